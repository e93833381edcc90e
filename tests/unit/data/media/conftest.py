"""Clips whose frames carry their own number, and keye-vl-utils 1.5.2 as oracle. Helpers are fixtures that return functions."""

import importlib
import sys
from collections.abc import Callable
from io import BytesIO
from types import ModuleType, SimpleNamespace

import av
import numpy as np
import pytest

BITS = 8
HEIGHT, WIDTH = 96, 160


def _numbered_frame(number: int) -> np.ndarray:
    """uint8 [H, W, 3]: the bits of `number` as bright and dark blocks, their complement below, and a moving ramp."""
    bits = np.array([(number >> k) & 1 for k in range(BITS)])
    code = np.kron(np.stack([bits, 1 - bits]), np.ones((HEIGHT // 4, WIDTH // BITS)))
    ramp = (np.arange(WIDTH)[None, :] + 3 * number) % 200 + np.zeros((HEIGHT // 2, 1))
    luma = np.concatenate([40 + 170 * code, 30 + ramp]).astype(np.uint8)
    return np.stack([luma, luma, 255 - luma], axis=-1)


def _frame_number(frame: np.ndarray) -> int:
    means = frame[: HEIGHT // 2, :, 0].reshape(2, HEIGHT // 4, BITS, WIDTH // BITS).mean(axis=(1, 3))
    bits = means[0] > 125
    assert np.array_equal(bits, ~(means[1] > 125)), f"unreadable frame number: block means {means.round()}"
    return sum(int(bit) << k for k, bit in enumerate(bits))


def _encode_clip(
    num_frames: int = 48,
    container: str = "mp4",
    codec: str = "libx264",
    rate: int = 30,
    rotation: int = 0,
    pix_fmt: str = "yuv420p",
    pts: list[int] | None = None,
    **options: str,
) -> bytes:
    file = BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pix_fmt
        if rotation:
            stream.set_display_rotation(rotation)
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(_numbered_frame(number), format="rgb24")
            frame.pts = number if pts is None else pts[number]
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


@pytest.fixture(scope="session")
def frame_number() -> Callable[[np.ndarray], int]:
    """The number drawn into a frame of `encode_clip`, whatever codec it went through."""
    return _frame_number


@pytest.fixture(scope="session")
def encode_clip() -> Callable[..., bytes]:
    """Encodes numbered frames; `pts` in 1/rate s replaces the regular ones, `options` go to the encoder."""
    return _encode_clip


@pytest.fixture(scope="session")
def h264_clip() -> bytes:
    """48 frames, B-frames between all others, key frames every 12."""
    return _encode_clip(g="12", bf="3", b_strategy="0")


@pytest.fixture(scope="session")
def oracle() -> ModuleType:
    """`keye_vl_utils.vision_process` 1.5.2, imported with empty stand-ins for the packages it only uses elsewhere."""
    stand_ins = {name: ModuleType(name) for name in ("requests", "torchvision", "torchvision.io", "torchvision.transforms")}
    stand_ins["torchvision"].io = stand_ins["torchvision.io"]
    stand_ins["torchvision"].transforms = stand_ins["torchvision.transforms"]
    stand_ins["torchvision.transforms"].InterpolationMode = None
    with pytest.MonkeyPatch.context() as patch:
        for name, module in stand_ins.items():
            patch.setitem(sys.modules, name, module)
        return importlib.import_module("keye_vl_utils.vision_process")


@pytest.fixture(scope="session")
def fetch_video(oracle: ModuleType) -> Callable:
    """The oracle's route for a video file, its decoder replaced: (frames uint8 [N, H, W, 3], fps, **message part)."""

    def fetch(frames: np.ndarray, fps: float, **part):
        decord = ModuleType("decord")
        decord.VideoReader = lambda _: _FrameReader(frames, fps)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "decord", decord)
            return oracle.fetch_video({"video": "clip.mp4", **part})

    return fetch


class _FrameReader:
    """What keye-vl-utils uses of decord.VideoReader, over frames in memory."""

    def __init__(self, frames: np.ndarray, fps: float):
        self._frames, self._fps = frames, fps

    def __len__(self) -> int:
        return len(self._frames)

    def get_avg_fps(self) -> float:
        return self._fps

    def get_batch(self, indices: list[int]) -> SimpleNamespace:
        return SimpleNamespace(asnumpy=lambda: self._frames[indices])
