"""What goes to which stream, and what never does: escapes, heavy imports, tracebacks."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .conftest import PROGRAM, clean_environment

MODEL = str(Path(__file__).parents[1] / "data" / "stories260K")
ESCAPE = b"\x1b"


def _on_terminal(*words: str, **changes: str) -> tuple[int, bytes]:
    """Run with both streams on a terminal; returns the exit code and what the terminal got."""
    leader, follower = pty.openpty()
    environment = clean_environment(COLUMNS="100", **changes)
    child = subprocess.Popen([*PROGRAM, *words], stdin=follower, stdout=follower, stderr=follower, env=environment)
    os.close(follower)
    got = b""
    while True:
        try:
            block = os.read(leader, 65536)
        except OSError:
            break
        if not block:
            break
        got += block
    os.close(leader)
    return child.wait(timeout=60), got


def test_help_loads_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "triton", "scipy", "numpy", "safetensors")
    code = (
        "import sys\n"
        "from rewright.cli.main import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit as ended:\n"
        f"    print(ended.code, sorted(set(sys.modules) & set({heavy!r})), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == "0 []\n"
    assert "compress" in done.stdout


@pytest.mark.parametrize("words", [("--help",), ("compress", "--help"), ("chain", "--help"), ("passes",)])
@pytest.mark.parametrize(
    "changes",
    [{"GITHUB_ACTIONS": "true"}, {"GITHUB_ACTIONS": "true", "NO_COLOR": "1", "FORCE_COLOR": "1"}, {"PY_COLORS": "1"}],
    ids=lambda changes: "+".join(changes),
)
def test_no_escapes_in_a_pipe(process: Any, words: tuple[str, ...], changes: dict[str, str]) -> None:
    done = process(*words, **changes)
    assert done.returncode == 0
    assert ESCAPE not in done.stdout + done.stderr
    assert b"compress" in done.stdout


def test_no_escapes_in_errors(process: Any) -> None:
    done = process("compres", GITHUB_ACTIONS="true")
    assert (done.returncode, done.stdout) == (2, b"")
    assert ESCAPE not in done.stderr


def test_forced_colour_reaches_a_pipe(process: Any) -> None:
    assert ESCAPE in process("--help", FORCE_COLOR="1").stdout
    assert b"\x1b[1;31merror:\x1b[0m" in process("compres", FORCE_COLOR="1").stderr


def test_colour_on_a_terminal() -> None:
    code, got = _on_terminal("--help")
    assert code == 0
    assert ESCAPE in got


@pytest.mark.parametrize("words", [("--help",), ("compress", "--help"), ("compres",)])
def test_no_color_on_a_terminal(words: tuple[str, ...]) -> None:
    _, got = _on_terminal(*words, NO_COLOR="1", GITHUB_ACTIONS="true", FORCE_COLOR="1")
    assert got
    assert ESCAPE not in got


def test_a_plain_terminal_keeps_its_width() -> None:
    _, got = _on_terminal("--help", NO_COLOR="1")
    assert max(len(line) for line in got.decode().splitlines()) == 100


@pytest.mark.parametrize("words", [("--help",), ("compress", "--help"), ("show", MODEL)])
def test_narrow_and_ascii(process: Any, words: tuple[str, ...]) -> None:
    done = process(*words, COLUMNS="20", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.isascii()


def test_an_error_is_one_line_at_any_width(process: Any) -> None:
    path = "missing/" + "long-folder-name/" * 20
    done = process("show", path, COLUMNS="20")
    assert done.returncode == 3
    assert path.rstrip("/").encode() in done.stderr.splitlines()[0]


def test_paths_are_shown_whole(process: Any, tmp_path: Path) -> None:
    folder = tmp_path / "[red] ü  -x [bold]"
    folder.symlink_to(MODEL)
    done = process("show", str(folder), PYTHONIOENCODING="utf-8")
    assert str(folder).encode() in done.stdout
    ascii_only = process("show", str(folder / "nothing"), PYTHONIOENCODING="ascii")
    assert ascii_only.returncode == 3
    assert b"[red] \\xfc  -x [bold]/nothing" in ascii_only.stderr


def test_a_control_character_is_shown_not_sent(process: Any) -> None:
    done = process("show", "a\x1b[31mb")
    assert done.returncode == 3
    assert ESCAPE not in done.stderr


def test_a_reader_that_leaves(tmp_path: Path) -> None:
    """`rewright ... | true`: exit 141, and nothing on stderr."""
    for words in (("show", MODEL), ("compress", "--help"), ("passes", "--json")):
        reader, writer = os.pipe()
        os.close(reader)
        child = subprocess.Popen([*PROGRAM, *words], stdout=writer, stderr=subprocess.PIPE, env=clean_environment())
        os.close(writer)
        _, told = child.communicate(timeout=60)
        assert (child.returncode, told) == (141, b""), words


def test_nobody_reads_stderr() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    child = subprocess.Popen([*PROGRAM, "compres"], stdout=writer, stderr=writer, env=clean_environment())
    os.close(writer)
    assert child.wait(timeout=60) == 141


def test_streams_closed_from_the_start() -> None:
    line = f"{sys.executable} -m rewright"
    for redirection in (">&-", "2>&-", "<&-", ">&- 2>&- <&-"):
        done = subprocess.run(f"{line} passes {redirection}", shell=True, env=clean_environment(), check=False)
        assert done.returncode == 0, redirection


def test_a_full_disk_under_stdout(process: Any) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([*PROGRAM, "passes"], stdout=full, stderr=subprocess.PIPE, env=clean_environment())
    assert done.returncode == 4


def test_version(process: Any) -> None:
    done = process("--version")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"rewright ")


def test_no_words_is_help_and_usage(process: Any) -> None:
    done = process()
    assert done.returncode == 2
    assert b"Usage: rewright" in done.stdout


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("rewright ch", ["chain"]),
        ("rewright compress --bi", ["--bits", "--bits-for"]),
        ("rewright compress --method g", ["gptq"]),
        ("rewright compress --dtype b", ["bf16"]),
        ("rewright chain src dst comp", ["compress"]),
        ("rewright passes comp", ["compress"]),
    ],
)
def test_bash_completion(process: Any, line: str, wanted: list[str]) -> None:
    words = line.split(" ")
    done = process(_REWRIGHT_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD=str(len(words) - 1))
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode().split() == wanted


def test_bash_completion_script(process: Any) -> None:
    done = process(_REWRIGHT_COMPLETE="source_bash")
    assert done.returncode == 0
    assert b"_REWRIGHT_COMPLETE=complete_bash" in done.stdout
    assert subprocess.run(["bash", "-n"], input=done.stdout, check=False).returncode == 0
