"""Samples -> rows of bounded length. No sample is split; the fewest rows are sought first, then equal cost."""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from megatron_keye.contract.media import SampleShape
from megatron_keye.plan.types import Document, Row


class Item(NamedTuple):
    """A sample waiting for its place. `slot` counts within the step and breaks ties; costs are in FLOPs."""

    slot: int
    sample: int
    shape: SampleShape
    padded_tokens: int
    decoder_cost: int
    vision_cost: int


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple that is at least `value`, and at least one: an empty sample keeps its slot in a row."""
    return max(1, -(-value // multiple)) * multiple


def best_fit_decreasing(sizes: Sequence[int], capacity: int) -> list[int]:
    """The bin of each item: largest first, each into the fullest bin that still has room, else into a new one.

    Bins hold at most `capacity`; a single larger item gets a bin of its own. Bins used are at most 11/9 of the fewest
    possible, plus one (D. S. Johnson, 1973).
    """
    bins = [0] * len(sizes)
    rooms: list[tuple[int, int]] = []
    num_bins = 0
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        at = bisect_left(rooms, (sizes[i], -1))
        if at < len(rooms):
            room, bins[i] = rooms.pop(at)
        else:
            room, bins[i] = capacity, num_bins
            num_bins += 1
        insort(rooms, (room - sizes[i], bins[i]))
    return bins


def pack_rows(items: Sequence[Item], num_rows: int, seq_length_tokens: int, pad_multiple_tokens: int) -> tuple[Row, ...]:
    """Exactly `num_rows` rows of at most `seq_length_tokens`, of like decoder cost; at least as many as `best_fit_decreasing` takes.

    Rows come in order of falling cost, so that microbatches that run at the same time in different replicas are alike;
    a row left without documents is padding of one multiple. Documents keep the order of the step inside a row.
    """
    bins = _equal_cost_bins(items, num_rows, seq_length_tokens)
    if bins is None:
        bins = best_fit_decreasing([item.padded_tokens for item in items], seq_length_tokens)
    costs: dict[int, int] = defaultdict(int)
    first_slots: dict[int, int] = {}
    for item, row in zip(items, bins, strict=True):
        costs[row] += item.decoder_cost
        first_slots.setdefault(row, item.slot)
    places = {row: place for place, row in enumerate(sorted(costs, key=lambda row: (-costs[row], first_slots[row])))}
    return rows_of(items, [places[row] for row in bins], num_rows, pad_multiple_tokens)


def rows_of(items: Sequence[Item], rows: Sequence[int], num_rows: int, pad_multiple_tokens: int) -> tuple[Row, ...]:
    """The rows that `items`, in slot order, make up when each goes to the row given for it."""
    contents: list[list[Item]] = [[] for _ in range(num_rows)]
    for item, row in zip(items, rows, strict=True):
        contents[row].append(item)
    empty = Row(documents=(), num_tokens=pad_multiple_tokens)
    return tuple(_row(row) if row else empty for row in contents)


def _equal_cost_bins(items: Sequence[Item], num_rows: int, capacity: int) -> list[int] | None:
    """Longest processing time first into rows with room; None where that order meets an item that fits nowhere."""
    bins = [0] * len(items)
    costs, rooms = [0] * num_rows, [capacity] * num_rows
    for i in sorted(range(len(items)), key=lambda i: (-items[i].padded_tokens, items[i].slot)):
        size = items[i].padded_tokens
        row = min((r for r in range(num_rows) if rooms[r] >= size), key=lambda r: (costs[r], r), default=None)
        if row is None:
            return None
        bins[i] = row
        costs[row] += items[i].decoder_cost
        rooms[row] -= size
    return bins


def _row(items: Sequence[Item]) -> Row:
    documents, start = [], 0
    for item in items:
        documents.append(Document(item.sample, item.shape, start, item.padded_tokens))
        start += item.padded_tokens
    return Row(tuple(documents), start)
