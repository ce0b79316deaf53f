"""What `ibxai report` puts right in the run folders before it compares them.

A run whose last process was killed between its last row and its page has all that was asked for, and nobody who says
so: it gets its end, tables and page. A heatmap that was damaged on the disk is found by its checksum, when it is asked
to look, and removed: a row without a heatmap is what a run makes.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ibxai.report.page import write_report
from ibxai.report.runs import UNREADABLE
from ibxai.sessions import now, summed
from ibxai.store import RunStore, find_runs


def finish_runs(outputs: Path) -> list[Path]:
    """End every run below a folder that is complete and was not ended; their pages. Unreadable ones are left alone."""
    pages = []
    for store in find_runs(outputs):
        with suppress(*UNREADABLE):
            told = store.provenance()
            if not told["finished"] and _is_complete(store, told["wanted"]):
                store.write_provenance({**told, **summed(store.sessions()), "finished": now()})
                pages.append(write_report(store))
    return pages


def _is_complete(store: RunStore, wanted: Mapping[str, Any]) -> bool:
    """Whether a run has all rows, scores and cells that its last command asked for. Samples that could not be used are
    not waited for. wanted: as `pipeline._wanted` has written it.
    """
    rows, given_up = store.rows(), store.skipped()
    samples = list(dict.fromkeys(row.sample_id for row in rows))[: wanted["limit"]]
    asked = {row.row_id for row in rows if row.sample_id in set(samples) - given_up.keys()}
    scores = [key for key in store.metrics() if key.folder in wanted["scores"]]
    return (
        store.finished(asked) == asked
        and len(scores) == len(wanted["scores"])
        and all(asked <= store.read_scores(key).keys() for key in scores)
        and (wanted["study"] is None or (store.path / "studies" / wanted["study"] / "finished.json").exists())
    )


def remove_damaged(outputs: Path) -> list[str]:
    """Read every heatmap below a folder and remove the damaged ones; what is wrong with each of them."""
    reasons = []
    for store in find_runs(outputs):
        with suppress(*UNREADABLE):
            reasons += store.remove_damaged_heatmaps()
    return reasons
