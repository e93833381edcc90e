"""The worker program of a training run: its own data sets, one thread, behind `worker.main`."""

import sys
from typing import TYPE_CHECKING, Any

from megatron_keye.data.worker import main

if TYPE_CHECKING:
    from megatron_keye.data.mixture import MixedDataset


def open_sets(sets: list[dict[str, Any]]) -> "list[MixedDataset]":
    """The data sets, as `workers.SampleSet.to_json` describes them."""
    # These take a while to import. By now `main` has told the kernel to end this process with its parent; before, a run that is
    # killed would leave it behind for as long.
    import cv2

    from megatron_keye.config.schema import DataConfig
    from megatron_keye.data.media.decoder import open_decoder
    from megatron_keye.data.mixture import open_samples
    from megatron_keye.data.tokenizer import load_tokenizer

    cv2.setNumThreads(1)
    opened = []
    for described in sets:
        config, variant = DataConfig.model_validate(described["data"]), described["variant"]
        open_decoder(config.media.decoder)  # before memory is limited: a GPU's driver takes much address space
        opened.append(open_samples(described["location"], load_tokenizer(config.tokenizer, variant), variant, config))
    return opened


if __name__ == "__main__":
    sys.exit(main(open_sets))
