import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_keye.data.media.patches import patchify


def test_a_linear_over_patches_is_the_patch_convolution():
    frames = np.random.default_rng(0).integers(0, 256, (2, 56, 84, 3), dtype=np.uint8)
    weight = torch.randn(8, 3, 14, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = F.conv2d(torch.from_numpy(frames).permute(0, 3, 1, 2).double(), weight, stride=14).permute(0, 2, 3, 1).reshape(-1, 8)
    patches = patchify(frames)
    assert patches.dtype == np.uint8
    assert patches.shape == (2 * 4 * 6, 588)
    assert patches.flags.c_contiguous
    difference = (torch.from_numpy(patches).double() @ weight.reshape(8, -1).T - expected).abs().max() / expected.abs().max()
    assert difference < 1e-12
    print(f"parity patchify max_diff={difference:.1e}")


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (np.zeros((1, 28, 42, 3), np.uint8), "expected multiples of 28"),
        (np.zeros((28, 28, 3), np.uint8), r"expected uint8 \[t, H, W, 3\]"),
        (np.zeros((1, 28, 28, 3), np.float32), r"expected uint8 \[t, H, W, 3\]"),
    ],
)
def test_other_shapes_are_refused(frames, message):
    with pytest.raises(ValueError, match=message):
        patchify(frames)
