"""All-reduce bandwidth of each node with its neighbours, as one line of JSON per node. One process per node, started by srun.

Pairs are measured side by side, in two rounds, so that every node meets two others: a node that is slow with both is slow itself.
NCCL with one GPU per node where there are any, gloo otherwise.
"""

import argparse
import json
import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

REPEATS = 5
TIMEOUT = timedelta(seconds=60)


def pairs(num_nodes: int, round_number: int) -> list[tuple[int, int]]:
    """Disjoint pairs of neighbours on a ring, shifted by one in round 1; of an odd number one node stays alone in each round."""
    ring = [(i + round_number) % num_nodes for i in range(num_nodes)]
    return list(zip(ring[::2], ring[1::2], strict=False))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--head", required=True, metavar="HOST:PORT")
    parser.add_argument("--bytes", type=int, default=64 << 20, metavar="B")
    args = parser.parse_args(argv)
    rank, num_nodes = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    device, backend = ("cuda:0", "nccl") if torch.cuda.is_available() else ("cpu", "gloo")
    dist.init_process_group(backend, init_method=f"tcp://{args.head}", rank=rank, world_size=num_nodes, timeout=TIMEOUT)
    values = torch.ones(args.bytes // 4, device=device)
    best = 0.0
    for round_number in (0, 1):
        # Every process makes every group, as torch demands.
        groups = [(pair, dist.new_group(pair)) for pair in pairs(num_nodes, round_number)]
        dist.barrier()
        for pair, group in groups:
            if rank in pair:
                best = max(best, bytes_per_s(values, group))
    print(json.dumps({"node": os.environ["SLURMD_NODENAME"], "bytes_per_s": best}), flush=True)
    dist.barrier()
    return 0


def bytes_per_s(values: torch.Tensor, group: dist.ProcessGroup) -> float:
    """Of the sum of a tensor over two processes."""
    dist.all_reduce(values, group=group)
    _finish(values)
    began_s = time.perf_counter()
    for _ in range(REPEATS):
        dist.all_reduce(values, group=group)
    _finish(values)
    return REPEATS * values.nbytes / (time.perf_counter() - began_s)


def _finish(values: torch.Tensor) -> None:
    if values.is_cuda:
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
