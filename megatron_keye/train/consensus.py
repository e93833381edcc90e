"""Agreement of all ranks before a step's collectives begin: same plan, nobody failed, and sums that everybody needs.

One small sum over the world. Where a rank failed, every rank learns of it here, at the same place, and ends with its words;
nothing is left waiting in a collective.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_keye.errors import KeyeError, PlanError
from megatron_keye.plan.digest import first_difference, table_digest

MESSAGE_BYTES = 2048
"""One byte for the exit code, the others for the message."""

PLANS_DIFFER = (
    "the ranks derived different step plans: {} (rank 0). They must read the same index with the same settings and the same version "
    "of this program: compare the run folder's config.yaml, data.train and the installed package on every host"
)

Item = TypeVar("Item")


class PeerError(KeyeError):
    """Another rank failed and says why; the message is its own, and so is the exit code."""

    def __init__(self, rank: int, message: str, exit_code: int):
        super().__init__(f"rank {rank} failed: {message}")
        self.exit_code = exit_code


def agree(table: np.ndarray, counts: Sequence[int], failure: Exception | None, world: ProcessGroup, device: torch.device) -> list[int]:
    """The sum of each of `counts` over the world, once all ranks have shown the same plan `table` and no failure.

    Tables are compared by their 32-byte digests, as a sum of int64 words, which may wrap. Raises as `raise_together` does, and
    PlanError, with the first difference, where plans differ.
    """
    digest = table_digest(table)
    words = [int.from_bytes(digest[i : i + 8], "little", signed=True) for i in range(0, 32, 8)]
    mine = torch.tensor([int(failure is not None), *counts, *words], dtype=torch.int64, device=device)
    total = mine.clone()
    dist.all_reduce(total, group=world)
    if int(total[0]):
        raise_together(failure, world, device)
    if not torch.equal(total[-len(words) :], mine[-len(words) :] * world.size()):
        _raise_difference(table, world, device)
    return total[1 : 1 + len(counts)].tolist()


def raise_together(failure: Exception | None, world: ProcessGroup, device: torch.device) -> None:
    """Raise on every rank when any has a `failure`: its own on the lowest failing rank and where it is another than that one's,
    PeerError on all other ranks, so that the same words are not said by each of them."""
    nobody = world.size()
    first = torch.tensor(nobody if failure is None else world.rank(), device=device)
    dist.all_reduce(first, op=dist.ReduceOp.MIN, group=world)
    if int(first) == nobody:
        return
    own = _to_bytes(failure)
    message = torch.frombuffer(bytearray(own), dtype=torch.uint8).to(device)
    dist.broadcast(message, src=dist.get_global_rank(world, int(first)), group=world)
    shown = bytes(message.cpu().tolist())
    if failure is not None and (world.rank() == int(first) or own != shown):
        raise failure
    raise PeerError(int(first), shown[1:].rstrip(b"\0").decode(errors="replace"), shown[0])


@contextmanager
def failing_together(world: ProcessGroup, device: torch.device) -> Iterator[None]:
    """For a phase without collectives: what is raised in it on any rank is raised on all, as `raise_together` does."""
    failure = None
    try:
        yield
    except Exception as error:
        # Whatever it is, the other ranks are about to wait for this one.
        failure = error
    raise_together(failure, world, device)


@contextmanager
def said_once(world: ProcessGroup, device: torch.device) -> Iterator[None]:
    """For a phase whose KeyeErrors are raised on all ranks alike: the lowest rank's goes on, the others' become PeerError."""
    try:
        yield
    except KeyeError as error:
        raise_together(error, world, device)


def from_all_ranks(items: list[Item], world: ProcessGroup) -> list[Item]:
    """The items of every rank, by rank."""
    gathered: list = [None] * world.size()
    dist.all_gather_object(gathered, items, group=world)
    return [item for part in gathered for item in part]


def _to_bytes(failure: Exception | None) -> bytes:
    if failure is None:
        return bytes(MESSAGE_BYTES)
    code = failure.exit_code if isinstance(failure, KeyeError) else 1
    text = str(failure) if isinstance(failure, KeyeError) else f"{type(failure).__name__}: {failure}"
    return (bytes([code]) + text.encode())[:MESSAGE_BYTES].ljust(MESSAGE_BYTES, b"\0")


def _raise_difference(table: np.ndarray, world: ProcessGroup, device: torch.device) -> None:
    """Compare with the lowest rank's table, so that the ranks whose own differs say how."""
    first = dist.get_global_rank(world, 0)
    num_rows = torch.tensor(len(table), device=device)
    dist.broadcast(num_rows, src=first, group=world)
    theirs = torch.zeros((int(num_rows), table.shape[1]), dtype=torch.int64, device=device)
    if world.rank() == 0:
        theirs.copy_(torch.from_numpy(table))
    dist.broadcast(theirs, src=first, group=world)
    difference = first_difference(table, theirs.cpu().numpy())
    raise_together(None if difference is None else PlanError(PLANS_DIFFER.format(difference)), world, device)
