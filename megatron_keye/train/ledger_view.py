"""A step of a ledger for people: its lines beside what the run's data says of the samples, where it still says it."""

from pathlib import Path

from rich.table import Table

from megatron_keye.data.mixture import MixedDataset, open_samples
from megatron_keye.data.tokenizer import load_tokenizer
from megatron_keye.errors import DataError, KeyeError
from megatron_keye.plan.ledger import SegmentLine, StepLine
from megatron_keye.plan.mixture import Mixture
from megatron_keye.train.run_dir import RunDir
from megatron_keye.train.serving import run_settings


def step_table(run_dir: Path, segment: SegmentLine, line: StepLine) -> tuple[Table, list[str]]:
    """The samples of a step, and remarks to print below."""
    notes = [f"{skipped.id} was left out: {skipped.reason}" for skipped in line.skipped]
    if not line.updated:
        notes.append("no weight was changed in this step")
    try:
        dataset = _training_set(run_dir, segment.rules.mixture)
    except KeyeError as error:
        dataset = None
        notes.append(f"source, task and tokens are not known: {error}")
    title = f"{run_dir}, step {line.step}: {len(line.samples)} samples, {dict(line.sources)}"
    table = Table(title=title, title_justify="left")
    for name in ("slot", "position", "epoch", "sample", "id", "crc32", "source", "task", "tokens", ""):
        table.add_column(name, justify="left" if name in ("id", "source", "task", "") else "right", overflow="fold")
    left_out = {skipped.sample for skipped in line.skipped}
    rows = zip(line.slot_positions, line.slot_epochs, line.samples, line.ids, line.crc32, strict=True)
    for slot, (position, epoch, sample, sample_id, crc32) in enumerate(rows):
        known = ("-", "-", "-") if dataset is None else _known(dataset, sample)
        state = "left out" if sample in left_out else ""
        table.add_row(str(slot), str(position), str(epoch), str(sample), sample_id, f"{crc32:08x}", *known, state)
    return table, notes


def _training_set(run_dir: Path, mixture: Mixture) -> MixedDataset:
    """The training set of a run's settings. Raises KeyeError where it is not there, or not what it was."""
    config = run_settings(RunDir(run_dir))
    tokenizer = load_tokenizer(config.data.tokenizer, config.model.variant)
    dataset = open_samples(config.data.train, tokenizer, config.model.variant, config.data)
    now = dataset.mixture(config.data, config.train.seed).sources[: len(mixture.sources)]
    if [source.fingerprint for source in now] != [source.fingerprint for source in mixture.sources]:
        raise DataError(f"{config.data.train} is not, or not with these settings, what the step was trained on")
    return dataset


def _known(dataset: MixedDataset, sample: int) -> tuple[str, str, str]:
    return dataset.source(sample), dataset.task(sample) or "-", str(dataset.shape(sample).num_tokens)
