"""Hyena models going on from a cache: the recurrence against the convolution, prompts in parts, padding, `generate`."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from rewright.passes.errors import InputError
from rewright.passes.generate import greedy
from rewright.passes.models.hyena_state import HyenaLayer
from tests.passes.hyenas import KINDS, SMALL, in_parts, logits, small, tokens

LONG = {"max_seq_len": 400}


@pytest.fixture(scope="module")
def distilled() -> dict[tuple[str, int], Any]:
    return {(kind, taps): small(kind, taps=taps, **LONG) for kind in KINDS for taps in (0, 5)}


@pytest.mark.parametrize("taps", [0, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_recurrence_is_the_convolution(kind: str, taps: int, distilled: dict[tuple[str, int], Any]) -> None:
    """Over 300 tokens, the last of them one at a time, in float32 as good as its rounding."""
    model, ids = distilled[kind, taps], tokens(2, 300)
    expected = logits(model, ids, use_cache=False)
    assert expected.abs().max() > 1
    found = in_parts(model, ids, [37, *range(220, 300)])
    assert (found - expected).abs().max() <= 1e-4
    assert (in_parts(model, ids, [1, 2, 3]) - expected).abs().max() <= 1e-4


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 59), unique=True, max_size=8), st.sampled_from(list(KINDS)), st.sampled_from([0, 5]))
def test_any_split_of_a_prompt(distilled: dict[tuple[str, int], Any], cuts: list[int], kind: str, taps: int) -> None:
    model, ids = distilled[kind, taps], tokens(2, 60)
    expected = logits(model, ids, use_cache=False)
    assert (in_parts(model, ids, sorted(cuts)) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_goes_on_from_its_inputs(kind: str) -> None:
    """What it keeps grows; past its positions there is no filter."""
    model, ids = small(kind), tokens(2, 48)
    expected = logits(model, ids, use_cache=False)
    for cuts in ([20, 21, 22, 40], [1, 2, 3], [47]):
        assert (in_parts(model, ids, cuts) - expected).abs().max() <= 1e-4
    cache = DynamicCache(config=model.config)
    logits(model, ids, cache=cache)
    with pytest.raises(InputError, match="49 tokens are past the 48 positions"):
        logits(model, ids[:, :1], cache=cache)
    with pytest.raises(InputError, match="49 tokens are past the 48 positions"):
        logits(model, tokens(1, 49), use_cache=False)


@pytest.mark.parametrize("kind", KINDS)
def test_states_are_as_large_at_every_position(kind: str, distilled: dict[tuple[str, int], Any]) -> None:
    for taps in (0, 5):
        model, sizes = distilled[kind, taps], []
        for length in (9, 90):
            cache = DynamicCache(config=model.config)
            logits(model, tokens(2, 0), cache=cache)
            logits(model, tokens(2, length), cache=cache)
            logits(model, tokens(2, 1), cache=cache)
            assert cache.get_seq_length() == length + 1
            layer = cache.layers[0]
            sizes.append([held.nbytes for held in (layer.tail, layer.state, layer.recent) if held is not None])
            assert layer.inputs is None
            assert {held.dtype for held in (layer.tail, layer.state)} == {torch.float32}
        assert sizes[0] == sizes[1]
        config = model.config
        each = config.d_model // config.num_heads if kind == "multihyena" else config.hyena_order - 1
        # three complex entries of float32, in both rows
        assert sizes[0][1] == 2 * config.d_model * each * 3 * 8


@pytest.mark.parametrize("taps", [None, 0, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_on_the_left_changes_nothing(kind: str, taps: int | None) -> None:
    model, ids = small(kind, taps=taps), tokens(1, 20)
    expected = logits(model, ids, use_cache=False)
    padded = torch.cat([torch.full((1, 7), 3), ids], dim=1)
    mask = torch.cat([torch.zeros(1, 7, dtype=torch.int64), torch.ones(1, 20, dtype=torch.int64)], dim=1)
    assert not torch.allclose(logits(model, padded, use_cache=False)[:, 7:], expected, atol=1e-2)
    for cached in (True, False):
        found = logits(model, padded, attention_mask=mask, use_cache=cached)
        assert (found[:, 7:] - expected).abs().max() <= 1e-4
    cache = DynamicCache(config=model.config)
    parts = [
        logits(model, padded[:, first:last], attention_mask=mask[:, :last], cache=cache)
        for first, last in ((0, 5), (5, 11), (11, 12), (12, 27))
    ]
    assert (torch.cat(parts, dim=1)[:, 7:] - expected).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("kind", "taps"),
    [("hyenadna", None), ("hyena", 0), ("order 3", None), ("order 3", 5), ("multihyena", None), ("multihyena", 0)],
)
def test_generate(kind: str, taps: int | None) -> None:
    """Greedy, sampled and by beams: with a cache and without one, padded and alone, the same tokens."""
    model = small(kind, taps=taps)
    rows = [tokens(1, 5, seed=2), tokens(1, 11, seed=3)]
    ids = torch.cat([torch.cat([torch.full((1, 6), 2), rows[0]], dim=1), rows[1]])
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    all_ways: dict[str, Any] = {"max_new_tokens": 12, "pad_token_id": 2}
    ways: dict[str, dict[str, Any]] = {
        "greedy": {"do_sample": False},
        "sampled": {"do_sample": True, "temperature": 0.7},
        "beams": {"num_beams": 3, "num_return_sequences": 2},
    }
    for name, way in ways.items():
        made = []
        for cached in (True, False):
            torch.manual_seed(5)
            made.append(model.generate(ids, attention_mask=mask, use_cache=cached, **all_ways, **way))
        assert torch.equal(*made), name
        assert made[0].shape == (4 if name == "beams" else 2, 23)
        if name == "greedy":
            for row, alone in enumerate(rows):
                expected = model.generate(alone, do_sample=False, **all_ways)
                assert torch.equal(made[0][row, -12:], expected[0, -12:])


def test_a_cache_of_ours_in_their_hands(distilled: dict[tuple[str, int], Any]) -> None:
    """What `generate` and beam search do to a cache: rows are repeated, picked and forgotten."""
    model, ids = distilled["order 3", 5], tokens(3, 30)
    expected = logits(model, ids, use_cache=False)
    cache = DynamicCache(config=model.config)
    logits(model, ids[:, :20], cache=cache)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    found = logits(model, ids[[2, 0, 0], 20:], cache=cache)
    assert (found - expected[[2, 0, 0], 20:]).abs().max() <= 1e-4
    cache.reset()
    assert cache.get_seq_length() == 0
    logits(model, ids[:1, :20], cache=cache)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([1]))
    assert (logits(model, ids[:1, 20:], cache=cache) - expected[:1, 20:]).abs().max() <= 1e-4
    with pytest.raises(InputError, match="cannot forget its last tokens"):
        cache.crop(-1)
    with pytest.raises(InputError, match="keeps no keys and values"):
        cache.update(torch.zeros(1), torch.zeros(1), 0)


def test_a_cache_of_keys_and_values_is_refused(distilled: dict[tuple[str, int], Any]) -> None:
    model = distilled["hyena", 0]
    cache = DynamicCache()
    cache.update(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), 0)
    with pytest.raises(InputError, match="not one that a Hyena model can use"):
        logits(model, tokens(1, 3), cache=cache)
    empty = DynamicCache()
    logits(model, tokens(1, 3), cache=empty)
    assert [type(layer) for layer in empty.layers] == [HyenaLayer, HyenaLayer]


def test_gradients_flow_through_a_cache(distilled: dict[tuple[str, int], Any]) -> None:
    """As the convolution's, for the residues of both layers."""
    model, ids = distilled["hyena", 5], tokens(1, 12)
    weights = [layer.mixer.modal.residues for layer in model.hyena.backbone.layers]
    whole = torch.autograd.grad(model(input_ids=ids, use_cache=False).logits.square().sum(), weights)
    cache = DynamicCache(config=model.config)
    parts = [model(input_ids=part, cache=cache).logits for part in ids.split(5, dim=1)]
    split = torch.autograd.grad(torch.cat(parts, dim=1).square().sum(), weights)
    for one, other in zip(whole, split, strict=True):
        assert (one - other).abs().max() <= 1e-4 * one.abs().max()


