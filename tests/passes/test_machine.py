"""What a run takes from the machine: devices by name, threads, rates measured once."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rewright.passes import machine, rates, world
from rewright.passes.context import Silent
from rewright.passes.errors import ResourceError, UsageError
from rewright.passes.machine import LIBRARIES, compute_dtype, find_device, libraries, prepare, usable_cpus
from rewright.passes.run_options import RunOptions
from rewright.passes.spec import Estimate, Layout
from rewright.passes.world import World


@pytest.mark.parametrize("word", ["", "gpu", "meta", "mps", "cuda:", "cuda:-1", "cuda:x", f"cuda:{10**30}", "\0"])
def test_a_device_that_is_none(word: str) -> None:
    with pytest.raises(UsageError, match="no device"):
        find_device(word)


def test_devices() -> None:
    assert find_device("cpu") == torch.device("cpu")
    assert find_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ResourceError, match=r"`cuda:99` is not there: this machine has \d+ GPUs"):
        find_device("cuda:99")


def test_processes_of_a_world_take_a_device_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run's own world counts, whatever torchrun has started beside it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    several = World()
    monkeypatch.setattr(world, "_current", several)
    found = []
    for local in range(3):
        several.size, several.local = 3, local
        found.append(find_device("auto", several))
        assert find_device("cpu", several) == torch.device("cpu")
        assert find_device("auto") == find_device("auto", World()) == torch.device("cuda")
    assert found == [torch.device("cuda", index) for index in (0, 1, 0)]


def test_the_dtype_rule() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert compute_dtype("auto", cpu, torch.bfloat16) == torch.float32
    assert compute_dtype("auto", gpu, torch.bfloat16) == torch.bfloat16
    assert compute_dtype("f16", cpu, torch.float32) == torch.float16


def test_threads_and_libraries(threads: Any) -> None:
    assert usable_cpus() >= 1
    prepare(3)
    assert torch.get_num_threads() == 3
    threads(1)
    assert libraries().keys() == {"python", *LIBRARIES}
    assert libraries()["torch"] == torch.__version__


_LARGE_AND_SMALL = """
import os
from pathlib import Path
import torch
from rewright.passes.machine import prepare

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

prepare(1)
# a large one that was freed would teach glibc to keep those that follow on the heap
del [torch.ones(5 << 20)][0]
before = resident()
large, between = [], []
for _ in range(8):
    large.append(torch.ones(4 << 20))
    between.append(torch.ones(1 << 14))
held = resident()
large.clear()
print(held - before, resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep their heaps otherwise")
def test_a_large_tensor_gives_its_pages_back_at_once() -> None:
    """In a process of its own: what else its pages hold is no matter of this test."""
    done = subprocess.run([sys.executable, "-c", _LARGE_AND_SMALL], capture_output=True, text=True, check=True)
    held, left = map(int, done.stdout.split())
    assert held > 100 << 20
    assert left < held / 4


@pytest.mark.parametrize(
    ("files", "share"),
    [
        ({}, None),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "250000 100000\n"}, 3),
        ({"cpu.max": "5000 100000\n"}, 1),
        ({"cpu.max": ""}, None),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
    ],
)
def test_a_container_has_its_share(files: dict[str, str], share: int | None, tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert machine._container_share(tmp_path) == share


def test_a_silent_reporter_keeps_warnings() -> None:
    reporter = Silent()
    reporter.info("a")
    reporter.debug("b")
    reporter.event("c", d=1)
    reporter.warn("e")
    with reporter.progress("f", None) as bar:
        bar.advance(1, "g")
    assert reporter.warnings == ["e"]


GUESS = Estimate(
    layout=Layout({}, {}), output_bytes=0, peak_host_bytes=0, peak_device_bytes=0, flops=10**9, bytes_moved=10**8
)


@pytest.mark.parametrize("found", [None, b"", b"[]", b"{", b'{"x": 3}', b"\xff"])
def test_rates_are_measured_once(
    found: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: Any
) -> None:
    cache = tmp_path / "deep" / "rates.json"
    measured = []

    def measure(device: Any) -> dict[str, float]:
        measured.append(torch.get_num_threads())
        return {"flops": 1e9, "bytes": 1e8}

    if found is not None:
        cache.parent.mkdir()
        cache.write_bytes(found)
    monkeypatch.setattr(rates, "_cache", lambda: cache)
    monkeypatch.setattr(rates, "_measure", measure)
    assert rates.timed(GUESS, RunOptions(threads=1))[0] == 2
    assert rates.timed(GUESS, RunOptions(threads=1))[0] == 2
    assert measured == [1], "at the threads the run will have"
    rates.timed(GUESS, RunOptions(threads=2))
    assert measured == [1, 2]
    known = json.loads(cache.read_text())
    assert {"flops": 1e9, "bytes": 1e8} in known.values()
    cache.write_text(json.dumps({key: {"flops": 0, "bytes": "x"} for key in known}))
    assert rates.timed(GUESS, RunOptions(threads=1))[0] == 2


def test_rates_without_a_place_to_keep_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: Any) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(rates, "_cache", lambda: tmp_path / "file" / "rates.json")
    assert rates.timed(GUESS, RunOptions(threads=1))[0] > 0
