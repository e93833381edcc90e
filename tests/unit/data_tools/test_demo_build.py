"""The demo folder: files as described, the same bytes again, complete or absent."""

import json

import av
import pytest
from av.video.frame import PictureType
from PIL import Image

from data_tools.demo import build as build_module
from data_tools.demo.build import STAMP, build, write_sources
from data_tools.demo.preview import write_contact_sheet
from megatron_keye.errors import DataError, SettingsError

NUMBERS = {"train": 60, "valid": 30}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "set"
    write_sources(folder, NUMBERS, seed=5, workers=1)
    return folder


def records_of(folder, split):
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_same_bytes_with_other_workers(sources, tmp_path):
    write_sources(tmp_path / "again", NUMBERS, seed=5, workers=2)
    again, first = files_of(tmp_path / "again"), files_of(sources)
    assert again.keys() == first.keys()
    assert [path for path in first if again[path] != first[path]] == []


@pytest.mark.parametrize("split", NUMBERS)
def test_records_are_complete(sources, split):
    records = records_of(sources, split)
    assert len(records) == NUMBERS[split] == len({record["id"] for record in records})
    tasks = json.loads((sources / "tasks.json").read_text())
    for record in records:
        assert record["task"] in tasks
        if "document" in record:
            assert "answer" not in record and tasks[record["task"]]["chance"] is None
        else:
            assert record["messages"][-1] == {"role": "assistant", "content": record["answer"]}
            assert 0 <= tasks[record["task"]]["chance"] <= 0.5


def test_media_open_at_the_size_they_were_made(sources):
    for record in records_of(sources, "train"):
        for part in record.get("document") or record["messages"][0]["content"]:
            if part["type"] == "image":
                image = Image.open(sources / part["image"])
                assert image.format == "JPEG" and 84 <= min(image.size) <= max(image.size) <= 336


def test_clips_are_h264_with_b_frames(sources):
    paths = sorted(sources.glob("media/*/order-*.mp4"))
    with_b_frames = 0
    for path in paths:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
            frames = list(container.decode(stream))
            assert 2.0 <= len(frames) / float(stream.average_rate) <= 2.5
            with_b_frames += any(frame.pict_type == PictureType.B for frame in frames)
    assert with_b_frames > len(paths) / 2


def test_contact_sheet_shows_every_task(sources, tmp_path):
    write_contact_sheet(sources / "valid.jsonl", tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").height > 0


class TestBuild:
    """`build` with shard writing replaced by one file, which leaves what it promises about folders."""

    @pytest.fixture(autouse=True)
    def shards(self, monkeypatch):
        monkeypatch.setattr(build_module, "write_shards", lambda folder, splits, workers: (folder / "shards").touch())

    def test_a_finished_set_is_left_alone(self, tmp_path):
        assert build(tmp_path / "demo", {"train": 4, "valid": 2}, seed=0, workers=1)
        (tmp_path / "demo" / "mine").write_text("kept")
        assert not build(tmp_path / "demo", {"train": 4, "valid": 2}, seed=0, workers=2)
        assert (tmp_path / "demo" / "mine").exists()

    def test_other_arguments_make_another_set(self, tmp_path):
        build(tmp_path / "demo", {"train": 4, "valid": 2}, seed=0, workers=1)
        assert build(tmp_path / "demo", {"train": 5, "valid": 2}, seed=0, workers=1)
        assert len(records_of(tmp_path / "demo", "train")) == 5

    def test_an_interrupted_call_leaves_nothing_and_the_next_starts_anew(self, tmp_path, monkeypatch):
        def interrupt(folder, splits, workers):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(build_module, "write_shards", interrupt)
            with pytest.raises(KeyboardInterrupt):
                build(tmp_path / "demo", {"train": 4, "valid": 2}, seed=0, workers=1)
        assert not (tmp_path / "demo").exists()
        assert build(tmp_path / "demo", {"train": 4, "valid": 2}, seed=0, workers=1)
        assert (tmp_path / "demo" / STAMP).exists() and [path.name for path in tmp_path.iterdir()] == ["demo"]

    def test_a_foreign_folder_is_refused(self, tmp_path):
        (tmp_path / "thesis.txt").write_text("years of work")
        with pytest.raises(SettingsError, match="not empty"):
            build(tmp_path, {"train": 4, "valid": 2}, seed=0, workers=1)
        assert (tmp_path / "thesis.txt").exists()


def test_a_failing_tool_is_named(tmp_path, monkeypatch):
    (tmp_path / "make_shards.py").write_text("raise SystemExit(65)")
    monkeypatch.setattr(build_module, "TOOLS", tmp_path)
    with pytest.raises(DataError, match=r"make_shards\.py.*exit code 65"):
        build_module.write_shards(tmp_path, ("train",), workers=1)
