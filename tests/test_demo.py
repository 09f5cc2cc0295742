"""The demo end to end, a short one: its files, its numbers' shape, and what it never overwrites."""

from __future__ import annotations

import csv
import importlib
import json
import multiprocessing
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import cllava_fast as cf
from cllava_fast.demo.base import load_base
from cllava_fast.demo.run import DEFAULT, DemoConfig, run_demo
from cllava_fast.evaluate.report import load_results
from cllava_fast.evaluate.results import METRICS
from cllava_fast.methods import METHODS

TASKS = ["chart", "document", "icon", "digit"]


def short(output: Path, **changes: Any) -> DemoConfig:
    return DemoConfig(output=str(output), **{"steps": 3, "train": 48, "test": 12, "progress": False, **changes})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("runs") / "demo"
    return output, run_demo(short(output, seeds=2))


def test_leaves_its_files(run: tuple[Path, dict[str, Any]]) -> None:
    output, _ = run
    for name in ("results.json", "matrix.csv", "accuracy_matrix.png", "forgetting.png", "report.md"):
        assert (output / name).stat().st_size > 0, name
    for method in DEFAULT[1:]:
        for seed in ("seed0", "seed1"):
            assert list((output / "methods" / method / seed).rglob("*.safetensors")), (method, seed)


def test_results_have_the_promised_shape(run: tuple[Path, dict[str, Any]]) -> None:
    output, returned = run
    results = load_results(output / "results.json")
    assert results == json.loads(json.dumps(returned))
    assert results["stream"] == TASKS and results["seeds"] == [0, 1]
    assert list(results["methods"]) == list(DEFAULT)
    for name, result in results["methods"].items():
        assert set(METRICS) <= set(result) and len(result["per_seed"]) == 2
        for i, row in enumerate(result["accuracy_matrix"]):
            for j, value in enumerate(row):
                assert (value is None) == (j > i or (name == "joint_lora" and i < 3)), (name, i, j)
                assert value is None or 0.0 <= value <= 1.0
        seeds = [seed["average_accuracy"] for seed in result["per_seed"]]
        assert result["average_accuracy"] == pytest.approx(sum(seeds) / 2)
    methods = results["methods"]
    assert methods["frozen"]["trainable_parameters"] == 0
    assert methods["frozen"]["average_forgetting"] == 0.0
    assert methods["continual_llava"]["selection_accuracy"] > 0.5
    assert methods["sequential_lora"]["selection_accuracy"] is None
    assert len(list(csv.DictReader((output / "matrix.csv").open()))) == 3 * (3 * 10 + 4)


def test_the_learned_increments_load_again(run: tuple[Path, dict[str, Any]]) -> None:
    output, results = run
    model, processor = load_base()
    folder = output / "methods" / "continual_llava" / "seed0"
    saved = sorted(path.parent for path in folder.rglob("*.safetensors"))
    cf.load_pretrained(model, saved[-1], processor=processor)
    pool = model.increments.pool
    assert pool.task_names == results["stream"] == TASKS
    assert all((factors.B.abs().amax((1, 2)) > 0).all() for factors in pool.layers.values())


