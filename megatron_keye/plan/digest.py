"""Fingerprints: of a plan, compared between ranks every step; of the samples trained so far, kept as a hash chain."""

import hashlib
from collections.abc import Sequence

import numpy as np

from megatron_keye.plan.types import StepPlan

PLAN_COLUMNS = ("step", "rows of a replica", "position", "number", "replica", "row", "tokens", "patches", "decoder cost", "vision cost")
NO_TABLE = np.zeros((0, len(PLAN_COLUMNS)), np.int64)

LEDGER_START = bytes(32)
"""The ledger digest of a run that has trained on nothing."""


def plan_table(plan: StepPlan) -> np.ndarray:
    """int64 [samples, len(PLAN_COLUMNS)]: all that every replica's plan follows from, besides the settings and the samples' shapes."""
    placed, samples = plan.assignment, len(plan.members)
    rows = np.full(samples, -1, np.int64) if placed.row is None else placed.row
    whole_step = (np.full(samples, plan.step), np.full(samples, placed.num_rows))
    return np.stack([*whole_step, plan.positions, plan.members, placed.replica, rows, *plan.costs], axis=1).astype(np.int64)


def table_digest(table: np.ndarray) -> bytes:
    """32 bytes (SHA-256) that differ whenever any entry of a plan table does."""
    return hashlib.sha256(_int64_bytes(table.shape) + table.astype("<i8").tobytes()).digest()


def first_difference(own: np.ndarray, other: np.ndarray) -> str | None:
    """The first entry in which two plan tables differ, in words; None where they are alike."""
    for slot, (mine, theirs) in enumerate(zip(own.tolist(), other.tolist(), strict=False)):
        for name, here, there in zip(PLAN_COLUMNS, mine, theirs, strict=True):
            if here != there:
                return f"sample {slot} of the step has {name} {here} here and {there} there"
    if len(own) != len(other):
        return f"the step has {len(own)} samples here and {len(other)} there"
    return None


def ledger_digest(previous: bytes, members: Sequence[int]) -> bytes:
    """32 bytes that prove a history: the next link of the hash chain, from `previous` and one step's samples in order."""
    return hashlib.sha256(previous + _int64_bytes(members)).digest()


def _int64_bytes(numbers: Sequence[int]) -> bytes:
    return np.array(numbers, dtype="<i8").tobytes()
