"""A policy in the words of others: accelerate, llama.cpp, vLLM; each with what is lost, and what it would reach.

accelerate places whole decoder layers and moves them when they are needed, one batch at a time, nothing overlapping;
llama.cpp computes where weights are; vLLM offloads groups of layers. Standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rewright.passes.flexgen_policy_search.machine import GIB, Machine
from rewright.passes.flexgen_policy_search.shape import Model
from rewright.passes.spec import Layout

Where = int | str
# llama.cpp's words for the bits of a cache.
_CACHES = {16: "f16", 8: "q8_0", 4: "q4_0"}


def exports(model: Model, machine: Machine, layout: Layout, policy: Mapping[str, Any]) -> dict[str, Any]:
    """What each of the three is to be told, from a finished policy."""
    return {
        "accelerate": _accelerate(model, machine, layout, policy),
        "llama_cpp": _llama_cpp(model, policy),
        "vllm": _vllm(model, machine, policy),
    }


def tiers_of(model: Model, policy: Mapping[str, Any]) -> list[dict[str, int]]:
    """Bytes of each layer's weights by tier; of what is cut, all where most of it is."""
    placed = policy["placement"]["weights"]
    found = [dict.fromkeys(("gpu", "cpu", "disk"), 0) for _ in range(model.layers)]
    for unit in model.units:
        for piece in unit.pieces:
            if piece.layer >= 0:
                found[piece.layer][_tier(placed, piece.tensors[0], piece.rows)] += unit.nbytes
    return found


def _tier(placed: Mapping[str, Any], name: str, rows: tuple[int, int] | None) -> str:
    said = placed["tensors"].get(name, placed["default"])
    if not isinstance(said, str):
        first = rows[0] if rows else 0
        said = next(tier for tier, start, past in said if start <= first < past)
    return "cpu" if said == "cpu-compute" else str(said)


def _accelerate(model: Model, machine: Machine, layout: Layout, policy: Mapping[str, Any]) -> dict[str, Any]:
    """A `device_map`: as many whole layers on the GPU and the host as the policy has bytes there, the rest on the disk.

    Embedding, head and norms stay on the GPU, where room for the largest layer that moves is left.
    """
    prefix, modules = _modules(layout)
    layers = [sum(held.values()) for held in tiers_of(model, policy)]
    outside = {name: sum(sizes) for name, sizes in modules.items()}
    setting, work = policy["schedule"], policy["workload"]
    kept = setting["gpu_batch"] * (work["prompt_len"] + work["gen_len"])
    caches = sum(cache.token_bytes(16) for cache in model.caches) * kept
    room = machine.rooms["gpu"] - sum(outside.values()) - caches
    where: list[Where] = []
    host = machine.rooms["cpu"]
    for at, size in enumerate(layers):
        # of layers that move, one is on the GPU at a time
        rest = max(layers[at + 1 :], default=0)
        if room >= size + rest:
            where.append(0)
            room -= size
        elif host >= size:
            where.append("cpu")
            host -= size
        else:
            where.append("disk")
    device_map: dict[str, Where] = dict.fromkeys(outside, 0)
    device_map |= {f"{prefix}.{at}": place for at, place in enumerate(where)}
    moved = sum(size for size, place in zip(layers, where, strict=True) if place != 0)
    read = sum(size for size, place in zip(layers, where, strict=True) if place == "disk")
    # weights are copied from memory that is not pinned, for each batch and token, and nothing overlaps
    step = moved / (machine.h2d / 2) + read / machine.disk_read + sum(layers) / machine.hbm
    return {
        "device_map": device_map,
        "max_memory": {"0": machine.rooms["gpu"], "cpu": machine.rooms["cpu"]},
        "throughput": setting["gpu_batch"] / step if step else 0.0,
        "lost": [
            "layers are not cut, blocks of several batches are not known, and nothing overlaps",
            "keys and values stay on the GPU",
        ],
    }


