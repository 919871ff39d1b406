"""What a prompt is before it learns."""

from __future__ import annotations

from typing import Any

import torch

from rewright.formats.checkpoint import Checkpoint
from rewright.formats.peft import Base, Heads, read_adapter
from rewright.passes import calibration, soft_prompt
from rewright.passes.context import Context
from rewright.passes.errors import InputError
from rewright.passes.loading import Assembly, load_tokenizer
from rewright.passes.models.prompted import Front, keys_and_values
from rewright.passes.prompt.data import Data
from rewright.passes.prompt.spec import OTHERS, PromptOptions, tokens_of


def begin(
    context: Context, options: PromptOptions, base: Base, source: Checkpoint, model: Any, tokenizer: Any, data: Data
) -> Front:
    """The prompt of step 0, float32. Raises InputError.

    Keys and values for every layer begin as what the model makes of embeddings.
    """
    if options.init.file is not None:
        found = learned(context, options, base, source)
    else:
        found = Front(_embeddings(context, options, base, model.get_input_embeddings(), tokenizer, data))
    if options.depth == "all" and found.depth == "input":
        return Front(keys_and_values(model, found.tensor), "all")
    return found


def _embeddings(
    context: Context, options: PromptOptions, base: Base, table: Any, tokenizer: Any, data: Data
) -> torch.Tensor:
    """(tokens, width) float32."""
    count = tokens_of(options)
    draws = torch.Generator().manual_seed(context.seed)
    if options.init.word == "random":
        return torch.randn(count, base.width, generator=draws) * scale_of(table.weight) * factor_of(table)
    if options.init_text is not None:
        ids = words(options, tokenizer, base.rows)
    else:
        # what the text has, in the order that it has it in or in none
        ids = [token for window in data.train for token in window.tokens]
    if options.init.word == "vocab":
        ids = [ids[place] for place in torch.randint(len(ids), (count,), generator=draws).tolist()]
    ids = (ids * (count // len(ids) + 1))[:count]
    found: torch.Tensor = table(torch.tensor(ids, device=table.weight.device))
    return found.float().cpu()


def words(options: PromptOptions, tokenizer: Any, rows: int) -> list[int]:
    """The tokens of `--init-text`. Raises InputError where there are none."""
    assert options.init_text is not None
    ids = calibration.encode(tokenizer, options.init_text, rows)
    if not ids:
        raise InputError("`--init-text` has no token")
    return ids


def hard(options: PromptOptions, source: Checkpoint, base: Base) -> Front:
    """The embeddings of `--init-text`, as they are. Raises InputError."""
    ids = words(options, load_tokenizer(source), base.rows)
    count = options.tokens or len(ids)
    name = soft_prompt.table_of(source)
    rows = torch.cat([source.read_rows(name, one, one + 1) for one in (ids * (count // len(ids) + 1))[:count]])
    whole = Assembly(source, rows.dtype, torch.device("cpu")).model
    return Front((rows * torch.tensor(factor_of(whole.get_input_embeddings()), dtype=rows.dtype)).float())


def learned(context: Context, options: PromptOptions, base: Base, source: Checkpoint) -> Front:
    """The prompt of `--init FILE`. Raises InputError when it was learned on another model, and that is not allowed."""
    assert options.init.file is not None
    adapter = read_adapter(options.init.file)
    for difference in soft_prompt.check(adapter, base, source):
        if not options.any_base:
            raise InputError(
                f"the prompt `{options.init}` was learned on another model: {difference}",
                hint=OTHERS,
            )
        context.reporter.warn(f"the prompt `{options.init}` was learned on another model: {difference}")
    if adapter.base is None:
        context.reporter.warn(f"`{options.init}` does not say what it was learned on: only its width was compared")
    return Front(soft_prompt.load(adapter), adapter.depth)


def columns(front: Front, model: Any, table: torch.Tensor) -> dict[str, tuple[slice, float]]:
    """The parts of a prompt that learn at a rate of their own: columns, and their scale, a root mean square."""
    if front.depth == "input":
        scale = scale_of(table) * factor_of(model.get_input_embeddings())
        return {"prompt": (slice(0, front.tensor.shape[1]), scale)}
    heads = Heads.of(model.config.to_dict())
    width, found = heads.count * heads.width, {}
    for part in range(2 * heads.layers):
        place = slice(part * width, (part + 1) * width)
        kind = "values" if part % 2 else "keys"
        found[f"layer {part // 2} {kind}"] = (place, scale_of(front.tensor[:, place]))
    return found


def factor_of(table: Any) -> float:
    """What a module of embeddings multiplies its rows by, as Gemma's do; 1 for any other."""
    return float(getattr(table, "scalar_embed_scale", 1.0))


def scale_of(table: torch.Tensor) -> float:
    """The root mean square of an embedding."""
    return max(float(table.float().square().mean().sqrt()), 1e-8)
