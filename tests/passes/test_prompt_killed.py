"""Learning a prompt that is interrupted or killed: the same command goes on, to the same bytes."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rewright.formats.draft import Draft
from rewright.passes.prompt import teacher
from rewright.passes.prompt.learn import Learner
from rewright.passes.training import Training
from tests.passes.forks import Forks, Strike
from tests.passes.interruptions import raise_at
from tests.passes.outputs import beside, contents, journal
from tests.passes.prompting import prompt, words

# a state on disk at every step, and a teacher that is asked in several units
OFTEN = """
from rewright.passes import training
from rewright.passes.prompt import teacher
training.PAUSE, teacher.TOGETHER = 0, 400
"""
STEPS = 8


@dataclass(frozen=True)
class Whole:
    """What an uninterrupted run makes of a model of codes that learns from its dense model."""

    source: Path
    options: dict[str, Any]
    text: Path
    out: Path

    def words(self, dst: Path) -> list[str | Path]:
        return ["prompt", "--threads", "1", self.source, dst, *words(self.text, **self.options)]


@pytest.fixture(scope="module")
def whole(half: Path, tiny: Callable[[str], Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    options = {"steps": STEPS, "loss": "mix", "teacher": tiny("llama")}
    made = Whole(half, options, text, tmp_path_factory.mktemp("whole") / "out")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("rewright.passes.prompt.teacher.TOGETHER", 400)
        prompt(half, made.out, text, **options)
    return made


@pytest.mark.parametrize(
    ("owner", "name", "call", "pause"),
    [
        (teacher, "write_file", 3, 0.0),
        (Learner, "_look", 1, 1e9),
        (Training, "_update", 1, 0.0),
        (Training, "_update", 3, 0.0),
        (Training, "_update", 3, 1e9),
        (Training, "_update", STEPS, 0.0),
        (Learner, "_look", 2, 0.0),
        (Draft, "link_weights", 1, 1e9),
        (Draft, "put", 4, 0.0),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_interruption_changes_no_byte(
    owner: Any, name: str, call: int, pause: float, whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rewright.passes.training.PAUSE", pause)
    monkeypatch.setattr("rewright.passes.prompt.teacher.TOGETHER", 400)
    dst = tmp_path / "out"
    with monkeypatch.context() as patched:
        raise_at(patched, owner, name, call)
        with pytest.raises(KeyboardInterrupt):
            prompt(whole.source, dst, whole.text, **whole.options)
    assert not dst.exists()
    prompt(whole.source, dst, whole.text, **whole.options)
    assert contents(dst) == contents(whole.out)
    assert [name for name in beside(dst) if "lock" not in name] == []


def test_what_is_kept_is_not_done_again(whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewright.passes.training.PAUSE", 0.0)
    monkeypatch.setattr("rewright.passes.prompt.teacher.TOGETHER", 400)
    dst = tmp_path / "out"
    with monkeypatch.context() as patched:
        raise_at(patched, Training, "_update", 6)
        with pytest.raises(KeyboardInterrupt):
            prompt(whole.source, dst, whole.text, **whole.options)
    scratch = dst.with_name("out.partial") / "1-prompt.work"
    assert {unit.split()[0] for unit in journal(scratch)} == {"teacher", "look", "first"}
    steps: list[int] = []
    asked: list[Any] = []
    real = Training._update

    def counted(self: Training, step: int, gradients: Any) -> None:
        steps.append(step)
        real(self, step, gradients)

    monkeypatch.setattr(Training, "_update", counted)
    monkeypatch.setattr(teacher, "open_scorer", lambda *given, **more: asked.append(given))
    prompt(whole.source, dst, whole.text, **whole.options)
    # the sixth step was taken but not yet kept
    assert (steps, asked) == ([5, 6, 7], [])
    assert contents(dst) == contents(whole.out)


def test_killed_at_any_moment(forks: Forks, whole: Whole, tmp_path: Path) -> None:
    """At changes to the disk drawn at random, and at some to the state and to what the teacher said."""
    dst = tmp_path / "out"
    last = forks.changes(*whole.words(dst), also=OFTEN)
    assert contents(dst) == contents(whole.out)
    shutil.rmtree(dst)
    moments = [Strike(number) for number in random.Random().sample(range(1, last), 1)]
    moments += [Strike(number, "prompt.safetensors") for number in (9, 22)]
    moments += [Strike(number, "teacher-") for number in (5,)] + [Strike(2, "journal.jsonl")]
    for strike in moments:
        ended = forks.run(*whole.words(dst), strike=strike, also=OFTEN)
        assert ended.code == -signal.SIGKILL, (strike, ended.err)
        ended = forks.run(*whole.words(dst), also=OFTEN)
        assert ended.code == 0, (strike, ended.err)
        assert contents(dst) == contents(whole.out), strike
        assert all(name.startswith("out.lock") for name in beside(dst)), strike
        shutil.rmtree(dst)


def test_interrupted_by_its_user(forks: Forks, whole: Whole, tmp_path: Path) -> None:
    dst = tmp_path / "out"
    ended = forks.run(*whole.words(dst), strike=Strike(14, "prompt.safetensors", signal.SIGINT), also=OFTEN)
    assert ended.code == 130
    assert "the same command goes on from it" in ended.err
    assert beside(dst) == ["out.partial"]
    assert json.loads(forks.run(*whole.words(dst), "--dry-run", "--json", also=OFTEN).out)["state"] == "resume"


def test_what_changed_meanwhile_is_named(forks: Forks, whole: Whole, rounded: Path, tmp_path: Path) -> None:
    """Text, start, and teacher by their contents; nothing is gone on with on other data."""
    dst, text, begun = tmp_path / "out", tmp_path / "text.txt", tmp_path / "begun"
    shutil.copy(whole.text, text)
    prompt(whole.source, begun, steps=0, init_text="Once upon a time")
    dense = Path(shutil.copytree(whole.options["teacher"], tmp_path / "dense"))
    asked = words(text, **{**whole.options, "teacher": dense, "init": begun})
    run = ["prompt", "--threads", "1", whole.source, dst, *asked]
    assert forks.run(*run, strike=Strike(9, "prompt.safetensors"), also=OFTEN).code == -signal.SIGKILL
    prompts = begun / "attachments/prompt/adapter_model.safetensors"
    for file, told in (
        (text, "the contents of `--text` changed"),
        (prompts, "the contents of `--init` changed"),
        (dense / "model.safetensors", "the contents of `--teacher` changed"),
        (whole.source / "config.json", "the source's contents changed"),
    ):
        kept = file.read_bytes()
        middle = len(kept) - 30
        file.write_bytes(
            kept + b" " if file.suffix == ".json" else kept[:middle] + bytes([kept[middle] ^ 1]) + kept[middle + 1 :]
        )
        ended = forks.run(*run, also=OFTEN)
        file.write_bytes(kept)
        assert ended.code == 6, ended.err
        assert f"is from another run: {told}\n" in ended.err
    ended = forks.run(*run, "--seed", "2", "--loss", "distill", also=OFTEN)
    assert ended.code == 6
    assert "`--seed` was 0, is 2; `--loss` was mix, is distill\n" in ended.err
    ended = forks.run(*run, also=OFTEN)
    assert ended.code == 0, ended.err
