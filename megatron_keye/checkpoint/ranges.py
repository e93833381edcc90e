"""Which rectangles of canonical tensors lie in a flat range of a local parameter. Pure arithmetic.

ZeRO-1 cuts a rank's gradient buffer at arbitrary elements, so a data-parallel rank owns a flat range of a parameter. A
checkpoint must not know that: it stores rectangles of canonical tensors, which any other layout can cut again. Every
canonical tensor counts as a matrix here: its first dimension is the rows, all others together are the columns.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod
from operator import mul

from torch import Tensor

from megatron_keye.model.names import Piece


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) of a tensor of `shape` as a matrix; a vector is one column, a scalar 1 x 1."""
    return (shape[0], prod(shape[1:])) if shape else (1, 1)


@dataclass(frozen=True, slots=True)
class Rectangle:
    """Rows [row, row + num_rows) and columns [column, column + num_columns) of a canonical matrix."""

    row: int
    column: int
    num_rows: int
    num_columns: int

    @property
    def numel(self) -> int:
        return self.num_rows * self.num_columns

    def common(self, other: "Rectangle") -> "Rectangle | None":
        """What both cover; None where they do not meet."""
        row, column = max(self.row, other.row), max(self.column, other.column)
        num_rows = min(self.row + self.num_rows, other.row + other.num_rows) - row
        num_columns = min(self.column + self.num_columns, other.column + other.num_columns) - column
        return Rectangle(row, column, num_rows, num_columns) if num_rows > 0 and num_columns > 0 else None

    def index_within(self, outer: "Rectangle") -> tuple[slice, slice]:
        """Where this rectangle lies in an array that holds `outer`."""
        row, column = self.row - outer.row, self.column - outer.column
        return slice(row, row + self.num_rows), slice(column, column + self.num_columns)


@dataclass(frozen=True, slots=True)
class Fragment:
    """Elements [start, start + rectangle.numel) of a flattened local parameter are, row after row, `rectangle` of `name`."""

    name: str
    start: int
    rectangle: Rectangle

    @property
    def stop(self) -> int:
        return self.start + self.rectangle.numel


def fragments_of(piece: Piece) -> list[Fragment]:
    """The contiguous runs of a piece, in the order of its rows; none for an empty piece.

    `piece.view` must be a view of the flat local parameter from whose first element `start` counts: one that was made of a
    tensor without data (`device="meta"`) is enough. Fused QKV weights give one run per group, everything else a single run.
    """
    num_rows, width = matrix_shape(piece.shape)
    column = piece.offset[1] if len(piece.shape) == 2 else 0
    row = piece.offset[0] if piece.shape else 0
    starts, run_numel = _contiguous_runs(piece.view)
    run_rows = run_numel // width if width else 0
    if not run_rows:
        return []
    assert run_rows * len(starts) == num_rows, f"{piece.name}: {len(starts)} runs of {run_rows} rows are not {num_rows}"
    return [Fragment(piece.name, start, Rectangle(row + number * run_rows, column, run_rows, width)) for number, start in enumerate(starts)]


def _contiguous_runs(view: Tensor) -> tuple[list[int], int]:
    """First elements of the contiguous runs of `view` in its own order, and the number of elements of each run."""
    run_numel, leading = 1, view.dim()
    while leading and (view.shape[leading - 1] == 1 or view.stride(leading - 1) == run_numel):
        leading -= 1
        run_numel *= view.shape[leading]
    strides = view.stride()[:leading]
    places = product(*(range(size) for size in view.shape[:leading]))
    starts = [view.storage_offset() + sum(map(mul, place, strides)) for place in places]
    return starts, run_numel


def cut(fragment: Fragment, start: int, stop: int) -> Iterator[Fragment]:
    """The part of `fragment` within the flat range [start, stop): a partial row, whole rows, a partial row; each may be absent."""
    width = fragment.rectangle.num_columns
    first = max(start, fragment.start) - fragment.start
    last = min(stop, fragment.stop) - fragment.start
    if first >= last:
        return
    whole_from = min(last, -(-first // width) * width)
    whole_to = max(whole_from, last // width * width)
    for low, high in ((first, whole_from), (whole_from, whole_to), (whole_to, last)):
        if low < high:
            row, column = divmod(low, width)
            num_rows = max(1, (high - low) // width)
            place = (fragment.rectangle.row + row, fragment.rectangle.column + column)
            yield Fragment(fragment.name, fragment.start + low, Rectangle(*place, num_rows, (high - low) // num_rows))
