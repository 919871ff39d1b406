"""`cast` refused, and `cast` killed: nothing is published, and the same command ends as if nothing had been."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rewright.formats.errors import FormatError, Refusal
from rewright.passes.errors import UsageError
from rewright.passes.recipe import make as make_stage
from tests.passes.casting import cast, write
from tests.passes.compressing import change
from tests.passes.conftest import STORIES
from tests.passes.converting import config
from tests.passes.forks import Forks, Strike
from tests.passes.outputs import beside, contents


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"to": "f64"}, "`to` must be one of f8_e4m3, f32, f16, bf16, not `f64`"),
        ({}, "`to` is required"),
        ({"to": "bf16", "keep": ["("]}, r"`keep` `\(` is not a regular expression: "),
        ({"to": "bf16", "max-shard-size": "5 apples"}, "`max-shard-size` must be a size as `5GB`, `16GiB` or"),
    ],
)
def test_words_that_cannot_be_meant(options: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        make_stage(1, "cast", options)


def _spoil(tensors: dict[str, torch.Tensor], value: float) -> None:
    tensors["model.layers.3.mlp.up_proj.weight"][1, 2] = value


@pytest.mark.parametrize(
    ("value", "to", "code", "told"),
    [
        (1e5, "f16", 5, "holds 100000, past the 65504 that float16 reaches"),
        (-449.0, "f8_e4m3", 5, "holds -449, past the 448 that float8_e4m3fn reaches"),
        (float("inf"), "f8_e4m3", 5, "holds inf, past the 448 that float8_e4m3fn reaches"),
        (3.4e38, "bf16", 5, "holds 3.4e+38, past the 3.38953e+38 that bfloat16 reaches"),
        (float("inf"), "f16", 0, ""),
        (float("nan"), "f8_e4m3", 0, ""),
        (448.0, "f8_e4m3", 0, ""),
    ],
)
def test_values_that_do_not_fit(forks: Forks, value: float, to: str, code: int, told: str, tmp_path: Path) -> None:
    src = change(Path(shutil.copytree(STORIES, tmp_path / "src")), lambda tensors: _spoil(tensors, value))
    ended = forks.run("cast", src, tmp_path / "out", "--to", to)
    assert (ended.code, ended.out) == (code, ""), ended.err
    if code:
        lines = ended.err.strip().splitlines()
        assert lines[-3] == f"error: tensor `model.layers.3.mlp.up_proj.weight` {told}"
        assert lines[-1].startswith("hint: leave the tensor as it is with `--keep`")
        assert beside(tmp_path / "out") == []
        assert not (tmp_path / "out").exists()
        assert forks.run("cast", src, tmp_path / "out", "--to", to, "--keep", "up_proj").code == 0


def test_a_keep_that_nothing_has(forks: Forks, tmp_path: Path) -> None:
    for words in ((), ("--dry-run",)):
        ended = forks.run(
            "cast", *words, STORIES, tmp_path / "out", "--to", "bf16", "--keep", "norm", "--keep", "gate$"
        )
        assert ended.code == 2
        assert "error: `--keep gate$` matches no tensor\n" in ended.err
    assert beside(tmp_path / "out") == []


def test_hostile_files(tmp_path: Path) -> None:
    src = write(tmp_path / "src", {"a.weight": torch.ones(2)}, dtype="float32")
    whole = (src / "model.safetensors").read_bytes()
    (src / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(FormatError, match="ends at byte 8 of 7"):
        cast(src, tmp_path / "out", "bf16")
    (src / "model.safetensors").write_bytes(whole.replace(b'"F32"', b'"F23"'))
    with pytest.raises(FormatError, match="unknown dtype `F23`"):
        cast(src, tmp_path / "out", "bf16")
    (src / "model.safetensors").write_bytes(whole)
    for broken in ("[]", '{"dtype": "float32", "dtype": "float16"}', '{"dtype": NaN}', "{"):
        (src / "config.json").write_text(broken)
        with pytest.raises(Refusal):
            cast(src, tmp_path / "out", "bf16")
    for odd in ({"dtype": 3, "text_config": None}, {"dtype": {"a": "float32"}}, {"text_config": ["dtype"]}):
        (src / "config.json").write_text(json.dumps(odd))
        cast(src, tmp_path / "odd", "bf16")
        assert config(tmp_path / "odd") == {**odd, "dtype": "bfloat16"}
        shutil.rmtree(tmp_path / "odd")
    assert beside(tmp_path / "out") == []


def test_killed_at_any_moment(forks: Forks, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """At changes to the disk drawn at random and at all to the journal: the same command ends in equal bytes."""
    whole, dst = tmp_path / "whole", tmp_path / "out"

    def words(to: Path) -> list[str | Path]:
        return ["cast", "--threads", "1", tiny("llama"), to, "--to", "bf16", "--max-shard-size", "20kB"]

    changes = forks.changes(*words(whole))
    moments = [Strike(number) for number in random.Random().sample(range(1, changes), 6)]
    moments += [Strike(number, "journal.jsonl") for number in range(1, 5)]
    for strike in moments:
        ended = forks.run(*words(dst), strike=strike)
        assert ended.code == -signal.SIGKILL, (strike, ended.err)
        ended = forks.run(*words(dst))
        assert ended.code == 0, (strike, ended.err)
        assert contents(dst) == contents(whole), strike
        assert all(name.startswith("out.lock") for name in beside(dst)), strike
        shutil.rmtree(dst)


def test_finished_layers_are_not_done_again(forks: Forks, tmp_path: Path) -> None:
    dst, events = tmp_path / "out", tmp_path / "events.jsonl"
    words = ["cast", STORIES, dst, "--to", "bf16"]
    assert forks.run(*words, strike=Strike(4, "journal.jsonl")).code == -signal.SIGKILL
    assert forks.run(*words, "--events", events).code == 0
    told = [json.loads(line) for line in events.read_text().splitlines()]
    done = [event["unit"] for event in told if event["event"] == "written"]
    # the journal is begun, and two of five layers and the rest are in it
    assert len(done) == 4
