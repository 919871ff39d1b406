"""The command line over the real pipeline, on a real model small enough to wait for."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from .conftest import PROGRAM, clean_environment

DATA = Path(__file__).parents[1] / "data"
MODEL, TEXT = str(DATA / "stories260K"), str(DATA / "tinystories.txt")


def test_a_run_its_record_and_its_repetition(process: Any, tmp_path: Path) -> None:
    out, again, events = tmp_path / "[red] ü", tmp_path / "again", tmp_path / "events.jsonl"
    words = ("compress", "--method", "rtn", "--bits", "8", "--group-size", "32")
    done = process("chain", "--json", "--events", str(events), MODEL, str(out), *words)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["state"], document["destination"]) == ("done", str(out))
    kinds = [json.loads(line)["event"] for line in events.read_text().splitlines()]
    assert kinds == ["stage", "published"]

    check = process("chain", "--check", MODEL, str(out), *words)
    assert (check.returncode, check.stdout) == (0, b"")
    other = process("chain", "--check", MODEL, str(out), "compress", "--method", "rtn", "--bits", "4")
    assert other.returncode == 7
    assert process("chain", MODEL, str(out), "compress", "--method", "rtn").returncode == 6
    assert process("compress", MODEL, MODEL + "/inside", "--method", "rtn").returncode == 2

    said = process("show", str(out), "--as", "chain").stdout.decode()
    assert process("chain", MODEL, str(again), *shlex.split(said)).returncode == 0
    assert process("diff", str(out), str(again)).stdout == b"equal\n"
    recipe = process("show", str(out), "--as", "toml").stdout
    settled = process("run", "-", MODEL, str(again), "--check", stdin=recipe)
    assert settled.returncode == 0, settled.stderr

    assert process("verify", str(out)).returncode == 0
    shown = json.loads(process("show", str(out), "--json").stdout)
    assert {item["bits"] for item in shown["quantization"]["schemes"]} == {8}
    assert shown["kinds"]["attention"]["bits_per_weight"] < 9


def test_ctrl_c_twice_in_a_real_run(tmp_path: Path) -> None:
    out, events = tmp_path / "out", tmp_path / "events.jsonl"
    child = subprocess.Popen(
        [*PROGRAM, "compress", MODEL, str(out), "--calibration-text", TEXT, "--events", str(events)],
        stderr=subprocess.PIPE,
        env=clean_environment(),
    )
    until = time.monotonic() + 60
    while not (events.exists() and events.read_text().startswith("{")) and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.5)
    child.send_signal(signal.SIGINT)
    time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    began = time.monotonic()
    _, told = child.communicate(timeout=30)
    assert time.monotonic() - began < 1
    assert child.returncode == 130
    assert b"Traceback" not in told
    assert not out.exists()
