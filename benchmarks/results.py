"""Results files, `benchmarks/results/<device>.json`: what was measured, on what, with which sources."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cllava_fast import atomic
from cllava_fast.environment import environment

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks" / "results"
KIND = "ops against their rivals"  # other files in the folder are none of ours


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU {platform.machine()}"


def file_name(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def sources() -> dict[str, str]:
    """What decides how fast ops and steps are, file by file; needs no git, so a copied tree has it as well."""
    package = ROOT / "cllava_fast"
    files = [path for part in ("ops", "model", "methods") for path in (package / part).rglob("*.py")]
    files += [package / "pool.py", *(ROOT / "csrc").rglob("*")]
    kept = [path for path in files if path.is_file() and path.suffix in (".py", ".cpp", ".cu", ".h", ".cuh")]
    return {str(path.relative_to(ROOT)): hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in sorted(kept)}


def sources_digest() -> str:
    return hashlib.sha256(json.dumps(sources()).encode()).hexdigest()[:16]


def changed(content: Mapping[str, Any]) -> list[str]:
    """Files that are not what they were when results were measured, as far as those say what they were."""
    then, now = content.get("files"), sources()
    return [] if then is None else sorted(path for path in then | now if then.get(path) != now.get(path))


def commit() -> str | None:
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() or None


def new(quick: bool) -> dict[str, Any]:
    return {
        "kind": KIND,
        "device": device_name(),
        "commit": commit(),
        "sources": sources_digest(),
        "files": sources(),
        "quick": quick,
        "complete": False,
        "load": os.getloadavg()[0],  # before anything was timed
        "environment": environment(),
        "rows": [],
        "breakdowns": [],
    }


def write(results: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(path, json.dumps(results, indent=1) + "\n")


def read_all(folder: Path) -> dict[str, dict[str, Any]]:
    """File name without .json -> results, GPUs first."""
    found = {}
    for path in sorted(folder.glob("*.json"), key=lambda path: (path.name.startswith("cpu"), path.name)):
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("kind") == KIND:
            found[path.stem] = content
    return found


def filled(text: str, mark: str, body: str) -> str:
    """A page with `body` between `<!-- mark -->` and the next `<!-- end -->`."""
    pattern = re.compile(f"<!-- {re.escape(mark)} -->.*?<!-- end -->", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"expected one <!-- {mark} --> with an <!-- end -->; put the marks where it belongs")
    return pattern.sub(lambda _: f"<!-- {mark} -->\n\n{body}\n\n<!-- end -->", text)


def fill(page: Path, mark: str, body: str) -> None:
    """Writes the page `filled`."""
    try:
        text = filled(page.read_text(encoding="utf-8"), mark, body)
    except ValueError as error:
        raise ValueError(f"{page}: {error}") from None
    atomic.write_text(page, text)
