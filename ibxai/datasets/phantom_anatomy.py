"""A made chest in three dimensions, from which both phantoms are taken: slices of it are a CT, its shadow an X-ray.

Coordinates are millimetres: x to the patient's left, y to the back, z to the head; z = 0 is the floor of the lungs
beside the heart. Organs are closed forms painted one over the other in Hounsfield units (a chest wall with periodic
ribs, two lungs over the domes of the diaphragm, heart, great vessels, airways, spine), bent by a smooth random field;
vessels are trees that grow from each hilum, thick where many branches meet (Murray's law, radius ~ branches ** 1/3).

Lesions are exact by construction. Each is a ball r around c, and p belongs to the disease where

    f(p) = max_b (1 - |p - c_b| / r_b) + roughness(p) > t,      t = the level that the asked share of the lungs exceeds

so the affected share of the lungs, from which MosMedData's category follows, is chosen and not met by chance.

It is no model of any patient, and nothing learnt from it says anything about real pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from ibxai.draws import normal, sample_keys, uniform

AIR, FAT, MUSCLE, LUNG, BLOOD = -1000.0, -100.0, 45.0, -860.0, 40.0  # HU
FLOOR, CEILING = -75.0, 310.0  # mm: from the liver to the neck
COARSE = 7.0  # mm: the grid on which places and shares are found
_EDGE = 0.4  # of f: how far inside its rim a lesion reaches its full density
_BRANCHES = 300  # vessels that reach the periphery of each lung
_WAVES = 16

# what a lesion may be: (HU at its rim, HU at its core)
KINDS = {"ground glass": (-720.0, -480.0), "consolidation": (-560.0, -30.0), "nodule": (-100.0, 40.0)}


@dataclass(frozen=True)
class Lesion:
    """A ball of disease, in millimetres. kind: of `KINDS`."""

    kind: str
    centre: tuple[float, float, float]
    radius: float


@dataclass(frozen=True)
class Block:
    """Voxels [Z, Y, X] at the asked coordinates. hu: float32. lungs: bool, lesions, vessels and fluid included.
    kinds: uint8, 0 where nothing is ill, else the place of the lesion's kind in `KINDS` from 1. fluid: bool.
    heart: bool.
    """

    hu: np.ndarray
    lungs: np.ndarray
    kinds: np.ndarray
    fluid: np.ndarray
    heart: np.ndarray


def shares(seed: int, name: str, purpose: str, count: int) -> np.ndarray:
    """float64 [count] in (0, 1): the draws of a patient or study for a purpose."""
    return uniform(sample_keys(seed, [name], purpose), 0, (count,))[0].double().numpy()


@dataclass(frozen=True)
class Waves:
    """A smooth random field of mean 0 and deviation 1: a sum of plane waves, so that any grid may ask for it."""

    numbers: np.ndarray  # [W, 3], radians a millimetre
    phases: np.ndarray

    @classmethod
    def drawn(cls, seed: int, name: str, purpose: str, length: float) -> Waves:
        """length: mm, of the typical wave."""
        directions = normal(sample_keys(seed, [name], purpose), 0, (_WAVES, 3))[0].double().numpy()
        phases = shares(seed, name, f"{purpose} phases", _WAVES) * 2 * np.pi
        return cls(directions * (2 * np.pi / length / np.sqrt(3)), phases)

    def __call__(self, z: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """float32 [Z, Y, X]. A wave is a product over the axes, so the sum of all is one product of matrices."""
        zy = np.exp(1j * (self.numbers[:, 0, None, None] * z[:, None] + self.numbers[:, 1, None, None] * y))
        along = np.exp(1j * (self.numbers[:, 2, None] * x + self.phases[:, None])) * np.sqrt(2 / _WAVES)
        rows = zy.reshape(_WAVES, -1)
        left = np.concatenate([rows.real, -rows.imag]).T.astype(np.float32)
        right = np.concatenate([along.real, along.imag]).astype(np.float32)
        return (left @ right).reshape(len(z), len(y), len(x))


@dataclass(frozen=True)
class Body:
    """A patient. Lengths in mm. lesions, level: the disease (see the module). fluid: how high an effusion stands in the
    right lung over the floor, None for none.

    width, depth: of the cage's ellipse, half axes. height: of the lungs. wall: its muscle, fat: over it. heart: scale.
    """

    seed: int
    name: str
    width: float
    depth: float
    height: float
    wall: float
    fat: float
    heart: float
    breasts: float
    tilt: float
    ribs: float
    lesions: tuple[Lesion, ...] = ()
    level: float = 0.0
    fluid: float | None = None
    wobble: Waves = field(init=False, compare=False, repr=False)
    rough: Waves = field(init=False, compare=False, repr=False)
    mottle: Waves = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        for purpose, length in (("wobble", 90.0), ("rough", 30.0), ("mottle", 11.0)):
            object.__setattr__(self, purpose, Waves.drawn(self.seed, self.name, f"phantom {purpose}", length))

    @classmethod
    def drawn(cls, seed: int, name: str) -> Body:
        """The healthy patient of this name."""
        u = iter(shares(seed, name, "phantom body", 10))

        def between(low: float, high: float) -> float:
            return low + (high - low) * float(next(u))

        return cls(
            seed, name, between(122, 140), between(80, 96), between(205, 245), between(7, 12), between(6, 24),
            between(0.88, 1.06), max(between(-15, 35), 0.0), between(-0.03, 0.03), between(0, 24),
        )  # fmt: skip

    def block(self, z: np.ndarray, y: np.ndarray, x: np.ndarray) -> Block:
        """The voxels at these coordinates, float [Z], [Y], [X] in mm."""
        grid = _Grid(self, z, y, x)
        hu = np.full(grid.shape, AIR, np.float32)
        _paint_wall(grid, hu)
        heart = _paint_heart(grid, hu)
        lungs = _lungs(grid)
        hu[lungs] = (LUNG + 45 * grid.mottle + 0.5 * np.broadcast_to(grid.y, grid.shape))[lungs]
        kinds = self._paint_lesions(grid, hu, lungs)
        _paint_vessels(grid, hu, lungs, self.vessels)
        fluid = np.zeros_like(lungs)
        if self.fluid is not None:
            meniscus = self.fluid + 0.006 * np.maximum(np.abs(grid.x) - 30, 0) ** 2 * (np.abs(grid.x) > 30)
            fluid = lungs & (grid.x < 0) & (grid.z < meniscus)
            hu[fluid] = 8
        _paint_airways(grid, hu)
        _paint_bones(grid, hu)
        return Block(hu, lungs, kinds, fluid, heart)

    def _paint_lesions(self, grid: _Grid, hu: np.ndarray, lungs: np.ndarray) -> np.ndarray:
        kinds = np.zeros(grid.shape, np.uint8)
        if not self.lesions:
            return kinds
        f, owner = self._disease(grid)
        ill = lungs & (f > self.level)
        rims, cores = np.array(list(KINDS.values()), dtype=np.float32).T
        kind = np.array([list(KINDS).index(lesion.kind) for lesion in self.lesions])[owner[ill]]
        depth = np.clip((f[ill] - self.level) / _EDGE, 0, 1)
        hu[ill] = np.maximum(hu[ill], rims[kind] + (cores - rims)[kind] * depth + 45 * grid.mottle[ill])
        kinds[ill] = kind + 1
        return kinds

    def _disease(self, grid: _Grid) -> tuple[np.ndarray, np.ndarray]:
        """f of the module [Z, Y, X], and the lesion that it is taken from."""
        best = np.full(grid.shape, -np.inf, np.float32)
        owner = np.zeros(grid.shape, np.uint8)
        for number, lesion in enumerate(self.lesions):
            value = 1 - np.sqrt(grid.ball(lesion.centre, (lesion.radius,) * 3))
            nearer = value > best
            best[nearer], owner[nearer] = value[nearer], number
        return best + 0.12 * self.rough(*grid.axes), owner

    @cached_property
    def _coarse(self) -> tuple[_Grid, np.ndarray]:
        """A coarse grid, and the lungs on it."""
        reach = self.width + 20
        grid = _Grid(self, *(np.arange(low, high, COARSE) for low, high in (
            (FLOOR, CEILING), (-reach, reach), (-reach, reach),
        )))  # fmt: skip
        return grid, _lungs(grid)

    @cached_property
    def places(self) -> np.ndarray:
        """float [N, 3]: points (x, y, z) evenly through the lungs."""
        grid, lungs = self._coarse
        z, y, x = (axis[index] for axis, index in zip(grid.axes, np.nonzero(lungs), strict=True))
        return np.stack([x, y, z], axis=1)

    def with_disease(self, lesions: Sequence[Lesion], share: float) -> Body:
        """The same patient with these lesions, grown until they fill this share of the lungs."""
        ill = replace(self, lesions=tuple(lesions))
        grid, lungs = self._coarse
        return replace(ill, level=float(np.quantile(ill._disease(grid)[0][lungs], 1 - share)))

    @cached_property
    def vessels(self) -> np.ndarray:
        """float [N, 8]: from (x, y, z) to (x, y, z), and the radius at both ends."""
        sides = [self.places[self.places[:, 0] * side > 0] for side in (-1, 1)]
        return np.concatenate([
            _grown(self.hilum(side), points, shares(self.seed, self.name, f"phantom vessels {side}", _BRANCHES))
            for side, points in zip((-1, 1), sides, strict=True)
        ])  # fmt: skip

    def hilum(self, side: int) -> np.ndarray:
        """Where vessels and airways enter the right (-1) or left (1) lung."""
        return np.array([32.0 * side, 0.05 * self.depth, 0.5 * self.height + 4 * side])


def _grown(root: np.ndarray, points: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """A tree of vessels: each drawn point joins the nearest one that is nearer to the root."""
    chosen = points[np.unique((draws * len(points)).astype(int))]
    # off the coarse grid, by less than half a step of it
    chosen = chosen + COARSE * 0.45 * np.sin(chosen[:, [1, 2, 0]] * 12.9898)
    nodes = np.concatenate([root[None], chosen])
    nodes = nodes[np.argsort(np.linalg.norm(nodes - root, axis=1), kind="stable")]
    parents = np.zeros(len(nodes), int)
    for number in range(1, len(nodes)):
        parents[number] = np.linalg.norm(nodes[:number] - nodes[number], axis=1).argmin()
    branches = np.ones(len(nodes))
    for number in range(len(nodes) - 1, 0, -1):
        branches[parents[number]] += branches[number]
    radii = 0.75 * branches ** (1 / 3)
    ends = np.arange(1, len(nodes))
    return np.concatenate(
        [
            nodes[parents[ends]],
            nodes[ends],
            np.minimum(radii[parents[ends]], 1.4 * radii[ends])[:, None],
            radii[ends, None],
        ],
        1,
    )


class _Grid:
    """Coordinates of voxels in the patient's frame, and the fields that several organs are cut from."""

    def __init__(self, body: Body, z: np.ndarray, y: np.ndarray, x: np.ndarray) -> None:
        self.body, self.axes = body, (z, y, x)
        self.shape = (len(z), len(y), len(x))
        z, y, x = (axis.astype(np.float32) for axis in (z, y, x))
        self.z, self.y = z[:, None, None], y[None, :, None]
        self.x = x[None, None, :] - np.float32(body.tilt) * (self.z - 100)
        over = np.clip((self.z / body.height - 0.35) / 0.66, 0, 1.2)
        narrow = np.sqrt(np.maximum(1 - 0.72 * over**2.4, 0.16))
        self.rx, self.ry = body.width * narrow, body.depth * (0.35 + 0.65 * narrow)
        self.wobble = 0.025 * body.wobble(*self.axes)
        self.cage = (self.x / self.rx) ** 2 + (self.y / self.ry) ** 2 + self.wobble

    @cached_property
    def mottle(self) -> np.ndarray:
        """The fine grain of all tissue, of deviation 1."""
        return self.body.mottle(*self.axes)

    def ball(self, centre: Sequence[float], radii: Sequence[float]) -> np.ndarray:
        """[Z, Y, X]: less than 1 inside an ellipsoid."""
        (cx, cy, cz), (rx, ry, rz) = centre, radii
        return ((self.x - cx) / rx) ** 2 + (((self.y - cy) / ry) ** 2 + ((self.z - cz) / rz) ** 2)

    def outline(self, a: np.ndarray, b: np.ndarray, power: float) -> np.ndarray:
        """[Z, Y, X]: less than 1 inside a superellipse whose half axes [Z, 1, 1] change along z."""
        return (np.abs(self.x) / a) ** power + (np.abs(self.y) / b) ** power

    def tube(self, start: ArrayLike, end: ArrayLike, r0: float, r1: float) -> tuple[tuple[slice, ...], np.ndarray]:
        """Where in the block a tube may lie, and how far inside it a voxel there is, in mm (outside: negative)."""
        p, q = np.asarray(start, np.float32), np.asarray(end, np.float32)
        far = max(r0, r1) + 3
        leaning = abs(self.body.tilt) * 210  # x is the patient's, and the axis the picture's
        box = tuple(
            slice(*np.searchsorted(axis, (min(p[at], q[at]) - margin, max(p[at], q[at]) + margin)))
            for axis, at, margin in zip(self.axes, (2, 1, 0), (far, far, far + leaning), strict=True)
        )
        x, y, z = self.x[box[0], :, box[2]] - p[0], self.y[:, box[1]] - p[1], self.z[box[0]] - p[2]
        along = q - p
        t = np.clip((x * along[0] + (y * along[1] + z * along[2])) / max(along @ along, 1e-6), 0, 1)
        off = (x - t * along[0]) ** 2 + (y - t * along[1]) ** 2 + (z - t * along[2]) ** 2
        return box, r0 + (r1 - r0) * t - np.sqrt(off)


