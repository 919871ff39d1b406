"""Runs that are interrupted, within the process, at a moment that a test chooses."""

from __future__ import annotations

from typing import Any

import pytest


def raise_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    """Interrupt the run at a call of something, once it has been done."""
    real, calls = getattr(owner, name), []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        result = real(*args, **kwargs)
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(owner, name, interrupted)
