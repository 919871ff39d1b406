"""Products with Hankel matrices of filters by FFT, and their leading eigenpairs by Lanczos' method.

The matrix of the samples g_0, g_1, ... is S_ij = g_(i+j), 0 <= i, j < m; scaled by weights a it is a_i S_ij a_j. It is
real and symmetric, and of rank d where g is the impulse response of a recurrence of d states (Kronecker), so that its
eigenpairs tell which recurrences come close (Ho and Kalman; Adamjan, Arov and Krein).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Sizes up to which a dense eigendecomposition is the faster one.
DENSE = 192
# Residuals of the wanted eigenpairs, as a part of the largest eigenvalue, at which iterations end.
TOLERANCE = 1e-10
_BREAKDOWN = 1e-13


class Hankel:
    """S or a_i S_ij a_j of `samples` [C, n] float64, `size` m rows each; samples past the n-th are zero.

    `weights` is [m], or None for ones.
    """

    def __init__(self, samples: torch.Tensor, size: int, weights: torch.Tensor | None = None) -> None:
        self.samples = samples[:, : 2 * size - 1]
        self.size, self.weights = size, weights
        self.period = 1 << max(2 * size - 2, 1).bit_length()
        self.spectrum = torch.fft.rfft(self.samples, self.period)

    def product(self, vectors: torch.Tensor) -> torch.Tensor:
        """The matrices times `vectors` [C, m], one a channel."""
        if self.weights is not None:
            vectors = vectors * self.weights
        found: torch.Tensor = torch.fft.irfft(self.spectrum * torch.fft.rfft(vectors, self.period).conj(), self.period)
        found = found[:, : self.size]
        return found if self.weights is None else found * self.weights

    def square(self) -> torch.Tensor:
        """The sum of squares [C] of the entries, exact to rounding."""
        squared = torch.ones(self.size, dtype=torch.float64, device=self.samples.device)
        if self.weights is not None:
            squared = self.weights.square()
        period = 2 * self.period
        counted = torch.fft.irfft(torch.fft.rfft(squared, period).square(), period)
        found: torch.Tensor = (counted[: self.samples.shape[1]] * self.samples.square()).sum(dim=1)
        return found

    def dense(self) -> torch.Tensor:
        """The matrices [C, m, m]."""
        padded = torch.nn.functional.pad(self.samples, (0, 2 * self.size - 1 - self.samples.shape[1]))
        found = padded.unfold(1, self.size, 1)
        if self.weights is None:
            return found
        return found * self.weights[:, None] * self.weights


@dataclass(frozen=True, slots=True)
class Leading:
    """Eigenpairs of largest magnitude, largest first.

    `values` [C, k] signed, `vectors` [C, m, k] orthonormal columns, `residuals` [C, k]: |S u - value u|, so that an
    eigenvalue lies within that of each value. Values are eigenvalues of the matrix confined to a subspace, hence in
    order none is larger in magnitude than the singular value that it stands for (Cauchy).
    """

    values: torch.Tensor
    vectors: torch.Tensor
    residuals: torch.Tensor


def leading(matrix: Hankel, count: int, seed: int = 0) -> Leading:
    """The `count` leading eigenpairs, or all of them if the matrix is smaller.

    `seed` draws the first vector, the same for each channel. Iterations end when the residuals of all are below
    TOLERANCE, or when the whole space is spanned.
    """
    count = min(count, matrix.size)
    if matrix.size <= DENSE:
        values, vectors = torch.linalg.eigh(matrix.dense())
        order = values.abs().argsort(dim=1, descending=True, stable=True)[:, :count]
        vectors = vectors.gather(2, order[:, None].expand(-1, matrix.size, -1))
        values = values.gather(1, order)
        return Leading(values, vectors, torch.zeros_like(values))
    return _Lanczos(matrix, seed).until(count)


class _Lanczos:
    """Lanczos' method with full reorthogonalisation, all channels in step."""

    def __init__(self, matrix: Hankel, seed: int) -> None:
        self.matrix = matrix
        channels, size = matrix.samples.shape[0], matrix.size
        generator = torch.Generator().manual_seed(seed)
        self.drawn = torch.randn(2, size, generator=generator, dtype=torch.float64).to(matrix.samples.device)
        first = matrix.samples.new_zeros(channels, size) + self.drawn[0]
        self.basis = (first / first.norm(dim=1, keepdim=True))[:, None]
        # columns of the tridiagonal matrix: its diagonal and, beside it, the norm that led to the next vector
        self.diagonal: list[torch.Tensor] = []
        self.beside: list[torch.Tensor] = []
        self.square = matrix.square()
        self.complete = False

    def until(self, count: int) -> Leading:
        steps = min(self.matrix.size, 2 * count + 32)
        while True:
            self._extend(steps, count)
            values, inner, residuals = self._ritz(count)
            near = bool((residuals.amax(dim=1) <= TOLERANCE * values[:, 0].abs()).all())
            if near or self.complete or steps == self.matrix.size:
                return Leading(values, self.basis[:, : inner.shape[1]].transpose(1, 2) @ inner, residuals)
            steps = min(self.matrix.size, steps + steps // 2)

    def _extend(self, steps: int, least: int) -> None:
        """Take the basis to `steps` vectors and the one that comes next, or to all that there is, yet `least`."""
        known = self.basis.shape[1]
        basis = torch.nn.functional.pad(self.basis, (0, 0, 0, steps + 1 - known))
        for step in range(known - 1, steps):
            self._next(basis, step)
            if self.complete and step + 1 >= least:
                steps = step + 1
                break
        self.basis = basis[:, : steps + 1]

    def _next(self, basis: torch.Tensor, step: int) -> None:
        """Fill in the vector after `step`."""
        current, before = basis[:, step], basis[:, : step + 1]
        vector = self.matrix.product(current)
        along = (vector * current).sum(dim=1, keepdim=True)
        vector = vector - along * current
        if step:
            vector = vector - self.beside[-1] * basis[:, step - 1]
        vector = _apart(vector, before)
        length = vector.norm(dim=1, keepdim=True)
        broken = length <= _BREAKDOWN * self.square.sqrt()[:, None]
        if bool(broken.any()):
            # an invariant subspace is spanned: go on in the rest of the space
            fresh = _apart(_apart(self.drawn[1].roll(step).expand_as(vector), before), before)
            vector = torch.where(broken, fresh, vector)
            length = torch.where(broken, 0.0, length)
            vector = vector / vector.norm(dim=1, keepdim=True).clamp_min(1e-300)
        else:
            vector = vector / length
        basis[:, step + 1] = vector
        self.diagonal.append(along)
        self.beside.append(length)
        if bool(broken.all()):
            held = torch.cat(self.diagonal, dim=1).square() + 2 * torch.cat(self.beside, dim=1).square()
            self.complete = bool((self.square - held.sum(dim=1) <= _BREAKDOWN * self.square).all())

    def _ritz(self, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Values [C, count], their vectors in the basis [C, steps, count], residuals [C, count]."""
        diagonal, beside = torch.cat(self.diagonal, dim=1), torch.cat(self.beside, dim=1)
        between = beside[:, :-1]
        inner = torch.diag_embed(diagonal) + torch.diag_embed(between, 1) + torch.diag_embed(between, -1)
        values, vectors = torch.linalg.eigh(inner)
        order = values.abs().argsort(dim=1, descending=True, stable=True)[:, :count]
        values = values.gather(1, order)
        vectors = vectors.gather(2, order[:, None].expand(-1, vectors.shape[1], -1))
        return values, vectors, (beside[:, -1:] * vectors[:, -1]).abs()


def _apart(vectors: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """`vectors` [C, m] less what lies in the rows of `basis` [C, k, m]."""
    # row vectors from the left: the products that a CPU does at the speed of its memory
    inside = vectors[:, None] @ basis.transpose(1, 2)
    return vectors - (inside @ basis)[:, 0]
