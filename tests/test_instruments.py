"""The instruments: the tap's names, patching, traces, and the comparison that finds a bug."""

import contextlib
import random
import types
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
import references as ref
from reference_traces import keras_trace, transformers_trace

import phi3_ref

TINY = dict(vocabulary_size=29, num_layers=2, hidden_dim=24, intermediate_dim=36,
            num_query_heads=6, num_key_value_heads=2)
SU = dict(rope_scaling_type="su", rope_scaling_short_factor=[1.0, 1.3],
          rope_scaling_long_factor=[2.0, 9.0], max_sequence_length=32)
TOO_LONG = pytest.mark.filterwarnings("ignore:.*max_sequence_length")


def tiny(seed=0, **kwargs):
    """A causal LM whose random weights tell tokens apart."""
    backbone = phi3_ref.Phi3Backbone(**{**TINY, "seed": 0, **kwargs})
    rng = np.random.default_rng(seed)
    backbone.set_weights([ref.randomized(w.shape, rng, w.shape[0]) for w in backbone.get_weights()])
    causal_lm = phi3_ref.Phi3CausalLM(backbone)
    causal_lm.compile(sampler="greedy")
    return causal_lm


def batch(*lengths, room):
    """Prompts of these lengths, and room to continue them."""
    token_ids = np.random.default_rng(1).integers(0, 29, (len(lengths), room))
    return {"token_ids": token_ids, "padding_mask": np.arange(room) < np.array(lengths)[:, None]}


INPUTS = {"token_ids": batch(7, 7, room=7)["token_ids"]}


def puzzles(dtype=None):
    """The embedded preset."""
    causal_lm = phi3_ref.Phi3CausalLM.from_preset("phi3_tiny_puzzles_en", dtype=dtype)
    causal_lm.compile(sampler="greedy")
    return causal_lm


def assert_equal(ours, expected):
    """Two dicts of arrays have the same names in the same order, and the same bits."""
    assert list(ours) == list(expected)
    for name in expected:
        assert ours[name].dtype == expected[name].dtype
        np.testing.assert_array_equal(ours[name], expected[name])


# Names: complete, in execution order, and the references' own intermediates -----------------------


@TOO_LONG
@pytest.mark.parametrize("dtype", list(ref.TOLERANCE))
def test_every_name_agrees_with_kerashub(dtype):
    """The same names, shapes and order as KerasHub's layers, and every tensor within tolerance."""
    for seed in range(8):
        config, inputs = ref.random_case(random.Random(seed).choice, num_layers=2)
        model = ref.keras_backbone(config, dtype, seed)
        theirs = keras_trace(model, inputs)
        causal_lm = phi3_ref.Phi3CausalLM(ref.ours_like(model))
        ours = phi3_ref.Trace.record(causal_lm, inputs)
        shapes = {name: array.shape for name, array in theirs.items()}
        assert ref.tap_shapes(causal_lm.backbone.config, *inputs["token_ids"].shape) == shapes
        assert {name: array.shape for name, array in ours.items()} == shapes
        assert list(ours) == list(theirs) == list(shapes)
        for name in shapes:
            assert ours[name].dtype == theirs[name].dtype
            assert ref.relative_error(ours[name], theirs[name]) <= ref.TOLERANCE[dtype], name
        assert phi3_ref.compare(theirs, ours).first is None


@TOO_LONG
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_name_agrees_with_transformers(dtype, tmp_path):
    """The same names in the same order as in transformers, and every tensor within tolerance.

    Twice the tolerance in 16 bits, where transformers' norms round once more than ours.
    """
    tolerance = ref.TOLERANCE[dtype] * (1 if dtype == "float32" else 2)
    for seed in range(8):
        config, token_ids = ref.random_huggingface(random.Random(seed).choice)
        model = ref.transformers_model(config, dtype, seed)
        theirs = transformers_trace(model, token_ids)
        directory = ref.write_huggingface(model, tmp_path / str(seed))
        causal_lm = phi3_ref.Phi3CausalLM.from_preset(directory, dtype=dtype)
        ours = phi3_ref.Trace.record(causal_lm, {"token_ids": token_ids})
        assert list(ours) == list(theirs)
        for name in theirs:
            assert ours[name].dtype == theirs[name].dtype
            assert ref.relative_error(ours[name], theirs[name]) <= tolerance, name
        np.testing.assert_array_equal(theirs["logits"], ref.transformers_logits(model, token_ids))


def test_names_sort_in_execution_order():
    """Layer 10 comes after layer 2, the second pass after the first, the unknown last."""
    shapes = ref.tap_shapes(tiny(num_layers=12).backbone.config, 1, 4)
    names = [*shapes, "own", *(f"{name}@1" for name in shapes), "logits@2", "logits@10"]
    shuffled = random.Random(0).sample(names, len(names))
    assert shuffled != names and sorted(shuffled, key=phi3_ref.execution_order) == names


# The weights, after the tensor whose gradient leads to the weight's.
WEIGHT_AFTER = {"attention.query": "qkv", "feedforward_gate": "feedforward_gate_intermediate",
                "logits": "reverse_embedding"}


