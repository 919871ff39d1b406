"""`passes`: the passes there are, and one in full."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer

from rewright.cli import console
from rewright.cli.build import command, completer, metavar
from rewright.cli.console import table
from rewright.passes import registry
from rewright.passes.run_options import RunOptions
from rewright.passes.spec import Field, Spec, fields_of


def facts(spec: Spec) -> dict[str, Any]:
    """A pass as JSON: everything its spec says."""
    return {
        "pass": spec.name,
        "summary": spec.summary,
        "version": spec.version,
        "wants": sorted(spec.wants),
        "gives": spec.gives,
        "attachment": spec.attachment,
        "grain": spec.grain,
        "archs": sorted(spec.archs),
        "paper": spec.paper,
        "options": [option(item) for item in fields_of(spec.options)],
    }


def option(item: Field) -> dict[str, Any]:
    """An option as JSON."""
    kind = "choice" if item.choices else item.type.__name__
    default = None if item.required or item.default is None else item.default
    if item.many:
        default = [item.plain(one) for one in item.default] if default is not None else []
    return {
        "flag": f"--{item.flag}",
        "negative": f"--{item.opt.negative}" if item.opt.negative else None,
        "type": kind,
        "metavar": "" if item.type is bool else metavar(item),
        "choices": list(item.choices),
        "default": default if default is None or item.many else item.plain(default),
        "required": item.required,
        "repeatable": item.many,
        "min": item.opt.min,
        "max": item.opt.max,
        "affects": item.opt.affects,
        "help": item.opt.help,
    }


def passes(
    run: RunOptions,
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            help="a pass to show in full",
            autocompletion=completer(registry.SPECS),
        ),
    ] = None,
) -> None:
    """List the passes, or show one with its options and its paper.

    Example: rewright passes compress
    """
    if name is None:
        if run.json:
            console.write_json([facts(spec) for spec in registry.SPECS.values()])
        else:
            console.write(table((spec.name, spec.summary) for spec in registry.SPECS.values()))
        return
    spec = registry.get(name)
    if run.json:
        console.write_json(facts(spec))
    else:
        console.write("\n".join(_page(spec)))


def _page(spec: Spec) -> Iterator[str]:
    yield f"{spec.name}: {spec.summary}"
    yield ""
    yield table(
        [
            ("paper", spec.paper),
            ("wants", ", ".join(sorted(spec.wants))),
            ("gives", spec.gives if spec.attachment is None else f"{spec.gives} `{spec.attachment}`"),
            ("a resume loses", f"at most one {spec.grain}"),
            ("models", ", ".join(sorted(spec.archs)) or "any"),
            ("version", str(spec.version)),
        ]
    )
    yield ""
    yield table(_row(option(item)) for item in fields_of(spec.options))


def _row(item: dict[str, Any]) -> tuple[str, str, str, str]:
    flag = item["flag"] if item["negative"] is None else f"{item['flag']}/{item['negative']}"
    default = "" if item["default"] in (None, []) else str(item["default"]).lower()
    return flag, item["metavar"], "required" if item["required"] else default, item["help"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "passes", run=("json",), rich_help_panel="Look")(passes)
