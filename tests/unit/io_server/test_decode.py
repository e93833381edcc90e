"""The real program of workers: what it loads, how it is limited, and that it ends where packages changed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_keye.data.media.decoder import PYAV, decoder_id
from megatron_keye.io_server.decode import decode
from megatron_keye.io_server.pool import worker_command
from megatron_keye.plan.compiled import has_numba
from tests.unit.data.corpus import mp4, png
from tests.unit.io_server.serving import MIB, error_of, job_for, post, real_server

WITH_NUMBA = pytest.mark.skipif(not has_numba(), reason="without numba torch resizes frames")
IN_A_PROCESS = """
import sys
from pathlib import Path
from megatron_keye.data.media.decoder import PYAV
from megatron_keye.io_server.decode import decode
from megatron_keye.io_server.protocol import parse_job
for text in sys.argv[1:]:
    job = parse_job(text.encode())
    assert sum(len(patches) for patches in decode(PYAV, job, Path(job.path).read_bytes())) == sum(job.segments)
print("torch" in sys.modules)
"""
CLIP, PICTURE = dict(height=240, width=320, frames=(0, 5, 9)), dict(height=400, width=300)
SLOW_FAST = dict(sizes=((252, 336), (140, 168)), fast=(False, True, False), **CLIP)


@pytest.fixture
def media(tmp_path):
    """Paths of a clip and a picture."""
    (clip := tmp_path / "clip.mp4").write_bytes(mp4(10, 240, 320, fps=5, cut=6))
    (picture := tmp_path / "picture.png").write_bytes(png(400, 300, seed=1))
    return clip, picture


@WITH_NUMBA
def test_keye_vl_1_5_is_decoded_without_torch(media):
    clip, picture = media
    jobs = job_for(clip, **SLOW_FAST), job_for(picture, sizes=((392, 308),), **PICTURE)
    command = [sys.executable, "-c", IN_A_PROCESS, *(job.model_dump_json() for job in jobs)]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() == "False"


def check(server, job):
    """The answer has the bytes that are made here."""
    status, _, body = post(server.url, job)
    assert status == 200, body
    assert body == b"".join(patches.tobytes() for patches in decode(PYAV, job, Path(job.path).read_bytes()))


def has_loaded_torch(pid: int) -> bool:
    return "libtorch" in Path(f"/proc/{pid}/maps").read_text()


@WITH_NUMBA
def test_previews_clips_load_torch_which_does_not_count_against_the_limit(media, tmp_path):
    clip, picture = media
    server = real_server(tmp_path, worker_bytes=256 * MIB, decode_s=60.0)  # torch alone would take more
    own = server.front._decoder_id
    (pid,) = server.pool.pids
    without_torch = [
        job_for(clip, decoder_id=own, **SLOW_FAST),
        job_for(picture, decoder_id=own, sizes=((392, 308),), **PICTURE),
        job_for(picture, decoder_id=own, variant="keye_vl_preview", sizes=((504, 392), (392, 308)), **PICTURE),
    ]
    for job in without_torch:
        check(server, job)
    assert not has_loaded_torch(pid)
    check(server, job_for(clip, decoder_id=own, variant="keye_vl_preview", sizes=((252, 336), (224, 308)), **CLIP))
    assert has_loaded_torch(pid)
    assert server.pool.pids == [pid]
    giant = job_for(clip, decoder_id=own, variant="keye_vl_preview", sizes=((8400, 8400), (28, 28)), **CLIP)
    assert error_of(post(server.url, giant)) == (422, "oom")
    server.close()


def test_a_worker_ends_where_the_server_started_with_other_packages():
    found = decoder_id(PYAV).replace("pillow-", "pillow-0")
    command = [*worker_command("pyav"), "serve", found, "0", "1", "1", "", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 65
    said = json.loads(done.stderr)["message"]
    assert "packages changed" in said
    assert found in said
    assert "restart it" in said
