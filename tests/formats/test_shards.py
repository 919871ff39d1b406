"""Which files are read, in which order, and what a set of shards may not be."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

from rewright.formats.checkpoint import Checkpoint
from rewright.formats.errors import FormatError
from rewright.formats.shards import find_weights
from tests.formats.samples import write_index

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
MAP = {"a.weight": FIRST, "b.weight": FIRST, "c.weight": SECOND}


def test_shards_in_order(sharded: Path) -> None:
    found = find_weights(sharded)
    assert [file.name for file in found.files] == [FIRST, SECOND]
    assert found.owner is not None
    assert {name: file.name for name, file in found.owner.items()} == MAP
    assert found.warnings == ()
    assert torch.equal(Checkpoint.open(sharded).read("c.weight"), torch.full((3,), 7.0))


def test_single_file_wins_over_index(sharded: Path) -> None:
    safetensors.torch.save_file({"only": torch.ones(1)}, sharded / "model.safetensors")
    ckpt = Checkpoint.open(sharded)
    assert list(ckpt.entries) == ["only"]
    assert ckpt.left_behind() == [FIRST, SECOND, "model.safetensors.index.json"]


def test_absent_shard_is_named(sharded: Path) -> None:
    (sharded / SECOND).unlink()
    with pytest.raises(FormatError, match=f"{SECOND}` is not there") as caught:
        find_weights(sharded)
    assert "missing shard" in (caught.value.hint or "")


def test_dangling_shard_is_named(sharded: Path) -> None:
    (sharded / SECOND).unlink()
    (sharded / SECOND).symlink_to("../blobs/00")
    with pytest.raises(FormatError, match=r"is a link to `\.\./blobs/00`, which is not there"):
        find_weights(sharded)


def test_pointer_shard_is_named(sharded: Path) -> None:
    (sharded / SECOND).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5000000\n")
    with pytest.raises(FormatError, match=f"{SECOND}` is a Git LFS pointer: the 5000000 bytes"):
        find_weights(sharded)


def test_tensor_in_no_shard(sharded: Path) -> None:
    write_index(sharded, MAP | {"gone.weight": FIRST})
    with pytest.raises(FormatError, match=f"`gone.weight` is not in `{FIRST}`.* no listed shard has it"):
        find_weights(sharded)


def test_tensor_in_another_shard_is_read_there(sharded: Path) -> None:
    write_index(sharded, MAP | {"c.weight": FIRST, "b.weight": FIRST, "a.weight": SECOND})
    ckpt = Checkpoint.open(sharded)
    assert torch.equal(ckpt.read("c.weight"), torch.full((3,), 7.0))
    assert torch.equal(ckpt.read("a.weight"), torch.ones(2, 3))
    assert len(ckpt.warnings) == 2
    assert "`c.weight` is read from" in "".join(ckpt.warnings)


def test_tensor_in_two_other_shards(sharded: Path) -> None:
    third = "model-00003-of-00003.safetensors"
    safetensors.torch.save_file({"c.weight": torch.zeros(3)}, sharded / third)
    write_index(sharded, MAP | {"c.weight": FIRST, "x": third, "y": SECOND})
    with pytest.raises(FormatError, match="2 other shards do"):
        find_weights(sharded)


def test_unlisted_tensors_are_kept(sharded: Path) -> None:
    write_index(sharded, {"a.weight": FIRST, "c.weight": SECOND})
    ckpt = Checkpoint.open(sharded)
    assert list(ckpt.entries) == ["a.weight", "b.weight", "c.weight"]
    assert "1 tensors are in the shards but not in" in ckpt.warnings[0]


def test_second_copy_is_not_read(sharded: Path) -> None:
    safetensors.torch.save_file({"c.weight": torch.full((3,), 7.0), "a.weight": torch.zeros(9)}, sharded / SECOND)
    ckpt = Checkpoint.open(sharded)
    assert torch.equal(ckpt.read("a.weight"), torch.ones(2, 3))
    assert "also in" in ckpt.warnings[0]


def test_unlisted_copies_clash(sharded: Path) -> None:
    for file, name in ((FIRST, "a.weight"), (SECOND, "c.weight")):
        safetensors.torch.save_file({name: torch.ones(1), "x": torch.ones(1)}, sharded / file)
    write_index(sharded, {"a.weight": FIRST, "c.weight": SECOND})
    with pytest.raises(FormatError, match=r"`x` is in .* names neither"):
        find_weights(sharded)


@pytest.mark.parametrize(
    "file", ["../model.safetensors", "/etc/passwd", "sub/../../x.safetensors", "", ".", "a\\..\\b", "a\nb", "a\0b"]
)
def test_paths_that_leave(file: str, sharded: Path) -> None:
    write_index(sharded, MAP | {"x": file})
    with pytest.raises(FormatError, match=r"index\.json` names the file"):
        find_weights(sharded)


@pytest.mark.parametrize(
    "document", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"weight_map": 1}']
)
def test_index_without_map(document: str, sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text(document)
    with pytest.raises(FormatError, match="no `weight_map`"):
        find_weights(sharded)


def test_unsafe_name_in_index(sharded: Path) -> None:
    write_index(sharded, MAP | {"../x": FIRST})
    with pytest.raises(FormatError, match="unsafe name"):
        find_weights(sharded)


def test_shards_below(sharded: Path) -> None:
    (sharded / "weights").mkdir()
    (sharded / SECOND).rename(sharded / "weights" / SECOND)
    write_index(sharded, MAP | {"c.weight": f"weights/{SECOND}"})
    ckpt = Checkpoint.open(sharded)
    assert ckpt.read("c.weight").tolist() == [7.0] * 3
    assert [relative for relative, _ in ckpt.sidecars()] == ["config.json"]


@pytest.mark.parametrize(
    ("names", "words", "hint"),
    [
        ([], "holds no weights", None),
        (["pytorch_model.bin"], "as a pickle, `pytorch_model.bin`", "save_pretrained"),
        (["x.gguf"], "`x.gguf` and no safetensors", "convert"),
        ([FIRST], "has shards but no", "index"),
        (["adapter_model.safetensors"], "has no `model.safetensors`", "adapter_model.safetensors"),
    ],
)
def test_folders_without(names: list[str], words: str, hint: str | None, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(FormatError) as caught:
        find_weights(tmp_path)
    assert words in str(caught.value)
    assert (hint is None) or hint in (caught.value.hint or "")


@pytest.mark.parametrize(("name", "words"), [("m.bin", "pickle"), ("m.pt", "pickle"), ("m.gguf", "not safetensors")])
def test_other_files(name: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="not there"):
        find_weights(tmp_path / name)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(FormatError, match=words):
        find_weights(tmp_path / name)


def test_index_that_names_a_pickle(sharded: Path) -> None:
    write_index(sharded, MAP | {"x": "pytorch_model.bin"})
    with pytest.raises(FormatError, match="pickle") as caught:
        find_weights(sharded)
    assert "safetensors" in (caught.value.hint or "")


def test_a_checkpoint_of_training_has_its_weights_by_a_name(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").write_bytes(b"x")
    for path in (tmp_path, tmp_path / "last.ckpt"):
        with pytest.raises(FormatError, match="pickle") as refused:
            Checkpoint.open(path)
        assert "state_dict" in (refused.value.hint or "")
