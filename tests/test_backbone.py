"""The whole backbone: against KerasHub on TensorFlow, against float64, and its own surface."""

import random
import tracemalloc
import warnings

import numpy as np
import pytest
import references as ref
from hypothesis import given, settings
from hypothesis import strategies as st

import phi3_ref

POLICIES = list(ref.TOLERANCE)
TINY = dict(vocabulary_size=29, num_layers=2, hidden_dim=24, intermediate_dim=36,
            num_query_heads=6, num_key_value_heads=2)
SU = dict(rope_scaling_type="su", rope_scaling_short_factor=[1.0, 1.3],
          rope_scaling_long_factor=[2.0, 9.0])
TOO_LONG = pytest.mark.filterwarnings("ignore:.*max_sequence_length")


@st.composite
def cases(draw, **kwargs):
    """Draws (config, inputs) of a small model; see `references.random_case`."""
    return ref.random_case(lambda options: draw(st.sampled_from(options)), **kwargs)


def token_ids(batch, length, seed=0):
    return np.random.default_rng(seed).integers(0, 29, (batch, length)).astype("int32")


def ours_tiny(**kwargs):
    return phi3_ref.Phi3Backbone(**{**TINY, "seed": 0, **kwargs})


# Against KerasHub --------------------------------------------------------------------------------

@TOO_LONG
@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=ref.examples(25))
@given(cases(), st.integers(0, 1000))
def test_hidden_states(policy, case, seed):
    """Every row equals KerasHub's, rows that see no key included; so do the logits."""
    import keras
    config, inputs = case
    reference = ref.keras_backbone(config, policy, seed)
    expected, ours = ref.keras_output(reference, inputs), ref.ours_like(reference)
    assert ours.dtype_policy == reference.dtype_policy.name
    hidden = ours(inputs)
    assert hidden.dtype == ref.NUMPY_DTYPE[policy.removeprefix("mixed_")]
    assert ref.relative_error(hidden, expected) <= ref.TOLERANCE[policy]
    textbook = ref.ours_like(reference, fused=False)(inputs)
    assert ref.relative_error(textbook, expected) <= ref.TOLERANCE[policy]
    assert ref.relative_error(hidden, textbook) <= ref.TOLERANCE[policy]

    states = keras.ops.convert_to_tensor(hidden)  # the same hidden states to both projections
    expected = keras.ops.convert_to_numpy(reference.token_embedding(states, reverse=True))
    logits = ours.token_embedding(hidden, reverse=True)
    assert logits.dtype == hidden.dtype
    assert ref.relative_error(logits, expected) <= ref.TOLERANCE[policy]


@pytest.mark.parametrize("policy", POLICIES)
def test_token_embedding(policy):
    """Token ids become KerasHub's very vectors, in the compute dtype."""
    import keras
    reference = ref.keras_backbone(TINY, policy)
    ids = token_ids(3, 5)
    ours = ref.ours_like(reference).token_embedding(ids)
    expected = keras.ops.convert_to_numpy(reference.token_embedding(ids))
    assert ours.dtype == expected.dtype
    assert (ours == expected).all()


@TOO_LONG
@pytest.mark.parametrize("length", [7, 8, 9, 40])
@pytest.mark.parametrize("ratio", [0.5, 1, 2, 32])
def test_su_scaling(length, ratio):
    """Short factors up to the pretraining length, long ones beyond; the magnitude by the ratio."""
    config = {**TINY, **SU, "pretraining_sequence_length": 8, "max_sequence_length": int(8 * ratio)}
    reference = ref.keras_backbone(config)
    inputs = {"token_ids": token_ids(2, length), "padding_mask": np.ones((2, length), "int32")}
    ours = ref.ours_like(reference)
    assert ref.relative_error(ours(inputs), ref.keras_output(reference, inputs)) <= 2e-6
    other_side = ref.ours_like(reference, pretraining_sequence_length=100 if length > 8 else 2,
                               rope_attention_factor=ref.exact_su_magnitude(8 * ratio, 8))
    assert ref.relative_error(other_side(inputs), ours(inputs)) > 1e-3


