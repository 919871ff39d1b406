"""What `hyena-distill` refuses, most of it at the sight of headers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rewright.formats.errors import Refusal
from rewright.passes.errors import InputError, UsageError
from tests.passes.conftest import STORIES
from tests.passes.distilling import bank, distill, dry, waves
from tests.passes.forks import Forks
from tests.passes.hyenas import small
from tests.passes.outputs import beside

Tensors = dict[str, torch.Tensor]
MIXER = "hyena.backbone.layers.1.mixer"
LAST = f"{MIXER}.filter_fn.implicit_filter.6.weight"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"order": "7"}, "`order` must be an even number of states or `auto`, not `7`"),
        ({"order": "0"}, "`order` must be an even number"),
        ({"order": "many"}, "`order` must be an even number"),
        ({"order": "auto", "tolerance": 0}, "no order reaches a tolerance of 0"),
        ({"weighting": "input-spectrum"}, "`--weighting input-spectrum` is measured on a text"),
        ({"order": 48}, "`--order 48` is more than 64 samples of `h` can show"),
        ({"order": 4, "fir_head": 60}, "`h` has 64 samples, too few for a recurrence after `--fir-head 60`"),
        ({"calibration_text": [str(STORIES / "config.json")]}, "a text counts for nothing here"),
        ({"validation_text": [str(STORIES / "config.json")]}, "a text counts for nothing here"),
        ({"horizon": 1}, "`horizon` must be at least 2"),
    ],
    ids=str,
)
def test_options(options: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=told):
        dry(bank(tmp_path / "bank.safetensors", h=waves(2, 2, 64)), **options)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"keep_filters": True}, "there is no filter for `--keep-filters`"),
        ({"fir_head": 2}, "`--fir-head` has no place"),
    ],
    ids=str,
)
def test_options_of_what_is_a_recurrence_already(options: dict[str, Any], told: str, tmp_path: Path) -> None:
    planes = torch.full((3, 2, 1, 2), 0.5)
    held = {
        "blocks.0.filter.poles": planes,
        "blocks.0.filter.residues": planes.clone(),
        "blocks.0.filter.D": planes[:, 0, 0, 0],
    }
    (tmp_path / "src").mkdir()
    save_file({name: tensor.contiguous() for name, tensor in held.items()}, tmp_path / "src" / "model.safetensors")
    said = {"model_type": "stripedhyena", "state_size": 2, "max_seqlen": 64}
    (tmp_path / "src" / "config.json").write_text(json.dumps(said))
    with pytest.raises(UsageError, match=told):
        dry(tmp_path / "src", order=2, **options)


def test_what_is_no_bank(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no tensor is a bank of impulse responses"):
        dry(bank(tmp_path / "a.safetensors", h=torch.ones(4)))
    with pytest.raises(InputError, match="`h` is 0 filters of 64 samples"):
        dry(bank(tmp_path / "b.safetensors", h=torch.empty(0, 64)))
    with pytest.raises(InputError, match=r"`h\.poles` is there already"):
        dry(bank(tmp_path / "c.safetensors", **{"h": waves(1, 1, 64), "h.poles": torch.ones(3)}))


def test_a_model_without_long_filters() -> None:
    with pytest.raises(InputError, match="model type `llama` is not one") as refused:
        dry(STORIES)
    assert "hyenadna" in (refused.value.hint or "")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_filter_that_is_not_finite(value: float, tmp_path: Path) -> None:
    filters = waves(3, 2, 64)
    filters[1, 9] = value
    with pytest.raises(InputError, match="filter 1 of `h` is not finite"):
        distill(bank(tmp_path / "bank.safetensors", h=filters), tmp_path / "out", order=4)
    assert beside(tmp_path / "out") == []


@pytest.mark.parametrize("scale", [1e60, 1e-170])
def test_a_filter_out_of_reach(scale: float, tmp_path: Path) -> None:
    filters = waves(3, 2, 64).double()
    filters[2] *= scale
    with pytest.raises(InputError, match=r"filter 2 of `h` is up to .* in size") as refused:
        distill(bank(tmp_path / "bank.safetensors", h=filters), tmp_path / "out", order=4)
    assert "from 1e-30 to 1e+30" in str(refused.value.hint)


@pytest.mark.parametrize("scale", [1e29, 1e-29])
def test_a_filter_within_reach(scale: float, tmp_path: Path) -> None:
    filters = waves(3, 2, 64).double()
    found = [
        distill(bank(tmp_path / f"{factor}.safetensors", h=filters * factor), tmp_path / f"out {factor}", order=4)
        for factor in (1.0, scale)
    ]
    plain, scaled = (told["metrics"] for told, _ in found)
    assert max(plain["error"], scaled["error"]) < 1e-12
    # the bound is 0 but for rounding, and the metric is there all the same
    assert scaled["error_over_bound"] < 100


def _lose(name: str) -> Callable[[Tensors, dict[str, Any]], None]:
    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        del tensors[name]

    return change


def _say(**said: Any) -> Callable[[Tensors, dict[str, Any]], None]:
    return lambda tensors, config: config.update(said)


def _poison(tensors: Tensors, config: dict[str, Any]) -> None:
    tensors[LAST][2] = float("nan")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_lose(f"{MIXER}.filter_fn.implicit_filter.2.bias"), r"`.*implicit_filter\.2\.bias` is missing"),
        (_lose(f"{MIXER}.filter_fn.implicit_filter.1.freq"), r"`.*freq` is missing"),
        (_say(max_seq_len=None), "does not say how long the filters are"),
        (_say(n_layer=3), "says `n_layer` 3, and the tensors have 2 layers with filters"),
        (_say(n_layer=1), "says `n_layer` 1, and the tensors have 2 layers with filters"),
        (_say(d_model=16), "makes 16 filters for each layer, and `hyena.backbone.layers.0.mixer` has 12"),
        (_say(d_model=6, hyena_order=3), "says `d_model` 6, and the tensors have 12 channels"),
        (_say(hyena_order="two"), "says `hyena_order` two, which is no whole number"),
        (_say(model_type="multihyena", num_heads=4), "says `num_heads` 4, and the tensors have 12 filters"),
        (_say(max_seq_len=40), r"pos_emb\.[tz]` has shape"),
        (_poison, "filter 2 of `hyena.backbone.layers.1.mixer` is not finite"),
    ],
)
def test_a_damaged_model(change: Callable[[Tensors, dict[str, Any]], None], told: str, tmp_path: Path) -> None:
    small("hyenadna").save_pretrained(tmp_path / "src")
    weights, said = tmp_path / "src" / "model.safetensors", tmp_path / "src" / "config.json"
    tensors, config = load_file(weights), json.loads(said.read_text())
    change(tensors, config)
    save_file(tensors, weights)
    said.write_text(json.dumps(config))
    with pytest.raises(Refusal, match=told):
        distill(tmp_path / "src", tmp_path / "out", order=8)
    assert not (tmp_path / "out").exists()


def test_what_is_distilled_already(tmp_path: Path) -> None:
    small("hyenadna", taps=0).save_pretrained(tmp_path / "src")
    with pytest.raises(InputError, match="the filters are recurrences already"):
        dry(tmp_path / "src", order=8)


def test_a_text_needs_a_tokenizer(tmp_path: Path) -> None:
    small("hyenadna").save_pretrained(tmp_path / "src")
    text = tmp_path / "text.txt"
    text.write_text("ACGT" * 100)
    with pytest.raises(InputError, match="has no tokenizer"):
        distill(tmp_path / "src", tmp_path / "out", order=8, calibration_text=[str(text)])


def test_a_chain_that_cannot_be_is_refused_before_the_work(forks: Forks, tmp_path: Path) -> None:
    """StripedHyena's layout has no place for samples kept as they are: a dry run knows."""
    small("hyenadna").save_pretrained(tmp_path / "src")
    ends = tmp_path / "src", tmp_path / "out"
    chain = ["chain", "--dry-run", *ends, "hyena-distill", "--order", "4", "--fir-head", "2"]
    ended = forks.run(*chain, "+", "convert", "--to", "stripedhyena-modal")
    assert ended.code == 3, ended.err
    assert "stage 2 (convert): StripedHyena's layout has no `fir`" in ended.err
    whole = [word for word in chain if word not in ("--fir-head", "2")]
    assert forks.run(*whole, "+", "convert", "--to", "stripedhyena-modal").code == 0


