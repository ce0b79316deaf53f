"""The curves of a training, drawn."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from ibxai.store import write_atomically


def draw_curves(rows: Sequence[Mapping[str, float]], path: Path) -> None:
    """Training and validation loss by epoch, and where the validation loss is lowest: the weights that are kept."""
    epochs = [row["epoch"] for row in rows]
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.add_subplot(xlabel="epoch", ylabel="loss")
    for name in ("training_loss", "validation_loss"):
        axes.plot(epochs, [row[name] for row in rows], marker=".", label=name.replace("_", " "))
    best = min(rows, key=lambda row: row["validation_loss"])
    axes.axvline(best["epoch"], color="grey", linewidth=1, linestyle=":", label="kept")
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomically(path, buffer.getvalue())
