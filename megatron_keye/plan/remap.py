"""The order of a source whose data changed: first the samples that are still due in the epochs in progress, then ordinary epochs.

An epoch in progress was begun with other data. What is due in it are the samples of the new set that were not used in it before, in
the order in which that epoch would go through the new set. Lookahead windows may have begun several epochs of a small source: then one
follows the other. The samples due are a file beside the run; a `Remap` names it by its hash.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np

from megatron_keye.errors import PlanError
from megatron_keye.plan.order import Order

SampleKey = tuple[str, int]
"""Id and CRC-32 of the record: samples of two sets are the same where both are. An edited sample is another one."""


@dataclass(frozen=True, slots=True)
class Remap:
    """How a source's order begins: with `counts[i]` samples of epoch `first_epoch + i`, listed in the file with this hash. Without an
    entry, with the whole of `first_epoch`."""

    sha256: str = ""
    first_epoch: int = 0
    counts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        numbers = (self.first_epoch, *self.counts)
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise PlanError(f"A remap has first epoch {self.first_epoch} and counts {self.counts}, expected whole numbers from 0 on.")
        if not re.fullmatch("[0-9a-f]{64}" if self.counts else "([0-9a-f]{64})?", self.sha256):
            raise PlanError(f"A remap names its samples by {self.sha256!r}, expected 64 hexadecimal digits.")

    @property
    def num_due(self) -> int:
        return sum(self.counts)

    @property
    def end_epoch(self) -> int:
        """The first epoch that is gone through as a whole."""
        return self.first_epoch + len(self.counts)

    def epochs(self, places: np.ndarray, num_samples: int) -> np.ndarray:
        """int64 [n]: the epoch of each of `places` in the order of a set of `num_samples`."""
        in_progress = np.searchsorted(np.array([*accumulate(self.counts)], np.int64), places, side="right")
        return self.first_epoch + in_progress + np.maximum(places - self.num_due, 0) // num_samples

    def epochs_begun(self, num_drawn: int, num_samples: int) -> int:
        """How many epochs have been begun when the first `num_drawn` places were given out."""
        return self.end_epoch + -(-max(0, num_drawn - self.num_due) // num_samples)


NO_REMAP = Remap()
"""Of a source whose data never changed."""

Due = Callable[[Remap], np.ndarray]
"""The samples that a remap begins with, int64 [num_due], numbered in the new set."""


def nothing_due(remap: Remap) -> np.ndarray:
    """For orders of data that never changed."""
    raise PlanError(f"The samples due of remap {remap.sha256:.12} are not at hand; they lie in the run directory.")


class RemappedOrder:
    """The endless order of a source whose data changed; `whole_epochs` is the new set's own."""

    def __init__(self, remap: Remap, due: np.ndarray, whole_epochs: Order):
        """`due` int64 [remap.num_due]. Raises PlanError where an epoch would have a sample twice, or one that the set does not have."""
        self.num_samples = whole_epochs.num_samples
        self._due, self._whole_epochs = due, whole_epochs
        self._offset = remap.end_epoch * self.num_samples - remap.num_due
        if len(due) != remap.num_due:
            raise PlanError(f"Remap {remap.sha256:.12} has {len(due)} samples due, expected {remap.num_due}.")
        for begin, end in pairwise(accumulate(remap.counts, initial=0)):
            samples = np.unique(due[begin:end])
            if len(samples) < end - begin or (len(samples) and not 0 <= samples[0] <= samples[-1] < self.num_samples):
                raise PlanError(
                    f"Remap {remap.sha256:.12} does not hold different samples of the {self.num_samples} in the set; it is of another one."
                )

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """The samples at `places`, int64 [n]."""
        samples, is_due = np.empty_like(places), places < len(self._due)
        samples[is_due] = self._due[places[is_due]]
        samples[~is_due] = self._whole_epochs(places[~is_due] + self._offset)
        return samples


def due_samples(
    whole_epochs: Order, epochs: range, samples: Iterable[SampleKey], used: Mapping[int, Mapping[SampleKey, int]]
) -> tuple[np.ndarray, tuple[int, ...]]:
    """The numbers in the new set of all that is due in `epochs`, one epoch after another, int64 [n]; and how many each has.

    `samples` are those of the new set, by number; `used[epoch]` says how often each was used in an epoch in progress.
    """
    number_of_samples, parts = whole_epochs.num_samples, []
    left = {epoch: Counter(used.get(epoch, {})) for epoch in epochs}
    was_used = {epoch: np.zeros(number_of_samples, bool) for epoch in epochs}
    for number, sample in enumerate(samples):
        for epoch in epochs:
            # A set may hold the same record several times: each use stands for one of them.
            if left[epoch][sample] > 0:
                left[epoch][sample] -= 1
                was_used[epoch][number] = True
    for epoch in epochs:
        order = whole_epochs(epoch * number_of_samples + np.arange(number_of_samples))
        parts.append(order[~was_used[epoch][order]])
    return np.concatenate([np.zeros(0, np.int64), *parts]), tuple(map(len, parts))
