"""Each layer alone: against KerasHub's layer, and against its formula in float64."""

import warnings

import numpy as np
import pytest
import references as ref
from hypothesis import given, settings
from hypothesis import strategies as st

import phi3_ref

DTYPES = st.sampled_from(list(ref.NUMPY_DTYPE))
SEEDS = st.integers(0, 2**32 - 1)


def normal(seed, shape, dtype="float32", scale=1.0):
    values = np.random.default_rng(seed).normal(0.0, scale, shape)
    return values.astype(ref.NUMPY_DTYPE.get(dtype, dtype))


def keras_call(layer, *inputs, **kwargs):
    import keras
    return keras.ops.convert_to_numpy(layer(*inputs, **kwargs)).astype("float64")


# Products -----------------------------------------------------------------------------------------

def test_every_float16_is_upcast_as_numpy_does():
    """All 65,536: zeros of both signs, subnormals, infinities and NaNs among them."""
    every = np.arange(65536, dtype=np.uint16).view(np.float16).reshape(256, 256)
    finite = np.where(np.isfinite(every), every, np.float16(0))
    for values in (every, finite, finite.T, finite[::-2, 1::3]):
        np.testing.assert_array_equal(phi3_ref.upcast_weight(values).view(np.uint32),
                                      values.astype(np.float32).view(np.uint32))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 4, 5, 63, 64])
def test_large_products_in_16_bits(dtype, rows):
    """Piece by piece: the product in float64, rounded once; weights of any layout."""
    square, x = normal(0, (1030, 1030), dtype), normal(1, (2, rows, 1030), dtype)
    for weight in (square, square.T):
        ours = phi3_ref.linear(x, weight)
        assert ours.dtype == x.dtype
        exact = x.astype("float64") @ weight.T.astype("float64")
        assert ref.relative_error(ours, exact) <= ref.EPSILON[dtype] / 2 + 1e-6


@pytest.mark.parametrize("dtype, value", [("float16", 100), ("bfloat16", 2e18)])
def test_a_product_beyond_16_bits_warns_where_it_is_asked_to(dtype, value):
    """NumPy's warning, by the caller's error settings, whichever thread has met it."""
    weight = np.full((1100, 1024), value, ref.NUMPY_DTYPE[dtype])
    x = weight[:1]
    for setting in ("ignore", "warn"):
        with np.errstate(over=setting), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert np.isinf(phi3_ref.linear(x, weight)).all()
        assert bool(caught) == (setting == "warn")


# RMSNorm, SiLU, softmax, dropout -----------------------------------------------------------------

@settings(max_examples=ref.examples(40))
@given(st.lists(st.integers(1, 7), max_size=3), st.integers(1, 99), DTYPES, SEEDS,
       st.sampled_from([1e-6, 1e-5, 0.1]), st.sampled_from([0.01, 1.0, 100.0]))
def test_rms_norm(leading, dim, dtype, seed, epsilon, size):
    """RMSNorm equals KerasHub's layer and the formula, rounded once, for vectors of any size."""
    from keras_hub.src.models.phi3.phi3_layernorm import Phi3LayerNorm
    x = normal(seed, (*leading, dim), dtype, size)
    scale = np.random.default_rng(seed).uniform(0.5, 1.5, dim).astype(x.dtype)
    ours = phi3_ref.rms_norm(x, scale, epsilon)
    assert ours.dtype == x.dtype and ours.shape == x.shape
    exact = ref.exact_rms_norm(x, scale, epsilon)
    layer = Phi3LayerNorm(epsilon=epsilon, dtype=dtype)
    layer.build((1, *x.shape))  # a Keras layer wants a batch axis
    layer.set_weights([scale])
    half_a_step = ref.EPSILON[dtype] / 2 + 1e-6
    assert ref.relative_error(ours, exact) <= half_a_step
    assert ref.relative_error(ours, keras_call(layer, x[None])[0]) <= 2 * half_a_step


