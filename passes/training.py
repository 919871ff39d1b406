"""Steps of Adam that survive a kill: parameters, moments and step are on disk from time to time."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from rewright.formats.files import write_file
from rewright.passes.errors import BoundError

BETAS = (0.9, 0.95)
EPSILON = 1e-8
# Seconds between two states on disk.
PAUSE = 30.0

GradientsAt = Callable[[int], tuple[float, Mapping[str, torch.Tensor]]]


@dataclass(slots=True)
class Training:
    """Parameters on their way. `name` says what is trained, for errors and so that a state is not another's.

    `parameters` are leaves, float32; `rates` the peak learning rate of each; `constants` what must come back with
    them, `notes` (JSON) as well. Rates rise over the first `warm_up` of `steps` and fall to 0 by a cosine; gradients
    whose norm over all parameters is past `clip` are scaled down to it. `losses` has one number a step. One process of
    several `keeps` the state, which all have.
    """

    name: str
    path: Path
    steps: int
    parameters: dict[str, torch.Tensor]
    rates: dict[str, float]
    constants: dict[str, torch.Tensor]
    losses: list[float]
    first: dict[str, torch.Tensor]
    second: dict[str, torch.Tensor]
    notes: dict[str, Any] = field(default_factory=dict)
    warm_up: float = 0.1
    clip: float | None = None
    keeps: bool = True

    @classmethod
    def begin(
        cls,
        name: str,
        path: Path,
        steps: int,
        parameters: Mapping[str, torch.Tensor],
        rates: dict[str, float],
        constants: Mapping[str, torch.Tensor],
        *,
        keeps: bool = True,
    ) -> Training:
        """At step 0, and so on disk."""
        held = {key: value.detach().clone().requires_grad_() for key, value in parameters.items()}
        first, second = ({key: torch.zeros_like(value) for key, value in parameters.items()} for _ in range(2))
        training = cls(name, path, steps, held, rates, dict(constants), [], first, second, keeps=keeps)
        training.keep()
        return training

    @classmethod
    def resume(cls, name: str, path: Path, steps: int, device: torch.device) -> Training | None:
        """From the state on disk; None where there is none, or it is another's."""
        if not path.exists():
            return None
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["training"])
            if (facts["name"], facts["steps"]) != (name, steps):
                return None
            parts: dict[str, dict[str, torch.Tensor]] = {"parameter": {}, "first": {}, "second": {}, "constant": {}}
            for key in file.keys():  # noqa: SIM118  # not a mapping
                kind, _, leaf = key.partition(" ")
                parts[kind][leaf] = file.get_tensor(key).to(device)
        held = {key: value.requires_grad_() for key, value in parts["parameter"].items()}
        moments = parts["first"], parts["second"]
        return cls(
            name, path, steps, held, facts["rates"], parts["constant"], facts["losses"], *moments, facts["notes"]
        )

    def keep(self) -> None:
        """Put the state on disk, where this is the process to do so. Raises StorageError."""
        if not self.keeps:
            return
        kinds = (
            ("parameter", self.parameters),
            ("first", self.first),
            ("second", self.second),
            ("constant", self.constants),
        )
        tensors = {
            f"{kind} {key}": value.detach().cpu().contiguous() for kind, held in kinds for key, value in held.items()
        }
        facts = {
            "name": self.name,
            "steps": self.steps,
            "rates": self.rates,
            "losses": self.losses,
            "notes": self.notes,
        }
        write_file(self.path, save(tensors, {"training": json.dumps(facts)}))

    def run(self, gradients_at: GradientsAt, note: Callable[[float], None], until: int | None = None) -> None:
        """Go on to step `until`, or to the last. `gradients_at` gives a step's loss and the gradient of each parameter.

        Raises BoundError naming what is trained when a loss is not finite.
        """
        since = time.monotonic()
        for step in range(len(self.losses), self.steps if until is None else until):
            told, gradients = gradients_at(step)
            if not math.isfinite(told):
                raise BoundError(
                    f"the loss of tuning {self.name} is not finite at step {step}",
                    hint="try a lower learning rate, or `--dtype f32`",
                )
            self._update(step, gradients)
            self.losses.append(told)
            note(told)
            if time.monotonic() - since > PAUSE:
                self.keep()
                since = time.monotonic()

    def by_autograd(self, loss_at: Callable[[int], torch.Tensor]) -> GradientsAt:
        """Gradients of a loss that is made of the parameters as they stand."""

        def gradients_at(step: int) -> tuple[float, Mapping[str, torch.Tensor]]:
            loss = loss_at(step)
            found = torch.autograd.grad(loss, list(self.parameters.values()))
            return float(loss.detach()), dict(zip(self.parameters, found, strict=True))

        return gradients_at

    @torch.no_grad()
    def _update(self, step: int, gradients: Mapping[str, torch.Tensor]) -> None:
        """Adam (arXiv:1412.6980), with both moments corrected for their start."""
        share = self._schedule(step)
        norm = sum(float(gradient.square().sum()) for gradient in gradients.values()) ** 0.5
        shrink = 1.0 if self.clip is None or norm <= self.clip else self.clip / norm
        for key, parameter in self.parameters.items():
            gradient = gradients[key] if shrink == 1.0 else gradients[key] * shrink
            first = self.first[key].lerp_(gradient, 1 - BETAS[0])
            second = self.second[key].mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
            scale = (second / (1 - BETAS[1] ** (step + 1))).sqrt_().add_(EPSILON)
            parameter.addcdiv_(first, scale, value=-share * self.rates[key] / (1 - BETAS[0] ** (step + 1)))

    def _schedule(self, step: int) -> float:
        rise = max(1, round(self.warm_up * self.steps))
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, self.steps - rise)))

    def done(self) -> dict[str, torch.Tensor]:
        """The parameters; the state on disk has served."""
        self.path.unlink(missing_ok=True)
        return {key: value.detach() for key, value in self.parameters.items()}


def shuffled(rows: int, size: int, step: int, seed: int) -> torch.Tensor:
    """The rows of a step: every row once in each round, in an order that the round's number and the seed decide."""
    size = min(size, rows)
    a_round = rows // size
    draws = torch.Generator().manual_seed((seed * 1_000_003 + step // a_round) % 2**63)
    place = step % a_round * size
    return torch.randperm(rows, generator=draws)[place : place + size].sort().values
