"""A low-rank linear predictor of the neurons that are on, in closed form.

A neuron i is on where its input z_i = w_i y + b_i is positive, y being what the MLP is fed. The predictor's score is
s = B (A x + a0) + c for the x that it reads: y itself, or the input of the layer. `svd` is the whitened singular value
decomposition of SVDP (arXiv:2603.14110); `rrr` is reduced-rank regression (Izenman 1975) of z on x, with an intercept
and an error of each neuron weighed by what it costs to miss it, of which `svd` is the case without either.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

# Of the mean variance, added to every one.
RIDGE = 1e-4
# How far weights of neurons may be from the middle one.
SPREAD = 30.0


@dataclass(frozen=True, slots=True)
class Moments:
    """Second moments of (x, 1) with itself and of y with (x, 1), float64: [width + 1, width + 1] and [width, width +
    1].

    `cross` is None where x is y.
    """

    tokens: int
    own: torch.Tensor
    cross: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Factors:
    """A predictor, float32: `a` [rank, width], `a0` [rank], `b` [neurons, rank], `c` [neurons].

    `relu`: hidden numbers below zero count as zero, as in predictors that PowerInfer learned.
    """

    a: torch.Tensor
    a0: torch.Tensor
    b: torch.Tensor
    c: torch.Tensor
    relu: bool = False

    def cut(self, rank: int) -> Factors:
        """The first of its components: the best of that rank."""
        return replace(self, a=self.a[:rank], a0=self.a0[:rank], b=self.b[:, :rank])

    def of(self, rows: torch.Tensor) -> Factors:
        """The predictor of some neurons."""
        return replace(self, b=self.b[rows], c=self.c[rows])

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        """A x + a0 for x [tokens, width]."""
        made = torch.addmm(self.a0, x, self.a.t())
        return made.clamp_(min=0) if self.relu else made

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, neurons] for x [tokens, width]."""
        return torch.addmm(self.c, self.hidden(x), self.b.t())


def fit(
    moments: Moments, weight: torch.Tensor, bias: torch.Tensor, importance: torch.Tensor | None, rank: int
) -> Factors:
    """The predictor of this rank, its components in the order of what they explain.

    `weight` [neurons, width], `bias` [neurons] of the matrix whose outputs are predicted; `importance` [neurons] weighs
    squared errors, None for `svd`, which has neither weights nor an intercept.
    """
    width = moments.own.shape[0] - 1
    weight, bias = weight.double(), bias.double()
    total = moments.own / moments.tokens
    mean = total[:width, width] if importance is not None else torch.zeros_like(total[:width, width])
    covariance = total[:width, :width] - torch.outer(mean, mean)
    covariance = covariance + RIDGE * covariance.diagonal().mean() * torch.eye(
        width, dtype=torch.float64, device=total.device
    )
    root = torch.linalg.cholesky(covariance)
    if moments.cross is None:
        slope, offset = weight, bias + weight @ mean
    else:
        cross = moments.cross / moments.tokens
        middle = cross[:, width]
        joint = cross[:, :width] - torch.outer(middle, mean)
        # regression of y on x, then of z through it
        slope = weight @ torch.cholesky_solve(joint.t(), root).t()
        offset = bias + weight @ middle - (slope @ mean if importance is None else 0.0)
    scale = torch.ones(len(weight), dtype=torch.float64, device=weight.device)
    if importance is not None:
        scale = importance.double().sqrt()
        middle = scale[scale > 0].median() if bool((scale > 0).any()) else scale.new_ones(())
        scale = scale.clamp(middle / SPREAD, middle * SPREAD)
    # eigenvectors of the smaller side: M is [neurons, width], V those of its right
    matrix = scale[:, None] * (slope @ root)
    values, vectors = torch.linalg.eigh(matrix.t() @ matrix)
    right = vectors[:, values.argsort(descending=True)[:rank]]
    right = right * torch.where(right.sum(0) < 0, -1.0, 1.0)
    b = (matrix @ right) / scale[:, None]
    a = torch.linalg.solve_triangular(root.t(), right, upper=True).t()
    c = offset if importance is not None else bias
    return Factors(a.float(), (-a @ mean).float(), b.float(), c.float())


@dataclass(frozen=True, slots=True)
class Stored:
    """A matrix as it is attached: bfloat16, or int8 with a scale a row, float32."""

    codes: torch.Tensor
    scale: torch.Tensor | None

    @property
    def value(self) -> torch.Tensor:
        """float32."""
        held = self.codes.float()
        return held if self.scale is None else held * self.scale[:, None]


def store(matrix: torch.Tensor, dtype: str) -> Stored:
    """A float32 matrix in `bf16` or, symmetric by rows, `int8`."""
    if dtype == "bf16":
        return Stored(matrix.to(torch.bfloat16), None)
    scale = matrix.abs().amax(dim=1).clamp(min=1e-30) / 127
    return Stored((matrix / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale)


@dataclass(frozen=True, slots=True)
class Predictor:
    """A predictor as it is attached and used; `c` lacks a threshold yet."""

    a: Stored
    b: Stored
    a0: torch.Tensor
    c: torch.Tensor
    relu: bool = False

    @property
    def factors(self) -> Factors:
        """What it computes with."""
        return Factors(self.a.value, self.a0, self.b.value, self.c, self.relu)

    @property
    def rank(self) -> int:
        return len(self.a0)


def settle(found: Factors, spread: torch.Tensor, dtype: str) -> Predictor:
    """A predictor in its stored form, each neuron's score divided by its `spread` [neurons], a standard deviation.

    Components are scaled alike on either side of the hidden numbers, so that rows of int8 use their range.
    """
    size = found.b.norm(dim=0).clamp(min=1e-30).sqrt()
    tame = spread.clamp(min=1e-12)
    b = found.b / size / tame[:, None]
    return Predictor(
        store(found.a * size[:, None], dtype), store(b, dtype), found.a0 * size, found.c / tame, found.relu
    )
