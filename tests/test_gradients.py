"""Every derivative: of each function alone, of the whole model, against three other ways to it.

KerasHub on TensorFlow and transformers on torch differentiate automatically; central differences
need no derivative at all, and hold the float64 oracle to its forward pass.
"""

import random

import ml_dtypes
import numpy as np
import pytest
import references as ref
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_traces import keras_trace, transformers_trace

import phi3_ref

TOO_LONG = pytest.mark.filterwarnings("ignore:.*max_sequence_length")
TINY = dict(vocabulary_size=29, num_layers=2, hidden_dim=24, intermediate_dim=36,
            num_query_heads=6, num_key_value_heads=2)


def chooser(data):
    """What `references.random_case` chooses with, where Hypothesis draws."""
    return lambda options: data.draw(st.sampled_from(options))


def tiny(seed=0, **kwargs):
    """A causal LM whose random weights tell tokens apart."""
    backbone = phi3_ref.Phi3Backbone(**{**TINY, "seed": 0, **kwargs})
    rng = np.random.default_rng(seed)
    for array in phi3_ref.unfused(backbone.weights, backbone.config).values():
        array[...] = ref.randomized(array.shape, rng, array.shape[-1])
    return phi3_ref.Phi3CausalLM(backbone)


def labelled(shape=(2, 9), seed=0):
    """Inputs, labels and weights for `tiny`; the first row begins with padding."""
    rng = np.random.default_rng(seed)
    padding_mask = np.ones(shape, int)
    padding_mask[0, :2] = 0
    inputs = {"token_ids": rng.integers(0, 29, shape), "padding_mask": padding_mask}
    return inputs, rng.integers(0, 29, shape), rng.uniform(0, 2, shape).astype("float32")


def assert_same_bits(a, b):
    """Two trees of gradients are equal, to the last bit."""
    a, b = dict(phi3_ref.named_weights(a)), dict(phi3_ref.named_weights(b))
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


# The whole model against KerasHub and transformers -----------------------------------------------


@TOO_LONG
@pytest.mark.parametrize("dtype", list(ref.TOLERANCE))
@settings(max_examples=ref.examples(12))
@given(data=st.data())
def test_every_gradient_agrees_with_kerashub(dtype, data):
    """Of every weight and every tensor that a tap sees, with masks, sample weights and su scaling.

    Rows that see no key included: KerasHub on TensorFlow gives them zeros, as we do.
    """
    choose = chooser(data)
    config, inputs = ref.random_case(choose)
    y, sample_weight = ref.random_labels(choose, config["vocabulary_size"], inputs["padding_mask"])
    model = ref.keras_backbone(config, dtype, data.draw(st.integers(0, 99)))
    theirs = keras_trace(model, inputs, y, sample_weight)
    ours, exact = (
        phi3_ref.Trace.record(phi3_ref.Phi3CausalLM(ref.ours_like(model, d)), inputs, y=y,
                              sample_weight=sample_weight) for d in (dtype, "float64"))
    assert sorted(ours, key=phi3_ref.execution_order) == sorted(
        theirs, key=phi3_ref.execution_order)
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype, name
    assert ref.gradients_beyond(theirs, ours, exact, ref.ours_like(model).config) == []
    assert ours.metadata["loss"] == pytest.approx(
        theirs.metadata["loss"], ref.TOLERANCE[dtype], ref.TOLERANCE[dtype])


