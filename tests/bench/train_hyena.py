"""Small Hyena models to distil: `python -m tests.bench.train_hyena hyena|multihyena|hyenadna FILE --out FOLDER`.

A text becomes bytes, a FASTA file its letters as HyenaDNA numbers them. The last twentieth of the file is held out:
its mean loss in nats is printed, and with `--held-out` the part is written, to score the model on again. The same
seed, steps and threads give the same weights; `--minutes` may end the training sooner. The folder is a checkpoint as
`rewright` reads it, with a tokenizer.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from rewright.passes.loading import register
from rewright.passes.models.hyena_letters import LETTERS, SPECIAL, letters_tokenizer
from tests.bench.training import mean_loss, options, train

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


def windows(tokens: torch.Tensor, length: int, most: int) -> list[torch.Tensor]:
    """The first windows [1, length + 1] of tokens, each from the last token of the one before."""
    count = max(1, min(most, (len(tokens) - 1) // length))
    return [tokens[window * length : window * length + length + 1][None] for window in range(count)]


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
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--length", type=int, default=1024, help="positions of the filters, and tokens of a row")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--heads", type=int, help="of multihyena (16)")
    parser.add_argument("--frequency", type=float, help="where the frequencies of the filters' sines start")
    options(parser, rate=3e-3, steps=3000)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    register()
    tokens, held, text = read(given.kind, given.file)
    if len(tokens) <= given.length:
        parser.error(f"`{given.file}` has {len(tokens)} tokens to learn from, fewer than a row")
    torch.manual_seed(given.seed)
    model = AutoModelForCausalLM.from_config(config_of(given))

    def draw(draws: torch.Generator) -> torch.Tensor:
        first = torch.randint(len(tokens) - given.length, (given.batch,), generator=draws)
        return tokens[first[:, None] + torch.arange(given.length + 1)]

    # networks make the filters: their weights do not decay
    facts = {"kind": given.kind} | train(model, draw, given, kept="filter_fn")
    facts["held_out_loss"] = mean_loss(model, windows(held, given.length, 64))
    write(given, model)
    if given.held_out is not None:
        given.held_out.write_text(text)
    print(json.dumps(facts, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
