"""The decoder of the settings is the one that reads a data set, here and in worker processes, and what it cannot do is never skipped."""

import numpy as np
import pytest

from megatron_keye.config.schema import LoaderConfig
from megatron_keye.data.media.decoder import open_decoder
from megatron_keye.data.sources import ThreadSource
from megatron_keye.data.workers import DecodeWorkers, SampleSet, WorkerSource
from megatron_keye.errors import SettingsError, UnsupportedError
from megatron_keye.train.inputs import open_inputs, start_loading
from tests.unit.data.media.test_dali import HAS_DALI

PICTURE, CLIP, TEXT = 0, 1, 2
"""Samples of the tiny set: a PNG picture, an H.264 clip, text alone."""
with_dali = pytest.mark.skipif(not HAS_DALI, reason="NVIDIA DALI is not installed (pip install 'megatron_keye[dali]')")


@pytest.mark.skipif(HAS_DALI, reason="NVIDIA DALI is installed")
def test_a_run_does_not_start_without_its_decoder(tiny):
    config = tiny.config("data.media.decoder=dali")
    inputs = open_inputs(config)
    with pytest.raises(SettingsError, match="pip install 'megatron_keye"):
        start_loading(inputs, config)
    with pytest.raises(SettingsError, match="pip install 'megatron_keye"):
        inputs.train.pixels(PICTURE)
    assert inputs.train.pixels(TEXT) == [], "planning and texts need none"


@with_dali
@pytest.mark.parametrize("where", ["here", "worker"])
def test_without_a_gpu_pictures_are_read_and_h264_ends_the_run(tiny, where):
    if "-gpu-" in open_decoder("dali").name:
        pytest.skip("a GPU is here")
    config = tiny.config("data.media.decoder=dali")
    dataset = open_inputs(config).train
    if where == "here":
        source = ThreadSource(dataset, 1)
    else:
        pool = DecodeWorkers(
            [SampleSet(config.data.train, "keye_vl_1_5", config.data, dataset.fingerprint)], LoaderConfig(workers=1)
        )  # fmt: skip
        source = WorkerSource(pool, 0, dataset.sample_id)
    expected = open_inputs(tiny.config()).train.pixels(PICTURE)
    found = source.read(PICTURE, dataset.shape(PICTURE)).patches
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    with pytest.raises(UnsupportedError, match="record t1, medium 0: .* has h264 video.*data.media.decoder=pyav"):
        source.read(CLIP, dataset.shape(CLIP))
    if where == "worker":
        pool.close()
