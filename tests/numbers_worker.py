"""One process of tests/test_bad_numbers.py: a sample of the second process alone breaks one step."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file

from cllava_fast import distributed
from cllava_fast.model import get_increments
from tests import distributed_worker as worker


def broken(folder: Path, policy: str) -> worker.cf.ContinualTrainer:
    run = worker.trainer(folder / policy, on_bad_numbers=policy, num_train_epochs=1)
    collate, calls = run._train_collate, iter(range(100))

    def break_one(examples):
        batch = collate(examples)
        if distributed.rank() == 1 and next(calls) == 1:
            batch["image_features"] = batch["image_features"] * float("nan")
        return batch

    run._train_collate = break_one  # type: ignore[assignment]
    return run


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    distributed.start()
    rank = distributed.rank()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = broken(folder, "skip")
        result = run.train()
    save_file(get_increments(run.model).pool.state(), folder / f"{rank}.safetensors")
    stopped = worker.message(broken(folder, "stop").train)
    (folder / f"{rank}.json").write_text(json.dumps({"skipped": result.bad_numbers, "stopped": stopped}))
