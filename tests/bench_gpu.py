"""Times the kernels, a training step, the whole model: `python tests/bench_gpu.py [--quick]`.

Prints one markdown table: what was measured, our rate, the hardware's limit (measured first, in the
same run), the same work done by others, and the target. Every result, ours and theirs, is compared
with `phi3_ref.textbook_attention` or the formula in float32 before it is timed, on outputs that
held NaN: a wrong one prints WRONG and the exit code is 1. Without a GPU it is 2.

How it is timed. The calls of one measurement take turns on several sets of random inputs, together
much larger than the GPU's L2 cache, and are recorded as one CUDA graph, so that Python's time is
not in it. CUDA events stand before and after each replay; the median of many counts, divided by the
number of calls. The whole model is timed as its users call it, through `generate`, and a training
step through `train_on_batch`. A measurement has fewer repeats the longer it takes, and the fewest
once seven minutes have passed, so that the table is whole within ten; a row that fails says why.
"""

import argparse
import datetime
import functools
import importlib
import importlib.metadata
import math
import pathlib
import statistics
import subprocess
import sys
import time
import types
import warnings

import ml_dtypes
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import kernels_cuda
import phi3_ref


def optional(name):
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


cupy, torch, transformers = map(optional, ("cupy", "torch", "transformers"))
DEVICE = "cuda"  # PyTorch's

BF16 = np.dtype(ml_dtypes.bfloat16)
TOLERANCE = 2e-2  # bfloat16's in design and tests: max|result - exact| / max|exact|
MODEL_TOLERANCE = 0.1  # 32 layers of roundings to 8 bits; a wrong layer gives about 1
HEADS = [(32, 32, 96), (32, 32, 128), (40, 10, 96), (40, 10, 128)]  # H, K, C
PHI3_MINI = dict(vocabulary_size=32064, num_layers=32, hidden_dim=3072, intermediate_dim=8192,
                 num_query_heads=32, num_key_value_heads=32, layer_norm_epsilon=1e-5)
TWO_LAYERS = dict(PHI3_MINI, num_layers=2)
SECONDS = [1.0, 420.0]  # for the repeats of one measurement, if there is time; until there is none
failures = []


# What there is to do. By hand: 1024 queries see 1024 x 1025 / 2 = 524,800 keys; x 4 C = 384 x 32
# heads = 6,448,742,400 operations. 4096 keys and values of 32 x 96, and query and result, in 2
# bytes: 2 x 2 x (4096 x 3072 + 3072) = 50,343,936. RMSNorm [8192, 3072]: 2 x 2 x 25,165,824 +
# 6,144 = 100,669,440; its derivative reads x and a gradient, writes one: 2 x 3 x 25,165,824, and
# scale in 2 bytes, its gradient in 4: + 6 x 3072 = 151,013,376 (partial sums are not counted: our
# own). A product of 8 x 3072 with 9216 x 3072: 2 x (28,311,552 + 8 x 12,288) =
# 56,819,712. A layer of Phi-3-mini: 9216 x 3072 + 3072 x 3072 + 3 x 8192 x 3072 =
# 113,246,208 weights, 32 of them 3,623,878,656; an embedding 32064 x 3072 = 98,500,608; norms 65 x
# 3072 = 199,680. A decoding step reads all but one embedding: 2 x 3,722,578,944 = 7,445,157,888
# bytes (cached keys are not counted). Prefill of 3968: 2 x 3,623,878,656 x 3968 + 2 x 98,500,608 +
# 32 x 96,761,806,848 = 31,855,675,834,368 operations. A training step of two layers and 4,096
# tokens: forward 2 x 4096 x (226,492,416 + 98,500,608) + 2 x 103,104,380,928 = 2,868,551,614,464
# operations; backward twice the products, and 2 x 257,760,952,320 in attention. AdamW changes
# 226,492,416 + 2 x 98,500,608 + 15,360 = 423,508,992 weights: read in 2 bytes, as are written, and
# gradient and means in 4 each, of which the means are written: x 24 = 10,164,215,808 bytes.

def attention_operations(S, H, C):
    return S * (S + 1) // 2 * 4 * C * H


def attention_backward_operations(S, H, C):
    return S * (S + 1) // 2 * 10 * C * H  # five products: what must be done, by whatever kernel


def decode_bytes(T, H, K, C):
    return 2 * 2 * (T * K * C + H * C)


def rms_norm_bytes(rows, D):
    return 2 * 2 * rows * D + 2 * D


def rms_norm_backward_bytes(rows, D):
    return 2 * 3 * rows * D + (2 + 4) * D


def linear_bytes(rows, size, out):
    return 2 * (out * size + rows * (size + out))


