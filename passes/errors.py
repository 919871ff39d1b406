"""What a run refuses, by kind; `cli/exits.py` alone gives each kind its exit code."""

from __future__ import annotations

from typing import Any

from rewright.formats.errors import Refusal


class UsageError(Refusal):
    """The command, chain or recipe says something that cannot be meant."""


class InputError(Refusal):
    """The checkpoint or text is missing, damaged or of a kind the pass cannot take."""


class ResourceError(Refusal):
    """The machine lacks what the run needs: memory, disk or a device."""


class BoundError(Refusal):
    """The pass ran, and its result misses a bound: not finite, or a `--require` not met.

    `document` is the run's, as far as it is filled, or None.
    """

    document: dict[str, Any] | None = None


class StaleError(Refusal):
    """`--check` found that a run would do work. `document` is the run's, or None."""

    document: dict[str, Any] | None = None
