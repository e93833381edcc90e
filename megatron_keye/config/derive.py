"""What follows from the settings: whether they fit each other and the number of processes, and values computed from them.

Pure arithmetic. `check` never changes anything; each rule is one short function that yields its problems.
"""

from collections.abc import Callable, Iterator
from math import isfinite

from megatron_keye.config.explain import all_settings, value_of
from megatron_keye.config.schema import DecoderConfig, ModelConfig, RunConfig
from megatron_keye.errors import SettingsError

SUPPORTED_PATCH_SIZE = 14
"""Pixels; the data side, the released checkpoints and the visual token of 28x28 pixels are all built on it."""

_BOUNDS: tuple[tuple[str, tuple[str, ...], Callable[[float], bool]], ...] = (
    (
        "> 0",
        (
            "model.vision.norm_eps",
            "model.vision.rope_base",
            "model.projector.norm_eps",
            "model.decoder.norm_eps",
            "model.decoder.rope_base",
            "data.video.fps",
            "optimizer.lr",
            "optimizer.eps",
            "optimizer.clip_norm",
        ),
        lambda value: value > 0,
    ),
    (
        ">= 0",
        (
            "model.init_std",
            "optimizer.weight_decay",
            "optimizer.lr_scale.vision",
            "optimizer.lr_scale.projector",
            "optimizer.lr_scale.decoder",
        ),
        lambda value: value >= 0,
    ),
    (">= 0 and < 1", ("optimizer.beta1", "optimizer.beta2"), lambda value: 0 <= value < 1),
)


def replica_size(config: RunConfig) -> int:
    """Ranks that hold one copy of the decoder: tp * cp * pp."""
    return config.parallel.tp * config.parallel.cp * config.parallel.pp


def num_replicas(config: RunConfig, world_size: int) -> int:
    """Data-parallel size of the decoder. The world must be a multiple of `replica_size`, which `check` reports."""
    return world_size // replica_size(config)


