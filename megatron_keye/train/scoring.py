"""Scores of the samples in a JSONL file: one line each, in order."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from megatron_keye.config.schema import KernelConfig, RunConfig
from megatron_keye.data.sample_list import SampleList, read_sample_list
from megatron_keye.errors import DataError, NumericError
from megatron_keye.train.inference import SampleScore, Scorer
from megatron_keye.train.model_source import ModelSource
from megatron_keye.train.serving import build_filled

ROW_TOKENS = 2048
"""Samples share a row up to this many tokens; a longer one has a row of its own."""


def read_samples(source: ModelSource, path: Path, max_tokens: int | None, on_sample: Callable[[], None]) -> SampleList:
    """The samples of `path` as `source` reads them; a sample above `max_tokens`, or above the model's own limit, is an error."""
    limit = source.max_tokens if max_tokens is None else max_tokens
    return read_sample_list(path, source.tokenize, source.rules, limit, on_sample, source.config.data.storage)


def build_scorer(
    source: ModelSource, samples: SampleList, precision: Literal["fp32", "bf16"], vision_attention: str
) -> Scorer:  # fmt: skip
    """The model with its weights, for samples as long as these."""
    config = source.config.model_copy(
        update={
            "kernels": KernelConfig(vision_attention=vision_attention),
            "data": source.config.data.model_copy(update={"seq_length_tokens": _row_tokens(source.config, samples)}),
            "train": source.config.train.model_copy(update={"precision": precision}),
        }
    )
    return Scorer(build_filled(config, source.fill), source.tokenizer.specials.endoftext)


def write_scores(scorer: Scorer, samples: SampleList, output: Path, on_sample: Callable[[], None]) -> None:
    """Write one line per sample to `output`, which appears when all are there.

    Raises DataError where the file cannot be written or media changed, NumericError for a score that is not finite.
    """
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            for sample, score in scorer.scores(samples):
                line = score_fields(samples.sample_id(sample), samples.shape(sample).num_tokens, score)
                file.write(json.dumps(line, allow_nan=False) + "\n")
                on_sample()
        partial.replace(output)
    except OSError as error:
        raise DataError(f"cannot write {output}: {error.strerror or error}; choose another --output") from error
    finally:
        partial.unlink(missing_ok=True)


def score_fields(sample_id: str, num_tokens: int, score: SampleScore) -> dict[str, object]:
    """A line of the output. The sum is of the float32 log-probabilities, added in float64."""
    logprobs = score.logprobs.tolist()
    total = math.fsum(logprobs)
    if not math.isfinite(total):
        raise NumericError(f"the log-probabilities of {sample_id} are not all finite; try --precision fp32, or look at the weights")
    return {"id": sample_id, "num_tokens": num_tokens, "num_supervised": len(logprobs), "logprob_sum": total, "logprobs": logprobs}


def _row_tokens(config: RunConfig, samples: SampleList) -> int:
    longest = max(samples.shape(sample).num_tokens for sample in range(len(samples)))
    multiple = config.data.pad_multiple_tokens
    return -(-max(longest, ROW_TOKENS) // multiple) * multiple
