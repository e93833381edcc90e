"""A data set end to end: what the index promises is what tokens and pixels are, and what happens when files are not as promised."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from megatron_keye.config.schema import DataConfig, ImageConfig, VideoConfig
from megatron_keye.data.dataset import Dataset
from megatron_keye.data.fit import Fitted, fit, row_limit_tokens
from megatron_keye.data.index import open_index
from megatron_keye.data.indexing import index_folder, save_index
from megatron_keye.data.items import media_rules
from megatron_keye.data.shards import iter_samples, list_shards
from megatron_keye.data.tokenizer import load_tokenizer
from megatron_keye.errors import DataError

VARIANTS = ("keye_vl_1_5", "keye_vl_preview")


def config(seq_length_tokens: int = 8192, **fields) -> DataConfig:
    return DataConfig(train="", tokenizer="", seq_length_tokens=seq_length_tokens, global_batch_samples=1, **fields)


def open_set(indexed, tokenizer_folder, variant: str = "keye_vl_1_5", settings: DataConfig | None = None) -> Dataset:
    folder = indexed[variant] if isinstance(indexed, dict) else indexed
    return Dataset.open(folder, load_tokenizer(tokenizer_folder, variant), variant, settings or config())


SETTINGS = {
    "roomy": config(),
    "tight": config(512, image=ImageConfig(max_tokens=100)),
    "tiny": config(130, pad_multiple_tokens=8, image=ImageConfig(min_tokens=1, max_tokens=16)),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_and_pixels_are_what_was_planned(indexed, tokenizer_folder, variant, name):
    settings = SETTINGS[name]
    dataset = open_set(indexed, tokenizer_folder, variant, settings)
    assert len(dataset) + len(dataset.rejected) == 60
    assert name != "roomy" or not dataset.rejected
    multiple = settings.pad_multiple_tokens
    for sample, shape in enumerate(dataset.shapes):
        tokenized = dataset.tokens(sample)
        assert tokenized.shape == shape
        assert len(tokenized.token_ids) == len(tokenized.supervised) == shape.num_tokens
        assert -(-shape.num_tokens // multiple) * multiple <= settings.seq_length_tokens
        assert tokenized.supervised.any()
        patches = dataset.pixels(sample)
        assert [p.shape for p in patches] == [(s.grid.num_patches, 588) for s in shape.segments]
        assert all(p.dtype == np.uint8 for p in patches)


def test_every_way_to_fit_occurs(indexed, tokenizer_folder):
    roomy, tiny = (open_set(indexed, tokenizer_folder, settings=SETTINGS[name]) for name in ("roomy", "tiny"))
    by_id = {roomy.sample_id(i): roomy.shape(i) for i in range(len(roomy))}
    pairs = [(by_id[tiny.sample_id(i)], shape) for i, shape in enumerate(tiny.shapes)]
    text = [(a.num_tokens - a.num_visual_tokens, b.num_tokens - b.num_visual_tokens) for a, b in pairs]
    assert any(b.num_visual_tokens < a.num_visual_tokens for a, b in pairs)
    assert any(cut < whole for whole, cut in text)
    assert any(a == b for a, b in pairs)
    assert tiny.rejected


@pytest.mark.parametrize("settings", [SETTINGS["tiny"], config(130, image=ImageConfig(min_tokens=40))])
def test_usable_samples_are_those_that_can_be_made_to_fit(indexed, tokenizer_folder, settings):
    # The second has images larger than when they were indexed, so that lengths in the index prove nothing.
    dataset, index = open_set(indexed, tokenizer_folder, settings=settings), open_index(indexed["keye_vl_1_5"])
    rules = media_rules(settings.image, settings.video, "keye_vl_1_5")
    limit = row_limit_tokens(settings.seq_length_tokens, settings.pad_multiple_tokens)
    fits = [isinstance(fit(index.facts(i), rules, limit), Fitted) for i in range(60)]
    assert [dataset.sample_id(i) for i in range(len(dataset))] == [f"r{i}" for i in range(60) if fits[i]]
    assert [sample_id for sample_id, _ in dataset.rejected] == [f"r{i}" for i in range(60) if not fits[i]]


def test_a_1_5_video_has_one_segment_per_frame_and_a_preview_clip_one(indexed, tokenizer_folder):
    frames, clips = (open_set(indexed, tokenizer_folder, variant) for variant in VARIANTS)
    assert all(s.grid.t == 1 for shape in frames.shapes for s in shape.segments)
    assert max(len(shape.segments) for shape in frames.shapes) > 4
    times = [s for shape in clips.shapes for s in shape.segments if s.grid.t > 1]
    assert times
    # 20 frames at 10 a second, and 36 at 8, are sampled at 2 (or, by wish, 1) a second: 4 of 2 s, 8 (4) of 4.5 s.
    assert {(s.grid.t, round(s.ticks_per_frame, 3)) for s in times} <= {(2, 0.1), (4, 1.0), (8, 1.125), (4, 2.25)}


def test_fields_of_a_record_are_carried(indexed, tokenizer_folder, corpus):
    dataset = open_set(indexed, tokenizer_folder)
    written = [json.loads(line) for line in corpus.read_text().splitlines()]
    assert [dataset.sample_id(i) for i in range(len(dataset))] == [r["id"] for r in written]
    assert [dataset.task(i) for i in range(len(dataset))] == [r.get("task") for r in written]
    assert [dataset.answer(i) for i in range(len(dataset))] == [r.get("answer") for r in written]
    assert [dataset.source(i) for i in range(len(dataset))] == [r.get("source") for r in written]


def test_supervision_follows_the_index(indexed, tokenizer_folder):
    dataset, index = open_set(indexed, tokenizer_folder), open_index(indexed["keye_vl_1_5"])
    assert [int(dataset.tokens(i).supervised.sum()) for i in range(60)] == [index.supervised_tokens(i) for i in range(60)]


def test_threads_read_the_same(indexed, tokenizer_folder):
    dataset, again = open_set(indexed, tokenizer_folder), open_set(indexed, tokenizer_folder)
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(dataset.pixels, range(30)))
    for sample, patches in enumerate(together):
        for a, b in zip(patches, again.pixels(sample), strict=True):
            np.testing.assert_array_equal(a, b)


def test_the_fingerprint_follows_what_changes_samples_and_nothing_else(indexed, tokenizer_folder):
    def fingerprint(**fields):
        return open_set(indexed, tokenizer_folder, settings=config(**fields)).fingerprint

    assert fingerprint(prefetch_steps=7, decode_threads=9) == fingerprint()
    changed = {
        fingerprint(),
        fingerprint(seq_length_tokens=4096),
        fingerprint(image=ImageConfig(max_tokens=64)),
        fingerprint(video=VideoConfig(max_frame_tokens=64)),
        open_set(indexed, tokenizer_folder, "keye_vl_preview").fingerprint,
    }
    assert len(changed) == 5


@pytest.fixture
def copy(indexed, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(indexed["keye_vl_1_5"], folder)
    return folder


def cut(path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


def edit_meta(folder, **fields) -> None:
    path = folder / "index" / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


DAMAGES = {
    "no index": (lambda f: shutil.rmtree(f / "index"), "no index at"),
    "no shard": (lambda f: list_shards(f)[1].unlink(), "shard-000001.tar is missing"),
    "short shard": (lambda f: cut(list_shards(f)[0], 5000), "has 5000 bytes, but had"),
    "other format": (lambda f: edit_meta(f, format=0), "has format 0, expected 3"),
    "meta is not JSON": (lambda f: cut(f / "index" / "index.json", 40), "the index at .* is damaged"),
    "meta lacks fields": (lambda f: (f / "index" / "index.json").write_text("{}"), "the index at .* is damaged"),
    "short table": (lambda f: cut(f / "index" / "items.npy", 500), "the index at .* is damaged"),
    "missing table": (lambda f: (f / "index" / "gaps.npy").unlink(), "the index at .* is damaged"),
    "other table": (lambda f: shutil.copy(f / "index" / "gaps.npy", f / "index" / "frames.npy"), "the index at .* is damaged"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_on_opening(copy, tokenizer_folder, name):
    damage, message = DAMAGES[name]
    damage(copy)
    with pytest.raises(DataError, match=message) as error:
        open_set(copy, tokenizer_folder)
    assert "index_shards" in str(error.value)
    assert str(copy) in str(error.value)


def test_an_index_of_other_making_is_refused(indexed, copy, tokenizer_folder, tmp_path):
    other = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_folder, other)
    (other / "tokenizer_config.json").write_text("{}")
    with pytest.raises(DataError, match="made with another tokenizer"):
        open_set(indexed, other)
    with pytest.raises(DataError, match="made with another video.min_frame_similarity"):
        open_set(indexed, tokenizer_folder, settings=config(video=VideoConfig(min_frame_similarity=0.5)))
    with pytest.raises(DataError, match="made with another variant"):
        open_set(indexed["keye_vl_preview"], tokenizer_folder)
    made = json.loads((copy / "index" / "index.json").read_text())["made"]
    for name, value in (("template", 0), ("decoder", "other")):
        edit_meta(copy, made=made | {name: value})
        with pytest.raises(DataError, match=f"made with another {name}"):
            open_set(copy, tokenizer_folder)


def test_settings_that_would_take_other_frames_are_refused_and_others_are_not(indexed, tokenizer_folder):
    with pytest.raises(DataError, match="of a video of record r"):
        open_set(indexed, tokenizer_folder, settings=config(video=VideoConfig(fps=1.0)))
    fewer_tokens = VideoConfig(min_frame_tokens=8, max_frame_tokens=64, total_tokens=512)
    assert len(open_set(indexed, tokenizer_folder, settings=config(video=fewer_tokens))) == 60


def test_a_set_of_samples_that_are_all_too_long_is_refused(indexed, tokenizer_folder):
    with pytest.raises(DataError, match="all 60 are too long"):
        open_set(indexed, tokenizer_folder, settings=config(63, pad_multiple_tokens=64))


def overwrite(folder, extension: str, old: bytes, new: bytes) -> int:
    """Replace `old` in the first member of that kind that has it; the number of its sample."""
    number = -1
    for shard in list_shards(folder):
        for _, members in iter_samples(shard):
            number += 1
            content = bytearray(shard.read_bytes())
            for name, span in members.items():
                blob = bytes(content[span.offset : span.offset + span.num_bytes])
                if name.endswith(extension) and old in blob:
                    content[span.offset : span.offset + span.num_bytes] = blob.replace(old, new, 1)
                    shard.write_bytes(content)
                    return number
    raise AssertionError(f"no {extension} member has {old!r}")


def test_a_changed_medium_is_named_when_it_is_read(copy, tokenizer_folder):
    sample = overwrite(copy, ".png", b"IDAT", b"IDAX")
    dataset = open_set(copy, tokenizer_folder)
    with pytest.raises(DataError, match="do not match their sha256") as error:
        dataset.pixels(sample)
    assert f"record r{sample}, medium" in str(error.value)


def test_a_changed_record_is_named_when_it_is_read(copy, tokenizer_folder):
    sample = overwrite(copy, "json", b"square", b"circle")
    dataset = open_set(copy, tokenizer_folder)
    with pytest.raises(DataError, match="not the one that was indexed") as error:
        dataset.tokens(sample)
    assert f"record r{sample}" in str(error.value)


def test_tokens_other_than_planned_are_refused(copy, tokenizer_folder):
    path = copy / "index" / "samples.npy"
    table = np.load(path)
    table["tail_tokens"][5] += 1
    np.save(path, table)
    dataset = open_set(copy, tokenizer_folder)
    with pytest.raises(DataError, match="where the index promised"):
        dataset.tokens(5)


def test_indexing_names_problems_and_leaves_the_rest(copy, tokenizer_folder):
    sample = overwrite(copy, ".mp4", b"moov", b"moo?")
    shards = index_folder(copy, tokenizer_folder, "keye_vl_1_5", VideoConfig())
    problems = [problem for shard in shards for problem in shard.problems]
    assert len(problems) == 1
    assert f"record r{sample}" in problems[0][1]
    save_index(copy, tokenizer_folder, "keye_vl_1_5", VideoConfig(), shards)
    assert len(open_set(copy, tokenizer_folder)) == 59
    assert open_index(copy).skipped == problems


def test_indexing_checks_the_bytes_of_media(copy, tokenizer_folder):
    sample = overwrite(copy, ".png", b"IDAT", b"IDAX")
    shards = index_folder(copy, tokenizer_folder, "keye_vl_1_5", VideoConfig())
    ((place, reason),) = [problem for shard in shards for problem in shard.problems]
    assert f"record r{sample}" in reason
    assert "do not match their sha256" in reason
    assert reason.startswith(place)


def test_an_empty_set_is_refused(tokenizer_folder, tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        index_folder(tmp_path / "nowhere", tokenizer_folder, "keye_vl_1_5", VideoConfig())
    with pytest.raises(DataError, match="no \\*.tar file"):
        index_folder(tmp_path, tokenizer_folder, "keye_vl_1_5", VideoConfig())
    with pytest.raises(DataError, match="no usable sample"):
        save_index(tmp_path, tokenizer_folder, "keye_vl_1_5", VideoConfig(), [])
