"""`eval --arms` and `transfer`: what prompts win back, and what they are worth elsewhere."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from rewright.formats import peft
from rewright.passes.arms import ARMS, compare_arms
from rewright.passes.context import Silent
from rewright.passes.evaluate import evaluate
from rewright.passes.run_options import RunOptions
from rewright.passes.training import Training
from tests.passes.compressing import change, compress
from tests.passes.conftest import DATA, ROUNDED, STORIES, make
from tests.passes.outputs import beside, contents, stamp
from tests.passes.prompting import attached, prompt

LENGTH = ("--sequence-length", "32")


@dataclass(frozen=True)
class Models:
    """stories260K at 3 bits and at 2, each with a prompt; what they learned from, and what they did not."""

    w3: Path
    w2: Path
    text: Path
    held: Path
    foreign: Path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("arms")
    stories = (DATA / "tinystories_heldout.txt").read_text().split("<|endoftext|>")
    made = Models(folder / "w3", folder / "w2", folder / "text.txt", folder / "held.txt", folder / "foreign.txt")
    made.text.write_text((DATA / "tinystories.txt").read_text()[:40_000])
    made.held.write_text("<|endoftext|>".join(stories[:6]))
    made.foreign.write_text("<|endoftext|>".join(f"int main(void) {{ return {number}; }}" for number in range(12)))
    for out, bits in ((made.w3, 3), (made.w2, 2)):
        compress(STORIES, folder / f"bare{bits}", **{**ROUNDED, "bits": bits})
        more = {"loss": "distill", "teacher": STORIES} if bits == 3 else {}
        prompt(folder / f"bare{bits}", out, made.text, seed=bits, **more)
    return made


@pytest.fixture
def own(models: Models, tmp_path: Path) -> Path:
    """The model of 3 bits, the test's own."""
    return Path(shutil.copytree(models.w3, tmp_path / "own"))


@pytest.fixture(scope="module")
def known(models: Models) -> Path:
    """The same beside the dense model's prompt; not to be written to."""
    out = Path(shutil.copytree(models.w3, models.w3.with_name("known")))
    silent = Silent()
    compare_arms(out, STORIES, [models.held], sequence_length=32, options=RunOptions(threads=1), reporter=silent)
    return out


def _arms(model: Path, models: Models, *more: str | Path) -> list[str]:
    return [str(word) for word in ("eval", model, "--text", models.held, "--arms", "--dense", STORIES, *LENGTH, *more)]


def test_the_five_arms(call: Any, models: Models, own: Path) -> None:
    """All on the same tokens, and each what `eval` says of it alone."""
    before = contents(own)
    ended = call(*_arms(own, models, "--foreign", models.foreign, "--json"))
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert (found["prompt_tokens"], found["sequence_length"]) == (4, 32)
    assert "8 steps of distill" in found["learned"]
    assert contents(own) == before, "nothing is written into a finished checkpoint"
    twin = own.with_name("own.dense-prompt")
    assert beside(own) == ["own.dense-prompt"]
    (learned,) = stamp(twin)["stages"]
    asked = stamp(own)["stages"][-1]["options"]
    assert learned["options"] == {**asked, "loss": "next-token", "teacher": None}
    assert learned["seed"] == 3
    prompts: list[bool | Path] = [False, False, True, peft.found_in(twin), peft.found_in(twin)]
    arms = list(zip(ARMS, (STORIES, own, own, STORIES, own), prompts, strict=True))
    for path, told in zip((models.held, models.foreign), found["texts"], strict=True):
        assert told["text"]["name"] == path.name
        for arm, model, with_it in arms if path == models.held else ():
            alone = evaluate(model, text=path, sequence_length=32, prompt=with_it)
            assert told["perplexity"][arm] == pytest.approx(alone["perplexity"], rel=1e-6), arm
            assert told["scored_tokens"] == alone["scored_tokens"]
        dense, compressed, prompted = (told["perplexity"][arm] for arm in ARMS[:3])
        assert told["recovery"] == pytest.approx((compressed - prompted) / (compressed - dense))


