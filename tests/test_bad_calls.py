"""Calls with wrong arrays and options: each is a ValueError that says which, and what was found."""

import re

import ml_dtypes
import numpy as np
import pytest

import phi3_ref

V, B, S, T, H, K, C, D = 64, 2, 3, 5, 6, 3, 4, 24
CONFIG = dict(
    vocabulary_size=V, num_layers=2, hidden_dim=D, intermediate_dim=40, num_query_heads=H,
    num_key_value_heads=K,
)


def normal(*shape):
    """Random numbers of that shape, float32."""
    return np.random.default_rng(0).standard_normal(shape, np.float32)


ATTENTION = dict(query=normal(B, S, H, C), key=normal(B, T, K, C), value=normal(B, T, K, C),
                 padding_mask=np.ones((B, T), int))
BAD_ATTENTION = {  # each case: the arguments that are wrong
    "rank": dict(query=normal(S, H, C)),
    "batch": dict(key=normal(3, T, K, C), value=normal(3, T, K, C)),
    "batch of one": dict(key=normal(1, T, K, C), value=normal(1, T, K, C)),
    "head_dim": dict(query=normal(B, S, H, 2 * C)),
    "heads": dict(query=normal(B, S, 4, C)),
    "no heads": dict(key=normal(B, T, 0, C), value=normal(B, T, 0, C)),
    "positions": dict(query=normal(B, T + 1, H, C)),
    "value": dict(value=normal(B, T + 1, K, C)),
    "value's heads": dict(value=normal(B, T, 2 * K, C)),
    "mask of the queries": dict(padding_mask=np.ones((B, S), int)),
    "mask of one row": dict(padding_mask=np.ones((1, T), int)),
}


@pytest.mark.parametrize("case", BAD_ATTENTION)
def test_attention_takes_only_arrays_that_fit_together(case):
    """The message lists the shapes found."""
    arguments = ATTENTION | BAD_ATTENTION[case]
    phi3_ref.attention(**ATTENTION)
    for name in BAD_ATTENTION[case]:
        with pytest.raises(ValueError, match=re.escape(str(arguments[name].shape))):
            phi3_ref.attention(**arguments)


@pytest.mark.parametrize("sliding_window", [0, -1, 1.5, True, "4"])
def test_attention_takes_only_a_window_of_positive_size(sliding_window):
    """Zero is not "no window": that is None."""
    with pytest.raises(ValueError, match="`sliding_window`"):
        phi3_ref.attention(**ATTENTION, sliding_window=sliding_window)


@pytest.mark.parametrize("shape", [(), (1,), (D - 1,), (1, D), (B, D)])
def test_rms_norm_takes_only_one_scale_per_component(shape):
    """Broadcasting would hide a wrong scale."""
    with pytest.raises(ValueError, match=re.escape(str(shape))):
        phi3_ref.rms_norm(normal(B, D), normal(*shape), 1e-6)


