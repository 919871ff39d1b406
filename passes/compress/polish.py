"""The end of a run: scales and norms of the whole model, polished by the KL divergence to the dense model's logits."""

from __future__ import annotations

from typing import Any

import torch

from rewright.formats.dtypes import to_torch
from rewright.passes.compress.job import Job
from rewright.passes.compress.plan import Matrix, scheme_of
from rewright.passes.training import Training, shuffled
from rewright.passes.walk import Walk

# Tokens of a step, in whole sequences.
STEP_TOKENS = 1024
# The peak learning rate of factors that begin at 1, and of norms as a share of their root mean square.
RATE = 4e-3
STATE = "polish.safetensors"
UNIT = "polish"


def polish(job: Job, walk: Walk) -> dict[str, Any]:
    """Take `--polish` steps of Adam after a walk, and write what became of scales and norms.

    Codes and zeros stay. Each scale gets a factor, a matrix that is only pruned one a row; a norm moves by itself.
    Matrices of experts stay as they are. Returns what the report says: the mean KL of the first and the last tenth of
    the steps, in nats a token.
    """
    journal, steps = job.context.journal, job.options.polish
    if UNIT not in journal.done:
        job.assembly.place()
        student = _Student(job, walk)
        path = job.context.work / STATE
        training = Training.resume("the model", path, steps, job.assembly.device)
        if training is None:
            training = Training.begin("the model", path, steps, *student.start())
        student.constants = training.constants
        size = max(1, STEP_TOKENS // walk.tokens.shape[1])

        def loss_at(step: int) -> torch.Tensor:
            rows = shuffled(walk.samples, size, step, job.context.seed)
            dense = walk.head(walk.pick("dense", rows), rows).float().log_softmax(-1)
            ours = student.logits(walk.tokens[rows], training.parameters).float().log_softmax(-1)
            return (dense.exp() * (dense - ours)).sum(-1).mean()

        with job.context.reporter.progress("polish", steps) as bar:
            bar.advance(len(training.losses))
            training.run(training.by_autograd(loss_at), lambda loss: bar.advance(1, f"KL {loss:.4f}"))
        training.keep()
        student.write(training.parameters)
        job.draft.sync()
        tenth = max(1, steps // 10)
        first, last = (sum(part) / len(part) for part in (training.losses[:tenth], training.losses[-tenth:]))
        journal.record(UNIT, {"steps": steps, "kl_first": first, "kl_last": last})
        path.unlink(missing_ok=True)
    return journal.done[UNIT]


class _Student:
    """The compressed model as a function of factors and norms."""

    def __init__(self, job: Job, walk: Walk) -> None:
        self.job = job
        self.constants: dict[str, torch.Tensor] = {}
        known = dict(job.assembly.model.named_parameters())
        self.matrices: dict[str, Matrix] = {}
        for matrix in job.plan.matrices:
            name = f"{walk.prefix}.{matrix.layer}.{matrix.local}.weight"
            if name in known and not matrix.expert:
                self.matrices[name] = matrix
        self.norms = {
            f"{path}.{leaf}": parameter
            for path, module in job.assembly.model.named_modules()
            if "norm" in type(module).__name__.lower()
            for leaf, parameter in module.named_parameters(recurse=False)
        }
        # what the factors multiply, in the model's layout
        self.weights = {name: job.running(matrix).to(job.assembly.device) for name, matrix in self.matrices.items()}

    def start(self) -> tuple[dict[str, torch.Tensor], dict[str, float], dict[str, torch.Tensor]]:
        """Parameters, rates and constants of step 0."""
        parameters: dict[str, torch.Tensor] = {}
        rates: dict[str, float] = {}
        constants: dict[str, torch.Tensor] = {}
        for name, matrix in self.matrices.items():
            groups = 1 if not matrix.quantised or matrix.group is None else matrix.columns // matrix.group
            parameters[name] = torch.ones(matrix.rows, groups, device=self.job.assembly.device)
            rates[name] = RATE
            constants[name] = self.weights[name]
            if scheme_of(matrix, self.job.options) is not None:
                constants[f"scale {name}"] = self.job.draft.read(f"{matrix.module}.weight_scale")
        for name, norm in self.norms.items():
            parameters[name] = norm.detach().float()
            rates[name] = RATE * max(float(norm.float().square().mean().sqrt()), 1e-3)
        return parameters, rates, constants

    def _factor(self, name: str, factor: torch.Tensor) -> torch.Tensor:
        """A factor as the rounding of the scale that it makes leaves it; gradients pass as if it were not rounded."""
        scale = self.constants.get(f"scale {name}")
        if scale is None:
            return factor
        held = scale.float()
        rounded = (held * factor.detach()).to(scale.dtype).float() / held
        return factor + (rounded - factor).detach()

    def weight(self, name: str, factor: torch.Tensor) -> torch.Tensor:
        """A matrix in the model's layout, float32."""
        matrix = self.matrices[name]
        factors = self._factor(name, factor).repeat_interleave(matrix.columns // factor.shape[1], dim=1)
        return self.constants[name].float() * matrix.turned(factors)

    def logits(self, tokens: torch.Tensor, parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        dtype = self.job.assembly.dtype
        given = {
            name: (self.weight(name, value) if name in self.matrices else value).to(dtype)
            for name, value in parameters.items()
        }
        kwargs = {"input_ids": tokens.to(self.job.assembly.device), "use_cache": False}
        found: torch.Tensor = torch.func.functional_call(self.job.assembly.model, given, (), kwargs).logits
        return found

    @torch.no_grad()
    def write(self, parameters: dict[str, torch.Tensor]) -> None:
        """Put scales, or weights, and norms into the draft."""
        draft, plan = self.job.draft, self.job.plan
        for name, value in parameters.items():
            matrix = self.matrices.get(name)
            if matrix is None:
                stored = self.job.assembly.weights.find(name)
                written = plan.names[stored]
                assert written is not None
                dtype = to_torch(self.job.source.entries[stored].dtype)
                draft.write(written, value.detach().to(dtype).cpu())
            elif f"scale {name}" in self.constants:
                scale = self.constants[f"scale {name}"]
                draft.write(f"{matrix.module}.weight_scale", (scale.float() * value).to(scale.dtype).cpu())
            else:
                draft.write(matrix.target, self.weight(name, value).to(to_torch(matrix.dtype)).cpu())
