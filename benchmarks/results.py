"""Results files, `benchmarks/results/<device>.json`: what was measured, on what, with which sources."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
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


def sources_digest() -> str:
    """Of what decides how fast ops and steps are; needs no git, so a copied tree has one as well."""
    package = ROOT / "cllava_fast"
    files = [path for part in ("ops", "model", "methods") for path in (package / part).rglob("*.py")]
    files += [package / "pool.py", *(ROOT / "csrc").rglob("*")]
    digest = hashlib.sha256()
    for path in sorted(
        path for path in files if path.is_file() and path.suffix in (".py", ".cpp", ".cu", ".h", ".cuh")
    ):
        digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def commit() -> str | None:
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() or None


def new(quick: bool) -> dict[str, Any]:
    return {
        "kind": KIND,
        "device": device_name(),
        "commit": commit(),
        "sources": sources_digest(),
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
    pattern = re.compile(f"<!-- {mark} -->.*?<!-- end -->", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"expected one <!-- {mark} --> with an <!-- end -->; put the marks where it belongs")
    return pattern.sub(lambda _: f"<!-- {mark} -->\n\n{body}\n\n<!-- end -->", text)
