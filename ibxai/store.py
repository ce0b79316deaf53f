"""What a run leaves on disk: its folder, its identity, atomic writes, and what is finished.

    <outputs>/<dataset>/<backbone>/<method>/<identity>/
        config.yaml provenance.json classes.json samples.csv skipped.csv run.log
        sessions/<start>.json           one a process that worked here; provenance.json adds them up (`sessions.py`)
        heatmaps/<row>.npz              raw map, unit, target, prediction, diagnostics
        pictures/<row>.png              what the network saw, of the first rows, for the report
        texts/<row>.json                the same of texts: the text, and where its tokens stand
        overlays/<row>.png              the same with the heat over it; metrics.csv summary.csv report.html: by `report`
        outlines/<row>.png              where a metric has found something on them, and where something was annotated
        skipped/<sample>.json           the reason why a sample could not be used; skipped.csv lists them
        scores/<metric>-<hash>/         settings.json, and one <batch>.npz a batch, keyed by row inside
        studies/<study>-<hash>/         settings.json, and one <cell>.json a cell (`cells.py`); studies.csv

A row is finished when its heatmap file exists, scored when a score file names it: there is no other record of
progress, so nothing can disagree. Every file is written under a temporary name, synced and renamed. `samples.csv`
lists all rows of the dataset, in order, whatever part of them has been computed.

Any number of processes may work in one folder. A file is either written by one of them alone, or has the same content
whoever writes it, or is made again from the others whenever it is wanted.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import logging
import math
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ibxai.errors import UserError

log = logging.getLogger(__name__)

_PLAIN_NAME = re.compile(r"[a-z0-9][a-z0-9_.@-]{0,99}")
_WITH_HASH = re.compile(r"-[0-9a-f]{12}$")  # what ends like a name made here could be taken for one
_STALE_SECONDS = 3600
_DIAGNOSTIC = "diagnostic."


class DamagedFile(Exception):
    """A stored file cannot be read (cut short, or not ours): recompute it."""


@dataclass(frozen=True)
class Row:
    """One line of samples.csv. row_id is "<sample_id>@<target>"; label is None where the dataset gives none."""

    row_id: str
    sample_id: str
    target: str
    group_id: str
    label: int | None


@dataclass(frozen=True)
class StoredHeatmap:
    """A finished row. heatmap: float32 [H, W] or, of a text, [T], raw; target and prediction are class indices.

    The probabilities are NaN of a regression. target_value: the explained output itself, a logit or a regression's
    value; NaN in folders of runs that did not keep it.
    """

    row_id: str
    heatmap: np.ndarray
    unit: str
    target: int
    target_probability: float
    prediction: int
    prediction_probability: float
    diagnostics: Mapping[str, np.ndarray] = field(default_factory=dict)
    target_value: float = math.nan


@dataclass(frozen=True)
class MetricKey:
    """A metric as it is stored: its name, and its settings (JSON-able, version included), which name its folder."""

    name: str
    settings: Mapping[str, Any]

    @property
    def folder(self) -> str:
        return f"{self.name}-{digest(self.settings)}"


def digest(content: Any) -> str:
    """12 hexadecimal digits that stand for a JSON-able value."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def safe_name(identifier: str) -> str:
    """A file name for any id: inside its folder, distinct on every file system, readable where possible.

    Ids with anything but lower-case letters, digits, "@", ".", "_" and "-" keep a readable part and gain a hash, so
    that "../../x", 300 characters, or two ids that differ in case alone cannot meet.
    """
    if _PLAIN_NAME.fullmatch(identifier) and ".." not in identifier and not _WITH_HASH.search(identifier):
        return identifier
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", identifier).strip("-")[:80]
    return f"{readable}-{hashlib.sha256(identifier.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}"


def write_atomically(path: Path, content: bytes) -> None:
    """All of it or nothing, also when the power goes. Raises UserError when the disk or the folder refuses."""
    # random, since processes of two machines that share the folder may have the same number; and cut, since a file
    # system's longest name is 255 bytes
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}.tmp")
    with explained_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A CSV file of rows that have all the same names, whole or not at all."""
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_atomically(path, text.getvalue().encode())


@contextmanager
def explained_os_errors(path: Path) -> Iterator[None]:
    """Turn "disk full", "read-only" and the like into a line that says what to do."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"Cannot write {path}: {error.strerror or error}.\n"
            "Free some space or choose another place with outputs=/some/folder; what is finished is kept."
        ) from error


