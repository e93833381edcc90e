"""Samples read from a JSONL file into memory, with the methods of a data set: for scoring, where nothing is indexed first.

Nothing is made to fit: a sample over the limit is an error, because whoever asks for a sample's score wants it whole.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron_keye.config.schema import StorageConfig
from megatron_keye.contract.media import SampleShape
from megatron_keye.data.describe import describe
from megatron_keye.data.items import Item, MediaRules, Resolved, load_patches, resolve
from megatron_keye.data.media.decoder import PYAV
from megatron_keye.data.record import Media, Record, parse_record
from megatron_keye.data.shards import parse_json
from megatron_keye.data.source_media import media_bytes
from megatron_keye.data.storage import DEFAULT_STORAGE
from megatron_keye.data.tokenize import ItemLayout, TokenizedSample
from megatron_keye.data.writing import Problem, format_problems
from megatron_keye.errors import DataError

Tokenize = Callable[[Record, Sequence[ItemLayout]], TokenizedSample]
"""Makes the tokens of a record whose media have these layouts."""


@dataclass(frozen=True, slots=True, eq=False)
class ListedSample:
    """One line of the file: where it is, its media with the checksums of their bytes, as they are and as they are sized, and its tokens."""

    place: str
    id: str
    media: tuple[Media, ...]
    items: tuple[Item, ...]
    resolved: tuple[Resolved, ...]
    tokens: TokenizedSample


class SampleList:
    """Samples of one file, numbered from 0 in its order. Pixels are decoded when asked for, from any thread."""

    def __init__(self, folder: Path, rules: MediaRules, samples: Sequence[ListedSample], storage: StorageConfig):
        """`folder` is what media paths are relative to; `storage` is how web addresses are read."""
        self._folder, self._storage = folder, storage
        self._rules = rules
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def sample_id(self, sample: int) -> str:
        return self._samples[sample].id

    def shape(self, sample: int) -> SampleShape:
        return self._samples[sample].tokens.shape

    def tokens(self, sample: int) -> TokenizedSample:
        return self._samples[sample].tokens

    def pixels(self, sample: int) -> list[np.ndarray]:
        """uint8 [num_patches, 588] per attention segment, in order. Raises DataError for media that changed or cannot be decoded."""
        listed = self._samples[sample]
        patches = []
        for number, (media, item, resolved) in enumerate(zip(listed.media, listed.items, listed.resolved, strict=True)):
            blob = media_bytes(media, self._folder, listed.place, self._storage)
            try:
                patches += load_patches(item, resolved, blob, self._rules.variant, PYAV)
            except DataError as error:
                raise DataError(f"{listed.place}, {media.kind} {number}: {error}") from error
        return patches


def read_sample_list(
    path: Path,
    tokenize: Tokenize,
    rules: MediaRules,
    limit_tokens: int,
    on_sample: Callable[[], None] = lambda: None,
    storage: StorageConfig = DEFAULT_STORAGE,
) -> SampleList:
    """Read, size and tokenize every record of the JSONL file `path`; looks at every medium, and at the frames of videos.

    `on_sample` is called after each. Raises DataError with all lines that cannot be used, one that is longer than `limit_tokens`
    among them, or for a file that cannot be read or is empty.
    """
    samples: list[ListedSample] = []
    problems: list[Problem] = []
    for place, line in _lines(path):
        try:
            samples.append(_list_sample(place, line, path.parent, tokenize, rules, limit_tokens, storage))
        except DataError as error:
            problems.append(Problem(place, str(error)))
        on_sample()
    if problems:
        raise DataError(f"{len(problems)} of {len(samples) + len(problems)} samples cannot be used:\n{format_problems(tuple(problems))}")
    if not samples:
        raise DataError(f"{path} has no record; expected one JSON object per line")
    return SampleList(path.parent, rules, samples, storage)


def count_lines(path: Path) -> int:
    """Lines with a record. Raises DataError for a file that cannot be read."""
    return sum(1 for _ in _lines(path))


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """(file and line, text) of every line that is not blank."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", line
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}; expected a JSONL file of records") from error


def _list_sample(
    place: str, line: bytes, folder: Path, tokenize: Tokenize, rules: MediaRules, limit_tokens: int, storage: StorageConfig
) -> ListedSample:
    record = parse_record(parse_json(line, place), place)
    place = f"{place}, record {record.id}"
    found, items, resolved = [], [], []
    for number, media in enumerate(record.media):
        blob = media_bytes(media, folder, place, storage)
        found.append(replace(media, sha256=hashlib.sha256(blob).hexdigest()))
        try:
            items.append(describe(media.kind, blob, media.options, rules))
            resolved.append(resolve(items[-1], rules))
        except DataError as error:
            raise DataError(f"{place}, {media.kind} {number}: {error}") from error
    try:
        tokens = tokenize(record, [item.layout for item in resolved])
    except DataError as error:
        raise DataError(f"{place}: {error}") from error
    if tokens.shape.num_tokens > limit_tokens:
        raise DataError(
            f"{place}: found {tokens.shape.num_tokens} tokens, {tokens.shape.num_visual_tokens} of them visual, expected at most "
            f"{limit_tokens}; samples are not cut or shrunk here: raise the limit, or give its media a max_pixels"
        )
    return ListedSample(place, record.id, tuple(found), tuple(items), tuple(resolved), tokens)
