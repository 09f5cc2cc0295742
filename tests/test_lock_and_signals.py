"""One run at a time in a folder, and signals that end it behind a step."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import cllava_fast as cf
from cllava_fast.data.encode import ImageFeatures
from cllava_fast.data.workers import outlive_signals
from cllava_fast.train import lock
from cllava_fast.train.lock import InUseError, run_lock
from cllava_fast.train.signals import RunStopped, Watch
from tests.train_helpers import CONFIG, arguments, stream, trainer


class TestLock:
    def test_a_second_run_is_refused_and_the_lock_goes(self, tmp_path: Path) -> None:
        with run_lock(tmp_path / "run"):
            with pytest.raises(InUseError, match=f"is in use by process {os.getpid()} on "), run_lock(tmp_path / "run"):
                pass
        assert not list((tmp_path / "run").iterdir())
        (tmp_path / "run" / ".lock").write_text("process 1 on a machine that was switched off\n")
        with run_lock(tmp_path / "run"):
            pass

    def test_one_whose_holder_ends_meanwhile_is_taken_anew(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        flock, asked = lock.fcntl.flock, list[int]()

        def late(descriptor: int, how: int) -> None:
            asked.append(descriptor)
            if len(asked) == 1:
                (tmp_path / ".lock").unlink()
            flock(descriptor, how)

        monkeypatch.setattr(lock.fcntl, "flock", late)
        with run_lock(tmp_path), pytest.raises(InUseError), run_lock(tmp_path):
            pass
        assert asked[0] == asked[1], "nothing stays open"

    def test_a_fork_does_not_keep_it(self, tmp_path: Path) -> None:
        """Workers of a data loader outlive a killed run for seconds."""
        (reader, writer), (here, there) = os.pipe(), os.pipe()
        descriptor = lock._take(tmp_path / ".lock")
        child = os.fork()
        if child == 0:
            os.write(there, b"x")
            os.read(reader, 1)
            os._exit(0)
        os.read(here, 1)
        try:
            assert descriptor is not None
            lock._held.discard(descriptor)
            os.close(descriptor)  # as the kernel does for who is killed
            with run_lock(tmp_path):
                pass
        finally:
            os.write(writer, b"x")
            os.waitpid(child, 0)

    def test_a_trainer_asks_before_anything_else(self, llava: Any, processor: Any, tmp_path: Path) -> None:
        cf.patch(llava, CONFIG, processor=processor)
        trainer = cf.ContinualTrainer(llava, processor, stream(), arguments(tmp_path / "run"))
        with run_lock(tmp_path / "run"):
            with pytest.raises(InUseError):
                trainer.train()
            with pytest.raises(InUseError):
                cf.ContinualTrainer(llava, processor, stream(), arguments(tmp_path / "run"))

    def test_a_folder_that_another_run_wrote_to_meanwhile(
        self, new_llava: Callable, processor: Any, tmp_path: Path
    ) -> None:
        first, second = (trainer(new_llava(), processor, tmp_path / "run", max_steps=1) for _ in range(2))
        first.train()
        with pytest.raises(FileExistsError, match="was written by another run meanwhile"):
            second.train()


class TestSignals:
    def test_handlers_of_the_caller_stay(self) -> None:
        def own(*args: Any) -> None:
            """Of whoever uses the library."""

        before = signal.signal(signal.SIGTERM, own)
        try:
            with Watch().catching():
                assert signal.getsignal(signal.SIGTERM) is own
        finally:
            signal.signal(signal.SIGTERM, before)

    def test_a_thread_gets_none(self) -> None:
        seen: list[Any] = []

        def work() -> None:
            with Watch().catching():
                seen.append(signal.getsignal(signal.SIGTERM))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert seen == [signal.SIG_DFL]

    def test_a_data_loaders_worker_is_ended_by_sigterm_alone(self) -> None:
        """A terminal's Ctrl-C reaches it, too."""
        with Watch().catching():
            child = os.fork()
            if child == 0:
                try:
                    os.kill(os.getpid(), signal.SIGINT)
                    os.kill(os.getpid(), signal.SIGTERM)
                finally:
                    os._exit(0)
            _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGTERM

    def test_a_worker_of_ours_outlives_signals_to_all_and_ends_with_its_parents(self) -> None:
        def work() -> None:
            for _ in range(2):
                outlive_signals(0)
                for signum in (signal.SIGINT, signal.SIGTERM):
                    os.kill(os.getpid(), signum)
            while signal.SIGTERM in signal.sigpending():  # a second one would be lost in the first
                time.sleep(0.01)
            ours.send("lives")
            time.sleep(60)

        theirs, ours = multiprocessing.Pipe()
        worker = multiprocessing.get_context("fork").Process(target=work, daemon=True)
        worker.start()
        try:
            assert theirs.poll(30) and theirs.recv() == "lives"
            worker.terminate()  # as multiprocessing ends it when Python ends, and then waits for it
            worker.join(10)
            assert worker.exitcode == 0
        finally:
            worker.kill()

    def test_one_while_images_are_computed_stops_behind_the_batch(
        self, llava: Any, processor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cf.patch(llava, CONFIG, processor=processor)
        trained, *_ = stream(1).tasks
        images = [Image.new("RGB", (64, 64), (i, 0, 0)) for i in range(130)]
        task = dataclasses.replace(trained, train=[cf.Sample("which color?", "red", image) for image in images])
        computed: list[int] = []

        def compute(self: Any, batch: Any, *args: Any) -> None:
            computed.append(len(batch))
            os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(ImageFeatures, "_compute", compute)
        with pytest.raises(RunStopped, match="stopped by SIGTERM"):
            cf.ContinualTrainer(llava, processor, cf.Stream([task]), arguments(tmp_path / "run")).train()
        assert computed == [64]

    def test_one_behind_the_last_step_is_not_lost(self) -> None:
        with pytest.raises(RunStopped, match="stopped by SIGINT"), Watch().catching():
            os.kill(os.getpid(), signal.SIGINT)

    def test_the_second_stops_at_once(self) -> None:
        watch = Watch()
        with pytest.raises(RunStopped, match="stopped at once by SIGINT"), watch.catching():
            os.kill(os.getpid(), signal.SIGTERM)
            assert watch.requested == signal.SIGTERM
            os.kill(os.getpid(), signal.SIGINT)
        with watch.catching():
            watch.check()  # of an earlier run, nothing stays
