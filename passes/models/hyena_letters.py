"""HyenaDNA's letters as tokens. Its checkpoints bring a tokenizer that is code, which is never run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SPECIAL = ("[CLS]", "[SEP]", "[BOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]")
LETTERS = ("A", "C", "G", "T", "N")


def letters_of(folder: Path) -> tuple[str, ...] | None:
    """The letters that the tokenizer of a checkpoint knows; None where it is not HyenaDNA's, or is a file."""
    try:
        stated = json.loads((folder / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(stated, dict) or stated.get("tokenizer_class") != "HyenaDNATokenizer":
        return None
    if (folder / "tokenizer.json").exists():
        return None
    named = stated.get("characters", LETTERS)
    known = isinstance(named, Sequence) and all(isinstance(one, str) and len(one) == 1 for one in named)
    return tuple(named) if known else None


def letters_tokenizer(letters: Sequence[str] = LETTERS) -> Any:
    """A transformers tokenizer: seven special tokens, then the letters, which small ones count as; no white space."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    numbers = {name: place for place, name in enumerate((*SPECIAL, *letters))}
    made = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))
    small = [normalizers.Replace(one.lower(), one) for one in letters if one.lower() not in numbers]
    made.normalizer = normalizers.Sequence([normalizers.Replace(Regex(r"\s"), ""), *small])
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made.decoder = decoders.Fuse()
    made.post_processor = processors.TemplateProcessing(single="$A [SEP]", special_tokens=[("[SEP]", 1)])
    names = {"bos_token": "[BOS]", "eos_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    # a model reads what stands last, and so is padded on the left
    return PreTrainedTokenizerFast(tokenizer_object=made, padding_side="left", cls_token="[CLS]", **names)
