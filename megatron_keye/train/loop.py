"""The training loop: resume, then step, record, evaluate, save, until the last step or a request to stop.

A step is committed by the checkpoint that holds its weights together with the cursor after it, so that whatever interrupts a
run, the next start goes on with the sample after the last one that is in the weights.
"""

import time
from collections import Counter

from megatron_keye.config.load import dump_config
from megatron_keye.config.schema import RunConfig
from megatron_keye.data.mixture import MixedDataset
from megatron_keye.data.transport import open_transport
from megatron_keye.plan.cursor import Cursor
from megatron_keye.plan.mixture import Mixture
from megatron_keye.train.build import build_model, build_optimizer
from megatron_keye.train.calibration import costs_version, open_calibration, require_same_device, require_same_everywhere
from megatron_keye.train.consensus import failing_together, from_all_ranks, said_once
from megatron_keye.train.control import Control, Requests
from megatron_keye.train.decoders import one_decoder
from megatron_keye.train.feed import Feed
from megatron_keye.train.history import History
from megatron_keye.train.initial_weights import drawing
from megatron_keye.train.inputs import open_inputs, start_loading
from megatron_keye.train.ledger import left_out
from megatron_keye.train.limits import BadSamples, FiniteSteps
from megatron_keye.train.placement import Planner
from megatron_keye.train.recorder import Recorder, StepRecord
from megatron_keye.train.run_dir import RunDir, write_atomically, writing
from megatron_keye.train.runtime import Runtime
from megatron_keye.train.schedule import lr_factor
from megatron_keye.train.step import TrainStep
from megatron_keye.train.watchdog import Watchdog


