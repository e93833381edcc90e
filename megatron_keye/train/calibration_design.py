"""Which steps `keye calibrate` measures: rows that tell tokens, pairs, items and sequences apart, within the limits of the run.

Every step has one kind of row, once per pipeline stage in each replica, so that a pipeline's time is a number of equal rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isqrt

from megatron_keye.config.schema import RunConfig, Variant
from megatron_keye.contract.media import MERGE, PatchGrid, SampleShape, Segment
from megatron_keye.plan.balance import place_segments
from megatron_keye.plan.cost import CostModel
from megatron_keye.plan.pack import round_up
from megatron_keye.plan.types import Document, ReplicaPlan, Row
from megatron_keye.train.placement import encoder_ranks

TEXT_TOKENS = 16
"""Text beside an image or clip."""
FEWEST_TOKENS = 4
MOST_IMAGES = 16


@dataclass(frozen=True, slots=True)
class DesignedStep:
    """What is measured, in words, and the samples of each of its rows."""

    name: str
    samples: tuple[SampleShape, ...]


def designed_steps(config: RunConfig) -> list[DesignedStep]:
    """Texts of many lengths, images from small to large, and clips of many frames; at least one of each kind of work."""
    limit, multiple = config.data.seq_length_tokens, config.data.pad_multiple_tokens
    steps = [*_texts(limit, multiple), *_images(config, limit), *_clips(config.model.variant, limit)]
    fitting = [step for step in steps if sum(round_up(s.num_tokens, multiple) for s in step.samples) <= limit]
    return list({step.samples: step for step in fitting}.values())


def _texts(limit: int, multiple: int) -> Iterator[DesignedStep]:
    for part in (1, 2, 4, 8):
        for documents in (1, 3, 8, 24):
            length = limit // part // documents // multiple * multiple
            if length:
                yield DesignedStep(f"{documents} text(s) of {length} tokens", (SampleShape(length),) * documents)


def _images(config: RunConfig, limit: int) -> Iterator[DesignedStep]:
    largest = min(config.data.image.max_tokens, limit - TEXT_TOKENS)
    for part in (1, 2, 4, 16, 64):
        grid = _grid(largest // part)
        sample = SampleShape(TEXT_TOKENS + grid.num_tokens, (Segment(grid, TEXT_TOKENS // 2),))
        padded = round_up(sample.num_tokens, config.data.pad_multiple_tokens)
        for count in (1, min(MOST_IMAGES, limit // padded)):
            yield DesignedStep(f"{count} image(s) of {grid.num_tokens} tokens", (sample,) * count)


def _clips(variant: Variant, limit: int) -> Iterator[DesignedStep]:
    for frames in (4, 16, 64):
        for part in (1, 4):
            grid = _grid(max(FEWEST_TOKENS, (limit // part - TEXT_TOKENS) // frames))
            segments = (Segment(PatchGrid(frames, grid.h, grid.w), TEXT_TOKENS // 2),)
            if variant == "keye_vl_1_5":
                segments = tuple(Segment(grid, TEXT_TOKENS // 2 if number == 0 else 0) for number in range(frames))
            sample = SampleShape(TEXT_TOKENS + frames * grid.num_tokens, segments)
            yield DesignedStep(f"a clip of {frames} frames of {grid.num_tokens} tokens", (sample,))


def _grid(num_tokens: int) -> PatchGrid:
    """A nearly square image of at most so many tokens, and of at least `FEWEST_TOKENS`."""
    num_tokens = max(num_tokens, FEWEST_TOKENS)
    height = isqrt(num_tokens)
    return PatchGrid(1, MERGE * height, MERGE * (num_tokens // height))


def designed_replica(samples: Sequence[SampleShape], config: RunConfig, cost: CostModel) -> ReplicaPlan:
    """A replica's plan of a designed step: the row of `samples` once per pipeline stage, encoded by the ranks that the run encodes on."""
    documents, start = [], 0
    for number, shape in enumerate(samples):
        padded = round_up(shape.num_tokens, config.data.pad_multiple_tokens)
        documents.append(Document(number, shape, start, padded))
        start += padded
    rows = (Row(tuple(documents), start),) * config.parallel.pp
    tasks = place_segments(rows, encoder_ranks(config), config.encode.patches_per_round, cost)
    return ReplicaPlan(rows, tasks, num_rounds=1 + max((task.round for task in tasks), default=-1))
