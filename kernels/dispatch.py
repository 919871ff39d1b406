"""Which implementation of an op runs: the Triton kernel or its plain-torch reference.

The choice is made per call. `use(...)` wins over the variable `REWRIGHT_KERNELS`, which wins over `auto`.
An explicit choice never falls back: what cannot run as asked raises `KernelError`.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Literal, get_args

import torch

Mode = Literal["auto", "triton", "reference"]
MODES: tuple[Mode, ...] = get_args(Mode)
ENVIRONMENT = "REWRIGHT_KERNELS"

_forced: ContextVar[Mode | None] = ContextVar("rewright_kernels", default=None)
_counts: dict[str, dict[str, int]] = {}


class KernelError(Exception):
    """The kernel that was asked for by name cannot run on these tensors here.

    `str()` is one line without a full stop; `hint` says what would work, or is None.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


def _checked(value: str, origin: str) -> Mode:
    if value not in MODES:
        raise KernelError(
            f"{origin} is `{value}`, which names no kernel implementation",
            hint="use one of " + ", ".join(f"`{name}`" for name in MODES),
        )
    return value


def mode() -> Mode:
    """The choice in force: the innermost `use`, else `REWRIGHT_KERNELS`, else `auto`.

    Raises `KernelError` when the variable names no implementation.
    """
    forced = _forced.get()
    if forced is not None:
        return forced
    return _checked(os.environ.get(ENVIRONMENT) or "auto", f"`{ENVIRONMENT}`")


@contextmanager
def use(choice: str) -> Iterator[None]:
    """Force `auto`, `triton` or `reference` for the calls inside, in this thread or task."""
    token = _forced.set(_checked(choice, "the kernel choice"))
    try:
        yield
    finally:
        _forced.reset(token)


def asked(choice: str) -> AbstractContextManager[None]:
    """Hold what an option asks for in the calls inside; its `auto` leaves the choice to `REWRIGHT_KERNELS`."""
    return nullcontext() if choice == "auto" else use(choice)


def pick(op: str, tensors: Sequence[torch.Tensor], supports: Callable[[], str | None]) -> bool:
    """True when `op` is to run its Triton kernel on `tensors`; the call is entered in the tally.

    `supports` is asked only when Triton is a candidate, and returns None or the reason why not. It may import the
    op's Triton module; it must not synchronise with the device.

    Raises `KernelError` when Triton was asked for by name and cannot run.
    """
    choice = mode()
    if choice == "reference":
        taken = False
    elif choice == "triton":
        reason = _obstacle(tensors) or supports()
        if reason is not None:
            raise KernelError(
                f"`{op}` has no Triton kernel for this call: {reason}",
                hint="`--kernels auto` takes the reference where the kernel cannot run",
            )
        taken = True
    else:
        on_gpu = bool(tensors) and all(t.is_cuda for t in tensors)
        taken = on_gpu and _obstacle(tensors) is None and supports() is None
    counts = _counts.setdefault(op, {"triton": 0, "reference": 0})
    counts["triton" if taken else "reference"] += 1
    return taken


def _obstacle(tensors: Sequence[torch.Tensor]) -> str | None:
    """Why no Triton kernel at all could take these tensors, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    from rewright.kernels.launch import interpreter

    if interpreter():
        # `tl.dot` of the interpreter multiplies the bit patterns of bfloat16 (triton#11584).
        if any(t.dtype == torch.bfloat16 for t in tensors):
            return "the interpreter (`TRITON_INTERPRET=1`) computes garbage from bfloat16"
        return None
    if not all(t.is_cuda for t in tensors):
        return "the tensors are not on a GPU and the interpreter (`TRITON_INTERPRET=1`) is off"
    if len({t.device for t in tensors}) > 1:
        return "the tensors are on different devices"
    return None


def tally() -> dict[str, dict[str, int]]:
    """Calls by op and implementation since the last reset; goes into a checkpoint's provenance."""
    return {op: dict(counts) for op, counts in sorted(_counts.items())}


def reset_tally() -> None:
    """Forget the calls counted so far."""
    _counts.clear()