@pytest.mark.parametrize("kind", ["hyena", "multihyena"])
def test_states_of_a_narrow_model_are_wide(kind: str, distilled: dict[tuple[str, int], Any]) -> None:
    ids = tokens(2, 60)
    exact = logits(distilled[kind, 0], ids, use_cache=False)
    model = small(kind, taps=0, **LONG).to(torch.bfloat16)
    near = logits(model, ids, use_cache=False)
    cache = DynamicCache(config=model.config)
    parts = [logits(model, part, cache=cache) for part in (ids[:, :20], *ids[:, 20:].split(1, dim=1))]
    assert (torch.cat(parts, dim=1) - exact).abs().max() <= 1.5 * (near - exact).abs().max()
    for layer in cache.layers:
        assert (layer.tail.dtype, layer.state.dtype) == (torch.bfloat16, torch.float32)


def test_a_recurrence_goes_on_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = small("hyena", taps=0)
    assert model.config.max_position_embeddings is None
    assert small("hyena").config.max_position_embeddings == SMALL["max_seq_len"]
    from transformers.utils import logging as theirs

    theirs.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            logits(model, tokens(1, 48))
            assert not caplog.records
            logits(model, tokens(1, 49))
    finally:
        theirs.disable_propagation()
    assert "longer than the 48 tokens that the filters were distilled for" in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_our_own_loops_run_them(kind: str, distilled: dict[tuple[str, int], Any]) -> None:
    """They make a cache for any model and never look at what a forward returns."""
    model = distilled[kind, 0]
    _, _, first = greedy(model, tokens(1, 9)[0].tolist(), 4)
    _, _, second = greedy(model, tokens(1, 90)[0].tolist(), 4)
    assert first == second > 0


@pytest.mark.parametrize("kind", ["order 3", "multihyena"])
def test_long_prompts_are_read_in_pieces(
    kind: str, distilled: dict[tuple[str, int], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where only the last logits are wanted, whichever way that is said; padding too."""
    model, ids = distilled[kind, 5], tokens(2, 60)
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    lengths: list[int] = []
    model.hyena.register_forward_pre_hook(
        lambda _, args, given: lengths.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    for kept in (1, 3, torch.tensor([-1])):
        lengths.clear()
        expected = logits(model, ids, attention_mask=mask, use_cache=False, logits_to_keep=kept)
        monkeypatch.setattr("rewright.passes.models.hyena.PIECE", 16)
        cache = DynamicCache(config=model.config)
        found = logits(model, ids, attention_mask=mask, cache=cache, logits_to_keep=kept)
        monkeypatch.undo()
        assert lengths == [60, 16, 16, 16, 12]
        assert cache.get_seq_length() == 60
        assert (found - expected).abs().max() <= 1e-4
    monkeypatch.setattr("rewright.passes.models.hyena.PIECE", 16)
    whole = logits(model, ids, cache=DynamicCache(config=model.config), logits_to_keep=0)
    assert whole.shape[1] == 60
