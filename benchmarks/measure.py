"""One comparison: several ways to compute the same, each checked against float64, then timed in turn.

Ways take turns, in a new order each round, so that a machine that slows down slows all of them down; a ratio of two
medians of one comparison means something even where the times do not. A way whose result is wrong has no time.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.util
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks import clocks
from benchmarks.clocks import GRAPH, HOST, IDLE, QUEUED
from cllava_fast import ops
from cllava_fast.ops import native, triton_backend
from cllava_fast.train.garbage import nothing_old_collected

# Largest error relative to the largest entry, the same for all ways. Roundings of sums over up to 16,384 tokens.
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
FEW, CLOSE = 25, 1.2  # rounds, and times over one another, that leave a comparison undecided
THREADS = torch.get_num_threads()  # torch's choice, however many are timed
FORWARD, BACKWARD, BOTH = DIRECTIONS = ("forward", "backward", "both")

BY_BATCH = "other semantics: one selection for the batch"


class Unavailable(Exception):
    """Why a way cannot run here."""


def need_peft() -> None:
    """Raises Unavailable where the package of some rivals is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise Unavailable("peft is not installed")


class Wrong(Exception):
    """A result that is too far from float64's."""


class Point(NamedTuple):
    """What the ways of one comparison have in common."""

    case: Any
    dtype: torch.dtype
    direction: str
    launch: str

    def __str__(self) -> str:
        return "-".join([str(self.case), dtype_name(self.dtype), self.direction, self.launch])


class Way(NamedTuple):
    """`function(*inputs)` returns a tensor or several; gradients go from the first to the inputs that ask for one."""

    function: Callable[..., Any]
    exact: Callable[..., Any]  # of the same inputs in float64, written independently
    inputs: tuple[Any, ...]
    note: str = ""  # what a reader must know of it
    rival: bool = True  # does the same job; what selects less, or not at all, is shown and beats nobody
    backend: str = ops.dispatch.AUTO


class Job(NamedTuple):
    """Whole work, such as a training step: `error` says how far what `run()` returns is from right."""

    run: Callable[[], Any]
    error: Callable[[Any], float]
    note: str = ""
    rival: bool = False
    backend: str = ops.dispatch.AUTO
    limits: Mapping[torch.dtype, float] = LIMITS


class Work(NamedTuple):
    """What the mathematics needs, whichever way it is computed: the floor of a roofline."""

    bytes: int
    flops: int

    def then(self, backward: Work, direction: str) -> Work:
        """What a direction needs, of a forward pass and its backward."""
        both = Work(self.bytes + backward.bytes, self.flops + backward.flops)
        return {FORWARD: self, BACKWARD: backward}.get(direction, both)


class Tokens(NamedTuple):
    """What a whole step works on, padding aside."""

    tokens: int


class Measured(NamedTuple):
    seconds: list[float]  # of each round
    error: float
    extra_memory: int | None  # bytes at the peak beyond what was there before, results included

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def iqr(self) -> float:
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return high - low


def points(
    cases: Iterable[Any],
    dtypes: Iterable[torch.dtype],
    device: str,
    directions: Callable[[Any], tuple[str, ...]] = lambda case: DIRECTIONS,
    launch_bound: Callable[[Any], bool] = lambda case: True,
) -> list[Point]:
    """On a GPU what is bound by launches is timed both ways: launched one by one, and replayed from a graph."""
    found = []
    for case in cases:
        for dtype in dtypes:
            for direction in directions(case):
                launch = HOST if device == "cpu" else IDLE if launch_bound(case) else QUEUED
                found.append(Point(case, dtype, direction, launch))
                if launch == IDLE and direction == FORWARD:
                    found.append(Point(case, dtype, direction, GRAPH))
    return found


