"""The one table of environment switches that the command line reads.

Nothing here is read at import. Kernels have a switch of their own (`REWRIGHT_KERNELS`), read by their dispatcher.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from typing import TextIO


@dataclass(frozen=True, slots=True)
class Switch:
    """An environment variable and what it does, for `rewright env` and the reference pages."""

    name: str
    help: str


NO_COLOR = Switch("NO_COLOR", "not empty: no escape byte at all, so no live bar either; wins over FORCE_COLOR")
FORCE_COLOR = Switch("FORCE_COLOR", "not empty: colour even where the stream is no terminal")
NO_PROGRESS = Switch("REWRIGHT_NO_PROGRESS", "not empty: no progress, neither bars nor lines")
TERM = Switch("TERM", "`dumb`: no colour and no live bar")
KERNELS = Switch("REWRIGHT_KERNELS", "`auto`, `triton` or `reference`: which implementation of each op")
INTERPRET = Switch("TRITON_INTERPRET", "`1`: Triton kernels run in its interpreter, on a CPU")

RANK = Switch("RANK", "set by torchrun: the place of this process among those of a run")
LOCAL_RANK = Switch("LOCAL_RANK", "set by torchrun: the place of this process on its machine, and of its GPU")
WORLD_SIZE = Switch("WORLD_SIZE", "set by torchrun: how many processes share a run")

SWITCHES = (NO_COLOR, FORCE_COLOR, NO_PROGRESS, TERM, KERNELS, INTERPRET, RANK, LOCAL_RANK, WORLD_SIZE)

# Typer takes these for a terminal that wants colour, whatever its output is.
_TYPER_FORCES = ("GITHUB_ACTIONS", "PY_COLORS", "FORCE_COLOR", "TTY_COMPATIBLE")


def value(switch: Switch) -> str:
    """What the switch is set to; empty where it is not."""
    return os.environ.get(switch.name, "")


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person is likely to look at `stream`; false for one that is closed."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:
        return False


def colour(stream: TextIO | None) -> bool:
    """Whether escape codes may go to `stream`."""
    if value(NO_COLOR):
        return False
    if value(FORCE_COLOR):
        return True
    return is_terminal(stream) and value(TERM).lower() not in ("dumb", "unknown")


def live(stream: TextIO | None) -> bool:
    """Whether a bar may redraw itself on `stream`; forced colour alone does not make a log a screen."""
    return colour(stream) and is_terminal(stream) and not value(NO_PROGRESS)


def place() -> tuple[int, int, int]:
    """This process's place among those of a run, their number, its place on its machine: (0, 1, 0) without torchrun."""
    rank, size, local = value(RANK), value(WORLD_SIZE), value(LOCAL_RANK)
    if rank.isdecimal() and size.isdecimal() and int(size) > 1:
        return int(rank), int(size), int(local) if local.isdecimal() else 0
    return 0, 1, 0


def settle(stdout: TextIO | None) -> None:
    """Fix, before Typer builds its help, what Typer and the libraries below read from the environment.

    Typer forces escape codes in known CI systems, and Rich keeps bold and reset under NO_COLOR; a dumb terminal is
    what both of them leave plain. The libraries are told to stay off the network, to draw no bars of their own, and to
    sleep where a thread waits: on a machine with other work spinning threads multiply the time of a run.
    """
    if not colour(stdout):
        for name in _TYPER_FORCES:
            os.environ.pop(name, None)
        if is_terminal(stdout):
            size = shutil.get_terminal_size()
            os.environ |= {"TERM": "dumb", "COLUMNS": str(size.columns), "LINES": str(size.lines)}
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TQDM_DISABLE": "1"}
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # a process that is gone is told of by whoever misses it, in one line
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
