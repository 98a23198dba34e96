"""Attention's backward kernels, executed on the CPU, against the formulas in float64; mutants."""

import dataclasses

import cuda_on_cpu
import numpy as np
import pytest
import references as ref
import test_kernels_on_cpu as on_cpu
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels_on_cpu import DTYPES, TYPES, Case

import kernels_cuda
import phi3_ref

NAMES = "query_gradient", "key_value_gradients"


# The gradient's layout, another one than the query's.
LAYOUTS = {"dense": "cache", "fused": "dense", "cache": "dense", "unaligned": "unaligned"}


def arguments(case):
    """Returns the gradient of the result, and attention's arguments."""
    query, key, value, mask, window = case.inputs()
    gradient, *_ = dataclasses.replace(
        case, layout=LAYOUTS[case.layout], size=1.0, seed=case.seed + 100).inputs()
    return gradient, query, key, value, mask, window


def expected(inputs):
    """Returns the exact gradients, and of each how large what is added up in it may be.

    s'_t = p_t (p'_t - sum p p') is zero where all p' are alike, a query's gradient where it sees
    one key: what is left is rounding, which is measured by the terms and not by their sum.
    """
    gradient, query, key, value = (array.astype("float64") for array in inputs[:4])
    tape = phi3_ref.Tape()
    phi3_ref.textbook_attention(query, key, value, *inputs[4:], tap=tape)
    (B, T, K, C), H = key.shape, query.shape[2]
    g, q = (x.transpose(0, 2, 1, 3) for x in (gradient, query))  # [B, H, S, C]
    k, v = (x.repeat(H // K, 2).transpose(0, 2, 1, 3) for x in (key, value))  # [B, H, T, C]

    def products(p, d_s, g, q, k, scale):
        """Returns what p and s' give of the three; keys and values sum over their heads."""
        of_query = (d_s @ k * scale).transpose(0, 2, 1, 3)
        return of_query, *(x.transpose(0, 2, 1, 3).reshape(B, T, K, H // K, C).sum(3) for x in (
            d_s.swapaxes(2, 3) @ q * scale, p.swapaxes(2, 3) @ g))

    p, d_p = tape["probabilities"], g @ v.swapaxes(2, 3)
    exact = products(p, p * (d_p - (p * d_p).sum(-1, keepdims=True)), g, q, k, C**-0.5)
    # Roundings of terms add up as the root of the sum of their squares.
    terms = p * (abs(d_p) + (p * abs(d_p)).sum(-1, keepdims=True))
    sizes = products(p**2, terms**2, g**2, q**2, k**2, 1 / C)
    # exp() turns an absolute error of a score, here relative to the largest, into a relative one.
    worse = max(1.0, abs(tape["scores"]).max() / 8)
    return exact, [worse * size.max()**0.5 for size in sizes]


def kept(inputs):
    """Returns what the forward may hand on, by the formulas: context and log-sum-exp."""
    query, key, value = (array.astype("float64") for array in inputs[1:4])
    context = phi3_ref.textbook_attention(query, key, value, *inputs[4:])
    log_sum_exp, _ = on_cpu.expected_log_sum_exp(inputs[1:])
    return {"context": context.astype(inputs[1].dtype), "log_sum_exp": log_sum_exp.astype("f4")}


def run(inputs, kept=None, **options):
    """Returns the three gradients and the kernels' names; the forward's among them, if need be."""
    with cuda_on_cpu.emulate(**options) as launches:
        results = kernels_cuda.attention_backward(*inputs, **kept or {})
    return results, [name for name, *_ in launches]


def check(case, **options):
    """Compares one case with the formulas; returns the names of the backward's kernels.

    The case that asks for the forward's log-sum-exp hands it on; else it must be found again.
    """
    inputs = arguments(case)
    before = [array.tobytes() for array in inputs[:4]]
    results, names = run(inputs, kept(inputs) if case.asks else None, **options)
    assert all("gradient" in name for name in names) == case.asks
    names = [name for name in names if "gradient" in name]
    for what, like, result, exact, size in zip(
            ("query", "key", "value"), inputs[1:4], results, *expected(inputs), strict=True):
        assert result.dtype == like.dtype and result.shape == like.shape
        assert result.flags.c_contiguous and np.isfinite(result.astype("float32")).all()
        error = abs(result.astype("float64") - exact).max()
        assert error <= ref.TOLERANCE[case.dtype] * size, f"{names}, {what}: {error} of {size}"
    blind = ~visible(case, inputs).any(-1)  # [B, S]
    assert not results[0][blind].astype("float32").any(), "a query that sees no key"
    unseen = ~visible(case, inputs).any(-2)  # [B, T]
    assert not any(x[unseen].astype("float32").any() for x in results[1:]), "a key nobody sees"
    assert before == [array.tobytes() for array in inputs[:4]]
    return names


def visible(case, inputs):
    """Returns which of the T keys each of the S queries sees, [B, S, T]."""
    distance = np.arange(case.T - case.S, case.T)[:, None] - np.arange(case.T)
    seen = (distance >= 0) & (distance < (case.window or case.T))
    return seen & (np.ones((case.B, 1, 1), bool) if inputs[4] is None
                   else inputs[4].astype(bool)[:, None])



@st.composite
def cases(draw, dtype, head_dims, layouts):
    """As `on_cpu.cases`, and fewer queries than a tile."""
    case = draw(on_cpu.cases(dtype, head_dims, few_queries=draw(st.integers(0, 4)) == 0,
                             layouts=layouts))
    if case.T > 200:  # for the keys of a decoding step; here every key costs
        case.T = 200
    return case


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiled(dtype):
    """The simple kernels: float32, head_dims that are no whole vectors, rows from anywhere on."""
    @settings(max_examples=ref.examples(25))
    @given(cases(dtype, [1, 2, 3, 7, 31, 33, 63, 65, 97, 127, 129, 130],
                 ("dense", "fused", "cache", "unaligned")))
    def all_equal(case):
        if case.C < 3:
            case.size = min(case.size, 1.0)
        assert check(case) == [f"{name}_tiled<{TYPES[dtype]}>" for name in NAMES]

    all_equal()
    for C in (64, 96, 128, 257):
        case = Case(dtype, 1, 70, 131, 1, 2, C, "random", 100, "unaligned", seed=C)
        assert check(case) == [f"{name}_tiled<{TYPES[dtype]}>" for name in NAMES]


@pytest.mark.parametrize("padded", kernels_cuda.BACKWARD_COLUMNS)
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_tensor_cores(dtype, padded):
    """Every instance of the tensor cores' kernels, with head_dims up to the one it is padded to."""
    smaller = max((C for C in kernels_cuda.BACKWARD_COLUMNS if padded > C), default=0)
    wanted = [f"{name}_tensor_cores<{TYPES[dtype]}, {padded}>" for name in NAMES]

    @settings(max_examples=ref.examples(9))
    @given(cases(dtype, [padded, padded, smaller + 8], ("dense", "fused", "cache")))
    def all_equal(case):
        assert check(case) == wanted

    all_equal()
    for C in (padded, smaller + 8):
        assert check(Case(dtype, 1, 130, 131, 1, 2, C, "left", 70)) == wanted


def test_which_kernels():
    """Tensor cores from sm_80 on, for vectors of 16 bytes in 16 bits."""
    tiled = [f"{name}_tiled<__half>" for name in NAMES]
    case = Case("float16", 1, 40, 70, 1, 2, 96)
    assert check(case, capability=75) == tiled
    inputs = arguments(case)
    wide = np.zeros((1, 40, 2, 97), "float16")
    wide[..., 1:] = inputs[0]  # the gradient alone begins anywhere
    (right, *_), names = run(inputs, kept(inputs))
    (shifted, *_), tiled_names = run((wide[..., 1:], *inputs[1:]), kept(inputs))
    assert tiled_names == tiled != names and ref.relative_error(shifted, right) < 3e-3
    wide[..., 1:] = kept(inputs)["context"]  # and so the context, which is then no whole array
    (shifted, *_), names = run(inputs, {**kept(inputs), "context": wide[..., 1:]})
    assert names != tiled and shifted.tobytes() == right.tobytes()
    assert check(Case("float16", 1, 9, 9, 1, 1, 136)) == tiled


def test_bytes_are_as_counted():
    """By hand, 128 queries and keys of one head, C = 64 in 16 bits, 128 bytes a row.

    The queries' blocks read their 64 rows of two arrays into tiles; of contexts and gradients once
    more for delta, with a log-sum-exp to each of a row's 4 lanes; and 64 keys and values, or all
    128. They write the gradient and 2 numbers a query. The keys' blocks read their rows of two
    arrays, of queries and gradients all 128 or the last 64, with 2 numbers a query; they write two
    gradients.
    """
    traffic, inputs = [], arguments(Case("float16", 1, 128, 128, 1, 1, 64))
    run(inputs, kept(inputs), traffic=traffic)
    assert [asked for asked, _ in traffic] == [
        128 * (4 * 128 + 4 * 4) + (64 + 128) * 2 * 128 + 128 * (128 + 8),
        128 * 2 * 128 + (128 + 64) * (2 * 128 + 8) + 128 * 2 * 128]
    # Read 128 neighbouring bytes at a time; arrays here begin at any 16.
    assert all(segments <= 1.25 * asked for asked, segments in traffic)


def test_the_forward_is_not_repeated():
    """What it has returned and filled gives the bits of a call without; half of it does not do."""
    inputs = arguments(Case("bfloat16", 2, 70, 131, 1, 2, 64, "left", 40))
    found = cuda_on_cpu.empty((2, 2, 70), "float32")
    with cuda_on_cpu.emulate():
        context = kernels_cuda.attention(*inputs[1:], found)
    given, names = run(inputs, {"context": context, "log_sum_exp": found})
    assert len(names) == 2
    for some in ({}, {"context": context * 2}, {"log_sum_exp": found * 2}):
        again, names = run(inputs, some)
        assert len(names) == 3
        assert [x.tobytes() for x in again] == [x.tobytes() for x in given]


@pytest.mark.parametrize("case", [
    Case("float32", 2, 70, 131, 2, 2, 40, "random", 100), Case("float16", 2, 130, 131, 2, 2, 96),
    Case("bfloat16", 2, 70, 131, 1, 2, 64, "left", 40)])
def test_same_bits_in_any_order(case):
    """Blocks and threads from last to first give the same bits."""
    inputs = arguments(case)
    one, other = ([x.tobytes() for x in run(inputs, reverse=order)[0]] for order in (False, True))
    assert one == other


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_to_do(dtype):
    """Without queries the keys' gradients are zeros; without keys, or sequences, there are none."""
    for B, S, T, C in ((0, 3, 4, 8), (1, 0, 0, 8), (1, 2, 4, 0)):
        results, names = run(arguments(Case(dtype, B, S, T, 2, 2, C)))
        assert [x.shape for x in results] == [(B, S, 4, C), (B, T, 2, C), (B, T, 2, C)]
        assert not names
    (_, *results), names = run(arguments(Case(dtype, 1, 0, 70, 2, 2, 8)))
    assert len(names) == 1 and not any(x.astype("float32").any() for x in results)


def test_what_all_keys_share_is_not_in_the_scores_gradient():
    """Values that are nearly alike: s' is a small difference, for which p must add up to one."""
    for dtype, C in (("float32", 16), ("float16", 16), ("bfloat16", 16)):
        gradient, query, key, value, *_ = arguments(Case(dtype, 1, 64, 64, 1, 1, C))
        value[:] = value[:, :1]
        (d_query, d_key, _), _ = run((gradient, query, key, value))
        noise = 64 * np.finfo("float32").eps  # of p' and delta, which are of size 10, in float32
        assert max(abs(x.astype("float32")).max() for x in (d_query, d_key)) < noise


def check_what_all_values_share(dtype, C, run):
    """A part that all values have in common is in no gradient of query and key.

    So the mean error of these may not grow with it, though delta, and its rounding, do: where all
    keys have a part in common, too, a wrong delta is wrong by that much in the query's gradient.
    """
    errors = []
    for times in (0, 10):  # the spread of the values
        rng = np.random.default_rng(0)
        arrays = rng.normal(size=(4, 1, 128, 2, C))  # gradient, query, key, value
        arrays[2] += 3 * rng.normal(size=C)
        arrays[3] += times * rng.normal(size=C)
        inputs = *arrays.astype(ref.NUMPY_DTYPE[dtype]), None, None
        errors.append([abs(x - exact).mean() for x, exact in zip(
            run(inputs, kept(inputs))[:2], expected(inputs)[0][:2], strict=True)])
    for without, beside in zip(*errors, strict=True):
        assert beside <= 1.5 * without, f"{beside} instead of {without}"


@pytest.mark.parametrize("dtype, C", [("bfloat16", 64), ("float16", 64), ("bfloat16", 60)])
def test_what_all_values_share(dtype, C):
    """On the tensor cores, and not on them."""
    check_what_all_values_share(dtype, C, lambda *inputs: run(*inputs)[0])


def test_what_is_of_another_kind_is_refused():
    """By its name, with what was expected and found; the other arguments as in the forward."""
    gradient, query, key, value, *_ = arguments(Case("float16", 1, 3, 5, 2, 2, 8))
    for wrong, error, words in (
            (gradient.astype("float32"), ValueError, "gradient.*float16.*float32"),
            (gradient[:, :2], ValueError, r"gradient.*1, 3, 4, 8.*\(1, 2, 4, 8\)"),
            (gradient.tolist(), TypeError, "gradient.*ndarray.*list"),
            (gradient.repeat(2, -1)[..., ::2], ValueError, "gradient.*contiguous")):
        with cuda_on_cpu.emulate() as launches, pytest.raises(error, match=words):
            kernels_cuda.attention_backward(wrong, query, key, value)
        assert not launches
    right = kept((gradient, query, key, value, None, None))
    for name, wrong, error, words in (
            ("context", right["context"].astype("float32"), ValueError, "float16.*float32"),
            ("context", right["context"][:, :2], ValueError, r"1, 3, 4, 8.*\(1, 2, 4, 8\)"),
            ("log_sum_exp", right["log_sum_exp"].astype("float16"), ValueError, "float32.*float16"),
            ("log_sum_exp", right["log_sum_exp"].swapaxes(1, 2), ValueError, "1, 4, 3.*1, 3, 4"),
            ("log_sum_exp", [0.0], TypeError, "ndarray.*list")):
        with cuda_on_cpu.emulate() as launches, pytest.raises(error, match=f"{name}.*{words}"):
            kernels_cuda.attention_backward(gradient, query, key, value, **{**right, name: wrong})
        assert not launches
    with cuda_on_cpu.emulate(), pytest.raises(ValueError, match=r"value.*\(1, 4, 2, 8\)"):
        kernels_cuda.attention_backward(gradient, query, key, value[:, :4])


# Mutants: what the checks above would find --------------------------------------------------------

# Cases that between them reach every line of each kernel.
MUTANT_CASES = {
    "ATTENTION_BACKWARD_TILED": [
        Case("float32", 2, 70, 131, 2, 2, 40, "random", 66, size=3.0),
        Case("float32", 1, 70, 131, 1, 2, 130, layout="fused", size=3.0)],
    "ATTENTION_BACKWARD_TENSOR_CORES": [
        Case("float16", 2, 70, 200, 2, 2, 64, "random", 66, size=3.0),
        Case("float16", 1, 130, 200, 2, 2, 88, layout="fused", size=3.0),
        Case("float16", 1, 70, 200, 1, 1, 64, window=60)]}


def is_caught(source_name, edit):
    """Says how the checks refuse a kernel's edited source, or None where they do not."""
    source = getattr(kernels_cuda, source_name)
    changed = edit(source)
    assert changed != source, "the mutation changes nothing: has the kernel been rewritten?"
    try:
        options = {"edit": lambda text: changed if text == source else text}
        for case in MUTANT_CASES[source_name]:
            check(case, **options)
        check_what_all_values_share("bfloat16", 60 if source_name.endswith("TILED") else 64,
                                    lambda *inputs: run(*inputs, **options)[0])
    except (cuda_on_cpu.KernelError, AssertionError) as error:
        assert "error:" not in str(error), error  # it must compile
        return str(error)
    return None


@pytest.mark.parametrize("source_name, statement, number", [
    (name, statement, number) for name in MUTANT_CASES for statement in on_cpu.ORDERING
    for number in range(getattr(kernels_cuda, name).replace(
        kernels_cuda.PRIMITIVES, "").count(statement))])
def test_every_barrier_is_needed_and_watched(source_name, statement, number):
    """Any barrier, wait or commit that is left out is noticed."""
    def drop(source):
        head, tail = source.split(kernels_cuda.PRIMITIVES)
        parts = tail.split(statement)
        return (head + kernels_cuda.PRIMITIVES + statement.join(parts[:number + 1]) + ";"
                + statement.join(parts[number + 1:]))

    assert is_caught(source_name, drop)


SEEN = "\n" + 16 * " " + "const bool seen = distance >= 0 && distance < window && t < T\n"
SEEN_BY = SEEN.replace("\n ", "\n     ")  # in the second kernel
MUTANTS = {
    "ATTENTION_BACKWARD_TILED": {
        "the mask lets the next key in": (SEEN, SEEN.replace(">= 0", ">= -1")),
        "the mask hides the key itself": (SEEN, SEEN.replace(">= 0", "> 0")),
        "the window is one too long": (SEEN, SEEN.replace("< window", "<= window")),
        "for a key, the mask lets the query before in": (
            SEEN_BY, SEEN_BY.replace(">= 0", ">= -1")),
        "for a key, the mask hides its own query": (SEEN_BY, SEEN_BY.replace(">= 0", "> 0")),
        "for a key, the window is one too long": (
            SEEN_BY, SEEN_BY.replace("< window", "<= window")),
        "the padding mask is ignored": ("&& (!has_mask || mask[t])", ""),
        "the padding mask of sequence 0": ("mask += b * T", "mask += 0 * b"),
        "the log-sum-exp to another base": ("log_sum_exp[row] / LN_2", "log_sum_exp[row]"),
        "the log-sum-exp of another head": ("log_sum_exp += (b * H + h)",
                                            "log_sum_exp += (b * H + k)"),
        "the log-sum-exp past the last": ("if (q0 + row < S)", "if (q0 + row <= S)"),
        "the context of another head": ("context += ((b * S + q0) * H + h)",
                                        "context += ((b * S + q0) * H + k)"),
        "delta of half the columns": ("c < C; c += 16", "c < C; c += 32"),
        "delta's lanes are not added": ("sum_over_lanes<1, 16>(delta",
                                        "sum_over_lanes<1, 8>(delta"),
        "the error's lanes are not added": ("sum_over_lanes<1, 16>(error",
                                            "sum_over_lanes<1, 8>(error"),
        "a query's gradient without delta": ("(d_s[i][j] - delta[i])", "d_s[i][j]"),
        "a query's gradient keeps the error": ("sum[i][j] -= error[i] * mean[i][j]", ""),
        "delta keeps the error": ("delta[i] + error[i]", "delta[i]"),
        "a key's gradient without delta": ("(d_s[i][j] - delta[q])", "d_s[i][j]"),
        "delta of another query": ("delta[q]", "delta[q ^ 1]"),
        "one head of the group": ("h < k * G + G; h++", "h < k * G + 1; h++"),
        "a head of another group": ("h = k * G; h < k * G + G; h++", "h = k; h < H; h += K"),
        "another head of keys": ("k = h / (H / K)", "k = h % K"),
        "the last queries left out": ("q0 < end; q0 += TILE", "q0 + TILE <= end; q0 += TILE"),
        "the end of the window left out": ("t0 + TILE - 1 + window", "t0 + window - 1"),
        "a tile before the first query": ("(t0 - offset) / TILE * TILE : 0",
                                          "(t0 - offset) / TILE * TILE + TILE : 0"),
        "weights transposed": ("shared.weights[4 * ty + i][tx + 16 * j] =",
                               "shared.weights[tx + 16 * j][4 * ty + i] ="),
        "values in the query's gradient": ("add_weighted_rows(sum, d_s, keys",
                                           "add_weighted_rows(sum, d_s, values"),
        "values in the mean key": ("add_weighted_rows(mean, p, keys",
                                   "add_weighted_rows(mean, p, values"),
        "p and s' exchanged": ("add_weighted_rows(d_v, p,", "add_weighted_rows(d_v, d_s,"),
        "the scale forgotten": ("T - t0, d_k, scale * LN_2", "T - t0, d_k, 1.0f"),
        "the query's scale forgotten": ("S - q0, sum, scale * LN_2", "S - q0, sum, 1.0f"),
        "the second half of columns": ("j / 4 * 64;", "j / 4 * 32;"),
        "columns past the last": ("row < count && c < C)", "row < count && c < C + 1)"),
        "rows past the last": ("row < count && c < C)", "row < count + 1 && c < C)"),
        "the stride of the query for the gradient": ("q0 * gradient_s,\n", "q0 * query_s,\n")},
    "ATTENTION_BACKWARD_TENSOR_CORES": {
        "the mask lets the next key in": ("distance < 0 || distance >= window || !(",
                                          "distance < -1 || distance >= window || !("),
        "the mask hides the key itself": ("distance < 0 || distance >= window || !(",
                                          "distance <= 0 || distance >= window || !("),
        "the window is one too long": ("distance >= window || !(", "distance > window || !("),
        "the padding mask is ignored": ("position < T && mask[position])", "position < T)"),
        "the diagonal is not masked": ("t0 + KEYS - 1 > lowest", "t0 > lowest"),
        "the window is not masked": ("t0 <= highest - window", "t0 < highest - window - KEYS"),
        "for a key, the mask lets the query before in": (
            "distance < 0 || distance >= window || !seen",
            "distance < -1 || distance >= window || !seen"),
        "for a key, the mask hides its own query": (
            "distance < 0 || distance >= window || !seen",
            "distance <= 0 || distance >= window || !seen"),
        "for a key, the window is one too long": ("distance >= window || !seen",
                                                  "distance > window || !seen"),
        "for a key, the padding mask is ignored": ("position < T && (!has_mask || mask[position])",
                                                   "position < T"),
        "for a key, the mask past its end": ("position < T && (!has_mask || mask[position])",
                                             "(!has_mask || mask[position])"),
        "for a key, the diagonal is not masked": ("from < lowest + 15", "from + 63 < lowest"),
        "for a key, the window is not masked": ("from + QUERIES - 1 >= lowest + window",
                                                "from >= lowest + window + 15"),
        "the padding mask of sequence 0": ("mask += b * T", "mask += 0 * b"),
        "the log-sum-exp to another base": ("log_sum_exp[row] / LN_2", "log_sum_exp[row]"),
        "the log-sum-exp of another head": ("log_sum_exp += (b * H + h)",
                                            "log_sum_exp += (b * H + k)"),
        "the log-sum-exp past the last": ("if (q0 + row < S)", "if (q0 + row <= S)"),
        "the context past its columns": ("c < C; c += 32", "c < C_PADDED; c += 32"),
        "delta of half the columns": ("c < C; c += 32", "c < C; c += 64"),
        "delta's lanes are not added": ("sum_over_lanes<1, 4>(delta", "sum_over_lanes<1, 2>(delta"),
        "the error's lanes are not added": ("sum_over_lanes<1, 4>(error",
                                            "sum_over_lanes<1, 2>(error"),
        "a query's gradient without delta": ("(d_p[0][n][e] - delta[e / 2])", "d_p[0][n][e]"),
        "a query's gradient keeps the error": (" - error[r] * sums[1][n][e]", ""),
        "delta keeps the error": ("delta[r] + error[r]", "delta[r]"),
        "a key's gradient without delta": ("(d_s[0][n][e] - delta[8 * n + 2 * t + e % 2])",
                                           "d_s[0][n][e]"),
        "delta of another query": ("delta[8 * n + 2 * t + e % 2]", "delta[8 * n + 2 * t + e / 2]"),
        "one head of the group": ("i < tiles * G; i++", "i < tiles; i++"),
        "another head of keys": ("k = h / (H / K)", "k = h % K"),
        "the statistics of the first head": ("(2LL * head + which)", "(0LL * head + which)"),
        "the statistics of the first sequence": ("statistics += (b * H + k * G)",
                                                 "statistics += (0 * H + k * G)"),
        "one buffer only": ("buffer ^= 1", "buffer ^= 0"),
        "a tile too few": ("t0 < end; t0 += KEYS", "t0 + KEYS < end; t0 += KEYS"),
        "a warp skips keys it needs": ("t0 + KEYS <= lowest - window + 1",
                                       "t0 + KEYS <= lowest - window + 33"),
        "the other buffer": ("numbers + i % 2 * 2 * QUERIES",
                             "numbers + (i + 1) % 2 * 2 * QUERIES"),
        "the operand is not transposed": ("ldmatrix_x4_trans(x, other", "ldmatrix_x4(x, other"),
        "the operand is transposed": ("ldmatrix_x4(x, other", "ldmatrix_x4_trans(x, other"),
        "p and s' exchanged": ("QUERIES>(d_v, p,", "QUERIES>(d_v, d_s,"),
        "queries and gradients exchanged": ("(d_k, d_s, queries)", "(d_k, d_s, gradients)"),
        "a warp skips a tile it needs": ("from + QUERIES <= lowest ||",
                                         "from + QUERIES <= lowest + 16 ||"),
        "a warp skips the end of its window": ("from >= lowest + 15 + window",
                                               "from >= lowest + window"),
        "the end of the window left out": ("t0 + KEYS - 1 + window", "t0 + window - 1"),
        "the scale forgotten": ("C, d_k[0], scale * LN_2", "C, d_k[0], 1.0f"),
        "the query's scale forgotten": ("C, d_q, scale * LN_2", "C, d_q, 1.0f"),
        "the stride of keys for values": ("values, value, value_t", "values, value, key_t + 8"),
        "rows past the last": ("row < count && c < C", "row <= count && c < C")}}


@pytest.mark.parametrize("source_name, mutant", [
    (name, mutant) for name, mutants in MUTANTS.items() for mutant in mutants])
def test_mutants_are_caught(source_name, mutant):
    """A kernel with one mistake fails: by its result, or by what it does to memory."""
    old, new = MUTANTS[source_name][mutant]
    assert is_caught(source_name, lambda source: source.replace(old, new))
