"""The CuPy path of phi3_ref, whole, on a stand-in whose arrays refuse to mix with NumPy's.

Everything equals the NumPy backend bit for bit: the stand-in computes with NumPy, and the kernels'
own arithmetic is tested in test_kernels_on_cpu.py. Here the question is where arrays live.
"""

import collections
import functools
import json
import math
import pathlib
import random
import sys

import cupy_stand_in
import ml_dtypes
import numpy as np
import pytest
from references import random_case, randomized, tap_shapes

import kernels_cuda
import phi3_ref

PUZZLES = "phi3_tiny_puzzles_en"
POLICIES = list(phi3_ref.DTYPE_POLICIES)
TRAINABLE = [policy for policy in POLICIES if not policy.endswith("float16") or "bfloat" in policy]
SAMPLERS = {
    "greedy": lambda: phi3_ref.GreedySampler(),
    "random": lambda: phi3_ref.RandomSampler(seed=1),
    "top_k": lambda: phi3_ref.TopKSampler(k=4, temperature=1.5, seed=2),
    "top_p": lambda: phi3_ref.TopPSampler(p=0.9, k=20, seed=3),
    "beam": lambda: phi3_ref.BeamSampler(num_beams=3),
}
PLAIN = dict(vocabulary_size=64, num_layers=2, hidden_dim=24, intermediate_dim=40,
             num_query_heads=4, num_key_value_heads=2)
SU = dict(rope_scaling_type="su", pretraining_sequence_length=9, max_sequence_length=36,
          rope_scaling_short_factor=[1.0, 1.1, 1.3], rope_scaling_long_factor=[1.5, 4.0, 9.0])
MODELS = {"plain": {}, "su": SU, "window": dict(sliding_window=3),
          "tied": dict(tie_word_embeddings=True, partial_rotary_factor=0.67)}


def attention_on_host(query, key, value, padding_mask=None, sliding_window=None, log_sum_exp=None):
    """Attention; a query that is alone, as in decoding, with the keys that its mask leaves."""
    if padding_mask is not None and query.shape[1] == 1 and (padding_mask == padding_mask[0]).all():
        seen, = padding_mask[0].nonzero()
        if len(seen) and seen[-1] - seen[0] == len(seen) - 1:  # so that the bits are the host's
            key, value = (array[:, seen[0] : seen[-1] + 1] for array in (key, value))
            padding_mask = None
    return phi3_ref.attention(query, key, value, padding_mask, sliding_window,
                              log_sum_exp=log_sum_exp)


def attention_backward_on_host(*args):
    *args, _, log_sum_exp = args
    return phi3_ref.attention_backward(*args, tape={"log_sum_exp": log_sum_exp})


def adam_step_on_host(weight, gradient, m, v, factor, decay, rate, beta_1, beta_2, epsilon):
    """AdamW's formula, in place."""
    gradient = gradient * factor
    m += (1 - beta_1) * (gradient - m)
    v += (1 - beta_2) * (gradient * gradient - v)
    weight[...] = phi3_ref.upcast(weight) * decay - rate * m / (v**0.5 + epsilon)


ON_HOST = {"attention": attention_on_host, "attention_backward": attention_backward_on_host,
           "adam_step": adam_step_on_host,
           "transposed_matmul": lambda x, y: phi3_ref.upcast(x).T @ phi3_ref.upcast(y)}
# Kernels whose arrays are of more than one dtype: log-sum-exp, running means, labels' weights.
ALSO = {"attention": "float32", "attention_backward": "float32", "adam_step": "float32",
        "cross_entropy": "float64"}


