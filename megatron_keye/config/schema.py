"""The typed, frozen settings of a run. Plain data: no torch, no files, no defaults that depend on the machine.

Every field carries its unit in its name or in its description, and every description is what `keye config` prints.
Values that follow from others are computed where they are used (`config/derive.py`), never written back here.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, IPvAnyNetwork

Variant = Literal["keye_vl_preview", "keye_vl_1_5"]
Module = Literal["vision", "projector", "embedding", "decoder"]
Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]
TransportName = Literal["auto", "collective", "shared_memory"]
DecoderName = Literal["pyav", "dali"]
ServedMedia = Literal["all", "videos"]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """A group of settings: frozen, unknown names refused, attribute docstrings kept as descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class VisionConfig(Section):
    """The native-resolution SigLIP vision transformer (ViT)."""

    hidden_size: Positive
    num_layers: Positive
    num_heads: Positive
    ffn_hidden_size: Positive
    patch_size: Positive = 14
    """Side of a square patch, in pixels."""
    position_table_side: Positive = 27
    """The learned position table has side x side rows and is interpolated to each image's own grid."""
    norm_eps: float = 1e-6
    rope_base: float = 10000.0
    carried_position_rows: NonNegative = 32768
    """Rows of the unused `packing_position_embedding` that released checkpoints hold and loaders demand."""
    recompute: bool = False
    """Recompute each layer's activations in the backward pass."""


class ProjectorConfig(Section):
    """The MLP that merges 2x2 patches into one decoder position."""

    norm_eps: float = 1e-5


class DecoderConfig(Section):
    """The Qwen3 decoder."""

    num_layers: Positive
    hidden_size: Positive
    num_heads: Positive
    num_kv_groups: Positive
    head_dim: Positive
    ffn_hidden_size: Positive
    vocab_size: Positive
    norm_eps: float = 1e-6
    rope_base: float = 1e6
    mrope_section: tuple[Positive, Positive, Positive] = (16, 24, 24)
    """Rotary frequencies given to the time, height and width position; their sum is head_dim / 2."""
    recompute: Literal["none", "core_attention", "full"] = "none"
    """Activations recomputed in the backward pass: none, those of the attention kernel, or whole layers."""


class InitParts(Section):
    """Modules whose weights a run does not take from `model.init_from`: of each, another folder of the same kinds, or `fresh`."""

    vision: str | None = None
    projector: str | None = None
    embedding: str | None = None
    decoder: str | None = None


class ModelConfig(Section):
    """Which model. `variant` fixes everything that differs between Keye-VL-8B-Preview and Keye-VL-1.5."""

    variant: Variant
    vision: VisionConfig
    projector: ProjectorConfig = ProjectorConfig()
    decoder: DecoderConfig
    freeze: tuple[Module, ...] = ()
    """Modules without weight gradients and optimizer state."""
    init_from: str | None = None
    """Hugging Face folder, checkpoint or run directory whose weights a run starts from; None starts from fresh ones."""
    init_parts: InitParts = InitParts()
    init_std: float = 0.02
    """Standard deviation of fresh weights."""


class ParallelConfig(Section):
    """The decoder's layout. The ViT and projector are always data-parallel over every rank."""

    tp: Positive = 1
    """Tensor-parallel ranks."""
    cp: Positive = 1
    """Context-parallel ranks."""
    pp: Positive = 1
    """Pipeline stages."""
    vp: Positive = 1
    """Virtual stages (model chunks) per pipeline rank; 1 is the plain 1F1B schedule."""
    sequence_parallel: bool = False
    """Shard activations between tensor-parallel regions along the sequence."""
    layers_per_stage: tuple[NonNegative, ...] | None = None
    """Decoder layers of each of the pp * vp stages, in order; None divides them evenly."""


class KernelConfig(Section):
    """Which implementations run; `auto` takes the best one that the machine has."""

    decoder: Literal["auto", "torch", "te"] = "auto"
    """Layer spec of the decoder: plain torch modules, or Transformer Engine."""
    vision_attention: Literal["auto", "sdpa", "varlen", "flash"] = "auto"
    """Segment attention in the ViT: torch SDPA per segment, torch varlen attention, or flash-attn."""


class EncodeConfig(Section):
    """How the ViT's work of one step is cut."""

    patches_per_round: Positive = 65536
    """Most patches a rank encodes at once. A single larger segment gets a round of its own."""
    activations: Literal["keep", "recompute"] = "keep"
    """Keep the graph of every round until its gradient comes back, or run the round's forward again."""
    slab_bytes: Positive = 8 << 30
    """Budget for the visual embeddings that one rank holds for a whole step."""
    placement: Literal["all_ranks", "stage0", "stage0_replicated"] = "all_ranks"
    """Ranks that encode a replica's images: all of its ranks (ours), those of pipeline stage 0 sharing the work, or
    every rank of stage 0 doing all of it. The last two exist so that benchmarks can compare."""


