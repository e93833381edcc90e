"""Files of a checkpoint: rectangles of tensors in the safetensors format, written as a stream, read as a memory map.

The format is an 8-byte little-endian header length, a JSON header (name -> dtype, shape, byte range), and the tensors' bytes
(https://github.com/huggingface/safetensors). It is written here and not by the library because checksums are computed while
writing and no more than one chunk is ever copied; and read here because a rectangle of a rectangle must not cost a copy, and
because the library decodes through torch calls that the float64 mode of `parallel/cpu.py` would redirect.
"""

import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch import Tensor

from megatron_keye.checkpoint.ranges import matrix_shape
from megatron_keye.errors import CheckpointError

DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
Block = bytes | np.ndarray
OnBytes = Callable[[int], object]
"""Told the number of bytes that have just been done."""
CHUNK_BYTES = 1 << 20
"""Most bytes of a block on its way from a file or tensor to the disk: it stays in the processor's cache."""
WRITE_BACK_BYTES = 128 << 20
"""Most bytes, or nearly so, that wait for the disk while more are made."""
MAX_HEADER_BYTES = 100 << 20
"""The safetensors library's own limit."""


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What a file must be."""

    name: str
    num_bytes: int
    xxh3_128: str
    """Checksum of all bytes, hexadecimal: against damage, not against forgery, and some ten times as fast as SHA-256."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and type of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def write_tensors(path: Path, tensors: Sequence[tuple[str, Tensor]]) -> FileRecord:
    """Write contiguous floating-point `tensors` under their names, flushed to disk. Host memory used: one chunk."""
    by_name = dict(tensors)

    def chunks(name: str) -> Iterator[Tensor]:
        flat = by_name[name].detach().reshape(-1)
        yield from flat.split(CHUNK_BYTES // flat.element_size())

    specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in by_name.items()}
    return write_recorded(path, specs, chunks)


def write_recorded(
    path: Path,
    specs: Mapping[str, TensorSpec],
    chunks: Callable[[str], Iterable[Tensor]],
    on_block: Callable[[Block], object] = lambda block: None,
) -> FileRecord:
    """As `write_stream`, with a checksum: a block that was just written is still in the processor's cache."""
    digest = xxhash.xxh3_128()

    def hash_and_tell(block: Block) -> None:
        digest.update(block)
        on_block(block)

    num_bytes = write_stream(path, specs, chunks, hash_and_tell)
    return FileRecord(path.name, num_bytes, digest.hexdigest())


def write_stream(
    path: Path,
    specs: Mapping[str, TensorSpec],
    chunks: Callable[[str], Iterable[Tensor]],
    on_block: Callable[[Block], object],
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Write a new file of the tensors `specs`, flushed to disk; returns its size in bytes. Host memory used: one chunk.

    `chunks(name)` gives the elements of a tensor in order, as contiguous tensors of its type. `on_block` is called with every run of
    bytes just after it is written.
    """
    # The widest first, which keeps every tensor aligned to its own element size.
    ordered = sorted(specs, key=lambda name: -specs[name].dtype.itemsize)
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name in ordered:
        spec, end = specs[name], position + specs[name].num_bytes
        header[name] = {"dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file, _WriteBack(file.fileno()) as write_back:
        for data in (struct.pack("<Q", len(text)), text):
            file.write(data)
            on_block(data)
        for name in ordered:
            for chunk in chunks(name):
                data = chunk.detach().reshape(-1).cpu().view(torch.uint8).numpy()
                file.write(data)
                on_block(data)
                write_back.add(len(data))
        num_bytes = file.tell()
        file.flush()
    if num_bytes != 8 + len(text) + position:
        raise CheckpointError(f"{path} got {num_bytes:,} bytes, and its header says {8 + len(text) + position:,}; please report it")
    return num_bytes


class _WriteBack:
    """Has the disk write a file while more of it is made, so that little is left for the flush with which the block ends.

    Raises OSError where the disk did not take what was written before: it says so only once.
    """

    def __init__(self, descriptor: int):
        self._descriptor = descriptor
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._flushing: Future[None] | None = None
        self._num_bytes = 0

    def add(self, num_bytes: int) -> None:
        """So many more bytes were written."""
        self._num_bytes += num_bytes
        if self._num_bytes >= WRITE_BACK_BYTES and (self._flushing is None or self._flushing.done()):
            self._wait()
            self._flushing = self._pool.submit(os.fdatasync, self._descriptor)
            self._num_bytes = 0

    def __enter__(self) -> "_WriteBack":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        with self._pool:
            if error is None:
                self._wait()
                os.fsync(self._descriptor)

    def _wait(self) -> None:
        if self._flushing is not None:
            self._flushing.result()


def write_text(path: Path, text: str) -> None:
    """Write a new file, flushed to disk."""
    with open(path, "x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def flush_folder(path: Path) -> None:
    """Make names created in or moved into the folder survive a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def size_damage(folder: Path, record: FileRecord) -> str | None:
    """What is wrong with a file as far as its size says, or None. Reads nothing of it."""
    path = folder / record.name
    try:
        num_bytes = path.stat().st_size
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    if num_bytes != record.num_bytes:
        return f"{path} has {num_bytes:,} bytes where {record.num_bytes:,} were written: it is torn"
    return None


def file_damage(folder: Path, record: FileRecord, on_bytes: OnBytes = lambda num_bytes: None) -> str | None:
    """What is wrong with a file, or None. Reads all of it, unless its size is wrong."""
    torn = size_damage(folder, record)
    if torn is not None:
        return torn
    path = folder / record.name
    try:
        digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(CHUNK_BYTES))
        with open(path, "rb", buffering=0) as file:
            while num_bytes := file.readinto(buffer):
                digest.update(buffer[:num_bytes])
                on_bytes(num_bytes)
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    if digest.hexdigest() != record.xxh3_128:
        return f"{path} has the checksum {digest.hexdigest()[:12]}... where {record.xxh3_128[:12]}... was written: its bytes have changed"
    return None


