"""Deja Vu's own predictor: learned by binary cross entropy on which neurons are on, begun from the closed form."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional

from rewright.passes.dejavu_predictor_train.job import Job
from rewright.passes.dejavu_predictor_train.mlp import Matrices
from rewright.passes.dejavu_predictor_train.predictor import Factors
from rewright.passes.training import Training, shuffled

# Tokens of a step, passes over them, and the peak learning rate as a share of each factor's root mean square.
STEP_TOKENS, ROUNDS, RATE = 512, 4, 0.02
# Added to the share of neurons that are on, as Deja Vu's training script does.
OFFSET = 0.005


def learn(job: Job, layer: int, start: Factors, held: Matrices, training: tuple[torch.Tensor, torch.Tensor]) -> Factors:
    """Train a predictor of a layer; a neuron counts as on where it is not zero.

    The loss is that of the paper's code: positives weigh 1, negatives the share of positives.
    """
    read, fed = training
    steps = max(1, ROUNDS * len(read) // STEP_TOKENS)
    spread = start.scores(read[:2048]).std(0).clamp(min=1e-12)
    begun = {"a": start.a, "a0": start.a0, "b": start.b / spread[:, None], "c": start.c / spread}
    path = job.context.work / f"learned-{layer}.safetensors"
    name = f"the predictor of layer {layer}"
    state = Training.resume(name, path, steps, read.device)
    if state is None:
        rates = {key: RATE * max(float(value.square().mean().sqrt()), 1e-3) for key, value in begun.items()}
        state = Training.begin(name, path, steps, begun, rates, {})

    def loss_at(step: int) -> torch.Tensor:
        rows = shuffled(len(read), STEP_TOKENS, step, job.context.seed)
        on = (held.made(fed[rows], slice(None)) != 0).float()
        scores = _made(state.parameters).scores(read[rows])
        share = on.mean() + OFFSET
        return functional.binary_cross_entropy_with_logits(scores, on, on * (1 - share) + share)

    with job.context.reporter.progress(f"learn layer {layer}", steps) as bar:
        bar.advance(len(state.losses))
        state.run(state.by_autograd(loss_at), lambda loss: bar.advance(1, f"loss {loss:.4f}"))
    return _made(state.done())


def _made(learned: Mapping[str, torch.Tensor]) -> Factors:
    return Factors(learned["a"], learned["a0"], learned["b"], learned["c"])
