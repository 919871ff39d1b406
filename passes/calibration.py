"""Text into token rows: the same text, seed and tokenizer give the same rows, and say what they were made of."""

from __future__ import annotations

import codecs
import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewright.passes.errors import InputError

if TYPE_CHECKING:
    import torch

    from rewright.formats.checkpoint import Checkpoint
    from rewright.passes.inputs import Inputs

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
SEPARATOR = "<|endoftext|>"
GOLDEN = 0.6180339887498949
# A document longer than this many characters a token of a row is drawn in pieces, so that a book can be sampled.
PIECE_CHARACTERS = 16


@dataclass(frozen=True, slots=True)
class Calibration:
    """Rows of tokens, (rows, length) int64, and what they came from.

    `held_out` rows come from documents, or pieces of a long one, that no calibration row touches; there are none where
    the text is too short.
    """

    tokens: torch.Tensor
    held_out: torch.Tensor
    facts: dict[str, Any]


def documents(data: bytes, name: str, *, lines: bool) -> list[str]:
    """The documents of a text: parts between `<|endoftext|>`, or with `lines` the `text` of each JSON line.

    A byte-order mark is dropped, CRLF is LF, empty documents do not count. Raises InputError naming file and place.
    """
    text = decode(data, name)
    if lines:
        return [record for record in _records(text, name) if record.strip()]
    return [part for part in (piece.strip() for piece in text.split(SEPARATOR)) if part]


def decode(data: bytes, name: str) -> str:
    """UTF-8 without a byte-order mark, with LF ends of lines. Raises InputError with the offset of what is not."""
    # the mark counts where an offset is told
    mark = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
    try:
        return data[mark:].decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        place = error.start + mark
        raise InputError(f"`{name}` is not UTF-8: byte {place} is {data[place]:#04x}") from None


def json_lines(text: str, name: str) -> Iterator[tuple[str, Any]]:
    """(where it stands, value) of every line that is not blank. Raises InputError naming a line that is not JSON."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"`{name}` line {number}"
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError):
                raise InputError(f"{where} is not JSON") from None


def whole(text: str, where: str) -> str:
    """The text, if it can be written as UTF-8: JSON can spell halves of characters. Raises InputError."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where} holds half a character, {error.object[error.start]!r}") from None
    return text


def _records(text: str, name: str) -> Iterator[str]:
    for where, record in json_lines(text, name):
        if isinstance(record, str):
            yield whole(record, where)
        elif isinstance(record, dict) and isinstance(record.get("text"), str):
            yield whole(record["text"], where)
        else:
            keys = ", ".join(f"`{key}`" for key in record) if isinstance(record, dict) else type(record).__name__
            raise InputError(f"{where} has no `text`: found {keys}", hint='one {"text": "..."} a line')


def read_documents(path: Path, inputs: Inputs) -> list[str]:
    """The documents of a text file by its ending; standard input is .jsonl if it starts with a brace."""
    data = inputs.read(path)
    head = data.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    lines = path.suffix in (".jsonl", ".ndjson") or (path == Path("-") and head == b"{")
    return documents(data, str(path), lines=lines)


def has_tokenizer(source: Checkpoint) -> bool:
    """Whether a checkpoint brings a tokenizer, by its files."""
    return any((source.root / name).exists() for name in TOKENIZER_FILES)


def start_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer puts in front of a text: one start token, or nothing."""
    bare = tokenizer("a", add_special_tokens=False).input_ids
    full = tokenizer("a").input_ids
    for cut in range(len(full) - len(bare) + 1):
        if full[cut : cut + len(bare)] == bare:
            return [int(token) for token in full[:cut]]
    return []


def encode(tokenizer: Any, text: str, rows: int) -> list[int]:
    """A text's tokens without any that the tokenizer adds. Raises InputError for an id past the last row."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    highest = max(ids, default=-1)
    if highest >= rows:
        token = tokenizer.convert_ids_to_tokens(highest)
        raise InputError(f"token `{token}` has id {highest}, and the embedding has {rows} rows")
    return ids


def pieces(texts: Sequence[str], most: int) -> list[str]:
    """Documents, those past `most` characters cut before white space; joined again they are what they were."""
    found = []
    for text in texts:
        start = 0
        while len(text) - start > most:
            cut = max(text.rfind(" ", start + 1, start + most), text.rfind("\n", start + 1, start + most))
            cut = cut if cut > 0 else start + most
            found.append(text[start:cut])
            start = cut
        found.append(text[start:])
    return found


def spread(count: int, seed: int) -> Iterator[int]:
    """Every index below `count` once, evenly spread at whatever point one stops: steps of the golden ratio."""
    offset = random.Random(seed).random()
    following = list(range(count + 1))

    def free(index: int) -> int:
        while following[index] != index:
            following[index] = following[following[index]]
            index = following[index]
        return index

    for step in range(count):
        index = free(int((offset + step * GOLDEN) % 1 * count))
        if index == count:
            index = free(0)
        following[index] = index + 1
        yield index


def draw(
    texts: Sequence[str],
    tokenizer: Any,
    *,
    rows: int,
    samples: int,
    held_out: int,
    length: int,
    seed: int,
) -> Calibration:
    """Documents drawn evenly over the text, each with its start token, joined and cut into rows of `length`.

    A long document is drawn in pieces, each a text of its own.

    `rows` is the number of rows of the embedding. No document is dropped for its length. Raises InputError when
    there is not one whole row.
    """
    import torch

    parts = pieces(texts, PIECE_CHARACTERS * length)
    start = start_tokens(tokenizer)
    order = spread(len(parts), seed)
    stream, used = _fill(order, parts, tokenizer, start, rows, samples * length)
    rest, _ = _fill(order, parts, tokenizer, start, rows, held_out * length)
    tokens = _cut(stream, samples, length)
    if not len(tokens):
        raise InputError(
            f"the calibration text has {len(stream)} tokens, less than one sequence of {length}",
            hint="give more text, or a smaller `--sequence-length`",
        )
    facts = {
        "samples_asked": samples,
        "samples_used": len(tokens),
        "samples_held_out": len(_cut(rest, held_out, length)),
        "sequence_length": length,
        "documents": len(texts),
        "documents_used": used,
        "tokens": tokens.numel(),
        "digest": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
    }
    return Calibration(torch.as_tensor(tokens), _cut(rest, held_out, length), facts)


def _fill(
    order: Iterator[int], pieces: Sequence[str], tokenizer: Any, start: list[int], rows: int, wanted: int
) -> tuple[list[int], int]:
    stream: list[int] = []
    used = 0
    while len(stream) < wanted:
        index = next(order, None)
        if index is None:
            break
        stream += start + encode(tokenizer, pieces[index], rows)
        used += 1
    return stream, used


def _cut(stream: list[int], samples: int, length: int) -> torch.Tensor:
    import torch

    count = min(samples, len(stream) // length)
    return torch.tensor(stream[: count * length], dtype=torch.int64).view(count, length)
