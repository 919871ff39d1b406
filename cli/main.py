"""The root command and the boundary around it: every way a command can end, and its exit code."""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

from rewright.cli import chain, console, env, environment, exits, measure, passes, show, usage
from rewright.cli.signals import Signals
from rewright.passes.registry import SPECS


def _version(wanted: bool) -> None:
    if wanted:
        console.write(f"rewright {env.version_of('rewright') or 'unknown'}")
        raise typer.Exit


def build() -> typer.Typer:
    """The root app with every command."""
    app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

    @app.callback()
    def root(
        version: Annotated[
            bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and exit")
        ] = False,
    ) -> None:
        """Passes over model checkpoints: each reads a safetensors checkpoint and writes one.

        Stdout carries data, stderr talk, and the exit code the verdict.

        Example: rewright compress model out --bits 4 --calibration-text text.txt
        """

    for module in (chain, show, measure, passes, env):
        module.register(app)
    return app


def run(words: Sequence[str], signals: Signals) -> int:
    """Parse and carry out one command line; returns the exit code. Raises whatever went wrong."""
    app = build()
    known = [command.name for command in app.registered_commands if command.name]
    parsed = usage.parse(app, words or ["--help"], prog="rewright", known=known)
    if callable(parsed):
        signals.listen()
        talk = console.current()
        signals.screen = talk.live
        parsed()
        return exits.DONE
    return parsed if isinstance(parsed, int) and words else exits.USAGE


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


def _end(error: BaseException, words: Sequence[str], signals: Signals) -> int:
    """Say how a command ended, and give its exit code."""
    talk = console.current()
    # An interrupt can surface as another error: a C extension under import, say, turns it into its own.
    interrupted = signals.first or (exits.INTERRUPTED if isinstance(error, KeyboardInterrupt | typer.Abort) else None)
    if interrupted is not None:
        ended = "terminated" if interrupted == exits.TERMINATED else "interrupted"
        if words and (words[0] in SPECS or words[0] in ("chain", "run")):
            again = chain.resume_line(words)
            talk.error(f"{ended}; partial work is kept", hint=f"the same command goes on from it: `{again}`")
        else:
            talk.error(ended)
        return interrupted
    if isinstance(error, SystemExit):
        if isinstance(error.__context__, BrokenPipeError):  # Rich turns a closed stdout into exit 1
            return exits.CLOSED
        return error.code if isinstance(error.code, int) else exits.DONE if error.code is None else exits.BUG
    verdict = exits.judge(error)
    if verdict.code == exits.CLOSED:
        return verdict.code
    if talk.level >= console.EVERYTHING:
        traceback.print_exception(error)
    hint = verdict.hint
    if verdict.code == exits.BUG:
        log = _log(error, words)
        hint = f"the traceback is in {log}; report it with what `rewright env` prints" if log else None
    talk.error(verdict.message, hint=hint)
    return verdict.code


def _flush(code: int) -> int:
    """Send what stdout still holds. A reader that left is exit 141, in silence."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to fail at exit
        return exits.judge(error).code if code == exits.DONE else code
    return code


def main(words: Sequence[str] | None = None) -> None:
    """The entry point of `rewright`: runs one command line and exits."""
    words = sys.argv[1:] if words is None else words
    _settle_streams()
    environment.settle(sys.stdout)
    warnings.simplefilter("ignore")  # the libraries' own, meant for their callers
    signals = Signals()
    try:
        code = run(words, signals)
    except BaseException as error:
        code = _end(error, words, signals)
    code = _flush(code)
    console.current().close()
    sys.exit(code)
