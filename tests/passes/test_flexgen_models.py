"""Models as the search sees them, from the headers of large ones: caches by layer, experts, heads, windows, states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rewright.passes.flexgen_policy_search.hills import Problem
from rewright.passes.flexgen_policy_search.model import read
from rewright.passes.flexgen_policy_search.presets import preset
from rewright.passes.flexgen_policy_search.roofline import Work
from rewright.passes.flexgen_policy_search.search import search
from rewright.passes.flexgen_policy_search.shape import Cache, Model
from rewright.passes.spec import Layout
from tests.bench.flexgen_models import deepseek_v3, gemma_27b, llama_70b, qwen_235b, qwen_next
from tests.passes.flexing import settings


def counts(model: Model) -> dict[str, int]:
    """Pieces by kind."""
    found: dict[str, int] = {}
    for unit in model.units:
        found[unit.kind] = found.get(unit.kind, 0) + unit.count
    return found


def test_groups_of_heads_and_a_head_of_its_own() -> None:
    model = read(llama_70b())
    assert counts(model) == {"dense": 560, "head": 1, "embedding": 1}
    assert set(model.caches) == {Cache("full", 2 * 8 * 128, None, 0, 64 * 128, 64 * 128, 4 * 64 * 128)}
    assert (model.tied, model.ffn, model.positions) == (False, 28672, 8192)
    assert model.fixed_bytes == 161 * 8192 * 2
    assert sum(unit.nbytes * unit.count for unit in model.units) + model.fixed_bytes == model.total_bytes


def test_windows() -> None:
    model = read(gemma_27b())
    kinds = [cache.kind for cache in model.caches]
    assert kinds[:6] == ["sliding"] * 5 + ["full"]
    assert (kinds.count("full"), model.tied) == (10, True)
    assert model.caches[0].peak(4096, 16) == 1024 * 2 * 16 * 128 * 2
    assert model.caches[5].peak(4096, 16) == 4096 * 2 * 16 * 128 * 2


def test_latent_attention_and_experts_of_8_bits() -> None:
    model = read(deepseek_v3(5))
    assert set(model.caches) == {Cache("latent", 576, None, 0, 128 * 576, 128 * 512, 2 * 128 * 1088)}
    assert counts(model)["expert"] == 2 * 256
    (experts,) = model.of("expert")
    assert experts.numbers == 3 * 2048 * 7168
    # eight bits a weight, and a scale for each square of 128
    assert experts.nbytes == 3 * (2048 * 7168 + 16 * 56 * 4)
    assert experts.at(4) == experts.numbers * 9 // 16
    assert (model.experts, model.reused) == (256, 8)


def test_states_beside_attention() -> None:
    model = read(qwen_next(4))
    assert [cache.kind for cache in model.caches[:4]] == ["state", "state", "state", "full"]
    # 32 heads of 128 by 128 in 32 bits, and three inputs of 8192 channels
    assert model.caches[0].state == 32 * 128 * 128 * 4 + 8192 * 3 * 2
    assert model.caches[0].peak(10**6, 16) == model.caches[0].state


@pytest.mark.parametrize("make", [lambda: qwen_235b(20), gemma_27b], ids=["experts", "windows"])
def test_a_search_of_each(make: Callable[[], Layout]) -> None:
    model = read(make())
    problem = Problem(model, preset("rtx4090"), Work(512, 32), settings())
    found = search(problem)
    assert found is not None
    best = found.best
    assert all(best.peak[tier] <= problem.machine.rooms[tier] for tier in best.peak)
    assert 0.95 * found.bound <= best.throughput <= found.bound * (1 + 1e-9)
    assert sum(count for (letter, _, _), count in best.counts.items() if letter == "w") == sum(counts(model).values())
    # without the CPU's help with experts and keys it is no faster
    slow = replace(problem.machine, cpu_attn=1e6, cpu_flops=1e9)
    alone = search(replace(problem, machine=slow, settings=settings()[2:]))
    assert alone is not None
    assert alone.best.throughput <= best.throughput * (1 + 1e-3)


def hyena(model_type: str, **more: Any) -> Layout:
    stem = "hyena.backbone"
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {f"{stem}.embeddings.word_embeddings.weight": ("F32", (64, 32))}
    for at in range(2):
        tensors[f"{stem}.layers.{at}.mixer.in_proj.weight"] = ("F32", (96, 32))
        tensors[f"{stem}.layers.{at}.mixer.filter_fn.bias"] = ("F32", (32,))
        tensors[f"{stem}.layers.{at}.mlp.fc1.weight"] = ("F32", (128, 32))
    config = {"model_type": model_type, "d_model": 32, "n_layer": 2, "vocab_size": 60, "max_seq_len": 1024}
    return Layout(tensors, {**config, "hyena_order": 2, "short_filter_order": 3, **more})


def test_long_convolutions_and_their_recurrences() -> None:
    """A filter needs all inputs before; distilled it has a state of as many numbers as the config says."""
    taps = 3 * 32 * 2 * 4
    long = read(hyena("hyena"))
    assert long.caches[0] == Cache("convolution", 32, None, taps, 32, 32, 64)
    assert not long.caches[0].attends
    short = read(hyena("hyena", modal={"states": [16, 8], "entries": 8}))
    assert [cache.state for cache in short.caches] == [taps + 4 * 32 * 16, taps + 4 * 32 * 8]
    assert short.caches[0].token_bytes(16) == 0
    many = read(hyena("multihyena", num_heads=4, modal={"states": [16, 8]}))
    assert many.caches[0].state == taps + 4 * (32 * 32 // 4) * 16
    rates = []
    for model in (long, short):
        found = search(Problem(model, preset("laptop"), Work(900, 100), settings()))
        assert found is not None
        rates.append(found.best.throughput)
    # a recurrence reads less the longer the context is
    assert rates[1] > 2 * rates[0]
    assert np.isfinite(rates).all()
