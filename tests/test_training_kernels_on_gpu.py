"""A training step on a GPU: what test_training_kernels_on_cpu.py asserts, and whole steps."""

import contextlib

import numpy as np
import pytest
import references as ref
import test_training_kernels_on_cpu as on_cpu
from test_kernels_on_gpu import to_gpu

import kernels_cuda
import phi3_ref

try:
    import cupy
    import cupyx
except ImportError:
    cupy = None

pytestmark = pytest.mark.gpu
DTYPES = on_cpu.DTYPES
# Phi-3-mini's shape in small: every kernel for 16 bits in whole vectors, several blocks of each.
MODEL = dict(vocabulary_size=1000, num_layers=2, hidden_dim=384, intermediate_dim=1024,
             num_query_heads=4, num_key_value_heads=2, seed=0)


@contextlib.contextmanager
def poisoned(*shapes):
    """Fills memory of these float32 shapes with NaN, and lets go of it for who comes next."""
    arrays = [cupy.full(shape, np.nan, np.float32) for shape in shapes]
    del arrays
    yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 3, 129), (1000, 2056), (4096, 8192)])
def test_silu(dtype, shape):
    """Parts of longer rows, as the gate is, and rows that begin anywhere."""
    rng = np.random.default_rng(0)
    x, gradient = (rng.normal(size=(2, *shape[:-1], 2 * shape[-1] + 1)) * 3).astype(
        ref.NUMPY_DTYPE[dtype])
    for start in (0, shape[-1]):
        parts = x[..., start : start + shape[-1]], gradient[..., : shape[-1]].copy()
        on_gpu, d_y = map(to_gpu, parts)
        with poisoned(shape):
            found = kernels_cuda.silu(on_gpu), kernels_cuda.silu_backward(d_y, on_gpu)
        on_cpu.assert_silu([array.get() for array in found], *parts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ids", ["all one", "all different", "some often"])
@pytest.mark.parametrize("shape, V", [
    ((1, 1, 8), 3), ((3, 700, 264), 5000), ((1, 4096, 3072), 32064), ((2, 300, 97), 700)])
def test_token_embedding_backward(dtype, ids, shape, V):
    """The same bits every time, too."""
    rng = np.random.default_rng(0)
    gradient = rng.normal(size=shape).astype(ref.NUMPY_DTYPE[dtype])
    ids = {"all one": np.zeros(shape[:2], int), "some often": rng.zipf(1.3, shape[:2]) % V,
           "all different": np.arange(gradient[..., 0].size).reshape(shape[:2]) % V}[ids]
    arrays = to_gpu(gradient), cupy.asarray(ids)
    first, second = (kernels_cuda.token_embedding_backward(*arrays, V).get() for _ in range(2))
    on_cpu.assert_embedding(first, gradient, ids, V)
    assert first.tobytes() == second.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 5), (2, 300, 1003), (1, 1000, 32064), (1, 2, 200_064)])
def test_cross_entropy(dtype, shape):
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=shape) * 3).astype(ref.NUMPY_DTYPE[dtype])
    labels, weight = rng.integers(0, shape[-1], shape[:2]), rng.random(shape[:2])
    arrays = to_gpu(logits), cupy.asarray(labels), cupy.asarray(weight)
    with poisoned(shape):
        found = [array.get() for array in kernels_cuda.cross_entropy(*arrays)]
    on_cpu.assert_cross_entropy(found, logits, labels, weight)
    for one, other in zip(found, kernels_cuda.cross_entropy(*arrays), strict=True):
        assert one.tobytes() == other.get().tobytes()


@pytest.mark.parametrize("n, M, N", [(1, 1, 1), (5, 3, 7), (300, 97, 1), (4096, 3072, 1024)])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_products_of_learning(dtype, n, M, N):
    """That of x is rounded once, the weight's not at all; the same bits every time."""
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(n, size)).astype(ref.NUMPY_DTYPE[dtype]) for size in (M, N))
    weight = rng.normal(size=(N, M)).astype(x.dtype)
    wide_x, wide_y, wide_weight = (array.astype("float64") for array in (x, y, weight))
    found = [phi3_ref.linear_backward(*map(cupy.asarray, (y, x, weight))) for _ in range(2)]
    (d_x, d_weight), again = ([array.get() for array in arrays] for arrays in found)
    assert d_x.dtype == x.dtype and d_weight.dtype == "float32"
    assert (abs(d_weight - wide_y.T @ wide_x) <= 3e-6 * (abs(wide_y).T @ abs(wide_x))).all()
    exact, terms = wide_y @ wide_weight, abs(wide_y) @ abs(wide_weight)
    error = abs(d_x.astype("float64") - exact)
    assert (error <= 1.001 * on_cpu.half_a_step(exact, dtype) + 3e-6 * terms).all()
    assert d_x.tobytes() == again[0].tobytes() and d_weight.tobytes() == again[1].tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clip", [None, 0.5])
