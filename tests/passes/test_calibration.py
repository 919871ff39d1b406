"""Text into tokens: nothing lost, nothing silent, the same rows every time."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rewright.formats.checkpoint import Checkpoint
from rewright.passes import calibration
from rewright.passes.errors import InputError
from rewright.passes.inputs import Inputs
from rewright.passes.loading import load_tokenizer
from tests.passes.conftest import DATA, STORIES


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(Checkpoint.open(STORIES))


def read(path: Path) -> list[str]:
    return calibration.read_documents(path, Inputs())


def test_marks_and_line_ends_change_nothing(tmp_path: Path) -> None:
    text = "One day.\nA cat.\n<|endoftext|>\nTwo dogs é.\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert read(tmp_path / "a.txt") == read(tmp_path / "b.txt") == ["One day.\nA cat.", "Two dogs é."]


def test_lines_of_json(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n"two"\n{"text": " "}\n')
    assert read(path) == ["one", "two"]
    path.write_text('{"text": "one"}\n{"content": "two", "id": 3}\n')
    with pytest.raises(InputError, match=r"line 2 has no `text`: found `content`, `id`"):
        read(path)
    path.write_text('{"text": "one"}\n{"text": \n')
    with pytest.raises(InputError, match="line 2 is not JSON"):
        read(path)


def test_json_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("[" * 100_000)
    with pytest.raises(InputError, match="line 1 is not JSON"):
        read(path)
    path.write_text('{"text": "a \\ud800 b"}')
    with pytest.raises(InputError, match=r"line 1 holds half a character, '\\ud800'"):
        read(path)


@given(st.text("ab \n", max_size=200), st.integers(2, 30))
def test_pieces_joined_are_the_document(text: str, most: int) -> None:
    pieces = calibration.pieces([text], most)
    assert "".join(pieces) == text
    assert all(len(piece) <= most for piece in pieces)


def test_other_encodings_are_refused_with_their_place(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("abc déf".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin.txt` is not UTF-8: byte 5 is 0xe9"):
        read(path)
    with pytest.raises(InputError, match=r"absent.txt` cannot be read: no such file"):
        read(tmp_path / "absent.txt")


def test_the_drawn_documents_are_spread_over_the_text(tokenizer: Any) -> None:
    """A tenth of the documents of a text, drawn, has a document in every fifteenth part of it."""
    order = calibration.spread(2000, seed=4)
    drawn = sorted(next(order) for _ in range(200))
    assert max(b - a for a, b in itertools.pairwise(drawn)) < 2000 / 15
    assert drawn[0] < 40
    assert drawn[-1] > 1960


@given(st.integers(0, 300), st.integers(0, 9))
def test_every_document_is_drawn_once(count: int, seed: int) -> None:
    assert sorted(calibration.spread(count, seed)) == list(range(count))


def draw(tokenizer: Any, texts: list[str], **said: Any) -> calibration.Calibration:
    plain = {"rows": 512, "samples": 6, "held_out": 2, "length": 32, "seed": 0, **said}
    return calibration.draw(texts, tokenizer, **plain)


def test_rows_are_the_documents_joined_and_cut(tokenizer: Any) -> None:
    texts = [text[:400] for text in read(DATA / "tinystories_heldout.txt")]
    drawn = draw(tokenizer, texts)
    assert drawn.tokens.shape == (6, 32)
    assert drawn.held_out.shape == (2, 32)
    first = next(calibration.spread(len(texts), 0))
    expected = tokenizer(texts[first]).input_ids[:32]
    assert drawn.tokens[0].tolist() == expected
    assert expected[0] == tokenizer.bos_token_id
    again = draw(tokenizer, texts)
    assert torch.equal(again.tokens, drawn.tokens)
    assert again.facts == drawn.facts
    assert draw(tokenizer, texts, seed=1).facts["digest"] != drawn.facts["digest"]


def test_short_documents_are_joined_and_long_ones_cut(tokenizer: Any) -> None:
    short = draw(tokenizer, ["A cat."] * 200)
    assert short.facts["samples_used"] == 6
    assert int((short.tokens == tokenizer.bos_token_id).sum()) > 12
    book = draw(tokenizer, ["Once upon a time there was a cat. " * 2000])
    assert book.facts["samples_used"] == 6
    few = draw(tokenizer, ["Once upon a time there was a little cat. " * 12], samples=128)
    assert 1 <= few.facts["samples_used"] < 128 == few.facts["samples_asked"]
    assert few.held_out.shape[0] == 0
    with pytest.raises(InputError, match="less than one sequence of 32"):
        draw(tokenizer, ["A cat."])
    with pytest.raises(InputError, match="0 tokens"):
        draw(tokenizer, [])


def test_ids_past_the_embedding_are_named(tokenizer: Any) -> None:
    with pytest.raises(InputError, match=r"token `.*` has id \d+, and the embedding has 300 rows"):
        draw(tokenizer, ["Once upon a time there was a zebra."] * 50, rows=300)


def test_start_tokens(tokenizer: Any, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    assert calibration.start_tokens(tokenizer) == [tokenizer.bos_token_id]
    config = json.loads((STORIES / "tokenizer.json").read_text())
    config["post_processor"] = None
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / name).write_bytes((STORIES / name).read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (tmp_path / "tokenizer.json").write_text(json.dumps(config))
    from transformers import AutoTokenizer

    assert calibration.start_tokens(AutoTokenizer.from_pretrained(tmp_path)) == []