@TOO_LONG
@pytest.mark.parametrize("dtype", list(ref.NUMPY_DTYPE))
@settings(max_examples=ref.examples(12))
@given(data=st.data())
def test_every_gradient_agrees_with_transformers(dtype, data, tmp_path_factory):
    """The same, with partial rotary, sliding windows, tied embeddings and other head sizes.

    Rows that see no key have no label here: transformers averages all values for them. Twice the
    tolerance in 16 bits, where transformers' norms round once more than ours.
    """
    choose = chooser(data)
    config, token_ids = ref.random_huggingface(choose)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    positions = np.arange(token_ids.shape[1])
    padding_mask = np.array([ref.padding_row(choose(["ones", "right", "left", "holes"]),
                                             len(positions), rng) for _ in token_ids], int)
    sees = phi3_ref.visible_keys(positions, positions, config["sliding_window"], padding_mask)
    sees = sees.any(axis=-1)
    y, sample_weight = ref.random_labels(choose, config["vocab_size"], padding_mask)
    sample_weight = ((1 if sample_weight is None else sample_weight) * sees).astype("float32")
    model = ref.transformers_model(config, dtype, data.draw(st.integers(0, 99)))
    model.model.embed_tokens.padding_idx = None  # see below
    theirs = transformers_trace(model, token_ids, padding_mask, y, sample_weight)
    directory = ref.write_huggingface(model, tmp_path_factory.mktemp("model"))
    models = [phi3_ref.Phi3CausalLM.from_preset(directory, dtype=d) for d in (dtype, "float64")]
    ours, exact = (
        phi3_ref.Trace.record(model, {"token_ids": token_ids, "padding_mask": padding_mask}, y=y,
                              sample_weight=sample_weight) for model in models)
    assert set(ours) == set(theirs)
    beyond = ref.gradients_beyond(theirs, ours, exact, models[0].backbone.config,
                                  factor=1 if dtype == "float32" else 2)
    # How a value that nobody sees would have counted is another, where its row is.
    assert [row for row in beyond
            if sees.all() or not row.name.endswith(".probabilities.gradient")] == []
    assert ours.metadata["loss"] == pytest.approx(
        theirs.metadata["loss"], 2 * ref.TOLERANCE[dtype], 2 * ref.TOLERANCE[dtype])


def test_transformers_gives_the_padding_token_no_gradient(tmp_path):
    """It tells torch's embedding so (`padding_idx`), wherever the token stands. Others are ours."""
    model = ref.transformers_model({})
    token_ids = np.random.default_rng(0).integers(0, 5, (3, 8))
    y = np.roll(token_ids, -1, axis=1)
    theirs = ref.weight_gradients(transformers_trace(model, token_ids, None, y))
    causal_lm = phi3_ref.Phi3CausalLM.from_preset(ref.write_huggingface(model, tmp_path))
    _, ours = causal_lm.gradients({"token_ids": token_ids}, y)
    pad = model.config.pad_token_id
    assert pad in token_ids and ours["token_embedding"][pad].any()
    assert not theirs["token_embedding"][pad].any(), ref.seen_with("transformers", "5.24.0")
    others = np.arange(61) != pad
    assert ref.relative_error(ours["token_embedding"][others],
                              theirs["token_embedding"][others]) <= 1e-5


@TOO_LONG
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed_bfloat16"])
def test_gradients_are_no_further_from_float64_than_keras(dtype):
    """The true error: the worst of all weights', in the mean over 24 models, as it is computed."""
    difference, ours, its = np.array(ref.keras_gradient_errors(dtype, range(24))).T
    assert ref.no_larger(ours, its), f"{ours.mean():.2e} against {its.mean():.2e}"
    assert np.median(difference) <= ref.GRADIENT_TOLERANCE[dtype]


# The oracle against its forward pass -------------------------------------------------------------


