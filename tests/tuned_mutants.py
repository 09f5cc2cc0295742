"""Ways to break tuned tables and what writes them that the tests must notice; ``tests/mutants.py`` runs them."""

# ruff: noqa: E501

from __future__ import annotations

READ, TILING, DISPATCH = "cllava_fast/ops/tuned.py", "cllava_fast/ops/inject/tiling.py", "cllava_fast/ops/dispatch.py"
LAUNCH = "cllava_fast/ops/inject/triton_launch.py"
TUNE, TILES, BACKENDS = "benchmarks/tune.py", "benchmarks/tune_tiles.py", "benchmarks/tune_backends.py"

TUNED_MUTANTS = [
    # name, file, old, new
    ("tiles of the table are not used", TILING, "    return found\n", "    return DEFAULTS[kernel](x.dtype, samples, tokens, columns)\n"),
    ("a tile may be taller than a sample", TILING, "found is None or found.tokens > tuned.bucket(tokens)", "found is None"),
    ("expand takes the default", LAUNCH, 'tiles = tiles or choose("expand", low, columns)', 'tiles = tiles or tiling.expand_tiles(low.dtype, samples, tokens, columns)'),
    ("the given tiles are not launched", LAUNCH, 'tiles = tiles or choose("outer", left, columns)', 'tiles = choose("outer", left, columns)'),
    ("a row counts beyond its bucket", READ, "return max(LEAST_TOKENS, power_of_two(size))", "return max(64, power_of_two(size))"),
    ("any dtype's row counts", READ, "(row.op, row.backend, row.dtype) != (op, backend, dtype)", "(row.op, row.backend) != (op, backend)"),
    ("any size's row counts", READ, "inside = all(", "inside = any("),
    ("bounds begin at 0", READ, "return [most // 2 + 1 if size else 0, most]", "return [0, most]"),
    ("the switch is not read", READ, "if name is None or not switched_on():", "if name is None:"),
    ("any tiles are taken", READ, "if one._asdict() == row[\"tiles\"]:", "if one:"),
    ("another architecture's table is taken", READ, "if architecture not in (None, table.architecture):", "if False:"),
    ("two rows for one bucket", READ, "if len(dict(tiles)) < len(tiles):", "if False:"),
    ("a backend may lose to one before it", READ, "after = dispatch.ORDER[dispatch.ORDER.index(row[\"backend\"]) + 1 :]", "after = dispatch.ORDER"),
    ("a loser leaves the call to one that cannot run it", READ, "if inside and dispatch.can_run(op, row.instead, site):", "if inside:"),
    ("an older choice stays", READ, "    _of.cache_clear()\n    dispatch.forget()", "    _of.cache_clear()"),
    ("advice is not heard", DISPATCH, "_refusal(op, name, site) or _advised(op, name, site)", "_refusal(op, name, site)"),
    ("advice is heard where a backend was asked for", DISPATCH, "refusal = _refusal(op, name, site, asked=True)", "refusal = _refusal(op, name, site, asked=True) or _advised(op, name, site)"),
    ("what is no faster is kept", TILES, "if seconds[default] < AHEAD * seconds[best]:", "if seconds[default] < seconds[best]:"),
    ("what is wrong is kept", TILES, "if error <= LIMITS[dtype]:", "if error == error:"),
    ("candidates larger than the bucket", TILES, "if t.columns <= columns and t.tokens <= tokens", "if t.columns <= columns"),
    ("what was found goes when tiles are cut off", TILES, "        keep(found)\n", ""),
    ("what was found goes when backends are cut off", BACKENDS, "        keep(found)\n", ""),
    ("a size that fails ends it all", TILES, "            found.out.append(failed(point, reason))\n            continue\n", "            raise\n"),
    ("a call that fails ends it all", BACKENDS, "                found.out.append(failed(call, reason))\n                continue\n", "                raise\n"),
    ("no loser", BACKENDS, "if ratios[instead] >= AHEAD:", "if ratios[instead] > 1e9:"),
    ("one launch decides", BACKENDS, "min(seconds[name] / seconds[other] for seconds in times)", "max(seconds[name] / seconds[other] for seconds in times)"),
    ("the dispatch goes on recording", BACKENDS, "        dispatch.choose = choose\n", "        pass\n"),
    ("a quick run replaces the table", TUNE, "(None if given.quick else tuned.FOLDER", "(None if not given else tuned.FOLDER"),
    ("what would be refused is written", TUNE, "    tuned.parse(content, path.name)\n    path", "    path"),
    ("what is cut off replaces a complete table", TUNE, "    stays = is_complete(path)", "    stays = False"),
    ("an incomplete table says that it is complete", TUNE, "tiles.complete and backends.complete", "True"),
]  # fmt: skip
