"""The cache of fetched bytes: a limit that holds, the least used first, and no damage whatever happens to its files."""

import multiprocessing
import os
import threading
import time

import pytest

from megatron_keye.data.span_cache import ABANDONED_AFTER_S, CRC_BYTES, PARTIAL, SpanCache, locked


def size_of(folder):
    return sum(path.stat().st_size for path in folder.glob("??/*"))


def test_what_is_put_is_got(tmp_path):
    cache = SpanCache(tmp_path, 1000)
    assert cache.get("a") is None
    cache.put("a", b"bytes of a")
    cache.put("b", b"")
    assert cache.get("a") == b"bytes of a"
    assert cache.get("b") == b""
    assert SpanCache(tmp_path, 1000).get("a") == b"bytes of a"


def test_the_limit_holds_and_the_least_used_go_first(tmp_path):
    cache = SpanCache(tmp_path, 10 * 104)
    for number in range(10):
        cache.put(str(number), bytes([number]) * 100)
        os.utime(cache._path(str(number)), (1000 + number, 1000 + number))
    assert cache.get("0") is not None  # used now, so it stays
    for number in range(10, 13):
        cache.put(str(number), bytes(100))
        assert size_of(tmp_path) <= 10 * 104
    kept = {number for number in range(13) if cache.get(str(number)) is not None}
    assert {0, 10, 11, 12} <= kept
    assert not {1, 2} & kept


def test_an_entry_beyond_the_limit_is_not_kept(tmp_path):
    cache = SpanCache(tmp_path, 50)
    cache.put("a", bytes(51 - CRC_BYTES))
    assert cache.get("a") is None
    assert size_of(tmp_path) == 0


def test_the_same_entry_twice_counts_once(tmp_path):
    cache = SpanCache(tmp_path, 1000)
    for _ in range(50):
        cache.put("a", bytes(100))
        cache.put("b", bytes(100))
    assert cache.get("a") == cache.get("b") == bytes(100)


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"", lambda b: b[:2], lambda b: bytes([b[0] ^ 1]) + b[1:]])
def test_a_damaged_entry_is_as_if_it_were_not_there(tmp_path, damage):
    cache = SpanCache(tmp_path, 1000)
    cache.put("a", b"0123456789")
    path = cache._path("a")
    path.write_bytes(damage(path.read_bytes()))
    assert cache.get("a") is None
    cache.put("a", b"0123456789")
    assert cache.get("a") == b"0123456789"


def test_a_lost_or_wrong_sum_is_counted_anew(tmp_path):
    cache = SpanCache(tmp_path, 500)
    for total in ("", "nonsense", None):
        if total is None:
            (tmp_path / "total").unlink()
        else:
            (tmp_path / "total").write_text(total)
        for number in range(9):
            cache.put(f"{total} {number}", bytes(100))
            assert size_of(tmp_path) <= 500


def test_partial_files_of_processes_that_are_gone_are_removed(tmp_path):
    cache = SpanCache(tmp_path, 300)
    cache.put("a", bytes(100))
    folder = cache._path("a").parent
    old, new = folder / f"old{PARTIAL}", folder / f"new{PARTIAL}"
    for path in (old, new):
        path.write_bytes(b"half")
    before = time.time() - ABANDONED_AFTER_S - 1
    os.utime(old, (before, before))
    for number in range(4):
        cache.put(str(number), bytes(100))
    assert not old.exists()
    assert new.exists()


def test_a_disk_that_refuses_costs_the_cache_alone(tmp_path, caplog):
    cache = SpanCache(tmp_path, 1000)
    (tmp_path / cache._path("a").parent.name).write_text("a file where the folder would be")
    for _ in range(3):
        cache.put("a", b"bytes")
    assert cache.get("a") is None
    assert caplog.text.count("cannot keep data in the cache") == 1
    cache.put("b", b"bytes")
    cache.put("a", b"bytes")
    assert caplog.text.count("cannot keep data in the cache") == 2


def test_an_entry_waits_for_whoever_changes_the_sum(tmp_path):
    cache = SpanCache(tmp_path, 1000)
    putting = threading.Thread(target=cache.put, args=("a", b"bytes"))
    with locked(tmp_path / "lock"):
        putting.start()
        putting.join(0.2)
        assert putting.is_alive()
        assert cache.get("a") is None
    putting.join(10)
    assert cache.get("a") == b"bytes"


def use(folder, limit_bytes, seed):
    cache = SpanCache(folder, limit_bytes)
    for number in range(150):
        key = str((seed * 7 + number * number) % 40)
        found = cache.get(key)
        assert found is None or found == key.encode() * 50
        cache.put(key, key.encode() * 50)


def test_processes_share_it_without_harm(tmp_path):
    limit_bytes = 15 * 104
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=use, args=(tmp_path, limit_bytes, seed)) for seed in range(3)]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        whole = [path for path in tmp_path.glob("??/*") if path.suffix != PARTIAL]
        assert len(whole) <= 15 * 2  # entries of 54 or 104 bytes
        time.sleep(0.01)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert size_of(tmp_path) <= limit_bytes
    assert int((tmp_path / "total").read_text()) == size_of(tmp_path)