def oracle(choose):
    """A random float64 model of any kind, with inputs and labels: what `loss_of` takes."""
    kv_heads = choose([1, 2, 3])
    heads, head_dim = kv_heads * choose([1, 2, 3]), choose([2, 4, 8])
    length, batch = choose([1, 2, 5, 9]), choose([1, 2])
    partial = choose([1.0, 0.5]) if head_dim > 2 else 1.0
    more = {}
    if choose([False, True]):
        pairs = int(head_dim * partial) // 2
        pretraining = choose([2, 4, 64])  # the long factors, or the short ones
        more = dict(
            rope_scaling_type="su", pretraining_sequence_length=pretraining,
            max_sequence_length=4 * pretraining,
            rope_scaling_short_factor=np.linspace(0.8, 2, pairs).tolist(),
            rope_scaling_long_factor=np.linspace(1.5, 9, pairs).tolist())
    config = phi3_ref.Phi3Config(
        vocabulary_size=choose([1, 2, 7]), num_layers=choose([1, 2]),
        hidden_dim=choose([4, heads * head_dim]), intermediate_dim=choose([1, 6]),
        num_query_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim,
        partial_rotary_factor=partial, layer_norm_epsilon=choose([1e-6, 1e-2]),
        tie_word_embeddings=choose([False, True]), sliding_window=choose([None, None, 1, 3]),
        dropout=choose([0.0, 0.0, 0.3]), fused=choose([True, False]), dtype="float64", **more)
    rng = np.random.default_rng(choose(list(range(100))))
    weights = config.build_weights(lambda _, shape: ref.randomized(shape, rng, shape[-1]))
    V = config.vocabulary_size
    token_ids = rng.integers(0, V, (batch, length))
    kinds = ["ones", "right", "left", "holes", "zeros"]
    mask = np.array([ref.padding_row(choose(kinds), length, rng) for _ in range(batch)])
    y, sample_weight = ref.random_labels(choose, V, mask)
    if sample_weight is not None:
        sample_weight = sample_weight.astype("float64")
    return weights, config, token_ids, y, sample_weight, None if mask.all() else mask, (3, 1, 4)


def loss_of(weights, config, token_ids, y, sample_weight, mask, seed):
    """The loss, by the forward pass alone."""
    hidden_states = phi3_ref.forward(weights, config, token_ids, mask, seed=seed)
    logits = phi3_ref.reverse_embedding(weights, config, hidden_states)
    log_p = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    losses = -np.take_along_axis(log_p, y[..., None], axis=-1)[..., 0]
    return (losses * (1 if sample_weight is None else sample_weight)).sum() / y.size


@settings(max_examples=ref.examples(120))
@given(seed=st.integers(0, 2**32 - 1))
def test_the_oracle_agrees_with_central_differences(seed):
    """Of every array, in a random direction: 1e-7 of its gradient's largest value.

    (And 1e-11, the loss's own rounding divided by the step.)

    Tied embeddings, partial rotary, windows, su scaling, padding, GQA, one position, one head, a
    vocabulary of one, dropout, no weight at all, recomputed layers: all of them, in any mixture.
    """
    choose = random.Random(seed).choice  # more kinds of models than Hypothesis draws one by one
    case = weights, config, *_ = oracle(choose)
    recompute = choose([False, True])
    loss, _, gradients = phi3_ref.loss_and_gradients(*case, recompute=recompute)
    assert loss == pytest.approx(loss_of(*case), 1e-12, 1e-12)
    gradients, rng = phi3_ref.unfused(gradients, config), np.random.default_rng(0)
    for name, weight in phi3_ref.unfused(weights, config).items():
        direction = rng.standard_normal(weight.shape)
        direction /= np.linalg.norm(direction)
        exact, before = (gradients[name] * direction).sum(), weight.copy()
        allowed, errors = 1e-7 * np.abs(gradients[name]).max() + 1e-11, []

        def at(distance, weight=weight, before=before, direction=direction):
            weight[...] = before + distance * direction
            return loss_of(*case)

        for h in (1e-3, 1e-4, 1e-5):  # a smaller step where the loss is curved, as RMSNorm's near 0
            slope = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
            errors.append(abs(slope - exact))
            if errors[-1] <= allowed:
                break
        weight[...] = before
        assert min(errors) <= allowed, name


