"""Breaks a copy of the tree in one place after another and expects the tests to go red: ``make mutants``.

A mutant that survives is a test that is missing. Names may be given to run some: ``python tests/mutants.py unpatch``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.hostile_mutants import HOSTILE_MUTANTS  # noqa: E402
from tests.kernel_mutants import KERNEL_MUTANTS  # noqa: E402
from tests.native_mutants import NATIVE_MUTANTS  # noqa: E402
from tests.serving_mutants import SERVING_MUTANTS  # noqa: E402
from tests.training_mutants import TRAIN, TRAINING_MUTANTS  # noqa: E402
from tests.tuned_mutants import TUNED_MUTANTS  # noqa: E402

PLUGINS = ("-p", "no:cacheprovider", "-p", "tests.any_order")
COPIED = ("cllava_fast", "csrc", "docs", "examples", "tests", "benchmarks", "pyproject.toml", "setup.py", "README.md")


class Mutant(NamedTuple):
    name: str
    file: str
    old: str  # occurs once
    new: str
    tests: tuple[str, ...]


SELECT = "cllava_fast/ops/select"
INJECT = "cllava_fast/ops/inject"
MEMORY = ("tests/test_memory.py",)
CONFORMANCE = "tests/test_ops.py"
INJECT_TESTS, SELECT_TESTS = (CONFORMANCE, "tests/test_op_inject.py"), (CONFORMANCE, "tests/test_op_select.py")
# names of an op's tests in the conformance test, where they are not its folder's
TESTED_AS = {"aggregate": "aggregate or mix_factors"}
TUNED = ("tests/test_tuned.py", "tests/test_tune.py")
MODEL = ("tests/test_pool.py", "tests/test_methods.py", "tests/test_patch.py", "tests/test_calls.py", *TRAIN)
SCORES, REPORT, PLOTS = ("tests/test_scores.py",), ("tests/test_report.py",), ("tests/test_plots.py",)
EVALUATION, SETTINGS = ("tests/test_evaluation.py",), ("tests/test_demo_settings.py",)
CLIP, CHECKS = ("tests/test_clip.py",), ("tests/test_checks.py",)
LOCK = ("tests/test_lock_and_signals.py",)
RESUME, ATOMIC, NATIVE = ("tests/test_checkpoint.py",), ("tests/test_atomic.py",), ("tests/test_native.py",)

MUTANTS = [
    Mutant(
        "inject: sign of dx", f"{INJECT}/reference.py", "expand_(to_x, low_grad,", "expand_(to_x, -low_grad,",
        INJECT_TESTS,
    ),
    Mutant("inject: what torch refused is lost", f"{INJECT}/native.py", "    if not left:", "    if True:", NATIVE),
    Mutant("inject: a refusal is tried again", f"{INJECT}/native.py", "    if not left:", "    if False:", NATIVE),
    Mutant(
        "inject: Triton reads factors of any dtype", f"{INJECT}/triton.py",
        "f if f.dtype in (dtype, torch.float32) else f.float() for f", "f for f", ("tests/test_op_inject.py",),
    ),
    Mutant(
        "inject: all samples gather at once", f"{INJECT}/reference.py", "GATHERED = 2**21", "GATHERED = 2**40", MEMORY
    ),
    Mutant(
        "inject: any choice of as many rows is all rows in order", f"{INJECT}/reference.py",
        "return torch.equal(index, _order(rows).expand_as(index))", "return True",
        INJECT_TESTS,
    ),
    Mutant(
        "inject: a turn lost", f"{INJECT}/reference.py", "range(0, max(1, samples),",
        "range(together, max(1, samples),", MEMORY,
    ),
    Mutant(
        "results are views", "cllava_fast/ops/library.py", "torch._C._AutoDispatchBelowADInplaceOrView()",
        "torch._C._AutoDispatchBelowAutograd()", MEMORY,
    ),
    Mutant(
        "inject: sign of dB", f"{INJECT}/reference.py", "to_B = _sum_over_tokens(", "to_B = -_sum_over_tokens(",
        INJECT_TESTS,
    ),
    Mutant(
        "select: sign of dkeys", f"{SELECT}/reference.py", "return across.flatten(1)", "return -across.flatten(1)",
        SELECT_TESTS,
    ),
    Mutant(
        "select: mask ignored", f"{SELECT}/reference.py",
        'similarity = similarity.masked_fill(~allowed, float("-inf"))', "pass", SELECT_TESTS,
    ),
    Mutant(
        "inject: the past's strength lost in the gradient", f"{INJECT}/reference.py",
        "times(low_grad, past_strength(given), grad.dtype)", "low_grad.to(grad.dtype)", INJECT_TESTS,
    ),
    Mutant(
        "inject: scale lost in a past that is added up", f"{INJECT}/__init__.py", "(past.coefficient * scale)",
        "past.coefficient", INJECT_TESTS,
    ),
    Mutant(
        "inject: a past that is added up acts twice", f"{INJECT}/__init__.py",
        "added_up(past, scale, x.dtype)), None", "added_up(past, scale, x.dtype)), past", INJECT_TESTS,
    ),
    Mutant(
        "inject: a past rounded away in a weight of few bits", f"{INJECT}/__init__.py",
        "exact = torch.finfo(x.dtype).bits >= 32", "exact = True", INJECT_TESTS,
    ),
    Mutant(
        "inject: a past rounded away under autocast", f"{INJECT}/__init__.py",
        " and not checks.under_autocast(x)", "", INJECT_TESTS,
    ),
    Mutant(
        "the second task has another precision", "cllava_fast/train/as_it_was.py",
        '"_original_forward", "_is_accelerate_prepared")', '"_original_forward")', TRAIN,
    ),
    Mutant(
        "two settings under one name", "cllava_fast/evaluate/combine.py",
        "if one != other and not (key in OF_BASE", "if False and not (key in OF_BASE", ("tests/test_combine.py",),
    ),
    Mutant(
        "runs in several orders by their places", "cllava_fast/evaluate/combine.py",
        '"order": place}', '"order": 0}', ("tests/test_combine.py",),
    ),
    Mutant(
        "a gradient of alignment is clipped to less than nothing", "cllava_fast/train/arguments.py",
        '"align_epochs", "align_steps", "align_weight_decay", "align_max_grad_norm",',
        '"align_epochs", "align_steps", "align_weight_decay",', TRAIN,
    ),
    Mutant(
        "trainer_options take over steps", "cllava_fast/train/arguments.py",
        "if name in self.__dataclass_fields__:", "if False:", TRAIN,
    ),
    Mutant(
        "a video is left out without a word", "cllava_fast/data/records.py",
        "            if video is not None:", "            if False:", ("tests/test_data_readers.py",),
    ),
    Mutant(
        "what a logger wrote is another run's", "cllava_fast/train/loop.py",
        "if self.callbacks or self.args.report_to:", "if False:", TRAIN,
    ),
    Mutant(
        "an optimizer's average is not what is learned", "cllava_fast/train/tune.py", "            optimizer.eval()",
        "            pass", TRAIN,
    ),
    Mutant(
        "checks: a trained weight looks like a frozen one", "cllava_fast/ops/checks.py",
        "argument.device, argument.requires_grad)", "argument.device)", CHECKS,
    ),
    Mutant(
        "checks: one count looks like another", "cllava_fast/ops/checks.py", "seen.append(argument)",
        "seen.append(kind)", CHECKS,
    ),
    Mutant(
        "checks: autocast looks like none", "cllava_fast/ops/checks.py", "seen.append(autocast)", "pass",
        CHECKS,
    ),
    Mutant(
        "checks: what is refused has passed", "cllava_fast/ops/checks.py",
        "            check(*arguments)\n            if like is not None:", "            if like is not None:",
        CHECKS,
    ),
    Mutant(
        "inject: each sample's past is added up", f"{INJECT}/__init__.py",
        "past.coefficient.shape[0] == 1 and total", "total", INJECT_TESTS,
    ),
    Mutant(
        "inject: a past that is added up teaches its coefficient nothing", f"{INJECT}/__init__.py",
        "(past.coefficient * scale).view", "(past.coefficient.detach() * scale).view", INJECT_TESTS,
    ),
    Mutant(
        "the context of two samples", "cllava_fast/methods/base.py", "context.shape[0] != 1:", "True:",
        ("tests/test_methods.py", "tests/test_method_o_lora.py"),
    ),
    Mutant(
        "inject: the past's coefficient learns nothing", f"{INJECT}/autograd.py",
        "needs[3], needs[4], needs[6], needs[9]]", "needs[3], needs[4], needs[6], False]", INJECT_TESTS,
    ),
    Mutant(
        "inject: a whole pool saves no past", f"{INJECT}/reference.py", "torch.cat([low, past_low], 2)",
        "torch.cat([low, 0 * past_low], 2)", INJECT_TESTS,
    ),
    Mutant(
        "inject: per token: coefficients of another row", f"{INJECT}/reference.py", "found.gather(-1, at)",
        "found[..., : at.shape[-1]]", INJECT_TESTS,
    ),
    Mutant(
        "inject: per token: a repeated row counts once", f"{INJECT}/reference.py",
        "chosen.to(coefficient.dtype))", "(chosen & (chosen.cumsum(1) == 1)).to(coefficient.dtype))",
        INJECT_TESTS,
    ),
    Mutant(
        "inject: shared: scale lost in the sum of B", f"{INJECT}/reference.py",
        "as_dtype(by_scale(given.coefficient, given.scale), exact)", "as_dtype(given.coefficient, exact)", INJECT_TESTS,
    ),
    Mutant(
        "inject: shared: scale lost in B's gradient", f"{INJECT}/reference.py",
        "as_dtype(by_scale(_of_pool(given), given.scale), to_sum.dtype).t()",
        "as_dtype(_of_pool(given), to_sum.dtype).t()", INJECT_TESTS,
    ),
    Mutant(
        "inject: shared: scale lost in the coefficient's gradient", f"{INJECT}/reference.py",
        "as_dtype(by_scale(found, given.scale), given", "as_dtype(found, given", INJECT_TESTS,
    ),
    Mutant(
        "inject: shared: the gradient of the last row alone", f"{INJECT}/reference.py",
        "_weighed(by_row, strength).sum(2), dtype)", "_weighed(by_row, strength)[:, :, -1], dtype)", INJECT_TESTS,
    ),
    Mutant(
        "inject: shared: A copied for each pair", f"{INJECT}/reference.py",
        "return shrink(x, given.A, given),",
        "return shrink(x, given.A.expand(len(given.B), -1, -1).clone(), given)[..., : given.A.shape[1]],", INJECT_TESTS,
    ),
    Mutant(
        "inject: native kernels take any coefficients", f"{INJECT}/native.py", 'if sizes.get("per_token"):',
        "if False:", INJECT_TESTS,
    ),
    Mutant(
        "context of too many rows", "cllava_fast/model/acting.py", "ops.Past(A[:rows], B[:rows],",
        "ops.Past(A[-rows:], B[-rows:],", MODEL,
    ),
    Mutant(
        "context lost in a layer", "cllava_fast/model/acting.py", "return [(*first, past),",
        "return [(*first, None),", MODEL,
    ),
    Mutant(
        "past keys drift", "cllava_fast/pool.py", "torch.cat([self.keys, keys])",
        "torch.cat([self.keys * 0.999, keys])", MODEL,
    ),
    Mutant(
        "past rows drift", "cllava_fast/pool.py", "torch.cat([self.B, B])",
        "torch.cat([self.B * 0.99, B])", MODEL,
    ),
    Mutant(
        "untrained rows at inference", "cllava_fast/methods/continual_llava.py",
        "if training and pool.block_rows:", "if pool.block_rows:", MODEL,
    ),
    Mutant(
        "one selection for the batch", "cllava_fast/methods/continual_llava.py",
        "query, pool.keys, top_m, *tasks, groups=groups, check_values=False",
        'query, pool.keys, top_m, *tasks, groups=groups, check_values=False, reduce="batch"', MODEL,
    ),
    Mutant(
        "unpatch leaves forward", "cllava_fast/model/patching.py", "        del module.__dict__[name]\n",
        "        pass\n", MODEL,
    ),
    Mutant(
        "unpatch leaves the freeze", "cllava_fast/model/patching.py",
        "parameter.requires_grad_(record.requires_grad.get(name, parameter.requires_grad))", "pass", MODEL,
    ),
    Mutant("unpatch leaves hooks", "cllava_fast/model/patching.py", "hook.remove()", "pass", MODEL),
    Mutant(
        "scores: VQA leaves no annotator out", "cllava_fast/evaluate/scores.py", "min((equal - 1) / needed, 1.0)",
        "min(equal / needed, 1.0)", SCORES,
    ),
    Mutant("scores: ANLS without a threshold", "cllava_fast/evaluate/scores.py", "best >= 0.5", "best >= 0.0", SCORES),
    Mutant("scores: any box that overlaps", "cllava_fast/evaluate/scores.py", "other) >= 0.5", "other) > 0", SCORES),
    Mutant("scores: percent is a number", "cllava_fast/evaluate/scores.py", "100.0 if text", "1.0 if text", SCORES),
    Mutant(
        "scores: a graded task by exact match", "cllava_fast/evaluate/evaluation.py",
        "find_metric(task.metric) for task", 'find_metric("exact_match") for task', EVALUATION,
    ),
    Mutant(
        "evaluation: rows of another sample", "cllava_fast/evaluate/evaluation.py", "selected.rows[position]",
        "selected.rows[-1 - position]", EVALUATION,
    ),
    Mutant(
        "evaluation: another task's block is right", "cllava_fast/evaluate/evaluation.py",
        "owner[index] == pool", "owner[index] != pool", EVALUATION,
    ),
    Mutant(
        "evaluation: answers in the wrong task", "cllava_fast/evaluate/evaluation.py", "start = part.stop", "start = 0",
        EVALUATION,
    ),
    Mutant(
        "report: an unfinished run has no averages", "cllava_fast/evaluate/metrics.py",
        "learned = [row[:size] for row in matrix[:size]]", "learned = matrix", ("tests/test_metrics.py",),
    ),
    Mutant(
        "report: orders averaged by place", "cllava_fast/evaluate/metrics.py", "[list(order).index(name) for",
        "[list(names).index(name) for", ("tests/test_metrics.py",),
    ),
    Mutant(
        "report: p of one side", "cllava_fast/evaluate/metrics.py", "batch=4096, rng=0",
        'batch=4096, rng=0, alternative="less"', ("tests/test_metrics.py",),
    ),
    Mutant(
        "report: p of differences that are rounded one by one", "cllava_fast/evaluate/metrics.py",
        "np.round(np.sum(signed, axis=axis) / largest * 2**30)",
        "np.sum(np.round(signed / largest * 2**30), axis=axis)",
        ("tests/test_metrics.py",),
    ),
    Mutant(
        "report: p of the scores, not of their differences", "cllava_fast/evaluate/report.py",
        "[a - b for a, b in pairs]", "[a for a, b in pairs]", REPORT,
    ),
    Mutant(
        "pictures: orders by step", "cllava_fast/evaluate/plots.py", "for i in range(place, len(order))]",
        "for i in range(len(order))]", PLOTS,
    ),
    Mutant(
        "selection: weight of either task is shared", "cllava_fast/evaluate/selection.py",
        "1 - torch.cdist(shares, shares, p=1) / 2", "1 + torch.cdist(shares, shares, p=1) / 2",
        ("tests/test_metrics.py",),
    ),
    Mutant(
        "selection: every row is used", "cllava_fast/evaluate/selection.py", "> USED", ">= 0",
        ("tests/test_metrics.py",),
    ),
    Mutant(
        "evaluation: the study counts rows, not weights", "cllava_fast/evaluate/evaluation.py",
        "scatter_add_(1, index, weight)", "scatter_add_(1, index, weight.new_ones(weight.shape))", SETTINGS,
    ),
    Mutant(
        "demo: every order is the first", "cllava_fast/demo/run.py", "orders[order])", "orders[0])", SETTINGS,
    ),
    Mutant(
        "demo: a failed run lets the others end", "cllava_fast/demo/run.py", "process.terminate()", "pass",
        ("tests/test_demo.py",),
    ),
    Mutant(
        "decoding: context lost", "cllava_fast/model/acting.py", "pairs, (A, B) = selection.joined,",
        "pairs, (A, B) = selection.past,", ("tests/test_decoding.py",),
    ),
    Mutant(
        "decoding: gradients lost", "cllava_fast/model/acting.py", "return torch.is_grad_enabled() or ", "return ",
        ("tests/test_decoding.py",),
    ),
    Mutant(
        "decoding: what looks at tokens looks once", "cllava_fast/model/increments.py",
        "lasts = not self.method.routes", "lasts = True", ("tests/test_decoding.py",),
    ),
    Mutant(
        "decoding: prompts decode as tokens do", "cllava_fast/model/acting.py", "return x.shape, x.dtype,",
        "return x.dtype,", ("tests/test_decoding.py",),
    ),
    Mutant(
        "decoding: cast models decode as before", "cllava_fast/model/acting.py", "return x.shape, x.dtype,",
        "return x.shape,", ("tests/test_decoding.py",),
    ),
    Mutant(
        "decoding: a selection holds the model", "cllava_fast/methods/base.py", "return WeakKeyDictionary()",
        "return {}", ("tests/test_decoding.py",),
    ),
    Mutant(
        "decoding: in spite of a backend asked for", "cllava_fast/ops/dispatch.py",
        "return _asked[-1]\n", "return AUTO\n", ("tests/test_decoding.py",),
    ),
    Mutant(
        "evaluation: batches that are selected for mix tasks", "cllava_fast/evaluate/evaluation.py",
        "increments.method.by_batch and len(names) > 1", "False", ("tests/test_method_slm.py",),
    ),
    Mutant(
        "smora: each batch is a step", "cllava_fast/methods/smora.py", "not in (None, version)", "is not None",
        ("tests/test_method_smora.py",),
    ),
    Mutant(
        "demo: the smaller one is bigger", "cllava_fast/demo/capability.py", "bigger = max(", "bigger = min(", SETTINGS,
    ),
    Mutant(
        "demo: tiles of training are tested", "cllava_fast/demo/dataset.py", '"train": places[2 * fifth :]',
        '"train": places', SETTINGS,
    ),
    Mutant(
        "page: names are not escaped", "cllava_fast/evaluate/page.py", "<h3>{escape(task)}", "<h3>{task}", REPORT,
    ),
    Mutant(
        "page: any text is a picture", "cllava_fast/evaluate/page.py", "damaged picture\n        return None",
        "damaged picture\n        return str(encoded)", REPORT,
    ),
    Mutant(
        "pictures: a name is mathematics", "cllava_fast/evaluate/plots.py", 'text.replace("$", r"\\$")', "text", REPORT,
    ),
    *(Mutant(f"hostile: {name}", file, old, new, (test,)) for name, file, old, new, test in HOSTILE_MUTANTS),
    Mutant(
        "resume: random states stay", "cllava_fast/train/checkpoint.py",
        'set_random_state(self._each[distributed.rank()]["random"])', "pass", RESUME,
    ),
    Mutant(
        "resume: tuning's optimizer begins anew", "cllava_fast/train/tune.py",
        "getattr(self, name).load_state_dict(self._saving.saved[name])", "pass", RESUME,
    ),
    Mutant(
        "resume: alignment's optimizer begins anew", "cllava_fast/train/align.py",
        'optimizer.load_state_dict(saved["optimizer"])', "pass", RESUME,
    ),
    Mutant(
        "resume: losses since the last log are lost", "cllava_fast/train/tune.py",
        "self.trainer._tr_loss = mine.to(args.device)", "pass", RESUME,
    ),
    Mutant(
        "resume: parameters in the order of a file", "cllava_fast/pool.py",
        'self.register_parameter("block_A", None)\n        self.register_parameter("block_B", None)',
        "self.block_A = self.block_B = None", RESUME,
    ),
    Mutant(
        "resume: any checkpoint is whole", "cllava_fast/train/checkpoint.py", 'check_sums(folder, values["files"])',
        "pass", RESUME,
    ),
    Mutant(
        "resume: nobody is locked out", "cllava_fast/train/lock.py", "fcntl.LOCK_EX | fcntl.LOCK_NB",
        "fcntl.LOCK_SH | fcntl.LOCK_NB", LOCK,
    ),
    Mutant(
        "resume: signal handlers stay", "cllava_fast/train/signals.py", "signal.signal(signum, handler)", "pass", LOCK
    ),
    Mutant(
        "atomic: a name before its contents", "cllava_fast/atomic.py",
        "            _to_disk(temporary)\n            os.replace(temporary, path)",
        "            os.replace(temporary, path)\n            _to_disk(path)", ATOMIC,
    ),
    Mutant(
        "atomic: folders are not written", "cllava_fast/atomic.py",
        "os.replace(temporary, path)\n            _to_disk(path.parent)", "os.replace(temporary, path)", ATOMIC,
    ),
    Mutant("clip: all images have the first one's task", "cllava_fast/clip.py", "pair[n : n + 1]", "pair[:1]", CLIP),
    Mutant(
        "clip: texts are the frozen tower's", "cllava_fast/clip.py",
        "self._acting(selection and selection.expand(len(input_ids)))", "self._acting(None)", CLIP,
    ),
    Mutant(
        "clip: hooks stay behind a file that is refused", "cllava_fast/clip.py",
        "            prompted.remove()\n            raise", "            raise", CLIP,
    ),
    Mutant(
        "smora: padding counts as work", "cllava_fast/methods/smora.py", "if selection.mask is not None:", "if False:",
        ("tests/test_method_smora.py",),
    ),
    Mutant(
        "smora: a bias picks, and does not weigh", "cllava_fast/methods/smora.py", "weight = scores.gather(",
        "weight = logits.sigmoid().gather(", ("tests/test_method_smora.py",),
    ),
    Mutant(
        "smora: a layer that is recomputed counts again", "cllava_fast/methods/smora.py",
        " and factors not in selection.seen", "", ("tests/test_method_smora.py",),
    ),
    Mutant("clip: half a task stays open", "cllava_fast/clip.py", "self.pool.drop_block()", "pass", CLIP),
    *(Mutant(name, file, old, new, (test,)) for name, file, old, new, test in SERVING_MUTANTS),
    *(Mutant(*mutant) for mutant in TRAINING_MUTANTS),
    *(Mutant(f"tuned: {name}", file, old, new, TUNED) for name, file, old, new in TUNED_MUTANTS),
    *(Mutant(name, file, old, new, (CONFORMANCE, test)) for name, file, old, new, test in KERNEL_MUTANTS),
    *(
        Mutant(f"{file}: {name}", f"csrc/{file}", old, new, (CONFORMANCE, test))
        for name, file, old, new, test in NATIVE_MUTANTS
    ),
]  # fmt: skip


def main(names: list[str]) -> int:
    chosen = [mutant for mutant in MUTANTS if not names or any(name in mutant.name for name in names)]
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, Path(folder) / name)
        native = any(mutant.file.startswith("csrc/") for mutant in chosen)
        if native and not _built(Path(folder)):
            print("the native libraries cannot be built here")
            return 1
        for mutant in chosen:
            verdict = _verdict(mutant, Path(folder))
            bad += verdict != "red"
            print(f"{verdict:<12} {mutant.name}", flush=True)
    print(f"{len(chosen) - bad} of {len(chosen)} went red")
    return 1 if bad else 0


def _built(folder: Path) -> bool:
    """The CPU's native library, and the CUDA kernels for their emulation."""
    command = [sys.executable, "csrc/build.py", "cpu", "emulated"]
    return subprocess.run(command, cwd=folder, capture_output=True).returncode == 0