class TensorFile:
    """A safetensors file, to be looked at through a memory map, which costs page cache and no memory of the process, or read in rows."""

    def __init__(self, path: Path):
        """Raises CheckpointError where the file is missing, cut off, or not of this format."""
        try:
            self._file = open(path, "rb", buffering=0)
            (header_bytes,) = struct.unpack("<Q", self._file.read(8))
            text = self._file.read(min(header_bytes, MAX_HEADER_BYTES))
            num_bytes = os.fstat(self._file.fileno()).st_size - 8 - header_bytes
            self._header_bytes = 8 + header_bytes
            if len(text) != header_bytes:
                raise ValueError(f"its header has {len(text):,} of {header_bytes:,} bytes")
            header = json.loads(text)
            header.pop("__metadata__", None)
            self._starts = {name: _checked_start(name, entry, num_bytes) for name, entry in header.items()}
            self._specs = {name: TensorSpec(tuple(entry["shape"]), DTYPES[entry["dtype"]]) for name, entry in header.items()}
            end = max((self._starts[name] + spec.num_bytes for name, spec in self._specs.items()), default=0)
            if end != num_bytes:
                raise ValueError(f"its tensors end at byte {end:,} of {num_bytes:,}: bytes were added")
            # Copy on write, never written: numpy would mark a read-only map as such, and torch would warn about every view.
            self._data = np.memmap(path, dtype=np.uint8, mode="c", offset=8 + header_bytes) if num_bytes else np.empty(0, np.uint8)
        except (OSError, ValueError, TypeError, AttributeError, LookupError, struct.error) as error:
            raise CheckpointError(f"{path} cannot be read as safetensors ({error}); copy it again, or use another one") from error

    def names(self) -> list[str]:
        return list(self._specs)

    def spec(self, name: str) -> TensorSpec:
        return self._specs[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._specs[name].shape

    def tensor(self, name: str) -> Tensor:
        """The tensor as a view of the file: to be copied from, not to be written to."""
        spec, start = self._specs[name], self._starts[name]
        if not spec.num_bytes:
            return torch.empty(spec.shape, dtype=spec.dtype)
        return torch.from_numpy(self._data[start : start + spec.num_bytes]).view(spec.dtype).view(spec.shape)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the tensor as a matrix, in memory of their own. Of data that is read once, this costs less than a map.

        Raises CheckpointError where the file has become shorter.
        """
        spec = self._specs[name]
        rows = torch.empty(stop - start, matrix_shape(spec.shape)[1], dtype=spec.dtype)
        if rows.nbytes:
            place = self._header_bytes + self._starts[name] + start * (rows.nbytes // (stop - start))
            if os.preadv(self._file.fileno(), [rows.view(torch.uint8).numpy()], place) != rows.nbytes:
                raise CheckpointError(f"{self._file.name} was cut off while it was read; copy it again, or use another one")
        return rows


def _checked_start(name: str, entry: Mapping, num_bytes: int) -> int:
    """First byte of a tensor in a file whose tensors have `num_bytes`. Raises ValueError where it cannot lie there."""
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{name} has the type {entry['dtype']}, expected one of {', '.join(DTYPES)}")
    start, stop = entry["data_offsets"]
    needed = prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize
    if not 0 <= start <= stop or stop - start != needed:
        raise ValueError(f"{name} of shape {entry['shape']} has {stop - start:,} bytes, expected {needed:,}")
    if stop > num_bytes:
        raise ValueError(f"{name} ends at byte {stop:,} of {num_bytes:,}: the file is cut off")
    return start
