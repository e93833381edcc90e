"""Several data sets trained on together. `data.train` names the folder of one set, or a YAML file of several; so may `data.valid`:

    token_shares: {video: 0.24, image: 0.50, text: 0.26}   # of all tokens; leave out to go by repeats alone
    sources:
      - {name: captions, path: sets/captions}              # relative to this file
      - {name: clips, path: /data/clips, repeats: 2}       # epochs of it, against the others
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_keye.config.schema import DataConfig, Variant
from megatron_keye.config.strict_yaml import parse_yaml
from megatron_keye.contract.media import SampleShape
from megatron_keye.data.dataset import Dataset, Shapes
from megatron_keye.data.locations import is_url
from megatron_keye.data.record import Record
from megatron_keye.data.stored import StoredMedium
from megatron_keye.data.tokenize import ItemLayout, TokenizedSample
from megatron_keye.data.tokenizer import KeyeTokenizer
from megatron_keye.errors import DataError
from megatron_keye.plan.blend import SourceTotals, weights_by_repeats, weights_by_token_shares
from megatron_keye.plan.mixture import Mixture, Source, fresh_mixture
from megatron_keye.plan.step import PlanData
from megatron_keye.plan.table import SampleTable

MIXTURE_SUFFIXES = (".yaml", ".yml")
ONLY_SOURCE = "all"
"""Name of the one source where there is no mixture file."""


class Part(BaseModel):
    """One of the sets in a mixture file. `repeats` is how often it is gone through while a set with 1 is once; 0 leaves it out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(min_length=1)]
    path: str
    repeats: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0


class TokenShares(BaseModel):
    """Shares of all tokens: visual ones of videos and of images, and all others."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    video: Annotated[float, Field(ge=0, le=1)]
    image: Annotated[float, Field(ge=0, le=1)]
    text: Annotated[float, Field(ge=0, le=1)]


class MixtureFile(BaseModel):
    """What a mixture file holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sources: Annotated[tuple[Part, ...], Field(min_length=1)]
    token_shares: TokenShares | None = None


