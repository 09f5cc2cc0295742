"""Files and folders appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cllava_fast.atomic import new_folder, write_file, write_text


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_a_file_is_replaced(tmp_path: Path) -> None:
    for text in ("one", "two"):
        write_text(tmp_path / "a.txt", text)
        assert contents(tmp_path) == {"a.txt": text}


def test_a_failing_write_leaves_the_old_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "old")

    def half(path: Path) -> None:
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_file(tmp_path / "a.txt", half)
    assert contents(tmp_path) == {"a.txt": "old"}


def test_a_folder_is_replaced_with_all_that_it_held(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    for name in ("a.txt", "b.txt"):
        with new_folder(target) as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / name).write_text(name)
            assert not target.exists() or contents(target) == {"sub/a.txt": "a.txt"}
        assert contents(tmp_path) == {f"deep/out/sub/{name}": name}
    umask = os.umask(0)
    os.umask(umask)
    assert target.stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.parametrize("existed", [False, True])
def test_a_failing_block_leaves_the_old_folder(existed: bool, tmp_path: Path) -> None:
    if existed:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "a.txt").write_text("old")
    before = contents(tmp_path)
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out") as folder:
        (folder / "a.txt").write_text("new")
        raise KeyboardInterrupt
    assert contents(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if existed else [])


def test_a_failing_rename_brings_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.txt").write_text("old")
    rename = Path.rename

    def fails_for_the_new(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError("device gone")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_for_the_new)
    with pytest.raises(OSError, match="device gone"), new_folder(tmp_path / "out") as folder:
        (folder / "a.txt").write_text("new")
    assert contents(tmp_path) == {"out/a.txt": "old"}