def test_defined_where_nothing_can_be_learned():
    """A vocabulary of one, weights all zero, a batch that is all padding: zeros, and no NaN."""
    inputs, y, _ = labelled()
    loss, gradients = tiny(vocabulary_size=1).gradients(
        {**inputs, "token_ids": inputs["token_ids"] * 0}, y * 0)
    assert loss == 0 and not any(g.any() for _, g in phi3_ref.named_weights(gradients))
    loss, gradients = tiny().gradients(inputs, y, np.zeros(y.shape))
    assert loss == 0 and not any(g.any() for _, g in phi3_ref.named_weights(gradients))
    loss, gradients = tiny().gradients({**inputs, "padding_mask": np.zeros(y.shape, int)}, y)
    assert loss > 0
    for name, g in phi3_ref.named_weights(gradients):
        assert np.isfinite(g).all(), name
        nothing_seen = name.endswith(("attention.qkv", ".qkv", ".attention_output",
                                      "pre_attention_layernorm"))
        assert g.any() != nothing_seen, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed_bfloat16"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_same_bits(dtype, dropout):
    """Twice the same gradients, and the same with each layer computed again."""
    causal_lm = tiny(dtype=dtype, dropout=dropout)
    batch = labelled((3, 150))
    loss, first = causal_lm.gradients(*batch)
    again, second = causal_lm.gradients(*batch)
    causal_lm.compile(recompute=True)
    third_loss, third = causal_lm.gradients(*batch)
    assert loss == again == third_loss
    assert_same_bits(first, second)
    assert_same_bits(first, third)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("arguments", [
    {}, {"sliding_window": 5}, {"tie_word_embeddings": True, "partial_rotary_factor": 0.5}])
def test_the_fast_functions_and_the_textbooks_agree(dtype, arguments):
    """`fused=False` computes the same loss and gradients, and so does a tap that looks on."""
    batch, tolerance = labelled((2, 140)), {"float64": 1e-12, **ref.GRADIENT_TOLERANCE}[dtype]
    loss, fast = tiny(dtype=dtype, **arguments).gradients(*batch)
    for fused, tap in ((False, None), (True, lambda name, array: array)):
        causal_lm = tiny(dtype=dtype, fused=fused, **arguments)
        other_loss, other = causal_lm.gradients(*batch, tap=tap, gradient_tap=tap)
        assert loss == pytest.approx(other_loss, tolerance)
        other = phi3_ref.unfused(other, causal_lm.backbone.config)
        for name, g in phi3_ref.unfused(fast, causal_lm.backbone.config).items():
            assert ref.relative_error(g, other[name]) <= tolerance, name


# Each derivative alone, against torch's own ------------------------------------------------------

DTYPES = {"float64": 1e-12, "float32": 1e-5, "float16": 1e-2, "bfloat16": 4e-2}


def arrays(dtype, *shapes, seed=0):
    """Random arrays of these shapes."""
    rng = np.random.default_rng(seed)
    numpy_dtype = phi3_ref.DTYPE_POLICIES[dtype][0]
    return [rng.standard_normal(shape).astype(numpy_dtype) for shape in shapes]


def torch_gradients(function, gradient, *arguments):
    """What torch's autograd makes of `function` in float64, `gradient` being its result's."""
    import torch

    tensors = [torch.from_numpy(np.asarray(x, "float64")).requires_grad_() for x in arguments]
    result = function(*tensors)
    result.backward(torch.from_numpy(np.asarray(gradient, "float64")).reshape(result.shape))
    return [tensor.grad.numpy() for tensor in tensors]


