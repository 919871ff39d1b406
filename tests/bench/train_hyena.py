"""Small Hyena models to distil: `python -m tests.bench.train_hyena hyena|multihyena|hyenadna FILE --out FOLDER`.

A text becomes bytes, a FASTA file its letters as HyenaDNA numbers them. The last twentieth of the file is held out:
its mean loss in nats is printed, and with `--held-out` the part is written, to score the model on again. The same
seed, steps and threads give the same weights; `--minutes` may end the training sooner. The folder is a checkpoint as
`rewright` reads it, with a tokenizer.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from rewright.passes.loading import register
from rewright.passes.models.hyena_letters import LETTERS, SPECIAL, letters_tokenizer

START = "<|endoftext|>"
# HyenaDNA's numbers: seven for what is no letter, then the letters.
DNA = {name: place for place, name in enumerate((*SPECIAL, *LETTERS))}
SHAPES: dict[str, dict[str, Any]] = {
    "hyena": {"activation_freq": 14, "emb_dim": 33},
    "multihyena": {"activation_freq": 14, "emb_dim": 33, "num_heads": 16},
    "hyenadna": {"activation_freq": 10, "emb_dim": 5},
}


def text_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, each with its own value as id, and 256 in front of a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    names = {**{chr(byte): byte for byte in printable}, **{chr(256 + n): byte for n, byte in enumerate(others)}}
    assert sorted(names) == letters
    made = Tokenizer(models.BPE(vocab={**names, START: 256}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([START])
    made.post_processor = processors.TemplateProcessing(single=f"{START} $A", special_tokens=[(START, 256)])
    names = dict.fromkeys(("bos_token", "eos_token", "pad_token"), START)
    return PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False, **names)


def read(kind: str, path: Path) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Tokens to learn from and tokens held out, and the text of these."""
    text = path.read_text()
    if kind == "hyenadna":
        text = "".join(line.strip() for line in text.splitlines() if not line.startswith(">")).upper()
        tokens = torch.tensor([DNA.get(letter, DNA["[UNK]"]) for letter in text])
        cut = len(text) - len(text) // 20
        return tokens[:cut], tokens[cut:], text[cut:]
    stories = [story.strip() for story in text.split(START) if story.strip()]
    parts = [torch.tensor([256, *story.encode()]) for story in stories]
    sizes = torch.tensor([len(part) for part in parts]).cumsum(0)
    if len(parts) == 1:
        cut = int(sizes[-1]) * 19 // 20
        return (
            parts[0][:cut],
            torch.cat([parts[0][:1], parts[0][cut:]]),
            stories[0].encode()[cut:].decode(errors="ignore"),
        )
    cut = min(int((sizes < sizes[-1] * 19 // 20).sum()), len(parts) - 1)
    return torch.cat(parts[:cut]), torch.cat(parts[cut:]), f"\n{START}\n".join(stories[cut:])


def config_of(given: argparse.Namespace) -> Any:
    """The config of the model to train."""
    shape = {**SHAPES[given.kind], "d_model": given.width, "n_layer": given.layers, "max_seq_len": given.length}
    if given.kind == "hyenadna":
        shape |= {"vocab_size": len(DNA), "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 4}
    else:
        shape |= {"vocab_size": 257, "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256}
        shape["tie_word_embeddings"] = True
    if given.frequency is not None:
        shape["activation_freq"] = given.frequency
    if given.heads is not None:
        shape["num_heads"] = given.heads
    return AutoConfig.for_model(given.kind, **shape)


def groups_of(model: torch.nn.Module) -> list[dict[str, Any]]:
    """What decays towards zero, and what does not: vectors, and the networks that make the filters."""
    kept, decayed = [], []
    for name, parameter in model.named_parameters():
        (decayed if parameter.dim() == 2 and "filter_fn" not in name else kept).append(parameter)
    return [{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}]


@torch.no_grad()
def held_out_loss(model: Any, tokens: torch.Tensor, length: int, most: int) -> float:
    """Mean loss in nats over the first windows of held-out tokens."""
    model.eval()
    count = max(1, min(most, (len(tokens) - 1) // length))
    losses = []
    for window in range(count):
        part = tokens[window * length : window * length + length + 1][None]
        logits = model(input_ids=part[:, :-1], use_cache=False).logits
        losses.append(torch.nn.functional.cross_entropy(logits[0], part[0, 1:]))
    model.train()
    return float(torch.stack(losses).mean())


def train(given: argparse.Namespace, tokens: torch.Tensor, held: torch.Tensor) -> tuple[Any, dict[str, Any]]:
    """The trained model and what was measured."""
    torch.manual_seed(given.seed)
    model = AutoModelForCausalLM.from_config(config_of(given)).train()
    optimiser = torch.optim.AdamW(groups_of(model), lr=given.rate, betas=(0.9, 0.98))
    draws = torch.Generator().manual_seed(given.seed)
    started, step, recent = time.perf_counter(), 0, 0.0
    budget = 60 * given.minutes if given.minutes else math.inf
    for step in range(1, given.steps + 1):
        used = time.perf_counter() - started
        # the schedule ends with whichever comes first
        share = min(1.0, max(step / given.steps, used / budget))
        optimiser.param_groups[0]["lr"] = optimiser.param_groups[1]["lr"] = (
            given.rate * min(1.0, step / 50) * (0.05 + 0.475 * (1 + math.cos(math.pi * share)))
        )
        first = torch.randint(len(tokens) - given.length, (given.batch,), generator=draws)
        rows = tokens[first[:, None] + torch.arange(given.length + 1)]
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        recent = float(loss.detach()) if step == 1 else 0.95 * recent + 0.05 * float(loss.detach())
        if step % 50 == 0:
            print(f"step {step}: loss {recent:.4f}, {used:.0f} s", file=sys.stderr, flush=True)
        if time.perf_counter() - started > budget:
            break
    return model, {
        "kind": given.kind,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": step,
        "seconds": round(time.perf_counter() - started, 1),
        "tokens": step * given.batch * given.length,
        "training_loss": recent,
        "held_out_loss": held_out_loss(model, held, given.length, 64),
    }


def write(given: argparse.Namespace, model: Any) -> None:
    """The checkpoint with its tokenizer."""
    model.eval().save_pretrained(given.out)
    tokenizer = letters_tokenizer() if given.kind == "hyenadna" else text_tokenizer()
    tokenizer.save_pretrained(given.out)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.train_hyena", description=(__doc__ or "").split(":")[0]
    )
    parser.add_argument("kind", choices=SHAPES)
    parser.add_argument("file", type=Path, help="a text, or for hyenadna a FASTA file")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, help="where to write the text that was held out")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--minutes", type=float, default=0.0, help="stop after so many (0: never)")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--length", type=int, default=1024, help="positions of the filters, and tokens of a row")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--heads", type=int, help="of multihyena (16)")
    parser.add_argument("--frequency", type=float, help="where the frequencies of the filters' sines start")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    register()
    tokens, held, text = read(given.kind, given.file)
    if len(tokens) <= given.length:
        parser.error(f"`{given.file}` has {len(tokens)} tokens to learn from, fewer than a row")
    model, facts = train(given, tokens, held)
    write(given, model)
    if given.held_out is not None:
        given.held_out.write_text(text)
    print(json.dumps(facts, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
