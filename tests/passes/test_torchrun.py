"""One run by several processes: the bytes of one, whatever happens to any of them."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from rewright.cli import environment
from rewright.formats.checkpoint import Checkpoint
from rewright.passes import chunks
from rewright.passes.compress import solve, spread, traffic, units
from rewright.passes.compress.plan import draw_up
from rewright.passes.compress.shapes import Counting
from rewright.passes.compress.spec import CompressOptions
from rewright.passes.errors import ResourceError
from rewright.passes.evaluate import evaluate
from rewright.passes.spec import Layout, from_plain
from rewright.passes.world import Torchrun
from tests.passes.forks import Forks
from tests.passes.outputs import beside, contents, stamp
from tests.passes.processes import Launched

STEPS = ("--threads", "1", "--group-size", "16", "--sparsity", "0.5", "--samples", "10", "--sequence-length", "64")


def words(source: Path, dst: Path, text: Path, *more: str) -> list[str | Path]:
    # several batches, so that there is something to share: 10 x 64 tokens are no more than one of 1024
    return ["compress", source, dst, *STEPS, "--calibration-text", text, *more]


SMALL_BATCHES = "from rewright.passes import chunks\nchunks.BATCH_TOKENS = 128"


def same(found: Path, expected: Path) -> None:
    """Equal files; in the stamp all but how many processes there were and what they sent."""

    def plain(folder: Path) -> dict[str, Any]:
        files: dict[str, Any] = contents(folder)
        document = json.loads(files["rewright.json"][1])
        for stage in document["stages"]:
            del stage["processes"], stage["bytes_sent"]
        return {**files, "rewright.json": document}

    assert plain(found) == plain(expected)
    assert beside(found) == []


@pytest.fixture(scope="module")
def alone(tiny: Callable[[str], Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes, cut as finely as the others cut."""
    folder = tmp_path_factory.mktemp("alone")
    code, _, err = Launched(folder, 1, words(tiny("llama"), folder / "out", text), SMALL_BATCHES).wait()
    assert code == 0, err
    assert stamp(folder / "out")["stages"][0]["processes"] == 1
    return folder / "out"


