"""Drafts: layout, streaming, resuming, sidecars, the stamp."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from rewright.formats import carry
from rewright.formats.checkpoint import Checkpoint
from rewright.formats.digest import sha256_file, source_digest
from rewright.formats.draft import WRITTEN, Draft, TensorSpec
from rewright.formats.errors import ConflictError, FormatError
from rewright.formats.provenance import read_stamp
from tests.formats.samples import CONFIG, snapshot, tensors


def layout_of(ckpt: Checkpoint) -> list[TensorSpec]:
    return [TensorSpec(entry.name, entry.dtype, entry.shape) for entry in ckpt.entries.values()]


def copied(src: Path, dst: Path, max_shard_bytes: int = 5 * 10**9) -> Draft:
    """A draft of everything in `src`, not sealed."""
    ckpt = Checkpoint.open(src)
    draft = Draft(dst)
    draft.declare(layout_of(ckpt), max_shard_bytes)
    for name in ckpt.entries:
        draft.copy(name, ckpt)
    draft.carry(ckpt)
    return draft


@pytest.mark.parametrize("most", [5 * 10**9, 40, 1])
def test_copy_is_equal(most: int, model: Path, tmp_path: Path) -> None:
    copied(model, tmp_path / "out", most).seal({})
    expected = tensors()
    found: dict[str, torch.Tensor] = {}
    weights = sorted((tmp_path / "out").glob("*.safetensors"))
    assert (len(weights) == 1) == (most > 1000)
    for file in weights:
        with safetensors.safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
        found |= safetensors.torch.load_file(file)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    again = Checkpoint.open(tmp_path / "out")
    assert all(torch.equal(again.read(name), expected[name]) for name in expected)
    if most == 1:
        index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == again.total_bytes
        assert set(index["weight_map"]) == set(expected)


def test_tensors_start_aligned(tmp_path: Path) -> None:
    draft = Draft(tmp_path / "out")
    draft.declare([TensorSpec("a", "U8", (3,)), TensorSpec("b", "F64", (1,)), TensorSpec("c", "F16", (1,))])
    for name, dtype, shape in (("a", torch.uint8, 3), ("b", torch.float64, 1), ("c", torch.float16, 1)):
        draft.write(name, torch.ones(shape, dtype=dtype))
    draft.put("config.json", b"{}")
    draft.seal({})
    for entry in Checkpoint.open(tmp_path / "out").entries.values():
        assert entry.offset % (entry.nbytes if entry.name != "a" else 1) == 0


def test_any_strides(tmp_path: Path) -> None:
    base = torch.randn(6, 10)
    views = {
        "turned": base.T,
        "stepped": base[::2, 1::3],
        "spread": torch.ones(1, 1).expand(4, 5),
        "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
        "point": base[1, 2],
        "none": base[:0],
        "grad": torch.nn.Parameter(base[:1]),
    }
    draft = Draft(tmp_path / "out")
    draft.declare(
        [TensorSpec(name, "C64" if view.is_complex() else "F32", tuple(view.shape)) for name, view in views.items()]
    )
    for name, view in views.items():
        draft.write(name, view)
        assert torch.equal(draft.read(name), view.detach())


def test_write_checks(tmp_path: Path, model: Path) -> None:
    draft = Draft(tmp_path / "out")
    draft.declare([TensorSpec("w", "F32", (2,)), TensorSpec("norm", "F16", (4,))])
    for wrong in (torch.ones(2, dtype=torch.float64), torch.ones(3), torch.ones(2, 1)):
        with pytest.raises(FormatError, match=r"but the layout says F32 \[2\]"):
            draft.write("w", wrong)
    with pytest.raises(FormatError, match="`x` is not in the layout"):
        draft.write("x", torch.ones(2))
    with pytest.raises(FormatError, match="not written yet"):
        draft.read("w")
    with pytest.raises(FormatError, match="but the layout says F16"):
        draft.copy("norm", Checkpoint.open(model), "model.norm.weight")


def test_copy_under_another_name(tmp_path: Path, model: Path) -> None:
    draft = Draft(tmp_path / "out")
    draft.declare([TensorSpec("norm", "F32", (4,))])
    draft.copy("norm", Checkpoint.open(model), "model.norm.weight")
    assert torch.equal(draft.read("norm"), tensors()["model.norm.weight"])


@pytest.mark.parametrize(
    "layout",
    [
        [TensorSpec("w", "F32", (1,)), TensorSpec("w", "F32", (1,))],
        [TensorSpec("../w", "F32", (1,))],
        [TensorSpec("w", "F32", (-1,))],
        [TensorSpec("w", "F31", (1,))],
        [TensorSpec("w", "F4", (1,))],
        [TensorSpec("w", "F32", (2**62, 4))],
    ],
)
def test_layouts_that_cannot_be(layout: list[TensorSpec], tmp_path: Path) -> None:
    with pytest.raises(FormatError):
        Draft(tmp_path / "out").declare(layout)
    assert list((tmp_path / "out").iterdir()) == []


def test_resume_keeps_what_was_synced(tmp_path: Path) -> None:
    layout = [TensorSpec(name, "F32", (4,)) for name in "abc"]
    first = Draft(tmp_path / "out")
    first.declare(layout, max_shard_bytes=20)
    first.write("a", torch.full((4,), 1.0))
    first.sync()
    first.write("b", torch.full((4,), 2.0))
    second = Draft(tmp_path / "out")
    second.declare(layout, max_shard_bytes=20)
    assert second.written == {"a"}
    assert torch.equal(second.read("a"), torch.full((4,), 1.0))
    second.write("b", torch.full((4,), 3.0))
    with pytest.raises(FormatError, match="1 declared tensors were not written, the first `c`"):
        second.seal({})
    second.write("c", torch.full((4,), 4.0))
    second.seal({"key": "k"})
    assert not (tmp_path / "out" / WRITTEN).exists()
    ckpt = Checkpoint.open(tmp_path / "out")
    assert [ckpt.read(name)[0].item() for name in "abc"] == [1.0, 3.0, 4.0]


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """A writer is killed again and again; what a resume counts as written is written, and the end is the same."""
    code = (
        "import sys, torch\n"
        "from rewright.formats.draft import Draft, TensorSpec\n"
        "layout = [TensorSpec(f't{at}', 'F32', (5000,)) for at in range(200)]\n"
        "draft = Draft(sys.argv[1])\n"
        "draft.declare(layout, max_shard_bytes=400_000)\n"
        "for at, spec in enumerate(layout):\n"
        "    value = torch.full((5000,), float(at))\n"
        "    if spec.name in draft.written:\n"
        "        assert torch.equal(draft.read(spec.name), value), spec.name\n"
        "        continue\n"
        "    draft.write(spec.name, value)\n"
        "    draft.sync()\n"
        "    print(len(draft.written), flush=True)\n"
        "draft.put('config.json', b'{}')\n"
        "draft.seal({})\n"
    )
    out, done = tmp_path / "out", 0
    for lines in (1, 17, 40):
        with subprocess.Popen([sys.executable, "-c", code, out], stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            for _ in range(lines):
                done = int(child.stdout.readline())
            child.kill()
        assert read_stamp(out) is None
        assert len((out / WRITTEN).read_text().split()) >= done
    subprocess.run([sys.executable, "-c", code, out], check=True, stdout=subprocess.DEVNULL)
    ckpt = Checkpoint.open(out)
    assert len(ckpt.files) == 10
    assert all(torch.equal(ckpt.read(f"t{at}"), torch.full((5000,), float(at))) for at in range(200))
    assert not (out / WRITTEN).exists()


@pytest.mark.parametrize("left", [b"", b"\0" * 500])
def test_resume_over_a_file_that_was_just_begun(left: bytes, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/model.safetensors").write_bytes(left)
    draft = Draft(tmp_path / "out")
    draft.declare([TensorSpec("a", "F32", (4,))])
    assert draft.written == frozenset()
    draft.write("a", torch.ones(4))
    assert torch.equal(draft.read("a"), torch.ones(4))


def test_a_record_cut_short_costs_one_tensor(tmp_path: Path) -> None:
    draft = Draft(tmp_path / "out")
    layout = [TensorSpec(name, "F32", (1,)) for name in ("a", "ab")]
    draft.declare(layout)
    for spec in layout:
        draft.write(spec.name, torch.ones(1))
    draft.sync()
    log = tmp_path / "out" / WRITTEN
    log.write_bytes(log.read_bytes()[:-2])
    again = Draft(tmp_path / "out")
    again.declare(layout)
    assert again.written == {"a"}


def test_another_layout_conflicts(tmp_path: Path) -> None:
    draft = Draft(tmp_path / "out")
    draft.declare([TensorSpec("a", "F32", (4,))])
    with pytest.raises(ConflictError, match="another layout") as caught:
        Draft(tmp_path / "out").declare([TensorSpec("a", "F32", (5,))])
    assert caught.value.hint
    with pytest.raises(ConflictError, match="another layout"):
        Draft(tmp_path / "out").declare([TensorSpec("a", "F32", (4,)), TensorSpec("b", "F32", (1,))], 1)


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


def test_a_tensor_in_parts(tmp_path: Path) -> None:
    """It counts as written when all of them are there; those that were synced outlive the process."""
    layout = [TensorSpec("e", "F32", (3, 2, 4)), TensorSpec("x", "F32", (2,))]
    whole = torch.randn(3, 2, 4)
    first = Draft(tmp_path / "d")
    first.declare(layout)
    first.write("e", whole[1], part=1)
    first.sync()
    first.write("e", whole[0], part=0)
    assert "e" not in first.written
    draft = Draft(tmp_path / "d")
    draft.declare(layout)
    assert torch.equal(draft.read("e", part=1), whole[1])
    with pytest.raises(FormatError, match="`e` was not written yet"):
        draft.read("e", part=0)
    with pytest.raises(FormatError, match="has no entries 3 to 4"):
        draft.write("e", whole[0], part=3)
    with pytest.raises(FormatError, match=r"layout says F32 \[2, 4\]"):
        draft.write("e", whole, part=0)
    draft.write("e", whole[2].t().contiguous().t(), part=2)
    draft.write("e", whole[0], part=0)
    draft.sync()
    again = Draft(tmp_path / "d")
    again.declare(layout)
    assert again.written == {"e"}
    assert torch.equal(again.read("e"), whole)
