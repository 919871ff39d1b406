"""The entry point, and the boundary around every command: each way one can end, and its exit code.

What takes time to import is imported inside the boundary, so that a Ctrl-C finds it in place from the start.
"""

from __future__ import annotations

import os
import shlex
import sys
import warnings
from collections.abc import Sequence

from rewright.cli import console, environment, exits
from rewright.cli.signals import Signals
from rewright.passes import world


def _settle_streams() -> None:
    """Make the standard streams fit to use: none missing, none that raises on a character it lacks."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, this one
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - lives as long as the process
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _log(error: BaseException, words: Sequence[str]) -> str | None:
    """Write a bug's traceback to a file of its own; its path, or None where no file can be written."""
    import tempfile
    import traceback

    from rewright.cli import env

    text = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="rewright-", suffix=".log", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            file.write(f"{shlex.join(['rewright', *words])}\npython {sys.version}\n")
            file.write("".join(f"{name} {env.version_of(name)}\n" for name in env.LIBRARIES))
            file.write(text)
        return file.name
    except OSError:
        sys.stderr.write(text)
        return None


def _makes(words: Sequence[str]) -> bool:
    """Whether a command line makes a checkpoint."""
    from rewright.passes.registry import SPECS

    return bool(words) and (words[0] in SPECS or words[0] in ("chain", "run"))


def _interrupted(code: int, words: Sequence[str], error: BaseException) -> int:
    """Say that a signal ended the command, and how to go on where there is partial work."""
    ended = "terminated" if code == exits.TERMINATED else "interrupted"
    if world.current().end(ended, error):
        return code
    if _makes(words):
        again = shlex.join(["rewright", *words])
        console.current().error(f"{ended}; partial work is kept", hint=f"the same command goes on from it: `{again}`")
    else:
        console.current().error(ended)
    return code


def _end(error: BaseException, words: Sequence[str], signals: Signals) -> int:
    """Say how a command ended, and give its exit code."""
    # An interrupt can surface as another error: a C extension under import, say, turns it into its own.
    if signals.first is not None or isinstance(error, KeyboardInterrupt):
        return _interrupted(signals.first or exits.INTERRUPTED, words, error)
    if isinstance(error, SystemExit):
        if isinstance(error.__context__, BrokenPipeError):  # Rich turns a closed stdout into exit 1
            return exits.CLOSED
        return error.code if isinstance(error.code, int) else exits.DONE if error.code is None else exits.BUG
    verdict = exits.judge(error)
    if verdict.code == exits.CLOSED or world.current().end(verdict.message, error):
        return verdict.code
    talk, hint = console.current(), verdict.hint
    if talk.level >= console.EVERYTHING:
        import traceback

        traceback.print_exception(error)
    if verdict.code == exits.BUG:
        log = _log(error, words)
        hint = f"the traceback is in {log}; report it with what `rewright env` prints" if log else None
    talk.error(verdict.message, hint=hint)
    return verdict.code


def _flush(code: int) -> int:
    """Send what stdout still holds. A reader that left is exit 141, in silence; a full disk is said."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to fail at exit
        if code == exits.DONE:
            return _end(error, (), Signals())
    return code


def _joined(words: Sequence[str]) -> bool:
    """Take this process's place among those that torchrun has started; whether it has a part in this command.

    What no processes share is done by the first. Of the others none writes to stdout.
    """
    rank, size, local = environment.place()
    if size == 1 or not (_makes(words) or "eval" in words[:1]):
        return rank == 0
    world.join(rank, size, local)
    if rank:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def main(words: Sequence[str] | None = None) -> None:
    """The entry point of `rewright`: runs one command line and exits."""
    words = sys.argv[1:] if words is None else words
    signals = Signals()
    try:
        signals.listen()
        _settle_streams()
        environment.settle(sys.stdout)
        warnings.simplefilter("ignore")  # the libraries' own, meant for their callers
        if _joined(words):
            from rewright.cli import root

            code = root.run(words)
        else:
            code = exits.DONE
        world.current().close()
    except BaseException as error:
        try:
            code = _end(error, words, signals)
        except BrokenPipeError:  # nobody reads stderr either
            code = exits.CLOSED
    code = _flush(code)
    console.current().close()
    if signals.first is not None:
        # The interpreter's own shutdown takes a while and hands signals back to the system: a second Ctrl-C then
        # would end this as killed, not as interrupted.
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
