"""What a run left on the disk, in a form to compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def without_times(value: Any) -> Any:
    """JSON without what differs between two runs of the same work: its seconds."""
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key != "seconds"}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Mode and bytes of every file, by relative path; JSON of ours without its times, and their digests."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        data = path.read_bytes() if path.is_file() else b""
        if name == "rewright.json" or (name.startswith("reports/") and name.endswith(".json")):
            document = without_times(json.loads(data)) if data else None
            if name == "rewright.json":
                document["files"] = {key: file for key, file in document["files"].items() if "reports/" not in key}
            data = json.dumps(document).encode()
        found[name] = (path.stat().st_mode, data)
    return found


def stamp(folder: Path) -> dict[str, Any]:
    document = json.loads((folder / "rewright.json").read_bytes())
    assert isinstance(document, dict)
    return document


def journal(scratch: Path) -> dict[str, Any]:
    """The whole lines of a stage's journal by unit."""
    file = scratch / "journal.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return {record["unit"]: record["data"] for record in map(json.loads, lines)}


def beside(dst: Path) -> list[str]:
    """Names that stand next to a destination and begin with its name."""
    return sorted(path.name for path in dst.parent.iterdir() if path.name != dst.name and dst.name in path.name)