def assert_close(ours, theirs, dtype, like=None):
    """Each of ours is like torch's, and of the dtype of `like`."""
    for mine, its in zip(ours, theirs, strict=True):
        assert ref.relative_error(mine, its) <= DTYPES[dtype]
        assert like is None or mine.dtype == like.dtype


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_linear_backward(dtype):
    from torch.nn import functional
    for shape in ((7, 5), (2, 3, 5), (1, 1, 5), (0, 5)):
        g, x, weight = arrays(dtype, (*shape[:-1], 4), shape, (4, 5))
        ours = phi3_ref.linear_backward(g, x, weight)
        assert_close(ours, torch_gradients(functional.linear, g, x, weight), dtype)
        assert ours[0].dtype == x.dtype and ours[1].dtype == phi3_ref.upcast(x).dtype


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("factor", [1, 1e-3, 300])
def test_rms_norm_backward(dtype, factor):
    from torch.nn import functional
    g, x, scale = arrays(dtype, (2, 9, 16), (2, 9, 16), (16,))
    x *= x.dtype.type(factor)
    x[0, 0] = 0
    ours = phi3_ref.rms_norm_backward(g, x, scale, 1e-4)
    theirs = torch_gradients(lambda x, scale: functional.rms_norm(x, (16,), scale, 1e-4), g, x,
                             scale)
    assert_close(ours, theirs, dtype)
    assert ours[0].dtype == x.dtype and ours[1].dtype == phi3_ref.upcast(x).dtype


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("rotary_dim, magnitude", [(8, 1), (4, 1), (8, 1.2)])
def test_rotary_embedding_backward(dtype, rotary_dim, magnitude):
    """A pair is a complex number that is turned: torch multiplies it."""
    import torch
    g, x = arrays(dtype, (2, 5, 3, 8), (2, 5, 3, 8))
    angles = np.random.default_rng(1).uniform(0, 6, (5, 1, rotary_dim // 2))
    cos, sin = ((magnitude * f(angles)).astype(x.dtype) for f in (np.cos, np.sin))

    def turned(x):
        half = rotary_dim // 2
        wide = [torch.from_numpy(np.asarray(table, "float64")) for table in (cos, sin)]
        pairs = torch.complex(x[..., :half], x[..., half:rotary_dim]) * torch.complex(*wide)
        return torch.cat([pairs.real, pairs.imag, x[..., rotary_dim:]], dim=-1)

    ours = phi3_ref.rotary_embedding_backward(g, cos, sin)
    assert_close([ours], torch_gradients(turned, g, x), dtype, like=x)


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_silu_backward(dtype):
    """Far beyond where e^(-x) is finite, too: the slope is 0 or 1 there."""
    from torch.nn import functional
    largest = min(float(ml_dtypes.finfo(phi3_ref.DTYPE_POLICIES[dtype][0]).max), 1e38)
    x, = arrays(dtype, (3, 50))
    x[0] *= x.dtype.type(10)
    x[1, :12] = [0, -0.0, 80, -80, 1e4, -1e4, 88.7, -88.7, 104, -104, largest, -largest]
    g = np.ones_like(x)
    ours = phi3_ref.silu_backward(g, x)
    assert np.isfinite(ours).all()
    assert_close([ours], torch_gradients(functional.silu, g, x), dtype, like=x)
    g, = arrays(dtype, (3, 50), seed=1)
    ours = phi3_ref.silu_backward(g, x)
    assert_close([ours], torch_gradients(functional.silu, g, x), dtype, like=x)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_softmax_backward(dtype):
    """With a mask, and scores so large that one probability is all."""
    import torch
    g, scores = arrays(dtype, (2, 3, 7), (2, 3, 7))
    scores[0] *= 100
    visible = np.random.default_rng(1).random((2, 3, 7)) < 0.7
    visible[0, 0] = False
    ours = phi3_ref.softmax_backward(g, phi3_ref.softmax(scores, visible))
    assert not ours[~visible].any()

    def masked(scores):
        hidden = torch.from_numpy(~visible)
        return torch.softmax(scores.masked_fill(hidden, -torch.inf), -1).masked_fill(hidden, 0)

    theirs, = torch_gradients(masked, g, scores)
    theirs[0, 0] = 0  # a row without anything is NaN to torch
    assert_close([ours], [theirs], dtype, like=scores)


def attention_gradients(g, query, key, value, mask, window):
    """Torch's, of scaled_dot_product_attention with all of the mask spelled out."""
    import torch
    from torch.nn import functional
    S, T = query.shape[1], key.shape[1]
    visible = np.broadcast_to(phi3_ref.visible_keys(
        np.arange(T - S, T), np.arange(T), window, mask), (len(query), S, T))
    blind = torch.from_numpy(~visible.any(axis=-1))[:, None, :, None]
    # A row that sees nothing is NaN to torch: it may see all, and is then put to zero.
    visible = torch.from_numpy(visible | ~visible.any(axis=-1, keepdims=True))

    def attend(query, key, value):
        context = functional.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2),
            attn_mask=visible[:, None], enable_gqa=True)
        return context.masked_fill(blind, 0).transpose(1, 2)

    return torch_gradients(attend, g, query, key, value)


