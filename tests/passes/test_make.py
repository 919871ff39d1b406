"""GNU make with the stamp as target: it rebuilds when it should, and only then."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.passes.conftest import DATA, STORIES

MAKEFILE = """\
.DELETE_ON_ERROR:
BOUND = inf

out/rewright.json: text.txt model/model.safetensors
\t{python} -m rewright compress --threads 1 --update --require 'error_calibration<$(BOUND)' model out \\
\t  --method rtn --bits 8 --group-size 32 --calibration-text text.txt --samples 4 --sequence-length 64
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "Makefile").write_text(MAKEFILE.format(python=sys.executable))
    (tmp_path / "text.txt").write_bytes((DATA / "tinystories.txt").read_bytes()[:20_000])
    shutil.copytree(STORIES, tmp_path / "model")
    return tmp_path


def _make(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", *words], cwd=folder, capture_output=True, text=True, check=False)


def _times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "out").iterdir() if path.is_file()}


def test_make_rebuilds_exactly_when_it_should(folder: Path) -> None:
    done = _make(folder)
    assert done.returncode == 0, done.stderr
    built = _times(folder)

    idle = _make(folder)
    assert (idle.returncode, idle.stdout) == (0, "make: 'out/rewright.json' is up to date.\n")
    assert _times(folder) == built

    os.utime(folder / "text.txt")
    touched = _make(folder)
    assert touched.returncode == 0
    assert touched.stderr == "`out` is up to date\n", "make asked, and there was nothing to do"
    now = _times(folder)
    assert now.pop("rewright.json") > built.pop("rewright.json")
    assert now == built
    assert "is up to date" in _make(folder).stdout, "the stamp is newer than the text again"

    with (folder / "text.txt").open("a") as text:
        text.write("And then the cat sat on the mat. " * 50)
    missed = _make(folder, "BOUND=1e-9")
    assert missed.returncode == 2
    assert "Error 5" in missed.stderr
    assert {**_times(folder), "rewright.json": 0} == {**built, "rewright.json": 0}, "the old output stands"
    assert (folder / "out" / "rewright.json").exists(), "and make had no cause to delete its stamp"

    rebuilt = _make(folder)
    assert rebuilt.returncode == 0, rebuilt.stderr
    assert _times(folder)["model.safetensors"] > built["model.safetensors"]
    assert "is up to date" in _make(folder).stdout
    assert sorted(path.name for path in folder.iterdir()) == ["Makefile", "model", "out", "text.txt"]
