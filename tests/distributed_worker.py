"""One process of tests/test_distributed.py: learns the stream, then fails in every way that the others must notice."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import accelerate
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import TrainerCallback

import cllava_fast as cf
from cllava_fast import distributed
from cllava_fast.cli import running
from cllava_fast.config import ModelConfig, RunConfig
from cllava_fast.data.encode import samples_of
from cllava_fast.demo.base import FOLDER
from cllava_fast.evaluate import evaluation
from cllava_fast.evaluate.predict import queries_of
from cllava_fast.methods.branch_lora import BranchLoraConfig
from cllava_fast.methods.smora import SmoraConfig
from cllava_fast.model import get_increments
from cllava_fast.train.signals import RunStopped

GLOBAL_BATCH = 8
COLORS = {"red": (255, 0, 0), "it is green": (0, 255, 0), "blue": (0, 0, 255)}
QUESTIONS = (
    ("what color is the shape?", "which color does the shape have?", "name the color of the shape"),
    ("which color has the bar?", "what is the color of the bar?", "in which color is the bar drawn?"),
)


def stream() -> cf.Stream:
    """Two tasks of 22 samples: the last batch of an epoch is not full, and answers differ in length."""
    images = {answer: Image.new("RGB", (64, 64), rgb) for answer, rgb in COLORS.items()}

    def samples(task: int, count: int) -> list[cf.Sample]:
        answers = [list(COLORS)[i % 3] for i in range(count)]
        return [cf.Sample(QUESTIONS[task][i * i % 3], answer, images[answer]) for i, answer in enumerate(answers)]

    return cf.Stream([cf.Task(f"task{task}", samples(task, 22), samples(task, 7)) for task in range(2)])


CONFIG = cf.IncrementConfig(rows_per_task=4, top_m=2, rank=2, a_std=0.1, scale=8.0)
# what they count over a step's tokens decides which rows freeze, or how a router is balanced
ROUTERS: dict[str, Any] = {
    "branch_lora": BranchLoraConfig(branches=4, rank=4, a_std=0.1, scale=4.0, targets=("self_attn.o_proj",)),
    "smora": SmoraConfig(experts=8, top_k=2, a_std=0.1, scale=4.0, dropout=0.0),
}

# without kept features, images go through the vision tower in every batch; its queries come from the base itself
PIXELS: dict[str, Any] = {
    "config": replace(CONFIG, surrogate="backbone"), "image_feature_bytes": 0, "num_train_epochs": 1,
}  # fmt: skip


def new_model(config: Any) -> tuple[Any, Any]:
    from cllava_fast.demo.base import new_base
    from cllava_fast.demo.tokenizer import build_processor

    processor = build_processor()
    model = new_base(processor, seed=0).eval()
    return cf.patch(model, config, processor=processor), processor


class GradientNorms(TrainerCallback):
    """Before clipping; neither Adam nor clipping would tell a gradient from twice that gradient."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.norms += [value for name, value in logs.items() if name.endswith("/grad_norm")]


def trainer(output: Path, callbacks: Any = (), config: Any = CONFIG, **values: Any) -> cf.ContinualTrainer:
    model, processor = new_model(config)
    options: dict[str, Any] = dict(
        num_train_epochs=2, align_steps=6, learning_rate=2e-2, lr_scheduler_type="linear", warmup_steps=1,
        per_device_train_batch_size=GLOBAL_BATCH // distributed.count(), logging_steps=1, eval_batch_size=4,
        max_new_tokens=5, progress=False, trainer_options={"adam_epsilon": 1e-4},
    )  # fmt: skip
    arguments = cf.ContinualArguments(output_dir=str(output), **{**options, **values})
    return cf.ContinualTrainer(model, processor, stream(), arguments, callbacks=callbacks)