def linear_as_on_the_device(x, weight, linear=phi3_ref.linear):
    """Dense layer; on the host the product that the device takes, for BLAS sums by shape."""
    rows = x.reshape(-1, x.shape[-1])
    if type(x) is not np.ndarray or (
            len(rows) <= kernels_cuda.LINEAR_ROWS[-1] and x.dtype != np.float64
            and weight.flags.c_contiguous):
        return linear(x, weight)
    return phi3_ref.matmul(rows, weight.T).reshape(*x.shape[:-1], len(weight))


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Put the stand-in in CuPy's place, checked functions in the kernels'; list their calls."""
    monkeypatch.setitem(sys.modules, "cupy", cupy_stand_in)
    monkeypatch.setattr(cupy_stand_in, "recorded", None)
    cupy_stand_in.transfers.clear()
    calls = []

    def stand_in_for(name):
        def kernel(*args, **kwargs):
            arrays = [a for a in (*args, *kwargs.values()) if hasattr(a, "dtype")]
            assert all(type(a) is cupy_stand_in.ndarray for a in arrays)
            dtypes = {a.dtype.name for a in arrays} - {"bool", "int32", "int64"}  # masks, ids
            dtypes -= {ALSO.get(name)} if len(dtypes) > 1 else set()
            assert len(dtypes) == 1 and dtypes <= {"float32", "float16", "bfloat16"}
            assert all(a.strides[-1] == a.itemsize for a in arrays if a.ndim and a.shape[-1] > 1)
            calls.append(name)
            on_host = ON_HOST.get(name) or getattr(phi3_ref, name)
            result = cupy_stand_in.on_device(on_host)(*args, **kwargs)
            if name == "token_embedding_backward":
                cupy_stand_in.allocated(result._host)  # if there is room
            return result

        return kernel

    for name in ("rms_norm", "rms_norm_backward", "attention", "attention_backward", "linear",
                 "silu", "silu_backward", "token_embedding_backward", "transposed_matmul",
                 "cross_entropy", "sum_of_squares", "adam_step"):
        monkeypatch.setattr(kernels_cuda, name, stand_in_for(name))
    monkeypatch.setattr(kernels_cuda, "array_module", cupy_stand_in)  # `capture`'s
    monkeypatch.setattr(phi3_ref, "linear", linear_as_on_the_device)
    return calls


def random_weights(backbone, seed=0):
    """Weights for `backbone` that tell tokens apart, in the order of `get_weights()`."""
    rng = np.random.default_rng(seed)
    weights = [randomized(w.shape, rng, w.shape[0]) for w in backbone.get_weights()]
    weights[0] = randomized(weights[0].shape, rng, 0.5)
    if backbone.tie_word_embeddings:
        weights[1] = weights[0].T
    return weights


def pair(**arguments):
    """Two backbones alike, on NumPy and on the stand-in."""
    ours, theirs = (phi3_ref.Phi3Backbone(**{**PLAIN, "seed": 7, **arguments}, backend=backend)
                    for backend in ("numpy", "cupy"))
    weights = random_weights(ours)
    for backbone in (ours, theirs):
        backbone.set_weights(weights)
    return ours, theirs


def assert_same(on_host, on_device):
    """The second is on the device, and the first's bits."""
    assert type(on_host) is np.ndarray
    assert type(on_device) is cupy_stand_in.ndarray
    assert on_host.dtype == on_device.dtype
    np.testing.assert_array_equal(on_host, on_device.get())


def batch(*lengths, room=14):
    """Prompts of these lengths, and room to continue."""
    token_ids = np.random.default_rng(4).integers(3, 60, (len(lengths), room))
    mask = np.arange(room) < np.array(lengths)[:, None]
    return {"token_ids": token_ids * mask, "padding_mask": mask}


# The stand-in can fail ----------------------------------------------------------------------------


@pytest.mark.parametrize("mix", [
    lambda x, h: x + h,
    lambda x, h: h + x,
    lambda x, h: h @ x,
    lambda x, h: x * np.array(2.0),
    lambda x, h: np.asarray(x),
    lambda x, h: np.concatenate([x, h]),
    lambda x, h: cupy_stand_in.concatenate([x, h]),
    lambda x, h: cupy_stand_in.exp(h),
    lambda x, h: x[np.array([0, 1])],
    lambda x, h: h[x.astype(int)],
    lambda x, h: x.__setitem__(0, h[0]),
    lambda x, h: h.__setitem__(0, x[0]),
    lambda x, h: x.__iadd__(h),
    lambda x, h: h.__iadd__(x),
    lambda x, h: np.isin(x, h),
], ids=range(15))
def test_the_stand_in_refuses_to_mix(mix):
    """Every way to bring a NumPy array and one of the device together is a TypeError."""
    host = np.ones((3, 3), np.float32)
    with pytest.raises(TypeError):
        mix(cupy_stand_in.asarray(host), host)


def test_the_stand_in_has_cupys_limits():
    """What CuPy 14 cannot do fails here, too; what it can, works."""
    x = cupy_stand_in.ones((2, 3, 3), ml_dtypes.bfloat16)
    with pytest.raises(TypeError):
        x @ x
    with pytest.raises(AttributeError):
        cupy_stand_in.where(True, x, 0)
    with pytest.raises(ValueError):
        cupy_stand_in.argsort(x, kind="quicksort")
    assert (x[0] @ x[0]).dtype == x.dtype
    y = np.float32(2) * (x[0] + 1) - ml_dtypes.bfloat16(1)
    assert type(y) is cupy_stand_in.ndarray
    cupy_stand_in.transfers.clear()
    assert bool((y == 3).all())
    assert cupy_stand_in.transfers == [1]
    assert math.isnan(cupy_stand_in.empty((), np.float32))


def test_the_stand_in_captures():
    """A graph computes when launched, with the numbers of its record, on what arrays then hold."""
    stream, x = cupy_stand_in.Stream(non_blocking=True), cupy_stand_in.zeros((2, 2), np.float32)
    number, row = 1.0, cupy_stand_in.full(1, 1)
    stream.begin_capture()
    y = x * 2 + number
    z = y[row].copy()
    x += 1
    for refused, error in ((x.get, RuntimeError), (lambda: bool(x[0, 0]), RuntimeError),
                           (lambda: cupy_stand_in.asarray([1.0]), RuntimeError),
                           (lambda: x @ x, NotImplementedError)):
        with pytest.raises(error):
            refused()
    graph = stream.end_capture()
    number = 5.0
    assert not x.get().any() and np.isnan(y.get()).all() and np.isnan(z.get()).all()
    for expected in (1, 3):
        graph.launch()
        np.testing.assert_array_equal(y.get(), np.full((2, 2), expected))
        np.testing.assert_array_equal(z.get(), np.full((1, 2), expected))
    np.testing.assert_array_equal(x.get(), np.full((2, 2), 2))


