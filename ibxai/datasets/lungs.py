"""Where the lungs are: by a threshold in a CT, and BrixIA's six regions in an X-ray with a lung mask.

In a CT, lung is what is thinner than -320 HU and not the air around the patient: of the pieces that touch no slice's
border, the largest, and all of at least a twentieth of it (a second lung, and what dense lesions cut off; less is gas
in the bowel). Vessels and lesions inside are taken in by closing each slice and filling its holes. Where a lesion as
dense as muscle lies at the lung's border the mask falls short, as with every threshold.
"""

from __future__ import annotations

import functools
from itertools import pairwise
from pathlib import Path

import numpy as np
from scipy import ndimage
from skimage import morphology

from ibxai.datasets.nifti import read_volume
from ibxai.errors import BadSample

AIR_AND_LUNG = -320.0  # HU; half way between lung (-700 ...) and soft tissue, as common segmentation rules have it
_SMALLEST_PIECE = 0.05  # of the largest one
_SECOND_LUNG = 0.1  # of the first one, in a mask of an X-ray
_CLOSING = 8  # pixels of a 512 x 512 slice, 4 to 9 mm: the width of the vessels at the hilum
REGIONS = "ABCDEF"


@functools.lru_cache(maxsize=2)
def lung_pieces(path: Path) -> np.ndarray:
    """bool [slices, H, W], read-only: the pieces of the volume in this file that are lung, vessels left out."""
    pieces = threshold_lungs(read_volume(path))
    pieces.flags.writeable = False
    return pieces


def threshold_lungs(volume: np.ndarray) -> np.ndarray:
    """bool [slices, H, W] of a CT in Hounsfield units [slices, H, W]."""
    thin, _ = ndimage.label(volume < AIR_AND_LUNG)
    sides = (thin[:, 0], thin[:, -1], thin[:, :, 0], thin[:, :, -1])
    sizes = np.bincount(thin.ravel())
    sizes[[0, *(int(piece) for side in sides for piece in np.unique(side))]] = 0
    kept = (sizes > 0) & (sizes >= _SMALLEST_PIECE * sizes.max())
    return kept[thin]


def closed_slice(pieces: np.ndarray) -> np.ndarray:
    """bool [H, W]: a slice of `threshold_lungs` with its vessels and lesions, as far as lung surrounds them."""
    radius = max(round(_CLOSING * pieces.shape[-1] / 512), 1)
    padded = np.pad(pieces, radius)  # or the border would count as lung
    closed = ndimage.binary_fill_holes(morphology.isotropic_closing(padded, radius))
    return closed[radius:-radius, radius:-radius]


def six_regions(mask: np.ndarray) -> np.ndarray:
    """bool [6, H, W], BrixIA's A to F, of a lung mask [H, W]: each lung in three parts of equal height.

    A, B, C are the patient's right lung from top to bottom, on the left of the picture, and D, E, F the left one.
    Borghesi and Maroldi (Radiologia Medica 2020) part the lungs at the aortic arch and the right inferior pulmonary
    vein, which a mask does not show. Raises BadSample when the mask has no lung on one of the sides.
    """
    parts = np.zeros((6, *mask.shape), dtype=bool)
    for side, lung in enumerate(_two_lungs(mask)):
        rows = np.flatnonzero(lung.any(1))
        edges = np.rint(np.linspace(rows[0], rows[-1] + 1, 4)).astype(int)
        for part, (top, bottom) in enumerate(pairwise(edges)):
            parts[3 * side + part, top:bottom] = lung[top:bottom]
    return parts


def _two_lungs(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lung on the left of the picture, and the one on its right.

    Two large pieces with other pieces going to the nearer of them; where the lungs hang together, the column of the
    middle third with the least lung parts them.
    """
    pieces, count = ndimage.label(mask)
    if not count:
        raise BadSample("its lung mask is empty")
    sizes = np.bincount(pieces.ravel())[1:]
    centres = np.array([x for _, x in ndimage.center_of_mass(mask, pieces, range(1, count + 1))])
    largest = np.argsort(sizes)[::-1][:2]
    if len(largest) == 2 and sizes[largest[1]] >= _SECOND_LUNG * sizes[largest[0]]:
        left, right = sorted(centres[largest])
        on_left = np.abs(centres - left) <= np.abs(centres - right)
        lungs = np.isin(pieces, 1 + np.flatnonzero(on_left)), np.isin(pieces, 1 + np.flatnonzero(~on_left))
    else:
        columns = np.flatnonzero(mask.any(0))
        third = (columns[-1] + 1 - columns[0]) // 3
        middle = columns[0] + third + int(mask[:, columns[0] + third : columns[-1] + 1 - third].sum(0).argmin())
        lungs = mask & (np.arange(mask.shape[1]) < middle), mask & (np.arange(mask.shape[1]) >= middle)
    if not (lungs[0].any() and lungs[1].any()):
        raise BadSample("its lung mask shows one lung alone")
    return lungs
