"""The CUDA kernels, executed on the CPU, against the formulas in float64; and mutants of them."""

import dataclasses

import cuda_on_cpu
import ml_dtypes
import numpy as np
import pytest
import references as ref
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels_cuda
import phi3_ref

DTYPES = ["float32", "float16", "bfloat16"]
TYPES = kernels_cuda.TYPES
# Sizes around the edges of everything that is tiled: vectors, warps, mma, tiles of queries, keys.
EDGES = [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 66, 95, 96, 97, 127, 128, 129, 130, 191]


@dataclasses.dataclass
class Case:
    """One call of attention, as Hypothesis draws and prints it."""

    dtype: str
    B: int
    S: int
    T: int
    K: int
    G: int
    C: int
    mask: str = "none"
    window: int | None = None
    layout: str = "dense"
    size: float = 1.0  # of the scores: large ones make one key win, and the running peak rise
    seed: int = 0
    asks: bool = True  # for the log-sum-exp of each query's scores

    def inputs(self):
        rng = np.random.default_rng(self.seed)
        dtype = ref.NUMPY_DTYPE[self.dtype]
        B, S, T, K, C = self.B, self.S, self.T, self.K, self.C
        H = K * self.G

        def normal(*shape):
            return rng.normal(size=shape).astype(dtype)

        if self.layout == "fused":  # slices of the fused projection; a step past S keys of a cache
            fused = normal(B, T, (H + 2 * K) * C)
            parts = np.split(fused, [H * C, (H + K) * C], axis=-1)
            query, key, value = (part.reshape(B, T, -1, C) for part in parts)
            query = query[:, T - S:]
            assert all(np.shares_memory(part, fused) for part in (query, key, value))
        elif self.layout == "cache":  # heads before positions, room for more keys
            query = normal(B, H, S, C).transpose(0, 2, 1, 3)
            key, value = normal(2, B, K, T + 5, C)[:, :, :, :T].transpose(0, 1, 3, 2, 4)
        elif self.layout == "unaligned":  # rows that begin anywhere
            query, key, value = (normal(B, n, heads, C + 1)[..., 1:]
                                 for n, heads in ((S, H), (T, K), (T, K)))
        else:
            query, key, value = normal(B, S, H, C), normal(B, T, K, C), normal(B, T, K, C)
        query *= dtype(self.size)

        mask = None if self.mask == "none" else np.ones((B, T), bool)
        if self.mask == "left":  # the padding of prompts of different lengths
            mask = np.arange(T) >= rng.integers(0, T + 1, (B, 1))
        elif self.mask == "random":
            mask = rng.random((B, T)) < rng.choice([0.05, 0.5, 0.95])
        elif self.mask == "numbers":
            mask = (rng.random((B, T)) < 0.7).astype("int32")
        elif self.mask == "nothing":
            mask[0] = False
        return query, key, value, mask, self.window


def expected(case, inputs):
    """Returns the exact result, and what relative error the case's dtype allows."""
    query, key, value, mask, window = inputs
    wide = [array.astype("float64") for array in (query, key, value)]
    scores = []
    result = phi3_ref.textbook_attention(
        *wide, mask, window, tap=lambda name, x: (scores.append(abs(x).max()), x)[1])
    # exp() turns an absolute error of a score, here relative to the largest, into a relative one.
    return result, ref.TOLERANCE[case.dtype] * max(1.0, scores[0] / 8)


def expected_log_sum_exp(inputs):
    """Returns the exact log-sum-exp of what each query sees, 0 for nothing; and its tolerance."""
    query, key, value, mask, window = inputs
    tape, (S, T) = phi3_ref.Tape(), (query.shape[1], key.shape[1])
    phi3_ref.textbook_attention(
        *(array.astype("float64") for array in (query, key, value)), mask, window, tape)
    visible = phi3_ref.visible_keys(np.arange(T - S, T), np.arange(T), window, mask)
    scores = np.where(visible[..., None, :, :], tape["scores"], -np.inf)  # [B, H, S, T]
    exact = np.logaddexp.reduce(scores, axis=-1)
    return np.where(np.isneginf(exact), 0, exact), 1e-6 * (1 + abs(tape["scores"]).max())


def check_log_sum_exp(found, inputs):
    exact, tolerance = expected_log_sum_exp(inputs)
    assert found.shape == exact.shape
    error = abs(found - exact).max()
    assert error <= tolerance, f"log_sum_exp: {error} > {tolerance}"
    assert not found[exact == 0].any(), "the log-sum-exp of nothing"


def run(case, inputs=None, **options):
    """Returns the kernels' result, log-sum-exp, and their names."""
    with cuda_on_cpu.emulate(**options) as launches:
        found = cuda_on_cpu.empty((case.B, case.K * case.G, case.S), "float32")
        result = kernels_cuda.attention(*(inputs or case.inputs()), found if case.asks else None)
    return result, found, [name for name, *_ in launches]


def check(case, **options):
    """Compares one case with the formulas; returns the names of the kernels that ran."""
    inputs = case.inputs()
    before = [array.tobytes() for array in inputs[:3]]
    result, log_sum_exp, names = run(case, inputs, **options)
    if case.asks:
        check_log_sum_exp(log_sum_exp, inputs)
    exact, tolerance = expected(case, inputs)
    assert result.dtype == inputs[0].dtype and result.flags.c_contiguous
    error = ref.relative_error(result, exact)
    assert error <= tolerance, f"{names}: {error} > {tolerance}"
    assert not np.asarray(result, "float64")[~exact.any(-1)].any(), "a row that sees no key"
    assert before == [array.tobytes() for array in inputs[:3]]
    return names