# The backbone -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_backbone(policy, fused, kernels):
    """Hidden states and logits of random models and masks; kernels where they are to be used."""
    for seed in range(4):
        config, inputs = random_case(random.Random(seed).choice)
        ours, theirs = pair(**config, dtype=policy, fused=fused)
        kernels.clear()
        on_host, on_device = (backbone(inputs) for backbone in (ours, theirs))
        assert_same(on_host, on_device)
        L = config["num_layers"] if fused and policy != "float64" else 0
        assert kernels.count("attention") == L
        assert kernels.count("rms_norm") == (2 * L + 1 if L else 0)
        logits = [backbone.token_embedding(x, reverse=True)
                  for backbone, x in ((ours, on_host), (theirs, on_device))]
        assert_same(*logits)


@pytest.mark.parametrize("model", MODELS)
def test_what_other_checkpoints_need(model):
    """Su scaling, a sliding window, tied embeddings and a partial rotation."""
    ours, theirs = pair(**MODELS[model])
    assert_same(ours(batch(14, 9)), theirs(batch(14, 9)))


def test_inputs_may_be_on_the_device():
    """Token ids and mask that are on the GPU already are taken from there."""
    ours, theirs = pair()
    inputs = batch(14, 9)
    moved = {name: cupy_stand_in.asarray(array) for name, array in inputs.items()}
    assert_same(ours(inputs), theirs(moved))
    np.testing.assert_array_equal(ours(moved), ours(inputs))


def test_dropout():
    """The same elements fall out, drawn on the device."""
    ours, theirs = pair(dropout=0.3)
    on_host = ours(batch(14, 9), training=True)
    assert_same(on_host, theirs(batch(14, 9), training=True))
    assert (on_host != ours(batch(14, 9))).any()


@pytest.mark.parametrize("policy", ["float32", "bfloat16"])
def test_taps(policy):
    """A tap sees every intermediate on the device, and what it returns is used."""
    ours, theirs = map(phi3_ref.Phi3CausalLM, pair(dtype=policy))
    seen = []
    for causal_lm in (ours, theirs):
        trace = {}

        def tap(name, array, trace=trace):
            trace[name] = array
            return array * 0.5 if name == "transformer_layer_0.attention.scores" else array

        causal_lm(batch(14, 9), tap=tap)
        seen.append(trace)
    assert list(seen[0]) == list(seen[1])
    assert {"logits", "transformer_layer_1.attention.probabilities"} <= seen[0].keys()
    for name, array in seen[0].items():
        assert_same(array, seen[1][name])


@pytest.mark.parametrize("policy", ["float32", "bfloat16"])
def test_traces(policy, tmp_path):
    """A Trace keeps what is on the device in the host's memory; files and comparisons are alike."""
    traces = []
    for backbone in pair(dtype=policy):
        causal_lm = phi3_ref.Phi3CausalLM(backbone)
        traces.append(phi3_ref.Trace.record(causal_lm, batch(14, 9)))
    on_host, on_device = traces
    assert list(on_host) == list(on_device) == list(tap_shapes(backbone.config, 2, 14))
    assert all(type(array) is np.ndarray for array in on_device.values())
    assert phi3_ref.compare(on_host, on_device, tolerance=0).first is None
    tensors = {name: cupy_stand_in.asarray(array) for name, array in on_device.items()}
    assert phi3_ref.compare(on_host, tensors, tolerance=0).first is None
    assert phi3_ref.compare(tensors, on_host, tolerance=0).first is None
    saved = phi3_ref.Trace()
    saved.update(tensors)
    saved.save(tmp_path / "trace.safetensors")
    path = str(tmp_path / "trace.safetensors")
    assert phi3_ref.compare(on_host, path, tolerance=0).first is None


# Learning -----------------------------------------------------------------------------------------


def labelled(inputs, vocabulary_size, seed=5):
    """Labels for `inputs`, and weights of which some are zero: what a training step takes."""
    rng, shape = np.random.default_rng(seed), np.shape(inputs["token_ids"])
    return (inputs, rng.integers(0, vocabulary_size, shape),
            rng.uniform(0, 2, shape) * (rng.random(shape) < 0.8))


SIXTEEN_BITS = {policy for policy in POLICIES if "16" in policy}
COUNT_OF_IDS = {"float64": [8]}  # what `unique` reads, where no kernel is


def learners(optimizer=None, recompute=False, **arguments):
    """Two causal LMs alike, on NumPy and on the stand-in, each with an optimizer of its own."""
    pair_of_models = [phi3_ref.Phi3CausalLM(backbone) for backbone in pair(**arguments)]
    for causal_lm in pair_of_models:
        causal_lm.compile(phi3_ref.AdamW(1e-2, **optimizer or {}), recompute=recompute)
    return pair_of_models


def assert_same_trees(on_host, on_device):
    """Two trees of weights, or of gradients, as `assert_same`; tied embeddings are one array."""
    pairs = zip(phi3_ref.named_weights(on_host), phi3_ref.named_weights(on_device), strict=True)
    for (name, array), (other, on_gpu) in pairs:
        assert name == other
        assert_same(array, on_gpu)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("policy", POLICIES)
