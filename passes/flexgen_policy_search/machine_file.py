"""A machine described in TOML, by hand or by measurement."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from fractions import Fraction
from pathlib import Path
from typing import Any

import tomli_w

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
    ("gpu", "attention"): ("gpu_attn", "B/s"),
    ("gpu", "attention-compute"): ("gpu_attn_flops", "FLOP/s"),
    ("cpu", "memory"): ("cpu_bytes", "B"),
    ("cpu", "reserve"): ("cpu_reserve", "B"),
    ("cpu", "bandwidth"): ("dram", "B/s"),
    ("cpu", "compute"): ("cpu_flops", "FLOP/s"),
    ("cpu", "attention"): ("cpu_attn", "B/s"),
    ("cpu", "attention-compute"): ("cpu_attn_flops", "FLOP/s"),
    ("disk", "size"): ("disk_bytes", "B"),
    ("disk", "read"): ("disk_read", "B/s"),
    ("disk", "write"): ("disk_write", "B/s"),
    ("link", "to-gpu"): ("h2d", "B/s"),
    ("link", "from-gpu"): ("d2h", "B/s"),
    ("link", "copy"): ("copy_s", "s"),
}
_OPTIONAL = ("gpu_reserve", "cpu_reserve", "launch_s", "copy_s", *Machine.OPTIONAL)
# Copies and the disk beside all else, under the names that their rates have.
_BUSY = {f"{table}.{key}": field for (table, key), (field, unit) in _KEYS.items() if table in ("disk", "link")}
_BUSY = {name: field for name, field in _BUSY.items() if field in Machine.RATES}
_TOP = ("name", "base", "published", "gpu", "cpu", "disk", "link", "products", "busy", "measured")
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
    made = _measured(replace(made, gemm=_products(said, path) or made.gemm), said, path)
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


def _products(said: Mapping[str, Any], path: Path) -> tuple[tuple[int, float], ...]:
    """What share of the GPU's arithmetic a product of so many rows reaches."""
    found = []
    for key, value in _table(said, "products", path).items():
        if not re.fullmatch("[1-9][0-9]{0,8}", key):
            raise InputError(f"`products` of `{path}` has rows for its keys, as `16`, not `{key}`")
        found.append((int(key), _share(value, f"products.{key}", path)))
    return tuple(sorted(found))


def _measured(made: Machine, said: Mapping[str, Any], path: Path) -> Machine:
    """The machine with what is left of its rates while all of it is busy, and with what measurement says of itself."""
    busy = _table(said, "busy", path)
    _known(busy, list(_BUSY), path, "busy.")
    left = {_BUSY[key]: _share(value, f"busy.{key}", path) for key, value in busy.items()}
    if left:
        rates = {field: getattr(made, field) * share for field, share in left.items()}
        made = replace(made, busy=tuple(sorted(left.items())), **rates)
    measured = _table(said, "measured", path)
    _known(measured, ["holdout", "at", "how"], path, "measured.")
    if not measured:
        return made
    holdout = measured.get("holdout")
    if isinstance(holdout, bool) or not isinstance(holdout, int | float) or not 0 <= holdout < math.inf:
        raise InputError(f"`measured.holdout` of `{path}` must be a share, 0 or more, not `{holdout}`")
    sources = tuple((field, f"measured, {path.name}") for field, _ in made.sources)
    return replace(made, source="measured", holdout=float(holdout), sources=sources)


def _share(value: Any, where: str, path: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise InputError(f"`{where}` of `{path}` must be a share, above 0 and at most 1, not `{value}`")
    return float(value)


def encode(machine: Machine, *, at: str, how: str) -> bytes:
    """The bytes of a measured machine's description: `at` a date, `how` what it was measured with."""
    tables: dict[str, Any] = {"name": machine.name}
    left = dict(machine.busy)
    for (table, key), (field, unit) in _KEYS.items():
        value = getattr(machine, field)
        if value is not None:
            tables.setdefault(table, {})[key] = _said(value / left.get(field, 1.0), unit)
    tables["products"] = {f"{rows}": round(share, 4) for rows, share in machine.gemm}
    tables["busy"] = {name: round(left[field], 4) for name, field in _BUSY.items() if field in left}
    tables["measured"] = {"holdout": round(machine.holdout or 0.0, 4), "at": at, "how": how}
    return tomli_w.dumps(tables).encode()


def _said(value: float, unit: str) -> str:
    """A figure with its unit, rates and times to four digits."""
    if unit == "B":
        return f"{int(value)}B"
    if unit == "s":
        return f"{1e6 * value:.3f}us"
    power = min(4, max(0, int(math.log10(max(value, 1.0)) // 3)))
    # four digits, and no power of ten
    return f"{float(f'{value / 1000**power:.4g}'):.15g}{('', 'k', 'M', 'G', 'T')[power]}{unit}"


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