@st.composite
def cases(draw, dtype, head_dims, few_queries=False, layouts=("dense", "fused", "cache")):
    C = draw(st.sampled_from(head_dims))
    T = draw(st.sampled_from([*EDGES, 257, 700] if few_queries else EDGES))
    S = draw(st.integers(1, min(8, T)) if few_queries else
             st.sampled_from([size for size in EDGES if 8 < size <= T] or [T]))
    K, G = draw(st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 2), (1, 3), (1, 4)]))
    windows = st.sampled_from([1, 2, 16, 31, 33, 63, 64, 65, 100, 10_000])
    return Case(dtype, draw(st.sampled_from([1, 1, 2])), S, T, K, G, C,
                draw(st.sampled_from(["none", "none", "left", "random", "numbers", "nothing"])),
                draw(st.none() | windows), draw(st.sampled_from(layouts)),
                draw(st.sampled_from([0.1, 1.0, 6.0])), draw(st.integers(0, 99)),
                draw(st.booleans()))


# Attention ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("padded, M", kernels_cuda.TENSOR_CORE_TILES)
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_tensor_cores(dtype, padded, M):
    """Every instance of the tensor cores' kernel, with head_dims up to the one it is padded to."""
    smaller = max((C for C, _ in kernels_cuda.TENSOR_CORE_TILES if padded > C), default=0)
    dims = [padded, padded, smaller + 8]

    @settings(max_examples=ref.examples(4))
    @given(cases(dtype, dims))
    def all_equal(case):
        names = check(case, multiprocessors=1 if M == 2 else 999)
        if case.S > 8:
            wanted = f"<{TYPES[dtype]}, {padded}, "
            assert all(name.startswith("attention_tensor_cores" + wanted) for name in names), names
            seen.update(names)

    seen = set()
    all_equal()
    check(Case(dtype, 1, 130, 131, 1, 2, dims[-1], "left", 70), multiprocessors=1)
    *_, names = run(Case(dtype, 1, 70, 70, 2, 2, padded), multiprocessors=1 if M == 2 else 999)
    assert f"attention_tensor_cores<{TYPES[dtype]}, {padded}, {M}>" in {*names, *seen}


