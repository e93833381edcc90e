"""Made-up data sets as real files, for the benchmarks that load: texts, photographs as JPEG, clips as H.264, in indexed shards."""

import json
from io import BytesIO
from pathlib import Path
from typing import Literal

import av
import cv2
import numpy as np

from data_tools.demo.tokenizer import COMMON_WORDS, write_tokenizer
from megatron_keye.config.load import load_config
from megatron_keye.config.schema import RunConfig
from megatron_keye.data.indexing import index_folder, save_index
from megatron_keye.data.writing import plan_shards, write_shards

Kind = Literal["text", "image", "video", "mixed"]
VARIANT = "keye_vl_1_5"
SHARD_BYTES = 8 << 20
JPEG_QUALITY = 90
NUM_CLIPS = 12
CLIP_S, CLIP_HEIGHT, CLIP_WIDTH, FRAME_RATE = 4, 360, 640, 30
WORDS_BESIDE_MEDIA = 60
MEDIAN_WORDS = 350
"""Of a text sample; lengths are log-normal."""
MIX = ("text", "image", "text", "image", "video")


def kept_set(sets: Path, kind: Kind, num_samples: int) -> Path:
    """The folder of a set below `sets`, which is written where it is not there yet."""
    folder = sets / kind
    if not folder.exists():
        folder.mkdir(parents=True)
        make_set(folder, kind, num_samples)
    return folder


def make_set(folder: Path, kind: Kind, num_samples: int, seed: int = 0) -> None:
    """Write `folder`/shards with an index, and `folder`/tokenizer."""
    write_tokenizer(folder / "tokenizer")
    (folder / "media").mkdir()
    rng = np.random.default_rng(seed)
    if kind in ("video", "mixed"):
        for number in range(NUM_CLIPS):
            (folder / "media" / f"{number}.mp4").write_bytes(_clip(rng))
    with open(folder / "input.jsonl", "w", encoding="utf-8") as file:
        for number in range(num_samples):
            own = MIX[number % len(MIX)] if kind == "mixed" else kind
            file.write(json.dumps(_record(folder, own, number, rng)) + "\n")
    source = folder / "input.jsonl"
    write_shards(source, folder / "shards", plan_shards(source, SHARD_BYTES))
    video = config_for(folder).data.video
    save_index(
        folder / "shards", folder / "tokenizer", VARIANT, video, index_folder(folder / "shards", folder / "tokenizer", VARIANT, video)
    )


def config_for(folder: Path, *overrides: str) -> RunConfig:
    """The debug model on the set in `folder`, in rows of 8,192 tokens, with images of up to 1,024 tokens and clips of up to 4,096."""
    data = (f"data.train={folder / 'shards'}", f"data.tokenizer={folder / 'tokenizer'}", "data.valid=null")
    sizes = ("data.seq_length_tokens=8192", "data.image.max_tokens=1024", "data.video.max_frame_tokens=256", "data.video.total_tokens=4096")
    return load_config("debug", (*data, *sizes, "data.global_batch_samples=32", *overrides))


def _record(folder: Path, kind: Kind, number: int, rng: np.random.Generator) -> dict:
    question = [{"type": "text", "text": _words(rng, WORDS_BESIDE_MEDIA)}]
    if kind == "text":
        length = int(np.clip(rng.lognormal(np.log(MEDIAN_WORDS), 0.8), 20, 4000))
        question = [{"type": "text", "text": _words(rng, length)}]
    elif kind == "image":
        path = f"media/{number}.jpg"
        (folder / path).write_bytes(photograph(rng))
        question.insert(0, {"type": "image", "image": path})
    else:
        question.insert(0, {"type": "video", "video": f"media/{number % NUM_CLIPS}.mp4"})
    answer = {"role": "assistant", "content": _words(rng, WORDS_BESIDE_MEDIA)}
    return {"id": f"{kind}-{number}", "source": kind, "messages": [{"role": "user", "content": question}, answer]}


def _words(rng: np.random.Generator, count: int) -> str:
    return " ".join(rng.choice(COMMON_WORDS.split(), count))


def photograph(rng: np.random.Generator) -> bytes:
    """Smooth noise with grain, of 640 by 480 or 480 by 640 pixels up to twice that, as a JPEG."""
    width, height = (np.array(rng.permutation([480, 640])) * rng.uniform(1, 2)).astype(int).tolist()
    coarse = rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    grain = rng.integers(0, 10, (height, width, 1), dtype=np.uint8)
    picture = cv2.add(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC), grain.repeat(3, axis=2))
    return BytesIO(cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1]).getvalue()


def _clip(rng: np.random.Generator) -> bytes:
    """H.264 of smooth noise that pans, with grain."""
    noise = rng.integers(0, 256, (CLIP_HEIGHT // 4, CLIP_WIDTH // 2, 3), dtype=np.uint8)
    canvas = cv2.resize(noise, (2 * CLIP_WIDTH, CLIP_HEIGHT), interpolation=cv2.INTER_CUBIC)
    stream = BytesIO()
    with av.open(stream, "w", format="mp4") as container:
        track = container.add_stream("h264", rate=FRAME_RATE, options={"preset": "veryfast", "crf": "26"})
        track.width, track.height, track.pix_fmt = CLIP_WIDTH, CLIP_HEIGHT, "yuv420p"
        for number in range(CLIP_S * FRAME_RATE):
            left = 2 * number % CLIP_WIDTH
            grain = rng.integers(0, 12, (CLIP_HEIGHT, CLIP_WIDTH, 1), dtype=np.uint8)
            frame = cv2.add(np.ascontiguousarray(canvas[:, left : left + CLIP_WIDTH]), grain.repeat(3, axis=2))
            container.mux(track.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(track.encode())
    return stream.getvalue()