IDS = np.arange(B * S).reshape(B, S)
BAD_INPUTS = {
    "no dict": (IDS, "token_ids"),
    "no ids": (dict(padding_mask=IDS > 0), "token_ids"),
    "None": (dict(token_ids=None), "token_ids"),
    "ragged": (dict(token_ids=[[1, 2], [3]]), "token_ids"),
    "floats": (dict(token_ids=IDS * 1.0), "float64"),
    "bools": (dict(token_ids=IDS > 0), "bool"),
    "strings": (dict(token_ids=IDS.astype(str)), "<U"),
    "rank 1": (dict(token_ids=IDS[0]), r"\(3,\)"),
    "rank 3": (dict(token_ids=IDS[None]), r"\(1, 2, 3\)"),
    "rank 0": (dict(token_ids=3), r"\(\)"),
    "too large": (dict(token_ids=IDS + V), str(V + B * S - 1)),
    "negative": (dict(token_ids=IDS - 1), "-1"),
    "beyond 64 bits": (dict(token_ids=[[2**70]]), "object"),
    "mask's shape": (dict(token_ids=IDS, padding_mask=np.ones((B, S + 1))), r"\(2, 4\)"),
    "mask's row": (dict(token_ids=IDS, padding_mask=np.ones(S)), r"\(3,\)"),
    "mask of twos": (dict(token_ids=IDS, padding_mask=np.full((B, S), 2)), "2"),
    "mask of halves": (dict(token_ids=IDS, padding_mask=np.full((B, S), 0.5)), "0.5"),
    "mask of NaN": (dict(token_ids=IDS, padding_mask=np.full((B, S), np.nan)), "nan"),
    "mask of strings": (dict(token_ids=IDS, padding_mask=np.full((B, S), "1")), "1"),
    "mask of None": (dict(token_ids=IDS, padding_mask=np.full((B, S), None)), "None"),
    "ragged mask": (dict(token_ids=IDS, padding_mask=[[1], [1, 1]]), "padding_mask"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_a_model_takes_only_ids_of_its_vocabulary_and_masks_of_zeros_and_ones(case):
    """By backbone, causal LM and generation alike."""
    inputs, message = BAD_INPUTS[case]
    backbone = phi3_ref.Phi3Backbone(**CONFIG, seed=0)
    causal_lm = phi3_ref.Phi3CausalLM(backbone)
    with pytest.raises(ValueError, match=message):
        backbone(inputs)
    with pytest.raises(ValueError, match=message):
        causal_lm(inputs)
    if isinstance(inputs, dict):
        with pytest.raises(ValueError, match=message):
            causal_lm.generate(inputs, stop_token_ids=None)


PROMPT = dict(token_ids=np.ones((1, 4), int), padding_mask=np.array([[1, 1, 0, 0]]))
BAD_OPTIONS = {
    "a length for a dict": (PROMPT, dict(max_length=8), "max_length"),
    "no length": ("What?", dict(max_length=0), "max_length"),
    "half a length": ("What?", dict(max_length=2.5), "max_length"),
    "a stop token as a number": (PROMPT, dict(stop_token_ids=3), "stop_token_ids"),
    "a stop token as a word": (PROMPT, dict(stop_token_ids=["<|end|>"]), "stop_token_ids"),
    "a stop token beyond the vocabulary": (PROMPT, dict(stop_token_ids=[10**6]), "1000000"),
    "a negative stop token": (PROMPT, dict(stop_token_ids=[-1]), "-1"),
    "a word for auto": (PROMPT, dict(stop_token_ids="none"), "stop_token_ids"),
    "an empty batch": (dict(token_ids=np.ones((0, 4), int)), dict(), "at least one token"),
    "an empty prompt": (PROMPT | dict(padding_mask=np.zeros((1, 4))), dict(), "at least one token"),
    "no text": ([], dict(), "at least one token"),
    "a number for a prompt": (7, dict(), "text"),
    "a list of numbers": ([7], dict(), "text"),
    "None for a prompt": (None, dict(), "text"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_generate_takes_only_options_that_mean_something(case):
    """The message says which option it is."""
    inputs, options, message = BAD_OPTIONS[case]
    causal_lm = phi3_ref.Phi3CausalLM.from_preset("phi3_tiny_puzzles_en")
    with pytest.raises(ValueError, match=message):
        causal_lm.generate(inputs, **options)


def test_weights_of_the_wrong_kind_leave_the_old_ones():
    """Wrong count, shape or dtype, in any place of the list."""
    backbone = phi3_ref.Phi3Backbone(**CONFIG, seed=0)
    old = backbone.get_weights()
    for place in (0, 1, 7, len(old) - 1):
        for wrong in (old[place][..., :-1], old[place].T[None], old[place] * 1j,
                      old[place].astype(str), old[place].astype(object), None):
            weights = [2 * weight for weight in old]
            weights[place] = wrong
            with pytest.raises(ValueError, match="must be real numbers"):
                backbone.set_weights(weights)
    for weights in (old[:-1], [*old, old[0]], []):
        with pytest.raises(ValueError, match=f"{len(old)} arrays"):
            backbone.set_weights(weights)
    for found, weight in zip(backbone.get_weights(), old, strict=True):
        np.testing.assert_array_equal(found, weight)


@pytest.mark.parametrize("dtype", ["float16", ml_dtypes.bfloat16, "float64", "int8"])
def test_weights_of_another_real_dtype_are_converted(dtype):
    """As Keras does."""
    backbone = phi3_ref.Phi3Backbone(**CONFIG, seed=0)
    weights = [np.round(100 * weight).astype(dtype) for weight in backbone.get_weights()]
    backbone.set_weights(weights)
    for found, weight in zip(backbone.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(found, weight.astype(np.float32))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)])
def test_empty_batches_and_sequences_have_empty_results(shape):
    """On both attentions, as NumPy's own functions."""
    for fused in (True, False):
        backbone = phi3_ref.Phi3Backbone(**CONFIG, seed=0, fused=fused)
        logits = phi3_ref.Phi3CausalLM(backbone)({"token_ids": np.zeros(shape, int)})
        assert logits.shape == (*shape, V) and logits.dtype == np.float32


HUGE = 10**30
BAD_CONFIGS = [
    ("vocabulary_size", HUGE), ("num_layers", 2**63), ("hidden_dim", float("inf")),
    ("layer_norm_epsilon", 10**400), ("layer_norm_epsilon", float("nan")),
    ("layer_norm_epsilon", 1e39), ("rope_max_wavelength", 1e300), ("dropout", -HUGE),
    ("seed", -1), ("seed", 2**64), ("max_sequence_length", HUGE), ("head_dim", HUGE),
    ("sliding_window", HUGE),
]


@pytest.mark.parametrize(("name", "value"), BAD_CONFIGS)
def test_no_argument_is_astronomical(name, value):
    """Integers have 64 bits, numbers fit into float32."""
    with pytest.raises(ValueError, match=f"`{name}`"):
        phi3_ref.Phi3Backbone(**CONFIG | {name: value})


@pytest.mark.parametrize("name", ["vocabulary_size", "num_layers", "intermediate_dim", "head_dim"])
def test_a_model_larger_than_any_memory_is_refused_at_once(name):
    """Before a shape is made of it."""
    with pytest.raises(ValueError, match="No memory"):
        phi3_ref.Phi3Backbone(**CONFIG | {name: 2**60})


def test_a_causal_lm_takes_only_a_tokenizer_that_fits():
    """A token beyond the embeddings could not be looked up."""
    preprocessor = phi3_ref.Phi3CausalLMPreprocessor.from_preset("phi3_tiny_puzzles_en")
    tokens = preprocessor.tokenizer.vocabulary_size()
    for size in (tokens - 1, tokens):
        backbone = phi3_ref.Phi3Backbone(**CONFIG | dict(vocabulary_size=size))
        if size == tokens:
            phi3_ref.Phi3CausalLM(backbone, preprocessor)
        else:
            with pytest.raises(ValueError, match=f"{tokens} tokens"):
                phi3_ref.Phi3CausalLM(backbone, preprocessor)


@pytest.mark.parametrize("call", ["backbone", "causal_lm", "generate"])
def test_a_tap_that_returns_nothing_is_named(call):
    """A forgotten `return` is an error at the first name, not a TypeError further on."""
    causal_lm = phi3_ref.Phi3CausalLM(phi3_ref.Phi3Backbone(**CONFIG, seed=0))
    function = {"backbone": causal_lm.backbone, "causal_lm": causal_lm,
                "generate": lambda inputs, tap: causal_lm.generate(
                    PROMPT, stop_token_ids=None, tap=tap)}[call]
    with pytest.raises(ValueError, match="tap returned None for 'token_embedding'"):
        function(PROMPT, tap=lambda name, array: None)


def test_a_setting_cannot_be_changed_on_the_backbone():
    """The model computes by its config: an attribute beside it would be ignored silently."""
    backbone = phi3_ref.Phi3Backbone(**CONFIG, seed=0)
    for name, value in (("fused", False), ("dropout", 0.1), ("sliding_window", 4)):
        with pytest.raises(ValueError, match=f"`{name}` is fixed"):
            setattr(backbone, name, value)
        assert name not in vars(backbone)


@pytest.mark.parametrize("sliding_window", [None, 3])
def test_a_full_cache_and_a_mask_beside_a_cache_are_refused(sliding_window):
    """One position too many would be broadcast into nothing, and a mask forgotten."""
    backbone = phi3_ref.Phi3Backbone(**CONFIG, seed=0, sliding_window=sliding_window)
    cache = phi3_ref.KVCache(backbone.config, 1, 4, chunk=1 if sliding_window else None)
    ids, room = np.ones((1, 1), int), cache.arrays.shape[3]
    with pytest.raises(ValueError, match="`padding_mask` must be None"):
        phi3_ref.forward(backbone.weights, backbone.config, ids, np.ones((1, 1)), cache)
    for _ in range(room):
        phi3_ref.forward(backbone.weights, backbone.config, ids, cache=cache)
    too_many = np.ones((1, 1 if sliding_window is None else room), int)
    with pytest.raises(ValueError, match=f"room for {room} positions"):
        phi3_ref.forward(backbone.weights, backbone.config, too_many, cache=cache)
    assert cache.length == room


def test_weights_are_given_or_loaded():
    """Both at once is an error that says so."""
    with pytest.raises(ValueError, match="load_weights=False"):
        phi3_ref.Phi3Backbone.from_preset("phi3_tiny_puzzles_en", weights={})


LABELS = IDS + 1
BAD_LABELS = {  # each case: x, y, sample_weight, and what the message says
    "no labels": (dict(token_ids=IDS), None, None, "`y`"),
    "no inputs": (None, None, None, "`x`"),
    "a number": (7, None, None, "`x`"),
    "strings without a tokenizer": (["What?"], None, None, "preprocessor"),
    "strings with labels": (["What?"], LABELS, None, "token_ids"),
    "ids of another vocabulary": (dict(token_ids=IDS + V), LABELS, None, "token_ids"),
    "floats": (dict(token_ids=IDS), LABELS * 1.0, None, "`y`.*float64"),
    "bools": (dict(token_ids=IDS), LABELS > 0, None, "`y`.*bool"),
    "strings": (dict(token_ids=IDS), LABELS.astype(str), None, "`y`.*<U"),
    "ragged": (dict(token_ids=IDS), [[1, 2], [3]], None, "`y`"),
    "a row": (dict(token_ids=IDS), LABELS[0], None, r"`y`.*\(3,\)"),
    "a row too few": (dict(token_ids=IDS), LABELS[:1], None, r"`y`.*\(1, 3\)"),
    "negative": (dict(token_ids=IDS), LABELS - 2, None, "`y`"),
    "too large": (dict(token_ids=IDS), LABELS + V, None, "`y`"),
    "empty": (dict(token_ids=IDS[:, :0]), LABELS[:, :0], None, "`y`.*empty"),
    "weights' shape": (dict(token_ids=IDS), LABELS, np.ones(S), r"`sample_weight`.*\(3,\)"),
    "weights' rank": (dict(token_ids=IDS), LABELS, 1.0, r"`sample_weight`.*\(\)"),
    "weights of NaN": (dict(token_ids=IDS), LABELS, np.full((B, S), np.nan), "`sample_weight`"),
    "infinite weights": (dict(token_ids=IDS), LABELS, np.full(B, np.inf), "`sample_weight`"),
    "weights of strings": (dict(token_ids=IDS), LABELS, np.full((B, S), "1"), "`sample_weight`"),
    "ragged weights": (dict(token_ids=IDS), LABELS, [[1.0], [1.0, 2.0]], "`sample_weight`"),
}


@pytest.mark.parametrize("case", BAD_LABELS)
def test_learning_takes_only_labels_and_weights_of_its_inputs(case):
    """By gradients, a step, `fit` and `evaluate` alike; nothing is learned."""
    *batch, message = BAD_LABELS[case]
    causal_lm = phi3_ref.Phi3CausalLM(phi3_ref.Phi3Backbone(**CONFIG, seed=0))
    before = causal_lm.backbone.get_weights()
    for call in (causal_lm.gradients, causal_lm.train_on_batch, causal_lm.fit, causal_lm.evaluate):
        with pytest.raises(ValueError, match=message):
            call(*batch)
    for old, new in zip(before, causal_lm.backbone.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


BAD_TEXTS = {
    "a number among them": (["Sort a", 3], None, "strings"),
    "bytes": ([b"Sort a"], None, "strings"),
    "weights, which are made of the texts": (["Sort a"], np.ones(1), "`sample_weight`"),
    "nothing": ([], None, "nothing to|not empty"),
}


@pytest.mark.parametrize("case", BAD_TEXTS)
@pytest.mark.parametrize("method", ["gradients", "train_on_batch", "fit", "evaluate"])
def test_learning_takes_only_texts(method, case):
    """What is no text is not learned as one, and no weight is left out silently."""
    x, sample_weight, message = BAD_TEXTS[case]
    causal_lm = phi3_ref.Phi3CausalLM.from_preset("phi3_tiny_puzzles_en")
    with pytest.raises(ValueError, match=message):
        getattr(causal_lm, method)(x, None, sample_weight)
    assert causal_lm.optimizer.iterations == 0


def test_one_text_is_a_batch_of_one():
    """It is not a list of letters."""
    found = []
    for x in ("Sort planet", ["Sort planet"]):
        causal_lm = phi3_ref.Phi3CausalLM.from_preset("phi3_tiny_puzzles_en")
        found.append([causal_lm.gradients(x)[0], causal_lm.evaluate(x), causal_lm.fit(x).history])
        assert causal_lm.optimizer.iterations == 1
    assert found[0] == found[1]


BAD_FITS = {
    "no batch": (dict(batch_size=0), "batch_size"),
    "half an example": (dict(batch_size=1.5), "batch_size"),
    "a batch of None": (dict(batch_size=None), "batch_size"),
    "no epoch": (dict(epochs=0), "epochs"),
    "a word for epochs": (dict(epochs="1"), "epochs"),
    "no step": (dict(steps_per_epoch=0), "steps_per_epoch"),
    "half a step": (dict(steps_per_epoch=0.5), "steps_per_epoch"),
    "a number to shuffle": (dict(shuffle=8), "shuffle"),
    "no data": (dict(x=[], y=None), "nothing to learn"),
    "an empty iterator": (dict(x=iter([]), y=None), "nothing to learn"),
    "a tuple of four": (dict(x=[(dict(token_ids=IDS), LABELS, None, 1)], y=None), "`x`"),
    "a tuple of one": (dict(x=[(dict(token_ids=IDS),)], y=None), "`y`"),
    "a batch without labels": (dict(x=[dict(token_ids=IDS)], y=None), "`y`"),
}


@pytest.mark.parametrize("case", BAD_FITS)
def test_fit_takes_only_options_that_mean_something(case):
    """The message says which; nothing is learned."""
    options, message = BAD_FITS[case]
    causal_lm = phi3_ref.Phi3CausalLM(phi3_ref.Phi3Backbone(**CONFIG, seed=0))
    with pytest.raises(ValueError, match=message):
        causal_lm.fit(**dict(x=dict(token_ids=IDS), y=LABELS) | options)
    assert causal_lm.optimizer.iterations == 0
    if "batch_size" in options:
        with pytest.raises(ValueError, match=message):
            causal_lm.evaluate(dict(token_ids=IDS), LABELS, **options)


@pytest.mark.parametrize(("name", "value"), [
    ("optimizer", "adam"), ("optimizer", None), ("optimizer", phi3_ref.AdamW), ("optimizer", 1e-3),
    ("sampler", "nucleus"), ("sampler", None), ("recompute", 1), ("recompute", None)])
def test_compile_takes_only_optimizers_and_samplers(name, value):
    """What was chosen before stays."""
    causal_lm = phi3_ref.Phi3CausalLM(phi3_ref.Phi3Backbone(**CONFIG, seed=0))
    optimizer = phi3_ref.AdamW(1e-3)
    causal_lm.compile(optimizer, "greedy", recompute=True)
    sampler = causal_lm.sampler
    with pytest.raises(ValueError, match=f"`{name}`"):
        causal_lm.compile(**{name: value})
    assert causal_lm.optimizer is optimizer and causal_lm.sampler is sampler and causal_lm.recompute


@pytest.mark.parametrize(("name", "value"), [
    ("learning_rate", "fast"), ("learning_rate", -1e-3), ("learning_rate", float("nan")),
    ("learning_rate", float("inf")), ("learning_rate", None), ("weight_decay", "some"),
    ("weight_decay", -0.1), ("beta_1", 1.0), ("beta_1", -0.1), ("beta_2", 1.5), ("beta_2", None),
    ("epsilon", -1e-7), ("epsilon", None), ("clipnorm", -1.0),
    ("clipnorm", float("nan")), ("global_clipnorm", -1), ("global_clipnorm", "1")])
def test_an_optimizer_takes_only_settings_that_mean_something(name, value):
    """As numbers, before a step is taken with them."""
    with pytest.raises(ValueError, match=f"`{name}`"):
        phi3_ref.AdamW(**{name: value})


def test_an_optimizer_clips_in_one_way():
    """As Keras's, which refuses both at once."""
    with pytest.raises(ValueError, match=r"`clipnorm`.*`global_clipnorm`"):
        phi3_ref.AdamW(clipnorm=1.0, global_clipnorm=1.0)


@pytest.mark.parametrize("rate", ["x", float("nan"), float("inf")])
def test_a_schedule_gives_only_numbers(rate):
    """A step that cannot be taken is not taken in part."""
    causal_lm = phi3_ref.Phi3CausalLM(phi3_ref.Phi3Backbone(**CONFIG, seed=0))
    before = causal_lm.backbone.get_weights()
    causal_lm.compile(phi3_ref.AdamW(lambda step: rate))
    with pytest.raises(ValueError):
        causal_lm.train_on_batch(dict(token_ids=IDS), LABELS)
    assert causal_lm.optimizer.iterations == 0 and not causal_lm.optimizer.moments
    for old, new in zip(before, causal_lm.backbone.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_tap_on_what_is_computed_twice_is_refused():
    """It would see each array twice; gradients, of which there is one each, may be looked at."""
    causal_lm = phi3_ref.Phi3CausalLM(phi3_ref.Phi3Backbone(**CONFIG, seed=0))
    causal_lm.compile(recompute=True)
    batch, seen = (dict(token_ids=IDS), LABELS), []
    for call in (lambda: causal_lm.gradients(*batch, tap=lambda name, array: array),
                 lambda: phi3_ref.Trace.record(causal_lm, batch[0], y=LABELS)):
        with pytest.raises(ValueError, match="recompute=False"):
            call()
    causal_lm.gradients(*batch, gradient_tap=lambda name, array: (seen.append(name), array)[1])
    assert len(seen) == len(set(seen)) > 10


@pytest.mark.parametrize("which", ["tap", "gradient_tap"])
def test_a_tap_on_learning_that_returns_nothing_is_named(which):
    """At the first name of its direction."""
    causal_lm = phi3_ref.Phi3CausalLM(phi3_ref.Phi3Backbone(**CONFIG, seed=0))
    first = {"tap": "token_embedding", "gradient_tap": "logits"}[which]
    with pytest.raises(ValueError, match=f"tap returned None for '{first}'"):
        causal_lm.gradients(dict(token_ids=IDS), LABELS, **{which: lambda name, array: None})


def test_right_calls_write_nothing_out():
    """Checks write out what they received only to refuse it: a mask of 27 x 36 takes 0.7 ms."""
    class Text(str):
        __slots__ = ()

        def __repr__(self):
            raise AssertionError("a text was written out")

    def refuse(array):
        raise AssertionError("an array was written out")

    causal_lm, text = phi3_ref.Phi3CausalLM.from_preset("phi3_tiny_puzzles_en"), Text("What is 1?")
    with np.printoptions(override_repr=refuse):
        causal_lm.fit([text] * 3, batch_size=2)
        x, y, weight = causal_lm.preprocessor([text])
        causal_lm.fit([(x, y, weight)])
        causal_lm.evaluate(x, y, weight)
        causal_lm.backbone(x)
        causal_lm.generate([text], max_length=20)
        causal_lm.preprocessor.tokenizer.apply_chat_template([dict(role="user", content=text)])
        with pytest.raises(AssertionError, match="an array was written out"):
            causal_lm.backbone([x])
        with pytest.raises(AssertionError, match="a text was written out"):
            causal_lm.preprocessor.tokenizer([text, 1])