def test_the_table_and_no_second_training(
    call: Any, models: Models, known: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # from any folder, by any name
    monkeypatch.setattr(Training, "_update", None)
    monkeypatch.chdir(known)
    first = call(*_arms(Path(), models, "--foreign", models.foreign))
    assert first.code == 0, first.err
    rows = {line.split("  ")[0]: line.split()[-2:] for line in first.out.splitlines()}
    assert list(rows) == ["perplexity", *ARMS, "won back", "scored tokens"]
    assert rows["perplexity"] == ["held.txt", "foreign.txt"]
    assert rows["won back"][-1] == "%"
    assert f"the dense model's own prompt: `{known}.dense-prompt`" in first.err


def test_all_windows_of_a_document(call: Any, models: Models, known: Path) -> None:
    (every,) = json.loads(call(*_arms(known, models, "--json", "--per-document", "all")).out)["texts"]
    assert every["scored_tokens"] > 6 * 31
    alone = evaluate(known, text=models.held, sequence_length=32, per_document="all")
    assert every["perplexity"]["compressed + prompt"] == pytest.approx(alone["perplexity"], rel=1e-6)


def test_nothing_lost_is_nothing_won_back(call: Any, models: Models, tmp_path: Path) -> None:
    prompt(STORIES, tmp_path / "dense", models.text, steps=2)
    ended = call(*_arms(tmp_path / "dense", models))
    assert ended.code == 0, ended.err
    (line,) = [line for line in ended.out.splitlines() if line.startswith("won back")]
    assert line.split()[-1] == "-"


def test_arms_that_cannot_be_compared(call: Any, models: Models, own: Path, tmp_path: Path) -> None:
    bare = models.w3.with_name("bare3")
    cases: list[tuple[list[str], int, str]] = [
        (_arms(bare, models), 3, f"`{bare}` has no prompt attached"),
        (["eval", str(own), "--text", "t", "--arms"], 2, "`--arms` and `--dense MODEL` go together"),
        (["eval", str(own), "--text", "t", "--dense", "m"], 2, "`--arms` and `--dense MODEL` go together"),
        (["eval", str(own), "--choices", "c", "--arms", "--dense", "m"], 2, "`--arms` scores texts and nothing else"),
        (_arms(own, models, "--by-layer"), 2, "`--arms` scores texts and nothing else"),
        (_arms(own, models, "--compare", "m"), 2, "`--arms` scores texts and nothing else"),
        (_arms(own, models, "--no-prompt"), 2, "`--arms` is about the prompt that `--no-prompt` leaves out"),
        (["eval", str(own), "--text", "t", "--foreign", "f"], 2, "`--foreign` goes with `--arms`"),
        (_arms(tmp_path / "none", models), 3, "is not there"),
    ]
    for words, code, told in cases:
        ended = call(*words)
        assert (ended.code, ended.out) == (code, ""), (words, ended.err)
        assert f"error: {told}" in ended.err or told in ended.err, ended.err
    assert beside(own) == []


def test_a_prompt_whose_learning_is_not_known(call: Any, models: Models, own: Path, tmp_path: Path) -> None:
    prompt(models.w2.with_name("bare2"), tmp_path / "taken", steps=0, init=models.w3)
    ended = call(*_arms(tmp_path / "taken", models))
    assert (ended.code, "was learned elsewhere" in ended.err) == (3, True)
    (own / "rewright.json").unlink()
    ended = call(*_arms(own, models))
    assert (ended.code, "does not say how its prompt was learned" in ended.err) == (3, True)


def test_a_text_that_changed_since(call: Any, models: Models, tmp_path: Path) -> None:
    """The dense model would learn from something else."""
    text = tmp_path / "text.txt"
    shutil.copy(models.text, text)
    prompt(models.w3.with_name("bare3"), tmp_path / "out", text, steps=1)
    text.write_text(text.read_text() + " The end.")
    ended = call(*_arms(tmp_path / "out", models))
    assert (ended.code, beside(tmp_path / "out")) == (3, [])
    assert "the contents of `--text` changed since the prompt of" in ended.err
    text.unlink()
    ended = call(*_arms(tmp_path / "out", models))
    assert (ended.code, "cannot be read" in ended.err) == (3, True)


def test_a_dense_model_that_is_another(call: Any, models: Models, own: Path, tmp_path: Path) -> None:
    other = make("llama", tmp_path / "other")
    words = _arms(own, models)
    words[words.index("--dense") + 1] = str(other)
    ended = call(*words)
    assert ended.code == 3
    assert f"`{other}` is not what `{own}` was made of: its embedding is 512 x 32, not 512 x 64" in ended.err
    twin = Path(shutil.copytree(STORIES, tmp_path / "twin"))
    change(twin, lambda tensors: tensors["model.embed_tokens.weight"].add_(0.1))
    words[words.index("--dense") + 1] = str(twin)
    ended = call(*words)
    assert ended.code == 0
    assert f"warning: `{twin}` has another embedding than `{own}`" in ended.err


def _transfer(models: Models, *more: str | Path) -> list[str]:
    texts = ("--text", models.held, "--text", models.foreign)
    return [str(word) for word in ("transfer", models.w3, models.w2, *texts, *LENGTH, *more)]


def test_the_transfer_grid(call: Any, models: Models, tmp_path: Path) -> None:
    """A row for each prompt and one for none, a column for each text and model, and a picture of it."""
    picture = tmp_path / "grid.svg"
    ended = call(*_transfer(models, "--json", "--picture", picture))
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    places = [str(models.w3), str(models.w2)]
    assert found["columns"] == [
        {"text": path.name, "model": place} for path in (models.held, models.foreign) for place in places
    ]
    assert list(found["perplexity"]) == ["no prompt", *places]
    assert found["sequence_length"] == 32
    for row, values in found["perplexity"].items():
        for column, value in zip(found["columns"], values, strict=True):
            if column["text"] == "held.txt":
                continue
            with_it = False if row == "no prompt" else peft.found_in(Path(row))
            alone = evaluate(column["model"], text=models.foreign, sequence_length=32, prompt=with_it)
            assert value == pytest.approx(alone["perplexity"], rel=1e-6)
    assert not torch.equal(attached(models.w3), attached(models.w2))
    root = ElementTree.parse(picture).getroot()
    told = list(root.itertext())
    for values in found["perplexity"].values():
        assert all(f"{value:.3f}" in told for value in values)
    assert "learned on w3" in told


def test_the_transfer_table(call: Any, models: Models) -> None:
    ended = call("transfer", str(models.w3), str(STORIES), "--text", str(models.foreign), *LENGTH)
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    assert len(lines) == 3
    assert lines[0].split() == ["prompt", "of", "foreign.txt", "w3", "foreign.txt", "stories260K"]
    assert lines[1].startswith("no prompt")
    assert lines[2].startswith(str(models.w3))


def test_a_transfer_that_cannot_be(call: Any, models: Models, tmp_path: Path) -> None:
    bare, wide = models.w3.with_name("bare3"), make("llama", tmp_path / "wide")
    moved = Path(shutil.copytree(STORIES, tmp_path / "moved"))
    change(moved, lambda tensors: tensors["model.embed_tokens.weight"].add_(0.1))
    text = ("--text", str(models.held))
    for words, code, told in (
        ((str(models.w3),), 2, "nothing to score"),
        ((str(bare), str(STORIES), *text), 3, "none of the models has a prompt attached"),
        ((str(models.w3), str(wide), *text), 3, "is 64 wide, and"),
        ((str(models.w3), str(moved), *text), 3, f"the prompt of `{models.w3}` cannot be used on `{moved}`: its base"),
        ((str(models.w3), str(tmp_path / "none"), *text), 3, "is not there"),
    ):
        ended = call("transfer", *words)
        assert (ended.code, ended.out) == (code, ""), ended.err
        assert told in ended.err
