"""Numbers that go wrong in tuning, and rows that must never change."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

import cllava_fast as cf
from cllava_fast.data.encode import IGNORE
from cllava_fast.model import get_increments
from cllava_fast.train import committed
from cllava_fast.train.bad_numbers import DIVERGED_STEPS, START_STEPS, NumberWatch, Samples
from cllava_fast.train.committed import CommittedRows, checksum
from tests.helpers import learn
from tests.test_distributed import ROOT, environment, free_port
from tests.test_waits import Reads
from tests.train_helpers import CONFIG, arguments, stream

NAN, INF = float("nan"), float("inf")


class Steps(TrainerCallback):
    """The block and the optimizer's state before and after every step."""

    def __init__(self, model: Any) -> None:
        self.model, self.before, self.changed = model, {}, list[bool]()

    def state(self, optimizer: Any) -> dict[str, torch.Tensor]:
        found = {name: p.detach().clone() for name, p in get_increments(self.model).pool.named_parameters()}
        for number, values in enumerate(optimizer.state.values()):
            found |= {f"{number} {name}": value.clone() for name, value in values.items()}
        return found

    def on_step_begin(self, *args: Any, optimizer: Any, **kwargs: Any) -> None:
        self.before = self.state(optimizer)

    def on_step_end(self, *args: Any, optimizer: Any, **kwargs: Any) -> None:
        after = self.state(optimizer)
        self.changed.append(
            any(n not in self.before or not torch.equal(value, self.before[n]) for n, value in after.items())
        )


def run_of(
    model: Any, processor: Any, output: Path, spoil: Callable[[int, list[str], dict], None] | None = None, **values: Any
) -> tuple[cf.ContinualTrainer, Steps]:
    """One task; ``spoil`` gets each batch's number, ids and tensors."""
    cf.patch(model, CONFIG, processor=processor)
    (task,) = stream(1)
    named = [cf.Sample(s.instruction, s.answer, s.image, id=f"id{i}") for i, s in enumerate(task.train)]
    data = cf.Stream([cf.Task("colors", train=named, test=task.test, validation=task.validation)])
    steps = Steps(model)
    run = cf.ContinualTrainer(model, processor, data, arguments(output, **values), callbacks=[steps])
    collate, calls = run._train_collate, iter(range(1000))

    def spoiled(examples: Any) -> Any:
        batch = collate(examples)
        if spoil is not None:
            spoil(next(calls), [example.sample.id for example in examples], batch)
        return batch

    run._train_collate = spoiled  # type: ignore[assignment]
    return run, steps


def nan_images(number: int, ids: list[str], batch: dict) -> None:
    if number == 3:
        batch["image_features"] = batch["image_features"] * NAN


def spoil_sample(name: str) -> Callable[[int, list[str], dict], None]:
    def spoil(number: int, ids: list[str], batch: dict) -> None:
        if name in ids:
            batch["labels"][ids.index(name)] = IGNORE

    return spoil