def test_gradients_sort_in_the_order_of_the_backward_pass():
    """After all of the forward pass, from last to first, each followed by that of its weight."""
    backbone = tiny(num_layers=12).backbone
    forward = list(ref.tap_shapes(backbone.config, 1, 4))
    weights, names = dict(phi3_ref.named_weights(backbone.weights)), list(forward)
    for name in reversed(forward):
        layer, _, part = name.partition(".")
        weight = WEIGHT_AFTER.get(part or layer, part or layer)
        weight = f"{layer}.{weight}" if part else weight
        names.append(f"{name}.gradient")
        if weight in weights:
            names.append(f"{weight}.weight.gradient")
    assert {name for name in names if ".weight." in name} == {
        f"{name}.weight.gradient" for name in weights}
    names += ["own.gradient"]
    shuffled = random.Random(0).sample(names, len(names))
    assert sorted(shuffled, key=phi3_ref.execution_order) == names
    again = [f"{name}@1" for name in forward]
    assert sorted(again + names, key=phi3_ref.execution_order) == names + again


def test_gradients_are_recorded_as_they_are_computed():
    """Tensors and their gradients in the order of the two passes, then the weights' gradients."""
    causal_lm = tiny(dtype="mixed_bfloat16")
    trace = phi3_ref.Trace.record(causal_lm, INPUTS, y="next")
    weights = [f"{name}.weight.gradient"
               for name, _ in phi3_ref.named_weights(causal_lm.backbone.weights)]
    assert list(trace) == [*NAMES, *(f"{name}.gradient" for name in reversed(NAMES)), *weights]
    assert {array.dtype.name for array in trace.values()} == {"bfloat16"}
    for name in NAMES:
        assert trace[f"{name}.gradient"].shape == trace[name].shape


# Patching and replaying --------------------------------------------------------------------------

LAYER_EDGES = """
    input > pre_attention_layernorm, attention_residual
    pre_attention_layernorm > attention.query, attention.key, attention.value
    attention.query > attention.query_rotary
    attention.key > attention.key_rotary
    attention.query_rotary > attention.scores
    attention.key_rotary > attention.scores
    attention.scores > attention.probabilities
    attention.probabilities > attention.context
    attention.value > attention.context
    attention.context > attention_output
    attention_output > attention_residual
    attention_residual > post_attention_layernorm, output
    post_attention_layernorm > feedforward_gate, feedforward_intermediate
    feedforward_gate > feedforward_output
    feedforward_intermediate > feedforward_output
    feedforward_output > output
"""


def downstream(name, num_layers):
    """All names that the tensor `name` influences, its own included: a walk along the edges."""
    edges = {"sequence_output_layernorm": ["logits"]}
    for i in range(num_layers):
        def full(stage, i=i):
            last = "token_embedding" if i == 0 else f"transformer_layer_{i - 1}"
            special = {"input": last, "output": f"transformer_layer_{i}"}
            return special.get(stage, f"transformer_layer_{i}.{stage}")

        for line in LAYER_EDGES.strip().splitlines():
            source, targets = line.split(" > ")
            edges.setdefault(full(source.strip()), []).extend(map(full, targets.split(", ")))
    edges[f"transformer_layer_{num_layers - 1}"] = ["sequence_output_layernorm"]
    reached, waiting = set(), [name]
    while waiting:
        name = waiting.pop()
        reached.add(name)
        waiting += set(edges.get(name, [])) - reached
    return reached


