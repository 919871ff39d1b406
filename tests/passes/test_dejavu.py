"""`dejavu-predictor-train`: what it attaches, and how a model decodes with that."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rewright.formats.dejavu import CONFIG, FOLDER, WEIGHTS
from rewright.passes.against import against
from rewright.passes.evaluate import evaluate
from rewright.passes.generate import generate
from rewright.passes.loading import load
from rewright.passes.models import sparse
from tests.passes.conftest import DATA, make
from tests.passes.forks import Forks
from tests.passes.outputs import contents
from tests.passes.sparsifying import PASS, STORIES, at_once, attached, decoded, dense, report, tokens, train

HELD_OUT = DATA / "tinystories_heldout.txt"


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained OPT with predictors of its neurons; not to be written to."""
    folder = tmp_path_factory.mktemp("stories") / "out"
    train(STORIES, folder, DATA / "tinystories.txt", tokens=16384, sequence_length=128, rank="auto", recall=0.99)
    return folder


def test_few_neurons_are_read_and_little_is_lost(stories: Path) -> None:
    told = report(stories)
    summary, places = told["summary"], told["places"]
    assert summary["density"] < 0.2
    assert summary["kl"] < 0.03
    assert summary["energy_recall"] > 0.97
    assert summary["perplexity_ratio"] < 1.04
    assert [row["layer"] for row in places] == list(range(len(places)))
    # the first layer is denser than the others, and one price finds that out
    assert places[0]["density"] > 2 * max(row["density"] for row in places[1:])
    # what gradients foretell is what the text shows
    assert 0.3 < summary["kl_foretold"] / summary["kl"] < 1.5


@pytest.fixture(autouse=True)
def however_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models decode sparsely too, for once."""
    monkeypatch.setattr(sparse, "SMALLEST", 0)


def test_where_asking_does_not_pay(stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small MLP, and a layer that reads much, are decoded densely."""
    model, _ = load(stories, torch.float32)
    ids = tokens(20, 1)
    whole = dense(stories, ids)
    assert not torch.allclose(decoded(model, ids, 8), whole, atol=1e-3)
    monkeypatch.setattr(sparse, "worth_asking", lambda rows: 0.0)
    torch.testing.assert_close(decoded(model, ids, 8), whole, rtol=1e-4, atol=1e-4)
    monkeypatch.undo()
    torch.testing.assert_close(decoded(model, ids, 8), whole, rtol=1e-4, atol=1e-4)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps go by their lists however long these are."""
    for name in ("break_even", "worth_asking"):
        monkeypatch.setattr(sparse, name, lambda rows: 2.0)


@pytest.mark.usefixtures("always")
def test_decoding_reads_as_scoring_does(stories: Path) -> None:
    """A text read token by token, against the same text at once."""
    model, _ = load(stories, torch.float32)
    ids = tokens(rows=1)
    scored = at_once(model, ids, 12)
    stepped = decoded(model, ids, 12)
    torch.testing.assert_close(stepped, scored, rtol=1e-4, atol=1e-4)
    # and it is not the dense model that was read
    assert float((scored[:, 12:] - dense(stories, ids)[:, 12:]).abs().max()) > 1e-2


def test_a_prompt_is_read_densely(stories: Path) -> None:
    model, _ = load(stories, torch.float32)
    ids = tokens()
    with torch.inference_mode():
        found = model(input_ids=ids, use_cache=True).logits
    torch.testing.assert_close(found, dense(stories, ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_the_whole_budget_is_the_dense_model(
    rows: int, tiny: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    train(tiny("opt"), tmp_path / "out", text, budget=1.0)
    model, _ = load(tmp_path / "out", torch.float32)
    ids = tokens(24, rows)
    torch.testing.assert_close(decoded(model, ids, 8), dense(tmp_path / "out", ids), rtol=1e-5, atol=1e-5)
    assert report(tmp_path / "out")["summary"]["kl"] < 1e-9


def test_more_rows_than_a_step_takes_are_dense(stories: Path) -> None:
    model, _ = load(stories, torch.float32)
    ids = tokens(10, 17)
    torch.testing.assert_close(decoded(model, ids, 8), dense(stories, ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [2, 4, 16])
def test_rows_together_read_their_union(rows: int, stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many the union is, dense or not: a row gets at least what it needs."""
    model, _ = load(stories, torch.float32)
    ids = tokens(20, rows)
    whole = dense(stories, ids)
    one = torch.cat([decoded(model, row[None], 8) for row in ids])
    together = decoded(model, ids, 8)
    error, alone = ((found - whole)[:, 8:].square().mean() for found in (together, one))
    assert float(error) < 3 * float(alone)
    monkeypatch.setattr(sparse, "break_even", lambda rows: -1.0)
    torch.testing.assert_close(decoded(model, ids, 8), whole, rtol=1e-4, atol=1e-4)


