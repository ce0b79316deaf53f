"""A run's log: to the terminal while it runs, to `run.log` for later, its warnings to the report."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm.contrib.logging import logging_redirect_tqdm

from ibxai.errors import UserError
from ibxai.store import explained_os_errors

_LOGGER = logging.getLogger("ibxai")


class Said(logging.Handler):
    """records: all that was shown so far. messages: its warnings. told: what to do at once with each of these."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.records: list[logging.LogRecord] = []
        self.messages: list[str] = []
        self.told: Callable[[str], None] = lambda message: None

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "sample", None) is not None:  # single samples are listed in skipped.csv
            return
        self.records.append(record)
        if record.levelno >= logging.WARNING:
            self.messages.append(record.getMessage())
            self.told(record.getMessage())


class _File(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """A full disk is told by the write of a result; logging itself would print a traceback for each message."""


@contextmanager
def run_log() -> Iterator[Said]:
    """Show the package's messages on stderr, and keep its warnings, as long as the block runs."""
    shown = logging.StreamHandler(sys.stderr)
    shown.setFormatter(logging.Formatter("%(message)s"))
    kept = Said()
    level, propagates = _LOGGER.level, _LOGGER.propagate
    _LOGGER.setLevel(logging.INFO)
    _LOGGER.addHandler(shown)
    _LOGGER.addHandler(kept)
    _LOGGER.propagate = False
    try:
        with logging_redirect_tqdm([_LOGGER]):
            yield kept
    finally:
        _LOGGER.removeHandler(shown)
        _LOGGER.removeHandler(kept)
        _LOGGER.setLevel(level)
        _LOGGER.propagate = propagates


@contextmanager
def also_to_file(path: Path, earlier: Iterable[logging.LogRecord] = ()) -> Iterator[None]:
    """Write the messages to a file too, behind those of earlier runs, and the error that ends the block.

    earlier: what this run has said before the file's place was known.
    """
    with explained_os_errors(path):
        file = _File(path, encoding="utf-8", errors="backslashreplace")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for record in earlier:
        file.handle(record)
    _LOGGER.addHandler(file)
    try:
        yield
    except Exception as error:
        trace = None if isinstance(error, UserError) else (type(error), error, error.__traceback__)
        file.handle(_LOGGER.makeRecord(_LOGGER.name, logging.ERROR, "", 0, "%s", (error,), trace))
        raise
    finally:
        _LOGGER.removeHandler(file)
        file.close()
