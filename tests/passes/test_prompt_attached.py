"""A prompt that is attached: PEFT reads it, it acts at every token, and scores are of the text alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rewright.formats.checkpoint import Checkpoint
from rewright.formats.peft import FOLDER
from rewright.passes.errors import InputError
from rewright.passes.evaluate import evaluate
from rewright.passes.generate import tokens_after
from rewright.passes.loading import load_tokenizer
from rewright.passes.models.prompted import Prompted
from rewright.passes.models.running import new_cache
from rewright.passes.scoring import open_scorer
from tests.passes.compressing import change
from tests.passes.conftest import DATA, STORIES, TINY, make
from tests.passes.forks import Forks
from tests.passes.prompting import attached, prompt

WORDS = "Once upon a time there was a cat"
# positions that are learned, rotated, and none but distances
POSITIONS = ("gpt2", "opt", "llama", "bloom")
FULL = [name for name in TINY if "sliding_window" not in TINY[name][1]]

Attach = Callable[..., Path]


@pytest.fixture(scope="module")
def attach(tiny: Callable[[str], Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> Attach:
    """A tiny model by name with a prompt of noise, or of words, in it; made once, not to be written to."""
    made: dict[tuple[str, str, bool], Path] = {}

    def get(name: str, depth: str = "input", words: bool = False) -> Path:
        key = (name, depth, words)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("attached") / f"{name}-{depth}"
            begun = {"init_text": WORDS, "tokens": None} if words else {"init": "random"}
            if depth == "input" and words:
                prompt(tiny(name), made[key], steps=0, init_text=WORDS)
            else:
                rate = 1e-30 if words else 1.0
                tokens = len(_ids(WORDS, tiny(name))) if words else 4
                more = {**begun, "tokens": tokens, "steps": 1, "learning_rate": rate, "depth": depth}
                prompt(tiny(name), made[key], text, **more)
        return made[key]

    return get


def _ids(text: str, model: Path = STORIES) -> list[int]:
    tokenizer = load_tokenizer(Checkpoint.open(model))
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


def _model(folder: Path, *, prompt: bool = True) -> Any:
    return open_scorer(folder, "cpu", "f32", prompt=prompt).model


def _logits(model: Any, rows: torch.Tensor, **given: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=rows, use_cache=False, **given).logits
    return found


TOKENS = torch.tensor([[1, *range(300, 320)], [1, *range(400, 420)]])


def _peft(folder: Path) -> Any:
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return PeftModel.from_pretrained(plain, str(folder / FOLDER)).eval()


@pytest.mark.parametrize("depth", ["input", "all"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bloom", "qwen3", "gemma3", "gpt_neox"])
def test_peft_gives_the_same_logits(name: str, depth: str, attach: Attach) -> None:
    """Bit for bit, from the folder that is attached and nothing else."""
    if depth == "all" and name not in FULL:
        return
    out = attach(name, depth)
    theirs, ours = _logits(_peft(out), TOKENS), _logits(_model(out), TOKENS)
    assert ours.shape == (2, 21, 512)
    assert torch.equal(theirs[:, -21:], ours)
    assert not torch.allclose(_logits(_model(out, prompt=False), TOKENS), ours, atol=1e-2)


@pytest.mark.parametrize("depth", ["input", "all"])
def test_peft_on_a_compressed_model(depth: str, rounded: Path, text: Path, tmp_path: Path) -> None:
    """Plain transformers decodes what runs here on its codes; PEFT's text is the same too."""
    prompt(rounded, tmp_path / "out", text, steps=3, depth=depth)
    theirs = _peft(tmp_path / "out")
    scorer = open_scorer(tmp_path / "out", "cpu", "f32")
    assert torch.equal(_logits(theirs, TOKENS)[:, -21:], _logits(scorer.model, TOKENS))
    begin = [1, *_ids("Lily had a")]
    ours = list(tokens_after(scorer, begin, 20, 0.0, 1.0, 0))
    assert len(ours) == 20
    assert _greedy(theirs, [begin], cache=False, masked=False)[0][0] == ours[:8]
    if depth == "input":
        # PEFT 0.21.2 looks for the cache under a name that transformers 5.24 has given up: with one it reads the
        # prompt again before every token; keys and values it does not go on from rightly either way
        asked = {"max_new_tokens": 20, "do_sample": False, "use_cache": False}
        rows = torch.tensor([begin])
        made = theirs.generate(input_ids=rows, attention_mask=torch.ones_like(rows), **asked)
        assert made[0, len(begin) :].tolist() == ours