@pytest.mark.parametrize("size", [2, 3, 4])
def test_bytes_do_not_hang_on_the_number_of_processes(
    size: int, alone: Path, tiny: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    code, out, err = Launched(tmp_path, size, words(tiny("llama"), tmp_path / "out", text), SMALL_BATCHES).wait()
    assert code == 0, err
    assert out == ""
    same(tmp_path / "out", alone)
    made = stamp(tmp_path / "out")["stages"][0]
    assert made["processes"] == size
    assert made["bytes_sent"] > 0
    assert err.count("done in") == 1, "one speaks"


def test_a_mask_chosen_in_the_sweep(tiny: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    """And with zero points, at 3 bits, whose words hold parts of rows."""
    more = ("--mask", "sweep", "--target", "own", "--refine", "0", "--bits", "3", "--asymmetric")
    for size in (1, 3):
        run = Launched(tmp_path, size, words(tiny("llama"), tmp_path / f"out of {size}", text, *more), SMALL_BATCHES)
        code, _, err = run.wait()
        assert code == 0, err
    same(tmp_path / "out of 3", tmp_path / "out of 1")


@pytest.mark.parametrize(("killed", "then"), [(1, 1), (0, 3)], ids=["the second, then one", "the first, then three"])
def test_killed_in_the_middle(
    killed: int, then: int, alone: Path, tiny: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    """All end, in a line; nothing is there; another number of processes goes on and makes the same bytes."""
    dst = tmp_path / "out"
    run = Launched(tmp_path, 2, words(tiny("llama"), dst, text), SMALL_BATCHES)
    scratch = tmp_path / "out.partial" / "1-compress.work"
    until = time.monotonic() + 120
    while not any("layer" in file.read_text() for file in scratch.glob("journal*.jsonl")):
        assert time.monotonic() < until
        time.sleep(random.uniform(0.001, 0.02))
    _kill(run.workers()[killed])
    began = time.monotonic()
    code, _, err = run.wait()
    assert time.monotonic() - began < 30
    assert code != 0
    assert "error: the run lost a process" in err or "error: terminated; partial work is kept" in err, err
    assert not dst.exists()
    code, _, err = Launched(tmp_path, then, words(tiny("llama"), dst, text), SMALL_BATCHES).wait()
    assert code == 0, err
    same(dst, alone)


def _kill(process: int) -> None:
    import os
    import signal

    os.kill(process, signal.SIGKILL)


@pytest.mark.parametrize(
    ("also", "said"),
    [
        (
            "import sys\nif os.environ['RANK'] == '1': sys.argv += ['--bits', '3']",
            "process 1 is not at the work of process 0: `--bits` was 4, is 3",
        ),
        (
            "import sys\nif os.environ['RANK'] == '1': sys.argv[2] += '-other'",
            "process 1 is not at the work of process 0: the source's contents changed",
        ),
        (
            "from rewright.passes import survey\nif os.environ['RANK'] == '1': survey.version = lambda: '9.9'",
            "process 1 is not at the work of process 0: rewright 0.1.0 and 9.9",
        ),
        ("import sys\nsys.argv[2] += '-absent'", "-absent` is not there"),
    ],
    ids=["options", "source", "version", "none has the source"],
)
def test_processes_that_are_not_at_the_same_work(
    also: str, said: str, tiny_copy: Callable[[str], Path], tiny: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    source = tiny_copy("llama")
    other = source.with_name(f"{source.name}-other")
    other.mkdir()
    for file in tiny("opt").iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    code, out, err = Launched(tmp_path, 2, words(source, tmp_path / "out", text), also).wait()
    assert (code != 0, out) == (True, "")
    assert said in err
    assert err.count("error:") == 1, err
    assert not (tmp_path / "out").exists()


def _pair(tmp_path: Path, argv: Sequence[str | Path]) -> tuple[int, str, str]:
    return Launched(tmp_path, 2, argv).wait()


def test_other_passes_and_scores(half: Path, forks: Forks, text: Path, tmp_path: Path) -> None:
    """Passes that name their units share them, chains do, and so do the windows of a text; what cannot be split is done
    by one.
    """
    chain = ["convert", "--to", "dense", "+", "cast", "--to", "bf16"]
    options = ["--threads", "1", "--eval-text", text]
    code, _, err = _pair(tmp_path, ["chain", *options, half, tmp_path / "two", *chain])
    assert code == 0, err
    ended = forks.run("chain", *options, half, tmp_path / "one", *chain)
    assert ended.code == 0, ended.err
    same(tmp_path / "two", tmp_path / "one")
    code, out, err = _pair(tmp_path, ["eval", half, "--text", text, "--threads", "1", "--json"])
    assert code == 0, err
    scores = evaluate(half, text=text, threads=1)
    assert json.loads(out)["perplexity"] == scores["perplexity"]


def test_what_is_not_split_is_done_by_one(tiny: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    more = ("--tune", "2", "--json")
    code, out, err = _pair(tmp_path, words(tiny("llama"), tmp_path / "out", text, *more))
    assert code == 0, err
    assert "`compress` is done by one of the 2 processes" in err
    assert json.loads(out)["state"] == "done"
    assert stamp(tmp_path / "out")["stages"][0]["processes"] == 1
    assert _pair(tmp_path, ["passes"])[1].count("prune and quantise") == 1


@pytest.mark.parametrize("said", [(), ("--target", "own", "--mask", "sweep"), ("--pattern", "2:4")], ids=str)
def test_what_is_sent_is_what_the_model_counts(
    said: tuple[str, ...], tiny: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    source = tiny("llama")
    more = said if "--pattern" in said else ("--sparsity", "0.5", *said)
    plain = [word for word in words(source, tmp_path / "out", text) if word not in ("--sparsity", "0.5")]
    code, _, err = Launched(tmp_path, 3, [*plain, *more], SMALL_BATCHES).wait()
    assert code == 0, err
    made = stamp(tmp_path / "out")["stages"][0]
    facts = json.loads((tmp_path / "out" / "reports" / "compress.json").read_text())["calibration"]
    options = from_plain(CompressOptions, made["options"])
    checkpoint = Checkpoint.open(source)
    tensors = {name: (entry.dtype, entry.shape) for name, entry in checkpoint.entries.items()}
    layout = Layout(tensors, checkpoint.config or {})
    rows = (facts["samples_used"], facts["samples_held_out"])
    count = Counting(options, draw_up(options, layout), layout, *rows, facts["sequence_length"], 0)
    with patch.object(units, "WEIGHTS", 1500), patch.object(chunks, "BATCH_TOKENS", 128):
        assert traffic.bytes_sent(count, 3) == made["bytes_sent"]
    assert (len(spread.ROUNDS), spread.BINS, solve.MASK_BLOCK) == (traffic.ROUNDS, traffic.BINS, traffic.SWEEP_BLOCK)


@pytest.mark.parametrize(
    ("said", "place"),
    [
        ({}, (0, 1, 0)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, (3, 8, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8"}, (3, 8, 0)),
        ({"RANK": "x", "WORLD_SIZE": "8"}, (0, 1, 0)),
        ({"WORLD_SIZE": "8"}, (0, 1, 0)),
    ],
)
def test_a_process_s_place(said: dict[str, str], place: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert environment.place() == place


def test_without_a_launcher_the_others_are_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ResourceError, match="cannot meet the other processes"):
        Torchrun(1, 2)