def test_gradients(policy, fused, recompute, kernels):
    """Of random models and masks, with dropout; what the host reads is the loss."""
    for seed in range(4):
        config, inputs = random_case(random.Random(seed).choice)
        batch_of = labelled(inputs, config["vocabulary_size"])
        results = []
        for causal_lm in learners(**config, dtype=policy, fused=fused, dropout=0.3,
                                  recompute=recompute):
            cupy_stand_in.transfers.clear()
            kernels.clear()
            results.append(causal_lm.gradients(*batch_of))
        assert cupy_stand_in.transfers == COUNT_OF_IDS.get(policy, []) + [8]
        assert results[0][0] == results[1][0]
        assert_same_trees(results[0][1], results[1][1])
        norms = 2 * config["num_layers"] + 1 if fused and policy != "float64" else 0
        assert kernels.count("rms_norm_backward") == norms
        assert kernels.count("attention_backward") == norms // 2
        products = 4 * config["num_layers"] + 1 if policy in SIXTEEN_BITS else 0
        assert kernels.count("transposed_matmul") == products


@pytest.mark.parametrize("recompute", [False, True])
def test_attentions_derivative_takes_what_the_forward_has_left(recompute, monkeypatch):
    """Context and log-sum-exp are the forward's own arrays, whose kernel is not launched again."""
    calls = []

    def watched(name, kernel):
        def call(*args):
            result = kernel(*args)
            calls.append((name, args, result))
            return result
        return call

    for name in ("attention", "attention_backward"):
        monkeypatch.setattr(kernels_cuda, name, watched(name, getattr(kernels_cuda, name)))
    _, causal_lm = learners(dropout=0.3, recompute=recompute, dtype="bfloat16")
    causal_lm.gradients(*labelled(batch(14, 9), 64))
    names = [name for name, *_ in calls]
    if recompute:  # the first forward keeps nothing
        assert names[:2] == ["attention"] * 2 and all(args[-1] is None for _, args, _ in calls[:2])
        pairs = zip(calls[2::2], calls[3::2], strict=True)
    else:
        assert names == ["attention"] * 2 + ["attention_backward"] * 2
        pairs = zip(calls[1::-1], calls[2:], strict=True)
    for (forward, (*_, filled), context), (backward, (*_, given, log_sum_exp), _) in pairs:
        assert (forward, backward) == ("attention", "attention_backward")
        assert filled is log_sum_exp and log_sum_exp.dtype == "float32" and context is given
        assert np.isfinite(log_sum_exp.get()).all()


@pytest.mark.parametrize("model", MODELS)
def test_gradients_of_other_checkpoints(model):
    """Su scaling, a sliding window, tied embeddings and a partial rotation."""
    (loss, on_host), (same, on_device) = (
        causal_lm.gradients(*labelled(batch(14, 9), 64)) for causal_lm in learners(**MODELS[model]))
    assert loss == same
    assert_same_trees(on_host, on_device)
    tied = on_device["token_embedding"] is on_device["reverse_embedding"]
    assert tied == (model == "tied")


@pytest.mark.parametrize("policy", TRAINABLE)
def test_taps_on_learning(policy):
    """Both taps see every array on the device, and what they return is used; so is a Trace."""
    seen, losses, traces = [], [], []
    for causal_lm in learners(dtype=policy, dropout=0.3):
        found = {}

        def tap(name, array, found=found, suffix=""):
            found[name + suffix] = array
            return array * 0.5 if name.endswith("attention.scores") else array

        loss, gradients = causal_lm.gradients(
            *labelled(batch(14, 9), 64), tap=tap,
            gradient_tap=functools.partial(tap, suffix=".gradient"))
        losses.append(loss)
        seen.append(found | dict(phi3_ref.named_weights(gradients)))
        traces.append(phi3_ref.Trace.record(causal_lm, batch(14, 9), y="next"))
    assert losses[0] == losses[1] and list(seen[0]) == list(seen[1])
    assert {"logits.gradient", "transformer_layer_1.attention.dropout"} <= seen[0].keys()
    for name, array in seen[0].items():
        assert_same(array, seen[1][name])
    on_host, on_device = traces
    assert list(on_host) == list(on_device) and on_host.metadata == on_device.metadata
    assert "transformer_layer_0.qkv.weight.gradient" in on_host
    assert phi3_ref.compare(on_host, on_device, tolerance=0).first is None


@pytest.mark.parametrize("optimizer", [
    dict(), dict(weight_decay=None), dict(clipnorm=0.01), dict(global_clipnorm=0.1)],
    ids=["AdamW", "Adam", "clipnorm", "global_clipnorm"])
