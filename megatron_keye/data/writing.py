"""From a JSONL file of records to webdataset shards: checked first, then written by several processes, whole or not at all."""

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from megatron_keye.config.schema import StorageConfig
from megatron_keye.data.record import parse_record
from megatron_keye.data.shards import encode_sample, parse_json
from megatron_keye.data.source_media import media_bytes
from megatron_keye.data.storage import DEFAULT_STORAGE
from megatron_keye.data.web_media import web_num_bytes
from megatron_keye.errors import DataError, KeyeError

MAX_LISTED_PROBLEMS = 20


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the input: its number, from 1, and where its bytes are."""

    number: int
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Problem:
    """A record that cannot be used: `place` is file and line."""

    place: str
    reason: str


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """Lines of each shard to write, and those that cannot be."""

    shards: tuple[tuple[Line, ...], ...]
    problems: tuple[Problem, ...]
    keep_web: bool
    """Whether media at web addresses stay there."""

    @property
    def num_samples(self) -> int:
        return sum(len(lines) for lines in self.shards)


def plan_shards(
    source: Path, shard_bytes: int, storage: StorageConfig = DEFAULT_STORAGE, keep_web: bool = False
) -> ShardPlan:  # fmt: skip
    """Check every record of `source` and cut them, in order, into shards of about `shard_bytes`.

    Media are read only as far as their size, web addresses as `storage` says, or not at all where `keep_web` leaves them where they
    are. The plan depends on the input alone. Raises DataError for a file that cannot be read or has no record.
    """
    shards: list[list[Line]] = []
    problems: list[Problem] = []
    seen: dict[str, int] = {}
    filled_bytes = shard_bytes
    for line, text in _lines(source):
        place = f"{source}:{line.number}"
        try:
            record_id, num_bytes = _check(text, source.parent, place, storage, keep_web)
            if record_id in seen:
                raise DataError(f"{place}: found id {record_id} again, first on line {seen[record_id]}; give every record its own")
        except DataError as error:
            problems.append(Problem(place, str(error)))
            continue
        seen[record_id] = line.number
        if filled_bytes >= shard_bytes:
            shards.append([])
            filled_bytes = 0
        shards[-1].append(line)
        filled_bytes += num_bytes
    if not shards and not problems:
        raise DataError(f"{source} has no record; expected one JSON object per line")
    return ShardPlan(tuple(tuple(s) for s in shards), tuple(problems), keep_web)


def write_shards(
    source: Path,
    folder: Path,
    plan: ShardPlan,
    workers: int = 1,
    on_shard: Callable[[int], None] = lambda num_samples: None,
    storage: StorageConfig = DEFAULT_STORAGE,
) -> None:
    """Write `plan` to `folder`, which must not exist or be empty; it appears once every shard is complete.

    Shards do not depend on `workers`. `on_shard` is called with the number of samples of each that is done.
    Raises DataError where the folder has content, nothing can be written, or a record changed since it was planned.
    """
    if not plan.shards:
        raise DataError(f"none of the records of {source} can be used; see their problems")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} exists and is not an empty folder; remove it or write to another")
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        jobs = [(source, partial / f"shard-{number:06d}.tar", lines, storage, plan.keep_web) for number, lines in enumerate(plan.shards)]
        for num_samples in run_jobs(_write_shard, jobs, workers):
            on_shard(num_samples)
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def run_jobs(function: Callable, jobs: list[tuple], workers: int, initializer: Callable[[], None] | None = None) -> Iterator:
    """Results of `function(*job)` as they complete, in `workers` processes, or in this one where that is 1.

    `initializer` is called first in every process that is started. Raises KeyeError where a process dies, and what `function` raises.
    """
    workers = min(workers, len(jobs))
    if workers == 1:
        yield from (function(*job) for job in jobs)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=initializer) as pool:
        futures: list[Future] = [pool.submit(function, *job) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise KeyeError("a worker process died, most likely for want of memory; try again with fewer --workers") from error
        finally:
            pool.shutdown(cancel_futures=True)


def format_problems(problems: tuple[Problem, ...]) -> str:
    """The first problems, one per line, and how many more there are."""
    lines = [f"  {p.reason}" for p in problems[:MAX_LISTED_PROBLEMS]]
    more = len(problems) - MAX_LISTED_PROBLEMS
    return "\n".join(lines + ([f"  and {more} more"] if more > 0 else []))


def _lines(source: Path) -> Iterator[tuple[Line, bytes]]:
    try:
        with source.open("rb") as file:
            offset = 0
            for number, text in enumerate(file, start=1):
                if text.strip():
                    yield Line(number, offset, len(text)), text
                offset += len(text)
    except OSError as error:
        raise DataError(f"cannot read {source}: {error.strerror or error}; expected a JSONL file of records") from error


def _check(text: bytes, folder: Path, place: str, storage: StorageConfig, keep_web: bool) -> tuple[str, int]:
    """Id of the record on a line, and about how many bytes it takes in a shard."""
    record = parse_record(parse_json(text, place), place)
    media_num_bytes = 0
    for media in record.media:
        path = folder / media.address
        if media.origin == "web":
            media_num_bytes += 0 if keep_web else web_num_bytes(media.address, f"{place}, record {record.id}", storage)
        elif media.origin == "file" and path.is_file() and path.stat().st_size > 0:
            media_num_bytes += path.stat().st_size
        else:
            media_num_bytes += len(media_bytes(media, folder, f"{place}, record {record.id}", storage))
    return record.id, len(text) + media_num_bytes


def _write_shard(source: Path, path: Path, lines: tuple[Line, ...], storage: StorageConfig, keep_web: bool) -> int:
    """Write one shard; the number of its samples."""
    import webdataset  # loads torch, which checking records does not need

    with source.open("rb") as file, path.open("wb") as stream, webdataset.TarWriter(stream, encoder=False, mtime=0) as tar:
        for line in lines:
            place = f"{source}:{line.number}"
            file.seek(line.offset)
            record = parse_record(parse_json(file.read(line.num_bytes), place), place)
            where = f"{place}, record {record.id}"
            stays = [keep_web and media.origin == "web" for media in record.media]
            pairs = zip(record.media, stays, strict=True)
            blobs = [None if stay else media_bytes(media, source.parent, where, storage) for media, stay in pairs]
            tar.write(encode_sample(f"{line.number:09d}", record, blobs))
    return len(lines)
