"""Make docs/first-picture.png from finished runs: photographs, and where two methods find the evidence.

ibxai run -m method=iba,gradcam && python scripts/readme_picture.py outputs
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt

from ibxai.report.figures import overlay
from ibxai.store import find_runs

SHOWN = ("coffee@predicted", "camera@predicted", "chelsea@predicted", "china@predicted")
METHODS = {"iba": "IBA", "gradcam": "Grad-CAM"}


def main(outputs: str) -> None:
    runs = {store.path.parent.name: store for store in find_runs(Path(outputs)) if store.path.parts[-4] == "sample"}
    figure, axes = plt.subplots(1 + len(METHODS), len(SHOWN), figsize=(9.6, 7.6), layout="constrained")
    names = runs["iba"].class_names()
    for column, row_id in enumerate(SHOWN):
        stored, picture = runs["iba"].read_heatmap(row_id), runs["iba"].read_picture(row_id)
        label = names[stored.target] if names else str(stored.target)
        axes[0, column].set_title(f"{label}, {stored.target_probability:.0%}", fontsize=11)
        axes[0, column].imshow(picture)
        for row, method in enumerate(METHODS, start=1):
            axes[row, column].imshow(overlay(picture, runs[method].read_heatmap(row_id).heatmap))
    for axis, label in zip(axes[:, 0], ("picture", *METHODS.values()), strict=True):
        axis.set_ylabel(label, fontsize=11)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    figure.savefig(Path(__file__).parent.parent / "docs/first-picture.png", dpi=100)


if __name__ == "__main__":
    main(*sys.argv[1:])