@pytest.mark.parametrize("policy", TRAINABLE)
@pytest.mark.filterwarnings("ignore:bfloat16 weights have 8 bits")
def test_training_steps(policy, optimizer):
    """Weights and moments after steps are the host's; of each step it reads three numbers, once."""
    results, moments = [], []
    for causal_lm in learners(optimizer, dtype=policy, dropout=0.3):
        logs = []
        for seed in range(3):
            cupy_stand_in.transfers.clear()
            logs.append(causal_lm.train_on_batch(*labelled(batch(14, 9), 64, seed)))
        results.append((logs, causal_lm.backbone.weights))
        moments.append(causal_lm.optimizer.moments)
    assert cupy_stand_in.transfers == COUNT_OF_IDS.get(policy, []) + [24]
    assert results[0][0] == results[1][0]
    assert_same_trees(results[0][1], results[1][1])
    for name in moments[0]:
        for on_host, on_device in zip(moments[0][name], moments[1][name], strict=True):
            assert_same(on_host, on_device)


@pytest.mark.parametrize("policy", TRAINABLE)
def test_lora(policy, tmp_path, monkeypatch):
    """Steps, of which the host reads numbers alone; files; decoding without a graph; merging."""
    found, captured = [], []
    monkeypatch.setattr(kernels_cuda, "capture", captured.append)
    for backend, causal_lm in zip(("numpy", "cupy"), learners(
            dtype=policy, dropout=0.3, recompute=True), strict=True):
        causal_lm.sampler = phi3_ref.GreedySampler()
        backbone, directory = causal_lm.backbone, tmp_path / backend
        backbone.enable_lora(3)
        for seed in range(3):
            cupy_stand_in.transfers.clear()
            log = causal_lm.train_on_batch(*labelled(batch(14, 9), 64, seed))
        assert max([0, *cupy_stand_in.transfers]) <= 24
        backbone.save_lora_weights(directory / "a.lora.h5")
        again = phi3_ref.Phi3Backbone(**PLAIN, dtype=policy, backend=backend)
        again.load_lora_weights(directory / "a.lora.h5")
        text = causal_lm.generate(batch(8, 5, room=9), stop_token_ids=None)["token_ids"]
        causal_lm.save_to_preset(directory)
        saved = [path.read_bytes() for path in sorted(directory.glob("*.h5"))]
        found.append((log, text.tolist(), saved, backbone, again))
    (*ours, backbone, _), (*theirs, on_device, again) = found
    assert ours == theirs and not captured
    assert_same_trees(backbone.weights, on_device.weights)
    for name, array in phi3_ref.adapters(again.weights).items():
        assert_same(phi3_ref.adapters(backbone.weights)[name], array)


def test_a_graph_is_of_weights_that_learn():
    """A step of the optimizer in the midst of a text: the graph computes with what it learned."""
    found, token_ids = [], np.random.default_rng(1).integers(3, 60, (1, 8))
    for causal_lm in learners():
        _, cache = causal_lm.next_logits(token_ids, 6)
        before, _ = causal_lm.next_logits(token_ids, 7, cache)
        causal_lm.train_on_batch(*labelled(batch(14, 9), 64))
        after, _ = causal_lm.next_logits(token_ids, 8, cache)
        found.append([phi3_ref.to_numpy(logits).copy() for logits in (before, after)])
    np.testing.assert_array_equal(*found)


def test_fit_and_evaluate_on_strings(tmp_path):
    """The embedded preset: history, weights and evaluation; the optimizer's file fits either."""
    texts, found = ["Reverse cat", "Sort dog", "What is 1 + 2?", "Sort a", "Reverse ab"], []
    for backend in ("numpy", "cupy"):
        causal_lm = phi3_ref.Phi3CausalLM.from_preset(PUZZLES, backend=backend, seed=1, dropout=0.1)
        causal_lm.preprocessor.sequence_length = 20
        causal_lm.compile(phi3_ref.AdamW(1e-3))
        history = causal_lm.fit(texts, batch_size=2, epochs=2).history
        causal_lm.save_optimizer(tmp_path / backend)
        found.append((causal_lm, history, causal_lm.evaluate(texts, batch_size=2)))
    (ours, history, mean), (theirs, other_history, other_mean) = found
    assert history == other_history and mean == other_mean
    assert_same_trees(ours.backbone.weights, theirs.backbone.weights)
    assert (tmp_path / "numpy").read_bytes() == (tmp_path / "cupy").read_bytes()
    theirs.load_optimizer(tmp_path / "numpy")
    for name, moments in theirs.optimizer.moments.items():
        for on_host, on_device in zip(ours.optimizer.moments[name], moments, strict=True):
            assert_same(on_host, on_device)
    for causal_lm in (ours, theirs):
        causal_lm.fit(texts, batch_size=3)
    assert_same_trees(ours.backbone.weights, theirs.backbone.weights)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, which computes with it
def test_what_is_not_finite_is_named():
    """By the same name on either side; the weights stay."""
    messages = []
    for causal_lm in learners():
        weight = causal_lm.backbone.weights["transformer_layers"][1]["feedforward_output"]
        weight[2, 3] = math.inf
        with pytest.raises(FloatingPointError) as error:
            causal_lm.train_on_batch(*labelled(batch(14, 9), 64))
        messages.append(str(error.value))
    assert messages[0] == messages[1] and "feedforward_output.weight" in messages[0]