def learn(output: Path, report: Path, config: Any = CONFIG, **values: Any) -> Any:
    """Runs the stream; leaves what this process ended with as ``report`` (JSON) and its state beside it."""
    gradients = GradientNorms()
    run = trainer(output, [gradients], config, **values)
    result = run.train()
    increments = get_increments(run.model)
    examples = [e for name in ("task0", "task1") for e in run.data.examples(name, "test", run.model)]
    queries = queries_of(run.model, samples_of(examples), run.data.features)
    selection = increments.method.select(increments.pool, queries, increments.groups, training=False)
    assert selection is not None
    save_file(increments.pool.state(), report.with_suffix(".safetensors"))
    found = {**result.to_dict(), "losses": result.losses, 
             "selected": None if selection.index is None else selection.index.tolist(),
             "gradients": gradients.norms}  # fmt: skip
    report.write_text(json.dumps({**found, "files": sorted(str(p.relative_to(output)) for p in output.rglob("*"))}))
    return run.model


def evaluated(model: Any, output: Path) -> list[float]:
    """The scores of each task; only the main process may look at the folder and write."""
    from cllava_fast.demo.tokenizer import build_processor

    def on_main(name: str) -> Any:
        work = getattr(evaluation, name)

        def alone(*given: Any) -> None:
            assert int(os.environ.get("RANK", "0")) == 0
            work(*given)

        return patch.object(evaluation, name, alone)

    with on_main("check_output"), on_main("write_report"):
        found = cf.evaluate_stream(model, build_processor(), stream(), output, max_new_tokens=5, progress=False)
    scores: list[float] = found["methods"]["continual_llava"]["accuracy_matrix"][-1]
    return scores


class Stop(TrainerCallback):
    """SIGTERM to this process alone, in a step of the first task."""

    def __init__(self, at: int) -> None:
        self.steps, self.at = 0, at

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps += 1
        if self.steps == self.at and not distributed.is_main():
            os.kill(os.getpid(), signal.SIGTERM)


def stopped(output: Path, at: int = 3, **values: Any) -> dict[str, Any]:
    """How a run ends when one of its processes gets a signal."""
    stop = Stop(at)
    try:
        trainer(output, [stop], **values).train()
    except RunStopped as error:
        saved = sorted(path.name for path in (output / "checkpoints").iterdir())
        return {"code": error.exit_code, "steps": stop.steps, "saved": saved}
    return {}


@contextmanager
def fsdp(version: str = "2") -> Iterator[None]:
    """FSDP 2 on CPUs. Accelerate offers it on accelerators alone, so it is told that gloo is one of them."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    from cllava_fast.train import tune

    plugin = {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_TORCH_DEVICE": "cpu", "FSDP_VERSION": version,
              "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_RESHARD_AFTER_FORWARD": "true",
              "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}  # fmt: skip
    options = tune.training_options
    with (
        patch.dict(os.environ, plugin),
        patch.object(PartialState, "_prepare_backend", lambda *args: ("gloo", DistributedType.MULTI_GPU)),
        patch.object(tune, "training_options", lambda *args: {**options(*args), "use_cpu": False}),
    ):
        yield


def sharded_again(model: Any, folder: Path) -> str:
    """How a run on a base ends that FSDP has taken apart, patched anew."""
    from cllava_fast.demo.tokenizer import build_processor

    processor = build_processor()
    cf.patch(cf.unpatch(model), CONFIG, processor=processor)
    return message(lambda: cf.ContinualTrainer(model, processor, stream(), cf.ContinualArguments(str(folder))))


def message(work: Callable[[], Any]) -> str:
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def command(output: Path) -> None:
    """What ``cllava-fast train`` does before it loads a base's weights."""
    arguments = cf.ContinualArguments(output_dir=str(output))
    base = ModelConfig(str(FOLDER))
    with patch.object(running, "open_stream", lambda config: stream()):
        running.train(RunConfig(base, CONFIG, arguments, {}, output.parent, "stream.yaml"))


