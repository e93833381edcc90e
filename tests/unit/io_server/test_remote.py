"""Pixels from a real server against pixels decoded here: the same bytes, or the same error, whatever happens in between."""

import random
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO
from types import SimpleNamespace

import av
import numpy as np
import pytest

from megatron_keye.config.load import load_config
from megatron_keye.config.schema import DataConfig, MediaConfig, StorageConfig
from megatron_keye.data.dataset import Dataset
from megatron_keye.data.items import iter_patches
from megatron_keye.data.media.decoder import PYAV, decoder_id
from megatron_keye.data.media.fingerprint import pixel_fingerprint
from megatron_keye.data.media.video import DECODER_ID
from megatron_keye.data.places import WebAddress
from megatron_keye.data.sources import MediaCounts, ThreadSource
from megatron_keye.data.stored import StoredMedium
from megatron_keye.errors import DataError, KeyeError, SettingsError
from megatron_keye.io_server.blobs import DiskCache
from megatron_keye.io_server.registry import write_lease
from megatron_keye.io_server.remote import RemoteSource, connect, job_of
from tests.unit.data.http_server import serving
from tests.unit.io_server.serving import error_of, post, real_server

VARIANTS = ("keye_vl_1_5", "keye_vl_preview")


def data_config(folder, **media) -> DataConfig:
    given = load_config("debug").data
    return given.model_copy(update={"train": str(folder), "seq_length_tokens": 8192, "media": MediaConfig(**media)})


def open_set(folder, tokenizer, variant, **media):
    config = data_config(folder, **media)
    return Dataset.open(folder, tokenizer, variant, config), connect(config.media, decoder_id(PYAV))


def remote_source(dataset, media):
    return RemoteSource(dataset, media, ThreadSource(dataset, threads=2))


@pytest.mark.parametrize("variant", VARIANTS)
def test_remote_pixels_are_the_local_ones(indexed, tokenizer, real, variant):
    dataset, media = open_set(indexed[variant], tokenizer, variant, servers=(real.url,))
    remote = remote_source(dataset, media)
    kinds = set()
    for sample in range(len(dataset)):
        loaded = remote.read(sample, dataset.shape(sample))
        here, there = dataset.pixels(sample), loaded.patches
        assert [patches.shape for patches in there] == [patches.shape for patches in here]
        assert all(patches.dtype == np.uint8 for patches in there)
        assert all(np.array_equal(a, b) for a, b in zip(here, there, strict=True))
        kinds |= {layout.kind for layout in dataset.layouts(sample)}
        assert remote.sample_id(sample) == dataset.sample_id(sample)
        assert np.array_equal(loaded.tokens.token_ids, dataset.tokens(sample).token_ids)
    assert kinds == {"image", "video"}
    assert media.client.counts.values.keys() == {"remote"}
    assert remote.counts().samples == len(dataset)
    num_media = sum(len(dataset.stored_media(sample)) for sample in range(len(dataset)))
    assert remote.counts().media == MediaCounts(remote=num_media)
    assert "remote" in media.summary()


def test_a_set_at_a_url_is_read_by_the_servers(indexed, tokenizer, tmp_path):
    with serving(indexed[VARIANTS[0]]) as (url, _):
        server = real_server(tmp_path, roots=(url,), disk=DiskCache(tmp_path / "disk", 1 << 30), decode_s=60.0)
        storage = StorageConfig(cache=str(tmp_path / "index"))
        config = data_config(url, servers=(server.url,)).model_copy(update={"storage": storage})
        dataset, media = Dataset.open(url, tokenizer, VARIANTS[0], config), connect(config.media, decoder_id(PYAV))
        remote = remote_source(dataset, media)
        for sample in range(len(dataset)):
            there = remote.read(sample, dataset.shape(sample)).patches
            assert all(np.array_equal(a, b) for a, b in zip(dataset.pixels(sample), there, strict=True))
        assert media.client.counts.values.keys() == {"remote"}
        assert any((tmp_path / "disk").rglob("??/*"))
        server.close()


