"""Fingerprints: of a plan, compared between ranks every step; of the samples trained so far, kept as a hash chain."""

import hashlib
import struct
from collections.abc import Sequence

import numpy as np

from megatron_keye.plan.assignment import Assignment
from megatron_keye.plan.types import ReplicaPlan, StepPlan

LEDGER_START = bytes(32)
"""The ledger digest of a run that has trained on nothing."""


def plan_digest(plan: StepPlan) -> bytes:
    """32 bytes (SHA-256) that differ whenever any field of the plan differs."""
    numbers = [plan.step, len(plan.members), *plan.members, len(plan.replicas)]
    for replica in plan.replicas:
        _encode_replica(replica, numbers)
    return hashlib.sha256(_int64_bytes(numbers)).digest()


def assignment_digest(step: int, members: Sequence[int], assignment: Assignment) -> bytes:
    """32 bytes (SHA-256) that differ whenever a step's samples, or their replicas and microbatches, do: all that a replica's plan
    follows from besides the settings."""
    rows = [] if assignment.row is None else assignment.row
    numbers = np.concatenate([[step, assignment.num_rows, len(members), len(rows)], members, assignment.replica, rows])
    return hashlib.sha256(numbers.astype("<i8").tobytes()).digest()


def ledger_digest(previous: bytes, members: Sequence[int]) -> bytes:
    """32 bytes that prove a history: the next link of the hash chain, from `previous` and one step's samples in order."""
    return hashlib.sha256(previous + _int64_bytes(members)).digest()


def _encode_replica(replica: ReplicaPlan, numbers: list[int]) -> None:
    """Append every field, each sequence after its length, so that no two replicas give the same numbers."""
    numbers += (replica.num_rounds, len(replica.rows), len(replica.tasks))
    for row in replica.rows:
        numbers += (row.num_tokens, len(row.documents))
        for document in row.documents:
            shape = document.shape
            numbers += (document.sample, document.start, document.padded_tokens, shape.num_tokens, len(shape.segments))
            for segment in shape.segments:
                grid = segment.grid
                numbers += (grid.t, grid.h, grid.w, segment.gap_tokens, _float_bits(segment.ticks_per_frame))
    for task in replica.tasks:
        numbers += (task.microbatch, task.document, task.segment, task.encoder, task.round)


def _float_bits(value: float) -> int:
    return struct.unpack("<q", struct.pack("<d", value))[0]


def _int64_bytes(numbers: Sequence[int]) -> bytes:
    return np.array(numbers, dtype="<i8").tobytes()
