"""What can be refused from the words and the files alone is refused before any work, and destroys nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROUND = ("compress", "--threads", "1", "--method", "rtn", "--bits", "8")


@pytest.fixture
def model(root: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(root / "tests/data/stories260K", tmp_path / "model"))


def ended(process: Any, *words: object, **said: Any) -> tuple[int, str, str]:
    done: subprocess.CompletedProcess[bytes] = process(*[str(word) for word in words], **said)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def untouched(folder: Path) -> bool:
    return not any(path.name.startswith("out") for path in folder.iterdir())


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--eval-text", "nope.txt"), 3, "`nope.txt` cannot be read"),
        (("--require", "perplexity_ratio<1.05"), 2, "no stage reports `perplexity_ratio`"),
        (("--require", "typo<1", "--eval-text", "TEXT"), 2, "no stage reports `typo`"),
        (("--events", "model/config.json"), 2, "is inside"),
        (("--events", "TEXT"), 2, "exists and holds something else"),
        (("--calibration-text", "-", "--eval-text", "-"), 2, "two options read standard input"),
        (("--threads", "100000"), 2, "`--threads` must be from 1 to 1024"),
        (("--device", "cuda:-1"), 2, "no device `cuda:-1`"),
        (("--calibration-text", ""), 2, "must not be empty"),
    ],
    ids=str,
)
def test_before_any_work(
    words: tuple[str, ...], code: int, said: str, process: Any, model: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time.")
    before = (model / "config.json").read_bytes(), text.read_bytes()
    spelled = [str(text) if word == "TEXT" else word.replace("model/", f"{model}/") for word in words]
    got, _, err = ended(process, *ROUND, *spelled, model, tmp_path / "out")
    assert got == code
    assert said in err
    assert untouched(tmp_path)
    assert ((model / "config.json").read_bytes(), text.read_bytes()) == before


def test_a_mount_point_is_no_destination(process: Any, model: Path, tmp_path: Path) -> None:
    target = Path("/proc")
    assert os.path.ismount(target)
    code, _, err = ended(process, *ROUND, model, target)
    assert code == 4
    assert "is a mount point" in err


def test_a_missed_bound_still_gives_the_document(process: Any, model: Path, tmp_path: Path) -> None:
    code, out, _ = ended(process, *ROUND, "--json", "--require", "sparsity>0.9", model, tmp_path / "out")
    assert code == 5
    assert json.loads(out)["stages"][0]["metrics"]["sparsity"] < 0.9
    assert not (tmp_path / "out").exists()


def test_a_destination_with_dots_is_one_place(process: Any, model: Path, tmp_path: Path) -> None:
    dotted = tmp_path / "absent" / ".." / "out"
    assert ended(process, *ROUND, model, dotted)[0] == 0
    assert ended(process, *ROUND, "--check", model, tmp_path / "out")[0] == 0
    assert ended(process, *ROUND, "--check", model, dotted)[0] == 0


def test_force_reads_every_byte_again(process: Any, model: Path, tmp_path: Path) -> None:
    """A source changed under the same size and time: a forced run records what it read."""
    assert ended(process, *ROUND, model, tmp_path / "out")[0] == 0
    weights = model / "model.safetensors"
    times = weights.stat().st_atime_ns, weights.stat().st_mtime_ns
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=times)
    before = json.loads((tmp_path / "out/rewright.json").read_text())
    assert ended(process, *ROUND, "--force", model, tmp_path / "out")[0] == 0
    assert json.loads((tmp_path / "out/rewright.json").read_text())["key"] != before["key"]


@pytest.mark.parametrize("stages", [[3], 3, [{"pass": "compress", "seconds": "x"}]])
def test_a_damaged_stamp_is_named(stages: object, process: Any, model: Path) -> None:
    (model / "rewright.json").write_text(json.dumps({"files": {}, "stages": stages, "key": 1}))
    code, _, err = ended(process, "show", model)
    assert code == 3
    assert "rewright.json` is damaged" in err


def test_events_that_cannot_be_written_do_not_end_the_run(process: Any, model: Path, tmp_path: Path) -> None:
    code, _, err = ended(process, *ROUND, "--events", "/dev/full", model, tmp_path / "out")
    assert code == 0
    assert "events are not written any more" in err
    assert (tmp_path / "out/rewright.json").exists()


def test_what_a_recipe_does_not_hold_is_said(process: Any, model: Path, tmp_path: Path) -> None:
    assert ended(process, *ROUND, "--seed", "3", model, tmp_path / "out")[0] == 0
    code, out, err = ended(process, "show", tmp_path / "out", "--as", "toml")
    assert code == 0
    assert out.startswith("[[stage]]\n")
    assert "made with --seed 3" in err
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(out)
    assert ended(process, "run", "--seed", "3", "--check", recipe, model, tmp_path / "out")[0] == 0


def test_a_dry_run_refuses_what_the_run_would(process: Any, model: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "mine.txt").write_text("keep")
    for words in ((), ("--dry-run",)):
        code, _, err = ended(process, *ROUND, *words, model, foreign)
        assert code == 6
        assert "exists and is not Rewright's" in err
    assert [path.name for path in foreign.iterdir()] == ["mine.txt"]
    assert ended(process, *ROUND, model, tmp_path / "out")[0] == 0
    assert ended(process, *ROUND, "--dry-run", model, tmp_path / "out")[0] == 0
    changed = ("compress", "--method", "rtn", "--bits", "3", "--dry-run")
    assert ended(process, *changed, model, tmp_path / "out")[0] == 6
    assert ended(process, *changed, "--update", model, tmp_path / "out")[0] == 0
