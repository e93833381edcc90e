"""A small set of every kind of record, with pictures of many sizes and real clips, written as JSONL beside its media."""

import base64
import io
import json
import random
from pathlib import Path

import av
import numpy as np
from PIL import Image

WORDS = "red blue square circle how many three first then 12 7.5 the of\n".split(" ")


def png(height: int, width: int, seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels.repeat(8, 0).repeat(8, 1)[:height, :width]).save(stream, "PNG")
    return stream.getvalue()


def mp4(num_frames: int, height: int, width: int, fps: int, cut: int) -> bytes:
    """A clip that loses its colours at frame `cut`, which makes that frame slow."""
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as container:
        track = container.add_stream("h264", rate=fps)
        track.width, track.height, track.pix_fmt = width, height, "yuv420p"
        for number in range(num_frames):
            frame = np.zeros((height, width, 3), np.uint8)
            frame[:, : width // 2] = (200, 30, 30) if number < cut else (240, 240, 240)
            frame[:, width // 2 :] = (20, 200, 40) if number < cut else (200, 200, 200)
            container.mux(track.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(track.encode())
    return stream.getvalue()


def write_corpus(folder: Path, num_records: int, seed: int = 0) -> Path:
    """Write `num_records` records and their media to `folder`; the JSONL file."""
    rng = random.Random(seed)
    media = folder / "media"
    media.mkdir(parents=True)
    for number in range(8):
        (media / f"{number}.png").write_bytes(png(rng.randint(10, 500), rng.randint(10, 500), number))
    for number, (num_frames, fps) in enumerate([(3, 30), (20, 10), (36, 8)]):
        (media / f"{number}.mp4").write_bytes(mp4(num_frames, 112 + 28 * number, 168, fps, cut=num_frames // 2))
    path = folder / "input.jsonl"
    records = [_record(rng, number) for number in range(num_records)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def _record(rng: random.Random, number: int) -> dict:
    head = {"id": f"r{number}"} | rng.choice([{}, {"task": "read", "source": "a"}, {"task": "count", "source": f"s{number}"}])
    if rng.random() < 0.3:
        return head | {"document": _parts(rng)}
    messages = []
    for _ in range(rng.randint(1, 2)):
        messages += [{"role": "user", "content": _parts(rng)}, {"role": "assistant", "content": _text(rng)}]
    return head | {"answer": "3", "messages": messages}


def _parts(rng: random.Random) -> list[dict]:
    parts = [{"type": "text", "text": _text(rng)}]
    for _ in range(rng.choice([0, 0, 1, 1, 2])):
        parts.insert(rng.randint(0, len(parts)), rng.choice([_picture, _picture, _clip])(rng))
    return parts


def _picture(rng: random.Random) -> dict:
    choice = rng.random()
    if choice < 0.15:
        data = base64.b64encode(png(40, 60, 99)).decode()
        return {"type": "image", "image": f"data:image/png;base64,{data}"}
    wish = {"max_pixels": 40_000} if choice < 0.3 else {"resized_height": 120, "resized_width": 90} if choice < 0.45 else {}
    return {"type": "image", "image": f"media/{rng.randrange(8)}.png", **wish}


def _clip(rng: random.Random) -> dict:
    return {"type": "video", "video": f"media/{rng.randrange(3)}.mp4", **({"fps": 1.0} if rng.random() < 0.3 else {})}


def _text(rng: random.Random) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.choice([1, 4, 30, 120])))
