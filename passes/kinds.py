"""The part of a model that a tensor belongs to, by its name."""

from __future__ import annotations

import re

KINDS = ("embedding", "attention", "mlp", "experts", "norm", "head", "other")
# Those whose matrices decoder layers consist of.
LAYER_KINDS = ("attention", "mlp", "experts")

# The first that matches a name decides: a norm inside attention is a norm.
_PATTERNS = (
    ("norm", re.compile(r"(^|[._])(norm\w*|\w*layer_?norm|ln_\w+|ln\d?)(\.|$)|_norm\.")),
    ("head", re.compile(r"(^|\.)(lm_head|embed_out|output)\.")),
    ("embedding", re.compile(r"(^|\.)(embed_\w+|embeddings?|w[tp]e|tok_embeddings|word_embeddings)\.")),
    ("attention", re.compile(r"(^|[._])(\w*attn|\w*attention|[qkv]_proj)(\.|$)")),
    ("experts", re.compile(r"(^|\.)experts?(\.|$)")),
    ("mlp", re.compile(r"(^|[._])(mlp|ffn|feed_forward|\w*moe|fc\d?|gate_proj|up_proj|down_proj)(\.|$)")),
)


def kind_of(name: str) -> str:
    """The part of a model that a tensor belongs to, by its name."""
    return next((kind for kind, pattern in _PATTERNS if pattern.search(name)), "other")