# Weights and presets ------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "bfloat16"])
def test_out_of_memory(policy, monkeypatch):
    """The error says for what, how much was needed, what is free; the model stays as it was."""
    backbone = phi3_ref.Phi3Backbone(**PLAIN, dtype=policy, backend="cupy", seed=1)
    weights = random_weights(backbone)
    before = backbone(batch(14)).get()
    largest = max(w.size for w in weights) * backbone.weight_dtype.itemsize
    monkeypatch.setattr(cupy_stand_in, "MEMORY", [1000, 2**34])
    size = sum(w.size for w in weights) * backbone.weight_dtype.itemsize
    message = (f"the {size:,} bytes of the weights, {policy}: Out of memory allocating {{}} bytes "
               r".*2,024 bytes are free on the GPU\.")
    with pytest.raises(MemoryError, match=message.format(f"{largest:,}")):
        backbone.set_weights(weights)
    np.testing.assert_array_equal(before, backbone(batch(14)).get())
    with pytest.raises(MemoryError, match=message.format(f"{size:,}")):  # before any is drawn
        phi3_ref.Phi3Backbone(**PLAIN, dtype=policy, backend="cupy")
    causal_lm = phi3_ref.Phi3CausalLM(backbone)
    cache_size = 2 * 2 * 50 * 12 * backbone.compute_dtype.itemsize  # layers, k and v, max, K * C
    cupy_stand_in.MEMORY[0] = cache_size - 2**10
    causal_lm.next_logits(np.zeros((1, 50), int), 1)
    with pytest.raises(MemoryError, match=f"51 positions: .*{cache_size * 51 // 50:,} bytes "):
        causal_lm.next_logits(np.zeros((1, 51), int), 1)


def test_out_of_memory_while_learning(monkeypatch):
    """The error says for what, and no weight has changed: by gradients, and by the first step."""
    causal_lm = phi3_ref.Phi3CausalLM(phi3_ref.Phi3Backbone(**PLAIN, backend="cupy", seed=1))
    before = causal_lm.backbone.get_weights()
    inputs, labels, weight = labelled(batch(14, 9), 64)
    monkeypatch.setattr(cupy_stand_in, "MEMORY", [1000, 2**34])
    positions = f"the gradients of {labels.size:,} positions: Out of memory"
    with pytest.raises(MemoryError, match=positions):
        causal_lm.train_on_batch(inputs, labels, weight)
    monkeypatch.setattr(cupy_stand_in, "zeros_like", lambda a: cupy_stand_in.allocated(
        np.broadcast_to(np.float32(0), 2**40)))
    cupy_stand_in.MEMORY[0] = 2**34
    with pytest.raises(MemoryError, match="a step of the optimizer: Out of memory"):
        causal_lm.train_on_batch(inputs, labels, weight)
    for then, now in zip(before, causal_lm.backbone.get_weights(), strict=True):
        np.testing.assert_array_equal(then, now)
    assert causal_lm.optimizer.iterations == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_weights(policy):
    """Random ones are equal; they go to the host and come back, from the host or the device."""
    ours, theirs = (phi3_ref.Phi3Backbone(**PLAIN, seed=3, dtype=policy, backend=backend)
                    for backend in ("numpy", "cupy"))
    assert_same(ours.weights["token_embedding"], theirs.weights["token_embedding"])
    weights = random_weights(ours)
    ours.set_weights(weights)
    theirs.set_weights(list(map(cupy_stand_in.asarray, weights)))
    cupy_stand_in.transfers.clear()
    back = theirs.get_weights()
    assert len(cupy_stand_in.transfers) == len(back)
    for on_host, on_device in zip(ours.get_weights(), back, strict=True):
        assert type(on_device) is np.ndarray and on_host.dtype == on_device.dtype
        np.testing.assert_array_equal(on_host, on_device)
    assert theirs.count_params() == ours.count_params()


def test_tied_weights_are_checked_on_either_side():
    """With tied embeddings, unequal ones are an error wherever they are."""
    _, theirs = pair(tie_word_embeddings=True)
    weights = random_weights(theirs)
    theirs.set_weights(list(map(cupy_stand_in.asarray, weights)))
    weights[1] = weights[1] + 1
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        theirs.set_weights(list(map(cupy_stand_in.asarray, weights)))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_keras_preset(policy, tmp_path):
    """What the device saves, the host loads, and the other way round."""
    ours, theirs = pair(dtype=policy)
    for name, backbone in (("ours", ours), ("theirs", theirs)):
        backbone.save_to_preset(tmp_path / name)
    for name in ("ours", "theirs"):
        on_host, on_device = (
            phi3_ref.Phi3Backbone.from_preset(tmp_path / name, dtype=policy, backend=backend)
            for backend in ("numpy", "cupy"))
        assert_same(on_host(batch(14, 9)), on_device(batch(14, 9)))
        assert_same(ours(batch(14, 9)), on_device(batch(14, 9)))


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_a_huggingface_directory(stored, tmp_path):
    """A Hugging Face directory in either dtype, su scaling and all."""
    from safetensors.numpy import save_file

    ours, _ = pair(**SU, dtype=stored)
    save_file(dict(phi3_ref.huggingface_tensors(ours.weights, ours.config)),
              tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(dict(
        model_type="phi3", vocab_size=64, num_hidden_layers=2, hidden_size=24,
        intermediate_size=40, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-6,
        max_position_embeddings=36, original_max_position_embeddings=9,
        rope_scaling=dict(type="longrope", short_factor=SU["rope_scaling_short_factor"],
                          long_factor=SU["rope_scaling_long_factor"]))))
    loaded = phi3_ref.Phi3CausalLM.from_preset(tmp_path, dtype=stored, backend="cupy")
    assert_same(ours(batch(14, 9)), loaded.backbone(batch(14, 9)))
    with pytest.raises(ValueError):  # and its file, once mapped, is not needed any more
        (tmp_path / "model.safetensors").write_bytes(b"")
        phi3_ref.Phi3Backbone.from_preset(tmp_path, dtype=stored, backend="cupy")
    assert_same(ours(batch(14, 9)), loaded.backbone(batch(14, 9)))


