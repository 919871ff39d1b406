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

# Of a small text the share of documents that is held out for validation.
SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Data:
    """Windows to learn from and to choose on; `facts` say what they came from."""

    train: list[Window]
    validation: list[Window]
    facts: dict[str, Any]


def gather(context: Context, options: PromptOptions, tokenizer: Any, rows: int) -> Data:
    """Windows of documents drawn evenly over the text, as many as the steps can see. Raises InputError.

    A document that is there twice counts once, and none is learned from that the validation text has too.
    """
    length = options.sequence_length
    text, apart = (_documents(context, paths) for paths in (options.text, options.validation_text))
    if apart and set(text) <= set(apart):
        raise InputError(
            "the validation text has every document of the text", hint="hold out other documents than are learned from"
        )
    text = [document for document in text if document not in set(apart)]
    pieces, order, kept = _split(text, length, context.seed, held_out=not apart)
    if apart:
        kept = calibration.pieces(apart, calibration.PIECE_CHARACTERS * length)
    validation = list(windows(tokenizer, rows, kept, length, first_only=True))[:VALIDATION]
    train: list[Window] = []
    used = tokens = 0
    for place in order:
        found = list(windows(tokenizer, rows, [pieces[place]], length, first_only=False))
        train += found
        used += 1
        tokens += sum(window.scored for window in found)
        if len(train) >= options.steps * options.batch_size and tokens >= length:
            break
    if tokens < length:
        raise InputError(
            f"the text has {tokens} tokens to learn from, less than one window of {length}",
            hint="give more text, or a smaller `--sequence-length`",
        )
    if not validation:
        raise InputError("the validation text has no token to score")
    facts = {
        "documents": len(text),
        "pieces": len(pieces),
        "pieces_used": used,
        "pieces_held_out": 0 if apart else len(kept),
        "windows": len(train),
        "tokens": tokens,
        "sequence_length": length,
        "validation_windows": len(validation),
        "validation_tokens": sum(window.scored for window in validation),
    }
    return Data(train, validation, facts)


def _split(texts: Sequence[str], length: int, seed: int, *, held_out: bool) -> tuple[list[str], list[int], list[str]]:
    """The text in pieces, the places of those to learn from, drawn evenly, and the pieces held out of it.

    All pieces of a document are held out together, unless there are so few documents that it is done by the piece.
    """
    cut = [calibration.pieces([text], calibration.PIECE_CHARACTERS * length) for text in texts]
    pieces = [piece for document in cut for piece in document]
    owners = [number for number, document in enumerate(cut) for _ in document]
    if len(cut) * SHARE < 1:
        owners = list(range(len(pieces)))
    order = list(calibration.spread(len(pieces), seed))
    if not held_out:
        return pieces, order, []
    if len(pieces) < 2:
        raise InputError(
            "the text is one short document, and none is left to choose the best step on",
            hint="give more text, or `--validation-text FILE`",
        )
    drawn = list(dict.fromkeys(owners[place] for place in order))
    held = set(drawn[: min(VALIDATION, max(1, int(SHARE * len(drawn))))])
    kept = [pieces[place] for place in order if owners[place] in held]
    return pieces, [place for place in order if owners[place] not in held], kept


def _documents(context: Context, paths: Sequence[Any]) -> list[str]:
    texts = [text for path in paths for text in calibration.read_documents(path, context.inputs)]
    if paths and not texts:
        raise InputError(f"`{paths[0]}` has no document")
    return list(dict.fromkeys(texts))
