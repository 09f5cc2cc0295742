"""Ways to break the native kernels that the tests must notice; ``tests/mutants.py`` runs them."""

# ruff: noqa: E501

from __future__ import annotations

SELECT, AGGREGATE, INJECT = "tests/test_op_select.py", "tests/test_op_aggregate.py", "tests/test_op_inject.py"
SELECT_AGGREGATE, EMULATED = "tests/test_op_select_aggregate.py", "tests/test_cuda_emulated.py"

NATIVE_MUTANTS = [
    # name, file under csrc/, old, new, tests beside the conformance test
    ("select: ties go to the highest row", "cpu/select.cpp", "+ (row_mask - row);", "+ row;", SELECT),
    ("select: the mask is not read", "cpu/select.cpp", "if (!call.allowed[", "if (false && !call.allowed[", SELECT),
    ("select: keys are not normalised", "cpu/select.cpp", "found[i] / norm);", "found[i]);", SELECT),
    ("select: no guard of the weights", "cpu/select.cpp", "total < sum_floor", "total < 0", SELECT),
    ("select: only the first tile", "cpu/select.cpp", "tile < tiles; tile += pieces", "tile < 1; tile += pieces", SELECT),
    ("select: the bar is stale", "cpu/select.cpp", "if (packed == lowest) return -", "if (packed == 1) return -", SELECT),
    ("select: sign of dkeys", "cpu/select.cpp", "(pull[d] - key[d] * along", "(pull[d] + key[d] * along", SELECT),
    ("aggregate: reads its own task", "cpu/aggregate.cpp", "t < task; ++t) by_task[t] += w", "t <= task; ++t) by_task[t] += w", AGGREGATE),
    ("aggregate: mean lost", "cpu/aggregate.cpp", "by_task[task] * call.row_mean[n]", "by_task[task]", AGGREGATE),
    ("aggregate: grad of unread rows", "cpu/aggregate.cpp", "t < task; ++t) context[", "t < T; ++t) context[", AGGREGATE),
    ("mix_factors: repeated rows lost", "cpu/mix.cpp", "strength += call", "strength = call", AGGREGATE),
    ("mix_factors: every strip goes to the first", "cpu/mix.cpp", "convert<V>(total, out + row * size + first, width)", "convert<V>(total, out + row * size, width)", AGGREGATE),
    ("mix_factors: products of eight samples of twelve", "cpu/mix.cpp", "dots<V, 1, false, 3>", "dots<V, 1, false, 2>", AGGREGATE),
    ("mix_factors: padding spreads", "cpu/mix.cpp", "if (term.strength == 0) continue;", "", AGGREGATE),
    ("mix_factors: products of the first row", "cpu/mix.cpp", "+ sums.before[row]", "", AGGREGATE),
    ("mix_factors: products of a row's first sample", "cpu/mix.cpp", "+ place[pair]]", "]", AGGREGATE),
    ("select: norms of the query", "cpu/rows.h", "sums[queries][j] += k * k", "sums[queries][j] += q[0] * k", SELECT),
    ("mix_factors: last columns lost", "cpu/mix.cpp", "convert<V>(total, out + row * size + first, width);", "convert<V>(total, out + row * size + first, width - width % V::lanes);", AGGREGATE),
    ("mix_factors: a strip is copied once and for all", "cpu/mix.cpp", "if (number != copied)", "if (copied < 0)", AGGREGATE),
    ("mix_factors: products of the first strip", "cpu/mix.cpp", "piece < strips; ++piece)\n      for", "piece < strips; piece += strips_A)\n      for", AGGREGATE),
    ("inject: scale lost", "cpu/inject.cpp", "call.coefficient[pair] * call.scale;", "call.coefficient[pair];", INJECT),
    ("inject: rank is not read", "cpu/inject.cpp", "B + r * call.B_stride_r", "B", INJECT),
    ("inject: columns beyond the groups of four are lost", "cpu/inject.cpp", "j < here; ++j) add<V, 1>", "j < 0; ++j) add<V, 1>", INJECT),
    ("inject: tokens of the first sample", "cpu/inject.cpp", "if (converted != b)", "if (converted < 0)", INJECT),
    ("rows: the tail of a dot is dropped", "cpu/rows.h", "if (d < width) add_at", "if (false) add_at", SELECT),
    ("rows: the tail is dropped", "cpu/rows.h", "total[i] += strength[j] * static_cast<float>(row[j][i]);", ";", INJECT),
    ("select: ties go to the highest row", "cuda/select.cu", "(0xffffffffu - unsigned(row));", "unsigned(row);", SELECT),
    ("select: the mask is not read", "cuda/select.cu", "may ? score[q][column] : -INFINITY", "score[q][column]", SELECT),
    ("select: disallowed rows share", "cuda/select.cu", "exists && value[i] != -INFINITY ?", "exists ?", SELECT),
    ("select: later slices are lost", "cuda/select.cu", "first < count; first += MERGE_WARPS * WARP", "first < 1; first += MERGE_WARPS * WARP", SELECT),
    ("select: sign of dkeys", "cuda/select_backward.cu", "__fmaf_rn(-over_norm(", "__fmaf_rn(over_norm(", SELECT),
    ("select: grad of the batch is a sum", "cuda/select_backward.cu", "__fdiv_rn(warp_sum(total), float(p.B))", "warp_sum(total)", SELECT),
    ("select_aggregate: one task for all", "cuda/select.cu", "chosen.task[m], task, p.context", "chosen.task[0], task, p.context", SELECT_AGGREGATE),
    ("select_aggregate: only the first copy", "cuda/select.cu", "p.M + n] = coefficient;", "p.M + n] = copy == sample ? coefficient : 0.0f;", SELECT_AGGREGATE),
    ("select_aggregate: one row a thread", "cuda/select.cu", "n < p.N; n += WARPS * WARP", "n < WARPS * WARP; n += WARPS * WARP", SELECT_AGGREGATE),
    ("aggregate: reads its own task", "cuda/aggregate.cuh", "if (task < from_task)", "if (task <= from_task)", AGGREGATE),
    ("aggregate: mean lost", "cuda/aggregate.cuh", "read ? total * *row_mean", "read ? total", AGGREGATE),
    ("aggregate: own gradient lost", "cuda/aggregate.cu", "grad[pair % p.M] + total", "total", AGGREGATE),
    ("mix_factors: strength lost", "cuda/mix_factors.cu", "if (index[i] == n) total += coefficient[i]", "if (index[i] == n) total += 1", AGGREGATE),
    ("mix_factors: only the first tile", "cuda/mix_factors.cu", "tile < tiles; tile++", "tile < 1; tile++", AGGREGATE),
    ("inject: scale lost", "cuda/inject_add.cu", "k < K ? p.coefficient[pair] * p.scale", "k < K ? p.coefficient[pair]", INJECT),
    ("inject: only the first split", "cuda/inject_add.cu", "split < splits.count; split++", "split < 1; split++", INJECT),
    ("inject: rank is not read", "cuda/inject_add.cu", "row[place] = factor_row<F>(p.B, p.index[pair], k % R,", "row[place] = factor_row<F>(p.B, p.index[pair], 0,", INJECT),
    ("inject: one token: only the first rows", "cuda/inject_add.cu", "group < groups; group++", "group < 1; group++", EMULATED),
    ("inject: one token: the count stays", "cuda/inject_add.cu", "if (threadIdx.x == 0) p.arrived[sample] = 0;", "", EMULATED),
    ("inject: one token: weights do not move with their rows", "cuda/inject_add.cu", "weight[place] = own;", "", EMULATED),
    ("inject: one token: nobody waits for the rows", "cuda/inject_add.cu", "  __syncthreads();\n  T* y =", "  T* y =", EMULATED),
]  # fmt: skip