class ImageConfig(Section):
    """Limits of an image, in visual tokens of 28x28 pixels. A message part may narrow them."""

    min_tokens: Positive = 4
    max_tokens: Positive = 20480


class VideoConfig(Section):
    """Slow-fast video. `preset` gives the values of the technical report or of keye-vl-utils 1.5.2; a field set here wins."""

    preset: Literal["released", "report"] = "released"
    fps: float = 2.0
    """Frames sampled per second of video, at most."""
    min_frame_tokens: Positive | None = None
    max_frame_tokens: Positive | None = None
    total_tokens: Positive | None = None
    """Visual tokens of one whole video, at most."""
    min_frame_similarity: Fraction | None = None
    """A frame less similar than this to the latest slow frame is slow, else fast."""
    max_frames: Positive | None = None


class MediaConfig(Section):
    """What decodes images and videos, and servers that do it in place of the training nodes. Only the decoder changes pixels."""

    decoder: DecoderName = "pyav"
    """pyav: FFmpeg, libjpeg-turbo and Pillow, on the CPU. dali: NVIDIA DALI for JPEG and videos, on the GPU; of videos it decodes VP9 and
    MJPEG alone where there is none."""
    allow_mixed_decoders: bool = False
    """Let a run go on with another decoder, or another version of it, than it began with, or with a different one on each node."""
    servers: tuple[str, ...] = ()
    """URLs of `keye io-server` processes, such as http://node1:7300; none decodes here."""
    registry: str | None = None
    """Shared folder in which servers announce themselves (`keye io-server --registry`)."""
    served: ServedMedia = "all"
    """What servers are asked for. videos: samples without one are decoded here; a photograph takes little longer to decode than its pixels
    take to fetch."""
    secret_file: str | None = None
    """File with the secret that servers ask for (`keye io-server --secret-file`)."""
    requests: Positive = 8
    """Images and videos asked for at a time, per replica."""
    in_flight_bytes: Positive = 1 << 30
    """Pixels on their way at a time, per replica."""
    deadline_s: PositiveFloat = 60.0
    """Longest wait for servers for one image or video, which is then decoded here."""
    hedge_after_s: PositiveFloat = 2.0
    """A second server is asked when the first takes longer than this, and longer than is usual for the size."""
    connect_timeout_s: PositiveFloat = 1.0
    stall_timeout_s: PositiveFloat = 5.0
    """Longest pause while an answer arrives."""


class StorageConfig(Section):
    """Reading data sets that lie at URLs, and images and videos that records name by web address. Folders are read as they are."""

    cache: str = "~/.cache/megatron_keye"
    """Folder for fetched indices and for bytes of shards; best on a disk of the node."""
    cache_bytes: NonNegative = 64 << 30
    """Most bytes of shards and of media that are kept there; 0 keeps none, and reads each record and medium alone. Best holds
    `data.order.blocks_per_window` blocks at least."""
    chunk_bytes: Positive = 1 << 20
    """Shards are read in aligned chunks of this size, so that the samples beside one that was read cost no request."""
    attempts: Positive = 6
    """Tries of a request before it is given up."""
    first_pause_s: PositiveFloat = 0.5
    """Longest pause after the first try; doubled after each, up to 30 s."""
    timeout_s: PositiveFloat = 60.0
    """Longest pause while a server answers over HTTP."""
    medium_bytes: Positive = 1 << 30
    """Most bytes of an image or video at a web address."""
    medium_timeout_s: PositiveFloat = 60.0
    """Longest time for one of these, all tries together; best below `data.loader.worker_deadline_s`."""
    private_networks: tuple[IPvAnyNetwork, ...] = ()
    """Networks that are not public, such as 10.1.0.0/16, from which media, or a proxy, may answer. Nothing else inside is asked for
    anything, whatever a record names."""


class LoaderConfig(Section):
    """Processes that read and decode samples for a replica. None of it changes what a run computes."""

    workers: NonNegative = 2
    """Decode processes of each replica's leader. 0 decodes in `data.decode_threads` threads of the leader, where a file that crashes
    or bloats the decoder takes the run along."""
    worker_memory_bytes: Positive = 4 << 30
    """Address space that a worker may take beyond what it starts with."""
    worker_deadline_s: PositiveFloat = 120.0
    """Longest time for one sample; a worker that takes longer is replaced, and the sample tried once more."""


class LookaheadConfig(Section):
    """Several global batches planned together, so that giant samples meet in few steps. Decides which samples a step holds; the
    layout never does."""

    batches: Positive = 1
    """1 takes the next samples of the order for each step; 8 to 16 pay where single samples are dearer than a step's mean."""
    canonical_replicas: Positive = 1
    """The replica count that steps are made for, whatever runs: the largest that the run may be scaled to."""
    growth_percent: Annotated[int, Field(ge=100)] = 200
    """The most work in one step, in percent of the mean step."""


