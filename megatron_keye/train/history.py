"""What of a run outlives its processes: checkpoints, each with the cursor after it, the ledger that leads there, and exports.

A step belongs to the run for good once a checkpoint holds it. `History` resumes from the last one and commits the next.
"""

from collections.abc import Callable
from pathlib import Path

import torch

import megatron_keye
from megatron_keye.checkpoint.background import BackgroundSave
from megatron_keye.checkpoint.host_copies import HostCopies
from megatron_keye.checkpoint.identity import identity
from megatron_keye.checkpoint.load import Loaded
from megatron_keye.checkpoint.manifest import RunRecord
from megatron_keye.checkpoint.store import Keep, save_checkpoint
from megatron_keye.config.load import dump_config
from megatron_keye.config.schema import RunConfig
from megatron_keye.plan.cursor import Cursor, ResumeState
from megatron_keye.plan.ledger import CHAIN_START, SourceCounts
from megatron_keye.train import checkpointing
from megatron_keye.train.calibration import COSTS, FLOPS
from megatron_keye.train.consensus import failing_together, from_all_ranks, said_once
from megatron_keye.train.decoders import DECODER, decoder_notes
from megatron_keye.train.initial_weights import start_from_elsewhere
from megatron_keye.train.inputs import Inputs
from megatron_keye.train.ledger import LedgerWriter, rules_of
from megatron_keye.train.live_export import LiveExport
from megatron_keye.train.remaps import Remaps
from megatron_keye.train.run_dir import RunDir
from megatron_keye.train.runtime import Runtime
from megatron_keye.train.step import TrainStep


