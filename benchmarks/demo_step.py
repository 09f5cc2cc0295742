"""A tune step of the demo's model: Continual LLaVA over sequential LoRA of equal active rank: `python -m
benchmarks.demo_step`.

Forward, backward, clipping and optimizer, without the Trainer around them, which is the same for all. Task by task both
learn from the same batch; ways take turns; medians. Earlier tasks act on all samples alike, and are added up.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import cllava_fast as cf
from benchmarks import results
from benchmarks.native_cpu import times
from cllava_fast.data.encode import Collator
from cllava_fast.demo.base import load_base
from cllava_fast.demo.run import DemoConfig
from cllava_fast.demo.stream import build_stream
from cllava_fast.environment import environment
from cllava_fast.train.batches import Item, TuneCollator

RESULTS = results.FOLDER / "demo-step.json"
BATCH = 32
LORA = "sequential_lora"


def tune_step(method: str, earlier: int, data: cf.PreparedStream) -> Callable[[], None]:
    """One step of the task that follows `earlier` committed ones."""
    model, processor = load_base()
    cf.patch(model, DemoConfig().method_config(method), processor=processor)
    increments, names = model.increments, data.stream.task_names
    for number, name in enumerate(names[: earlier + 1]):
        examples = data.examples(name, "train", model)
        queries = None
        if increments.surrogate is not None:
            queries = increments.surrogate.query([increments.reader.canonical(e.instruction) for e in examples])
        increments.method.open_task(increments.pool, queries, torch.Generator().manual_seed(number))
        if number < earlier:
            increments.method.close_task(increments.pool, name, queries, increments.groups)
    increments.pool.train_keys(False)
    collate = TuneCollator(Collator(data.encoder, data.features, training=True))
    batch = collate([Item(examples[i], None if queries is None else queries[i], True) for i in range(BATCH)])
    del batch["samples"]  # for the Trainer
    trained = [p for p in increments.pool.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    model.train()

    def step() -> None:
        model(**batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    chosen: Any = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    data = cf.PreparedStream(build_stream(0, train=64, test=4), load_base()[1])
    methods, tasks = (LORA, "continual_llava"), range(len(data.stream))
    steps = {f"{name} {task}": tune_step(name, task, data) for task in tasks for name in methods}
    found = times(steps, chosen.rounds)
    for task in tasks:
        lora, ours = (found[f"{name} {task}"] / 1e3 for name in methods)
        print(f"task {task + 1}: {LORA} {lora:.2f} ms, {methods[1]} {ours:.2f} ms, {ours / lora:.2f}x")
    content = {"environment": environment(), "threads": chosen.threads, "microseconds": found}
    results.write(content, chosen.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