def test_two_runs_give_equal_bytes(tiny: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        train(tiny("opt"), tmp_path / name, text, targets="mlp,heads,inputs")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("method", ["svd", "bce"])
@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_every_method(method: str, dtype: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    told = train(STORIES, out, DATA / "tinystories.txt", method=method, predictor_dtype=dtype, rank="16", recall=0.95)
    assert told["metrics"]["kl"] < 0.2
    assert told["metrics"]["density"] < 0.25
    stored = attached(out).source.entries["layers.0.mlp.A"]
    assert (stored.dtype, stored.shape) == ({"bf16": "BF16", "int8": "I8"}[dtype], (16, 128))


@pytest.mark.usefixtures("always")
def test_from_the_layer_s_input(tmp_path: Path) -> None:
    out = tmp_path / "out"
    told = train(STORIES, out, DATA / "tinystories.txt", input="block_in", rank="32", recall=0.95)
    assert told["metrics"]["kl"] < 0.3
    model, _ = load(out, torch.float32)
    ids = tokens(rows=1)
    scored = at_once(model, ids, 12)
    torch.testing.assert_close(decoded(model, ids, 12), scored, rtol=1e-4, atol=1e-4)


def test_a_budget_is_kept(tmp_path: Path) -> None:
    told = train(STORIES, tmp_path / "out", DATA / "tinystories.txt", budget=0.06, rank="32")
    assert told["metrics"]["density"] == pytest.approx(0.06, abs=0.012)


def test_a_divergence_is_kept(tmp_path: Path) -> None:
    told = train(STORIES, tmp_path / "out", DATA / "tinystories.txt", max_kl=0.05, rank="32")
    assert 0.025 < told["metrics"]["kl"] <= 0.0501


def test_one_price_beats_a_share_for_each_layer(tmp_path: Path) -> None:
    found = {
        allocation: train(
            STORIES, tmp_path / allocation, DATA / "tinystories.txt", budget=0.08, rank="32", allocation=allocation
        )["metrics"]["kl"]
        for allocation in ("global", "layer")
    }
    assert found["global"] < 0.6 * found["layer"]


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3"])
def test_inputs_of_gated_families(name: str, tiny: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    told = train(tiny(name), out, text, rank=None, budget=0.5)
    assert told["metrics"]["density"] == pytest.approx(0.5, abs=0.05)
    model, _ = load(out, torch.float32)
    ids = tokens(20, 1)
    scored = at_once(model, ids, 8)
    torch.testing.assert_close(decoded(model, ids, 8), scored, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(scored, dense(out, ids), atol=1e-3)
    torch.testing.assert_close(scored[:, :8], dense(out, ids)[:, :8], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_heads_are_routed_and_keys_written_for_all(
    name: str, tiny: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    from rewright.passes.models.running import cache_name, new_cache

    out = tmp_path / "out"
    told = train(tiny(name), out, text, rank=None, targets="heads", budget=0.5, allocation="layer")
    assert 0.2 < told["metrics"]["density"] < 0.6
    model, _ = load(out, torch.float32)
    plain, _ = load(out, torch.float32, predictors=False)
    ids, held = tokens(12, 1), []
    for one in (model, plain):
        cache = new_cache(one)
        with torch.inference_mode():
            one(input_ids=ids[:, :8], use_cache=True, **cache)
            for place in range(8, 12):
                one(input_ids=ids[:, place : place + 1], use_cache=True, **cache)
        held.append(cache[cache_name(one)].layers)
    # the first layer's input is the same: all its heads' keys and values are there
    torch.testing.assert_close(held[0][0].keys, held[1][0].keys)
    torch.testing.assert_close(held[0][0].values, held[1][0].values)
    assert not torch.allclose(held[0][1].keys, held[1][1].keys, atol=1e-4)


@pytest.mark.usefixtures("always")
def test_a_gated_mlp_of_relu(text: Path, tmp_path: Path) -> None:
    """Predicted by its gate; squared ReLU too."""
    for activation in ("relu", "relu2"):
        source = make("llama", tmp_path / activation, hidden_act=activation)
        out = tmp_path / f"{activation}-out"
        train(source, out, text, rank="16", budget=0.4)
        model, _ = load(out, torch.float32)
        ids = tokens(20, 1)
        scored = at_once(model, ids, 8)
        torch.testing.assert_close(decoded(model, ids, 8), scored, rtol=1e-3, atol=1e-3)


def test_on_a_compressed_checkpoint(forks: Forks, text: Path, tmp_path: Path) -> None:
    """In one chain: thresholds are settled on the codes, and the result runs."""
    out = tmp_path / "out"
    stages = ["compress", "--method", "rtn", "--group-size", "32", "+", PASS, "--calibration-text", text]
    more = ["--tokens", "4096", "--sequence-length", "64", "--rank", "16"]
    ended = forks.run("chain", "--threads", "1", STORIES, out, *stages, *more)
    assert ended.code == 0, ended.err
    assert "quantization_config" in json.loads((out / "config.json").read_text())
    model, _ = load(out, torch.float32)
    ids = tokens(20, 1)
    assert float((decoded(model, ids, 8) - dense(out, ids)).abs().max()) < 2.0
    assert evaluate(out, text=HELD_OUT, threads=1)["decoded_sparsely"]


def test_a_recipe(forks: Forks, text: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'[[stage]]\npass = "{PASS}"\ncalibration-text = ["{text}"]\ntokens = 4096\nsequence-length = 64\nrank = 8\n'
    )
    ended = forks.run("run", "--threads", "1", recipe, STORIES, tmp_path / "out")
    assert ended.code == 0, ended.err
    train(STORIES, tmp_path / "again", text)
    assert (tmp_path / "out" / FOLDER / WEIGHTS).read_bytes() == (tmp_path / "again" / FOLDER / WEIGHTS).read_bytes()


def test_eval_reads_as_decoding_does(stories: Path) -> None:
    found = evaluate(stories, text=HELD_OUT, compare=STORIES, threads=1)
    assert found["decoded_sparsely"]
    assert 1.0 < found["perplexity_ratio"] < 1.05
    plain = evaluate(stories, text=HELD_OUT, compare=STORIES, predictors=False, threads=1)
    assert not plain["decoded_sparsely"]
    assert plain["kl"] < 1e-9


def test_generate_goes_on_sparsely(stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    real = sparse.SparseMLP._decoded

    def counted(self: sparse.SparseMLP, flat: torch.Tensor) -> torch.Tensor:
        steps.append(len(flat))
        return real(self, flat)

    monkeypatch.setattr(sparse.SparseMLP, "_decoded", counted)
    given: dict[str, Any] = {"temperature": 0.0, "top_p": 1.0, "seed": 0, "threads": 1}
    told = "".join(generate(stories, "Once upon a time", max_new_tokens=12, **given))
    assert len(told) > 10
    assert len(steps) == 4 * 11


def test_beside_other_ways_to_choose(stories: Path, tmp_path: Path) -> None:
    few = tmp_path / "few.txt"
    few.write_text(HELD_OUT.read_text()[:24_000])
    found = against(stories, few, ("dense", "oracle", "random", "static", "griffin"), sequence_length=128, threads=1)
    by: dict[str, list[dict[str, Any]]] = {}
    for row in found["methods"]:
        by.setdefault(row["method"], []).append(row)
    levels = attached(stories).config["levels"]
    assert len(by["predicted"]) == len(levels)
    for place, row in enumerate(by["predicted"]):
        assert row["density"] == pytest.approx(levels[place], abs=0.03)
        assert by["oracle"][place]["kl"] <= row["kl"] + 1e-6
        for method in ("random", "static", "griffin"):
            assert by[method][place]["kl"] > row["kl"], (method, place)
    kl = [row["kl"] for row in by["predicted"]]
    assert kl == sorted(kl, reverse=True)


def test_the_picture_and_the_table(forks: Forks, stories: Path, tmp_path: Path) -> None:
    picture, few = tmp_path / "frontier.svg", tmp_path / "few.txt"
    few.write_text(HELD_OUT.read_text()[:12_000])
    asked = ["eval", stories, "--text", few, "--against", "oracle,random", "--picture", picture, "--threads", "1"]
    asked += ["--sequence-length", "96"]
    ended = forks.run(*asked)
    assert ended.code == 0, ended.err
    assert ended.out.count("oracle") == ended.out.count("predicted") > 2
    assert picture.read_text().startswith("<svg")


def test_show_tells_of_them(forks: Forks, stories: Path) -> None:
    found = json.loads(forks.run("show", stories, "--json").out)
    assert found["predictors"]["targets"] == ["mlp"]
    assert 0 < found["predictors"]["read_bytes"] < found["tensor_bytes"]
    assert "read sparsely" in forks.run("show", stories).out


def test_predictors_of_other_weights_are_refused(stories: Path, forks: Forks, tmp_path: Path) -> None:
    out = Path(shutil.copytree(STORIES, tmp_path / "out"))
    shutil.copytree(stories / FOLDER, out / FOLDER)
    assert attached(out).config["method"] == "rrr"
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "model.safetensors").write_bytes(data)
    ended = forks.run("generate", out, "--prompt", "Once")
    assert ended.code == 3
    assert "trained on other weights" in ended.err
    assert "dejavu-predictor-train" in ended.err
    shown = json.loads(forks.run("show", out, "--json").out)
    assert shown["predictors"] is None
    assert any("other weights" in line for line in shown["warnings"])


@pytest.mark.parametrize("harm", ["cut", "missing", "shape", "schema", "levels"])
def test_damaged_attachments_are_refused(harm: str, stories: Path, forks: Forks, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    out = Path(shutil.copytree(stories, tmp_path / "out"))
    file, config = out / FOLDER / WEIGHTS, out / FOLDER / CONFIG
    if harm == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif harm in ("missing", "shape"):
        held = load_file(file)
        c = held.pop("layers.1.mlp.c")
        if harm == "shape":
            held["layers.1.mlp.c"] = c[:-1].clone()
        save_file(held, file)
    else:
        told = json.loads(config.read_text())
        told[harm] = "other"
        config.write_text(json.dumps(told))
    ended = forks.run("generate", out, "--prompt", "Once", "--threads", "1")
    assert ended.code == 3, ended.err
    assert ended.err.startswith("error: ")
    assert "Traceback" not in ended.err
