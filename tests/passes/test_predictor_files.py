"""Predictors of other systems: taken by `dejavu-predictor-train`, written by `export-predictors`."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from rewright.formats import predictors
from rewright.formats.errors import FormatError
from rewright.passes.errors import InputError, UsageError
from rewright.passes.export_predictors import files
from rewright.passes.loading import load
from rewright.passes.models import sparse
from tests.passes.forks import Forks
from tests.passes.sparsifying import STORIES, attached, report, train

WIDTH, NEURONS, LAYERS, RANK = 128, 512, 4, 6


def halves(layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(layer)
    return torch.randn(RANK, WIDTH, generator=draw), torch.randn(NEURONS, RANK, generator=draw)


def state(form: str, layer: int) -> dict[str, torch.Tensor]:
    """A layer's state dict as Deja Vu, PowerInfer or SVDP would have it."""
    a, b = halves(layer)
    if form == "dejavu":
        return {"0.weight": a, "1.weight": b}
    return {"fc1.weight": a, "fc2.weight": b, **({"fc2.bias": b.sum(1)} if form == "svdp" else {})}


NAMES = {"dejavu": "opt_layer{}_0.9876-12.34.pt", "powerinfer": "model_{}.pt", "svdp": "model_{}.pt"}


def folder(where: Path, form: str, layers: int = LAYERS) -> Path:
    where.mkdir()
    for layer in range(layers):
        torch.save(state(form, layer), where / NAMES[form].format(layer))
    return where


def scores(model: Path, layer: int, x: torch.Tensor) -> torch.Tensor:
    """What an attached predictor says, its thresholds taken off."""
    whole, _ = load(model, torch.float32)
    place: Any = next(
        module for module in whole.modules() if isinstance(module, sparse.SparseMLP) and module.layer == layer
    )
    found: torch.Tensor = replace(place.held, c=torch.zeros(NEURONS)).scores(x)
    return found


@pytest.mark.parametrize("form", ["dejavu", "powerinfer", "svdp"])
def test_they_are_taken_as_they_are(form: str, text: Path, tmp_path: Path) -> None:
    """Only thresholds are ours: a neuron's score is theirs, times a number of its own."""
    given = folder(tmp_path / "given", form)
    made = train(STORIES, tmp_path / "out", text, predictors=str(given), rank=None, predictor_dtype="bf16")
    assert 0 < made["metrics"]["density"] <= 1
    config = attached(tmp_path / "out").config
    assert (config["method"], config["ranks"]) == ("imported", [RANK] * LAYERS)
    assert config["relu"] == (list(range(LAYERS)) if form == "powerinfer" else [])
    x = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(9))
    a, b = halves(2)
    hidden = x @ a.t()
    theirs = (hidden.relu() if form == "powerinfer" else hidden) @ b.t()
    ours = scores(tmp_path / "out", 2, x)
    together = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(ours.t(), theirs.t(), strict=True)])
    assert float(together.min()) > 0.999


def test_a_relu_counts_when_decoding(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step reads is what the scores with the ReLU say."""
    monkeypatch.setattr(sparse, "SMALLEST", 0)
    train(
        STORIES, tmp_path / "out", text, predictors=str(folder(tmp_path / "given", "powerinfer")), rank=None, budget=0.4
    )
    whole, _ = load(tmp_path / "out", torch.float32)
    place: Any = next(module for module in whole.modules() if isinstance(module, sparse.SparseMLP))
    listed: list[torch.Tensor] = []
    real = sparse.active_neurons

    def seen(*args: Any, **words: Any) -> torch.Tensor:
        listed.append(real(*args, **words))
        return listed[-1]

    monkeypatch.setattr(sparse, "active_neurons", seen)
    x = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(3))
    place._decoded(x)
    expected = (place.held.scores(x)[0] + place.held.shift_of(1) > 0).nonzero()[:, 0]
    assert torch.equal(listed[0].long().sort().values, expected)
    plain = place.held.scores(x)
    place.held.relu = False
    assert not torch.allclose(place.held.scores(x), plain)


def test_what_is_written_can_be_taken_again(text: Path, tmp_path: Path) -> None:
    first = train(STORIES, tmp_path / "first", text, predictor_dtype="bf16")
    given = tmp_path / "given"
    given.mkdir()
    for name, data in files(tmp_path / "first", relu=False):
        (given / name).write_bytes(data)
    second = train(STORIES, tmp_path / "second", text, predictors=str(given), rank=None, predictor_dtype="bf16")
    assert second["metrics"]["density"] == pytest.approx(first["metrics"]["density"], abs=0.01)
    assert second["metrics"]["kl"] == pytest.approx(first["metrics"]["kl"], rel=0.2)
    assert report(tmp_path / "second")["options"]["predictors"] == str(given)


@pytest.mark.parametrize("relu", [False, True])
def test_a_file_says_which_neurons_are_on(relu: bool, text: Path, tmp_path: Path) -> None:
    train(STORIES, tmp_path / "out", text)
    whole, _ = load(tmp_path / "out", torch.float32)
    x = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(9))
    for module in whole.modules():
        if not isinstance(module, sparse.SparseMLP):
            continue
        data = dict(files(tmp_path / "out", relu=relu))[f"model_{module.layer}.pt"]
        held = torch.load(io.BytesIO(data), weights_only=True)
        hidden = x @ held["fc1.weight"].t()
        theirs = (hidden.relu() if relu else hidden) @ held["fc2.weight"].t() + held["fc2.bias"]
        ours = module.held.scores(x).clamp(-1e30, 1e30)
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


def test_the_command_writes_a_new_folder(forks: Forks, text: Path, tmp_path: Path) -> None:
    train(STORIES, tmp_path / "out", text)
    ended = forks.run("export-predictors", tmp_path / "out", tmp_path / "given")
    assert ended.code == 0, ended.err
    assert sorted(path.name for path in (tmp_path / "given").iterdir()) == [f"model_{at}.pt" for at in range(LAYERS)]
    again = forks.run("export-predictors", tmp_path / "out", tmp_path / "given")
    assert again.code == 2
    assert "is there already" in again.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["given", "out"]
    none = forks.run("export-predictors", STORIES, tmp_path / "none")
    assert none.code == 3
    assert "has no predictors of neurons" in none.err
    assert not (tmp_path / "none").exists()


def test_the_same_files_the_same_run(forks: Forks, text: Path, tmp_path: Path) -> None:
    """Contents are what counts, and not the folder's name."""
    given = folder(tmp_path / "given", "powerinfer")
    words = [STORIES, tmp_path / "out", "--calibration-text", text, "--tokens", "4096", "--sequence-length", "64"]
    ended = forks.run("dejavu-predictor-train", *words, "--predictors", given)
    assert ended.code == 0, ended.err
    given.rename(tmp_path / "moved")
    assert forks.run("dejavu-predictor-train", *words, "--predictors", tmp_path / "moved", "--check").code == 0
    torch.save(state("powerinfer", 7), tmp_path / "moved" / "model_1.pt")
    changed = forks.run("dejavu-predictor-train", *words, "--predictors", tmp_path / "moved", "--check")
    assert changed.code == 7
    assert "the contents of `--predictors` changed" in changed.err


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("harm"),))


