"""Learning: the loss of a prompt and its gradient, step by step, and the choice of the best step."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from rewright.kernels.linear_cross_entropy import linear_cross_entropy
from rewright.kernels.linear_kl import linear_kl
from rewright.passes.chunks import merged
from rewright.passes.context import Context
from rewright.passes.errors import BoundError
from rewright.passes.models.families import family_of
from rewright.passes.models.prompted import Front, final_states
from rewright.passes.prompt.data import Data
from rewright.passes.prompt.spec import PromptOptions, pause
from rewright.passes.prompt.teacher import Teacher
from rewright.passes.prompt.units import UNIT_TOKENS, units
from rewright.passes.scoring import Window, padded
from rewright.passes.sums import OrderedSum
from rewright.passes.training import Training, shuffled

STATE = "prompt.safetensors"
# In the journal, when a step was taken.
STEPPED = "first step"
NAME = "the prompt"
# Gradients are scaled down to this norm, as the paper has it.
CLIP = 1.0
# Activations of a unit from which on they are computed twice.
RECOMPUTED_BYTES = 2 << 30


class Learner:
    """A frozen model, the windows to learn from, and the losses of a prompt on them."""

    def __init__(
        self, context: Context, options: PromptOptions, model: Any, data: Data, teacher: Teacher | None
    ) -> None:
        self.context, self.options, self.model, self.data, self.teacher = context, options, model, data, teacher
        self.head, self.depth = model.get_output_embeddings().weight, options.depth
        self.softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)

    def train(self, start: Front, columns: Mapping[str, tuple[slice, float]]) -> Training:
        """Take the steps that are left, from `start` or from what an earlier run left.

        `columns` are the parts of the prompt and their scales, which the learning rate is in units of.
        """
        self.depth = start.depth
        options, world = self.options, self.context.world
        path = self.context.common / STATE
        training = Training.resume(NAME, path, options.steps, self.context.device)
        if training is None:
            held = start.tensor.to(self.context.device)
            begun = {name: held[:, place] for name, (place, _) in columns.items()}
            rates = {name: options.learning_rate * scale for name, (_, scale) in columns.items()}
            training = Training.begin(NAME, path, options.steps, begun, rates, {"best": held}, keeps=world.leads)
        # none writes a state before all have read it
        world.meet()
        training.keeps, training.warm_up, training.clip = world.leads, options.warmup, CLIP
        every = pause(options)
        looks: list[list[float]] = training.notes.setdefault("looks", [])
        if "before" not in training.notes:
            training.notes["before"] = self.perplexity(None)
        with self._recomputing(), self.context.reporter.progress("learn the prompt", options.steps) as bar:
            bar.advance(len(training.losses))
            while True:
                taken = len(training.losses)
                if (taken % every == 0 or taken == options.steps) and (not looks or looks[-1][0] != taken):
                    self._look(training, taken)
                if taken == options.steps or self._stalls(looks):
                    break
                until = min(options.steps, (taken // every + 1) * every)
                best = min(look[1] for look in looks)
                training.run(
                    functools.partial(self._gradients, training),
                    lambda loss: bar.advance(1, f"loss {loss:.4f}, perplexity {best:.3f}"),  # noqa: B023  # called at once
                    until,
                )
        return training

    def _look(self, training: Training, taken: int) -> None:
        """Score the prompt as it stands on the validation text, and keep it if it is the best so far."""
        looks = training.notes["looks"]
        front = self._front(training)
        found = self.perplexity(front)
        if not looks or found < min(look[1] for look in looks):
            training.constants["best"] = front.tensor.detach().clone()
        looks.append([taken, found])
        self.context.reporter.event("look", step=taken, perplexity=found)
        # a state that is kept tells nothing of the seconds that it took
        self.context.journal.record(f"look {taken}", {"perplexity": found})
        training.keep()

    def _stalls(self, looks: Sequence[Sequence[float]]) -> bool:
        """Whether the last `--patience` looks brought nothing."""
        patience = self.options.patience
        best = min(range(len(looks)), key=lambda place: looks[place][1])
        return patience > 0 and len(looks) - 1 - best >= patience

    def _gradients(self, training: Training, step: int) -> tuple[float, Mapping[str, torch.Tensor]]:
        """The mean loss a token of a step's windows, and its gradient; the same for any number of processes."""
        world, parts = self.context.world, list(training.parameters.values())
        sizes, before = [part.numel() for part in parts], len(parts[0])
        places = shuffled(len(self.data.train), self.options.batch_size, step, self.context.seed).tolist()
        found = [self.data.train[place] for place in places]
        total = sum(window.scored for window in found)
        every = units([len(window.tokens) for window in found], before)
        costs = [float(len(unit) * (before + len(found[unit[-1]].tokens))) for unit in every]
        own = OrderedSum(lambda: torch.zeros(1 + sum(sizes), device=self.context.device))
        for number in world.share(costs):
            unit = every[number]
            loss = self._loss(self._front(training), [places[at] for at in unit], [found[at] for at in unit], 1 / total)
            gradients = torch.autograd.grad(loss, parts)
            torch.cat([loss.detach().view(1), *(part.reshape(-1) for part in gradients)], out=own.term(number))
        summed = world.add_up(own, [merged(share) for share in world.shares(costs)])
        if STEPPED not in self.context.journal.done:
            # and which ops ran is on record before a state can be kept from which a later run takes no step
            self.context.journal.record(STEPPED, {})
        shares = zip(training.parameters, torch.split(summed[1:], sizes), parts, strict=True)
        return float(summed[0]), {name: share.view_as(part) for name, share, part in shares}

    def _front(self, training: Training) -> Front:
        """The prompt as it stands."""
        return Front(torch.cat(list(training.parameters.values()), dim=1), self.depth)

    def _loss(self, prompt: Front, places: Sequence[int], found: Sequence[Window], weight: float) -> torch.Tensor:
        """The loss of some windows, each target of weight `weight`."""
        states, targets = self._states(prompt, found)
        each = torch.full((len(targets),), weight, device=states.device)
        kind = self.options.loss
        share = {"next-token": (1.0, 0.0), "distill": (0.0, 1.0), "mix": (0.5, 0.5)}[kind]
        total = states.new_zeros((), dtype=torch.float32)
        if share[0]:
            total = (
                total + share[0] * linear_cross_entropy(states, self.head, targets, each, softcap=self.softcap).total
            )
        if share[1]:
            assert self.teacher is not None
            ids, logs = (tensor.to(states.device) for tensor in self.teacher.of(places))
            whole = logs.new_zeros(len(logs))
            total = total + share[1] * linear_kl(states, self.head, ids, logs, whole, each, softcap=self.softcap).total
        return total

    def _states(self, prompt: Front | None, found: Sequence[Window]) -> tuple[torch.Tensor, torch.Tensor]:
        """What stands before the head ahead of every target (targets, width), and the targets."""
        tokens = padded(found).to(self.context.device)
        states = final_states(self.model, prompt, tokens)
        rows = torch.cat([torch.full((window.scored,), row) for row, window in enumerate(found)])
        ends = torch.cat([torch.arange(len(window.tokens) - window.scored, len(window.tokens)) for window in found])
        rows, ends = rows.to(tokens.device), ends.to(tokens.device)
        return states[rows, ends - 1], tokens[rows, ends]

    def perplexity(self, prompt: Front | None) -> float:
        """Of the validation text, by the protocol of `rewright eval`. Raises BoundError when it is not finite."""
        found, world = self.data.validation, self.context.world
        before = 0 if prompt is None else len(prompt)
        every = units([len(window.tokens) for window in found], before)
        losses = []
        for number in world.share([float(len(unit)) for unit in every]):
            with torch.no_grad():
                states, targets = self._states(prompt, [found[place] for place in every[number]])
                told = linear_cross_entropy(states, self.head, targets, softcap=self.softcap).losses
            losses.append(float(told.sum(dtype=torch.float64)))
        total = sum(loss for theirs in world.together(losses) for loss in theirs)
        mean = total / sum(window.scored for window in found)
        if not math.isfinite(mean):
            raise BoundError("the loss on the validation text is not finite", hint="try `--dtype f32`")
        return math.exp(min(mean, 700.0))

    @contextlib.contextmanager
    def _recomputing(self) -> Iterator[None]:
        """Keep of each layer its input alone for the way back, where what it makes is large."""
        layers = self.model.get_submodule(family_of(self.model.config.to_dict()).layers)
        config = self.model.config.get_text_config()
        held = UNIT_TOKENS * len(layers) * 18 * config.hidden_size * self.head.element_size()
        if self.options.recompute == "off" or (self.options.recompute == "auto" and held < RECOMPUTED_BYTES):
            yield
            return
        for layer in layers:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward
