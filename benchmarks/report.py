"""Tables and pictures of the results files: `python -m benchmarks.report` fills benchmarks/README.md, README.md with
what increments cost in a whole model, and these and other pages with the tables of the demo and of native kernels.

A ratio is of two medians of one comparison. What runs on a CPU is shown as ratios only.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import native_cpu, results
from cllava_fast import atomic
from cllava_fast.evaluate.plots import COLORS, panels
from cllava_fast.evaluate.report import load_results, markdown_table

README = results.ROOT / "benchmarks" / "README.md"
MARK, COST_MARK = "results", "cost of increments"
FLOORS = ("frozen linear", "frozen step", "unpatched model")
# The end of a case of whole models.
WHOLE_MODEL = re.compile(r"-B(?P<samples>\d+)-S(\d+)-(past|new)(\d+)")
NOISY = 0.25  # interquartile range over median
NAMED = 6  # of the sources that have changed since
# The devices that this library's kernels are made for.
WANTED = ("NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", "NVIDIA H200")
STALE = "**Stale**: the sources have changed since; measure again."
Row = Mapping[str, Any]


def _of_demo(path: Path) -> str:
    return markdown_table(load_results(path), brief=True)


def _of_native(path: Path) -> str:
    return native_cpu.table(json.loads(path.read_text(encoding="utf-8"))["rows"])


# Pages, what their marks say before the name of a results file, and what is shown of it.
TABLES = (
    ("README.md", "table of", _of_demo),
    ("docs/evaluation.md", "table of", _of_demo),
    ("csrc/README.md", "native table of", _of_native),
)


def comparisons(rows: Iterable[Row]) -> dict[tuple[str, ...], dict[str, Row]]:
    """(op, case, dtype, direction, launch) -> way -> row."""
    found: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("op", "case", "dtype", "direction", "launch"))
        found.setdefault(key, {})[row["way"]] = row
    return found


def ours(ways: Mapping[str, Row]) -> Row | None:
    return next((row for row in ways.values() if row.get("ours")), None)


def best_rival(ways: Mapping[str, Row]) -> Row | None:
    return min((row for row in ways.values() if row.get("rival")), key=lambda row: row["median"], default=None)


def base(ways: Mapping[str, Row]) -> Row | None:
    """What ratios are to: the floor where there is one, else the fastest rival."""
    floor = next((ways[name] for name in FLOORS if name in ways), None)
    return floor if floor and "median" in floor else best_rival(ways)


def render(found: Mapping[str, Mapping[str, Any]], sources: str) -> str:
    """Everything between the README's marks."""
    parts = [missing(found)]
    for stem, content in found.items():
        parts.append(f"## {content['device']}\n\n{describe(content, sources)}")
        grouped = comparisons(content["rows"])
        for op in dict.fromkeys(op for op, *_ in grouped):
            parts.append(f"### {op}\n\n{table({key: ways for key, ways in grouped.items() if key[0] == op}, content)}")
            parts += breakdowns(op, content)
        pictures_of = {f"{stem}-{name}.png": title for name, title in pictures(content)}
        parts += [f"![{title}](results/{name})" for name, title in pictures_of.items()]
    return "\n\n".join(parts)


def missing(found: Mapping[str, Mapping[str, Any]]) -> str:
    there = {content["device"] for content in found.values()}
    absent = ", ".join(device for device in WANTED if device not in there)
    gpus = [device for device in there if not device.startswith("CPU")]
    first = "" if gpus else "**No GPU has a results file: nothing is claimed about the speed of any kernel on a GPU.** "
    if not found:
        first += "No device has one. "
    return f"{first}Without a results file, and so without a claim: {absent or 'none of the usual ones'}."


def describe(content: Mapping[str, Any], sources: str) -> str:
    where = content["environment"]
    versions = ", ".join(f"{name} {where[name]}" for name in ("torch", "triton", "peft") if where.get(name))
    lines = [
        f"Measured {where['date'][:10]} at commit `{(content['commit'] or 'unknown')[:10]}` with {versions}, "
        f"{where['cpu_threads']} CPU threads of {where['cpus']} CPUs, load {content['load']:.1f} before."
    ]
    lines += staleness(content, sources)
    if not content["complete"]:
        lines.append("**Incomplete**: not every benchmark was run.")
    if content["quick"]:
        lines.append("**Quick run**: small shapes, few rounds.")
    wrong = sum("wrong" in row for row in content["rows"])
    if wrong:
        lines.append(f"**{wrong} wrong results**, which have no time.")
    noisy = sum(noise(row) > NOISY for row in content["rows"])
    timed = sum("median" in row for row in content["rows"])
    lines.append(f"{noisy} of {timed} times vary by more than {NOISY:.0%} (interquartile range over median): ~.")
    against = [ways for ways in comparisons(content["rows"]).values() if best_rival(ways)]
    lines.append(f"This library loses {sum(map(loses, against))} of {len(against)} comparisons.")
    return "\n\n".join(lines)


def staleness(content: Mapping[str, Any], sources: str) -> list[str]:
    if content["sources"] == sources:
        return []
    changed = results.changed(content)
    names = ", ".join(f"`{path}`" for path in changed[:NAMED])
    more = f" and {len(changed) - NAMED} others" if len(changed) > NAMED else ""
    return [f"{STALE} Changed: {names}{more}." if names else STALE]


def noise(row: Row) -> float:
    return row["iqr"] / row["median"] if "median" in row else 0.0


def loses(ways: Mapping[str, Row]) -> bool:
    own, rival = ours(ways), best_rival(ways)
    return bool(own and rival and "median" in own and own["median"] > 1.005 * rival["median"])


def table(grouped: Mapping[tuple[str, ...], Mapping[str, Row]], content: Mapping[str, Any]) -> str:
    """A line a comparison, a column a way: the ratio to the floor or the fastest rival; memory and error below it."""
    found = [(name, row) for ways in grouped.values() for name, row in ways.items()]
    # those that have a time come first
    names = list(dict.fromkeys(name for kind in ("median", "wrong") for name, row in found if kind in row))
    on_gpu = not content["device"].startswith("CPU")
    whole_steps = any("tokens" in row for ways in grouped.values() for row in ways.values())
    device_columns = ["ms", "tokens/s", "GiB"] if whole_steps else ["us", "GB/s", "TFLOP/s"]
    rivals = any(best_rival(ways) for ways in grouped.values())
    header = ["case", *(["over fastest rival"] if rivals else []), *(device_columns if on_gpu else []), *names]
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    notes: dict[str, None] = {}
    for (_, case, dtype, direction, launch), ways in grouped.items():
        own, rival = ours(ways), best_rival(ways)
        over = "–"
        if own and rival and "median" in own:
            over = f"{about(own) or about(rival)}{own['median'] / rival['median']:.2f}"
            over = f"**{over} loses**" if loses(ways) else over
        cells = [named(case, dtype, direction, launch).replace("\n", "<br>"), *([over] if rivals else [])]
        if on_gpu:
            cells += achieved(own)
        to = base(ways)
        for name in names:
            row = ways.get(name, {})
            cells.append(cell(row, to))
            if row.get("note"):
                notes[f"*{name}*: {row['note']}."] = None
        lines.append("| " + " | ".join(cells) + " |")
    floor = next((name for name in FLOORS if any(name in ways for ways in grouped.values())), None)
    to_name = "frozen linear alone" if floor == "frozen linear" else floor or "fastest rival"
    below = "peak memory beyond weights and state likewise, and the error" if whole_steps else "the error"
    legend = f"Times over those of the {to_name}; below, {below}."
    return "\n".join([*lines, "", " ".join([legend, *notes])])


def named(case: str, dtype: str, direction: str, launch: str) -> str:
    how = [dtype, direction] if launch == "host" else [dtype, direction, launch]
    return f"{case.removesuffix('-groups1-none-sample')}\n{', '.join(how)}"


def cell(row: Row, to: Row | None) -> str:
    if "wrong" in row:
        return "wrong"
    if "median" not in row or to is None:
        return "–"
    memory = ""
    if "tokens" in row and row["extra_memory"] and to["extra_memory"]:
        memory = f"{row['extra_memory'] / to['extra_memory']:.2f}, "
    return f"{about(row)}{row['median'] / to['median']:.2f}<br><sub>{memory}{row['error']:.0e}</sub>"


def achieved(row: Row | None) -> list[str]:
    """Microseconds, and what the mathematics needs in bytes and FLOPs by that time; of whole steps milliseconds, tokens
    by that time, and peak memory."""
    if not row or "median" not in row:
        return ["–"] * 3
    seconds = row["median"]
    if "tokens" in row:
        return [f"{seconds * 1e3:,.1f}", f"{row['tokens'] / seconds:,.0f}", f"{row['extra_memory'] / 2**30:,.2f}"]
    return [f"{seconds * 1e6:,.0f}", f"{row['bytes'] / seconds / 1e9:,.0f}", f"{row['flops'] / seconds / 1e12:,.1f}"]


def breakdowns(op: str, content: Mapping[str, Any]) -> list[str]:
    """Where the time of each comparison that was broken down goes: a line a kernel, a column a way."""
    found: dict[tuple[str, ...], dict[str, Mapping[str, Any]]] = {}
    for entry in content.get("breakdowns", ()):
        if entry["op"] == op:
            key = named(*(entry[name] for name in ("case", "dtype", "direction", "launch"))).replace("\n", ", ")
            found.setdefault(key, {})[entry["way"]] = entry
    return [breakdown_table(case, ways, content) for case, ways in found.items()]


def breakdown_table(case: str, ways: Mapping[str, Mapping[str, Any]], content: Mapping[str, Any]) -> str:
    on_gpu = not content["device"].startswith("CPU")
    kernels = dict.fromkeys(line["name"] for way in ways.values() for line in way["lines"])

    def shown(way: Mapping[str, Any], share: float | None, calls: int = 0) -> str:
        if share is None:
            return "–"
        time = f"{1e3 * share * way['seconds']:,.2f} ms, " if on_gpu else ""
        return f"{time}{share:.1%}" + (f" ({calls})" if calls else "")

    lines = ["| " + " | ".join(["", *ways]) + " |", "| --- |" + " ---: |" * len(ways)]
    for name in kernels:
        of_kernel = [next((line for line in way["lines"] if line["name"] == name), {}) for way in ways.values()]
        cells = [
            shown(way, line.get("share"), line.get("calls", 0))
            for way, line in zip(ways.values(), of_kernel, strict=True)
        ]
        short = name if len(name) <= 70 else f"{name[:69]}…"
        lines.append("| " + " | ".join([f"`{short.replace('|', '/')}`", *cells]) + " |")
    for title, name in (("the rest", "rest"), ("**inside this library's ops**", "ours")):
        lines.append("| " + " | ".join([title, *(shown(way, way[name]) for way in ways.values())]) + " |")
    what = "kernel (calls), of the time that kernels ran" if on_gpu else "operator (calls)"
    return "\n".join([f"Where the time goes in {case}, by {what}; – : not among the first.", "", *lines])


