"""The text that a prompt is learned from, and the text that the best step is chosen on: other documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rewright.passes import calibration
from rewright.passes.context import Context
from rewright.passes.errors import InputError
from rewright.passes.prompt.spec import VALIDATION, PromptOptions
from rewright.passes.scoring import Window
from rewright.passes.windows import windows

# Of a small text the share of documents that is kept for validation.
SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Data:
    """Windows to learn from and to choose on; `facts` say what they came from."""

    train: list[Window]
    validation: list[Window]
    facts: dict[str, Any]


def gather(context: Context, options: PromptOptions, tokenizer: Any, rows: int) -> Data:
    """Windows of documents drawn evenly over the text, as many as the steps can see. Raises InputError."""
    length, seed = options.sequence_length, context.seed
    pieces = _pieces(context, options.text, length)
    kept = _pieces(context, options.validation_text, length)
    order = list(calibration.spread(len(pieces), seed))
    if not options.validation_text:
        count = min(VALIDATION, max(1, int(SHARE * len(pieces))))
        if len(pieces) < 2:
            raise InputError(
                "the text is one short document, and none is left to choose the best step on",
                hint="give more text, or `--validation-text FILE`",
            )
        kept, order = [pieces[place] for place in order[:count]], order[count:]
    validation = list(windows(tokenizer, rows, kept, length, first_only=True))[:VALIDATION]
    train: list[Window] = []
    documents = tokens = 0
    for place in order:
        found = list(windows(tokenizer, rows, [pieces[place]], length, first_only=False))
        train += found
        documents += 1
        tokens += sum(window.scored for window in found)
        if len(train) >= options.steps * options.batch_size:
            break
    if tokens < length:
        raise InputError(
            f"the text has {tokens} tokens to learn from, less than one window of {length}",
            hint="give more text, or a smaller `--sequence-length`",
        )
    if not validation:
        raise InputError("the validation text has no token to score")
    facts = {
        "documents": len(pieces),
        "documents_used": documents,
        "documents_held_out": 0 if options.validation_text else len(kept),
        "windows": len(train),
        "tokens": tokens,
        "sequence_length": length,
        "validation_windows": len(validation),
        "validation_tokens": sum(window.scored for window in validation),
    }
    return Data(train, validation, facts)


def _pieces(context: Context, paths: Sequence[Any], length: int) -> list[str]:
    texts = [text for path in paths for text in calibration.read_documents(path, context.inputs)]
    if paths and not texts:
        raise InputError(f"`{paths[0]}` has no document")
    return calibration.pieces(texts, calibration.PIECE_CHARACTERS * length)
