"""Command lines by the hundred: a process that has imported everything and run nothing forks a child for each.

A child is a real process with its own streams, fit to be killed; it starts in milliseconds, where a fresh one takes
seconds to import torch and transformers.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

# Audit events that come just before something changes on the disk.
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "ctypes.dlopen"}


@dataclass(frozen=True)
class Ended:
    """How a command line ended: its exit code, or minus the signal; what it said."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Strike:
    """A signal that a run gets from itself, just before its `number`-th change to the disk that is about `name`."""

    number: int
    name: str = ""
    signal: int = signal.SIGKILL


@dataclass(frozen=True)
class Job:
    """A command line under way."""

    pid: int
    folder: Path


class Forks:
    """The test's end of the server."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-B", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._read() == "ready"

    def start(self, *words: str | Path, stdin: bytes = b"", strike: Strike | None = None, also: str = "") -> Job:
        """Begin a command line, after `also`, which is Python."""
        folder = Path(tempfile.mkdtemp())
        (folder / "in").write_bytes(stdin)
        when = astuple(strike or Strike(0))
        return Job(
            int(self._ask(do="start", words=[str(w) for w in words], folder=str(folder), strike=when, also=also)),
            folder,
        )

    def wait(self, job: Job) -> Ended:
        code = int(self._ask(do="wait", pid=job.pid))
        # one that was killed at once has not even opened its streams
        out, err = (path.read_text() if path.exists() else "" for path in (job.folder / "out", job.folder / "err"))
        return Ended(code, out, err)

    def run(self, *words: str | Path, stdin: bytes = b"", strike: Strike | None = None, also: str = "") -> Ended:
        return self.wait(self.start(*words, stdin=stdin, strike=strike, also=also))

    def changes(self, *words: str | Path, also: str = "") -> int:
        """How many times a command line changes the disk, counted as `Strike` counts."""
        job = self.start(*words, also=also)
        assert self.wait(job).code == 0
        return int((job.folder / "changes").read_text())

    def close(self) -> None:
        self._server.communicate(timeout=60)

    def _ask(self, **request: Any) -> str:
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return self._read()

    def _read(self) -> str:
        assert self._server.stdout is not None
        return self._server.stdout.readline().strip()


def serve() -> None:
    """Answer requests from standard input until it ends."""
    import compressed_tensors  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401
    from transformers.quantizers import auto  # noqa: F401

    from rewright.cli import root  # noqa: F401
    from rewright.passes import evaluate, pipeline  # noqa: F401
    from rewright.passes.compress import run as compressing  # noqa: F401
    from rewright.passes.prompt import run as prompting  # noqa: F401

    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "wait":
            print(os.waitstatus_to_exitcode(os.waitpid(request["pid"], 0)[1]), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            exec(request["also"])
            _be_child(request["words"], Path(request["folder"]), Strike(*request["strike"]))
        print(pid, flush=True)


def _be_child(words: Sequence[str], folder: Path, strike: Strike) -> None:
    for number, (name, flags) in enumerate((("in", os.O_RDONLY), ("out", os.O_WRONLY), ("err", os.O_WRONLY))):
        os.dup2(os.open(folder / name, flags | os.O_CREAT, 0o600), number)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115 - until the process ends
    changes = _count(strike)
    from rewright.cli.main import main

    code: Any = 1
    try:
        main(words)
    except SystemExit as ended:
        code = ended.code
    sys.stdout.flush()
    sys.stderr.flush()
    (folder / "changes").write_text(str(changes[0]))
    os._exit(code)


def _count(strike: Strike) -> list[int]:
    """Count changes to the disk from now on, and strike at the one that was asked for."""
    seen = [0]

    def hook(event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if (event in CHANGES or writes) and strike.name in str(args):
            seen[0] += 1
            if seen[0] == strike.number:
                os.kill(os.getpid(), strike.signal)

    sys.addaudithook(hook)
    return seen


if __name__ == "__main__":
    serve()
