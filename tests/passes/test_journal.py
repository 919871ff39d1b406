"""The journal of a stage: what it names is there, what a kill cut short is not in it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewright.formats.errors import StorageError
from rewright.passes.journal import Journal


def test_what_is_recorded_is_read_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.record("layer 0", {"loss": 0.5, "damp": None})
    journal.record("layer 1", {})
    assert Journal(tmp_path).done == {"layer 0": {"loss": 0.5, "damp": None}, "layer 1": {}}


@given(
    st.dictionaries(st.text(), st.dictionaries(st.text(), st.floats(allow_nan=False) | st.text()), max_size=4),
    st.floats(0, 1),
)
def test_cut_anywhere(tmp_path_factory: pytest.TempPathFactory, units: dict[str, Any], share: float) -> None:
    """Every whole line counts and nothing else; new records follow the last of them."""
    path = tmp_path_factory.mktemp("cut") / "journal.jsonl"
    journal = Journal(path.parent)
    for unit, facts in units.items():
        journal.record(unit, facts)
    whole = path.read_bytes()
    cut = round(share * len(whole))  # its length differs by the time it took
    path.write_bytes(whole[:cut])
    again = Journal(path.parent)
    lines = whole[:cut].count(b"\n")
    assert again.done == dict(list(units.items())[:lines])
    again.record("last", {"x": 1})
    assert Journal(path.parent).done == {**again.done, "last": {"x": 1}}
    assert path.read_bytes().count(b"\n") == lines + 1


@pytest.mark.parametrize(
    "line", [b"\n", b"{}\n", b"[1]\n", b'{"unit": 3}\n', b"\xff\xff\n", b'{"unit": "a", "data": []}\n']
)
def test_damage_ends_the_record(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path.parent)
    journal.record("a", {})
    good = path.read_bytes()
    journal.record("b", {})
    path.write_bytes(good + line + path.read_bytes()[len(good) :])
    assert Journal(path.parent).done == {"a": {}}
    assert path.read_bytes() == good


def test_time_and_implementations_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    ran: dict[str, list[str]] = {}
    path = tmp_path / "journal.jsonl"
    journal = Journal(path.parent, ran=lambda: ran)
    assert (journal.seconds, journal.ran) == (0, {})
    now[0], ran = 107.0, {"pack": ["reference"]}
    journal.record("a", {})
    now[0], ran = 1000.0, {"pack": ["triton"], "sweep": ["triton"]}  # lost: a kill comes before the next record
    assert journal.seconds == 900

    again = Journal(path.parent, ran=lambda: ran)
    ran = {"sweep": ["reference"]}
    now[0] += 3
    assert again.seconds == 10
    assert again.ran == {"pack": ["reference"], "sweep": ["reference"]}
    again.record("b", {})
    ran = {}
    third = Journal(path.parent, ran=lambda: ran)
    assert (third.seconds, third.ran) == (10, again.ran | {"sweep": ["reference"]})


def test_a_record_is_on_the_disk_when_it_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = []
    fsync = os.fsync

    def note(number: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{number}"))
        fsync(number)

    monkeypatch.setattr(os, "fsync", note)
    journal = Journal(tmp_path)
    assert flushed == [str(tmp_path)], "the file's name, too"
    journal.record("a", {})
    assert flushed[1:] == [str(tmp_path / "journal.jsonl")]


def test_a_full_disk_is_a_refusal(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.path = Path("/dev/full")
    with pytest.raises(StorageError, match="no space left"):
        journal.record("a", {})
    assert journal.done == {}
    assert json.dumps(journal.ran) == "{}"
    with pytest.raises(StorageError):
        Journal(tmp_path / "absent")


def test_processes_write_apart_and_read_together(tmp_path: Path) -> None:
    """A run goes on with another number of processes; a line cut short in one journal does not end another."""
    first, third = Journal(tmp_path), Journal(tmp_path, rank=2)
    first.record("a", {"x": 1})
    third.record("b", {"x": 2})
    assert (first.done, third.done) == ({"a": {"x": 1}}, {"b": {"x": 2}})
    torn = tmp_path / "journal-2.jsonl"
    torn.write_bytes(torn.read_bytes() + b'{"unit": "c"')
    for rank in (0, 1):
        assert Journal(tmp_path, rank=rank).done == {"a": {"x": 1}, "b": {"x": 2}}
    assert torn.read_bytes().endswith(b'"c"'), "only its owner mends it"
    Journal(tmp_path, rank=2).record("d", {})
    assert Journal(tmp_path).done == {"a": {"x": 1}, "b": {"x": 2}, "d": {}}
