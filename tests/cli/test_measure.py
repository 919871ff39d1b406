"""`eval`, `generate`, `bench`, `passes` and `env`: what they hand on, and what they print."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from rewright.kernels import dispatch
from rewright.passes import evaluate, generate, registry

MODEL = str(Path(__file__).parents[1] / "data" / "stories260K")
SCORES = {"perplexity": 4.5, "bits_per_byte": 1.1, "scored_tokens": 100}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Stand-ins for the passes' functions, which keep what they were asked."""
    calls: list[dict[str, Any]] = []

    def score(path: Path, **given: Any) -> dict[str, Any]:
        calls.append({"path": path, "kernels": dispatch.mode(), **given})
        found: dict[str, Any] = dict(SCORES)
        if given["compare"] is not None:
            found |= {"other": {"perplexity": 4.0, "bits_per_byte": 1.0}}
            found |= {"perplexity_ratio": 1.125, "kl": 0.25, "top1_agreement": 0.75}
        if given["choices"] is not None:
            found["choices"] = {"accuracy": 0.5, "accuracy_normalised": 0.625, "questions": 8}
        return found

    def tell(path: Path, prompt: str, **given: Any) -> Any:
        calls.append({"path": path, "prompt": prompt, **given})
        yield from (" there", " was\x1b", " ü")

    def timed(path: Path, **given: Any) -> dict[str, Any]:
        calls.append({"path": path, **given})
        return {"prefill_tokens_per_second": 10.5, "weight_bytes": 1000}

    monkeypatch.setattr(evaluate, "evaluate", score)
    monkeypatch.setattr(generate, "generate", tell)
    monkeypatch.setattr(generate, "bench", timed)
    return calls


def test_eval_table(call: Any, asked: list[dict[str, Any]]) -> None:
    ended = call("eval", MODEL, "--text", "t", "--compare", MODEL + "/", "--choices", "c", "--sample", "3")
    assert ended.code == 0
    rows = {line.split("  ")[0]: line.split()[-2:] for line in ended.out.splitlines() if "  " in line}
    assert rows["size on disk"][1] == "MB"
    assert rows["bits a weight"] == ["32", "32"]
    assert rows["in the layers"] == ["32", "32"]
    assert rows["perplexity"] == ["4", "4.5"]
    assert rows["accuracy normalised"] == ["-", "0.625"]
    assert rows["ratio"][-1] == "1.125"
    assert rows["KL (nats)"][-1] == "0.25"
    assert rows["scored tokens"][-1] == "100"
    assert ended.out.count("Once upon a time there was\\x1b ü") == 1, "one path, one story"
    scored, story = asked[0], asked[1]
    assert (scored["sequence_length"], scored["per_document"], scored["device"]) == (256, "auto", "auto")
    assert (story["max_new_tokens"], story["temperature"]) == (3, 0.0)


def test_eval_json(call: Any, asked: list[dict[str, Any]]) -> None:
    words = ("--text", "t", "--json", "--kernels", "reference", "--threads", "1", "--dtype", "f32", "--prompt", "A")
    document = json.loads(call("eval", MODEL, *words).out)
    assert SCORES.items() <= document.items()
    assert document["sample"]["texts"][MODEL] == " there was\x1b ü"
    assert document["checkpoints"][MODEL]["bits_per_weight"] == 32
    assert (asked[0]["kernels"], asked[0]["threads"], asked[0]["dtype"]) == ("reference", 1, "f32")
    assert asked[1]["prompt"] == "A"


def test_eval_wants_something_to_score(call: Any, asked: list[dict[str, Any]]) -> None:
    ended = call("eval", MODEL)
    assert (ended.code, asked) == (2, [])
    assert "--choices" in ended.err


def test_generate_streams(call: Any, asked: list[dict[str, Any]]) -> None:
    ended = call("generate", MODEL, "--prompt", "Once", "--top-p", "0.5", "--temperature", "0", "--max-new-tokens", "9")
    assert (ended.code, ended.out) == (0, " there was\x1b ü\n")
    (given,) = asked
    assert (given["prompt"], given["top_p"], given["temperature"], given["max_new_tokens"]) == ("Once", 0.5, 0.0, 9)


def test_generate_reads_stdin(call: Any, asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("ü two\n".encode())))
    assert json.loads(call("generate", MODEL, "--prompt", "-", "--json").out)["text"] == " there was\x1b ü"
    assert asked[0]["prompt"] == "ü two"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff")))
    ended = call("generate", MODEL, "--prompt", "-")
    assert (ended.code, ended.out) == (3, "")
    assert "byte 2" in ended.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("generate", MODEL), "missing option `--prompt`"),
        (("generate", MODEL, "--prompt", "x", "--temperature", "-1"), "`--temperature` must be at least 0, not `-1.0`"),
        (("bench", MODEL, "--new-tokens", "0"), "`--new-tokens` must be at least 1, not `0`"),
        (("eval", MODEL, "--text", "t", "--per-document", "some"), "`--per-document` must be one of auto, first, all"),
    ],
)
def test_measures_refuse(call: Any, asked: list[dict[str, Any]], words: tuple[str, ...], said: str) -> None:
    ended = call(*words)
    assert (ended.code, asked) == (2, [])
    assert said in ended.err


def test_bench(call: Any, asked: list[dict[str, Any]]) -> None:
    assert call("bench", MODEL, "--prompt-tokens", "8").out.split("\n")[1].split() == ["weight", "bytes", "1", "kB"]
    assert json.loads(call("bench", MODEL, "--json").out)["weight_bytes"] == 1000
    assert asked[0]["prompt_tokens"] == 8


def test_passes(call: Any, pipeline: Any) -> None:
    listed = call("passes").out.splitlines()
    assert [line.split()[0] for line in listed] == list(registry.SPECS)
    page = call("passes", "fake").out
    for text in ("A Paper (2020)", "at most one tensor", "--even/--odd", "soft|hard", "files (repeatable)"):
        assert text in page
    facts = json.loads(call("passes", "fake", "--json").out)
    options = {item["flag"]: item for item in facts["options"]}
    assert options["--size"] == {
        "flag": "--size",
        "negative": None,
        "type": "int",
        "metavar": "1..9",
        "choices": [],
        "default": 4,
        "required": False,
        "repeatable": False,
        "min": 1,
        "max": 9,
        "affects": "result",
        "help": "a whole number [in brackets]",
    }
    assert options["--pattern"]["default"] == "unstructured"
    assert call("passes", "fakes").code == 2


def test_env(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = json.loads(call("env", "--json").out)
    assert found["libraries"]["torch"]
    assert found["kernels"].keys() >= {"hessian_update", "joint_sweep", "pack"}
    assert set(found["kernels"].values()) <= {"triton", "reference"}
    assert found["interpreter"] is False
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("REWRIGHT_KERNELS", "triton")
    told = call("env").out
    assert "triton interpreter on" in " ".join(told.split())
    assert "kernel pack triton" in " ".join(told.split())
    monkeypatch.setenv("REWRIGHT_KERNELS", "tritn")
    assert call("env").code == 2


def test_every_command_has_an_example(call: Any, pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from rewright.cli.root import build

    monkeypatch.setenv("COLUMNS", "200")
    names = [command.name for command in build().registered_commands]
    assert len(names) == len(set(names)) == 12 + len(registry.SPECS)
    for name in names:
        ended = call(str(name), "--help")
        assert ended.code == 0
        assert f"Example: rewright {name} " in ended.out, name
