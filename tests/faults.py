"""Kills runs at random moments and breaks what is under them, resumes them, and compares to the bit: ``make faults``.

A tiny LLaVA learns three tasks once, undisturbed. Then the same run is killed (SIGKILL) while it aligns, tunes, saves,
commits, evaluates and between tasks, and resumed by the same call; it gets signals, full disks, read-only folders,
damaged files and a second run in its folder. Each time the increments, the matrix, the losses and the predictions must
end as those of the undisturbed run, bit by bit. Most runs are forks of one warmed-up process; some go through the
command line.

    python tests/faults.py [--kills 50] [--out FILE.json] [--seed N] [--jobs N] [--quick]
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import gc
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

os.environ.update(TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from PIL import Image  # noqa: E402

from cllava_fast import atomic  # noqa: E402
from cllava_fast.environment import environment  # noqa: E402
from cllava_fast.train import signals  # noqa: E402
from tests.faults_world import COLORS, MOMENTS, OPTIONS, QUESTIONS, Trial, World, outcome  # noqa: E402

RESULTS, DOCS = ROOT / "benchmarks" / "results" / "faults.json", ROOT / "docs" / "running.md"


def interrupt(
    world: World, run: Path, moment: str, send: Callable[[int], None], resume: bool = False
) -> tuple[int, bool]:
    """Calls ``send`` somewhere in ``moment``; the run's exit code, and whether it came that far."""
    lasts = world.moments[moment]
    chosen = world.random.randrange(len(lasts))
    delay, seen, sent = world.random.random() * lasts[chosen], 0, False

    def watch(kind: str, process: int) -> None:
        nonlocal seen, sent
        if kind == moment and not sent:
            seen += 1
            if seen > chosen:
                time.sleep(delay)
                sent = True
                send(process)

    return world.run(run, watch, resume=resume), sent


def kill(world: World, moment: str) -> list[Trial]:
    """SIGKILL, for one run in three twice."""
    run, trials = world.new(moment), []
    for again in range(2 if world.random.random() < 1 / 3 else 1):
        code, _ = interrupt(world, run, moment, lambda process: os.kill(process, signal.SIGKILL), resume=bool(again))
        if code != -signal.SIGKILL:
            break
        trials.append(moment)
    lost, detail = world.resume(run)
    return [Trial(f"SIGKILL: {moment}", "", lost, detail) for moment in trials]


def stop(world: World, signum: signal.Signals, moment: str) -> Trial:
    """A signal: the run ends with its exit code, and says so."""
    run = world.new(signum.name)
    code, sent = interrupt(world, run, moment, lambda process: os.kill(process, signum))
    said = world.said(run)
    lost, detail = world.resume(run)
    finished = code == 0  # the signal came behind the last step
    if sent and not finished and (code != 128 + signum or signum.name not in said):
        lost, detail = True, f"exit code {code}: {said} {detail}"
    return Trial(signum.name, said, lost, detail)


def stop_twice(world: World) -> Trial:
    """Ctrl-C in a step, and once more while that is saved."""
    run, sent = world.new("twice"), 0

    def watch(kind: str, process: int) -> None:
        nonlocal sent
        if kind == ("tune", "save", None)[sent]:
            os.kill(process, signal.SIGINT)
            sent += 1

    code = world.run(run, watch)
    said = world.said(run)
    lost, detail = world.resume(run)
    return Trial("Ctrl-C twice", said, lost or code != 130 or sent != 2, f"exit code {code}, {sent} sent; {detail}")


def begun(world: World, name: str) -> Path:
    """A run that was killed while it tuned its third task: two sets of increments, two checkpoints."""
    run, seen = world.new(name), 0
    third = 2 * len(world.moments["tune"]) // 3 + 6

    def watch(kind: str, process: int) -> None:
        nonlocal seen
        seen += kind == "tune"
        if seen == third:
            os.kill(process, signal.SIGKILL)

    assert world.run(run, watch) == -signal.SIGKILL
    assert len(list((run / "increments").iterdir())) == 2 and len(list((run / "checkpoints").iterdir())) >= 2
    return run


