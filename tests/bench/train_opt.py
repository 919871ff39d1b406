"""Small OPT models with ReLU: `python -m tests.bench.train_opt FILE --held-out FILE --out FOLDER`.

Documents are parted by `<|endoftext|>`; one that is held out is never learned from. After the short rows at first, a
row is a document from its start, and others after it until the row is full. Losses are in nats a token, over whole
documents, as far as the positions reach. The density of a layer is the share of its neurons that ReLU lets through on
the held-out documents. The same seed, steps and threads give the same weights. The folder is a checkpoint as `rewright`
reads it, with a tokenizer.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

from tests.bench.training import mean_loss, options, train

DATA = Path(__file__).resolve().parents[1] / "data"
APART = "<|endoftext|>"


def documents_of(path: Path) -> list[str]:
    """The documents of a file."""
    return [document.strip() for document in path.read_text().split(APART) if document.strip()]


def tokenizer_of(path: Path, length: int) -> Any:
    """The tokenizer at `path`, with OPT's padding on a token that no text has."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = tokenizer.unk_token
    tokenizer.model_max_length = length
    return tokenizer


def encoded(tokenizer: Any, documents: list[str]) -> list[torch.Tensor]:
    """Each document's tokens, between the marks of its start and its end."""
    first, last = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    found = tokenizer(documents, add_special_tokens=False, verbose=False).input_ids
    return [torch.tensor(first + tokens + last) for tokens in found]


class Rows:
    """Draws batches of rows [batch, length + 1]: every document once, in an order of chance, then all again.

    The first `short` batches are twice as many rows of half the length, from anywhere in the text: what stands near
    is learned earlier from these.
    """

    def __init__(self, documents: list[torch.Tensor], batch: int, length: int, short: int = 0) -> None:
        self.documents, self.batch, self.length, self.short = documents, batch, length, short
        self.left: list[int] = []
        self.text = torch.cat(documents)

    def __call__(self, draws: torch.Generator) -> torch.Tensor:
        if self.short:
            self.short -= 1
            half = self.length // 2
            first = torch.randint(len(self.text) - half, (2 * self.batch, 1), generator=draws)
            return self.text[first + torch.arange(half + 1)]
        return torch.stack([self._row(draws) for _ in range(self.batch)])

    def _row(self, draws: torch.Generator) -> torch.Tensor:
        parts, size = [], 0
        while size <= self.length:
            if not self.left:
                self.left = torch.randperm(len(self.documents), generator=draws).tolist()
            parts.append(self.documents[self.left.pop()])
            size += len(parts[-1])
        return torch.cat(parts)[: self.length + 1]


def config_of(given: argparse.Namespace, tokenizer: Any) -> OPTConfig:
    """The config of the model to train: norms before, ReLU, tied embeddings, no dropout."""
    return OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=given.width,
        word_embed_proj_dim=given.width,
        num_hidden_layers=given.layers,
        ffn_dim=given.inner,
        num_attention_heads=given.heads,
        max_position_embeddings=given.length,
        do_layer_norm_before=True,
        activation_function="relu",
        dropout=0.0,
        attention_dropout=0.0,
        layerdrop=0.0,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@torch.no_grad()
def densities(model: Any, rows: list[torch.Tensor]) -> list[float]:
    """By layer, the share of neurons above zero after ReLU, over rows [1, tokens]."""
    layers = model.model.decoder.layers
    above, seen = [0] * len(layers), [0] * len(layers)

    def count(layer: int, hidden: torch.Tensor) -> None:
        above[layer] += int((hidden > 0).sum())
        seen[layer] += hidden.numel()

    hooks = [
        layer.fc2.register_forward_pre_hook(lambda _, inputs, place=place: count(place, inputs[0]))
        for place, layer in enumerate(layers)
    ]
    for row in rows:
        model(input_ids=row[:, :-1], use_cache=False)
    for hook in hooks:
        hook.remove()
    return [round(part / whole, 4) for part, whole in zip(above, seen, strict=True)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.train_opt", description=(__doc__ or "").split(":")[0])
    parser.add_argument("file", type=Path, help="a text to learn from")
    parser.add_argument("--held-out", type=Path, required=True, help="a text to score, and to keep out of the training")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, default=DATA / "stories260K")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--inner", type=int, default=512, help="neurons of a layer")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--length", type=int, default=512, help="positions, and tokens of a row")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--start", type=Path, help="a model of the same shape to go on from")
    parser.add_argument("--short", type=int, default=1150, help="steps at first with rows of half the length")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights written")
    parser.add_argument("--keep-every", type=int, default=500, help="steps between checkpoints, each over the last")
    options(parser, rate=3e-3, steps=1500)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    torch.manual_seed(given.seed)
    tokenizer = tokenizer_of(given.tokenizer, given.length)
    held = documents_of(given.held_out)
    learned = [document for document in documents_of(given.file) if document not in set(held)]
    if not learned:
        parser.error(f"`{given.file}` has no document that is not held out")
    documents = encoded(tokenizer, learned)
    rows = [document[None, : given.length + 1] for document in encoded(tokenizer, held)]
    model: Any = OPTForCausalLM(config_of(given, tokenizer))
    if given.start is not None:
        model = OPTForCausalLM.from_pretrained(given.start, dtype=torch.float32)

    def write() -> None:
        model.save_pretrained(given.out)
        tokenizer.save_pretrained(given.out)

    drawn = Rows(documents, given.batch, given.length, given.short)
    facts = train(model, drawn, given, keep=write, keep_every=given.keep_every)
    same = [document[None, : given.length + 1] for document in documents[: len(rows)]]
    model.eval().to(getattr(torch, given.dtype))
    write()
    model.float()
    facts |= {
        "documents": len(documents),
        "passes": round(facts["tokens"] / sum(map(len, documents)), 2),
        "loss_of_learned_documents": mean_loss(model, same),
        "held_out_loss": mean_loss(model, rows),
        "density": densities(model.eval(), rows),
    }
    print(json.dumps(facts, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
