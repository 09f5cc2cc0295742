"""Files and folders appear whole or not at all."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest

from cllava_fast import atomic
from cllava_fast.atomic import (
    DamagedError,
    MissingError,
    SaveError,
    new_folder,
    read_json,
    remove_folder,
    sweep,
    write_file,
    write_json,
    write_text,
)


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
def test_a_link_stays_a_link(existed: bool, tmp_path: Path) -> None:
    target, link = tmp_path / "releases" / "5", tmp_path / "current"
    if existed:
        target.mkdir(parents=True)
    link.symlink_to(Path("releases") / "5")
    with new_folder(link) as folder:
        (folder / "a.txt").write_text("new")
    assert link.is_symlink() and contents(tmp_path / "releases") == {"5/a.txt": "new"}
    assert sorted(p.name for p in (*tmp_path.iterdir(), *target.parent.iterdir())) == ["5", "current", "releases"]


@pytest.mark.parametrize("path", [".", "../out", ""])
def test_the_current_directory_is_not_replaced(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    with pytest.raises(ValueError, match="out is the current directory, .*; give a folder within it"):
        with new_folder(Path(path)) as folder:
            (folder / "a.txt").write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and not list(Path().iterdir())


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


def test_contents_reach_the_disk_before_their_name_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, str]] = []
    flushed: list[int] = []
    to_disk, replace, rename = atomic._to_disk, os.replace, Path.rename

    def plain(path: Path) -> str:
        return "/".join(part for part in path.relative_to(tmp_path).parts if "partial" not in part)

    monkeypatch.setattr(atomic, "_to_disk", lambda path: (done.append(("sync", plain(path))), to_disk(path)))
    monkeypatch.setattr(os, "fsync", flushed.append)
    monkeypatch.setattr(os, "replace", lambda old, new: (done.append(("name", new.name)), replace(old, new)))
    monkeypatch.setattr(Path, "rename", lambda old, new: (done.append(("name", new.name)), rename(old, new))[1])
    write_text(tmp_path / "a.txt", "one")
    assert done == [("sync", ""), ("name", "a.txt"), ("sync", "")]  # the file, its name, the folder
    assert len(flushed) == 2
    done.clear()
    with new_folder(tmp_path / "out") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "b.txt").write_text("two")
    named = done.index(("name", "out"))
    assert {("sync", "new"), ("sync", "new/sub"), ("sync", "new/sub/b.txt")} <= set(done[:named])
    assert ("sync", "") in done[named:]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_no_space_and_no_permission_are_a_sentence(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text(tmp_path / "a.txt", "old")

    def refuse(path: Path) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(atomic, "_to_disk", refuse)
    sentence = f"a.txt cannot be written: {os.strerror(number)}; what was saved before is untouched"
    with pytest.raises(SaveError, match=sentence):
        write_text(tmp_path / "a.txt", "new")
    with pytest.raises(SaveError, match="out cannot be written"), new_folder(tmp_path / "out") as folder:
        (folder / "b.txt").write_text("new")
    assert contents(tmp_path) == {"a.txt": "old"} and len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_made_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("keep")
    for check in (atomic.check_empty, lambda path: atomic.check_replaceable(path, (), "nothing")):
        check(tmp_path / "new" / "folder")
        with pytest.raises(SaveError, match="file is no folder that can be written to"):
            check(tmp_path / "file" / "new" / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_that_is_read_meanwhile_is_not_blamed_on_the_folder(tmp_path: Path) -> None:
    with pytest.raises(PermissionError, match="secret.png"), new_folder(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere/secret.png")
    (tmp_path / "a").write_text("a file")
    with (
        pytest.raises(SaveError, match="a/b/c cannot be written: Not a directory"),
        new_folder(tmp_path / "a" / "b" / "c"),
    ):
        pass


def test_json_knows_when_it_was_changed(tmp_path: Path) -> None:
    file, values = tmp_path / "a.json", {"matrix": [[0.1 + 0.2, None]], "task": "ä"}
    write_json(file, values)
    assert read_json(file) == values
    whole = file.read_bytes()
    for _ in range(50):
        content = bytearray(whole)
        content[random.randrange(len(content) - 1)] ^= 1 << random.randrange(8)
        file.write_bytes(content)
        try:
            found = read_json(file)
        except DamagedError:
            continue
        assert found == values  # a blank became another
    for broken in (whole[: random.randrange(len(whole) - 2)], b"[]", b"3"):
        file.write_bytes(broken)
        with pytest.raises(DamagedError, match="a.json is damaged"):
            read_json(file)
    file.unlink()
    with pytest.raises(MissingError, match="a.json is missing"):
        read_json(file)


def test_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    (tmp_path / ".a.txt.partial-1").write_text("half")
    for left in (".out.partial-x", ".kept.partial-y"):
        (tmp_path / left / "old").mkdir(parents=True)
        (tmp_path / left / "old" / "b.txt").write_text("old")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "b.txt").write_text("new")
    (tmp_path / ".mine").write_text("keep")
    sweep(tmp_path)
    assert contents(tmp_path) == {"out/b.txt": "old", "kept/b.txt": "new", ".mine": "keep"}
    remove_folder(tmp_path / "out")
    remove_folder(tmp_path / "nothing")
    assert contents(tmp_path) == {"kept/b.txt": "new", ".mine": "keep"}


@pytest.mark.parametrize("text", ["[" * 100_000, "[1]", "3", '{"a": 1}', "", "\ufeff{}"])
def test_what_is_no_saved_json_is_damaged(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(DamagedError, match="a.json is damaged"):
        read_json(tmp_path / "a.json")
