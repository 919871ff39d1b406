"""Reading: values, rows, links, and what travels."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

from rewright.formats.checkpoint import Checkpoint
from rewright.formats.errors import FormatError, StorageError
from tests.formats.samples import raw, snapshot, tensors


def test_values_are_the_librarys(model: Path) -> None:
    ckpt = Checkpoint.open(model)
    for name, expected in safetensors.torch.load_file(model / "model.safetensors").items():
        got = ckpt.read(name)
        assert got.dtype == expected.dtype
        assert got.shape == expected.shape
        assert torch.equal(got, expected)
        assert b"".join(ckpt.chunks(name, size=5)) == expected.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    assert ckpt.total_bytes == sum(tensor.nbytes for tensor in tensors().values())
    assert ckpt.config == {"model_type": "llama", "rope_theta": 500000.0, "odd": [1, 1e-05], "hidden_size": 4}
    assert ckpt.metadata == {}
    assert ckpt.stamp is None


def test_real_model(root: Path) -> None:
    path = root / "tests/data/stories260K"
    ckpt = Checkpoint.open(path)
    expected = safetensors.torch.load_file(path / "model.safetensors")
    assert set(ckpt.entries) == set(expected)
    assert all(torch.equal(ckpt.read(name), tensor) for name, tensor in expected.items())


def test_memory_is_its_own(model: Path) -> None:
    ckpt = Checkpoint.open(model)
    read = ckpt.read("model.norm.weight")
    read.add_(1)
    (model / "model.safetensors").write_bytes(b"\0" * (model / "model.safetensors").stat().st_size)
    assert torch.equal(read, torch.linspace(-1, 1, 4) + 1)


@pytest.mark.parametrize(("start", "stop"), [(0, 8), (2, 5), (3, 3), (5, 2), (6, 99), (-2, 8)])
def test_rows(start: int, stop: int, model: Path) -> None:
    ckpt = Checkpoint.open(model)
    whole = tensors()["model.embed_tokens.weight"]
    assert torch.equal(ckpt.read_rows("model.embed_tokens.weight", start, stop), whole[start:stop])


def test_rows_of_nothing(model: Path) -> None:
    ckpt = Checkpoint.open(model)
    assert ckpt.read_rows("none", 0, 3).shape == (0, 4)
    with pytest.raises(FormatError, match="no axis"):
        ckpt.read_rows("scalar", 0, 1)


def test_unknown_tensor(model: Path) -> None:
    with pytest.raises(FormatError, match="has no tensor `x`"):
        Checkpoint.open(model).read("x")


def test_narrow_types_pass_and_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(raw({"w": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}, b"\x12\x34"))
    ckpt = Checkpoint.open(path)
    assert b"".join(ckpt.chunks("w")) == b"\x12\x34"
    with pytest.raises(FormatError, match="`w` is F4"):
        ckpt.read("w")


def test_impossible_empty_shape(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(raw({"w": {"dtype": "U8", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}}))
    with pytest.raises(FormatError, match="a shape torch cannot make"):
        Checkpoint.open(path).read("w")


def test_memory_that_is_short(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("can't allocate memory: you tried to allocate 64 bytes")

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(StorageError, match=r"`model\.embed_tokens\.weight` needs 64 bytes of memory"):
        Checkpoint.open(model).read("model.embed_tokens.weight")


def test_file_that_shrinks_meanwhile(model: Path) -> None:
    ckpt = Checkpoint.open(model)
    os.truncate(model / "model.safetensors", ckpt.entries["none"].offset - 1)
    last = list(ckpt.entries.values())[-1]
    with pytest.raises(FormatError, match="ended inside tensor"):
        ckpt.read(last.name)
    (model / "model.safetensors").unlink()
    with pytest.raises(FormatError, match="cannot be read"):
        ckpt.read(last.name)


def test_cache_of_links(model: Path, tmp_path: Path) -> None:
    place = snapshot(model, tmp_path / "hub")
    ckpt = Checkpoint.open(place)
    assert torch.equal(ckpt.read("counts"), tensors()["counts"])
    assert [relative for relative, _ in ckpt.sidecars()] == ["config.json", "tokenizer.json"]
    file = Checkpoint.open(place / "model.safetensors")
    assert file.config == ckpt.config
    assert file.root == place


def test_links_to_source(model: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").symlink_to(model)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/file.safetensors").symlink_to(model / "model.safetensors")
    for path in ("folder", "elsewhere/file.safetensors"):
        ckpt = Checkpoint.open(tmp_path / path)
        assert ckpt.config is not None
        assert [relative for relative, _ in ckpt.sidecars()] == ["config.json", "tokenizer.json"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "model.safetensors.index.json"])
def test_dangling_links_are_named(name: str, model: Path) -> None:
    (model / "model.safetensors").unlink()
    if name == "config.json":
        (model / "model.safetensors").write_bytes(raw({}))
        (model / name).unlink()
    (model / name).symlink_to("../../blobs/0123")
    with pytest.raises(FormatError, match=rf"{name}` is a link to `\.\./\.\./blobs/0123`"):
        Checkpoint.open(model)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="is not there"):
        Checkpoint.open(tmp_path / "none")


@pytest.mark.parametrize("name", ["config.json", "rewright.json"])
@pytest.mark.parametrize("text", ["[1]", '{"a": NaN}', '{"a": 1, "a": 1}', "{"])
def test_bad_documents(name: str, text: str, model: Path) -> None:
    (model / name).write_text(text)
    with pytest.raises(FormatError, match=name):
        Checkpoint.open(model)


def test_bare_file_has_no_neighbours(tmp_path: Path) -> None:
    safetensors.torch.save_file(tensors(), tmp_path / "any.safetensors")
    (tmp_path / "diary.txt").write_text("dear")
    ckpt = Checkpoint.open(tmp_path / "any.safetensors")
    assert ckpt.config is None
    assert ckpt.sidecars() == []
    assert ckpt.left_behind() == []


TRAVEL = [
    "1_Dense/config.json",
    "1_Dense/model.safetensors",
    "README.md",
    "assets/chart.png",
    "attachments/prompt/adapter_model.safetensors",
    "attachments/prompt/data.bin",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "modeling_custom.py",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer.model",
]
STAY = [
    ".git/HEAD",
    ".cache/huggingface/x",
    "__pycache__/m.pyc",
    "checkpoint-500/model.safetensors",
    "consolidated.00.pth",
    "consolidated.safetensors",
    "consolidated.safetensors.index.json",
    "flax_model.msgpack",
    "model.Q4.gguf",
    "model.fp16.safetensors",
    "model.safetensors.index.json",
    "original/params.json",
    "original/consolidated.00.pth",
    "pytorch_model-00001-of-00002.bin",
    "pytorch_model.bin.index.json",
    "tf_model.h5",
    "training_args.bin",
]


def test_what_travels(model: Path) -> None:
    for name in (*TRAVEL, *STAY, "reports/compress.json"):
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text("{}")
    (model / "elsewhere").symlink_to("/etc")
    os.mkfifo(model / "pipe")
    ckpt = Checkpoint.open(model)
    assert [relative for relative, _ in ckpt.sidecars()] == TRAVEL
    folders = {".git/", ".cache/", "__pycache__/", "checkpoint-500/", "original/", "elsewhere/", "pipe"}
    assert set(ckpt.left_behind()) == folders | {name for name in STAY if "/" not in name}
