"""Training and mixed generation for as long as asked, with memory and open files watched: `python -m benchmarks.soak
--minutes 60`.

A round is a run of a few small tasks on a fresh model (align, tune, commit, save, evaluate) and answers of the trained
one, in batches that mix tasks. After a warm-up, resident memory may not grow by more than `--bound` MiB and the number
of open files not at all; otherwise it ends with 1. On a GPU the bound is on the bytes that torch has allocated there.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

import cllava_fast as cf
from benchmarks import tiny_stream
from benchmarks.results import FOLDER, device_name, fill
from cllava_fast import atomic
from cllava_fast.environment import environment

TASKS, STEPS, ANSWERS = 3, 4, 6  # of a round
WARM_UP = 0.2  # share of the time
MIB = 1 << 20


def one_round(number: int, device: torch.device, folder: Path) -> None:
    """A run from the first task to the last, its files, and generation in batches that mix its tasks."""
    model, processor = tiny_stream.new_model()
    model = cf.patch(model.to(device), cf.IncrementConfig(**tiny_stream.METHOD), processor=processor)
    stream = cf.Stream([tiny_stream.tiny_task((TASKS * number + k) % 200) for k in range(TASKS)])
    arguments = cf.ContinualArguments(
        output_dir=str(folder / "run"), max_steps=STEPS, align_steps=STEPS, learning_rate=1e-2, logging_steps=2,
        per_device_train_batch_size=8, max_new_tokens=3, seed=number, progress=False, on_bad_numbers="stop",
    )  # fmt: skip
    trainer = cf.ContinualTrainer(model, processor, stream, arguments)
    trainer.train()
    saved = sorted((folder / "run" / "increments").iterdir())[-1]
    cf.unpatch(model)
    cf.load_pretrained(model, saved, processor=processor)
    for turn in range(ANSWERS):
        samples = [task.test[turn % len(task.test)] for task in stream]
        texts = [processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": s.instruction}]}],
            add_generation_prompt=True, tokenize=False,
        ) for s in samples]  # fmt: skip
        inputs = processor(
            text=texts, images=[s.open_image() for s in samples], return_tensors="pt", padding=True, padding_side="left"
        ).to(device)
        model.generate(**inputs, max_new_tokens=4, do_sample=turn % 2 == 1)
    shutil.rmtree(folder / "run")


def measure(device: torch.device) -> dict[str, int]:
    gc.collect()
    found = {"resident": tiny_stream.resident_bytes(), "files": tiny_stream.open_files()}
    if device.type == "cuda":
        found["device"] = torch.cuda.memory_stats(device)["allocated_bytes.all.current"]
    return found


def verdict(points: list[dict[str, Any]], bound: int) -> dict[str, Any]:
    """What grew after the warm-up: the median of the last third of the rounds over that of the first."""
    begin = WARM_UP * points[-1]["seconds"]
    warm = [point for point in points if point["seconds"] >= begin]
    third = max(1, len(warm) // 3)

    def growth(name: str) -> int:
        first, last = (sorted(p[name] for p in part) for part in (warm[:third], warm[-third:]))
        # a leak lifts the least number of open files; a file may be open for a moment
        return last[0] - first[0] if name == "files" else last[third // 2] - first[third // 2]

    grown = {f"{name}_growth": growth(name) for name in ("resident", "files", "device") if name in warm[0]}
    memory = grown.get("device_growth", grown["resident_growth"])
    return {**grown, "warm_rounds": len(warm), "passed": memory <= bound and grown["files_growth"] <= 0}


def plot(results: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    left = figure.add_subplot()
    minutes = [point["seconds"] / 60 for point in results["points"]]
    left.plot(minutes, [point["resident"] / MIB for point in results["points"]], label="resident memory, MiB")
    if "device" in results["points"][0]:
        left.plot(minutes, [point["device"] / MIB for point in results["points"]], label="allocated on the GPU, MiB")
    left.axvline(WARM_UP * minutes[-1], color="grey", linestyle=":", label="end of warm-up")
    left.set(xlabel="minutes", ylabel="MiB")
    left.set_ylim(0, 1.2 * left.get_ylim()[1])
    right = left.twinx()
    right.plot(minutes, [point["files"] for point in results["points"]], color="tab:red", label="open files")
    right.set(ylabel="open files", ylim=(0, 2 * max(point["files"] for point in results["points"])))
    lines = [*left.get_lines(), *right.get_lines()]
    figure.legend(lines, [line.get_label() for line in lines], loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=110, format="png")


def on_gpu(results: dict[str, Any]) -> bool:
    return "device_growth" in results


def sentence(results: dict[str, Any]) -> str:
    def grown(memory: str, said: str) -> str:
        growth, last = results[f"{memory}_growth"] / MIB, results["points"][-1][memory] / MIB
        return f"{said} grew by {growth:.1f} MiB to {last:.0f} MiB"

    bounded = ("device", "memory allocated there") if on_gpu(results) else ("resident", "resident memory")
    also = f", {grown('resident', 'resident memory')}" if on_gpu(results) else ""
    return (
        f"{results['minutes']:.0f} minutes on {results['device']}: {results['rounds']} rounds, each "
        f"{results['round']['tasks']} tasks and {results['round']['answers']} answers. After the warm-up, "
        f"{grown(*bounded)} (bound: {results['bound'] / MIB:.0f} MiB){also}, open files by "
        f"{results['files_growth']}: {'passed' if results['passed'] else 'FAILED'}."
    )


def report(results: dict[str, Any], docs: Path | None) -> int:
    if docs is not None:
        picture = docs.with_name("soak-gpu.png" if on_gpu(results) else "soak.png")
        atomic.write_file(picture, lambda path: plot(results, path))
        fill(docs, "soak on a GPU" if on_gpu(results) else "soak", sentence(results))
    print(sentence(results))
    return 0 if results["passed"] else 1


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--bound", type=int, default=32, help="MiB that memory may grow by after the warm-up")
    parser.add_argument("--limit", type=float, default=8.0, help="GiB of address space on a CPU (RLIMIT_AS); 0: none")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="default: soak.json or soak-gpu.json in benchmarks/results")
    parser.add_argument(
        "--docs", type=lambda name: Path(name) if name else None, default=tiny_stream.DOCS,
        help="page to fill in; the picture lies beside it (default: %(default)s; empty: none)",
    )  # fmt: skip
    parser.add_argument("--report", action="store_true", help="run nothing: fill in the page from --out")
    chosen: Any = parser.parse_args(arguments)
    chosen.out = chosen.out or FOLDER / ("soak-gpu.json" if chosen.device.startswith("cuda") else "soak.json")
    if chosen.report:
        return report(json.loads(chosen.out.read_text(encoding="utf-8")), chosen.docs)
    device = torch.device(chosen.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
        if chosen.limit:
            bytes_ = int(chosen.limit * 1024 * MIB)
            resource.setrlimit(resource.RLIMIT_AS, (bytes_, resource.getrlimit(resource.RLIMIT_AS)[1]))
    warnings.filterwarnings("ignore", category=FutureWarning)
    points: list[dict[str, Any]] = []
    results: dict[str, Any] = {
        "kind": "soak", "device": device_name(), "environment": environment(), "minutes_asked": chosen.minutes,
        "bound": chosen.bound * MIB, "limit_gib": chosen.limit if device.type == "cpu" else None,
        "round": {"tasks": TASKS, "steps": STEPS, "answers": ANSWERS * TASKS}, "warm_up": WARM_UP,
    }  # fmt: skip

    def save() -> None:
        minutes = round(points[-1]["seconds"] / 60, 2)
        results.update(minutes=minutes, rounds=len(points), **verdict(points, results["bound"]), points=points)
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_text(chosen.out, json.dumps(results) + "\n")

    start = written = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        while not points or time.monotonic() - start < 60 * chosen.minutes:
            one_round(len(points), device, Path(folder))
            points.append({"seconds": round(time.monotonic() - start, 2), **measure(device)})
            if time.monotonic() - written > 30:
                written = time.monotonic()
                save()
    save()
    return report(results, chosen.docs)


if __name__ == "__main__":
    sys.exit(main())
