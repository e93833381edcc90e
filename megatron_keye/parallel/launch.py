"""Start ranks by forking this process: one function, N ranks, their results back.

Forking after Megatron is imported makes a two-rank world in a fraction of a second instead of the 10 s that N fresh
interpreters take on two cores. Used by `keye verify-layout` and by the tests; training runs under torchrun.
"""

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from typing import Any

import torch
import torch.distributed as dist


class WorkerError(RuntimeError):
    """A rank failed or did not end in time; the message carries the first failure's traceback."""


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, prepare: Callable[[], None], timeout_s: float = 120.0
) -> list[Any]:
    """Call `function(*args)` on `world_size` forked ranks in one gloo (or NCCL) world; returns each rank's result, by rank.

    `prepare` runs in each rank before the world exists (the CPU adapter belongs there). The caller must not have used
    CUDA yet. Raises WorkerError with the traceback of the rank that failed first; the others are ended.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ranks, pipes = [], []
        for rank in range(world_size):
            receiving, sending = context.Pipe(duplex=False)
            target_args = (sending, os.path.join(folder, "store"), rank, world_size, prepare, function, args, timeout_s)
            process = context.Process(target=_run_rank, args=target_args, daemon=False)
            process.start()
            sending.close()
            ranks.append(process)
            pipes.append(receiving)
        try:
            return _collect(pipes, time.monotonic() + timeout_s)
        finally:
            for process in ranks:
                process.join(timeout=2.0)
                if process.is_alive():
                    process.kill()
                    process.join()


def _run_rank(sending, store_path, rank, world_size, prepare, function, args, timeout_s) -> None:
    try:
        torch.set_num_threads(1)
        prepare()
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if backend == "nccl":
            torch.cuda.set_device(rank)
        dist.init_process_group(
            backend, store=dist.FileStore(store_path, world_size), rank=rank, world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )  # fmt: skip
        outcome = (True, function(*args))
    except BaseException:
        outcome = (False, traceback.format_exc())
    try:
        # Plain pickle, between this process and its own child over an anonymous pipe: torch's pickler would share memory with a
        # process that is about to end.
        sending.send_bytes(pickle.dumps(outcome))
    finally:
        sending.close()
        # Without the interpreter's own shutdown: forked ranks share the parent's atexit handlers and buffers.
        os._exit(0)


def _collect(pipes: list, deadline: float) -> list[Any]:
    """Results by rank. The first failure ends the wait: what other ranks report after it is only its echo."""
    results: list[Any] = [None] * len(pipes)
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise WorkerError(f"ranks {sorted(waiting.values())} did not end in time")
        failures = []
        for pipe in ready:
            rank = waiting.pop(pipe)
            try:
                succeeded, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                succeeded, value = False, "the process died without a word"
            if succeeded:
                results[rank] = value
            else:
                failures.append((rank, value))
        if failures:
            rank, text = next(((r, t) for r, t in failures if "Connection closed by peer" not in t), failures[0])
            raise WorkerError(f"rank {rank} of {len(pipes)} failed:\n{text}")
    return results