def pictures(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and title of each picture of a device."""
    found = []
    for op in dict.fromkeys(row["op"] for row in content["rows"] if "median" in row):
        found.append((f"{op}-time", f"{op}: time of each way"))
    for op in ("inject", "step"):
        if any(row.get("extra_memory") and row["op"] == op for row in content["rows"]):
            found.append((f"{op}-memory", f"{op}: peak memory of each way"))
    if not content["device"].startswith("CPU"):
        found.append(("roofline", "Achieved throughput over arithmetic intensity"))
    return found


BARS: dict[str, tuple[Callable[[Row, Row], float], str]] = {  # how long each is, and what that says
    "time": (lambda row, to: row["median"] / to["median"], "times the floor or the fastest rival"),
    "memory": (lambda row, to: (row.get("extra_memory") or 0) / 2**20, "MiB at the peak beyond the inputs"),
}


def draw(stem: str, content: Mapping[str, Any], folder: Path) -> None:
    for name, title in pictures(content):
        path = folder / f"{stem}-{name}.png"
        op, _, kind = name.partition("-")
        rows = content["rows"]
        figure = bars(whole(rows, op), *BARS[kind]) if kind else roofline(rows)
        figure.suptitle(f"{title}\n{content['device']}", fontsize=10)
        atomic.write_file(path, lambda to, figure=figure: figure.savefig(to, dpi=110, format="png", facecolor="white"))


def whole(rows: Iterable[Row], op: str) -> dict[tuple[str, ...], dict[str, Row]]:
    """For each case the comparisons that say most: forward and backward together where there is a backward."""
    grouped = {key: ways for key, ways in comparisons(rows).items() if key[0] == op}
    both = {key[:3] for key in grouped if key[3] == "both"}
    return {key: ways for key, ways in grouped.items() if key[3] == "both" or key[:3] not in both}


def bars(grouped: Mapping[tuple[str, ...], Mapping[str, Row]], value: Callable[[Row, Row], float], label: str) -> Any:
    """One panel a comparison, one bar a way, the same colour everywhere: ours, rivals, what is no rival."""
    most = max(len(ways) for ways in grouped.values())
    figure, grid = panels(len(grouped), min(3, len(grouped)), (5.2, 0.24 * most + 0.9), (0.0, 0.8))
    for axes, ((_, case, dtype, direction, launch), ways) in zip(grid.flat, grouped.items(), strict=False):
        to = base(ways)
        timed = {name: row for name, row in ways.items() if "median" in row and to is not None}
        heights = [value(row, to) for row in timed.values()] or [0.0]
        colors = [COLORS[0] if row["ours"] else COLORS[1] if row["rival"] else "0.65" for row in timed.values()]
        axes.barh(range(len(timed)), heights, color=colors)
        axes.set_yticks(range(len(timed)), list(timed), fontsize=8)
        axes.invert_yaxis()
        own = [height for height, row in zip(heights, timed.values(), strict=True) if row["ours"]]
        end = min(max(heights), 4 * max(own, default=math.inf))  # what is longer is cut off, and its number says so
        axes.set_xlim(0, 1.2 * end or 1)
        for i, height in enumerate(heights):
            cut = {"backgroundcolor": "white"} if height > end else {}
            axes.text(min(height, end), i, f" {height:.3g}", va="center", fontsize=7, **cut)
        axes.set_title(named(case, dtype, direction, launch), fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="x", which="both", labelsize=7)
    figure.supxlabel(f"{label}\nblue: ours, orange: rivals, grey: the rest", fontsize=9)
    return figure


def roofline(rows: Iterable[Row]) -> Any:
    """Roofs are the most that anything here achieved that does all the work, as floors do not; not a data sheet's."""
    timed = [row for row in rows if "bytes" in row and (row["ours"] or row["rival"])]
    bandwidth = max(row["bytes"] / row["median"] for row in timed)
    compute = max(row["flops"] / row["median"] for row in timed)
    figure, ((axes,),) = panels(1, 1, (7, 4.6))
    own = [row for row in timed if row["ours"]]
    for number, op in enumerate(dict.fromkeys(row["op"] for row in own)):
        of_op = [row for row in own if row["op"] == op]
        across, up = zip(*((row["flops"] / row["bytes"], row["flops"] / row["median"]) for row in of_op), strict=True)
        axes.scatter(across, up, color=COLORS[number % len(COLORS)], label=op, zorder=3)
    intensity = [row["flops"] / row["bytes"] for row in timed]
    ends = [min(intensity), compute / bandwidth, max(max(intensity), compute / bandwidth)]
    axes.plot(ends, [min(compute, bandwidth * x) for x in ends], color="0.5")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOPs for each byte that must move")
    axes.set_ylabel("FLOP/s")
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def costs(found: Mapping[str, Mapping[str, Any]], sources: str) -> str:
    """Whole steps and answers on the GPU that was measured last: times over those of the frozen model."""
    measured = [content for content in found.values() if not content["device"].startswith("CPU")]
    whole_models = [c for c in measured if not c["quick"] and any(row["op"] == "step" for row in c["rows"])]
    if not whole_models:
        return "No GPU has a results file: nothing is claimed."
    content = max(whole_models, key=lambda content: content["environment"]["date"])
    by_samples: list[tuple[int, str]] = []
    for (op, case, _, direction, _), ways in comparisons(content["rows"]).items():
        place, floor = WHOLE_MODEL.search(case), base(ways)
        if place is not None and floor is not None and floor["way"] in FLOORS:
            peft = "PEFT LoRA" if op == "step" else "PEFT mixed batch"
            cells = [ratio(ways.get(name, {}), floor) for name in ("patched", "dense offset", peft)]
            time = f"{about(floor)}{1e3 * floor['median']:,.0f} ms"
            line = f"| {what(place, direction)} | {time} | {' | '.join(cells)} |"
            by_samples.append((int(place["samples"]), line))
    lines = [
        "| | frozen model | this library | the ancestor's dense offset | PEFT |",
        "| --- | ---: | ---: | ---: | ---: |",
        *(line for _, line in sorted(by_samples, key=lambda row: -row[0])),
    ]
    head = f"{content['device']}, {content['environment']['date'][:10]}, times over those of the frozen model"
    noisy = f"; ~: varies by more than {NOISY:.0%}" if "~" in "".join(lines) else ""
    return "\n\n".join([f"{head}{noisy}:", *staleness(content, sources), "\n".join(lines)])


def about(row: Row) -> str:
    return "~" if noise(row) > NOISY else ""


def ratio(row: Row, floor: Row) -> str:
    if "median" in row:
        return f"{about(row)}{row['median'] / floor['median']:.2f}"
    return "wrong" if "wrong" in row else "–"


def what(place: re.Match[str], direction: str) -> str:
    """ "LLaVA-1.5-7B-B16-S656-past7" in words."""
    samples, tokens, kind, count = place.groups()
    if kind == "new":
        return f"{count} tokens for each of {samples} requests"
    several = "samples" if int(samples) > 1 else "sample"
    again = ", activations computed again" if "checkpointing" in direction else ""
    earlier = f"{count} earlier tasks" if int(count) else "no earlier task"
    return f"training step, {samples} {several} of {tokens} tokens, {earlier}{again}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="folder of results files")
    parser.add_argument("--readme", type=Path, default=README, help="file to fill in")
    given = parser.parse_args(arguments)
    found = results.read_all(given.results)
    for stem, content in found.items():
        draw(stem, content, given.results)
    sources = results.sources_digest()
    body = render(found, sources)
    results.fill(given.readme, MARK, body)
    if given.readme.resolve() == README:
        results.fill(results.ROOT / "README.md", COST_MARK, costs(found, sources))
        for page, kind, table in TABLES:
            for file in re.findall(f"<!-- {kind} (\\S+) -->", (results.ROOT / page).read_text(encoding="utf-8")):
                results.fill(results.ROOT / page, f"{kind} {file}", table(results.ROOT / file))
    print(body.split("\n\n")[0])
    for stem, content in found.items():
        state = "stale" if content["sources"] != sources else "up to date"
        print(f"{stem}: {len(content['rows'])} rows, {state}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
