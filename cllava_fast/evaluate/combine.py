"""One report of several runs on one stream: methods or settings side by side, means over seeds and orders."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

from cllava_fast.evaluate import metrics
from cllava_fast.evaluate.results import METRICS, check_results
from cllava_fast.evaluate.wording import learned
from cllava_fast.names import brief

# settings that not every file says: earlier versions' do not, nor evaluations of weights that hold what was learned
OF_BASE = ("base_fingerprint", "surrogate_fingerprint", "chat_template_sha256", "image_settings")
MEASURED = (*METRICS, "transfer", "base_kept", "selection", "cut_off")
TRAIN_SAMPLES = "train_samples"  # of each task, how many it learned from, which its order may decide (rehearsal)

Results = Mapping[str, Any]
Order = tuple[str, ...]
_Samples = dict[str, tuple[Any, str]]  # of each task their fingerprint, and where it was said first


class Source(NamedTuple):
    """``results`` of a run, ``where`` they lie, and the ``name`` that their method shall have; None for its own."""

    where: str
    results: Results
    name: str | None = None


class _Run(NamedTuple):
    """One method, seed and order."""

    source: Source
    method: str
    values: Mapping[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """What runs of one name share."""
        config = self.source.results.get("config", {})
        if "settings" in config:  # of runs that were combined
            return dict(_mapping(_mapping(config["settings"]).get(self.method)))
        arguments = {key: value for key, value in _mapping(config.get("arguments")).items() if key != "seed"}
        method = _mapping(_mapping(config.get("method_configs")).get(self.method))
        return {**arguments, **method, **_mapping(config.get("base"))}


def combine(sources: Sequence[Source]) -> dict[str, Any]:
    """What ``results.json`` holds for all of them together; runs of one name become its seeds and orders.

    Raises:
        ValueError: they measured other tasks, metrics, splits, samples or lengths of answers; one has not learned all
            tasks; two have one name with other settings, or with the same seed and order; a name lacks a seed or an
            order that others have. The frozen model, which has neither, may have one run.
    """
    measured: dict[int, _Samples] = {}  # of each seed: another may stand for other samples, as in the demo
    for source in sources:
        _check_alike(source, sources[0])
        for seed in source.results["seeds"]:
            _check_samples(source, seed, measured.setdefault(seed, {}))
    named: dict[str, dict[tuple[int, Order], _Run]] = {}
    for source in sources:
        if source.name is not None and len(source.results["methods"]) > 1:
            raise ValueError(f"{source.where} holds several methods, which cannot all be {source.name!r}; leave it out")
        for method, result in source.results["methods"].items():
            _add(named.setdefault(source.name or method, {}), source, method, result)
    learning = [runs for runs in named.values() if not _is_frozen(runs)] or list(named.values())
    seeds = sorted({seed for runs in learning for seed, _ in runs})
    orders = list(dict.fromkeys(order for runs in learning for _, order in runs))
    methods = {name: _mean(name, runs, seeds, orders) for name, runs in named.items()}
    if any(result.get("transfer") is not None for result in methods.values()):
        for name in filter(lambda name: _is_frozen(named[name]), methods):
            methods[name]["transfer"] = _frozen_transfer(methods[name]["accuracy_matrix"][-1], orders)
    results = {
        "stream": list(orders[0]),
        **({"orders": [list(order) for order in orders]} if len(orders) > 1 else {}),
        "metrics": _metrics(sources[0].results),
        "seeds": seeds,
        "methods": methods,
        "environment": sources[0].results["environment"],
        "config": {
            "split": _split(sources[0].results),
            "max_new_tokens": _longest_answer(sources[0].results),
            "samples_sha256": {
                str(seed): {task: digest for task, (digest, _) in samples.items()} for seed, samples in measured.items()
            },
            "runs": {name: list(dict.fromkeys(r.source.where for r in runs.values())) for name, runs in named.items()},
            # an old file beside others does not say all of them
            "settings": {name: dict(ChainMap(*(r.settings for r in runs.values()))) for name, runs in named.items()},
        },
    }
    check_results(results, "the report of all runs")
    return results


def _check_alike(source: Source, first: Source) -> None:
    results, other = source.results, first.results
    count, tasks = learned(results)
    if count != tasks:
        raise ValueError(f"{source.where} has learned {count} of {tasks} tasks; finish it first")
    for what, ours, theirs in (
        ("the tasks", sorted(results["stream"]), sorted(other["stream"])),
        ("the metrics", _metrics(results), _metrics(other)),
        ("the split", _split(results), _split(other)),
        ("max_new_tokens", _longest_answer(results), _longest_answer(other)),
    ):
        if ours != theirs:
            raise ValueError(
                f"{what} of {source.where}: {brief(ours)}; of {first.where}: {brief(theirs)}; expected runs that "
                "measured the same"
            )


def _check_samples(source: Source, seed: int, known: _Samples) -> None:
    """Notes the fingerprint of each task's measured samples, where it is said."""
    config = source.results.get("config", {})
    samples = _mapping(config.get("samples_sha256"))
    if "settings" in config:  # of runs that were combined
        samples = _mapping(samples.get(str(seed)))
    for task, digest in samples.items():
        other, where = known.setdefault(task, (digest, source.where))
        if other != digest:
            raise ValueError(
                f"{source.where} and {where} measured other samples of task {task!r}; expected the same ones"
            )


