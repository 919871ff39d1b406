"""A policy in the words of accelerate, llama.cpp and vLLM: loads, computes the same, says what is lost."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rewright.formats.checkpoint import Checkpoint
from rewright.passes.flexgen_policy_search.exports import exports
from rewright.passes.flexgen_policy_search.model import read
from rewright.passes.flexgen_policy_search.policy import document
from rewright.passes.flexgen_policy_search.settings import machine_of
from rewright.passes.flexgen_policy_search.spec import FlexgenOptions
from rewright.passes.flexgen_policy_search.values import MachineName, Memory
from rewright.passes.spec import Layout
from tests.passes.flexing import machine, opt


def made(layout: Layout, gpu: str, cpu: str = "1GiB", **more: Any) -> tuple[FlexgenOptions, dict[str, Any]]:
    said: dict[str, Any] = {"machine": MachineName("laptop"), "prompt_length": 8, "generate_length": 4, **more}
    options = FlexgenOptions(gpu_memory=Memory.parse(gpu), cpu_memory=Memory.parse(cpu), **said)
    return options, document(options, layout)


@pytest.mark.parametrize(("name", "gpu"), [("llama", "700KiB"), ("llama-tied", "600KiB"), ("gpt2", "700KiB")])
def test_accelerate_loads_the_map_and_computes_the_same(
    name: str, gpu: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """The map as it is, with the CPU in the place of the GPU: this machine may have none."""
    layout = Layout.of(Checkpoint.open(tiny(name)))
    _, found = made(layout, gpu)
    where = {key: "cpu" if at == 0 else at for key, at in found["exports"]["accelerate"]["device_map"].items()}
    plain = AutoModelForCausalLM.from_pretrained(tiny(name)).eval()
    covered = [key for key in plain.state_dict() if not any(key == k or key.startswith(k + ".") for k in where)]
    assert covered == []
    assert sum(key.rsplit(".", 1)[-1].isdecimal() for key in where) == plain.config.num_hidden_layers
    loaded = AutoModelForCausalLM.from_pretrained(tiny(name), device_map=where, offload_folder=tmp_path).eval()
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, plain(tokens).logits)


def test_layers_that_are_offloaded_to_host_and_disk(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """A machine that holds one layer on the GPU and one on the host: accelerate reads the rest from the disk."""
    layout = Layout.of(Checkpoint.open(tiny("llama")))
    options, found = made(layout, "16MiB")
    model = read(layout)
    layer = sum(unit.nbytes for unit in model.units for piece in unit.pieces if piece.layer == 0)
    tight = machine(0.5 * layer, 1.2 * layer, 1e9)
    told = exports(model, tight, layout, found)["accelerate"]
    places = [told["device_map"][f"model.layers.{at}"] for at in range(2)]
    assert places == ["cpu", "disk"]
    assert machine_of(options).name == "laptop"
    where = {key: "cpu" if at == 0 else at for key, at in told["device_map"].items()}
    loaded = AutoModelForCausalLM.from_pretrained(tiny("llama"), device_map=where, offload_folder=tmp_path).eval()
    plain = AutoModelForCausalLM.from_pretrained(tiny("llama")).eval()
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, plain(tokens).logits)
    assert loaded.model.layers[1].mlp.up_proj.weight.is_meta


def test_words_for_llama_cpp_and_vllm(tiny: Callable[[str], Path]) -> None:
    _, found = made(opt("6.7b"), "8GiB", "64GiB", kv_bits="4")
    told = found["exports"]
    argv = told["llama_cpp"]["argv"]
    pairs = dict(itertools.pairwise(argv))
    held = found["placement"]["bytes"]["weights"]
    layers = 32 * held["gpu"] / sum(held.values())
    assert abs(int(pairs["-ngl"]) - layers) <= 2
    sequences = found["schedule"]["gpu_batch"] * found["schedule"]["num_batches"]
    assert (pairs["-np"], pairs["-c"]) == (str(sequences), str(12 * sequences))
    assert (pairs["-ctk"], pairs["-ctv"], pairs["--fit"]) == ("q4_0", "q4_0", "off")
    argv = told["vllm"]["argv"]
    pairs = dict(itertools.pairwise(argv))
    off = held["cpu"] + held["disk"]
    assert float(pairs.get("--cpu-offload-gb", 0)) == pytest.approx(off / 2**30, abs=0.02)
    assert 0.5 < float(pairs["--gpu-memory-utilization"]) < 1
    assert all(part["lost"] for part in told.values() if part is not told["vllm"])


def test_experts_stay_with_the_cpu_in_llama_cpp(tiny: Callable[[str], Path]) -> None:
    _, found = made(Layout.of(Checkpoint.open(tiny("qwen3_moe"))), "600KiB")
    argv = found["exports"]["llama_cpp"]["argv"]
    assert argv[:2] == ["-ngl", "4"]
    held = found["placement"]["bytes"]["weights"]
    assert ("--n-cpu-moe" in argv) == (held["cpu"] + held["disk"] > 0)
