"""From JSONL to shards and index: what the webdataset library reads back, what is refused, and that workers change nothing."""

import base64
import hashlib
import json
import os
from pathlib import Path

import pytest
import webdataset

from data_tools import index_shards, inspect_data, make_shards
from megatron_keye.data.index import open_index
from megatron_keye.data.record import parse_record
from megatron_keye.data.shards import Span, iter_samples, list_shards, read_span
from megatron_keye.data.source_media import media_bytes
from megatron_keye.data.storage import DEFAULT_STORAGE
from megatron_keye.data.writing import plan_shards, run_jobs, write_shards
from megatron_keye.errors import DataError, KeyeError
from tests.unit.data.corpus import png


def write_lines(folder: Path, *records) -> Path:
    path = folder / "input.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8")
    return path


def document(record_id, *parts) -> dict:
    return {"id": record_id, "document": [{"type": "text", "text": "t"}, *parts]}


def test_webdataset_reads_back_every_record_with_its_media(corpus, tmp_path):
    plan = plan_shards(corpus, shard_bytes=40_000)
    write_shards(corpus, tmp_path / "out", plan)
    urls = [str(path) for path in list_shards(tmp_path / "out")]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    written = [(n, parse_record(json.loads(line), "x")) for n, line in enumerate(corpus.read_text().splitlines(), start=1)]
    assert len(urls) == len(plan.shards) > 2
    assert [s["__key__"] for s in samples] == [f"{n:09d}" for n, _ in written]
    for sample, (_, record) in zip(samples, written, strict=True):
        stored = parse_record(json.loads(sample["json"]), "x")
        assert [(m.role, len(m.parts)) for m in stored.messages] == [(m.role, len(m.parts)) for m in record.messages]
        for media, original in zip(stored.media, record.media, strict=True):
            assert sample[media.address] == media_bytes(original, corpus.parent, "x", DEFAULT_STORAGE)
            assert hashlib.sha256(sample[media.address]).hexdigest() == media.sha256
            assert (media.kind, media.options) == (original.kind, original.options)


def test_spans_are_the_bytes_of_the_members(indexed):
    shard = list_shards(indexed["keye_vl_1_5"])[0]
    reference = {s["__key__"]: s for s in webdataset.WebDataset(str(shard), shardshuffle=False, empty_check=False)}
    found = dict(iter_samples(shard))
    assert found.keys() == reference.keys()
    for key, members in found.items():
        for extension, span in members.items():
            assert read_span(shard, span) == reference[key][extension]


def test_shards_have_about_the_size_asked_for(tmp_path):
    source = write_lines(tmp_path, *(document(f"d{n}", {"type": "image", "image": "p.png"}) for n in range(10)))
    (tmp_path / "p.png").write_bytes(bytes(1000))
    assert [len(lines) for lines in plan_shards(source, 3000).shards] == [3, 3, 3, 1]
    assert len(plan_shards(source, 1).shards) == 10


def test_bad_records_are_listed_with_their_lines(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    picture = {"type": "image", "image": "data:image/png;base64," + base64.b64encode(png(30, 30, 0)).decode()}
    source = write_lines(
        tmp_path,
        document("good", picture),
        '{"id": "broken"',
        {"id": "bare"},
        "",
        document("lost", {"type": "image", "image": "nowhere.png"}),
        document("hollow", {"type": "image", "image": "empty.png"}),
        document("garbled", {"type": "image", "image": "data:image/png;base64,!!"}),
        document("raw", {"type": "image", "image": "data:image/png,abc"}),
        document("inside", {"type": "image", "member": "0.png"}),
        document("good", picture),
    )
    plan = plan_shards(source, 1 << 20)
    assert [line.number for lines in plan.shards for line in lines] == [1]
    findings = {2: "not JSON", 3: "only ['id']", 5: "nowhere.png", 6: "is empty", 7: "base64 is damaged", 8: "expected data:TYPE;base64"}
    findings |= {9: "not in a shard", 10: "id good again, first on line 1"}
    assert [p.place for p in plan.problems] == [f"{source}:{line}" for line in findings]
    for problem, finding in zip(plan.problems, findings.values(), strict=True):
        assert finding in problem.reason
        assert problem.place in problem.reason


def test_a_folder_with_content_is_left_alone_and_a_failure_leaves_nothing(tmp_path):
    source = write_lines(tmp_path, document("a", {"type": "image", "image": "p.png"}))
    (tmp_path / "p.png").write_bytes(b"x")
    plan = plan_shards(source, 100)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(DataError, match="is not an empty folder"):
        write_shards(source, tmp_path / "full", plan)
    (tmp_path / "p.png").unlink()
    with pytest.raises(DataError, match="cannot read"):
        write_shards(source, tmp_path / "out", plan)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "input.jsonl"]