class History:
    """Of one run, on this rank. After `resume`, it has the `mixture` that the run goes on with, the main rank's `ledger` (None on other
    ranks), the `counts` of what was taken from each source so far, and `notes` for people. `remaps` say what was due where data changed."""

    def __init__(self, config: RunConfig, run_dir: RunDir, runtime: Runtime, inputs: Inputs, costs: str, decoder: str):
        """`costs` is the version of the costs that placement goes by, `decoder` the id of what makes pixels."""
        self._config, self._run_dir, self._runtime, self._inputs = config, run_dir, runtime, inputs
        self._costs, self._decoder = costs, decoder
        self.mixture = inputs.train.mixture(config.data, config.train.seed)
        self.remaps = Remaps(run_dir)
        self.ledger: LedgerWriter | None = None
        self.counts = SourceCounts()
        self.notes: list[str] = []
        self._being_saved: tuple[int, BackgroundSave] | None = None
        """The step and the save of a checkpoint that is not there yet."""
        self._host_copies = HostCopies()
        self._exports: LiveExport | None = None
        self._loaded_from: Path | None = None

    def resume(self, step: TrainStep) -> Cursor:
        """Fill the model and optimizer of `step` from the newest good checkpoint, if there is one; where to go on. All ranks must call it.

        Raises CheckpointError and LedgerError where the run cannot go on exactly from what is there, SettingsError where other pixels
        would follow and the settings do not allow it.
        """
        with said_once(self._runtime.groups.world, self._runtime.device):
            loaded = checkpointing.resume(self._run_dir.checkpoints, step.model, step.optimizer, self._inputs.tokenizer.fingerprint)
            if loaded is not None:
                cursor, chain = self._go_on(loaded), loaded.run.ledger
            else:
                cursor, chain = Cursor(), CHAIN_START
                self.notes = start_from_elsewhere(step.model, step.optimizer)
        self._open_ledger(cursor, chain)
        return cursor

    def start_exports(self, cursor: Cursor, say: Callable[[str], None]) -> None:
        """Export checkpoints from here on, where the settings ask for it; only the main rank does."""
        if self._runtime.is_main and self._config.train.export_hf_every_steps:
            self._exports = LiveExport(self._run_dir, self._config.train, say)
            self._exports.resume(cursor.step, self._loaded_from)

    def commit(self, cursor: Cursor, step: TrainStep) -> None:
        """Save the weights together with the cursor after them. All ranks must call it. Raises CheckpointError.

        With `train.async_save`, this begins a save, once the one before it is finished, and `finish_save` ends it.
        """
        self.finish_save()
        world, device, train = self._runtime.groups.world, self._runtime.device, self._config.train
        with failing_together(world, device):
            if self.ledger is not None:
                self.ledger.flush()
        state = ResumeState(cursor, self.mixture.since(cursor.progress.base))
        versions = {"megatron_keye": megatron_keye.__version__, "torch": torch.__version__, COSTS: self._costs, DECODER: self._decoder}
        # The main rank's record is the one that is written.
        chain = CHAIN_START if self.ledger is None else self.ledger.chain
        record = RunRecord(cursor.step, state.to_json(), dump_config(self._config), chain, versions)
        saved = checkpointing.training_state(step.model, step.optimizer)
        model = identity(self._config.model, self._inputs.tokenizer.fingerprint)
        what = (self._run_dir.checkpoints, saved, record, model, Keep(train.keep_checkpoints, train.keep_every_steps))
        with said_once(world, device):
            if train.async_save:
                self._being_saved = cursor.step, BackgroundSave(*what, self._host_copies)
            else:
                self._saved(cursor.step, save_checkpoint(*what))

    @property
    def is_saving(self) -> bool:
        """Whether a checkpoint was begun that is not there yet: the same on all ranks."""
        return self._being_saved is not None

    @property
    def is_writing(self) -> bool:
        """Whether this rank still writes its part of a checkpoint."""
        return self._being_saved is not None and self._being_saved[1].is_writing

    def finish_save(self) -> None:
        """Commit the checkpoint that is being written, if there is one, when all ranks have written. All must call it.

        Raises CheckpointError on all ranks where any could not write; earlier checkpoints are untouched.
        """
        if self._being_saved is None:
            return
        (step, saving), self._being_saved = self._being_saved, None
        with said_once(self._runtime.groups.world, self._runtime.device):
            path = saving.finish()
        self._saved(step, path)

    def finish(self) -> None:
        """Wait for what is still being exported."""
        if self._exports is not None:
            self._exports.wait()

    def _saved(self, step: int, path: Path) -> None:
        if self._exports is not None:
            self._exports.saved(step, path)

    def _go_on(self, loaded: Loaded) -> Cursor:
        self._loaded_from = loaded.path
        self.notes = [f"passed over a damaged checkpoint: {problem}" for problem in loaded.passed_over]
        is_mixing_allowed = self._config.data.media.allow_mixed_decoders
        self.notes += decoder_notes(loaded.run.versions.get(DECODER), self._decoder, is_mixing_allowed)
        if loaded.fresh_moments:
            self.notes.append(f"newly trained, with fresh optimizer state: {', '.join(loaded.fresh_moments)}")
        if loaded.run.versions.get(COSTS, FLOPS) != self._costs:
            self.notes.append("placement goes by other costs than before the checkpoint; the samples of each step stay the same")
        state = self.remaps.applied(loaded.run.resume_state).going_on(self.mixture)
        self.mixture = state.mixture
        return state.cursor

    def _open_ledger(self, cursor: Cursor, saved_chain: str) -> None:
        with failing_together(self._runtime.groups.world, self._runtime.device):
            if self._runtime.is_main:
                rules = rules_of(self._config, self.mixture)
                self.ledger = LedgerWriter(self._run_dir.ledger, self._inputs.train, rules, cursor, saved_chain, self.remaps.due)
                if self.ledger.continues_elsewhere:
                    self.notes.append(
                        f"no ledger of the first {cursor.step} steps is here: a new one begins, and `keye ledger verify` needs the run "
                        "directory of those steps too"
                    )
        (self.counts,) = from_all_ranks([] if self.ledger is None else [self.ledger.counts], self._runtime.groups.world)
