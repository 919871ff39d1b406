"""What reads headers needs the standard library alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HEAVY = ("torch", "numpy", "safetensors", "transformers", "triton", "scipy", "compressed_tensors")


def test_headers_without_torch(root: Path, tmp_path: Path) -> None:
    """Every module imports, and headers, layouts, copies, stamps and verification work, with none of these loaded."""
    names = sorted(path.stem for path in (root / "formats").glob("*.py"))
    code = (
        "import sys, tempfile, importlib\n"
        "from pathlib import Path\n"
        f"for name in {names!r}: importlib.import_module('rewright.formats.' + name)\n"
        "from rewright.formats.checkpoint import Checkpoint\n"
        "from rewright.formats.compressed_tensors import parse\n"
        "from rewright.formats.digest import source_digest\n"
        "from rewright.formats.draft import Draft, TensorSpec\n"
        "from rewright.formats.publish import lock, partial_path, publish\n"
        "from rewright.formats.verify import verify\n"
        "src = Checkpoint.open(sys.argv[1])\n"
        "dst = Path(sys.argv[2]) / 'out'\n"
        "with lock(dst):\n"
        "    draft = Draft(partial_path(dst))\n"
        "    draft.declare([TensorSpec(e.name, e.dtype, e.shape) for e in src.entries.values()])\n"
        "    for name in src.entries: draft.copy(name, src)\n"
        "    draft.carry(src)\n"
        "    draft.edit_config({'x': 1})\n"
        "    draft.seal({'source': source_digest(src).digest})\n"
        "    publish(draft.path, dst, False)\n"
        "assert parse(src.config) is None\n"
        "assert verify(dst).ok, verify(dst).problems\n"
        f"print(sorted(set({HEAVY!r}) & set(sys.modules)))\n"
    )
    words = [sys.executable, "-c", code, str(root / "tests/data/stories260K"), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
