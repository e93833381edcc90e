"""A data set of very many very small texts, for benchmarks of what grows with the number of samples."""

import json
import tarfile
import zlib
from pathlib import Path

from data_tools.demo.tokenizer import write_tokenizer
from megatron_keye.config.load import load_config
from megatron_keye.config.schema import ImageConfig, RunConfig
from megatron_keye.data.index import made_with
from megatron_keye.data.index_tables import SampleRow, ShardIndex, shard_index, write_index
from megatron_keye.data.items import media_rules
from megatron_keye.data.record import parse_record
from megatron_keye.data.shards import Span
from megatron_keye.data.tokenize import TokenizedSample, tokenize
from megatron_keye.data.tokenizer import load_tokenizer

VARIANT = "keye_vl_1_5"
SHARD_SAMPLES = 50_000
END_BLOCKS = bytes(2 * tarfile.BLOCKSIZE)


def make_tiny_set(folder: Path, num_samples: int) -> None:
    """Write `folder`/shards with an index, and `folder`/tokenizer. Ids of samples are their numbers.

    Every record has as many tokens as the first, as the tokenizer takes digits one by one: only that one is tokenized.
    """
    write_tokenizer(folder / "tokenizer")
    (folder / "shards").mkdir()
    tokenizer = load_tokenizer(folder / "tokenizer", VARIANT)
    first = parse_record(json.loads(record_text(0)), "the first record")
    sample = tokenize(first, [], tokenizer, VARIANT)
    shards = []
    for begin in range(0, num_samples, SHARD_SAMPLES):
        numbers = range(begin, min(begin + SHARD_SAMPLES, num_samples))
        shards.append(_write_shard(folder / "shards" / f"shard-{len(shards):06d}.tar", numbers, sample))
    rules = media_rules(ImageConfig(), tiny_config(folder).data.video, VARIANT)
    write_index(folder / "shards", made_with(tokenizer.fingerprint, rules), shards)


def record_text(number: int) -> bytes:
    return json.dumps({"id": str(number), "document": [{"type": "text", "text": f"sample {number:08d} of very many"}]}).encode()


def tiny_config(folder: Path, *overrides: str) -> RunConfig:
    """The debug model on the set in `folder`, 64 samples a step, shuffled as a whole."""
    data = (f"data.train={folder / 'shards'}", f"data.tokenizer={folder / 'tokenizer'}", "data.valid=null")
    return load_config("debug", (*data, "data.global_batch_samples=64", *overrides))


def _write_shard(path: Path, numbers: range, sample: TokenizedSample) -> ShardIndex:
    rows, offset = [], 0
    with path.open("wb") as file:
        for number in numbers:
            key, text = f"{number:09d}", record_text(number)
            header = tarfile.TarInfo(f"{key}.json")
            header.size = len(text)
            span = Span(offset + tarfile.BLOCKSIZE, len(text))
            padding = -len(text) % tarfile.BLOCKSIZE
            offset += file.write(header.tobuf(tarfile.USTAR_FORMAT) + text + bytes(padding))
            rows.append(_row(number, key, span, text, sample))
        file.write(END_BLOCKS)
    return shard_index(path.name, offset + len(END_BLOCKS), rows, [])


def _row(number: int, key: str, span: Span, text: bytes, sample: TokenizedSample) -> SampleRow:
    return SampleRow(
        key=key, id=str(number), record=span, record_crc32=zlib.crc32(text), items=(), media=(), shape=sample.shape,
        supervised_tokens=int(sample.supervised.sum()), first_supervised=1, task=None, source=None,
    )  # fmt: skip
