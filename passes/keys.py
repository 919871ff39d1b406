"""When two runs are the same run: the record of what decides a result, its key, and how two records differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from rewright.formats.digest import SourceDigest
from rewright.passes.context import RunOptions
from rewright.passes.inputs import Inputs
from rewright.passes.recipe import Stage
from rewright.passes.spec import to_plain


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


def differences(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two records, a phrase each: `--bits was 4, is 3`."""
    said = []
    if was.get("source") != now.get("source"):
        said.append("the source's contents changed")
    said += [
        f"`--{flag}` was {was.get(flag)}, is {now.get(flag)}"
        for flag in ("seed", "dtype")
        if was.get(flag) != now.get(flag)
    ]
    before, after = was.get("stages", []), now.get("stages", [])
    if [stage.get("pass") for stage in before] != [stage["pass"] for stage in after]:
        names = [" + ".join(str(stage.get("pass")) for stage in stages) for stages in (before, after)]
        return [*said, f"passes were `{names[0]}`, are `{names[1]}`"]
    for old, new in zip(before, after, strict=True):
        if old.get("version") != new["version"]:
            said.append(f"`{new['pass']}` is version {new['version']}, was {old.get('version')}")
        options = old.get("options", {})
        said += [
            _option(flag, options.get(flag), new["options"].get(flag))
            for flag in sorted(options.keys() | new["options"].keys())
            if options.get(flag) != new["options"].get(flag)
        ]
    return said


def _option(flag: str, was: Any, now: Any) -> str:
    if any(isinstance(v, list) and v and all(len(str(one)) == 64 for one in v) for v in (was, now)):
        return f"the contents of `--{flag}` changed"
    return f"`--{flag}` was {was}, is {now}"
