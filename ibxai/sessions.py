"""Who has worked on a run, when and for how long: one small file a process, which nobody else writes.

    sessions/<start>-<random>.json      command, device, shard, start, end, seconds, network passes, notes

`provenance.json` is what describes the run and what its sessions add up to. So shards, restarts and a process that was
killed all count, and two processes that write at once lose nothing: whoever writes last has read all the others.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from ibxai.store import RunStore


class Session:
    """This process's part in a run. passes: of the network, counted by others while the work goes on."""

    def __init__(self, store: RunStore, record: Mapping[str, Any], session: Mapping[str, Any], notes: Sequence[str]):
        """record: what describes the run; session: command, device, shard."""
        self.passes: Mapping[str, int] = {}
        self._store, self._record, self._clock = store, record, time.perf_counter()
        self._told = {**session, "started": now(), "finished": None, "notes": list(dict.fromkeys(notes))}
        self._name = f"{self._told['started'].replace(':', '-')}-{secrets.token_hex(4)}"

    def save(self) -> None:
        """What has been done so far, after every batch: a killed process has counted what it finished."""
        seconds = round(time.perf_counter() - self._clock, 1)
        self._told |= {"seconds": seconds, "passes": dict(self.passes)}
        self._store.write_session(self._name, self._told)

    def tell(self) -> None:
        """The run's provenance, as it stands."""
        self.save()
        self._store.write_provenance(self.provenance())

    def note(self, message: str) -> None:
        """A thing that a reader of the run must know. Told at once: a killed process leaves its heatmaps."""
        if message not in self._told["notes"]:
            self._told["notes"].append(message)
            self.tell()

    def end(self, run_is_finished: bool) -> None:
        self._told["finished"] = now()
        self._record = {**self._record, "finished": now() if run_is_finished else None}
        self.tell()

    def provenance(self) -> dict[str, Any]:
        return {**self._record, **summed(self._store.sessions() or [self._told])}


def summed(sessions: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What the sessions of a run, in the order of their start, come to."""
    sessions = list(sessions)
    passes: Counter[str] = Counter()
    for session in sessions:
        passes.update(session.get("passes", {}))
    return {
        "command": sessions[-1]["command"],
        "device": "; ".join(dict.fromkeys(session["device"] for session in sessions)),
        "notes": list(dict.fromkeys(note for session in sessions for note in session["notes"])),
        "started": sessions[0]["started"],
        "seconds": round(sum(session.get("seconds", 0) for session in sessions), 1),
        "passes": dict(passes),
        "sessions": len(sessions),
    }


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
