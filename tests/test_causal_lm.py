"""The causal LM: logits, the KV cache, generation on strings and ragged batches, streaming."""

import pathlib
import warnings

import keras_hub
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from references import keras_backbone, ours_like, relative_error

import phi3_ref

VOCABULARY = pathlib.Path(phi3_ref.__file__).parent.joinpath(
    "notebooks/presets/phi3_tiny_puzzles_en/assets/tokenizer/vocabulary.spm"
)
PLAIN = dict(
    vocabulary_size=64, num_layers=2, hidden_dim=24, intermediate_dim=40, num_query_heads=6,
    num_key_value_heads=6,
)
SU = dict(
    rope_scaling_type="su", max_sequence_length=64, rope_scaling_short_factor=[1.0, 1.1],
    rope_scaling_long_factor=[1.5, 4.0],
)
# The su models' boundary lies inside (8), before (2) or after (40) the sequences below.
MODELS = {
    "plain": (PLAIN, {}),
    "grouped queries": (PLAIN | dict(num_key_value_heads=2), {}),
    "one key/value head": (PLAIN | dict(num_key_value_heads=1), {}),
    "sliding window": (PLAIN | dict(num_key_value_heads=3), dict(sliding_window=3)),
    "su, across the boundary": (PLAIN | SU | dict(pretraining_sequence_length=8), {}),
    "su, long": (PLAIN | SU | dict(pretraining_sequence_length=2), {}),
    "su, short": (PLAIN | SU | dict(pretraining_sequence_length=32), {}),
    "su, across, sliding window": (
        PLAIN | SU | dict(pretraining_sequence_length=8, num_key_value_heads=2),
        dict(sliding_window=4),
    ),
}
LENGTH = 14


def batch(*prompts, length=LENGTH):
    """Right-padded `token_ids` and `padding_mask` of a few prompts."""
    rows = np.zeros((len(prompts), length), np.int32)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = prompt
    lengths = np.array([[len(prompt)] for prompt in prompts])
    return {"token_ids": rows, "padding_mask": (np.arange(length) < lengths).astype(np.int32)}


