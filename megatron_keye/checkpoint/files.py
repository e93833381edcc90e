"""Files of a checkpoint: rectangles of tensors in the safetensors format, written as a stream, read as a memory map.

The format is an 8-byte little-endian header length, a JSON header (name -> dtype, shape, byte range), and the tensors' bytes
(https://github.com/huggingface/safetensors). It is written here and not by the library because checksums are computed while
writing and no more than one chunk is ever copied; and read here because a rectangle of a rectangle must not cost a copy, and
because the library decodes through torch calls that the float64 mode of `parallel/cpu.py` would redirect.
"""

import hashlib
import json
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_keye.errors import CheckpointError

DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
CHUNK_BYTES = 32 << 20
"""Most bytes on their way from a tensor to the disk at once."""
MAX_HEADER_BYTES = 100 << 20
"""The safetensors library's own limit."""


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What a file must be."""

    name: str
    num_bytes: int
    sha256: str


def write_tensors(path: Path, tensors: Sequence[tuple[str, Tensor]]) -> FileRecord:
    """Write contiguous floating-point `tensors` under their names, flushed to disk. Host memory used: one chunk."""
    ordered = sorted(tensors, key=lambda item: -item[1].element_size())  # keeps every tensor aligned to its own element size
    header, position = {}, 0
    for name, tensor in ordered:
        end = position + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "xb") as file:
        for data in (struct.pack("<Q", len(text)), text):
            file.write(data)
            digest.update(data)
        for _, tensor in ordered:
            for chunk in tensor.detach().reshape(-1).split(CHUNK_BYTES // tensor.element_size()):
                data = chunk.cpu().view(torch.uint8).numpy()
                file.write(data)
                digest.update(data)
        num_bytes = file.tell()
        _flush(file)
    return FileRecord(path.name, num_bytes, digest.hexdigest())


def write_text(path: Path, text: str) -> None:
    """Write a new file, flushed to disk."""
    with open(path, "x", encoding="utf-8") as file:
        file.write(text)
        _flush(file)


def flush_folder(path: Path) -> None:
    """Make names created in or moved into the folder survive a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_damage(folder: Path, record: FileRecord) -> str | None:
    """What is wrong with a file, or None. Reads all of it."""
    path = folder / record.name
    try:
        num_bytes = path.stat().st_size
        if num_bytes != record.num_bytes:
            return f"{path} has {num_bytes:,} bytes where {record.num_bytes:,} were written: it is torn"
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    if found != record.sha256:
        return f"{path} has SHA-256 {found[:12]}... where {record.sha256[:12]}... was written: its bytes have changed"
    return None


class TensorFile:
    """A safetensors file, mapped into memory: reading costs page cache and no memory of the process."""

    def __init__(self, path: Path):
        """Raises CheckpointError where the file is missing or not of this format."""
        try:
            with open(path, "rb") as file:
                (header_bytes,) = struct.unpack("<Q", file.read(8))
                text = file.read(min(header_bytes, MAX_HEADER_BYTES))
            if len(text) != header_bytes:
                raise ValueError(f"its header has {len(text):,} of {header_bytes:,} bytes")
            self._header = json.loads(text)
            self._header.pop("__metadata__", None)
            # Copy on write, never written: numpy would mark a read-only map as such, and torch would warn about every view.
            self._data = np.memmap(path, dtype=np.uint8, mode="c", offset=8 + header_bytes) if self._header else None
        except (OSError, ValueError, struct.error) as error:
            raise CheckpointError(f"{path} cannot be read as safetensors ({error}); use another checkpoint") from error

    def names(self) -> list[str]:
        return list(self._header)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._header[name]["shape"])

    def tensor(self, name: str) -> Tensor:
        """The tensor as a view of the file: to be copied from, not to be written to."""
        entry = self._header[name]
        start, stop = entry["data_offsets"]
        data = torch.from_numpy(self._data[start:stop])
        return data.view(DTYPES[entry["dtype"]]).view(entry["shape"])


def _flush(file) -> None:
    file.flush()
    os.fsync(file.fileno())
