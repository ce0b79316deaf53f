"""`ibxai data check`: is a dataset where its settings say, is all of it there, and can its files be read?

The answer is short: what was found and what is missing, splits, classes, sizes, and the first files with a problem.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from tqdm import tqdm

from ibxai.catalogue import defaults, entries, hints
from ibxai.config import build, resolved, unset
from ibxai.datasets.splits import order
from ibxai.errors import BadSample, UserError
from ibxai.overrides import check, explained
from ibxai.tokenisation import words
from ibxai.types import Dataset, Picture, Sample

OK, PROBLEMS = 0, 3
_PROBLEMS_SHOWN = 10
_CLASSES_SHOWN = 12
_SIZES_SHOWN = 5


def check_dataset(overrides: Sequence[str], read: int | None, config_dir: Path | None = None) -> int:
    """Print what was found; 3 when files cannot be used, else 0. Raises UserError when the layout is not there.

    overrides: "dataset=NAME" and its settings, as for a run. read: how many samples are decoded, chosen by a hash of
    their ids, None for all.
    """
    dataset = dataset_of(overrides, config_dir)
    samples = {sample.sample_id: sample for _, split in _splits(dataset) for sample in split}
    print(dataset.name)
    for what, text in _described(dataset, list(samples.values())):
        _print(what, text)
    chosen = sorted(samples.values(), key=lambda sample: order("check", sample.sample_id))[:read]
    # in the order of their files, since the slices of a volume share its unpacking
    sizes, problems = _read(dataset, sorted(chosen, key=lambda sample: sample.sample_id))
    _print("read", f"{len(chosen):,} of {len(samples):,} samples, {len(problems):,} with a problem")
    common = ", ".join(f"{w} x {h} ({count:,})" for (w, h), count in sizes.most_common(_SIZES_SHOWN))
    if sizes:  # texts have none
        _print("pixels", common + (f", {len(sizes) - _SIZES_SHOWN:,} other sizes" if len(sizes) > _SIZES_SHOWN else ""))
    for sample, reason in problems[:_PROBLEMS_SHOWN]:
        _print("problem", f"{sample.source}: {reason}")
    if len(problems) > _PROBLEMS_SHOWN:
        _print("problem", f"... and {len(problems) - _PROBLEMS_SHOWN:,} more")
    return PROBLEMS if problems else OK


def _print(what: str, text: str) -> None:
    print(f"  {what:12} {text or 'none'}", flush=True)


def dataset_of(overrides: Sequence[str], config_dir: Path | None) -> Dataset:
    """The dataset that the overrides describe. Raises UserError."""
    foreign = [text for text in overrides if not text.startswith("dataset")]
    if foreign:
        raise UserError(f"{foreign[0]}: only dataset=NAME and dataset.setting=value are of use here.")
    check(overrides, multirun=False)
    search = [f"hydra.searchpath=[file://{config_dir.resolve()}]"] if config_dir else []
    known = entries(config_dir)
    try:
        with initialize_config_module("ibxai.conf", version_base="1.3"):
            settings: dict[str, Any] = resolved(compose("run", [*overrides, *search]))["dataset"]
    except Exception as error:
        explanation = explained(error, known)
        if explanation is None:
            raise
        raise explanation from error
    names = [text.partition("=")[2] for text in overrides if text.startswith("dataset=")] or defaults()["dataset"]
    meanings = hints(known, {"dataset": names[-1]})
    for key in unset(settings, "dataset."):
        raise UserError(f"{key} is not set: give {key}=..." + (f", {meanings[key]}" if key in meanings else ""))
    return build(settings, "dataset")


def _splits(dataset: Any) -> Iterator[tuple[str, Sequence[Sample]]]:
    if hasattr(dataset, "in_split"):
        yield from ((name, dataset.in_split(name)) for name in ("train", "test"))
    else:
        yield "all", dataset.samples()


def _described(dataset: Any, samples: Sequence[Sample]) -> Iterator[tuple[str, str]]:
    """(what, text): the dataset's own facts, then what all datasets have."""
    yield from dataset.facts() if hasattr(dataset, "facts") else ()
    files = {sample.source: sample.size for sample in samples}
    yield "files", f"{len(files):,}, {sum(files.values()) / 1e6:,.1f} MB"
    for name, split in _splits(dataset):
        groups = len({sample.group_id for sample in split})
        yield f"split {name}", f"{len(split):,} samples" + (f" of {groups:,} groups" if groups < len(split) else "")
    names = dataset.class_names
    if samples and samples[0].values:
        kinds = {value for sample in samples for value in sample.values}
        for place, name in enumerate(names or ()):
            values = [sample.values[place] for sample in samples]
            if kinds <= {0.0, 1.0}:
                yield "label", f"{name}: {sum(values):,.0f} of {len(values):,}"
            else:
                yield "value", f"{name}: {min(values):g} to {max(values):g}, mean {sum(values) / len(values):.2f}"
        return
    counts = Counter(sample.label for sample in samples)
    shown = [f"{_name(label, names)} {count:,}" for label, count in counts.most_common(_CLASSES_SHOWN)]
    more = f", {len(counts) - len(shown):,} other classes" if len(counts) > len(shown) else ""
    yield "classes", ", ".join(shown) + more


def _name(label: int | None, names: Sequence[str] | None) -> str:
    if label is None:
        return "(no label)"
    return names[label] if names else str(label)


def _read(dataset: Dataset, samples: Sequence[Sample]) -> tuple[Counter[tuple[int, int]], list[tuple[Sample, str]]]:
    """The sizes of the pictures, and the samples that cannot be used, with the reason."""
    sizes: Counter[tuple[int, int]] = Counter()
    problems: list[tuple[Sample, str]] = []
    for sample in tqdm(samples, unit="sample", desc="reading", disable=None, leave=False):
        try:
            content = dataset.read(sample)
            if isinstance(content, Picture):
                sizes[content.image.size] += 1
            elif not words(content.text):
                problems.append((sample, "the text holds no word"))
        except BadSample as error:
            problems.append((sample, str(error)))
        except Exception as error:  # as in a run: one file that nobody foresaw must not hide the others
            problems.append((sample, f"unexpected {type(error).__name__}: {error}"))
    return sizes, problems