class RunStore:
    """One run folder. Reading needs nothing but the folder; nothing is created before the first write."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._made: list[Path] = []  # the folders that `begin` made, innermost first

    # the run itself

    def begin(
        self, config: str, provenance: Mapping[str, Any], classes: Sequence[str] | None, rows: Sequence[Row]
    ) -> None:
        """Write what describes the run, and clear away what a killed process left half-written."""
        self._made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        self._clear_stale_files()
        self.write_text("config.yaml", config)
        self.write_provenance(provenance)
        self.write_text("classes.json", json.dumps(list(classes) if classes else None, ensure_ascii=False))
        if not (self.path / "samples.csv").exists():
            lines = [(r.row_id, r.sample_id, r.target, r.group_id, "" if r.label is None else r.label) for r in rows]
            self._write_csv("samples.csv", ("row", "sample", "target", "group", "label"), lines)

    def discard(self) -> None:
        """Undo `begin` as long as no row is finished: a mistake leaves no folder behind. Older folders stay, and so
        does one in which another process has begun too.
        """
        if self._made and not _names_in(self.path / "heatmaps") and len(_names_in(self.path / "sessions")) < 2:
            shutil.rmtree(self.path, ignore_errors=True)
            for folder in self._made[1:]:
                with suppress(OSError):  # another run has come into it
                    folder.rmdir()

    def is_reported(self) -> bool:
        """Whether the run was finished, and its page made after all else: one that goes on has written its provenance
        again since.
        """
        try:
            if not self.provenance().get("finished"):
                return False
            written = (self.path / "provenance.json").stat().st_mtime_ns
            return (self.path / "report.html").stat().st_mtime_ns >= written
        except (OSError, ValueError, AttributeError):
            return False

    def write_session(self, name: str, session: Mapping[str, Any]) -> None:
        write_atomically(self.path / "sessions" / f"{name}.json", json.dumps(session, indent=2).encode())

    def sessions(self) -> list[dict[str, Any]]:
        """What every process that worked here tells of itself, by their start. Damaged files are left out."""
        return _read_all_json(self.path / "sessions", ("command", "device", "notes", "started"))

    def write_provenance(self, provenance: Mapping[str, Any]) -> None:
        self.write_text("provenance.json", json.dumps(provenance, indent=2, ensure_ascii=False) + "\n")

    def provenance(self) -> dict[str, Any]:
        return json.loads(self._read_text("provenance.json"))

    def config(self) -> str:
        return self._read_text("config.yaml")

    def class_names(self) -> list[str] | None:
        return json.loads(self._read_text("classes.json"))

    def rows(self) -> list[Row]:
        """All rows of the dataset, in its order."""
        lines = csv.DictReader(io.StringIO(self._read_text("samples.csv"), newline=""))
        return [
            Row(r["row"], r["sample"], r["target"], r["group"], int(r["label"]) if r["label"] else None) for r in lines
        ]

    def write_skipped(self, reasons: Mapping[str, str], tried: Iterable[str] = ()) -> None:
        """sample id -> why it could not be used. tried: samples of which those without a reason are well again."""
        known = _names_in(self.path / "skipped")
        for sample_id, reason in reasons.items():
            content = json.dumps({"sample": sample_id, "reason": reason}).encode()
            write_atomically(self._skipped_path(sample_id), content)
        for sample_id in set(tried) - reasons.keys():
            if (path := self._skipped_path(sample_id)).name in known:
                path.unlink(missing_ok=True)
        if reasons or known:
            self._write_csv("skipped.csv", ("sample", "reason"), list(self.skipped().items()))

    def skipped(self) -> dict[str, str]:
        """sample id -> reason, in the order of the dataset."""
        found = {told["sample"]: told["reason"] for told in _read_all_json(self.path / "skipped", ("sample", "reason"))}
        if not found:
            return {}
        order = {row.sample_id: place for place, row in enumerate(self.rows())}
        return dict(sorted(found.items(), key=lambda entry: order.get(entry[0], len(order))))

    # heatmaps

    def write_heatmap(self, stored: StoredHeatmap) -> None:
        arrays: dict[str, Any] = {
            "row": stored.row_id,
            "heatmap": stored.heatmap.astype(np.float32),
            "unit": stored.unit,
            "target": stored.target,
            "target_probability": stored.target_probability,
            "target_value": stored.target_value,
            "prediction": stored.prediction,
            "prediction_probability": stored.prediction_probability,
        }
        arrays |= {_DIAGNOSTIC + name: value for name, value in stored.diagnostics.items()}
        self._write_npz(self._heatmap_path(stored.row_id), arrays)

    def read_heatmap(self, row_id: str) -> StoredHeatmap:
        """Raises DamagedFile when the file is absent, cut short or another row's."""
        arrays = _read_npz(self._heatmap_path(row_id))
        try:
            if str(arrays["row"]) != row_id:
                raise DamagedFile(f"{self._heatmap_path(row_id)} holds the row {arrays['row']}")
            return StoredHeatmap(
                row_id=row_id,
                heatmap=arrays["heatmap"],
                unit=str(arrays["unit"]),
                target=int(arrays["target"]),
                target_probability=float(arrays["target_probability"]),
                prediction=int(arrays["prediction"]),
                prediction_probability=float(arrays["prediction_probability"]),
                target_value=float(arrays.get("target_value", math.nan)),
                diagnostics={n.removeprefix(_DIAGNOSTIC): v for n, v in arrays.items() if n.startswith(_DIAGNOSTIC)},
            )
        except KeyError as error:
            raise DamagedFile(f"{self._heatmap_path(row_id)} has no entry {error}") from error

    def finished(self, row_ids: Iterable[str]) -> set[str]:
        """Those of the rows whose heatmap is there. One that was cut short, such as by a copy that was broken off, is
        not, and that is logged.
        """
        present = _names_in(self.path / "heatmaps")
        named = {row_id: f"{safe_name(row_id)}.npz" for row_id in row_ids}
        found = {row_id for row_id, name in named.items() if name in present}
        cut = {row_id for row_id in found if not _has_its_end(self.path / "heatmaps" / named[row_id])}
        for row_id in sorted(cut):
            log.warning("a stored heatmap is cut short and made again: %s", self._heatmap_path(row_id))
        return found - cut

    def forget_heatmap(self, row_id: str) -> None:
        self._heatmap_path(row_id).unlink(missing_ok=True)

    def remove_damaged_heatmaps(self) -> list[str]:
        """Read all heatmaps and remove those that are damaged; what is wrong with each of them."""
        present, reasons = _names_in(self.path / "heatmaps"), []
        for row in self.rows():
            if self._heatmap_path(row.row_id).name in present:
                try:
                    self.read_heatmap(row.row_id)
                except DamagedFile as error:
                    reasons.append(str(error))
                    self.forget_heatmap(row.row_id)
        return reasons

    # scores

    def write_scores(self, metric: MetricKey, row_ids: Sequence[str], values: Mapping[str, np.ndarray]) -> None:
        """One batch: values [B] and curves [B, S], row by row in the order of row_ids."""
        folder = self.path / "scores" / metric.folder
        if not (folder / "settings.json").exists():
            settings = json.dumps({"metric": metric.name, "settings": metric.settings}, indent=2)
            write_atomically(folder / "settings.json", settings.encode())
        name = hashlib.sha256("\0".join(row_ids).encode("utf-8", "surrogatepass")).hexdigest()[:16]
        self._write_npz(folder / f"{name}.npz", {"row": np.array(row_ids), **values})

    def metrics(self) -> list[MetricKey]:
        """The metrics that have scores here, by name. Raises DamagedFile."""
        found = []
        for path in sorted((self.path / "scores").glob("*/settings.json")):
            try:
                described = json.loads(path.read_bytes())
                found.append(MetricKey(described["metric"], described["settings"]))
            except (ValueError, KeyError, TypeError) as error:
                raise DamagedFile(f"{path}: {error}") from error
        return found

    def read_scores(self, metric: MetricKey) -> dict[str, dict[str, np.ndarray]]:
        """row id -> {name: value or curve [S]}. A damaged file is removed: its rows count as not scored."""
        scores: dict[str, dict[str, np.ndarray]] = {}
        for path in sorted((self.path / "scores" / metric.folder).glob("*.npz")):
            try:
                arrays = _read_npz(path)
                row_ids = arrays.pop("row").tolist()
            except (DamagedFile, KeyError) as error:
                log.warning("A score file is damaged and removed, its rows count as not scored: %s (%s)", path, error)
                path.unlink(missing_ok=True)
                continue
            for place, row_id in enumerate(row_ids):
                scores[row_id] = {name: array[place] for name, array in arrays.items()}
        return scores

    # pictures for people

    def write_picture(self, row_id: str, pixels: np.ndarray) -> None:
        """pixels: uint8 [H, W, 3], what the network saw."""
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "png")
        write_atomically(self._picture_path(row_id), buffer.getvalue())

    def read_picture(self, row_id: str) -> np.ndarray | None:
        """uint8 [H, W, 3], or None when none was kept. Raises DamagedFile."""
        path = self._picture_path(row_id)
        try:
            return np.asarray(Image.open(path).convert("RGB"))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DamagedFile(f"{path}: {error}") from error

    def write_outline(self, row_id: str, places: np.ndarray) -> None:
        """places: uint8 [H, W], see `types.DrawsOutlines`."""
        buffer = io.BytesIO()
        Image.fromarray(places).save(buffer, "png")
        write_atomically(self.path / "outlines" / f"{safe_name(row_id)}.png", buffer.getvalue())

    def read_outline(self, row_id: str) -> np.ndarray | None:
        """uint8 [H, W], or None when none was kept, or it cannot be read: it is for the eye alone."""
        try:
            return np.asarray(Image.open(self.path / "outlines" / f"{safe_name(row_id)}.png").convert("L"))
        except OSError:
            return None

    def write_words(self, row_id: str, text: str, spans: Sequence[tuple[int, int]]) -> None:
        """A text as it stands in its file, and where in it the tokens are that the network read."""
        content = json.dumps({"text": text, "spans": spans}, ensure_ascii=False)
        write_atomically(self._words_path(row_id), content.encode("utf-8", "surrogatepass"))

    def read_words(self, row_id: str) -> tuple[str, list[tuple[int, int]]] | None:
        """(text, spans), or None when none was kept. Raises DamagedFile."""
        path = self._words_path(row_id)
        try:
            told = json.loads(path.read_bytes().decode("utf-8", "surrogatepass"))
            return str(told["text"]), [(int(start), int(end)) for start, end in told["spans"]]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DamagedFile(f"{path}: {error}") from error

    def holds_texts(self) -> bool:
        """Whether texts were kept for the report, and not pictures."""
        return (self.path / "texts").is_dir()

    def write_text(self, name: str, text: str) -> None:
        write_atomically(self.path / name, text.encode("utf-8", "surrogateescape"))

    # inside

    def _heatmap_path(self, row_id: str) -> Path:
        return self.path / "heatmaps" / f"{safe_name(row_id)}.npz"

    def _skipped_path(self, sample_id: str) -> Path:
        return self.path / "skipped" / f"{safe_name(sample_id)}.json"

    def _picture_path(self, row_id: str) -> Path:
        return self.path / "pictures" / f"{safe_name(row_id)}.png"

    def _words_path(self, row_id: str) -> Path:
        return self.path / "texts" / f"{safe_name(row_id)}.json"

    def _read_text(self, name: str) -> str:
        return (self.path / name).read_bytes().decode("utf-8", "surrogateescape")

    def _write_csv(self, name: str, header: Sequence[str], lines: Iterable[Sequence[object]]) -> None:
        buffer = io.StringIO()
        table = [header, *lines]
        # Python before 3.13 leaves a carriage return unquoted, and reads the rest of the name as another line
        returns = any("\r" in str(entry) for line in table for entry in line)
        if returns:
            csv.writer(buffer, lineterminator="\n", quoting=csv.QUOTE_ALL).writerows(table)
        else:
            csv.writer(buffer, lineterminator="\n").writerows(table)
        self.write_text(name, buffer.getvalue())

    @staticmethod
    def _write_npz(path: Path, arrays: Mapping[str, Any]) -> None:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, **arrays)
        write_atomically(path, buffer.getvalue())

    def _clear_stale_files(self) -> None:
        for path in self.path.glob("**/.*.tmp"):
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                path.unlink(missing_ok=True)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise DamagedFile(f"{path} is not there") from error
    except OSError as error:  # "too many open files" says nothing about the file: it is not to be lost for that
        raise UserError(f"Cannot read {path}: {error.strerror or error}.") from error
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # damage surfaces as whatever its decoder stumbles on: BadZipFile, zlib.error, EOFError
        raise DamagedFile(f"{path}: {error or type(error).__name__}") from error