def _paint_tube(
    grid: _Grid, hu: np.ndarray, start: ArrayLike, end: ArrayLike, r0: float, r1: float, value: float
) -> None:
    box, inside = grid.tube(start, end, r0, r1)
    hu[box][inside > 0] = value


def _paint_wall(grid: _Grid, hu: np.ndarray) -> None:
    """Skin and fat, muscle, and what lies under the diaphragm."""
    body = grid.body
    thick = body.wall + body.fat
    heights = np.array([FLOOR, 0.55 * body.height, 0.85 * body.height, body.height + 12, body.height + 35, CEILING])
    wide = np.array([body.width + thick, body.width + thick, body.width + thick + 14, 178, 100, 62])
    deep = np.array([body.depth + thick, body.depth + thick + 4, body.depth + thick, 92, 68, 60])
    a, b = (np.interp(grid.z, heights, table).astype(np.float32) for table in (wide, deep))
    outline = grid.outline(a, b, 2.3) + grid.wobble
    skin = outline < 1
    if body.breasts > 14:  # of fewer millimetres nothing would stand out
        for side in (-1, 1):
            skin |= grid.ball((78 * side, -body.depth - thick + 8, 0.33 * body.height), (58, body.breasts, 55)) < 1
    hu[skin] = FAT + 12 * grid.mottle[skin]
    muscle = (grid.outline(a - 0.8 * body.fat, b - 0.8 * body.fat, 2.3) + grid.wobble < 1) & (
        np.abs(grid.x) > body.width * (1.25 - np.clip((grid.z / body.height - 0.4) / 0.5, 0, 1) * 0.7)
    )
    muscle |= (grid.x / (grid.rx + body.wall)) ** 2 + (grid.y / (grid.ry + body.wall)) ** 2 + grid.wobble < 1
    for side in (-1, 1):  # along the spine, and before the ribs
        muscle |= grid.ball((34 * side, body.depth + 2, 100), (30, 17, 400)) < 1
        muscle |= grid.ball((72 * side, -0.93 * body.depth, 0.75 * body.height), (52, 17, 62)) < 1
    muscle |= (grid.z > body.height) & (outline < 0.75)
    hu[muscle & skin] = MUSCLE + 10 * grid.mottle[muscle & skin]
    inner = grid.cage < 0.96
    hu[inner] = (FAT + 75 + 15 * grid.mottle)[inner]  # what fills the mediastinum between the organs
    liver = inner & (grid.z < _domes(grid) - 3)
    hu[liver] = np.where(np.broadcast_to(grid.x < 18, grid.shape)[liver], 58, 42)
    gas = grid.ball((62, -0.25 * body.depth, _dome_height(body, 1) - 24), (34, 30, 13)) < 1
    hu[gas & liver] = AIR + 60