@pytest.mark.parametrize(("content", "message"), [(None, "cannot read"), ("", "has no record"), ("\n \n", "has no record")])
def test_an_unreadable_or_empty_input_is_named(tmp_path, content, message):
    path = tmp_path / "input.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=message):
        plan_shards(path, 100)


def damaged(indexed, folder: Path, num_bytes: int) -> Path:
    whole = list_shards(indexed["keye_vl_1_5"])[0].read_bytes()
    (folder / "cut.tar").write_bytes(whole[:num_bytes])
    return folder / "cut.tar"


def test_every_cut_of_a_tar_is_noticed(indexed, tmp_path):
    shard = list_shards(indexed["keye_vl_1_5"])[0]
    ends = [span.offset + span.num_bytes for _, members in iter_samples(shard) for span in members.values()]
    after_a_member = -(-ends[2] // 512) * 512  # where tarfile sees a good end
    for num_bytes in (0, 100, ends[2] - 1, after_a_member, after_a_member + 512, -(-ends[-1] // 512) * 512):
        with pytest.raises(DataError, match="not a whole tar|truncated"):
            list(iter_samples(damaged(indexed, tmp_path, num_bytes)))


def test_reading_past_the_end_or_a_missing_shard_is_named(indexed, tmp_path):
    shard = damaged(indexed, tmp_path, 1000)
    with pytest.raises(DataError, match="found 488 of 600 bytes at offset 512"):
        read_span(shard, Span(512, 600))
    with pytest.raises(DataError, match="gone.tar: No such file"):
        read_span(tmp_path / "gone.tar", Span(0, 1))


def test_a_worker_that_dies_is_an_error_and_no_hang():
    with pytest.raises(KeyeError, match="a worker process died"):
        list(run_jobs(os._exit, [(9,), (9,)], workers=2))


@pytest.fixture
def run_tool(monkeypatch, capsys):
    """Runs the main function of a tool; its exit code and what it printed to stdout and stderr."""

    def run(main, *arguments) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["tool", *map(str, arguments)])
        return main(), *capsys.readouterr()

    return run


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_tools_with_two_workers_write_what_one_writes(corpus, indexed, tokenizer_folder, tmp_path, run_tool):
    out = tmp_path / "out"
    # Indexing is what several processes are for; each takes seconds to start, so only it gets two here.
    code, printed, _ = run_tool(make_shards.main, corpus, out, "--shard-bytes", 40_000, "--workers", 1)
    assert (code, "60 samples" in printed) == (0, True)
    variant = ("--tokenizer", tokenizer_folder, "--variant", "keye_vl_1_5")
    assert run_tool(index_shards.main, out, *variant, "--workers", 2)[0] == 0
    assert content(out) == content(indexed["keye_vl_1_5"])
    code, printed, _ = run_tool(inspect_data.main, out, "--tokenizer", tokenizer_folder, "--sample", 3)
    assert (code, "60 samples" in printed, "id r3" in printed) == (0, True, True)
    assert run_tool(inspect_data.main, out, "--tokenizer", tokenizer_folder, "--sample", 60)[0] == 65


def test_the_tools_end_with_65_and_skip_on_demand(tokenizer_folder, tmp_path, run_tool):
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    source = write_lines(tmp_path, document("a"), document("b", {"type": "image", "image": "bad.png"}), {"id": "c"})
    make = (make_shards.main, source, tmp_path / "out", "--workers", 1)
    code, _, errors = run_tool(*make)
    assert (code, f"{source}:3" in errors, (tmp_path / "out").exists()) == (65, True, False)
    assert run_tool(*make, "--skip-bad")[0] == 0
    (skipped,) = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert skipped["place"] == f"{source}:3"

    index = (index_shards.main, tmp_path / "out", "--tokenizer", tokenizer_folder, "--variant", "keye_vl_1_5", "--workers", 1)
    code, _, errors = run_tool(*index)
    assert (code, "record b, image 0: cannot decode an image" in errors) == (65, True)
    assert not (tmp_path / "out" / "index").exists()
    assert run_tool(*index, "--skip-bad", "--fps", 1.5)[0] == 0
    opened = open_index(tmp_path / "out")
    assert (len(opened), opened.made.video["fps"]) == (1, 1.5)
    assert run_tool(*index, "--fps", "fast")[0] == 65