@pytest.mark.parametrize("variant", VARIANTS)
def test_segments_of_a_job_are_those_of_the_plan(indexed, tokenizer, variant):
    dataset, _ = open_set(indexed[variant], tokenizer, variant)
    for sample in range(len(dataset)):
        jobs = [job_of(medium, "id") for medium in dataset.stored_media(sample)]
        grids = [segment.grid.num_patches for segment in dataset.shape(sample).segments]
        assert [count for job in jobs for count in job.segments] == grids


def test_without_servers_in_the_settings_there_is_no_client(tmp_path):
    assert connect(data_config(tmp_path).media, decoder_id(PYAV)) is None


def test_all_servers_gone_means_local_pixels(indexed, tokenizer):
    dataset, media = open_set(indexed[VARIANTS[0]], tokenizer, VARIANTS[0], servers=("http://127.0.0.1:9",))
    remote = remote_source(dataset, media)
    sample = next(s for s in range(len(dataset)) if dataset.layouts(s))
    there = remote.read(sample, dataset.shape(sample)).patches
    assert all(np.array_equal(a, b) for a, b in zip(dataset.pixels(sample), there, strict=True))
    assert media.client.counts.values["local"] == len(dataset.layouts(sample))
    assert remote.counts().media == MediaCounts(local=len(dataset.layouts(sample)), failed=1)
    assert "Connection refused" in media.summary()


def test_servers_that_decode_otherwise_are_named(indexed, tokenizer, tmp_path):
    write_lease(tmp_path, "http://old:7300", "another decoder", 4)
    dataset, media = open_set(indexed[VARIANTS[0]], tokenizer, VARIANTS[0], registry=str(tmp_path))
    sample = next(s for s in range(len(dataset)) if dataset.layouts(s))
    remote = remote_source(dataset, media)
    remote.read(sample, dataset.shape(sample))
    assert remote.counts().media == MediaCounts(local=len(dataset.layouts(sample)))
    assert f"not asked, as they decode otherwise than {media.decoder_id}: http://old:7300" in media.summary()


def test_media_at_web_addresses_are_read_here_and_no_server_is_asked(indexed, tokenizer):
    dataset, media = open_set(indexed[VARIANTS[0]], tokenizer, VARIANTS[0], servers=("http://127.0.0.1:9",))
    sample = next(s for s in range(len(dataset)) if dataset.layouts(s))
    stored = [replace(medium, place=WebAddress(None, "")) for medium in dataset.stored_media(sample)]
    local = SimpleNamespace(read=lambda sample, shape: "from here")
    asked = SimpleNamespace(stored_media=lambda sample: stored, sample_id=dataset.sample_id)
    assert RemoteSource(asked, media, local).read(sample, dataset.shape(sample)) == "from here"
    assert media.client.counts.values == {"local": len(stored)}


def test_images_alone_may_be_decoded_here(indexed, tokenizer, real):
    dataset, media = open_set(indexed[VARIANTS[0]], tokenizer, VARIANTS[0], servers=(real.url,), served="videos")
    remote, counts = remote_source(dataset, media), {True: 0, False: 0}
    for sample in range(len(dataset)):
        there = remote.read(sample, dataset.shape(sample)).patches
        assert all(np.array_equal(a, b) for a, b in zip(dataset.pixels(sample), there, strict=True))
        kinds = [layout.kind for layout in dataset.layouts(sample)]
        counts["video" in kinds] += len(kinds)
    assert remote.counts().media == MediaCounts(remote=counts[True], local=counts[False])
    assert min(counts.values()) > 0