def test_a_prompt_that_peft_wrote(rounded: Path, tmp_path: Path) -> None:
    """It does not say what it was learned on, and so only its width can be compared."""
    model = AutoModelForCausalLM.from_pretrained(rounded, dtype=torch.float32)
    tuned: Any = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    tuned.save_pretrained(tmp_path / "theirs")
    made, warnings = prompt(rounded, tmp_path / "out", steps=0, init=tmp_path / "theirs")
    assert made["metrics"] == {"tokens": 5}
    assert warnings == [f"`{tmp_path / 'theirs'}` does not say what it was learned on: only its width was compared"]
    weights = load_file(tmp_path / "theirs" / "adapter_model.safetensors")["prompt_embeddings"]
    assert torch.equal(attached(tmp_path / "out"), weights)
    assert torch.equal(_logits(tuned.eval(), TOKENS)[:, 5:], _logits(_model(tmp_path / "out"), TOKENS))


@pytest.mark.parametrize("name", TINY)
def test_words_act_as_the_words_themselves(name: str, attach: Attach) -> None:
    """Embeddings of words in front are what a model makes of the words' tokens, in every family."""
    out = attach(name, words=True)
    model, words = _model(out), torch.tensor([_ids(WORDS, out)] * 2)
    assert len(model.front) == words.shape[1]
    whole = _logits(model.inner, torch.cat([words, TOKENS], dim=1))[:, words.shape[1] :]
    assert torch.allclose(_logits(model, TOKENS), whole, atol=1e-5)


@pytest.mark.parametrize("name", FULL)
def test_keys_and_values_of_words_act_as_the_words(name: str, attach: Attach) -> None:
    out = attach(name, "all", words=True)
    model, words = _model(out), torch.tensor([_ids(WORDS, out)] * 2)
    whole = _logits(model.inner, torch.cat([words, TOKENS], dim=1))[:, words.shape[1] :]
    assert torch.allclose(_logits(model, TOKENS), whole, atol=1e-5)


def _greedy(model: Any, rows: Sequence[Sequence[int]], *, cache: bool, masked: bool) -> list[tuple[Any, Any]]:
    """What follows each row, and the logits of that; all rows together, padded to the left as servers do."""
    longest = max(map(len, rows))
    tokens = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    kept, step, told = new_cache(model) if cache else {}, tokens, []
    for _ in range(8):
        given = {"attention_mask": mask} if masked else {}
        with torch.no_grad():
            logits = model(input_ids=step, use_cache=cache, **kept, **given).logits[:, -1]
        following = logits.argmax(-1, keepdim=True)
        tokens, mask = torch.cat([tokens, following], 1), torch.cat([mask, torch.ones_like(following)], 1)
        step = following if cache else tokens
        told.append(logits)
    return list(zip(tokens[:, longest:].tolist(), torch.stack(told, dim=1), strict=True))


def _same(found: Sequence[tuple[Any, Any]], wanted: Sequence[tuple[Any, Any]]) -> bool:
    return all(
        ours == theirs and torch.allclose(logits, others, atol=1e-4)
        for (ours, logits), (theirs, others) in zip(found, wanted, strict=True)
    )


@pytest.mark.parametrize("depth", ["input", "all"])
@pytest.mark.parametrize("name", POSITIONS)
def test_rows_together_are_rows_alone(name: str, depth: str, attach: Attach) -> None:
    """Of 3 tokens and of 11, padded between prompt and text, with a cache and without one."""
    model = _model(attach(name, depth))
    rows = [[1, 304, 411], [1, *range(320, 330)]]
    alone = [_greedy(model, [row], cache=False, masked=False)[0] for row in rows]
    assert alone[0][0] != alone[1][0]
    for cache in (False, True):
        assert _same([_greedy(model, [row], cache=cache, masked=False)[0] for row in rows], alone)
        assert _same([_greedy(model, [row], cache=cache, masked=True)[0] for row in rows], alone)
        assert _same(_greedy(model, rows, cache=cache, masked=True), alone)
        assert _same(_greedy(model, rows[::-1], cache=cache, masked=True), alone[::-1])
    without = [_greedy(model.inner, [row], cache=True, masked=False)[0] for row in rows]
    assert not _same(without[:1], alone[:1])
    assert not _same(without[1:], alone[1:]), "the prompt has an effect"
    padded = _greedy(model, rows, cache=True, masked=False)
    assert not _same(padded[:1], alone[:1]), "the mask has an effect"


