"""A record that is in no shard, to tokens and pixels in one go: for scoring single files, where nothing is planned ahead."""

from pathlib import Path

import numpy as np

from megatron_keye.data.items import MediaRules, describe, load_patches, resolve
from megatron_keye.data.record import Record
from megatron_keye.data.shards import media_bytes
from megatron_keye.data.tokenize import TokenizedSample, tokenize
from megatron_keye.data.tokenizer import KeyeTokenizer
from megatron_keye.errors import DataError


def encode_record(
    record: Record, folder: Path, tokenizer: KeyeTokenizer, rules: MediaRules, where: str
) -> tuple[TokenizedSample, list[np.ndarray]]:
    """The whole record, not made to fit any row: its tokens, and uint8 [num_patches, 588] per attention segment.

    Media paths are relative to `folder`; `where` (file and line) begins every error. Raises DataError for media that cannot be
    read, decoded or sized, and for placeholders without media.
    """
    layouts, patches = [], []
    for number, media in enumerate(record.media):
        blob = media_bytes(media, folder, where)
        try:
            item = describe(media.kind, blob, media.options, rules)
            resolved = resolve(item, rules)
            patches += load_patches(item, resolved, blob, rules.variant)
        except DataError as error:
            raise DataError(f"{where}, record {record.id}, {media.kind} {number}: {error}") from error
        layouts.append(resolved.layout)
    return tokenize(record, layouts, tokenizer, rules.variant), patches