ATTENTION = {  # B, S, T, H, K, C, window, mask
    "one of each": (1, 1, 1, 1, 1, 2, None, None),
    "one query": (2, 1, 40, 4, 2, 8, None, "left"),
    "a group": (2, 9, 9, 6, 2, 4, None, "holes"),
    "one key head": (1, 33, 33, 5, 1, 6, None, None),
    "blocks": (1, 300, 300, 2, 1, 8, None, "holes"),
    "an exact block": (1, 128, 256, 2, 2, 4, None, "right"),
    "blocks and a window": (1, 270, 390, 4, 2, 4, 130, None),
    "a small window": (2, 150, 150, 2, 2, 4, 3, "holes"),
    "a window of one": (1, 7, 7, 2, 1, 4, 1, "holes"),
    "the last queries": (2, 140, 200, 3, 3, 4, None, "left"),
    "nothing seen": (2, 5, 5, 2, 1, 4, None, "zeros"),
}


def attention_case(case, dtype):
    """The gradient of attention's result, then attention's arguments."""
    B, S, T, H, K, C, window, kind = ATTENTION[case]
    rng = np.random.default_rng(2)
    mask = None if kind is None else np.array([ref.padding_row(kind, T, rng) for _ in range(B)])
    return *arrays(dtype, (B, S, H, C), (B, S, H, C), (B, T, K, C), (B, T, K, C)), mask, window


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("case", list(ATTENTION))
@pytest.mark.parametrize("name", ["attention_backward", "textbook_attention_backward"])
def test_attention_backward(name, case, dtype):
    """Both forms against torch, in blocks, with windows, groups, padding, and blind rows."""
    arguments = attention_case(case, dtype)
    ours = getattr(phi3_ref, name)(*arguments)
    theirs = attention_gradients(*arguments)
    largest = max(np.abs(x).max() for x in theirs)
    for mine, its in zip(ours, theirs, strict=True):
        assert mine.dtype == arguments[0].dtype and np.isfinite(mine).all()
        error = np.abs(np.asarray(mine, "float64") - its).max()
        # Where every query sees one key, its and the key's are zero: the difference of equals.
        alone = case in ("one of each", "a window of one")
        assert error <= DTYPES[dtype] * (largest if alone else np.abs(its).max())


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("case", list(ATTENTION))
def test_log_sum_exp_of_attention(case, dtype):
    """What the forward leaves to its derivative: of float64's scores, 0 where nothing is seen.

    It changes no bit of the context; a derivative that is given none has the same bits.
    """
    gradient, query, key, value, mask, window = attention_case(case, dtype)
    (B, S, H, _), T = query.shape, key.shape[1]
    found = np.full((B, H, S), np.nan, phi3_ref.upcast(query).dtype)
    context = phi3_ref.attention(query, key, value, mask, window, log_sum_exp=found)
    without = phi3_ref.attention(query, key, value, mask, window)
    assert context.tobytes() == without.tobytes()
    tape = phi3_ref.Tape()
    phi3_ref.textbook_attention(*(x.astype("float64") for x in (query, key, value)), tap=tape)
    scores = tape["scores"]
    visible = phi3_ref.visible_keys(np.arange(T - S, T), np.arange(T), window, mask)
    exact = np.where(visible[..., None, :, :], scores, -np.inf).astype(np.longdouble)
    exact = np.logaddexp.reduce(exact, axis=-1)  # one by one
    exact[np.isneginf(exact)] = 0
    tolerance = (1e-15 if dtype == "float64" else 1e-6) * (1 + abs(scores).max())
    assert found.shape == exact.shape and abs(found - exact).max() <= tolerance
    assert not found[exact == 0].any()
    arguments = gradient, query, key, value, mask, window
    given = phi3_ref.attention_backward(*arguments, tape={"context": context, "log_sum_exp": found})
    for one, other in zip(given, phi3_ref.attention_backward(*arguments), strict=True):
        assert one.tobytes() == other.tobytes()


