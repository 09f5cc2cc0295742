"""Two processes do what one does: the same samples in a step, the same state, the same answers, and one failure ends
both."""

from __future__ import annotations

import json
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.data_loader import BatchSamplerShard
from safetensors.torch import load_file
from torch.utils.data import BatchSampler

from cllava_fast.train.batches import GlobalOrder
from tests import distributed_worker

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "examples" / "accelerate"


def environment(**values: Any) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **{k: str(v) for k, v in values.items()}}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def read(report: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    return json.loads(report.read_text()), load_file(report.with_suffix(".safetensors"))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left. Nothing but the library ends one when the other fails."""
    folder = tmp_path_factory.mktemp("two")
    shared = environment(WORLD_SIZE=2, LOCAL_WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    command = [sys.executable, "-m", "tests.distributed_worker", str(folder)]
    processes = [
        subprocess.Popen(command, cwd=ROOT, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=300) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    distributed_worker.evaluated(distributed_worker.new_model(distributed_worker.CONFIG)[0], folder / "alone")
    distributed_worker.learn(folder / "run", folder / "rank0.json")
    for name, config in distributed_worker.ROUTERS.items():
        distributed_worker.learn(folder / name, folder / f"{name}0.json", config, num_train_epochs=1)
    distributed_worker.learn(folder / "pixels", folder / "pixels0.json", **distributed_worker.PIXELS)
    return folder


@pytest.mark.parametrize("report", ["rank0.json", "rank1.json", "accumulated0.json", "sharded0.json", "sharded1.json"])
def test_two_processes_learn_what_one_learns(one: Path, two: Path, report: str) -> None:
    expected, state = read(one / "rank0.json")
    found, other = read(two / report)
    for name in ("accuracy_matrix", "selected", "selection_accuracy", "trainable_parameters", "files"):
        assert found[name] == expected[name], name
    assert expected["average_accuracy"] > 0.5, "with nothing right, equal answers mean little"
    for task, losses in expected["losses"].items():
        assert found["losses"][task] == pytest.approx(losses, rel=1e-4)
    assert len(expected["gradients"]) == 2 * 6 and found["gradients"] == pytest.approx(expected["gradients"], rel=1e-3)
    assert state.keys() == other.keys() and state["context"][1, 0] != 0.25
    for name, tensor in state.items():
        exact = name in ("keys", "row_mean", "row_task")
        bound = 1e-6 if exact else 5e-5 * tensor.abs().max().item()
        assert (tensor - other[name]).abs().max().item() <= bound, name


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", [*distributed_worker.ROUTERS, "pixels"])
def test_routers_and_images_learn_what_they_learn_on_one(one: Path, two: Path, name: str, rank: int) -> None:
    (expected, state), (found, other) = read(one / f"{name}0.json"), read(two / f"{name}{rank}.json")
    assert found["selected"] == expected["selected"] and found["files"] == expected["files"]
    for task, losses in expected["losses"].items():
        assert found["losses"][task] == pytest.approx(losses, rel=1e-4)
    assert state.keys() == other.keys()
    for key, tensor in state.items():
        if tensor.is_floating_point() and tensor.numel():
            assert (tensor - other[key]).abs().max() <= 2e-4 * tensor.abs().max(), key
        else:
            assert torch.equal(tensor, other[key]), key


def test_a_router_that_was_stopped_goes_on_to_the_same_bits(two: Path) -> None:
    for rank in range(2):
        (expected, state), (found, other) = read(two / f"branch_lora{rank}.json"), read(two / f"counted{rank}.json")
        assert found["losses"] == expected["losses"]
        assert all(torch.equal(tensor, other[name]) for name, tensor in state.items())


def test_both_processes_end_with_the_same_bits(two: Path) -> None:
    (expected, state), (found, other) = read(two / "rank0.json"), read(two / "rank1.json")
    assert expected == found
    assert all(torch.equal(tensor, other[name]) for name, tensor in state.items())


def test_one_process_writes_an_evaluation(two: Path) -> None:
    expected = json.loads((two / "rank0.json").read_text())["accuracy_matrix"][-1]
    assert all(json.loads((two / f"evaluated{rank}.json").read_text()) == expected for rank in range(2))
    assert (two / "evaluated" / "report.html").exists() and (two / "evaluated" / "predictions" / "task1.jsonl").exists()


def test_an_evaluation_alone_is_shared(one: Path, two: Path) -> None:
    files = sorted((one / "alone" / "predictions").iterdir())
    assert len(files) == 2 == len(list((two / "alone" / "predictions").iterdir()))
    assert all(file.read_bytes() == (two / file.relative_to(one)).read_bytes() for file in files)


def test_a_signal_to_one_process_ends_both_behind_the_same_step(two: Path) -> None:
    for rank in range(2):
        ended = json.loads((two / f"failures{rank}.json").read_text())["stopped"]
        assert ended == {"code": 143, "steps": 3, "saved": ["0001-tune-000003"]}


# behind an epoch, and within the second
@pytest.mark.parametrize(("whole", "name"), [("rank", "stopped"), ("rank", "within"), ("sharded", "sharded_within")])
def test_a_stopped_run_goes_on_to_the_same_bits(two: Path, whole: str, name: str) -> None:
    for rank in range(2):
        (expected, state), (found, other) = read(two / f"{whole}{rank}.json"), read(two / f"{name}{rank}.json")
        assert found["losses"] == expected["losses"] and found["accuracy_matrix"] == expected["accuracy_matrix"]
        assert all(torch.equal(tensor, other[key]) for key, tensor in state.items())


def test_a_failure_on_one_process_ends_both(two: Path) -> None:
    main, other = (json.loads((two / f"failures{rank}.json").read_text()) for rank in range(2))
    assert main["tune"] == "RuntimeError: process 1 failed: ValueError: the image is damaged"
    assert other["tune"] == "ValueError: the image is damaged"
    for name in ("again", "another"):
        assert main[name] == other[name] and main[name].endswith("has failed in this script; start the processes again")
    # what one process does for both
    assert main["on_main"] == other["on_main"] == "OSError: no space left on device"
    assert main["run.json"] == other["run.json"] and "holds this run already" in main["run.json"]
    # whoever looks holds the lock for a moment, which another process would take for another run's
    assert main["command"] == other["command"] and "run holds another run" in main["command"]
    assert main["check_equal"] == other["check_equal"] == (
        "ValueError: the seed of process 1 is not that of process 0; every process needs the same"
    )  # fmt: skip
    assert main["no shared disk"].endswith("belongs on a disk that all share, of process 1 is not that of process 0; "
                                           "every process needs the same")  # fmt: skip
    assert other["no shared disk"].replace("elsewhere", "within") == main["no shared disk"]
    assert main["arguments"] == other["arguments"] and "of process 1 is not that of" in main["arguments"]
    assert main["sharded again"] == other["sharded again"] == (
        "ValueError: FSDP has taken the base apart, and nobody can tell any more which it is; load it anew"
    )  # fmt: skip
    assert "fsdp_version is 1; expected 2" in main["fsdp1"] and main["fsdp1"] == other["fsdp1"]
    assert (
        not (two / "other").exists() and not list((two / "refused").iterdir()) and not list((two / "broken").iterdir())
    )


@pytest.mark.parametrize("samples", [1, 7, 16, 22])
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("shuffled", [True, False])
def test_a_step_holds_the_same_samples_on_any_number_of_processes(samples: int, processes: int, shuffled: bool) -> None:
    per_process = 8 // processes

    def steps(count: int, per_process: int, epoch: int) -> list[list[int]]:
        shards = []
        for rank in range(count):
            order = GlobalOrder(samples, per_process * count if count > 1 else 1, 3, shuffled)
            order.set_epoch(epoch)
            batches = BatchSampler(order, per_process, drop_last=False)
            shards.append(list(BatchSamplerShard(batches, count, rank) if count > 1 else batches))
        assert len({len(shard) for shard in shards}) == 1, "a process without a batch would be waited for"
        return [sorted(i for shard in shards for i in shard[step] if i < samples) for step in range(len(shards[0]))]

    for epoch in range(2):
        assert steps(processes, per_process, epoch) == steps(1, 8, epoch)
    assert samples <= 8 or (steps(1, 8, 0) != steps(1, 8, 1)) == shuffled, "each epoch has its own order"


def test_the_example_by_accelerate_launch(tmp_path: Path) -> None:
    script = ROOT / "examples" / "train.py"
    options = (
        "--limit 12 --scale 8 --a_std 0.09 --learning_rate 3e-3 --align_steps 3 --max_steps 2 --max_new_tokens 4 "
        "--logging_steps 1 --no_progress"
    ).split()
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "ddp.yaml")]
    launch += ["--main_process_port", str(free_port()), str(script), "--per_device_train_batch_size", "4"]
    subprocess.run([*launch, "--output_dir", str(tmp_path / "two"), *options], check=True, env=environment())
    main = runpy.run_path(str(script))["main"]
    result = main(["--output_dir", str(tmp_path / "one"), "--per_device_train_batch_size", "8", *options])
    one, two = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("one", "two"))
    assert one["arguments"] == two["arguments"] and one["arguments"]["train_batch_size"] == 8
    assert one["matrix"] == two["matrix"] and len(one["matrix"]) == 4
    for task, losses in one["losses"].items():
        assert two["losses"][task] == pytest.approx(losses, rel=1e-4)
    assert result.accuracy_matrix[-1] == one["matrix"][-1]


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_the_configurations(config: Path) -> None:
    loaded = load_config_from_file(str(config))
    kinds = {"single": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED"}
    assert loaded.distributed_type.value == kinds[config.stem]
    assert loaded.num_processes >= 1 and loaded.mixed_precision == "no"
