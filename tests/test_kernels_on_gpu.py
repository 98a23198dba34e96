"""The CUDA kernels and the CuPy backend on a GPU: what test_kernels_on_cpu.py asserts, and more."""

import random

import numpy as np
import pytest
import references as ref
import test_attention_backward_on_cpu as backward_on_cpu
import test_kernels_on_cpu as on_cpu
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels_cuda
import phi3_ref

try:
    import cupy
except ImportError:
    cupy = None

pytestmark = pytest.mark.gpu
DTYPES = on_cpu.DTYPES
HEADS = [(32, 32, 96), (32, 32, 128), (40, 10, 96), (40, 10, 128)]  # H, K, C


def to_gpu(array):
    """Returns a NumPy array on the GPU with its strides, and its place in what it is a view of."""
    if array is None:
        return None
    base = array
    while isinstance(base.base, np.ndarray):
        base = base.base
    memory = cupy.asarray(base.reshape(-1).view(np.uint8)).data
    offset = array.ctypes.data - base.ctypes.data
    return cupy.ndarray(array.shape, array.dtype, memory + offset, array.strides)


def run(inputs, asks=False):
    """Returns the kernels' result, from memory that held NaN, and the log-sum-exp, as NumPy arrays.

    The latter stays NaN where nobody asks for it.
    """
    query, key, value, mask, window = inputs
    (B, S, H, _), arrays = query.shape, [to_gpu(array) for array in (query, key, value, mask)]
    poison = cupy.empty(query.shape, query.dtype)
    poison.view(np.uint8).fill(0xFF)
    del poison
    log_sum_exp = cupy.full((B, H, S), np.nan, np.float32)
    result = kernels_cuda.attention(*arrays, window, log_sum_exp if asks else None)
    assert result.dtype == query.dtype and result.flags.c_contiguous
    return result.get(), log_sum_exp.get()


def check(case):
    """Compares one case with the formulas in float64, as on the CPU."""
    inputs = case.inputs()
    (result, found), (exact, tolerance) = run(inputs, case.asks), on_cpu.expected(case, inputs)
    if case.asks:
        on_cpu.check_log_sum_exp(found, inputs)
    assert ref.relative_error(result, exact) <= tolerance
    assert not np.asarray(result, "float64")[~exact.any(-1)].any(), "a row that sees no key"


