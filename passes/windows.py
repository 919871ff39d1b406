"""Documents cut into the windows that are scored and learned from.

Each document is cut into windows; a window starts as the tokenizer starts a text (one start token, or none), and the
windows' own tokens follow each other without overlap. Every token that has something before it in its window is a
target.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rewright.passes import calibration
from rewright.passes.scoring import Window


def windows(tokenizer: Any, rows: int, texts: Sequence[str], length: int, first_only: bool) -> Iterator[Window]:
    """Windows of at most `length` tokens, start token included, of each document the first or all."""
    start = calibration.start_tokens(tokenizer)
    own = length - len(start)
    for text in texts:
        tokens = calibration.encode(tokenizer, text, rows)
        ends = _ends(tokenizer, text, tokens)
        for begin in range(0, len(tokens), own):
            part = tokens[begin : begin + own]
            scored = len(part) if start else len(part) - 1
            before = begin if start else begin + 1
            size = ends[begin + len(part) - 1] - (ends[before - 1] if before else 0)
            if scored > 0:
                yield Window(start + part, scored, size)
            if first_only:
                break


def _ends(tokenizer: Any, text: str, tokens: list[int]) -> list[int]:
    """For each token the bytes of text up to its end."""
    if getattr(tokenizer, "is_fast", False):
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
            "offset_mapping"
        ]
        sizes = [0]
        for character in text:
            sizes.append(sizes[-1] + len(character.encode()))
        return [sizes[end] for _, end in offsets]
    return [len(tokenizer.decode(tokens[: end + 1]).encode()) for end in range(len(tokens))]
