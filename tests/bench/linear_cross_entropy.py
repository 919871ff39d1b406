"""`linear_cross_entropy` with its gradient beside torch's linear, cross entropy and backward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import cross_entropy, linear

from rewright.kernels.linear_cross_entropy import linear_cross_entropy
from tests.bench.harness import Job

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# Tokens, width and vocabulary.
SIZES = {"cpu": ((512, 288, 32000), (1024, 576, 49152)), "cuda": ((4096, 2048, 32000), (4096, 4096, 131072))}


def jobs(device: str) -> list[Job]:
    """The head of a small model and of a larger one: with a fixed matrix, with a cap, and training the matrix too."""
    made = []
    for tokens, width, vocabulary in SIZES[device]:
        hidden, weight = head(tokens, width, vocabulary, device)
        targets = torch.randint(0, vocabulary, (tokens,), device=device)
        made += [job("cap" if cap else "", hidden, weight, *pair(targets, cap)) for cap in (None, 30.0)]
        made.append(job("both", hidden, weight.detach().requires_grad_(), *pair(targets, None)))
    return made


def head(tokens: int, width: int, vocabulary: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states that want a gradient, and a matrix; bfloat16 on a GPU, float32 on a CPU."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    hidden = torch.randn(tokens, width, device=device).to(dtype).requires_grad_()
    return hidden, (torch.randn(vocabulary, width, device=device) / width**0.5).to(dtype)


def pair(targets: torch.Tensor, softcap: float | None) -> tuple[Loss, Loss]:
    """The op, and torch with all logits."""

    def mine(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(hidden, weight, targets, softcap=softcap).total

    def theirs(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return cross_entropy(logits(hidden, weight, softcap), targets, reduction="sum")

    return mine, theirs


def logits(hidden: torch.Tensor, weight: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """All of them, in float32."""
    z = linear(hidden, weight).float()
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def job(kind: str, hidden: torch.Tensor, weight: torch.Tensor, mine: Loss, theirs: Loss) -> Job:
    """Loss and gradients in what wants one; the matrix is read for each product, or its gradient written."""
    wanted = tuple(t for t in (hidden, weight) if t.requires_grad)
    products = 1 + len(wanted)
    tokens, width, vocabulary = *hidden.shape, len(weight)

    def run(loss: Loss) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(hidden, weight), wanted)

    dtype = str(hidden.dtype).removeprefix("torch.")
    return Job(
        label=" ".join(filter(None, (f"{tokens}x{width}x{vocabulary} {dtype}", kind))),
        call=run(mine),
        moved=products * weight.nbytes + 2 * hidden.nbytes,
        flops=2 * products * tokens * width * vocabulary,
        bound="matmul",
        dtype=hidden.dtype,
        peer_name="torch with all logits",
        peer=run(theirs),
    )
