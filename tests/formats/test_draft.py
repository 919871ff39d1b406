"""Drafts: layout, streaming, resuming."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from rewright.formats.checkpoint import Checkpoint
from rewright.formats.draft import WRITTEN, Draft, TensorSpec
from rewright.formats.errors import ConflictError, FormatError
from rewright.formats.provenance import read_stamp
from tests.formats.samples import copied, tensors


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
