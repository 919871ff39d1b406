"""A kernel as one launch specialises it, to be compiled ahead of time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Variant:
    """Types by argument (the others are i32), constants, options; `aligned` arguments are multiples of 16.

    `targets` are those that a launcher takes the configuration on; None means all.
    """

    op: str
    label: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()
    targets: tuple[str, ...] | None = None
