"""The import rules, read from the source: who may import whom, what may load when, who reads the environment."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("cli", "passes", "kernels", "formats")
BELOW = {
    "cli": {"cli", "passes", "kernels", "formats"},
    "passes": {"passes", "kernels", "formats"},
    "kernels": {"kernels"},
    "formats": {"formats"},
}
HEAVY = {"torch", "transformers", "triton", "scipy", "numpy", "safetensors"}
# Shared by the passes, hence free to be imported by each of them.
COMMON = {"models"}
LIGHT = (
    *(
        f"passes/{name}.py"
        for name in (
            "spec",
            "registry",
            "recipe",
            "pipeline",
            "survey",
            "document",
            "journal",
            "world",
            "chunks",
            "errors",
        )
    ),
    *(f"passes/{name}.py" for name in ("stages", "workspace", "keys", "inputs", "bounds", "machine", "rates")),
    *(f"passes/{name}.py" for name in ("context", "run_options", "summary", "compare", "values", "wants", "svg")),
    *(f"formats/{name}.py" for name in ("header", "shards", "digest", "provenance", "publish", "errors")),
)
ENVIRONMENT = {"cli/environment.py", "kernels/dispatch.py"}

SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def _label(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _pass_of(path: Path) -> str | None:
    """The pass whose folder a file is in."""
    folder, *inside = path.relative_to(ROOT).parts
    return inside[0] if folder == "passes" and len(inside) > 1 and inside[0] not in COMMON else None


def _typing_only(node: ast.If) -> bool:
    return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _imports(node: ast.AST, *, module_level: bool) -> Iterator[str]:
    """Dotted names that are imported; at module level only those that run when the module is imported."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif module_level and (
            isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            or (isinstance(child, ast.If) and _typing_only(child))
        ):
            continue
        else:
            yield from _imports(child, module_level=module_level)


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def _ours(path: Path) -> Iterator[tuple[str, ...]]:
    for name in _imports(_tree(path), module_level=False):
        first, *rest = name.split(".")
        assert first not in FOLDERS, f"`{name}` must be imported as `rewright.{name}`"
        if first == "rewright":
            yield tuple(rest)


@pytest.mark.parametrize("path", SOURCES, ids=_label)
def test_imports_go_downwards(path: Path) -> None:
    here = path.relative_to(ROOT).parts[0]
    above = [".".join(name) for name in _ours(path) if name[0] not in BELOW[here]]
    assert not above


@pytest.mark.parametrize("path", [p for p in SOURCES if _pass_of(p) is not None], ids=_label)
def test_a_pass_imports_no_other_pass(path: Path) -> None:
    others = {p.name for p in (ROOT / "passes").iterdir() if p.is_dir()} - COMMON - {_pass_of(path)}
    assert not [name for name in _ours(path) if name[0] == "passes" and name[1] in others]


@pytest.mark.parametrize(
    "path",
    [p for p in SOURCES if _label(p).startswith("cli/") or _label(p) in LIGHT or p.name == "spec.py"],
    ids=_label,
)
def test_nothing_heavy_at_module_level(path: Path) -> None:
    found = {name.split(".")[0] for name in _imports(_tree(path), module_level=True)}
    assert not found & HEAVY


@pytest.mark.parametrize("path", SOURCES, ids=_label)
def test_one_table_reads_the_environment(path: Path) -> None:
    if _label(path) in ENVIRONMENT:
        return
    reads = [
        node.lineno
        for node in ast.walk(_tree(path))
        if (isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv", "putenv"))
        or (isinstance(node, ast.alias) and node.name in ("environ", "getenv"))
    ]
    assert not reads


def test_only_the_command_line_knows_typer() -> None:
    shells = {"typer", "click", "rich"}
    for path in SOURCES:
        if not _label(path).startswith("cli/"):
            names = {name.split(".")[0] for name in _imports(_tree(path), module_level=False)}
            assert not names & shells, path
        assert "click" not in {name.split(".")[0] for name in _imports(_tree(path), module_level=False)}


def test_kernels_is_no_package_of_its_own() -> None:
    """Hugging Face has a package `kernels`, and transformers takes whatever answers to that name."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = "from transformers import LlamaForCausalLM; print(LlamaForCausalLM.__name__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "LlamaForCausalLM", done.stderr


def test_specs_load_nothing_heavy() -> None:
    code = f"import sys, rewright.passes.registry, rewright.passes.recipe\nprint(*sorted(set(sys.modules) & {HEAVY!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr, done.returncode) == ("", "", 0)
