"""What every test stands on: fixed seeds, poisoned memory where torch is used, no network, short temporary paths."""

from __future__ import annotations

import os
import random
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Set before any library is imported, by tests or by the processes they start.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # threads that wait must not spin: on a shared machine that multiplies every time by five
    "OMP_WAIT_POLICY": "PASSIVE",
}


# A shell without job control starts background commands with Ctrl-C ignored, and they hand that on. With a handler
# here, the processes that tests start have the default again.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Random numbers that nobody seeded are the same in each run of a test, alone or among others."""
    random.seed(0)
    if "numpy" in sys.modules:
        import numpy as np

        np.random.seed(0)
    if "torch" in sys.modules:
        import torch

        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Memory that is read before it is written shows as NaN: torch fills `empty` so when asked to be deterministic."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    if torch is not None:
        torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket that would leave this machine's own processes is refused."""
    plain = socket.socket

    class Local(plain):  # type: ignore[misc, valid-type] # the class is found at run time
        def connect(self, address: Any, /) -> None:
            if self.family != socket.AF_UNIX:
                raise PermissionError(f"tests have no network: connect to {address}")
            super().connect(address)

        def connect_ex(self, address: Any, /) -> int:
            self.connect(address)
            return 0

    monkeypatch.setattr(socket, "socket", Local)


@pytest.fixture
def root() -> Path:
    """The repository's root."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Set torch's thread count for one test."""
    import torch

    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
