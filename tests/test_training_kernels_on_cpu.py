"""What a training step has on the GPU beside attention and norms, executed on the CPU; mutants.

SiLU and its derivative, the embedding's derivative, AdamW's step, and the product of a weight's
gradient, which is cuBLAS's: its arguments are carried out as NVIDIA documents them.
"""

import math

import cuda_on_cpu
import ml_dtypes
import numpy as np
import pytest
import references as ref
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels_cuda
import phi3_ref

DTYPES = ["float32", "float16", "bfloat16"]
TYPES = kernels_cuda.TYPES
DIMS = [1, 7, 8, 31, 32, 64, 96, 255, 256, 257, 1024, 2047, 2048, 2056, 4104]


def half_a_step(exact, dtype):
    """The error of one rounding to `dtype`."""
    return np.maximum(ref.EPSILON[dtype] / 2 * abs(exact),
                      float(ml_dtypes.finfo(ref.NUMPY_DTYPE[dtype]).smallest_subnormal) / 2)


def part_of(array, layout, N):
    """The first columns of rows that are longer, rows that begin anywhere, or the array."""
    D = array.shape[-1] - 2 * N
    return {"wider": array[..., N : N + D], "unaligned": array[..., 1 : D + 1],
            "dense": array[..., :D].copy()}[layout]


# SiLU ---------------------------------------------------------------------------------------------

def assert_silu(found, x, gradient):
    """Both results are PyTorch's in float64, but for one rounding and the arithmetic in float32."""
    wide_x = torch.from_numpy(x.astype("float64")).requires_grad_()
    y = torch.nn.functional.silu(wide_x)
    d_y = gradient.astype("float64")
    d_x, = torch.autograd.grad(y, wide_x, torch.from_numpy(d_y))
    # 1 + x (1 - s) may nearly cancel, and 1 - s does: their errors are relative to the terms.
    # (Where e^-x overflows, the result of up to 2.7e-37 is 0.)
    for ours, exact, terms in zip(found, (y.detach().numpy(), d_x.numpy()), (
            abs(y.detach().numpy()), abs(d_y) * (1 + abs(x.astype("float64")))), strict=True):
        assert ours.dtype == x.dtype and ours.shape == x.shape and ours.flags.c_contiguous
        error = abs(ours.astype("float64") - exact)
        assert (error <= 1.001 * half_a_step(exact, x.dtype.name) + 3e-7 * terms + 3e-37).all()


def check_silu(x, gradient, **options):
    """Returns the names of the kernels that ran."""
    before = x.tobytes(), gradient.tobytes()
    with cuda_on_cpu.emulate(**options) as launches:
        found = kernels_cuda.silu(x), kernels_cuda.silu_backward(gradient, x)
    assert before == (x.tobytes(), gradient.tobytes())
    assert_silu(found, x, gradient)
    return [name for name, *_ in launches]


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu(dtype):
    """Any shape and stride; vectors of 16 bytes where they fit."""
    item = ref.NUMPY_DTYPE[dtype]
    N = 16 // item(0).itemsize
    layouts = st.sampled_from(["dense", "wider", "unaligned"])

    @settings(max_examples=ref.examples(25))
    @given(st.lists(st.integers(1, 3), max_size=3), st.sampled_from(DIMS), layouts, layouts,
           st.sampled_from([1.0, 30.0]), st.integers(0, 99))
    def all_equal(leading, D, layout, other, size, seed):
        rng = np.random.default_rng(seed)
        x, gradient = (rng.normal(size=(2, *leading, D + 2 * N)) * size).astype(item)
        names = check_silu(part_of(x, layout, N), part_of(gradient, other, N))
        if layout != "unaligned":
            assert names[0] == f"silu<{TYPES[dtype]}, {1 if D % N else N}>"
        if "unaligned" not in (layout, other):
            assert names[1] == f"silu_backward<{TYPES[dtype]}, {1 if D % N else N}>"

    all_equal()


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_at_its_limits(dtype):
    """Where e^-x is infinite, and where it is 0; infinity stays, and NaN."""
    x = np.array([-3e4, -200, -89, 89, 200, 3e4, math.inf, math.nan], ref.NUMPY_DTYPE[dtype])
    with cuda_on_cpu.emulate():
        y, d_x = kernels_cuda.silu(x), kernels_cuda.silu_backward(np.ones_like(x), x)
    y, d_x, x = (array.astype("float32") for array in (y, d_x, x))
    np.testing.assert_array_equal(y, [0, 0, 0, *x[3:]])
    np.testing.assert_array_equal(d_x[:6], [0, 0, 0, 1, 1, 1])


