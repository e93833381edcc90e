"""What every pipeline of `loader.py` does to one sample, with the functions of `megatron_keye.data`: the same tokens and patches.

Ours knows sizes and slow-fast tags from its index. The others are measured twice: with the same facts and functions handed to them, and
on their own, where each sample's media are looked at first. An image is then decoded and resized by Pillow, which is what their users
have and gives the same bytes; a clip is decoded once, its frames are held, tagged, and resized.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.shard_sets import VARIANT
from megatron_keye.config.schema import DataConfig
from megatron_keye.contract.media import PATCH_VALUES
from megatron_keye.data.describe import describe, sample_frames
from megatron_keye.data.index import open_index
from megatron_keye.data.items import Item, Resolved, load_patches, media_rules, resolve
from megatron_keye.data.media.decoder import PYAV
from megatron_keye.data.media.frame_tags import frame_tags
from megatron_keye.data.media.patches import patchify
from megatron_keye.data.media.resample import resize_bilinear
from megatron_keye.data.media.video import iter_frames, probe
from megatron_keye.data.record import Media, parse_record
from megatron_keye.data.shards import parse_json
from megatron_keye.data.tokenize import tokenize
from megatron_keye.data.tokenizer import load_tokenizer

COLUMNS = ("token_ids", "supervised", "patches")


@dataclass(frozen=True)
class Counted:
    """Some samples that a pipeline has delivered."""

    samples: int
    tokens: int
    patches: int


class SampleWork:
    """A raw webdataset sample -> its tensors. Opens what it needs when it is first called, in a worker."""

    def __init__(self, config: DataConfig, with_index: bool):
        self._config, self._with_index = config, with_index
        self._rules = media_rules(config.image, config.video, VARIANT)
        self._opened = None

    def __call__(self, sample: dict) -> dict[str, torch.Tensor]:
        tokenizer, index = self._open()
        key = sample["__key__"]
        record = parse_record(parse_json(sample["json"], key), key)
        blobs = [sample[media.address] for media in record.media]
        if index is None:
            made = [self._look_and_load(media, blob) for media, blob in zip(record.media, blobs, strict=True)]
        else:
            items = index.facts(int(key) - 1).items  # keys are numbers of lines
            resolved = [resolve(item, self._rules) for item in items]
            made = [(r, load_patches(item, r, blob, VARIANT, PYAV)) for item, r, blob in zip(items, resolved, blobs, strict=True)]
        tokens = tokenize(record, [resolved.layout for resolved, _ in made], tokenizer, VARIANT)
        patches = [p for _, own in made for p in own]
        return {
            "token_ids": torch.from_numpy(tokens.token_ids),
            "supervised": torch.from_numpy(tokens.supervised),
            "patches": torch.from_numpy(np.concatenate([np.zeros((0, PATCH_VALUES), np.uint8), *patches])),
        }

    def _open(self):
        if self._opened is None:
            index = open_index(Path(self._config.train)) if self._with_index else None
            self._opened = (load_tokenizer(self._config.tokenizer, VARIANT), index)
        return self._opened

    def _look_and_load(self, media: Media, blob: bytes) -> tuple[Resolved, list[np.ndarray]]:
        if media.kind == "image":
            resolved = resolve(describe("image", blob, media.options, self._rules), self._rules)
            (size,) = resolved.sizes
            picture = Image.open(BytesIO(blob)).convert("RGB").resize(size[::-1], Image.Resampling.BICUBIC)
            return resolved, [patchify(np.array(picture)[None])]
        info = probe(blob)
        sampled = sample_frames(info.num_frames, info.fps, media.options, self._rules)
        frames = list(iter_frames(blob, sampled.numbers))
        tags = frame_tags(frames, self._rules.video)
        resolved = resolve(Item(info.height, info.width, media.options, replace(sampled, tags=tags)), self._rules)
        return resolved, [patchify(resize_bilinear(f, resolved.sizes[tag])[None]) for f, tag in zip(frames, tags, strict=True)]


def batched(samples: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """One tensor of each kind for the whole batch: the cheapest to hand to another process."""
    return {name: torch.cat([sample[name] for sample in samples]) for name in COLUMNS} | {
        "lengths": torch.tensor([len(sample["token_ids"]) for sample in samples])
    }


def count(batch: dict[str, torch.Tensor]) -> Counted:
    return Counted(len(batch["lengths"]), len(batch["token_ids"]), len(batch["patches"]))