def test_5000_tokens_across_the_su_boundary():
    """A long prompt equals KerasHub's; decoding over the boundary, a forward pass from nothing."""
    config = {**TINY, **SU, "pretraining_sequence_length": 4096, "max_sequence_length": 131072}
    reference = ref.keras_backbone(config)
    ours, ids = ref.ours_like(reference), token_ids(1, 5000)
    expected = ref.keras_output(reference, {"token_ids": ids, "padding_mask": np.ones_like(ids)})
    assert ref.relative_error(ours({"token_ids": ids}), expected) <= 2e-6
    causal_lm, cache = phi3_ref.Phi3CausalLM(ours), None
    for length in (4090, 4096, 4097, 4098):
        logits, cache = causal_lm.next_logits(ids, length, cache)
        expected = causal_lm({"token_ids": ids[:, :length]})[:, -1]
        assert ref.relative_error(logits, expected) <= 2e-6


@pytest.mark.parametrize("fused", [True, False])
def test_memory_grows_with_the_prompt_not_with_its_square(fused):
    """Twice the prompt, twice the memory; the textbook path, for which that is false, shows it."""
    backbone, peaks = ours_tiny(fused=fused), []
    for length in (1024, 1024, 2048):  # the first draws the weights
        tracemalloc.start()
        backbone({"token_ids": token_ids(1, length)})
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    ratio = peaks[2] / peaks[1]
    assert 1.5 < ratio < 2.2 if fused else 3.5 < ratio < 4.2


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
def test_nothing_gives_nothing(shape, fused):
    """An empty batch and sequences without tokens have hidden states and logits, of no size."""
    for policy in ("float32", "bfloat16"):
        backbone = ours_tiny(fused=fused, dtype=policy)
        hidden = backbone({"token_ids": np.zeros(shape, int)})
        assert hidden.shape == (*shape, 24) and hidden.dtype == backbone.compute_dtype
        assert backbone.token_embedding(hidden, reverse=True).shape == (*shape, 29)


def test_mask_of_zeros():
    """A sequence that is all padding equals KerasHub's, where attention gives exact zeros."""
    reference = ref.keras_backbone(TINY)
    inputs = {"token_ids": token_ids(2, 6), "padding_mask": np.zeros((2, 6), "int32")}
    contexts = []

    def record(name, array):
        if name.endswith("attention.context"):
            contexts.append(array)
        return array

    ours = ref.ours_like(reference)
    ours(inputs, tap=record)
    assert len(contexts) == 2 and not np.any(contexts)
    assert ref.relative_error(ours(inputs), ref.keras_output(reference, inputs)) <= 2e-6


def test_padding_mask_may_be_left_out():
    """Without a padding mask every token is real; a bool mask is as good as 0 and 1."""
    backbone, ids = ours_tiny(), token_ids(2, 5)
    hidden = backbone({"token_ids": ids})
    assert (hidden == backbone({"token_ids": ids, "padding_mask": np.ones((2, 5), "int64")})).all()
    mask = np.array([[1, 1, 0, 1, 1], [0, 1, 1, 1, 0]])
    hidden = backbone({"token_ids": ids, "padding_mask": mask})
    assert (hidden == backbone({"token_ids": ids, "padding_mask": mask > 0})).all()


# Against float64 ---------------------------------------------------------------------------------

@TOO_LONG
@settings(max_examples=ref.examples(25))
@given(cases(), st.integers(0, 1000))
def test_float64_is_exact(case, seed):
    """The float64 policy equals the formulas to 1e-12, with the weights of a KerasHub model."""
    config, inputs = case
    ours = phi3_ref.Phi3Backbone(**config, dtype="float64")
    rng = np.random.default_rng(seed)
    ours.set_weights([ref.randomized(w.shape, rng, w.shape[0]) for w in ours.get_weights()])
    exact = ref.exact_backbone(ours.get_config(), ours.get_weights(), **inputs)
    assert ours(inputs).dtype == np.float64
    assert ref.relative_error(ours(inputs), exact) <= 1e-12


@TOO_LONG
@pytest.mark.parametrize("policy", POLICIES)
def test_error_is_no_larger_than_kerashubs(policy):
    """Over 30 models, the mean error against float64 is no larger than KerasHub's own."""
    parity, ours, theirs = np.array(ref.keras_errors(policy, range(30))).T
    assert parity.max() <= ref.TOLERANCE[policy]
    assert ref.no_larger(ours, theirs)


