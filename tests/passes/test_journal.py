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
    journal = Journal(tmp_path / "journal")
    journal.record("layer 0", {"loss": 0.5, "damp": None})
    journal.record("layer 1", {})
    assert Journal(tmp_path / "journal").done == {"layer 0": {"loss": 0.5, "damp": None}, "layer 1": {}}


@given(
    st.dictionaries(st.text(), st.dictionaries(st.text(), st.floats(allow_nan=False) | st.text()), max_size=4),
    st.floats(0, 1),
)
def test_cut_anywhere(tmp_path_factory: pytest.TempPathFactory, units: dict[str, Any], share: float) -> None:
    """Every whole line counts and nothing else; new records follow the last of them."""
    path = tmp_path_factory.mktemp("cut") / "journal"
    journal = Journal(path)
    for unit, facts in units.items():
        journal.record(unit, facts)
    whole = path.read_bytes()
    cut = round(share * len(whole))  # its length differs by the time it took
    path.write_bytes(whole[:cut])
    again = Journal(path)
    lines = whole[:cut].count(b"\n")
    assert again.done == dict(list(units.items())[:lines])
    again.record("last", {"x": 1})
    assert Journal(path).done == {**again.done, "last": {"x": 1}}
    assert path.read_bytes().count(b"\n") == lines + 1


@pytest.mark.parametrize(
    "line", [b"\n", b"{}\n", b"[1]\n", b'{"unit": 3}\n', b"\xff\xff\n", b'{"unit": "a", "data": []}\n']
)
def test_damage_ends_the_record(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path)
    journal.record("a", {})
    good = path.read_bytes()
    journal.record("b", {})
    path.write_bytes(good + line + path.read_bytes()[len(good) :])
    assert Journal(path).done == {"a": {}}
    assert path.read_bytes() == good


def test_time_and_implementations_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    ran: dict[str, list[str]] = {}
    path = tmp_path / "journal"
    journal = Journal(path, ran=lambda: ran)
    assert (journal.seconds, journal.ran) == (0, {})
    now[0], ran = 107.0, {"pack": ["reference"]}
    journal.record("a", {})
    now[0], ran = 1000.0, {"pack": ["triton"], "sweep": ["triton"]}  # lost: a kill comes before the next record
    assert journal.seconds == 900

    again = Journal(path, ran=lambda: ran)
    ran = {"sweep": ["reference"]}
    now[0] += 3
    assert again.seconds == 10
    assert again.ran == {"pack": ["reference"], "sweep": ["reference"]}
    again.record("b", {})
    ran = {}
    third = Journal(path, ran=lambda: ran)
    assert (third.seconds, third.ran) == (10, again.ran | {"sweep": ["reference"]})


def test_a_record_is_on_the_disk_when_it_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = []
    fsync = os.fsync

    def note(number: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{number}"))
        fsync(number)

    monkeypatch.setattr(os, "fsync", note)
    journal = Journal(tmp_path / "journal")
    assert flushed == [str(tmp_path)], "the file's name, too"
    journal.record("a", {})
    assert flushed[1:] == [str(tmp_path / "journal")]


def test_a_full_disk_is_a_refusal(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    journal.path = Path("/dev/full")
    with pytest.raises(StorageError, match="no space left"):
        journal.record("a", {})
    assert journal.done == {}
    assert json.dumps(journal.ran) == "{}"
    with pytest.raises(StorageError):
        Journal(tmp_path / "absent" / "journal")
