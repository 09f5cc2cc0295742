"""``make fuzz``: feeds each reader of ``readers.py`` inputs that grow towards code not yet seen, and counts what came.

With atheris (``pip install atheris``) mutations are guided by coverage; without it they are random. What breaks a
reader's promise is kept in ``runs/fuzz``; the counts go to a results file.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
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
    parser.add_argument("--one", help=argparse.SUPPRESS)  # this process fuzzes one reader itself
    given, rest = parser.parse_known_args(argv)
    if given.one:
        return _atheris(given.one, [*given.readers, *rest])  # folders of inputs, and libFuzzer's flags
    from tests.fuzz.readers import READERS

    if unknown := set(given.readers) - set(READERS):
        parser.error(f"unknown {', '.join(sorted(unknown))}: expected some of {', '.join(READERS)}")
    run = _guided if importlib.util.find_spec("atheris") else _random
    rows = []
    for name in given.readers or READERS:
        rows.append({"reader": name, **run(name, given.seconds)})
        print(json.dumps(rows[-1]), flush=True)
    if given.out:
        from cllava_fast.atomic import write_text
        from cllava_fast.environment import environment, version_of

        content = {"seconds_per_reader": given.seconds, "atheris": version_of("atheris"), "rows": rows}
        content["environment"] = environment()
        write_text(given.out, json.dumps(content, indent=2) + "\n")
    return 1 if any(row["findings"] for row in rows) else 0


def _guided(name: str, seconds: int) -> dict[str, Any]:
    found = ROOT / "runs" / "fuzz" / name
    found.mkdir(parents=True, exist_ok=True)
    before = set(found.iterdir())
    with tempfile.TemporaryDirectory() as grown:
        done = subprocess.run(
            [sys.executable, "-m", "tests.fuzz", "--one", name, grown, str(CORPUS / name),
             f"-max_total_time={seconds}", f"-timeout={SLOW}", "-max_len=4096", "-print_final_stats=1",
             "-rss_limit_mb=4096", f"-artifact_prefix={found}/"],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        inputs = len(list(Path(grown).iterdir()))
    (found.parent / f"{name}.log").write_text(done.stdout + done.stderr)
    count = re.search(r"number_of_executed_units:\s*(\d+)", done.stderr)
    findings = sorted(path.name for path in set(found.iterdir()) - before)
    if done.returncode and not findings:
        findings = [f"exit code {done.returncode}: {done.stderr[-300:]}"]
    return {
        "engine": "atheris", "executions": int(count[1]) if count else 0, "inputs_with_new_coverage": inputs,
        "findings": findings,
    }  # fmt: skip


def _atheris(name: str, arguments: list[str]) -> int:
    import atheris

    with atheris.instrument_imports(include=INSTRUMENTED):
        from tests.fuzz import readers
    atheris.Setup([name, *arguments], lambda data: readers.check(name, data))
    atheris.Fuzz()
    return 0


def _random(name: str, seconds: int) -> dict[str, Any]:
    from tests.fuzz.readers import check

    seeds = [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]
    found = ROOT / "runs" / "fuzz" / name
    executions, findings = 0, []
    generator, end = random.Random(), time.monotonic() + seconds
    while time.monotonic() < end:
        data = mutated(generator.choice(seeds), generator)
        start = time.monotonic()
        executions += 1
        try:
            check(name, data)
            assert time.monotonic() - start < SLOW, "too slow"
        except Exception as error:
            found.mkdir(parents=True, exist_ok=True)
            (found / f"random-{executions}").write_bytes(data)
            findings.append(f"random-{executions}: {type(error).__name__}")
    return {"engine": "random", "executions": executions, "findings": findings}


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