def flip(world: World, file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[world.random.randrange(len(content))] ^= 1 << world.random.randrange(8)
    file.write_bytes(content)


def truncate(world: World, file: Path) -> None:
    file.write_bytes(file.read_bytes()[: world.random.randrange(file.stat().st_size)])


DAMAGES: dict[str, Callable[[World, Path], None]] = {
    "one bit flipped": flip, "cut off": truncate, "missing": lambda world, file: file.unlink(),
}  # fmt: skip
FILES = ("run.json", "increments/*2/adapter_model.safetensors", "increments/*2/adapter_config.json",
         "checkpoints/*/state.safetensors", "checkpoints/*/checkpoint.json")  # fmt: skip


def newest(run: Path, pattern: str) -> Path:
    return sorted(run.glob(pattern.replace("*2", "02-*")))[-1]


def damage(world: World, start: Path, how: str, pattern: str) -> Trial:
    """A damaged newest state: the run says so, and goes on from the one before."""
    run = world.new("damaged")
    shutil.copytree(start, run)
    DAMAGES[how](world, newest(run, pattern))
    lost, detail = world.resume(run)
    said = world.said(run)
    name = Path(pattern).name
    if name not in said or "going on" not in said:
        lost, detail = True, f"said {said!r} {detail}"
    return Trial(f"{name} {how}", said, lost, detail)


def damage_all(world: World, start: Path, pattern: str) -> Trial:
    """Nothing that can be read: exit code 4, and what is still good stays as it is."""
    run = world.new("all-damaged")
    shutil.copytree(start, run)
    kept = {file: file.read_bytes() for file in run.glob(pattern)}
    for file in kept:
        truncate(world, file)
    code, said = world.run(run, resume=True), world.said(run)
    for file, content in kept.items():
        file.write_bytes(content)
    lost, detail = world.resume(run)
    return Trial(f"every {pattern} cut off", said, lost or code != 4, f"exit code {code}; {detail}")


def no_space(world: World, number: int) -> Trial:
    """The disk is full at the ``number``-th write of the run (the system's answer is injected)."""
    run, left = world.new("full"), number

    def prepare() -> None:
        to_disk = atomic._to_disk

        def full(path: Path) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            to_disk(path)

        atomic._to_disk = full  # type: ignore[assignment]

    code, said = world.run(run, prepare=prepare), world.said(run)
    lost, detail = world.resume(run)
    return Trial("disk full (injected)", said, lost or code != 3, f"exit code {code}; {detail}")


@contextmanager
def mounted(world: World, kilobytes: int) -> Iterator[Path]:
    """A file system of that size, in a namespace of this process; unmounted at the end."""
    folder = world.new("disk")
    folder.mkdir()
    mount(b"tmpfs", folder, 0, f"size={kilobytes}k")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def mount(kind: bytes | None, folder: Path, flags: int, data: str = "") -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"none", str(folder).encode(), kind, flags, data.encode()):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def can_mount() -> bool:
    """Whether this process may have file systems of its own."""
    private, recursive, new_namespace = 1 << 18, 1 << 14, 0x20000
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "unshare") or libc.unshare(new_namespace):
        return False
    try:
        mount(None, Path("/"), private | recursive)
    except OSError:
        return False
    return True


REMOUNT, READ_ONLY = 32, 1


def full_disk(world: World, needed: int) -> Trial:
    """A file system that is too small, then larger."""
    with mounted(world, world.random.randrange(64, needed)) as disk:
        code, said = world.run(disk / "run"), world.said(disk / "run")
        mount(None, disk, REMOUNT, "size=64m")
        lost, detail = world.resume(disk / "run")
    return Trial("disk full", said, lost or code != 3, f"exit code {code}; {detail}")


def read_only(world: World, start: Path) -> Trial:
    """A file system that can be read and not written."""
    with mounted(world, 65536) as disk:
        shutil.copytree(start, disk / "run")
        mount(None, disk, REMOUNT | READ_ONLY)
        code, said = world.run(disk / "run", resume=True), world.said(disk / "run")
        mount(None, disk, REMOUNT)
        lost, detail = world.resume(disk / "run")
    return Trial("read-only folder", said, lost or code != 3, f"exit code {code}; {detail}")


def second_run(world: World) -> Trial:
    """Another run in the folder of one that goes on: refused, and the first ends as if alone."""
    run, code, said = world.new("two"), None, ""

    def watch(kind: str, process: int) -> None:
        nonlocal code, said
        if kind == "tune" and code is None:
            code, said = world.run(run), world.said(run)

    first = world.run(run, watch)
    differ = first != 0 or outcome(run) != world.expected
    return Trial("two runs in one folder", said, differ or code != 5, f"exit code {code}")


