"""Build the model and optimizer of a run on this rank: the one place where modules, groups and settings meet."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import ChainedOptimizer as OptimizerChain
from megatron.core.optimizer import OptimizerConfig, ParamKey, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamPredicate
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_no_pipelining,
    forward_backward_pipelining_with_interleaving,
    forward_backward_pipelining_without_interleaving,
)
from torch import Tensor, nn

from megatron_keye.config.derive import padded_vocab_size, stage_layers
from megatron_keye.config.schema import OptimizerConfig as OptimizerSettings
from megatron_keye.config.schema import ParallelConfig, RunConfig
from megatron_keye.model.decoder import KeyeDecoder, build_chunk
from megatron_keye.model.decoder_backend import decoder_backend
from megatron_keye.model.decoder_config import PRECISION, megatron_config
from megatron_keye.model.encoder import VisualEncoder
from megatron_keye.model.init import fill, initial_tensor
from megatron_keye.model.names import Piece, decoder_pieces, encoder_pieces, local_parameters
from megatron_keye.parallel.groups import Groups

NO_DECAY = ParamPredicate(name="vectors", fn=lambda parameter: parameter.dim() == 1)
"""Norm weights and biases get no weight decay."""


@dataclass
class KeyeModel:
    """This rank's part of the model. `encoder` is whole on every rank; `chunks` are this stage's pieces of the decoder.

    The `_ddp` fields hold Megatron's DDP around the trainable ones: None or empty where everything in them is frozen.
    """

    config: RunConfig
    groups: Groups
    device: torch.device
    dtype: torch.dtype
    encoder: VisualEncoder
    encoder_ddp: DistributedDataParallel | None
    chunks: list[KeyeDecoder]
    chunks_ddp: list[DistributedDataParallel]

    def pieces(self, select: Callable[[nn.Module], dict[str, Tensor]] = local_parameters) -> list[Piece]:
        """Canonical pieces of everything on this rank; `select` may give gradients or other tensors named like parameters."""
        decoder = self.config.model.decoder
        tp, tp_rank = self.groups.grid.tp, self.groups.coordinate("tp")
        found = [p for chunk in self.chunks for p in decoder_pieces(chunk, select(chunk), decoder, tp, tp_rank)]
        return found + list(encoder_pieces(select(self.encoder)))

    @property
    def schedule_models(self) -> list[nn.Module]:
        return list(self.chunks_ddp or self.chunks)


def build_model(config: RunConfig, groups: Groups, device: torch.device, draw=initial_tensor) -> KeyeModel:
    """The model with fresh weights, which depend on `train.seed` and not on the layout, wrapped for training."""
    dtype = PRECISION[config.train.precision]
    encoder = VisualEncoder(config.model, dtype=dtype, attention=config.kernels.vision_attention).to(device)
    chunks = _build_chunks(config, groups, dtype, device)
    _freeze(config.model.freeze, encoder, chunks)
    model = KeyeModel(config, groups, device, dtype, encoder, None, chunks, [])
    fill(model.pieces(), config.model.init_std, config.train.seed, draw)
    if _is_trainable(encoder):
        encoder_config = megatron_config(config.model.decoder, ParallelConfig(), dtype)
        ddp_config = _ddp_config(config, overlap=False)
        model.encoder_ddp = DistributedDataParallel(encoder_config, ddp_config, encoder, pg_collection=groups.encoder)
    if not {"decoder", "embedding"} <= set(config.model.freeze):
        for number, chunk in enumerate(chunks):
            wrap = partial(DistributedDataParallel, disable_bucketing=number > 0, pg_collection=groups.decoder)
            model.chunks_ddp.append(wrap(chunk.config, _ddp_config(config, overlap=True), chunk))
    return model


def _build_chunks(config: RunConfig, groups: Groups, dtype: torch.dtype, device: torch.device) -> list[KeyeDecoder]:
    parallel, decoder = config.parallel, config.model.decoder
    transformer = megatron_config(decoder, parallel, dtype)
    layers = stage_layers(config)
    layer_spec, final_norm = decoder_backend(config.kernels.decoder, dtype, device)
    chunks = []
    for virtual in range(parallel.vp):
        stage = virtual * parallel.pp + groups.coordinate("pp")
        chunk = build_chunk(
            transformer, layer_spec, final_norm, pg_collection=groups.decoder, padded_vocab_size=padded_vocab_size(config),
            max_tokens=config.data.seq_length_tokens, num_layers=layers[stage], first_layer=sum(layers[:stage]),
            is_first=stage == 0, is_last=stage == len(layers) - 1, vp_stage=virtual if parallel.vp > 1 else None,
        )  # fmt: skip
        chunks.append(chunk)
    return chunks


def _freeze(modules: tuple[str, ...], encoder: VisualEncoder, chunks: list[KeyeDecoder]) -> None:
    if "vision" in modules:
        encoder.visual.requires_grad_(False)
    if "projector" in modules:
        encoder.mlp_AR.requires_grad_(False)
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            module = "embedding" if name.startswith("embedding.") else "decoder"
            if module in modules:
                parameter.requires_grad_(False)


def _is_trainable(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _ddp_config(config: RunConfig, overlap: bool) -> DistributedDataParallelConfig:
    """Of the decoder (`overlap` as set) or of the encoder, whose gradient is reduced once, after its whole backward."""
    return DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=config.train.precision == "bf16",
        overlap_grad_reduce=overlap and config.train.overlap_grad_reduce,
        overlap_param_gather=overlap and config.train.overlap_param_gather,
    )


def build_optimizer(model: KeyeModel) -> OptimizerChain:
    """Megatron's distributed optimizer (ZeRO-1): of the decoder over DP x CP, of the encoder over the world, chained, so that
    one gradient norm covers both. Every rank must call it, since building compares parameter groups over the world."""
    config, groups = model.config, model.groups
    settings = _optimizer_config(config)
    chained = []
    if model.chunks_ddp:
        overrides = _overrides(config.optimizer, {"*": config.optimizer.lr_scale.decoder})
        chained += _optimizer(settings, model.chunks_ddp, overrides, groups.decoder)
    if model.encoder_ddp is not None:
        scales = {"*visual.*": config.optimizer.lr_scale.vision, "*mlp_AR.*": config.optimizer.lr_scale.projector}
        chained += _optimizer(settings, [model.encoder_ddp], _overrides(config.optimizer, scales), groups.encoder)
    return OptimizerChain(chained)


def _optimizer(settings, ddp_modules, overrides, collection) -> list:
    built = get_megatron_optimizer(settings, ddp_modules, overrides, use_gloo_process_groups=False, pg_collection=collection)
    return built.chained_optimizers


def _overrides(settings: OptimizerSettings, lr_scales: dict[str, float]) -> dict:
    """Parameter groups by module (their learning rate) and by dimension (their weight decay)."""
    overrides = {ParamKey(name=pattern): {"max_lr": settings.lr * scale} for pattern, scale in lr_scales.items()}
    return {**overrides, ParamKey(predicate=NO_DECAY): {"wd_mult": 0.0}}


def _optimizer_config(config: RunConfig) -> OptimizerConfig:
    settings = config.optimizer
    dtype = PRECISION[config.train.precision]
    return OptimizerConfig(
        optimizer="adam", lr=settings.lr, min_lr=0.0, weight_decay=settings.weight_decay, adam_beta1=settings.beta1,
        adam_beta2=settings.beta2, adam_eps=settings.eps, clip_grad=settings.clip_norm, bf16=dtype == torch.bfloat16,
        params_dtype=dtype, use_distributed_optimizer=True,
    )  # fmt: skip


def build_schedule(model: KeyeModel) -> Callable:
    """Megatron's forward-backward schedule for the layout, with every process group given."""
    parallel, groups = model.config.parallel, model.groups
    if parallel.pp == 1:
        return partial(forward_backward_no_pipelining, pg_collection=groups.decoder)
    interleaved = parallel.vp > 1
    schedule = forward_backward_pipelining_with_interleaving if interleaved else forward_backward_pipelining_without_interleaving
    communicator = P2PCommunicator(pp_group=groups.pp, config=model.chunks[0].config)
    return partial(schedule, pg_collection=groups.decoder, p2p_communicator=communicator)
