"""Agreement of all ranks before a step's collectives begin: same plan, nobody failed, how many tokens are supervised.

One small sum over the world. Where a rank failed, every rank learns of it here, at the same place, and ends with its words;
nothing is left waiting in a collective.
"""

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_keye.errors import KeyeError, PlanError

MESSAGE_BYTES = 2048


class PeerError(KeyeError):
    """Another rank failed; the message is its own, and so is the exit code."""

    def __init__(self, rank: int, message: str, exit_code: int):
        super().__init__(f"rank {rank} failed: {message}")
        self.exit_code = exit_code


def agree(digest: bytes, num_supervised: int, failure: Exception | None, world: ProcessGroup, device: torch.device) -> int:
    """The sum of `num_supervised` over the world, once all ranks have shown the same 32-byte plan `digest` and no failure.

    Raises this rank's own `failure`, PeerError where only others failed, and PlanError where plans differ. The digests are
    compared as a sum of int64 words, which may wrap.
    """
    words = [0, num_supervised, *(int.from_bytes(digest[i : i + 8], "little", signed=True) for i in range(0, 32, 8))]
    words[0] = int(failure is not None)
    mine = torch.tensor(words, dtype=torch.int64, device=device)
    total = mine.clone()
    dist.all_reduce(total, group=world)
    if int(total[0]):
        raise_together(failure, world, device)
    if not torch.equal(total[2:], mine[2:] * world.size()):
        raise PlanError(
            "the ranks derived different step plans; they must read the same index with the same settings and the same version "
            "of this program: compare the run folder's config.yaml, data.train and the installed package on every host"
        )
    return int(total[1])


def raise_together(failure: Exception | None, world: ProcessGroup, device: torch.device) -> None:
    """Raise on every rank when any has a `failure`: its own where it has one, else the lowest failing rank's as PeerError."""
    nobody = world.size()
    first = torch.tensor(nobody if failure is None else world.rank(), device=device)
    dist.all_reduce(first, op=dist.ReduceOp.MIN, group=world)
    if int(first) == nobody:
        return
    message = torch.zeros(MESSAGE_BYTES, dtype=torch.uint8, device=device)
    if failure is not None:
        code = failure.exit_code if isinstance(failure, KeyeError) else 1
        text = bytes([code]) + (str(failure) or type(failure).__name__).encode()[: MESSAGE_BYTES - 1]
        message[: len(text)] = torch.tensor(list(text), dtype=torch.uint8)
    dist.broadcast(message, src=dist.get_global_rank(world, int(first)), group=world)
    if failure is not None:
        raise failure
    code, *text = message.cpu().tolist()
    raise PeerError(int(first), bytes(text).rstrip(b"\0").decode(errors="replace"), code)
