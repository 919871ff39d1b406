"""The choice between kernel and reference: an explicit one never falls back."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rewright.kernels.dispatch import KernelError, asked, mode, pick, reset_tally, tally, use
from rewright.kernels.hessian_update import hessian_update
from rewright.kernels.pack import pack
from tests.kernels.ops import OPS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REWRIGHT_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reset_tally()


def test_the_innermost_choice_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    assert mode() == "auto"
    monkeypatch.setenv("REWRIGHT_KERNELS", "reference")
    assert mode() == "reference"
    with use("triton"):
        assert mode() == "triton"
        with use("auto"):
            assert mode() == "auto"
        assert mode() == "triton"
    assert mode() == "reference"


def test_an_option_says_auto_for_what_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWRIGHT_KERNELS", "reference")
    with asked("auto"):
        assert mode() == "reference"
    with asked("triton"):
        assert mode() == "triton"
    with pytest.raises(KernelError), asked("fast"):
        pass


def test_a_name_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWRIGHT_KERNELS", "cuda")
    with pytest.raises(KernelError, match="`REWRIGHT_KERNELS` is `cuda`") as caught:
        mode()
    assert caught.value.hint == "use one of `auto`, `triton`, `reference`"
    with pytest.raises(KernelError), use("fast"):
        pass


def test_auto_takes_the_reference_on_a_cpu_and_counts_it() -> None:
    pack(torch.zeros(2, 8, dtype=torch.int8), 4)
    pack(torch.zeros(2, 8, dtype=torch.int8), 4)
    with use("reference"):
        hessian_update(torch.zeros(3, 3), torch.ones(2, 3), 1.0)
    assert tally() == {
        "hessian_update": {"triton": 0, "reference": 1},
        "pack": {"triton": 0, "reference": 2},
    }
    reset_tally()
    assert tally() == {}


def test_triton_by_name_never_falls_back_on_a_cpu() -> None:
    with use("triton"), pytest.raises(KernelError, match="not on a GPU") as caught:
        pack(torch.zeros(2, 8, dtype=torch.int8), 4)
    assert "--kernels auto" in str(caught.value.hint)
    assert tally() == {}


def test_triton_by_name_says_when_it_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with use("triton"), pytest.raises(KernelError, match="triton is not installed"):
        pick("pack", [torch.zeros(1)], lambda: None)


def test_what_the_kernel_does_not_support_is_said() -> None:
    code = """
import torch
from rewright.kernels.dispatch import KernelError, tally, use
from rewright.kernels.hessian_update import hessian_update
from rewright.kernels.joint_sweep import joint_sweep
with use("triton"):
    for call in (
        lambda: hessian_update(torch.zeros(3, 3), torch.ones(2, 3, dtype=torch.bfloat16), 1.0),
        lambda: joint_sweep(torch.ones(2, 129), torch.eye(129), low=-8, high=7),
    ):
        try:
            call()
        except KernelError as error:
            print(error)
    hessian_update(torch.zeros(3, 3), torch.ones(2, 3), 1.0)
print(tally())
"""
    path = os.pathsep.join([str(ROOT / ".src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert "garbage from bfloat16" in lines[0]
    assert "at most 128 columns" in lines[1]
    assert lines[2] == "{'hessian_update': {'triton': 1, 'reference': 0}}"


def test_importing_an_op_imports_no_triton() -> None:
    code = f"import sys, {', '.join(f'rewright.kernels.{op}' for op in OPS)}; print('triton' in sys.modules)"
    path = os.pathsep.join([str(ROOT / ".src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "False"
