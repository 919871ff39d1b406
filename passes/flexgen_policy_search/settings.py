"""From options to a problem: the machine, the work, and the settings that are allowed. Standard library only."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from rewright.passes.errors import InputError
from rewright.passes.flexgen_policy_search import detect, machine_file, presets
from rewright.passes.flexgen_policy_search.machine import Machine
from rewright.passes.flexgen_policy_search.shape import Model
from rewright.passes.inputs import Inputs

if TYPE_CHECKING:
    from rewright.passes.flexgen_policy_search.roofline import Device, Schedule, Setting
    from rewright.passes.flexgen_policy_search.spec import FlexgenOptions


def machine_of(options: FlexgenOptions, inputs: Inputs | None = None) -> Machine:
    """The machine that is named, described or found here, with the sizes that options give. Raises InputError."""
    named = options.machine
    if named is None:
        made = detect.detect(Path.cwd())
    elif named.file is None:
        made = presets.preset(named.word)
    else:
        made = machine_file.parse((inputs or Inputs()).read(named.file), named.file)
    given = {"gpu": options.gpu_memory, "cpu": options.cpu_memory, "disk": options.disk}
    return made.sized({tier: None if size is None else size.count for tier, size in given.items()})


def check_positions(options: FlexgenOptions, model: Model) -> None:
    """Raise InputError for a prompt and what follows it past the model's positions."""
    asked = options.prompt_length + options.generate_length
    if model.positions is not None and asked > model.positions:
        room = model.positions - options.generate_length
        raise InputError(
            f"a prompt of {options.prompt_length} tokens and {options.generate_length} more are past the model's"
            f" {model.positions} positions",
            hint=f"use `--prompt-length {room}`" if room > 0 else "use a shorter `--generate-length`",
        )


def settings_of(options: FlexgenOptions, model: Model) -> tuple[Setting, ...]:
    """Every setting that the options allow, likelier winners first."""
    from rewright.passes.flexgen_policy_search.roofline import Setting

    weights: list[int | None] = [None, 8, 4] if options.weight_bits == "any" else [None]
    if options.weight_bits in ("16", "8", "4"):
        weights = [int(options.weight_bits)]
    caches = [16, 8, 4] if options.kv_bits == "any" else [int(options.kv_bits)]
    attention: list[Device] = ["cpu", "gpu"] if options.attention == "any" else [options.attention]
    schedules: list[Schedule] = ["zigzag", "staggered"] if options.schedule == "any" else [options.schedule]
    devices: list[Device] = ["gpu", "cpu"]
    found = []
    for schedule, bits, kept, where, hidden in product(schedules, weights, caches, attention, devices):
        # codes are too slow to decode on a CPU, and states of recurrences are not attended to
        if where == "cpu" and (kept != 16 or not any(cache.attends for cache in model.caches)):
            where = "gpu"
        found.append(Setting(bits, kept, where, hidden, schedule))
    return tuple(dict.fromkeys(found))