def _dome_height(body: Body, side: int) -> float:
    return (46.0 if side < 0 else 34.0) * body.height / 225


def _domes(grid: _Grid) -> np.ndarray:
    """[Z, Y, X]: the height of the diaphragm."""
    body = grid.body
    top = np.where(grid.x < 0, _dome_height(body, -1), _dome_height(body, 1))
    across = ((np.abs(grid.x) - 0.45 * body.width) / (0.6 * body.width)) ** 2
    return top - 75 * (across + ((grid.y + 0.15 * body.depth) / (0.95 * body.depth)) ** 2) ** 1.3


def _lungs(grid: _Grid) -> np.ndarray:
    """bool [Z, Y, X]"""
    body = grid.body
    lobe = (np.abs(np.abs(grid.x) - 0.49 * body.width) / (0.475 * body.width)) ** 2.6 + (
        (np.abs(grid.y - 3) / (0.97 * body.depth)) ** 2.6
        + (np.maximum(grid.z - 0.35 * body.height, 0) / (0.65 * body.height)) ** 2.2
    )
    lungs = (lobe + grid.wobble < 1) & (grid.cage < 0.9) & (grid.z > _domes(grid))
    if not lungs.any():
        return lungs
    vessels = (grid.x / (34 - 6 * grid.z / body.height)) ** 2 + ((grid.y + 8) / (0.52 * body.depth)) ** 2
    lungs &= (vessels > 1) | (grid.z < 0.3 * body.height)
    lungs &= (grid.x / 26) ** 2 + ((grid.y - 0.8 * body.depth) / 24) ** 2 > 1
    lungs &= np.abs(grid.x) > 4
    return lungs & (_heart_field(grid) > 1)