@pytest.mark.parametrize("columns, rows", kernels_cuda.DECODE_BLOCKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode(dtype, columns, rows):
    """Every instance of the decode kernel: few queries, keys split over blocks."""
    smaller = max((c for c, _ in kernels_cuda.DECODE_BLOCKS if c < columns), default=0)
    step = 16 // ref.NUMPY_DTYPE[dtype](0).itemsize
    seen = set()

    @settings(max_examples=ref.examples(5))
    @given(cases(dtype, [columns, smaller + step, columns - step], few_queries=True),
           st.sampled_from([1, 3, 20]))
    def all_equal(case, multiprocessors):
        names = check(case, multiprocessors=multiprocessors)
        assert names[0].startswith(f"attention_decode<{TYPES[dtype]}, {columns}, "), names
        assert names[1:] == [f"attention_combine<{TYPES[dtype]}>"]
        seen.add(names[0])

    all_equal()
    S, G = {1: (1, 1), 4: (2, 2), 8: (5, 2)}[rows]
    for window in (None, 50):
        case = Case(dtype, 1, S, 300, 2, G, columns, "left", window)
        seen.update(check(case, multiprocessors=2))
    assert f"attention_decode<{TYPES[dtype]}, {columns}, {rows}>" in seen


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiled(dtype):
    """The simple kernel: float32, head_dims that are no whole vectors, rows that begin anywhere."""
    @settings(max_examples=ref.examples(25))
    @given(cases(dtype, [1, 2, 3, 7, 31, 33, 63, 65, 97, 127, 129, 130, 257], layouts=(
        "dense", "fused", "cache", "unaligned")))
    def all_equal(case):
        if case.C < 3:
            case.size = min(case.size, 1.0)
        assert check(case) == [f"attention_tiled<{TYPES[dtype]}>"]

    all_equal()
    for C in (64, 96, 128):
        case = Case(dtype, 1, 70, 131, 1, 2, C, "random", 100, "unaligned", seed=C)
        assert check(case) == [f"attention_tiled<{TYPES[dtype]}>"]


def test_one_output_column_per_block():
    """More columns than a block of the simple kernel takes, to the last one."""
    for C in (128, 256, 300):
        check(Case("float32", 1, 20, 20, 1, 1, C, layout="unaligned"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_older_gpus(dtype):
    """Below sm_80 no kernel is chosen that uses its instructions."""
    for S in (1, 40):
        names = check(Case(dtype, 1, S, 70, 1, 2, 96), capability=75)
        assert not any("tensor_cores" in name for name in names)


@pytest.mark.parametrize("case", [
    Case("float32", 2, 70, 131, 2, 2, 96, "random", 100), Case("float16", 2, 130, 131, 2, 2, 96),
    Case("bfloat16", 2, 70, 131, 1, 2, 160, "left", 40), Case("float16", 2, 3, 300, 2, 3, 96)])
def test_same_bits_in_any_order(case):
    """Blocks and threads from last to first give the same bits; so does asking for less."""
    one, log_sum_exp, _ = run(case)
    other, same, _ = run(case, reverse=True)
    assert one.tobytes() == other.tobytes() and log_sum_exp.tobytes() == same.tobytes()
    other, *_ = run(dataclasses.replace(case, asks=False))
    assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("shape", [(0, 3, 4, 2, 2, 8), (1, 0, 4, 2, 2, 8)])
def test_nothing_to_do(shape):
    B, S, T, K, G, C = shape
    result, _, names = run(Case("float32", B, S, T, K, G, C))
    assert result.shape == (B, S, K * G, C) and not names


# RMSNorm ------------------------------------------------------------------------------------------

def check_rms_norm(x, scale, epsilon, **options):
    with cuda_on_cpu.emulate(**options) as launches:
        y = kernels_cuda.rms_norm(x, scale, epsilon)
    assert y.dtype == x.dtype and y.shape == x.shape and y.flags.c_contiguous
    half_a_step = ref.EPSILON[x.dtype.name] / 2 + 1e-6
    assert ref.relative_error(y, ref.exact_rms_norm(x, scale, epsilon)) <= half_a_step
    return [name for name, *_ in launches]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype):
    """Any dimension and row count, any stride; vectors of 16 bytes where they fit."""
    item = ref.NUMPY_DTYPE[dtype]
    N = 16 // item(0).itemsize
    dims = [1, 2, 7, 8, 16, 31, 32, 33, 63, 64, 96, 127, 128, 129, 255, 256, 257, 511, 512, 513,
            1023, 1024, 1025, 2047, 2048, 2056, 3072, 5120]

    @settings(max_examples=ref.examples(40))
    @given(st.lists(st.integers(1, 3), max_size=3), st.sampled_from(dims), st.integers(0, 99),
           st.sampled_from(["dense", "fused", "unaligned"]), st.sampled_from([1e-6, 0.1]),
           st.sampled_from([0.01, 1.0, 100.0]))
    def all_equal(leading, D, seed, layout, epsilon, size):
        rng = np.random.default_rng(seed)
        x = (rng.normal(size=(*leading, D + {"dense": 0, "fused": 2 * N, "unaligned": 1}[layout]))
             * size).astype(item)
        x = x[..., N:N + D] if layout == "fused" else x[..., -D:]
        scale = rng.uniform(0.5, 1.5, D).astype(item)
        names = check_rms_norm(x, scale, epsilon)
        if layout != "unaligned":
            assert names == [f"rms_norm<{TYPES[dtype]}, {1 if D % N else N}>"]

    all_equal()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [8191, 8192, 8193, 16384, 16392, 20000])
def test_rms_norm_of_long_rows(dtype, D):
    """Rows longer than a block's registers are read twice."""
    x = np.random.default_rng(D).normal(size=(2, D)).astype(ref.NUMPY_DTYPE[dtype])
    check_rms_norm(x, np.flip(x[0]).copy(), 1e-6)
    check_rms_norm(x[:, 1:], x[1, 1:], 1e-6, reverse=True)


# RMSNorm, backward --------------------------------------------------------------------------------

def assert_rms_norm_gradients(found, gradient, x, scale, epsilon):
    """Both gradients are the formulas', but for x's one rounding and the sums in float32."""
    (d_x, d_scale), dtype = found, x.dtype.name
    wide = [array.astype("float64") for array in (gradient, x, scale)]
    exact, exact_scale = phi3_ref.textbook_rms_norm_backward(*wide, epsilon)
    assert d_x.dtype == x.dtype and d_x.shape == x.shape and d_x.flags.c_contiguous
    assert d_scale.dtype == "float32" and d_scale.shape == scale.shape
    # What is subtracted may nearly cancel: the sums' errors are relative to the terms.
    r = np.sqrt(np.mean(wide[1]**2, axis=-1, keepdims=True) + epsilon)
    n, d_n = wide[1] / r, wide[0] * wide[2]
    terms = (abs(d_n) + abs(n) * np.mean(abs(d_n * n), axis=-1, keepdims=True)) / r
    rounded_once = np.maximum(ref.EPSILON[dtype] / 2 * abs(exact),
                              float(ml_dtypes.finfo(x.dtype).smallest_subnormal) / 2)
    assert (abs(d_x.astype("float64") - exact) <= 1.001 * rounded_once + 1e-6 * terms).all()
    columns = abs(wide[0] * n).reshape(-1, len(scale)).sum(axis=0)
    assert (abs(d_scale - exact_scale) <= 1e-6 * columns).all()


def check_rms_norm_backward(gradient, x, scale, epsilon, **options):
    """Compares one case with the formulas; returns the names of the kernels that ran."""
    before = [array.tobytes() for array in (gradient, x, scale)]
    with cuda_on_cpu.emulate(**options) as launches:
        found = kernels_cuda.rms_norm_backward(gradient, x, scale, epsilon)
    assert_rms_norm_gradients(found, gradient, x, scale, epsilon)
    assert before == [array.tobytes() for array in (gradient, x, scale)]
    return [name for name, *_ in launches]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_backward(dtype):
    """Any dimension and strides, and more or fewer rows than there are blocks."""
    item = ref.NUMPY_DTYPE[dtype]
    N = 16 // item(0).itemsize
    dims = [1, 2, 7, 8, 16, 31, 32, 33, 63, 64, 96, 127, 128, 129, 255, 256, 257, 511, 512, 513,
            1023, 1024, 1025, 2047, 2048, 2056, 3072, 5120]
    layouts = st.sampled_from(["dense", "fused", "unaligned"])

    @settings(max_examples=ref.examples(40))
    @given(st.lists(st.integers(1, 3), max_size=3) | st.lists(st.integers(4, 40), max_size=1),
           st.sampled_from(dims), st.integers(0, 99), layouts, layouts,
           st.sampled_from([1e-6, 0.1]), st.sampled_from([0.01, 1.0, 100.0]),
           st.sampled_from([1, 1, 2, 3]))
    def all_equal(leading, D, seed, layout, other, epsilon, size, multiprocessors):
        rng = np.random.default_rng(seed)

        def array(layout, size):
            more = {"dense": 0, "fused": 2 * N, "unaligned": 1}[layout]
            x = (rng.normal(size=(*leading, D + more)) * size).astype(item)
            return x[..., N:N + D] if layout == "fused" else x[..., -D:]

        gradient, x = array(other, 1.0), array(layout, size)
        x[rng.random(x.shape[:-1]) < 0.1] = 0  # a row of zeros has no direction
        scale = rng.uniform(-1.5, 1.5, D).astype(item)
        names = check_rms_norm_backward(gradient, x, scale, epsilon,
                                        multiprocessors=multiprocessors)
        if "unaligned" not in (layout, other):
            assert names == [f"rms_norm_backward<{TYPES[dtype]}, {1 if D % N else N}>",
                             "rms_norm_backward_scale"]

    all_equal()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [4095, 4096, 4097, 8192, 8196, 16384, 16392, 20000])
