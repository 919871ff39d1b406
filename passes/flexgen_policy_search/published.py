"""The published cost model: the equations of the paper and of its released script, kept for comparison.

FlexGen, arXiv:2303.06865, section 4.3 and appendix A.3. A layer's times and memory are affine in nine shares: weights,
keys and values, and hidden states on GPU, host and disk. `paper` lets all five resources overlap; `released`, as the
script has it, lets copies to the GPU and from the disk follow each other, and decoding wait for its weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from rewright.passes.errors import UsageError
from rewright.passes.flexgen_policy_search.machine import Published
from rewright.passes.flexgen_policy_search.roofline import Array, Work
from rewright.passes.flexgen_policy_search.shape import Model

Law = Literal["paper", "released"]
# The shares, in order: weights, keys and values, hidden states, each on GPU, host and disk.
SHARES = ("wg", "wc", "wd", "cg", "cc", "cd", "hg", "hc", "hd")
NAMES = ("ctog", "gtoc", "dtoc", "ctod", "comp")
# Part of the disk's rate that weights get in decoding, in the script alone.
WEIGHT_READ = 0.95


@dataclass(frozen=True, slots=True)
class Shape:
    """What the equations know of a model: layers, width, width of the feed-forward part, heads."""

    layers: int
    hidden: int
    ffn: int
    heads: int

    @property
    def weights(self) -> int:
        """Bytes of a layer's weights at 16 bits."""
        return 8 * self.hidden**2 + 4 * self.hidden * self.ffn


def shape_of(model: Model) -> Shape:
    """The shape of a model that the equations hold for. Raises UsageError for any other."""
    kinds = {cache.kind for cache in model.caches}
    if kinds != {"full"} or model.experts or len(set(model.caches)) > 1:
        raise UsageError(
            "the published equations know dense layers of full attention, all alike, and nothing else",
            hint="leave out `--cost-model`",
        )
    return Shape(model.layers, model.hidden, model.ffn, model.heads)


Row = tuple[dict[str, Array], Array]


