"""``make fuzz``: feeds each reader of ``readers.py`` inputs that grow towards code not yet seen, and counts what came.

With atheris (``pip install atheris``) mutations are guided by coverage; without it they are random. What breaks a
reader's promise is kept in ``runs/fuzz``; the counts go to a results file.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CORPUS = Path(__file__).parent / "corpus"
ROOT = Path(__file__).resolve().parents[2]
INSTRUMENTED = ["cllava_fast", "yaml", "json", "PIL"]
SLOW = 60  # seconds for one input: a hang, on a busy machine too


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("readers", nargs="*", help="(default: all)")
    parser.add_argument("--seconds", type=int, default=60, help="for each reader (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="results file to write (default: print only)")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # this process fuzzes readers itself
    given, rest = parser.parse_known_args(argv)
    if given.one:
        return _atheris(given.one.split(","), Path(given.readers[0]), rest)
    if rest:
        parser.error(f"unknown {rest[0]}")
    from tests.fuzz.readers import READERS

    if unknown := set(given.readers) - set(READERS):
        parser.error(f"unknown {', '.join(sorted(unknown))}: expected some of {', '.join(READERS)}")
    names = given.readers or list(READERS)
    rows = (_guided if importlib.util.find_spec("atheris") else _random)(names, given.seconds)
    for row in rows:
        print(json.dumps(row), flush=True)
    if given.out:
        from cllava_fast.atomic import write_text
        from cllava_fast.environment import environment, version_of

        content = {"seconds_per_reader": given.seconds, "atheris": version_of("atheris"), "rows": rows}
        content["environment"] = environment()
        write_text(given.out, json.dumps(content, indent=2) + "\n")
    return 1 if any(row["findings"] for row in rows) else 0


def _guided(names: list[str], seconds: int) -> list[dict[str, Any]]:
    before = {name: set(_found(name).iterdir()) for name in names}
    with tempfile.TemporaryDirectory() as grown:
        for name in names:
            (Path(grown) / name).mkdir()
        subprocess.run(
            [sys.executable, "-m", "tests.fuzz", "--one", ",".join(names), grown, f"-max_total_time={seconds}",
             f"-timeout={SLOW}", "-max_len=4096", "-print_final_stats=1", "-rss_limit_mb=4096"],
            cwd=ROOT, check=True,
        )  # fmt: skip
        inputs = {name: len(list((Path(grown) / name).iterdir())) for name in names}
    rows = []
    for name in names:
        log = _log(name).read_text(encoding="utf-8", errors="replace")
        count = re.search(r"number_of_executed_units:\s*(\d+)", log)
        findings = sorted(path.name for path in set(_found(name).iterdir()) - before[name])
        if count is None and not findings:
            findings = [f"stopped: {log[-300:]}"]
        rows.append({
            "reader": name, "engine": "atheris", "executions": int(count[1]) if count else 0,
            "inputs_with_new_coverage": inputs[name], "findings": findings,
        })  # fmt: skip
    return rows


def _atheris(names: list[str], grown: Path, flags: list[str]) -> int:
    """Each reader in a fork of its own: to import everything under instruments takes longest."""
    import atheris

    with atheris.instrument_imports(include=INSTRUMENTED):
        from tests.fuzz import readers
    readers.check("conversation", b"is it?\0yes")  # imports what is imported late
    for name in names:
        if os.fork():
            os.wait()
            continue
        with _log(name).open("wb") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        folders = [str(grown / name), str(CORPUS / name), f"-artifact_prefix={_found(name)}/"]
        atheris.Setup([name, *folders, *flags], functools.partial(readers.check, name))
        atheris.Fuzz()
        os._exit(0)
    return 0


def _found(name: str) -> Path:
    """The folder of inputs that broke a reader's promise."""
    folder = ROOT / "runs" / "fuzz" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _log(name: str) -> Path:
    return ROOT / "runs" / "fuzz" / f"{name}.log"


def _random(names: list[str], seconds: int) -> list[dict[str, Any]]:
    from tests.fuzz.readers import check

    generator, rows = random.Random(), []
    for name in names:
        seeds = [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]
        executions, findings = 0, []
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            data = mutated(generator.choice(seeds), generator)
            start = time.monotonic()
            executions += 1
            try:
                check(name, data)
                assert time.monotonic() - start < SLOW, "too slow"
            except Exception as error:
                (_found(name) / f"random-{executions}").write_bytes(data)
                findings.append(f"random-{executions}: {type(error).__name__}")
        rows.append({"reader": name, "engine": "random", "executions": executions, "findings": findings})
    return rows


def mutated(data: bytes, generator: random.Random) -> bytes:
    """A few bytes changed, taken out, put in, or repeated."""
    result = bytearray(data)
    for _ in range(generator.randint(1, 6)):
        at = generator.randrange(len(result) + 1)
        kind = generator.randrange(4)
        if kind == 0 and at < len(result):
            result[at] = generator.randrange(256)
        elif kind == 1:
            del result[at : at + generator.randint(1, 8)]
        elif kind == 2:
            result[at:at] = generator.randbytes(generator.randint(1, 4))
        else:
            result[at:at] = result[at : at + generator.randint(1, 32)]
    return bytes(result)


if __name__ == "__main__":
    sys.exit(main())
