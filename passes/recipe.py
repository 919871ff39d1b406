"""Stages as text: TOML recipes and chain words, both ways. Standard library, and tomli-w to write."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rewright.passes import registry
from rewright.passes.errors import InputError, UsageError
from rewright.passes.spec import Spec, fields_of, from_plain, to_plain


@dataclass(frozen=True, slots=True)
class Stage:
    """One pass with its options."""

    spec: Spec
    options: Any


def parse(text: str, sets: Sequence[str] = ()) -> tuple[Stage, ...]:
    """The stages of a recipe, changed by `pass.option=value` or `number.option=value`. Raises UsageError."""
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the recipe is not TOML: {error}") from None
    unknown = set(document) - {"stage"}
    tables = document.get("stage")
    if unknown or not isinstance(tables, list) or not tables:
        what = f"has `{min(unknown)}`" if unknown else "has no stage"
        raise UsageError(f"the recipe {what}", hint='a recipe is `[[stage]]` tables, each with `pass = "NAME"`')
    for number, table in enumerate(tables, start=1):
        if not isinstance(table, dict) or not isinstance(table.get("pass"), str):
            raise UsageError(f'stage {number} has no `pass = "NAME"`')
    for word in sets:
        _apply(tables, word)
    return tuple(
        make(number, table["pass"], {key: value for key, value in table.items() if key != "pass"})
        for number, table in enumerate(tables, start=1)
    )


def _apply(tables: list[dict[str, Any]], word: str) -> None:
    """Change one option of one stage, as `--set` says."""
    target, equals, value = word.partition("=")
    stage, _, option = target.partition(".")
    option = option.replace("_", "-")
    if not (option and equals) or option == "pass":
        raise UsageError(f"`--set {word}` is not `pass.option=value`")
    chosen = [table for number, table in enumerate(tables, start=1) if stage in (str(number), table["pass"])]
    if len(chosen) != 1:
        names = ", ".join(f"{number} ({table['pass']})" for number, table in enumerate(tables, start=1))
        raise UsageError(f"`--set {word}` names {'several stages' if chosen else 'no stage'}", hint=f"stages: {names}")
    for spelled in [key for key in chosen[0] if key.replace("_", "-") == option]:
        del chosen[0][spelled]
    chosen[0][option] = _value(value)


def _value(text: str) -> Any:
    """A quoted text or a list as TOML has them; any other word as it stands, for the option to read."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return parsed["value"] if len(parsed) == 1 and isinstance(parsed["value"], str | list) else text


def make(number: int, name: str, plain: Mapping[str, Any]) -> Stage:
    """A stage from plain values. Raises UsageError naming the stage and the option."""
    try:
        spec = registry.get(name)
        return Stage(spec, from_plain(spec.options, plain))
    except ValueError as error:
        raise UsageError(f"stage {number} ({name}): {error}") from None
    except UsageError as error:
        raise UsageError(f"stage {number} ({name}): {error.message}", hint=error.hint) from None


def _said(stage: Stage) -> dict[str, Any]:
    """The options that differ from their defaults, plain."""
    plain = to_plain(stage.options)
    for item in fields_of(type(stage.options)):
        if not item.required and getattr(stage.options, item.name) == item.default:
            del plain[item.flag]
    return plain


def dump(stages: Sequence[Stage]) -> str:
    """A recipe: `parse(dump(stages)) == stages`."""
    import tomli_w

    tables = (tomli_w.dumps({"pass": stage.spec.name, **_said(stage)}) for stage in stages)
    return "\n".join(f"[[stage]]\n{table}" for table in tables)


def words(stages: Sequence[Stage]) -> list[str]:
    """The stages in the grammar of `chain`."""
    said: list[str] = []
    for stage in stages:
        said += ["+", stage.spec.name] if said else [stage.spec.name]
        for item in fields_of(type(stage.options)):
            value = getattr(stage.options, item.name)
            if not item.required and value == item.default:
                continue
            for one in value if item.many else (value,):
                said += _option_words(item.flag, item.plain(one), item.opt.negative)
    return said


def _option_words(flag: str, plain: Any, negative: str | None) -> list[str]:
    if plain is True:
        return [f"--{flag}"]
    if plain is False:
        return [f"--{negative or 'no-' + flag}"]
    text = str(plain)
    return [f"--{flag}={text}"] if text == "+" or (text.startswith("-") and text != "-") else [f"--{flag}", text]


def stages_of_stamp(stamp: Mapping[str, Any]) -> tuple[Stage, ...]:
    """The stages that made a stamped checkpoint.

    Raises InputError when the stamp does not say, UsageError when this version has no such pass or option.
    """
    try:
        said = [(record["pass"], dict(record["options"])) for record in stamp["stages"]]
    except (KeyError, TypeError, ValueError):
        said = []
    if not said:
        raise InputError("the stamp does not say which passes made the checkpoint")
    return tuple(make(number, name, options) for number, (name, options) in enumerate(said, start=1))
