"""What a ledger says of data that changed since: which samples epochs in progress have used, and how the new set differs.

The old set is not needed: a ledger names every sample that was used by its id and its record's checksum.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_keye.plan.ledger import Line, SegmentLine
from megatron_keye.plan.remap import Due, SampleKey


@dataclass(slots=True)
class UsedSamples:
    """Of one source. `by_epoch` says how often each sample was used in an epoch in progress; `checksums` has the CRC-32 by id of all
    that were ever used of the set as it was last."""

    by_epoch: dict[int, Counter[SampleKey]]
    checksums: dict[str, int] = field(default_factory=dict)
    fingerprint: str = ""


def used_samples(lines: Iterable[Line], due: Due, epochs: Sequence[range]) -> list[UsedSamples]:
    """What `lines`, from a run's first on, say of each source whose epochs in progress are `epochs`."""
    found = [UsedSamples({epoch: Counter() for epoch in in_progress}) for in_progress in epochs]
    for line in lines:
        if isinstance(line, SegmentLine):
            mixture, order = line.rules.mixture, line.rules.mixture.order(due)
            for source, used in zip(mixture.sources, found, strict=False):
                if used.fingerprint != source.fingerprint:
                    used.fingerprint, used.checksums = source.fingerprint, {}
            continue
        sources, in_epochs = mixture.sources_and_epochs(order, np.array(line.slot_positions, np.int64))
        for source, epoch, name, crc32 in zip(sources.tolist(), in_epochs.tolist(), line.ids, line.crc32, strict=True):
            found[source].checksums[name] = crc32
            if epoch in found[source].by_epoch:
                found[source].by_epoch[epoch][name, crc32] += 1
    return found


@dataclass(frozen=True, slots=True)
class Changes:
    """How a new set differs from what was used of the old one, in samples."""

    unchanged: int
    edited: int
    """The same id, and another checksum."""
    removed: int
    new: int
    """Of the new set: those that were never used, be it that they were added or that their turn had not come."""
    used: int
    """Of the new set: those that need not be used any more in the epochs in progress, over all of these."""


def changes(before: UsedSamples, samples: Iterable[SampleKey], due_counts: Sequence[int]) -> Changes:
    """`samples` are those of the new set, of which `due_counts[i]` are due in the i-th epoch in progress."""
    ids, unchanged, edited, num_samples = set(), 0, 0, 0
    for name, crc32 in samples:
        num_samples += 1
        if name in before.checksums:
            ids.add(name)
            same = before.checksums[name] == crc32
            unchanged += same
            edited += not same
    removed = len(before.checksums) - len(ids)
    used = len(due_counts) * num_samples - sum(due_counts)
    return Changes(unchanged, edited, removed, num_samples - unchanged - edited, used)