def _modules(layout: Layout) -> tuple[str, dict[str, list[int]]]:
    """The name of the list of layers, and bytes of the modules that stand beside it and above."""
    from rewright.formats.dtypes import nbytes
    from rewright.passes.flexgen_policy_search.model import layers_list

    prefix = layers_list(layout)
    found: dict[str, list[int]] = {}
    for name, entry in layout.tensors.items():
        if not name.startswith(prefix + "."):
            found.setdefault(name.rpartition(".")[0] or name, []).append(nbytes(*entry))
    if not any(name.split(".")[-1] in ("lm_head", "embed_out") for name in found):
        # a tied head is stored once, and must be where the embedding is
        found["lm_head"] = []
    parent = prefix.rpartition(".")[0]
    buffers = f"{parent}.rotary_emb" if parent else "rotary_emb"
    return prefix, {**found, buffers: []}


def _llama_cpp(model: Model, policy: Mapping[str, Any]) -> dict[str, Any]:
    """Layers on the GPU from the last on, experts of others on the CPU, bits and place of the cache."""
    held = tiers_of(model, policy)
    setting, work, kv = policy["schedule"], policy["workload"], policy["placement"]["kv"]
    shares = [part["gpu"] / max(1, sum(part.values())) for part in held]
    experts = bool(model.experts)
    # with experts all layers go to the GPU, and the experts of some stay behind
    count = model.layers if experts else round(sum(shares))
    sequences = setting["gpu_batch"] * setting["num_batches"]
    bits = (policy["compression"]["kv"] or {"bits": 16})["bits"]
    argv = ["-ngl", str(count + 1 if count == model.layers else count)]
    if experts and sum(shares) < model.layers:
        argv += ["--n-cpu-moe", str(math.ceil(model.layers - sum(shares)))]
    argv += ["-c", str(sequences * (work["prompt_len"] + work["gen_len"])), "-np", str(sequences)]
    if bits != 16:
        argv += ["-ctk", _CACHES[bits], "-ctv", _CACHES[bits]]
    if kv["gpu"] < kv["cpu"] + kv["disk"]:
        argv.append("--no-kv-offload")
    argv += ["--fit", "off"]
    lost = [
        "the model must be converted to GGUF",
        "what is in host memory is computed by the CPU, not copied to the GPU",
    ]
    if any(part["disk"] for part in held) or kv["disk"]:
        lost.append("nothing is read from the disk but by the page cache")
    if setting["num_batches"] > 1:
        lost.append("all sequences are decoded at once, not batch by batch")
    return {"argv": argv, "lost": lost}


def _vllm(model: Model, machine: Machine, policy: Mapping[str, Any]) -> dict[str, Any]:
    """The share of weights that is off the GPU as GiB that are offloaded, and the GPU's memory that may be used."""
    held = policy["placement"]["bytes"]["weights"]
    off = held["cpu"] + held["disk"]
    work = policy["workload"]
    argv = ["--max-model-len", str(work["prompt_len"] + work["gen_len"])]
    argv += ["--max-num-seqs", str(policy["schedule"]["gpu_batch"] * policy["schedule"]["num_batches"])]
    share = machine.rooms["gpu"] / max(1, machine.gpu_bytes)
    argv += ["--gpu-memory-utilization", f"{max(0.01, math.floor(100 * share) / 100):g}"]
    lost = []
    if off:
        argv += ["--cpu-offload-gb", f"{math.ceil(100 * off / GIB) / 100:g}"]
        lost.append("weights are read over the bus by the kernels that use them, for each batch and token")
    if held["disk"]:
        lost.append("weights that the policy leaves on the disk must fit the host's memory")
    kv = policy["placement"]["kv"]
    if kv["cpu"] or kv["disk"]:
        lost.append("keys and values of running sequences stay on the GPU: fewer sequences run at a time")
    if policy["compute"]["experts"] != "gpu":
        lost.append("experts are computed on the GPU")
    return {"argv": argv, "lost": lost}
