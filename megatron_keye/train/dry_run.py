"""What a run would be, without starting anything: settings, layout, parameters per rank, first weights, and the first step's plan."""

from megatron_keye.config.derive import num_replicas, padded_vocab_size, require_valid, stage_layers
from megatron_keye.config.load import dump_config
from megatron_keye.config.schema import DecoderConfig, ModelConfig, RunConfig
from megatron_keye.data.loader import replica_pixel_bytes
from megatron_keye.data.mixture import open_samples
from megatron_keye.data.tokenizer import load_tokenizer
from megatron_keye.errors import KeyeError
from megatron_keye.plan.blend import CYCLE
from megatron_keye.plan.cursor import Cursor
from megatron_keye.plan.mixture import Source
from megatron_keye.plan.types import ReplicaPlan
from megatron_keye.train.calibration import open_calibration
from megatron_keye.train.inputs import require_windows_fit
from megatron_keye.train.placement import Planner
from megatron_keye.train.weight_origins import describe_origins, sources


def describe(config: RunConfig, processes: int) -> str:
    """The whole report. Raises SettingsError when the settings do not fit `processes`, and CheckpointError where weights that the run
    should start from are not there, damaged or of another model."""
    require_valid(config, processes)
    parts = [dump_config(config).rstrip(), _layout(config, processes), _parameters(config)]
    if sources(config.model):
        parts.append(describe_origins(config.model))
    return "\n\n".join([*parts, _first_plan(config, processes)])


def _layout(config: RunConfig, processes: int) -> str:
    p = config.parallel
    replicas = num_replicas(config, processes)
    return (
        f"layout: {processes} processes = tp {p.tp} x cp {p.cp} x pp {p.pp} x dp {replicas}; {p.vp} model chunk(s) per pipeline rank, "
        f"sequence parallel {'on' if p.sequence_parallel else 'off'}\n"
        f"ViT and projector: data-parallel over all {processes}"
    )


def _parameters(config: RunConfig) -> str:
    lines = [f"parameters: {total_parameters(config.model):,} in all; on each rank:"]
    encoder = encoder_parameters(config.model)
    for stage in range(config.parallel.pp):
        decoder = stage_parameters(config, stage)
        lines.append(f"  pipeline stage {stage}: {decoder:,} of the decoder + {encoder:,} of ViT and projector")
    return "\n".join(lines)


def layer_parameters(decoder: DecoderConfig, tp: int) -> int:
    """Of one decoder layer on one TP rank."""
    attention = (2 * decoder.num_heads + 2 * decoder.num_kv_groups) * decoder.head_dim * decoder.hidden_size
    mlp = 3 * decoder.ffn_hidden_size * decoder.hidden_size
    norms = 2 * decoder.hidden_size + 2 * decoder.head_dim
    return (attention + mlp) // tp + norms


def stage_parameters(config: RunConfig, pp_rank: int) -> int:
    """Of the decoder on one rank of pipeline rank `pp_rank`, all its chunks together."""
    decoder, parallel = config.model.decoder, config.parallel
    layers = stage_layers(config)[pp_rank :: parallel.pp]
    count = sum(layers) * layer_parameters(decoder, parallel.tp)
    vocabulary = padded_vocab_size(config) // parallel.tp * decoder.hidden_size
    if pp_rank == 0:
        count += vocabulary
    if pp_rank == parallel.pp - 1:
        count += vocabulary + decoder.hidden_size
    return count


def encoder_parameters(model: ModelConfig) -> int:
    """Of ViT and projector, tensors that are only carried included."""
    v, merged = model.vision, 4 * model.vision.hidden_size
    linear = v.hidden_size * v.hidden_size + v.hidden_size
    mlp = 2 * v.hidden_size * v.ffn_hidden_size + v.ffn_hidden_size + v.hidden_size
    norm = 2 * v.hidden_size
    layers = v.num_layers * (4 * linear + mlp + 2 * norm)
    embeddings = (588 + 1 + v.position_table_side**2 + v.carried_position_rows) * v.hidden_size
    head = v.hidden_size + 4 * linear + norm + mlp
    projector_norm = 2 * (v.hidden_size if model.variant == "keye_vl_preview" else merged)
    projector = merged * merged + merged + merged * model.decoder.hidden_size + model.decoder.hidden_size + projector_norm
    return layers + embeddings + norm + head + projector


def total_parameters(model: ModelConfig) -> int:
    decoder = model.decoder
    vocabulary = 2 * decoder.vocab_size * decoder.hidden_size
    return encoder_parameters(model) + decoder.num_layers * layer_parameters(decoder, 1) + vocabulary + decoder.hidden_size


def _first_plan(config: RunConfig, processes: int) -> str:
    try:
        tokenizer = load_tokenizer(config.data.tokenizer, config.model.variant)
        dataset = open_samples(config.data.train, tokenizer, config.model.variant, config.data)
        require_windows_fit(config.data, len(dataset))
        mixture = dataset.mixture(config.data, config.train.seed)
        calibration = open_calibration(config)
    except KeyeError as error:
        return f"first step: cannot be planned here: {error}"
    planner = Planner(config, num_replicas(config, processes), None if calibration is None else calibration.time_model)
    plan, _ = planner.over(dataset.plan_data, mixture.order())(Cursor())
    loads = planner.loads(plan.replicas)
    lines = [
        f"data: {len(dataset):,} samples in {config.data.train}, {len(dataset.rejected)} left out",
        *(_source_line(source, weight) for source, weight in zip(mixture.sources, mixture.stages[0].weights, strict=True)),
        f"first step: predicted imbalance (max / mean) decoder {loads.decoder_imbalance:.3f}, ViT {loads.vision_imbalance:.3f}",
        *(_replica_line(number, plan.replicas[number]) for number in range(min(len(plan.replicas), 8))),
    ]
    if len(plan.replicas) > 8:
        lines.append(f"  ... and {len(plan.replicas) - 8} more replicas")
    return "\n".join(lines)


def _source_line(source: Source, weight: int) -> str:
    return f"  {source.name}: {source.num_samples:,} samples, {weight / CYCLE:.1%} of those trained on"


def _replica_line(number: int, replica: ReplicaPlan) -> str:
    documents = [document for row in replica.rows for document in row.documents]
    return (
        f"  replica {number}: {len(documents)} samples in {len(replica.rows)} rows of {[row.num_tokens for row in replica.rows]} tokens, "
        f"{sum(d.shape.num_visual_tokens for d in documents):,} of them visual; {len(replica.tasks)} attention segments in "
        f"{replica.num_rounds} rounds, {replica_pixel_bytes(replica):,} bytes of pixels"
    )
