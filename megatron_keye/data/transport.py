"""How a step's bytes get from a replica's leader to its ranks: by the replica's collective, or through memory that ranks of one host share.

Which is faster depends on the host and the backend, so it is measured when a run starts, unless a setting forces one.
"""

import mmap
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_keye.config.schema import TransportName
from megatron_keye.errors import SettingsError

Parcels = Sequence[Sequence[np.ndarray]]
PROBE_BYTES = 4 << 20
"""Sent to every rank when transports are compared."""
PROBE_ROUNDS = 3
LEAST_FILE_BYTES = 1 << 20


class Transport(Protocol):
    """From the leader, rank 0 of the group, to every rank of it."""

    name: str

    def scatter(self, parcels: Parcels | None, sizes: Sequence[int]) -> Tensor:
        """uint8 [sizes[rank]]: the arrays of `parcels[rank]`, one after another. All ranks must call it; the leader alone has `parcels`.

        The tensor is good until this rank calls again.
        """
        ...


class CollectiveTransport:
    """One collective of the group, on its device; a rank that is alone only puts its arrays together."""

    name = "collective"

    def __init__(self, group: ProcessGroup, device: torch.device):
        self._group, self._device = group, device

    def scatter(self, parcels: Parcels | None, sizes: Sequence[int]) -> Tensor:
        """As `Transport.scatter`; the tensor is on the group's device."""
        own = sizes[self._group.rank()]
        sent = torch.empty(0 if parcels is None else sum(sizes), dtype=torch.uint8, device=self._device)
        if parcels is not None:
            _send(sent, parcels)
        if self._group.size() == 1:
            return sent
        received = torch.empty(own, dtype=torch.uint8, device=self._device)
        send_sizes = [0] * len(sizes) if parcels is None else list(sizes)
        dist.all_to_all_single(received, sent, [own] + [0] * (len(sizes) - 1), send_sizes, group=self._group)
        return received


class SharedMemoryTransport:
    """Memory files of the leader, which the other ranks open through its /proc entry: whoever dies, nothing is left behind.

    Two files take turns: while the leader fills one, others may still use what came in the other. Nobody leaves a call before all have
    come, and whoever comes has done with what came before, so the leader may then write to that file again.
    """

    name = "shared_memory"

    def __init__(self, group: ProcessGroup, device: torch.device):
        self._group, self._device = group, device
        self._files = [np.empty(0, np.uint8), np.empty(0, np.uint8)]
        self._addresses = [(0, 0), (0, 0)]
        """Process and descriptor of each."""

    def scatter(self, parcels: Parcels | None, sizes: Sequence[int]) -> Tensor:
        """As `Transport.scatter`; the tensor is in this host's memory. Raises OSError where the leader's file cannot be opened."""
        self._files.reverse()
        self._addresses.reverse()
        if parcels is not None:
            if len(self._files[0]) < sum(sizes):
                self._make_file(sum(sizes))
            _write(self._files[0], parcels)
        address = torch.tensor((0, 0) if parcels is None else self._addresses[0], device=self._device)
        dist.all_reduce(address, group=self._group)  # it also says that the bytes are there
        if parcels is None and tuple(address.tolist()) != self._addresses[0]:
            self._open_file(*address.tolist())
        start = sum(sizes[: self._group.rank()])
        return torch.from_numpy(self._files[0][start : start + sizes[self._group.rank()]])

    def _make_file(self, num_bytes: int) -> None:
        descriptor = os.memfd_create("keye-step", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, max(LEAST_FILE_BYTES, 2 * num_bytes))
        self._replace_file(descriptor, (os.getpid(), descriptor))

    def _open_file(self, process: int, descriptor: int) -> None:
        own = os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
        self._replace_file(own, (process, descriptor))
        os.close(own)

    def _replace_file(self, descriptor: int, address: tuple[int, int]) -> None:
        """The memory lives as long as an array of it; the leader's old descriptor is closed, as nobody opens it any more."""
        if self._addresses[0][0] == os.getpid():
            os.close(self._addresses[0][1])
        self._files[0] = np.frombuffer(mmap.mmap(descriptor, 0), dtype=np.uint8)
        self._addresses[0] = address