def failures(folder: Path) -> dict[str, str]:
    """What each failure looks like on this process."""
    main = distributed.is_main()
    found = {}

    def disk_full() -> None:
        raise OSError("no space left on device")

    found["on_main"] = message(lambda: distributed.on_main(disk_full))
    found["check_equal"] = message(lambda: distributed.check_equal({"seed": distributed.rank()}, "the seed"))
    found["arguments"] = message(lambda: trainer(folder / "other", seed=distributed.rank()))
    found["run.json"] = message(lambda: trainer(folder / "run"))  # only there is it found by the main process alone
    found["command"] = message(lambda: command(folder / ("run" if main else "nothing")))
    found["no shared disk"] = message(trainer(folder / ("within" if main else "elsewhere"), resume=True)._train)
    broken = trainer(folder / "broken")
    collate, calls = broken._train_collate, iter(range(100))

    def break_on_one(examples: Any) -> Any:
        if not main and next(calls) == 2:
            raise ValueError("the image is damaged")
        return collate(examples)

    broken._train_collate = break_on_one  # type: ignore[assignment]
    found["tune"] = message(broken.train)
    found["again"] = message(broken.train)
    found["another"] = message(lambda: trainer(folder / "other"))
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    evaluated(new_model(CONFIG)[0], folder / "alone")
    offloaded = accelerate.cpu_offload(new_model(CONFIG)[0], execution_device=torch.device("cpu"))
    evaluated(offloaded, folder / "offloaded")  # which no process may move
    assert distributed.count() == 2
    rank = distributed.rank()
    model = learn(folder / "run", folder / f"rank{rank}.json")
    (folder / f"evaluated{rank}.json").write_text(json.dumps(evaluated(model, folder / "evaluated")))
    learn(folder / "accumulated", folder / f"accumulated{rank}.json", per_device_train_batch_size=2,
          gradient_accumulation_steps=2)  # fmt: skip
    for name, config in ROUTERS.items():
        learn(folder / name, folder / f"{name}{rank}.json", config, num_train_epochs=1)
    branch: dict[str, Any] = {"config": ROUTERS["branch_lora"], "num_train_epochs": 1}
    # behind a step whose gates differ between the processes
    assert stopped(folder / "counted", at=1, **branch)["steps"] == 1
    learn(folder / "counted", folder / f"counted{rank}.json", resume=True, **branch)
    ended = stopped(folder / "stopped")
    learn(folder / "stopped", folder / f"stopped{rank}.json", resume=True)
    # within the second of its epochs of three steps
    assert stopped(folder / "within", at=5)["saved"] == ["0001-tune-000005"]
    learn(folder / "within", folder / f"within{rank}.json", resume=True)
    with fsdp(version="1"):
        refused = message(trainer(folder / "refused")._train)
    with fsdp():
        model = learn(folder / "sharded", folder / f"sharded{rank}.json")
        assert distributed.is_sharded(model)
        again = sharded_again(model, folder / "again")
        assert stopped(folder / "sharded_within", at=5)["saved"] == ["0001-tune-000005"]
        learn(folder / "sharded_within", folder / f"sharded_within{rank}.json", resume=True)
        lora = learn(folder / "lora", folder / f"lora{rank}.json", cf.LoraConfig(), num_train_epochs=1)
        assert not any(parameter._post_accumulate_grad_hooks for parameter in lora.parameters())
        model = learn(folder / "pixels", folder / f"pixels{rank}.json", **PIXELS)
        if rank == 0:  # one process alone may ask, too
            unseen, fresh = ["which shape is it?"], new_model(PIXELS["config"])[0]
            assert torch.equal(*(get_increments(each).surrogate.encode(unseen) for each in (model, fresh)))
    refused_or_ended = {"fsdp1": refused, "sharded again": again, "stopped": ended, **failures(folder)}
    (folder / f"failures{rank}.json").write_text(json.dumps(refused_or_ended))
