"""`flexgen-policy-search` refused: contradictions, units, positions, machine files, machines on which nothing fits."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

from rewright.cli.policy import policy_tables
from rewright.formats.errors import FormatError, Refusal
from rewright.formats.policy import read_policy
from rewright.passes.errors import InputError, ResourceError, UsageError
from rewright.passes.flexgen_policy_search.hills import Problem
from rewright.passes.flexgen_policy_search.machine import GIB
from rewright.passes.flexgen_policy_search.machine_file import parse
from rewright.passes.flexgen_policy_search.model import read
from rewright.passes.flexgen_policy_search.policy import document
from rewright.passes.flexgen_policy_search.presets import preset
from rewright.passes.flexgen_policy_search.roofline import Work
from rewright.passes.flexgen_policy_search.search import search
from rewright.passes.flexgen_policy_search.short import size_for
from rewright.passes.flexgen_policy_search.spec import FlexgenOptions
from rewright.passes.flexgen_policy_search.values import MachineName, Memory
from rewright.passes.recipe import make as make_stage
from rewright.passes.spec import Layout
from tests.bench.flexgen_models import LARGE
from tests.passes.flexing import FILE, flexgen, opt, settings
from tests.passes.forks import Forks
from tests.passes.outputs import beside

BOX = """
name = "box"
[gpu]
memory = "16GiB"
bandwidth = "250GB/s"
compute = "21TFLOP/s"
launch = "5us"
[cpu]
memory = "200GiB"
bandwidth = "60GB/s"
compute = "500GFLOP/s"
attention = "12.3GB/s"
[disk]
size = "1.5TB"
read = "2GB/s"
write = "1GB/s"
[link]
to-gpu = "12.9GiB/s"
from-gpu = "12GB/s"
"""


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"gpu-memory": "16"}, "`gpu-memory` has no unit, as `16GiB` or `5GB`: `16`"),
        ({"cpu-memory": "0GiB"}, "must be a size of whole bytes above zero"),
        ({"disk": "-1TB"}, "must be a size of whole bytes above zero"),
        ({"gpu-memory": "16 apples"}, "`gpu-memory` must be a quantity, as `16GiB`"),
        ({"machine": "h100"}, "`machine` must be one of t4-gcp-released"),
        ({"prompt-length": 0}, "`prompt-length` must be from 1 to"),
        ({"max-latency": 0}, "`--max-latency 0` leaves no time"),
        ({"max-latency": float("nan")}, "must be at least 0, not `nan`"),
        ({"cost-model": "paper", "kv-bits": 4}, "`--cost-model paper` knows nothing of `--kv-bits`"),
        ({"cost-model": "released", "objective": "min-ram"}, "`--cost-model released` knows nothing of `--objective`"),
        ({"attention": "cpu", "kv-bits": 8}, "`--attention cpu` reads keys of 16 bits, not of 8"),
    ],
)
def test_words_that_cannot_be_meant(options: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        make_stage(1, "flexgen-policy-search", options)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"num_hidden_layers": 3}, "`config.json` says 3 layers, and there is no tensor of layer 2"),
        ({"hidden_size": 48}, "`config.json` says `hidden_size` 48, and `model.embed_tokens.weight` is 32 wide"),
        ({"vocab_size": 9999}, "`config.json` says `vocab_size` 9999, and `model.embed_tokens.weight` has"),
        (
            {"num_key_value_heads": 4},
            "for `k`, and layer 0 has `self_attn.k_proj` of 16 rows, not 32",
        ),
        ({"num_attention_heads": 5, "head_dim": None}, "says 5 heads, which do not divide `hidden_size` 32"),
        ({"num_key_value_heads": 3}, "says 3 key heads, which do not divide its 4 heads"),
        ({"num_hidden_layers": 0}, "there is no `num_hidden_layers`"),
        ({"hidden_size": -32}, "says `hidden_size` -32, which is no whole number above 0"),
        ({"hidden_size": "wide"}, "says `hidden_size` wide, which is no whole number above 0"),
        ({"layer_types": ["full_attention"]}, "does not give each of the 2 layers one of `layer_types`"),
    ],
)
def test_a_config_that_contradicts_the_headers(
    forks: Forks, change: dict[str, Any], told: str, tiny_copy: Callable[[str], Path], tmp_path: Path
) -> None:
    src = tiny_copy("llama")
    config = {**json.loads((src / "config.json").read_text()), **change}
    (src / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=re.escape(told)):
        flexgen(src, tmp_path / "out")
    assert beside(tmp_path / "out") == []


def test_past_the_positions(forks: Forks, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    ended = forks.run(
        "flexgen-policy-search", tiny("gpt2"), tmp_path / "out", "--machine", "laptop", "--prompt-length", "120"
    )
    assert (ended.code, ended.out) == (3, "")
    assert "error: a prompt of 120 tokens and 32 more are past the model's 128 positions\n" in ended.err
    assert "hint: use `--prompt-length 96`" in ended.err


def test_a_machine_in_a_file() -> None:
    made = parse(BOX.encode(), Path("box.toml"))
    assert (made.gpu_bytes, made.disk_bytes, made.h2d) == (16 * GIB, 1_500_000_000_000, 12.9 * GIB)
    assert (made.source, made.name) == ("description", "box")
    assert made.launch_s == pytest.approx(5e-6)
    based = parse(b'base = "rtx4090"\n[cpu]\nmemory = "128GiB"\n', Path("more.toml"))
    assert (based.gpu_bytes, based.cpu_bytes, based.name) == (24 * GIB, 128 * GIB, "more")
    assert dict(based.sources)["cpu_bytes"] == "more.toml"


@pytest.mark.parametrize(
    ("was", "now", "told", "hint"),
    [
        ("bandwidth = ", "bandwith = ", "`box.toml` has no use for `gpu.bandwith`", "did you mean `gpu.bandwidth`?"),
        ("[disk]", "[disc]", "`box.toml` has no use for `disc`", "did you mean `disk`?"),
        ('read = "2GB/s"', 'read = "0GB/s"', "`disk.read` of `box.toml` must be above zero, not `0GB/s`", None),
        ('read = "2GB/s"', 'read = "-2GB/s"', "`disk.read` of `box.toml` must be above zero, not `-2GB/s`", None),
        ('memory = "16GiB"', "memory = 16", "`gpu.memory` of `box.toml` has no unit, as `16GiB`", None),
        ('memory = "16GiB"', 'memory = "16GiB/s"', "`gpu.memory` of `box.toml` must be a quantity", None),
        ('launch = "5us"', 'launch = "soon"', "`gpu.launch` of `box.toml` must be a time as `5us`, not `soon`", None),
        ('size = "1.5TB"', "", "`box.toml` lacks `disk.size`", "give it, or start from a preset"),
        ('name = "box"', 'name = "box"\nbase = "h20"', "`base` of `box.toml` must be one of", None),
        ('launch = "5us"', 'launch = "infs"', "`gpu.launch` of `box.toml` must be a time as `5us`, not `infs`", None),
        ('launch = "5us"', 'launch = "1e400s"', "`gpu.launch` of `box.toml` must be a time as `5us`, not", None),
        ('launch = "5us"', 'launch = "0ms"', "`gpu.launch` of `box.toml` must be above zero", None),
        ('launch = "5us"', 'reserve = "16GiB"', "`gpu.reserve` of `box.toml` leaves nothing of `gpu.memory`", None),
        ('memory = "16GiB"', 'memory = "0.3B"', "`gpu.memory` of `box.toml` must be from 1B to less than", None),
        ('size = "1.5TB"', 'size = "1e20PB"', "`disk.size` of `box.toml` must be from 1B to less than", None),
        ('name = "box"', 'name = " "', "`name` of `box.toml` is no text", None),
        ('name = "box"', f"name = {'[' * 9999}", "`box.toml` is not TOML", None),
        ('name = "box"', f"name = {'9' * 5000}", "`box.toml` is not TOML", None),
        ("[link]", "[link", "`box.toml` is not TOML", None),
        ("[gpu]", "published = 3\n[gpu]", "`published` of `box.toml` is no table", None),
    ],
)
def test_a_machine_file_that_is_wrong(was: str, now: str, told: str, hint: str | None) -> None:
    assert was in BOX
    with pytest.raises(InputError) as refused:
        parse(BOX.replace(was, now, 1).encode(), Path("box.toml"))
    assert refused.value.message.startswith(told)
    assert hint is None or (refused.value.hint or "").startswith(hint)


def test_a_machine_file_from_the_command_line(forks: Forks, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    file = tmp_path / "box.toml"
    file.write_text(BOX.replace("attention", "atention"))
    ended = forks.run("flexgen-policy-search", tiny("llama"), tmp_path / "out", "--machine", file)
    assert (ended.code, ended.out) == (3, "")
    assert f"error: `{file}` has no use for `cpu.atention`" in ended.err
    assert "hint: did you mean `cpu.attention`?" in ended.err
    ended = forks.run("flexgen-policy-search", tiny("llama"), tmp_path / "out", "--machine", tmp_path / "no.toml")
    assert ended.code == 3
    assert beside(tmp_path / "out") == []


def test_a_machine_on_which_nothing_fits(forks: Forks, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """Exit 4 names the smallest change, and with that change it is feasible, and with a MiB less it is not."""
    words: list[str | Path] = ["flexgen-policy-search", tiny("llama"), tmp_path / "out", "--machine", "laptop"]
    words += ["--prompt-length", "24", "--generate-length", "8", "--cpu-memory", "100KiB", "--disk", "100KiB"]
    ended = forks.run(*words, "--gpu-memory", "100KiB")
    assert (ended.code, ended.out) == (4, "")
    assert "error: no policy fits" in ended.err
    found = re.search(r"hint: the smallest change is `--gpu-memory (\d+)MiB`", ended.err)
    assert found, ended.err
    assert beside(tmp_path / "out") == []
    assert forks.run(*words, "--gpu-memory", f"{found[1]}MiB").code == 0


def test_the_smallest_change_of_a_large_model() -> None:
    def ask(cpu: str, latency: float | None = None) -> dict[str, Any]:
        said = FlexgenOptions(
            machine=MachineName("t4-gcp-paper"), cpu_memory=Memory.parse(cpu), disk=Memory.parse("1MiB"),
            max_latency=latency, attention="cpu",
        )  # fmt: skip
        return document(said, opt("13b"))

    with pytest.raises(ResourceError) as refused:
        ask("10GiB")
    found = re.fullmatch(r"the smallest change is `--(gpu|cpu)-memory (\d+)MiB`", refused.value.hint or "")
    assert found, refused.value.hint
    if found[1] == "cpu":
        assert ask(f"{found[2]}MiB")["predicted"]["throughput"] > 0
        with pytest.raises(ResourceError):
            ask(f"{int(found[2]) - 64}MiB")
    with pytest.raises(ResourceError) as refused:
        ask("100GiB", latency=1.0)
    found = re.fullmatch(r"the smallest change is `--max-latency ([\d.]+)`", refused.value.hint or "")
    assert found, refused.value.hint
    assert ask("100GiB", latency=float(found[1]))["predicted"]["latency_s"] <= float(found[1]) * (1 + 1e-6)


def test_a_reserve_that_was_described_stays() -> None:
    """With another size too; and the size that is needed has room for it."""
    box = parse(BOX.replace('launch = "5us"', 'reserve = "10GiB"').encode(), Path("box.toml"))
    assert box.sized({"gpu": 24 * GIB}).rooms["gpu"] == 14 * GIB
    assert size_for(box, "gpu", 14 * GIB) == 24 * GIB
    usual = parse(BOX.encode(), Path("box.toml"))
    for tier, room in (("gpu", 3), ("gpu", 10**11), ("cpu", 10**10), ("disk", 2**20 + 1)):
        size = size_for(usual, tier, room)  # type: ignore[arg-type]  # words of a literal
        assert usual.sized({tier: size}).rooms[tier] >= room
        assert size <= 2**20 or usual.sized({tier: size - 2**20}).rooms[tier] < room


def test_cut_pieces_fit_where_whole_ones_do_not() -> None:
    """What seems to fit does not, and one sequence at a time does."""
    box = preset("rtx4090").sized({"gpu": 598931 * 2**20, "disk": 12752547737})
    work = Work(1, 1)
    kept = tuple(one for one in settings("zigzag", "staggered") if one.attention == "cpu")
    found = search(Problem(read(LARGE["DeepSeek-V3"]()), box, work, kept))
    assert found is not None
    assert found.best.gbs * found.best.nb >= 1


@pytest.mark.parametrize(("law", "generate"), [("roofline", 8), ("released", 32)])
def test_a_bound_that_no_machine_keeps(law: Literal["roofline", "released"], generate: int) -> None:
    """The hint says that the bound is what is in the way, though memory is short as well."""
    small = {} if law == "released" else {"gpu_memory": Memory.parse("1GiB"), "cpu_memory": Memory.parse("1GiB")}
    said = FlexgenOptions(
        machine=MachineName("t4-gcp-paper"), max_latency=1e-3, cost_model=law, disk=Memory.parse("1TB"),
        prompt_length=24, generate_length=generate, **small,
    )  # fmt: skip
    with pytest.raises(ResourceError, match=r"no policy fits .*within 0.001 s") as refused:
        document(said, opt("13b"))
    assert "--max-latency" in (refused.value.hint or "")


def test_headers_that_are_no_model() -> None:
    for tensors in ({}, {"a.weight": ("F32", (2, 2))}):
        with pytest.raises(Refusal):
            read(Layout(tensors, {"hidden_size": 2, "num_hidden_layers": 1}))
    with pytest.raises(InputError, match="there is no `hidden_size`"):
        read(Layout({}, {}))


def test_figures_that_no_float_holds(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    flexgen(tiny("llama"), tmp_path / "out")
    found = read_policy(tmp_path / "out")
    assert found is not None
    for part in (found["predicted"], found["predicted"]["peak_bytes"]):
        key, kept = next(iter(part.items()))
        part[key] = 10**400
        with pytest.raises(FormatError, match="the attached policy is damaged"):
            list(policy_tables(found))
        part[key] = kept
    assert list(policy_tables(found))


@pytest.mark.parametrize("text", ["[]", '{"schema": "flexgen-policy/9"}', '{"schema": "flexgen-policy/1"}', "{"])
def test_an_attached_policy_that_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / FILE).parent.mkdir(parents=True)
    (tmp_path / FILE).write_text(text)
    with pytest.raises(FormatError):
        read_policy(tmp_path)