class CommandLine:
    """The same three tasks as files, by typed commands on the demo's base."""

    def __init__(self, world: World) -> None:
        from cllava_fast.demo.base import FOLDER

        self.world, self.folder = world, world.new("command-line")
        tasks = ""
        for k, question in enumerate(QUESTIONS):
            for i, (split, (name, rgb)) in enumerate((s, c) for s in ("train", "test") * 3 for c in COLORS.items()):
                file = self.folder / f"task{k}" / split / name / f"{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (64, 64), rgb).save(file)
            tasks += f"  - {{name: task{k}, train: task{k}/train, test: task{k}/test, prompt: {question!r}}}\n"
        (self.folder / "stream.yaml").write_text(f"tasks:\n{tasks}")
        options = [f"--training.{name}={value}" for name, value in OPTIONS.items() if name != "progress"]
        self.program = [sys.executable, "-m", "cllava_fast.cli"]
        self.command = ["train", str(self.folder / "stream.yaml"), "--model", str(FOLDER), *options]
        code, said = self.run("whole")
        assert code == 0, said
        self.expected = self.outcome("whole")

    def run(self, name: str, more: list[str] | None = None, signum: int = 0, line: str = "") -> tuple[int, str]:
        """``signum`` is sent soon after the first line that begins with ``line``."""
        arguments = more or [*self.command, "--output", str(self.folder / name)]
        said = []
        with subprocess.Popen(
            [*self.program, *arguments], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        ) as process:  # fmt: skip
            assert process.stderr is not None
            for words in process.stderr:
                said.append(words.strip())
                if signum and words.startswith(line):
                    time.sleep(0.3 * self.world.random.random())
                    process.send_signal(signum)
                    signum = 0
        return process.returncode, "\n".join(word for word in said if "cllava" in word)

    def outcome(self, name: str) -> dict[str, str]:
        made = ("report.html", "report.md", "matrix.csv")  # with the seconds that it took
        return {k: v for k, v in outcome(self.folder / name).items() if k not in made and not k.endswith(".png")}

    def stopped(self, signum: signal.Signals, line: str) -> Trial:
        """A signal to the command, then the command that it prints; after SIGKILL the same with --resume."""
        name = f"{signum.name}-{self.world.random.randrange(10**9)}"
        code, said = self.run(name, signum=signum, line=line)
        again = [*self.command, "--output", str(self.folder / name), "--resume"]
        wanted = -signum if signum == signal.SIGKILL else 128 + signum
        if signum != signal.SIGKILL:
            again = shlex.split(said.splitlines()[-1].partition("cllava_fast.cli ")[2])
        ended, words = self.run(name, again)
        lost = code != wanted or ended != 0 or self.outcome(name) != self.expected
        return Trial(f"{signum.name}, command line", said if signum != signal.SIGKILL else "", lost,
                     f"{line} exit codes {code}, {ended}; {words}")  # fmt: skip


def main() -> int:
    # which a shell has told what it starts in the background to ignore, and so would every run
    signal.signal(signal.SIGINT, signal.default_int_handler)
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(3), "big"))
    parser.add_argument("--out", type=Path, help="results file (JSON)")
    parser.add_argument("--quick", action="store_true", help="a few of each, nothing by the command line")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="runs side by side (default: %(default)s)"
    )
    options = parser.parse_args()
    start = time.perf_counter()
    memory = Path("/dev/shm")  # a killed process loses nothing there either, and fsync costs nothing
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        trials = run_all(World(Path(folder), options.seed), options.kills, options.quick, options.jobs)
    gc.unfreeze()
    table = summary(trials)
    for row in table:
        print(f"{row['fault']:<48} {row['tried']:>3} tried  {row['lost']} lost  {row['message']}")
    for trial in trials:
        if trial.lost:
            print(f"LOST: {trial.fault}: {trial.detail}")
    lost = sum(trial.lost for trial in trials)
    print(f"{len(trials)} tried, {lost} lost, {time.perf_counter() - start:.0f} s, --seed {options.seed}")
    if options.out is not None:
        found = {"seed": options.seed, "tried": len(trials), "lost": lost, "faults": table,
                 "environment": environment()}  # fmt: skip
        options.out.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_text(options.out, json.dumps(found, indent=2) + "\n")
        if options.out.resolve() == RESULTS:
            write_docs(found)
    return 1 if lost else 0


