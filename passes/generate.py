"""Text from a model, as it comes, and how fast it comes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewright.formats.checkpoint import Checkpoint
from rewright.passes import calibration
from rewright.passes.errors import BoundError, InputError
from rewright.passes.machine import peak_resident, prepare, usable_cpus
from rewright.passes.scoring import Scorer, open_scorer

# What a model whose speed depends on its text reads before it is timed.
WORDS = (
    "Once upon a time there was a little girl who lived near the sea. Every morning she went down to the water and"
    " looked for shells. One day she found a big red one, and her brother asked if he could hold it. "
)

if TYPE_CHECKING:
    import torch


def _pick(logits: torch.Tensor, temperature: float, top_p: float, draws: torch.Generator) -> int:
    """The next token: the likeliest at temperature 0, else a draw from the smallest set that holds `top_p`."""
    import torch

    if not bool(torch.isfinite(logits).any()) or bool(torch.isnan(logits).any()):
        raise BoundError("the model's logits are not numbers", hint="try `--dtype f32`")
    if temperature == 0:
        return int(logits.argmax())
    # the likeliest has the exponent 0 at any temperature
    warm = (logits.double() - logits.max().double()) / temperature
    ordered, index = torch.softmax(warm, dim=-1).sort(descending=True, stable=True)
    held = ordered.cumsum(0) - ordered < top_p
    held[0] = True
    return int(index[torch.multinomial(ordered * held, 1, generator=draws)])


def tokens_after(
    scorer: Scorer, prompt: list[int], most: int, temperature: float, top_p: float, seed: int
) -> Iterator[int]:
    """Token ids after a prompt, one forward each, with a key-value cache."""
    import torch

    from rewright.passes.models.running import last_only, new_cache

    draws = torch.Generator().manual_seed(seed)
    rows, kept = torch.tensor([prompt], device=scorer.device), {**new_cache(scorer.model), **last_only(scorer.model)}
    for _ in range(most):
        with torch.inference_mode():
            output = scorer.model(input_ids=rows, use_cache=True, **kept)
        token = _pick(output.logits[0, -1].float().cpu(), temperature, top_p, draws)
        if token in scorer.ends:
            return
        yield token
        rows = torch.tensor([[token]], device=scorer.device)


def generate(
    path: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    learned: bool = True,
    device: str = "auto",
    dtype: str = "auto",
    threads: int | None = None,
) -> Iterator[str]:
    """Pieces of text that follow the prompt, with the `learned` one in front where one is attached.

    Raises InputError when prompt and text are past the model's positions.
    """
    prepare(threads or usable_cpus())
    scorer = open_scorer(path, device, dtype, brief=True, prompt=learned)
    start = calibration.start_tokens(scorer.tokenizer)
    begin = start + calibration.encode(scorer.tokenizer, prompt, scorer.rows)
    if not begin:
        raise InputError("the prompt is empty, and the tokenizer has no start token", hint="give a prompt")
    if scorer.positions and len(begin) + max_new_tokens > scorer.positions:
        left = f"the model's {scorer.positions} positions"
        if scorer.prompt is not None:
            left = f"the {scorer.positions} positions that the learned prompt leaves"
        raise InputError(
            f"{len(begin)} tokens of prompt and {max_new_tokens} new ones are past {left}",
            hint=f"use `--max-new-tokens {max(1, scorer.positions - len(begin))}` at most",
        )
    made: list[int] = []
    shown = _decode(scorer, begin)
    for token in tokens_after(scorer, begin, max_new_tokens, temperature, top_p, seed):
        made.append(token)
        text = _decode(scorer, begin + made)
        # a character whose bytes are still coming decodes to a stand-in
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    text = _decode(scorer, begin + made)
    if len(text) > len(shown):
        yield text[len(shown) :]


def _decode(scorer: Scorer, tokens: list[int]) -> str:
    text: str = scorer.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def bench(
    path: str | Path,
    *,
    prompt_tokens: int = 64,
    new_tokens: int = 64,
    device: str = "auto",
    dtype: str = "auto",
    threads: int | None = None,
) -> dict[str, Any]:
    """Tokens a second of reading a prompt and of writing on, greedily, one row; bytes of weights, of reading, at most.

    Where predictors of sparsity are attached, the same model writes on densely in turns with that, after a prompt of
    words. `bytes_read_per_token` is what one token's decoding reads, were it dense: the weights, but of a table only
    the row it looks up and of experts those it goes to, and the keys and values of the tokens before it, as many as
    there are half-way.
    `peak_over_idle_bytes` is the growth of the process's peak over what it held before it opened the checkpoint.
    """
    import torch

    from rewright.passes.loading import import_model
    from rewright.passes.models import running
    from rewright.passes.models.sparse import flow_of

    prepare(threads or usable_cpus())
    import_model(Checkpoint.open(path))
    idle = peak_resident()
    scorer = open_scorer(path, device, dtype, brief=True, prompt=False)
    limit = scorer.positions or prompt_tokens + new_tokens
    prompt_tokens = min(prompt_tokens, limit - 1)
    new_tokens = min(new_tokens, limit - prompt_tokens)
    flow, dense = flow_of(scorer.model), []
    prompt = [(7 * place) % scorer.rows for place in range(prompt_tokens)]
    if flow is not None:
        # which neurons are on has to be as it is in a text
        words = calibration.encode(scorer.tokenizer, WORDS, scorer.rows)
        prompt = (words * -(-prompt_tokens // len(words)))[:prompt_tokens]
    rounds = []
    for _ in range(4):
        rounds.append(greedy(scorer.model, prompt, new_tokens))
        if flow is not None:
            with flow.rests():
                dense.append(greedy(scorer.model, prompt, new_tokens)[1])
    # the first round warms up
    rounds = rounds[1:]
    prefill, decode = (sorted(column)[1] for column in list(zip(*rounds, strict=True))[:2])
    beside = {"dense_decode_tokens_per_second": new_tokens / sorted(dense[1:])[1]} if dense else {}
    cached = round(rounds[0][2] * (prompt_tokens + new_tokens / 2) / (prompt_tokens + new_tokens))
    peak = peak_resident()
    return {
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "prefill_tokens_per_second": prompt_tokens / prefill,
        "decode_tokens_per_second": new_tokens / decode,
        **beside,
        "weight_bytes": running.weight_bytes(scorer.model),
        "bytes_read_per_token": running.read_bytes(scorer.model) + cached,
        "peak_resident_bytes": peak,
        "peak_over_idle_bytes": peak - idle,
        "peak_device_bytes": torch.cuda.max_memory_allocated(scorer.device) if scorer.device.type == "cuda" else None,
        "device": str(scorer.device),
        "dtype": str(scorer.model.dtype).removeprefix("torch."),
    }


def greedy(
    model: Any, prompt: list[int], new_tokens: int, seconds: Callable[[], float] = time.perf_counter
) -> tuple[float, float, int]:
    """Seconds in which any transformers model reads a prompt and writes so many tokens after it; bytes of its cache."""
    import torch

    from rewright.passes.models.running import cache_bytes, last_only, new_cache

    def clock() -> float:
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        return seconds()

    rows = torch.tensor([prompt], device=model.device)
    with torch.inference_mode():
        started = clock()
        cache = new_cache(model)
        kept = {**cache, **last_only(model)}
        output = model(input_ids=rows, use_cache=True, **kept)
        read = clock()
        for _ in range(new_tokens):
            rows = output.logits[:, -1:].argmax(-1)
            output = model(input_ids=rows, use_cache=True, **kept)
        return read - started, clock() - read, sum(map(cache_bytes, cache.values()))
