"""Results by job: one decode at a time for equal jobs, and finished ones kept while there is room."""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

from megatron_keye.data.slabs import Slab
from megatron_keye.io_server.slabs import SlabBudget


@dataclass(frozen=True, slots=True)
class Result:
    """The patches of a job, and the checksum of their bytes."""

    slab: Slab
    checksum: str


@dataclass(slots=True)
class _Flight:
    task: asyncio.Task
    waiting: int = 0


class Results:
    """Kept results are the least recently used first to go when a new one needs their room."""

    def __init__(self, budget: SlabBudget):
        self._budget = budget
        self._kept: OrderedDict[bytes, Result] = OrderedDict()
        self._flights: dict[bytes, _Flight] = {}
        self.hits = self.joined = 0

    async def get(self, key: bytes, num_bytes: int, decode: Callable[[Slab], Awaitable[str]], *, keep: bool) -> Result:
        """The result under `key`, made by `decode`, which returns its checksum, unless it is there or on its way.

        `keep` it only where the key says which bytes it was made from.
        Whoever waits may be cancelled; the decode is when nobody waits any more. Raises what `decode` raises, and Refused.
        """
        if (kept := self._kept.get(key)) is not None:
            self._kept.move_to_end(key)
            self.hits += 1
            return kept
        flight = self._flights.get(key)
        if flight is None:
            slab = self._allocate(num_bytes)
            flight = self._flights[key] = _Flight(asyncio.create_task(_make(slab, decode)))
            flight.task.add_done_callback(partial(self._landed, key, keep))
        else:
            self.joined += 1
        flight.waiting += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.waiting -= 1
            if not flight.waiting and not flight.task.done():
                # Out of the table at once: the next to ask must not join what is ending.
                del self._flights[key]
                flight.task.cancel()

    @property
    def kept_bytes(self) -> int:
        return sum(result.slab.num_bytes for result in self._kept.values())

    def _allocate(self, num_bytes: int) -> Slab:
        self._budget.require_possible(num_bytes)  # first: nothing is to be forgotten for what is refused in any case
        while self._kept and not self._budget.has_room(num_bytes):
            self._kept.popitem(last=False)
        return self._budget.allocate(num_bytes)

    def _landed(self, key: bytes, keep: bool, task: asyncio.Task) -> None:
        flight = self._flights.get(key)
        if flight is not None and flight.task is task:
            del self._flights[key]
        if not task.cancelled() and task.exception() is None and keep:
            self._kept[key] = task.result()


async def _make(slab: Slab, decode: Callable[[Slab], Awaitable[str]]) -> Result:
    checksum = await decode(slab)
    slab.freeze()
    return Result(slab, checksum)