def put(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda where: (where / name).write_bytes(data)


def saved(held: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(held, buffer)
    return buffer.getvalue()


A, B = halves(0)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda where: (where / "model_2.pt").unlink(), "has no predictor of layer 2"),
        (put("model_4.pt", saved(state("svdp", 0))), "has a predictor of layer 4, and the model has 4 layers"),
        (put("mlp_layer1.pt", b""), "are both of layer 1"),
        (put("weights.pt", b""), "does not say of which layer it is"),
        (put("model_0.pt", pickle.dumps(Harmful(), 2)), "cannot be read as plain tensors"),
        (put("model_0.pt", saved(state("svdp", 0))[:900]), "cannot be read as plain tensors"),
        (put("model_0.pt", saved([A])), "is no state dict"),
        (put("model_0.pt", saved({"0.weight": A, "2.weight": B})), "is no predictor that is known: it has 0.weight"),
        (put("model_0.pt", saved({"0.weight": A[:, :64], "1.weight": B})), r"its A is \[6, 64\], and not \[6, 128\]"),
        (put("model_0.pt", saved({"0.weight": A, "1.weight": B[:, :5]})), r"its B is \[512, 5\], and not \[512, 6\]"),
        (put("model_0.pt", saved({"0.weight": A, "1.weight": B / 0})), "not finite"),
        (put("model_0.pt", saved({"0.weight": A.int(), "1.weight": B})), "no floats, in its A"),
        (put("model_0.pt", saved({"fc1.weight": A, "fc2.weight": B, "fc2.bias": B[0]})), "its bias is"),
    ],
)
def test_what_is_no_predictor(
    change: Callable[[Path], object], told: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = folder(tmp_path / "given", "svdp")
    change(given)
    with pytest.raises((InputError, FormatError), match=told):
        train(STORIES, tmp_path / "out", text, predictors=str(given), rank=None)
    assert not (tmp_path / "harm").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"rank": "8"}, "`--rank` is of predictors that are fitted"),
        ({"rank": None, "method": "bce"}, "`--method bce` is of predictors that are fitted"),
        ({"rank": None, "targets": "inputs"}, "`--predictors` are of neurons"),
    ],
)
def test_options_that_predictors_leave_nothing_to(
    options: dict[str, Any], told: str, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=told):
        train(STORIES, tmp_path / "out", text, predictors=str(folder(tmp_path / "given", "svdp")), **options)
    assert not (tmp_path / "out").exists()


def test_files_of_attention_and_other_kinds_are_left_alone(tmp_path: Path) -> None:
    given = folder(tmp_path / "given", "dejavu", 2)
    for name in ("att_layer0.pt", "attn_router_1-0.9-0.8.pt", "notes.txt"):
        (given / name).write_bytes(b"")
    assert sorted(predictors.by_layer(given)) == [0, 1]
    with pytest.raises(FormatError, match="is no folder"):
        predictors.by_layer(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match="has no predictors"):
        predictors.by_layer(tmp_path / "empty")


def test_safetensors_will_do(tmp_path: Path) -> None:
    found = predictors.read(Path("model_0.safetensors"), save(state("svdp", 0)), WIDTH, NEURONS)
    assert torch.equal(found.a, A)
    assert not found.relu