# The embedding, backward --------------------------------------------------------------------------

def assert_embedding(table, gradient, ids, V):
    """The table is NumPy's `add.at` in float64, but for sums in float32."""
    rows = gradient.reshape(-1, gradient.shape[-1]).astype("float64")
    exact, terms = np.zeros((2, V, rows.shape[-1]))
    np.add.at(exact, ids.reshape(-1), rows)
    np.add.at(terms, ids.reshape(-1), abs(rows))
    assert table.dtype == "float32" and table.shape == exact.shape
    assert (abs(table - exact) <= 1e-6 * terms).all()


def check_embedding(gradient, ids, V, **options):
    """Returns the names of the kernels that ran, and the table."""
    with cuda_on_cpu.emulate(**options) as launches:
        table = kernels_cuda.token_embedding_backward(gradient, ids, V)
    assert_embedding(table, gradient, ids, V)
    return [name for name, *_ in launches], table


@pytest.mark.parametrize("dtype", DTYPES)
def test_token_embedding_backward(dtype):
    """Ids that come once, often, always or never, in any order; any width and stride."""
    item = ref.NUMPY_DTYPE[dtype]
    N = 16 // item(0).itemsize

    @settings(max_examples=ref.examples(25))
    @given(st.sampled_from([(1, 1), (1, 9), (2, 33), (1, 70), (3, 45), (300,)]),
           st.sampled_from([1, 2, 9, 500]), st.sampled_from([1, 8, 32, 33, 256, 264, 520]),
           st.sampled_from(["dense", "wider", "unaligned"]), st.sampled_from(["int64", "int32"]),
           st.integers(0, 99))
    def all_equal(shape, V, D, layout, ints, seed):
        rng = np.random.default_rng(seed)
        gradient = part_of(rng.normal(size=(*shape, D + 2 * N)).astype(item), layout, N)
        ids = rng.integers(0, V, shape).astype(ints)
        names, _ = check_embedding(gradient, ids, V)
        if layout != "unaligned":
            assert names == [f"token_embedding_backward<{TYPES[dtype]}, {1 if D % N else N}>"]

    all_equal()


def test_token_embedding_backward_in_any_order():
    """Blocks and threads from last to first give the same bits."""
    rng = np.random.default_rng(0)
    gradient, ids = rng.normal(size=(2, 100, 40)).astype("float16"), rng.integers(0, 5, (2, 100))
    (_, one), (_, other) = (check_embedding(gradient, ids, 6, reverse=order)
                            for order in (False, True))
    assert one.tobytes() == other.tobytes()


def test_token_embedding_backward_with_nothing_to_do():
    with cuda_on_cpu.emulate() as launches:
        table = kernels_cuda.token_embedding_backward(
            np.ones((0, 3, 8), "float32"), np.ones((0, 3), int), 5)
    np.testing.assert_array_equal(table, np.zeros((5, 8), "float32"), strict=True)
    assert not launches


# Cross entropy ------------------------------------------------------------------------------------

