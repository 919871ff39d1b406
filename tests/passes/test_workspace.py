"""The folder of partial work, as another process of the same run may leave it at any moment."""

from __future__ import annotations

import os
from pathlib import Path
from unittest.mock import patch

import pytest

from rewright.formats.errors import ConflictError
from rewright.passes.workspace import Workspace


def test_a_run_that_another_process_begins_between_two_looks(tmp_path: Path) -> None:
    """No record at the first look, and one in the listing: it is ours, begun meanwhile."""
    dst = tmp_path / "out"
    partial = tmp_path / "out.partial"
    partial.mkdir()
    listed = os.listdir

    def begins(path: Path) -> list[str]:
        Workspace(partial, None).begin({"key": "this run"})
        return listed(path)

    with patch("rewright.passes.workspace.os.listdir", begins):
        assert Workspace.beside(dst).continues("this run", forced=False)


def test_a_folder_of_somebody_else(tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    assert Workspace.beside(tmp_path / "out").record is None
    (partial / "thesis.tex").write_text("mine")
    with pytest.raises(ConflictError, match="is not Rewright's"):
        Workspace.beside(tmp_path / "out")
