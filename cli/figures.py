"""Numbers as a person reads them: bytes, operations, times, and the plain figures of a table."""

from __future__ import annotations

from typing import Any


def size(count: float) -> str:
    """Bytes: `812 B`, `1.03 MB`, `14.2 GB` (powers of 1000)."""
    if count < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB", "GB", "TB"):
        count /= 1000
        if count < 999.5 or unit == "TB":
            break
    return f"{count:.3g} {unit}"


def operations(count: float) -> str:
    """Operations: `97 GFLOP`, `6.89 PFLOP`."""
    count /= 1e9
    for unit in ("GFLOP", "TFLOP", "PFLOP"):
        if count < 999.5 or unit == "PFLOP":
            break
        count /= 1000
    return f"{count:.3g} {unit}"


def duration(seconds: float) -> str:
    """A time span: `0.4 s`, `41 s`, `3 min 5 s`, `2 h 10 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def figure(value: Any) -> str:
    """One value of a metric or table: four figures, `-` for none."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)
