"""Publishing: apart, whole, exchanged where the disk can, and without loss where it cannot."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rewright.formats import publish as publishing
from rewright.formats.errors import ConflictError, OverlapError, StorageError
from rewright.formats.locks import aside_path
from rewright.formats.publish import check_apart, discard, ensure_room, lock, partial_path, publish
from tests.formats.samples import snapshot


def ready(place: Path, text: str = "new") -> Path:
    place.mkdir()
    (place / "file").write_text(text)
    return place


def test_first(tmp_path: Path) -> None:
    publish(ready(tmp_path / "out.partial"), tmp_path / "out", replace=False)
    assert (tmp_path / "out/file").read_text() == "new"
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("kind", ["folder", "empty", "file", "dangling"])
def test_what_exists_stays(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("old")
    elif kind == "dangling":
        (tmp_path / "nowhere").symlink_to("gone")
        out.symlink_to("loop")
        (tmp_path / "loop").symlink_to("out")
    else:
        out.mkdir()
        if kind == "folder":
            (out / "file").write_text("old")
    new = ready(tmp_path / "out.partial")
    with pytest.raises(ConflictError):
        publish(new, out, replace=False)
    assert (new / "file").read_text() == "new"


def test_no_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("old")
    with pytest.raises(ConflictError, match="not a folder"):
        publish(ready(tmp_path / "out.partial"), tmp_path / "out", replace=True)
    assert (tmp_path / "out").read_text() == "old"


def refusing(code: int) -> object:
    def refuse(old: Path, new: Path, flags: int) -> None:
        raise OSError(code, os.strerror(code))

    return refuse


@pytest.mark.parametrize("code", [0, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_replace(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if code:
        monkeypatch.setattr(publishing, "_renameat2", refusing(code))
    ready(tmp_path / "out", "old")
    new = ready(tmp_path / "out.partial")
    publish(new, tmp_path / "out", replace=True)
    assert (tmp_path / "out/file").read_text() == "new"
    assert (new / "file").read_text() == "old"
    discard(new)
    assert sorted(os.listdir(tmp_path)) == ["out"]


@pytest.mark.parametrize("code", [errno.EINVAL])
def test_first_without_the_call(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "_renameat2", refusing(code))
    publish(ready(tmp_path / "out.partial"), tmp_path / "out", replace=False)
    assert (tmp_path / "out/file").read_text() == "new"


def test_other_failures_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "_renameat2", refusing(errno.EACCES))
    ready(tmp_path / "out", "old")
    with pytest.raises(StorageError, match=r"cannot publish .*: permission denied"):
        publish(ready(tmp_path / "out.partial"), tmp_path / "out", replace=True)
    assert (tmp_path / "out/file").read_text() == "old"


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_fallback_never_loses_the_old(failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The crash comes at the first, second or third rename; the next run's lock finds an output at `out` again."""
    monkeypatch.setattr(publishing, "_renameat2", refusing(errno.EINVAL))
    ready(tmp_path / "out", "old")
    new = ready(tmp_path / "out.partial")
    rename, count = Path.rename, 0

    class Crash(BaseException):
        pass

    def crash(self: Path, target: Path) -> Path:
        nonlocal count
        count += 1
        if count == failing:
            raise Crash
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", crash)
        with pytest.raises(Crash):
            publish(new, tmp_path / "out", replace=True)
    with lock(tmp_path / "out"):
        assert (tmp_path / "out/file").read_text() == ("new" if failing == 3 else "old")
        assert not aside_path(tmp_path / "out").exists()


def test_fallback_that_fails_halfway_puts_the_old_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "_renameat2", refusing(errno.EINVAL))
    ready(tmp_path / "out", "old")
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name == "out.partial":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(StorageError):
        publish(ready(tmp_path / "out.partial"), tmp_path / "out", replace=True)
    assert (tmp_path / "out/file").read_text() == "old"
    assert (tmp_path / "out.partial/file").read_text() == "new"