def test_rms_norm_backward_of_long_rows(dtype, D):
    """Rows longer than a block's registers are read twice, and their sums kept in memory."""
    gradient, x = np.random.default_rng(D).normal(size=(2, 5, D)).astype(ref.NUMPY_DTYPE[dtype])
    scale = np.flip(x[0]).copy()
    check_rms_norm_backward(gradient, x, scale, 1e-6, multiprocessors=2)
    check_rms_norm_backward(gradient[:, 1:], x[:, 1:], scale[1:], 1e-6, reverse=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_backward_gives_the_same_bits_in_any_order(dtype):
    gradient, x = np.random.default_rng(0).normal(size=(2, 70, 520)).astype(ref.NUMPY_DTYPE[dtype])
    results = []
    for reverse in (False, True):
        with cuda_on_cpu.emulate(multiprocessors=2, reverse=reverse):
            results.append([array.tobytes() for array in kernels_cuda.rms_norm_backward(
                gradient, x, gradient[0], 1e-5)])
    assert results[0] == results[1]


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (3, 0)])
def test_rms_norm_backward_with_nothing_to_do(shape):
    x = np.ones(shape, "float16")
    with cuda_on_cpu.emulate() as launches:
        d_x, d_scale = kernels_cuda.rms_norm_backward(x, x, np.ones(shape[-1], "float16"), 1e-6)
    assert d_x.shape == shape and d_x.dtype == "float16" and not launches
    np.testing.assert_array_equal(d_scale, np.zeros(shape[-1], "float32"), strict=True)


def test_bytes_of_rms_norm_backward():
    """Each array is read or written once; beside that, partial sums and what caches hold move."""
    rows, D, blocks = 64, 1024, 2 * 16
    gradient, x = np.random.default_rng(0).normal(size=(2, rows, D)).astype("float16")
    traffic = []
    with cuda_on_cpu.emulate(multiprocessors=2, traffic=traffic) as launches:
        kernels_cuda.rms_norm_backward(gradient, x, x[0], 1e-5)
    (asked, _), (asked_by_sum, _) = traffic
    assert launches[0][1] == (blocks,)
    scale = 2 * rows * 2 * D  # twice a row, from the L1 cache
    assert asked == 3 * 2 * rows * D + scale + 4 * blocks * D
    assert asked_by_sum == 4 * blocks * D + 4 * D


# Products of few rows -----------------------------------------------------------------------------

def check_linear(x, weight, **options):
    with cuda_on_cpu.emulate(**options) as launches:
        y = kernels_cuda.linear(x, weight)
    wide_x, wide_weight = x.astype("float64"), weight.astype("float64")
    exact = wide_x @ wide_weight.T
    assert y.dtype == x.dtype and y.shape == exact.shape and y.flags.c_contiguous
    rounded_once = ref.EPSILON[x.dtype.name] / 2 * abs(exact)
    summed_in_float32 = 1e-6 * (abs(wide_x) @ abs(wide_weight).T)
    assert (abs(y.astype("float64") - exact) <= rounded_once + summed_in_float32).all()
    return [name for name, *_ in launches]


@pytest.mark.parametrize("rows", range(1, 9))
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(dtype, rows):
    """Any sizes and strides; vectors of 16 bytes where they fit."""
    item = ref.NUMPY_DTYPE[dtype]
    N = 16 // item(0).itemsize
    sizes = [1, 7, 8, 31, 32, 33, 96, 127, 128, 129, 256, 257, 512, 1000, 1024, 1032, 2048, 2056]
    most = next(most for most in kernels_cuda.LINEAR_ROWS if most >= rows)

    @settings(max_examples=ref.examples(12))
    @given(st.sampled_from(sizes), st.sampled_from([1, 2, 3, 7, 8, 9, 16, 17, 50]),
           st.sampled_from(["dense", "wider", "unaligned"]), st.integers(0, 99))
    def all_equal(size, out, layout, seed):
        rng = np.random.default_rng(seed)
        more = {"dense": 0, "wider": 2 * N, "unaligned": 1}[layout]
        x, weight = (rng.normal(size=(n, size + more)).astype(item) for n in (rows, out))
        x, weight = ((a[:, N:N + size] if layout == "wider" else a[:, -size:]) for a in (x, weight))
        names = check_linear(x, weight)
        if layout != "unaligned":
            assert names == [f"linear<{TYPES[dtype]}, {1 if size % N else N}, {most}>"]

    all_equal()
    x = np.random.default_rng(0).normal(size=(1, rows, 2, 64)).astype(item)[:, :, 1]
    check_linear(x, x[0], reverse=True)