def _selection(file: Path) -> list[str]:
    """Of the tests of an op's file: those of the op, and for a kernel those that run it."""
    if file.parts[0] == "csrc":
        mix, rows = "mix_factors", "(select or inject)"
        ops = {"aggregate": "aggregate", "mix": mix, "mix_factors": mix, "rows": rows}
        return ["-k", f"{file.parts[1]} and {ops.get(file.stem, file.stem.partition('_')[0])}"]
    if file.parts[:2] != ("cllava_fast", "ops") or len(file.parts) < 4:
        return []
    op = TESTED_AS.get(file.parts[2], file.parts[2])
    return ["-k", f"({op}) and triton" if "triton" in file.name else op]


def _verdict(mutant: Mutant, folder: Path) -> str:
    file = folder / mutant.file
    text = file.read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        return "NOT APPLIED"
    file.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    native = mutant.file.startswith("csrc/")
    try:
        if native and not _built(folder):
            return "NOT BUILT"
        only = _selection(Path(mutant.file)) if CONFORMANCE in mutant.tests else []
        command = [sys.executable, "-m", "pytest", "-q", "-x", *PLUGINS, *only, *mutant.tests]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
        run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    finally:
        file.write_text(text, encoding="utf-8")
        if native:
            _built(folder)
    if run.returncode < 0:  # a kernel that wrote where it must not
        return "red"
    # 1: tests failed. Anything else is no verdict on the tests.
    return {0: "SURVIVED", 1: "red"}.get(run.returncode, f"EXIT {run.returncode}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
