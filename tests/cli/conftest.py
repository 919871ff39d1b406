"""Ways to run the command line: as a process of its own, or inside the test on a fake pass and pipeline."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from rewright.cli import console, main
from rewright.cli.signals import Signals
from rewright.passes import registry
from rewright.passes.spec import Opt, Spec
from rewright.passes.values import Pattern

ANYWHERE = Pattern()
PROGRAM = (sys.executable, "-m", "rewright")
_SWITCHES = ("NO_COLOR", "FORCE_COLOR", "GITHUB_ACTIONS", "PY_COLORS", "COLUMNS", "REWRIGHT_NO_PROGRESS")


def clean_environment(**changes: str) -> dict[str, str]:
    """This process's environment without the switches under test, then with `changes`."""
    kept = {name: value for name, value in os.environ.items() if name not in _SWITCHES}
    return {**kept, "TERM": "xterm-256color", **changes}


Process = Callable[..., subprocess.CompletedProcess[bytes]]


@pytest.fixture
def process() -> Process:
    """Run `rewright` as a user does; streams are pipes, environment changes are keywords."""

    def start(*words: str, stdin: bytes = b"", **changes: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [*PROGRAM, *words], input=stdin, capture_output=True, env=clean_environment(**changes), timeout=120
        )

    return start


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeOptions:
    """One option of every kind that a pass can have."""

    size: Annotated[int, Opt("a whole number [in brackets]", min=1, max=9)] = 4
    share: Annotated[float | None, Opt("a number or nothing", min=0, max=1)] = None
    mode: Annotated[Literal["soft", "hard"], Opt("one of two words")] = "soft"
    level: Annotated[Literal[2, 4], Opt("one of two numbers")] = 4
    pattern: Annotated[Pattern, Opt("a value with a text form", metavar="N:M")] = ANYWHERE
    inputs: Annotated[tuple[Path, ...], Opt("files (repeatable)")] = ()
    even: Annotated[bool, Opt("a switch that is on", negative="odd")] = True
    loud: Annotated[bool, Opt("a switch that is off")] = False

    def __post_init__(self) -> None:
        if self.size == 7:
            raise ValueError("`--size 7` is never right")


FAKE = Spec(
    name="fake",
    summary="do nothing to a model",
    version=1,
    options=FakeOptions,
    impl="nowhere:run",
    wants=frozenset({"weights"}),
    gives="weights",
    grain="tensor",
    paper="A Paper (2020)",
    estimate=lambda options, layout: None,  # type: ignore[arg-type, return-value] # never asked for
)


@dataclass
class Ended:
    """How a command line ended."""

    code: int
    out: str
    err: str


@dataclass
class FakePipeline:
    """Stands for `passes.pipeline`: keeps the run it was given; `act` is what executing it does."""

    runs: list[Any] = field(default_factory=list)
    act: Callable[[Any, Any], None] = lambda run, reporter: None

    def document(self, run: Any, state: str) -> dict[str, Any]:
        stage = {"pass": "fake", "output_bytes": 1200, "peak_host_bytes": 0, "peak_device_bytes": 0, "flops": 2e9}
        stage |= {"bytes_moved": 0, "seconds_estimated": 2.0, "seconds": 1.5, "metrics": {"loss": 0.25}}
        stage |= {"details": {"matrices": [{"name": "a.weight", "bits": 4}]}}
        return {"destination": str(run.dst), "state": state, "stages": [stage], "evaluation": None, "seconds": 1.5}

    def plan(self, run: Any) -> dict[str, Any]:
        self.runs.append(run)
        return self.document(run, "fresh")

    def execute(self, run: Any, reporter: Any, world: Any) -> dict[str, Any]:
        self.runs.append(run)
        self.act(run, reporter)
        return self.document(run, "done")


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> FakePipeline:
    """A pass `fake` in the registry, and a pipeline that runs nothing."""
    from rewright.passes import pipeline as real

    fake = FakePipeline()
    monkeypatch.setitem(registry.SPECS, "fake", FAKE)
    monkeypatch.setattr(real, "plan", fake.plan)
    monkeypatch.setattr(real, "execute", fake.execute)
    return fake


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Ended]]:
    """Run a command line inside the test, without its signal handlers."""
    before = dict(os.environ)
    monkeypatch.setattr(Signals, "listen", lambda self: None)
    for name in _SWITCHES:
        monkeypatch.delenv(name, raising=False)

    def run(*words: str) -> Ended:
        monkeypatch.setattr(console, "_current", None)
        with warnings.catch_warnings(), pytest.raises(SystemExit) as ended:
            main.main(words)
        told = capsys.readouterr()
        code = ended.value.code
        assert isinstance(code, int)
        return Ended(code, told.out, told.err)

    yield run
    os.environ.clear()
    os.environ.update(before)