# Generation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("model", MODELS)
def test_generation(model, sampler):
    """The same tokens; per token, at most one copy to the host, of 8 bytes per row."""
    inputs, results = batch(5, 3, 8), []
    for causal_lm in map(phi3_ref.Phi3CausalLM, pair(**MODELS[model])):
        causal_lm.compile(sampler=SAMPLERS[sampler]())
        results.append(causal_lm.generate(inputs, stop_token_ids=[11]))
    on_host, on_device = results
    for name in on_host:
        assert type(on_device[name]) is np.ndarray
        np.testing.assert_array_equal(on_host[name], on_device[name])
    rows = 3 * (3 if sampler == "beam" else 1)
    assert 0 < len(cupy_stand_in.transfers) <= 14 - 3
    assert max(cupy_stand_in.transfers) <= 8 * rows


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_taps_on_generation(sampler):
    """A tap sees and steers every pass on the device, as on the host."""
    traces = []
    for causal_lm in map(phi3_ref.Phi3CausalLM, pair(**SU)):
        causal_lm.compile(sampler=SAMPLERS[sampler]())
        trace = phi3_ref.Trace()

        def tap(name, array, trace=trace):
            return trace(name, array * 0.5 if name.endswith("value") else array)

        causal_lm.generate(batch(5, 3, 8), stop_token_ids=None, tap=tap)
        traces.append(trace)
    on_host, on_device = traces
    assert list(on_host) == list(on_device) and "logits@10" in on_host
    assert phi3_ref.compare(on_host, on_device, tolerance=0).first is None


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("policy", POLICIES)
def test_generation_in_every_policy(policy, fused):
    """Cached decoding in each dtype: the same tokens and the same next logits."""
    inputs, results = batch(5, 3), []
    for causal_lm in map(phi3_ref.Phi3CausalLM, pair(**SU, dtype=policy, fused=fused)):
        causal_lm.compile(sampler="greedy")
        token_ids = causal_lm.generate(inputs, stop_token_ids=None)["token_ids"]
        logits, cache = causal_lm.next_logits(token_ids, 12, None)
        logits, cache = causal_lm.next_logits(token_ids, 13, cache)
        results.append((token_ids, logits, cache.arrays[:, :, :, :13]))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    assert_same(results[0][1], results[1][1])
    assert_same(results[0][2], results[1][2])


@pytest.mark.parametrize("model, graphs", [
    (dict(), 2), (dict(dtype="bfloat16"), 2), (dict(dtype="mixed_bfloat16"), 2),
    (dict(SU, max_sequence_length=2000, pretraining_sequence_length=1021), 3),
    (dict(sliding_window=700), 2), (dict(sliding_window=4000), 2),
    (dict(tie_word_embeddings=True), 2), (dict(dtype="float64"), 0), (dict(fused=False), 0)])
def test_decoding_is_a_graph(model, graphs, monkeypatch, kernels):
    """One launch per token; a new record per 1,024 slots, change of factors, and moved window."""
    captured, launches = [], []

    def capture(function):
        before = len(kernels)
        graph = kernels_cuda_capture(function)
        captured.append(collections.Counter(kernels[before:]))

        def launch():
            launches.append(len(captured))
            before = len(kernels)
            result = graph()
            assert len(kernels) == before  # Python launches none of them
            return result
        return launch

    kernels_cuda_capture = kernels_cuda.capture
    monkeypatch.setattr(kernels_cuda, "capture", capture)
    S, room, logits = 1015, 1030, []
    if model.get("sliding_window") == 700:
        S, room = 1395, 1405  # the cache has room for two windows: 1400
    token_ids = np.random.default_rng(1).integers(0, 64, (2, room))
    for causal_lm in map(phi3_ref.Phi3CausalLM, pair(max_sequence_length=2000, **{
            key: value for key, value in model.items() if key != "max_sequence_length"})):
        backbone, found = causal_lm.backbone, []
        cache = phi3_ref.KVCache(backbone.config, 2, room, chunk=500, xp=backbone.xp)
        for start in range(0, S, 500):
            ids = backbone.xp.asarray(token_ids[:, start : min(start + 500, S)])
            phi3_ref.forward(backbone.weights, backbone.config, ids, cache=cache, total=S)
        for index in range(S + 1, room + 1):
            step, cache = causal_lm.next_logits(token_ids, index, cache)
            found.append(phi3_ref.to_numpy(step).copy())
        logits.append(np.stack(found))
    np.testing.assert_array_equal(*logits)
    assert len(captured) == graphs
    if graphs:  # one position is not alone: the long factors begin by computing 1,022 anew
        assert len(launches) == room - S - ("rope_scaling_type" in model)
        once = {"rms_norm": 5, "attention": 2, "linear": 8, "silu": 2}  # in two layers
        assert captured == [collections.Counter(once) + collections.Counter(once)] * graphs


