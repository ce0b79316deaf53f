"""The folds of a cross-validation on the public BrixIA pictures, put together: held-out predictions, and maps' scores.

    COMMON="dataset=brixia dataset.root=ROOT dataset.subset=cohen dataset.patients=metadata.csv dataset.fold=0,1,2,3,4"
    ibxai train -m $COMMON backbone=efficientnet_lite0 backbone.weights=packaged learns=head ...
    ibxai run -m $COMMON backbone=efficientnet_lite0 method=gradcam,iba,random metric=[pearson] ...
    python scripts/cohen_folds.py ROOT OUTPUTS

Every picture is in the test split of one fold, so that its prediction comes from a network that has not seen its
patient. Beside the network stand the junior reader, and the mean of the other folds' pictures, which knows nothing of
the picture. Intervals resample patients.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ibxai.backbones.performance import performance
from ibxai.datasets.brixia import COHEN, cohen_rows
from ibxai.report.statistics import mean_intervals
from ibxai.store import RunStore, find_runs

MEASURES = ("pearson", "spearman", "mae")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="dataset.root of the runs")
    parser.add_argument("outputs", type=Path, help="outputs of the runs, of one network and nothing else")
    options = parser.parse_args()
    readers = {name: scores_of(options.root, name) for name in ("senior", "junior")}
    runs = find_runs(options.outputs)
    said, groups, floor = held_out(runs, readers["senior"])
    names = sorted(said)
    print(f"{len(names)} pictures of {len(set(groups.values()))} patients\n")
    told: Mapping[str, Mapping[str, float]] = {"network": said, "junior reader": readers["junior"], "mean": floor}
    print_row("", MEASURES)
    for who, values in told.items():
        right, given = (np.array([[of[name]] for name in names]) for of in (readers["senior"], values))
        found = {s.metric: s for s in performance(given, right, [groups[n] for n in names], ["score"], "values")}
        # the mean differs between folds alone, which correlates it with what it leaves out
        shown = ["mae"] if values is floor else MEASURES
        print_row(who, [interval(found[m].value, found[m].low, found[m].high) if m in shown else "" for m in MEASURES])
    print()
    for line in judged(runs):
        print_row(*line)


def scores_of(root: Path, reader: str) -> dict[str, float]:
    """File name -> global score of a reader."""
    path = next(folder / COHEN for folder in (root / "data", root) if (folder / COHEN).is_file())
    return {name: float(sum(row.scores)) for name, row in cohen_rows(path, reader).items()}  # type: ignore[arg-type]


def held_out(
    runs: Sequence[RunStore], senior: Mapping[str, float]
) -> tuple[dict[str, float], dict[str, str], dict[str, float]]:
    """(prediction, patient, mean score of all pictures of other folds) of every picture that a run has a map of."""
    said, groups, floor = {}, {}, {}
    known = {row.sample_id for store in runs for row in store.rows()}
    for store in runs:
        own = {row.sample_id for row in store.rows()}
        mean = float(np.mean([senior[name] for name in known - own]))
        for row in store.rows():
            if row.row_id in store.finished([row.row_id]):
                said[row.sample_id] = store.read_heatmap(row.row_id).target_value
                groups[row.sample_id], floor[row.sample_id] = row.group_id, mean
    return said, groups, floor


def judged(runs: Sequence[RunStore]) -> list[tuple[str, list[str]]]:
    """Of every method and metric: mean with interval and n, over the pictures of all folds."""
    found: dict[tuple[str, str], dict[str, tuple[float, str]]] = {}
    for store in runs:
        groups = {row.row_id: row.group_id for row in store.rows()}
        for metric in store.metrics():
            for row_id, values in store.read_scores(metric).items():
                value = float(values["auc" if "auc" in values else "value"])
                if np.isfinite(value):
                    method = store.path.parent.name
                    found.setdefault((method, metric.name), {})[row_id] = (value, groups[row_id])
    lines = []
    for (method, metric_name), rows in sorted(found.items()):
        values = np.array([[value] for value, _ in rows.values()])
        low, high = mean_intervals(values, [group for _, group in rows.values()])
        cells = [metric_name, interval(values.mean(), low[0], high[0]), f"n = {len(rows)}"]
        lines.append((method, cells))
    return lines


def interval(value: float, low: float, high: float) -> str:
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def print_row(first: str, cells: Sequence[str]) -> None:
    print(f"{first:14}" + "".join(f"{cell:>26}" for cell in cells))


if __name__ == "__main__":
    main()
