"""IMDB: 50,000 film reviews, positive or negative, half of them for training.

Maas, Daly, Pham, Huang, Ng and Potts, "Learning Word Vectors for Sentiment Analysis", ACL 2011. In `root`:

    train/pos/<id>_<rating>.txt  train/neg/*.txt  test/pos/*.txt  test/neg/*.txt        (or in `root`/aclImdb)

One file a review, UTF-8, with `<br />` for its line breaks. Ratings are 1 to 4 (negative) and 7 to 10 (positive); ids
are numbers within a folder. A part of the dataset in the same folders is read too. `train/unsup` is not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ibxai.datasets.splits import Found, SplitDataset, SplitName, by_id, content_digest, files_in, size_of
from ibxai.errors import BadSample
from ibxai.types import Sample, Text

CLASSES = ("negative", "positive")
_FOLDERS = ("neg", "pos")
_NAME = re.compile(r"\d+_\d+\.txt")
_MOST_BYTES = 1 << 20  # the longest review has 14 KB


@dataclass(frozen=True)
class IMDB(SplitDataset):
    """The reviews under `root`. A sample is known by the digest of its text's bytes: sizes alone are often equal."""

    title: ClassVar[str] = "IMDB"
    modality: ClassVar[str] = "text"
    how_to_get: ClassVar[str] = (
        "Get aclImdb_v1.tar.gz from ai.stanford.edu/~amaas/data/sentiment (terms: research, cite Maas et al. 2011), "
        "unpack it (tar xzf aclImdb_v1.tar.gz) and set dataset.root to the folder aclImdb."
    )

    @property
    def class_names(self) -> Sequence[str]:
        return CLASSES

    def read(self, sample: Sample) -> Text:
        """The review as it stands in its file. Raises BadSample where it cannot be read."""
        try:
            if sample.source.stat().st_size > _MOST_BYTES:
                raise BadSample(f"{sample.source.stat().st_size:,} bytes are no review")
            return Text(sample.source.read_bytes().decode("utf-8"))
        except OSError as error:
            raise BadSample(error.strerror or str(error)) from error
        except UnicodeDecodeError as error:
            raise BadSample(f"no text in UTF-8: {error.reason}") from error

    def _look(self, root: Path) -> Found:
        base = root / "aclImdb" if (root / "aclImdb").is_dir() else root
        wanted = [f"{split}/{kind}" for split in ("train", "test") for kind in _FOLDERS]
        absent = [folder for folder in wanted if not (base / folder).is_dir()]
        if absent:
            packed = sorted(path.name for path in root.glob("*.tar.gz"))
            hint = f"; {packed[0]} lies there packed: tar xzf {packed[0]}" if packed else ""
            raise self.missing(f"there is no folder {', '.join(absent)} in {base}{hint}")
        train, test = self._samples(base, "train"), self._samples(base, "test")
        if not train and not test:
            raise self.missing(f"the folders of {base} hold no file named <id>_<rating>.txt")
        facts = tuple(
            (f"{name} split", f"{len(found):,} reviews") for name, found in (("train", train), ("test", test))
        )
        return Found(train, test, facts)

    @staticmethod
    def _samples(base: Path, split: SplitName) -> tuple[Sample, ...]:
        """The kind comes last in an id, so that the first samples are of both."""
        found = []
        for label, kind in enumerate(_FOLDERS):
            for name, file in files_in([base / split / kind], [".txt"]).items():
                if _NAME.fullmatch(name):
                    path = Path(file.path)
                    sample_id = f"{split}-{path.stem}-{kind}"
                    found.append(Sample(sample_id, sample_id, path, size_of(file), label, (), content_digest(path)))
        return by_id(found)
