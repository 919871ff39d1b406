"""What a prompt is before it learns."""

from __future__ import annotations

from typing import Any

import torch

from rewright.formats.peft import Base, read_adapter
from rewright.passes import calibration, soft_prompt
from rewright.passes.context import Context
from rewright.passes.errors import InputError
from rewright.passes.prompt.data import Data
from rewright.passes.prompt.spec import PromptOptions, tokens_of


def begin(
    context: Context, options: PromptOptions, base: Base, where: str, table: torch.Tensor, tokenizer: Any, data: Data
) -> torch.Tensor:
    """The prompt (tokens, width) float32 of step 0, from the embedding `table` (rows, width). Raises InputError."""
    if options.init.file is not None:
        return learned(context, options, base, where)
    count = tokens_of(options)
    draws = torch.Generator().manual_seed(context.seed)
    if options.init.word == "random":
        return torch.randn(count, base.width, generator=draws) * scale_of(table)
    if options.init.word == "text":
        assert options.init_text is not None
        ids = calibration.encode(tokenizer, options.init_text, base.rows)
        if not ids:
            raise InputError("`--init-text` has no token")
        ids = (ids * (count // len(ids) + 1))[:count]
    else:
        # tokens as often as the text has them, which the model knows well
        seen = torch.tensor([token for window in data.train for token in window.tokens[-window.scored :]])
        ids = seen[torch.randint(len(seen), (count,), generator=draws)].tolist()
    return table[torch.tensor(ids, device=table.device)].float().cpu()


def learned(context: Context, options: PromptOptions, base: Base, where: str) -> torch.Tensor:
    """The prompt of `--init FILE`. Raises InputError when it was learned on another model, and that is not allowed."""
    assert options.init.file is not None
    adapter = read_adapter(options.init.file)
    for difference in soft_prompt.check(adapter, base, where):
        if not options.any_base:
            raise InputError(
                f"the prompt `{options.init}` was learned on another model: {difference}",
                hint="add `--any-base` to take it all the same",
            )
        context.reporter.warn(f"the prompt `{options.init}` was learned on another model: {difference}")
    if adapter.base is None:
        context.reporter.warn(f"`{options.init}` does not say what it was learned on: only its width was compared")
    return soft_prompt.load(adapter)


def scale_of(table: torch.Tensor) -> float:
    """The root mean square of an embedding."""
    return max(float(table.float().square().mean().sqrt()), 1e-8)
