"""Commands made from data: a dataclass of options becomes Typer parameters through a synthesised signature.

Typer sees words; every value is read by the option's own `Field.read`, so that the command line, recipes and
`--set` accept the same things and refuse them with the same text. A command that Typer has parsed does not run:
it is handed back as an `Action`, which the error boundary calls.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Annotated, Any

import typer

from rewright.passes.errors import UsageError
from rewright.passes.run_options import RunOptions
from rewright.passes.spec import Field, fields_of

Action = Callable[[], None]

PASS_PANEL, RUN_PANEL = "Pass options", "Run options"
_METAVARS = {"int": "N", "float": "X", "Path": "PATH", "str": "TEXT"}


def escape(text: str) -> str:
    """Keep square brackets in help from being read as markup."""
    return text.replace("[", r"\[")


def metavar(item: Field) -> str:
    """What stands for an option's value in help: its choices, its kind and bounds."""
    if item.opt.metavar:
        return item.opt.metavar
    if item.choices:
        return "|".join(str(choice) for choice in item.choices)
    name = _METAVARS.get(item.type.__name__, "VALUE")
    low, high = item.opt.min, item.opt.max
    if low is not None and high is not None:
        return f"{low:g}..{high:g}" if high < 1e6 else f"{name}>={low:g}"
    if low is not None:
        return f"{name}>={low:g}"
    return name if high is None else f"{name}<={high:g}"


def _flags(item: Field) -> list[str]:
    word = f"--{item.flag}"
    if item.type is bool and (item.opt.negative or item.default is True):
        word += f"/--{item.opt.negative or 'no-' + item.flag}"
    return [word, f"-{item.opt.short}"] if item.opt.short else [word]


def counts(item: Field) -> bool:
    """Whether an option counts how often it is given: a whole number with a letter, as `-vv`."""
    return item.type is int and item.opt.short is not None


def _parameter(item: Field, panel: str) -> inspect.Parameter:
    """One option, as Typer reads it from a signature."""
    settings: dict[str, Any] = {"help": escape(item.opt.help), "rich_help_panel": panel}
    default: Any = inspect.Parameter.empty if item.required else item.default
    kind: Any
    if item.type is bool:
        kind = bool
    elif counts(item):
        kind, settings["count"], settings["show_default"] = int, True, False
    else:
        kind = list[str] if item.many else str
        settings["metavar"] = metavar(item)
        if item.choices:
            settings["autocompletion"] = completer([str(choice) for choice in item.choices])
        if item.many or default is None:
            kind, default = kind | None, None
        elif not item.required:
            default = str(item.plain(default))
    annotation = Annotated[kind, typer.Option(*_flags(item), **settings)]
    return inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def completer(words: Iterable[str]) -> Callable[[str], list[str]]:
    """What completes an argument that is one of `words`."""
    listed = tuple(words)

    def complete(incomplete: str) -> list[str]:
        return [word for word in listed if word.startswith(incomplete)]

    return complete


def read(options: type, given: Mapping[str, Any]) -> Any:
    """The options object from what Typer parsed; absent names take their defaults. Raises UsageError."""
    values: dict[str, Any] = {}
    for item in fields_of(options):
        if item.name not in given:
            continue
        raw = given[item.name]
        try:
            if item.type is bool or counts(item):
                values[item.name] = raw
            elif item.many:
                values[item.name] = tuple(item.read(one) for one in raw or ())
            elif raw is not None:
                values[item.name] = item.read(raw)
        except ValueError as error:
            raise UsageError(f"`--{item.flag}` {error}") from None
    try:
        return options(**values)
    except ValueError as error:
        raise UsageError(str(error)) from None


def command(
    app: typer.Typer,
    name: str,
    *,
    run: Iterable[str] | None = (),
    options: type | None = None,
    panel: str = PASS_PANEL,
    doc: str | None = None,
    **settings: Any,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as a command with its own parameters, those of a pass (`options`) and run options (`run`).

    The function takes `options` and `run` as keywords where they are asked for. `run` names the fields of
    `RunOptions` that the command has a use for, None for all of them.
    """
    chosen = [item for item in fields_of(RunOptions) if run is None or item.name in run]
    passed = fields_of(options) if options is not None else ()

    def register(function: Callable[..., None]) -> Callable[..., None]:
        own = [
            item
            for item in inspect.signature(function, eval_str=True).parameters.values()
            if item.name not in ("run", "options")
        ]
        derived = [_parameter(item, panel) for item in passed] + [_parameter(item, RUN_PANEL) for item in chosen]

        def parsed(**given: Any) -> Action:
            keywords = {item.name: given[item.name] for item in own}
            if options is not None:
                keywords["options"] = read(options, {item.name: given[item.name] for item in passed})
            if chosen:
                keywords["run"] = read(RunOptions, {item.name: given[item.name] for item in chosen})
            return partial(function, **keywords)

        kept = [item.replace(kind=inspect.Parameter.KEYWORD_ONLY) for item in own]
        vars(parsed)["__signature__"] = inspect.Signature([*kept, *derived])
        parsed.__annotations__ = {item.name: item.annotation for item in (*kept, *derived)}
        parsed.__name__, parsed.__doc__ = function.__name__, doc or function.__doc__
        app.command(name, **settings)(parsed)
        return function

    return register


def parser(name: str, options: type, doc: str) -> typer.Typer:
    """An app of one command that only reads a pass's options: its result is the options object."""
    app = typer.Typer(add_completion=False)

    def parsed(**given: Any) -> Any:
        return read(options, given)

    derived = [_parameter(item, PASS_PANEL) for item in fields_of(options)]
    vars(parsed)["__signature__"] = inspect.Signature(derived)
    parsed.__annotations__ = {item.name: item.annotation for item in derived}
    parsed.__doc__ = doc
    app.command(name)(parsed)
    return app