NAMES = list(ref.tap_shapes(tiny().backbone.config, 1, 1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_a_patch_changes_what_is_downstream_and_nothing_else(name, dtype):
    """Noise added at one name reaches every tensor that depends on it; the others keep each bit."""
    causal_lm = tiny(dtype=dtype)
    before, after = phi3_ref.Trace.record(causal_lm, INPUTS), phi3_ref.Trace()
    rng = np.random.default_rng(0)

    def patch(this, array):
        if this == name:
            array = (array + rng.normal(0, 1, array.shape)).astype(array.dtype)
        return after(this, array)

    logits = causal_lm(INPUTS, tap=patch)
    changed = {this for this in before if (before[this] != after[this]).any()}
    assert changed == downstream(name, TINY["num_layers"])
    np.testing.assert_array_equal(logits, after["logits"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_recorded_trace_replays(dtype, tmp_path):
    """Each recorded tensor, fed back from a file, gives the recorded logits; so do all at once."""
    causal_lm, stranger = tiny(dtype=dtype), tiny(seed=1, dtype=dtype)
    expected = causal_lm(INPUTS)
    phi3_ref.Trace.record(causal_lm, INPUTS).save(tmp_path / "trace.safetensors")
    trace = phi3_ref.Trace.load(tmp_path / "trace.safetensors")
    with_tap = causal_lm(INPUTS, tap=lambda name, array: array)
    np.testing.assert_array_equal(trace["logits"], with_tap)
    assert ref.relative_error(expected, with_tap) <= ref.TOLERANCE[dtype]
    for replayed in NAMES:
        got = causal_lm(
            INPUTS, tap=lambda name, array, replayed=replayed: (
                trace[name] if name == replayed else array))
        np.testing.assert_array_equal(got, with_tap)
    # In a model of other weights, too: nothing bypasses the tap.
    others = phi3_ref.Trace()
    stranger(INPUTS, tap=lambda name, array: others(name, trace[name]))
    assert_equal(others, trace)
    assert (stranger(INPUTS) != with_tap).any()


def test_an_activation_patched_into_another_prompt():
    """What layer 0 made of one prompt, put into a run over another, gives the first's logits."""
    causal_lm, trace = tiny(), phi3_ref.Trace()
    other = {"token_ids": (INPUTS["token_ids"] + 5) % 29}
    first = causal_lm(INPUTS, tap=trace)

    def patch(name, array):
        return trace[name] if name == "transformer_layer_0" else array

    np.testing.assert_array_equal(causal_lm(other, tap=patch), first)
    assert (causal_lm(other) != first).any()


# Generation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [
    {}, {"sliding_window": 3}, {**SU, "pretraining_sequence_length": 9}])
def test_a_trace_of_generation(arguments):
    """Pass n holds what chose token n: the prompt's first, then one position each."""
    causal_lm, trace = tiny(**arguments), phi3_ref.Trace()
    inputs, length, room = batch(6, 6, room=12), 6, 12
    token_ids = causal_lm.generate(inputs, stop_token_ids=None, tap=trace)["token_ids"]
    np.testing.assert_array_equal(
        token_ids, causal_lm.generate(inputs, stop_token_ids=None)["token_ids"])
    assert list(trace) == [*NAMES, *(f"{name}@{i}" for i in range(1, 6) for name in NAMES)]
    for i in range(room - length):
        suffix = f"@{i}" if i else ""
        # All positions at once: the prompt, and where su scaling's boundary is crossed.
        anew = i == 0 or (i == 4 and "rope_scaling_type" in arguments)
        S, T = length + i if anew else 1, length + i
        assert trace[f"token_embedding{suffix}"].shape == (2, S, 24)
        assert trace[f"transformer_layer_1.attention.scores{suffix}"].shape == (2, 6, S, T)
        assert trace[f"logits{suffix}"].shape == (2, 1, 29)
        chosen = trace[f"logits{suffix}"][:, 0].argmax(axis=-1)
        np.testing.assert_array_equal(chosen, token_ids[:, T])
        whole = phi3_ref.Trace.record(causal_lm, {"token_ids": token_ids[:, :T]})
        for name in NAMES:
            last = np.s_[:, :, -1:] if name.endswith(("scores", "probabilities")) else np.s_[:, -1:]
            error = ref.relative_error(trace[name + suffix][last], whole[name][last])
            assert error <= ref.TOLERANCE["float32"], name


@pytest.mark.parametrize("sampler", [*phi3_ref.SAMPLERS])
def test_a_tap_steers_generation(sampler):
    """What the tap makes of the logits is what the sampler sees, in every pass."""
    causal_lm = tiny()
    causal_lm.compile(sampler=sampler)
    answers = iter([3, 1, 4, 1, 5])

    def dictate(name, array):
        if name != "logits":
            return array
        logits = np.full_like(array, -1e4)
        logits[..., next(answers)] = 0
        return logits

    got = causal_lm.generate(batch(4, room=9), stop_token_ids=None, tap=dictate)
    assert got["token_ids"][0, 4:].tolist() == [3, 1, 4, 1, 5]


def test_a_tap_on_a_stream():
    """A stream calls the tap as it goes: by the first piece, the prompt's pass only."""
    causal_lm, trace = puzzles(), phi3_ref.Trace("logits*")
    prompt = causal_lm.preprocessor.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Reverse planet"}])
    stream = causal_lm.stream(prompt, 60, tap=trace)
    assert next(stream) == "t" and list(trace) == ["logits"]
    assert "t" + "".join(stream) == "tenalp"
    assert list(trace) == ["logits", *(f"logits@{i}" for i in range(1, 7))]


def test_without_a_tap_nothing_is_done_for_it(monkeypatch):
    """No textbook attention, and no memory that a score matrix would need."""
    def textbook(*args):
        raise AssertionError("the score matrix was computed")

    monkeypatch.setattr(phi3_ref, "textbook_attention", textbook)
    causal_lm = tiny()
    causal_lm.generate(batch(4, room=9), stop_token_ids=None)
    causal_lm(INPUTS)
    with pytest.raises(AssertionError, match="score matrix"):
        causal_lm(INPUTS, tap=phi3_ref.Trace("logits"))


# Trace -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names, kept", [
    ("*", NAMES),
    ("logits", ["logits"]),
    (["*.scores", "token_embedding"], ["token_embedding", *(
        f"transformer_layer_{i}.attention.scores" for i in range(2))]),
    ("transformer_layer_?", ["transformer_layer_0", "transformer_layer_1"]),
    ("*@1", [f"{name}@1" for name in NAMES]),
    ("logits*", ["logits", "logits@1"]),
])
def test_the_names_to_keep(names, kept):
    """Glob patterns of whole names; the second pass's names end in @1."""
    trace = phi3_ref.Trace(names)
    for _ in range(2):
        tiny()(INPUTS, tap=trace)
    assert [name for name in trace if names != "*" or "@" not in name] == kept


