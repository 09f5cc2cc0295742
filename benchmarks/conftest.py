"""Glue between pytest and `measure.compare`: which tests there are, what each prints, where results go.

A module `test_<op>.py` says what there is to measure:

    WAYS                              names, the floor first; ops.backends add one each
    points(device, quick)             the comparisons
    inputs(case, dtype, device)       made once for all ways and directions of a case
    way(name, point, inputs)          a `Way`, or raises `Unavailable`
    work(point)                       the bytes and FLOPs that the mathematics needs
    BROKEN_DOWN                       if there: ways whose time is also told by kernel, for `broken_down(point)`

and, where whole work of a model is measured rather than an op (`way` gives a `Job`, `work` its `Tokens`):

    OWN                               which way is this library's (else the one named like the op)
    BACKENDS                          those to ask for by name (else all that the op has)

One test is one way of one comparison. The first test of a comparison measures all ways that were collected, in turn.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from benchmarks import breakdown, measure, results

# cuBLAS sums in float32, as the kernels do
torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False

SUBJECTS = ("inject", "select", "aggregate", "merge", "mix_factors", "align", "generate", "step")  # in this order
UNAVAILABLE = (measure.Unavailable, measure.ops.BackendError, torch.OutOfMemoryError)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SECONDS = {"cpu": 1.2, "cuda": 0.4}  # of a comparison


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="small shapes, few rounds; writes no results file")
    parser.addoption("--results", type=Path, metavar="FILE", help="write results here (default: results/<device>.json)")
    parser.addoption("--first", choices=SUBJECTS, action="append", default=[], help="before the others")
    parser.addoption("--threads", type=int, help="of the CPU (default: torch's choice); 1 on a machine that others use")


def pytest_configure(config):
    if config.getoption("threads"):
        torch.set_num_threads(config.getoption("threads"))
    config.stash[STATE] = State(config)


def pytest_generate_tests(metafunc):
    module = metafunc.module
    if "comparison" in metafunc.fixturenames:
        names = list(dict.fromkeys([*module.WAYS, *backends(module)]))
        chosen = list(itertools.product(module.points(DEVICE, metafunc.config.getoption("quick")), names))
        metafunc.parametrize(("point", "way"), chosen, ids=[f"{point}-{way}" for point, way in chosen])


def backends(module):
    return getattr(module, "BACKENDS", None) or measure.backends(module.OP)


def own(module):
    return getattr(module, "OWN", module.OP)


def is_rival(name, module, ways):
    return name in module.WAYS and name != own(module) and getattr(ways[name], "rival", False)


def pytest_collection_modifyitems(config, items):
    unknown = {item.module.OP for item in items if hasattr(item.module, "OP")} - set(SUBJECTS)
    if unknown:
        raise pytest.UsageError(f"{sorted(unknown)} is the OP of a benchmark; enter it in SUBJECTS of {__file__}")
    order = list(dict.fromkeys((*config.getoption("--first"), *SUBJECTS)))
    items.sort(key=lambda item: order.index(getattr(item.module, "OP", order[0])))


def pytest_deselected(items):
    if items:
        items[0].config.stash[STATE].partial = True


def pytest_collection_finish(session):
    state = session.config.stash[STATE]
    state.items = [item for item in session.items if "comparison" in getattr(item, "fixturenames", ())]
    state.partial |= {item.module.OP for item in state.items} != set(SUBJECTS)


def pytest_sessionfinish(session):
    session.config.stash[STATE].finish()


def pytest_terminal_summary(terminalreporter, config):
    path = config.stash[STATE].path()
    if path is not None and path.exists():
        terminalreporter.write_line(f"results: {path}")


class State:
    """What a session has measured so far. Only the last case's inputs and the last comparison are kept."""

    def __init__(self, config):
        self.config = config
        self.items = []
        self.partial = False  # not everything was asked for
        self.content = results.new(quick=config.getoption("quick"))
        self.inputs = self.compared = (None, None)

    def path(self):
        """A part of the results never takes the place of the whole unless asked for."""
        given = self.config.getoption("results")
        if given is not None or self.partial or self.config.getoption("quick"):
            return given
        return results.FOLDER / results.file_name(self.content["device"])

    def compare(self, module, point):
        key = (module.OP, point)
        if self.compared[0] != key:
            self.compared = (None, None)
            torch.cuda.empty_cache()
            case = (module.OP, point.case, point.dtype)
            if self.inputs[0] != case:
                self.inputs = (None, None)
                self.inputs = (case, module.inputs(point.case, point.dtype, DEVICE))
            ways = {}
            for name in self._names(module, point):
                try:
                    ways[name] = module.way(name, point, self.inputs[1])
                except Exception as reason:  # a rival that another version of its package broke, say
                    ways[name] = reason
            budget = 0.7 if self.config.getoption("quick") else SECONDS[DEVICE]
            rivals = [name for name in ways if is_rival(name, module, ways)]
            self.compared = (key, measure.compare(ways, point, budget, own(module), rivals))
            self._break_down(module, point, ways)
            self._record(module, point, ways)
        return self.compared[1]

    def _names(self, module, point):
        every = [(item.module.OP, *item.callspec.params.values()) for item in self.items]
        return [way for op, at, way in every if (op, at) == (module.OP, point)]

    def _break_down(self, module, point, ways):
        if not getattr(module, "BROKEN_DOWN", ()) or not module.broken_down(point):
            return
        for name in module.BROKEN_DOWN:
            if isinstance(self.compared[1].get(name), measure.Measured):
                found = breakdown.of(measure.runner(ways[name], point), DEVICE)
                self.content["breakdowns"].append(self._place(module, point, name) | found)

    def _place(self, module, point, name):
        row = {"op": module.OP, "case": str(point.case), "dtype": measure.dtype_name(point.dtype)}
        return row | {"direction": point.direction, "launch": point.launch, "way": name}

    def _record(self, module, point, ways):
        for name, found in self.compared[1].items():
            row = self._place(module, point, name)
            if isinstance(found, Exception):
                kind = "unavailable" if isinstance(found, UNAVAILABLE) else "wrong"
                row |= {kind: f"{type(found).__name__}: {found}"}
            else:
                row |= {
                    "ours": name == own(module), "rival": is_rival(name, module, ways), "note": ways[name].note,
                    "median": found.median, "iqr": found.iqr, "error": found.error, "rounds": len(found.seconds),
                    "extra_memory": found.extra_memory, **module.work(point)._asdict(),
                }  # fmt: skip
            self.content["rows"].append(row)
        self._write()  # after each, so that a session that is cut off leaves what it found

    def finish(self):
        if self.content["rows"]:
            self.content["complete"] = not self.partial and len(self.content["rows"]) == len(self.items)
            self._write()

    def _write(self):
        path = self.path()
        if path is not None:
            for found in (self.content["rows"], self.content["breakdowns"]):
                found.sort(key=lambda row: SUBJECTS.index(row["op"]))
            results.write(self.content, path)


STATE = pytest.StashKey[State]()


@pytest.fixture
def comparison(request, point, way):
    """`comparison()`: the gate, then the time, which goes to pytest-benchmark's table where that is installed."""

    def check():
        found = request.config.stash[STATE].compare(request.module, point)[way]
        if isinstance(found, UNAVAILABLE):
            pytest.skip(str(found))
        if isinstance(found, Exception):
            ours = way == own(request.module) or way not in request.module.WAYS
            (pytest.fail if ours else pytest.xfail)(f"{way}: {type(found).__name__}: {found}")
        if request.config.pluginmanager.hasplugin("benchmark"):
            ticks = itertools.chain.from_iterable((0.0, seconds) for seconds in found.seconds)
            request.node.add_marker(pytest.mark.benchmark(timer=ticks.__next__, group=f"{request.module.OP} {point}"))
            benchmark = request.getfixturevalue("benchmark")
            benchmark.extra_info |= {"error": found.error, "extra_memory": found.extra_memory}
            benchmark.pedantic(lambda: None, rounds=len(found.seconds))

    return check