@dataclass(frozen=True, slots=True)
class Equations:
    """The equations for pairs of GPU batch and number of batches: rows of coefficients by share, and constants."""

    shape: Shape
    constants: Published
    work: Work
    law: Law
    gbs: Array
    nb: Array

    @property
    def block(self) -> Array:
        return self.gbs * self.nb

    def prefill(self) -> dict[str, Row]:
        """Seconds of each resource for a layer and the block's prompts."""
        k, m, s, block = self.constants, self.shape, self.work.prompt, self.block
        weights, hidden = m.weights * np.ones_like(block), 2.0 * s * m.hidden * block
        cache = 4.0 * (s + 1) * m.hidden * block
        linear = block * (8.0 * s * m.hidden**2 + 4.0 * s * m.hidden * m.ffn) / k.mm_p
        if k.hbm is not None:
            linear = np.maximum(linear, self.nb * m.weights / k.hbm)
        return {
            "ctog": _row(wc=weights / k.ctog, wd=weights / k.ctog, hc=hidden / k.ctog, hd=hidden / k.ctog),
            "gtoc": _row(
                cc=cache / k.gtoc_cache,
                cd=cache / k.gtoc_cache,
                hc=hidden / k.gtoc_hidden,
                hd=hidden / k.gtoc_hidden,
            ),
            "dtoc": _row(wd=weights / k.dtoc, hd=hidden / k.dtoc),
            "ctod": _row(cd=cache / k.ctod_cache_p, hd=hidden / k.ctod_hidden_p),
            "comp": _row(linear + 4.0 * block * s**2 * m.hidden / k.bmm_p),
        }

    def decode(self) -> dict[str, Row]:
        """Seconds of each resource for a layer and a token of every sequence of the block."""
        k, m, block = self.constants, self.shape, self.block
        weights, hidden = m.weights * np.ones_like(block), 2.0 * m.hidden * block
        read = 4.0 * block * (self.work.prompt + self.work.generate / 2) * m.hidden
        linear = block * (8.0 * m.hidden**2 + 4.0 * m.hidden * m.ffn) / k.mm_g
        if k.hbm is not None:
            linear = np.maximum(linear, self.nb * m.weights / k.hbm)
        cpu = self._cpu()
        disk = k.dtoc * (WEIGHT_READ if self.law == "released" else 1.0)
        new = 4.0 * block * m.hidden
        return {
            "ctog": _row(wc=weights / k.ctog, wd=weights / k.ctog, hc=hidden / k.ctog, hd=hidden / k.ctog),
            "gtoc": _row(hc=hidden / k.gtoc_hidden, hd=hidden / k.gtoc_hidden),
            "dtoc": _row(cd=read / k.dtoc, hd=hidden / k.dtoc, wd=weights / disk),
            "ctod": _row(cd=new / k.ctod_g, hd=hidden / k.ctod_g),
            "comp": _row(linear, cg=read / k.bmm_g, cc=read / cpu, cd=read / cpu),
        }

    def _cpu(self) -> Array:
        """The rate of attention on the CPU: slower, in the script, the smaller batch and width are."""
        k, ones = self.constants, np.ones_like(self.gbs)
        if self.law == "paper":
            return k.cpu * ones
        a = np.maximum(0.0, np.log2(64 / self.gbs))
        b = max(0.0, float(np.log2(4096 / self.shape.hidden)))
        return np.asarray(k.cpu * np.maximum(0.1, 1 + k.c1 * a * b - k.c2 * a - k.c3 * b))

    def waits(self) -> tuple[list[Row], list[Row]]:
        """What a layer takes at least, in prefill and in decoding: sums of the resources that do not overlap."""
        before, after = self.prefill(), self.decode()
        if self.law == "paper":
            return list(before.values()), list(after.values())
        first = [_sum(before["ctog"], before["dtoc"]), _sum(before["gtoc"], before["ctod"]), before["comp"]]
        return first, [_sum(after["ctog"], after[name]) for name in NAMES[1:]]

    def memory(self) -> list[tuple[str, Row]]:
        """Bytes of a tier that are held, by tier; every row of it must fit."""
        m, work, gbs, block = self.shape, self.work, self.gbs, self.block
        s, h, n = work.prompt, m.hidden, work.context
        weights, ones = float(m.weights), np.ones_like(gbs)
        every = weights * m.layers * ones
        cache = 4.0 * n * h * block * m.layers
        rows: list[tuple[str, Row]] = []
        for tokens in (s, 1):
            home = _row(wg=every, hg=2.0 * tokens * h * block, cg=cache)
            buffers = _row(2 * weights + 2.0 * tokens * h * gbs, wg=-2 * weights * ones, hg=-2.0 * tokens * h * gbs)
            rows += [("gpu", _sum(home, _sum(buffers, part))) for part in self._stages(tokens)]
        early = 4.0 * (s if self.law == "released" else n) * h * block * m.layers
        rows.append(
            (
                "cpu",
                _row(
                    weights + 2.0 * s * h * gbs,
                    wc=every,
                    wg=-weights * ones,
                    hc=2.0 * s * h * block,
                    hg=-2.0 * s * h * gbs,
                    cc=early,
                ),
            )
        )
        rows.append(
            (
                "cpu",
                _row(
                    2.0 * m.heads * n * gbs + 2.0 * h * gbs,
                    wc=every,
                    wd=weights * ones,
                    hc=2.0 * h * block,
                    hd=4.0 * h * gbs,
                    cc=cache,
                    cd=8.0 * n * h * gbs,
                ),
            )
        )
        rows.append(("disk", _row(wd=every, hd=2.0 * s * h * block, cd=cache)))
        return rows

    def _stages(self, tokens: int) -> list[Row]:
        """What a layer's own work holds on the GPU: the largest stage in the paper, their sum in the script."""
        m, gbs, nh, h, f = self.shape, self.gbs, self.shape.heads, self.shape.hidden, self.shape.ffn
        if tokens > 1 or self.law == "paper":
            n = tokens if tokens > 1 else self.work.context
            if self.law == "released":
                part = 8 * tokens * h + 2 * tokens * h + 2 * nh * tokens**2 + 2 * tokens * h
                return [_row(gbs * (part + 4.0 * tokens * h + 2.0 * tokens * f + 2 * tokens * h))]
            seen = 4.0 * tokens * h + 2.0 * nh * tokens**2 if tokens > 1 else 4.0 * n * h + 2.0 * nh * n
            return [
                _row(8.0 * gbs * tokens * h),
                _row(cg=gbs * seen),
                _row(4.0 * gbs * tokens * h),
                _row(2.0 * gbs * tokens * (h + f)),
            ]
        n = self.work.context
        held = 4.0 * gbs * n * h
        first = gbs * (2.0 * h + 2 * n * h + 2 * m.heads * n)
        second = gbs * (2.0 * n * h + 2 * h)
        return [_row(gbs * (8.0 * h + 4 * h + 2 * f + 2 * h), cg=held + first + second)]


def _row(constant: Array | float = 0.0, **parts: Array) -> Row:
    return dict(parts), np.asarray(constant, dtype=np.float64)


def _sum(one: Row, other: Row) -> Row:
    zero = np.zeros(1)
    return {k: one[0].get(k, zero) + other[0].get(k, zero) for k in (*one[0], *other[0])}, one[1] + other[1]


def value(row: Row, shares: dict[str, Array]) -> Array:
    """A row at given shares."""
    total = row[1]
    for name, part in row[0].items():
        total = total + part * shares[name]
    return np.asarray(total)


def seconds(equations: Equations, shares: dict[str, Array]) -> tuple[Array, Array]:
    """Prefill and decoding of a block, over all layers and tokens."""
    first, second = equations.waits()
    layers, steps = equations.shape.layers, equations.work.generate - 1
    before = np.max(np.broadcast_arrays(*(value(row, shares) for row in first)), axis=0)
    after = np.max(np.broadcast_arrays(*(value(row, shares) for row in second)), axis=0)
    return np.asarray(before * layers), np.asarray(after * layers * steps)
