"""The worker program of a training run: its own data sets, one thread, behind `worker.main`."""

import sys
from typing import Any

import cv2
import torch

from megatron_keye.config.schema import DataConfig
from megatron_keye.data.mixture import MixedDataset, open_samples
from megatron_keye.data.tokenizer import load_tokenizer
from megatron_keye.data.worker import main


def open_sets(sets: list[dict[str, Any]]) -> list[MixedDataset]:
    """The data sets, as `workers.SampleSet.to_json` describes them."""
    opened = []
    for described in sets:
        config, variant = DataConfig.model_validate(described["data"]), described["variant"]
        opened.append(open_samples(described["location"], load_tokenizer(config.tokenizer, variant), variant, config))
    return opened


if __name__ == "__main__":
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    sys.exit(main(open_sets))