def test_a_trace_keeps_copies_and_returns_what_it_was_given():
    """Recording changes nothing, and what happens to the array later does not reach the trace."""
    trace, array = phi3_ref.Trace(), np.arange(6.0).reshape(2, 3).T
    assert trace("x", array) is array
    array[:] = 0
    np.testing.assert_array_equal(trace["x"], np.arange(6.0).reshape(2, 3).T)
    assert trace["x"].flags.c_contiguous


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_conversion(dtype):
    """On request everything is kept in another dtype, and the model still computes in its own."""
    causal_lm = tiny(dtype="bfloat16")
    trace = phi3_ref.Trace(dtype=phi3_ref.DTYPE_POLICIES[dtype][0])
    logits = causal_lm(INPUTS, tap=trace)
    assert {array.dtype.name for array in trace.values()} == {dtype}
    assert logits.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(trace["logits"], logits.astype(dtype))


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_save_and_load(dtype, tmp_path):
    """Names, order, bits and metadata come back; safetensors' own reader finds the same bits."""
    import torch
    from safetensors.torch import load_file
    causal_lm, path = puzzles(dtype), tmp_path / "new" / "trace.safetensors"
    trace = phi3_ref.Trace.record(causal_lm, "Sort cab", max_length=20)
    trace["more"] = np.arange(6, dtype="int32").reshape(2, 3).T
    trace.save(path)
    loaded = phi3_ref.Trace.load(path)
    assert_equal(loaded, trace)
    assert loaded.metadata == trace.metadata
    assert loaded.metadata["config"] == causal_lm.backbone.get_config()
    assert loaded.metadata["prompt"] == "Sort cab"
    expected = causal_lm.preprocessor.generate_preprocess("Sort cab", 10)["token_ids"]
    assert loaded.metadata["token_ids"] == [expected.tolist()]
    for name, tensor in load_file(path).items():
        assert str(tensor.dtype).removeprefix("torch.") == trace[name].dtype.name
        ours = torch.from_numpy(trace[name].astype("float64"))
        assert torch.equal(tensor.double(), ours)


