"""Our models against transformers' own, family by family, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rewright.formats.checkpoint import Checkpoint
from rewright.passes.errors import InputError
from rewright.passes.loading import Assembly, load
from rewright.passes.models.families import family_of
from rewright.passes.walk import Walk
from tests.passes.conftest import STORIES, TINY

CPU = torch.device("cpu")


def rows(count: int = 5, length: int = 40, seed: int = 3) -> torch.Tensor:
    return torch.randint(3, 512, (count, length), generator=torch.Generator().manual_seed(seed))


def oracle(path: Path, tokens: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


@pytest.mark.parametrize("name", TINY)
def test_load_equals_transformers(name: str, tiny: Callable[[str], Path]) -> None:
    model, tokenizer = load(tiny(name))
    with torch.no_grad():
        ours = model(input_ids=rows(), use_cache=False).logits
    assert torch.equal(ours, oracle(tiny(name), rows()))
    assert tokenizer("Once").input_ids[0] == 1


@pytest.mark.parametrize("name", TINY)
def test_walk_equals_transformers(name: str, tiny: Callable[[str], Path]) -> None:
    """Rows longer than any window, and a last batch smaller than the others."""
    tokens = rows()
    walk = Walk(Assembly(Checkpoint.open(tiny(name)), torch.float32, CPU), tokens)
    walk.batches = [slice(0, 2), slice(2, 4), slice(4, 5)]
    for layer in walk:
        assert layer.linears
    for batch in walk.batches:
        assert torch.equal(walk.logits("compressed", batch), oracle(tiny(name), tokens[batch]))


@pytest.mark.parametrize("name", TINY)
def test_families_know_their_matrices(name: str, tiny: Callable[[str], Path]) -> None:
    """What a running model has is what the file's names say, layer by layer, and both have one shape."""
    source = Checkpoint.open(tiny(name))
    family = family_of(source.config)
    stored: dict[tuple[int, str], tuple[int, ...]] = {}
    for path, entry in source.entries.items():
        index = family.matrix_of(path, source.config or {})
        if index is not None:
            local = path.split(f".{index}.", 1)[1].removesuffix(".weight")
            parts = [""] if len(entry.shape) == 2 else [f"[{part}]" for part in range(entry.shape[0])]
            stored.update({(index, local + part): tuple(entry.shape[-2:]) for part in parts})
    running = {
        (layer.index, path): tuple(slot.weight.shape)
        for layer in Walk(Assembly(source, torch.float32, CPU), rows(1))
        for path, slot in layer.linears.items()
    }
    assert running == stored


def test_other_families_are_refused_where_tensors_are_missing(tiny_copy: Callable[[str], Path]) -> None:
    """Plain transformers would fill them with random numbers, with a word on stderr."""
    folder = tiny_copy("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "olmo2"}))
    with pytest.raises(InputError, match=r"`model.layers.0.post_feedforward_layernorm.weight` is missing"):
        load(folder)


@pytest.mark.parametrize("name", [name for name, (_, settings) in TINY.items() if "sliding_window" in settings])
def test_windows_matter(name: str, tiny: Callable[[str], Path]) -> None:
    """The sliding window of the tiny models is shorter than the rows: without it the logits differ."""
    model, _ = load(tiny(name))
    wide = AutoModelForCausalLM.from_pretrained(tiny(name), sliding_window=64, dtype=torch.float32)
    with torch.no_grad():
        assert not torch.equal(model(input_ids=rows()).logits, wide(input_ids=rows()).logits)


def test_inputs_of_a_layer_are_what_its_matrices_get(tiny: Callable[[str], Path]) -> None:
    tokens = rows()
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32).eval()
    seen: dict[str, torch.Tensor] = {}
    for path, module in model.model.layers[1].named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, args, path=path: seen.update({path: args[0]}))
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    walk = Walk(Assembly(Checkpoint.open(tiny("llama")), torch.float32, CPU), tokens)
    for layer in walk:
        if layer.index == 1:
            (batch,) = list(layer.meet(list(layer.linears), dense=False))
            for path, streams in batch.seen.items():
                assert torch.equal(streams["compressed"].inputs, seen[path].flatten(0, 1))
            one, other = (batch.seen[f"self_attn.{part}_proj"]["compressed"].inputs for part in "qv")
            assert one is other


def test_two_streams_part_where_weights_are_replaced(tiny: Callable[[str], Path]) -> None:
    """The dense stream goes on with stored weights, the compressed one with the caller's."""
    tokens, source = rows(), Checkpoint.open(tiny("qwen3"))
    walk = Walk(Assembly(source, torch.float32, CPU), tokens, dense_from=0)
    for layer in walk:
        if layer.index == 0:
            for batch in layer.meet(["mlp.up_proj"], dense=True):
                met = batch.seen["mlp.up_proj"]
                assert torch.equal(met["dense"].inputs, met["compressed"].inputs)
        layer.replace("mlp.down_proj", torch.zeros_like(layer.weight("mlp.down_proj")))
    everything = slice(0, len(tokens))
    assert torch.equal(walk.logits("dense", everything), oracle(tiny("qwen3"), tokens))
    changed = AutoModelForCausalLM.from_pretrained(tiny("qwen3"), dtype=torch.float32)
    with torch.no_grad():
        for block in changed.model.layers:
            block.mlp.down_proj.weight.zero_()
        expected = changed(input_ids=tokens, use_cache=False).logits
    assert torch.equal(walk.logits("compressed", everything), expected)