def model_parameters(vocabulary_size, num_layers, hidden_dim, intermediate_dim, **_):
    """Returns the weights of the layers' matrices (K is H), of one embedding, and of all norms."""
    D, F = hidden_dim, intermediate_dim
    return num_layers * (4 * D + 3 * F) * D, vocabulary_size * D, (2 * num_layers + 1) * D


def decode_step_bytes():
    return 2 * sum(model_parameters(**PHI3_MINI))


def prefill_operations(S):
    matrices, embedding, _ = model_parameters(**PHI3_MINI)
    return 2 * (matrices * S + embedding) + 32 * attention_operations(S, 32, 96)


def training_operations(S, sizes):
    """Returns the forward's and the backward's, of one sequence."""
    matrices, embedding, _ = model_parameters(**sizes)
    products, (L, H) = 2 * S * (matrices + embedding), (sizes["num_layers"],
                                                        sizes["num_query_heads"])
    C = sizes["hidden_dim"] // H
    return (products + L * attention_operations(S, H, C),
            2 * products + L * attention_backward_operations(S, H, C))


def adam_bytes(sizes):
    matrices, embedding, norms = model_parameters(**sizes)
    return (2 + 2 + 4 + 4 * 4) * (matrices + 2 * embedding + norms)


# Inputs and checks --------------------------------------------------------------------------------

def has_torch():
    return torch is not None and torch.cuda.is_available()


def absent():
    return "absent" if torch is None else "absent (this torch has no CUDA)"


def random_array(*shape):
    return cupy.random.standard_normal(shape, dtype=np.float32).astype(BF16)


def input_sets(make, nbytes):
    """Returns inputs made so often that they exceed four times the L2 cache, and at least twice."""
    cache = cupy.cuda.Device().attributes["L2CacheSize"]
    return [make() for _ in range(max(2, math.ceil(4 * cache / nbytes)))]


def to_torch(array):
    """Returns the same memory as a tensor; bfloat16 crosses as int16."""
    return torch.from_dlpack(array.view(np.int16)).view(torch.bfloat16)


def on_host(result):
    """Returns CuPy's or PyTorch's result, or each of several, as a NumPy array in float32."""
    if isinstance(result, tuple):
        return tuple(map(on_host, result))
    if cupy is not None and isinstance(result, cupy.ndarray):
        return result.get().astype(np.float32)
    return result.float().cpu().numpy()


def error_of(result, exact):
    """Returns max|result - exact| / max|exact|; NaN gives infinity."""
    error = np.abs(result - exact).max() / np.abs(exact).max()
    return float(error) if np.isfinite(error) else math.inf


def attention_error(inputs, result):
    """Compares the first and the last 64 queries of the first and last group of heads."""
    (_, S, H, _), (T, K) = inputs[0].shape, inputs[1].shape[1:3]
    worst, G = 0.0 if np.isfinite(result).all() else math.inf, H // K
    for k in {0, K - 1}:
        for start in {0, max(0, S - 64)}:
            stop, heads = min(start + 64, S), slice(k * G, (k + 1) * G)
            query = on_host(inputs[0][:, start:stop, heads])
            key, value = (on_host(x[:, :T - S + stop, k:k + 1]) for x in inputs[1:])
            exact = phi3_ref.textbook_attention(query, key, value)
            worst = max(worst, error_of(result[:, start:stop, heads], exact))
    return worst


def attention_backward_error(inputs, results):
    """Compares the first and last group of heads: of the last 64 queries and keys, which only they
    see, everything; of the first 64 queries theirs; and up to 1,024 positions everything.
    """
    (_, S, H, _), K = inputs[1].shape, inputs[2].shape[2]
    worst, G = 0.0 if all(np.isfinite(x).all() for x in results) else math.inf, H // K
    for k in {0, K - 1}:
        heads, one = slice(k * G, (k + 1) * G), slice(k, k + 1)
        for start, stop, keys in ((0, min(64, S), 0), (max(0, S - 64), S, max(0, S - 64)),
                                  *([(0, S, 0)] if S <= 1024 else [])):
            rows = [on_host(x[:, start:stop, heads]) for x in inputs[:2]]
            exact = phi3_ref.attention_backward(
                *rows, *(on_host(x[:, :stop, one]) for x in inputs[2:4]))
            worst = max(worst, error_of(results[0][:, start:stop, heads], exact[0]))
            if stop == S:
                worst = max(worst, *(error_of(ours[:, keys:, one], theirs[:, keys:]) for
                                     ours, theirs in zip(results[1:], exact[1:], strict=True)))
    return worst


def linear_error(inputs, result):
    """Compares the first and the last 64 outputs."""
    x, weight = inputs
    worst = 0.0 if np.isfinite(result).all() else math.inf
    for part in (slice(64), slice(-64, None)):
        exact = on_host(x) @ on_host(weight[part]).T
        worst = max(worst, error_of(result[:, part], exact))
    return worst


