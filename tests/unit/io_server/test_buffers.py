"""Memory that is lent again and again: never to two at a time, whatever part of it somebody still holds."""

import gc
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_keye.io_server.buffers import LEAST_BLOCK_BYTES, BufferPool, block_bytes

BIG = LEAST_BLOCK_BYTES


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_memory_that_nobody_holds_is_lent_again():
    pool = BufferPool(16 * BIG)
    first = pool.lend(BIG)
    at = address(first)
    del first
    assert address(pool.lend(BIG)) == at


PARTS = {
    "the array": lambda array: array,
    "a slice": lambda array: array[10:20],
    "a slice of a slice": lambda array: array[10:20][2:3],
    "another shape": lambda array: array.reshape(-1, 4),
    "rows of another shape": lambda array: np.split(array.reshape(-1, 4), [2, 5])[1],
    "the same bytes as other numbers": lambda array: array.view(np.int32)[3:],
    "a memoryview": lambda array: memoryview(array)[5:],
    "a tensor": lambda array: torch.from_numpy(array)[5:].view(-1),
}


@pytest.mark.parametrize("part_of", PARTS.values(), ids=PARTS)
def test_memory_is_not_lent_again_while_any_part_of_it_is_held(part_of):
    pool = BufferPool(16 * BIG)
    array = pool.lend(BIG)
    array[:] = 5
    held = part_of(array)
    del array
    before = np.array(held)
    gc.collect()
    for _ in range(3):
        pool.lend(BIG)[:] = 77
    for other in [pool.lend(BIG) for _ in range(3)]:
        other[:] = 78
    assert np.array_equal(np.array(held), before)


def test_parts_outlive_the_pool():
    pool = BufferPool(16 * BIG)
    array = pool.lend(BIG)
    array[:] = 5
    part = array[100:200]
    del array, pool
    gc.collect()
    assert (part == 5).all()


def test_idle_memory_is_bounded_and_the_last_used_stays():
    pool = BufferPool(4 * BIG)
    arrays = [pool.lend(BIG) for _ in range(8)]
    addresses = [address(array) for array in arrays]
    while arrays:
        del arrays[0]
    assert pool._idle_bytes == 4 * BIG
    assert [address(block) for block in pool._idle] == addresses[4:]


def test_memory_that_cannot_be_page_locked_is_ordinary_and_the_log_says_so_once(monkeypatch, caplog):
    def refuse(*args, pin_memory, **kwargs):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.empty", refuse)
    pool = BufferPool(16 * BIG)
    arrays = [pool.lend(BIG) for _ in range(3)]
    assert len({address(array) for array in arrays}) == 3
    (said,) = caplog.records
    assert "page-locked memory" in said.getMessage() and "CUDA error" in said.getMessage()


def test_no_two_threads_hold_the_same_memory():
    pool = BufferPool(8 * BIG)

    def work(number: int) -> None:
        rng = np.random.default_rng(number)
        for _ in range(50):
            array = pool.lend(int(rng.integers(BIG, 2 * BIG)))
            array[:1000] = number
            array[-1000:] = number
            gc.collect(0)
            assert (array[:1000] == number).all() and (array[-1000:] == number).all()
            good.append(number)

    good: list[int] = []
    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(good) == 200


@given(st.integers(1, 1 << 40))
def test_blocks_are_large_enough_and_little_larger(num_bytes):
    found = block_bytes(num_bytes)
    assert num_bytes <= found <= 1.25 * num_bytes + 1
    assert block_bytes(found) == found
