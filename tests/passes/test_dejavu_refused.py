"""What `dejavu-predictor-train` refuses: a line, a hint, an exit code, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rewright.passes.errors import InputError, UsageError
from tests.passes.conftest import make
from tests.passes.forks import Forks
from tests.passes.outputs import beside
from tests.passes.sparsifying import PASS, STORIES, train, words


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("opt-350m", "norms stand after its blocks"),
        ("gpt2", "no contextual sparsity that is known"),
        ("bloom", "no contextual sparsity that is known"),
        ("mixtral", "no contextual sparsity that is known"),
        ("phi3", "no contextual sparsity that is known"),
    ],
)
def test_families(name: str, message: str, tiny: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as caught:
        train(tiny(name), tmp_path / "out", text)
    assert caught.value.hint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "settings", "message", "hint"),
    [
        ("opt", {"activation_function": "gelu"}, "`gelu` without a gate has no zeros", "--targets inputs"),
        ("opt", {"activation_function": "tanh"}, "activation `tanh` is not one", "relu"),
        ("llama", {"hidden_act": "sigmoid"}, "activation `sigmoid` is not one", "silu"),
    ],
)
def test_activations(name: str, settings: dict[str, Any], message: str, hint: str, text: Path, tmp_path: Path) -> None:
    source = make(name, tmp_path / "src", **settings)
    for targets in ("auto", "inputs"):
        with pytest.raises(InputError, match=message) as caught:
            train(source, tmp_path / "out", text, targets=targets, rank=None)
        assert hint in str(caught.value.hint)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "mlp"}, "never off"),
        ({"method": "bce"}, "`--method bce` is of predictors of neurons"),
        ({"rank": "8"}, "`--rank` is of predictors of neurons"),
        ({"budget": 0.5, "recall": 0.9}, "`--budget` and `--recall` ask for one thing"),
        ({"max-kl": 0.1, "cost": "energy"}, "counts in nats"),
        ({"sequence-length": 256}, "past the model's 128 positions"),
        ({"targets": "mpl"}, "must be `auto` or some of"),
        ({"batch-buckets": "1,64"}, "must be numbers from 1 to 16"),
        ({"budget": 1.5}, "must be from 0.001 to 1"),
    ],
)
def test_options(
    options: dict[str, Any], message: str, tiny: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        train(tiny("llama"), tmp_path / "out", text, **{"rank": None, **options})
    assert list(tmp_path.iterdir()) == []


def test_a_rank_past_the_width(text: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="more than the model is wide"):
        train(STORIES, tmp_path / "out", text, rank="129")


def test_in_one_line(forks: Forks, tiny: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    for asked, code in (
        ([PASS, tiny("opt"), tmp_path / "out"], 2),
        ([PASS, tiny("opt-350m"), tmp_path / "out", *words(text)], 3),
        ([PASS, tiny("opt"), tmp_path / "out", "--calibration-text", tmp_path / "none.txt"], 3),
        (["eval", tiny("opt"), "--text", text, "--against", "oracle"], 3),
        (["eval", tiny("opt"), "--text", text, "--against", "orcale"], 2),
        (["eval", tiny("opt"), "--text", text, "--picture", tmp_path / "a.svg"], 2),
        (["eval", tiny("opt"), "--text", text, "--against", "oracle", "--no-predictors"], 2),
    ):
        ended = forks.run(*asked)
        assert ended.code == code, (asked, ended.err)
        assert len([line for line in ended.err.splitlines() if line.startswith("error: ")]) == 1, ended.err
        assert "Traceback" not in ended.err
    assert not (tmp_path / "out").exists()


def test_a_text_too_short(forks: Forks, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Once upon a time.")
    ended = forks.run(PASS, STORIES, tmp_path / "out", *words(short))
    assert ended.code == 3, ended.err
    assert "less than one sequence of 64" in ended.err
    assert beside(tmp_path / "out") in ([], ["out.partial"])
