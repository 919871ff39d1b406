"""The files that options name: their bytes, and the digests that enter the key. Standard library only."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

from rewright.formats.checkpoint import Checkpoint
from rewright.formats.digest import source_digest
from rewright.formats.errors import reason
from rewright.passes.errors import InputError
from rewright.passes.spec import fields_of

STDIN = Path("-")


def paths_of(options: Any) -> list[Path]:
    """The files that a pass's options name."""
    found: list[Path] = []
    for item in fields_of(type(options)):
        value = getattr(options, item.name)
        if item.type is Path and value is not None:
            found += value if item.many else (value,)
    return found


class Inputs:
    """Option files of one run; `-` is standard input. What is read is what the key was made of, or an error."""

    def __init__(self) -> None:
        self._stdin: bytes | None = None
        self._digests: dict[Path, str] = {}

    def read(self, path: Path) -> bytes:
        """The bytes of a file or of standard input. Raises InputError, also when they changed since the last time."""
        data = self._bytes(path)
        digest = hashlib.sha256(data).hexdigest()
        if self._digests.setdefault(path, digest) != digest:
            raise InputError(f"`{path}` changed while it was in use", hint="run again, with a file that stays as it is")
        return data

    def digest(self, path: Path) -> str:
        """sha256 of the contents, hexadecimal."""
        if path not in self._digests:
            self.read(path)
        return self._digests[path]

    def _bytes(self, path: Path) -> bytes:
        if path == STDIN:
            if self._stdin is None:
                self._stdin = sys.stdin.buffer.read()
            return self._stdin
        try:
            return path.read_bytes()
        except IsADirectoryError:
            raise InputError(f"`{path}` is a directory, not a text file") from None
        except OSError as error:
            raise InputError(f"`{path}` cannot be read: {reason(error)}") from None

    def digests_of(self, options: Any) -> dict[str, list[str]]:
        """The digests of every file and checkpoint that a pass's options name, by flag."""
        found: dict[str, list[str]] = {}
        for item in fields_of(type(options)):
            value = getattr(options, item.name)
            if item.opt.affects == "result" and value is not None:
                digests = [self._digest_of(one) for one in (value if item.many else (value,))]
                if kept := [digest for digest in digests if digest is not None]:
                    found[item.flag] = kept
        return found

    def _digest_of(self, value: Any) -> str | None:
        """The digest of what an option's value names; None where it names nothing."""
        checkpoint = getattr(value, "checkpoint", None)
        if checkpoint is not None:
            return self.digest_of_checkpoint(checkpoint)
        files = getattr(value, "files", None)
        if files is not None:
            told = "".join(f"{key} {self.digest(path)}\n" for key, path in sorted(files.items()))
            return hashlib.sha256(told.encode()).hexdigest()
        file = value if isinstance(value, Path) else getattr(value, "file", None)
        return None if file is None else self.digest(file)

    def digest_of_checkpoint(self, path: Path) -> str:
        """sha256 over all files of a checkpoint, each of which is read."""
        if path not in self._digests:
            self._digests[path] = source_digest(Checkpoint.open(path), {}).digest
        return self._digests[path]