def _heart_field(grid: _Grid) -> np.ndarray:
    """Less than 1 inside the heart."""
    body, size = grid.body, grid.body.heart
    d, h = body.depth, body.height
    left = grid.ball((16 + 14 * size, -0.2 * d, 0.2 * h), (46 * size, 42 * size, 50 * size))
    right = grid.ball((-14, -0.15 * d, 0.26 * h), (32 * size, 38 * size, 42 * size))
    return np.minimum(left, right) + 1.5 * grid.wobble


def _paint_heart(grid: _Grid, hu: np.ndarray) -> np.ndarray:
    """The heart and the great vessels; returns the heart, bool."""
    body = grid.body
    d, h = body.depth, body.height
    field_ = _heart_field(grid)
    rim = field_ < 1.12
    hu[rim & (grid.cage < 0.95)] = FAT
    heart = (field_ < 1) & (grid.z > -40)
    hu[heart] = BLOOD
    for side in (-1, 1):
        _paint_tube(grid, hu, (8, -0.15 * d, 0.5 * h), body.hilum(side), 12, 8, BLOOD)
    _paint_tube(grid, hu, (20, 0.45 * d, FLOOR), (20, 0.42 * d, 0.7 * h), 12, 12, BLOOD + 5)
    _paint_tube(grid, hu, (20, 0.42 * d, 0.7 * h), (-6, -0.3 * d, 0.7 * h), 13, 14, BLOOD + 5)
    _paint_tube(grid, hu, (-6, -0.3 * d, 0.7 * h), (2, -0.25 * d, 0.35 * h), 14, 15, BLOOD + 5)
    _paint_tube(grid, hu, (-24, -0.2 * d, 0.3 * h), (-20, -0.2 * d, h), 9, 8, BLOOD)
    _paint_tube(grid, hu, (-18, -0.2 * d, h), (-30, -0.1 * d, CEILING), 7, 6, BLOOD)
    _paint_tube(grid, hu, (14, -0.1 * d, 0.7 * h), (28, -0.1 * d, CEILING), 7, 5, BLOOD)
    return heart


