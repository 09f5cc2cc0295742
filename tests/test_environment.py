"""What is missing is named, with the way to get it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from cllava_fast.environment import require


def test_an_installed_module_is_imported() -> None:
    assert require("os.path", "anything").join("a", "b") == "a/b"


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    with pytest.raises(ModuleNotFoundError, match="pictures: needs matplotlib, .* pip install matplotlib"):
        require("matplotlib.figure", "pictures")
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ModuleNotFoundError, match="pip install sentence-transformers"):
        require("sentence_transformers", "surrogate='sentence'")


def test_what_an_installed_package_misses_is_its_own_affair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "installed_here.py").write_text("import missing_below\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="No module named 'missing_below'"):
        require("installed_here", "anything")
