"""What a teacher predicts for the text that is learned from: asked once, kept on disk, read a step at a time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from rewright.formats.checkpoint import Checkpoint
from rewright.formats.files import write_file
from rewright.passes.calibration import encode
from rewright.passes.context import Context, Progress
from rewright.passes.errors import InputError
from rewright.passes.loading import load_tokenizer
from rewright.passes.prompt.spec import TOP
from rewright.passes.scoring import Window, open_scorer, scored
from rewright.passes.sharing import each

# Tokens that the teacher, a layer at a time in memory, reads together: its layers are read again for the next.
TOGETHER = 1 << 16
# Windows whose logits are held at once.
BATCH = 4


class Teacher:
    """The `TOP` likeliest tokens before every target of some windows, and their log-probabilities.

    Log-probabilities are kept in float16, whose error is least where they are near 0. What the other tokens have in
    all follows from them.
    """

    def __init__(self, folder: Path, windows: Sequence[Window]) -> None:
        self.folder, self.windows = folder, windows
        self._starts = [0]
        tokens = 0
        for place, window in enumerate(windows):
            tokens += len(window.tokens)
            if tokens >= TOGETHER or place == len(windows) - 1:
                self._starts.append(place + 1)
                tokens = 0
        # of each window its unit, and where in it its targets begin
        self._at: list[tuple[int, int]] = []
        for unit, (first, last) in enumerate(pairwise(self._starts)):
            offset = 0
            for window in windows[first:last]:
                self._at.append((unit, offset))
                offset += window.scored

    def _path(self, unit: int) -> Path:
        return self.folder / f"teacher-{unit}.safetensors"

    def ask(self, context: Context, path: Path, device: str, dtype: str, rows: int) -> None:
        """Have the teacher at `path` predict every window. Raises InputError for one of another vocabulary."""
        scorer: Any = None

        def predict(name: str, unit: int, bar: Progress) -> dict[str, Any]:
            nonlocal scorer
            scorer = scorer or open_scorer(path, device, dtype, by_layer=True)
            if scorer.rows != rows:
                raise InputError(f"the teacher `{path}` has another vocabulary: {scorer.rows} rows, not {rows}")
            own = self.windows[self._starts[unit] : self._starts[unit + 1]]
            batches = [own[start : start + BATCH] for start in range(0, len(own), BATCH)]
            ids, logs = [], []
            for batch, found in zip(batches, scored(scorer, batches), strict=True):
                for one in found:
                    likeliest = one.topk(min(TOP, rows), dim=1)
                    ids.append(likeliest.indices.int().cpu())
                    logs.append(likeliest.values.half().cpu())
                bar.advance(sum(window.scored for window in batch))
            write_file(self._path(unit), save({"ids": torch.cat(ids), "logs": torch.cat(logs)}))
            return {"windows": len(own)}

        def size(unit: int) -> float:
            return sum(window.scored for window in self.windows[self._starts[unit] : self._starts[unit + 1]])

        units = {f"teacher {unit}": unit for unit in range(len(self._starts) - 1)}
        each(context, "ask the teacher, tokens", units, size, predict)

    def of(self, places: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids (targets, k) int32 and log-probabilities (targets, k) float32 of some windows, one after the other."""
        ids, logs = [], []
        for place in places:
            unit, offset = self._at[place]
            span = slice(offset, offset + self.windows[place].scored)
            with safe_open(self._path(unit), "pt") as file:
                ids.append(file.get_slice("ids")[span])
                logs.append(file.get_slice("logs")[span])
        return torch.cat(ids), torch.cat(logs).float()


def check_tokens(path: Path, tokenizer: Any, windows: Sequence[Window], rows: int) -> None:
    """Raise InputError for a teacher that cuts what some windows say into other tokens than the model does."""
    theirs = load_tokenizer(Checkpoint.open(path))
    said = [tokenizer.decode(window.tokens, skip_special_tokens=True) for window in windows[:BATCH]]
    if theirs is None or any(encode(theirs, text, rows) != encode(tokenizer, text, rows) for text in said):
        told = "has no tokenizer" if theirs is None else "cuts the text into other tokens"
        raise InputError(f"the teacher `{path}` {told}", hint="a teacher has the tokenizer of the model that learns")


def is_itself(source: Checkpoint, path: Path) -> bool:
    """Whether the checkpoint at a path is the one that learns."""
    return path.resolve() == source.path.resolve()


def check_teacher(source: Checkpoint, path: Path) -> None:
    """Raise InputError for a model that would teach itself."""
    if is_itself(source, path):
        raise InputError(
            "the model would be its own teacher",
            hint="give the uncompressed one as `--teacher MODEL`, or use `--loss next-token`",
        )