def _paint_airways(grid: _Grid, hu: np.ndarray) -> None:
    body = grid.body
    carina = (0.0, 0.12 * body.depth, 0.62 * body.height)
    _paint_tube(grid, hu, (0, -0.02 * body.depth, CEILING), carina, 10, 10, MUSCLE)
    _paint_tube(grid, hu, (0, -0.02 * body.depth, CEILING), carina, 8, 8, AIR + 20)
    for side in (-1, 1):
        bronchus = body.hilum(side) + np.array([12 * side, 4, -6])
        _paint_tube(grid, hu, carina, bronchus, 7.5, 5, MUSCLE)
        _paint_tube(grid, hu, carina, bronchus, 5.5, 3.5, AIR + 40)


def _paint_vessels(grid: _Grid, hu: np.ndarray, lungs: np.ndarray, vessels: np.ndarray) -> None:
    """Soft at the edges, since most are thinner than a voxel: a voxel that is filled in part is as dense in part."""
    voxel = max(float(np.diff(grid.axes[2][:2])[0]), 0.5)
    z = grid.axes[0]
    for x0, y0, z0, x1, y1, z1, r0, r1 in vessels:
        if max(z0, z1) + 5 < z[0] or min(z0, z1) - 5 > z[-1]:
            continue
        box, inside = grid.tube((x0, y0, z0), (x1, y1, z1), r0, r1)
        filled = np.clip(inside / voxel + 0.5, 0, 1) * min(1.0, 2 * r0 / voxel)
        part = hu[box]
        dense = np.maximum(part, LUNG + (BLOOD - LUNG) * filled)
        hu[box] = np.where(lungs[box], dense, part)