@pytest.mark.parametrize("dtype", ref.NUMPY_DTYPE)
def test_silu(dtype):
    """SiLU equals x * sigmoid(x) to one rounding, where exp() overflows and underflows too."""
    import keras
    x = np.array([*np.linspace(-120, 120, 4801), 0.0, -0.0, 1e-4, -6e4, 6e4])
    x = x.astype(ref.NUMPY_DTYPE[dtype])
    ours = phi3_ref.silu(x)
    assert ours.dtype == x.dtype
    # Below -88, exp(-x) overflows float32: the result is -0 where the formula says -1e-36 or less.
    smallest = max(1e-35, float(ref.ml_dtypes.finfo(x.dtype).smallest_subnormal))
    rtol = 4 * ref.EPSILON[dtype]
    exact = ref.exact_silu(x)
    np.testing.assert_allclose(ours.astype("float64"), exact, rtol=rtol, atol=smallest)
    reference = keras_call(keras.activations.silu, x.astype("float32"))
    np.testing.assert_allclose(ours.astype("float64"), reference, rtol=rtol, atol=smallest)


@settings(max_examples=ref.examples(40))
@given(st.lists(st.integers(1, 5), max_size=2), st.integers(1, 40), SEEDS,
       st.sampled_from([0.1, 10.0, 1e4]), st.sampled_from([0.0, 0.3, 1.0]))
def test_softmax(leading, length, seed, size, hidden):
    """Softmax equals Keras's and the formula; with nothing visible it is zero."""
    import keras
    scores = normal(seed, (*leading, length), scale=size)
    visible = np.random.default_rng(seed).random(scores.shape) >= hidden
    ours = phi3_ref.softmax(scores, visible)
    assert ours.dtype == np.float32 and ours.shape == scores.shape
    wide = np.where(visible, scores.astype("float64"), -np.inf)
    peak = np.where(visible.any(-1), wide.max(-1), 0.0)[..., None]
    exact = np.exp(wide - peak) / np.maximum(np.exp(wide - peak).sum(-1, keepdims=True), 1e-300)
    np.testing.assert_allclose(ours, exact, rtol=3e-6, atol=1e-7)
    assert not ours[~visible].any()
    sums = ours.astype("float64").sum(-1)
    np.testing.assert_allclose(sums, visible.any(-1).astype("float64"), atol=1e-6)
    layer = keras.layers.Softmax(axis=-1)
    np.testing.assert_allclose(ours, keras_call(layer, scores, mask=visible), rtol=3e-6, atol=1e-7)


def test_softmax_without_a_mask():
    """With no mask every score is visible, and a constant added to all changes nothing."""
    scores = normal(0, (3, 11))
    ours = phi3_ref.softmax(scores)
    np.testing.assert_allclose(ours, np.exp(scores) / np.exp(scores).sum(-1)[:, None], rtol=1e-5)
    np.testing.assert_allclose(ours, phi3_ref.softmax(scores + 64), rtol=1e-4)


@pytest.mark.parametrize("dtype", ref.NUMPY_DTYPE)
@pytest.mark.parametrize("rate", [0.1, 0.25, 0.5, 0.9])
def test_dropout(rate, dtype):
    """Dropout keeps a share 1 - rate, drawn per element, and scales it exactly as Keras does."""
    import keras
    x = np.ones((400, 500), ref.NUMPY_DTYPE[dtype])
    ours = phi3_ref.dropout(x, rate, np.random.default_rng(1))
    assert ours.dtype == x.dtype and ours.shape == x.shape
    reference = keras_call(keras.layers.Dropout(rate, seed=1, dtype=dtype), x, training=True)
    values = np.unique(ours).astype("float64")
    np.testing.assert_allclose(values, np.unique(reference), rtol=ref.EPSILON[dtype])
    kept = (ours != 0).astype("float64")
    deviation = np.sqrt(rate * (1 - rate))
    assert abs(kept.mean() - (1 - rate)) < 5 * deviation / np.sqrt(kept.size)
    for axis in (0, 1):  # whole rows or columns do not fall together
        spread = kept.mean(axis).std() * np.sqrt(kept.shape[axis])
        assert 0.8 * deviation < spread < 1.2 * deviation


def test_dropout_draws():
    """A generator's seed repeats the draw, its next draw differs, and rate 0 drops nothing."""
    x = normal(0, (30, 40))
    rng, again = np.random.default_rng(3), np.random.default_rng(3)
    first = phi3_ref.dropout(x, 0.5, rng)
    assert (first == phi3_ref.dropout(x, 0.5, again)).all()
    assert (first != phi3_ref.dropout(x, 0.5, rng)).any()
    assert (phi3_ref.dropout(x, 0.0, rng) == x).all()


# RoPE --------------------------------------------------------------------------------------------

