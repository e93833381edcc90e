"""Where encoded bytes come from: only from below the roots, and from the disk only what a file of theirs would give."""

import hashlib
import threading

import pytest

from megatron_keye.errors import DataError, SettingsError
from megatron_keye.io_server.blobs import Blob, Blobs, DiskCache
from megatron_keye.io_server.protocol import Refused
from tests.unit.data.http_server import serving
from tests.unit.io_server.serving import MIB, expected, job_for, post


@pytest.fixture
def root(tmp_path):
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
def clip(root):
    (root / "shard").write_bytes(b"head" + b"clip" * 1000 + b"tail")
    return root / "shard"


@pytest.fixture
def disk(tmp_path_factory):
    return DiskCache(tmp_path_factory.mktemp("disk") / "cache", MIB)


def job_of(path, content=b"clip" * 1000, **changes):
    given = dict(offset=4, num_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    return job_for(path, **given | changes)


def test_a_medium_is_read_once_and_kept_over_a_restart(root, clip, disk):
    job = job_of(clip)
    assert Blobs([str(root)], disk).read(job) == Blob(b"clip" * 1000, from_disk=False)
    assert Blobs([str(root)], disk).read(job) == Blob(b"clip" * 1000, from_disk=True)
    assert Blobs([str(root)]).read(job).from_disk is False
    # Another place of the same bytes is the same medium.
    (root / "copy").write_bytes(clip.read_bytes())
    assert Blobs([str(root)], disk).read(job_of(root / "copy")).from_disk


def test_what_is_kept_is_only_for_who_may_ask_for_the_file(root, clip, disk, tmp_path):
    Blobs([str(root)], disk).read(job_of(clip))
    (tmp_path / "outside").write_bytes(clip.read_bytes())
    (root / "link").symlink_to(tmp_path / "outside")
    for path, code in ((tmp_path / "outside", "forbidden_path"), (root / "link", "forbidden_path"), (root / "gone", "missing")):
        job = job_of(clip).model_copy(update={"path": str(path)})
        with pytest.raises(Refused) as refusal:
            Blobs([str(root)], disk).read(job)
        assert refusal.value.code == code


def test_nothing_is_kept_that_has_no_checksum_or_a_wrong_one(root, clip, disk):
    blobs = Blobs([str(root)], disk)
    for _ in range(2):
        assert not blobs.read(job_of(clip, sha256=None)).from_disk
        with pytest.raises(DataError, match="do not have the sha256"):
            blobs.read(job_of(clip, offset=3))
    assert not [path for path in disk.folder.glob("media/??/*") if path.is_file()]


@pytest.mark.parametrize(
    "damage", [lambda blob: blob[:-1], lambda blob: b"x" + blob[1:], lambda blob: b""], ids=["short", "changed", "empty"]
)
def test_a_damaged_entry_is_read_anew(root, clip, disk, damage):
    job = job_of(clip)
    Blobs([str(root)], disk).read(job)
    (entry,) = (path for path in disk.folder.glob("media/??/*") if path.is_file())
    entry.write_bytes(damage(entry.read_bytes()))
    assert Blobs([str(root)], disk).read(job) == Blob(b"clip" * 1000, from_disk=False)
    assert Blobs([str(root)], disk).read(job).from_disk


def test_an_entry_under_a_wrong_name_is_never_believed(root, clip, disk):
    blobs, job = Blobs([str(root)], disk), job_of(clip)
    blobs._cache.put(job.sha256, b"another medium")
    assert blobs.read(job) == Blob(b"clip" * 1000, from_disk=False)


def test_the_disk_keeps_to_its_limit_with_several_servers_at_work(root, tmp_path):
    disk = DiskCache(tmp_path / "disk", 100_000)
    contents = [bytes([number]) * 7000 for number in range(40)]
    for number, content in enumerate(contents):
        (root / str(number)).write_bytes(content)
    jobs = [job_of(root / str(number), content, offset=0) for number, content in enumerate(contents)]

    def work(shift: int) -> None:
        blobs = Blobs([str(root)], disk)
        for place in range(len(jobs)):
            number = (place + shift) % len(jobs)
            good.append(blobs.read(jobs[number]).content == contents[number])

    good: list[bool] = []
    threads = [threading.Thread(target=work, args=(10 * number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert good == [True] * 160
    assert 50_000 < sum(path.stat().st_size for path in disk.folder.glob("media/??/*")) <= 100_000


def test_a_disk_cache_where_runs_could_ask_for_it_is_refused(root, tmp_path):
    with pytest.raises(SettingsError, match="lies in a --root"):
        Blobs([str(root)], DiskCache(root / "cache", MIB))
    (tmp_path / "link").symlink_to(root)
    with pytest.raises(SettingsError, match="lies in a --root"):
        Blobs([str(root)], DiskCache(tmp_path / "link", MIB))
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match="cannot make it"):
        Blobs([str(root)], DiskCache(tmp_path / "file" / "cache", MIB))


def test_a_medium_at_a_url_is_asked_for_once(root, clip, disk):
    with serving(root) as (url, faults):
        job = job_of(clip).model_copy(update={"path": f"{url}/shard"})
        for from_disk in (False, True):
            assert Blobs([url], disk).read(job) == Blob(b"clip" * 1000, from_disk)
        assert len(faults.ranged()) == 1


def test_a_url_that_does_not_answer_is_missing_here(root, clip):
    with serving(root) as (url, _):
        blobs, path = Blobs([url]), f"{url}/shard"
    with pytest.raises(Refused) as refusal:
        blobs.read(job_of(clip).model_copy(update={"path": path}))
    assert refusal.value.code == "missing"


NAMES = (
    "../secret",
    "a/../../secret",
    "%2e%2e/secret",
    "shard?x=1",
    "shard#x",
    "",
    "/shard",
    "a//shard",
    "./shard",
    "..",
    "a/..",
    "a\\..\\b",
)


@pytest.mark.parametrize("name", NAMES)
def test_a_url_outside_of_the_roots_is_denied(root, clip, name):
    with serving(root.parent) as (url, faults):
        blobs = Blobs([f"{url}/root"])
        for path in (f"{url}/root/{name}", f"{url}/root2/shard", f"{url}/shard", "s3://other/shard"):
            with pytest.raises(Refused) as refusal:
                blobs.read(job_of(clip).model_copy(update={"path": path}))
            assert refusal.value.code == "forbidden_path"
        assert not faults.requests


@pytest.mark.parametrize(
    ("roots", "problem"), [([], "at least one"), (["file:///tmp"], "the folder itself"), (["nosuch://x"], "cannot be read")]
)
def test_roots_that_cannot_be_are_settings_errors(roots, problem):
    with pytest.raises(SettingsError, match=problem):
        Blobs(roots)


def test_a_server_tells_how_often_its_disk_had_the_medium(start_server, write, disk):
    path = write("picture")
    for hits in (0, 1):
        server = start_server(disk=disk)
        assert post(server.url, job_for(path))[2] == expected(job_for(path), path)
        assert server.pool.counts["from_disk"] == hits
        server.close()