# Weights -----------------------------------------------------------------------------------------

@settings(max_examples=ref.examples(10))
@given(cases())
def test_weights(case):
    """get_weights has KerasHub's order and shapes, what is set comes back, the count is equal."""
    config, _ = case
    reference = ref.keras_backbone(config)
    expected = reference.get_weights()
    ours = phi3_ref.Phi3Backbone(**config)
    assert [w.shape for w in ours.get_weights()] == [w.shape for w in expected]
    ours.set_weights(expected)
    for got, want in zip(ours.get_weights(), expected, strict=True):
        assert got.dtype == want.dtype and (got == want).all()
    reference.set_weights(ours.get_weights())
    assert ours.count_params() == reference.count_params()


@pytest.mark.parametrize("policy", POLICIES)
def test_weight_dtypes(policy):
    """Weights are stored in KerasHub's dtype: float32 in the mixed policies."""
    expected = ref.keras_backbone(TINY, policy).get_weights()
    ours = ours_tiny(dtype=policy).get_weights()
    assert [weight.dtype for weight in ours] == [weight.dtype for weight in expected]


def test_set_weights_checks():
    """A missing array, or one of a wrong shape, is refused by name and changes nothing."""
    backbone = ours_tiny()
    before = backbone.get_weights()
    with pytest.raises(ValueError, match=str(len(before))):
        backbone.set_weights(before[:-1])
    wrong = [weight + 1 for weight in before]
    wrong[4] = wrong[4].T
    with pytest.raises(ValueError, match="key"):
        backbone.set_weights(wrong)
    assert all((a == b).all() for a, b in zip(backbone.get_weights(), before, strict=True))


def test_get_weights_gives_copies():
    """Writing into what get_weights returned leaves the model as it was."""
    backbone, ids = ours_tiny(), {"token_ids": token_ids(1, 4)}
    before = backbone(ids)
    for weight in backbone.get_weights():
        weight[...] = 0
    assert (backbone(ids) == before).all()


@pytest.mark.parametrize("max_length", [4096, 131072])
def test_built_in_presets_dimensions_allocate_nothing(max_length):
    """Phi-3-mini's 3,821,079,552 parameters are counted and described without drawing them."""
    import keras_hub
    su = dict(pretraining_sequence_length=4096, rope_scaling_type="su",
              rope_scaling_short_factor=[1.0] * 48, rope_scaling_long_factor=[2.0] * 48)
    tracemalloc.start()
    backbone = phi3_ref.Phi3Backbone(
        vocabulary_size=32064, num_layers=32, hidden_dim=3072, intermediate_dim=8192,
        num_query_heads=32, num_key_value_heads=32, max_sequence_length=max_length, weights={},
        **(su if max_length > 4096 else {}))
    count, config = backbone.count_params(), backbone.get_config()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 3_821_079_552
    assert config["hidden_dim"] == 3072
    assert peak < 2**20
    name = f"phi3_mini_{max_length // 1024}k_instruct_en"
    assert count == keras_hub.models.Phi3Backbone.presets[name]["metadata"]["params"]


def test_random_weights_are_kerashubs():
    """Random weights have KerasHub's distributions: normal, 0.01 or 0.02 wide; ones for norms."""
    config = {**TINY, "vocabulary_size": 500, "hidden_dim": 96, "intermediate_dim": 200}
    import keras_hub
    reference = keras_hub.models.Phi3Backbone(**config).get_weights()
    for ours, expected in zip(phi3_ref.Phi3Backbone(**config, seed=3).get_weights(), reference,
                              strict=True):
        if expected.ndim == 1:
            assert (expected == 1).all() and (ours == 1).all()
            continue
        sigma = 0.01 if 500 in expected.shape else 0.02
        for sample in (ours, expected):  # what holds for ours is seen to hold for KerasHub's
            root = np.sqrt(sample.size)
            assert abs(sample.mean()) < 5 * sigma / root
            assert abs(sample.std() - sigma) < 5 * sigma / root
            inside = (np.abs(sample) < sigma).mean()
            assert abs(inside - 0.6827) < 5 * np.sqrt(0.6827 * 0.3173) / root
            assert np.abs(sample).max() > 3 * sigma  # not truncated


