"""The root command with every command under it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from rewright.cli import chain, console, env, exits, export, measure, passes, show, transfer, usage


def _version(wanted: bool) -> None:
    if wanted:
        console.write(f"rewright {env.version_of('rewright') or 'unknown'}")
        raise typer.Exit


def build() -> typer.Typer:
    """The root app."""
    app = typer.Typer(pretty_exceptions_enable=False)

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

    for module in (chain, show, measure, transfer, export, passes, env):
        module.register(app)
    return app


def run(words: Sequence[str]) -> int:
    """Parse and carry out one command line; returns the exit code. Raises whatever went wrong."""
    app = build()
    known = [command.name for command in app.registered_commands if command.name]
    parsed = usage.parse(app, words or ["--help"], prog="rewright", known=known)
    if callable(parsed):
        parsed()
        return exits.DONE
    return parsed if isinstance(parsed, int) and words else exits.USAGE
