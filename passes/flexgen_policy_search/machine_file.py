"""A machine described in TOML. Standard library only."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from fractions import Fraction
from pathlib import Path
from typing import Any

from rewright.passes.errors import InputError
from rewright.passes.flexgen_policy_search.machine import Machine, Published, reserve_of
from rewright.passes.flexgen_policy_search.presets import preset
from rewright.passes.flexgen_policy_search.values import MOST, NUMBER, PRESETS, quantity

# Table and key in the file, the machine's field, and the unit.
_KEYS = {
    ("gpu", "memory"): ("gpu_bytes", "B"),
    ("gpu", "reserve"): ("gpu_reserve", "B"),
    ("gpu", "bandwidth"): ("hbm", "B/s"),
    ("gpu", "compute"): ("gpu_flops", "FLOP/s"),
    ("gpu", "launch"): ("launch_s", "s"),
    ("cpu", "memory"): ("cpu_bytes", "B"),
    ("cpu", "reserve"): ("cpu_reserve", "B"),
    ("cpu", "bandwidth"): ("dram", "B/s"),
    ("cpu", "compute"): ("cpu_flops", "FLOP/s"),
    ("cpu", "attention"): ("cpu_attn", "B/s"),
    ("disk", "size"): ("disk_bytes", "B"),
    ("disk", "read"): ("disk_read", "B/s"),
    ("disk", "write"): ("disk_write", "B/s"),
    ("link", "to-gpu"): ("h2d", "B/s"),
    ("link", "from-gpu"): ("d2h", "B/s"),
    ("link", "copy"): ("copy_s", "s"),
}
_OPTIONAL = ("gpu_reserve", "cpu_reserve", "launch_s", "copy_s")
_TOP = ("name", "base", "published", "gpu", "cpu", "disk", "link")
_SECONDS = {unit: Fraction(1, 1000**power) for power, unit in enumerate(("s", "ms", "us", "ns"))}


def parse(data: bytes, path: Path) -> Machine:
    """A machine from the bytes of a description. Raises InputError that names the key, and the nearest known one."""
    try:
        said = tomllib.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"`{path}` is not TOML: {error}") from None
    _known(said, _TOP, path, "")
    figures: dict[str, Any] = {}
    for table in ("gpu", "cpu", "disk", "link"):
        held = _table(said, table, path)
        keys = [key for of, key in _KEYS if of == table]
        _known(held, keys, path, f"{table}.")
        for key, value in held.items():
            field, unit = _KEYS[table, key]
            figures[field] = _figure(value, unit, f"{table}.{key}", path)
    base = said.get("base")
    if base is not None and base not in PRESETS:
        raise InputError(f"`base` of `{path}` must be one of {', '.join(PRESETS)}, not `{base}`")
    name = said.get("name", path.stem)
    if not isinstance(name, str) or not name.isprintable() or not name.strip():
        raise InputError(f"`name` of `{path}` is no text")
    made = _made(figures, base, name, _published(said, path), path)
    for tier in ("gpu", "cpu"):
        if not made.rooms[tier]:
            raise InputError(f"`{tier}.reserve` of `{path}` leaves nothing of `{tier}.memory`")
    return made


def _made(figures: dict[str, Any], base: str | None, name: str, published: Published | None, path: Path) -> Machine:
    sources = tuple(sorted((field, path.name) for field in figures))
    if base is not None:
        kept = tuple(pair for pair in preset(base).sources if pair[0] not in figures)
        sized = preset(base).sized({tier: figures.get(f"{tier}_bytes") for tier in Machine.TIERS})
        constants = published if published or set(figures) & set(Machine.RATES) else preset(base).published
        return replace(
            sized, name=name, source="description", sources=(*sources, *kept), published=constants, **figures
        )
    missing = [
        f"{table}.{key}"
        for (table, key), (field, _) in _KEYS.items()
        if field not in figures and field not in _OPTIONAL
    ]
    if missing:
        raise InputError(
            f"`{path}` lacks `{missing[0]}`", hint=f"give it, or start from a preset: base = `{PRESETS[2]}`"
        )
    for tier in ("gpu", "cpu"):
        figures.setdefault(f"{tier}_reserve", reserve_of(tier, figures[f"{tier}_bytes"]))
    return Machine(name=name, source="description", sources=sources, published=published, **figures)


def _table(said: Mapping[str, Any], name: str, path: Path) -> Mapping[str, Any]:
    held = said.get(name, {})
    if not isinstance(held, dict):
        raise InputError(f"`{name}` of `{path}` is no table")
    return held


def _known(held: Mapping[str, Any], keys: Any, path: Path, prefix: str) -> None:
    for key in held:
        if key not in keys:
            close = get_close_matches(key, list(keys), n=1, cutoff=0.5)
            hint = f"did you mean `{prefix}{close[0]}`?" if close else f"keys: {', '.join(keys)}"
            raise InputError(f"`{path}` has no use for `{prefix}{key}`", hint=hint)


def _figure(value: Any, unit: str, where: str, path: Path) -> int | float:
    """A quantity above zero, bytes as a whole number, time as seconds."""
    reader: Callable[[str], Fraction] = _time if unit == "s" else lambda text: quantity(text, unit)
    try:
        found = reader(value if isinstance(value, str) else f"{value}")
    except ValueError as error:
        raise InputError(f"`{where}` of `{path}` {error}") from None
    if found <= 0 and not (where.endswith("reserve") and found == 0):
        raise InputError(f"`{where}` of `{path}` must be above zero, not `{value}`")
    if unit == "B" and (found >= MOST or 0 < found < 1):
        raise InputError(f"`{where}` of `{path}` must be from 1B to less than {MOST}B, not `{value}`")
    return int(found) if unit == "B" else float(found)


def _time(text: str) -> Fraction:
    found = re.fullmatch(NUMBER + "(ns|us|ms|s)", text)
    if found is None:
        raise ValueError(f"must be a time as `5us`, not `{text}`")
    return Fraction(found[1]) * _SECONDS[found[2]]


def _published(said: Mapping[str, Any], path: Path) -> Published | None:
    """Constants of the published equations, where they are given: rates in bytes or operations a second."""
    held = _table(said, "published", path)
    if not held:
        return None
    fields = Published.__dataclass_fields__
    _known(held, list(fields), path, "published.")
    values: dict[str, float] = {}
    for key, value in held.items():
        if key in ("c1", "c2", "c3"):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise InputError(f"`published.{key}` of `{path}` must be a number, not `{value}`")
            values[key] = float(value)
        else:
            unit = "FLOP/s" if key.startswith(("mm", "bmm", "cpu")) else "B/s"
            values[key] = float(_figure(value, unit, f"published.{key}", path))
    missing = [key for key in fields if key not in values and key not in ("c1", "c2", "c3", "hbm")]
    if missing:
        raise InputError(f"`{path}` lacks `published.{missing[0]}`")
    return Published(**values)
