"""Locks: one holder, dead ones taken over, live and foreign ones respected."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rewright.formats import locks
from rewright.formats.errors import ConflictError, StorageError
from rewright.formats.publish import lock

HOLD = (
    "import sys, time\n"
    "from rewright.formats.publish import lock\n"
    "with lock(sys.argv[1]):\n"
    "    print('held', flush=True)\n"
    "    time.sleep(60)\n"
)
# Each waits for the start file, then tries; the winner holds until the others have tried.
RACE = (
    "import os, sys, time\n"
    "from rewright.formats.errors import ConflictError\n"
    "from rewright.formats.publish import lock\n"
    "print('ready', flush=True)\n"
    "while not os.path.exists(sys.argv[2]): pass\n"
    "try:\n"
    "    with lock(sys.argv[1]):\n"
    "        print('won', flush=True)\n"
    "        sys.stdin.read()\n"
    "except ConflictError:\n"
    "    print('lost', flush=True)\n"
)


def start(code: str, *args: object) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_one_at_a_time(tmp_path: Path) -> None:
    with lock(tmp_path / "out") as path:
        assert path == tmp_path / "out.lock"
        assert json.loads(path.read_text())["pid"] == os.getpid()
        with pytest.raises(ConflictError, match=f"written by process {os.getpid()} on"), lock(tmp_path / "out"):
            pass
        with lock(tmp_path / "other"):
            pass
    assert os.listdir(tmp_path) == []
    with lock(tmp_path / "out"):
        pass


def test_released_by_errors(tmp_path: Path) -> None:
    with pytest.raises(KeyError), lock(tmp_path / "out"):
        raise KeyError
    assert os.listdir(tmp_path) == []


def test_live_process_keeps_it_and_dead_one_loses_it(tmp_path: Path) -> None:
    holder = start(HOLD, tmp_path / "out")
    try:
        assert line(holder) == "held"
        with pytest.raises(ConflictError) as caught, lock(tmp_path / "out"):
            pass
        assert str(holder.pid) in str(caught.value)
        assert str(tmp_path / "out.lock") in (caught.value.hint or "")
        holder.send_signal(signal.SIGSTOP)
        with pytest.raises(ConflictError), lock(tmp_path / "out"):
            pass
    finally:
        end(holder)
    with lock(tmp_path / "out"):
        assert json.loads((tmp_path / "out.lock").read_text())["pid"] == os.getpid()
    assert os.listdir(tmp_path) == []


def record(**changes: Any) -> str:
    return json.dumps({**locks._this_process(), **changes})


def test_number_that_another_process_has_now(tmp_path: Path) -> None:
    """A process number is used again: the start time tells the new process from the holder."""
    (tmp_path / "out.lock").write_text(record(pid=os.getppid(), started="1"))
    with lock(tmp_path / "out"):
        pass


def test_before_the_last_boot(tmp_path: Path) -> None:
    (tmp_path / "out.lock").write_text(record(boot="another"))
    with lock(tmp_path / "out"):
        pass


@pytest.mark.parametrize(
    "text",
    [
        record(host="elsewhere", pid=2**22 + 1),
        record(machine="another", pid=2**22 + 1),
        record(space="pid:[1]", pid=2**22 + 1),
        record(pid=0),
        record(pid="1"),
        "",
        "[]",
        '{"host": "ha',
    ],
)
def test_uncertain_holders_are_respected(text: str, tmp_path: Path) -> None:
    (tmp_path / "out.lock").write_text(text)
    with pytest.raises(ConflictError) as caught, lock(tmp_path / "out"):
        pass
    assert "delete" in (caught.value.hint or "")
    assert (tmp_path / "out.lock").read_text() == text


@pytest.mark.parametrize("stale", [False, True])
def test_contention(stale: bool, tmp_path: Path) -> None:
    for turn in range(3):
        dst, go = tmp_path / f"out{turn}", tmp_path / f"go{turn}"
        if stale:
            (tmp_path / f"out{turn}.lock").write_text(record(pid=2**22 + 1))
        racers = [start(RACE, dst, go) for _ in range(4)]
        assert [line(racer) for racer in racers] == ["ready"] * 4
        go.touch()
        assert sorted(line(racer) for racer in racers) == ["lost"] * 3 + ["won"]
        for racer in racers:
            racer.communicate()
            assert racer.returncode == 0
        go.unlink()
    assert os.listdir(tmp_path) == []


def test_disk_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    with lock(tmp_path / "out"), pytest.raises(ConflictError), lock(tmp_path / "out"):
        pass
    assert os.listdir(tmp_path) == []


def test_lock_taken_away_by_hand_is_left_alone(tmp_path: Path) -> None:
    with lock(tmp_path / "out") as path:
        path.write_text("another's")
    assert path.read_text() == "another's"
    path.unlink()
    with lock(tmp_path / "out") as path:
        path.unlink()


def test_folder_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As root a mode stops nobody, so the system call is made to answer as it does to others."""

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(StorageError, match="permission denied") as caught, lock(tmp_path / "out"):
        pass
    assert caught.value.hint
    with pytest.raises(StorageError), lock("/proc/nowhere/out"):
        pass


@pytest.mark.parametrize("refused", [False, True])
def test_a_dead_holder_is_taken_over_where_the_system_has_no_file_locks(
    refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill in the middle of a takeover leaves nothing that stops the next run, where the system locks files."""
    if refused:

        def refuse(*_: object) -> None:
            raise OSError(errno.ENOLCK, "no locks available")

        monkeypatch.setattr("fcntl.flock", refuse)
    dead = subprocess.run(
        [
            sys.executable,
            "-c",
            "import os, sys; from rewright.formats.locks import lock\n"
            f"with lock({str(tmp_path / 'out')!r}): os.kill(os.getpid(), 9)",
        ],
        check=False,
    )
    assert dead.returncode == -9
    assert (tmp_path / "out.lock").exists()
    with lock(tmp_path / "out"), pytest.raises(ConflictError), lock(tmp_path / "out"):
        pass
    assert not list(tmp_path.iterdir())
