"""`linear_kl` with its gradient beside the same divergence from all logits in plain torch."""

from __future__ import annotations

import torch

from rewright.kernels.linear_kl import linear_kl
from tests.bench.harness import Job
from tests.bench.linear_cross_entropy import SIZES, Loss, head, job, logits

KNOWN = 64


def jobs(device: str) -> list[Job]:
    """A teacher's 64 likeliest tokens of the vocabulary of a small and of a larger model."""
    made = []
    for tokens, width, vocabulary in SIZES[device]:
        hidden, weight = head(tokens, width, vocabulary, device)
        teacher = likeliest(tokens, vocabulary, device)
        made += [job("cap" if cap else "", hidden, weight, *pair(*teacher, cap)) for cap in (None, 30.0)]
    return made


def likeliest(tokens: int, vocabulary: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids and logits of 64 distinct tokens, and what their softmax is divided by: nine tenths are theirs."""
    first = torch.randint(0, vocabulary, (tokens, 1), device=device)
    ids = (first + 251 * torch.arange(KNOWN, device=device)) % vocabulary
    known = torch.randn(tokens, KNOWN, device=device).sort(dim=1, descending=True).values
    return ids.int(), known, known.logsumexp(dim=1) - torch.tensor(0.9).log().item()


def pair(ids: torch.Tensor, known: torch.Tensor, log_sum_exp: torch.Tensor, softcap: float | None) -> tuple[Loss, Loss]:
    """The op, and torch with all logits."""

    def mine(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return linear_kl(hidden, weight, ids, known, log_sum_exp, softcap=softcap).total

    def theirs(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        at = ids.long()
        log_q = logits(hidden, weight, softcap).log_softmax(dim=1)
        log_r = log_q.scatter(1, at, -torch.inf).logsumexp(dim=1)
        log_p = known - log_sum_exp[:, None]
        rest = 1 - log_p.exp().sum(dim=1)
        return (log_p.exp() * (log_p - log_q.gather(1, at))).sum() + (rest * (rest.log() - log_r)).sum()

    return mine, theirs