def _paint_bones(grid: _Grid, hu: np.ndarray) -> None:
    body = grid.body
    outside = hu == AIR
    _paint_ribs(grid, hu)
    _paint_spine(grid, hu)
    d, h = body.depth, body.height
    sternum = (
        (np.abs(grid.x) < 17) & (np.abs(grid.y + grid.ry * 1.0 + 1) < 5.5) & (grid.z > 0.28 * h) & (grid.z < 0.88 * h)
    )
    hu[sternum] = 230
    for side in (-1, 1):
        _paint_tube(grid, hu, (18 * side, -0.78 * d, 0.93 * h), (85 * side, -0.62 * d, h + 8), 7, 5, 420)
        _paint_tube(grid, hu, (85 * side, -0.62 * d, h + 8), (152 * side, 0, h + 14), 5, 6, 420)
        hu[grid.ball((168 * side, 5, h - 8), (23, 23, 25)) < 1] = 330
        _paint_tube(grid, hu, (172 * side, 5, h - 20), (196 * side, 5, 0.45 * h), 12, 11, 420)
        blade = np.abs((grid.x - 108 * side) * 0.55 * side + (grid.y - 0.86 * d) * 0.83) < 3
        blade &= grid.ball((108 * side, 0.86 * d, 0.72 * h), (44, 44, 62)) < 1
        hu[blade] = 380
    hu[outside] = AIR


def _paint_ribs(grid: _Grid, hu: np.ndarray) -> None:
    """All ribs at once: they repeat every 24 mm and fall by the same curve from the back to the front."""
    body = grid.body
    ring = np.nonzero(np.abs(grid.cage - 1.04) < 0.12)
    rho = np.sqrt(grid.cage[ring])
    z, y = grid.axes[0][ring[0]], grid.axes[1][ring[1]]
    x = grid.x[ring[0], 0, ring[2]]
    back = np.clip(y / (grid.ry[ring[0], 0, 0] * rho), -1, 1)  # 1 at the back, -1 at the front
    height = z + 0.4 * body.height * (1 - back) / 2
    across = (np.mod(height - body.ribs, 24) - 12) / (5.5 - 1.2 * back)
    through = (rho - 1.02) * grid.rx[ring[0], 0, 0] / 4.6
    inside = across**2 + through**2
    rib = (inside < 1) & (height > -50) & (height < body.height + 12) & (np.abs(x) > 12)
    cartilage = back < -0.82
    value = np.where(cartilage, 75, np.where(inside > 0.45, 620, 260))
    where = tuple(axis[rib & ~(cartilage & (z < 0.2 * body.height))] for axis in ring)
    hu[where] = value[rib & ~(cartilage & (z < 0.2 * body.height))]


def _paint_spine(grid: _Grid, hu: np.ndarray) -> None:
    body = grid.body
    place = 0.8 * body.depth
    level = np.mod(grid.z + body.ribs, 26)
    vertebra = (grid.x / 18) ** 2 + ((grid.y - place) / 15) ** 2
    disc = (level < 5) & (vertebra < 1.1)
    hu[vertebra < 1] = 190
    hu[(vertebra < 1.1) & (vertebra > 0.82)] = 480
    hu[disc] = 85
    canal = (grid.x / 10) ** 2 + ((grid.y - place - 24) / 9) ** 2
    hu[(canal < 2.1) & (canal >= 1) & (level > 6)] = 430
    hu[canal < 1] = 30
    process = (np.abs(grid.x) < 3.5) & (np.abs(grid.y - place - 44) < 13) & (level > 6) & (level < 17)
    process |= (
        (np.abs(grid.x) < 34) & (np.abs(grid.x) > 8) & (np.abs(grid.y - place - 16) < 4.5) & (level > 9) & (level < 18)
    )
    hu[process] = 400
