"""Typer's usage errors in our words. Versions raise them from different modules, so they are known by their shape."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import typer
import typer.main

from rewright.passes.errors import UsageError
from rewright.passes.registry import nearest

_WORD = re.compile(r"'([^']*)'")
_COMMAND = re.compile(r"^No such command '(.*?)'\.?")
_EXTRA = re.compile(r"^Got unexpected extra argument(?:s|\(s\))? \((.*)\)$")


def is_usage(error: BaseException) -> bool:
    """Whether Typer refused the words it was given."""
    return getattr(error, "exit_code", None) == 2 and callable(getattr(error, "format_message", None))


def translate(error: Any, known: Iterable[str] = ()) -> UsageError:
    """A usage error of Typer's as ours; `known` are the words that could have been meant."""
    message = str(error.format_message()).partition("\n")[0].strip()
    if found := _COMMAND.match(message):
        return unknown("command or pass", found[1], known)
    option = getattr(error, "option_name", None)
    if option and hasattr(error, "possibilities"):
        return unknown("option", option, error.possibilities or known)
    if found := _EXTRA.match(message):
        return UsageError(f"unexpected word `{found[1]}`")
    said = _WORD.sub(r"`\1`", message.rstrip("."))
    return UsageError(said[:1].lower() + said[1:])


def unknown(kind: str, word: str, known: Iterable[str]) -> UsageError:
    """The refusal of a word that nothing answers to, with the nearest that something does."""
    close = nearest(word, known)
    return UsageError(f"no {kind} `{word}`", hint=f"did you mean `{close}`?" if close else None)


def parse(app: typer.Typer, words: Sequence[str], *, prog: str, known: Iterable[str] = ()) -> Any:
    """Let Typer read `words`: what the command returned, or an exit code after help. Raises UsageError."""
    try:
        return typer.main.get_command(app)(list(words), prog_name=prog, standalone_mode=False)
    except Exception as error:
        if is_usage(error):
            raise translate(error, known) from None
        raise
