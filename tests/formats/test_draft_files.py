"""Drafts: config, sidecars, links, the stamp."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from rewright.formats import carry
from rewright.formats.checkpoint import Checkpoint
from rewright.formats.digest import sha256_file, source_digest
from rewright.formats.draft import Draft, TensorSpec
from rewright.formats.errors import ConflictError, FormatError
from rewright.formats.provenance import read_stamp
from tests.formats.samples import CONFIG, copied, layout_of, snapshot, tensors


def test_config_edited_as_text(tmp_path: Path, model: Path) -> None:
    draft = copied(model, tmp_path / "out")
    draft.edit_config({"hidden_size": 8, "quantization_config": {"ignore": ["é"]}}, remove=["model_type"])
    text = (tmp_path / "out/config.json").read_text()
    assert text == (
        '{\n  "rope_theta": 500000.0,\n  "odd": [1, 1e-05],\n  "hidden_size": 8,\n'
        '  "quantization_config": {\n    "ignore": [\n      "é"\n    ]\n  }\n}\n'
    )
    assert (model / "config.json").read_text() == CONFIG


def test_config_started_when_absent(tmp_path: Path) -> None:
    Draft(tmp_path / "out").edit_config({"a": 1})
    assert (tmp_path / "out/config.json").read_text() == '{\n  "a": 1\n}\n'


def test_sidecars_byte_for_byte(tmp_path: Path, model: Path) -> None:
    odd = b'{"do_sample": false, "temperature": 0.9}\r\n\xff'
    for name in ("generation_config.json", "deep/er/file.bin.txt"):
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_bytes(odd)
    (model / "rewright.json").write_text("{}")
    (model / "pytorch_model.bin").write_bytes(b"x")
    draft = Draft(tmp_path / "out")
    assert draft.carry(Checkpoint.open(model)) == ["pytorch_model.bin"]
    assert (tmp_path / "out/generation_config.json").read_bytes() == odd
    assert (tmp_path / "out/deep/er/file.bin.txt").read_bytes() == odd
    assert not (tmp_path / "out/rewright.json").exists()


def test_pointers_do_not_pass_for_tokenizers(tmp_path: Path, model: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1234\n"
    (model / "picture.png").write_text(pointer)
    Draft(tmp_path / "out").carry(Checkpoint.open(model))
    assert (tmp_path / "out/picture.png").read_text() == pointer
    (model / "tokenizer.json").write_text(pointer)
    for refused in (
        lambda: Draft(tmp_path / "out").carry(Checkpoint.open(model)),
        lambda: source_digest(Checkpoint.open(model)),
    ):
        with pytest.raises(FormatError, match=r"tokenizer\.json` is a Git LFS pointer: the 1234 bytes"):
            refused()


def test_names_that_are_not_text(tmp_path: Path, model: Path) -> None:
    with open(os.fsencode(model) + b"/\xff.txt", "wb"):
        pass
    with pytest.raises(FormatError, match="not UTF-8"):
        Checkpoint.open(model).sidecars()


def test_results_hold_regular_files(tmp_path: Path, model: Path) -> None:
    place = snapshot(model, tmp_path / "hub")
    copied(place, tmp_path / "out").seal({})
    draft = Draft(tmp_path / "linked")
    draft.carry(Checkpoint.open(place))
    draft.link_weights(Checkpoint.open(place))
    draft.seal({})
    for out in ("out", "linked"):
        for file in (tmp_path / out).iterdir():
            assert file.is_file()
            assert not file.is_symlink()
            assert file.stat().st_nlink == 1
        assert torch.equal(Checkpoint.open(tmp_path / out).read("counts"), tensors()["counts"])


def test_links_are_hard_and_resolved(tmp_path: Path, sharded: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    shard = "model-00002-of-00002.safetensors"
    (sharded / shard).rename(store / shard)
    (sharded / shard).symlink_to(store / shard)
    draft = Draft(tmp_path / "out")
    draft.carry(Checkpoint.open(sharded))
    draft.link_weights(Checkpoint.open(sharded))
    stamp = draft.seal({"stage": 1})
    assert os.path.samefile(tmp_path / "out" / shard, store / shard)
    assert not (tmp_path / "out" / shard).is_symlink()
    assert "sha256" not in stamp["files"][shard]
    assert stamp["files"]["config.json"]["sha256"] == sha256_file(sharded / "config.json")
    assert torch.equal(Checkpoint.open(tmp_path / "out").read("c.weight"), torch.full((3,), 7.0))


def test_linked_files_keep_the_digest_on_record(tmp_path: Path, model: Path) -> None:
    copied(model, tmp_path / "one").seal({})
    one = Checkpoint.open(tmp_path / "one")
    draft = Draft(tmp_path / "two")
    draft.carry(one)
    draft.link_weights(one)
    stamp = draft.seal({})
    assert os.path.samefile(tmp_path / "one/model.safetensors", tmp_path / "two/model.safetensors")
    assert stamp["files"]["model.safetensors"] == (one.stamp or {})["files"]["model.safetensors"]


def test_bare_file_is_linked_under_the_usual_name(tmp_path: Path) -> None:
    safetensors.torch.save_file(tensors(), tmp_path / "any.safetensors")
    draft = Draft(tmp_path / "out")
    draft.link_weights(Checkpoint.open(tmp_path / "any.safetensors"))
    draft.seal({})
    assert os.path.samefile(tmp_path / "any.safetensors", tmp_path / "out/model.safetensors")


def test_links_across_disks_are_copies(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    draft = Draft(tmp_path / "out")
    draft.link_weights(Checkpoint.open(model))
    assert (tmp_path / "out/model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


def test_names_that_differ_in_case(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model / "README.md").write_text("one")
    (model / "readme.md").write_text("two")
    ckpt = Checkpoint.open(model)
    Draft(tmp_path / "out").carry(ckpt)
    assert (tmp_path / "out/readme.md").read_text() == "two"
    monkeypatch.setattr(carry, "tells_case", lambda folder: False)
    with pytest.raises(FormatError, match=r"`README\.md` and `readme\.md` differ only in case"):
        Draft(tmp_path / "mac").carry(ckpt)


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_modes_follow_the_umask(mask: int, umask: Callable[[int], int], tmp_path: Path, model: Path) -> None:
    (model / "sub").mkdir()
    (model / "sub/file").write_text("x")
    for path in model.rglob("*"):
        path.chmod(0o500 if path.is_dir() else 0o400)
    umask(mask)
    draft = copied(model, tmp_path / "out", max_shard_bytes=40)
    draft.edit_config({"a": 1})
    draft.put("attachments/x/data.json", b"{}")
    draft.seal({})
    for path in (tmp_path / "out", *(tmp_path / "out").rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~mask, path


def test_stamp_says_what_is_there(tmp_path: Path, model: Path) -> None:
    draft = copied(model, tmp_path / "out")
    draft.put("reports/x.json", b"{}")
    returned = draft.seal({"rewright": "0.1", "stages": []}, known={"tokenizer.json": "0" * 64})
    stamp = read_stamp(tmp_path / "out")
    assert stamp == returned
    assert stamp["rewright"] == "0.1"
    assert set(stamp["files"]) == {"config.json", "model.safetensors", "reports/x.json", "tokenizer.json"}
    weights = tmp_path / "out/model.safetensors"
    assert stamp["files"]["model.safetensors"] == {"size": weights.stat().st_size, "sha256": sha256_file(weights)}
    assert stamp["files"]["tokenizer.json"]["sha256"] == "0" * 64
    assert read_stamp(model) is None


def test_changing_a_sealed_draft_unseals_it(tmp_path: Path, model: Path) -> None:
    changes: list[Callable[[Draft, Checkpoint], object]] = [
        lambda draft, ckpt: draft.put("x", b""),
        lambda draft, ckpt: draft.edit_config({"a": 1}),
        lambda draft, ckpt: draft.carry(ckpt),
        lambda draft, ckpt: draft.link_weights(ckpt),
        lambda draft, ckpt: draft.declare(layout_of(ckpt)),
    ]
    for at, change in enumerate(changes):
        copied(model, tmp_path / f"{at}").seal({})
        assert read_stamp(tmp_path / f"{at}") is not None
        change(Draft(tmp_path / f"{at}"), Checkpoint.open(model))
        assert read_stamp(tmp_path / f"{at}") is None


def test_seal_refuses(tmp_path: Path, model: Path) -> None:
    with pytest.raises(FormatError, match="no weights"):
        Draft(tmp_path / "none").seal({})
    draft = copied(model, tmp_path / "config")
    (tmp_path / "config/config.json").write_text("{")
    with pytest.raises(FormatError, match=r"config\.json"):
        draft.seal({})
    draft = copied(model, tmp_path / "link")
    (tmp_path / "link/x").symlink_to("config.json")
    with pytest.raises(FormatError, match="neither a file nor a folder"):
        draft.seal({})
    with pytest.raises(ValueError, match="JSON"):
        copied(model, tmp_path / "nan").seal({"loss": float("nan")})
    for place in ("none", "config", "link", "nan"):
        assert read_stamp(tmp_path / place) is None


@pytest.mark.parametrize("relative", ["../x", "/x", "", "a/../../x", "rewright.json", "a\0"])
def test_put_stays_inside(relative: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError):
        Draft(tmp_path / "out").put(relative, b"")


def test_draft_never_writes_through_links(tmp_path: Path, model: Path) -> None:
    """What stands in a draft may be a hard link to the source: writing replaces it, and never changes its bytes."""
    before = (model / "model.safetensors").read_bytes()
    linked = Draft(tmp_path / "out")
    linked.link_weights(Checkpoint.open(model))
    os.link(model / "config.json", tmp_path / "out/config.json")
    (tmp_path / "out/tokenizer.json").symlink_to(model / "tokenizer.json")
    linked.put("tokenizer.json", b"new")
    linked.carry(Checkpoint.open(model))
    linked.edit_config({"hidden_size": 0})
    with pytest.raises(ConflictError):
        linked.declare([TensorSpec("a", "F32", (1,))])
    assert (model / "model.safetensors").read_bytes() == before
    assert (model / "config.json").read_text() == CONFIG
    assert (model / "tokenizer.json").read_text() == "{}"
