"""One line per event of a run on SLURM, in `attempts.jsonl`: submitted by a person, attempt begun, attempt ended and why.

Written by the supervisor, one at a time; read by the next decision, `keye report` and `launch/status.sh`.
"""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from megatron_keye.train.supervise.decide import Action, Ending

FILE = "attempts.jsonl"


@dataclass(frozen=True)
class Attempt:
    """One start of the ranks. Without `ending` it runs, or its host was lost."""

    number: int
    job: str
    nodes: tuple[str, ...]
    began_s: float
    first_step: int
    ended_s: float | None = None
    ending: Ending | None = None
    action: str = ""
    reason: str = ""


class Journal:
    def __init__(self, run_dir: Path):
        self.path = run_dir / FILE

    def submitted(self, job: str) -> None:
        """A person started the run (again): what failed before it does not count against it."""
        self._append({"event": "submitted", "time_s": time.time(), "job": job})

    def began(self, attempt: Attempt) -> None:
        line = {"attempt": attempt.number, "job": attempt.job, "nodes": attempt.nodes, "first_step": attempt.first_step}
        self._append({"event": "began", "time_s": attempt.began_s, **line})

    def ended(self, number: int, time_s: float, ending: Ending, action: Action) -> None:
        line = {"attempt": number, **asdict(ending), "action": action.kind, "reason": action.reason}
        self._append({"event": "ended", "time_s": time_s, **line})

    def attempts(self) -> list[Attempt]:
        """All attempts, oldest first."""
        return _attempts(self._lines())

    def endings(self) -> list[Ending]:
        """How the attempts ended since a person last submitted the run, oldest first."""
        lines = self._lines()
        last = max((i for i, line in enumerate(lines) if line["event"] == "submitted"), default=-1)
        return [attempt.ending for attempt in _attempts(lines[last + 1 :]) if attempt.ending is not None]

    def _append(self, line: dict) -> None:
        with self.path.open("a+b") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
            torn = file.read(1) not in (b"", b"\n")
            file.write(("\n" * torn + json.dumps(line) + "\n").encode())

    def _lines(self) -> list[dict]:
        """A line that was cut off when a host was lost is passed over."""
        if not self.path.exists():
            return []
        lines = []
        for text in self.path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                continue
        return lines


def _attempts(lines: Sequence[dict]) -> list[Attempt]:
    attempts: dict[int, Attempt] = {}
    for line in lines:
        number = line.get("attempt")
        if line["event"] == "began":
            attempts[number] = Attempt(number, line["job"], tuple(line["nodes"]), line["time_s"], line["first_step"])
        elif line["event"] == "ended" and number in attempts:
            values = {field.name: line[field.name] for field in fields(Ending)}
            ending = Ending(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
            begun = attempts[number]
            attempts[number] = Attempt(
                number, begun.job, begun.nodes, begun.began_s, begun.first_step, line["time_s"], ending, line["action"], line["reason"]
            )
    return list(attempts.values())