def _mapping(value: Any) -> Mapping[str, Any]:
    """Of what a file holds."""
    return value if isinstance(value, Mapping) else {}


def _metrics(results: Results) -> Mapping[str, str]:
    return results.get("metrics") or dict.fromkeys(results["stream"], "exact_match")


def _split(results: Results) -> str:
    return str(results.get("config", {}).get("split", "test"))


def _longest_answer(results: Results) -> Any:
    """In tokens, as a run has it or an evaluation; None where it is not said."""
    config = results.get("config", {})
    return config.get("max_new_tokens", _mapping(config.get("arguments")).get("max_new_tokens"))


def _is_frozen(runs: Mapping[tuple[int, Order], _Run]) -> bool:
    run = next(iter(runs.values()))
    return len(runs) == 1 and "frozen" in (run.method, run.settings.get("method"))


def _add(runs: dict[tuple[int, Order], _Run], source: Source, method: str, result: Mapping[str, Any]) -> None:
    for seed, order, values in _each(source.results, result):
        run = _Run(source, method, values)
        name = source.name or method
        hint = f"give one of them another name, such as mine={source.where}"
        if (seed, order) in runs:
            earlier = runs[seed, order].source.where
            raise ValueError(f"{earlier} and {source.where} both hold {name!r} with seed {seed}; {hint}")
        for (_, its_order), other in runs.items():
            sizes = run.values.get(TRAIN_SAMPLES), other.values.get(TRAIN_SAMPLES)
            if order == its_order and None not in sizes and sizes[0] != sizes[1]:
                raise ValueError(
                    f"{source.where} holds {name!r} with {brief(sizes[0])} training samples, {other.source.where} with "
                    f"{brief(sizes[1])}; {hint}"
                )
            if (key := _differing(run.settings, other.settings)) is not None:
                raise ValueError(
                    f"{source.where} holds {name!r} with {key} {brief(run.settings.get(key))}, {other.source.where} "
                    f"with {brief(other.settings.get(key))}; {hint}"
                )
        runs[seed, order] = run


def _differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """The first setting that is another."""
    for key in {**theirs, **ours}:
        one, other = ours.get(key), theirs.get(key)
        if one != other and not (key in OF_BASE and (one is None or other is None)):
            return key
    return None


def _each(results: Results, result: Mapping[str, Any]) -> Iterator[tuple[int, Order, Mapping[str, Any]]]:
    """A method's runs, each with its seed and its order of the tasks."""
    runs = result.get("per_seed") or [result]
    config = results.get("config", {})
    of_file = {TRAIN_SAMPLES: config[TRAIN_SAMPLES]} if TRAIN_SAMPLES in config else {}
    for order, of_order in metrics.runs_by_order(results, {"per_seed": runs}):
        for seed, of_run in zip(results["seeds"], of_order, strict=False):
            values = {**of_file, **of_run}
            yield seed, tuple(order), {key: values[key] for key in (*MEASURED, TRAIN_SAMPLES) if key in values}


def _frozen_transfer(scores: Sequence[float | None], orders: Sequence[Order]) -> float | None:
    """Of a model that learns nothing, with its score on each task of the first order."""
    of_task = dict(zip(orders[0], scores, strict=True))
    return metrics.mean_over_seeds(
        [{"transfer": metrics.transfer([[of_task[task] for task in order]] * len(order))} for order in orders]
    )["transfer"]


def _mean(
    name: str, runs: Mapping[tuple[int, Order], _Run], seeds: Sequence[int], orders: Sequence[Order]
) -> dict[str, Any]:
    if _is_frozen(runs):  # which has learned in no order: its tasks are brought into that of the others
        ((_, order), last), *_ = runs.items()
        values = [metrics.mean_over_orders([last.values], [order], orders[0])]
    else:
        for seed, order in product(seeds, orders):
            if (seed, order) not in runs:
                where = f" in the order {' → '.join(order)}" if len(orders) > 1 else ""
                raise ValueError(f"{name} has no run with seed {seed}{where}; expected each name to have the same ones")
        values = [
            {**runs[seed, order].values, **({"seed": seed, "order": place} if len(orders) > 1 else {})}
            for seed, (place, order) in product(seeds, enumerate(orders))
        ]
        last = runs[seeds[-1], orders[0]]
    shown = last.source.results["methods"][last.method]
    details = {key: shown[key] for key in ("losses", "examples") if key in shown}
    return {**metrics.mean_over_orders(values, orders, orders[0]), "per_seed": values, **details}
