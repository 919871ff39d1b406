"""`hyena_filter` beside the layers of the network one after the other."""

from __future__ import annotations

import torch

from rewright.kernels.hyena_filter import hyena_filter
from tests.bench.harness import Job

Network = tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], list[torch.Tensor], list[torch.Tensor], torch.Tensor]
# Positions, features and channels, all with three layers of 64.
SIZES = {"cpu": ((1024, 5, 128), (16384, 5, 128)), "cuda": ((160_000, 5, 256), (8192, 33, 4096))}


def jobs(device: str) -> list[Job]:
    """The filters of a layer."""
    return [_job(*size, device) for size in SIZES[device]]


def network(length: int, inputs: int, channels: int, device: str) -> Network:
    """What `hyena_filter` takes, as HyenaDNA starts it."""
    shapes = ((64, inputs), (64, 64), (64, 64), (channels, 64))
    return (
        torch.randn(length, inputs, device=device),
        torch.linspace(0, 1, length, device=device),
        [torch.randn(*shape, device=device) / shape[1] ** 0.5 for shape in shapes],
        [torch.randn(64, device=device) for _ in range(3)],
        [torch.full((64,), 10.0, device=device)] * 3,
        torch.linspace(3.07, 15.35, channels, device=device),
    )


def _job(length: int, inputs: int, channels: int, device: str) -> Job:
    given = network(length, inputs, channels, device)
    return Job(
        label=f"{length}x{inputs} to {channels}",
        call=lambda: hyena_filter(*given),
        moved=4 * length * (channels + inputs),
        flops=2 * length * 64 * (inputs + 2 * 64 + channels),
        bound="matmul",
        dtype=torch.float32,
        peer_name="torch, layer by layer",
        peer=lambda: eager(*given),
    )


def eager(
    features: torch.Tensor,
    times: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor],
    frequencies: list[torch.Tensor],
    deltas: torch.Tensor,
) -> torch.Tensor:
    """h [D, L] with every layer's activations of all positions."""
    x = features
    for weight, bias, frequency in zip(weights, biases, frequencies, strict=False):
        x = torch.sin(frequency * torch.nn.functional.linear(x, weight, bias))
    return ((x @ weights[-1].t()) * torch.exp(-times[:, None] * deltas.abs())).t().contiguous()