def rms_norm_error(inputs, result):
    x, scale = map(on_host, inputs)
    exact = phi3_ref.rms_norm(x[::97], scale, 1e-5)
    return error_of(result[::97], exact) if np.isfinite(result).all() else math.inf


def rms_norm_backward_error(inputs, result):
    """Compares every 97th row of x's gradient, and all of scale's."""
    gradient, x, scale = map(on_host, inputs)
    d_x, d_scale = phi3_ref.textbook_rms_norm_backward(gradient, x, scale, 1e-5)
    if not all(np.isfinite(part).all() for part in result):
        return math.inf
    return max(error_of(result[0][::97], d_x[::97]), error_of(result[1], d_scale))


def on_poison(function, inputs):
    """Runs twice: the second result gets the memory of the first, filled with NaN in between."""
    result = function(*inputs)
    for array in result if isinstance(result, tuple) else (result,):
        if isinstance(array, cupy.ndarray):
            array.view(np.int16).fill(-1)
        else:
            array.view(torch.int16).fill_(-1)
        del array
    del result
    return function(*inputs)


# Timing -------------------------------------------------------------------------------------------

started = time.perf_counter()


def seconds_of(run, repeats):
    """Returns the seconds of each `run`, between two events on CuPy's current stream."""
    pairs = []
    for _ in range(repeats):
        pairs.append((cupy.cuda.Event(), cupy.cuda.Event()))
        pairs[-1][0].record()
        run()
        pairs[-1][1].record()
    pairs[-1][1].synchronize()
    return [cupy.cuda.get_elapsed_time(*pair) / 1e3 for pair in pairs]


def median_seconds(run, most=50):
    """Returns the median seconds of `run`, of so many repeats as there is time for."""
    longest = max(1e-6, min(seconds_of(run, 3)[1:]))  # the first one compiles
    there_is_time = time.perf_counter() - started < SECONDS[1]
    repeats = int(SECONDS[0] / longest) if there_is_time else 0
    return statistics.median(seconds_of(run, min(most, max(3, repeats))))


def time_ours(calls):
    """Returns the seconds of one of the calls, recorded in turn into one CUDA graph."""
    graph = kernels_cuda.capture(lambda: [call() for call in calls])  # each has its own output
    return median_seconds(graph) / len(calls)


def time_torch(calls):
    """The same, of calls of PyTorch."""
    with torch.cuda.stream(torch.cuda.Stream()):
        kept = [call() for call in calls]
    torch.cuda.synchronize()
    del kept
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
        return median_seconds(graph.replay) / len(kept)


def time_plain(calls):
    """The same, one by one: for calls so long that launching them takes no time."""
    return median_seconds(lambda: [call() for call in calls], 20) / len(calls)


def rate(name, amount, timer, function, sets, error, given=None):
    """Checks `function` on the first and last input set, then times it.

    `given` are the sets as CuPy's arrays where `sets` are PyTorch's. Returns `amount` per second,
    or in words what is wrong.
    """
    try:
        for i in (0, -1):
            found = error((given or sets)[i], on_host(on_poison(function, sets[i])))
            if not found <= TOLERANCE:
                return wrong(name, found)
        return amount / timer([functools.partial(function, *inputs) for inputs in sets])
    except Exception as problem:  # one that fails does not hide the others
        return failed(name, problem)


def wrong(name, found):
    failures.append(f"WRONG {name}: error {found:.1e}")
    return f"WRONG (error {found:.1e})"


def failed(name, problem):
    """Says what was raised, in a few words; only our own failure is one of this script."""
    words = " ".join(f"{type(problem).__name__} {problem}".split()).replace("|", "/")
    if not name.startswith("peer"):
        failures.append(f"FAILED {name}: {words}")
    return f"failed: {words[:60]}"


# The table ----------------------------------------------------------------------------------------

