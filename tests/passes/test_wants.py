"""What a spec says that a pass wants is refused before any work where it is not there."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from rewright.cli.exits import INPUT, USAGE, Verdict, judge
from rewright.formats.errors import Refusal
from rewright.passes import registry
from rewright.passes.calibration import TOKENIZER_FILES
from rewright.passes.errors import InputError
from rewright.passes.recipe import Stage, make
from rewright.passes.spec import Layout
from tests.passes.compressing import compress
from tests.passes.conftest import DATA, STORIES
from tests.passes.fakes import FAKE, FakeOptions, fake, go
from tests.passes.outputs import beside


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return Path(shutil.copytree(STORIES, tmp_path / "model"))


@pytest.fixture
def dst(tmp_path: Path) -> Path:
    return tmp_path / "out"


def _wanting(*wants: str, file: Path | None = None, **said: Any) -> Stage:
    return Stage(replace(FAKE, wants=frozenset(wants), **said), FakeOptions(file=file))


def _refused(src: Path, dst: Path, *stages: Stage) -> Verdict:
    """How a run is refused, with nothing left beside its destination."""
    with pytest.raises(Refusal) as caught:
        go(src, dst, *stages)
    assert beside(dst) == [], "refused at the sight of the headers"
    assert not dst.exists()
    return judge(caught.value)


def test_a_config(src: Path, dst: Path) -> None:
    (src / "config.json").unlink()
    refusal = _refused(src, dst, fake(), _wanting("config"))
    assert refusal.message == f"stage 2 (fake): `{src}` has no `config.json`"
    assert (refusal.code, refusal.hint) == (INPUT, "`fake` needs the whole checkpoint directory")


def test_weights(src: Path, dst: Path) -> None:
    save_file({}, src / "model.safetensors")
    refusal = _refused(src, dst, _wanting("weights"))
    assert (refusal.code, refusal.message) == (INPUT, f"`{src}` holds no tensor, and `fake` is about tensors")
    go(src, dst, _wanting("config"))


def test_a_tokenizer_is_looked_for_under_all_its_names(src: Path, dst: Path) -> None:
    for name in TOKENIZER_FILES:
        (src / name).unlink(missing_ok=True)
    refusal = _refused(src, dst, _wanting("tokenizer"))
    assert refusal.message == (
        f"`{src}` has no tokenizer, and `fake` needs one: there is none of `tokenizer.json`, `tokenizer.model`,"
        " `vocab.json`, `tokenizer_config.json`"
    )
    assert (refusal.code, refusal.hint) == (INPUT, "put the model's tokenizer files beside its weights")
    (src / "vocab.json").write_text("{}")
    go(src, dst, _wanting("tokenizer"))


def test_a_text(src: Path, dst: Path, tmp_path: Path) -> None:
    refusal = _refused(src, dst, _wanting("text"))
    assert (refusal.code, refusal.message) == (USAGE, "`fake` needs a text, and none is named")
    assert refusal.hint == "name one with `--file`"
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time")
    go(src, dst, _wanting("text", file=text))


def test_a_model_type(src: Path, dst: Path) -> None:
    refusal = _refused(src, dst, fake(), _wanting(archs=frozenset({"gpt2", "bloom"})))
    assert refusal.message == "stage 2 (fake): model type `llama` is not one that `fake` takes"
    assert (refusal.code, refusal.hint) == (INPUT, "known: `bloom`, `gpt2`")
    go(src, dst, _wanting(archs=frozenset({"gpt2", "llama"})))


@pytest.mark.parametrize("said", [{}, {"model_type": ["llama"]}, {"model_type": None}])
def test_a_config_without_a_model_type(said: dict[str, Any], src: Path, dst: Path) -> None:
    (src / "config.json").write_text(json.dumps(said))
    refusal = _refused(src, dst, _wanting(archs=frozenset({"llama"})))
    assert f"model type `{said.get('model_type')}` is not one" in refusal.message


def test_a_model_type_that_an_earlier_stage_makes(src: Path, dst: Path) -> None:
    """The stage is given what the one before would write, not what the run began with."""

    def turned(options: FakeOptions, layout: Layout) -> Any:
        guess = FAKE.estimate(options, layout)
        return replace(guess, layout=replace(layout, config={**layout.config, "model_type": "gpt2"}))

    go(src, dst, _wanting(estimate=turned), _wanting(archs=frozenset({"gpt2"})))


def test_options_may_do_without(src: Path, dst: Path) -> None:
    for name in TOKENIZER_FILES:
        (src / name).unlink(missing_ok=True)
    go(src, dst, _wanting("text", "tokenizer", spares=lambda options: frozenset({"text", "tokenizer"})))


def test_compress_wants_a_tokenizer_for_its_text(src: Path, dst: Path) -> None:
    for name in TOKENIZER_FILES:
        (src / name).unlink(missing_ok=True)
    with pytest.raises(InputError, match="has no tokenizer, and `compress` needs one: there is none of"):
        compress(src, dst, DATA / "tinystories.txt")
    assert beside(dst) == []
    compress(src, dst, method="rtn")


def test_passes_say_what_they_read(src: Path, dst: Path, tmp_path: Path) -> None:
    """Each does its work with what it says it wants, and nothing else beside its weights."""
    bare = tmp_path / "bare.safetensors"
    shutil.copy(src / "model.safetensors", bare)
    for path in src.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            path.unlink()
    rtn = make(1, "compress", {"method": "rtn", "group-size": 32})
    assert rtn.spec.needs(rtn.options) == {"weights", "config"}
    assert registry.get("convert").wants == {"weights", "config"}
    assert registry.get("cast").wants == {"weights"}
    taken = make(1, "prompt", {"steps": 0, "init": "prompt.safetensors"})
    assert taken.spec.needs(taken.options) == {"weights", "config"}
    go(src, dst, rtn, make(2, "convert", {"to": "dense"}))
    go(bare, tmp_path / "cast", make(1, "cast", {"to": "bf16"}))
