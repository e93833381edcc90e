"""Clips: a few shots, each a shape that stands or moves on a plain background, encoded as H.264 with PyAV."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import av
from PIL import Image

from .pictures import RGB, Item, Scene, draw


@dataclass(frozen=True, slots=True)
class Shot:
    """From the end of the shot before it until frame `end`, the first frame outside. Velocity is in pixels per second."""

    end: int
    background: RGB
    items: tuple[Item, ...]
    velocity: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Clip:
    """A whole clip of `shots[-1].end` frames at a constant rate. `gop_frames` is the distance of key frames."""

    width: int
    height: int
    frames_per_s: int
    gop_frames: int
    shots: tuple[Shot, ...]

    @property
    def num_frames(self) -> int:
        return self.shots[-1].end


def scenes(clip: Clip) -> Iterator[Scene]:
    """The clip frame by frame."""
    start = 0
    for shot in clip.shots:
        for frame in range(start, shot.end):
            elapsed_s = (frame - start) / clip.frames_per_s
            dx, dy = (round(velocity * elapsed_s) for velocity in shot.velocity)
            yield Scene(clip.width, clip.height, shot.background, tuple(_moved(item, dx, dy) for item in shot.items))
        start = shot.end


def encode(clip: Clip, path: Path) -> None:
    """Write the clip as MP4: H.264, 4:2:0, B-frames. The bytes depend on the clip alone: one thread, and no macroblock tree, whose
    rate decisions differ from call to call."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=clip.frames_per_s)
        stream.width, stream.height, stream.pix_fmt = clip.width, clip.height, "yuv420p"
        stream.options = {"preset": "veryfast", "crf": "20", "mbtree": "0", "bf": "2", "g": str(clip.gop_frames), "threads": "1"}
        last_scene, image = None, None
        for scene in scenes(clip):
            if scene != last_scene:
                last_scene, image = scene, draw(scene, oversampling=1)
            for packet in stream.encode(av.VideoFrame.from_image(image)):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def decode(path: Path, num_frames: int) -> list[Image.Image]:
    """`num_frames` frames, evenly spread from the first to the last."""
    with av.open(str(path)) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
    last = len(frames) - 1
    return [frames[round(i * last / max(num_frames - 1, 1))] for i in range(num_frames)]


def _moved(item: Item, dx: int, dy: int) -> Item:
    x1, y1, x2, y2 = item.box
    return replace(item, box=(x1 + dx, y1 + dy, x2 + dx, y2 + dy))
