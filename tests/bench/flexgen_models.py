"""The headers of large models, as their configs on the hub say them: names, dtypes and shapes, and no weights."""

from __future__ import annotations

from typing import Any

from rewright.passes.spec import Layout

Tensors = dict[str, tuple[str, tuple[int, ...]]]


def _frame(rows: int, hidden: int) -> Tensors:
    return {
        "model.embed_tokens.weight": ("BF16", (rows, hidden)),
        "lm_head.weight": ("BF16", (rows, hidden)),
        "model.norm.weight": ("BF16", (hidden,)),
    }


def _gated(stem: str, hidden: int, ffn: int) -> Tensors:
    return {
        f"{stem}.gate_proj.weight": ("BF16", (ffn, hidden)),
        f"{stem}.up_proj.weight": ("BF16", (ffn, hidden)),
        f"{stem}.down_proj.weight": ("BF16", (hidden, ffn)),
    }


def _attention(stem: str, hidden: int, heads: int, kept: int, width: int) -> Tensors:
    return {
        f"{stem}.q_proj.weight": ("BF16", (heads * width, hidden)),
        f"{stem}.k_proj.weight": ("BF16", (kept * width, hidden)),
        f"{stem}.v_proj.weight": ("BF16", (kept * width, hidden)),
        f"{stem}.o_proj.weight": ("BF16", (hidden, heads * width)),
    }


def llama_70b() -> Layout:
    """Llama 3 70B (arXiv:2407.21783, table 3)."""
    tensors = _frame(128256, 8192)
    for at in range(80):
        stem = f"model.layers.{at}"
        tensors |= _attention(f"{stem}.self_attn", 8192, 64, 8, 128) | _gated(f"{stem}.mlp", 8192, 28672)
        tensors |= {
            f"{stem}.{name}.weight": ("BF16", (8192,)) for name in ("input_layernorm", "post_attention_layernorm")
        }
    config = {"model_type": "llama", "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64}
    config |= {"num_key_value_heads": 8, "vocab_size": 128256, "intermediate_size": 28672}
    return Layout(tensors, {**config, "max_position_embeddings": 8192})


def gemma_27b() -> Layout:
    """Gemma 3 27B's text model (arXiv:2503.19786): five layers with a window, then one without."""
    tensors = _frame(262208, 5376)
    del tensors["lm_head.weight"]
    for at in range(62):
        stem = f"model.layers.{at}"
        tensors |= _attention(f"{stem}.self_attn", 5376, 32, 16, 128) | _gated(f"{stem}.mlp", 5376, 21504)
    config: dict[str, Any] = {"model_type": "gemma3_text", "hidden_size": 5376, "num_hidden_layers": 62}
    config |= {"num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128, "vocab_size": 262208}
    return Layout(tensors, {**config, "sliding_window": 1024, "sliding_window_pattern": 6})


def qwen_235b(layers: int = 94) -> Layout:
    """Qwen3-235B-A22B (arXiv:2505.09388): 94 layers of 128 experts, of which 8 are used."""
    tensors = _frame(151936, 4096)
    for at in range(layers):
        stem = f"model.layers.{at}"
        tensors |= _attention(f"{stem}.self_attn", 4096, 64, 4, 128)
        tensors[f"{stem}.mlp.gate.weight"] = ("BF16", (128, 4096))
        for expert in range(128):
            tensors |= _gated(f"{stem}.mlp.experts.{expert}", 4096, 1536)
    config = {"model_type": "qwen3_moe", "hidden_size": 4096, "num_hidden_layers": layers, "num_attention_heads": 64}
    config |= {"num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936, "num_experts": 128}
    return Layout(tensors, {**config, "num_experts_per_tok": 8, "moe_intermediate_size": 1536})


def deepseek_v3(layers: int = 61) -> Layout:
    """DeepSeek-V3 (arXiv:2412.19437): latent attention, three dense layers, 58 of 256 experts, 8-bit weights."""
    tensors = _frame(129280, 7168)
    for at in range(layers):
        stem, own = f"model.layers.{at}", {}
        shapes = {"q_a_proj": (1536, 7168), "q_b_proj": (24576, 1536), "kv_a_proj_with_mqa": (576, 7168)}
        shapes |= {"kv_b_proj": (32768, 512), "o_proj": (7168, 16384)}
        own |= {f"{stem}.self_attn.{name}": shape for name, shape in shapes.items()}
        places = [("mlp", 18432)] if at < 3 else [("mlp.shared_experts", 2048)]
        places += [(f"mlp.experts.{expert}", 2048) for expert in range(256)] if at >= 3 else []
        for name, ffn in places:
            own |= {f"{stem}.{name}.{part}_proj": (ffn, 7168) for part in ("gate", "up")}
            own[f"{stem}.{name}.down_proj"] = (7168, ffn)
        for module, (rows, columns) in own.items():
            tensors[f"{module}.weight"] = ("F8_E4M3", (rows, columns))
            tensors[f"{module}.weight_scale_inv"] = ("F32", (-(-rows // 128), -(-columns // 128)))
        if at >= 3:
            tensors[f"{stem}.mlp.gate.weight"] = ("BF16", (256, 7168))
    config = {"model_type": "deepseek_v3", "hidden_size": 7168, "num_hidden_layers": layers, "num_attention_heads": 128}
    config |= {"num_key_value_heads": 128, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "vocab_size": 129280}
    return Layout(tensors, {**config, "n_routed_experts": 256, "num_experts_per_tok": 8, "intermediate_size": 18432})


def qwen_next(layers: int = 48) -> Layout:
    """Qwen3-Next-80B-A3B: three layers of gated delta nets, then one of attention, 512 experts of which 10 are used."""
    tensors, kinds = _frame(151936, 2048), []
    for at in range(layers):
        stem = f"model.layers.{at}"
        kinds.append("full_attention" if at % 4 == 3 else "linear_attention")
        if at % 4 == 3:
            tensors |= _attention(f"{stem}.self_attn", 2048, 16, 2, 256)
            tensors[f"{stem}.self_attn.q_proj.weight"] = ("BF16", (2 * 16 * 256, 2048))
        else:
            own = {
                "in_proj_qkvz": (12288, 2048),
                "in_proj_ba": (64, 2048),
                "out_proj": (2048, 4096),
                "conv1d": (8192, 1, 4),
            }
            tensors |= {f"{stem}.linear_attn.{name}.weight": ("BF16", shape) for name, shape in own.items()}
            tensors[f"{stem}.linear_attn.A_log"] = ("BF16", (32,))
        tensors |= _gated(f"{stem}.mlp.shared_expert", 2048, 512)
        for expert in range(512):
            tensors |= _gated(f"{stem}.mlp.experts.{expert}", 2048, 512)
    config: dict[str, Any] = {"model_type": "qwen3_next", "hidden_size": 2048, "num_hidden_layers": layers}
    config |= {"num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256, "vocab_size": 151936}
    config |= {"num_experts": 512, "num_experts_per_tok": 10, "layer_types": kinds, "linear_num_value_heads": 32}
    return Layout(tensors, {**config, "linear_value_head_dim": 128, "linear_key_head_dim": 128})


LARGE = {
    "Llama-3-70B": llama_70b,
    "Gemma-3-27B": gemma_27b,
    "Qwen3-235B-A22B": qwen_235b,
    "DeepSeek-V3": deepseek_v3,
    "Qwen3-Next-80B-A3B": qwen_next,
}
