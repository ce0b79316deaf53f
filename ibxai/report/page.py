"""A run's page: what was run, how good it is and how sure that is, what it looks like, how to run it again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ibxai.report.cards import make_cards
from ibxai.report.curves import curve_sets, write_all_tables
from ibxai.report.render import count, render
from ibxai.report.statistics import FEW_GROUPS
from ibxai.report.studies import study_sections
from ibxai.report.tables import MetricScores, differing_settings, method_name, read_run_scores
from ibxai.store import Row, RunStore, write_atomically

_MOST_SKIPPED_LISTED = 200


def write_report(store: RunStore) -> Path:
    """Make the CSV tables, overlays/*.png and report.html of a run, finished or not; the page.

    Reads all score files, and the heatmaps of the shown rows alone. Raises UserError when the folder refuses.
    """
    rows, scores = store.rows(), read_run_scores(store)
    summary, means = write_all_tables(store, scores)
    curves = curve_sets(scores, means)
    context = {
        **_what_was_run(store),
        **_how_much(store, rows, scores),
        "summary": _summary_lines(summary, scores),
        "few_groups": FEW_GROUPS,
        "mean_charts": [curve_set.mean_chart() for curve_set in curves],
        "studies": study_sections(store),
        "cards": make_cards(store, scores, curves),
    }
    page = store.path / "report.html"
    write_atomically(page, render("run.html", context))
    return page


def _what_was_run(store: RunStore) -> dict[str, Any]:
    """From provenance.json; whatever it lacks is left off the page."""
    told = store.provenance()
    folder = store.path.resolve()
    weights = str(told.get("weights") or "")
    return {
        "dataset": str(told.get("dataset") or folder.parents[2].name),
        "backbone": str(told.get("backbone") or folder.parents[1].name),
        "method": method_name(store),
        "run_id": folder.name,
        "weights": weights,
        "random_weights": "random" in weights.lower(),
        "notes": [str(note) for note in told.get("notes") or []],
        "reference": str(told.get("reference") or ""),
        "command": str(told.get("command") or ""),
        "device": str(told.get("device") or ""),
        "started": told.get("started"),
        "finished": told.get("finished"),
        "seconds": told.get("seconds"),
        "passes": dict(told.get("passes") or {}),
        "versions": dict(told.get("versions") or {}),
        "identity": json.dumps(told.get("identity") or {}, indent=2, ensure_ascii=False),
        "config": store.config(),
    }


def _how_much(store: RunStore, rows: Sequence[Row], scores: Sequence[MetricScores]) -> dict[str, Any]:
    """How much of the dataset this page speaks of."""
    finished = store.finished(row.row_id for row in rows)
    skipped = store.skipped()
    partly = [metric for metric in scores if len(metric.rows) < len(finished)]
    return {
        "rows": len(rows),
        "heatmaps": len(finished),
        "samples": len({row.sample_id for row in rows}),
        "partly_scored": [f"{m.label}: {count(len(m.rows))} of {count(len(finished), 'row')}" for m in partly],
        "skipped": list(skipped.items())[:_MOST_SKIPPED_LISTED],
        "skipped_total": len(skipped),
    }


def _summary_lines(summary: pd.DataFrame, scores: Sequence[MetricScores]) -> list[dict[str, Any]]:
    """The summary's lines for the page, each with what tells its metric from another setting of the same one."""
    variants = differing_settings(metric.key for metric in scores)
    labelled = {metric.value_label(name): (metric, name) for metric in scores for name in metric.values}
    lines = []
    for line in summary.to_dict("records"):
        metric, name = labelled[line["metric"]]
        extra = {"variant": variants.get(metric.key.folder, ""), "is_auc": name == "auc"}
        lines.append({str(key): value for key, value in line.items()} | extra)
    return lines
