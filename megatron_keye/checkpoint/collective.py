"""Phases that succeed or fail on all ranks alike: a disk that is full on one rank must not leave the others waiting.

`world` is a process group, or None for a process that is alone.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_keye.errors import CheckpointError

Result = TypeVar("Result")
MAX_PROBLEMS_SHOWN = 20


def rank_of(world: ProcessGroup | None) -> int:
    return 0 if world is None else world.rank()


def size_of(world: ProcessGroup | None) -> int:
    return 1 if world is None else world.size()


def exchange(world: ProcessGroup | None, value: Any) -> list[Any]:
    """Every rank's `value`, by rank."""
    if world is None:
        return [value]
    values: list[Any] = [None] * world.size()
    dist.all_gather_object(values, value, group=world)
    return values


def gather(world: ProcessGroup | None, value: Any) -> list[Any]:
    """Every rank's `value` on rank 0; an empty list on the others."""
    if world is None:
        return [value]
    values: list[Any] | None = [None] * world.size() if world.rank() == 0 else None
    dist.gather_object(value, values, dst=dist.get_global_rank(world, 0), group=world)
    return values or []


def together(world: ProcessGroup | None, phase: Callable[[], Result]) -> Result:
    """Run `phase`, which must hold no collective, on every rank and return its result.

    Raises CheckpointError on all ranks, with each failing rank's problem, when it failed on any.
    """
    result, failure = None, None
    try:
        result = phase()
    except Exception as error:
        # Whatever it is, the other ranks are about to wait for this one.
        failure = error
    problems: dict[str, list[int]] = {}
    for rank, text in enumerate(exchange(world, None if failure is None else _describe(failure))):
        if text is not None:
            problems.setdefault(text, []).append(rank)
    if problems:
        raise CheckpointError(_summary(problems, size_of(world))) from failure
    return result


def on_first_rank(world: ProcessGroup | None, phase: Callable[[], Result]) -> Result:
    """Run `phase` on rank 0 only and return its result on every rank. Raises as `together` does."""
    result = together(world, lambda: phase() if rank_of(world) == 0 else None)
    return exchange(world, result)[0]


def _describe(error: Exception) -> str:
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"


def _summary(problems: dict[str, list[int]], num_ranks: int) -> str:
    """Each problem once, with the ranks that met it unless all did."""
    lines = [text if len(ranks) == num_ranks else f"{_ranks(ranks)}: {text}" for text, ranks in problems.items()]
    hidden = len(lines) - MAX_PROBLEMS_SHOWN
    return "\n".join(lines[:MAX_PROBLEMS_SHOWN]) + (f"\n... and {hidden} more problems" if hidden > 0 else "")


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" + (f" and {len(ranks) - 1} more" if len(ranks) > 1 else "")
