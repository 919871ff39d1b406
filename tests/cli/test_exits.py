"""Every way a command can end: its exit code, and what it says."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rewright.cli import exits
from rewright.formats import errors as formats
from rewright.passes import errors as passes

from .conftest import clean_environment


def _raise(error: BaseException) -> Any:
    def act(run: Any, reporter: Any) -> None:
        raise error

    return act


def _torch_memory() -> BaseException:
    import torch

    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")


def _kernel() -> BaseException:
    from rewright.kernels.dispatch import KernelError

    return KernelError("no kernel", hint="another")


REFUSALS = [
    (lambda: passes.UsageError("said"), 2, "said"),
    (lambda: formats.OverlapError("said"), 2, "said"),
    (_kernel, 2, "no kernel"),
    (lambda: passes.InputError("said"), 3, "said"),
    (lambda: formats.FormatError("said"), 3, "said"),
    (lambda: FileNotFoundError(errno.ENOENT, "No such file", "x y"), 3, "cannot open `x y`: no such file"),
    (lambda: passes.ResourceError("said"), 4, "said"),
    (lambda: formats.StorageError("said"), 4, "said"),
    (lambda: MemoryError(), 4, "out of memory"),
    (_torch_memory, 4, "out of memory: CUDA out of memory. Tried to allocate 2 GiB"),
    (lambda: RuntimeError("[x] DefaultCPUAllocator: can't allocate memory: you tried"), 4, "out of memory: [x] Def"),
    (lambda: OSError(errno.ENOSPC, "No space left on device"), 4, "the system refused: no space left on device"),
    (lambda: PermissionError(errno.EACCES, "Permission denied", "d"), 4, "cannot use `d`: permission denied"),
    (lambda: passes.BoundError("said"), 5, "said"),
    (lambda: formats.ConflictError("said"), 6, "said"),
    (lambda: passes.StaleError("said"), 7, "said"),
]


@pytest.mark.parametrize(("make", "code", "said"), REFUSALS)
def test_each_kind_has_its_code(call: Any, pipeline: Any, make: Any, code: int, said: str) -> None:
    pipeline.act = _raise(make())
    ended = call("fake", "src", "dst")
    assert (ended.code, ended.out) == (code, "")
    assert ended.err.startswith(f"error: {said}")
    assert "Traceback" not in ended.err


def test_every_refusal_has_a_row() -> None:
    for kind in (formats.Refusal, *formats.Refusal.__subclasses__()):
        if kind is not formats.Refusal:
            assert exits.judge(kind("said")).code != exits.BUG, kind
    assert exits.judge(formats.Refusal("said")).code == exits.BUG


def test_hint_after_a_blank_line(call: Any, pipeline: Any) -> None:
    pipeline.act = _raise(passes.InputError("layer 7 has 96 heads", hint="use `--group 32` [or 48]"))
    assert call("fake", "a", "b").err == "error: layer 7 has 96 heads\n\nhint: use `--group 32` [or 48]\n"


def test_traceback_only_at_vv(call: Any, pipeline: Any) -> None:
    pipeline.act = _raise(passes.InputError("said"))
    assert "Traceback" not in call("fake", "a", "b", "-v").err
    ended = call("fake", "a", "b", "-vv")
    assert "Traceback" in ended.err
    assert ended.err.endswith("error: said\n")
    assert call("fake", "a", "b", "-q").err == "error: said\n"


def test_a_bug_goes_to_a_log(call: Any, pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    pipeline.act = _raise(KeyError("lost"))
    ended = call("fake", "a b", "dst")
    assert ended.code == 1
    assert ended.err.startswith("error: a bug in rewright: KeyError: 'lost'\n")
    found = re.search(r"the traceback is in (\S+);", ended.err)
    assert found is not None
    log = Path(found[1]).read_text(encoding="utf-8")
    assert log.startswith("rewright fake 'a b' dst\n")
    assert "Traceback" in log
    assert "KeyError: 'lost'" in log


def test_events_tell_the_end(call: Any, pipeline: Any, tmp_path: Path) -> None:
    def act(run: Any, reporter: Any) -> None:
        reporter.event("stage", name="fake", path=Path("x"), loss=float("nan"))
        reporter.warn("odd")
        raise passes.BoundError("missed", hint="try")

    pipeline.act = act
    file = tmp_path / "events.jsonl"
    assert call("fake", "--events", str(file), "a", "b").code == 5
    stage, warning, error = (json.loads(line) for line in file.read_text().splitlines())
    assert stage.pop("time") <= warning.pop("time") <= error.pop("time")
    assert stage == {"event": "stage", "name": "fake", "path": "x", "loss": None}
    assert warning == {"event": "warning", "text": "odd"}
    assert error == {"event": "error", "text": "missed", "hint": "try"}


def test_events_that_cannot_be_written(call: Any, pipeline: Any, tmp_path: Path) -> None:
    assert call("fake", "--events", str(tmp_path / "no" / "file"), "a", "b").code == 4
    assert not pipeline.runs


DRIVER = """
import hashlib, sys, time
from rewright.cli import main
from rewright.passes import pipeline

def long_call():
    hashlib.pbkdf2_hmac("sha256", b"", b"", 1 << 30)  # no bytecode runs for minutes

def wait(run, reporter, world):
    reporter.info("started")
    time.sleep(60)

def block(run, reporter, world):
    reporter.info("started")
    long_call()

def linger(run, reporter, world):
    try:
        wait(run, reporter, world)
    finally:
        reporter.info("cleaning")
        long_call()

def turn(run, reporter, world):
    try:
        wait(run, reporter, world)
    except KeyboardInterrupt:
        raise ImportError("a library made this of it")

pipeline.execute = {"wait": wait, "block": block, "linger": linger, "turn": turn}[sys.argv[1]]
main.main(["compress", "--method", "rtn", "a b", "dst"])
"""


def _started(how: str) -> subprocess.Popen[bytes]:
    child = subprocess.Popen(
        [sys.executable, "-c", DRIVER, how],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env=clean_environment(),
        start_new_session=True,
    )
    assert child.stderr is not None
    assert child.stderr.readline() == b"started\n"
    return child


def _ended(child: subprocess.Popen[bytes]) -> tuple[int, str, float]:
    began = time.monotonic()
    _, told = child.communicate(timeout=30)
    spent = time.monotonic() - began
    with pytest.raises(ProcessLookupError):
        os.killpg(child.pid, 0)
    return child.returncode, told.decode(), spent


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
@pytest.mark.parametrize("how", ["wait", "turn"])
def test_one_signal(number: int, code: int, word: str, how: str) -> None:
    child = _started(how)
    child.send_signal(number)
    returned, told, _ = _ended(child)
    assert returned == code
    assert told == (
        f"error: {word}; partial work is kept\n\n"
        "hint: the same command goes on from it: `rewright compress --method rtn 'a b' dst`\n"
    )


def test_the_second_ctrl_c_ends_a_clean_up() -> None:
    child = _started("linger")
    child.send_signal(signal.SIGINT)
    assert child.stderr is not None
    assert child.stderr.readline() == b"cleaning\n"
    child.send_signal(signal.SIGINT)
    returned, told, spent = _ended(child)
    assert (returned, told) == (130, "")
    assert spent < 1


def test_the_second_ctrl_c_ends_a_long_call() -> None:
    child = _started("block")
    time.sleep(0.3)
    child.send_signal(signal.SIGINT)
    time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    returned, told, spent = _ended(child)
    assert (returned, told) == (130, "")
    assert spent < 1
