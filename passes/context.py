"""What a pass is handed besides its options and its checkpoints, and where a run talks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rewright.passes.world import World

if TYPE_CHECKING:
    import torch

    from rewright.formats.checkpoint import Checkpoint
    from rewright.passes.inputs import Inputs
    from rewright.passes.journal import Journal


class Progress(Protocol):
    """A bar under way."""

    def advance(self, amount: float = 1, note: str = "") -> None: ...


class Reporter(Protocol):
    """Where a run talks: never on stdout."""

    def info(self, text: str) -> None: ...
    def warn(self, text: str) -> None: ...
    def debug(self, text: str) -> None: ...
    def event(self, kind: str, **fields: Any) -> None: ...
    def progress(self, label: str, total: float | None) -> AbstractContextManager[Progress]: ...


class _SilentProgress:
    def advance(self, amount: float = 1, note: str = "") -> None:
        pass


class Silent:
    """The reporter of library callers and tests: keeps warnings, drops the rest."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def info(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def debug(self, text: str) -> None:
        pass

    def event(self, kind: str, **fields: Any) -> None:
        pass

    @contextmanager
    def progress(self, label: str, total: float | None) -> Iterator[Progress]:
        yield _SilentProgress()


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """A stage under way. `work` is this process's own folder for scratch files, gone when the stage is done.

    `world` has the processes that share the stage; a pass that does not split its work is given one process. `origin`
    is the source of the whole chain.
    """

    seed: int
    device: torch.device
    dtype: str
    threads: int
    reporter: Reporter
    journal: Journal
    inputs: Inputs
    work: Path
    origin: Checkpoint
    world: World = field(default_factory=World)

    @property
    def common(self) -> Path:
        """The stage's folder for scratch files that all processes see."""
        return self.work if self.world.leads else self.work.parent
