"""When two runs are one: what the key is made of, and how two records differ in words."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewright.formats.checkpoint import Checkpoint
from rewright.formats.digest import source_digest
from rewright.passes import keys
from rewright.passes.compress.spec import COMPRESS, CompressOptions
from rewright.passes.errors import InputError
from rewright.passes.inputs import Inputs
from rewright.passes.recipe import Stage
from rewright.passes.run_options import RunOptions
from rewright.passes.spec import fields_of
from rewright.passes.values import Bits, BitsFor, GroupSize, Pattern, Regex, SparsityFor
from tests.passes.conftest import STORIES
from tests.passes.fakes import FAKE, FakeOptions, fake

# For each option of `compress` and of a run another value than the one `_record` has.
OTHER = {
    "bits": Bits(3),
    "group_size": GroupSize(64),
    "symmetric": False,
    "sparsity": 0.25,
    "pattern": Pattern(2, 4),
    "method": "wanda",
    "clip": "minmax",
    "target": "own",
    "mask": "sweep",
    "mask_block": 64,
    "saliency": "quant-aware",
    "sequential": "layer",
    "refine": 5,
    "order": "act",
    "budget": "measured",
    "tune": 5,
    "polish": 5,
    "damp": 0.1,
    "bits_for": (BitsFor("q_proj", 3),),
    "sparsity_for": (SparsityFor("q_proj", 0.1),),
    "samples": 64,
    "sequence_length": 99,
    "skip": (Regex("a"),),
    "format": "dense",
}
# What an option cannot stand beside.
BESIDE = {"order": {"sparsity": None}, "saliency": {"mask": "sweep"}}
SPEED = {
    "device": "cpu",
    "kernels": "reference",
    "threads": 3,
    "eval_text": Path("x"),
    "require": ("x<1",),
    "dry_run": True,
    "json": True,
    "events": Path("x"),
    "check": True,
    "update": True,
    "force": True,
    "quiet": True,
    "verbose": 2,
}
RESULT = {"seed": 1, "dtype": "f32"}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "text.txt"
    path.write_text("once upon a time")
    return path


def _key(*stages: Stage, source: Path = STORIES, **options: Any) -> str:
    digest = source_digest(Checkpoint.open(source))
    return keys.key_of(keys.record(stages, RunOptions(**options), digest, Inputs()))


def _compress(text: Path, **options: Any) -> Stage:
    return Stage(COMPRESS, CompressOptions(**{"sparsity": 0.5, "calibration_text": (text,), **options}))


def test_every_option_is_thought_of() -> None:
    assert OTHER.keys() | {"calibration_text"} == {item.name for item in fields_of(CompressOptions)}
    assert SPEED.keys() | RESULT.keys() == {item.name for item in fields_of(RunOptions)}


@pytest.mark.parametrize("name", OTHER)
def test_every_option_of_the_pass_counts(name: str, text: Path) -> None:
    beside = BESIDE.get(name, {})
    assert _key(_compress(text, **{name: OTHER[name]}, **beside)) != _key(_compress(text, **beside))


@pytest.mark.parametrize("name", RESULT)
def test_seed_and_dtype_count(name: str) -> None:
    assert _key(fake(), **{name: RESULT[name]}) != _key(fake())


@pytest.mark.parametrize("name", SPEED)
def test_how_a_run_goes_does_not_count(name: str) -> None:
    assert _key(fake(), **{name: SPEED[name]}) == _key(fake())


def test_an_option_for_speed_does_not_count() -> None:
    assert _key(fake(speed=9)) == _key(fake())
    assert _key(fake(level=9)) != _key(fake())


def test_passes_their_order_and_their_versions_count() -> None:
    assert len({_key(fake()), _key(fake(), fake()), _key(fake(level=2), fake()), _key(fake(), fake(level=2))}) == 4
    assert _key(Stage(replace(FAKE, version=2), FakeOptions())) != _key(fake())
    assert _key(Stage(replace(FAKE, name="other"), FakeOptions())) != _key(fake())


def test_a_file_counts_by_its_contents(text: Path, tmp_path: Path) -> None:
    other = tmp_path / "another name.txt"
    shutil.copy(text, other)
    assert _key(_compress(other)) == _key(_compress(text))
    assert _key(_compress(text, calibration_text=(text, text))) != _key(_compress(text))
    other.write_text("Once upon a time")
    assert _key(_compress(other)) != _key(_compress(text))


def test_a_source_counts_by_its_contents(tmp_path: Path) -> None:
    copied = Path(shutil.copytree(STORIES, tmp_path / "elsewhere"))
    os.utime(copied / "model.safetensors")
    (copied / "README.md").write_text("words")
    assert _key(fake(), source=copied) == _key(fake())
    data = bytearray((copied / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copied / "model.safetensors").write_bytes(data)
    assert _key(fake(), source=copied) != _key(fake())


def _records() -> tuple[dict[str, Any], dict[str, Any]]:
    stage = {"pass": "compress", "version": 1, "options": {"bits": 4, "calibration-text": ["a" * 64], "skip": []}}
    was = {"source": "s", "seed": 0, "dtype": "auto", "stages": [stage]}
    return was, copy.deepcopy(was)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda now: None, []),
        (lambda now: now.update(source="t"), ["the source's contents changed"]),
        (lambda now: now.update(seed=4, dtype="f32"), ["`--seed` was 0, is 4", "`--dtype` was auto, is f32"]),
        (lambda now: now["stages"][0]["options"].update(bits=3), ["`--bits` was 4, is 3"]),
        (lambda now: now["stages"][0]["options"].update({"skip": ["x"]}), ['`--skip` was not given, is ["x"]']),
        (lambda now: now["stages"][0]["options"].update({"new": None}), []),
        (lambda now: now["stages"][0]["options"].update({"new": 1}), ["`--new` was not given, is 1"]),
        (
            lambda now: now["stages"][0]["options"].update({"calibration-text": []}),
            ["the contents of `--calibration-text` changed"],
        ),
        (lambda now: now["stages"][0].update(version=2), ["`compress` was version 1, is 2"]),
        (lambda now: now["stages"].append(now["stages"][0]), ["passes were `compress`, are `compress + compress`"]),
    ],
)
def test_differences_in_words(change: Any, said: list[str]) -> None:
    was, now = _records()
    change(now)
    found = keys.differences(was, now)
    assert found == said or (not said and found == (["it was recorded by another version of Rewright"] * (was != now)))


def test_differences_in_a_chain_name_the_stage() -> None:
    was, now = _records()
    for record in (was, now):
        record["stages"].append(copy.deepcopy(record["stages"][0]))
    now["stages"][1]["options"]["bits"] = 8
    for stage in now["stages"]:
        stage["options"]["calibration-text"] = ["b" * 64]
    said = keys.differences(was, now)
    assert sorted(said) == ["stage 2: `--bits` was 4, is 8", "the contents of `--calibration-text` changed"]


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
KNOWN = st.sampled_from(["source", "seed", "dtype", "stages", "pass", "version", "options", "bits"])
SHAPED = st.recursive(JSON, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KNOWN, inner), max_leaves=8)


@given(SHAPED, st.booleans(), KNOWN)
def test_differences_never_raise(broken: Any, inside: bool, key: str) -> None:
    was, now = _records()
    if inside and key in was["stages"][0]:
        was["stages"][0][key] = broken
    elif inside:
        was[key] = broken
    found = keys.differences(was if inside else broken, now)
    assert all(isinstance(phrase, str) and phrase for phrase in found)
    assert bool(found) == ((was if inside else broken) != now)


def test_the_key_is_a_digest_of_the_record_alone() -> None:
    was, now = _records()
    now = dict(reversed(now.items()))
    assert keys.key_of(was) == keys.key_of(json.loads(json.dumps(now)))
    assert re.fullmatch(r"[0-9a-f]{64}", keys.key_of(was))


def test_inputs_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = Inputs()
    with pytest.raises(InputError, match=r"cannot be read: no such file or directory$"):
        inputs.digest(tmp_path / "absent")
    with pytest.raises(InputError, match="is a directory, not a text file"):
        inputs.digest(tmp_path)
    file = tmp_path / "file"
    file.write_text("one")
    digest = inputs.digest(file)
    file.write_text("two")
    assert inputs.digest(file) == digest
    with pytest.raises(InputError, match="changed while it was in use"):
        inputs.read(file)


def test_standard_input_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"text")
    os.close(writer)
    with open(reader) as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        inputs = Inputs()
        assert inputs.digest(Path("-")) == inputs.digest(Path("-"))
        assert inputs.read(Path("-")) == inputs.read(Path("-")) == b"text"