def test_a_tape_has_the_log_sum_exp_and_no_scores():
    """Of attention, where nobody looks; a user's tap is never called with it, and sees scores."""
    config, inputs = ref.random_case(random.Random(0).choice, num_layers=2)
    for fused in (True, False):
        backbone = phi3_ref.Phi3Backbone(**config, fused=fused, seed=0)
        weights = backbone.weights, backbone.config, np.asarray(inputs["token_ids"])
        tapes, seen = [], phi3_ref.Tape()
        phi3_ref.forward(*weights, tapes=tapes)
        *tapes, _ = tapes
        assert all(("attention.log_sum_exp" in tape) == fused for tape in tapes)
        assert not any("attention.scores" in tape for tape in tapes)
        tapes = []
        phi3_ref.forward(*weights, tapes=tapes, tap=seen)
        assert not any("log_sum_exp" in name for tape in (seen, *tapes) for name in tape)
        assert "transformer_layer_1.attention.scores" in seen


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["attention_backward", "textbook_attention_backward"])
def test_what_all_keys_share_is_not_in_the_scores_gradient(name, dtype):
    """Values that are nearly alike: s' is a small difference, for which p must add up to one.

    KerasHub and transformers, too, keep the probabilities in float32 for softmax's derivative: the
    error is that of the gradients of the probabilities, whose rounding is the only one before it.
    """
    import torch
    g, query, key, value = arrays(dtype, (1, 64, 2, 16), (1, 64, 2, 16), (1, 64, 2, 16),
                                  (1, 64, 2, 16))
    value[:] = value[:, :1]  # the same for every key: no query or key matters at all
    ours = getattr(phi3_ref, name)(g, query, key, value)
    tensors = [torch.from_numpy(np.asarray(x, "float32")).to(getattr(torch, dtype)).transpose(1, 2)
               .requires_grad_() for x in (query, key, value)]
    q, k, v = tensors  # as transformers' eager attention
    scores = (q @ k.transpose(2, 3)) * 16**-0.5
    scores = scores.masked_fill(torch.ones(64, 64, dtype=bool).triu(1), -torch.inf)
    context = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype) @ v
    context.backward(torch.from_numpy(np.asarray(g, "float32")).to(q.dtype).transpose(1, 2))
    for mine, tensor in zip(ours[:2], tensors[:2], strict=True):
        its = np.abs(tensor.grad.float().numpy()).mean()  # all of it is error: the truth is zero
        assert np.abs(np.asarray(mine, "float32")).mean() <= 2 * its + 1e-7