def _has_its_end(path: Path) -> bool:
    """Whether a file ends as our zip archives do: with a directory, whose record is the last 22 bytes."""
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(-22, os.SEEK_END)
            return file.read(4) == b"PK\5\6"
    except FileNotFoundError:
        return False
    except OSError as error:  # shorter than that, or it cannot be opened just now, which `read_heatmap` will tell
        return error.errno != errno.EINVAL


def _read_all_json(folder: Path, needed: Sequence[str]) -> list[dict[str, Any]]:
    """The objects in a folder's files, in the order of their names; without those that are damaged or just removed."""
    found = []
    for name in sorted(name for name in _names_in(folder) if not name.startswith(".")):
        with suppress(OSError, ValueError):
            told = json.loads((folder / name).read_bytes())
            if isinstance(told, dict) and all(key in told for key in needed):
                found.append(told)
    return found


def _names_in(folder: Path) -> set[str]:
    try:
        return {entry.name for entry in os.scandir(folder)}
    except (FileNotFoundError, NotADirectoryError):  # the first write says what is wrong with the place
        return set()


def find_runs(outputs: Path) -> list[RunStore]:
    """All run folders under an outputs folder, in the order of their paths."""
    return [RunStore(path.parent) for path in sorted(Path(outputs).glob("*/*/*/*/provenance.json"))]