def test_linear_with_nothing_to_do():
    with cuda_on_cpu.emulate() as launches:
        for x, weight in (((0, 8), (5, 8)), ((3, 8), (0, 8))):
            y = kernels_cuda.linear(np.ones(x, "float32"), np.ones(weight, "float32"))
            assert y.shape == (x[0], weight[0])
        assert not launches


# What the launchers refuse ------------------------------------------------------------------------

def arrays(**changes):
    """Returns the arguments of a call of attention, each by its name."""
    query, key, value, mask, _ = Case("float32", 2, 3, 5, 2, 2, 8, "random").inputs()
    return {"query": query, "key": key, "value": value, "padding_mask": mask, **changes}


@pytest.mark.parametrize("changes, error, words", [
    ({"query": [[1.0]]}, TypeError, "query.*ndarray.*list"),
    ({"padding_mask": [[True] * 5] * 2}, TypeError, "padding_mask.*ndarray.*list"),
    ({"query": np.zeros((2, 3, 4, 8))}, ValueError, "query.*float32.*float16.*bfloat16.*float64"),
    ({"query": np.zeros((2, 3, 4, 8), "int32")}, ValueError, "query.*float32.*int32"),
    ({"key": np.zeros((2, 5, 2, 8), "float16")}, ValueError, "key.*float32.*float16"),
    ({"value": np.zeros((2, 5, 2, 8), ml_dtypes.bfloat16)}, ValueError, "value.*float32.*bfloat16"),
    ({"query": np.zeros((3, 4, 8), "float32")}, ValueError, r"query.*\(3, 4, 8\)"),
    ({"key": np.zeros((2, 5, 2, 7), "float32")}, ValueError, r"key.*8.*\(2, 5, 2, 7\)"),
    ({"key": np.zeros((1, 5, 2, 8), "float32")}, ValueError, r"key.*2.*\(1, 5, 2, 8\)"),
    ({"value": np.zeros((2, 6, 2, 8), "float32")}, ValueError, r"value.*5.*\(2, 6, 2, 8\)"),
    ({"key": np.zeros((2, 2, 2, 8), "float32"), "value": np.zeros((2, 2, 2, 8), "float32"),
      "padding_mask": None}, ValueError, "query.*2 positions.*3"),
    ({"key": np.zeros((2, 5, 3, 8), "float32"), "value": np.zeros((2, 5, 3, 8), "float32")},
     ValueError, "query.*multiple.*3.*4"),
    ({"padding_mask": np.ones((2, 3), bool)}, ValueError, r"padding_mask.*\(2, 5\).*\(2, 3\)"),
    ({"query": np.zeros((2, 3, 4, 16), "float32")[..., ::2]}, ValueError, "query.*contiguous"),
    ({"value": np.zeros((2, 8, 2, 5), "float32").transpose(0, 3, 2, 1)}, ValueError,
     "value.*contiguous"),
    ({"log_sum_exp": np.zeros((2, 3, 4), "float32")}, ValueError, r"log_sum_exp.*2, 4, 3.*2, 3, 4"),
    ({"log_sum_exp": np.zeros((2, 4, 3))}, ValueError, "log_sum_exp.*float32.*float64"),
    ({"log_sum_exp": np.zeros((4, 2, 3), "float32").swapaxes(0, 1)}, ValueError,
     "log_sum_exp.*contiguous"),
    ({"log_sum_exp": [0.0]}, TypeError, "log_sum_exp.*ndarray.*list")])
def test_attention_refuses(changes, error, words):
    """Each wrong argument is named, with what was expected and found."""
    with cuda_on_cpu.emulate() as launches, pytest.raises(error, match=f"(?s){words}"):
        kernels_cuda.attention(**arrays(**changes))
    assert not launches


@pytest.mark.parametrize("x, scale, error, words", [
    ([1.0], np.ones(1, "float32"), TypeError, "x.*ndarray.*list"),
    (np.ones((2, 8)), np.ones(8), ValueError, "x.*float64"),
    (np.ones((2, 8), "float32"), np.ones(8, "float16"), ValueError, "scale.*float32.*float16"),
    (np.ones((2, 8), "float32"), np.ones(7, "float32"), ValueError, r"scale.*\(8\).*\(7,\)"),
    (np.ones((2, 16), "float32")[:, ::2], np.ones(8, "float32"), ValueError, "x.*contiguous"),
    (np.float32(1), np.ones(1, "float32"), TypeError, "x.*ndarray")])
def test_rms_norm_refuses(x, scale, error, words):
    with cuda_on_cpu.emulate() as launches, pytest.raises(error, match=f"(?s){words}"):
        kernels_cuda.rms_norm(x, scale, 1e-6)
    assert not launches


