"""Runs that are killed, and the same command again: the same bytes, and nothing done twice."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rewright.formats.verify import verify
from tests.passes.conftest import STORIES
from tests.passes.forks import Ended, Forks, Job, Strike
from tests.passes.outputs import beside, contents, journal, stamp

QUICK = ("--samples", "8", "--sequence-length", "64")


@dataclass(frozen=True)
class Chain:
    """Two passes over stories260K: the words for a destination, what an uninterrupted run made, how long it took."""

    text: Path
    out: Path
    seconds: float

    def words(self, dst: Path, *run_options: str, bits: int = 4) -> list[str | Path]:
        calibrate = (*QUICK, "--calibration-text", self.text)
        first = ("compress", "--bits", "16", "--sparsity", "0.3", *calibrate)
        second = ("compress", "--bits", str(bits), "--group-size", "16", *calibrate)
        return ["chain", "--threads", "1", *run_options, STORIES, dst, *first, "+", *second]


@pytest.fixture(scope="module")
def chain(forks: Forks, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    folder = tmp_path_factory.mktemp("whole")
    made = Chain(text, folder / "out", 0)
    began = time.monotonic()
    assert forks.run(*made.words(made.out)).code == 0
    assert beside(made.out) == []
    return Chain(text, made.out, time.monotonic() - began)


def _wait_for(happened: Callable[[], Any], job: Job) -> None:
    until = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < until
        assert os.path.exists(f"/proc/{job.pid}")
        time.sleep(0.002)


def _first_layer(dst: Path) -> Callable[[], bool]:
    """Whether the first layer is on record, or the whole stage."""
    partial = dst.with_name(f"{dst.name}.partial")
    sealed = partial / "1-compress" / "rewright.json"
    return lambda: "layer 0" in journal(partial / "1-compress.work") or sealed.exists()


def _finished(dst: Path) -> dict[int, dict[str, Any] | None]:
    """By stage the layers that partial work has on record; None for a stage that is sealed."""
    partial = dst.with_name(f"{dst.name}.partial")
    found: dict[int, dict[str, Any] | None] = {}
    for number in (1, 2):
        sealed = (partial / f"{number}-compress" / "rewright.json").exists()
        found[number] = None if sealed else journal(partial / f"{number}-compress.work")
    return {1: None, 2: None} if found[2] is None else found


def _layers(events: Path) -> dict[int, dict[str, Any]]:
    """By stage the layers that a run went through, as its events tell."""
    found: dict[int, dict[str, Any]] = {}
    for event in map(json.loads, events.read_text().splitlines()):
        if event["event"] == "stage":
            stage = found.setdefault(event["number"], {})
        elif event["event"] == "layer":
            stage[f"layer {event['index']}"] = {"matrices": event["matrices"]}
    return found


def _killed_after(delay: float, forks: Forks, words: Sequence[str | Path], first: Callable[[], Any] | None) -> bool:
    """Kill a run some seconds after it began, or after something happened first; whether it was still there."""
    job = forks.start(*words)
    if first is not None:
        _wait_for(first, job)
    time.sleep(delay)
    os.kill(job.pid, signal.SIGKILL)
    ended = forks.wait(job)
    assert ended.code in (-signal.SIGKILL, 0), ended.err
    return ended.code != 0


@pytest.mark.parametrize("number", range(10))
def test_killed_at_a_random_moment(number: int, forks: Forks, chain: Chain, tmp_path: Path) -> None:
    """Four of ten die at any moment, six after the first layer is on record."""
    dst, events = tmp_path / "out", tmp_path / "events.jsonl"
    delay = random.Random().uniform(0, chain.seconds * (0.9 if number < 4 else 0.6))
    while not _killed_after(delay, forks, chain.words(dst), _first_layer(dst) if number >= 4 else None):
        shutil.rmtree(dst)  # it was done before
        delay /= 2
    if dst.exists():
        assert contents(dst) == contents(chain.out)
    before = _finished(dst)
    assert before[2] is None or not before[2] or before[1] is None, "stage 1 is sealed before stage 2 begins"

    ended = forks.run(*chain.words(dst, "--events", str(events)))
    assert ended.code == 0, ended.err
    assert contents(dst) == contents(chain.out)
    assert beside(dst) == []
    assert verify(dst).problems == []
    after = _layers(events)
    for stage, layers in before.items():
        if layers is None:
            assert stage not in after, "a sealed stage ran again"
        for name, facts in (layers or {}).items():
            # seconds and all: a layer that was done again would have others; past the last one nothing is walked again
            assert name == "rest" or "walk" in (layers or {}) or after[stage][name] == facts


def test_killed_at_every_change_near_the_end(forks: Forks, chain: Chain, tmp_path: Path) -> None:
    """What stands at the destination is the old output or the new one, whole, whenever the process dies."""
    old = tmp_path / "old"
    assert forks.run(*chain.words(old, bits=8)).code == 0
    dst = tmp_path / "out"
    shutil.copytree(old, dst)
    last = forks.changes(*chain.words(dst, "--update"))
    was, new = contents(old), contents(chain.out)
    some = random.Random().sample(range(1, last - 24), 2)
    first = random.Random().randrange(3)
    moments = [*some, *range(last - 24 + first, last, 3), last]
    seen = set()
    for moment in moments:
        shutil.rmtree(dst)
        shutil.copytree(old, dst)
        ended = forks.run(*chain.words(dst, "--update"), strike=Strike(moment))
        assert ended.code == -signal.SIGKILL, (moment, last, ended)
        found = contents(dst)
        assert found in (was, new), moment
        seen.add(found == new)
        ended = forks.run(*chain.words(dst, "--update"))
        assert ended.code == 0, (moment, ended.err)
        assert contents(dst) == new, moment
        # the first and the last changes of all are about the lock: what is left of it is in nobody's way
        assert all(name.startswith("out.lock") for name in beside(dst)), moment
        assert moment < 5 or moment == last or not beside(dst), moment
        for name in beside(dst):
            (tmp_path / name).unlink()
    assert seen == {True, False}


def _struck(forks: Forks, words: Sequence[str | Path], number: int = 4, how: int = signal.SIGKILL) -> Ended:
    """A run that is struck when it would put the second layer on record, its fourth change to a journal."""
    ended = forks.run(*words, strike=Strike(number, "journal.jsonl", how))
    assert ended.code == (130 if how == signal.SIGINT else -how)
    return ended


def _scratch(dst: Path) -> Path:
    return dst.with_name(f"{dst.name}.partial") / "1-compress.work"


def test_interrupted_run_says_how_to_go_on(forks: Forks, chain: Chain, tmp_path: Path) -> None:
    dst = tmp_path / "out"
    ended = _struck(forks, chain.words(dst), how=signal.SIGINT)
    assert "the same command goes on from it" in ended.err
    assert not dst.exists()
    assert beside(dst) == ["out.partial"], "an interrupted run lets its lock go"
    dry = json.loads(forks.run(*chain.words(dst, "--dry-run", "--json")).out)
    assert dry["state"] == "resume"
    assert forks.run(*chain.words(dst)).code == 0
    assert contents(dst) == contents(chain.out)


def test_other_options_do_not_take_over(forks: Forks, chain: Chain, tmp_path: Path) -> None:
    dst = tmp_path / "out"
    _struck(forks, chain.words(dst))
    ended = forks.run(*chain.words(dst, "--seed", "3", bits=3))
    assert ended.code == 6
    assert ended.err == (
        f"error: partial work at `{dst}.partial` is from another run: `--seed` was 0, is 3; "
        "stage 2: `--bits` was 4, is 3\n\n"
        "hint: repeat that run to finish it, or add `--force` to drop it\n"
    )
    assert forks.run(*chain.words(dst, "--update", bits=3)).code == 6, "`--update` is no leave to drop partial work"
    assert forks.run(*chain.words(dst)).code == 0
    assert contents(dst) == contents(chain.out)


def _begun_by_force(dst: Path) -> bool:
    return bool(json.loads(dst.with_name(f"{dst.name}.partial").joinpath("run.json").read_text())["forced"])


def test_force_drops_other_partial_work_and_goes_on_from_its_own(forks: Forks, chain: Chain, tmp_path: Path) -> None:
    dst, events = tmp_path / "out", tmp_path / "events.jsonl"
    _struck(forks, chain.words(dst))
    assert not _begun_by_force(dst)
    _struck(forks, chain.words(dst, "--force"), number=5)  # the first is to delete what was there
    forced = journal(_scratch(dst))["layer 0"]
    assert _begun_by_force(dst), "begun anew"
    assert forks.run(*chain.words(dst, "--force", "--events", str(events))).code == 0
    assert _layers(events)[1]["layer 0"] == forced
    assert contents(dst) == contents(chain.out)


def test_changed_text_and_source_are_named(forks: Forks, chain: Chain, tmp_path: Path) -> None:
    dst, text, source = tmp_path / "out", tmp_path / "text.txt", tmp_path / "src"
    shutil.copy(chain.text, text)
    shutil.copytree(STORIES, source)
    mine = Chain(text, chain.out, chain.seconds)

    def words() -> list[str | Path]:
        return [source if word == STORIES else word for word in mine.words(dst)]

    _struck(forks, words())

    data = text.read_bytes()
    text.write_bytes(data[:1000] + bytes([data[1000] ^ 1]) + data[1001:])
    ended = forks.run(*words())
    assert ended.code == 6
    assert "is from another run: the contents of `--calibration-text` changed\n" in ended.err
    text.write_bytes(data)

    weights = source / "model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    ended = forks.run(*words())
    assert ended.code == 6
    assert "is from another run: the source's contents changed\n" in ended.err
    weights.write_bytes(kept)

    assert forks.run(*words()).code == 0
    assert {**contents(dst), "rewright.json": None} == {**contents(chain.out), "rewright.json": None}


def test_a_resumed_run_keeps_its_threads(forks: Forks, chain: Chain, tmp_path: Path) -> None:
    dst = tmp_path / "out"
    _struck(forks, chain.words(dst))
    words = chain.words(dst)
    words[words.index("--threads") + 1] = "2"
    ended = forks.run(*words)
    assert ended.code == 0
    assert "warning: going on with 1 threads, as the run was begun" in ended.err
    assert [stage["threads"] for stage in stamp(dst)["stages"]] == [1, 1]
    assert contents(dst) == contents(chain.out)


def test_seconds_of_a_resumed_run_count_both_parts(forks: Forks, chain: Chain, tmp_path: Path) -> None:
    dst = tmp_path / "out"
    _struck(forks, chain.words(dst))
    lines = (_scratch(dst) / "journal.jsonl").read_text().splitlines()
    spent = json.loads(lines[-1])["seconds"]
    assert spent > 0
    assert forks.run(*chain.words(dst)).code == 0
    assert stamp(dst)["stages"][0]["seconds"] > spent
