"""Both transports bring the same bytes to every rank, step after step, whatever the sizes; the setting and the host decide which it is."""

import os
import time

import numpy as np
import pytest

from megatron_keye.data.transport import CollectiveTransport, SharedMemoryTransport, open_transport
from megatron_keye.errors import SettingsError
from tests.tiny import on_ranks, runtime_here

SIZES = [[5, 0, 70_000, 12], [0, 0, 0, 0], [1, 3_000_000, 8, 9], [40, 41, 42, 43], [7, 1, 0, 2_000_000]]


def arrays_of(step, rank, size):
    """Two arrays that make `size` bytes."""
    numbers = (np.arange(size) * (rank + 3) + step).astype(np.uint8)
    return [numbers[: size // 2], numbers[size // 2 :]]


def received(config, kind):
    runtime = runtime_here(config)
    groups, device = runtime.groups, runtime.device
    transport, found, held = kind(groups.replica, device), [], []
    for step, sizes in enumerate(SIZES):
        if step:  # the leader is already at the next
            time.sleep(0.02 * groups.rank)
            np.testing.assert_array_equal(held[-1].numpy(), found[-1])
        parcels = [arrays_of(step, rank, size) for rank, size in enumerate(sizes)] if groups.is_leader else None
        held.append(transport.scatter(parcels, sizes))
        found.append(held[-1].numpy().copy())
    return found, [name for name in os.listdir("/dev/shm") if name.startswith("keye")]


@pytest.mark.parametrize("kind", [CollectiveTransport, SharedMemoryTransport])
def test_every_rank_gets_its_bytes(tiny, kind):
    for rank, (found, left_behind) in enumerate(on_ranks("tp2pp2", tiny.config(), received, kind)):
        for step, sizes in enumerate(SIZES):
            np.testing.assert_array_equal(found[step], np.concatenate(arrays_of(step, rank, sizes[rank])))
        assert left_behind == []


def opened(config, name, denied_rank=None):
    runtime = runtime_here(config)
    groups, device = runtime.groups, runtime.device
    if groups.rank == denied_rank:
        os.setgid(65534)
        os.setuid(65534)  # another user may not open the leader's files
    try:
        transport, why = open_transport(name, groups.replica, device)
    except SettingsError as error:
        return str(error)
    return transport.name, why


def test_the_faster_one_is_taken_on_all_ranks_alike(tiny):
    first, second = on_ranks("tp2", tiny.config(), opened, "auto")
    assert first == second
    assert "collective" in first[1] and "shared_memory" in first[1] and "ms" in first[1]


@pytest.mark.parametrize("name", ["collective", "shared_memory"])
def test_a_setting_forces_one(tiny, name):
    assert on_ranks("tp2", tiny.config(), opened, name) == [(name, "by setting")] * 2


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_ranks_that_share_no_memory_use_the_collective_or_say_so(tiny):
    assert on_ranks("tp2", tiny.config(), opened, "auto", 1) == [("collective", "the ranks share no memory")] * 2
    for error in on_ranks("tp2", tiny.config(), opened, "shared_memory", 1):
        assert "do not share a host; set it to auto" in error


def test_a_rank_alone_needs_neither(tiny):
    assert on_ranks("one", tiny.config(), opened, "auto") == [("collective", "there is one rank")]