def compare(
    ways: Mapping[str, Way | Job | Exception], point: Point, budget: float, own: str = "", rivals: Iterable[str] = ()
) -> dict[str, Measured | Exception]:
    """Times for about `budget` seconds; a way that cannot run or is wrong has the reason instead.

    Where few rounds leave `own` and the fastest of `rivals` close, these two go on for as long again.
    """
    found: dict[str, Any] = {}
    runs = {}
    exact: dict[Any, tuple[Tensor, ...]] = {}
    for name, way in ways.items():
        if isinstance(way, Exception):
            found[name] = way
            continue
        try:
            with ops.backend(way.backend):
                if isinstance(way, Job):
                    run, limit = runner(way, point), way.limits[point.dtype]
                    took, results = peak_memory(run, point.launch != HOST, warm=bool(runs))
                    with _all_threads():
                        worst, peak = way.error(results), took.peak
                    del results
                    _tidy()  # a 7B model leaves no room for what is only waiting to be freed
                else:
                    run, limit = runner(way, point), LIMITS[point.dtype]
                    with _all_threads():
                        right = _exact_results(way, point.direction, exact)
                    worst = error(run(), right)
                    # what a graph replays was allocated when it was captured
                    peak = None if point.launch == GRAPH else peak_memory(run, point.launch != HOST)[0].peak
                if not worst <= limit:
                    raise Wrong(f"relative error {worst:.1e} exceeds {limit:.1e}: a wrong result has no time")
        except Exception as reason:  # whatever it is, the others have their times
            found[name] = reason.with_traceback(None)  # whose frames would keep their tensors
        else:
            runs[name] = run
            found[name] = Measured([], worst, peak)
    exact.clear()
    _take_turns(runs, ways, found, point.launch, budget, own, rivals)
    return found


@contextlib.contextmanager
def _all_threads() -> Iterator[None]:
    """For what is exact, which takes longer than what is timed."""
    timed = torch.get_num_threads()
    torch.set_num_threads(max(timed, THREADS))
    try:
        yield
    finally:
        torch.set_num_threads(timed)


def _tidy() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def _take_turns(
    runs: Any, ways: Any, found: Any, launch: str, budget: float, own: str = "", rivals: Iterable[str] = ()
) -> None:
    shuffle = random.Random(0).shuffle
    whole = any(isinstance(ways[name], Job) for name in runs)

    def turn(order: list[str]) -> dict[str, float]:
        shuffle(order)  # whoever comes right after a way whose threads still spin would pay for it each time
        taken = {}
        if whole:
            gc.collect()  # a step leaves much behind
        for name in order:
            with ops.backend(ways[name].backend):
                taken[name] = clocks.seconds(runs[name], launch)
        return taken

    def take(order: list[str], least: int) -> None:
        start, rounds = time.perf_counter(), 0
        while order and (rounds < least or (rounds < 200 and time.perf_counter() < start + budget)):
            for name, seconds in turn(order).items():
                found[name].seconds.append(seconds)
            rounds += 1

    with nothing_old_collected():
        gc.disable()
        try:
            least = 3 if whole else 4
            if not whole or launch != HOST:  # of a whole step, the first one asks the GPU for its memory
                first = turn(list(runs))
                least = 9 if whole and sum(first.values()) < 1.0 else least
            take(list(runs), least)
            take(undecided(found, own, [name for name in rivals if name in runs]) if own in runs else [], 0)
        finally:
            gc.enable()


def undecided(found: Mapping[str, Measured], own: str, rivals: Iterable[str]) -> list[str]:
    """`own` and its fastest rival, where a few rounds leave them so close that noise would say who is ahead."""
    fastest = min(rivals, key=lambda name: found[name].median, default=None)
    if fastest is None or len(found[own].seconds) >= FEW:
        return []
    ratio = found[own].median / found[fastest].median
    return [own, fastest] if 1 / CLOSE < ratio < CLOSE else []


def turns(runs: Mapping[Any, Callable[[], Any]], launch: str, budget: float) -> dict[Any, float]:
    """Median seconds of each, for about `budget` seconds in all. Nobody looks at the results here."""
    found = {name: Measured([], 0.0, None) for name in runs}
    _take_turns(runs, {name: Way(run, run, ()) for name, run in runs.items()}, found, launch, budget)
    return {name: measured.median for name, measured in found.items()}