def softmax(logits):
    """Probabilities in float64."""
    powers = np.exp(np.asarray(logits, np.float64) - np.max(logits, -1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


class Dictated(phi3_ref.Sampler):
    """Continues with given ids, [B, steps], and keeps the probabilities that it was shown."""

    def __init__(self, continuation):
        super().__init__()
        self.continuation, self.shown = continuation, []

    def get_next_token(self, probabilities):
        self.shown.append(np.array(probabilities))
        return self.continuation[:, len(self.shown) - 1]


def naive_greedy(causal_lm, inputs):
    """Greedy ids, the whole sequence computed anew at each step, row by row, without a cache."""
    token_ids = np.array(inputs["token_ids"])
    for row, length in zip(token_ids, np.sum(inputs["padding_mask"], axis=1), strict=True):
        for index in range(length, len(row)):
            logits = causal_lm({"token_ids": row[None, :index]})
            row[index] = np.argmax(np.asarray(logits)[0, -1])
    return token_ids


@pytest.fixture(scope="module", params=list(MODELS))
def model(request):
    """One of ours for each entry of MODELS, with weights large enough to tell tokens apart."""
    config, extra = MODELS[request.param]
    return phi3_ref.Phi3CausalLM(ours_like(keras_backbone(config, "float32", 5), **extra))


@pytest.fixture(scope="module")
def pair():
    """KerasHub's causal LM with its preprocessor, and ours with the same weights."""
    tokenizer = keras_hub.models.Phi3Tokenizer(VOCABULARY.read_bytes())
    config = PLAIN | dict(vocabulary_size=tokenizer.vocabulary_size(), num_key_value_heads=2)
    backbone = keras_backbone(config, "float32", 1)
    theirs = keras_hub.models.Phi3CausalLM(
        backbone, keras_hub.models.Phi3CausalLMPreprocessor(tokenizer, sequence_length=32)
    )
    theirs.compile(sampler="greedy", run_eagerly=True)
    ours = phi3_ref.Phi3CausalLM(
        ours_like(backbone),
        phi3_ref.Phi3CausalLMPreprocessor(
            phi3_ref.Phi3Tokenizer(VOCABULARY.read_bytes()), sequence_length=32
        ),
    )
    ours.compile(sampler="greedy")
    return theirs, ours


@pytest.fixture(scope="module")
def pair_of_ids():
    """The same without a preprocessor: token ids in, token ids out."""
    backbone = keras_backbone(PLAIN | dict(num_key_value_heads=3), "float32", 2)
    theirs = keras_hub.models.Phi3CausalLM(backbone)
    theirs.compile(sampler="greedy", run_eagerly=True)
    ours = phi3_ref.Phi3CausalLM(ours_like(backbone))
    ours.compile(sampler="greedy")
    return theirs, ours


# Logits and the KV cache --------------------------------------------------------------------------


def test_logits_are_hidden_states_times_the_reverse_embedding(pair_of_ids):
    """The logits equal KerasHub's, and the backbone's result through the reverse embedding."""
    theirs, ours = pair_of_ids
    inputs = batch([1, 2, 3, 4, 5], [9, 8, 7], length=6)
    logits = ours(inputs)
    assert logits.shape == (2, 6, 64)
    np.testing.assert_array_equal(
        logits, ours.backbone.token_embedding(ours.backbone(inputs), reverse=True)
    )
    assert relative_error(logits, theirs(inputs), inputs["padding_mask"]) < 2e-6


def test_incremental_decoding_equals_one_full_pass_at_every_split(model):
    """After a prefill of any length, each step sees what computing its whole prefix anew gives."""
    token_ids = np.random.default_rng(0).integers(1, 64, (2, LENGTH)).astype(np.int32)
    anew = [softmax(model({"token_ids": token_ids[:, :end]})[:, -1]) for end in range(1, LENGTH)]
    for split in range(1, LENGTH):
        sampler = Dictated(token_ids[:, split:])
        model.compile(sampler=sampler)
        result = model.generate(batch(*token_ids[:, :split]), stop_token_ids=None)
        np.testing.assert_array_equal(result["token_ids"], token_ids)
        assert len(sampler.shown) == LENGTH - split
        np.testing.assert_allclose(sampler.shown, anew[split - 1 :], rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16", "mixed_bfloat16"])
def test_incremental_decoding_in_other_dtypes(dtype):
    """The cache is kept in the compute dtype: to its rounding, steps equal one full pass."""
    tolerance = {"float64": 1e-6, "float16": 2e-2}.get(dtype, 1e-1)
    config = MODELS["su, across the boundary"][0]
    model = phi3_ref.Phi3CausalLM(ours_like(keras_backbone(config, "float32", 5), dtype))
    token_ids = np.random.default_rng(1).integers(1, 64, (2, LENGTH)).astype(np.int32)
    anew = [softmax(model({"token_ids": token_ids[:, :end]})[:, -1]) for end in range(4, LENGTH)]
    sampler = Dictated(token_ids[:, 4:])
    model.compile(sampler=sampler)
    model.generate(batch(*token_ids[:, :4]), stop_token_ids=None)
    assert relative_error(sampler.shown, anew) < tolerance


def test_greedy_generation_equals_a_naive_loop(model):
    """Ragged prompts, across the su boundary too: the ids are those of the full model each step."""
    inputs = batch([3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5, 8, 9], [7], length=20)
    model.compile(sampler="greedy")
    result = model.generate(inputs, stop_token_ids=None)
    np.testing.assert_array_equal(result["token_ids"], naive_greedy(model, inputs))
    assert np.all(result["padding_mask"])


# Generation against KerasHub ----------------------------------------------------------------------


@settings(max_examples=12)
@given(data=st.data())
def test_ragged_generation_equals_keras(pair_of_ids, data):
    """Any batch and stop tokens: ids and masks equal KerasHub's, no prompt is overwritten."""
    theirs, ours = pair_of_ids
    ids = st.integers(0, 63)
    prompts = data.draw(st.lists(st.lists(ids, min_size=1, max_size=10), min_size=1, max_size=4))
    inputs = batch(*prompts, length=data.draw(st.integers(11, 14)))
    free = ours.generate(dict(inputs), stop_token_ids=None)["token_ids"]
    appearing = sorted(set(free.ravel().tolist()) - {0})  # tokens that do come, padding aside
    stops = data.draw(st.none() | st.lists(st.sampled_from(appearing), min_size=1, max_size=2))
    expected = theirs.generate(dict(inputs), stop_token_ids=stops)
    result = ours.generate(dict(inputs), stop_token_ids=stops)
    assert result.keys() == {"token_ids", "padding_mask"}
    np.testing.assert_array_equal(result["token_ids"], expected["token_ids"])
    np.testing.assert_array_equal(result["padding_mask"], expected["padding_mask"])
    given_ids = inputs["padding_mask"].astype(bool)
    np.testing.assert_array_equal(result["token_ids"][given_ids], inputs["token_ids"][given_ids])


def test_generation_starts_at_the_shortest_prompt(pair_of_ids):
    """Steps run from the shortest prompt to the end, and stop once every row has stopped."""
    _, ours = pair_of_ids
    sampler = Dictated(np.full((2, LENGTH), 9))
    ours.compile(sampler=sampler)
    result = ours.generate(batch([1, 2, 3], [4, 5, 6, 9, 8]), stop_token_ids=[9])
    # Row 0 stops in the first step; row 1's own 9 is no stop, its first free position is 5.
    assert len(sampler.shown) == 3
    np.testing.assert_array_equal(
        result["token_ids"], batch([1, 2, 3, 9, 9, 9], [4, 5, 6, 9, 8, 9])["token_ids"]
    )
    ours.compile(sampler="greedy")


PROMPTS = ["What is 1 + 2?", "<|user|>\nSort banana<|end|>\n<|assistant|>\n", "é"]


@pytest.mark.parametrize("prompt", [*PROMPTS, PROMPTS, PROMPTS[:1]])
@pytest.mark.parametrize("max_length", [None, 26])
def test_strings_equal_keras(pair, prompt, max_length):
    """A string gives a string and a list a list; the texts equal KerasHub's."""
    theirs, ours = pair
    expected = theirs.generate(prompt, max_length=max_length)
    assert ours.generate(prompt, max_length=max_length) == expected
    assert type(ours.generate(prompt, max_length=max_length)) is type(expected)


def test_stop_tokens_equal_keras(pair):
    """None, a list and "auto" (which means <|endoftext|> and <|end|>) stop where KerasHub does."""
    theirs, ours = pair
    free = theirs.generate(PROMPTS, stop_token_ids=None)
    assert ours.generate(PROMPTS, stop_token_ids=None) == free
    inputs = ours.preprocessor.generate_preprocess(PROMPTS)
    ids = ours.generate(inputs, stop_token_ids=None)["token_ids"][:, -6].tolist()
    for stops in (ids[:1], tuple(ids)):
        expected = theirs.generate(PROMPTS, stop_token_ids=stops)
        assert ours.generate(PROMPTS, stop_token_ids=stops) == expected != free


@pytest.mark.parametrize("special", ["<|end|>", "<|endoftext|>"])
def test_auto_stops_at_both_of_phi3s_tokens(pair, special):
    """Generation ends right after a dictated <|end|> or <|endoftext|>, as KerasHub's defaults."""
    _, ours = pair
    tokenizer = ours.preprocessor.tokenizer
    answer = [tokenizer.token_to_id(piece) for piece in ("a", "b", special)]
    sampler = Dictated(np.array([answer + [tokenizer.token_to_id("c")] * 40]))
    ours.compile(sampler=sampler)
    ours.generate(PROMPTS[0])
    assert len(sampler.shown) == 3
    ours.compile(sampler="greedy")


@pytest.mark.parametrize("prompt", [PROMPTS[1], PROMPTS])
def test_strip_prompt_equals_keras(pair, prompt):
    """`strip_prompt` gives the answers alone, as KerasHub's CausalLM does."""
    theirs, ours = pair
    stops = [ours.preprocessor.tokenizer.end_token_id]
    expected = keras_hub.models.CausalLM.generate(
        theirs, prompt, stop_token_ids=stops, strip_prompt=True
    )
    assert ours.generate(prompt, stop_token_ids=stops, strip_prompt=True) == expected


# Streaming ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("max_length", [None, 48])
def test_stream_joins_to_generate(pair, prompt, max_length):
    """The streamed pieces join to what `generate` returns at once, with the same seed."""
    _, ours = pair
    for seed in range(5):
        arguments = dict(max_length=max_length, stop_token_ids=None)
        ours.compile(sampler=phi3_ref.RandomSampler(seed=seed))
        pieces = list(ours.stream(prompt, **arguments))
        ours.compile(sampler=phi3_ref.RandomSampler(seed=seed))
        text = ours.generate(prompt, strip_prompt=True, **arguments)
        assert "".join(pieces) == text
    ours.compile(sampler="greedy")


def test_stream_keeps_split_characters_together_and_ends_at_the_stop_token(pair):
    """The four byte tokens of a character come as one piece; the stop token does not come."""
    _, ours = pair
    tokenizer = ours.preprocessor.tokenizer
    answer = [*tokenizer("a🍌bé"), tokenizer.token_to_id("<|end|>"), *tokenizer("no")]
    ours.compile(sampler=Dictated(np.array([answer + [5] * 40])))
    pieces = list(ours.stream(PROMPTS[1]))
    assert "".join(pieces).strip() == "a🍌bé" and len(pieces) > 2
    assert not any("\ufffd" in piece for piece in pieces)
    ours.compile(sampler="greedy")


def test_stream_yields_before_it_has_computed_everything(pair):
    """Text arrives while generation goes on: the first piece needs only the first steps."""
    _, ours = pair
    tokenizer = ours.preprocessor.tokenizer
    sampler = Dictated(np.full((1, 40), tokenizer.token_to_id("a")))
    ours.compile(sampler=sampler)
    stream = ours.stream(PROMPTS[1])
    assert next(piece for piece in stream if piece).strip() in ("a", "aa")
    assert len(sampler.shown) <= 2
    stream.close()
    ours.compile(sampler="greedy")


def test_stream_has_no_beams(pair):
    """Beam search knows its answer only at the end: streaming it is an error."""
    _, ours = pair
    ours.compile(sampler="beam")
    with pytest.raises(ValueError, match="Beam search"):
        list(ours.stream(PROMPTS[0]))
    ours.compile(sampler="greedy")


# Errors and warnings ------------------------------------------------------------------------------


GOOD = batch([1, 2], length=4)


@pytest.mark.parametrize(
    "inputs, message",
    [
        (GOOD | dict(token_ids=GOOD["token_ids"] * 32), r"64"),
        (GOOD | dict(token_ids=-GOOD["token_ids"]), r"token_ids"),
        (GOOD | dict(token_ids=GOOD["token_ids"].astype(float)), r"float"),
        (GOOD | dict(token_ids=GOOD["token_ids"][0]), r"token_ids"),
        (GOOD | dict(token_ids=GOOD["token_ids"][None]), r"token_ids"),
        (GOOD | dict(padding_mask=GOOD["padding_mask"][:, :2]), r"padding_mask"),
        (GOOD | dict(padding_mask=GOOD["padding_mask"] * 2), r"padding_mask"),
        (GOOD | dict(padding_mask=GOOD["padding_mask"] * 0), r"empty|prompt"),
        (GOOD | dict(padding_mask=np.array([[0, 1, 1, 0]])), r"padding_mask"),
        ({name: array[:0] for name, array in GOOD.items()}, r"prompt|token_ids"),
        ("What is 1 + 2?", r"preprocessor|dict"),
    ],
)
def test_bad_inputs_are_errors(pair_of_ids, inputs, message):
    """Ids out of range, wrong types and ranks, no, empty and left-padded prompts are named."""
    _, ours = pair_of_ids
    with pytest.raises((ValueError, TypeError), match=message):
        ours.generate(inputs, stop_token_ids=None)


def test_auto_needs_a_preprocessor(pair_of_ids):
    """Without a tokenizer, nobody knows the stop tokens: KerasHub's error, and ours."""
    for model in pair_of_ids:
        with pytest.raises(ValueError, match="preprocessor"):
            model.generate(dict(GOOD))


def test_a_sequence_longer_than_the_model_is_made_for_warns_once():
    """Past max_sequence_length generation goes on, as KerasHub's does, with one warning in all."""
    backbone = keras_backbone(PLAIN | dict(max_sequence_length=6), "float32", 2)
    ours = phi3_ref.Phi3CausalLM(ours_like(backbone))
    ours.compile(sampler="greedy")
    inputs = batch([1, 2, 3], length=12)
    with pytest.warns(UserWarning, match="max_sequence_length") as caught:
        result = ours.generate(inputs, stop_token_ids=None)
    assert len(caught) == 1
    theirs = keras_hub.models.Phi3CausalLM(backbone)
    theirs.compile(sampler="greedy", run_eagerly=True)
    expected = theirs.generate(dict(inputs), stop_token_ids=None)
    np.testing.assert_array_equal(result["token_ids"], expected["token_ids"])


def test_no_room_to_generate_warns_and_returns_the_prompt(pair, pair_of_ids):
    """A prompt that fills max_length comes back, cut, as from KerasHub, with one warning."""
    theirs, ours = pair
    expected = theirs.generate(PROMPTS, max_length=4)
    with pytest.warns(UserWarning) as caught:
        assert ours.generate(PROMPTS, max_length=4) == expected
    assert len(caught) == 1
    full = {"token_ids": np.array([[5, 6, 7]]), "padding_mask": np.ones((1, 3), int)}
    with pytest.warns(UserWarning) as caught:
        result = pair_of_ids[1].generate(full, stop_token_ids=None)
    assert len(caught) == 1 and result["token_ids"].tolist() == [[5, 6, 7]]


def test_generation_with_room_does_not_warn(pair):
    """Nothing is said where nothing is wrong, and the caller's arrays are left alone."""
    _, ours = pair
    inputs = ours.preprocessor.generate_preprocess(PROMPTS)
    before = {name: np.array(array) for name, array in inputs.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.generate(PROMPTS)
        model = phi3_ref.Phi3CausalLM(ours.backbone)
        model.generate(inputs, stop_token_ids=None)
    for name, array in before.items():
        np.testing.assert_array_equal(inputs[name], array)


def test_prompts_that_are_cut_are_announced_with_the_numbers(pair):
    """In a batch, too, where others fit: KerasHub's texts, and one warning, at the call."""
    theirs, ours = pair
    texts = ["ab", "Sort planet again and again", "What is 345 + 278?"]
    lengths = [1 + len(ids) for ids in ours.preprocessor.tokenizer(texts)]
    room = sorted(lengths)[1]  # fits one, is filled by one, cuts one
    with pytest.warns(UserWarning) as caught:
        found = ours.generate(texts, max_length=room)
    assert found == theirs.generate(texts, max_length=room)
    message, = caught
    assert message.filename == __file__
    for text in (f"`max_length`={room} ", "2 of 3 prompts", f"{max(lengths)} tokens"):
        assert text in str(message.message)
    ours.generate(texts, max_length=max(lengths) + 1)  # no warning: it would be an error


def test_a_streams_prompt_that_is_cut_is_announced(pair):
    """Where it begins; nothing comes of it."""
    _, ours = pair
    with pytest.warns(UserWarning, match="`=4 .* 1 of 1 prompts: .* 13 tokens") as caught:
        assert "".join(ours.stream("Sort planet", max_length=4)) == ""
    assert len(caught) == 1 and caught[0].filename == __file__


def test_training_cuts_as_it_is_told(pair):
    """`sequence_length` is what every text is cut or padded to: KerasHub's arrays, no warning."""
    theirs, ours = pair
    preprocessor = phi3_ref.Phi3CausalLMPreprocessor(
        ours.preprocessor.tokenizer, add_end_token=True)  # Keras's default
    x, y, sample_weight = preprocessor("Sort planet", sequence_length=4)
    expected = theirs.preprocessor("Sort planet", sequence_length=4)
    np.testing.assert_array_equal(x["token_ids"], expected[0]["token_ids"])
    np.testing.assert_array_equal(y, expected[1])
    np.testing.assert_array_equal(sample_weight, expected[2])


def test_full_rows_of_token_ids_are_announced(pair_of_ids):
    """A dict's prompt that leaves no room, in a batch where another does: KerasHub's ids."""
    theirs, ours = pair_of_ids
    inputs = batch([1, 2, 3], [4, 5], length=3)
    with pytest.warns(UserWarning, match="1 of 2 prompts leave no room") as caught:
        result = ours.generate(inputs, stop_token_ids=None)
    assert len(caught) == 1
    expected = theirs.generate(dict(inputs), stop_token_ids=None)
    np.testing.assert_array_equal(result["token_ids"], expected["token_ids"])


def test_inputs_labels_and_weights_can_be_changed_freely():
    """Hiding a prompt from the loss, by its weights, does not hide it from the model."""
    preprocessor = phi3_ref.Phi3CausalLMPreprocessor.from_preset("phi3_tiny_puzzles_en")
    for texts in ("Sort cab", ["Sort cab", "Reverse ab"]):
        x, y, sample_weight = preprocessor(texts)
        arrays = [x["token_ids"], x["padding_mask"], y, sample_weight]
        assert not any(np.shares_memory(one, other)
                       for i, one in enumerate(arrays) for other in arrays[:i])
