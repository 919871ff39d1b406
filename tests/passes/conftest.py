"""Tiny random checkpoints of every family, with a real tokenizer of 512 tokens."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rewright.passes.models.families import FAMILIES
from tests.passes.converting import HALF
from tests.passes.forks import Forks

DATA = Path(__file__).resolve().parent.parent / "data"
STORIES = DATA / "stories260K"
ROUNDED: dict[str, Any] = {"method": "rtn", "bits": 3, "group-size": 32}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")

_LLAMA = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SLIDING = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
_NEOX = {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"}
_OPT = {
    **{key: _NEOX[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")},
    "ffn_dim": 64,
    "max_position_embeddings": 128,
    "word_embed_proj_dim": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_GEMMA3 = {**_LLAMA, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8, "sliding_window_pattern": 2}
_BLOOM = {
    **{key: _NEOX[key] for key in ("vocab_size", "hidden_size", "bos_token_id", "eos_token_id")},
    "n_layer": 2,
    "n_head": 4,
}
_FALCON = {
    **{key: value for key, value in _NEOX.items() if key != "intermediate_size"},
    "ffn_hidden_size": 64,
    "bias": True,
}
_MOE = {**_LLAMA, "num_experts_per_tok": 2}
_QWEN3_MOE = {**_MOE, "moe_intermediate_size": 16, "num_experts": 4, "head_dim": 8, "norm_topk_prob": True}
_GPT_OSS = {
    **_MOE,
    "intermediate_size": 48,
    "num_local_experts": 4,
    "head_dim": 8,
    "sliding_window": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}

# name -> (model type, settings of its config)
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**_LLAMA, "tie_word_embeddings": False}),
    "llama-tied": ("llama", {**_LLAMA, "tie_word_embeddings": True}),
    "mistral": ("mistral", {**_LLAMA, "sliding_window": 8}),
    "qwen2": ("qwen2", {**_LLAMA, **_SLIDING}),
    "qwen3": ("qwen3", {**_LLAMA, **_SLIDING, "head_dim": 8}),
    "gemma2": ("gemma2", {**_LLAMA, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}),
    "opt": ("opt", _OPT),
    "opt-350m": ("opt", {**_OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "gpt2": ("gpt2", {"vocab_size": 512, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "gpt_neox": ("gpt_neox", {**_NEOX, "tie_word_embeddings": False}),
    "gpt_neox-sequential": ("gpt_neox", {**_NEOX, "tie_word_embeddings": False, "use_parallel_residual": False}),
    "gemma3": ("gemma3_text", _GEMMA3),
    "phi3": ("phi3", {**_LLAMA, "sliding_window": 8, "pad_token_id": 0, "tie_word_embeddings": False}),
    "bloom": ("bloom", _BLOOM),
    "bloom-post-norm": ("bloom", {**_BLOOM, "apply_residual_connection_post_layernorm": True}),
    "falcon": ("falcon", _FALCON),
    "falcon-alibi": ("falcon", {**_FALCON, "alibi": True, "multi_query": False, "parallel_attn": False}),
    "falcon-new": ("falcon", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": False}),
    "mixtral": ("mixtral", {**_MOE, "intermediate_size": 48, "num_local_experts": 4, "sliding_window": 8}),
    "qwen3_moe": ("qwen3_moe", {**_QWEN3_MOE, "num_hidden_layers": 3, "mlp_only_layers": [1]}),
    "gpt_oss": ("gpt_oss", _GPT_OSS),
}
# those that plain transformers runs packed, and those of them that hold experts
PACKED = [name for name in TINY if FAMILIES[TINY[name][0]].matrix_class == "Linear" and name != "gpt_oss"]
EXPERTS = ["mixtral", "qwen3_moe"]


def make(name: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Write a random checkpoint of `TINY[name]`, its settings changed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, settings = TINY[name]
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**settings, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            # initial matrices are so small that a model hardly depends on its input
            if parameter.ndim > 1:
                parameter.mul_(8)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
    for file in TOKENIZER:
        shutil.copy(STORIES / file, folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny checkpoint by name, made once; not to be written to."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = make(name, tmp_path_factory.mktemp("tiny") / name)
        return made[name]

    return get


@pytest.fixture
def tiny_copy(tiny: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A tiny checkpoint by name, the test's own."""

    def get(name: str) -> Path:
        return Path(shutil.copytree(tiny(name), tmp_path / "src"))

    return get


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stories enough to calibrate tiny models."""
    path = tmp_path_factory.mktemp("text") / "stories.txt"
    path.write_text((DATA / "tinystories.txt").read_text()[:60_000])
    return path


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Runs command lines in processes that start in milliseconds."""
    server = Forks()
    yield server
    server.close()


@pytest.fixture(scope="session")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K at 3 bits; not to be written to."""
    from tests.passes.compressing import compress  # which imports this module

    folder = tmp_path_factory.mktemp("rounded") / "w3"
    compress(STORIES, folder, **ROUNDED)
    return folder


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[[str], Path]) -> Path:
    """A tiny model of 4-bit codes with half of every group of 16 kept; not to be written to."""
    from tests.passes.compressing import compress  # which imports this module

    folder = tmp_path_factory.mktemp("half") / "p"
    compress(tiny("llama"), folder, **HALF)
    return folder


@pytest.fixture
def own(half: Path, tmp_path: Path) -> Path:
    """The model that is half kept, the test's own."""
    return Path(shutil.copytree(half, tmp_path / "own"))
