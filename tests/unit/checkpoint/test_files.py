"""Our writer against the safetensors library's reader, and what damage is seen."""

import errno
import os

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from megatron_keye.checkpoint.files import DTYPE_NAMES, TensorFile, file_damage, write_tensors
from megatron_keye.errors import CheckpointError


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(7, 10, generator=generator, dtype=torch.float64)
    return [
        ("odd@0,0", wide[1:4, 2:9].to(torch.bfloat16)),
        ("f32@0,0", wide.float()),
        ("view@0,0", wide.flatten()[3:63].view(6, 10)),
        ("f16@0,0", wide[:, :1].half()),
    ]


def test_the_library_reads_what_we_write(tmp_path, tensors):
    record = write_tensors(tmp_path / "a.safetensors", tensors)
    read = load_file(tmp_path / "a.safetensors")
    assert record.num_bytes == (tmp_path / "a.safetensors").stat().st_size
    assert read.keys() == {name for name, _ in tensors}
    for name, tensor in tensors:
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def test_we_read_what_the_library_writes(tmp_path, tensors):
    save_file({name: tensor.contiguous() for name, tensor in tensors}, tmp_path / "a.safetensors", {"format": "pt"})
    file = TensorFile(tmp_path / "a.safetensors")
    assert set(file.names()) == {name for name, _ in tensors}
    for name, tensor in tensors:
        assert file.shape(name) == tuple(tensor.shape)
        assert torch.equal(file.tensor(name), tensor)
        assert torch.equal(file.tensor(name)[1:3, :1], tensor[1:3, :1])


def test_a_tensor_longer_than_a_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_keye.checkpoint.files.CHUNK_BYTES", 64)
    tensor = torch.arange(101.0).view(101, 1)
    record = write_tensors(tmp_path / "a.safetensors", [("x@0,0", tensor)])
    assert torch.equal(load_file(tmp_path / "a.safetensors")["x@0,0"], tensor)
    assert file_damage(tmp_path, record) is None


def test_a_disk_that_says_only_once_that_it_failed_is_heard(tmp_path, monkeypatch):
    """The flush that runs while more is written may get the error, and then the last one does not."""
    monkeypatch.setattr("megatron_keye.checkpoint.files.WRITE_BACK_BYTES", 64)

    def fail(descriptor):
        monkeypatch.setattr(os, "fdatasync", lambda descriptor: None)
        raise OSError(errno.EIO, "the disk is broken")

    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(OSError, match="the disk is broken"):
        write_tensors(tmp_path / "a.safetensors", [(f"{n}@0,0", torch.ones(40, 1)) for n in range(20)])


def test_a_rank_that_owns_nothing_writes_a_file_too(tmp_path):
    record = write_tensors(tmp_path / "a.safetensors", [])
    assert file_damage(tmp_path, record) is None
    assert TensorFile(tmp_path / "a.safetensors").names() == []


def test_every_dtype_has_a_name():
    assert len(set(DTYPE_NAMES.values())) == len(DTYPE_NAMES)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "torn"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x99"), "bytes have changed"),
        (lambda path: path.unlink(), "No such file"),
    ],
)
def test_damage_is_named(tmp_path, tensors, damage, said):
    record = write_tensors(tmp_path / "a.safetensors", tensors)
    assert file_damage(tmp_path, record) is None
    damage(tmp_path / "a.safetensors")
    assert said in file_damage(tmp_path, record)
    assert "a.safetensors" in file_damage(tmp_path, record)


def test_a_file_with_more_bytes_than_tensors_is_refused(tmp_path, tensors):
    """As the safetensors library refuses it."""
    path = tmp_path / "a.safetensors"
    write_tensors(path, tensors)
    path.write_bytes(path.read_bytes() + bytes(8))
    with pytest.raises(SafetensorError):
        load_file(path)
    with pytest.raises(CheckpointError, match="bytes were added"):
        TensorFile(path)


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 8 + b"{}", b"\x02" + b"\0" * 7 + b"no"])
def test_what_is_no_safetensors_file_is_refused(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="a.safetensors cannot be read"):
        TensorFile(tmp_path / "a.safetensors")