@pytest.mark.parametrize("few_queries", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_around_every_edge(dtype, few_queries):
    layouts = ("dense", "fused", "cache", "unaligned")
    dims = [1, 8, 24, 64, 80, 96, 97, 128, 160, 192, 256, 300]

    @settings(max_examples=ref.examples(150))
    @given(on_cpu.cases(dtype, dims, few_queries, layouts))
    def all_equal(case):
        check(case)

    all_equal()


@pytest.mark.parametrize("H, K, C", HEADS)
@pytest.mark.parametrize("S, T, mask, window", [
    (1024, 1024, "none", None), (4096, 4096, "none", None), (4096, 4096, "left", 1000),
    (1000, 4096, "random", None), (1, 4096, "none", None), (4, 4095, "left", 2047)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_at_real_shapes(dtype, S, T, mask, window, H, K, C):
    """The first, middle and last 32 queries of the first and the last group of heads."""
    case = on_cpu.Case(dtype, 1, S, T, K, H // K, C, mask, window, layout="fused")
    query, key, value, mask, _ = inputs = case.inputs()
    result, found = run(inputs, asks=True)
    result = result.astype("float64")
    assert np.isfinite(result).all() and np.isfinite(found).all()
    for k in (0, K - 1):
        heads = slice(k * H // K, (k + 1) * H // K)
        for start in sorted({0, S // 2, max(0, S - 32)}):
            rows = slice(start, min(start + 32, S))
            end = T - S + rows.stop
            part = (query[:, rows, heads], key[:, :end, k:k + 1], value[:, :end, k:k + 1],
                    None if mask is None else mask[:, :end], window)
            exact, tolerance = on_cpu.expected(case, part)
            assert ref.relative_error(result[:, rows, heads], exact) <= tolerance
            on_cpu.check_log_sum_exp(found[:, heads, rows], part)


def run_backward(inputs, kept=None):
    """Returns the three gradients, from memory that held NaN, as NumPy arrays."""
    *arrays, window = inputs
    arrays = [to_gpu(array) for array in arrays]
    kept = {name: to_gpu(array) for name, array in (kept or {}).items()}
    poison = [cupy.empty(array.shape, array.dtype) for array in arrays[1:4]]
    for array in poison:
        array.view(np.uint8).fill(0xFF)
    del poison
    results = kernels_cuda.attention_backward(*arrays, window, **kept)
    assert all(x.dtype == like.dtype and x.shape == like.shape and x.flags.c_contiguous
               for x, like in zip(results, inputs[1:4], strict=True))
    return [x.get() for x in results]


def check_backward(results, inputs, dtype):
    for result, exact, size in zip(results, *backward_on_cpu.expected(inputs), strict=True):
        assert abs(result.astype("float64") - exact).max() <= ref.TOLERANCE[dtype] * size


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_backward_around_every_edge(dtype):
    layouts = ("dense", "fused", "cache", "unaligned")
    dims = [1, 8, 24, 32, 64, 80, 96, 97, 128, 130, 160, 257]

    @settings(max_examples=ref.examples(150))
    @given(backward_on_cpu.cases(dtype, dims, layouts))
    def all_equal(case):
        inputs = backward_on_cpu.arguments(case)
        kept = backward_on_cpu.kept(inputs) if case.asks else None
        check_backward(run_backward(inputs, kept), inputs, dtype)

    all_equal()


@pytest.mark.parametrize("H, K, C", HEADS)
@pytest.mark.parametrize("S, T, mask, window", [
    (1024, 1024, "none", None), (1000, 2000, "left", 700), (2000, 2000, "random", None)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_backward_at_real_shapes(dtype, S, T, mask, window, H, K, C):
    """Everything of the first and the last group of heads."""
    case = on_cpu.Case(dtype, 1, S, T, K, H // K, C, mask, window, layout="fused")
    gradient, query, key, value, mask, _ = inputs = backward_on_cpu.arguments(case)
    results = run_backward(inputs)
    assert all(np.isfinite(x.astype("float32")).all() for x in results)
    for k in (0, K - 1):
        heads, one = slice(k * H // K, (k + 1) * H // K), slice(k, k + 1)
        part = (gradient[:, :, heads], query[:, :, heads], key[:, :, one], value[:, :, one], mask,
                window)
        check_backward([results[0][:, :, heads], *(x[:, :, one] for x in results[1:])], part, dtype)


@pytest.mark.parametrize("C", [64, 60])  # on the tensor cores, or not
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_what_all_values_share(dtype, C):
    """The rounding of delta is taken out of the gradients of query and key, as on the CPU."""
    backward_on_cpu.check_what_all_values_share(dtype, C, run_backward)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [
    (1, 1), (3, 7), (5, 96), (2, 3, 129), (1, 3072), (4096, 3072), (4, 5120), (2, 8193),
    (2, 16384), (3, 20000)])
def test_rms_norm(dtype, shape):
    rng = np.random.default_rng(shape[-1])
    x = rng.normal(size=(*shape[:-1], shape[-1] + 8)).astype(ref.NUMPY_DTYPE[dtype])
    scale = rng.uniform(0.5, 1.5, shape[-1]).astype(x.dtype)
    for part in (x[..., :-8], x[..., 8:], x[..., 1:-7], x[..., :-8].copy()):
        y = kernels_cuda.rms_norm(to_gpu(part), to_gpu(scale), 1e-6).get()
        assert y.dtype == x.dtype and y.shape == shape
        exact = ref.exact_rms_norm(part, scale, 1e-6)
        assert ref.relative_error(y, exact) <= ref.EPSILON[dtype] / 2 + 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [
    (1, 1), (3, 7), (5, 96), (2, 3, 129), (1, 3072), (4096, 3072), (1999, 5120), (700, 8193),
    (300, 16384), (700, 20000)])
def test_rms_norm_backward(dtype, shape):
    """In memory that held NaN, dense and strided; more and fewer rows than there are blocks."""
    rng = np.random.default_rng(shape[-1])
    gradient, x = rng.normal(size=(2, *shape[:-1], shape[-1] + 8)).astype(ref.NUMPY_DTYPE[dtype])
    scale = rng.uniform(0.5, 1.5, shape[-1]).astype(x.dtype)
    for part in (slice(-8), slice(8, None), slice(1, -7)):
        inputs = gradient[..., part], x[..., :-8].copy() if part.start == 8 else x[..., part], scale
        arrays = [to_gpu(array) for array in inputs]
        for array in kernels_cuda.rms_norm_backward(*arrays, 1e-6):
            array.view(np.uint8).fill(0xFF)
        del array  # the next call gets this memory
        found = [array.get() for array in kernels_cuda.rms_norm_backward(*arrays, 1e-6)]
        on_cpu.assert_rms_norm_gradients(found, *inputs, 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("size, out", [
    (1, 1), (97, 5), (136, 9), (3072, 9216), (3072, 16384), (8192, 3072), (3072, 32064)])
def test_linear(dtype, rows, size, out):
    rng = np.random.default_rng(size)
    x, weight = (rng.normal(size=(n, size + 8)).astype(ref.NUMPY_DTYPE[dtype])
                 for n in (rows, out))
    for part in (slice(8, None), slice(1, -7)):  # in vectors, and one by one
        y = kernels_cuda.linear(to_gpu(x)[:, part], to_gpu(weight)[:, part]).get()
        exact = x[:, part].astype("float64") @ weight[:, part].astype("float64").T
        assert y.dtype == x.dtype and y.shape == exact.shape
        assert ref.relative_error(y, exact) <= ref.EPSILON[dtype] / 2 + 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("S, T", [(1, 4096), (3, 2000), (777, 2000), (2048, 2048)])
def test_same_bits_every_time(dtype, S, T):
    inputs = on_cpu.Case(dtype, 2, S, T, 10, 4, 96, "left", 1500, layout="fused").inputs()
    first, *others = ([x.tobytes() for x in run(inputs, asks)] for asks in (True, True, False))
    assert others[0] == first and others[1][0] == first[0]
    inputs = backward_on_cpu.arguments(on_cpu.Case(
        dtype, 2, S, T, 10, 4, 96, "left", 1500, layout="fused"))
    first, *others = ([x.tobytes() for x in run_backward(inputs)] for _ in range(3))
    assert others == [first, first]
    inputs = inputs[1:]
    x, scale = (to_gpu(inputs[0][i].reshape(-1, 96)[:n]) for i, n in ((0, None), (1, 1)))
    first, *others = (kernels_cuda.rms_norm(x, scale[0], 1e-6).get().tobytes() for _ in range(3))
    assert others == [first, first]
    first, *others = ([array.get().tobytes() for array in kernels_cuda.rms_norm_backward(
        x, x, scale[0], 1e-6)] for _ in range(3))
    assert others == [first, first]


def test_arrays_of_the_host_are_refused():
    arrays = on_cpu.arrays()
    with pytest.raises(TypeError, match=r"query.*cupy.ndarray.*numpy"):
        kernels_cuda.attention(**arrays)
    arrays["query"] = to_gpu(arrays["query"])
    with pytest.raises(TypeError, match=r"key.*cupy.ndarray.*numpy"):
        kernels_cuda.attention(**arrays)


@pytest.mark.filterwarnings("ignore:The sequence outgrows")
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_backbone(dtype, fused):
    """The same random weights, on CuPy and on NumPy."""
    real = dict(vocabulary_size=101, num_layers=3, hidden_dim=384, intermediate_dim=512,
                num_query_heads=4, num_key_value_heads=2, seed=0)
    cases = [(real, {"token_ids": np.random.default_rng(0).integers(0, 101, (2, 300))})]
    cases += [ref.random_case(random.Random(seed).choice, num_layers=3) for seed in range(10)]
    for config, inputs in cases:
        numpys = phi3_ref.Phi3Backbone(**{"seed": 1, **config}, dtype=dtype)
        cupys = phi3_ref.Phi3Backbone(
            **{"seed": 1, **config}, dtype=dtype, backend="cupy", fused=fused)
        ours, reference = cupys(inputs), numpys(inputs)
        assert isinstance(ours, cupy.ndarray) and ours.dtype == reference.dtype
        mask = inputs.get("padding_mask")
        if mask is None or mask.any():
            error = ref.relative_error(ours.get(), reference, mask)
            assert error <= ref.TOLERANCE[dtype], config


SU = dict(rope_scaling_type="su", max_sequence_length=2000, pretraining_sequence_length=1021,
          rope_scaling_short_factor=np.linspace(1, 2, 48).tolist(),
          rope_scaling_long_factor=np.linspace(1, 8, 48).tolist())


@pytest.mark.parametrize("B", [1, 2, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", [{}, SU, dict(sliding_window=600)])
def test_decoding_by_a_graph(model, dtype, B):
    """Logits while the 1,024 slots of the first record fill up, factors change, windows move."""
    token_ids = np.random.default_rng(0).integers(0, 200, (B, 1210))
    results = []
    for backend in ("numpy", "cupy", "cupy"):
        causal_lm = phi3_ref.Phi3CausalLM(phi3_ref.Phi3Backbone(
            200, 2, 384, 512, 4, 2, seed=0, dtype=dtype, backend=backend, **model))
        weights, config, xp = (getattr(causal_lm.backbone, name)
                               for name in ("weights", "config", "xp"))
        cache, logits = phi3_ref.KVCache(config, B, 1210, chunk=600, xp=xp), []
        phi3_ref.forward(weights, config, xp.asarray(token_ids[:, :1014]), cache=cache)
        for index in range(1015, 1031 if "sliding_window" not in model else 1210):
            step, cache = causal_lm.next_logits(token_ids, index, cache)
            logits.append(phi3_ref.to_numpy(step).copy())
        results.append(np.stack(logits))
        assert hasattr(cache, "graph") == (backend == "cupy")
    exact, ours, again = results
    assert ref.relative_error(ours, exact) <= ref.TOLERANCE[dtype]
    np.testing.assert_array_equal(ours, again)


@settings(max_examples=ref.examples(5))
@given(st.integers(0, 99))
def test_greedy_generation_is_equal_token_for_token(seed):
    """Prompts of two lengths; float32."""
    rng, generated = np.random.default_rng(seed), []
    mask = np.arange(80) < np.array([[20], [33]])
    ids = rng.integers(0, 200, mask.shape) * mask
    for backend in ("numpy", "cupy"):
        model = phi3_ref.Phi3CausalLM(phi3_ref.Phi3Backbone(
            200, 3, 384, 512, 4, 2, seed=seed, backend=backend))
        model.compile(sampler="greedy")
        generated.append(model.generate({"token_ids": ids, "padding_mask": mask},
                                        stop_token_ids=None)["token_ids"])
    assert np.array_equal(*generated)


def test_embedded_preset_answers_alike():
    prompts = [f"<|user|>\n{text}<|end|>\n<|assistant|>\n" for text in ("12 + 34", "sort 3 1 2")]
    answers = []
    for backend in ("numpy", "cupy"):
        model = phi3_ref.Phi3CausalLM.from_preset("phi3_tiny_puzzles_en", backend=backend)
        model.compile(sampler="greedy")
        answers.append(model.generate(prompts, max_length=64))
    assert answers[0] == answers[1]
