"""``cllava-fast env``."""

from __future__ import annotations

import argparse

EXAMPLE = "example: cllava-fast env"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It takes none."""


def run(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from cllava_fast.environment import environment
    from cllava_fast.ops import dispatch

    console = Console()
    versions = Table("what", "value", title="environment")
    for name, value in environment().items():
        versions.add_row(name, "none" if value is None else str(value))
    console.print(versions)
    ops: dict[tuple[str, bool, str], list[str]] = {}
    rows = dispatch.table()
    installed = {row.backend for row in rows if not row.reason.startswith(dispatch.NOT_REGISTERED)}
    for row in rows:
        reason = row.reason
        if reason.startswith(dispatch.NOT_REGISTERED):
            reason = "has no such kernel" if row.backend in installed else "not in this installation"
        ops.setdefault((row.backend, row.available, reason), []).append(row.op)
    backends = Table("backend", "runs here", "why", "ops", title="backends, the first that can run a call does")
    for name in dispatch.ORDER:
        for (backend, available, reason), names in ops.items():
            if backend == name:
                backends.add_row(name, "yes" if available else "no", reason, ", ".join(names))
    console.print(backends)
    return 0
