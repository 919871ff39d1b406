"""`flexgen-policy-search`: a policy attached to any checkpoint, every tensor in it once, shown and reported."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from rewright.formats.checkpoint import Checkpoint
from rewright.formats.policy import read_policy
from rewright.passes.flexgen_policy_search.model import read
from rewright.passes.flexgen_policy_search.policy import SCHEMA
from rewright.passes.flexgen_policy_search.spec import FlexgenOptions
from rewright.passes.flexgen_policy_search.values import MachineName, Memory
from rewright.passes.spec import Layout
from tests.passes.conftest import STORIES
from tests.passes.flexing import FILE, QUICK, flexgen, policy
from tests.passes.forks import Forks, Strike
from tests.passes.outputs import beside, contents

TIGHT = {"gpu_memory": "1MiB", "cpu_memory": "4MiB", "disk": "8MiB"}


def words(src: Path, dst: Path, *more: str) -> list[str | Path]:
    said = [word for key, value in QUICK.items() for word in (f"--{key}", str(value))]
    return ["flexgen-policy-search", src, dst, "--threads", "1", *said, *more]


def covered(found: dict[str, Any], source: Checkpoint) -> dict[str, int]:
    """Bytes of weights by tier, from the placement alone; a tensor that is cut counts by its rows."""
    placed = found["placement"]["weights"]
    assert placed["tensors"].keys() <= source.entries.keys()
    held: dict[str, int] = {}
    for name, entry in source.entries.items():
        where = placed["tensors"].get(name, placed["default"])
        if isinstance(where, str):
            held[where] = held.get(where, 0) + entry.nbytes
            continue
        assert [part[1] for part in where] == [0, *(part[2] for part in where[:-1])], name
        assert where[-1][2] == entry.shape[0]
        for tier, first, past in where:
            held[tier] = held.get(tier, 0) + entry.nbytes * (past - first) // entry.shape[0]
    return held


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "qwen3_moe", "gpt_oss", "opt-350m"])
def test_every_tensor_has_one_place(name: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    stage, warnings = flexgen(tiny(name), out, **TIGHT)
    found, source = policy(out), Checkpoint.open(tiny(name))
    held = covered(found, source)
    assert sum(held.values()) == source.total_bytes == found["checkpoint"]["total_bytes"]
    told = found["placement"]["bytes"]["weights"]
    model = read(Layout.of(source))
    assert held.get("gpu", 0) == told["gpu"] + model.fixed_bytes
    assert held.get("cpu", 0) + held.get("cpu-compute", 0) == told["cpu"]
    assert held.get("disk", 0) == told["disk"]
    peak, tiers = found["predicted"]["peak_bytes"], found["hardware"]["tiers"]
    assert all(peak[tier] <= tiers[tier]["bytes"] - tiers[tier]["reserve"] for tier in tiers)
    kept = found["placement"]["kv"]
    assert len(kept["per_layer"]) == model.layers == sum(kept[tier] for tier in ("gpu", "cpu", "disk"))
    assert stage["metrics"]["throughput"] == found["predicted"]["throughput"] > 0
    assert stage["metrics"]["gap"] >= 0
    assert (found["schema"], warnings) == (SCHEMA, [])
    weights = out / "model.safetensors"
    assert os.path.samefile(weights, tiny(name) / "model.safetensors")


def test_the_same_bytes_again_and_in_a_dry_run(forks: Forks, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    flexgen(STORIES, one)
    dry = forks.run(*words(STORIES, other, "--dry-run", "--json"))
    (stage,) = json.loads(dry.out)["stages"]
    assert stage["output_bytes"] == (one / FILE).stat().st_size
    assert stage["details"]["throughput"] == policy(one)["predicted"]["throughput"]
    assert not other.exists()
    ended = forks.run(*words(STORIES, other))
    assert ended.code == 0, ended.err
    assert (one / FILE).read_bytes() == (other / FILE).read_bytes()
    names = ("flexgen-policy-search.json", "flexgen-policy-search.svg")
    assert all((one / "reports" / name).read_bytes() == (other / "reports" / name).read_bytes() for name in names)
    root = ElementTree.fromstring((one / "reports" / names[1]).read_text())
    assert root.tag.endswith("svg")
    assert len(root.findall(".//{*}circle")) == len(policy(one)["pareto"])
    assert "up to date" in forks.run(*words(STORIES, other)).err
    shown = forks.run("show", other).out
    for text in ("placement policy", "laptop, preset", "tokens/s", "host memory", "waits for"):
        assert text in shown
    assert json.loads(forks.run("show", other, "--json").out)["policy"] == policy(other)


def test_compressed_weights_count_as_they_are_stored(half: Path, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """A model of 4-bit codes, half of them kept, streams less; what stands beside codes goes along."""
    dense, packed = read(Layout.of(Checkpoint.open(tiny("llama")))), read(Layout.of(Checkpoint.open(half)))
    numbers = [sum(u.numbers * u.count for u in model.of("dense")) for model in (dense, packed)]
    assert numbers[0] == numbers[1]
    held = [sum(u.nbytes * u.count for u in model.of("dense")) for model in (dense, packed)]
    assert held[1] < held[0] / 4
    assert all(len(piece.tensors) >= 3 for unit in packed.of("dense") for piece in unit.pieces)
    flexgen(half, tmp_path / "out", **TIGHT)
    assert sum(covered(policy(tmp_path / "out"), Checkpoint.open(half)).values()) == packed.total_bytes


def test_a_chain_with_what_comes_before(forks: Forks, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    stages = ["cast", "--to", "bf16", "+", "flexgen-policy-search"]
    said = [word for key, value in QUICK.items() for word in (f"--{key}", str(value))]
    ended = forks.run("chain", "--threads", "1", tiny("llama"), out, *stages, *said)
    assert ended.code == 0, ended.err
    assert policy(out)["checkpoint"]["dtype"] == "BF16"
    assert read_policy(out) is not None
    # a new policy takes the place of the old one
    again = tmp_path / "again"
    flexgen(out, again, generate_length=4)
    assert policy(again)["workload"]["gen_len"] == 4


def test_fewer_bits_where_they_are_asked_for(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    tight = {"gpu_memory": "400KiB", "cpu_memory": "100MiB", "weight_bits": "4", "kv_bits": "any"}
    flexgen(tiny("llama"), tmp_path / "out", **tight)
    found = policy(tmp_path / "out")
    assert found["compression"]["weights"] == {"bits": 4, "group": 64}
    assert sum(found["placement"]["bytes"]["weights"].values()) < Checkpoint.open(tiny("llama")).total_bytes * 0.75


def test_schedules_and_objectives(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    kinds = {}
    for kind in ("row", "zigzag", "staggered"):
        flexgen(tiny("llama"), tmp_path / kind, schedule=kind, **TIGHT)
        kinds[kind] = policy(tmp_path / kind)
        assert kinds[kind]["schedule"]["kind"] == kind
    assert kinds["row"]["schedule"]["num_batches"] == 1
    assert kinds["row"]["predicted"]["throughput"] <= kinds["zigzag"]["predicted"]["throughput"] * (1 + 1e-9)
    slow = kinds["row"]["predicted"]["latency_s"] * 2
    flexgen(tiny("llama"), tmp_path / "lean", objective="min-ram", max_latency=slow, **TIGHT)
    lean = policy(tmp_path / "lean")
    assert lean["predicted"]["latency_s"] <= slow * (1 + 1e-6)
    assert lean["predicted"]["peak_bytes"]["cpu"] <= kinds["zigzag"]["predicted"]["peak_bytes"]["cpu"]


def test_by_the_published_equations(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    for law in ("paper", "released"):
        flexgen(tiny("opt"), tmp_path / law, cost_model=law, machine="t4-gcp-released")
        found = policy(tmp_path / law)
        assert found["cost_model"] == law
        assert found["placement"]["kv"]["unit"] == "layer"
        assert any("leave out embedding" in note for note in found["notes"])
    rates = [policy(tmp_path / law)["predicted"]["throughput"] for law in ("paper", "released")]
    assert rates[0] >= rates[1] > 0


def test_this_machine_is_found_and_said(tmp_path: Path) -> None:
    _, warnings = flexgen(STORIES, tmp_path / "out", machine=None)
    (told,) = warnings
    assert told.startswith("the machine is what was found here, and not measured: ")
    found = policy(tmp_path / "out")
    assert found["hardware"]["source"] == "detected"
    assert found["hardware"]["tiers"]["cpu"]["bytes"] > 2**20
    assert any("not measured" in note for note in found["notes"])


def test_killed_at_any_moment(forks: Forks, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    whole, dst = tmp_path / "whole", tmp_path / "out"
    changes = forks.changes(*words(tiny("llama"), whole))
    moments = [Strike(number) for number in random.Random().sample(range(1, changes), 1)] + [Strike(1, "policy.json")]
    for strike in moments:
        assert forks.run(*words(tiny("llama"), dst), strike=strike).code == -signal.SIGKILL
        ended = forks.run(*words(tiny("llama"), dst))
        assert ended.code == 0, (strike, ended.err)
        assert contents(dst) == contents(whole), strike
        assert all(name.startswith("out.lock") for name in beside(dst)), strike
        shutil.rmtree(dst)


def test_values_of_options() -> None:
    for text, count in (("16GiB", 16 * 2**30), ("1.5TB", 1_500_000_000_000), ("4096B", 4096)):
        assert Memory.parse(text).count == count
        assert Memory.parse(str(Memory.parse(text))) == Memory.parse(text)
    assert MachineName.parse("box.toml").file == Path("box.toml")
    assert MachineName.parse("laptop").file is None
    assert FlexgenOptions().machine is None
