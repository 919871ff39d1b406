"""What a run tells of itself: the report's parts, and the picture beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rewright.passes.compress import picture
from rewright.passes.compress.plan import draw_up
from rewright.passes.compress.report import kinds_of
from rewright.passes.compress.spec import CompressOptions
from rewright.passes.spec import Layout
from rewright.passes.values import GroupSize
from tests.passes.compressing import compress, report
from tests.passes.conftest import STORIES

LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def kinds(model_type: str, *names: str, **config: object) -> list[str]:
    tensors = {name: ("F32", (64, 64, 64)[: 2 + (not name.endswith(".weight"))]) for name in names}
    said = CompressOptions(method="rtn", group_size=GroupSize(32), format="dense")
    return list(dict.fromkeys(kinds_of(draw_up(said, Layout(tensors, {"model_type": model_type, **config}))).values()))


def test_kinds_come_as_a_forward_reaches_them() -> None:
    attention = [f"self_attn.{part}_proj" for part in "okqv"]
    names = [
        f"model.layers.{layer}.{part}.weight"
        for layer in (0, 1)
        for part in ("mlp.down_proj", "mlp.up_proj", *attention)
    ]
    assert kinds("llama", *names) == ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


def test_kinds_that_end_alike_are_told_apart() -> None:
    names = [f"transformer.h.0.{part}.weight" for part in ("mlp.c_proj", "attn.c_proj", "attn.c_attn")]
    assert kinds("gpt2", *names) == ["c_attn", "attn.c_proj", "mlp.c_proj"]


def test_experts_are_one_kind_each() -> None:
    parts = [f"block_sparse_moe.experts.{expert}.{part}" for expert in (0, 1) for part in ("w2", "w1", "w3")]
    names = [f"model.layers.0.{part}.weight" for part in ("self_attn.o_proj", *parts)]
    assert kinds("mixtral", *names, num_local_experts=2) == ["o_proj", "w1", "w3", "w2"]
    names = [f"model.layers.0.mlp.experts.{part}" for part in ("down_proj", "gate_up_proj")]
    assert kinds("gpt_oss", *names, num_local_experts=64) == ["gate_up_proj", "down_proj"]


def test_the_report_of_a_run(text: Path, tmp_path: Path) -> None:
    compress(STORIES, tmp_path / "out", text, sparsity=0.25)
    told = report(tmp_path / "out")
    assert told["options"] | {"sparsity": 0.25, "refine": 3, "sequence-length": 64} == told["options"]
    assert "calibration-text" not in told["options"]
    assert [row["kind"] for row in told["kinds"]] == list(LLAMA)
    for kind in told["kinds"]:
        rows = [row for row in told["matrices"] if row["kind"] == kind["kind"]]
        assert kind["matrices"] == len(rows) == 5
        assert kind["weights"] == sum(row["rows"] * row["columns"] for row in rows)
        assert kind["error_held_out"] == pytest.approx(sum(row["error_held_out"] for row in rows) / 5)
        assert kind["worst"] == max(rows, key=lambda row: row["error_held_out"])["name"]
    assert {row["sparsity_asked"] for row in told["matrices"]} == {0.25}
    assert told["summary"]["matrices"] == 35
    assert (tmp_path / "out/reports/compress.svg").read_bytes() == picture.draw(told)


def test_a_run_without_a_text_has_no_picture(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    compress(tiny("llama"), tmp_path / "out", method="rtn")
    assert report(tmp_path / "out")["summary"]["error_held_out"] is None
    assert [path.name for path in (tmp_path / "out/reports").iterdir()] == ["compress.json"]