def test_a_graph_is_of_its_weights():
    """New weights in the midst of a text are computed with, as on the host; so is a full cache."""
    found, token_ids = [], np.random.default_rng(1).integers(3, 60, (1, 8))
    for causal_lm in map(phi3_ref.Phi3CausalLM, pair()):
        _, cache = causal_lm.next_logits(token_ids, 6)
        causal_lm.next_logits(token_ids, 7, cache)
        causal_lm.backbone.set_weights(random_weights(causal_lm.backbone, seed=9))
        logits, cache = causal_lm.next_logits(token_ids, 8, cache)
        found.append(phi3_ref.to_numpy(logits))
        with pytest.raises(ValueError, match="room for 8 positions"):
            causal_lm.next_logits(np.ones((1, 9), int), 9, cache)
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("rows, graphs", [(1, 1), (8, 1), (9, 0)])
def test_more_rows_than_the_kernel_takes(rows, graphs, monkeypatch):
    """A batch of up to 8 is decoded by a graph; of more, by cuBLAS, which none can hold."""
    assert kernels_cuda.LINEAR_ROWS[-1] == 8
    captured = []
    monkeypatch.setattr(kernels_cuda, "capture", lambda function, capture=kernels_cuda.capture: (
        captured.append(1), capture(function))[1])
    results = []
    for causal_lm in map(phi3_ref.Phi3CausalLM, pair()):
        causal_lm.compile(sampler="greedy")
        results.append(causal_lm.generate(batch(*[5] * rows), stop_token_ids=None)["token_ids"])
    np.testing.assert_array_equal(*results)
    assert len(captured) == graphs


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_preset_answers_in_text(sampler):
    """The embedded preset's answers, whole and as a stream."""
    text = "<|user|>\nreverse: cat<|end|>\n<|assistant|>\n"
    answers = []
    for backend in ("numpy", "cupy"):
        causal_lm = phi3_ref.Phi3CausalLM.from_preset(PUZZLES, backend=backend)
        causal_lm.compile(sampler=SAMPLERS[sampler]())
        answers.append([causal_lm.generate(text, max_length=30, strip_prompt=True),
                        causal_lm.generate([text, text[:-9]], max_length=30)])
        if sampler != "beam":
            answers[-1].append("".join(causal_lm.stream(text, max_length=30)))
    assert answers[0] == answers[1]


def test_the_command_line(capsys):
    """`--backend cupy` prints what `--backend numpy` does."""
    for backend in ("numpy", "cupy"):
        phi3_ref.main(["reverse: cat", "--backend", backend, "--dtype", "bfloat16"])
    first, second = capsys.readouterr().out.splitlines()
    assert first == second


# No GPU -------------------------------------------------------------------------------------------


def test_without_cupy_the_error_says_what_to_install(monkeypatch):
    """`backend="cupy"` without CuPy is an ImportError with the command."""
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(ImportError, match="pip install"):
        phi3_ref.Phi3Backbone(**PLAIN, backend="cupy")


def test_without_a_gpu_the_error_says_so(monkeypatch):
    """`backend="cupy"` without a GPU or a driver is an error that says so."""
    def no_device():
        raise cupy_stand_in.cuda.runtime.CUDARuntimeError("cudaErrorInsufficientDriver")

    monkeypatch.setattr(cupy_stand_in.cuda.runtime, "getDeviceCount", no_device)
    with pytest.raises(RuntimeError, match="NVIDIA GPU"):
        phi3_ref.Phi3Backbone(**PLAIN, backend="cupy")


def test_the_model_never_imports_cupy_by_itself():
    """No file but the kernels' names CuPy outside of a function."""
    source = pathlib.Path(phi3_ref.__file__).read_text(encoding="utf-8")
    assert "\nimport cupy" not in source and "\nimport kernels_cuda" not in source


@pytest.mark.parametrize("policy", POLICIES)
def test_export(policy, tmp_path):
    """What is on the device is exported tensor by tensor, as what is on the host."""
    for backend in ("numpy", "cupy"):
        backbone = phi3_ref.Phi3Backbone(**PLAIN, seed=3, dtype=policy, backend=backend)
        cupy_stand_in.transfers.clear()
        backbone.export_to_transformers(tmp_path / backend)
    assert len(cupy_stand_in.transfers) == 3 + 6 * PLAIN["num_layers"]
    for name in ("config.json", "model.safetensors"):
        on_host, on_device = (tmp_path / backend / name for backend in ("numpy", "cupy"))
        assert on_host.read_bytes() == on_device.read_bytes()
