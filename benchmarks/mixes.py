"""Made-up mixes of samples with long tails, and what they cost: the data of `benchmarks/balance.py`.

A decoder of 8 billion parameters (36 layers, hidden size 4096, causal) and a ViT of 400 million (27 layers, hidden size 1152,
attention within each image or frame), forward and backward, at rates that an H100 reaches. Times are integers, in ns.
"""

from dataclasses import dataclass

import numpy as np

LINEAR_FLOPS, ATTENTION_FLOPS = 480e12, 400e12
VISION_LINEAR_FLOPS, VISION_ATTENTION_FLOPS = 330e12, 300e12
DECODER_TOKEN_NS = 6 * 8.0e9 / LINEAR_FLOPS * 1e9
DECODER_SQUARE_NS = 6 * 36 * 4096 / ATTENTION_FLOPS * 1e9
VISION_PATCH_NS = 6 * 0.4e9 / VISION_LINEAR_FLOPS * 1e9
VISION_SQUARE_NS = 12 * 27 * 1152 / VISION_ATTENTION_FLOPS * 1e9
MIN_PATCHES, MAX_PATCHES, GIANT_PATCHES = 256, 16_384, 81_920


@dataclass(frozen=True)
class Mix:
    """Shares of text, images, interleaved and video samples, and how long they are (medians of log-normals)."""

    name: str
    max_tokens: int
    shares: tuple[float, float, float, float]
    text_tokens: float
    text_sigma: float
    video_tokens: float
    video_sigma: float
    giant_share: float = 0.0
    """Share of samples that are one image of 20,480 tokens."""


MIXES = (
    Mix("8K", 8_192, (0.45, 0.40, 0.10, 0.05), 750, 1.0, 3_500, 0.8),
    Mix("32K", 32_768, (0.40, 0.38, 0.12, 0.10), 1_100, 1.2, 8_000, 0.9),
    Mix("128K", 131_072, (0.35, 0.35, 0.10, 0.20), 1_200, 1.4, 14_000, 1.25),
    Mix("128K, large images", 131_072, (0.35, 0.35, 0.10, 0.20), 1_200, 1.4, 14_000, 1.25, giant_share=0.005),
)


@dataclass(frozen=True)
class Samples:
    """Columns int64 [n]: tokens; ns of decoder and ViT. Segments: ns int64 [m], tokens int64 [m], and `first` int64 [n + 1]."""

    tokens: np.ndarray
    decoder_ns: np.ndarray
    vision_ns: np.ndarray
    segment_ns: np.ndarray
    segment_tokens: np.ndarray
    first: np.ndarray


def decoder_ns(tokens: np.ndarray) -> np.ndarray:
    return (DECODER_TOKEN_NS * tokens + DECODER_SQUARE_NS * np.square(tokens, dtype=np.float64)).astype(np.int64)


def vision_ns(patches: np.ndarray) -> np.ndarray:
    return (VISION_PATCH_NS * patches + VISION_SQUARE_NS * np.square(patches, dtype=np.float64)).astype(np.int64)


def draw(mix: Mix, count: int, seed: int) -> Samples:
    """`count` samples of `mix`."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(4, count, p=mix.shares)
    text = np.clip(rng.lognormal(np.log(mix.text_tokens), mix.text_sigma, count), 16, mix.max_tokens).astype(np.int64)
    text = np.where(kind == 0, text, np.minimum(text // 4 + 16, mix.max_tokens // 8))
    num_segments = np.choose(kind, [np.zeros(count, np.int64), 1, rng.integers(2, 9, count), 0])
    image_limit = np.minimum(MAX_PATCHES, 4 * (mix.max_tokens - text) // np.maximum(num_segments, 1))
    video = kind == 3
    frame_patches = 4 * rng.integers(32, 257, count)
    wanted = np.clip(rng.lognormal(np.log(mix.video_tokens), mix.video_sigma, count), 256, mix.max_tokens - text).astype(np.int64)
    num_segments = np.where(video, np.maximum(1, 4 * wanted // frame_patches), num_segments)
    giant = rng.random(count) < mix.giant_share
    num_segments = np.where(giant, 1, num_segments)
    first = np.concatenate([[0], np.cumsum(num_segments)])
    owner = np.repeat(np.arange(count), num_segments)
    patches = np.clip(rng.lognormal(np.log(2200), 0.9, len(owner)), MIN_PATCHES, MAX_PATCHES).astype(np.int64)
    patches = np.where(video[owner], frame_patches[owner], np.minimum(patches, image_limit[owner]))
    patches = np.where(giant[owner], GIANT_PATCHES, patches) // 4 * 4
    segment_tokens = patches // 4
    visual = np.bincount(owner, segment_tokens, count).astype(np.int64)
    tokens = np.minimum(text + visual, mix.max_tokens)
    segment_ns = vision_ns(patches)
    sums = np.concatenate([[0], np.cumsum(segment_ns)])
    return Samples(tokens, decoder_ns(tokens), sums[first[1:]] - sums[first[:-1]], segment_ns, segment_tokens, first)