def test_seed_repeats_random_weights():
    """One seed gives the same weights, in every dtype up to rounding; another gives others."""
    first, again, other = (ours_tiny(seed=seed).get_weights() for seed in (5, 5, 6))
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert (first[0] != other[0]).any()
    half = ours_tiny(seed=5, dtype="float16").get_weights()
    assert all((a.astype("float16") == b).all() for a, b in zip(first, half, strict=True))
    unseeded = [ours_tiny(seed=None).get_weights()[0] for _ in range(2)]
    assert (unseeded[0] != unseeded[1]).any()


# Configuration -----------------------------------------------------------------------------------

@TOO_LONG
@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=ref.examples(5))
@given(cases(), st.sampled_from([0.0, 0.25]))
def test_config(policy, case, dropout):
    """get_config equals KerasHub's, which accepts it; from_config gives the same model back."""
    import keras_hub
    config, inputs = {**case[0], "dropout": dropout, "name": "phi", "trainable": False}, case[1]
    reference = keras_hub.models.Phi3Backbone(**config, dtype=policy)
    ours = phi3_ref.Phi3Backbone(**config, dtype=policy)
    assert ours.get_config() == reference.get_config()
    assert list(ours.get_config()) == list(reference.get_config())
    theirs = keras_hub.models.Phi3Backbone.from_config(ours.get_config())
    assert theirs.dtype_policy.name == policy
    copy = phi3_ref.Phi3Backbone.from_config(reference.get_config())
    copy.set_weights(ours.get_weights())
    assert (copy(inputs) == ours(inputs)).all()


@pytest.mark.parametrize("extra", [
    {"head_dim": 10}, {"partial_rotary_factor": 0.5}, {"sliding_window": 3},
    {"tie_word_embeddings": True}, {**SU, "rope_attention_factor": 1.25},
    {"hidden_dim": 25, "head_dim": 4}], ids=lambda extra: ",".join(extra))
def test_config_of_what_kerashub_cannot_express(extra):
    """The arguments beyond KerasHub's, too, survive get_config and from_config."""
    ours = ours_tiny(**extra)
    copy = phi3_ref.Phi3Backbone.from_config(ours.get_config())
    copy.set_weights(ours.get_weights())
    ids = {"token_ids": token_ids(2, 9)}
    assert (copy(ids) == ours(ids)).all()
    plain = {name: ours_tiny().get_config().get(name) for name in extra}
    assert copy.get_config() == ours.get_config() and copy.count_params() == ours.count_params()
    assert any(getattr(copy, name) == value != plain[name] for name, value in extra.items())


def test_tied_embeddings():
    """Tied, the projection onto the vocabulary is the embedding, and is counted once."""
    ours = ours_tiny(tie_word_embeddings=True)
    embedding, reverse = ours.get_weights()[:2]
    assert (embedding == reverse.T).all()
    hidden = ours({"token_ids": token_ids(1, 3)})
    logits = ours.token_embedding(hidden, reverse=True)
    assert ref.relative_error(logits, hidden @ embedding.T) < 1e-6
    assert ours.count_params() == ours_tiny().count_params() - 29 * 24


