"""Measures what `cllava_fast/ops/tuned.py` reads: ``make tune PY=python3`` on the GPU that it is for; commit the file.

First the tiles of the inject kernels, against those of arithmetic; then, with the tiles that won, the backends of each
op against each other. What gives another result than the default, or the reference, is out. What is not at least 3 %
ahead changes nothing. Beyond --minutes nothing new is begun, and the table says that it is not complete. It is written
after each comparison, so that what is cut off leaves what it found; a complete one is replaced at the end alone.

Exits with 1 if something was wrong or failed (the table is written without it), with 2 if there is no GPU to tune for.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure, results, tune_backends, tune_tiles
from benchmarks.tune_tiles import Found, Timer
from cllava_fast import atomic
from cllava_fast.environment import environment
from cllava_fast.ops import native, triton_backend, tuned

DEVICE = "cuda"
MINUTES = 5.5
TILES_SHARE = 0.6  # of the time, at most
SECONDS = 0.1  # of a comparison, most of whose time goes into compiling


def missing() -> str | None:
    """Why nothing can be tuned here."""
    if not torch.cuda.is_available():
        return f"there is no CUDA device that torch {torch.__version__} can use: tune on the GPU that the table is for"
    if triton_backend.INTERPRETED:
        return "this process interprets its kernels: unset TRITON_INTERPRET"
    return triton_backend.usable()


def measured(
    quick: bool, minutes: float, timer: Timer, progress: Callable[[str], None], keep: Callable[[Found, Found], Any]
) -> tuple[Found, Found]:
    """The rows of tiles, and those of backends; `keep` is handed what there is, again and again."""
    start = time.monotonic()
    nothing = Found([], [], 0, False)

    def over(share: float) -> Callable[[], bool]:
        return lambda: time.monotonic() > start + 60 * minutes * share

    with tuned.using(None):  # not what an older table says
        progress("tiles ...")
        points = tune_tiles.points(quick)
        tiles = tune_tiles.find(points, DEVICE, timer, over(TILES_SHARE), lambda found: keep(found, nothing))
    with tuned.using(tuned.parse(table(tiles, nothing))):
        progress(f"backends, after {time.monotonic() - start:.0f} s ...")
        cases = tune_backends.QUICK if quick else tune_backends.CASES
        work = tune_backends.work(cases, DEVICE)
        backends = tune_backends.find(work, timer, over(1.0), lambda found: keep(tiles, found))
    return tiles, backends


def table(tiles: Found, backends: Found) -> dict[str, Any]:
    return {
        "kind": tuned.KIND,
        "architecture": tuned.architecture(torch.device(DEVICE)),
        "device": results.device_name(),
        "commit": results.commit(),
        "complete": tiles.complete and backends.complete,
        "environment": {name: value for name, value in environment().items() if name != "tuned"},
        "tiles": tiles.rows,
        "avoid": backends.rows,
    }


def write(content: dict[str, Any], path: Path) -> None:
    """Whole or not at all, and never a table that would be refused."""
    tuned.parse(content, path.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(path, render(content))


def is_complete(path: Path | None) -> bool:
    """Whether a table lies there that says so of itself."""
    try:
        return path is not None and json.loads(path.read_text())["complete"] is True
    except (OSError, ValueError, TypeError, KeyError):
        return False


def render(content: dict[str, Any]) -> str:
    """One row a line, so that a change of one is a change of a line."""
    lines = []
    for name, value in content.items():
        text = json.dumps(value)
        if isinstance(value, list) and value:
            text = "[\n" + ",\n".join(f"  {json.dumps(row)}" for row in value) + "\n ]"
        lines.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def show(content: dict[str, Any], tiles: Found, backends: Found) -> None:
    for reason in (*tiles.out, *backends.out):
        print(f"out: {reason}")
    print(f"\n{content['architecture']}, {content['device']}: {'' if content['complete'] else 'NOT '}complete")
    print(f"tiles: {len(tiles.rows)} of {tiles.measured} sizes have faster ones")
    for row in tiles.rows:
        ratio = row["default_microseconds"] / row["microseconds"]
        name = f"{row['kernel']:<7} {row['dtype']:<9} {row['columns']:>4} columns {row['tokens']:>6} tokens"
        print(f"  {name} {row['microseconds']:>9.1f} us  {ratio:.2f}x  {'-'.join(map(str, row['tiles'].values()))}")
    refusal = native.cuda_usable()
    left_out = f"; without cuda: {refusal}" if refusal else ""
    print(f"backends: {len(backends.rows)} losers in {backends.measured} calls{left_out}")
    for row in backends.rows:
        sizes = " ".join(f"{name}<={most}" for name, (_, most) in row["sizes"].items())
        name = f"{row['op']:<20} {row['dtype']:<9} {row['backend']:>7} {row['ratio']:.2f}x of {row['instead']:<9}"
        print(f"  {name} {sizes}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: where the library looks for it")
    parser.add_argument("--quick", action="store_true", help="a few sizes; writes a file only with --out")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="begin nothing later (default: %(default)s)")
    given = parser.parse_args(arguments)
    refusal = missing()
    if refusal is not None:
        print(f"tune: {refusal}", file=sys.stderr)
        return 2

    def timer(runs: tune_tiles.Runs, launch: str) -> dict[Any, float]:
        return measure.turns(runs, launch, SECONDS)

    path = given.out or (None if given.quick else tuned.FOLDER / f"{tuned.architecture(torch.device(DEVICE))}.json")

    stays = is_complete(path)

    def keep(tiles: Found, backends: Found) -> None:
        if path is not None and not stays:
            write(table(tiles, backends), path)

    tiles, backends = measured(given.quick, given.minutes, timer, lambda text: print(text, flush=True), keep)
    content = table(tiles, backends)
    if path is not None:
        write(content, path)
    show(content, tiles, backends)
    print(f"written to {path}" if path else "nothing written: give --out FILE")
    return 1 if tiles.out or backends.out else 0


if __name__ == "__main__":
    sys.exit(main())
