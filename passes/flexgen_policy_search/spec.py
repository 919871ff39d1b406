"""`flexgen-policy-search`: what it takes, and what is refused at the sight of the headers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from rewright.passes.errors import UsageError
from rewright.passes.flexgen_policy_search.values import PRESETS, MachineName, Memory
from rewright.passes.spec import Estimate, Layout, Opt, Spec

_SIZE = "with its unit, instead of the machine's"


@dataclass(frozen=True, slots=True, kw_only=True)
class FlexgenOptions:
    """The options of `flexgen-policy-search`."""

    machine: Annotated[
        MachineName | None,
        Opt("preset or description; by default what is found here", metavar="|".join((*PRESETS, "FILE.toml"))),
    ] = None
    gpu_memory: Annotated[Memory | None, Opt(f"the GPU's memory, {_SIZE}", metavar="SIZE")] = None
    cpu_memory: Annotated[Memory | None, Opt(f"the host's memory, {_SIZE}", metavar="SIZE")] = None
    disk: Annotated[Memory | None, Opt(f"the disk, {_SIZE}", metavar="SIZE")] = None
    prompt_length: Annotated[int, Opt("tokens of each prompt", min=1, max=10**7)] = 512
    generate_length: Annotated[int, Opt("tokens that each prompt gets", min=1, max=10**7)] = 32
    objective: Annotated[
        Literal["throughput", "min-ram"], Opt("most tokens a second, or least of the host's memory")
    ] = "throughput"
    max_latency: Annotated[float | None, Opt("seconds until a block of prompts is done, at most", min=0)] = None
    cost_model: Annotated[
        Literal["roofline", "paper", "released"],
        Opt("how times are foretold: per resource, or by the equations of the paper or of its released script"),
    ] = "roofline"
    weight_bits: Annotated[
        Literal["stored", "16", "8", "4", "any"], Opt("weights as they are stored, or with fewer bits; any: the best")
    ] = "stored"
    kv_bits: Annotated[Literal["16", "8", "4", "any"], Opt("keys and values; any: the best")] = "16"
    attention: Annotated[
        Literal["any", "gpu", "cpu"], Opt("where decoding attends to keys that are off the GPU; any: the best")
    ] = "any"
    schedule: Annotated[
        Literal["zigzag", "staggered", "row", "any"],
        Opt("order of the work; `row` is one batch at a time; any: the best"),
    ] = "zigzag"

    def __post_init__(self) -> None:
        if self.cost_model != "roofline":
            odd = {"weight-bits": self.weight_bits != "stored", "kv-bits": self.kv_bits != "16"}
            odd |= {"objective": self.objective != "throughput"}
            odd |= {"attention": self.attention == "gpu", "schedule": self.schedule not in ("zigzag", "any")}
            for flag, said in odd.items():
                if said:
                    raise UsageError(f"`--cost-model {self.cost_model}` knows nothing of `--{flag}`")
        if self.max_latency == 0:
            raise UsageError("`--max-latency 0` leaves no time for anything")
        if self.attention == "cpu" and self.kv_bits not in ("16", "any"):
            raise UsageError(
                f"`--attention cpu` reads keys of 16 bits, not of {self.kv_bits}", hint="use `--attention gpu`"
            )


def _estimate(options: FlexgenOptions, layout: Layout) -> Estimate:
    from rewright.passes.flexgen_policy_search.policy import document, encode

    found = document(options, layout)
    size = len(encode(found))
    predicted, schedule = found["predicted"], found["schedule"]
    return Estimate(
        layout=layout,
        output_bytes=size,
        peak_host_bytes=256 * 2**20,
        peak_device_bytes=0,
        flops=0,
        bytes_moved=size,
        details={
            "throughput": predicted["throughput"],
            "latency_s": predicted["latency_s"],
            "gpu_batch": schedule["gpu_batch"],
            "num_batches": schedule["num_batches"],
            "machine": found["hardware"]["name"],
        },
    )


def metrics(found: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a policy that bounds may be put on."""
    predicted = found["predicted"]
    return {
        "throughput": predicted["throughput"],
        "latency": predicted["latency_s"],
        "gpu_bytes": predicted["peak_bytes"]["gpu"],
        "cpu_bytes": predicted["peak_bytes"]["cpu"],
        "disk_bytes": predicted["peak_bytes"]["disk"],
        "gap": predicted["mip_gap"],
    }


FLEXGEN = Spec(
    name="flexgen-policy-search",
    summary="find the best placement of a model on a machine's GPU, memory and disk",
    version=1,
    options=FlexgenOptions,
    impl="rewright.passes.flexgen_policy_search.run:run",
    wants=frozenset({"config"}),
    gives="attachment",
    attachment="flexgen",
    grain="step",
    metrics=frozenset({"throughput", "latency", "gpu_bytes", "cpu_bytes", "disk_bytes", "gap"}),
    paper="FlexGen (arXiv:2303.06865)",
    estimate=_estimate,
)
