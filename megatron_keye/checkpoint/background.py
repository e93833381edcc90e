"""A save that holds up training only while the state is copied: a thread of each rank writes the files, and all ranks commit later.

Collectives stay with the main thread: the writing threads need none, and `finish` is called where all ranks are at the same step.
"""

import threading
from concurrent.futures import Future
from pathlib import Path

from megatron_keye.checkpoint.host_copies import HostCopies
from megatron_keye.checkpoint.manifest import Identity, RunRecord
from megatron_keye.checkpoint.state import SavedPart, TrainingState, saved_parts
from megatron_keye.checkpoint.store import Keep, UnfinishedCheckpoint, Written

WRITING_THREAD = "checkpoint"


class BackgroundSave:
    """One save of `state` as it is now, which may change as soon as this is made. All ranks must make it, and call `finish`."""

    def __init__(self, folder: Path, state: TrainingState, run: RunRecord, identity: Identity, keep: Keep, copies: HostCopies):
        """As `store.save_checkpoint`. The memory of `copies` belongs to this save until it is finished.

        Raises CheckpointError on all ranks where `folder` cannot be written to.
        """
        self._unfinished = UnfinishedCheckpoint(folder, run, identity, keep, state.world)
        self._written: Future[Written] = Future()
        try:
            parts = copies.make(saved_parts(state))
        except Exception as error:
            # No memory, say. Other ranks have begun to write, so it counts as a failed write.
            self._written.set_exception(error)
            return
        # A daemon: a process that ends for another reason does not wait for a checkpoint that nobody will commit.
        threading.Thread(target=self._write, args=(parts,), name=WRITING_THREAD, daemon=True).start()

    @property
    def is_writing(self) -> bool:
        """Whether this rank has not yet written its file, or failed to."""
        return not self._written.done()

    def finish(self) -> Path:
        """Wait for the files of all ranks and commit; returns the checkpoint's folder. All ranks must call it, once.

        Raises CheckpointError on all ranks, leaving earlier checkpoints as they were, when any could not write.
        """
        return self._unfinished.commit(self._written.result)

    def _write(self, parts: list[SavedPart]) -> None:
        try:
            self._written.set_result(self._unfinished.write(parts))
        except BaseException as error:
            self._written.set_exception(error)
