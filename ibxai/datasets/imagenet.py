"""ImageNet (ILSVRC 2012): photographs of 1,000 classes, with the official bounding boxes where they are there.

Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge", IJCV 2015. Pictures and labels are found in
any of the usual layouts (`imagenet_layout.py`); boxes become the region "target" (`imagenet_boxes.py`).
"""

from __future__ import annotations

import hashlib
import heapq
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ibxai.datasets.imagenet_boxes import box_planes
from ibxai.datasets.imagenet_classes import class_names, wnids
from ibxai.datasets.imagenet_layout import Layout, find_layout
from ibxai.datasets.pictures import read_picture
from ibxai.errors import UserError
from ibxai.types import Picture, Sample

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageNet:
    """The pictures of ILSVRC 2012 under `root`, labelled 0 to 999 in the order of their WordNet ids.

    root: a folder in one of the layouts of `imagenet_layout.py`.
    boxes: folder of XML annotations or a LOC_val_solution.csv; None looks for them beside the pictures.
    reference_size: the number of pictures that feature statistics are estimated on.
    reference_root: another folder, of the same layouts, that they are drawn from; None draws them from `root`.
    """

    root: str
    name: str = "imagenet"
    boxes: str | None = None
    reference_size: int = 1000
    reference_root: str | None = None

    @property
    def class_names(self) -> Sequence[str]:
        return class_names()

    @property
    def reference_note(self) -> str:
        """One sentence for the log and the report. Reads the folders, as `reference` does."""
        if self.reference_root is not None:
            whence = f"of the {len(self._reference_pool)} under {self.reference_root}"
        else:
            whence = (
                f"of the {len(self._reference_pool)} of this dataset: the pictures that are explained are among them"
            )
        return f"The reference split is {len(self.reference())} pictures, chosen by a hash of their ids, {whence}."

    def samples(self) -> Sequence[Sample]:
        """All the pictures, sorted by id. An id is the file's stem, or its path below the root where stems repeat.

        Pictures are not opened. Raises `UserError` when the layout is not there.
        """
        return self._layout.samples

    def reference(self) -> Sequence[Sample]:
        """`reference_size` pictures, or all when there are fewer, sorted by id.

        The hash makes the choice the same on every machine and nearly the same when pictures are added.
        """
        return self._reference

    def read(self, sample: Sample) -> Picture:
        """The picture, with "target" [R, H, W] when boxes of its class are annotated. Raises `BadSample`, also for an
        annotation that is there but unreadable: without it the picture would silently count as not annotated.
        """
        image = read_picture(sample.source)
        annotations = self._layout.annotations
        annotation = None if annotations is None else annotations.of(sample.source.stem)
        if annotation is None or sample.label is None:
            return Picture(image)
        planes = box_planes(annotation, wnids()[sample.label], image.width, image.height)
        return Picture(image) if planes is None else Picture(image, {"target": planes})

    def annotations(self) -> str:
        """A digest of the boxes of all pictures as they are written down, 64 hex digits; "" without boxes."""
        found = self._layout.annotations
        return "" if found is None else found.digest(sample.source.stem for sample in self.samples())

    @cached_property
    def _layout(self) -> Layout:
        layout = find_layout(self.root, self.boxes)
        log.info("ImageNet: %s", layout.description)
        return layout

    @cached_property
    def _reference_pool(self) -> Sequence[Sample]:
        if self.reference_root is None:
            return self.samples()
        return find_layout(self.reference_root, None).samples

    @cached_property
    def _reference(self) -> Sequence[Sample]:
        if self.reference_size < 1:
            raise UserError(f"ImageNet: dataset.reference_size is {self.reference_size}: give 1 or more pictures.")
        chosen = heapq.nsmallest(self.reference_size, self._reference_pool, key=_draw)
        return tuple(sorted(chosen, key=lambda sample: sample.sample_id))


def _draw(sample: Sample) -> bytes:
    return hashlib.sha256(sample.sample_id.encode("utf-8", "surrogateescape")).digest()