def runner(way: Way | Job, point: Point) -> Callable[[], Any]:
    """What is timed."""
    if isinstance(way, Job):
        return way.run
    leaves = _leaves(way.inputs)

    def forward() -> tuple[Tensor, ...]:
        return _outputs(way.function(*way.inputs))

    if point.launch == GRAPH:
        return captured(forward)
    if point.direction == FORWARD:
        return forward
    output = forward()[0]
    upstream = _upstream(output.shape, output.dtype, output.device)
    if point.direction == BACKWARD:
        return lambda: torch.autograd.grad(output, leaves, upstream, retain_graph=True)
    return lambda: torch.autograd.grad(forward()[0], leaves, upstream)


def captured(run: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    try:
        with torch.cuda.graph(graph):
            results = run()
    except RuntimeError as error:
        raise Unavailable(f"no CUDA graph: {str(error).splitlines()[0]}") from error

    def replay() -> tuple[Tensor, ...]:
        graph.replay()
        return results

    return replay


def _exact_results(way: Way, direction: str, known: dict[Any, tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    key = (way.exact, *map(id, way.inputs))
    if key not in known:
        inputs = tuple(_double(value) for value in way.inputs)
        outputs = _outputs(way.exact(*inputs))
        if direction == FORWARD:
            known[key] = tuple(output.detach() for output in outputs)
        else:
            upstream = _upstream(outputs[0].shape, torch.float64, outputs[0].device)
            known[key] = torch.autograd.grad(outputs[0], _leaves(inputs), upstream)
    return known[key]


@functools.lru_cache(maxsize=2)
def _upstream(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The gradient that comes in: bfloat16's numbers in every dtype, so that float64 sees the same ones."""
    rng = torch.Generator(device).manual_seed(1)
    return torch.randn(shape, generator=rng, device=device).bfloat16().to(dtype)


def _double(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return value


def _leaves(inputs: Iterable[Any]) -> list[Tensor]:
    return [value for value in inputs if isinstance(value, Tensor) and value.requires_grad]


def _outputs(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def error(found: Iterable[Tensor], wanted: Iterable[Tensor]) -> float:
    """The largest, relative to the largest entry; infinite where a row number differs or a NaN appears."""
    worst = 0.0
    for result, exact in zip(found, wanted, strict=True):
        if result.shape != exact.shape:
            raise Wrong(f"shape {tuple(result.shape)} instead of {tuple(exact.shape)}: a wrong result has no time")
        if not exact.is_floating_point():
            worst = max(worst, 0.0 if torch.equal(result, exact) else float("inf"))
        elif exact.numel():
            one = ((result.detach().double() - exact).abs().max() / exact.abs().max().clamp(min=1e-12)).item()
            worst = max(worst, one if one == one else float("inf"))
    return worst


class Took(NamedTuple):
    peak: int  # bytes beyond what was there before
    largest: int  # bytes of the largest single allocation (0 where nobody knows)


def peak_memory(run: Callable[[], Any], on_gpu: bool, warm: bool = False) -> tuple[Took, Any]:
    """What `run` takes, and its results. On a CPU torch's profiler sees every allocation, also those inside the ops;
    on a GPU the allocator keeps count."""
    if on_gpu:
        if not warm:
            run()  # what libraries allocate once
        time.sleep(0.01)  # autograd's own threads let go of their last tensors a moment later
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = run()
        return Took(torch.cuda.max_memory_allocated() - before, 0), results
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        results = run()
    events = profiler.profiler.kineto_results.events()
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()) if e.name() == "[memory]"]
    if not changes:
        raise RuntimeError("the profiler recorded no allocation")
    live = torch.tensor(changes).cumsum(0)
    return Took(int(live.max()), max(changes)), results


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Compiled once a shape, whatever the direction."""
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False  # its backward runs more than once on one graph
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(function, dynamic=False, fullgraph=True, **options)


def backends(op: str) -> list[str]:
    """The names of those that can run the op on this machine, interpreters and emulations aside."""
    pretended = {"triton": triton_backend.INTERPRETED, "cuda": native.EMULATED}
    rows = [row for row in ops.dispatch.table() if row.op == op and row.available]
    return [row.backend for row in rows if not pretended.get(row.backend)]
