"""A data set as planning and loading see it: shapes from the index alone, tokens and pixels by random access."""

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import numpy as np

from megatron_keye.config.schema import DataConfig, DecoderName, Variant
from megatron_keye.contract.media import SampleShape
from megatron_keye.data.fit import Fitted, Rejected, fit, row_limit_tokens
from megatron_keye.data.index import Index, Made, made_with, open_index
from megatron_keye.data.items import MediaRules, count_frames, media_rules
from megatron_keye.data.media.decoder import open_decoder
from megatron_keye.data.record import Record, parse_record
from megatron_keye.data.shards import parse_json
from megatron_keye.data.stored import StoredMedium
from megatron_keye.data.tokenize import ItemLayout, TokenizedSample, tokenize
from megatron_keye.data.tokenizer import KeyeTokenizer
from megatron_keye.errors import DataError
from megatron_keye.plan.step import PlanData
from megatron_keye.plan.table import SampleTable

CACHED_FITS = 65536
TAGGING_RULES = ("min_frame_similarity", "block_similarity")
"""Video rules that must be those of the index, as they decide which frames are fast."""
SAMPLING_RULES = ("fps", "min_frame_tokens", "total_tokens", "max_frames")
"""Video rules that decide which frames are taken, but may change where they take the same ones. The others set sizes only."""


class Dataset:
    """Samples that fit a row, numbered from 0 in index order. All methods may be called from several threads."""

    def __init__(
        self, index: Index, tokenizer: KeyeTokenizer, rules: MediaRules, limit_tokens: int, decoder: DecoderName, fingerprint: str
    ):  # fmt: skip
        self._index = index
        self._tokenizer = tokenizer
        self._rules = rules
        self._limit_tokens = limit_tokens
        self._decoder: DecoderName = decoder
        self.fingerprint = fingerprint
        """Changes with the data, the tokenizer, and every setting that changes a sample."""
        self._usable, self._table, self.rejected = _usable(index, rules, limit_tokens)
        """`rejected` lists (id, reason) of the samples that do not fit."""
        self._fit = lru_cache(CACHED_FITS)(self._fit_sample)

    @classmethod
    def open(cls, folder: str | Path, tokenizer: KeyeTokenizer, variant: Variant, data_config: DataConfig) -> "Dataset":
        """Open the indexed shards of `folder`, which may be a URL.

        Raises DataError for a missing folder, a missing, damaged or outdated index, missing or truncated shards, and where no sample
        is usable; SettingsError for a URL that cannot be used, UnreachableError for one that does not answer.
        """
        rules = media_rules(data_config.image, data_config.video, variant)
        index = open_index(folder, data_config.storage)
        _check_made(folder, index.made, made_with(tokenizer.fingerprint, rules))
        _check_sampling(folder, index, rules)
        limit_tokens = row_limit_tokens(data_config.seq_length_tokens, data_config.pad_multiple_tokens)
        settings = json.dumps([index.fingerprint, asdict(rules), limit_tokens], sort_keys=True)
        fingerprint = hashlib.sha256(settings.encode()).hexdigest()
        dataset = cls(index, tokenizer, rules, limit_tokens, data_config.media.decoder, fingerprint)
        if not len(dataset):
            why = f"all {len(index)} are too long, the first: {dataset.rejected[0]}" if len(index) else "its index is empty"
            raise DataError(f"the data set at {folder} has no usable sample: {why}")
        return dataset

    def __len__(self) -> int:
        return len(self._usable)

    @property
    def shapes(self) -> "Shapes":
        """The shapes of all samples as a sequence, each worked out when it is asked for."""
        return Shapes(self)

    @property
    def plan_data(self) -> PlanData:
        """What planning reads of it: no shard is opened."""
        return PlanData(self._table, self.shapes)

    @property
    def mean_sample_bytes(self) -> int:
        """Bytes of shards per sample."""
        return self._index.shard_bytes // len(self._index)

    def tokens_by_modality(self) -> tuple[int, int, int]:
        """Tokens of all samples: visual ones of samples with a video, visual ones of the others, and text."""
        visual = self._table.visual_tokens()
        with_video = self._index.with_video()[np.asarray(self._usable)]
        text = int(self._table.tokens.sum()) - int(visual.sum())
        return int(visual[with_video].sum()), int(visual[~with_video].sum()), text

    def shape(self, sample: int) -> SampleShape:
        """Shape of a sample after it was made to fit; exactly that of its tokens."""
        return self._fit(sample).shape

    def layouts(self, sample: int) -> list[ItemLayout]:
        """Its images and videos, in order, with the sizes that were settled."""
        return [item.layout for item in self._fit(sample).items]

    def sample_id(self, sample: int) -> str:
        return self._index.key_and_id(self._number(sample))[1]

    def task(self, sample: int) -> str | None:
        return self._index.task(self._number(sample))

    def source(self, sample: int) -> str | None:
        return self._index.source(self._number(sample))

    def source_sizes(self, unnamed: str) -> Counter[str]:
        """Samples of each source; those that name none are of the source `unnamed`."""
        return self._index.source_sizes(self._usable, unnamed)

    def record_crc32(self, sample: int) -> int:
        """Checksum of the record's JSON, which holds the SHA-256 of each of its media, and of that of media at web addresses."""
        return self._index.payload_crc32(self._number(sample))

    def answer(self, sample: int) -> str | None:
        return self.record(sample).answer

    def record(self, sample: int) -> Record:
        """The record as it is stored. Raises DataError for a shard that cannot be read or was changed."""
        number, place = self._number(sample), self._place(sample)
        text = self._index.store.read(self._index.shard(number), self._index.record_span(number))
        if zlib.crc32(text) != self._index.record_crc32(number):
            raise DataError(f"{place}: the record is not the one that was indexed; restore the shard, or run index_shards.py again")
        return parse_record(parse_json(text, place), place)

    def tokens(self, sample: int) -> TokenizedSample:
        """Token ids and supervision flags. Raises DataError where they do not have the shape that was planned."""
        fitted = self._fit(sample)
        whole = tokenize(self.record(sample), self.layouts(sample), self._tokenizer, self._rules.variant)
        tokenized = whole.truncated(fitted.shape.num_tokens)
        if tokenized.shape != fitted.shape:
            raise DataError(
                f"{self._place(sample)}: its record gives {tokenized.shape.num_tokens} tokens where the index promised "
                f"{fitted.shape.num_tokens}, or other media: this version reads records differently; run data_tools/index_shards.py again"
            )
        return tokenized

    def pixels(self, sample: int) -> list[np.ndarray]:
        """uint8 [num_patches, 588] per attention segment, in order. Raises as `StoredMedium.patches` and `open_decoder` do."""
        media = self.stored_media(sample)
        if not media:
            return []
        decoder = open_decoder(self._decoder)
        return [patches for medium in media for patches in medium.patches(decoder)]

    def stored_media(self, sample: int) -> list[StoredMedium]:
        """Its images and videos, in order. Raises DataError as `record` does."""
        number = self._number(sample)
        facts = self._index.facts(number)
        if not facts.items:
            return []
        rows = zip(self.record(sample).media, facts.items, self._fit(sample).items, self._index.media_places(number), strict=True)
        where, variant = self._place(sample), self._rules.variant
        return [
            StoredMedium(place, media, item, resolved, variant, f"{where}, medium {position}")
            for position, (media, item, resolved, place) in enumerate(rows)
        ]

    def bytes_read(self) -> int:
        """Bytes of shards, and of media at web addresses, that were read so far."""
        return self._index.bytes_read()

    def _number(self, sample: int) -> int:
        """Place of a usable sample in the index."""
        return int(self._usable[sample])

    def _fit_sample(self, sample: int) -> Fitted:
        result = fit(self._index.facts(self._number(sample)), self._rules, self._limit_tokens)
        if isinstance(result, Rejected):
            raise AssertionError(f"sample {sample} is listed as usable, but {result.reason}")
        return result

    def _place(self, sample: int) -> str:
        number = self._number(sample)
        key, record_id = self._index.key_and_id(number)
        return f"{self._index.store.address(self._index.shard(number))}:{key}, record {record_id}"