def run_all(world: World, kills: int, quick: bool, processes: int) -> list[Trial]:
    """``kills`` is how often at least; a run that is killed twice counts twice."""
    jobs: list[Callable[[], list[Trial]]] = []
    command_line = None if quick else CommandLine(world)
    lines = () if quick else ("task0: align", "task1: tune", "evaluate 2")
    for number in range(kills - len(lines)):
        jobs.append(partial(kill, world, MOMENTS[number % len(MOMENTS)]))

    def add(function: Callable[..., Trial], *arguments: Any) -> None:
        jobs.append(lambda: [function(*arguments)])

    if command_line is not None:
        for line in lines:
            add(command_line.stopped, signal.SIGKILL, line)
        for signum in signals.SIGNALS:
            add(command_line.stopped, signum, "task1: align")
    for signum in signals.SIGNALS:
        for moment in world.random.sample(MOMENTS[:5], 1 if quick else 5):
            add(stop, world, signum, moment)
    add(stop_twice, world)
    add(second_run, world)
    start = begun(world, "begun")
    damages = [(how, pattern) for pattern in FILES for how in DAMAGES]
    for how, pattern in world.random.sample(damages, 3) if quick else damages:
        add(damage, world, start, how, pattern)
    for pattern in ("run*.json",) if quick else ("run*.json", "increments/*/adapter_model.safetensors"):
        add(damage_all, world, start, pattern)
    writes = len(world.moments["save"]) + len(world.moments["commit"]) + len(world.moments["evaluate"])
    for _ in range(1 if quick else 5):
        add(no_space, world, world.random.randrange(writes // 2))
    if can_mount():
        needed = sum(file.stat().st_size for file in (world.folder / "001-whole").rglob("*")) // 1024
        for _ in range(1 if quick else 5):
            add(full_disk, world, needed)
        add(read_only, world, start)
    return share(world, jobs, processes)


def share(world: World, jobs: list[Callable[[], list[Trial]]], processes: int) -> list[Trial]:
    """Forks that each do a share of the jobs, in folders and with random numbers of their own."""
    seed, folder, children = world.random.random(), world.folder, []
    for worker in range(processes):
        children.append(os.fork())
        if children[-1] == 0:
            try:
                world.folder = folder / f"worker{worker}"
                world.folder.mkdir()
                with (folder / f"worker{worker}.jsonl").open("w") as file:
                    for number in range(worker, len(jobs), processes):
                        world.random.seed(f"{seed} {number}")
                        try:
                            trials = jobs[number]()
                        except Exception:
                            trials = [Trial("the harness", "", True, traceback.format_exc())]
                        for trial in trials:
                            print(f"{'LOST' if trial.lost else 'ok':<5} {trial.fault}", file=sys.stderr, flush=True)
                            print(json.dumps(trial), file=file, flush=True)
            finally:
                os._exit(0)
    for child in children:
        os.waitpid(child, 0)
    lines = [line for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]
    return sorted((Trial(*json.loads(line)) for line in lines), key=lambda trial: trial.fault)


def markdown(found: dict[str, Any]) -> str:
    """The table of docs/running.md."""
    rows = [f"| {row['fault']} | {row['tried']} | {row['lost']} | {row['message']} |" for row in found["faults"]]
    rows.append(f"| **all** | **{found['tried']}** | **{found['lost']}** | |")
    return "\n".join(["| fault | tried | lost | what the run said |", "| --- | --- | --- | --- |", *rows])


def write_docs(found: dict[str, Any]) -> None:
    before, mark, rest = DOCS.read_text(encoding="utf-8").partition("<!-- faults -->\n")
    after = "<!-- /faults -->" + rest.partition("<!-- /faults -->")[2]
    atomic.write_text(DOCS, f"{before}{mark}{markdown(found)}\n{after}")


def summary(trials: list[Trial]) -> list[dict[str, Any]]:
    """One row for each fault, with one of the messages; temporary paths are left out."""
    rows: dict[str, dict[str, Any]] = {}
    for trial in trials:
        row = rows.setdefault(trial.fault, {"fault": trial.fault, "tried": 0, "lost": 0, "message": ""})
        row["tried"] += 1
        row["lost"] += trial.lost
        said = re.sub(r"/\S*?/tmp\w+/(worker\d+/)?[\w.-]+(/run(?![.\w])|/[A-Z]+-\d+)?", "RUN", trial.message)
        said = said.replace(f"{ROOT}/", "")
        said = re.sub(r"process \d+ on \S+;", "process 123 on HOST;", said)
        row["message"] = row["message"] or " ".join(said.split()).removeprefix("cllava-fast: ")
    return list(rows.values())


if __name__ == "__main__":
    sys.exit(main())
