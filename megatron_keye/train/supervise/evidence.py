"""What an attempt leaves behind in the run directory.

attempts/0001/hosts          nodes, one per line
attempts/0001/environment    of the supervisor, without secrets
attempts/0001/nodes/HOST     how torchrun ended there: written by launch/run_ranks.py, absent when the node was lost
attempts/0001/ranks/HOST/    standard output and error of every rank
attempts/0001/stacks/        where the threads of each rank were when its watchdog ended it
"""

import json
import os
import re
import shutil
import signal
from collections.abc import Iterable
from pathlib import Path

from megatron_keye.train.run_dir import RunDir
from megatron_keye.train.supervise.decide import CANCELLED, Failure
from megatron_keye.train.supervise.heartbeats import parse_beat

TAKEN_DOWN = (-15, CANCELLED)
"""How ranks end that are stopped because another one failed."""
TAIL_BYTES = 65536
NAMES_ERROR = re.compile(r"[\w.]*(Error|Exception|Failure|Exit|Interrupt)\b|keye\b.*: error: ")
CHECKPOINT = re.compile(r"step_(\d+)(?:_\d+)?")
"""With a second number where a step was saved again."""
SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD")
"""Parts of names of environment variables that are not written down."""


class Evidence:
    """The folder of one attempt."""

    def __init__(self, run_dir: RunDir, number: int):
        self._run_dir = run_dir
        self.folder = run_dir.path / "attempts" / f"{number:04d}"

    def prepare(self, nodes: Iterable[str]) -> None:
        """Make the folder, and clear what the ranks of an earlier attempt left where this attempt's will write."""
        for name in ("nodes", "ranks"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        (self.folder / "hosts").write_text("".join(f"{node}\n" for node in nodes), encoding="utf-8")
        kept = (f"{name}={value}\n" for name, value in sorted(os.environ.items()) if not any(part in name.upper() for part in SECRET))
        (self.folder / "environment").write_text("".join(kept), encoding="utf-8")
        self._run_dir.step.unlink(missing_ok=True)
        for name in ("heartbeats", "stacks"):
            for file in (self._run_dir.path / name).glob("rank*"):
                file.unlink(missing_ok=True)

    def heartbeats(self) -> dict[str, str]:
        return {file.name: _text(file) for file in (self._run_dir.path / "heartbeats").glob("rank*")}

    def last_step(self) -> int:
        """The step that the ranks had reached, as a number of finished steps."""
        beats = (parse_beat(text) for text in self.heartbeats().values())
        return max((beat.step for beat in beats if beat is not None), default=0)

    def collect_stacks(self) -> list[str]:
        """Move the stacks of this attempt into its folder; names of the ranks whose watchdog ended them."""
        source, target = self._run_dir.path / "stacks", self.folder / "stacks"
        stalled = [file.name for file in sorted(source.glob("rank*")) if _text(file).startswith("Timeout")]
        if source.exists():
            shutil.move(source, target)
        return stalled

    def exit_codes(self) -> dict[str, int]:
        """Of torchrun, by node."""
        return {node: report["exit_code"] for node, report in self._reports().items()}

    def failures(self) -> tuple[Failure, ...]:
        """Ranks that failed by themselves, earliest first."""
        failures = []
        for node, report in self._reports().items():
            for failed in report["failures"]:
                if failed["exit_code"] not in TAKEN_DOWN:
                    log = self._rank_log(node, failed["local_rank"])
                    failures.append(
                        Failure(
                            failed["rank"], node, failed["exit_code"], failed["time_s"], error_of(failed["exit_code"], log), str(log or "")
                        )
                    )
        return tuple(sorted(failures, key=lambda failure: (failure.time_s, failure.rank)))

    def launcher_error(self) -> str:
        """The error of a torchrun that did not live to report, or empty."""
        logs = sorted((self.folder / "ranks").glob("*/launcher.log"))
        return next((error for log in logs if (error := _error_in(tail(log, 200)))), "")

    def _reports(self) -> dict[str, dict]:
        reports = {}
        for file in sorted((self.folder / "nodes").glob("*.json")):
            try:
                reports[file.stem] = json.loads(_text(file))
            except ValueError:
                continue
        return reports

    def _rank_log(self, node: str, local_rank: int) -> Path | None:
        return next(iter(sorted((self.folder / "ranks" / node).glob(f"*/attempt_*/{local_rank}/stderr.log"))), None)


def samples_of_step(run_dir: RunDir, step: int) -> list[str]:
    """Ids of the samples of the step that was being trained; empty where another one was, or none had begun."""
    try:
        noted = json.loads(_text(run_dir.step))
    except ValueError:
        return []
    return noted["samples"] if noted["step"] == step else []


def saved_step(run_dir: RunDir) -> int:
    """Steps in the newest checkpoint; 0 without one."""
    names = (path.parent.name for path in run_dir.checkpoints.glob("step_*/manifest.json"))
    return max((int(found.group(1)) for name in names if (found := CHECKPOINT.fullmatch(name))), default=0)


def tail(log: Path | None, num_lines: int) -> list[str]:
    """The last lines of a file that may be large or missing."""
    if log is None or not log.exists():
        return []
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL_BYTES))
        return file.read().decode(errors="replace").splitlines()[-num_lines:]


def error_of(exit_code: int, log: Path | None) -> str:
    """How a rank failed, in one line: the signal that ended it, else the last line of its log that names an error."""
    if exit_code < 0:
        return f"ended by {signal.Signals(-exit_code).name}"
    lines = [line.strip() for line in tail(log, 200) if line.strip()]
    return _error_in(lines) or (lines[-1] if lines else f"exit code {exit_code}")


def _error_in(lines: list[str]) -> str | None:
    """Libraries may add warnings after the error, while the interpreter ends."""
    return next((line.strip() for line in reversed(lines) if NAMES_ERROR.match(line.strip())), None)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
