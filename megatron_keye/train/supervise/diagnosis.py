"""`failure.json`: what a person needs who looks into a run that is not tried again."""

import json
from dataclasses import asdict
from pathlib import Path

from megatron_keye.train.run_dir import RunDir, write_atomically
from megatron_keye.train.supervise.attempt import Result
from megatron_keye.train.supervise.decide import Action
from megatron_keye.train.supervise.evidence import samples_of_step, tail
from megatron_keye.train.supervise.journal import Journal

FILE = "failure.json"
TAIL_LINES = 40


def write_diagnosis(run_dir: RunDir, result: Result, action: Action, journal: Journal) -> Path:
    """Step and its samples, rank, node, error, last lines of its log, and how the attempts before ended. Returns the file's path."""
    first = result.failures[0] if result.failures else None
    content = {
        "reason": action.reason,
        "exit_code": action.exit_code,
        **asdict(result.ending),
        "samples": samples_of_step(run_dir, result.ending.last_step),
        "first_failure": None if first is None else asdict(first),
        "last_lines": tail(Path(first.log) if first is not None and first.log else run_dir.path / "train.log", TAIL_LINES),
        "attempts": [{"cause": e.cause, "last_step": e.last_step, "saved_step": e.saved_step, "error": e.error} for e in journal.endings()],
    }
    path = run_dir.path / FILE
    write_atomically(path, json.dumps(content, indent=1) + "\n")
    return path
