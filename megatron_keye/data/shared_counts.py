"""Counts that jobs in other processes raise, each its own, while the process that began them shows their sum."""

import tempfile
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class SharedCount:
    """One job's own number, in a file that all of them map. It may be sent to the job's process."""

    path: str
    number: int

    def map(self) -> np.ndarray:
        """int64 [1], to add to: the file itself."""
        return np.memmap(self.path, np.int64, "r+", offset=self.number * np.dtype(np.int64).itemsize, shape=1)


class SharedCounts:
    """As many counts as there are jobs, at least one, from 0. They are gone with this object."""

    def __init__(self, num_jobs: int):
        self._file = tempfile.NamedTemporaryFile(prefix="keye-counts-")
        self._counts = np.memmap(self._file.name, np.int64, "w+", shape=num_jobs)

    def of_job(self, number: int) -> SharedCount:
        return SharedCount(self._file.name, number)

    def total(self) -> int:
        return int(self._counts.sum())