def one_head(head_dim, **settings):
    """The configuration of a model with one head."""
    return phi3_ref.Phi3Config(vocabulary_size=1, num_layers=1, hidden_dim=head_dim,
                               intermediate_dim=1, num_query_heads=1, num_key_value_heads=1,
                               **settings)


@settings(max_examples=ref.examples(40))
@given(st.integers(1, 2), st.integers(1, 9), st.integers(1, 3), st.sampled_from([2, 6, 16, 96]),
       st.sampled_from([0, 1, 77, 5000]), st.sampled_from([100.0, 10000.0, 250000.0]),
       st.booleans(), DTYPES, SEEDS)
def test_rotary_embedding(batch, length, heads, dim, start, wavelength, su, dtype, seed):
    """RoPE equals a product of complex numbers, and KerasHub's plain and su-scaled layers."""
    from keras_hub.src.layers.modeling.rotary_embedding import RotaryEmbedding
    from keras_hub.src.models.phi3.phi3_rotary_embedding import Phi3SuScaledRotaryEmbedding
    x = normal(seed, (batch, length, heads, dim), dtype)
    positions = np.arange(start, start + length)
    layer, factors, magnitude = RotaryEmbedding(wavelength, dtype=dtype), None, 1.0
    scaling = {}
    if su:
        factors = np.random.default_rng(seed).uniform(0.8, 40.0, dim // 2).astype("float32")
        magnitude = ref.exact_su_magnitude(4096, 64)
        unused = np.ones(dim // 2, "float32")
        short, long = (unused, factors) if start + length > 64 else (factors, unused)
        layer = Phi3SuScaledRotaryEmbedding(short, long, 4096, 64, wavelength, dtype=dtype)

        scaling = dict(rope_scaling_type="su", rope_scaling_short_factor=short.tolist(),
                       rope_scaling_long_factor=long.tolist(), max_sequence_length=4096,
                       pretraining_sequence_length=64)

    config = one_head(dim, rope_max_wavelength=wavelength, dtype=dtype, **scaling)
    cos, sin = config.rotary(positions, config.uses_long_factors(start + length))
    assert cos.shape == sin.shape == (length, 1, dim // 2) and cos.dtype == sin.dtype == x.dtype
    ours = phi3_ref.rotary_embedding(x, cos, sin)
    assert ours.dtype == x.dtype and ours.shape == x.shape
    # An angle in float32 is off by a part in 2^22 of itself, on either side.
    angle = positions[-1] * 2.0**-22 / (1.0 if factors is None else factors.min())
    exact = ref.exact_rotary(x, positions, wavelength, factors, magnitude)
    assert ref.relative_error(ours, exact) <= 3 * ref.EPSILON[dtype] + 2 * angle
    reference = keras_call(layer, x, start_index=start)
    assert ref.relative_error(ours, reference) <= 3 * ref.EPSILON[dtype] + 4 * angle


def test_rotary_embedding_in_float64():
    """In float64 RoPE equals the complex product to 1e-10, at positions up to 131,071."""
    x, factors = normal(0, (1, 5, 2, 96), "float64"), np.linspace(1.0, 60.0, 48)
    positions = np.array([0, 1, 4096, 65537, 131071])
    config = one_head(96, dtype="float64", rope_scaling_type="su", rope_attention_factor=1.19,
                      rope_scaling_short_factor=[1.0] * 48, rope_scaling_long_factor=[*factors])
    tables = config.rotary(positions, long=True)
    ours = phi3_ref.rotary_embedding(x, *tables)
    exact = ref.exact_rotary(x, positions, 1e4, factors, 1.19)
    assert ref.relative_error(ours, exact) < 1e-10  # an angle of 131,071 is known to 1.5e-11


def test_rotary_embedding_sees_distances_only():
    """The product of a rotated query and a rotated key depends on how far apart they stand."""
    query, key = normal(0, (1, 1, 1, 32), "float64"), normal(1, (1, 1, 1, 32), "float64")

    def product(query_position, key_position):
        tables = [one_head(32, dtype="float64").rotary(np.array([position]))
                  for position in (query_position, key_position)]
        return (phi3_ref.rotary_embedding(query, *tables[0])
                * phi3_ref.rotary_embedding(key, *tables[1])).sum()

    assert product(9, 2) == pytest.approx(product(507, 500), abs=1e-10)
    assert product(9, 2) != pytest.approx(product(9, 3), abs=1e-3)


@pytest.mark.parametrize("rotary_dim", [2, 6, 12])
def test_partial_rotary_embedding(rotary_dim):
    """The first `rotary_dim` channels turn as a head of that size would; the rest pass through."""
    x, positions = normal(0, (2, 4, 3, 16)), np.arange(4)
    tables = one_head(16, partial_rotary_factor=rotary_dim / 16).rotary(positions)
    ours = phi3_ref.rotary_embedding(x, *tables)
    exact = ref.exact_rotary(x[..., :rotary_dim], positions, 1e4)
    assert ref.relative_error(ours[..., :rotary_dim], exact) < 1e-6
    assert (ours[..., rotary_dim:] == x[..., rotary_dim:]).all()


# Attention ---------------------------------------------------------------------------------------

BOTH = pytest.mark.parametrize("attend", [phi3_ref.textbook_attention, phi3_ref.attention])


def attention_arrays(seed, batch, queries, keys, kv_heads, group, dim, dtype="float32"):
    query = normal(seed, (batch, queries, kv_heads * group, dim), dtype, 2.0)
    key = normal(seed + 1, (batch, keys, kv_heads, dim), dtype)
    return query, key, normal(seed + 2, (batch, keys, kv_heads, dim), dtype)


@st.composite
def attention_cases(draw):
    """Draws the arguments of an attention function: S <= T, GQA, masks, windows, dtypes."""
    batch, queries = draw(st.integers(1, 3)), draw(st.integers(1, 7))
    keys, seed = queries + draw(st.integers(0, 6)), draw(st.integers(0, 2**20))
    arrays = attention_arrays(seed, batch, queries, keys, draw(st.sampled_from([1, 2, 3])),
                              draw(st.sampled_from([1, 2, 5])), draw(st.sampled_from([1, 3, 8])),
                              draw(DTYPES))
    rng, kinds = np.random.default_rng(seed), ["ones", "right", "left", "holes", "zeros"]
    mask = np.array([ref.padding_row(draw(st.sampled_from(kinds)), keys, rng)
                     for _ in range(batch)], "int32")
    return *arrays, draw(st.sampled_from([None, mask])), draw(st.sampled_from([None, 1, 2, 4, 99]))


def attention_tolerance(attend, dtype):
    """The blocked form rounds once, at its end; the textbook form rounds every step."""
    once = ref.EPSILON[dtype.name] / 2 + 2e-6
    return once if attend is phi3_ref.attention else max(ref.TOLERANCE[dtype.name], once)


@BOTH
@settings(max_examples=ref.examples(60))
@given(attention_cases())
def test_attention(attend, case):
    """Attention equals a loop over rows in float64; a row that sees no key is exactly zero."""
    query, key, value, mask, window = case
    ours = attend(query, key, value, mask, window)
    assert ours.dtype == query.dtype and ours.shape == query.shape
    exact = ref.exact_attention(query, key, value, mask, window)
    assert ref.relative_error(ours, exact) <= attention_tolerance(attend, query.dtype)
    blind = ~exact.any(-1)
    assert not ours[blind].any()


@BOTH
@settings(max_examples=ref.examples(30))
@given(attention_cases())
def test_attention_against_keras(attend, case):
    """Attention equals what KerasHub's attention layer computes with KerasHub's own cache mask."""
    from keras import ops
    from keras_hub.src.layers.modeling.transformer_layer_utils import compute_causal_mask
    from keras_hub.src.models.phi3.phi3_attention import Phi3Attention
    query, key, value, mask, _ = case
    (batch, queries, heads, dim), (keys, kv_heads) = query.shape, key.shape[1:3]
    layer = Phi3Attention(heads, kv_heads, dtype=query.dtype.name)
    layer.build((batch, queries, heads * dim))
    visible = compute_causal_mask(batch, keys, queries, keys - queries)
    if mask is not None:
        visible = ops.logical_and(visible, ops.convert_to_tensor(mask[:, None, :] > 0))
    key_heads, value_heads = (np.repeat(array, heads // kv_heads, 2) for array in (key, value))
    reference = keras_call(layer._compute_attention, query, key_heads, value_heads, visible)
    ours = attend(query, key, value, mask)
    assert ref.relative_error(ours, reference) <= 2 * ref.TOLERANCE[query.dtype.name]


@BOTH
@pytest.mark.parametrize("queries, keys, window", [
    (1, 700, None), (1, 700, 300), (129, 700, None), (300, 300, 5), (300, 300, 150),
    (257, 300, None), (128, 128, None), (256, 256, 128), (127, 383, 129)])
def test_long_attention(attend, queries, keys, window):
    """Across many blocks, with keys hidden at their start, attention still equals the row loop."""
    query, key, value = attention_arrays(queries, 2, queries, keys, 1, 2, 4)
    mask = np.ones((2, keys), bool)
    mask[0, : keys // 2 + 20] = False  # whole blocks of queries see nothing
    mask[1, 7::3] = False
    ours = attend(query, key, value, mask, window)
    assert ref.relative_error(ours, ref.exact_attention(query, key, value, mask, window)) < 2e-6


@BOTH
def test_attention_in_float64(attend):
    """In float64 attention equals the row loop to 1e-14: nothing inside falls back to float32."""
    query, key, value = (array.astype("float64") for array in attention_arrays(0, 2, 5, 8, 2, 3, 6))
    ours = attend(query, key, value, None, 6)
    assert ours.dtype == np.float64
    assert ref.relative_error(ours, ref.exact_attention(query, key, value, None, 6)) < 1e-14


@BOTH
def test_attention_of_large_scores(attend):
    """Scores in the thousands neither overflow nor lose the one key that wins."""
    query, key, value = attention_arrays(0, 1, 6, 6, 1, 1, 8)
    query, key = query * 100, key * 100
    ours = attend(query, key, value)
    assert ref.relative_error(ours, ref.exact_attention(query, key, value)) < 2e-5


def test_textbook_attention_shows_its_steps():
    """The tap sees scaled scores and probabilities, and what it returns is used instead."""
    query, key, value = attention_arrays(5, 2, 3, 5, 2, 2, 4)
    seen = {}

    def record(name, array):
        seen[name] = array
        return array

    phi3_ref.textbook_attention(query, key, value, tap=record)
    heads = np.repeat(key, 2, 2).astype("float64")
    scores = np.einsum("bshc,bthc->bhst", query.astype("float64"), heads) / 2.0
    assert ref.relative_error(seen["scores"], scores) < 1e-6
    causal = np.tril(np.ones((3, 5), bool), 2)
    weights = np.exp(scores) * causal
    assert ref.relative_error(seen["probabilities"], weights / weights.sum(-1)[..., None]) < 2e-6

    def look_at_the_first(name, array):
        return np.eye(1, 5, dtype=array.dtype) + 0 * array if name == "probabilities" else array

    patched = phi3_ref.textbook_attention(query, key, value, tap=look_at_the_first)
    assert (patched == np.repeat(value[:, :1], 2, 2)).all()


@pytest.mark.parametrize("dtype", ref.NUMPY_DTYPE)
def test_textbook_attention_rounds_its_steps(dtype):
    """Scores and probabilities are in the compute dtype, as in KerasHub."""
    dtypes = {}

    def record(name, array):
        dtypes[name] = array.dtype
        return array

    phi3_ref.textbook_attention(*attention_arrays(0, 1, 2, 3, 1, 2, 4, dtype), tap=record)
    assert dtypes == dict.fromkeys(["scores", "probabilities"], ref.NUMPY_DTYPE[dtype])


def test_textbook_attention_holds_what_the_fast_attention_holds():
    """Where q·k exceeds float16's 65,504 and the scaled scores do not: torch's attention."""
    import torch
    C = 96
    query, key, value = attention_arrays(7, 2, 5, 5, 2, 2, C, "float16")
    query, key = query * np.float16(60), key * np.float16(60)  # q·k to 230,000
    heads = [np.repeat(array, 2, axis=2) for array in (key, value)]
    products = np.einsum("bshc,bthc->bhst", query, heads[0], dtype="float64")
    assert 65_504 < abs(products).max() < 65_504 * C**0.5
    tensors = [torch.from_numpy(array).transpose(1, 2) for array in (query, *heads)]
    theirs = torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=True)
    theirs, seen = theirs.transpose(1, 2).numpy(), []
    for ours in (phi3_ref.attention(query, key, value),
                 phi3_ref.textbook_attention(query, key, value),
                 phi3_ref.attention(query, key, value, tap=lambda _, x: seen.append(x) or x)):
        assert np.isfinite(ours).all()
        assert ref.relative_error(ours, theirs) <= ref.TOLERANCE["float16"]
    assert ref.relative_error(seen[0], products * C**-0.5) <= ref.TOLERANCE["float16"]
