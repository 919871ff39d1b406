"""What a prompt is learned from, and what it is chosen on: other documents, each once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rewright.formats.checkpoint import Checkpoint
from rewright.passes.errors import InputError
from rewright.passes.loading import load_tokenizer
from rewright.passes.prompt.data import Data, gather
from rewright.passes.prompt.spec import VALIDATION, PromptOptions
from rewright.passes.scoring import Window
from tests.passes.conftest import STORIES
from tests.passes.prompting import attached, context, prompt, report

END = "<|endoftext|>"
TOKENIZER: Any = load_tokenizer(Checkpoint.open(STORIES))


def _gather(folder: Path, *text: Path, seed: int = 0, **options: Any) -> Data:
    asked = {"steps": 10_000, "batch_size": 8, "sequence_length": 32, **options}
    return gather(context(folder, STORIES, seed), PromptOptions(text=text, **asked), TOKENIZER, 512)


def _said(windows: list[Window]) -> list[str]:
    return [TOKENIZER.decode(window.tokens, skip_special_tokens=True) for window in windows]


def _numbered(folder: Path, count: int, words: int, name: str = "text.txt") -> Path:
    """Documents each of which has a word of its own in every window."""
    path = folder / name
    path.write_text(END.join(" ".join([f"the {number:04d}th cat sat"] * words) for number in range(count)))
    return path


def _documents(windows: list[Window], count: int) -> set[int]:
    told = _said(windows)
    return {number for number in range(count) if any(f"{number:04d}" in one for one in told)}


@pytest.mark.parametrize(("count", "words"), [(30, 4), (30, 400), (10, 100), (1200, 2)])
def test_documents_that_are_chosen_on_are_not_learned_from(count: int, words: int, tmp_path: Path) -> None:
    """Also none of the pieces that a long one is cut into."""
    found = _gather(tmp_path, _numbered(tmp_path, count, words))
    held, own = _documents(found.validation, count), _documents(found.train, count)
    assert held
    assert own
    assert not held & own
    assert len(found.validation) <= VALIDATION
    if words < 10:
        assert len(held) == min(VALIDATION, count // 10)
        assert len(own) == count - len(held), "with steps enough all others are seen"


def test_a_few_long_documents_are_held_out_by_the_piece(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text(" ".join(f"the {number:04d}th cat sat" for number in range(1500)))
    found = _gather(tmp_path, path)
    assert not _documents(found.validation, 1500) & _documents(found.train, 1500)
    assert found.facts["documents"] == 1
    assert found.facts["pieces_held_out"] == int(0.1 * found.facts["pieces"]) > 3


def test_every_target_once(tmp_path: Path) -> None:
    """All tokens of a document that is learned from are targets, whatever the window's length."""
    path = _numbered(tmp_path, 20, 7)
    for length in (11, 17, 64):
        found = _gather(tmp_path, path, sequence_length=length)
        assert found.facts["tokens"] == sum(window.scored for window in found.train)
        assert all(window.tokens[0] == TOKENIZER.bos_token_id for window in found.train)
        assert all(window.scored == len(window.tokens) - 1 <= length - 1 for window in found.train)
        own = [part for part in path.read_text().split(END) if part[4:8] in "".join(_said(found.train))]
        assert found.facts["tokens"] == sum(len(TOKENIZER(part, add_special_tokens=False).input_ids) for part in own)


def test_the_seed_decides_and_no_more_is_read_than_steps_see(tmp_path: Path) -> None:
    path = _numbered(tmp_path, 300, 4)
    one, same, other = (_gather(tmp_path, path, seed=seed, steps=3, batch_size=2) for seed in (0, 0, 1))
    assert (one.train, one.validation) == (same.train, same.validation)
    assert one.validation != other.validation
    assert 6 <= len(one.train) < 40


def test_a_short_first_document_is_not_the_whole_text(tmp_path: Path) -> None:
    """One step of one window, of documents shorter than that: more of them are taken."""
    found = _gather(tmp_path, _numbered(tmp_path, 40, 1), steps=1, batch_size=1)
    assert found.facts["tokens"] >= 32


@pytest.mark.parametrize("twice", ["the file", "every document", "some in another file"])
def test_what_is_there_twice_counts_once(twice: str, tmp_path: Path) -> None:
    path = _numbered(tmp_path, 30, 4)
    other = tmp_path / "other.jsonl"
    parts = path.read_text().split(END)
    other.write_text("".join(f'{{"text": "{part}"}}\n' for part in parts[:7]))
    if twice == "every document":
        path.write_text(END.join([*parts, *parts]))
    texts = {"the file": (path, path), "every document": (path,), "some in another file": (path, other)}[twice]
    found, once = _gather(tmp_path, *texts), _gather(tmp_path, _numbered(tmp_path, 30, 4, "once.txt"))
    assert (found.train, found.validation, found.facts) == (once.train, once.validation, once.facts)


def test_a_validation_text_is_not_learned_from(tmp_path: Path) -> None:
    path = _numbered(tmp_path, 30, 4)
    held = tmp_path / "held.txt"
    held.write_text(END.join(path.read_text().split(END)[20:]))
    found = _gather(tmp_path, path, validation_text=(held,))
    assert _documents(found.validation, 30) == set(range(20, 30))
    assert _documents(found.train, 30) == set(range(20))
    assert found.facts["pieces_held_out"] == 0
    with pytest.raises(InputError, match="the validation text has every document of the text") as refused:
        _gather(tmp_path, held, validation_text=(path,))
    assert refused.value.hint


def test_several_files_are_one_text(rounded: Path, text: Path, tmp_path: Path) -> None:
    documents = text.read_text().split(END)
    halves = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path, part in zip(halves, (documents[:20], documents[20:]), strict=True):
        path.write_text(END.join(part))
    prompt(rounded, tmp_path / "one", text, steps=2)
    for name, listed in (("two", halves), ("twice", [*halves, halves[1]])):
        prompt(rounded, tmp_path / name, listed, steps=2)
        assert torch.equal(attached(tmp_path / name), attached(tmp_path / "one")), name
        assert report(tmp_path / name)["text"] == report(tmp_path / "one")["text"]


def test_other_ways_to_write_a_text(rounded: Path, text: Path, tmp_path: Path) -> None:
    """A byte-order mark and ends of lines of Windows are no other text."""
    prompt(rounded, tmp_path / "one", text, steps=1)
    odd = tmp_path / "odd.txt"
    odd.write_bytes(b"\xef\xbb\xbf" + text.read_bytes().replace(b"\n", b"\r\n"))
    prompt(rounded, tmp_path / "two", odd, steps=1)
    assert torch.equal(attached(tmp_path / "two"), attached(tmp_path / "one"))
