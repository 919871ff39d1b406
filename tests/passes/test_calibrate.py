"""`bench --calibrate`: a machine measured, written down, read again, and searched with."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewright.formats.errors import StorageError
from rewright.passes.errors import InputError, ResourceError
from rewright.passes.flexgen_policy_search import calibrate, machine_file
from rewright.passes.flexgen_policy_search.hills import Problem
from rewright.passes.flexgen_policy_search.machine import GIB, Machine
from rewright.passes.flexgen_policy_search.measure import Disk, Meter
from rewright.passes.flexgen_policy_search.model import read
from rewright.passes.flexgen_policy_search.presets import preset
from rewright.passes.flexgen_policy_search.roofline import Work, attended, multiplied
from rewright.passes.flexgen_policy_search.search import search
from tests.passes.flexing import hasten, opt
from tests.passes.flexing import settings as setting

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[calibrate.Calibration]:
    with pytest.MonkeyPatch.context() as patched:
        hasten(patched)
        yield calibrate.calibrate(tmp_path_factory.mktemp("disk"), CPU, torch.float32, 1, share=0.01)


def test_what_is_measured_can_be_written_and_searched_with(measured: calibrate.Calibration, tmp_path: Path) -> None:
    machine = measured.machine
    assert len(measured.held) == 12
    assert all(one.measured > 0 and one.foretold > 0 for one in measured.held)
    assert machine.holdout == pytest.approx(np.mean([abs(one.error) for one in measured.held]))
    assert all(0 < getattr(machine, name) < math.inf for name in machine.rates)
    assert all(0 < share <= 1 for _, share in machine.busy)
    shares = [share for _, share in machine.gemm]
    assert shares == sorted(shares)
    assert not shares or shares[-1] == 1
    file = tmp_path / "box.toml"
    again = machine_file.parse(machine_file.encode(machine, at="2026-01-01", how=measured.how), file)
    assert again.source == "measured"
    assert again.rooms == machine.rooms
    for name in (*machine.rates, "launch_s", "copy_s", "holdout"):
        assert getattr(again, name) == pytest.approx(getattr(machine, name), rel=2e-3, abs=1e-4), name
    again = again.sized({"gpu": 4 * GIB, "cpu": 64 * GIB})
    assert search(Problem(read(opt("6.7b")), again, Work(64, 8), setting())) is not None


def test_a_calibration_is_no_guess(measured: calibrate.Calibration) -> None:
    """Work that is done again takes as long, within what a busy machine does."""
    torch.set_num_threads(1)
    spent = Meter(CPU, torch.float32, 0.05).product(1, 3072, 1024)
    foretold = float(multiplied(measured.machine, 2.0 * 3072 * 1024, 4.0 * 3072 * 1024, 1))
    assert 0.2 < foretold / spent < 5


def test_products_of_few_rows_reach_less() -> None:
    machine = replace(preset("laptop"), gpu_flops=100.0, hbm=1e9, gemm=((2, 0.1), (32, 0.5), (256, 1.0)))
    rates = [1 / float(multiplied(machine, 1.0, 0.0, rows)) for rows in (1, 2, 8, 32, 90, 256, 4096)]
    assert rates == pytest.approx([10, 10, 30, 50, 74.860, 100, 100], rel=1e-4)
    assert float(multiplied(replace(machine, hbm=2.0), 1.0, 4.0, 1)) == 2.0


def test_attention_may_be_slower_than_reading() -> None:
    machine = replace(preset("laptop"), hbm=100.0, gpu_flops=1000.0)
    assert float(attended(machine, 1000.0, 10.0)) == 1.0
    slower = replace(machine, gpu_attn=5.0, gpu_attn_flops=200.0)
    assert (float(attended(slower, 1000.0, 10.0)), float(attended(slower, 10.0, 10.0))) == (5.0, 2.0)


def test_a_slower_curve_never_raises_throughput() -> None:
    machine = preset("rtx4090").sized({"gpu": 8 * GIB, "cpu": 32 * GIB})
    slow = replace(machine, gemm=((1, 0.01), (64, 0.1), (4096, 0.3)), gpu_attn=machine.hbm / 20)
    model, work = read(opt("6.7b")), Work(64, 16)
    found = [search(Problem(model, one, work, setting())) for one in (machine, slow)]
    assert found[0] is not None
    assert found[1] is not None
    assert found[1].best.throughput < found[0].best.throughput


@settings(max_examples=40)
@given(
    figures=st.fixed_dictionaries(dict.fromkeys((*Machine.RATES, *Machine.OPTIONAL), st.floats(1.0, 1e15))),
    gemm=st.dictionaries(st.integers(1, 10**6), st.floats(0.001, 1.0), max_size=5),
    left=st.floats(0.01, 1.0),
)
def test_a_description_comes_back(figures: dict[str, float], gemm: dict[int, float], left: float) -> None:
    curve = tuple(sorted(gemm.items()))
    machine = replace(preset("laptop"), gemm=curve, busy=(("disk_read", left),), holdout=0.07, **figures)
    again = machine_file.parse(machine_file.encode(machine, at="2026-01-01", how="here"), Path("x.toml"))
    for name in machine.rates:
        assert getattr(again, name) == pytest.approx(getattr(machine, name), rel=0.01), name
    assert [rows for rows, _ in again.gemm] == [rows for rows, _ in curve]
    assert [share for _, share in again.gemm] == pytest.approx([share for _, share in curve], abs=1e-3)
    assert dict(again.busy)["disk_read"] == pytest.approx(left, abs=1e-3)


@pytest.mark.parametrize(
    ("odd", "told"),
    [
        ("[products]\n0 = 0.5\n", "`products` of `box.toml` has rows for its keys, as `16`, not `0`"),
        ("[products]\nmany = 0.5\n", "rows for its keys"),
        ("[products]\n8 = 1.5\n", "`products.8` of `box.toml` must be a share, above 0 and at most 1, not `1.5`"),
        ("[products]\n8 = true\n", "must be a share"),
        ("products = 3\n", "`products` of `box.toml` is no table"),
        ('[busy]\n"disk.raed" = 0.5\n', "no use for `busy.disk.raed`"),
        ('[busy]\n"disk.read" = 0\n', "must be a share"),
        ("[measured]\nholdout = nan\n", "`measured.holdout` of `box.toml` must be a share"),
        ('[measured]\nholdout = "much"\n', "must be a share"),
        ("[gpu]\nattention = 5\n", "has no unit"),
    ],
)
def test_a_description_may_be_wrong(odd: str, told: str) -> None:
    with pytest.raises(InputError, match=told.replace("(", r"\(")):
        machine_file.parse(f'base = "laptop"\n{odd}'.encode(), Path("box.toml"))


def test_a_description_by_hand_says_what_is_left() -> None:
    said = b'base = "laptop"\n[busy]\n"link.to-gpu" = 0.5\n"disk.read" = 0.25\n'
    machine, plain = machine_file.parse(said, Path("box.toml")), preset("laptop")
    assert (machine.h2d, machine.disk_read, machine.d2h) == (plain.h2d / 2, plain.disk_read / 4, plain.d2h)
    assert machine.source == "description"


def test_the_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    with Disk(tmp_path) as disk:
        assert disk.write() > 0
        assert disk.read(3 << 20, 1 << 20, 2) > 0
        assert not list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewright.passes.flexgen_policy_search.measure.free_bytes", lambda path: 10)
    with pytest.raises(ResourceError, match="too little room on the disk"):
        calibrate.calibrate(tmp_path, CPU, torch.float32, 1)


def test_a_disk_that_fails_is_not_a_fast_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes wrong in the threads that read is heard, and so is a file that ends early."""
    with Disk(tmp_path) as disk:
        with pytest.raises(StorageError, match="cannot read"):
            disk.read(3 << 20, 1 << 20, 2)

        def breaks(*_: object) -> int:
            raise OSError(5, "Input/output error")

        disk.write()
        monkeypatch.setattr("rewright.passes.flexgen_policy_search.measure.read_into", breaks)
        with pytest.raises(StorageError, match="cannot read"):
            disk.read(3 << 20, 1 << 20, 2)


def test_no_file_where_the_folder_may_not_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuses)
    with pytest.raises(StorageError, match="permission denied"):
        calibrate.calibrate(tmp_path, CPU, torch.float32, 1)