class TestStop:
    @pytest.mark.parametrize("accumulated", [1, 2])
    def test_a_loss_that_is_no_number(self, llava: Any, processor: Any, tmp_path: Path, accumulated: int) -> None:
        seen: dict[int, list[str]] = {}

        def spoil(number: int, ids: list[str], batch: dict) -> None:
            seen[number] = ids
            nan_images(number, ids, batch)

        options = dict(per_device_train_batch_size=8 // accumulated, gradient_accumulation_steps=accumulated)
        run, _ = run_of(llava, processor, tmp_path / "run", spoil, **options)
        step = 3 // accumulated + 1
        with pytest.raises(
            FloatingPointError, match=rf"^colors: tune: the loss is nan at step {step}, samples id"
        ) as e:
            run.train()
        named = str(e.value).split("samples ")[1].split(";")[0].split(", ")
        assert named == seen[3], "the guilty batch alone"
        pool = get_increments(llava).pool
        saved = json.loads((tmp_path / "run" / "run.json").read_text())
        assert pool.num_tasks == pool.block_rows == 0 and saved["files"] == saved["losses"] == {}

    def test_a_gradient(self, llava: Any, processor: Any, tmp_path: Path) -> None:
        run, _ = run_of(llava, processor, tmp_path / "run", max_steps=5, logging_steps=2)
        spoil_gradient(llava, at=3)
        with pytest.raises(FloatingPointError, match="the gradient holds NaN or Inf at step 3, samples id"):
            run.train()

    def test_in_the_last_steps_that_nobody_logs(self, llava: Any, processor: Any, tmp_path: Path) -> None:
        run, _ = run_of(llava, processor, tmp_path / "run", nan_images, max_steps=4, logging_steps=100)
        with pytest.raises(FloatingPointError, match="the loss is nan at step 4"):
            run.train()
        assert get_increments(llava).pool.num_tasks == 0

    def test_a_sample_without_a_label(self, llava: Any, processor: Any, tmp_path: Path) -> None:
        run, _ = run_of(llava, processor, tmp_path / "run", spoil_sample("id7"))
        with pytest.raises(
            ValueError, match=r"colors: tune: nothing is to be learned from id7 in step [123]: all labels"
        ):
            run.train()
        assert get_increments(llava).pool.num_tasks == 0

    def test_a_query(self, llava: Any, processor: Any, tmp_path: Path, monkeypatch: Any) -> None:
        run, _ = run_of(llava, processor, tmp_path / "run")
        surrogate = get_increments(llava).surrogate
        query = surrogate.query
        monkeypatch.setattr(surrogate, "query", lambda *a, **k: query(*a, **k).index_fill(0, torch.tensor([5]), INF))
        with pytest.raises(FloatingPointError, match="colors: queries hold NaN or Inf, of samples id5; check"):
            run.train()


def spoil_gradient(model: Any, at: int) -> None:
    """Inf in one entry of one factor's gradient in the at-th backward pass."""
    pool, calls = get_increments(model).pool, iter(range(1, 1000))
    opened = pool.open_block

    def open_block(*args: Any, **kwargs: Any) -> None:
        opened(*args, **kwargs)
        parameter = next(iter(pool.layers.values())).block_B

        def spoil(grad: torch.Tensor) -> torch.Tensor:
            grad = grad.clone()
            if next(calls) == at:
                grad.view(-1)[0] = INF
            return grad

        parameter.register_hook(spoil)

    pool.open_block = open_block


class TestSkip:
    @pytest.mark.parametrize("optimizer", ["adamw_torch_fused", "adamw_torch"])
    @pytest.mark.parametrize("accumulated", [1, 2])
    def test_a_bad_step_changes_nothing(
        self, llava: Any, processor: Any, tmp_path: Path, optimizer: str, accumulated: int
    ) -> None:
        options = dict(
            per_device_train_batch_size=8 // accumulated, gradient_accumulation_steps=accumulated,
            trainer_options={"optim": optimizer}, on_bad_numbers="skip", weight_decay=0.1, logging_steps=2,
        )  # fmt: skip
        run, steps = run_of(llava, processor, tmp_path / "run", nan_images, **options)
        bad = 3 // accumulated + 1
        with pytest.warns(UserWarning, match=rf"colors: tune: 1 step\(s\) skipped for NaN or Inf: {bad}"):
            result = run.train()
        assert steps.changed == [step != bad for step in range(1, 7)]
        found = {"skipped_steps": [bad], "unlabelled_samples": [], "diverged_at": None}
        assert result.bad_numbers == {"colors": found}
        assert json.loads((tmp_path / "run" / "run.json").read_text())["bad_numbers"] == {"colors": found}
        assert all(loss == loss for loss in result.losses["colors"]) and len(result.losses["colors"]) == 3
        assert get_increments(llava).pool.num_tasks == 1

    def test_a_gradient_alone(self, llava: Any, processor: Any, tmp_path: Path) -> None:
        run, steps = run_of(llava, processor, tmp_path / "run", on_bad_numbers="skip")
        spoil_gradient(llava, at=2)
        with pytest.warns(UserWarning, match="skipped"):
            result = run.train()
        assert steps.changed == [True, False, True, True, True, True]
        assert result.bad_numbers["colors"]["skipped_steps"] == [2]

    def test_a_sample_without_a_label_is_left_out(self, new_llava: Callable, processor: Any, tmp_path: Path) -> None:
        run, steps = run_of(new_llava(), processor, tmp_path / "run", spoil_sample("id7"), on_bad_numbers="skip")
        with pytest.warns(UserWarning, match=r"1 sample\(s\) without a label: id7"):
            result = run.train()
        assert result.bad_numbers["colors"]["unlabelled_samples"] == ["id7"] and all(steps.changed)

    def test_a_step_without_labels(self, llava: Any, processor: Any, tmp_path: Path) -> None:
        def spoil(number: int, ids: list[str], batch: dict) -> None:
            if number == 1:
                batch["labels"].fill_(IGNORE)

        run, steps = run_of(llava, processor, tmp_path / "run", spoil, on_bad_numbers="skip")
        with pytest.warns(UserWarning, match=r"1 step\(s\) skipped for NaN or Inf: 2; 8 sample\(s\) without a label"):
            run.train()
        assert steps.changed == [True, False, True, True, True, True]

    def test_a_run_that_stopped_goes_on_by_skipping(self, new_llava: Callable, processor: Any, tmp_path: Path) -> None:
        """The policy is not part of what makes a run that run."""
        first = arguments(tmp_path, on_bad_numbers="stop").identity()
        assert first == arguments(tmp_path, on_bad_numbers="skip").identity()
        with pytest.raises(ValueError, match="on_bad_numbers is 'ignore'"):
            arguments(tmp_path, on_bad_numbers="ignore")


def test_nothing_waits_for_the_device_between_readings(
    llava: Any, processor: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    read = NumberWatch.read
    at: list[int] = []

    def spy(self: NumberWatch) -> None:
        at.append(len(self._unread))
        read(self)

    monkeypatch.setattr(NumberWatch, "read", spy)

    def reads_of(policy: str, optimizer: str) -> set[str]:
        options = dict(on_bad_numbers=policy, logging_steps=3, trainer_options={"optim": optimizer})
        run, _ = run_of(llava, processor, tmp_path / f"{policy} {optimizer}", **options)
        at.clear()
        with Reads() as reads:
            run.train()
        cf.unpatch(llava)
        return set(reads.by) & {"end_step", "after_batch", "_skip", "training_step"}

    assert not reads_of("stop", "adamw_torch_fused") and at == [3, 3, 0], "six steps"
    assert not reads_of("skip", "adamw_torch_fused") and at == [3, 3, 0]
    assert reads_of("skip", "adamw_torch") == {"_skip"}, "it needs an answer, and is seen to read one"


def feed(watch: NumberWatch, losses: list[float]) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    for step, loss in enumerate(losses, 1):
        parameter.grad = torch.ones(1)
        watch.after_batch(step, Samples([f"s{step}"], []), torch.tensor(loss))
        watch.end_step(step, optimizer, None)
    watch.finish()


class TestDivergence:
    START = [2.0] * START_STEPS

    def test_a_loss_far_above_its_start_for_long(self) -> None:
        losses = [*self.START, *[7.0] * DIVERGED_STEPS]
        at = len(losses)
        with pytest.raises(
            FloatingPointError, match=f"a: diverges: the loss was above 6 for 20 steps, up to step {at}"
        ):
            feed(NumberWatch("a", "stop", 4), losses)
        skipping = NumberWatch("a", "skip", 4)
        with pytest.warns(UserWarning, match=f"a: diverged at step {at}"):
            feed(skipping, [*losses, *[7.0] * 10])
        assert skipping.found.diverged_at == at and not skipping.found.skipped_steps

    @pytest.mark.parametrize(
        "losses",
        [[7.0] * (DIVERGED_STEPS - 1), [7.0, 7.0, 5.9] * 20, [4.9] * 60],
        ids=["not for long", "back in between", "not far"],
    )
    def test_what_is_none(self, losses: list[float]) -> None:
        feed(NumberWatch("a", "stop", 4), [*self.START, *losses])

    def test_three_times_almost_nothing_is_not_far(self) -> None:
        feed(NumberWatch("a", "stop", 4), [*[0.01] * START_STEPS, *[2.9] * 60])


def test_a_loss_may_be_written_over_by_the_next() -> None:
    """As that of a compiled model is, which a CUDA graph puts where the last one lay."""
    parameter, loss = torch.nn.Parameter(torch.zeros(1)), torch.zeros(())
    optimizer, watch = torch.optim.SGD([parameter], lr=0.0), NumberWatch("a", "stop", 2)
    parameter.grad = torch.ones(1)
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 1, samples s10;"):
        for step in (1, 2):
            for batch, value in enumerate((NAN, 1.0)):
                watch.after_batch(step, Samples([f"s{step}{batch}"], []), loss.fill_(value))
            watch.end_step(step, optimizer, None)


def test_a_bad_sample_on_one_process_is_skipped_by_both(tmp_path: Path) -> None:
    shared = environment(WORLD_SIZE=2, LOCAL_WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    command = [sys.executable, "-m", "tests.numbers_worker", str(tmp_path)]
    processes = [
        subprocess.Popen(command, cwd=ROOT, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=150) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second and first["skipped"]["task0"]["skipped_steps"] == [2]
    assert first["stopped"].startswith("FloatingPointError: task0: tune: the loss is nan at step 2, samples number ")
    named = first["stopped"].split("samples ")[1].split(";")[0].split(", ")
    assert len(named) == 4, "of the process that had it alone"
    states = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert all(torch.isfinite(tensor).all() for tensor in states[0].values())


class TestCommittedRows:
    @pytest.mark.parametrize("name", ["keys", "row_mean", "row_task", "context", "layers"])
    def test_a_changed_row_is_an_error(
        self, name: str, llava: Any, processor: Any, tmp_path: Path, rng: torch.Generator
    ) -> None:
        """An entry of the first task's rows changes while the second is learned."""
        cf.patch(llava, CONFIG, processor=processor)
        pool = get_increments(llava).pool

        class Spoil(cf.ContinualCallback):
            def on_stage_begin(self, task: str, number: int, stage: str, **kwargs: Any) -> None:
                if (number, stage) == (2, "tune"):
                    found = {n: b for n, b in pool.named_buffers() if n.startswith(name)}
                    self.name, buffer = list(found.items())[int(torch.randint(len(found), (), generator=rng))]
                    place = (1, 0) if name == "context" else tuple(
                        int(torch.randint(size, (), generator=rng)) for size in buffer.shape
                    )  # fmt: skip
                    buffer[place] += 1

        spoil = Spoil()
        run = cf.ContinualTrainer(llava, processor, stream(3), arguments(tmp_path / "run"), callbacks=[spoil])
        with pytest.raises(RuntimeError) as error:
            run.train()
        assert f"task2: 1 tensors of committed rows have changed, which nothing may do: ['{spoil.name}']" in str(error)
        assert len(json.loads((tmp_path / "run" / "run.json").read_text())["matrix"]) == 2
        assert len(list((tmp_path / "run" / "increments").iterdir())) == 2

    def test_what_is_added_changes_nothing_and_what_is_noted_counts(
        self, llava: Any, processor: Any, rng: torch.Generator
    ) -> None:
        pool = learn(cf.patch(llava, CONFIG, processor=processor), 2, rng).pool
        guard = CommittedRows(pool)
        learn(llava, 1, rng)
        guard.check("task")
        pool.keys[-1] += 1  # of a task that was committed since
        guard.check("task")
        guard.note()
        pool.keys[-1] += 1
        with pytest.raises(RuntimeError, match=r"\['keys'\]"):
            guard.check("task")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64])
    @pytest.mark.parametrize("shape", [(64, 32), (4, 5), (7, 3, 5), (1,)])
    def test_checksum_sees_every_change(
        self, dtype: torch.dtype, shape: tuple[int, ...], rng: torch.Generator, monkeypatch: Any
    ) -> None:
        monkeypatch.setattr(committed, "CHUNK", 100)
        tensor = torch.randn(shape, generator=rng).mul(100).to(dtype)
        before = checksum(tensor).item()
        assert checksum(tensor.clone()).item() == before and checksum(tensor[:0]).item() == 0
        bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[tensor.element_size()]
        for bit in (0, tensor.element_size() * 8 - 1):
            changed = tensor.clone()
            place = int(torch.randint(tensor.numel(), (), generator=rng))
            changed.view(bits).view(-1)[place] ^= (1 << bit) if bit < 63 and bit % 8 != 7 else torch.iinfo(bits).min
            assert checksum(changed).item() != before
        if tensor.numel() > 1:
            assert checksum(-tensor).item() != before, "what a sum or a parity would miss"
            assert checksum(tensor.flip(0)).item() != before
            swapped = tensor.clone().view(-1)
            swapped[0], swapped[-1] = tensor.view(-1)[-1], tensor.view(-1)[0]
            assert checksum(swapped).item() != before or swapped[0] == swapped[-1]