def test_adam_step(dtype, clip):
    """Three steps, of vectors and of single elements, beside AdamW in float64 on the host."""
    rng, item = np.random.default_rng(0), ref.NUMPY_DTYPE[dtype]
    weights = {str(size): rng.normal(size=size).astype(item) for size in (1, 5, 4096, 3_000_001)}
    ours, exact = (phi3_ref.AdamW(clipnorm=clip, epsilon=1e-3) for _ in range(2))
    on_gpu = {name: cupy.asarray(w) for name, w in weights.items()}
    for _ in range(3):
        gradients = {name: rng.normal(size=w.size).astype("float32") for name, w in weights.items()}
        before = {name: w.get().astype("float64") for name, w in on_gpu.items()}
        wide = {name: w.copy() for name, w in before.items()}
        ours.update(on_gpu, {name: cupy.asarray(g) for name, g in gradients.items()})
        exact.update(wide, {name: g.astype("float64") for name, g in gradients.items()})
        for name, w in wide.items():
            error = abs(on_gpu[name].get().astype("float64") - w)
            moved = abs(w - before[name])
            assert (error <= 1.001 * on_cpu.half_a_step(w, dtype) + 2e-7 * abs(before[name])
                    + 2e-5 * moved).all()


@pytest.mark.parametrize("size", [1, 5, 4096, 1_000_001, 50_000_000])
def test_sum_of_squares(size):
    x = cupy.asarray(np.random.default_rng(0).normal(size=size).astype("float32"))
    first, second = (float(kernels_cuda.sum_of_squares(x)) for _ in range(2))
    assert first == second == pytest.approx(float((x.astype("float64") ** 2).sum()), rel=1e-6)


def batch_of(rng):
    ids, labels = rng.integers(0, 1000, (2, 3, 130))
    mask = np.arange(130) < np.array([[130], [57], [128]])
    return {"token_ids": ids * mask, "padding_mask": mask}, labels, mask * rng.random(mask.shape)


@pytest.mark.parametrize("dtype, tolerance", [
    ("float64", 1e-11), ("float32", 2e-5), ("bfloat16", 4e-2), ("mixed_bfloat16", 4e-2)])
@pytest.mark.filterwarnings("ignore:bfloat16 weights have 8 bits")
def test_training_steps(dtype, tolerance):
    """Losses, gradients and accuracy as on the host; the same bits when all is done again."""
    rng, logs, trees = np.random.default_rng(0), [], []
    batches = [batch_of(rng) for _ in range(3)]
    for backend in ("numpy", "cupy", "cupy"):
        causal_lm = phi3_ref.Phi3CausalLM(phi3_ref.Phi3Backbone(
            **MODEL, dtype=dtype, backend=backend))
        causal_lm.compile(phi3_ref.AdamW(1e-3, global_clipnorm=1.0))
        _, gradients = causal_lm.gradients(*batches[0])
        trees.append({name: phi3_ref.to_numpy(array).astype("float64") for name, array in
                      phi3_ref.named_weights(gradients)})
        logs.append([causal_lm.train_on_batch(*batch) for batch in batches])
    for name, exact in trees[0].items():
        assert abs(trees[1][name] - exact).max() <= tolerance * abs(exact).max(), name
        np.testing.assert_array_equal(trees[1][name], trees[2][name])
    np.testing.assert_allclose(logs[1], logs[0], rtol=max(1e-4, tolerance), atol=1e-2)
    assert logs[1] == logs[2]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed_bfloat16"])
@pytest.mark.filterwarnings("ignore:cupyx.allow_synchronize")
def test_a_step_waits_for_nothing(dtype):
    """From the batch on the device to the new weights, nothing is copied to the host."""
    backbone = phi3_ref.Phi3Backbone(**MODEL, dtype=dtype, backend="cupy", dropout=0.1)
    weights, config = backbone.weights, backbone.config
    optimizer = phi3_ref.AdamW(1e-3, clipnorm=1.0)
    inputs, labels, share = batch_of(np.random.default_rng(0))
    ids, mask, labels, share = map(cupy.asarray, (*inputs.values(), labels, share))
    for wait in (True, False):  # the first time, kernels are compiled
        with cupyx.allow_synchronize(wait):
            _, _, gradients = phi3_ref.loss_and_gradients(
                weights, config, ids, labels, share, mask, seed=(1, 2))
            optimizer.update(*(phi3_ref.unfused(tree, config) for tree in (weights, gradients)))
