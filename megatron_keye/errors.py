"""Every error a user can meet, by the exit code that launchers act on.

65 means that settings or data must be changed before another attempt, 66 that the numbers went wrong; anything else may be retried.
A message says what was found, what was expected, and what to do.
"""


class KeyeError(Exception):
    """Base of all errors raised on purpose. `exit_code` becomes the exit code of the process."""

    exit_code = 1


class SettingsError(KeyeError):
    """The settings contradict themselves, the machine, or each other. `problems` lists every one that was found."""

    exit_code = 65

    def __init__(self, problems: str | list[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        if len(self.problems) == 1:
            text = self.problems[0]
        else:
            text = f"{len(self.problems)} problems in the settings:\n" + "\n".join(f"  - {p}" for p in self.problems)
        super().__init__(text)


class DataError(KeyeError):
    """A record, media file, shard or index cannot be used."""

    exit_code = 65


class UnreachableError(KeyeError):
    """Where data lie did not answer, in spite of retries. Nothing says that the data are bad: another attempt may succeed."""


class MediumUnreachableError(DataError):
    """The host of a single image or video did not answer in time, in spite of retries. It may be gone, so that a run which skips bad
    samples skips this one; for any other, another attempt may succeed."""

    exit_code = 1


class UnsupportedError(KeyeError):
    """The chosen decoder cannot decode a medium on this host. Nothing says that the medium is bad."""

    exit_code = 65


class CheckpointError(KeyeError):
    """A checkpoint is missing, damaged, or of another model."""

    exit_code = 65


class PlanError(KeyeError):
    """Ranks disagree about the step plan, or a plan cannot be made."""

    exit_code = 65


class LedgerError(KeyeError):
    """A ledger is damaged, or does not prove that every sample was used once."""

    exit_code = 65


class NumericError(KeyeError):
    """Loss or gradients were not finite more often than the settings allow."""

    exit_code = 66