def row(what, unit, scale, ours, limit=None, peers=None, share=None, beat=None):
    """Prints one measurement; `ours`, `limit`, `peers` are rates per second, or say what is wrong.

    `share` of the limit is to be reached; `beat` is (peer, how many times as fast to be).
    """
    def text(x):
        return x if isinstance(x, str) else f"{x / scale:.4g}"

    def ratio(x, y):
        return None if isinstance(x, str) or isinstance(y, str) or y is None else x / y

    def against(theirs):
        return text(theirs) + (f" ({ratio(ours, theirs):.2f} x)" if ratio(ours, theirs) else "")

    peers = peers or {}
    wanted, reached = [], []
    if share:
        wanted.append(f"{share:.0%} of the limit")
        reached.append(ratio(ours, limit) and ratio(ours, limit) >= share)
    if beat:
        wanted.append(f"{beat[1]:g} x {beat[0]}")
        times = ratio(ours, peers[beat[0]])
        reached.append(times and times >= beat[1])
    words = ["not measured" if x is None else "yes" if x else "NO" for x in reached]
    of_limit = ratio(ours, limit)
    print("|", " | ".join([
        what, unit, text(ours), "" if limit is None else text(limit),
        f"{of_limit:.1%}" if of_limit else "",
        ", ".join(f"{name}: {against(theirs)}" for name, theirs in peers.items()) or "",
        ", ".join(wanted), ", ".join(words)]), "|", flush=True)
    cupy.get_default_memory_pool().free_all_blocks()
    if has_torch():
        torch.cuda.empty_cache()


def bench_limits():
    """Measures what the hardware can do; returns bytes per second and operations per second."""
    buffers = [random_array(1 << 29) for _ in range(4)]

    def copy(source, target):
        target.data.copy_from_device_async(source.data, source.nbytes)
        return target

    pairs = [(buffers[0], buffers[1]), (buffers[2], buffers[3])]
    copied = rate("copy", 2 * buffers[0].nbytes, time_plain, copy, pairs,
                  lambda inputs, result: error_of(result[::999], on_host(inputs[0][::999])))
    row("device-to-device copy, 1 GiB, read and written", "GB/s", 1e9, copied)
    del buffers, pairs
    N = 8192
    sets = [(random_array(N, N), random_array(N, N)) for _ in range(2)]

    def error(inputs, result):
        return error_of(result[:32], on_host(inputs[0][:32]) @ on_host(inputs[1]))

    products = {"CuPy": rate("matmul", 2 * N**3, time_plain, cupy.matmul, sets, error)}
    if has_torch():
        theirs = [tuple(map(to_torch, inputs)) for inputs in sets]
        products["torch"] = rate("peer", 2 * N**3, time_plain, torch.matmul, theirs, error, sets)
    found = [x for x in products.values() if not isinstance(x, str)]
    ours = products.pop("CuPy")
    row(f"bf16 matrix product, {N} x {N} x {N}, CuPy (cuBLAS)", "TFLOP/s", 1e12, ours, None,
        products)
    return copied, max(found, default=ours)


def bench_rms_norm(copied):
    rows, D = 8192, 3072
    amount = rms_norm_bytes(rows, D)
    sets = input_sets(lambda: (random_array(rows, D), random_array(D)), amount)
    ours = rate("RMSNorm", amount, time_ours, lambda *inputs: kernels_cuda.rms_norm(*inputs, 1e-5),
                sets, rms_norm_error)
    peers = {"torch rms_norm": absent()}
    if has_torch():
        peers["torch rms_norm"] = rate(
            "peer", amount, time_torch,
            lambda x, scale: torch.nn.functional.rms_norm(x, (D,), scale, 1e-5),
            [tuple(map(to_torch, inputs)) for inputs in sets], rms_norm_error, sets)
    row(f"RMSNorm [{rows}, {D}]", "GB/s", 1e9, ours, copied, peers, share=0.9)


def torch_rms_norm_backward(amount, sets):
    """Returns the rate of the operator behind the derivative of PyTorch's rms_norm."""
    try:
        operators, D = torch.ops.aten, sets[0][1].shape[-1]
        theirs = [tuple(map(to_torch, inputs)) for inputs in sets]
        theirs = [(*inputs, operators._fused_rms_norm(inputs[1], [D], inputs[2], 1e-5)[1])
                  for inputs in theirs]  # with 1 / r, which the forward keeps
        return rate("peer", amount, time_torch, lambda gradient, x, scale, inverse: (
            operators._fused_rms_norm_backward(gradient, x, [D], inverse, scale, [True, True])),
            theirs, rms_norm_backward_error, sets)
    except Exception as problem:
        return failed("peer", problem)


def bench_rms_norm_backward(rows, D, copied):
    amount = rms_norm_backward_bytes(rows, D)
    sets = input_sets(lambda: (random_array(rows, D), random_array(rows, D), random_array(D)),
                      amount)
    what = f"RMSNorm backward [{rows}, {D}]"
    ours = rate(what, amount, time_ours,
                lambda *inputs: kernels_cuda.rms_norm_backward(*inputs, 1e-5), sets,
                rms_norm_backward_error)
    theirs = torch_rms_norm_backward(amount, sets) if has_torch() else absent()
    row(what, "GB/s", 1e9, ours, copied, {"torch rms_norm": theirs})