class OrderConfig(Section):
    """How samples are shuffled: blocks of neighbours first, then the samples of a few blocks, so that shards are read in long stretches.
    Where all samples lie in one window, any sample may come anywhere in an epoch."""

    block_bytes: Positive = 64 << 20
    blocks_per_window: Positive = 16


class BadSampleBudget(Section):
    """Samples of one source that a run may leave out, over all its restarts, before it stops: as many as either limit allows. A
    source of which nothing can be read stops it at once."""

    max_count: NonNegative = 100
    max_fraction: Fraction = 0.001
    """Of the samples that were taken from the source."""


class DataConfig(Section):
    """Where samples come from and how they fill steps."""

    train: str
    """Folder or URL (s3://, https://, ...) with shards and index of the training set, or a YAML file that mixes several by weights or token
    shares."""
    valid: str | None = None
    """Folder or URL of the held-out set; None evaluates nothing."""
    tokenizer: str
    """Folder of a Hugging Face tokenizer that has the variant's special tokens."""
    seq_length_tokens: Positive
    """Most tokens of one packed row, padding included."""
    pad_multiple_tokens: Positive = 64
    """Every document is padded at its end to this multiple: of 2 * cp * tp of every layout the run may use."""
    global_batch_samples: Positive
    """Samples of one optimizer step."""
    lookahead: LookaheadConfig = LookaheadConfig()
    order: OrderConfig = OrderConfig()
    cost_file: str | None = None
    """Times measured by `keye calibrate`, which placement then goes by in place of FLOPs. Which samples a step holds stays the same."""
    image: ImageConfig = ImageConfig()
    video: VideoConfig = VideoConfig()
    prefetch_steps: NonNegative = 2
    """Steps whose media are decoded ahead of the one that trains."""
    prefetch_bytes: Positive = 4 << 30
    """Budget for pixels decoded ahead, per replica."""
    decode_threads: Positive = 2
    """Threads that decode in the leader itself, where data.loader.workers is 0, and in evaluation and scoring."""
    loader: LoaderConfig = LoaderConfig()
    storage: StorageConfig = StorageConfig()
    transport: TransportName = "auto"
    """How a replica's leader gives its ranks what they need of a step: by the backend's collective, or through memory, where the ranks
    share a host. auto measures both when the run starts."""
    media: MediaConfig = MediaConfig()
    bad_sample: Literal["stop", "skip"] = "stop"
    """What a sample that cannot be read does: stop the run, or leave its slot empty, with its reason in the ledger."""
    bad_sample_budget: BadSampleBudget = BadSampleBudget()


class LearningRateScale(Section):
    """Factor on the learning rate, per module."""

    vision: float = 1.0
    projector: float = 1.0
    decoder: float = 1.0


class OptimizerConfig(Section):
    """AdamW with linear warm-up and cosine decay, one global gradient norm, ZeRO-1 sharding of its state."""

    lr: float
    min_lr_ratio: Fraction = 0.1
    warmup_steps: NonNegative = 0
    decay_steps: Positive | None = None
    """Steps after which the learning rate has reached its minimum; None means train.steps."""
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_norm: float = 1.0
    lr_scale: LearningRateScale = LearningRateScale()


class TrainConfig(Section):
    """The loop."""

    steps: Positive
    seed: int = 0
    precision: Literal["bf16", "fp32", "fp64"] = "bf16"
    """bf16 keeps float32 main weights and gradients; fp64 is for proofs on CPU."""
    save_every_steps: Positive = 100
    save_every_s: NonNegativeFloat = 0.0
    """A checkpoint is also saved when this long has passed since the last one; 0 goes by steps alone."""
    async_save: bool = False
    """Go on training while checkpoints are written, from a copy in host memory as large as a rank's part of the state."""
    keep_checkpoints: Positive = 2
    """The newest ones."""
    keep_every_steps: NonNegative = 0
    """Checkpoints of steps that are multiples of it are kept for good; 0 keeps none of them."""
    export_hf_every_steps: NonNegative = 0
    """Steps between Hugging Face folders, made of checkpoints while training goes on, and at the end (RUN_DIR/hf/step_N); 0 makes none."""
    valid_every_steps: NonNegative = 0
    """0 evaluates only at the end."""
    valid_steps: Positive = 8
    max_nonfinite_steps: NonNegative = 10
    """Steps skipped for a non-finite gradient before the run ends with exit code 66."""
    hang_timeout_s: PositiveFloat = 60.0
    """A rank ends, with the stacks of its threads in the run directory, when a step takes longer than this and than three times
    the longest step before it."""
    slow_phase_timeout_s: PositiveFloat = 1800.0
    """The same limit for loading, saving, evaluation and the first step of a start."""
    deterministic: bool = False
    """On GPUs, the same bits at every start at one layout, for some speed: kernels and collectives that add in a fixed order. CPUs always
    repeat."""
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False


class RunConfig(Section):
    """All settings of one run."""

    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    kernels: KernelConfig = KernelConfig()
    encode: EncodeConfig = EncodeConfig()
    data: DataConfig
    optimizer: OptimizerConfig
    train: TrainConfig