@pytest.mark.parametrize("depth", ["input", "all"])
@pytest.mark.parametrize("name", POSITIONS)
def test_it_acts_at_every_token(name: str, depth: str, attach: Attach) -> None:
    """Also on those that come when a cache holds what was before: a prompt that is left out there is seen."""
    model = _model(attach(name, depth))
    row = TOKENS[:1]
    whole, without = _logits(model, row), _logits(model.inner, row)
    kept, parts = new_cache(model), []
    for first, last in ((0, 5), (5, 6), (6, 7), (7, 15), (15, 21)):
        with torch.no_grad():
            parts.append(model(input_ids=row[:, first:last], use_cache=True, **kept).logits)
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-5)
    apart = (whole - without).norm(dim=-1) / without.norm(dim=-1)
    assert float(apart.min()) > 1e-3
    (cache,) = kept.values()
    assert cache.get_seq_length() == 4 + row.shape[1], "the prompt is read once"


def test_a_cached_prompt_is_read_once(attach: Attach, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, lengths = open_scorer(attach("llama"), "cpu", "f32"), []
    layer = scorer.model.inner.model.layers[0]
    whole = layer.forward

    def counted(hidden_states: torch.Tensor, *rest: Any, **more: Any) -> Any:
        lengths.append(hidden_states.shape[1])
        return whole(hidden_states, *rest, **more)

    monkeypatch.setattr(layer, "forward", counted)
    made = list(tokens_after(scorer, [1, 304, 411], 5, 0.0, 1.0, 0))
    assert made == _greedy(scorer.model, [[1, 304, 411]], cache=False, masked=False)[0][0][:5]
    assert lengths[:5] == [4 + 3, 1, 1, 1, 1]


@pytest.fixture
def some(tmp_path: Path) -> Path:
    """Three documents of different lengths."""
    parts = [part.strip() for part in (DATA / "tinystories_heldout.txt").read_text().split("<|endoftext|>")]
    path = tmp_path / "some.txt"
    path.write_text("<|endoftext|>".join([parts[0], parts[1][:60], parts[2]]))
    return path


@pytest.mark.parametrize("name", TINY)
def test_by_layer_is_the_same(name: str, attach: Attach, some: Path) -> None:
    out = attach(name)
    whole = evaluate(out, text=some, sequence_length=48)
    layered = evaluate(out, text=some, sequence_length=48, by_layer=True)
    assert math.isclose(layered["perplexity"], whole["perplexity"], rel_tol=1e-5)
    assert layered["prompt_tokens"] == whole["prompt_tokens"] == 4
    without = evaluate(out, text=some, sequence_length=48, prompt=False)
    assert not math.isclose(without["perplexity"], whole["perplexity"], rel_tol=1e-3)


def test_keys_and_values_are_not_used_layer_by_layer(attach: Attach, some: Path) -> None:
    with pytest.raises(InputError, match="keys and values in front of every layer cannot be used layer by layer") as no:
        evaluate(attach("llama", "all"), text=some, by_layer=True)
    assert "--no-prompt" in str(no.value.hint)


def test_a_longer_prompt_does_not_lower_perplexity_by_itself(
    tiny_copy: Callable[[str], Path], text: Path, some: Path, tmp_path: Path
) -> None:
    """No prompt changes what a model without a head predicts: 512 tokens, equally likely.

    Divided by the tokens of prompt and text the same loss would be told as less, the more so the longer the prompt.
    """
    src = change(tiny_copy("llama"), lambda tensors: tensors["lm_head.weight"].zero_())
    told = {}
    for tokens in (1, 8, 64):
        out = tmp_path / f"out{tokens}"
        made, _ = prompt(src, out, text, tokens=tokens, steps=1, validation_text=[str(some)])
        for by_layer in (False, True):
            found = evaluate(out, text=some, sequence_length=32, by_layer=by_layer)
            assert found["prompt_tokens"] == tokens
            told[tokens, by_layer] = (found["scored_tokens"], found["bits_per_byte"], found["windows"])
            assert math.isclose(found["perplexity"], 512, rel_tol=1e-6)
        for key in ("perplexity_before", "validation_perplexity"):
            assert math.isclose(made["metrics"][key], 512, rel_tol=1e-6)
        scored, windows = found["scored_tokens"], found["windows"]
        assert 512 ** (scored / (scored + tokens * windows)) < 0.9 * 512, "what the other denominator would tell"
    assert len(set(told.values())) == 1
    assert evaluate(src, text=some, sequence_length=32)["scored_tokens"] == found["scored_tokens"]


def test_questions_are_answered_with_it(attach: Attach, tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    lines = [{"query": f"The cat {verb}", "choices": ["home", "a red ball"], "gold": 0} for verb in ("saw", "had")]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = attach("llama")
    whole = evaluate(out, choices=path)
    assert whole["prompt_tokens"] == 4
    assert whole["choices"] == evaluate(out, choices=path, by_layer=True)["choices"]


def test_the_command_line_uses_it(forks: Forks, rounded: Path, text: Path, some: Path, tmp_path: Path) -> None:
    """`eval`, `generate` and `show`, with it and without."""
    out = tmp_path / "out"
    prompt(rounded, out, text, steps=4)
    scores = []
    for words in ((), ("--no-prompt",)):
        ended = forks.run("eval", out, *words, "--text", some, "--compare", rounded, "--json")
        assert ended.code == 0, ended.err
        scores.append(json.loads(ended.out))
    assert [one["prompt_tokens"] for one in scores] == [4, 0]
    assert scores[0]["scored_tokens"] == scores[1]["scored_tokens"]
    assert scores[0]["other"] == scores[1]["other"]
    assert scores[1]["perplexity_ratio"] == 1 != scores[0]["perplexity_ratio"]
    texts = []
    for words in ((out,), (out, "--no-prompt"), (rounded,)):
        ended = forks.run("generate", *words, "--prompt", "Lily", "--temperature", "0", "--max-new-tokens", "20")
        assert ended.code == 0, ended.err
        texts.append(ended.out)
    assert texts[1] == texts[2] != texts[0]


def test_show_tells_what_it_costs(forks: Forks, rounded: Path, text: Path, tmp_path: Path) -> None:
    prompt(rounded, tmp_path / "out", text, steps=4)
    ended = forks.run("show", tmp_path / "out")
    (line,) = [line for line in ended.out.splitlines() if line.startswith("prompt ")]
    # 2 bytes for each of 5 layers' keys and values, of 4 heads of 8 numbers, for 4 tokens
    assert (
        line.split(None, 1)[1]
        == f"4 tokens, {text.name}, 4 steps of next-token; 2.56 kB of 16-bit keys and values a request"
    )
    found = json.loads(forks.run("show", tmp_path / "out", "--json").out)["prompt"]
    assert (found["tokens"], found["width"], found["depth"], found["cache_bytes_16_bit"]) == (4, 64, "input", 2560)
    assert "prompt " not in forks.run("show", rounded).out


def test_no_further_than_the_model_s_positions(
    forks: Forks, tiny: Callable[[str], Path], text: Path, some: Path, tmp_path: Path
) -> None:
    """128 positions, 100 of them the prompt's."""
    out = tmp_path / "out"
    prompt(tiny("llama"), out, text, tokens=100, sequence_length=28, steps=1)
    found = evaluate(out, text=some)
    assert (found["sequence_length"], found["prompt_tokens"]) == (28, 100)
    assert evaluate(out, text=some, prompt=False)["sequence_length"] == 128
    ended = forks.run("generate", out, "--prompt", "Lily", "--max-new-tokens", "100")
    assert ended.code == 3
    assert "new ones are past the 28 positions that the learned prompt leaves" in ended.err
    assert forks.run("generate", out, "--prompt", "Lily", "--max-new-tokens", "100", "--no-prompt").code == 0
    assert forks.run("generate", out, "--prompt", "Lily", "--max-new-tokens", "20").code == 0


def test_one_that_does_not_fit_is_not_used(
    attach: Attach, tiny: Callable[[str], Path], some: Path, tmp_path: Path
) -> None:
    """A prompt that is named for a checkpoint, of another width or another vocabulary."""
    file = attach("llama") / FOLDER
    with pytest.raises(InputError, match=r"is 32 wide, for 512 rows of embedding; .* takes 16 and has 512") as no:
        evaluate(tiny("opt-350m"), text=some, prompt=file)
    assert "--no-prompt" in str(no.value.hint)
    rows = make("llama", tmp_path / "rows", vocab_size=520)
    with pytest.raises(InputError, match=r"is 32 wide, for 512 rows of embedding; .* takes 32 and has 520"):
        evaluate(rows, text=some, prompt=file)
    with pytest.raises(InputError, match=r"is 64 wide, for 512 rows of embedding; .* takes 128 and has 512"):
        evaluate(tiny("gpt2"), text=some, prompt=attach("llama", "all") / FOLDER)


def test_it_is_a_model_as_any_other(attach: Attach) -> None:
    model = _model(attach("llama"))
    assert isinstance(model, Prompted)
    assert (model.device.type, model.dtype) == ("cpu", torch.float32)
    assert model.get_input_embeddings() is model.inner.get_input_embeddings()
    assert model.get_output_embeddings() is model.inner.get_output_embeddings()
    assert not list(model.front.parameters()), "a prompt that is attached does not learn"
