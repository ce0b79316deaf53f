"""Datasets whose files lie one by one in folders, with a train and a test split that share no patient and no study.

What every one of them does alike: the explained split, the reference pictures of the train split, and what
`ibxai data check` is told.
"""

from __future__ import annotations

import hashlib
import heapq
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

from ibxai.errors import UserError
from ibxai.types import Picture, Sample, Text

log = logging.getLogger(__name__)

SplitName = Literal["train", "test"]
PHANTOM = "phantom.json"  # marks a folder that `ibxai data phantom` has written


@dataclass(frozen=True)
class Found:
    """What lies under a root. train, test: sorted by id. facts: (what, how much), the lines of `ibxai data check`."""

    train: tuple[Sample, ...]
    test: tuple[Sample, ...]
    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class SplitDataset(ABC):
    """root: where the official files are. split: the samples that are explained.
    reference_size: samples of the train split that feature statistics are estimated on, chosen by a hash of their ids.
    """

    root: str
    name: str
    split: SplitName
    reference_size: int

    title: ClassVar[str]
    how_to_get: ClassVar[str]
    is_phantom: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.reference_size < 1:
            raise UserError(f"dataset.reference_size is {self.reference_size}: give 1 or more samples.")

    @property
    @abstractmethod
    def class_names(self) -> Sequence[str]: ...

    @abstractmethod
    def read(self, sample: Sample) -> Picture | Text: ...

    @abstractmethod
    def _look(self, root: Path) -> Found:
        """What lies there. Raises UserError when the layout does not."""

    @property
    def reference_note(self) -> str:
        among = ": the samples that are explained may be among them" if self.split == "train" else ""
        return f"The reference split is {len(self.reference())} samples of the train split, chosen by a hash{among}."

    def samples(self) -> Sequence[Sample]:
        """The samples of `split`, sorted by id. Nothing is decoded. Raises UserError when the layout is not there."""
        return self.in_split(self.split)

    def in_split(self, split: SplitName) -> Sequence[Sample]:
        """All the samples of a split, sorted by id. Raises UserError when the layout is not there."""
        return self._found.train if split == "train" else self._found.test

    def reference(self) -> Sequence[Sample]:
        """`reference_size` samples of the train split, or all when there are fewer, sorted by id."""
        return self._reference

    def facts(self) -> Sequence[tuple[str, str]]:
        """(what, how much) of what was found and what is missing, for people."""
        return self._found.facts

    def missing(self, what: str) -> UserError:
        """Two lines: what is not there, then what to get, from where, and where to put it."""
        return UserError(f"{self.title}: {what}.\n{self.how_to_get}")

    @property
    def folder(self) -> Path:
        """`root` as an absolute path."""
        return Path(os.path.abspath(os.path.expanduser(self.root)))

    @cached_property
    def _found(self) -> Found:
        if not self.folder.is_dir():
            what = "is a file, not a folder" if self.folder.exists() else "does not exist"
            raise self.missing(f"dataset.root={self.root} {what}")
        self._check_real()
        found = self._look(self.folder)
        _check_apart(self.title, found)
        log.info("%s: %s", self.title, "; ".join(f"{what} {count}" for what, count in found.facts))
        return found

    def _check_real(self) -> None:
        """Phantoms are read as phantoms, and nothing else is."""
        made = any((place / PHANTOM).is_file() for place in (self.folder, self.folder.parent))
        if made and not self.is_phantom:
            raise UserError(
                f"{self.title}: {self.root} holds phantoms, which are no real data.\n"
                "Read them as what they are: dataset=phantom_ct or dataset=phantom_cxr."
            )
        if self.is_phantom and not made:
            raise self.missing(f"there is no {PHANTOM} in {self.root}: it holds no phantoms")

    @cached_property
    def _reference(self) -> Sequence[Sample]:
        train = self.in_split("train")
        if not train:
            raise UserError(f"{self.title}: no sample of the train split is there, and the reference is drawn from it.")
        chosen = heapq.nsmallest(self.reference_size, train, key=lambda sample: order("", sample.sample_id))
        return tuple(sorted(chosen, key=lambda sample: sample.sample_id))


def order(seed: int | str, name: str) -> bytes:
    """A key to sort by that is as good as random: the same on every machine, whatever else is in the list."""
    return hashlib.sha256(f"{seed} {name}".encode("utf-8", "surrogatepass")).digest()


def train_groups(groups: Mapping[str, object], share: float, seed: int) -> set[str]:
    """The groups (patients, studies) of the train split: `share` of those of each stratum, by a hash of seed and name.

    groups: group -> stratum. A stratum of two or more groups has one at least in each split.
    """
    if not 0 < share < 1:
        raise UserError(f"dataset.train_share={share}: a share between 0 and 1 is expected.")
    strata: dict[object, list[str]] = {}
    for group, stratum in groups.items():
        strata.setdefault(stratum, []).append(group)
    chosen: set[str] = set()
    for members in strata.values():
        count = round(share * len(members))
        if len(members) > 1:
            count = min(max(count, 1), len(members) - 1)
        chosen.update(sorted(members, key=lambda group: order(seed, group))[:count])
    return chosen


def files_in(folders: Iterable[Path], endings: Sequence[str]) -> dict[str, os.DirEntry[str]]:
    """File name -> its entry, of the files with one of these endings (any case) directly in these folders.

    macOS leaves "._name" beside a file: not one. A name that is in two folders is taken from the first.
    """
    found: dict[str, os.DirEntry[str]] = {}
    for folder in folders:
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.lower().endswith(tuple(endings)) and not entry.name.startswith("."):
                        found.setdefault(entry.name, entry)
        except OSError as error:
            raise UserError(f"The folder {folder} cannot be read: {error.strerror or error}.") from error
    return found


def size_of(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except OSError:  # a dangling link: reading it tells why, as a bad sample
        return 0


def content_digest(path: Path) -> str:
    """sha256 of a file's bytes: uncompressed masks of one shape all have the same size. "" where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


def by_id(samples: Iterable[Sample]) -> tuple[Sample, ...]:
    return tuple(sorted(samples, key=lambda sample: sample.sample_id))


def _check_apart(title: str, found: Found) -> None:
    """A patient in both splits would let a network recognise the person: never in silence."""
    both = {s.group_id for s in found.train} & {s.group_id for s in found.test}
    if both:
        raise UserError(
            f"{title}: {min(both)} and {len(both) - 1} others have samples in the train and in the test split.\n"
            "Put the official lists there, as they were downloaded: their splits share no patient."
        )