def test_a_closed_source_waits_for_no_server_and_decodes_nothing(indexed, tokenizer):
    with socket.create_server(("127.0.0.1", 0)) as hung:
        url = f"http://127.0.0.1:{hung.getsockname()[1]}"
        dataset, media = open_set(indexed[VARIANTS[0]], tokenizer, VARIANTS[0], servers=(url,), deadline_s=60.0, hedge_after_s=60.0)
        sample = next(s for s in range(len(dataset)) if dataset.layouts(s))
        remote, other = remote_source(dataset, media), remote_source(dataset, media)
        with ThreadPoolExecutor(2) as threads:
            reading = [threads.submit(source.read, sample, dataset.shape(sample)) for source in (remote, other)]
            connections = [hung.accept()[0] for _ in reading]  # an answer never comes
            remote.close()
            with pytest.raises(KeyeError, match="was closed"):
                reading[0].result(5)
            assert not reading[1].done()
            other.close()
            with pytest.raises(KeyeError, match="was closed"):
                reading[1].result(5)
        for connection in connections:
            connection.close()


def damaged_copy(folder, tmp_path):
    """The set with one byte changed in the middle of every medium's bytes."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.rglob("*"):
        if path.is_file():
            (copy / path.relative_to(folder)).parent.mkdir(exist_ok=True)
            (copy / path.relative_to(folder)).write_bytes(path.read_bytes())
    return copy


def test_a_damaged_medium_gives_the_same_error_as_here(indexed, tokenizer, real, tmp_path):
    variant = VARIANTS[0]
    folder = damaged_copy(indexed[variant], tmp_path)
    dataset, media = open_set(folder, tokenizer, variant, servers=(real.url,))
    sample = next(s for s in range(len(dataset)) if dataset.layouts(s))
    medium = dataset.stored_media(sample)[0]
    with open(medium.place.store.address(medium.place.shard), "r+b") as file:
        file.seek(medium.place.span.offset + medium.place.span.num_bytes // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 255]))
    with pytest.raises(DataError) as here:
        dataset.pixels(sample)
    with pytest.raises(DataError) as there:
        remote_source(dataset, media).read(sample, dataset.shape(sample))
    assert str(there.value) == str(here.value)
    assert media.client.counts.values["confirmed_here"] == 1


PLAYLISTS = {
    "ffconcat": "ffconcat version 1.0\nfile {other}\n",
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{other}\n#EXT-X-ENDLIST\n",
    "html": "<html><body>not found</body></html>",
    "nothing of the kind": "\0\0\0\x18ftypmp42" + "x" * 100,
}


@pytest.mark.parametrize("text", PLAYLISTS.values(), ids=PLAYLISTS)
def test_a_text_named_mp4_opens_no_other_file(indexed, tokenizer, real, tmp_path, text):
    variant = VARIANTS[0]
    dataset, _ = open_set(indexed[variant], tokenizer, variant)
    media = (m for s in range(len(dataset)) for m in dataset.stored_media(s) if m.item.frames is not None)
    job = job_of(next(media), real.front._decoder_id)
    with open(job.path, "rb") as file:
        file.seek(job.offset)
        (tmp_path / "other.mp4").write_bytes(file.read(job.num_bytes))
    whole = job.model_copy(update=dict(path=str(tmp_path / "other.mp4"), offset=0))
    assert post(real.url, whole)[0] == 200
    (disguised := tmp_path / "clip.mp4").write_text(text.format(other="other.mp4"))
    changes = dict(path=str(disguised), offset=0, num_bytes=disguised.stat().st_size, sha256=None)
    assert error_of(post(real.url, job.model_copy(update=changes))) == (422, "corrupt")


def sound_alone() -> bytes:
    file = BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44100, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 2048), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


@pytest.mark.parametrize("blob", [b"", sound_alone()], ids=["nothing", "sound alone"])
def test_a_file_without_pictures_is_corrupt(indexed, tokenizer, real, tmp_path, blob):
    dataset, _ = open_set(indexed[VARIANTS[0]], tokenizer, VARIANTS[0])
    media = (m for s in range(len(dataset)) for m in dataset.stored_media(s) if m.item.frames is not None)
    (path := tmp_path / "clip.mp4").write_bytes(blob)
    changes = dict(path=str(path), offset=0, num_bytes=max(len(blob), 1), sha256=None)
    assert error_of(post(real.url, job_of(next(media), real.front._decoder_id).model_copy(update=changes))) == (422, "corrupt")


def damaged(blob: bytes, seed: int) -> bytes:
    """Cut off, bits flipped, or a stretch blanked."""
    rng = random.Random(seed)
    if seed % 3 == 0:
        return blob[: rng.randrange(1, len(blob))]
    changed = bytearray(blob)
    if seed % 3 == 1:
        for _ in range(rng.randint(1, 8)):
            changed[rng.randrange(len(blob))] ^= 1 << rng.randrange(8)
    else:
        at = rng.randrange(len(blob))
        changed[at : at + 200] = bytes(len(changed[at : at + 200]))
    return bytes(changed)


def outcome_here(medium: StoredMedium, blob: bytes) -> bytes | None:
    try:
        return b"".join(p.tobytes() for p in iter_patches(medium.item, medium.resolved.sizes, blob, medium.variant, PYAV))
    except DataError:
        return None


def test_hundreds_of_damaged_files_end_there_as_they_end_here(indexed, tokenizer, real, tmp_path):
    dataset, _ = open_set(indexed[VARIANTS[0]], tokenizer, VARIANTS[0])
    media = [medium for sample in range(len(dataset)) for medium in dataset.stored_media(sample)]
    kinds = [next(m for m in media if m.item.frames is None), *[m for m in media if m.item.frames is not None][:2]]
    path, started = tmp_path / "damaged", real.pool.counts["started"]
    refused = 0
    for seed in range(300):
        medium = kinds[seed % 2 + (seed % 4 == 3)]
        blob = damaged(medium.place.read(medium.media, medium.where), seed)
        path.write_bytes(blob)
        changes = dict(path=str(path), offset=0, num_bytes=len(blob), sha256=None)
        answer = post(real.url, job_of(medium, real.front._decoder_id).model_copy(update=changes))
        here = outcome_here(medium, blob)
        if here is None:
            assert error_of(answer) == (422, "corrupt"), seed
            refused += 1
        else:
            assert answer[0] == 200, seed
            assert answer[2] == here, seed
    assert refused > 100
    assert real.pool.counts["started"] == started


def test_a_header_that_promises_a_giant_picture_is_refused(indexed, tokenizer, real, tmp_path):
    dataset, _ = open_set(indexed[VARIANTS[0]], tokenizer, VARIANTS[0])
    job = job_of(next(m for s in range(len(dataset)) for m in dataset.stored_media(s) if m.item.frames is None), real.front._decoder_id)
    header = b"P6 60000 60000 255\n"
    (path := tmp_path / "bomb.ppm").write_bytes(header + bytes(1000))
    changes = dict(path=str(path), offset=0, num_bytes=path.stat().st_size, sha256=None, height=60000, width=60000)
    assert error_of(post(real.url, job.model_copy(update=changes)))[0] == 422


def test_the_decoder_id_names_the_decoder_what_resizes_and_what_comes_out(real):
    own = decoder_id(PYAV)
    assert own.startswith(DECODER_ID)
    assert {"pillow", "torch", pixel_fingerprint()} < set(own.split("-"))
    assert "+" not in own
    assert real.front._decoder_id == own


def test_settings_that_make_no_client_are_named(tmp_path):
    for strange in ("node1:7300", "http://node1:73000"):
        with pytest.raises(SettingsError, match=f"has {strange}: expected http://HOST:PORT"):
            connect(data_config(tmp_path, servers=(strange,)).media, decoder_id(PYAV))
    with pytest.raises(SettingsError, match="cannot read the secret file"):
        connect(data_config(tmp_path, servers=("http://node1:7300",), secret_file=str(tmp_path / "none")).media, decoder_id(PYAV))
