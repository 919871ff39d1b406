"""The ordered table from a kind of failure to its exit code. Nothing else in the project knows exit codes."""

from __future__ import annotations

import errno
import sys
from dataclasses import dataclass

from rewright.formats.errors import reason

DONE, BUG, USAGE, INPUT, RESOURCE, BOUND, CONFLICT, STALE = range(8)
INTERRUPTED, CLOSED, TERMINATED = 130, 141, 143


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a failure ends: its exit code, the line said about it, and a hint or none."""

    code: int
    message: str
    hint: str | None = None


# First match wins. A kind whose module was never imported cannot have been raised, so naming it costs no import.
TABLE: tuple[tuple[str, int], ...] = (
    ("rewright.passes.errors:UsageError", USAGE),
    ("rewright.passes.errors:InputError", INPUT),
    ("rewright.passes.errors:ResourceError", RESOURCE),
    ("rewright.passes.errors:BoundError", BOUND),
    ("rewright.passes.errors:StaleError", STALE),
    ("rewright.formats.errors:OverlapError", USAGE),
    ("rewright.formats.errors:StorageError", RESOURCE),
    ("rewright.formats.errors:ConflictError", CONFLICT),
    ("rewright.formats.errors:FormatError", INPUT),
    ("rewright.kernels.dispatch:KernelError", USAGE),
    ("torch:OutOfMemoryError", RESOURCE),
    ("builtins:MemoryError", RESOURCE),
    ("builtins:BrokenPipeError", CLOSED),
)

_MEMORY_HINT = "use fewer or shorter sequences, `--dtype bf16`, or a machine with more memory"
_MISSING = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG})
_REFUSED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE})


def judge(error: BaseException) -> Verdict:
    """The verdict on whatever ended a command. An error that no row knows is a bug."""
    message, hint = str(error), getattr(error, "hint", None)
    for place, code in TABLE:
        if _is_a(error, place):
            if code == RESOURCE and not hasattr(error, "hint"):
                return Verdict(code, _first_line("out of memory", message), _MEMORY_HINT)
            return Verdict(code, message, hint)
    if isinstance(error, RuntimeError) and "can't allocate memory" in message:
        return Verdict(RESOURCE, _first_line("out of memory", message), _MEMORY_HINT)
    if isinstance(error, OSError):
        return _system(error)
    return Verdict(BUG, _first_line(f"a bug in rewright: {type(error).__name__}", message))


def _is_a(error: BaseException, place: str) -> bool:
    module, _, name = place.partition(":")
    kind = getattr(sys.modules.get(module), name, None)
    return isinstance(kind, type) and isinstance(error, kind)


def _first_line(heading: str, message: str) -> str:
    detail = message.strip().partition("\n")[0].rstrip(".")
    return f"{heading}: {detail}" if detail else heading


def _system(error: OSError) -> Verdict:
    """What the system refused: a name that is not there is the user's input, the rest the machine's limits."""
    where = f" `{error.filename}`" if error.filename is not None else ""
    told = reason(error)
    if error.errno in _MISSING and where:
        return Verdict(INPUT, f"cannot open{where}: {told}")
    if error.errno == errno.ENOMEM:
        return Verdict(RESOURCE, f"out of memory: {told}", _MEMORY_HINT)
    if error.errno in _REFUSED:
        return Verdict(RESOURCE, f"cannot use{where}: {told}" if where else f"the system refused: {told}")
    return Verdict(BUG, _first_line(f"a bug in rewright: {type(error).__name__}", str(error)))