def test_hidden_states_in_a_file_are_the_same(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rewright.passes.walk.IN_MEMORY_BYTES", 0)
    walk = Walk(Assembly(Checkpoint.open(tiny("llama")), torch.float32, CPU), rows(), scratch=tmp_path)
    for _ in walk:
        pass
    assert (tmp_path / "hidden-compressed.bin").stat().st_size == 5 * 40 * 32 * 4
    assert torch.equal(walk.logits("compressed", slice(0, 5)), oracle(tiny("llama"), rows()))


def test_one_layer_is_in_memory_at_a_time(tiny: Callable[[str], Path]) -> None:
    assembly = Assembly(Checkpoint.open(tiny("llama")), torch.float32, CPU)
    for layer in Walk(assembly, rows()):
        held = [i for i, block in enumerate(assembly.layers) if not next(block.parameters()).is_meta]
        assert held == [layer.index]
    assert all(parameter.is_meta for parameter in assembly.layers.parameters())


def test_names_as_the_hub_spells_them(tiny_copy: Callable[[str], Path]) -> None:
    """GPT-2's files lack the base prefix and carry causal masks as tensors."""
    folder = tiny_copy("gpt2")
    expected = oracle(folder, rows())
    tensors = {
        name.removeprefix("transformer."): value for name, value in load_file(folder / "model.safetensors").items()
    }
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model, _ = load(folder)
    with torch.no_grad():
        assert torch.equal(model(input_ids=rows(), use_cache=False).logits, expected)


def test_only_the_head_is_stored(tiny_copy: Callable[[str], Path]) -> None:
    folder = tiny_copy("llama-tied")
    expected = oracle(folder, rows())
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model, _ = load(folder)
    with torch.no_grad():
        assert torch.equal(model(input_ids=rows(), use_cache=False).logits, expected)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_missing_and_broken_tensors_are_named(name: str, tiny_copy: Callable[[str], Path]) -> None:
    folder = tiny_copy("llama")
    tensors = load_file(folder / "model.safetensors")
    broken = {**tensors, name: torch.full_like(tensors[name], float("inf"))}
    save_file(broken, folder / "model.safetensors")
    with pytest.raises(InputError, match=f"`{name}` holds values that are not finite"):
        load(folder)
    del broken[name]
    save_file(broken, folder / "model.safetensors")
    with pytest.raises(InputError, match=f"`{name}` is missing"):
        load(folder)


def test_rows_unlike_the_config_are_refused(tiny_copy: Callable[[str], Path]) -> None:
    folder = tiny_copy("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 500}))
    with pytest.raises(InputError, match=r"`vocab_size` 500, and `model.embed_tokens.weight` has 512 rows"):
        load(folder)
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 500, "pad_vocab_size_multiple": 64}))
    model, _ = load(folder)
    assert model.get_input_embeddings().weight.shape == (512, 32)


def test_unknown_family_is_refused_though_its_names_look_known(tiny_copy: Callable[[str], Path]) -> None:
    folder = tiny_copy("llama")
    config = json.loads((folder / "config.json").read_text())
    with pytest.raises(InputError, match="`nemesis`") as caught:
        family_of({**config, "model_type": "nemesis"})
    assert "`gemma3_text`, `gpt2`, `gpt_neox`, `gpt_oss`, `llama`" in str(caught.value.hint)
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "nemesis"}))
    with pytest.raises(InputError, match="`nemesis`"):
        load(folder)


def test_relatives_of_known_families_are_refused() -> None:
    """Gemma 3n has layers without keys of their own, and its names are Gemma 3's; a picture model nests its text."""
    for model_type in ("gemma3n_text", "gemma3", "qwen2_moe", "phimoe", "llama4_text"):
        with pytest.raises(InputError, match=f"`{model_type}` is not one whose layers are known"):
            family_of({"model_type": model_type, "text_config": {"model_type": "gemma3_text"}})


def test_tokenizer_is_none_where_there_is_none(tiny_copy: Callable[[str], Path]) -> None:
    folder = tiny_copy("llama")
    for file in folder.glob("*token*"):
        file.unlink()
    model, tokenizer = load(folder)
    assert tokenizer is None
    assert model is not None


def test_a_real_model_tells_its_story() -> None:
    from rewright.passes.generate import generate

    text = "".join(generate(STORIES, "Once upon a time", max_new_tokens=40))
    assert text.startswith(", there was a little girl named Lily.")
