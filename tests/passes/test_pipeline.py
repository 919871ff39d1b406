"""What a run does with what stands at its destination: nothing, refuse, replace, or only answer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.passes.conftest import DATA, STORIES
from tests.passes.forks import Forks, Strike
from tests.passes.outputs import beside, contents, stamp

RTN = ("compress", "--threads", "1", "--method", "rtn", "--bits", "8", "--group-size", "32")
LONG_AGO = 10**18
HEAVY = {"torch", "transformers", "triton", "scipy", "numpy", "safetensors"}


def _words(src: Path, dst: Path, *more: str | Path) -> list[str | Path]:
    return [*RTN, src, dst, *more]


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return Path(shutil.copytree(STORIES, tmp_path / "model"))


@pytest.fixture
def dst(forks: Forks, src: Path, tmp_path: Path) -> Path:
    """An output whose files say that they were written long ago."""
    made = tmp_path / "out"
    assert forks.run(*_words(src, made)).code == 0
    for path in made.rglob("*"):
        os.utime(path, ns=(LONG_AGO, LONG_AGO))
    return made


def _touched(folder: Path) -> list[str]:
    """The files whose time has changed."""
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.stat().st_mtime_ns != LONG_AGO]


def _flip(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_up_to_date_touches_the_stamp_and_loads_nothing(src: Path, dst: Path) -> None:
    code = (
        "import sys\nfrom rewright.cli.main import main\n"
        f"try:\n    main({[str(word) for word in _words(src, dst, '--json')]!r})\n"
        f"except SystemExit as ended:\n    print(ended.code, sorted({HEAVY} & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == f"`{dst}` is up to date\n0 []\n"
    assert json.loads(done.stdout)["state"] == "up-to-date"
    assert _touched(dst) == ["rewright.json"]
    assert beside(dst) == []


def test_check_only_answers(forks: Forks, src: Path, dst: Path) -> None:
    assert forks.run(*_words(src, dst, "--check")).code == 0
    ended = forks.run(*_words(src, dst, "--check", "--seed", "5", "--bits", "3"))
    assert (ended.code, ended.out) == (7, "")
    assert ended.err == f"error: `{dst}` is not up to date: `--seed` was 0, is 5; `--bits` was 8, is 3\n"
    nothing = dst.with_name("nothing")
    ended = forks.run(*_words(src, nothing, "--check"))
    assert (ended.code, ended.err) == (7, f"error: `{nothing}` is not up to date: nothing is there\n")
    assert (_touched(dst), beside(dst), nothing.exists(), beside(nothing)) == ([], [], False, [])


def test_stale_is_refused_by_name_then_updated(forks: Forks, src: Path, dst: Path) -> None:
    words = _words(src, dst, "--bits", "4", "--skip", "o_proj", "--asymmetric")
    ended = forks.run(*words)
    assert ended.code == 6
    assert ended.err == (
        f"error: `{dst}` exists and differs: `--bits` was 8, is 4; `--skip` was not given, is "
        '["o_proj"]; `--symmetric` was true, is false\n\n'
        "hint: add `--update` to replace it, or choose another destination\n"
    )
    assert (_touched(dst), beside(dst)) == ([], [])
    assert forks.run(*words, "--update").code == 0
    assert stamp(dst)["stages"][0]["options"]["bits"] == 4
    assert forks.run(*words, "--update").err == f"`{dst}` is up to date\n"
    assert beside(dst) == []


def test_force_builds_again(forks: Forks, src: Path, dst: Path) -> None:
    was, number = contents(dst), dst.stat().st_ino
    assert forks.run(*_words(src, dst, "--force")).code == 0
    assert dst.stat().st_ino != number
    assert contents(dst) == was
    assert len(_touched(dst)) > 3


def test_options_that_change_no_byte_change_nothing(forks: Forks, src: Path, dst: Path) -> None:
    more = ("--threads", "2", "--device", "cpu", "--kernels", "reference", "-q")
    assert forks.run(*_words(src, dst, *more)).code == 0
    assert _touched(dst) == ["rewright.json"]


def test_a_source_is_known_by_its_contents(forks: Forks, src: Path, dst: Path) -> None:
    os.utime(src / "model.safetensors")
    assert forks.run(*_words(src, dst)).err == f"`{dst}` is up to date\n"
    known = stamp(dst)["source"]["files"]["model.safetensors"]
    assert known["mtime_ns"] == (src / "model.safetensors").stat().st_mtime_ns, "read once, not on every run"
    for name, said in (("tokenizer.json", 6), ("config.json", 6), ("README.md", 0)):
        kept = (src / name).read_bytes() if (src / name).exists() else b""
        (src / name).write_bytes(kept + b" ")
        ended = forks.run(*_words(src, dst))
        assert ended.code == said, name
        assert said == 0 or "exists and differs: the source's contents changed\n" in ended.err
        (src / name).write_bytes(kept)
    assert forks.run(*_words(src, dst, "--check")).code == 0


def test_another_source_of_equal_size_and_time_is_another(forks: Forks, src: Path, dst: Path, tmp_path: Path) -> None:
    """As packages with all times set to one have them."""
    other = Path(shutil.copytree(src, tmp_path / "other"))
    _flip(other / "model.safetensors")
    for path in src.iterdir():
        os.utime(path, ns=(LONG_AGO, LONG_AGO))
        os.utime(other / path.name, ns=(LONG_AGO, LONG_AGO))
    assert forks.run(*_words(src, dst)).code == 0
    assert forks.run(*_words(other, dst)).code == 6
    moved = src.rename(tmp_path / "moved")
    assert forks.run(*_words(moved, dst)).code == 0, "where a model lies is not what it is"


@pytest.mark.parametrize("how", ["cut", "gone", "foreign"])
def test_an_incomplete_output_is_not_up_to_date(how: str, forks: Forks, src: Path, dst: Path) -> None:
    was = contents(dst)
    if how == "cut":
        os.truncate(dst / "model.safetensors", 1000)
    elif how == "gone":
        (dst / "tokenizer.json").unlink()
    else:
        (dst / "rewright.json").write_text(json.dumps({"key": stamp(dst)["key"], "files": 3, "stages": {}}))
    assert forks.run(*_words(src, dst, "--check")).code == 7
    assert forks.run(*_words(src, dst)).code == 6
    assert forks.run(*_words(src, dst, "--update")).code == 0
    assert contents(dst) == was


def test_source_and_destination_stay_apart(forks: Forks, src: Path, tmp_path: Path) -> None:
    was = contents(src)
    link = tmp_path / "link"
    link.symlink_to(src)
    for target in (src, src / "out", tmp_path, link, link / "out"):
        for more in ((), ("--force",), ("--update",)):
            ended = forks.run(*_words(src, target, *more))
            assert ended.code == 2, (target, more, ended.err)
    assert contents(src) == was
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "model"]


@pytest.mark.parametrize("more", [(), ("--update",), ("--force",)])
def test_what_is_not_ours_stays(more: tuple[str, ...], forks: Forks, src: Path, tmp_path: Path) -> None:
    folder, file, partial = tmp_path / "folder", tmp_path / "file", tmp_path / "out.partial"
    for path in (folder, partial):
        path.mkdir()
        (path / "thesis.txt").write_text("years of work")
    file.write_text("years of work")
    for target in (folder, file, tmp_path / "out"):
        ended = forks.run(*_words(src, target, *more))
        assert ended.code == 6, ended.err
        assert "not Rewright's" in ended.err
    assert {path.read_text() for path in (file, *tmp_path.glob("*/thesis.txt"))} == {"years of work"}
    partial.rename(tmp_path / "elsewhere")
    partial.write_text("a file")
    assert forks.run(*_words(src, tmp_path / "out", *more)).code == 6
    assert partial.read_text() == "a file"


def test_an_empty_folder_is_as_good_as_none(forks: Forks, src: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out.partial").mkdir()
    dry = forks.run(*_words(src, tmp_path / "out", "--dry-run", "--json"))
    assert json.loads(dry.out)["state"] == "fresh"
    assert forks.run(*_words(src, tmp_path / "out")).code == 0
    assert beside(tmp_path / "out") == []


def test_standard_input_is_text_like_any_other(forks: Forks, src: Path, tmp_path: Path) -> None:
    text = (DATA / "tinystories.txt").read_bytes()[:30_000]
    more = ("--calibration-text", "-", "--samples", "4", "--sequence-length", "64")
    words = _words(src, tmp_path / "out", *more)
    assert forks.run(*words, stdin=text).code == 0
    assert forks.run(*words, stdin=text).err == f"`{tmp_path / 'out'}` is up to date\n"
    ended = forks.run(*words, stdin=text + b"!")
    assert ended.code == 6
    assert "the contents of `--calibration-text` changed" in ended.err
    file = tmp_path / "text.txt"
    file.write_bytes(text)
    named = [file if word == "-" else word for word in words]
    assert forks.run(*named).code == 0, "the key holds contents, not names"


def test_dry_and_real_runs_have_one_shape(forks: Forks, src: Path, tmp_path: Path) -> None:
    def shape(value: Any) -> Any:
        return {key: shape(item) for key, item in value.items()} if isinstance(value, dict) else None

    words = ["chain", "--json", "--threads", "1", src, tmp_path / "out", *RTN[:1], *RTN[3:], "--format", "dense"]
    dry = forks.run(words[0], "--dry-run", *words[1:])
    assert (beside(tmp_path / "out"), (tmp_path / "out").exists()) == ([], False)
    real, again = forks.run(*words), forks.run(*words)
    documents = [json.loads(ended.out) for ended in (dry, real, again)]
    assert [document["state"] for document in documents] == ["fresh", "done", "up-to-date"]
    assert documents[1]["stages"][0]["metrics"] == documents[2]["stages"][0]["metrics"]
    assert documents[0]["stages"][0]["seconds_estimated"] > 0
    for document in documents:
        stage = document["stages"][0]
        assert stage["metrics"] is None or stage["metrics"]["matrices"] == 35
        stage["metrics"] = None
    assert shape(documents[0]) == shape(documents[1]) == shape(documents[2])


def test_two_runs_at_one_destination(forks: Forks, src: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = forks.start(*_words(src, out), strike=Strike(4, "journal.jsonl", 19))  # SIGSTOP
    while "\nState:\tT" not in Path(f"/proc/{first.pid}/status").read_text():
        pass
    ended = forks.run(*_words(src, out))
    assert ended.code == 6
    assert ended.err.startswith(f"error: `{out}` is being written by process {first.pid} on `")
    assert forks.run(*_words(src, out, "--force")).code == 6
    assert forks.run(*_words(src, out, "--check")).code == 7
    os.kill(first.pid, 18)  # SIGCONT
    assert forks.wait(first).code == 0
    assert beside(out) == []
    assert forks.run(*_words(src, out)).err == f"`{out}` is up to date\n"


def test_many_runs_at_once(forks: Forks, src: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = [forks.wait(job) for job in [forks.start(*_words(src, out)) for _ in range(4)]]
    codes = [one.code for one in ended]
    assert 0 in codes
    assert set(codes) <= {0, 6}, [one.err for one in ended]
    assert forks.run(*_words(src, out, "--check")).code == 0
    assert beside(out) == []
