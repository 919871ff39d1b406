"""Training predictors that is interrupted or killed: the same command goes on, to the same bytes."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rewright.formats.dejavu import CONFIG, FOLDER, WEIGHTS
from rewright.formats.draft import Draft
from rewright.passes.dejavu_predictor_train import layers, run
from rewright.passes.journal import Journal
from rewright.passes.training import Training
from tests.passes.forks import Forks, Strike
from tests.passes.interruptions import raise_at
from tests.passes.outputs import beside, contents
from tests.passes.processes import Launched
from tests.passes.sparsifying import PASS, train, words

OPTIONS: dict[str, Any] = {"targets": "mlp,heads", "method": "bce", "tokens": 2048, "sequence-length": 64}
OFTEN = "from rewright.passes import training\ntraining.PAUSE = 0\n"


@pytest.fixture(scope="module")
def whole(tiny: Callable[[str], Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an uninterrupted run makes."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    train(tiny("opt"), folder, text, **OPTIONS)
    return folder


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (run, "write_file", 1),
        (layers, "write_file", 1),
        (layers, "write_file", 2),
        (Journal, "record", 2),
        (Training, "_update", 3),
        (run, "compare", 1),
        (Draft, "link_weights", 1),
        (Draft, "put", 1),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_interruption_changes_no_byte(
    owner: Any,
    name: str,
    call: int,
    whole: Path,
    tiny: Callable[[str], Path],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rewright.passes.training.PAUSE", 0.0)
    dst = tmp_path / "out"
    with monkeypatch.context() as patched:
        raise_at(patched, owner, name, call)
        with pytest.raises(KeyboardInterrupt):
            train(tiny("opt"), dst, text, **OPTIONS)
    assert not dst.exists()
    train(tiny("opt"), dst, text, **OPTIONS)
    assert contents(dst) == contents(whole)
    assert [name for name in beside(dst) if "lock" not in name] == []


def test_layers_that_are_done_are_not_done_again(
    whole: Path, tiny: Callable[[str], Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dst, real, trained = tmp_path / "out", layers._train, []
    with monkeypatch.context() as patched:
        raise_at(patched, run, "compare", 1)
        with pytest.raises(KeyboardInterrupt):
            train(tiny("opt"), dst, text, **OPTIONS)

    def counted(job: Any, layer: Any, sensitivity: Any) -> Any:
        trained.append(layer.index)
        return real(job, layer, sensitivity)

    monkeypatch.setattr(layers, "_train", counted)
    train(tiny("opt"), dst, text, **OPTIONS)
    assert trained == []
    assert contents(dst) == contents(whole)


def test_killed_at_any_moment(
    forks: Forks, whole: Path, tiny: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    """At changes to the disk drawn at random."""
    dst = tmp_path / "out"
    asked = [PASS, "--threads", "1", tiny("opt"), dst, *words(text, **OPTIONS)]
    last = forks.changes(*asked, also=OFTEN)
    assert contents(dst) == contents(whole)
    shutil.rmtree(dst)
    moments = [Strike(number) for number in random.Random().sample(range(1, last), 2)]
    moments += [Strike(2, "journal.jsonl"), Strike(1, "layer-1.safetensors")]
    for strike in moments:
        ended = forks.run(*asked, strike=strike, also=OFTEN)
        assert ended.code == -signal.SIGKILL, (strike, ended.err)
        ended = forks.run(*asked, also=OFTEN)
        assert ended.code == 0, (strike, ended.err)
        assert contents(dst) == contents(whole), strike
        shutil.rmtree(dst)


def test_two_processes_make_the_bytes_of_one(
    whole: Path, tiny: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    run = Launched(tmp_path, 2, [PASS, "--threads", "1", tiny("opt"), tmp_path / "out", *words(text, **OPTIONS)], "")
    code, _, err = run.wait()
    assert code == 0, err
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / "out" / FOLDER / name).read_bytes() == (whole / FOLDER / name).read_bytes()