@pytest.mark.parametrize("arguments, message", [
    *[({name: value}, name) for value in (0, -1, 2.0, "2", None, True) for name in (
        "vocabulary_size", "num_layers", "hidden_dim", "intermediate_dim", "num_query_heads",
        "num_key_value_heads", "max_sequence_length", "pretraining_sequence_length")],
    *[({"sliding_window": value}, "sliding_window") for value in (0, -3, 1.5)],
    *[({"head_dim": value}, "head_dim") for value in (0, -2, 3, 4.5, "4")],
    *[({name: value}, name) for value in (1, "false", None, np.nan)
      for name in ("trainable", "fused", "tie_word_embeddings")],
    *[({"layer_norm_epsilon": value}, "layer_norm_epsilon")
      for value in (-1e-6, np.nan, "1", None)],
    *[({"dropout": value}, "dropout") for value in (-0.1, 1.0, 1.5, np.nan, "a", None)],
    *[({"rope_max_wavelength": value}, "rope_max_wavelength") for value in (0, -1, np.inf, "x")],
    *[({"partial_rotary_factor": value}, "partial_rotary_factor") for value in (0, -1, 1.5, 0.3)],
    *[({**SU, "rope_attention_factor": value}, "rope_attention_factor")
      for value in (0, -1, np.nan, "x")],
    ({"num_query_heads": 5}, "num_query_heads"),           # 5 does not divide 24
    ({"num_key_value_heads": 4}, "num_key_value_heads"),   # 4 does not divide 6
    ({"num_query_heads": 8}, "head_dim"),                  # 3 channels are no pairs
    ({"num_query_heads": 24, "num_key_value_heads": 5, "head_dim": 4}, "num_key_value_heads"),
    ({"rope_scaling_type": "yarn"}, "rope_scaling_type"),
    ({**SU, "rope_scaling_short_factor": None}, "rope_scaling_short_factor"),
    ({**SU, "rope_scaling_short_factor": [1.0]}, "rope_scaling_short_factor"),
    ({**SU, "rope_scaling_long_factor": None}, "rope_scaling_long_factor"),
    ({**SU, "rope_scaling_long_factor": [1.0, 2.0, 3.0]}, "rope_scaling_long_factor"),
    ({**SU, "rope_scaling_long_factor": [1.0, 0.0]}, "rope_scaling_long_factor"),
    ({**SU, "rope_scaling_long_factor": [1.0, np.nan]}, "rope_scaling_long_factor"),
    *[({"dtype": value}, "dtype") for value in ("int32", "float8", "mixed_float32", 7)],
    ({"backend": "torch"}, "backend"),
], ids=str)
def test_impossible_arguments(arguments, message):
    """A value that no model can have is a ValueError whose message names the argument."""
    with pytest.raises(ValueError, match=message):
        phi3_ref.Phi3Backbone(**{**TINY, **arguments})


def test_unknown_arguments():
    """An argument that neither KerasHub nor we know is a TypeError."""
    with pytest.raises(TypeError, match="num_heads"):
        phi3_ref.Phi3Backbone(**TINY, num_heads=4)


@pytest.mark.parametrize("inputs, message", [
    (np.zeros((1, 3), int), "token_ids"),
    ({"tokens": np.zeros((1, 3), int)}, "token_ids"),
    ({"token_ids": np.zeros(3, int)}, "token_ids"),
    ({"token_ids": np.zeros((1, 3))}, "token_ids"),
    ({"token_ids": np.array([[0, 29]])}, "token_ids"),
    ({"token_ids": np.array([[0, -1]])}, "token_ids"),
    ({"token_ids": np.zeros((1, 3), int), "padding_mask": np.ones((1, 4))}, "padding_mask"),
    ({"token_ids": np.zeros((1, 3), int), "padding_mask": np.ones(3)}, "padding_mask"),
    ({"token_ids": np.zeros((1, 3), int), "padding_mask": np.full((1, 3), 2)}, "padding_mask"),
])
def test_impossible_inputs(inputs, message):
    """Inputs of a wrong kind, shape or range are a ValueError whose message names them."""
    with pytest.raises(ValueError, match=message):
        ours_tiny()(inputs)


def test_too_long_a_sequence_warns_once():
    """Past max_sequence_length there is one warning, and still what KerasHub computes."""
    reference = ref.keras_backbone({**TINY, "max_sequence_length": 6})
    ours = ref.ours_like(reference)
    inputs = {"token_ids": token_ids(1, 7), "padding_mask": np.ones((1, 7), "int32")}
    with pytest.warns(UserWarning, match="max_sequence_length") as caught:
        hidden = ours(inputs)
    assert len(caught) == 1
    assert ref.relative_error(hidden, ref.keras_output(reference, inputs)) <= 2e-6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours({"token_ids": token_ids(1, 6)})


# Dropout -----------------------------------------------------------------------------------------

def test_dropout_is_for_training_only():
    """Dropout acts with training=True alone, its seed repeats it, and the next call differs."""
    ids = {"token_ids": token_ids(2, 5)}
    first, again = ours_tiny(dropout=0.3), ours_tiny(dropout=0.3)
    still = first(ids)
    assert (still == ours_tiny(dropout=0.0)(ids)).all()
    dropped = first(ids, training=True)
    assert (dropped != still).any()
    assert (dropped == again(ids, training=True)).all()
    assert (dropped != first(ids, training=True)).any()
    assert (first(ids) == still).all()
    assert (ours_tiny(dropout=0.0)(ids, training=True) == still).all()