@pytest.mark.parametrize("changes, error, words", [
    ({"x": [1.0]}, TypeError, "x.*ndarray.*list"),
    ({"x": np.ones((2, 8))}, ValueError, "x.*float64"),
    ({"gradient": np.ones((2, 8), "float16")}, ValueError, "gradient.*float32.*float16"),
    ({"gradient": np.ones((8, 2), "float32")}, ValueError, r"gradient.*\(2, 8\).*\(8, 2\)"),
    ({"gradient": np.ones((2, 16), "float32")[:, ::2]}, ValueError, "gradient.*contiguous"),
    ({"scale": np.ones(7, "float32")}, ValueError, r"scale.*\(8\).*\(7,\)"),
    ({"scale": np.ones(8, "float16")}, ValueError, "scale.*float32.*float16")])
def test_rms_norm_backward_refuses(changes, error, words):
    right = {"gradient": np.ones((2, 8), "float32"), "x": np.ones((2, 8), "float32"),
             "scale": np.ones(8, "float32"), "epsilon": 1e-6}
    with cuda_on_cpu.emulate() as launches, pytest.raises(error, match=f"(?s){words}"):
        kernels_cuda.rms_norm_backward(**{**right, **changes})
    assert not launches


@pytest.mark.parametrize("x, weight, error, words", [
    (np.ones((2, 8)), np.ones((3, 8)), ValueError, "x.*float64"),
    (np.ones((2, 8), "float32"), np.ones((3, 8), "float16"), ValueError, "weight.*float32.*16"),
    (np.ones((2, 8), "float32"), np.ones((8, 3), "float32"), ValueError, r"weight.*8.*\(8, 3\)"),
    (np.ones((9, 8), "float32"), np.ones((3, 8), "float32"), ValueError, "x.*8 vectors.*9"),
    (np.ones((2, 8), "float32"), np.ones((8, 3), "float32").T, ValueError, "weight.*contiguous"),
    (np.ones((2, 8), "float32"), [[1.0] * 8], TypeError, "weight.*ndarray.*list")])
def test_linear_refuses(x, weight, error, words):
    with cuda_on_cpu.emulate() as launches, pytest.raises(error, match=f"(?s){words}"):
        kernels_cuda.linear(x, weight)
    assert not launches


# Mutants: what the checks above would find --------------------------------------------------------

# Cases that between them reach every line of each kernel.
MUTANT_CASES = {
    "RMS_NORM": [],
    "RMS_NORM_BACKWARD": [],
    "LINEAR": [],
    "ATTENTION_TILED": [Case("float32", 2, 9, 20, 1, 1, 40, "nothing"),
                        Case("float32", 2, 70, 131, 2, 2, 96, "random", 66, size=6.0),
                        Case("float32", 1, 70, 131, 1, 2, 130, layout="fused", size=6.0)],
    "ATTENTION_TENSOR_CORES": [Case("float16", 2, 9, 20, 1, 1, 64, "nothing"),
                               Case("float16", 2, 70, 200, 2, 2, 64, "random", 66, size=6.0),
                               Case("float16", 2, 130, 200, 2, 2, 56, layout="fused", size=6.0),
                               Case("float16", 1, 70, 200, 1, 1, 64, window=70)],
    "ATTENTION_DECODE": [Case("float16", 2, 3, 20, 1, 1, 64, "nothing"),
                         Case("float16", 2, 3, 300, 2, 3, 64, "random", 150, size=6.0),
                         Case("float16", 1, 3, 300, 2, 3, 40, layout="fused", size=6.0),
                         Case("float16", 1, 3, 70, 2, 2, 64),
                         Case("float16", 1, 3, 70, 2, 2, 64, window=30)]}


def is_caught(source_name, edit):
    """Says how the checks refuse a kernel's edited source, or None where they do not."""
    source = getattr(kernels_cuda, source_name)
    changed = edit(source)
    assert changed != source, "the mutation changes nothing: has the kernel been rewritten?"

    def edit_this(text):
        return changed if text == source else text

    try:
        if source_name == "RMS_NORM":
            x = np.random.default_rng(0).normal(size=(3, 20000)).astype("float16")
            for D in (20000, 200, 20001 - 4):
                check_rms_norm(x[:, :D], x[0, :D], 0.1, edit=edit_this)
        if source_name == "RMS_NORM_BACKWARD":
            gradient, x = np.random.default_rng(0).normal(size=(2, 7, 20008)).astype("float16")
            for rows, D in ((3, 20000), (3, 4101), (3, 1040), (3, 201)):
                x = x[:rows, :D + 8].copy()  # another stride than the gradient's, and than D
                check_rms_norm_backward(gradient[:rows, :D], x[:, :D], x[0, :D], 0.1,
                                        edit=edit_this, multiprocessors=1)
        if source_name == "LINEAR":
            x = np.random.default_rng(0).normal(size=(7, 1400)).astype("float16")
            for size, out in ((1400, 5), (1024, 6), (1032, 7), (40, 1)):
                check_linear(x[:3, :size], x[:out, :size], edit=edit_this)
        for case in MUTANT_CASES[source_name]:
            check(case, edit=edit_this, multiprocessors=3)
    except (cuda_on_cpu.KernelError, AssertionError) as error:
        assert "error:" not in str(error), error  # it must compile
        return str(error)
    return None


ORDERING = ["__syncthreads();", "__syncwarp();", "cp_async_wait<0>();", "cp_async_commit();"]