def torch_cross_entropy(logits, labels, sample_weight):
    import torch
    from torch.nn import functional
    x = torch.from_numpy(np.asarray(logits, "float64")).requires_grad_()
    losses = functional.cross_entropy(x.flatten(0, 1), torch.from_numpy(labels).flatten(),
                                      reduction="none")
    if sample_weight is not None:
        losses = losses * torch.from_numpy(np.asarray(sample_weight, "float64")).flatten()
    loss = losses.sum() / labels.size
    loss.backward()
    return loss.item(), x.grad.numpy()


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy(dtype, weighted):
    rng = np.random.default_rng(3)
    logits, = arrays(dtype, (3, 5, 11))
    labels = rng.integers(0, 11, (3, 5))
    sample_weight = rng.uniform(0, 2, (3, 5)).astype("float32") if weighted else None
    loss, gradient = phi3_ref.cross_entropy(logits, labels, sample_weight)
    its_loss, its_gradient = torch_cross_entropy(logits, labels, sample_weight)
    assert loss.dtype == phi3_ref.upcast(logits).dtype and loss.shape == ()
    assert loss == pytest.approx(its_loss, 1e-12 if dtype == "float64" else 1e-6)
    assert_close([gradient], [its_gradient], dtype, like=logits)


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_cross_entropy_of_extreme_logits(dtype):
    """Where e^logit is far beyond any dtype, foreseen or not; and with one token alone."""
    largest = float(ml_dtypes.finfo(np.float16).max)
    logits = np.zeros((1, 6, 3), phi3_ref.DTYPE_POLICIES[dtype][0])
    logits[0] = [[1e4, -1e4, 0], [-1e4, 1e4, 0], [largest, -largest, 0], [-largest, largest, 1],
                 [largest] * 3, [-largest] * 3]
    labels = np.zeros((1, 6), int)
    loss, gradient = phi3_ref.cross_entropy(logits, labels)
    its_loss, its_gradient = torch_cross_entropy(logits, labels, None)
    assert loss == pytest.approx(its_loss, 1e-6)
    assert_close([gradient], [its_gradient], dtype, like=logits)
    loss, gradient = phi3_ref.cross_entropy(logits[..., :1], labels)
    assert loss == 0 and not gradient.any()
    loss, gradient = phi3_ref.cross_entropy(logits, labels, np.zeros((1, 6)))
    assert loss == 0 and not gradient.any()


def test_dropout_backward():
    """The derivative of a product with a constant: the same zeros, the same factor."""
    x, g = arrays("float64", (200, 50), (200, 50))
    rng, kept = np.random.default_rng(0), phi3_ref.Tape()
    y = phi3_ref.dropout(x, 0.25, rng, kept)
    np.testing.assert_allclose(y, x * kept["dropout"] / 0.75, rtol=1e-15)
    gradient = phi3_ref.dropout_backward(g, 0.25, kept["dropout"])
    np.testing.assert_allclose(gradient, g * (y / x), rtol=1e-12)
    assert phi3_ref.dropout_backward(g, 0.25, None) is g


@pytest.mark.parametrize("V", [1, 3, 50])
def test_token_embedding_backward(V):
    """Each token's row sums up its occurrences, as torch's embedding does."""
    import torch
    from torch.nn import functional
    token_ids = np.random.default_rng(0).integers(0, V, (3, 8))
    g, table = arrays("float64", (3, 8, 4), (V, 4))
    ours = phi3_ref.token_embedding_backward(g, token_ids, V)
    theirs = torch_gradients(lambda w: functional.embedding(torch.from_numpy(token_ids), w), g,
                             table)
    assert_close([ours], theirs, "float64")


@TOO_LONG
def test_the_references_own_gradients_are_seen():
    """The recorders miss nothing: every name that `LAYER_TAPS` lists, and every weight."""
    config, inputs = ref.random_case(random.Random(0).choice, num_layers=2)
    model = ref.keras_backbone(config)
    y, _ = ref.random_labels(random.Random(0).choice, config["vocabulary_size"],
                             inputs["padding_mask"])
    trace, ours = keras_trace(model, inputs, y), ref.ours_like(model)
    taps = ref.tap_shapes(ours.config, *y.shape)
    weights = {name: array.shape for name, array in phi3_ref.named_weights(ours.weights)}
    shapes = {**taps, **{f"{name}.gradient": shape for name, shape in taps.items()},
              **{f"{name}.weight.gradient": shape for name, shape in weights.items()}}
    assert {name: array.shape for name, array in trace.items()} == shapes