def test_dropout_is_distributed_as_kerashubs():
    """Over 4,000 draws each, mean and spread of every hidden state equal KerasHub's."""
    draws, length = 4000, 3
    reference = ref.keras_backbone({**TINY, "dropout": 0.25})
    ours = ref.ours_like(reference, seed=1)
    ids = np.repeat(token_ids(1, length), draws, axis=0)
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    theirs = ref.keras_output(reference, inputs, training=True)
    dropped = ours(inputs, training=True).astype("float64")
    sigma = theirs.std(0)
    assert sigma.min() > 0.05  # there is something to compare
    assert (np.abs(dropped.mean(0) - theirs.mean(0)) < 6 * sigma * (2 / draws) ** 0.5).all()
    np.testing.assert_allclose(dropped.std(0), sigma, rtol=0.12)
    # Element by element, the draws are independent: rows correlate no more than chance makes them.
    flat = (dropped - dropped.mean(0)).reshape(draws, -1)
    neighbours = (flat[:-1] * flat[1:]).mean(0) / flat.var(0)
    assert np.abs(neighbours).max() < 6 / draws**0.5


@pytest.mark.parametrize("output, mean_of", [
    ("attention_output", "attention_residual"), ("feedforward_output", "transformer_layer_0")])
def test_dropout_expectation(output, mean_of):
    """What dropout leaves of a residual is, in the mean over draws, what it is without dropout."""
    ours = ours_tiny(num_layers=1, dropout=0.25)
    weights = ours.get_weights()
    rng = np.random.default_rng(0)
    weights = [ref.randomized(w.shape, rng, w.shape[0]) for w in weights]
    if output == "feedforward_output":  # so that its input does not vary
        weights[6][:] = 0
    ours.set_weights(weights)
    ids = np.repeat(token_ids(1, 3), 4000, axis=0)
    seen = []

    def record(name, array):
        if name.endswith(mean_of):
            seen.append(array.astype("float64"))
        return array

    ours({"token_ids": ids[:1]}, tap=record)
    ours({"token_ids": ids}, tap=record, training=True)
    still, dropped = seen
    error = np.abs(dropped.mean(0) - still[0])
    assert (error < 6 * dropped.std(0) / len(ids) ** 0.5 + 1e-6).all()
    assert dropped.std(0).max() > 0.1


# Other -------------------------------------------------------------------------------------------

def test_summary(capsys):
    """The table lists every kind of weight with its shape, and ends with the parameter count."""
    ours = ours_tiny()
    ours.summary()
    table = capsys.readouterr().out
    for name in ("token_embedding", "qkv", "attention_output", "feedforward", "layernorm"):
        assert name in table
    assert f"{ours.count_params():,}" in table.splitlines()[-1]
    assert f"{4 * ours.count_params():,}" in table.splitlines()[-1]
    assert "[29, 24]" in table


def test_sliding_window():
    """With a window, hidden states equal those of the tokens that the layers can still reach."""
    window, layers = 3, 2
    ours = ours_tiny(sliding_window=window, num_layers=layers)
    ids = token_ids(1, 20)
    whole = ours({"token_ids": ids})
    reach = layers * (window - 1)  # each layer looks back window - 1 positions
    changed = ids.copy()
    changed[0, 19 - reach - 1] = (changed[0, 19 - reach - 1] + 1) % 29
    assert (ours({"token_ids": changed})[0, -1] == whole[0, -1]).all()
    changed[0, 19 - reach] = (changed[0, 19 - reach] + 1) % 29
    assert (ours({"token_ids": changed})[0, -1] != whole[0, -1]).any()
    np.testing.assert_array_equal(ours_tiny(sliding_window=20)({"token_ids": ids}),
                                  ours_tiny()({"token_ids": ids}))


def test_sequence_cases_are_reproducible():
    """The seeded cases are a fixed set: the parity table can be printed again."""
    first, again = (ref.random_case(random.Random(7).choice) for _ in range(2))
    assert first[0] == again[0] and (first[1]["token_ids"] == again[1]["token_ids"]).all()