def assert_cross_entropy(found, logits, labels, weight):
    """Loss and gradient are PyTorch's in float64, but for one rounding, and sums in float32."""
    V, N = logits.shape[-1], labels.size
    wide = torch.from_numpy(logits.astype("float64").reshape(N, V)).requires_grad_()
    rows = torch.nn.functional.cross_entropy(wide, torch.from_numpy(
        labels.astype("int64").reshape(-1)), reduction="none")
    share = (np.ones(N) if weight is None else weight.reshape(-1)) / N
    exact, = torch.autograd.grad((rows * torch.from_numpy(share)).sum(), wide)
    exact, rows, (loss, gradient) = exact.numpy(), rows.detach().numpy(), found
    assert loss.shape == () and loss.dtype == "float32"
    largest = abs(logits.astype("float64")).max()
    assert abs(loss - share @ rows) <= 1e-6 * share @ (rows + largest)
    assert gradient.dtype == logits.dtype and gradient.shape == logits.shape
    assert gradient.flags.c_contiguous
    error = abs(gradient.astype("float64").reshape(N, V) - exact)
    own = np.zeros_like(exact)
    own[np.arange(N), labels.reshape(-1)] = 1  # p - 1 may nearly cancel
    terms = abs(exact) + own * share[:, None]
    # A difference of logits has a rounding, of which e^x makes a relative error.
    assert (error <= 1.001 * half_a_step(exact, logits.dtype.name)
            + (3e-7 + 6e-8 * 2 * largest) * terms + 1e-37).all()


def check_cross_entropy(logits, labels, weight, **options):
    """Returns the names of the kernels that ran."""
    before = logits.tobytes()
    with cuda_on_cpu.emulate(**options) as launches:
        found = kernels_cuda.cross_entropy(logits, labels, weight)
    assert before == logits.tobytes()
    assert_cross_entropy(found, logits, labels, weight)
    return [name for name, *_ in launches]


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy(dtype):
    """Vocabularies around what a block holds, any stride, logits that rise or fall or are equal."""
    item = ref.NUMPY_DTYPE[dtype]
    N = 16 // item(0).itemsize

    @settings(max_examples=ref.examples(20))
    @given(st.sampled_from([(1, 1), (2, 3), (5,)]), st.sampled_from([*DIMS, 16392]),
           st.sampled_from(["dense", "wider", "unaligned"]), st.sampled_from([0.0, 1.0, 10.0]),
           st.sampled_from(["none", "rising", "falling"]), st.booleans(), st.integers(0, 99))
    def all_equal(shape, V, layout, size, order, weighted, seed):
        rng = np.random.default_rng(seed)
        logits = rng.normal(size=(*shape, V + 2 * N)) * size
        logits = {"none": logits, "rising": np.sort(logits),
                  "falling": np.sort(logits)[..., ::-1]}[order].astype(item)
        logits, labels = part_of(logits, layout, N), rng.integers(0, V, shape)
        weight = rng.uniform(0, 2, shape) * (rng.random(shape) < 0.7) if weighted else None
        names = check_cross_entropy(logits, labels, weight)
        if layout != "unaligned":
            assert names == [f"cross_entropy<{TYPES[dtype]}, {1 if V % N else N}>"]

    all_equal()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_cross_entropy_that_is_not_finite(bad):
    """Neither is the loss; where a logit is minus infinity, its probability is zero."""
    logits, labels = np.ones((1, 3, 40), "float32"), np.zeros((1, 3), int)
    logits[0, 1, 7] = bad
    with cuda_on_cpu.emulate():
        loss, _ = kernels_cuda.cross_entropy(logits, labels)
        logits[0, 1, 7] = -math.inf
        found, gradient = kernels_cuda.cross_entropy(logits, labels)
    assert not np.isfinite(loss) and gradient[0, 1, 7] == 0
    assert found == pytest.approx((2 * math.log(40) + math.log(39)) / 3, rel=1e-6)


# A sum of squares ---------------------------------------------------------------------------------

def check_squares(x, **options):
    """Compares with the sum in float64; returns what was launched."""
    with cuda_on_cpu.emulate(**options) as launches:
        total = kernels_cuda.sum_of_squares(x)
    exact = (x.astype("float64") ** 2).sum()
    assert total.shape == () and total.dtype == "float32" and abs(total - exact) <= 1e-6 * exact
    return launches