def bench_linear(rows, size, out, copied):
    """One of decoding's products, [rows, size] x [out, size]."""
    amount = linear_bytes(rows, size, out)
    sets = input_sets(lambda: (random_array(rows, size), random_array(out, size)), amount)
    what = f"product of {rows} x {size:,} with {out:,} x {size:,}"
    ours = rate(what, amount, time_ours, kernels_cuda.linear, sets, linear_error)
    peers = {"torch linear": absent()}
    if has_torch():
        peers["torch linear"] = rate(
            "peer", amount, time_torch, torch.nn.functional.linear,
            [tuple(map(to_torch, inputs)) for inputs in sets], linear_error, sets)
    row(what, "GB/s", 1e9, ours, copied, peers)


def torch_attention(name, amount, backend, sets):
    """Returns the rate of one of PyTorch's attention backends on the same inputs."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    (_, S, H, _), (_, T, K, _) = sets[0][0].shape, sets[0][1].shape

    def call(query, key, value, **kwargs):
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return torch.nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=S == T, **kwargs).transpose(1, 2)

    theirs = [tuple(to_torch(x).transpose(1, 2) for x in inputs) for inputs in sets]  # [B, H, S, C]
    if H == K:
        return rate(name, amount, time_torch, call, theirs, attention_error, sets)
    found = rate(name, amount, time_torch, functools.partial(call, enable_gqa=True), theirs,
                 attention_error, sets)
    if isinstance(found, str) and found.startswith("failed"):  # it wants the keys of every head
        theirs = [(q, *(x.repeat_interleave(H // K, 1) for x in kv)) for q, *kv in theirs]
        found = rate(name, amount, time_torch, call, theirs, attention_error, sets)
    return found


def bench_attention(S, T, H, K, C, limit):
    """Prefill where S is T, decode where it is 1."""
    def make():
        return random_array(1, S, H, C), random_array(1, T, K, C), random_array(1, T, K, C)

    nbytes = decode_bytes(T, H, K, C) + 2 * 2 * (S - 1) * H * C
    amount = nbytes if S == 1 else attention_operations(S, H, C)
    sets = input_sets(make, nbytes)
    what = f"{'decode' if S == 1 else 'prefill'} attention, {T:,} keys, H/K {H}/{K}, C {C}"
    ours = rate(what, amount, time_ours, kernels_cuda.attention, sets, attention_error)
    peers = {name: torch_attention(f"peer {name}", amount, backend, sets)
             if has_torch() else absent()
             for name, backend in (("flash", "FLASH_ATTENTION"), ("cuDNN", "CUDNN_ATTENTION"))}
    if S == 1:
        row(what, "GB/s", 1e9, ours, limit, peers, share=0.85)
    else:
        row(what, "TFLOP/s", 1e12, ours, limit, peers, beat=("flash", 1) if S >= 4096 else None)


def torch_attention_backward(name, amount, backend, sets):
    """Returns the rate of the derivative of one of PyTorch's attention backends."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    H, K = sets[0][1].shape[2], sets[0][2].shape[2]

    def forward(inputs, repeat, **kwargs):
        gradient, *leaves = (to_torch(x).transpose(1, 2) for x in inputs)  # [B, H, S, C]
        for leaf in leaves:
            leaf.requires_grad_()
        key, value = (x.repeat_interleave(repeat, 1) if repeat > 1 else x for x in leaves[1:])
        with sdpa_kernel(getattr(SDPBackend, backend)):
            context = torch.nn.functional.scaled_dot_product_attention(
                leaves[0], key, value, is_causal=True, **kwargs)
        return gradient, context, *leaves

    def call(gradient, context, *leaves):
        found = torch.autograd.grad(context, leaves, gradient, retain_graph=True)
        return tuple(x.transpose(1, 2) for x in found)

    found = None
    for repeat, kwargs in [(1, {})] if H == K else [(1, {"enable_gqa": True}), (H // K, {})]:
        try:
            theirs = [forward(inputs, repeat, **kwargs) for inputs in sets]
        except Exception as problem:  # it wants the keys of every head
            found = failed(name, problem)
            continue
        found = rate(name, amount, time_plain, call, theirs, attention_backward_error, sets)
        if not isinstance(found, str):
            break
    return found


def bench_attention_backward(S, H, K, C, limit):
    def make():
        return tuple(random_array(1, S, heads, C) for heads in (H, H, K, K))

    amount = attention_backward_operations(S, H, C)
    sets = input_sets(make, 2 * 2 * S * C * (H + K))
    what = f"attention backward, {S:,} keys, H/K {H}/{K}, C {C}"

    def call(gradient, query, key, value, context, log_sum_exp):
        return kernels_cuda.attention_backward(
            gradient, query, key, value, context=context, log_sum_exp=log_sum_exp)

    try:  # the derivative takes what the forward has left, as PyTorch's does
        ours = []
        for inputs in sets:
            log_sum_exp = cupy.empty((1, H, S), np.float32)
            context = kernels_cuda.attention(*inputs[1:], log_sum_exp=log_sum_exp)
            ours.append((*inputs, context, log_sum_exp))
        ours = rate(what, amount, time_ours, call, ours, attention_backward_error)
    except Exception as problem:
        ours = failed(what, problem)
    peers = {name: torch_attention_backward(f"peer {name} backward", amount, backend, sets)
             if has_torch() else absent()
             for name, backend in (("flash", "FLASH_ATTENTION"), ("cuDNN", "CUDNN_ATTENTION"))}
    row(what, "TFLOP/s", 1e12, ours, limit, peers, beat=("flash", 0.9))


# The whole model ----------------------------------------------------------------------------------

def our_model(sizes):
    """Returns a model with random weights drawn on the GPU."""
    def draw(name, shape):
        if len(shape) == 1:
            return cupy.ones(shape, BF16)
        stddev = 0.01 if name.endswith("embedding") else 0.02
        return (cupy.random.standard_normal(shape, dtype=np.float32) * stddev).astype(BF16)

    weights = phi3_ref.Phi3Config(**sizes).build_weights(draw)
    model = phi3_ref.Phi3CausalLM(phi3_ref.Phi3Backbone(
        **sizes, dtype="bfloat16", backend="cupy", weights=weights))
    model.compile(sampler="greedy")
    return model


def exact_logits(ours, token_ids):
    """Returns the last position's logits from the same weights, in float32, step by step."""
    bfloat16 = dict(phi3_ref.named_weights(ours.backbone.weights))
    weights = ours.backbone.config.build_weights(
        lambda name, shape: bfloat16[name].astype(np.float32))
    exact = phi3_ref.Phi3Backbone(
        **PHI3_MINI, dtype="float32", backend="cupy", fused=False, weights=weights)
    return on_host(phi3_ref.Phi3CausalLM(exact)({"token_ids": token_ids})[:, -1])


def their_model(ours, sizes):
    """Returns transformers' model with the same weights."""
    c = sizes
    config = transformers.Phi3Config(
        vocab_size=c["vocabulary_size"], hidden_size=c["hidden_dim"],
        intermediate_size=c["intermediate_dim"], num_hidden_layers=c["num_layers"],
        num_attention_heads=c["num_query_heads"], num_key_value_heads=c["num_key_value_heads"],
        rms_norm_eps=c["layer_norm_epsilon"], pad_token_id=0)
    with torch.device(DEVICE):
        model = transformers.Phi3ForCausalLM(config).eval().to(torch.bfloat16)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        backbone = ours.backbone
        for name, array in phi3_ref.huggingface_tensors(backbone.weights, backbone.config):
            parameters.pop(name).copy_(to_torch(array))
    assert not parameters, f"not set: {list(parameters)}"
    model.generation_config.eos_token_id = None  # it must not stop early
    return model


def bench_model(copied, multiplied):
    prompt, short, new = 3968, 128, 128
    rng = np.random.default_rng()
    tokens = rng.integers(3, 32000, (1, prompt + 1))
    names = "transformers eager", "transformers compiled, static cache"
    peers = {name: "absent" if transformers is None else absent() for name in names}
    prefill, decode = dict(peers), dict(peers)

    def seconds(generate):
        """Returns the seconds of the prompt, and of one token after a short prompt."""
        first, one, many = (median_seconds(functools.partial(generate, *lengths), 9)
                            for lengths in ((prompt, 1), (short, 1), (short, 1 + new)))
        return first, (many - one) / new

    def measure(name, model_logits, generate):
        """Returns the rates of prefill and decode, in tokens per second, or what is wrong."""
        try:
            found = error_of(model_logits(), exact)
            if not found <= MODEL_TOLERANCE:
                return [wrong(name, found)] * 2
            print(f"{name}: error of the logits {found:.1e}", file=sys.stderr)
            first, each = seconds(generate)
            return prompt / first, 1 / each
        except Exception as problem:
            return [failed(name, problem)] * 2

    model = our_model(PHI3_MINI)
    exact = exact_logits(model, tokens[:, :64])
    cupy.get_default_memory_pool().free_all_blocks()

    def our_generate(length, count):
        mask = np.arange(length + count)[None] < length
        ids = np.where(mask, np.resize(tokens, mask.shape), 0)
        model.generate({"token_ids": ids, "padding_mask": mask}, stop_token_ids=None)

    ours = measure("the model",
                   lambda: on_host(model({"token_ids": tokens[:, :64]})[:, -1]), our_generate)
    if has_torch() and transformers is not None:
        ids = torch.from_numpy(tokens).to(DEVICE)
        their = functools.cache(lambda: their_model(model, PHI3_MINI))

        def their_generate(length, count, **kwargs):
            with torch.inference_mode():
                their().generate(ids[:, :length], attention_mask=torch.ones_like(ids[:, :length]),
                                 max_new_tokens=count, do_sample=False, pad_token_id=0, **kwargs)
            torch.cuda.synchronize()

        def their_logits():
            with torch.inference_mode():
                return on_host(their()(ids[:, :64], use_cache=False).logits[:, -1])

        for name, kwargs in zip(names, ({}, {"cache_implementation": "static"}), strict=True):
            prefill[name], decode[name] = measure(
                f"peer {name}", their_logits, functools.partial(their_generate, **kwargs))
    share = prefill_operations(prompt) / prompt / multiplied
    row(f"Phi-3-mini bf16, prefill of {prompt:,} tokens", "tokens/s", 1, ours[0], 1 / share,
        prefill)
    row(f"Phi-3-mini bf16, decode after {short} tokens, {new} tokens", "tokens/s", 1, ours[1],
        copied / decode_step_bytes(), decode, share=0.6, beat=(names[0], 5))


# A training step ----------------------------------------------------------------------------------

def our_training(model):
    """Returns what is timed, as functions of token ids and labels, NumPy's, and `update`."""
    weights, config = model.backbone.weights, model.backbone.config
    model.compile(phi3_ref.AdamW(1e-6))

    def forward(ids, labels):
        hidden = phi3_ref.forward(weights, config, ids, tapes=[])
        return phi3_ref.cross_entropy(phi3_ref.reverse_embedding(weights, config, hidden), labels)

    def learn(ids, labels):
        loss, _, gradients = phi3_ref.loss_and_gradients(weights, config, ids, labels)
        return loss, gradients

    def update(learned):
        model.optimizer.update(*(phi3_ref.unfused(tree, config) for tree in (weights, learned[1])))

    return types.SimpleNamespace(
        to_device=cupy.asarray, forward=forward, learn=learn, update=update,
        gradients=lambda learned: phi3_ref.huggingface_tensors(learned[1], config),
        step=lambda ids, labels: model.train_on_batch({"token_ids": ids}, labels))


def their_training(model):
    """The same of transformers' model."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    optimizer = torch.optim.AdamW(model.parameters(), 1e-6, fused=True)

    def forward(ids, labels):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            logits = model(ids, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())

    def learn(ids, labels):
        optimizer.zero_grad()
        loss = forward(ids, labels)
        loss.backward()
        return loss.detach(), None

    def step(ids, labels):
        loss, _ = learn(to_device(ids), to_device(labels))
        optimizer.step()
        return loss.item()

    def to_device(array):
        return torch.from_numpy(array).to(DEVICE)

    return types.SimpleNamespace(
        to_device=to_device, forward=forward, learn=learn, update=lambda learned: optimizer.step(),
        gradients=lambda learned: [(name, p.grad) for name, p in model.named_parameters()],
        step=step)


def exact_training(ours, sizes, ids, labels):
    """Returns loss and gradients of the same weights, in float32, by NumPy."""
    bfloat16 = dict(phi3_ref.named_weights(ours.backbone.weights))
    weights = ours.backbone.config.build_weights(lambda name, shape: on_host(bfloat16[name]))
    exact = phi3_ref.Phi3CausalLM(phi3_ref.Phi3Backbone(**sizes, weights=weights))
    loss, gradients = exact.gradients({"token_ids": ids}, labels)
    return {"loss": loss, **dict(phi3_ref.huggingface_tensors(gradients, exact.backbone.config))}


def training_error(training, ids, labels, exact):
    """Returns the largest error of the loss and of any weight's gradient."""
    learned = training.learn(*map(training.to_device, (ids, labels)))
    errors = [abs(float(learned[0]) - exact["loss"]) / exact["loss"]]
    errors += [error_of(on_host(array), exact[name])
               for name, array in training.gradients(learned)]
    assert len(errors) == len(exact)
    return max(errors)


def time_training(name, make, ids, labels, exact):
    """Checks 64 tokens, then times all; returns the seconds of a step, forward, backward, AdamW."""
    try:
        training = make()
        found = training_error(training, ids[:, :64], labels[:, :64], exact)
        if not found <= MODEL_TOLERANCE:
            return [wrong(name, found)] * 4
        print(f"{name}: error of loss and gradients {found:.1e}", file=sys.stderr)
        batch = [training.to_device(array) for array in (ids, labels)]
        forward = median_seconds(lambda: training.forward(*batch), 20)
        both = median_seconds(lambda: training.learn(*batch), 20)
        update = median_seconds(functools.partial(training.update, training.learn(*batch)), 20)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # bfloat16 weights have 8 bits
            step = median_seconds(lambda: training.step(ids, labels), 20)
        return [step, forward, both - forward, update]
    except Exception as problem:
        return [failed(name, problem)] * 4


def bench_training(copied, multiplied, S=4096, sizes=TWO_LAYERS):
    """A step as users take it, and its parts; the peer keeps AdamW's means in 16 bits."""
    model = our_model(sizes)
    ids, labels = np.random.default_rng(0).integers(3, sizes["vocabulary_size"], (2, 1, S))
    exact = exact_training(model, sizes, ids[:, :64], labels[:, :64])
    what = f"{sizes['num_layers']} layers of Phi-3-mini, bf16, {S:,} tokens"
    peer, theirs = "transformers, flash", ["absent" if transformers is None else absent()] * 4
    if has_torch() and transformers is not None:  # first, while the weights are those of `exact`
        theirs = time_training(f"peer {peer}", lambda: their_training(their_model(model, sizes)),
                               ids, labels, exact)
        torch.cuda.empty_cache()
    ours = time_training("training", lambda: our_training(model), ids, labels, exact)
    forward, backward = training_operations(S, sizes)
    least = forward / multiplied, backward / multiplied, adam_bytes(sizes) / copied
    for i, (name, limit) in enumerate(zip(("step", "forward", "backward", "AdamW"),
                                          (sum(least), *least), strict=True)):
        rates = [x[i] if isinstance(x[i], str) else S / x[i] for x in (ours, theirs)]
        row(f"training {name}, {what}", "tokens/s", 1, rates[0], S / limit, {peer: rates[1]},
            beat=(peer, 1) if name == "step" else None)


# The command line ---------------------------------------------------------------------------------

def why_no_gpu():
    """Returns why nothing can be measured here, or None."""
    if cupy is None:
        return "CuPy is not installed"
    try:
        return None if cupy.cuda.runtime.getDeviceCount() else "the driver reports none"
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return str(error)


def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def print_machine():
    try:
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], check=True,
            capture_output=True, text=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    runtime = cupy.cuda.runtime
    print(f"GPU: {runtime.getDeviceProperties(0)['name'].decode()}, driver {driver}, CUDA "
          f"{runtime.driverGetVersion()} (driver), {runtime.runtimeGetVersion()} (runtime)")
    cupy_name = next((name for name in ("cupy-cuda13x", "cupy-cuda12x", "cupy")
                      if version(name) != "absent"), "cupy")
    print(", ".join(f"{name} {version(name)}" for name in (
        cupy_name, "numpy", "torch", "transformers", "triton", "flash-attn")))
    print(datetime.datetime.now().astimezone().isoformat(timespec="minutes"), end="\n\n")


def attempt(bench, *arguments):
    """Returns what `bench` does; if it raises, prints a row that says so, and the rest goes on."""
    try:
        return bench(*arguments)
    except Exception as problem:
        row(" ".join([bench.__name__, *map(str, arguments)]), "", 1,
            failed(bench.__name__, problem))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true",
                        help="leave out the whole model and 128k keys, and repeat less")
    quick = parser.parse_args(arguments).quick
    SECONDS[0] = 0.2 if quick else 1.0
    reason = why_no_gpu()
    if reason:
        print(f"no CUDA device: {reason}")
        return 2
    print_machine()
    print("| measurement | unit | ours | limit | ours / limit | peers (ours / theirs) | target "
          "| reached |\n|---|---|---|---|---|---|---|---|", flush=True)
    copied, multiplied = attempt(bench_limits) or ("not measured", "not measured")
    attempt(bench_rms_norm, copied)
    for D in (3072, 5120):  # Phi-3-mini's and -medium's
        attempt(bench_rms_norm_backward, 8192, D, copied)
    for H, K, C in HEADS:
        for S in (1024, 4096, 16384):
            attempt(bench_attention, S, S, H, K, C, multiplied)
    for H, K, C in HEADS:
        for T in (4096, 16384, 32768) + (131072,) * (not quick):
            attempt(bench_attention, 1, T, H, K, C, copied)
    for H, K, C in HEADS:
        for S in (4096, 16384):
            attempt(bench_attention_backward, S, H, K, C, multiplied)
    attempt(bench_training, copied, multiplied)
    for rows in (1, 8):  # Phi-3-mini's: query, key and value; gate and intermediate; and so on
        for size, out in ((3072, 9216), (3072, 3072), (3072, 16384), (8192, 3072), (3072, 32064)):
            attempt(bench_linear, rows, size, out, copied)
    if not quick:
        attempt(bench_model, copied, multiplied)
    for failure in failures:
        print(f"\n{failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
