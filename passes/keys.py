"""When two runs are the same run: the record of what decides a result, its key, and how two records differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rewright.formats.digest import SourceDigest
from rewright.passes import registry
from rewright.passes.inputs import Inputs
from rewright.passes.recipe import Stage
from rewright.passes.run_options import RunOptions
from rewright.passes.spec import fields_of, to_plain
from rewright.passes.values import ModelPath, PredictorFolder, PromptStart


def record(stages: Sequence[Stage], options: RunOptions, source: SourceDigest, inputs: Inputs) -> dict[str, Any]:
    """Everything that can reach the result's bytes, as JSON. Paths are not in it, the contents of files are."""
    return {
        "source": source.digest,
        **to_plain(options, affects="result"),
        "stages": [_stage(stage, inputs) for stage in stages],
    }


def _stage(stage: Stage, inputs: Inputs) -> dict[str, Any]:
    plain = to_plain(stage.options, affects="result")
    plain.update(inputs.digests_of(stage.options))
    return {"pass": stage.spec.name, "version": stage.spec.version, "options": plain}


def key_of(run: dict[str, Any]) -> str:
    """sha256 of the record in canonical JSON."""
    text = json.dumps(run, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def differences(was: Any, now: Mapping[str, Any]) -> list[str]:
    """What differs between two records, a phrase each: `--bits was 4, is 3`; nothing when they are equal.

    `was` comes from a file, and may be anything that JSON can say. Never raises.
    """
    if was == now:
        return []
    if not isinstance(was, dict):
        return ["what made it is not on record"]
    said = ["the source's contents changed"] if was.get("source") != now["source"] else []
    said += [_changed(flag, was.get(flag), now[flag]) for flag in ("seed", "dtype") if was.get(flag) != now[flag]]
    stages = _stages_of(was)
    names = [" + ".join(str(stage.get("pass")) for stage in side) for side in (stages, now["stages"])]
    if names[0] != names[1]:
        return [*said, f"passes were `{names[0]}`, are `{names[1]}`" if stages else "passes are not on its record"]
    said += _by_stage([list(_stage_differences(old, new)) for old, new in zip(stages, now["stages"], strict=True)])
    return said or ["it was recorded by another version of Rewright"]


def _stages_of(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    stages = record.get("stages")
    return [stage for stage in stages if isinstance(stage, dict)] if isinstance(stages, list) else []


def _by_stage(found: Sequence[Sequence[str]]) -> Iterator[str]:
    """Each phrase once; in a chain with the stage it is about, if it is one."""
    for phrase in dict.fromkeys(phrase for phrases in found for phrase in phrases):
        numbers = [number for number, phrases in enumerate(found, start=1) if phrase in phrases]
        yield phrase if len(found) == 1 or len(numbers) > 1 else f"stage {numbers[0]}: {phrase}"


def _stage_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    name = new["pass"]
    if old.get("version") != new["version"]:
        yield f"`{name}` was version {old.get('version')}, is {new['version']}"
    held = old.get("options")
    before, after = held if isinstance(held, dict) else {}, new["options"]
    files = _file_flags(name)
    for flag in sorted({*before, *after}):
        one, other = before.get(flag), after.get(flag)
        if one == other:
            continue
        if flag in files and not isinstance(one, str) and not isinstance(other, str):
            yield f"the contents of `--{flag}` changed"
        else:
            # of a file there is a digest, which says nothing to a person
            yield _changed(flag, *("a file" if flag in files and isinstance(it, list) else it for it in (one, other)))


def _file_flags(name: str) -> set[str]:
    """The options of a pass that name files, or may: a record has their digests."""
    spec = registry.SPECS.get(name)
    kinds = (Path, ModelPath, PredictorFolder, PromptStart)
    return {item.flag for item in fields_of(spec.options) if item.type in kinds} if spec else set()


def _changed(flag: str, was: Any, now: Any) -> str:
    return f"`--{flag}` was {_shown(was)}, is {_shown(now)}"


def _shown(value: Any) -> str:
    if value is None or value == []:
        return "not given"
    return value if isinstance(value, str) else json.dumps(value)