class Shapes(Sequence[SampleShape]):
    """The shapes of a data set, as planning reads them."""

    def __init__(self, dataset: Dataset):
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, sample: int) -> SampleShape:
        return self._dataset.shape(sample)


def _usable(index: Index, rules: MediaRules, limit_tokens: int) -> tuple[Sequence[int], SampleTable, list[tuple[str, str]]]:
    """Numbers of the samples that can be made to fit, what planning knows of them, and (id, reason) of the others.

    Samples that are as they were indexed and fit need no look at each; where all are, the index's own memory-mapped table serves.
    """
    full = index.full_table()
    unchanged = full.tokens <= limit_tokens
    if not _sizes_as_indexed(index.made, rules):
        unchanged &= full.num_runs == 0
    if unchanged.all():
        return range(len(full)), full, []
    usable, changed, shapes, rejected = unchanged.copy(), [], [], []
    for number in np.flatnonzero(~unchanged).tolist():
        result = fit(index.facts(number), rules, limit_tokens)
        if isinstance(result, Rejected):
            rejected.append((index.key_and_id(number)[1], result.reason))
        else:
            usable[number] = True
            changed.append(number)
            shapes.append(result.shape)
    table = full.with_samples(np.array(changed, np.int64), shapes) if changed else full
    numbers = np.flatnonzero(usable)
    return numbers, table.taking(numbers), rejected


def _sizes_as_indexed(made: Made, rules: MediaRules) -> bool:
    """Whether every medium has the size that it had when it was indexed."""
    image = {"min_tokens": rules.image_min_tokens, "max_tokens": rules.image_max_tokens}
    return made.image == image and made.video == asdict(rules.video)


def _check_made(folder: str | Path, then: Made, now: Made) -> None:
    """Raises DataError where tokens, frames or pixels would not be those that were indexed."""
    then_values, now_values = _comparable(then), _comparable(now)
    changed = [f"{name} (then {then_values[name]}, now {now_values[name]})" for name in now_values if then_values[name] != now_values[name]]
    if changed:
        raise DataError(f"the index of {folder} was made with another {', another '.join(changed)}; run data_tools/index_shards.py again")


def _comparable(made: Made) -> dict[str, object]:
    values = asdict(made)
    video = values.pop("video")
    values.pop("image")
    return values | {f"video.{name}": video[name] for name in TAGGING_RULES}


def _check_sampling(folder: str | Path, index: Index, rules: MediaRules) -> None:
    """Raises DataError where the settings would take other frames of a video than those that were indexed."""
    now = asdict(rules.video)
    if all(index.made.video[name] == now[name] for name in SAMPLING_RULES):
        return
    for sample, item in index.distinct_clips():
        found = len(item.frames.numbers)
        taken = count_frames(item.frames.clip_frames, item.frames.clip_fps, item.options, rules)
        if taken != found:
            raise DataError(
                f"the index of {folder} holds {found} frames of a video of record {index.key_and_id(sample)[1]}, but the settings "
                f"take {taken}; set {', '.join(f'video.{name}' for name in SAMPLING_RULES)} as they were, "
                "or run data_tools/index_shards.py again"
            )