class MixedDataset:
    """The samples of several sets, numbered one set after another. All methods may be called from several threads."""

    def __init__(self, names: Sequence[str], parts: Sequence[Dataset], weights: Sequence[int]):
        """`weights` of the sets sum to `blend.CYCLE`."""
        self._names, self._parts, self._weights = tuple(names), tuple(parts), tuple(weights)
        self.fingerprint = "+".join(part.fingerprint for part in parts)
        """That of the set, of several one after another."""
        self._ends = np.cumsum([len(part) for part in parts])
        self.rejected = [entry for part in parts for entry in part.rejected]
        """(id, reason) of the samples that do not fit."""

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def shapes(self) -> Shapes:
        """The shapes of all samples as a sequence, each worked out when it is asked for."""
        return Shapes(self)

    @property
    def plan_data(self) -> PlanData:
        """What planning reads of it: no shard is opened."""
        tables = [part.plan_data.table for part in self._parts]
        return PlanData(SampleTable.concatenated(tables) if len(tables) > 1 else tables[0], self.shapes)

    def shape(self, sample: int) -> SampleShape:
        part, number = self._at(sample)
        return part.shape(number)

    def layouts(self, sample: int) -> list[ItemLayout]:
        part, number = self._at(sample)
        return part.layouts(number)

    def sample_id(self, sample: int) -> str:
        part, number = self._at(sample)
        return part.sample_id(number)

    def task(self, sample: int) -> str | None:
        part, number = self._at(sample)
        return part.task(number)

    def source(self, sample: int) -> str:
        """The record's own source, else the name of its set."""
        part, number = self._at(sample)
        return part.source(number) or self._names[self._parts.index(part)]

    def source_sizes(self) -> Counter[str]:
        """Samples of each source."""
        return sum((part.source_sizes(name) for name, part in zip(self._names, self._parts, strict=True)), Counter())

    def record(self, sample: int) -> Record:
        part, number = self._at(sample)
        return part.record(number)

    def record_crc32(self, sample: int) -> int:
        part, number = self._at(sample)
        return part.record_crc32(number)

    def records(self, number: int) -> Iterator[tuple[str, int]]:
        """Id and CRC-32 of the record of every sample of one set, in order."""
        part = self._parts[number]
        return ((part.sample_id(sample), part.record_crc32(sample)) for sample in range(len(part)))

    def tokens(self, sample: int) -> TokenizedSample:
        part, number = self._at(sample)
        return part.tokens(number)

    def pixels(self, sample: int) -> list[np.ndarray]:
        part, number = self._at(sample)
        return part.pixels(number)

    def stored_media(self, sample: int) -> list[StoredMedium]:
        part, number = self._at(sample)
        return part.stored_media(number)

    def bytes_read(self) -> int:
        """Of shards, so far."""
        return sum(part.bytes_read() for part in self._parts)

    def mixture(self, data: DataConfig, seed: int) -> Mixture:
        """The order in which a run that begins goes through these samples."""
        order = data.order
        sources = [
            Source(name, part.fingerprint, len(part), max(1, order.block_bytes // max(1, part.mean_sample_bytes)))
            for name, part in zip(self._names, self._parts, strict=True)
        ]
        return fresh_mixture(sources, self._weights, seed, order.blocks_per_window)

    def _at(self, sample: int) -> tuple[Dataset, int]:
        """The set that has a sample, and its number there."""
        part = int(np.searchsorted(self._ends, sample, side="right"))
        return self._parts[part], sample - (int(self._ends[part - 1]) if part else 0)


def open_samples(location: str, tokenizer: KeyeTokenizer, variant: Variant, data: DataConfig) -> MixedDataset:
    """The sets at `location`: the folder of one, or a mixture file.

    Raises DataError for a mixture file that cannot be used, and as `Dataset.open` does; PlanError where no weights give the token shares.
    """
    wanted = read_mixture(location)
    parts = [Dataset.open(part.path, tokenizer, variant, data) for part in wanted.sources]
    return MixedDataset([part.name for part in wanted.sources], parts, _weights(wanted, parts))


def _weights(wanted: MixtureFile, parts: Sequence[Dataset]) -> tuple[int, ...]:
    """Tokens are only added up where shares of them are asked for: that goes through all samples."""
    repeats, shares = [part.repeats for part in wanted.sources], wanted.token_shares
    tokens = [() if shares is None else part.tokens_by_modality() for part in parts]
    totals = [SourceTotals(source.name, len(part), own) for source, part, own in zip(wanted.sources, parts, tokens, strict=True)]
    if shares is None:
        return weights_by_repeats(totals, repeats)
    return weights_by_token_shares(totals, (shares.video, shares.image, shares.text), repeats)


def read_mixture(location: str | Path) -> MixtureFile:
    """The mixture in a YAML file, its paths made relative to where the program runs; of one source where `location` is no YAML file.

    Raises DataError, with every problem.
    """
    path = Path(location)
    if path.suffix not in MIXTURE_SUFFIXES:
        return MixtureFile(sources=(Part(name=ONLY_SOURCE, path=str(location)),))
    try:
        found = MixtureFile.model_validate(parse_yaml(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"the mixture {path} cannot be read: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, problem['loc'])) or 'it'}: {problem['msg']}" for problem in error.errors())
        raise DataError(f"the mixture {path} is not one: {problems}; see megatron_keye/data/mixture.py for an example") from error
    names = [part.name for part in found.sources]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DataError(f"the mixture {path} has several sources called {', '.join(repeated)}; give each a name of its own")
    places = (part.path if is_url(part.path) else str(path.parent / part.path) for part in found.sources)
    sources = tuple(part.model_copy(update={"path": place}) for part, place in zip(found.sources, places, strict=True))
    return found.model_copy(update={"sources": sources})
