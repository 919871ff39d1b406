"""What is installed is what is in the tree, and runs from any folder."""

from __future__ import annotations

import ast
import email
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.message import Message
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("cli", "passes", "kernels", "formats")
PACKAGED = ("pyproject.toml", "README.md", "LICENSE", ".src", *FOLDERS)


def _project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return found


def _run(words: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        words, cwd=folder, env=inherited | environment, capture_output=True, text=True, check=False, timeout=300
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a source distribution of a copy of the tree, without the network."""
    tree, made = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in PACKAGED:
        if (ROOT / name).is_dir():
            unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=unwanted)
        else:
            shutil.copy(ROOT / name, tree / name)
    done = _run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(made), str(tree)], tree)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (found,) = made.glob("*.whl")
    assert list(made.glob("*.tar.gz"))
    return found


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def _metadata(unpacked: Path) -> Message:
    (found,) = unpacked.glob("*.dist-info")
    return email.message_from_string((found / "METADATA").read_text(encoding="utf-8"))


def test_the_wheel_holds_the_tree(unpacked: Path) -> None:
    expected = {path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    held = {p.relative_to(unpacked / "rewright").as_posix() for p in (unpacked / "rewright").rglob("*") if p.is_file()}
    assert held == expected | {"__main__.py"}
    for name in expected:
        assert (unpacked / "rewright" / name).read_bytes() == (ROOT / name).read_bytes()
    assert not any(path.is_symlink() for path in unpacked.rglob("*"))
    assert {path.name for path in unpacked.iterdir()} == {"rewright", next(unpacked.glob("*.dist-info")).name}


def test_the_wheel_says_what_the_project_says(unpacked: Path) -> None:
    project, metadata = _project(), _metadata(unpacked)
    assert (metadata["Name"], metadata["Version"]) == (project["name"], project["version"])
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == project["requires-python"]
    assert len([r for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r]) == len(
        project["dependencies"]
    )
    (entry,) = unpacked.glob("*.dist-info/entry_points.txt")
    assert "rewright = rewright.cli.main:main" in entry.read_text(encoding="utf-8")
    assert list(unpacked.glob("*.dist-info/licenses/LICENSE"))


def test_the_wheel_runs_from_another_folder(unpacked: Path, tmp_path: Path) -> None:
    place = {"PYTHONPATH": str(unpacked)}
    where = (
        "import rewright.cli.main, rewright.passes.compress.spec as s; print(rewright.cli.main.__file__, s.__file__)"
    )
    found = _run([sys.executable, "-c", where], tmp_path, **place)
    assert [Path(line).is_relative_to(unpacked) for line in found.stdout.split()] == [True, True], found.stderr
    told = _run([sys.executable, "-m", "rewright", "--version"], tmp_path, **place)
    assert (told.stdout, told.returncode) == (f"rewright {_project()['version']}\n", 0), told.stderr
    listed = _run([sys.executable, "-m", "rewright", "passes"], tmp_path, **place)
    assert listed.stdout.startswith("compress "), listed.stderr


@pytest.mark.parametrize("words", [[sys.executable, "-m", "rewright"], [str(Path(sys.executable).parent / "rewright")]])
def test_the_installation_runs_from_another_folder(words: list[str], tmp_path: Path) -> None:
    told = _run([*words, "--version"], tmp_path)
    assert (told.stdout, told.stderr, told.returncode) == (f"rewright {_project()['version']}\n", "", 0)


def test_every_import_is_declared() -> None:
    declared = {word.split(";")[0].split(">")[0].strip().replace("-", "_") for word in _project()["dependencies"]}
    imported = set()
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module:
                    imported.add(node.module.split(".")[0])
    assert imported - set(sys.stdlib_module_names) - {"rewright"} <= declared


def test_versions_agree() -> None:
    version = _project()["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_ci_pins_what_the_project_asks_for() -> None:
    pins = dict(
        line.split("==")
        for line in (ROOT / ".ci/constraints.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line
    )
    known = {name.lower().replace("_", "-") for name in pins}
    project = _project()
    asked = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    names = {word.split(";")[0].split(">")[0].strip() for word in asked if not word.startswith("rewright")}
    assert names <= known