@pytest.mark.parametrize("shape", [
    (1,), (3,), (2047,), (2048,), (17, 128), (3, 40, 100), (9, 2052), (50, 1000)])
def test_sum_of_squares(shape):
    """Fewer elements than threads, more than are under way at once; vectors where they fit."""
    x = np.random.default_rng(0).normal(size=shape).astype("float32")
    (name, grid, _), (last, one, _) = check_squares(x, multiprocessors=1)
    assert name == f"sum_of<{1 if x.size % 4 else 4}, true>" and last == "sum_of<1, false>"
    assert grid == (min(4, -(-x.size // (2048 if x.size % 4 == 0 else 512))),) and one == (1,)
    check_squares(x.reshape(-1)[1:] if x.size > 1 else x, reverse=True)


@pytest.mark.parametrize("bad", [math.inf, math.nan, 3e19])
def test_a_sum_of_squares_that_is_not_finite(bad):
    """One element is enough, also one whose square overflows."""
    x = np.ones(3000, "float32")
    for i in (0, 1499, 2999):
        x[i] = bad
        with cuda_on_cpu.emulate():
            assert not np.isfinite(kernels_cuda.sum_of_squares(x))
        x[i] = 1
    with cuda_on_cpu.emulate() as launches:
        assert kernels_cuda.sum_of_squares(x[:0]) == 0 and not launches


# AdamW --------------------------------------------------------------------------------------------

def check_adam(weights, gradients, settings, monkeypatch, steps=3, **options):
    """Compares `AdamW`, with the kernel, with `AdamW` in float64, of which Keras is the judge."""
    ours, exact = (phi3_ref.AdamW(**settings) for _ in range(2))
    wide = {name: weight.astype("float64") for name, weight in weights.items()}
    with cuda_on_cpu.emulate(**options) as launches, monkeypatch.context() as patched:
        for step in range(steps):
            given = {name: g * np.float32(1 + step) for name, g in gradients.items()}
            before = {name: w.astype("float64") for name, w in weights.items()}
            exact.update(wide, {name: g.astype("float64") for name, g in given.items()})
            patched.setattr(phi3_ref, "kernels_for", lambda x: kernels_cuda)
            ours.update(weights, given)
            patched.undo()
            for name, w in weights.items():
                for found, right, size in zip(ours.moments[name], exact.moments[name], (
                        (1 + step) * abs(gradients[name]).max(),
                        ((1 + step) * gradients[name].astype("float64")).max() ** 2 + 1e-30),
                        strict=True):
                    assert found.dtype == np.float32
                    assert (abs(found - right) <= 1e-6 * (abs(right) + size)).all()
                moved = abs(wide[name] - before[name])
                error = abs(w.astype("float64") - wide[name])
                assert (error <= 1.001 * half_a_step(wide[name], w.dtype.name) + 2e-7 * abs(
                    before[name]) + 2e-5 * moved).all()
                wide[name][...] = w  # a rounding is not to be judged twice
    return [name for name, *_ in launches]


@pytest.mark.parametrize("settings", [
    dict(), dict(weight_decay=None, beta_1=0.5, beta_2=0.7), dict(clipnorm=0.3, epsilon=1e-3),
    dict(global_clipnorm=0.5, learning_rate=0.1)], ids=["AdamW", "Adam", "clipnorm", "global"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_adam_step(dtype, settings, monkeypatch):
    """Arrays of any size, some of them rows of longer ones; what is beside them stays."""
    rng = np.random.default_rng(0)
    item = ref.NUMPY_DTYPE[dtype]
    fused, d_fused = rng.normal(size=(31, 24)).astype(item), rng.normal(size=(31, 24))
    weights = {"query": fused[:8], "key": fused[8:15], "vector": rng.normal(size=13).astype(item),
               "many": rng.normal(size=(300, 8)).astype(item)}
    gradients = {"query": d_fused[:8], "key": d_fused[8:15], "vector": rng.normal(size=13),
                 "many": rng.normal(size=(300, 8)) * 1e-4}
    gradients = {name: g.astype("float32") for name, g in gradients.items()}
    beside = fused[15:].tobytes()
    names = check_adam(weights, gradients, settings, monkeypatch)
    assert beside == fused[15:].tobytes()
    assert {*names} == {f"adam_step<{TYPES[dtype]}, {N}>" for N in (1, 4)}


# A weight's gradient ------------------------------------------------------------------------------

@pytest.mark.parametrize("n, M, N", [(1, 1, 1), (5, 3, 7), (7, 1, 5), (4, 6, 1), (64, 40, 24)])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_transposed_matmul(dtype, n, M, N):
    """In float32, not rounded to 16 bits; any strides; nothing outside of the arrays is touched."""
    rng = np.random.default_rng(n)
    x, y = (rng.normal(size=(n, size + 3)).astype(ref.NUMPY_DTYPE[dtype]) for size in (M, N))
    for left, right in ((x[:, :M].copy(), y[:, :N].copy()), (x[:, 1 : M + 1], y[:, :N])):
        with cuda_on_cpu.emulate():
            product = kernels_cuda.transposed_matmul(left, right)
        wide = [array.astype("float64") for array in (left, right)]
        assert product.dtype == "float32" and product.shape == (M, N)
        terms = abs(wide[0]).T @ abs(wide[1])
        assert (abs(product - wide[0].T @ wide[1]) <= 1e-6 * terms).all()


def test_transposed_matmul_of_nothing():
    with cuda_on_cpu.emulate():
        product = kernels_cuda.transposed_matmul(*np.zeros((2, 0, 3), "float16"))
    np.testing.assert_array_equal(product, np.zeros((3, 3), "float32"), strict=True)


@pytest.mark.parametrize("mistake", [
    lambda a: a[1:3] + (a[3], a[5], a[4]) + a[6:],  # the operations and sizes of one another
    lambda a: a[:4] + (a[4], a[3], a[5]) + a[6:],
    lambda a: (a[0], 1, 0) + a[3:],
    lambda a: a[:9] + (a[9] - 1,) + a[10:],
    lambda a: a[:12] + (a[12] - 1,) + a[13:],
    lambda a: a[:12] + (a[12] + 1,) + a[13:],
    lambda a: a[:16] + (a[16] + 1,) + a[17:],
    lambda a: a[:7] + a[10:13] + a[7:10] + a[13:],
    lambda a: a[:5] + (a[5] + 1,) + a[6:],
    lambda a: a[:6] + (a[13],) + a[7:],  # alpha is 0
    lambda a: a[:13] + (a[6],) + a[14:],  # beta is 1
    lambda a: a[:15] + (2,) + a[16:],
    lambda a: a[:8] + (14,) + a[9:]], ids=range(13))
def test_the_arguments_of_cublas_are_judged(mistake, monkeypatch):
    """With one argument wrong, the product is, or an array is left."""
    x, y = (np.random.default_rng(0).normal(size=(6, size)).astype("float16") for size in (4, 5))
    right = cuda_on_cpu.CUBLAS.gemmEx
    monkeypatch.setattr(cuda_on_cpu.CUBLAS, "gemmEx", lambda *a: right(*mistake(a)))
    try:
        with cuda_on_cpu.emulate():
            product = kernels_cuda.transposed_matmul(x, y)
    except (cuda_on_cpu.KernelError, TypeError):
        return
    assert not np.allclose(product, x.astype("float32").T @ y.astype("float32"), atol=1e-3)


# What the launchers refuse ------------------------------------------------------------------------

F32, F16 = np.ones((2, 8), "float32"), np.ones((2, 8), "float16")


@pytest.mark.parametrize("name, arguments, error, words", [
    ("silu", ([1.0],), TypeError, "x.*ndarray.*list"),
    ("silu", (np.ones((2, 8)),), ValueError, "x.*float64"),
    ("silu", (np.ones((2, 16), "float32")[:, ::2],), ValueError, "x.*contiguous"),
    ("silu_backward", (F16, F32), ValueError, "gradient.*float32.*float16"),
    ("silu_backward", (F32[:1], F32), ValueError, r"gradient.*\(2, 8\).*\(1, 8\)"),
    ("token_embedding_backward", (F32, np.ones((1, 2), int), 3), ValueError,
     r"token_ids.*\(2,\).*\(1, 2\)"),
    ("token_embedding_backward", (F32, np.ones(2), 3), ValueError, "token_ids.*integers.*float64"),
    ("token_embedding_backward", (np.ones((2, 8)), np.ones(2, int), 3), ValueError, "float64"),
    ("cross_entropy", (F32, np.ones((1, 2), int)), ValueError, r"labels.*\(2,\).*\(1, 2\)"),
    ("cross_entropy", (F32, np.ones(2)), ValueError, "labels.*integers.*float64"),
    ("cross_entropy", (F32, np.ones(2, int), np.ones(3)), ValueError, r"weight.*\(2,\).*\(3,\)"),
    ("cross_entropy", (F32[:0], np.ones(0, int)), ValueError, "labels.*at least one"),
    ("sum_of_squares", (F16,), ValueError, "x.*float32.*float16"),
    ("sum_of_squares", (np.ones((8, 3), "float32")[:, :2],), ValueError, "x.*contiguous"),
    ("adam_step", ([1.0],), TypeError, "weight.*ndarray.*list"),
    ("adam_step", (F32, F16, F32, F32), ValueError, "gradient.*float32.*float16"),
    ("adam_step", (F16, F32, F16, F32), ValueError, "m.*float32.*float16"),
    ("adam_step", (F16, F32, F32, F32[:1]), ValueError, r"v.*\(2, 8\).*\(1, 8\)"),
    ("adam_step", (np.ones((8, 2), "float32").T,) * 4, ValueError, "weight.*contiguous"),
    ("transposed_matmul", (F32, F32), ValueError, "x.*16 bits.*float32"),
    ("transposed_matmul", (F16, F16[:1]), ValueError, r"y.*\(2, 8\).*\(1, 8\)")])
def test_what_is_refused(name, arguments, error, words):
    """Each wrong argument is named, with what was expected and found."""
    if name == "adam_step":
        arguments = (*arguments, *[F32] * (4 - len(arguments)), 1, 1, 1, 0.9, 0.9, 1e-7)
    with cuda_on_cpu.emulate() as launches, pytest.raises(error, match=f"(?s){words}"):
        getattr(kernels_cuda, name)(*arguments)
    assert not launches


# Mutants: what the checks above would find --------------------------------------------------------

def is_caught(source_name, edit):
    """Says how the checks refuse a kernel's edited source, or None where they do not."""
    source = getattr(kernels_cuda, source_name)
    changed = edit(source)
    assert changed != source, "the mutation changes nothing: has the kernel been rewritten?"
    options = dict(edit=lambda text: changed if text == source else text)
    rng = np.random.default_rng(0)
    try:
        if source_name == "SILU":
            x, gradient = rng.normal(size=(2, 3, 4112)).astype("float16")
            for D in (4096, 4104, 270):
                check_silu(x[:, :D], gradient[:, :D].copy(), **options)
        if source_name == "TOKEN_EMBEDDING_BACKWARD":
            gradient, ids = rng.normal(size=(120, 280)).astype("float16"), np.arange(120)
            ids[30:] = rng.integers(30, 33, 90)
            for D in (264, 256, 37):
                check_embedding(gradient[:, :D], rng.permutation(ids), 130, **options)
        if source_name == "CROSS_ENTROPY":
            logits = np.sort(rng.normal(size=(3, 20_008)) * 3).astype("float16")
            logits[1, 511 * 8] = 300  # the last warp's: e^300 is infinite
            for V in (20_000, 517, 20):
                part, weight = logits[:, ::-1][:, -V:] if V == 517 else logits[:, :V], rng.random(3)
                check_cross_entropy(part.copy() if V == 517 else part,
                                    np.array([V - 1, 0, V // 2]), weight, **options)
        if source_name == "SUM_OF_SQUARES":
            x = rng.normal(size=101_000).astype("float32")
            for size in (101_000, 8192, 4097, 5):
                check_squares(x[:size], multiprocessors=1, **options)
        if source_name == "ADAM_STEP":
            weights = {name: rng.normal(size=size).astype("float16")
                       for name, size in (("a", 2048), ("b", 301), ("c", 12))}
            gradients = {name: rng.normal(size=w.size).astype("float32")
                         for name, w in weights.items()}
            with pytest.MonkeyPatch.context() as monkeypatch:
                check_adam(weights, gradients, dict(clipnorm=0.3, weight_decay=0.9, epsilon=0.1,
                                                    learning_rate=0.1), monkeypatch, **options)
    except (cuda_on_cpu.KernelError, AssertionError) as error:
        assert "error:" not in str(error), error  # it must compile
        return str(error)
    return None


MUTANTS = {
    "SILU": {
        "the wrong sign": ("(1.0f + expf(-wide)));\n", "(1.0f + expf(wide)));\n"),
        "the sigmoid alone": ("wide / (1.0f", "1.0f / (1.0f"),
        "the derivative of s forgotten": ("(1.0f + wide * (1.0f - s))", "1.0f"),
        "s for 1 - s": ("wide * (1.0f - s)", "wide * s"),
        "the stride of x in the result": ("y + row * D", "y + row * x_row"),
        "the stride of x for the gradient": ("row * gradient_row", "row * x_row"),
        "past the end of a row": ("if (i >= D / N) return;\n    reinterpret",
                                  "if (i > D / N) return;\n    reinterpret"),
        "the second block's part": ("blockIdx.y * 256", "blockIdx.y * 255")},
    "TOKEN_EMBEDDING_BACKWARD": {
        "every position begins a run": ("first > 0 && ids", "false && ids"),
        "the first row alone": ("more = same[HELD - 1]", "more = false"),
        "a warp left out": ("w < WARPS; w++", "w < WARPS - 1; w++"),
        "positions left out": ("i += WARPS * HELD", "i += WARPS * HELD + 1"),
        "positions twice": ("i += WARPS * HELD", "i += WARPS * (HELD - 1)"),
        "past the last position": ("j < count && ids", "ids"),
        "another id's rows": ("j < count && ids[order[j]] == id", "j < count"),
        "not in the order": ("gradient + order[j]", "gradient + j"),
        "the position's row": ("table[id * D", "table[first * D"),
        "the stride of the table for the gradient": ("order[j] * gradient_row", "order[j] * D"),
        "columns past the last": ("warp > 0 || column >= D", "warp > 0"),
        "columns past the last read": ("if (same[h] && column < D)\n                held",
                                       "if (same[h])\n                held"),
        "lanes change places": ("sums[w][n][lane]", "sums[w][n][lane ^ 1]"),
        "the second block's columns": ("(blockIdx.y * 32 + lane) * N", "lane * N"),
        "no barrier": ("__syncthreads();", ";")},
    "CROSS_ENTROPY": {
        "the total does not shrink": ("total *= expf(old - peak);", ""),
        "the warps are not brought to one peak": ("total * expf(own - peak)", "total"),
        "the first round alone": ("i += threads * HELD", "i += count"),
        "a round twice": ("i += threads * HELD", "i += threads * (HELD - 1)"),
        "past the end": ("if (i + h * threads >= count) continue;", ""),
        "half of a warp": ("sum_over_lanes<1, 32>", "sum_over_lanes<1, 16>"),
        "half of a warp's peak": ("highest_over_lanes<1, 32>", "highest_over_lanes<1, 16>"),
        "a warp's peak left out": ("w < warps; w++) peak", "w < warps - 1; w++) peak"),
        "a warp's total left out": ("w < warps; w++) total", "w < warps - 1; w++) total"),
        "the label is not seen": ("i * N + n == label ? p - 1.0f : p", "p"),
        "the next label": ("i * N + n == label", "i * N + n == label + 1"),
        "the share is forgotten": ("p - 1.0f : p) * part", "p - 1.0f : p)"),
        "the loss has no share": ("part * (logf", "(logf"),
        "the loss without the peak": ("+ label]) - peak))", "+ label])))"),
        "the loss without its label": ("logf(total) - (to_float", "logf(total) - 0 * (to_float"),
        "another row's label": ("labels[row]", "labels[0]"),
        "another row's share": ("share[row]", "share[0]"),
        "the stride of logits in the gradient": ("gradient + row * V", "gradient + row * logits_r"
                                                 "ow"),
        "the last part of the gradient": ("for (int i = threadIdx.x; i < count; i += threads) {",
                                          "for (int i = threadIdx.x; i + threads < count; i += "
                                          "threads) {"),
        "no barrier for the peak": ("__syncthreads();\n    for (int w = 0; w < warps; w++) peak",
                                    "for (int w = 0; w < warps; w++) peak"),
        "no barrier for the total": ("__syncthreads();\n    total = 0", "total = 0")},
    "SUM_OF_SQUARES": {
        "not the square": ("SQUARE ? held", "!SQUARE ? held"),
        "the square of the partial sums": ("SQUARE ? held", "true ? held"),
        "past the end": ("if (i + h * step < count)", "if (i + h * step <= count)"),
        "read past the end": ("if (i + h * step < count)", ""),
        "the first round alone": ("i += step * HELD", "i += count"),
        "a round left out": ("i += step * HELD", "i += step * (HELD + 1)"),
        "a round twice": ("i += step * HELD", "i += step * (HELD - 1)"),
        "half of a warp": ("sum_over_lanes<1, 32>", "sum_over_lanes<1, 16>"),
        "a warp left out": ("warp < 16", "warp < 15"),
        "another block's place": ("partial[blockIdx.x]", "partial[0]"),
        "no barrier": ("__syncthreads();", ";")},
    "ADAM_STEP": {
        "the gradient is not cut": (" * shrink", ""),
        "the means' rates change places": ("long long count, float decay,\n    float rate, float "
                                           "new_1, float new_2", "long long count, float decay,\n"
                                           "    float rate, float new_2, float new_1"),
        "no mean": ("new_1 * (g - mean.element[n])", "new_1 * g"),
        "v of g": ("(g * g - square", "(g - square"),
        "epsilon within the root": ("(sqrtf(square.element[n]) + epsilon)",
                                    "sqrtf(square.element[n] + epsilon)"),
        "no decay": ("* decay\n", "\n"),
        "the step's sign": ("- rate * mean", "+ rate * mean"),
        "m is not written": ("    *means = mean;\n", ""),
        "v is not written": ("    *squares = square;\n", ""),
        "past the end": ("if (i >= count)", "if (i > count)"),
        "the second block's part": ("blockIdx.x * 256LL", "blockIdx.x * 255LL")}}


@pytest.mark.parametrize("source_name, mutant", [
    (name, mutant) for name, mutants in MUTANTS.items() for mutant in mutants])
def test_mutants_are_caught(source_name, mutant):
    """A kernel with one mistake fails: by its result, or by what it does to memory."""
    old, new = MUTANTS[source_name][mutant]
    assert is_caught(source_name, lambda source: source.replace(old, new))


@pytest.mark.parametrize("source_name", MUTANTS)
def test_the_kernels_themselves_are_not_caught(source_name):
    assert is_caught(source_name, lambda source: source + "\n") is None