def test_readers_see_one_or_the_other(tmp_path: Path) -> None:
    """While outputs are exchanged over and over, a reader never finds the destination absent or mixed."""
    for name, text in (("out", "old"), ("out.partial", "new")):
        (tmp_path / name).mkdir()
        for part in ("a", "b"):
            (tmp_path / name / part).write_text(text)
    code = (
        "import os, sys\n"
        "seen = set()\n"
        "print('ready', flush=True)\n"
        "while len(seen) < 2 or not os.path.exists(sys.argv[1] + '.stop'):\n"
        "    fd = os.open(sys.argv[1], os.O_RDONLY)\n"
        "    texts = {open(os.open(n, os.O_RDONLY, dir_fd=fd)).read() for n in ('a', 'b')}\n"
        "    assert len(texts) == 1, texts\n"
        "    seen |= texts\n"
        "    os.close(fd)\n"
    )
    out = tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == b"ready\n"
        for _ in range(400):
            publish(tmp_path / "out.partial", out, replace=True)
        (tmp_path / "out.stop").touch()
        while reader.poll() is None:
            publish(tmp_path / "out.partial", out, replace=True)
        assert reader.returncode == 0


def test_partial_is_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert partial_path(tmp_path / "out") == tmp_path / "out.partial"
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to("far/out")
    assert partial_path(tmp_path / "link") == tmp_path / "far/out.partial"
    monkeypatch.chdir(tmp_path)
    assert partial_path("out/") == tmp_path / "out.partial"
    with pytest.raises(ConflictError):
        partial_path("/")


def test_scratch_is_not_published(tmp_path: Path) -> None:
    new = ready(tmp_path / "out.partial")
    (new / ".rewright-written").write_text("a\n")
    publish(new, tmp_path / "out", replace=False)
    assert os.listdir(tmp_path / "out") == ["file"]


OVERLAPS = [
    ("model", "model"),
    ("model", "model/"),
    ("model", "model/out"),
    ("model", "model/deep/er"),
    ("model", "."),
    ("model", "link"),
    ("link", "model"),
    ("link", "model/out"),
    ("model", "link/out"),
    ("model/model.safetensors", "model"),
    ("model/model.safetensors", "model/model.safetensors"),
    ("model/model.safetensors", "model/out"),
    ("file.safetensors", "model/out"),
    ("file.safetensors", "model"),
    ("model/../model", "model"),
]


@pytest.mark.parametrize(("src", "dst"), OVERLAPS)
def test_overlaps(src: str, dst: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = model.parent
    (root / "link").symlink_to("model")
    (root / "file.safetensors").symlink_to("model/model.safetensors")
    monkeypatch.chdir(root)
    before = {file: file.read_bytes() for file in model.iterdir()}
    with pytest.raises(OverlapError) as caught:
        check_apart(src, dst)
    assert caught.value.hint
    assert {file: file.read_bytes() for file in model.iterdir()} == before


def test_source_made_of_links_into_the_destination(model: Path, tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    for file in model.iterdir():
        (tmp_path / "links" / file.name).symlink_to(file)
    with pytest.raises(OverlapError, match="is a link into the destination"):
        check_apart(tmp_path / "links", model)


@pytest.mark.parametrize("name", ["out.partial", ".out.aside"])
def test_source_at_the_place_of_partial_work(name: str, model: Path, tmp_path: Path) -> None:
    model.rename(tmp_path / name)
    with pytest.raises(OverlapError, match=name):
        check_apart(tmp_path / name, tmp_path / "out")


def test_what_is_apart(model: Path, tmp_path: Path) -> None:
    (model / "config.json").rename(tmp_path / "kept")
    check_apart(model, tmp_path / "model2")
    check_apart(model / "model.safetensors", model / "out")
    (tmp_path / "kept").rename(model / "config.json")
    place = snapshot(model, tmp_path / "hub")
    check_apart(place, tmp_path / "out")
    check_apart(place, place.parent / "out")


def test_room(tmp_path: Path) -> None:
    ensure_room(tmp_path / "a/b/c", 1)
    with pytest.raises(StorageError, match=r"needs \d+ bytes and its disk has \d+ free"):
        ensure_room(tmp_path / "a/b/c", 2**62)
