"""`verify`: any file or folder, digests too when stamped. And digests of sources."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from rewright.formats import digest
from rewright.formats.checkpoint import Checkpoint
from rewright.formats.digest import sha256_file, source_digest
from rewright.formats.draft import Draft, TensorSpec
from rewright.formats.errors import FormatError
from rewright.formats.verify import verify
from tests.formats.samples import snapshot, tensors


@pytest.fixture
def stamped(model: Path, tmp_path: Path) -> Path:
    ckpt = Checkpoint.open(model)
    draft = Draft(tmp_path / "stamped")
    draft.declare([TensorSpec(entry.name, entry.dtype, entry.shape) for entry in ckpt.entries.values()], 40)
    for name in ckpt.entries:
        draft.copy(name, ckpt)
    draft.carry(ckpt)
    draft.seal({"rewright": "0"})
    return draft.path


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_whole(stamped: Path, model: Path) -> None:
    report = verify(stamped)
    assert report.plain() == {
        "path": str(stamped),
        "ok": True,
        "files": len(os.listdir(stamped)),
        "tensors": 6,
        "bytes": sum(tensor.nbytes for tensor in tensors().values()),
        "digests": len(os.listdir(stamped)) - 1,
        "problems": [],
        "warnings": [],
    }
    plain = verify(model)
    assert (plain.ok, plain.tensors, plain.digests, plain.files) == (True, 6, 0, 3)


def test_odd_and_legal_files_pass(tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    safetensors.torch.save_file({"a": torch.tensor(1.0), "b": torch.zeros(0, 4)}, path)
    assert verify(path).ok
    assert verify(path).tensors == 2
    (tmp_path / "notes.txt").write_text("no weights here")
    assert verify(tmp_path).ok


def test_changed_byte_is_found(stamped: Path) -> None:
    shard = sorted(stamped.glob("*.safetensors"))[0]
    flip(shard, -1)
    report = verify(stamped)
    assert not report.ok
    assert report.problems == [f"`{shard}` is not the file that was stamped: its digest differs"]


def test_every_problem_is_named(stamped: Path) -> None:
    (stamped / "tokenizer.json").unlink()
    (stamped / "config.json").write_text((stamped / "config.json").read_text() + " ")
    (stamped / "extra.json").write_text('{"a": NaN}')
    (stamped / "late.bin").write_text("version https://git-lfs.github.com/spec/v1\nsize 7\n")
    (stamped / "gone").symlink_to("nowhere")
    report = verify(stamped)
    text = "\n".join(report.problems)
    for words in ("tokenizer.json` is not there", "bytes, but the stamp says", "`NaN`", "Git LFS pointer", "a link to"):
        assert words in text
    assert "not in the stamp" in "\n".join(report.warnings)


@pytest.mark.parametrize("damage", ["truncate", "no shard", "no index entry"])
def test_broken_checkpoints(damage: str, sharded: Path) -> None:
    shard = sharded / "model-00002-of-00002.safetensors"
    if damage == "truncate":
        os.truncate(shard, shard.stat().st_size - 1)
    elif damage == "no shard":
        shard.unlink()
    else:
        (sharded / "model.safetensors.index.json").unlink()
    report = verify(sharded)
    assert not report.ok
    assert len(report.problems) == 1


@pytest.mark.parametrize("files", [[], {"../x": {}}, {"/x": {}}, {"x": 1}])
def test_hostile_stamps(files: Any, model: Path) -> None:
    import json

    (model / "rewright.json").write_text(json.dumps({"files": files}))
    assert not verify(model).ok


def test_files_of_other_kinds(tmp_path: Path) -> None:
    (tmp_path / "m.bin").write_bytes(b"x")
    assert "pickle" in verify(tmp_path / "m.bin").warnings[0]
    (tmp_path / "x.json").write_text("[1")
    assert not verify(tmp_path / "x.json").ok
    (tmp_path / "empty").mkdir()
    assert verify(tmp_path / "empty").problems == [f"`{tmp_path / 'empty'}` holds no files"]
    with pytest.raises(FormatError, match="not there"):
        verify(tmp_path / "none")


def test_source_digest_follows_content(model: Path, tmp_path: Path) -> None:
    first = source_digest(Checkpoint.open(model))
    assert set(first.files) == {"config.json", "model.safetensors", "tokenizer.json"}
    assert first.files["config.json"]["sha256"] == sha256_file(model / "config.json")
    assert source_digest(Checkpoint.open(snapshot(model, tmp_path / "hub"))).digest == first.digest
    (model / "README.md").write_text("words")
    assert source_digest(Checkpoint.open(model)).digest == first.digest
    seen = {first.digest}
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        if name == "model.safetensors":
            flip(model / name, -1)
        else:
            (model / name).write_text('{"other": 1}')
        seen.add(source_digest(Checkpoint.open(model)).digest)
    (model / "chat_template.jinja").write_text("{}")
    seen.add(source_digest(Checkpoint.open(model)).digest)
    assert len(seen) == 5


def test_source_digest_reads_only_what_changed(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ckpt = Checkpoint.open(model)
    counted: list[int] = []
    first = source_digest(ckpt, on_bytes=counted.append)
    assert sum(counted) == sum(record["size"] for record in first.files.values())
    read: list[str] = []
    real = sha256_file

    def watch(path: Path, on_bytes: Any = None) -> str:
        read.append(path.name)
        return real(path, on_bytes)

    monkeypatch.setattr(digest, "sha256_file", watch)
    assert source_digest(ckpt, first.files) == first
    assert read == []
    os.utime(model / "config.json", ns=(0, 1))
    assert source_digest(ckpt, first.files).digest == first.digest
    assert read == ["config.json"]


def test_digest_of_a_file_that_goes(model: Path) -> None:
    ckpt = Checkpoint.open(model)
    (model / "config.json").unlink()
    (model / "tokenizer.json").unlink()
    (model / "model.safetensors").unlink()
    with pytest.raises(FormatError, match="cannot be read"):
        source_digest(ckpt)
