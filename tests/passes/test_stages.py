"""Stages in a row: who is named, what stays on the disk, what may not go on to be published."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rewright.formats.errors import ConflictError, FormatError, Refusal, StorageError
from rewright.kernels import dispatch
from rewright.passes.errors import BoundError, InputError, ResourceError, UsageError
from tests.passes.conftest import STORIES
from tests.passes.fakes import ACTS, Act, fake, go
from tests.passes.outputs import beside, stamp


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return Path(shutil.copytree(STORIES, tmp_path / "model"))


@pytest.fixture
def dst(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture(autouse=True)
def acts() -> Iterator[dict[str, Act]]:
    yield ACTS
    ACTS.clear()


def _raising(error: BaseException) -> Act:
    def act(*_: Any) -> None:
        raise error

    return act


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (InputError("said", hint="do"), InputError),
        (FormatError("said", hint="do"), FormatError),
        (StorageError("said", hint="do"), StorageError),
        (dispatch.KernelError("said", hint="do"), UsageError),
    ],
)
def test_a_refusal_says_which_stage(error: Exception, kind: type[Refusal], src: Path, dst: Path, acts: Any) -> None:
    acts["fail"] = _raising(error)
    with pytest.raises(kind) as caught:
        go(src, dst, fake(), fake(act="fail"))
    assert (str(caught.value), caught.value.hint) == ("stage 2 (fake): said", "do")
    assert not dst.exists()
    shutil.rmtree(dst.with_name("out.partial"))
    error.args, vars(error)["message"] = ("said",), "said"
    with pytest.raises(kind) as caught:
        go(src, dst, fake(act="fail"))
    assert str(caught.value) == "said", "a run of one stage needs no number"


def test_a_stage_that_fails_keeps_those_before_it(src: Path, dst: Path, acts: Any) -> None:
    acts["count"] = lambda *_: ran.append(1)
    acts["fail"] = _raising(KeyboardInterrupt())
    ran: list[int] = []
    chain = (fake(act="count"), fake(act="count", level=2), fake(act="fail"), fake(level=4))
    with pytest.raises(KeyboardInterrupt):
        go(src, dst, *chain)
    partial = dst.with_name("out.partial")
    assert sorted(path.name for path in partial.iterdir()) == ["2-fake", "3-fake", "3-fake.work", "run.json"]
    acts["fail"] = lambda *_: ran.append(3)
    document = go(src, dst, *chain)
    assert ran == [1, 1, 3]
    assert [stage["metrics"]["level"] for stage in document["stages"]] == [1, 2, 1, 4]
    assert [stage["metrics"]["level"] for stage in stamp(dst)["stages"]] == [1, 2, 1, 4]
    assert beside(dst) == []


def test_at_most_two_checkpoints_are_on_the_disk(src: Path, dst: Path, acts: Any) -> None:
    seen = []

    def look(context: Any, source: Any, draft: Any) -> None:
        seen.append(sorted(path.name for path in context.work.parent.iterdir() if not path.suffix))
        assert context.work.is_dir()

    acts["look"] = look
    go(src, dst, *[fake(act="look", level=n) for n in (1, 2, 3)])
    assert seen == [["1-fake"], ["1-fake", "2-fake"], ["2-fake", "3-fake"]]


def test_the_journal_stays_until_its_stage_is_sealed(src: Path, dst: Path, acts: Any, monkeypatch: Any) -> None:
    """Reading a large result for its digests takes minutes, and a kill in them must not cost the stage."""
    from rewright.passes.stages import Draft

    def record(context: Any, *_: Any) -> None:
        context.journal.record("unit", {})

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    acts["record"] = record
    with monkeypatch.context() as patch:
        patch.setattr(Draft, "seal", killed)
        with pytest.raises(KeyboardInterrupt):
            go(src, dst, fake(act="record"))
    acts["record"] = lambda context, *_: found.update(context.journal.done)
    found: dict[str, Any] = {}
    go(src, dst, fake(act="record"))
    assert found == {"unit": {}}


@pytest.mark.parametrize("error", [InputError("x"), UsageError("x"), BoundError("x")])
def test_a_run_that_cannot_succeed_is_in_nobodys_way(error: Refusal, src: Path, dst: Path, acts: Any) -> None:
    def fail(context: Any, *_: Any) -> None:
        context.journal.record("unit", {})
        raise error

    acts["fail"] = fail
    with pytest.raises(type(error)):
        go(src, dst, fake(act="fail"))
    assert beside(dst) == []
    acts["fail"] = lambda *_: None
    assert go(src, dst, fake(act="fail", level=2))["state"] == "done"


def test_nothing_done_is_in_nobodys_way(src: Path, dst: Path, acts: Any) -> None:
    acts["stop"] = _raising(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        go(src, dst, fake(act="stop"))
    assert beside(dst) == ["out.partial"]
    assert go(src, dst, fake(level=2))["state"] == "done"
    assert beside(dst) == []


def test_a_resumed_run_that_fails_keeps_its_work(src: Path, dst: Path, acts: Any) -> None:
    """`--kernels` is not in the key: asking for what this machine lacks must not cost hours of work."""

    def stop(context: Any, *_: Any) -> None:
        context.journal.record("unit", {})
        raise KeyboardInterrupt

    acts["work"] = stop
    with pytest.raises(KeyboardInterrupt):
        go(src, dst, fake(act="work"))
    acts["work"] = _raising(dispatch.KernelError("no"))
    with pytest.raises(UsageError):
        go(src, dst, fake(act="work"), kernels="triton")
    acts["work"] = lambda context, *_: {"units": len(context.journal.done)}
    assert go(src, dst, fake(act="work"))["stages"][0]["metrics"]["units"] == 1


def test_an_absent_device_is_refused_before_anything_is_begun(src: Path, dst: Path) -> None:
    with pytest.raises(ResourceError):
        go(src, dst, device="cuda:77")
    assert beside(dst) == []


def test_kernels_and_what_ran_are_on_record(src: Path, dst: Path, acts: Any) -> None:
    def look(*_: Any) -> None:
        modes.append(dispatch.mode())
        dispatch.pick("op", [], lambda: None)

    modes: list[str] = []
    acts["look"] = look
    go(src, dst, fake(act="look"), fake(), kernels="reference")
    assert modes == ["reference"]
    assert [stage["kernels"] for stage in stamp(dst)["stages"]] == [{"op": ["reference"]}, {}]


def test_a_metric_that_is_not_finite(src: Path, dst: Path, acts: Any) -> None:
    acts["diverge"] = lambda *_: {"loss": float("nan")}
    with pytest.raises(BoundError, match=r"stage 2 .* `loss` came out as nan"):
        go(src, dst, fake(), fake(act="diverge"))
    assert not dst.exists()


def test_a_source_that_changes_under_the_run(src: Path, dst: Path, acts: Any) -> None:
    def change(*_: Any) -> None:
        config = json.loads((src / "config.json").read_text())
        (src / "config.json").write_text(json.dumps({**config, "changed": True}))

    acts["change"] = change
    with pytest.raises(InputError, match="changed while it was read"):
        go(src, dst, fake(act="change"))
    assert not dst.exists()


def test_a_file_that_changes_under_the_run(src: Path, dst: Path, acts: Any, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("one")

    def change(context: Any, *_: Any) -> None:
        assert context.inputs.read(file) == b"one"
        file.write_text("two")
        context.inputs.read(file)

    acts["change"] = change
    with pytest.raises(InputError, match="changed while it was in use"):
        go(src, dst, fake(act="change", file=file))


def test_what_appears_at_the_destination_meanwhile_stays(src: Path, dst: Path, acts: Any) -> None:
    def appear(*_: Any) -> None:
        dst.mkdir()
        (dst / "thesis.txt").write_text("years of work")

    acts["appear"] = appear
    with pytest.raises(ConflictError, match="is not Rewright's"):
        go(src, dst, fake(act="appear"), force=True)
    assert (dst / "thesis.txt").read_text() == "years of work"
    shutil.rmtree(dst)
    acts["appear"] = _raising(AssertionError("is done already"))
    assert go(src, dst, fake(act="appear"), force=True)["state"] == "done"


def test_another_run_that_finishes_first(src: Path, dst: Path, monkeypatch: Any) -> None:
    """Between the look at the destination and the lock."""
    from rewright.passes import pipeline

    lock = pipeline.publish.lock

    def late(place: Path) -> Any:
        monkeypatch.setattr(pipeline.publish, "lock", lock)
        go(src, dst)
        return lock(place)

    monkeypatch.setattr(pipeline.publish, "lock", late)
    assert go(src, dst)["state"] == "up-to-date"
    assert beside(dst) == []


def test_the_stamp_tells_the_source_and_its_past(src: Path, dst: Path, tmp_path: Path) -> None:
    go(src, dst, fake(level=3))
    go(dst, tmp_path / "next", fake(level=4))
    found = stamp(tmp_path / "next")
    assert [stage["options"]["level"] for stage in found["stages"]] == [4]
    assert found["source"]["name"] == "out"
    assert [stage["options"]["level"] for stage in found["source"]["stages"]] == [3]


def test_reports_of_earlier_stages_are_kept(src: Path, dst: Path, acts: Any) -> None:
    acts["a"] = lambda context, source, draft: draft.put("reports/a.json", b"1")
    acts["b"] = lambda context, source, draft: draft.put("reports/a.json", b"2")
    acts["stop"] = _raising(KeyboardInterrupt())
    chain = (fake(act="a"), fake(act="b"), fake(act="stop"))
    with pytest.raises(KeyboardInterrupt):
        go(src, dst, *chain)
    acts["stop"] = lambda *_: None
    go(src, dst, *chain)
    assert {path.name: path.read_text() for path in (dst / "reports").iterdir()} == {"a.json": "2", "1-a.json": "1"}
    go(dst, dst.with_name("next"))
    assert not (dst.with_name("next") / "reports").exists(), "another run's reports are not this one's"
