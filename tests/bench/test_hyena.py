"""Hyena models that are trained for a moment, and the decoding study on a random one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rewright.passes.evaluate import evaluate
from rewright.passes.generate import generate
from rewright.passes.loading import load
from tests.bench import hyena_decode, train_hyena
from tests.passes.hyenas import small

STORY = "Once there was a cat. She said: naïve! "
SMALL = ["--width", "8", "--length", "32", "--batch", "2", "--steps", "3"]


def train(kind: str, file: Path, out: Path, *more: str) -> None:
    assert train_hyena.main([kind, str(file), "--out", str(out), *SMALL, *more]) == 0


@pytest.mark.parametrize("kind", ["hyena", "multihyena"])
def test_a_trained_model_is_a_checkpoint(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that `eval` scores as the training did, and `generate` goes on with; the same seed gives the same bytes."""
    text, held = tmp_path / "stories.txt", tmp_path / "held.txt"
    text.write_text("\n<|endoftext|>\n".join(STORY * count for count in range(1, 12)))
    more = ["--heads", "4"] if kind == "multihyena" else []
    train(kind, text, tmp_path / "one", "--held-out", str(held), *more)
    said = json.loads(capsys.readouterr().out)
    train(kind, text, tmp_path / "two", *more)
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()
    assert said["steps"] == 3
    found = evaluate(tmp_path / "one", text=held, per_document="all", sequence_length=33, device="cpu", threads=1)
    assert found["perplexity"] == pytest.approx(2.718281828 ** said["held_out_loss"], rel=0.1)
    assert len("".join(generate(tmp_path / "one", "One", max_new_tokens=5, device="cpu", threads=1)).encode()) >= 5
    _, tokenizer = load(tmp_path / "one")
    assert tokenizer("naïve").input_ids == [256, *"naïve".encode()]
    assert tokenizer.decode(tokenizer("naïve").input_ids[1:]) == "naïve"


def test_a_model_of_letters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    genome, held = tmp_path / "genome.fa", tmp_path / "held.txt"
    genome.write_text(">name\n" + "\n".join(["ACGTTGCAnnRACGTTTTACG"] * 40) + "\n")
    train("hyenadna", genome, tmp_path / "out", "--held-out", str(held), "--minutes", "0.0001")
    assert json.loads(capsys.readouterr().out)["steps"] == 1
    assert held.read_text() == ("ACGTTGCANNRACGTTTTACG" * 40)[-42:]
    model, tokenizer = load(tmp_path / "out")
    assert tokenizer("acgtN r").input_ids == [7, 8, 9, 10, 11, 6, 1]
    assert tokenizer.decode([7, 8, 9, 10, 11]) == "ACGTN"
    assert model.config.modulation_shift == 0.05
    names = load_file(tmp_path / "out/model.safetensors")
    assert names["hyena.backbone.embeddings.word_embeddings.weight"].shape == (16, 8)
    assert evaluate(tmp_path / "out", text=held, device="cpu", threads=1)["scored_tokens"] == 31 + 9


def test_the_decoding_study(tmp_path: Path) -> None:
    model = small("hyena", taps=0, max_seq_len=64, vocab_size=32)
    model.save_pretrained(tmp_path / "distilled")
    words = ["--tokens", "40", "--positions", "16", "64", "--convolve", "64", "--rounds", "2", "--count", "3"]
    out = ["--out", str(tmp_path), "--prefill"]
    assert hyena_decode.main([str(tmp_path / "distilled"), *words, *out]) == 0
    (found,) = json.loads((tmp_path / "hyena-decode.json").read_text())["models"]
    assert max(found["agreement"]["largest_difference"].values()) <= 1e-4
    first, second = found["decode"]
    # in two layers: three projections of width 12 for two taps, and three entries, then two
    assert first["state_bytes"] == second["state_bytes"] == 4 * (2 * 36 * 2 + 12 * (3 + 2) * 2)
    assert second["key_value_bytes"] == 2 * 2 * 12 * 2 * 64
    page = (tmp_path / "hyena-decode.md").read_text()
    assert "| `distilled` | 2 x 12 | 3, 2 | 40 tokens" in page
    threads = torch.get_num_threads()
    assert hyena_decode.prefill(tmp_path / "distilled", 50, threads)["tokens"] == 50
    small("hyena").save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match="is not distilled"):
        hyena_decode.main([str(tmp_path / "teacher"), *words])