def test_a_pole_too_near_0_for_stripedhyena(tmp_path: Path) -> None:
    """Its layout has residues divided by poles: one that the fit puts at 0 would be lost."""
    size, turn = torch.tensor([0.9, 0.95, 0.8, 1e-3]), torch.tensor([0.3, 1.1, 2.0, 0.0])
    poles = torch.stack([size * turn.cos(), size * turn.sin()], dim=-1)[None, :, None].contiguous()
    residues = torch.tensor([0.5, 0.5, 0.5, 1e3])[None, :, None, None] * torch.tensor([1.0, 0.0])
    (tmp_path / "src").mkdir()
    held = {"poles": poles, "residues": residues, "D": torch.zeros(1)}
    save_file({f"blocks.0.filter.{leaf}": tensor for leaf, tensor in held.items()}, tmp_path / "src/model.safetensors")
    said = {"model_type": "stripedhyena", "state_size": 8, "max_seqlen": 64}
    (tmp_path / "src" / "config.json").write_text(json.dumps(said))
    with pytest.raises(InputError, match=r"filter 0 of `blocks\.0\.filter` needs a pole so near 0"):
        distill(tmp_path / "src", tmp_path / "out", order=8)
    assert not (tmp_path / "out").exists()
    # what a dry run says is written is written
    foretold = dry(tmp_path / "src", order=6)["output_bytes"]
    made, _ = distill(tmp_path / "src", tmp_path / "six", order=6)
    assert foretold == made["metrics"]["bytes_after"] < made["metrics"]["bytes_before"]
