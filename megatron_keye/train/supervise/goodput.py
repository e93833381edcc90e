"""Where the time of a run went, from its journal and its metrics. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_keye.train.supervise.journal import Attempt


@dataclass(frozen=True)
class Goodput:
    """Seconds since the first attempt began. `training` is what is in the weights now; the rest did not bring the run further."""

    wall_s: float
    training_s: float
    """Steps that were kept."""
    repeated_s: float
    """Steps that were trained, lost, and trained again; estimated by their number and the mean step."""
    waiting_s: float
    """Between attempts: in the queue, or in a pause before another try."""

    @property
    def other_s(self) -> float:
        """Starting, loading, saving, evaluating, ending."""
        return max(0.0, self.wall_s - self.training_s - self.repeated_s - self.waiting_s)

    @property
    def share(self) -> float:
        return self.training_s / self.wall_s if self.wall_s else 0.0


def lost_steps(attempt: Attempt) -> int:
    """Steps that were trained in the attempt and are in no checkpoint."""
    return 0 if attempt.ending is None else max(0, attempt.ending.last_step - attempt.ending.saved_step)


def goodput(attempts: Sequence[Attempt], kept_steps: int, training_s: float, now_s: float) -> Goodput:
    """`attempts`, at least one, oldest first; `kept_steps` took `training_s` in all; an attempt that runs lasts until `now_s`."""
    ends_s = [now_s if attempt.ended_s is None else attempt.ended_s for attempt in attempts]
    waiting_s = sum(max(0.0, after.began_s - end_s) for after, end_s in zip(attempts[1:], ends_s[:-1], strict=True))
    mean_step_s = training_s / kept_steps if kept_steps else 0.0
    repeated_s = mean_step_s * sum(map(lost_steps, attempts))
    return Goodput(ends_s[-1] - attempts[0].began_s, training_s, repeated_s, waiting_s)
