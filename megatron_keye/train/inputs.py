"""The data side of a run: tokenizer and data sets, opened from the settings."""

from dataclasses import dataclass

from megatron_keye.config.schema import DataConfig, RunConfig
from megatron_keye.data.mixture import MixedDataset, open_samples
from megatron_keye.data.tokenizer import KeyeTokenizer, load_tokenizer
from megatron_keye.errors import SettingsError
from megatron_keye.train.loading import Loading


@dataclass(frozen=True)
class Inputs:
    """What a run trains on and is validated with."""

    tokenizer: KeyeTokenizer
    train: MixedDataset
    valid: MixedDataset | None


def open_inputs(config: RunConfig) -> Inputs:
    """Open tokenizer and indices. Raises SettingsError or DataError."""
    data, variant = config.data, config.model.variant
    tokenizer = load_tokenizer(data.tokenizer, variant)
    if tokenizer.vocab_size > config.model.decoder.vocab_size:
        raise SettingsError(
            f"the tokenizer at {data.tokenizer} has {tokenizer.vocab_size} ids, and model.decoder.vocab_size is "
            f"{config.model.decoder.vocab_size}; use the model's own tokenizer, or raise vocab_size for a fresh model"
        )
    train = open_samples(data.train, tokenizer, variant, data)
    require_windows_fit(data, len(train))
    valid = None if data.valid is None else open_samples(data.valid, tokenizer, variant, data)
    return Inputs(tokenizer, train, valid)


def require_windows_fit(data: DataConfig, num_samples: int) -> None:
    """Raises SettingsError where a lookahead window is larger than the training set: it would hold samples twice."""
    batches, batch = data.lookahead.batches, data.global_batch_samples
    if batches > 1 and batches * batch > num_samples:
        raise SettingsError(
            f"data.lookahead.batches * data.global_batch_samples = {batches} * {batch} = {batches * batch:,} samples are planned together, "
            f"and {data.train} has {num_samples:,}; set data.lookahead.batches to {max(1, num_samples // batch)} or less"
        )


def start_loading(inputs: Inputs, config: RunConfig) -> Loading:
    """What a replica's leader reads these data sets with. Raises SettingsError."""
    sets = [(config.data.train, inputs.train)] + ([] if inputs.valid is None else [(config.data.valid, inputs.valid)])
    return Loading(config, sets, inputs.tokenizer.specials.endoftext)