def open_transport(name: TransportName, group: ProcessGroup, device: torch.device) -> tuple[Transport, str]:
    """The transport that the setting names, or the faster one; and why, in words. All ranks of the group must call it.

    Raises SettingsError where shared memory is forced and the ranks do not share any.
    """
    collective = CollectiveTransport(group, device)
    if group.size() == 1 or name == "collective":
        return collective, "by setting" if name == "collective" else "there is one rank"
    shared = SharedMemoryTransport(group, device)
    if not _shares_memory(group, device):
        if name == "shared_memory":
            raise SettingsError("data.transport=shared_memory: the ranks of a replica do not share a host; set it to auto")
        return collective, "the ranks share no memory"
    if name == "shared_memory":
        return shared, "by setting"
    times_s = {transport.name: _seconds(transport, group, device) for transport in (collective, shared)}
    fastest = min((collective, shared), key=lambda transport: times_s[transport.name])
    measured = ", ".join(f"{kind} {1e3 * seconds:.1f} ms" for kind, seconds in times_s.items())
    return fastest, f"measured for {PROBE_BYTES >> 20} MiB to each rank: {measured}"


def _shares_memory(group: ProcessGroup, device: torch.device) -> bool:
    """Whether every rank can open the leader's files and finds in one of them what the leader wrote."""
    token = np.frombuffer(os.urandom(8), np.uint8)
    descriptor = os.memfd_create("keye-probe", os.MFD_CLOEXEC)
    os.write(descriptor, token.tobytes())
    sent = torch.tensor([os.getpid(), descriptor, *token.tolist()], device=device)
    dist.broadcast(sent, src=dist.get_global_rank(group, 0), group=group)
    process, number, *expected = sent.tolist()
    try:
        found = list(Path(f"/proc/{process}/fd/{number}").read_bytes())
    except OSError:
        found = []
    agreed = torch.tensor(int(found == expected), device=device)
    dist.all_reduce(agreed, op=dist.ReduceOp.MIN, group=group)
    os.close(descriptor)
    return bool(agreed)


def _seconds(transport: Transport, group: ProcessGroup, device: torch.device) -> float:
    """The shortest of a few rounds, of the slowest rank, up to where the bytes are on the device; alike on all ranks."""
    sizes = [PROBE_BYTES] * group.size()
    parcels = [[np.ones(PROBE_BYTES, np.uint8)] for _ in sizes] if group.rank() == 0 else None
    shortest = float("inf")
    for _ in range(PROBE_ROUNDS + 1):
        began_s = time.perf_counter()
        transport.scatter(parcels, sizes).to(device).sum().item()
        took_s = torch.tensor(time.perf_counter() - began_s, dtype=torch.float64, device=device)
        dist.all_reduce(took_s, op=dist.ReduceOp.MAX, group=group)
        shortest = min(shortest, float(took_s))
    return shortest


def _write(target: np.ndarray, parcels: Parcels) -> None:
    """The bytes of all arrays, one after another, into uint8 `target`."""
    for place, array in _placed(parcels):
        target[place] = array


def _send(target: Tensor, parcels: Parcels) -> None:
    """`_write` to a device. A GPU takes every array from where it lies: at once where that is page-locked, as servers' answers are."""
    if target.device.type == "cpu":
        _write(target.numpy(), parcels)
        return
    for place, array in _placed(parcels):
        target[place].copy_(torch.from_numpy(array), non_blocking=True)
    torch.cuda.synchronize(target.device)  # the arrays' memory may be used again when this returns


def _placed(parcels: Parcels) -> Iterator[tuple[slice, np.ndarray]]:
    """The bytes of all arrays, uint8, and where they go."""
    start = 0
    for array in (array for parcel in parcels for array in parcel):
        yield slice(start, start + array.nbytes), array.reshape(-1).view(np.uint8)
        start += array.nbytes