def padded_vocab_size(config: RunConfig) -> int:
    """Rows of the embedding and output tables: the vocabulary rounded up to a multiple of tp, and nothing else."""
    tp = config.parallel.tp
    return -(-config.model.decoder.vocab_size // tp) * tp


def stage_layers(config: RunConfig) -> tuple[int, ...]:
    """Decoder layers of each of the pp * vp stages in the order in which a token passes them."""
    layout = config.parallel
    if layout.layers_per_stage is not None:
        return layout.layers_per_stage
    num_stages = layout.pp * layout.vp
    return (config.model.decoder.num_layers // num_stages,) * num_stages


def require_valid(config: RunConfig, world_size: int) -> None:
    """Raises SettingsError with every problem that `check` finds."""
    problems = check(config, world_size)
    if problems:
        raise SettingsError(problems)


def check(config: RunConfig, world_size: int) -> list[str]:
    """Every contradiction within the settings and with `world_size` processes, as sentences with found, expected and remedy."""
    return [*_check_world(config, world_size), *check_settings(config)]


def check_settings(config: RunConfig) -> list[str]:
    """The part of `check` that holds for any number of processes."""
    return [
        *_check_numbers(config),
        *_check_vision(config.model),
        *_check_decoder(config.model.decoder),
        *_check_tensor_parallel(config),
        *_check_stages(config),
        *_check_lengths(config),
        *_check_media(config),
        *_check_storage(config),
        *_check_training(config),
    ]


def _check_world(config: RunConfig, world_size: int) -> Iterator[str]:
    size = replica_size(config)
    if world_size % size:
        p = config.parallel
        yield (
            f"{world_size} processes cannot hold whole replicas of parallel.tp * cp * pp = {p.tp} * {p.cp} * {p.pp} = {size} ranks: "
            f"start a multiple of {size} processes, or change the layout"
        )


def _check_numbers(config: RunConfig) -> Iterator[str]:
    """Floats that the schema's types do not bound."""
    for setting in all_settings():
        value = value_of(config, setting.name)
        if isinstance(value, float) and not isfinite(value):
            yield f"{setting.name} is {value}: expected a finite number"
    for expected, names, holds in _BOUNDS:
        for name in names:
            value = value_of(config, name)
            if isfinite(value) and not holds(value):
                yield f"{name} is {value}: expected a number {expected}"


def _check_vision(model: ModelConfig) -> Iterator[str]:
    vision = model.vision
    if vision.patch_size != SUPPORTED_PATCH_SIZE:
        yield f"model.vision.patch_size is {vision.patch_size}: only {SUPPORTED_PATCH_SIZE} is supported, remove the setting"
    if vision.hidden_size % vision.num_heads:
        yield f"model.vision.hidden_size = {vision.hidden_size} is not a multiple of num_heads = {vision.num_heads}: change one of them"
    elif (vision.hidden_size // vision.num_heads) % 4:
        yield (
            f"model.vision.hidden_size / num_heads = {vision.hidden_size // vision.num_heads}: expected a multiple of 4, since "
            "the 2D rotary embedding gives half of each head to rows and half to columns, in pairs; change one of them"
        )


def _check_decoder(decoder: DecoderConfig) -> Iterator[str]:
    if decoder.num_heads % decoder.num_kv_groups:
        yield (
            f"model.decoder.num_heads = {decoder.num_heads} is not a multiple of model.decoder.num_kv_groups = {decoder.num_kv_groups}: "
            "change one of them"
        )
    section = decoder.mrope_section
    if 2 * sum(section) != decoder.head_dim:
        yield (
            f"model.decoder.mrope_section = {list(section)} sums to {sum(section)}: expected half of model.decoder.head_dim = "
            f"{decoder.head_dim}, which is {decoder.head_dim / 2:g}; change one of them"
        )


def _check_tensor_parallel(config: RunConfig) -> Iterator[str]:
    decoder, tp = config.model.decoder, config.parallel.tp
    # num_heads needs no rule of its own: it is a multiple of num_kv_groups.
    for name, value in {"num_kv_groups": decoder.num_kv_groups, "ffn_hidden_size": decoder.ffn_hidden_size}.items():
        if value % tp:
            yield f"model.decoder.{name} = {value} is not a multiple of parallel.tp = {tp}: use a tp that divides it"
    if config.parallel.sequence_parallel and tp == 1:
        yield "parallel.sequence_parallel is on with parallel.tp = 1: it divides activations over tp ranks; raise tp or turn it off"


def _check_stages(config: RunConfig) -> Iterator[str]:
    layout, num_layers = config.parallel, config.model.decoder.num_layers
    num_stages = layout.pp * layout.vp
    if layout.vp > 1 and layout.pp == 1:
        yield f"parallel.vp = {layout.vp} with parallel.pp = 1: virtual stages need at least two pipeline ranks; set vp to 1 or raise pp"
    if layout.layers_per_stage is None:
        if num_layers % num_stages:
            yield (
                f"model.decoder.num_layers = {num_layers} is not a multiple of parallel.pp * vp = {num_stages}: "
                "change the layout, or give parallel.layers_per_stage"
            )
        return
    given = list(layout.layers_per_stage)
    if len(given) != num_stages:
        yield f"parallel.layers_per_stage = {given} has {len(given)} entries: expected parallel.pp * vp = {num_stages}, one for each stage"
    if sum(given) != num_layers:
        yield f"parallel.layers_per_stage = {given} sums to {sum(given)}: expected model.decoder.num_layers = {num_layers}"


def _check_lengths(config: RunConfig) -> Iterator[str]:
    data, layout = config.data, config.parallel
    needed = 2 * layout.cp * layout.tp
    if data.pad_multiple_tokens % needed:
        yield (
            f"data.pad_multiple_tokens = {data.pad_multiple_tokens} is not a multiple of 2 * cp * tp = {needed}: every document is cut "
            f"into 2 * cp chunks, and those over tp ranks; use a multiple of {needed}, the same for the whole run"
        )
    if data.seq_length_tokens % data.pad_multiple_tokens:
        lower = data.seq_length_tokens // data.pad_multiple_tokens * data.pad_multiple_tokens
        yield (
            f"data.seq_length_tokens = {data.seq_length_tokens} is not a multiple of pad_multiple_tokens = {data.pad_multiple_tokens}: "
            f"use {lower or data.pad_multiple_tokens}, for example"
        )


def _check_media(config: RunConfig) -> Iterator[str]:
    image, video = config.data.image, config.data.video
    if image.min_tokens > image.max_tokens:
        yield f"data.image.min_tokens = {image.min_tokens} is above data.image.max_tokens = {image.max_tokens}: exchange them"
    lowest, highest = video.min_frame_tokens, video.max_frame_tokens
    if lowest is not None and highest is not None and lowest > highest:
        yield f"data.video.min_frame_tokens = {lowest} is above data.video.max_frame_tokens = {highest}: exchange them"
    if lowest is not None and video.total_tokens is not None and lowest > video.total_tokens:
        yield f"data.video.min_frame_tokens = {lowest} is above data.video.total_tokens = {video.total_tokens}: no frame would fit"


def _check_storage(config: RunConfig) -> Iterator[str]:
    storage = config.data.storage
    if 0 < storage.cache_bytes <= storage.chunk_bytes:
        yield (
            f"data.storage.cache_bytes = {storage.cache_bytes} is not above data.storage.chunk_bytes = {storage.chunk_bytes}, so that no "
            "chunk would be kept: raise it, or set it to 0 to read without chunks"
        )


def _check_training(config: RunConfig) -> Iterator[str]:
    optimizer, train = config.optimizer, config.train
    # Without decay_steps a short trial run may end within its warm-up.
    if optimizer.decay_steps is not None and optimizer.warmup_steps > optimizer.decay_steps:
        yield f"optimizer.warmup_steps = {optimizer.warmup_steps} is above optimizer.decay_steps = {optimizer.decay_steps}: lower it"
    if set(config.model.freeze) == {"vision", "projector", "embedding", "decoder"}:
        yield "model.freeze names every module, so nothing would train: remove at least one"
    if train.valid_every_steps and config.data.valid is None:
        yield f"train.valid_every_steps = {train.valid_every_steps} without data.valid: name a held-out set, or set it to 0"
    if train.export_hf_every_steps % train.save_every_steps:
        yield (
            f"train.export_hf_every_steps = {train.export_hf_every_steps} is not a multiple of train.save_every_steps = "
            f"{train.save_every_steps}: exports are made of checkpoints; change one of them"
        )
    if train.keep_every_steps % train.save_every_steps:
        yield (
            f"train.keep_every_steps = {train.keep_every_steps} is not a multiple of train.save_every_steps = {train.save_every_steps}: "
            "no checkpoint of such steps would be there to keep; change one of them"
        )
    if train.overlap_param_gather and not train.overlap_grad_reduce:
        yield "train.overlap_param_gather is on without train.overlap_grad_reduce: Megatron-core needs both together; turn both on or off"
