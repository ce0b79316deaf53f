"""What may happen to a run from outside: signals, disks, no network, no memory, damaged files.

More of the kind: test_resume.py (kills), test_store.py (writes), test_bad_input.py (pictures, a full disk), and
scripts/kill_and_resume.py, scripts/random_command_lines.py, scripts/broken_files.py for what takes minutes.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import test_pipeline
from test_pipeline import ALL_ROWS, heatmaps_of, pictures, plan  # noqa: F401  (fixtures)
from test_resume import IBXAI, folder_of, made, start, stop_when, tiny  # noqa: F401

from ibxai import jobs
from ibxai.cli import main
from ibxai.pipeline import Plan, run

HERE = Path(__file__).parent


# SIGTERM: what a cluster sends when time is up


def test_sigterm_says_so_exits_143_and_loses_nothing(tiny: list[str], tmp_path: Path) -> None:  # noqa: F811
    outputs = tmp_path / "outputs"
    process = start(outputs, *tiny, "method.seconds=0.5")
    out, err = stop_when(process, signal.SIGTERM, made(outputs, "heatmaps/*.npz", 2))
    assert process.returncode == 143
    assert out == ""
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("ibxai: stopped by SIGTERM. The batch in flight is dropped")
    kept = heatmaps_of(folder_of(outputs)).keys()
    assert 2 <= len(kept) < 7
    assert not list(outputs.rglob("*.tmp"))


def test_sigterm_is_handled_as_before_afterwards(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left, jobs._stopped_by_sigterm():
        signal.raise_signal(signal.SIGTERM)
    assert left.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    done = []

    def work() -> None:
        with jobs._stopped_by_sigterm():
            done.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [1], "a thread gets no signals, and may run jobs all the same"


# disks and the network, made by Linux's namespaces


def in_namespace(*flags: str) -> list[str]:
    """What runs a command without a network or with mounts of its own; skips the test where that is not allowed."""
    command = ["unshare", "--map-root-user", *flags]
    if sys.platform != "linux" or shutil.which("unshare") is None:
        pytest.skip("namespaces are Linux's")
    tried = subprocess.run([*command, "sh", "-c", "true"], capture_output=True)
    if tried.returncode:
        pytest.skip("this machine does not allow namespaces")
    return command


def ibxai(prefix: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    return subprocess.run([*prefix, *arguments], capture_output=True, text=True, env=environment, timeout=200)


def test_without_a_network(tmp_path: Path) -> None:
    """The default pictures and the default network, which are inside wheels."""
    network = in_namespace("--net")
    settings = ["method=gradcam", "metric=[insertion]", "metric.insertion.step=0.5", "limit=1", f"outputs={tmp_path}"]
    done = ibxai(network, *IBXAI, "run", *settings)
    assert done.returncode == 0, done.stderr
    assert "1 row: 1 heatmap and 1 score made" in done.stdout


def test_a_disk_that_is_really_full_and_a_folder_that_is_really_read_only(
    tiny: list[str],  # noqa: F811
    tmp_path: Path,
) -> None:
    """A run on a disk of 64 kB, and then on the same one mounted read-only. Both times two lines, and no damage."""
    disk = tmp_path / "disk"
    disk.mkdir()
    run_it = " ".join([*IBXAI, "run", *tiny, f"outputs={disk}/outputs"])
    script = f"""
        mount -t tmpfs -o size=64k none {disk} || exit 99
        {run_it}; echo "full: $?"
        ls {disk}/outputs/*/*/*/*/heatmaps | wc -l
        mount -o remount,ro {disk}
        {run_it}; echo "read-only: $?"
        find {disk} -name '*.tmp' | wc -l
        mount -o remount,rw,size=16m {disk}
        {run_it}; echo "more room: $?"
    """
    done = ibxai(in_namespace("--mount"), "sh", "-c", textwrap.dedent(script))
    told = [line for line in done.stdout.splitlines() if line]
    assert "full: 2" in told, done.stderr
    kept = int(told[told.index("full: 2") + 1])
    assert kept < 7
    assert "read-only: 2" in told
    assert told[told.index("read-only: 2") + 1] == "0", "half-written files were left on the full disk"
    assert told[-1] == "more room: 0"
    assert (f"{kept} heatmap" in done.stdout) == (kept > 0)
    assert "No space left on device" in done.stderr
    assert "Read-only file system" in done.stderr
    assert "Traceback" not in done.stderr


# memory


OUT_OF_MEMORY = """
    import logging, resource, torch
    from networks import ROLES, batch_of, noise_pictures, relative, small_net
    from ibxai.backbones import freeze
    from ibxai.memory import with_backoff
    from ibxai.methods import IntegratedGradients
    logging.basicConfig(format="%(message)s")
    torch.set_num_threads(1)
    batch = batch_of(torch.nn.functional.interpolate(noise_pictures(2), size=(128, 128)), [0, 1])
    method = IntegratedGradients(steps=128)
    narrow, backbone = (freeze(small_net(0), (3, 128, 128), ROLES, max_passes=n) for n in (8, 1024))
    wanted = method.fit(narrow, [], 0)(batch).heatmap
    attribute = method.fit(backbone, [], 0)
    pages = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (pages + 300 * 2**20,) * 2)
    for _ in range(2):
        found = with_backoff(lambda: attribute(batch), backbone, "method", batch.inputs.shape[1:]).heatmap
    [passes] = backbone.rows_that_fit.values()
    frugal = with_backoff(lambda: (backbone(batch.inputs), backbone.max_passes)[1], backbone, "metric.frugal")
    print(passes, relative(found, wanted), frugal)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="address space limits are Linux's")
def test_a_method_under_a_real_limit_of_memory_gives_the_same_map() -> None:
    """256 rows at once do not fit into 300 MB; the process goes on with as many as do, each size tried once, also by
    the next batch. What needs little still runs all its rows at once.
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(OUT_OF_MEMORY)], cwd=HERE, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    passes, apart, frugal = done.stdout.split()
    assert 1 <= int(passes) <= 128, "the limit was not felt"
    tried = [int(line.rpartition("=")[2]) for line in done.stderr.splitlines() if "memory ran out" in line]
    assert tried == [1024 >> place for place in range(1, len(tried) + 1)], "halved, and never tried twice"
    assert tried[-1] == int(passes)
    assert float(apart) < 1e-4
    assert frugal == "1024"


# files that others have damaged


def test_a_heatmap_cut_short_is_found_although_its_scores_are_complete(plan: Plan) -> None:  # noqa: F811
    first = run(plan)
    whole = heatmaps_of(first.folder)
    path = first.folder / "heatmaps" / "d@predicted.npz"
    path.write_bytes(path.read_bytes()[:-40])
    test_pipeline.EXPLAINED.clear()
    again = run(plan)
    assert test_pipeline.EXPLAINED == ["d"]
    assert (again.new_heatmaps, again.new_scores) == (1, 1)
    assert "cut short" in (again.folder / "run.log").read_text()
    assert "d@predicted.npz" in again.report.read_text(), "a reader of the page is told"
    assert heatmaps_of(again.folder)["d@predicted"].tobytes() == whole["d@predicted"].tobytes()
    assert heatmaps_of(again.folder).keys() == set(ALL_ROWS)


def test_a_byte_changed_inside_a_heatmap_is_found_by_a_report_that_verifies(
    plan: Plan,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = run(plan)
    whole, path = heatmaps_of(first.folder), first.folder / "heatmaps" / "d@predicted.npz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert run(plan).new_heatmaps == 0, "a run does not look inside finished heatmaps"
    assert main(["report", str(plan.outputs)]) == 0
    assert "damaged" not in capsys.readouterr().out
    assert main(["report", str(plan.outputs), "--verify"]) == 3
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("damaged, removed: ")]
    assert str(path) in line
    again = run(plan)
    assert (again.new_heatmaps, again.new_scores) == (1, 1)
    assert heatmaps_of(again.folder)["d@predicted"].tobytes() == whole["d@predicted"].tobytes()
    assert main(["report", str(plan.outputs), "--verify"]) == 0


def test_a_score_file_cut_short_is_made_again_by_the_shard_that_needs_it(plan: Plan) -> None:  # noqa: F811
    from ibxai.shards import Shard

    first = run(plan)
    for path in (first.folder / "scores").glob("*/*.npz"):
        path.write_bytes(path.read_bytes()[:-40])
    one = run(replace(plan, shard=Shard(1, 2)))
    assert (one.new_heatmaps, one.new_scores, one.missing) == (0, 4, 3)
    other = run(replace(plan, shard=Shard(2, 2)))
    assert (other.new_heatmaps, other.new_scores, other.missing) == (0, 3, 0)
