"""The fingerprint tells machines apart whose kernels give other pixels, and only those."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from megatron_keye.data.media import preview_video
from megatron_keye.data.media.fingerprint import pixel_fingerprint
from megatron_keye.data.media.resample import resize_bilinear

PROGRAM = """
from tests.unit.data.media.test_fingerprint import pixels_of_many_sizes
from megatron_keye.data.media.fingerprint import pixel_fingerprint
print(pixel_fingerprint(), pixels_of_many_sizes())
"""


def pixels_of_many_sizes() -> str:
    """A digest of what both video resizes make of 60 other pictures and sizes than those of the fingerprint."""
    rng, digest = np.random.default_rng(7), hashlib.sha256()
    for _ in range(60):
        height, width = rng.integers(20, 400, 2)
        frames = rng.integers(0, 256, (1, height, width, 3), dtype=np.uint8)
        size = tuple(28 * int(n) for n in rng.integers(1, 12, 2))
        digest.update(resize_bilinear(frames[0], size))
        digest.update(preview_video.resize_frames(frames, (size,)))
    return digest.hexdigest()


def test_it_is_the_same_every_time():
    assert pixel_fingerprint() == pixel_fingerprint()


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_it_differs_where_torch_uses_kernels_that_give_other_bytes(capability):
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    text = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, check=True, capture_output=True, text=True).stdout
    fingerprint, digest = text.split()
    assert (fingerprint == pixel_fingerprint()) == (digest == pixels_of_many_sizes())
    if capability == "default" and torch.backends.cpu.get_cpu_capability() != "DEFAULT":
        assert fingerprint != pixel_fingerprint(), "the case that it is for"
