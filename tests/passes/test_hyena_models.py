"""Hyena models as checkpoints: names, filters, dtypes, what is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from rewright.passes.errors import InputError
from rewright.passes.loading import load
from rewright.passes.models.hyena_filter import ImplicitFilter, filled
from tests.passes.hyenas import KINDS, implicit, logits, mixer, modal, small, tensors, tokens

LAYER = "hyena.backbone.layers.0."
FILTER = f"{LAYER}mixer.filter_fn."


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """Write a small model, its tensors and config changed by a function."""

    def write(kind: str, change: Callable[[dict[str, torch.Tensor], dict[str, object]], None], **given: int) -> Path:
        small(kind, **given).save_pretrained(tmp_path)
        held, config = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
        change(held, config)
        save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return write


def same(one: Any, other: Any) -> bool:
    """Where memory lies decides how products round, and sines of large angles show it."""
    return bool((logits(one, tokens(2, 20)) - logits(other, tokens(2, 20))).abs().max() < 3e-4)


def test_names_are_those_of_the_hub(saved: Callable[..., Path]) -> None:
    folder = saved("hyenadna", lambda held, config: None)
    names = {name for name in load_file(folder / "model.safetensors") if not name.startswith("hyena.backbone.layers.1")}
    linear = [f"{part}.{leaf}" for part in ("mlp.fc1", "mlp.fc2", "norm1", "norm2") for leaf in ("weight", "bias")]
    mixed = [f"{part}.{leaf}" for part in ("in_proj", "out_proj", "short_filter") for leaf in ("weight", "bias")]
    network = [f"{place}.{leaf}" for place in (0, 2, 4) for leaf in ("weight", "bias")]
    assert names == {
        "hyena.backbone.embeddings.word_embeddings.weight",
        *(LAYER + name for name in linear),
        *(f"{LAYER}mixer.{name}" for name in mixed),
        *(FILTER + name for name in ("bias", "pos_emb.z", "pos_emb.t", "modulation.deltas")),
        *(f"{FILTER}implicit_filter.{name}" for name in (*network, "1.freq", "6.weight")),
        "hyena.backbone.ln_f.weight",
        "hyena.backbone.ln_f.bias",
        "lm_head.weight",
    }
    shapes = {name: tuple(value.shape) for name, value in load_file(folder / "model.safetensors").items()}
    assert shapes[f"{LAYER}mixer.short_filter.weight"] == (36, 1, 3)
    assert shapes["lm_head.weight"] == (24, 12)
    assert shapes[f"{FILTER}implicit_filter.1.freq"] == (1, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_filters_are_what_the_formulas_say(kind: str) -> None:
    """Positions too, which a file may lack; in float32 as near as sines of large angles are."""
    model = small(kind)
    held = tensors(model, FILTER)
    layer = model.hyena.backbone.layers[0].mixer
    expected = implicit(held, 48, model.config.modulation_shift)
    for traced in (True, False):
        with torch.set_grad_enabled(traced):
            for length, dtype, least in (
                (48, torch.float64, 1e-13),
                (7, torch.float64, 1e-13),
                (48, torch.float32, 3e-5),
            ):
                found = layer.impulse(length, dtype).detach().numpy()
                assert np.abs(found - expected[:, :length]).max() <= least * np.abs(expected).max()
    bands = (model.config.emb_dim - 1) // 2
    angle = np.linspace(1e-4, bands - 1, bands) * (2 * np.pi / 48 * np.arange(48)[:, None])
    time = np.arange(48)[:, None] / 47
    assert np.abs(held["pos_emb.z"][0] - np.hstack([time, np.cos(angle), -np.sin(angle)])).max() < 1e-7
    count = model.config.filters
    deltas = np.log(0.01) * (1 / 1.5 + np.arange(count) / (count - 1) * (1 / 0.3 - 1 / 1.5))
    assert np.abs(held["modulation.deltas"] - deltas).max() < 1e-5


@pytest.mark.parametrize("taps", [None, 0, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_mixers_are_what_the_formulas_say(kind: str, taps: int | None) -> None:
    model = small(kind, taps=taps).double()
    layer = model.hyena.backbone.layers[0].mixer
    hidden = torch.randn(1, 29, 12, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    held = tensors(model, f"{LAYER}mixer.")
    if taps is None:
        filters = implicit(tensors(model, FILTER), 29, model.config.modulation_shift)
    else:
        filters = modal(tensors(model, f"{LAYER}mixer.modal."), 29)
    expected = mixer(held, filters, hidden[0].numpy(), getattr(model.config, "num_heads", None))
    with torch.no_grad():
        found = layer(hidden)[0].numpy()
    assert np.abs(found - expected).max() <= 1e-12 * np.abs(expected).max()


@pytest.mark.parametrize("places", [(3,), (5,), (1, 3, 5)])
def test_one_tensor_of_frequencies_has_three_names(places: tuple[int, ...], saved: Callable[..., Path]) -> None:
    """Which of them a file keeps is a matter of chance."""
    names = [f"hyena.backbone.layers.{layer}.mixer.filter_fn.implicit_filter" for layer in range(2)]

    def rename(held: dict[str, torch.Tensor], config: object) -> None:
        for name in names:
            value = held.pop(f"{name}.1.freq") * 1.25
            held.update({f"{name}.{place}.freq": value.clone() for place in places})

    folder = saved("hyenadna", rename)
    model, _ = load(folder)
    expected = small("hyenadna")
    with torch.no_grad():
        for layer in expected.hyena.backbone.layers:
            layer.mixer.filter_fn.implicit_filter[3].freq *= 1.25
    assert same(model, expected)
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert same(again, expected)


@pytest.mark.parametrize("wrapper", ["", ".layer"])
def test_names_of_the_training_code_are_read(wrapper: str, saved: Callable[..., Path], tmp_path: Path) -> None:
    """As its `.ckpt` has them once they are safetensors."""
    pairs = [
        ("hyena.", "model."),
        ("lm_head", "model.lm_head"),
        (".mixer", f".mixer{wrapper}"),
        (".mlp", f".mlp{wrapper}"),
    ]

    def rename(held: dict[str, torch.Tensor], config: object) -> None:
        for name in list(held):
            other = name
            for one, instead in pairs:
                other = other.replace(one, instead)
            held[other] = held.pop(name)

    folder = saved("order 3", rename)
    for model in (load(folder)[0], AutoModelForCausalLM.from_pretrained(folder)):
        assert same(model, small("order 3"))
    model.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again/model.safetensors").keys() == load_file(folder / "model.safetensors").keys()


def test_positions_may_be_missing(saved: Callable[..., Path]) -> None:
    def drop(held: dict[str, torch.Tensor], config: object) -> None:
        for name in [name for name in held if ".pos_emb." in name]:
            del held[name]

    model, tokenizer = load(saved("order 3", drop))
    assert tokenizer is None
    assert same(model, small("order 3"))


def test_positions_of_the_file_count(saved: Callable[..., Path]) -> None:
    """Some were trained."""
    model, _ = load(saved("hyenadna", lambda held, config: held[f"{FILTER}pos_emb.z"].mul_(0.9)))
    assert not same(model, small("hyenadna"))


@pytest.mark.parametrize(
    ("taps", "name"),
    [
        (None, f"{FILTER}implicit_filter.6.weight"),
        (None, f"{FILTER}implicit_filter.1.freq"),
        (None, f"{FILTER}modulation.deltas"),
        (None, f"{FILTER}bias"),
        (2, f"{LAYER}mixer.modal.poles"),
        (2, f"{LAYER}mixer.modal.fir"),
    ],
)
def test_what_is_missing_is_never_drawn_at_random(taps: int | None, name: str, saved: Callable[..., Path]) -> None:
    folder = saved("hyenadna", lambda held, config: held.pop(name), taps=taps)
    with pytest.raises(InputError, match=f"`{name}` is missing"):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(InputError, match=f"`{name}` is missing"):
        load(folder)


def test_another_shape_is_refused(saved: Callable[..., Path]) -> None:
    def cut(held: dict[str, torch.Tensor], config: object) -> None:
        held[f"{LAYER}mixer.modal.poles"] = held[f"{LAYER}mixer.modal.poles"][:, :2].clone()

    with pytest.raises(InputError, match=r"mixer.modal.poles` is missing, or has another shape"):
        load(saved("hyena", cut, taps=0))


def test_filters_that_were_kept_do_not_matter(saved: Callable[..., Path]) -> None:
    others = small("hyena").state_dict()

    def keep(held: dict[str, torch.Tensor], config: object) -> None:
        held.update({name: value.clone() for name, value in others.items() if name.endswith("6.weight")})

    model, _ = load(saved("hyena", keep, taps=0))
    assert same(model, small("hyena", taps=0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("taps", [None, 3])
@pytest.mark.parametrize("kind", ["hyenadna", "multihyena"])
def test_filters_stay_wide(kind: str, taps: int | None, dtype: torch.dtype, saved: Callable[..., Path]) -> None:
    """However a model is cast; a pole near 1 keeps its decay over thousands of tokens."""

    def slow(held: dict[str, torch.Tensor], config: object) -> None:
        if taps is not None:
            held[f"{LAYER}mixer.modal.poles"][0, 0] = torch.tensor([0.9999, 0.0])

    folder = saved(kind, slow, taps=taps)
    exact = AutoModelForCausalLM.from_pretrained(folder)
    length = 48 if taps is None else 4096
    expected = exact.hyena.backbone.layers[0].mixer.impulse(length)
    cast = AutoModelForCausalLM.from_pretrained(folder)
    for model in (AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), load(folder, dtype)[0], cast.to(dtype)):
        assert model.dtype == model.hyena.backbone.layers[0].mixer.in_proj.weight.dtype == dtype
        assert torch.equal(model.hyena.backbone.layers[0].mixer.impulse(length), expected)
        kept = {value.dtype for name, value in model.state_dict().items() if "filter_fn" in name or "modal" in name}
        assert kept == {torch.float32}
        near = logits(model, tokens(2, 20))
        assert near.dtype == torch.float32
        assert (near - logits(exact, tokens(2, 20))).abs().max() < 0.2
    assert {value.dtype for value in exact.double().state_dict().values()} == {torch.float64}


def test_remote_code_of_the_hub_is_not_wanted(saved: Callable[..., Path]) -> None:
    """Its checkpoints name classes of their own, keys that nothing reads, and a vocabulary that is not padded."""

    def as_there(held: object, config: dict[str, object]) -> None:
        config["auto_map"] = {
            "AutoConfig": "configuration_hyena.HyenaConfig",
            "AutoModelForCausalLM": "modeling_hyena.HyenaDNAForCausalLM",
        }
        config |= {"vocab_size": 21, "hyena_filter_dropout": 0.0, "use_bias": True, "torch_dtype": "float32"}
        del config["modulation_shift"], config["modal"]

    folder = saved("hyenadna", as_there)
    model, _ = load(folder)
    assert (model.config.vocab_size, model.lm_head.out_features) == (24, 24)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert (plain.config.vocab_size, plain.lm_head.out_features) == (24, 24)
    assert plain.config.modulation_shift == 0.05
    assert same(model, plain)
    base = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        states = base(input_ids=tokens(2, 20)).last_hidden_state
    assert (plain.lm_head(states) - logits(plain, tokens(2, 20))).abs().max() < 3e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_poles_are_refused(dtype: torch.dtype, saved: Callable[..., Path]) -> None:
    """A checkpoint that something cast loads in float32 again, and its filters are others."""

    def cast(held: dict[str, torch.Tensor], config: object) -> None:
        held.update({name: value.to(dtype) for name, value in held.items()})

    folder = saved("hyenadna", cast, taps=0)
    for read in (AutoModelForCausalLM.from_pretrained, load):
        with pytest.raises(InputError, match=r"poles of `.*layers.0.mixer.modal` were rounded to 16 bits"):
            read(folder)


def test_the_tokenizer_of_the_hub_is_not_run(
    saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """HyenaDNA's is known; about any other's code nobody is asked."""
    folder = saved("hyenadna", lambda held, config: None)
    code = {"AutoTokenizer": ["tokenization_hyena.HyenaDNATokenizer", None]}
    stated = {"tokenizer_class": "HyenaDNATokenizer", "auto_map": code, "characters": ["A", "C", "G", "T", "N"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(stated))
    (folder / "tokenization_hyena.py").write_text("raise SystemExit('ran')")
    _, tokenizer = load(folder)
    assert tokenizer("ACGTN\nacx").input_ids == [7, 8, 9, 10, 11, 7, 8, 6, 1]
    assert tokenizer(["ACG", "T"], padding=True).input_ids == [[7, 8, 9, 1], [4, 4, 10, 1]]
    assert tokenizer.decode([7, 8, 9, 10, 11]) == "ACGTN"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 1, 4)
    (folder / "tokenizer_config.json").write_text(json.dumps({**stated, "tokenizer_class": "Other"}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    with pytest.raises(InputError, match=r"the tokenizer of `.*` cannot be read"):
        load(folder)
    assert capsys.readouterr().out == ""


def test_tied_heads_are_stored_once(saved: Callable[..., Path]) -> None:
    folder = saved("hyena", lambda held, config: None)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    model, _ = load(folder)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_frequencies_may_be_a_constant() -> None:
    model = small("hyenadna", train_freq=False)
    assert not [name for name in model.state_dict() if "freq" in name]
    assert same(model, small("hyenadna"))


def test_losses_and_gradients_reach_the_filters() -> None:
    for kind in KINDS:
        for taps in (None, 2):
            model = small(kind, taps=taps).train()
            model(input_ids=tokens(2, 20), labels=tokens(2, 20)).loss.backward()
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None, name
                assert parameter.grad.abs().max() > 0, name


def test_a_filter_is_filled_from_a_checkpoint() -> None:
    config = small("hyenadna").config
    held = {name: torch.as_tensor(value) for name, value in tensors(small("hyenadna"), FILTER).items()}
    stored = {name: value for name, value in held.items() if name != "implicit_filter.1.freq" and "pos" not in name}
    with torch.no_grad():
        found = filled(ImplicitFilter(config).double(), stored, "mixer").impulse(48, torch.float64).numpy()
    assert np.abs(found - implicit({k: v.numpy() for k, v in held.items()}, 48, 0.05)).max() < 1e-5
    del stored["bias"]
    with pytest.raises(InputError, match=r"tensor `mixer.filter_fn.bias` is missing"):
        filled(ImplicitFilter(config), stored, "mixer")
    with pytest.raises(InputError, match=r"`mixer.filter_fn.bias` has shape \[3\]"):
        filled(ImplicitFilter(config), {**stored, "bias": torch.zeros(3)}, "mixer")


def test_configs_that_cannot_be_are_refused() -> None:
    small("hyena")
    for settings in ({"num_heads": 5}, {"num_heads": 4, "hyena_order": 3}):
        with pytest.raises(ValueError, match=r"num_heads|order 2"):
            AutoConfig.for_model("multihyena", d_model=12, **settings)
    with pytest.raises(InputError, match="`emb_dim` is 4"):
        small("hyenadna", emb_dim=4)


@pytest.mark.parametrize(
    "modal",
    [
        {},
        [],
        "8",
        {"entries": 4},
        {"entries": [4]},
        {"entries": [4, -1]},
        {"entries": [4, True]},
        {"entries": [4, 4], "fir_head": "a"},
        {"entries": [4, 4], "fir_head": -1},
    ],
    ids=str,
)
def test_a_malformed_modal_is_refused_in_a_line(modal: Any, tmp_path: Path) -> None:
    small("hyenadna", taps=0).save_pretrained(tmp_path / "src")
    path = tmp_path / "src" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "modal": modal}))
    with pytest.raises(InputError, match="modal"):
        load(tmp_path / "src")