class Training:
    """One run on this rank."""

    def __init__(self, config: RunConfig, run_dir: RunDir, runtime: Runtime):
        self.config, self.run_dir, self.runtime = config, run_dir, runtime
        self._watchdog = Watchdog(run_dir.stacks(runtime.groups.rank), config.train)
        self._beat(0, "setup")
        self.control = Control(run_dir, runtime.groups, runtime.device)
        with failing_together(runtime.groups.world, runtime.device):
            self.inputs = open_inputs(config)
            calibration = open_calibration(config)
            require_same_device(calibration, runtime.device.type)
            self._loading = start_loading(self.inputs, config) if runtime.groups.is_leader else None
        with said_once(runtime.groups.world, runtime.device):
            require_same_everywhere(calibration, runtime.groups.world)
            ids = from_all_ranks([] if self._loading is None else [self._loading.decoder_id], runtime.groups.world)
            decoder = one_decoder(ids, config.data.media.allow_mixed_decoders)
            self.model = build_model(config, runtime.groups, runtime.device, draw=drawing(config.model))
            self._transport, self._transport_note = open_transport(config.data.transport, runtime.groups.replica, runtime.device)
        self.step = TrainStep(self.model, build_optimizer(self.model))
        self.planner = Planner(config, runtime.groups.grid.dp, None if calibration is None else calibration.time_model)
        self.history = History(config, run_dir, runtime, self.inputs, costs_version(calibration), decoder)
        self._saved_at_s = time.monotonic()

    def run(self) -> None:
        """Train to the last step, or to a request to stop. Raises KeyeError subclasses that carry the exit code."""
        self._beat(0, "load")
        cursor = self.history.resume(self.step)
        self.recorder = Recorder(self.run_dir, self.runtime, self.planner, self.history.ledger, cursor.step, self.config.train.steps)
        try:
            self._announce(cursor)
            self.history.start_exports(cursor, self.recorder.say)
            cursor, stopped = self._steps(cursor)
            self._finish(cursor, stopped)
        finally:
            if self._loading is not None:
                for line in self._loading.summary():
                    self.recorder.say(line)
                self._loading.close()
            self.recorder.close()
            self._watchdog.close()

    def _steps(self, cursor: Cursor) -> tuple[Cursor, bool]:
        """Train from `cursor` on; returns where it ended, and whether that was by request."""
        settings = self.config.train
        first_step = cursor.step
        finite = FiniteSteps(settings)
        bad = BadSamples(self.config.data.bad_sample_budget, self.inputs.train.source_sizes(), self.history.counts)
        feed = self._feed(self.inputs.train, cursor, self.history.mixture)
        try:
            while True:
                requests = self.control.poll(self._is_save_overdue(), self.history.is_writing)
                self._save_where_due(cursor, requests, first_step)
                if cursor.step >= settings.steps:
                    return cursor, False
                if requests.stop:
                    self.recorder.say(f"stopped on request after {cursor.step} steps; the same command goes on from there")
                    return cursor, True
                self._heartbeat(cursor, "step")
                record = self._one_step(feed)
                cursor = record.fed.after
                with said_once(self.runtime.groups.world, self.runtime.device):
                    finite.count(record.result.grad_norm)
                    bad.count(Counter(map(self.inputs.train.source, record.fed.plan.members)), record.skipped)
                if settings.valid_every_steps and cursor.step % settings.valid_every_steps == 0 and cursor.step < settings.steps:
                    self._validate(cursor)
        finally:
            feed.close()

    def _one_step(self, feed: Feed) -> StepRecord:
        began_s = time.perf_counter()
        fed = feed.next_step()
        factor = lr_factor(fed.plan.step, self.config)
        if self.runtime.is_main:
            self.run_dir.note_step(fed.plan.step, list(map(self.inputs.train.sample_id, fed.plan.members)))
        result = self.step.run(fed.batch, factor)
        took_s = time.perf_counter() - began_s
        lr = self.config.optimizer.lr * factor
        skipped = left_out(fed.plan, fed.skipped, self.inputs.train)
        record = StepRecord(fed, skipped, result, lr, took_s, len(self.inputs.train))
        self.recorder.record(record)
        return record

    def _feed(self, dataset: MixedDataset, cursor: Cursor, mixture: Mixture) -> Feed:
        loader = None if self._loading is None else self._loading.loader(dataset)
        plan_at = self.planner.over(dataset.plan_data, mixture.order(self.history.remaps.due))
        return Feed(self.config, self.runtime.groups, plan_at, loader, self._transport, cursor, self.runtime.device)

    def _validate(self, cursor: Cursor) -> None:
        """The mean loss of the first `valid_steps` steps of the held-out set, always the same samples; none when asked to stop."""
        if self.inputs.valid is None:
            return
        valid = self.inputs.valid
        feed = self._feed(valid, Cursor(), valid.mixture(self.config.data, self.config.train.seed))
        total = supervised = 0.0
        try:
            for _ in range(self.config.train.valid_steps):
                if self.control.poll().stop:
                    return
                self._heartbeat(cursor, "eval")
                fed = feed.next_step()
                total += self.step.evaluate(fed.batch) * fed.batch.num_supervised
                supervised += fed.batch.num_supervised
        finally:
            feed.close()
        self.recorder.validated(cursor.step, total / max(supervised, 1.0))

    def _is_save_overdue(self) -> bool:
        """By this rank's clock, for `train.save_every_s`."""
        every_s = self.config.train.save_every_s
        return every_s > 0 and time.monotonic() - self._saved_at_s >= every_s

    def _save_where_due(self, cursor: Cursor, requests: Requests, first_step: int) -> None:
        """Between steps: finish the save that was being written, begin the next. Who asked for one, or for the end, waits for it."""
        if not requests.writing:
            self._finish_save(cursor)
        ends = requests.stop or cursor.step >= self.config.train.steps
        due = requests.due or cursor.step % self.config.train.save_every_steps == 0
        if (due or ends or requests.save) and cursor.step > first_step:
            self._save(cursor)
        if ends or requests.save:
            self._finish_save(cursor)
        if requests.save and self.runtime.is_main:
            self.run_dir.answer("SAVE")

    def _save(self, cursor: Cursor) -> None:
        self._heartbeat(cursor, "save")
        self.history.commit(cursor, self.step)
        self._saved_at_s = time.monotonic()

    def _finish_save(self, cursor: Cursor) -> None:
        if self.history.is_saving:
            self._heartbeat(cursor, "save")
            self.history.finish_save()

    def _finish(self, cursor: Cursor, stopped: bool) -> None:
        if not stopped:
            self._validate(cursor)
        self.history.finish()
        if stopped:
            return
        if self.runtime.is_main:
            self.run_dir.mark_done(cursor.step)
        self.recorder.say(f"complete: {cursor.step} steps, {cursor.position} samples; checkpoints in {self.run_dir.checkpoints}")

    def _announce(self, cursor: Cursor) -> None:
        if self.runtime.is_main:
            with writing(self.run_dir.config):
                write_atomically(self.run_dir.config, dump_config(self.config))
        train = self.inputs.train
        for note in self.history.notes:
            self.recorder.say(note)
        for sample_id, reason in train.rejected[:10]:
            self.recorder.say(f"left out of the training set: {sample_id}: {reason}")
        if len(train.rejected) > 10:
            self.recorder.say(f"... and {len(train.rejected) - 10} more that do not fit a row")
        start = f"resuming after {cursor.step} steps" if cursor.step else "starting"
        grid = self.runtime.groups.grid
        layout = f"tp {grid.tp} x cp {grid.cp} x pp {grid.pp} x dp {grid.dp}"
        if self.runtime.groups.grid.replica_size > 1:
            self.recorder.say(f"data travel within a replica by {self._transport.name} ({self._transport_note})")
        self.recorder.say(f"{start}: {len(train):,} samples, {self.config.train.steps} steps, {layout} on {self.runtime.device.type}")

    def _heartbeat(self, cursor: Cursor, phase: str) -> None:
        self._beat(cursor.step, phase)

    def _beat(self, step: int, phase: str) -> None:
        self.run_dir.heartbeat(self.runtime.groups.rank, step, phase)
        self._watchdog.beat(step, phase)
