"""The study of prompts: what it works out and prints from runs, and that both sides of the peer's bench run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from rewright.passes.arms import ARMS
from tests.bench import prompt_peft, prompts
from tests.passes.compressing import compress
from tests.passes.conftest import STORIES


def results() -> dict[str, Any]:
    arms = dict(zip(ARMS, (4.0, 8.0, 6.0, 3.9, 7.5), strict=True))
    run = {"setting": "W3", "recipe": "distill", "perplexity": {"stories": arms}, "cpu_seconds": 3.0}
    return {"models": {"tiny": {"asked": {"tokens": 8}, "runs": [run]}}, "machine": {"device": "here"}}


def test_what_is_won_back_is_a_share_of_what_was_lost() -> None:
    assert prompts.recovery(dict(zip(ARMS, (4.0, 8.0, 6.0, 3.9, 7.5), strict=True))) == 0.5
    assert prompts.recovery(dict(zip(ARMS, (4.0, 8.0, 9.0, 3.9, 7.5), strict=True))) == -0.25


def test_a_page_and_a_picture_of_the_runs() -> None:
    side = {"step": 1.0, "memory": 2.0**20, "perplexity": 5.0}
    beside = {"checkpoint": "c", "asked": {"steps": 3}, "rewright": side, "peft": side, "ratios": side}
    page = prompts.page(results(), beside)
    assert "| W3 | distill | 4.000 | 8.000 | 6.000 | 3.900 | 7.500 | 50.0 % |" in page
    assert "| seconds of a step | 1 | 1 | 1.000 |" in page
    assert "PEFT" not in prompts.page(results(), None)
    picture = ElementTree.fromstring(prompts.picture(results()))
    assert "50.0 %" in "".join(picture.itertext())


def test_both_sides_come_to_one_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compress(STORIES, tmp_path / "c", method="rtn", bits=4, group_size=32)
    told = []
    for side in prompt_peft.SIDES:
        small = ("--tokens", "4", "--steps", "3", "--batch-size", "2", "--sequence-length", "24")
        prompt_peft.main([str(tmp_path / "c"), "--side", side, *small])
        told.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert told[0]["perplexity"] == pytest.approx(told[1]["perplexity"], rel=1e-4)
