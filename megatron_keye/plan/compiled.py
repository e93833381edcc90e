"""Kernels: plain functions over integers that numba compiles where it is installed and the work is worth it.

A kernel is written once, in the part of Python that numba compiles too: loops over one-dimensional int64 arrays that the
caller passes in and finds changed. Without numba, and for small inputs, the same function runs on lists. All arithmetic is on
integers below 2**63, so both give the same answer on every host.
"""

from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec

import numpy as np

Argument = np.ndarray | int | tuple[np.ndarray, ...]

COMPILED_FROM_STEPS = 100_000
"""Estimated inner steps from which compiled code is worth loading: some 30 ms of Python."""


@cache
def has_numba() -> bool:
    return find_spec("numba") is not None


class Kernel:
    """A function of int64 arrays, tuples of them, and integers. `helpers` are the functions that it calls, in the same file."""

    def __init__(self, function: Callable[..., None], helpers: Sequence[Callable] = ()):
        self.function = function
        self._helpers = helpers
        self._compiled: Callable[..., None] | None = None

    def __call__(self, steps: int, *arguments: Argument) -> None:
        """Run on arrays, which are changed in place; `steps` estimates the inner steps beyond a look at every item."""
        if steps + sum(map(_num_items, arguments)) >= COMPILED_FROM_STEPS and has_numba():
            self.compiled()(*arguments)
        else:
            self.interpreted(*arguments)

    def interpreted(self, *arguments: Argument) -> None:
        """Run in Python, on lists: their items are plain integers, several times faster than those of arrays."""
        lists = [_to_lists(argument) for argument in arguments]
        self.function(*lists)
        for argument, values in zip(arguments, lists, strict=True):
            _copy_back(values, argument)

    def compiled(self) -> Callable[..., None]:
        """The machine code, compiled at the first call and kept on disk; it lets other threads run."""
        if self._compiled is None:
            from numba.extending import register_jitable

            for helper in self._helpers:
                register_jitable(helper)
            self._compiled = compile_function(self.function)
        return self._compiled


def compile_function(function: Callable[..., None]) -> Callable[..., None]:
    """`function` compiled by numba: kept on disk where there is a folder for it, and free of Python's lock."""
    import numba

    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # no folder to keep it in can be written to
        return numba.njit(nogil=True)(function)


def _num_items(argument: Argument) -> int:
    if isinstance(argument, tuple):
        return sum(map(len, argument))
    return len(argument) if isinstance(argument, np.ndarray) else 0


def _to_lists(argument: Argument) -> list[int] | int | tuple[list[int], ...]:
    if isinstance(argument, tuple):
        return tuple(array.tolist() for array in argument)
    return argument.tolist() if isinstance(argument, np.ndarray) else argument


def _copy_back(values: list[int] | int | tuple[list[int], ...], argument: Argument) -> None:
    if isinstance(argument, tuple):
        for array, items in zip(argument, values, strict=True):
            array[:] = items
    elif isinstance(argument, np.ndarray):
        argument[:] = values