def test_the_same_config_gives_the_same_numbers(run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """In processes of their own, too."""
    _, results = run
    threads = torch.get_num_threads()
    again = run_demo(short(tmp_path / "again", methods=("continual_llava", "frozen"), jobs=2))
    assert torch.get_num_threads() == threads and list(again["methods"]) == ["continual_llava", "frozen"]
    for method in again["methods"]:
        first, second = (found["methods"][method]["per_seed"][0] for found in (results, again))
        for metric in METRICS:
            if metric == "seconds":
                continue
            if isinstance(first[metric], float):  # sums of weights; all else are counts
                assert first[metric] == pytest.approx(second[metric], abs=1e-6), metric
            else:
                assert first[metric] == second[metric], metric
    assert list((tmp_path / "again" / "methods" / "continual_llava" / "seed0").rglob("*.safetensors"))


OWN_METHOD = """
from dataclasses import dataclass
from typing import ClassVar

from cllava_fast.methods import register
from cllava_fast.methods.slm import Slm, SlmConfig

@dataclass(frozen=True)
class MineConfig(SlmConfig):
    method: ClassVar[str] = "mine"
    title: ClassVar[str] = "Mine"

@register(MineConfig)
class Mine(Slm):
    pass
"""


def test_a_method_from_outside_learns_in_other_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_method.py").write_text(OWN_METHOD)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("my_method")
    try:
        monkeypatch.setattr("cllava_fast.demo.run.METHODS", ("mine", "frozen"))
        results = run_demo(short(tmp_path / "demo", methods=("all",), jobs=2, steps=1))
    finally:
        del METHODS["mine"], sys.modules["my_method"]
    assert list(results["methods"]) == ["mine", "frozen"]


class Broken(DemoConfig):
    """One of its seeds has no tasks."""

    def stream(self, seed: int) -> cf.Stream:
        (Path(self.output).parent / f"began{seed}").touch()
        if seed == 38:  # the second to begin
            raise OSError("the disk is gone")
        return super().stream(seed)


def test_a_run_that_fails_stops_the_others(tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 1, "train": 8, "test": 4, "progress": False, "methods": ["frozen"]}
    with pytest.raises(OSError, match="the disk is gone"):
        run_demo(Broken(output=str(tmp_path / "demo"), seeds=40, jobs=2, **options))
    began = [path.name for path in tmp_path.iterdir()]
    assert "began38" in began and len(began) < 20 and all(name.startswith("began") for name in began)
    for process in multiprocessing.active_children():
        process.join(10)
    assert multiprocessing.active_children() == []


def test_a_demo_that_is_killed_leaves_no_process(tmp_path: Path) -> None:
    words = "-m cllava_fast.cli demo --jobs=2 --seeds=2".split()
    command = [sys.executable, *words, f"--output={tmp_path / 'demo'}"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as demo:
        workers: list[psutil.Process] = []
        patience = time.monotonic() + 120
        while len(workers) < 2 and time.monotonic() < patience:
            time.sleep(0.2)
            workers = [
                child for child in psutil.Process(demo.pid).children() if "spawn_main" in " ".join(child.cmdline())
            ]
        demo.kill()
    assert len(workers) == 2
    _, alive = psutil.wait_procs(workers, timeout=60)
    for worker in alive:
        worker.kill()
    assert not alive


def test_what_is_in_the_way_stays(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="something else than a demo"):
            run_demo(short(taken, overwrite=overwrite))
    assert [p.name for p in taken.iterdir()] == ["thesis.txt"]
    demo = tmp_path / "demo"
    run_demo(short(demo, methods=("frozen",)))
    (demo / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="thesis.txt"):
        run_demo(short(demo, methods=("frozen",), overwrite=True))
    assert (demo / "thesis.txt").read_text() == "years of work"


def test_an_earlier_demo_goes_only_when_told(tmp_path: Path) -> None:
    demo = tmp_path / "demo"
    run_demo(short(demo, methods=("frozen",)))
    before = {p.name: p.read_bytes() for p in demo.iterdir() if p.is_file()}
    with pytest.raises(FileExistsError, match="earlier demo; use --overwrite"):
        run_demo(short(demo, methods=("frozen",)))
    assert {p.name: p.read_bytes() for p in demo.iterdir() if p.is_file()} == before
    with pytest.raises(ValueError, match="train is 0"):
        run_demo(short(demo, methods=("frozen",), train=0, overwrite=True))
    assert {p.name: p.read_bytes() for p in demo.iterdir() if p.is_file()} == before
    run_demo(short(demo, methods=("frozen",), overwrite=True, test=8))
    assert json.loads((demo / "results.json").read_text())["config"]["test"] == 8
