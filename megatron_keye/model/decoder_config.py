"""Our settings -> Megatron's TransformerConfig."""

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_keye.config.schema import DecoderConfig, ParallelConfig

PRECISION = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


def megatron_config(decoder: DecoderConfig, parallel: ParallelConfig, dtype: torch.dtype) -> TransformerConfig:
    """Megatron's configuration of the decoder.

    `calculate_per_token_loss` makes the schedules pure sums, so that the one division by the global token count is ours.
    Virtual stages run only with overlapped point-to-point communication: batched messages pair up wrongly on gloo
    (silently, at PP 2), and without overlap PP 4 hangs. Megatron's own weight initialisation stays on although ours
    overwrites it: it also marks parameters as split over TP, without which their gradient norm counts TP rank 0 alone.
    """
    on_gpu = torch.cuda.is_available()
    return TransformerConfig(
        num_layers=decoder.num_layers,
        hidden_size=decoder.hidden_size,
        num_attention_heads=decoder.num_heads,
        num_query_groups=decoder.num_kv_groups,
        kv_channels=decoder.head_dim,
        ffn_hidden_size=decoder.ffn_hidden_size,
        gated_linear_unit=True,
        activation_func=F.silu,
        normalization="RMSNorm",
        layernorm_epsilon=decoder.norm_eps,
        qk_layernorm=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        context_parallel_size=parallel.cp,
        virtual_pipeline_model_parallel_size=parallel.vp if parallel.vp > 1 else None,
        sequence_parallel=parallel.sequence_parallel and parallel.tp > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=not on_gpu,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        bias_activation_fusion=on_gpu,
        bias_dropout_fusion=False,
        calculate_per_token_loss=True,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        batch_p2p_comm=False,
        overlap_p2p_comm=parallel.vp > 1,
        deallocate_pipeline_outputs=True,
        **_recompute(decoder),
    )


def _recompute(decoder: DecoderConfig) -> dict:
    return {
        "none": {},
        "core_attention": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }[decoder.recompute]