@pytest.mark.parametrize("source_name, statement, number", [
    (name, statement, number) for name in MUTANT_CASES for statement in ORDERING
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


MUTANTS = {
    "ATTENTION_TILED": {
        "the log-sum-exp to the base 2": ("log2f(total)) * LN_2", "log2f(total))"),
        "the log-sum-exp of nothing": ("return total == 0.0f ? 0.0f :", "return"),
        "the log-sum-exp without the peak": ("(peak + log2f(total))", "log2f(total)"),
        "the mask lets the next key in": ("t > position", "t > position + 1"),
        "the mask hides the key itself": ("t > position", "t >= position"),
        "the window is one too long": ("position - t >= window", "position - t > window"),
        "the padding mask is ignored": ("(has_mask && !mask[t])", "false"),
        "the padding mask of sequence 0": ("mask += (long long)b * T", "mask += 0 * b"),
        "the result is not rescaled": ("mixed[i][j] *= r.shrink", "mixed[i][j] *= 1"),
        "the total is not rescaled": ("total[i] * r.shrink", "total[i]"),
        "another head of keys": ("key += b * key_b + h / (H / K) * key_k",
                                 "key += b * key_b + h % K * key_k"),
        "the stride of keys for values": ("row * value_t", "row * key_t * 1 + 0 * value_t + row"),
        "the last tile of keys left out": ("t0 < end; t0 += TILE", "t0 + TILE <= end; t0 += TILE"),
        "a tile before the window's": ("first / TILE * TILE", "first / TILE * TILE + TILE"),
        "the second half of columns": ("j / 4 * 64", "j / 4 * 32"),
        "queries past the last": ("s < S && c < C", "s < S + 1 && c < C"),
        "the log-sum-exp of queries past the last": ("tx == 0 && s < S", "tx == 0 && s <= S"),
        "the log-sum-exp by query and head": ("* H + h) * S + s] = log", "* S + s) * H + h] = log"),
        "the log-sum-exp of any columns": ("&& c0 == 0 && tx", "&& tx"),
        "columns past the last": ("s < S && c < C", "s < S && c < C + 1"),
        "the wrong divisor": ("1.0f / total[i]", "1.0f / (total[i] + 1e-2f)"),
        "no padding of C": ("q0 + row < S && c < C", "q0 + row < S")},
    "ATTENTION_TENSOR_CORES": {
        "the log-sum-exp to the base 2": ("log2f(total)) * LN_2", "log2f(total))"),
        "the log-sum-exp of nothing": ("return total == 0.0f ? 0.0f :", "return"),
        "the log-sum-exp without the peak": ("(peak + log2f(total))", "log2f(total)"),
        "the mask lets the next key in": ("distance < 0", "distance < -1"),
        "the mask hides the key itself": ("distance < 0", "distance <= 0"),
        "the window is one too long": ("distance >= window", "distance > window"),
        "the diagonal is not masked": ("t0 + KEYS - 1 > lowest", "t0 > lowest"),
        "the window is not masked": ("t0 <= highest - window", "t0 < highest - window - KEYS"),
        "the padding mask is ignored": ("position < T && mask[position]", "position < T"),
        "the padding mask of sequence 0": ("mask += (long long)b * T", "mask += 0 * b"),
        "the mask past its end": ("position < T && mask[position]", "mask[position]"),
        "the result is not rescaled": ("mixed[m][n][2 * i] *= r.shrink", "mixed[m][n][2 * i] *= 1"),
        "the total is not rescaled": ("total[m][i] * r.shrink", "total[m][i]"),
        "a row's lanes do not agree": ("highest_over_lanes<1, 4>", "highest_over_lanes<1, 2>"),
        "another head of keys": ("k = h / (H / K)", "k = h % K"),
        "the stride of keys for values": ("value + t0 * value_t, value_t", "value + t0 * key_t, "
                                          "value_t + 8"),
        "one buffer only": ("buffer ^= 1", "buffer ^= 0"),
        "the other buffer": ("int buffer) {\n        E* tile = buffers + buffer * 2",
                             "int buffer) {\n        E* tile = buffers + (buffer ^ 1) * 2"),
        "rows past the last": ("row0 + i < rows && c0 + j < C", "row0 + i <= rows && c0 + j < C"),
        "columns past the last": ("row0 + i < rows && c0 + j < C",
                                  "row0 + i < rows && c0 + j < C + 8"),
        "the operand is not transposed": ("ldmatrix_x4_trans", "ldmatrix_x4"),
        "a warp skips a tile it needs": ("t0 + KEYS <= lowest - window + 1",
                                         "t0 + KEYS <= lowest - window + 33"),
        "a tile too few": ("t0 < end; t0 += KEYS", "t0 + KEYS < end; t0 += KEYS"),
        "queries past the last written": ("s < S && c < C", "s <= S && c < C"),
        "the log-sum-exp of queries past the last": ("if (s < S)", "if (s <= S)"),
        "the log-sum-exp of a lane": ("total[m][i] = sum_over_lanes<1, 4>(total[m][i]);", ""),
        "the log-sum-exp of the block's first queries": ("q0 + row0 + 16 * m + g + 8 * i;",
                                                         "q0 + 16 * m + g + 8 * i;")},
    "ATTENTION_DECODE": {
        "the log-sum-exp to the base 2": ("log2f(total)) * LN_2", "log2f(total))"),
        "the log-sum-exp of nothing": ("return total == 0.0f ? 0.0f :", "return"),
        "the log-sum-exp without the peak": ("(peak + log2f(total))", "log2f(total)"),
        "the mask lets the next key in": ("distance < 0", "distance < -1"),
        "the window is one too long": ("distance >= window", "distance > window"),
        "the padding mask is ignored": ("(!has_mask || mask[t])", "true"),
        "the result is not rescaled": ("x *= rescaling.shrink", "x *= 1"),
        "the total is not rescaled": ("total[r] * rescaling.shrink", "total[r]"),
        "the groups are not brought to one peak": ("mixed[r][j][n] * shrink", "mixed[r][j][n]"),
        "the warps are not brought to one peak": ("warp_total[w][r] * shrink", "warp_total[w][r]"),
        "the splits are not brought to one peak": ("partial_sums[2 * i + 1] * shrink",
                                                   "partial_sums[2 * i + 1]"),
        "another head of queries": ("(k * G + r % G) * query_h", "(k * G + r / S % G) * query_h"),
        "another head in the result": ("k * G + r % G) * C", "k + r % G * K) * C"),
        "a split too short": ("start + keys_per_split < T ?",
                              "start + keys_per_split - 1 < T ? -1 +"),
        "keys past the end of a split": ("t == wanted &&", "true &&"),
        "the last split left out": ("i < splits; i++) {", "i < splits - 1; i++) {"),
        "rows past the last": ("row0 + r >= rows", "row0 + r > rows"),
        "the log-sum-exp by query and head": ("r % G) * S + r / G] =", "r / G) * S + r % G] =")},
    "LINEAR": {
        "half of a warp": ("sum_over_lanes<1, 32>", "sum_over_lanes<1, 16>"),
        "columns past the last": ("if (i0 + u * STEP < in)", "if (i0 + u * STEP <= in)"),
        "one step of columns only": ("i0 < in; i0 += STEP * UNROLL", "i0 < STEP; i0 += STEP"),
        "a step left out": ("i0 += STEP * UNROLL", "i0 += STEP * (UNROLL + 1)"),
        "rows of x past the last": ("r >= rows || i >= in", "i >= in"),
        "the first output twice": ("(o + j < out ? o + j : out - 1)", "o"),
        "outputs past the last read": ("(o + j < out ? o + j : out - 1)", "(o + j)"),
        "outputs past the last written": ("&& o + j < out)", ")"),
        "the stride of x for the weight": ("out - 1) * weight_row", "out - 1) * in")},
    "RMS_NORM": {
        "the wrong mean": ("sum / D", "sum / (D + 1)"),
        "epsilon outside of the root": ("sqrtf(sum / D + epsilon)", "(sqrtf(sum / D) + epsilon)"),
        "a warp left out": ("threads / 32; warp++", "threads / 32 - 1; warp++"),
        "half of a warp": ("sum_over_lanes<1, 32>", "sum_over_lanes<1, 16>"),
        "the rest of a long row": ("threadIdx.x + ITEMS * threads; i < count; i += threads)\n"
                                   "        sum", "count; i < count; i += threads)\n        sum"),
        "past the end of a row": ("if (i < count) out[i]", "if (i <= count) out[i]")},
    "RMS_NORM_BACKWARD": {
        "the projection is dropped": (" - normed * mean", ""),
        "epsilon is forgotten": ("squares / D + epsilon", "squares / D"),
        "the wrong mean": ("products / D", "products / (D + 1)"),
        "the wrong mean of squares": ("squares / D", "squares / (D + 1)"),
        "the mean of n' x": ("products / D * inverse", "products / D"),
        "scale is forgotten in x'": ("d_y * to_float(scale.element[n])", "d_y"),
        "scale is forgotten in the mean": ("* to_float(scale.element[n]) * wide", "* wide"),
        "x for n in scale's": ("d_y * normed;", "d_y * to_float(x.element[n]);"),
        "a warp left out": ("w < threads / 32;", "w < threads / 32 - 1;"),
        "half of a warp": ("sum_over_lanes<1, 32>(products)", "sum_over_lanes<1, 16>(products)"),
        "one place for all rows": ("warp_sums[row % 2]", "warp_sums[0]"),
        "a share's last row": ("row < end; row++", "row < end - 1; row++"),
        "a row of the next share": ("row < end; row++", "row <= end && row < rows; row++"),
        "the stride of x for the gradient": ("row * gradient_row", "row * x_row"),
        "the stride of x in the result": ("(long long)row * D", "(long long)row * x_row"),
        "the rest of a long row": (
            "threadIdx.x + ITEMS * threads; i < count; i += threads)\n            add",
            "count; i < count; i += threads)\n            add"),
        "the rest's sums are not added up": ("in_memory[n] = partial[i * N + n]",
                                             "in_memory[n] = 0.0f"),
        "the rest's sums begin with garbage": ("if (row > first)", ""),
        "partial sums of block 0": ("partial += (long long)blockIdx.x * D", "partial += 0 * D"),
        "past the end of a row": ("            if (i < count)\n", "            if (i <= count)\n"),
        "half of the partial sums written": ("n < N; n += M", "n < N; n += 2 * M"),
        "the last partial sum forgotten": ("end = blocks * (warp + 1) / warps",
                                           "end = (blocks - 1) * (warp + 1) / warps"),
        "shares of partial sums overlap": ("end = blocks * (warp + 1) / warps",
                                           "end = min(blocks, blocks * (warp + 1) / warps + 1)"),
        "a warp of partial sums left out": ("w < warps; w++", "w < warps - 1; w++"),
        "columns past the last": ("warp > 0 || column >= D", "warp > 0")}}


@pytest.mark.parametrize("source_name, mutant", [
    (name, mutant) for name, mutants in MUTANTS.items() for mutant in mutants])
def test_mutants_are_caught(source_name, mutant):
    """A kernel with one mistake fails: by its result, or by what it does to memory."""
    old, new = MUTANTS[source_name][mutant]
    assert is_caught(source_name, lambda source: source.replace(old, new))
