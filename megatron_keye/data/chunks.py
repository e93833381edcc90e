"""Where the aligned chunks of a file lie, which of them a span needs, and how they are put together."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from megatron_keye.data.shards import Span


@dataclass(frozen=True, slots=True)
class ChunkGrid:
    """A file of `file_bytes` in chunks of `chunk_bytes`, numbered from 0; the last may be shorter."""

    file_bytes: int
    chunk_bytes: int

    def touched(self, span: Span) -> range:
        """Numbers of the chunks that hold `span`."""
        return range(span.offset // self.chunk_bytes, -(-(span.offset + span.num_bytes) // self.chunk_bytes))

    def stretch(self, chunks: range) -> Span:
        """The bytes of adjacent chunks."""
        offset = chunks.start * self.chunk_bytes
        return Span(offset, min(chunks.stop * self.chunk_bytes, self.file_bytes) - offset)

    def divided(self, chunks: range, blob: bytes) -> dict[int, bytes]:
        """The bytes of adjacent chunks, by number."""
        return {chunk: blob[place * self.chunk_bytes : (place + 1) * self.chunk_bytes] for place, chunk in enumerate(chunks)}

    def joined(self, span: Span, chunks: Mapping[int, bytes]) -> bytes:
        """The bytes of `span`, of which all chunks are given."""
        touched = self.touched(span)
        begin = span.offset - touched.start * self.chunk_bytes
        return b"".join(chunks[chunk] for chunk in touched)[begin : begin + span.num_bytes]


def stretches(chunks: Iterable[int]) -> list[range]:
    """Ascending numbers as the fewest ranges."""
    found: list[range] = []
    for chunk in chunks:
        if found and found[-1].stop == chunk:
            found[-1] = range(found[-1].start, chunk + 1)
        else:
            found.append(range(chunk, chunk + 1))
    return found