def test_a_failed_save_leaves_the_old_file(tmp_path):
    """A trace is written whole or not at all."""
    trace, path = phi3_ref.Trace(), tmp_path / "trace.safetensors"
    trace("x", np.ones(3))
    trace.save(path)
    trace["y"] = np.array(["text"])
    with pytest.raises(Exception, match="str"):
        trace.save(path)
    assert_equal(phi3_ref.Trace.load(path), {"x": np.ones(3)})
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_another_programs_file(tmp_path):
    """Metadata that is not JSON stays text; a mapped file's later change does not reach us."""
    import torch
    from safetensors.torch import save_file
    path = tmp_path / "theirs.safetensors"
    save_file({"logits": torch.ones(2), "transformer_layer_10": torch.ones(2),
               "transformer_layer_9": torch.ones(2)}, path, {"format": "pt", "n": "3"})
    trace = phi3_ref.Trace.load(path)
    assert list(trace) == ["transformer_layer_9", "transformer_layer_10", "logits"]
    assert trace.metadata == {"format": "pt", "n": 3}
    path.write_bytes(bytes(path.stat().st_size))
    np.testing.assert_array_equal(trace["logits"], np.ones(2))


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 100, "bool"])
def test_unreadable_files(content, tmp_path):
    """A damaged file, or one of a dtype that is no number, is a ValueError with its path."""
    path = tmp_path / "bad.safetensors"
    if content == "bool":
        from safetensors.numpy import save_file
        save_file({"x": np.ones(3, bool)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.safetensors"):
        phi3_ref.Trace.load(path)
    with pytest.raises(FileNotFoundError):
        phi3_ref.Trace.load(tmp_path / "none.safetensors")


def test_record_takes_prompts_and_ids():
    """A prompt, a list of them and a dict give the same tensors; the prompts are cut as told."""
    causal_lm = puzzles()
    one = phi3_ref.Trace.record(causal_lm, "Sort cab")
    ids = causal_lm.preprocessor.generate_preprocess("Sort cab", 10)["token_ids"]
    assert_equal(one, phi3_ref.Trace.record(causal_lm, {"token_ids": ids[None]}))
    assert_equal(one, phi3_ref.Trace.record(causal_lm, ["Sort cab"]))
    two = phi3_ref.Trace.record(causal_lm, ["Sort cab", "Sort"])
    assert two.metadata["padding_mask"] == [[1] * 10, [1] * 6 + [0] * 4]
    assert ref.relative_error(two["logits"][:1], one["logits"]) <= 2e-6
    with pytest.warns(UserWarning, match="10 tokens") as caught:
        cut = phi3_ref.Trace.record(causal_lm, "Sort cab", max_length=4)
    assert len(caught) == 1
    assert cut.metadata["token_ids"] == [ids[:4].tolist()]
    with pytest.raises(ValueError, match=r"logit\b"):
        phi3_ref.Trace.record(causal_lm, "Sort cab", "logit")
    with pytest.raises(ValueError, match="preprocessor"):
        phi3_ref.Trace.record(tiny(), "Sort cab")


def test_the_next_tokens_as_labels(tmp_path):
    """`y="next"` is what follows, weighted 1 where something does; all of it is in the metadata."""
    causal_lm, inputs = tiny(), batch(7, 4, room=9)
    inputs["padding_mask"][1, 0] = False  # padding on the left: it foresees nothing either
    trace = phi3_ref.Trace.record(causal_lm, inputs, y="next")
    y = np.concatenate([inputs["token_ids"][:, 1:], inputs["token_ids"][:, :1]], axis=1)
    weights = np.zeros((2, 9))
    weights[0, :6] = weights[1, 1:3] = 1
    explicit = phi3_ref.Trace.record(causal_lm, inputs, y=y, sample_weight=weights)
    assert_equal(trace, explicit)
    assert trace.metadata == explicit.metadata
    assert trace.metadata["sample_weight"] == weights.tolist()
    loss, gradients = causal_lm.gradients(inputs, y, weights, training=False)
    assert trace.metadata["loss"] == pytest.approx(loss, 1e-6)
    for name, g in phi3_ref.named_weights(gradients):
        assert ref.relative_error(trace[f"{name}.weight.gradient"], g) <= 1e-5, name
    trace.save(tmp_path / "trace.safetensors")
    loaded = phi3_ref.Trace.load(tmp_path / "trace.safetensors")
    assert set(loaded) == set(trace) and loaded.metadata == trace.metadata
    assert list(loaded) == sorted(trace, key=phi3_ref.execution_order)
    for name in trace:
        np.testing.assert_array_equal(loaded[name], trace[name])


def test_gradients_of_a_prompt():
    """Strings are labelled, too; patterns choose among gradients; without `y` there are none."""
    causal_lm = puzzles()
    trace = phi3_ref.Trace.record(causal_lm, ["Sort cab", "Sort"], "*logits*", y="next")
    assert list(trace) == ["logits", "logits.gradient"]
    assert trace.metadata["sample_weight"] == [[1] * 9 + [0], [1] * 5 + [0] * 5]
    assert not trace["logits.gradient"][1, 5:].any()
    only = phi3_ref.Trace.record(causal_lm, "Sort cab", "*.weight.gradient", y="next")
    assert len(only) == 3 + 6 * causal_lm.backbone.num_layers
    assert not any(name.endswith("gradient") for name in phi3_ref.Trace.record(causal_lm, "Sort"))


def test_a_gradient_tap_that_returns_nothing_is_refused():
    """And what it returns is used instead: zeros for a layer's gradient stop all before it."""
    causal_lm, y = tiny(), INPUTS["token_ids"]
    with pytest.raises(ValueError, match="returned None for 'logits'"):
        causal_lm.gradients(INPUTS, y, gradient_tap=lambda name, array: None)
    _, gradients = causal_lm.gradients(INPUTS, y, gradient_tap=lambda name, array: (
        array * 0 if name == "transformer_layer_0" else array))
    stopped = {name for name, g in phi3_ref.named_weights(gradients) if not g.any()}
    assert stopped == {"token_embedding", *(
        f"transformer_layer_0.{part}" for part in gradients["transformer_layers"][0])}


def test_a_large_trace_is_announced():
    """Once, where it grows beyond 1 GB: what is kept counts, in the dtype that it is kept in."""
    trace = phi3_ref.Trace("*.scores", dtype="float16")
    scores = np.broadcast_to(np.float32(1), (1, 6, 8192, 4990))  # 0.49 GB
    for name in ("0.scores", "0.probabilities", "0.context", "1.scores"):  # no warning: an error
        trace(name, scores)
    with pytest.warns(UserWarning, match="over 1 GB by '2.scores'"):
        trace("2.scores", scores[:, :1])
    trace("3.scores", scores[:, :1])


# Comparison --------------------------------------------------------------------------------------


def test_the_numbers_of_a_row():
    """Errors, units in the last place, cosine and the worst index, by hand."""
    reference = {"x": np.array([[3.0, -4.0], [0.0, 1.0]], "float32")}
    other = {"x": np.array([[3.0, -4.0], [0.0, 1.5]], "float32")}
    [row] = phi3_ref.compare(reference, other).rows
    assert (row.name, row.shape, row.dtype) == ("x", (2, 2), "float32")
    assert (row.max_error, row.relative_error) == (0.5, 0.125)
    assert row.ulps == 0.5 / 2**-21  # of 4.0, whose neighbour is 2^-21 away
    assert row.cosine == pytest.approx(26.5 / (26**0.5 * 27.25**0.5))
    assert (row.index, row.values) == ((1, 1), (1.0, 1.5))
    assert (row.tolerance, row.within) == (2e-6, False)


@pytest.mark.parametrize("first, second, dtype, ulps", [
    ("float32", "float32", "float32", 4.0), ("float32", "bfloat16", "bfloat16", 2.0**-14),
    ("float16", "float32", "float16", 2.0**-11), ("float16", "bfloat16", "bfloat16", 2.0**-14),
    ("float64", "float32", "float32", 4.0), ("float64", "float64", "float64", 2.0**31),
    ("float64", "int64", "float64", 2.0**31)])
def test_the_lower_dtype_counts(first, second, dtype, ulps):
    """Tolerance and units are those of the less precise dtype; ml_dtypes states the latter."""
    a, b = (np.zeros(2, phi3_ref.DTYPE_POLICIES.get(d, [d])[0]) for d in (first, second))
    a[0] = b[0] = 1
    error = 4 * 2.0**-23
    if second == "int64":
        a[1] = error
    else:
        b[1] = error  # 2^-21: representable as a subnormal or normal number in each dtype
    for pair in ((a, b), (b, a)):
        [row] = phi3_ref.compare(*({"x": array} for array in pair)).rows
        assert row.dtype == dtype and row.max_error == error
        assert row.ulps == ulps == error / float(ml_dtypes.finfo(dtype).eps)
        assert row.tolerance == {**ref.TOLERANCE, "float64": 1e-12}[dtype]


def test_tolerance():
    """The caller's tolerance replaces the dtype's; zero allows no bit to differ."""
    a, b = {"x": np.array([1.0, 0.5])}, {"x": np.array([1.0, 0.51])}
    assert phi3_ref.compare(a, b).first.name == "x"
    assert phi3_ref.compare(a, b, tolerance=0.011).first is None
    assert phi3_ref.compare(a, b, tolerance=0.009).first.name == "x"
    assert phi3_ref.compare(a, a, tolerance=0).first is None
    for tolerance in (-1, np.nan, "1", True):
        with pytest.raises(ValueError, match="tolerance"):
            phi3_ref.compare(a, b, tolerance=tolerance)


@pytest.mark.parametrize("reference, other, index", [
    ([1.0, np.nan], [1.0, 2.0], 1), ([1.0, 2.0], [1.0, np.nan], 1),
    ([1.0, np.nan], [1.0, np.nan], 1), ([np.nan, np.nan], [1.0, 2.0], 0),
    ([1.0, np.inf], [1.0, 2.0], 1), ([1.0, 2.0], [1.0, -np.inf], 1),
    ([1.0, np.inf], [1.0, -np.inf], 1), ([1.0, -np.inf], [1.0, -np.inf], None),
    ([-np.inf, 1.0], [-np.inf, 3.0], 1),
    ([0.0, 0.0], [0.0, 0.0], None), ([0.0, 0.0], [0.0, 1.0], 1), ([0.0, 1.0], [0.0, 0.0], 1),
])
def test_what_is_not_a_number_or_zero(reference, other, index):
    """NaN is never within tolerance, an infinity only where both have it; zeros are no trouble."""
    comparison = phi3_ref.compare({"x": np.array(reference)}, {"x": np.array(other)})
    if index is None:
        assert comparison.first is None
    else:
        assert comparison.first.index == (index,)
        values = comparison.first.values
        np.testing.assert_array_equal(values, (reference[index], other[index]))
    assert "x" in str(comparison)


def test_names_and_shapes_that_do_not_fit():
    """What cannot be compared is said, and the rest compared; nothing in common is an error."""
    ones = np.ones((2, 3), "float32")
    comparison = phi3_ref.compare({"logits": ones, "x": ones, "token_embedding": ones},
                                  {"y": ones, "x": ones.T, "token_embedding": ones})
    assert [row.name for row in comparison.rows] == ["token_embedding", "x"]
    assert comparison.first.name == "x" and comparison.first.values == ([2, 3], [3, 2])
    assert comparison.only_in_reference == ["logits"] and comparison.only_in_other == ["y"]
    text = str(comparison)
    assert "[2, 3] in the reference, [3, 2] in the other" in text
    assert "Only in the reference, 1: logits" in text and "Only in the other, 1: y" in text
    with pytest.raises(ValueError, match=r"'a'.*'b'"):
        phi3_ref.compare({"a": ones}, {"b": ones})


def test_other_layouts():
    """A mapping renames, cuts and transposes what another implementation calls otherwise."""
    causal_lm = tiny()
    trace = phi3_ref.Trace.record(causal_lm, INPUTS)
    path = "transformer_layer_0.attention"
    theirs = {
        "qkv": np.concatenate([trace[f"{path}.{x}"] for x in ("query", "key", "value")], axis=2),
        "p": trace[f"{path}.probabilities"].transpose(0, 2, 3, 1),
        "logits": trace["logits"], "own": np.ones(3)}
    mapping = {f"{path}.query": ("qkv", lambda x: x[:, :, :6]),
               f"{path}.key": ("qkv", lambda x: x[:, :, 6:8]),
               f"{path}.value": ("qkv", lambda x: x[:, :, 8:]),
               f"{path}.probabilities": ("p", lambda x: x.transpose(0, 3, 1, 2))}
    comparison = phi3_ref.compare(trace, theirs, mapping, tolerance=0)
    assert [row.name for row in comparison.rows] == [
        f"{path}.query", f"{path}.key", f"{path}.value", f"{path}.probabilities", "logits"]
    assert comparison.first is None
    assert f"{path}.scores" in comparison.only_in_reference  # the mapping leaves it out
    assert comparison.only_in_other == ["own"]
    mapping[f"{path}.key"] = ("qkv", lambda x: x[:, :, 8:])
    assert phi3_ref.compare(trace, theirs, mapping).first.name == f"{path}.key"


def test_a_mapping_that_names_nothing():
    """Either side's misspelt name is an error that says which side lacks it, and what it has."""
    a, b = {"logits": np.ones(2), "x": np.ones(2)}, {"out": np.ones(2), "x": np.ones(2)}
    assert len(phi3_ref.compare(a, b, {"logits": "out"}).rows) == 2
    with pytest.raises(ValueError, match=r"names \['logit'\].* the reference .* \['logits', 'x'\]"):
        phi3_ref.compare(a, b, {"logit": "out"})
    with pytest.raises(ValueError, match=r"names \['oút'\], .* the other .* \['out', 'x'\]"):
        phi3_ref.compare(a, b, {"logits": ("oút", lambda x: x)})


def test_what_came_before_the_first_wrong_tensor():
    """The last that was right, and what lay between and was not compared; gradients, too."""
    names = ["token_embedding", *(f"transformer_layer_0.attention.{part}" for part in (
        "query", "key", "value", "query_rotary", "key_rotary", "scores")), "logits"]
    reference = {name: np.ones(3) for name in [*names, "logits.gradient", *(
        f"{name}.gradient" for name in names[-2:0:-1])]}

    def said(wrong, lacking=()):
        other = {name: np.full(3, 1.0 + (name == wrong)) for name in reference
                 if name not in lacking}
        lines = phi3_ref.compare(reference, other).summary()[2:]
        return [line for line in lines if not line.startswith("Only in")]

    path = "transformer_layer_0.attention"
    assert said(f"{path}.scores") == [f"Right until {path}.key_rotary"]
    assert said(f"{path}.scores", names[3:6] + names[:1]) == [
        f"Right until {path}.key", "Not compared between the two, "
        f"3: {path}.value, {path}.query_rotary, {path}.key_rotary"]
    assert said("token_embedding") == []
    assert said(f"{path}.query", names[:1]) == ["Not compared before it, 1: token_embedding"]
    assert said(f"{path}.key_rotary.gradient", [f"{path}.scores.gradient"]) == [
        "Right until logits.gradient", f"Not compared between the two, 1: {path}.scores.gradient"]


def test_how_a_comparison_looks():
    """A line per tensor, aligned; the first divergence last; in HTML, markup in names is text."""
    a = {"token_embedding": np.ones((1, 2)), "transformer_layer_0": np.zeros(3), "<x>": np.ones(1)}
    b = {**a, "transformer_layer_0": np.array([0, 0.25, 0])}
    comparison = phi3_ref.compare(a, b)
    lines = repr(comparison).splitlines()
    assert str(comparison) == repr(comparison)
    assert [line.split()[0] for line in lines[:4]] == [
        "name", "token_embedding", "transformer_layer_0", "<x>"]
    assert len({len(line) for line in lines[:4]}) == 1 and "<-" in lines[2]
    assert lines[-2:] == ["transformer_layer_0: relative error inf > 1.0e-12, largest at [1]: "
                          "0 in the reference, 0.25 in the other", "Right until token_embedding"]
    html = comparison._repr_html_()
    assert html.count("<tr>") == 4 and "&lt;x&gt;" in html and "<x>" not in html
    assert "<b>transformer_layer_0" in html and "<b>token_embedding" not in html


# Planted bugs: transformers' model as the port that has one --------------------------------------

PORT = dict(num_key_value_heads=2, num_hidden_layers=3)


def interleaved(q, k, cos, sin):
    """RoPE on neighbouring components instead of halves."""
    import torch
    half = cos.shape[-1] // 2
    cos, sin = cos[..., :half].unsqueeze(1), sin[..., :half].unsqueeze(1)

    def rotate(x):
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)

    return rotate(q), rotate(k)


def one_key_too_many(**kwargs):
    """A causal mask that shows each query the token after it, too."""
    import torch
    hidden = kwargs["inputs_embeds"]
    length = hidden.shape[1]
    mask = torch.full((length, length), torch.finfo(hidden.dtype).min, dtype=hidden.dtype).triu(2)
    return mask[None, None].expand(len(hidden), 1, length, length)


def swap_gate_and_intermediate(layer):
    weight = layer.mlp.gate_up_proj.weight.data
    weight[:] = weight.roll(len(weight) // 2, dims=0)


def without_scale(layer):
    layer.self_attn.scaling = 1.0


def with_another_epsilon(layer):
    layer.post_attention_layernorm.variance_epsilon = 1e-6


@pytest.mark.parametrize("bug, name", [
    (swap_gate_and_intermediate, "transformer_layer_1.feedforward_gate"),
    (without_scale, "transformer_layer_1.attention.scores"),
    (with_another_epsilon, "transformer_layer_1.post_attention_layernorm"),
    ({"apply_rotary_pos_emb": interleaved}, "transformer_layer_0.attention.query_rotary"),
    ({"repeat_kv": lambda x, groups: x.repeat(1, groups, 1, 1)},
     "transformer_layer_0.attention.scores"),
    ({"create_causal_mask": one_key_too_many}, "transformer_layer_0.attention.probabilities"),
], ids=["swapped gate and intermediate", "missing scale", "wrong epsilon", "interleaved RoPE",
        "keys repeated in the wrong order", "off-by-one mask"])
def test_a_planted_bug_is_found_where_it_is(bug, name, tmp_path):
    """`compare` names the very tensor that a bug in the port spoils first, and none without it."""
    from transformers.models.phi3 import modeling_phi3
    model = ref.transformers_model(PORT)
    directory = ref.write_huggingface(model, tmp_path)
    token_ids = np.random.default_rng(0).integers(0, 61, (2, 9))
    causal_lm = phi3_ref.Phi3CausalLM.from_preset(directory)
    ours = phi3_ref.Trace.record(causal_lm, {"token_ids": token_ids})
    assert phi3_ref.compare(ours, transformers_trace(model, token_ids)).first is None
    patches = bug if isinstance(bug, dict) else {}
    if not patches:
        bug(model.model.layers[1])
    with contextlib.ExitStack() as stack:
        for attribute, replacement in patches.items():
            stack.enter_context(mock.patch.object(modeling_phi3, attribute, replacement))
        theirs = transformers_trace(model, token_ids)
    comparison = phi3_ref.compare(ours, theirs)
    assert comparison.first.name == name
    worst = np.abs(ours[name].astype("float64") - theirs[name])
    assert comparison.first.max_error == worst.max() == worst[comparison.first.index]
    assert comparison.first.values == (ours[name][comparison.first.index],
                                       theirs[name][comparison.first.index])


# Planted bugs in a port's backward pass: ours, with one derivative that is wrong ------------------


def transposed(right):
    """A square weight's gradient is not transposed: its shape does not tell."""
    def linear_backward(gradient, x, weight, frozen):
        x_gradient, weight_gradient = right.linear_backward(gradient, x, weight, frozen)
        square = weight.shape[0] == weight.shape[1]
        return x_gradient, weight_gradient.T if square else weight_gradient
    return {"linear_backward": linear_backward}


def the_groups_first_head(right):
    """Keys get the gradient of the first query head that reads them, not the sum over all."""
    def backward(gradient, query, key, value, *rest):
        groups = query.shape[2] // key.shape[2]
        query_gradient, _, value_gradient = right.textbook_attention_backward(
            gradient, query, key, value, *rest)
        rest = *rest[:2], phi3_ref.no_tap, *rest[3:]
        by_head = right.textbook_attention_backward(
            gradient, query, np.repeat(key, groups, axis=2), np.repeat(value, groups, axis=2),
            *rest)
        return query_gradient, by_head[1][:, :, ::groups], value_gradient
    return {"textbook_attention_backward": backward}


def without_projection(right):
    """RMSNorm as if its root mean square were a constant."""
    def rms_norm_backward(gradient, x, scale, epsilon):
        r = ((x * x).mean(axis=-1, keepdims=True) + epsilon) ** 0.5
        return gradient * scale / r, right.rms_norm_backward(gradient, x, scale, epsilon)[1]
    return {"rms_norm_backward": rms_norm_backward}


def rotated_on(right):
    """The gradient is rotated as the forward rotates, and not back."""
    return {"rotary_embedding_backward": right.rotary_embedding}


def mean_of_weights(right):
    """The loss is divided by the sum of the weights, not by the number of labels."""
    def cross_entropy(logits, labels, sample_weight):
        loss, gradient = right.cross_entropy(logits, labels, sample_weight)
        factor = labels.size / sample_weight.sum()
        return loss * factor, gradient * factor
    return {"cross_entropy": cross_entropy}


@pytest.mark.parametrize("bug, name", [
    (transposed, "transformer_layer_1.attention_output.weight.gradient"),
    (the_groups_first_head, "transformer_layer_1.attention.key_rotary.gradient"),
    (without_projection, "transformer_layer_1.gradient"),
    (rotated_on, "transformer_layer_1.attention.key.gradient"),
    (mean_of_weights, "logits.gradient")])
def test_a_bug_in_a_backward_pass_is_found_where_it_is(bug, name, monkeypatch):
    """`compare` with KerasHub names the very gradient that a bug spoils first, and none without."""
    model = ref.keras_backbone(TINY)
    inputs = batch(7, 5, room=7)
    inputs["padding_mask"] = inputs["padding_mask"].astype("int32")
    y = np.random.default_rng(2).integers(0, 29, (2, 7))
    weights = inputs["padding_mask"].astype("float32")
    theirs = keras_trace(model, inputs, y, weights)
    port = phi3_ref.Phi3CausalLM(ref.ours_like(model))
    right = phi3_ref.Trace.record(port, inputs, y=y, sample_weight=weights)
    assert phi3_ref.compare(theirs, right).first is None
    functions = types.SimpleNamespace(**vars(phi3_ref))
    for function, replacement in bug(functions).items():
        monkeypatch.setattr(phi3_ref, function, replacement)
    wrong = phi3_ref.Trace.record(port, inputs, y=y, sample_weight=weights)
    comparison = phi3_ref.compare(theirs, wrong)
    assert comparison.first.name == name
    assert comparison.summary()[1].startswith(f"{name}: ")


def test_a_norm_that_scales_after_the_cast(tmp_path):
    """In bfloat16 transformers rounds before RMSNorm's scale; KerasHub does not, and neither do we.

    One rounding is within the dtype's tolerance: a smaller one is asked for.
    """
    inputs = {"token_ids": np.random.default_rng(0).integers(0, 29, (2, 9)),
              "padding_mask": np.ones((2, 9), "int32")}
    name = "transformer_layer_0.pre_attention_layernorm"
    model = ref.transformers_model({"vocab_size": 29, **PORT}, "bfloat16")
    directory = ref.write_huggingface(model, tmp_path)
    causal_lm = phi3_ref.Phi3CausalLM.from_preset(directory, dtype="bfloat16")
    ours = phi3_ref.Trace.record(causal_lm, inputs)
    comparison = phi3_ref.compare(ours, transformers_trace(model, **inputs), tolerance=1e-3)
    assert comparison.first is not None and comparison.first.name == name, (
        ref.seen_with("transformers", "5.24.0"))
    assert 0.5 <= comparison.first.ulps <= 1

    model = ref.keras_backbone(TINY, "bfloat16")
    ours = phi3_ref.Trace.record(phi3_ref.Phi3CausalLM(ref.ours_like(model)), inputs)
    rows = {row.name: row for row in phi3_ref.compare(ours, keras_trace(model, inputs)).rows}
    assert rows[name].max_error == 0


def test_empty_arrays_are_equal_and_have_no_numbers():
    """And an empty one differs from one that is not."""
    empty, full = {"logits": np.zeros((0, 3))}, {"logits": np.ones((2, 3))}
    comparison = phi3_ref.compare(empty, empty)
    assert comparison.first is None and "logits" in str(comparison) + comparison._repr_html_()
    assert phi3_ref.compare(empty, full).first.name == "logits"


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "mixed_float16"])
def test_a_tap_sees_what_generate_computes(dtype):
    """With queries and keys so large that q·k leaves float16: the same tokens with a tap."""
    causal_lm = tiny(dtype=dtype, head_dim=64)
    for layer in causal_lm.backbone.weights["transformer_layers"]:
        layer["qkv"][: -2 * 64] *= layer["qkv"].dtype.type(100)  # all but the values'
    inputs, trace = batch(7, 7, room=12), phi3_ref.Trace()
    expected = causal_lm.generate(inputs, stop_token_ids=None)["token_ids"]
    found = causal_lm.generate(inputs, stop_token_ids=None, tap=trace)["token_ids"]
    np.testing.assert_array_equal(found, expected)
    assert all(np.isfinite(array).all() for array in trace.values())
    scores = trace["transformer_layer_0.attention.scores"].astype("float64")
    assert abs(scores).max() * 64**0.5 > 65_504
