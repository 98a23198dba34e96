"""LoRA: what it learns, what stays, and adapters' files: KerasHub's, PEFT's, and forged ones."""

import json
import math
import random
import re
import tracemalloc
import warnings

import h5py
import hypothesis
import numpy as np
import pytest
import references as ref
import safetensors.numpy
from hypothesis import strategies as st

import phi3_ref

CONFIG = dict(vocabulary_size=64, num_layers=3, hidden_dim=24, intermediate_dim=40,
              num_query_heads=6, num_key_value_heads=3)
PUZZLES = "phi3_tiny_puzzles_en"


def randomize(backbone, seed=0):
    """Give the adapters, which begin with zeros, any numbers of such a size that they matter."""
    rng = np.random.default_rng(seed)
    for name, array in phi3_ref.adapters(backbone.weights).items():
        array[...] = rng.normal(0, 0.5 if name.endswith("_b") else array.shape[1] ** -0.5,
                                array.shape)
    return backbone


def random_lora(rank=2, seed=0, **arguments):
    """A backbone whose weights and adapters are all random."""
    backbone = phi3_ref.Phi3Backbone(**{**CONFIG, "seed": 1, **arguments})
    rng = np.random.default_rng(seed)
    for array in phi3_ref.unfused(backbone.weights, backbone.config).values():
        array[...] = ref.randomized(array.shape, rng, array.shape[-1])
    backbone.enable_lora(rank)
    return randomize(backbone, seed)


def bits(backbone):
    """{name: bytes} of all weights."""
    return {name: array.tobytes() for name, array in phi3_ref.named_weights(backbone.weights)}


def batch(rng, shape=(3, 12), V=64):
    """Inputs, labels and their weights, of which some are zero."""
    ids, y = rng.integers(0, V, (2, *shape))
    weight = rng.uniform(0, 2, shape) * (rng.random(shape) < 0.7)
    return ({"token_ids": ids, "padding_mask": np.ones(shape, int)}, y, weight.astype("float32"))


# Beside KerasHub ----------------------------------------------------------------------------------


def keras_pair(config, rank, dtype="float32", seed=0):
    """KerasHub's backbone and ours, with the same random weights and random adapters."""
    theirs, rng = ref.keras_backbone(config, dtype, seed), np.random.default_rng(seed)
    ours = ref.ours_like(theirs)
    for backbone in (theirs, ours):
        backbone.enable_lora(rank)
    weights = [np.asarray(weight, "float64") for weight in theirs.get_weights()]
    for i, (weight, variable) in enumerate(zip(weights, theirs.weights, strict=True)):
        if variable.path.endswith("lora_kernel_b"):
            weights[i] = rng.normal(0, 0.5, weight.shape)
        if variable.path.endswith("lora_kernel_a"):
            weights[i] = rng.normal(0, weight.shape[0] ** -0.5, weight.shape)
    for backbone in (theirs, ours):
        backbone.set_weights(weights)
    return theirs, ours


STEPS = {  # each case: rank, the optimizer's arguments, and our backbone's
    "rank 4": (4, dict(weight_decay=0.004), {}),
    "rank 1, without weight decay": (1, dict(weight_decay=None), dict(fused=False)),
    "clipped": (2, dict(weight_decay=0.1, global_clipnorm=0.02), {}),
}


@pytest.mark.parametrize("case", STEPS)
def test_thirty_steps_end_at_kerashubs_adapters(case):
    """From KerasHub's initial ones, on TensorFlow. Seen: 2e-5 of the way. All else stays."""
    import keras
    import keras_hub
    rank, settings, arguments = STEPS[case]
    backbone, rng = ref.keras_backbone(CONFIG), np.random.default_rng(0)
    ours = phi3_ref.Phi3CausalLM(ref.ours_like(backbone, **arguments))
    for model in (backbone, ours.backbone):
        model.enable_lora(rank)
    ours.backbone.set_weights([np.asarray(weight) for weight in backbone.get_weights()])
    start, learning = ours.backbone.get_weights(), [w.trainable for w in backbone.weights]
    theirs = keras_hub.models.Phi3CausalLM(backbone)
    kind = keras.optimizers.AdamW if settings["weight_decay"] else keras.optimizers.Adam
    theirs.compile(optimizer=kind(1e-2, **settings), jit_compile=False)
    ours.compile(phi3_ref.AdamW(1e-2, **settings))
    for _ in range(30):
        x, y, weight = batch(rng)
        theirs.reset_metrics()
        found, expected = ours.train_on_batch(x, y, weight), theirs.train_on_batch(x, y, weight)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    end = ours.backbone.get_weights(), backbone.get_weights()
    moved = 0
    for a, b, before, learns in zip(*end, start, learning, strict=True):
        if learns:
            assert np.abs(a - b).max() < 1e-3 * np.abs(b - before).max()
            moved += np.abs(b - before).max() > 0.02
        else:
            assert a.tobytes() == before.tobytes()
    assert moved == 4 * CONFIG["num_layers"]


@pytest.mark.parametrize("dtype", list(ref.TOLERANCE))
@hypothesis.settings(max_examples=ref.examples(4))
@hypothesis.given(data=st.data())
def test_hidden_states_are_kerashubs(dtype, data):
    """With any adapters, masks and su scaling, in every policy; and in 16 bits they count more.

    KerasHub adds A B to the kernel and rounds the sum to 16 bits, we the projections' sum: twice
    the tolerance is allowed, as for transformers' norms.
    """
    def choose(options):
        return data.draw(st.sampled_from(options))

    config, inputs = ref.random_case(choose)
    theirs, ours = keras_pair(config, choose([1, 3]), dtype, choose([0, 1]))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The sequence outgrows", UserWarning)
        error = ref.relative_error(ours(inputs), ref.keras_output(theirs, inputs))
    assert error <= (1 if dtype == "float32" else 2) * ref.TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed_bfloat16"])
def test_the_true_error_is_no_larger_than_kerashubs(dtype):
    """Against the float64 oracle, in the mean over 8 models."""
    errors = []
    for seed in range(8):
        config, inputs = ref.random_case(random.Random(seed).choice, num_layers=3, full_mask=True)
        theirs, ours = keras_pair(config, 2, dtype, seed)
        exact = phi3_ref.Phi3Backbone(**{**config, "dtype": "float64"})
        exact.enable_lora(2)
        exact.set_weights(ours.get_weights())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The sequence outgrows", UserWarning)
            errors.append([ref.relative_error(result, exact(inputs)) for result in (
                ours(inputs), ref.keras_output(theirs, inputs))])
    ours, its = np.array(errors).T
    assert ref.no_larger(ours, its), f"{ours.mean():.2e} against {its.mean():.2e}"


def test_counts_are_kerashubs():
    """All parameters; and in the summary those that learn and those that do not."""
    theirs, ours = keras_pair(CONFIG, 3)
    assert ours.count_params() == theirs.count_params()
    assert ours.get_config()["trainable"] is theirs.get_config()["trainable"] is True
    known = {name: value for name, value in ours.get_config().items() if name != "name"}
    assert known.items() <= theirs.get_config().items()


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_summary_tells_what_learns(lora, dtype, capsys):
    """Numbers and bytes: adapters are float32 in every policy, as KerasHub's."""
    theirs = ref.keras_backbone(CONFIG, dtype)
    ours = ref.ours_like(theirs)
    for backbone in (theirs, ours) if lora else ():
        backbone.enable_lora(3)
    ours.summary()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for name, variables in (("trainable", theirs.trainable_weights), ("total", theirs.weights),
                            ("frozen", theirs.non_trainable_weights)):
        count, size = (sum(math.prod(w.shape) * (w.dtype == "float32" or not size or 0.5)
                           * (4 if size else 1) for w in variables) for size in (False, True))
        assert [name, f"{count:,}", f"{size:,.0f}"] in lines


def test_adapters_begin_as_kerashubs():
    """A is uniform within the same bounds, B zero: so the model computes what it did."""
    import keras
    config = CONFIG | dict(hidden_dim=96, num_layers=1)
    ours = phi3_ref.Phi3Backbone(**config, seed=3)
    before = ours({"token_ids": np.arange(12)[None]})
    ours.enable_lora(8)
    np.testing.assert_array_equal(ours({"token_ids": np.arange(12)[None]}), before)
    weights = ours.weights["transformer_layers"][0]
    for part, heads in (("query", 6), ("value", 3)):
        a = weights[f"{part}_lora_a"]
        theirs = np.asarray(keras.initializers.get("he_uniform")((96, heads, 8)))
        assert not weights[f"{part}_lora_b"].any()
        np.testing.assert_allclose(np.abs(a).max(), np.abs(theirs).max(), rtol=0.02)
        np.testing.assert_allclose(a.std(), theirs.std(), rtol=0.05)
    again = phi3_ref.Phi3Backbone(**config, seed=3)
    again.enable_lora(8)
    assert bits(again) == bits(ours)


@pytest.mark.parametrize("layers", [1, 2, 12])
def test_lora_files_are_kerashubs(layers, tmp_path):
    """Each reads the other's, whether LoRA is enabled yet or not; and ours again is the same."""
    import keras_hub
    config = CONFIG | dict(num_layers=layers)
    theirs, ours = keras_pair(config, 3)
    theirs.save_lora_weights(tmp_path / "theirs.lora.h5")
    ours.save_lora_weights(tmp_path / "ours.lora.h5")
    contents = []
    for name in ("theirs", "ours"):
        with h5py.File(tmp_path / f"{name}.lora.h5") as file:
            found = {}
            file.visititems(lambda path, item, found=found: found.update(
                {path: item[()]} if isinstance(item, h5py.Dataset) else {}))
        contents.append(found)
    assert contents[0].keys() == contents[1].keys()
    for path, array in contents[0].items():
        np.testing.assert_array_equal(contents[1][path], array)
        assert contents[1][path].dtype == array.dtype
    for cls, name in ((keras_hub.models.Phi3Backbone, "ours"), (phi3_ref.Phi3Backbone, "theirs")):
        for enabled in (False, True):
            other = cls(**config)
            if enabled:
                other.enable_lora(3)
            other.load_lora_weights(str(tmp_path / f"{name}.lora.h5"))
            found = [w for w in other.get_weights() if w.shape[-1] == 3 or w.shape[0] == 3]
            kept = [w for w in ours.get_weights() if w.shape[-1] == 3 or w.shape[0] == 3]
            assert len(found) == 4 * layers
            for a, b in zip(found, kept, strict=True):
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "mixed_bfloat16"])
def test_lora_files_of_other_policies(dtype, tmp_path):
    """The oracle's adapters are float64, all others' float32, whatever the weights; as stored."""
    import keras_hub
    ours = random_lora(dtype=dtype)
    wide = "float64" if dtype == "float64" else "float32"
    assert {a.dtype.name for a in phi3_ref.adapters(ours.weights).values()} == {wide}
    ours.save_lora_weights(tmp_path / "a.lora.h5")
    again = phi3_ref.Phi3Backbone(**CONFIG, dtype=dtype)
    again.load_lora_weights(tmp_path / "a.lora.h5")
    expected = phi3_ref.adapters(ours.weights)
    for name, array in phi3_ref.adapters(again.weights).items():
        assert array.tobytes() == expected[name].tobytes()
    theirs = keras_hub.models.Phi3Backbone(**CONFIG)
    theirs.load_lora_weights(str(tmp_path / "a.lora.h5"))
    layer = theirs.transformer_layers[1].attention.query_dense
    np.testing.assert_allclose(
        np.asarray(layer.lora_kernel_b),
        ours.weights["transformer_layers"][1]["query_lora_b"].T, rtol=1e-6)


# Merging ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("tied", [False, True])
def test_merged_and_unmerged_logits_agree(dtype, tied, tmp_path):
    """What is saved in either format: read by us, by KerasHub and by transformers."""
    import keras_hub
    ours = phi3_ref.Phi3CausalLM(random_lora(dtype=dtype, tie_word_embeddings=tied))
    before, inputs = bits(ours.backbone), {"token_ids": np.arange(24).reshape(2, 12)}
    logits = ours(inputs)
    assert ref.relative_error(logits, phi3_ref.Phi3CausalLM(phi3_ref.Phi3Backbone(
        **CONFIG, dtype=dtype, tie_word_embeddings=tied, weights={
            **ours.backbone.weights, "transformer_layers": [
                {k: w for k, w in layer.items() if "lora" not in k}
                for layer in ours.backbone.weights["transformer_layers"]]}))(inputs)) > 0.1
    ours.save_to_preset(tmp_path / "keras")
    ours.export_to_transformers(tmp_path / "huggingface")
    assert bits(ours.backbone) == before
    tolerance = ref.TOLERANCE.get(dtype, 1e-12)
    for name in ("keras", "huggingface"):
        merged = phi3_ref.Phi3CausalLM.from_preset(tmp_path / name, dtype=dtype)
        assert not phi3_ref.adapters(merged.backbone.weights)
        assert ref.relative_error(merged(inputs), logits) <= tolerance
    if dtype == "float32":
        model = ref.read_huggingface(tmp_path / "huggingface")
        theirs = ref.transformers_logits(model, inputs["token_ids"])
        assert ref.relative_error(logits, theirs) <= tolerance
        backbone = keras_hub.models.Phi3Backbone.from_preset(str(tmp_path / "keras"))
        theirs = backbone.token_embedding(backbone(inputs | {
            "padding_mask": np.ones((2, 12), int)}), reverse=True)
        assert ref.relative_error(logits, np.asarray(theirs)) <= tolerance


def test_keras_saves_the_same_merged_weights(tmp_path):
    """KerasHub's own file of a model with LoRA has the merged kernels, too: these."""
    theirs, ours = keras_pair(CONFIG, 3)
    theirs.save_to_preset(str(tmp_path / "theirs"))
    ours.save_to_preset(tmp_path / "ours")
    for a, b in zip(*(phi3_ref.Phi3Backbone.from_preset(tmp_path / name).get_weights()
                      for name in ("theirs", "ours")), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_generation_goes_by_the_adapters(tmp_path):
    """Cached decoding, greedy and by beams, is the merged model's, and not the plain one's."""
    texts, prompt = [], "<|user|>\nReverse planet<|end|>\n<|assistant|>\n"
    causal_lm = phi3_ref.Phi3CausalLM.from_preset(PUZZLES)
    plain = causal_lm.generate(prompt, 36, strip_prompt=True)
    causal_lm.backbone.enable_lora(2)
    assert causal_lm.generate(prompt, 36, strip_prompt=True) == plain
    randomize(causal_lm.backbone)
    causal_lm.save_to_preset(tmp_path)
    for model in (causal_lm, phi3_ref.Phi3CausalLM.from_preset(tmp_path)):
        for sampler in ("greedy", "beam"):
            model.compile(sampler=sampler)
            texts.append(model.generate([prompt, prompt + "a"], 36, stop_token_ids=None))
    assert texts[:2] == texts[2:] and plain not in texts[0][0]


# What learns, and what stays ----------------------------------------------------------------------


def oracle(choose):
    """A random float64 model with adapters of any rank: what `loss_and_gradients` takes."""
    K = choose([1, 2])
    H = K * choose([1, 3])
    config = phi3_ref.Phi3Config(
        vocabulary_size=choose([2, 7]), num_layers=choose([1, 2]), hidden_dim=choose([4, 6]),
        intermediate_dim=5, num_query_heads=H, num_key_value_heads=K, head_dim=choose([2, 4]),
        tie_word_embeddings=choose([False, True]), sliding_window=choose([None, 3]),
        dropout=choose([0.0, 0.3]), fused=choose([True, False]), dtype="float64")
    rng = np.random.default_rng(choose(range(100)))
    weights = config.build_weights(lambda _, shape: ref.randomized(shape, rng, shape[-1]))
    weights = phi3_ref.with_adapters(
        weights, config, choose([1, 2, 5]), lambda shape, _: rng.normal(0, 0.5, shape))
    ids, y = rng.integers(0, config.vocabulary_size, (2, choose([1, 2]), choose([1, 6])))
    mask = np.array([ref.padding_row(choose(["ones", "left", "holes"]), ids.shape[1], rng)
                     for _ in ids])
    sample_weight = rng.uniform(0, 2, y.shape) * (rng.random(y.shape) < 0.6)
    return weights, config, ids, y, choose([None, sample_weight]), mask, (3, 1, 4)


def loss_of(weights, config, token_ids, y, sample_weight, mask, seed):
    """The loss, by the forward pass alone."""
    logits = phi3_ref.reverse_embedding(weights, config, phi3_ref.forward(
        weights, config, token_ids, mask, seed=seed))
    log_p = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    losses = -np.take_along_axis(log_p, y[..., None], axis=-1)[..., 0]
    return (losses * (1 if sample_weight is None else sample_weight)).sum() / y.size


@hypothesis.settings(max_examples=ref.examples(40))
@hypothesis.given(seed=st.integers(0, 2**32 - 1))
def test_the_oracle_agrees_with_central_differences(seed):
    """Of every adapter, in a random direction: 1e-7 of its gradient's largest value."""
    choose = random.Random(seed).choice
    case = weights, *_ = oracle(choose)
    loss, _, gradients = phi3_ref.loss_and_gradients(*case, recompute=choose([False, True]))
    assert loss == pytest.approx(loss_of(*case), 1e-12, 1e-12)
    gradients, rng = dict(phi3_ref.named_weights(gradients)), np.random.default_rng(0)
    learning = phi3_ref.adapters(weights)
    assert gradients.keys() == learning.keys()
    for name, weight in learning.items():
        direction, before, errors = rng.standard_normal(weight.shape), weight.copy(), []
        direction /= np.linalg.norm(direction)
        exact, allowed = (gradients[name] * direction).sum(), 1e-7 * np.abs(gradients[name]).max()
        for h in (1e-3, 1e-4, 1e-5):  # a smaller step where the loss is curved
            losses = []
            for move in (-2, -1, 1, 2):
                weight[...] = before + move * h * direction
                losses.append(loss_of(*case))
            slope = (8 * (losses[2] - losses[1]) - (losses[3] - losses[0])) / (12 * h)
            errors.append(abs(slope - exact))
        weight[...] = before
        assert min(errors) <= allowed + 1e-11, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed_bfloat16"])
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_of_every_policy_against_the_oracle(dtype, recompute):
    """Within the tolerance of all gradients, and in float32 (the oracle's in float64)."""
    found = []
    for policy in (dtype, "float64"):
        causal_lm = phi3_ref.Phi3CausalLM(random_lora(dtype=policy))
        causal_lm.backbone.set_weights(random_lora().get_weights())
        causal_lm.compile(recompute=recompute)
        found.append(causal_lm.gradients(*batch(np.random.default_rng(5), (2, 40))))
    (loss, ours), (exact_loss, exact) = found
    assert loss == pytest.approx(exact_loss, ref.TOLERANCE[dtype])
    exact = dict(phi3_ref.named_weights(exact))
    for name, gradient in phi3_ref.named_weights(ours):
        assert gradient.dtype == "float32" and exact[name].dtype == "float64"
        assert ref.relative_error(gradient, exact[name]) <= ref.GRADIENT_TOLERANCE[dtype], name


@pytest.mark.parametrize("tied", [False, True])
def test_they_are_the_gradients_of_a_full_models_products(tied):
    """By the chain rule from the merged weights' gradients: A' and B' of each head of W' = B A."""
    ours = random_lora(dtype="float64", tie_word_embeddings=tied)
    merged = phi3_ref.Phi3Backbone(**CONFIG, dtype="float64", tie_word_embeddings=tied,
                                   weights=phi3_ref.merged(ours.weights, ours.config))
    examples = batch(np.random.default_rng(5))
    (loss, gradients), (same, whole) = (phi3_ref.Phi3CausalLM(backbone).gradients(*examples)
                                        for backbone in (ours, merged))
    assert loss == pytest.approx(same, 1e-12)
    H, K, C, D = 6, 3, 4, 24
    for layer, found, full in zip(*(tree["transformer_layers"] for tree in (
            ours.weights, gradients, whole)), strict=True):
        per_head = full["qkv"].reshape(H + 2 * K, C, D)
        for part, change in (("query", per_head[:H]), ("value", per_head[-K:])):
            a, b = layer[f"{part}_lora_a"].reshape(len(change), 2, D), layer[f"{part}_lora_b"]
            d_a = np.einsum("hcd,cr->hrd", change, b).reshape(-1, D)
            d_b = np.einsum("hcd,hrd->cr", change, a)
            np.testing.assert_allclose(found[f"{part}_lora_a"], d_a, rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(found[f"{part}_lora_b"], d_b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_frozen_weights_stay_bit_for_bit(dtype):
    """Through `fit`, with decay and dropout; no moment is kept of them, and no gradient made."""
    causal_lm = phi3_ref.Phi3CausalLM(random_lora(dtype=dtype, dropout=0.1))
    before, arrays = bits(causal_lm.backbone), dict(
        phi3_ref.named_weights(causal_lm.backbone.weights))
    causal_lm.compile(phi3_ref.AdamW(1e-2, weight_decay=0.5), recompute=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # bfloat16's 8 bits are not those that learn
        causal_lm.fit([batch(np.random.default_rng(i)) for i in range(4)])
    after, learning = bits(causal_lm.backbone), phi3_ref.adapters(causal_lm.backbone.weights)
    assert {name for name in after if after[name] != before[name]} == learning.keys()
    assert causal_lm.optimizer.moments.keys() == learning.keys()
    for name, array in phi3_ref.named_weights(causal_lm.backbone.weights):
        assert array is arrays[name]


def test_learning_goes_on_from_files(tmp_path):
    """Adapters and optimizer saved after two steps: the next two give the same bits."""
    batches = [batch(np.random.default_rng(i)) for i in range(4)]
    whole, first, second = (
        phi3_ref.Phi3CausalLM(phi3_ref.Phi3Backbone(**CONFIG, seed=1, dropout=0.2))
        for _ in range(3))
    for causal_lm in (whole, first):
        causal_lm.backbone.enable_lora(2)
    for causal_lm in (whole, first, second):
        causal_lm.compile(phi3_ref.AdamW(1e-2))
    whole.fit(batches)
    first.fit(batches[:2])
    first.backbone.save_lora_weights(tmp_path / "a.lora.h5")
    first.save_optimizer(tmp_path / "optimizer.safetensors")
    second.backbone.load_lora_weights(tmp_path / "a.lora.h5")
    second.load_optimizer(tmp_path / "optimizer.safetensors")
    second.fit(batches[2:])
    assert bits(second.backbone) == bits(whole.backbone)


def test_an_optimizer_of_the_whole_model_is_refused():
    """It has moments of other weights; nothing changes."""
    causal_lm = phi3_ref.Phi3CausalLM(phi3_ref.Phi3Backbone(**CONFIG, seed=1))
    examples = batch(np.random.default_rng(0))
    causal_lm.train_on_batch(*examples)
    causal_lm.backbone.enable_lora(2)
    before = bits(causal_lm.backbone)
    with pytest.raises(ValueError, match="has learned another model"):
        causal_lm.train_on_batch(*examples)
    assert bits(causal_lm.backbone) == before
    causal_lm.compile(phi3_ref.AdamW(1e-2))
    causal_lm.train_on_batch(*examples)
    assert bits(causal_lm.backbone) != before


def test_a_frozen_weight_that_is_not_finite_is_named():
    """Though it does not learn."""
    causal_lm = phi3_ref.Phi3CausalLM(random_lora())
    causal_lm.backbone.weights["transformer_layers"][1]["feedforward_output"][0, 0] = np.nan
    with pytest.raises(FloatingPointError, match=r"_layer_1\.feedforward_output\.weight"):
        causal_lm.train_on_batch(*batch(np.random.default_rng(0)))


def test_traces_have_the_adapters_gradients():
    """Beside those of all intermediates, which are the merged model's."""
    ours = random_lora(dtype="float64")
    merged = phi3_ref.Phi3Backbone(**CONFIG, dtype="float64",
                                   weights=phi3_ref.merged(ours.weights, ours.config))
    x, y, weight = batch(np.random.default_rng(5))
    found, expected = (phi3_ref.Trace.record(phi3_ref.Phi3CausalLM(backbone), x, y=y,
                                             sample_weight=weight) for backbone in (ours, merged))
    order = sorted(found, key=phi3_ref.execution_order)
    layer = "transformer_layer_1."
    assert (order.index(f"{layer}attention.query.gradient")
            < order.index(f"{layer}query_lora_a.weight.gradient")
            < order.index(f"{layer}pre_attention_layernorm.gradient"))
    learned = {name for name in found if name.endswith(".weight.gradient")}
    assert learned == {f"{name}.weight.gradient" for name in phi3_ref.adapters(ours.weights)}
    for name in expected.keys() - {n for n in expected if n.endswith(".weight.gradient")}:
        assert ref.relative_error(found[name], expected[name]) <= 1e-9, name


# Memory -------------------------------------------------------------------------------------------


def test_logits_are_made_a_few_at_once_and_only_where_a_label_counts(monkeypatch):
    """The same loss and gradients as with a tap, which sees them all; and here, on two threads."""
    shapes, project = [], phi3_ref.reverse_embedding

    def reverse_embedding(weights, config, x):
        shapes.append(x.shape)
        return project(weights, config, x)

    monkeypatch.setattr(phi3_ref, "reverse_embedding", reverse_embedding)
    causal_lm = phi3_ref.Phi3CausalLM(random_lora(dtype="float64", num_layers=1))
    x, y, weight = batch(np.random.default_rng(0), (4, 520))
    loss, gradients = causal_lm.gradients(x, y, weight)
    assert sum(rows for rows, _ in shapes) == np.count_nonzero(weight) > 1024
    assert max(rows for rows, _ in shapes) <= 512 and len(shapes) == 4
    step = causal_lm.train_on_batch(x, y, weight)
    looked = phi3_ref.Phi3CausalLM(random_lora(dtype="float64", num_layers=1))
    same, whole = looked.gradients(x, y, weight, tap=lambda name, array: array)
    assert shapes[-1] == (4, 520, 24)
    assert loss == pytest.approx(same, 1e-12) and step[0] == loss
    assert step[1] == pytest.approx(looked.evaluate(x, y, weight)[1], 1e-12)
    whole = dict(phi3_ref.named_weights(whole))
    for name, gradient in phi3_ref.named_weights(gradients):
        np.testing.assert_allclose(gradient, whole[name], rtol=1e-9, atol=1e-15)
    loss, gradients = causal_lm.gradients(x, y, 0 * weight)
    assert loss == 0 and not any(g.any() for _, g in phi3_ref.named_weights(gradients))


def test_a_step_holds_no_float32_copy_of_a_bfloat16_weight():
    """What it takes at most, by Python's own count, is less than half of one would be."""
    sizes = dict(vocabulary_size=4_000, num_layers=1, hidden_dim=1024, intermediate_dim=2048,
                 num_query_heads=4, num_key_value_heads=4)
    causal_lm = phi3_ref.Phi3CausalLM(phi3_ref.Phi3Backbone(**sizes, dtype="bfloat16", seed=0))
    causal_lm.backbone.enable_lora(2)
    causal_lm.compile(phi3_ref.AdamW(1e-3), recompute=True)
    examples = batch(np.random.default_rng(0), (1, 16), 4_000)
    causal_lm.train_on_batch(*examples)
    tracemalloc.start()
    try:
        causal_lm.train_on_batch(*examples)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1024 * 1024 * 4 * 2  # half of gate and intermediate


# Calls --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, -1, 1.5, "2", True, None, 2**70])
def test_enable_lora_takes_only_a_positive_rank(rank):
    """The model stays as it is."""
    ours = phi3_ref.Phi3Backbone(**CONFIG)
    with pytest.raises(ValueError, match="`rank`"):
        ours.enable_lora(rank)
    assert not phi3_ref.adapters(ours.weights)


def test_enable_lora_twice_is_an_error_as_in_kerashub():
    """And so are files where there is no LoRA, or by another name."""
    ours = phi3_ref.Phi3Backbone(**CONFIG)
    with pytest.raises(ValueError, match=r"enable_lora\(rank\)"):
        ours.save_lora_weights("a.lora.h5")
    ours.enable_lora(2)
    before = bits(ours)
    with pytest.raises(ValueError, match="already enabled"):
        ours.enable_lora(2)
    with pytest.raises(ValueError, match=r'\.lora\.h5.*a\.h5'):
        ours.save_lora_weights("a.h5")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.lora\.h5"):
        ours.load_lora_weights("nowhere.lora.h5")
    assert bits(ours) == before


def test_a_model_that_was_not_trainable_learns_its_adapters():
    """`enable_lora` says what learns, as in KerasHub."""
    causal_lm = phi3_ref.Phi3CausalLM(phi3_ref.Phi3Backbone(**CONFIG, trainable=False))
    causal_lm.backbone.enable_lora(2)
    assert causal_lm.backbone.trainable
    before = bits(causal_lm.backbone)
    causal_lm.train_on_batch(*batch(np.random.default_rng(0)))
    assert bits(causal_lm.backbone) != before


# .lora.h5 files that nobody should write ----------------------------------------------------------


def put(path, value):
    """Replace a dataset's value; None removes it."""
    def change(file):
        del file[path]
        if value is not None:
            file[path] = value
    return change


def elsewhere(file):
    """A dataset whose values are in another file."""
    del file["lora/8/vars/lora_kernel_b"]
    file.create_dataset("lora/8/vars/lora_kernel_b", (3, 4), "float32",
                        external=[("/etc/passwd", 0, 48)])


B_OF_VALUE = "lora/8/vars/lora_kernel_b"
HOSTILE_LORA = {
    "another rank": (put("lora/vars/rank", 2), r"must be .*\(24, 3, 2\)\. Found: .*\(24, 3, 3\)"),
    "an absurd rank": (put("lora/vars/rank", 2**30), r"must be .*\. Found"),
    "rank zero": (put("lora/vars/rank", 0), "must be positive. Found: 0"),
    "a rank that is none": (put("lora/vars/rank", 3.0), "no integer lora/vars/rank"),
    "many ranks": (put("lora/vars/rank", [3, 3]), "no integer lora/vars/rank"),
    "no rank": (put("lora/vars/rank", None), "no integer lora/vars/rank"),
    "a layer less": (put(B_OF_VALUE, None), f"other layers.*{B_OF_VALUE}"),
    "a layer more": (lambda file: file.create_dataset("lora/9/vars/lora_kernel_b", data=[1.0]),
                     "other layers.*lora/9"),
    "a transposed array": (put(B_OF_VALUE, np.ones((4, 3), "f4")), rf"{B_OF_VALUE} must be"),
    "integers": (put(B_OF_VALUE, np.ones((3, 4), int)), rf"{B_OF_VALUE} must be floating-point"),
    "NaN": (put(B_OF_VALUE, np.full((3, 4), np.nan, "f4")), f"{B_OF_VALUE} has values.* NaN"),
    "too large for float32": (put(B_OF_VALUE, np.full((3, 4), 1e300)), "NaN or infinite"),
    "values elsewhere": (elsewhere, "is not stored as Keras does"),
    "a link": (lambda file: (put(B_OF_VALUE, None)(file), file.__setitem__(
        B_OF_VALUE, h5py.ExternalLink("other.h5", "/x"))), f"other layers.*{B_OF_VALUE}"),
}


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("case", HOSTILE_LORA)
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_a_forged_lora_file_is_refused_by_name(case, enabled, tmp_path):
    """The model stays as it was, with adapters or without."""
    change, message = HOSTILE_LORA[case]
    path = tmp_path / "a.lora.h5"
    random_lora(3).save_lora_weights(path)
    with h5py.File(path, "a") as file:
        change(file)
    ours = random_lora(3) if enabled else phi3_ref.Phi3Backbone(**CONFIG)
    before = bits(ours)
    if enabled and "rank" in message + case:
        message = f"{message}|enable_lora"
    with pytest.raises(ValueError, match=f"(?s)a.lora.h5.*({message})") as error:
        ours.load_lora_weights(path)
    assert len(str(error.value)) < 1200 and bits(ours) == before


@pytest.mark.parametrize("content", [b"", b"\x89HDF\r\n\x1a\n", b"x" * 999])
def test_a_lora_file_that_is_no_hdf5(content, tmp_path):
    """It cannot be read."""
    (tmp_path / "a.lora.h5").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.lora\.h5 cannot be read"):
        phi3_ref.Phi3Backbone(**CONFIG).load_lora_weights(tmp_path / "a.lora.h5")


def test_adapters_of_another_model_are_refused(tmp_path):
    """Of more layers, of another size, of another rank than was enabled."""
    random_lora(3).save_lora_weights(tmp_path / "a.lora.h5")
    for other in (dict(num_layers=2), dict(num_layers=4), dict(hidden_dim=48),
                  dict(num_query_heads=3)):
        with pytest.raises(ValueError, match=r"a\.lora\.h5"):
            phi3_ref.Phi3Backbone(**CONFIG | other).load_lora_weights(tmp_path / "a.lora.h5")
    with pytest.raises(ValueError, match=r"rank 3, but `enable_lora\(2\)`"):
        random_lora(2).load_lora_weights(tmp_path / "a.lora.h5")


# PEFT's adapters ----------------------------------------------------------------------------------

# Each case: the base model's configuration, and LoraConfig's arguments.
PEFT = {
    "Phi-3's four": ({}, dict(target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"])),
    "all-linear": ({}, dict(target_modules="all-linear")),
    "a pattern": ({}, dict(target_modules=r".*layers\.[02].*(qkv|down)_proj")),
    "rslora": ({}, dict(target_modules=["qkv_proj"], use_rslora=True)),
    "ranks and alphas by module": ({}, dict(
        target_modules=["qkv_proj", "o_proj", "gate_up_proj"], use_rslora=True,
        rank_pattern={"1.self_attn.qkv_proj": 5, "layers.1.self_attn.qkv_proj": 3, "o_proj": 1},
        alpha_pattern={"^model.layers.2.mlp.gate_up_proj": 5, r"mlp\.gate_up_proj": 24.5})),
    "some layers": ({}, dict(target_modules=["o_proj", "down_proj"], layers_to_transform=[0, 2],
                             exclude_modules=["layers.2.self_attn.o_proj"])),
    "one layer": ({}, dict(target_modules=["qkv_proj"], layers_to_transform=1,
                           layers_pattern="layers")),
    "names of other models, too": ({}, dict(target_modules=["q_proj", "v_proj", "o_proj"])),
    "the output projection": ({}, dict(target_modules=["lm_head", "o_proj"])),
    "tied": (dict(tie_word_embeddings=True), dict(target_modules=["qkv_proj"])),
    "Llama's split names": ("llama", dict(
        target_modules=["q_proj", "v_proj", "up_proj", "down_proj"], rank_pattern={"v_proj": 2})),
    "Llama's, all": ("llama", dict(target_modules="all-linear", init_lora_weights="gaussian")),
}


def base_model(kind):
    """A random model of transformers: a Phi-3 of that configuration, or a Llama."""
    import torch
    import transformers
    if kind != "llama":
        return ref.transformers_model(dict(num_key_value_heads=2) | kind)
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2)).eval()


def write_adapter(model, directory, dtype=None, **arguments):
    """Save a random adapter to a transformers model, by PEFT; return PEFT's model with it."""
    import peft
    import torch
    settings = peft.LoraConfig(**{"r": 4, "lora_alpha": 12, "task_type": "CAUSAL_LM", **arguments})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(model, settings)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(0, 0.1, generator=generator)
                    if dtype:
                        parameter.data = parameter.data.to(dtype)
        # (Else it saves the output projection, where that is adapted, as it was before, too.)
        model.save_pretrained(directory, save_embedding_layers=False)
    return model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", PEFT)
def test_a_merged_adapter_is_pefts(case, dtype, tmp_path):
    """Every weight, bit for bit in bfloat16 but where a product's last bit decides; and logits."""
    import torch
    kind, arguments = PEFT[case]
    model = base_model(kind).to(getattr(torch, dtype))
    ref.write_huggingface(model, tmp_path / "base")
    ours = phi3_ref.Phi3Backbone.from_preset(tmp_path / "base", dtype=dtype)
    before = bits(ours)
    merged = write_adapter(model, tmp_path / "adapter", **arguments).merge_and_unload()
    ours.load_adapter(tmp_path / "adapter")
    changed = {name for name, content in bits(ours).items() if content != before[name]}
    assert changed and not phi3_ref.adapters(ours.weights)
    theirs = {name: tensor.float().numpy() for name, tensor in merged.state_dict().items()}
    compared = 0
    for name, array in phi3_ref.huggingface_tensors(ours.weights, ours.config):
        pieces = {name: array}
        if name not in theirs:
            pieces = dict(phi3_ref.split_tensors(name, array, ours.config))
        for piece, view in pieces.items():
            error = np.abs(view.astype("float32") - theirs[piece])
            if dtype == "float32":
                np.testing.assert_allclose(view, theirs[piece], rtol=1e-6, atol=1e-6)
            else:
                assert (error <= 2.0**-8 * np.abs(theirs[piece])).all()
                assert (error > 0).mean() < 1e-3
            compared += 1
    assert compared == len(theirs) - ours.tie_word_embeddings
    if dtype == "float32":
        ids = np.arange(24).reshape(2, 12)
        logits = phi3_ref.Phi3CausalLM(ours)({"token_ids": ids})
        assert ref.relative_error(logits, ref.transformers_logits(
            merged, ids)) <= ref.TOLERANCE["float32"]


def test_adapters_in_16_bits_and_on_other_policies(tmp_path):
    """A bfloat16 adapter on float32 weights, and on the oracle's: the exact sum, rounded once."""
    import torch
    model = base_model({})
    ref.write_huggingface(model, tmp_path / "base")
    peft_model = write_adapter(model, tmp_path / "adapter", torch.bfloat16,
                               target_modules=["qkv_proj", "down_proj"])
    stored = safetensors.safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt")
    assert {stored.get_tensor(name).dtype for name in stored.keys()} == {torch.bfloat16}  # noqa: SIM118
    layer = peft_model.base_model.model.model.layers[1].self_attn.qkv_proj
    a, b = (part["default"].weight.detach().double().numpy() for part in (
        layer.lora_A, layer.lora_B))
    for dtype in ("float64", "float32", "bfloat16", "float16", "mixed_bfloat16"):
        ours = phi3_ref.Phi3Backbone.from_preset(tmp_path / "base", dtype=dtype)
        ours.load_adapter(tmp_path / "adapter")
        merged = ours.weights["transformer_layers"][1]["qkv"]
        base = layer.base_layer.weight.detach().numpy().astype(merged.dtype).astype("float64")
        exact = base + 3 * (b @ a)
        epsilon = {"float64": 1e-15, "bfloat16": 2.0**-8, "float16": 2.0**-11}.get(dtype, 1e-7)
        error = np.abs(merged.astype("float64") - exact)
        assert (error <= epsilon * (np.abs(base) + 6 * np.abs(b) @ np.abs(a))).all()


def test_mapped_weights_are_copied_only_where_they_change(tmp_path):
    """The rest stays mapped from the model's file, which itself stays as it was."""
    model = base_model({})
    ref.write_huggingface(model, tmp_path / "base")
    write_adapter(model, tmp_path / "adapter", target_modules=["o_proj"])
    file = tmp_path / "base" / "model.safetensors"
    content, ours = file.read_bytes(), phi3_ref.Phi3Backbone.from_preset(tmp_path / "base")
    before = dict(phi3_ref.named_weights(ours.weights))
    sharing = phi3_ref.Phi3Backbone(**{**ours.get_config(), "weights": ours.weights})
    ours.load_adapter(tmp_path / "adapter")
    for name, array in phi3_ref.named_weights(ours.weights):
        assert (array is before[name]) == (not name.endswith(".attention_output")), name
    assert dict(phi3_ref.named_weights(sharing.weights)).items() == before.items()
    assert file.read_bytes() == content


def test_an_adapter_beneath_lora(tmp_path):
    """It is merged into the frozen weights; the adapters that learn stay, on top of it."""
    model = base_model({})
    ref.write_huggingface(model, tmp_path / "base")
    write_adapter(model, tmp_path / "adapter", target_modules=["qkv_proj"])
    first, second = (phi3_ref.Phi3Backbone.from_preset(tmp_path / "base") for _ in range(2))
    for backbone in (first, second):
        backbone.enable_lora(2)
        randomize(backbone)
        if backbone is first:
            backbone.load_adapter(tmp_path / "adapter")
    plain = phi3_ref.Phi3Backbone.from_preset(tmp_path / "base")
    plain.load_adapter(tmp_path / "adapter")
    second.weights = phi3_ref.tree_of(
        dict(phi3_ref.named_weights(plain.weights)) | phi3_ref.adapters(second.weights))
    assert bits(first) == bits(second)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """The directory of a small model, and {file: content} of an adapter that PEFT saved for it."""
    directory = tmp_path_factory.mktemp("peft")
    model = base_model({})
    ref.write_huggingface(model, directory / "base")
    write_adapter(model, directory / "adapter",
                  target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"])
    files = {path.name: path.read_bytes() for path in (directory / "adapter").iterdir()
             if path.suffix in (".json", ".safetensors")}
    assert files.keys() == {"adapter_config.json", "adapter_model.safetensors"}
    return directory / "base", files


def refused(adapter, directory, message, settings=None, tensors=None, files=None):
    """Change an adapter as told: it must be refused with that message, and the model be as it was.

    `settings` are entries of adapter_config.json; `tensors` changes {name: array} in place.
    """
    base, contents = adapter
    contents = dict(contents)
    if settings:
        contents["adapter_config.json"] = json.dumps(
            json.loads(contents["adapter_config.json"]) | settings).encode()
    if tensors:
        arrays = safetensors.numpy.load(contents["adapter_model.safetensors"])
        tensors(arrays)
        contents["adapter_model.safetensors"] = safetensors.numpy.save(arrays)
    directory.mkdir(exist_ok=True)
    for name, content in (contents | (files or {})).items():
        if content is not None:
            (directory / name).write_bytes(content)
    ours = phi3_ref.Phi3Backbone.from_preset(base)
    before = bits(ours)
    with pytest.raises((ValueError, FileNotFoundError), match=f"(?s){message}") as error:
        ours.load_adapter(directory)
    assert str(directory) in str(error.value) and len(str(error.value)) < 1200
    assert bits(ours) == before
    return error.value


REFUSED_SETTINGS = [
    (dict(use_dora=True), "`use_dora`"), (dict(bias="all"), "`bias`"),
    (dict(bias="lora_only"), "`bias`"), (dict(lora_bias=True), "`lora_bias`"),
    (dict(modules_to_save=["lm_head"]), "`modules_to_save`"),
    (dict(fan_in_fan_out=True), "`fan_in_fan_out`"),
    (dict(peft_type="LOHA"), "`peft_type`.*LOHA"), (dict(peft_type=None), "`peft_type`"),
    (dict(init_lora_weights="pissa_niter_4"), "`init_lora_weights`.*pissa_niter_4"),
    (dict(init_lora_weights="olora"), "`init_lora_weights`"),
    (dict(init_lora_weights="loftq"), "`init_lora_weights`"),
    (dict(layer_replication=[[0, 2]]), "`layer_replication`"),
    (dict(trainable_token_indices=[1]), "`trainable_token_indices`"),
    (dict(something_new={"a": 1}), "`something_new`"),
    (dict(r=3), r"lora_A.weight must be .*\(3, 2?4?0?\d*\)\. Found"), (dict(r=0), "`r`"),
    (dict(r=True), "`r`"), (dict(r="4"), "`r`"), (dict(r=2**40), "`r`"),
    (dict(lora_alpha="12"), "`lora_alpha`"), (dict(lora_alpha=float("nan")), "`lora_alpha`"),
    (dict(lora_alpha=1e39), "`lora_alpha`"), (dict(use_rslora="no"), "`use_rslora`"),
    (dict(rank_pattern={"o_proj": 3}), r"o_proj\.lora_A.weight must be .*\(3, 24\)"),
    (dict(rank_pattern={"o_proj": 0}), "`rank_pattern`"),
    (dict(rank_pattern=[1]), "`rank_pattern`"),
    (dict(alpha_pattern={"(a+)+$": 3}), "`alpha_pattern`"),
    (dict(alpha_pattern={".*_proj": 3}), "`alpha_pattern`"),
    (dict(alpha_pattern={"o_proj": "3"}), "`alpha_pattern`"),
    (dict(target_modules=["qkv_proj"]), "other modules.*down_proj"),
    (dict(target_modules=[1]), "`target_modules`"), (dict(target_modules={}), "`target_modules`"),
    (dict(exclude_modules=["qkv_proj"]), "other modules.*qkv_proj"),
    (dict(layers_to_transform=[0]), r"other modules.*layers\.1"),
    (dict(layers_to_transform="0"), "`layers_to_transform`"),
    (dict(layers_pattern="h"), "`layers_pattern`"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED_SETTINGS,
                         ids=[json.dumps(settings) for settings, _ in REFUSED_SETTINGS])
def test_settings_that_cannot_be_merged_are_refused_by_name(settings, message, adapter, tmp_path):
    """What PEFT would compute otherwise, or what no writer writes."""
    refused(adapter, tmp_path / "adapter", f"adapter_.*{message}", settings)


# Those of PEFT's settings that may have any value, and why.
HARMLESS = {
    "auto_mapping": "which class to build", "base_model_name_or_path": "the caller has the model",
    "eva_config": "how A began", "inference_mode": "whether it learns", "loftq_config": "of LoftQ",
    "lora_dropout": "in training only", "megatron_core": "of Megatron's layers",
    "peft_version": "what wrote it", "qalora_group_size": "of use_qalora, which is refused",
    "revision": "of the base model", "task_type": "what for",
}


def test_every_setting_of_pefts_is_read_or_refused(adapter, tmp_path):
    """By PEFT's own list: what is neither read nor harmless is refused where it says something."""
    import dataclasses

    import peft
    names = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    read = phi3_ref.ADAPTER_SETTINGS - HARMLESS.keys()
    assert HARMLESS.keys() <= phi3_ref.ADAPTER_SETTINGS and "use_dora" in names
    tested = set().union(*(settings for settings, _ in REFUSED_SETTINGS))
    assert read <= tested
    for name in sorted(names - phi3_ref.ADAPTER_SETTINGS - {"runtime_config"}):
        refused(adapter, tmp_path / "adapter", f"`{name}`", {name: ["anything"]})


def rename(old, new):
    """Give the tensors with `old` in their names other ones."""
    def change(arrays):
        for name in [name for name in arrays if old in name]:
            arrays[name.replace(old, new)] = arrays.pop(name)
    return change


def spoil(end, value):
    """Put a value into the first tensor whose name has that end."""
    def change(arrays):
        name = min(name for name in arrays if name.endswith(end))
        arrays[name] = arrays[name].copy()
        arrays[name].flat[1] = value
    return change


def replace(end, make):
    """Replace the first tensor whose name has that end."""
    def change(arrays):
        name = min(name for name in arrays if name.endswith(end))
        arrays[name] = make(arrays[name])
    return change


def drop(part):
    def change(arrays):
        for name in [name for name in arrays if part in name]:
            del arrays[name]
    return change


FORGED_TENSORS = {
    "another rank": (replace("o_proj.lora_A.weight", lambda a: a[:3].copy()),
                     r"o_proj.lora_A.weight must be .*\(4, 24\)\. Found: float32, \(3, 24\)"),
    "transposed": (replace("o_proj.lora_B.weight", lambda b: b.T.copy()), "lora_B.* must be"),
    "integers": (replace("o_proj.lora_B.weight", lambda b: b.astype("int32")), "floating-point"),
    "NaN": (spoil("gate_up_proj.lora_B.weight", np.nan), "gate_up_proj.lora_B.* are NaN"),
    "infinity": (spoil("qkv_proj.lora_A.weight", -np.inf), "qkv_proj.lora_A.* NaN or infinite"),
    "a sum beyond float32": (lambda arrays: (
        replace("qkv_proj.lora_A.weight", lambda a: a * 0 + 2e20)(arrays),
        replace("qkv_proj.lora_B.weight", lambda b: b * 0 + 2e20)(arrays)),
        "qkv_proj.*with the adapter.*NaN or infinite"),
    "a layer that is not there": (rename("layers.2.", "layers.3."), r"other modules.*layers\.[23]"),
    "a module that is not there": (rename("o_proj", "x_proj"), r"other modules.*[xo]_proj"),
    "parts beside the whole": (lambda arrays: arrays.update({
        name.replace("qkv_proj", "q_proj"): array.copy() for name, array in list(arrays.items())
        if "qkv_proj" in name}), r"other modules.*q_proj"),
    "a missing layer": (drop("layers.1.mlp.down_proj"), r"other modules.*1\.mlp\.down_proj"),
    "a missing B": (drop("layers.1.mlp.down_proj.lora_B"), "no tensor .*down_proj.lora_B"),
    "no tensor": (drop(""), "other modules"),
    "DoRA's magnitudes": (rename("layers.0.self_attn.o_proj.lora_B.weight",
                                 "layers.0.self_attn.o_proj.lora_magnitude_vector"),
                          "lora_magnitude_vector' is not"),
    "a weight of the base model": (lambda arrays: arrays.update({
        "base_model.model.lm_head.base_layer.weight": np.ones((61, 24), "f4")}),
        "lm_head.base_layer.weight' is not"),
    "a saved module": (lambda arrays: arrays.update({
        "base_model.model.lm_head.weight": np.ones((61, 24), "f4")}), "lm_head.weight' is not"),
    "an embedding": (lambda arrays: arrays.update({
        "base_model.model.model.embed_tokens.lora_embedding_A": np.ones((4, 61), "f4")}),
        "lora_embedding_A' is not"),
    "an embedding as a product": (lambda arrays: arrays.update({
        "base_model.model.model.embed_tokens.lora_A.weight": np.ones((4, 24), "f4")}),
        "other modules.*embed_tokens"),
    "a bias": (lambda arrays: arrays.update({
        "base_model.model.model.layers.0.mlp.down_proj.bias": np.ones(24, "f4")}), "bias' is not"),
    "a norm": (lambda arrays: arrays.update({
        "base_model.model.model.norm.lora_A.weight": np.ones((4, 24), "f4")}),
        "other modules.*norm"),
    "one under two names": (lambda arrays: arrays.update({
        name.removeprefix("base_model.model."): array.copy()
        for name, array in list(arrays.items())[:1]}), "or is so once more"),
}


@pytest.mark.parametrize("case", FORGED_TENSORS)
def test_forged_tensors_are_refused_by_name(case, adapter, tmp_path):
    """The model stays as it was, to the last bit."""
    tensors, message = FORGED_TENSORS[case]
    refused(adapter, tmp_path / "adapter", f"adapter.*{message}", tensors=tensors)


@pytest.mark.parametrize(("files", "message"), [
    ({"adapter_config.json": None}, "adapter_config.json is not there"),
    ({"adapter_model.safetensors": None}, "adapter_model.safetensors is not there"),
    ({"adapter_model.safetensors": None, "adapter_model.bin": b"cos\nsystem\n(S'false'\ntR."},
     "Pickles"),
    ({"adapter_config.json": b"{"}, "adapter_config.json is not JSON"),
    ({"adapter_config.json": b"[]"}, "adapter_config.json must hold an object"),
    ({"adapter_config.json": b'{"r": 4, "r": 8}'}, "comes twice"),
    ({"adapter_config.json": b"[" * 99_999}, "adapter_config.json is not JSON"),
    ({"adapter_config.json": b" " * (2**25 + 1)}, "at most"),
    ({"adapter_model.safetensors": b""}, "adapter_model.safetensors cannot be read"),
    ({"adapter_model.safetensors": b"\xff" * 8 + b"{}"}, "its header has"),
], ids=str)
def test_forged_files_are_refused_by_name(files, message, adapter, tmp_path):
    """Missing, pickled, cut off, nested, too large."""
    error = refused(adapter, tmp_path / "adapter", message, files=files)
    assert isinstance(error, FileNotFoundError if "not there" in str(error) else ValueError)


def test_split_names_must_be_in_every_layer(tmp_path):
    """A file that has but the first layer's is of another model, or cut; fused names as well."""
    base = base_model("llama")
    ref.write_huggingface(base, tmp_path / "base")
    write_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    files = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()
             if path.suffix in (".json", ".safetensors")}
    for layers in (("1", "2"), ("0",), ("2",)):
        refused((tmp_path / "base", files), tmp_path / "cut",
                rf"other modules.*layers\.{layers[0]}\.self_attn\.q_proj",
                tensors=lambda arrays, layers=layers: [
                    drop(f"layers.{layer}.")(arrays) for layer in layers])


def test_a_whole_name_is_adapted_whatever_the_layers(tmp_path):
    """As PEFT has it: `layers_to_transform` holds for names that are parts of others'."""
    model = base_model({})
    ref.write_huggingface(model, tmp_path / "base")
    ours = phi3_ref.Phi3Backbone.from_preset(tmp_path / "base")
    merged = write_adapter(model, tmp_path / "adapter", layers_to_transform=[0],
                           target_modules=["qkv_proj", "lm_head"]).merge_and_unload()
    ours.load_adapter(tmp_path / "adapter")
    np.testing.assert_allclose(ours.weights["reverse_embedding"],
                               merged.lm_head.weight.detach().numpy(), rtol=1e-6, atol=1e-6)


def test_adapters_take_no_sequence_as_the_model_does():
    """[0, S] and [B, 0] token ids give results of those shapes, with adapters as without."""
    for shape in ((0, 4), (2, 0)):
        assert random_lora()({"token_ids": np.zeros(shape, int)}).shape == (*shape, 24)


def test_what_overflows_when_merged_is_not_written(tmp_path):
    """float16's largest number is 65,504: the error names the weight, and no file is left."""
    backbone = phi3_ref.Phi3Backbone(**CONFIG, dtype="float16", seed=0)
    backbone.enable_lora(2)
    for array in phi3_ref.adapters(backbone.weights).values():
        array[...] = 300
    for save in (backbone.save_to_preset, backbone.export_to_transformers):
        with pytest.raises(ValueError, match=r"transformer_layer_0\.qkv, .* NaN or infinite"):
            save(tmp_path / "preset")
        assert not list(tmp_path.rglob("*.*"))


def test_a_truncated_adapter_at_every_length(adapter, tmp_path):
    """Wherever its safetensors file is cut off: refused, and nothing is merged."""
    content = adapter[1]["adapter_model.safetensors"]
    for length in [*range(0, 64, 7), *range(64, len(content), len(content) // 9), len(content) - 1]:
        refused(adapter, tmp_path / "adapter", "adapter_model.safetensors cannot be read",
                files={"adapter_model.safetensors": content[:length]})


def test_patterns_that_take_forever_take_no_time(adapter, tmp_path):
    """PEFT matches regular expressions from the file; ours are names, or are not looked at."""
    base, files = adapter
    settings = json.loads(files["adapter_config.json"]) | {
        "target_modules": r"(.*.*.*.*)*x", "exclude_modules": r"((\w|\.)+)+!"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    phi3_ref.Phi3Backbone.from_preset(base).load_adapter(tmp_path)
    many = {f"o{i}": 4 for i in range(10**5)} | {"o_proj": 4}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"rank_pattern": many}))
    phi3_ref.Phi3Backbone.from_preset(base).load_adapter(tmp_path)


def test_an_adapter_is_no_preset(adapter, tmp_path):
    """The error says what to do with it."""
    for name, content in adapter[1].items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape("backbone.load_adapter(directory)")):
        phi3_ref.Phi3CausalLM.from_preset(tmp_path)


def test_the_command_line_takes_an_adapter(tmp_path, capsys):
    """Its answer is that of the merged model; what is wrong with the directory is one line."""
    causal_lm = phi3_ref.Phi3CausalLM.from_preset(PUZZLES)
    causal_lm.export_to_transformers(tmp_path / "base")
    model = ref.read_huggingface(tmp_path / "base")
    write_adapter(model, tmp_path / "adapter", target_modules="all-linear")
    causal_lm.backbone.load_adapter(tmp_path / "adapter")
    causal_lm.compile(sampler="greedy")
    prompt = causal_lm.preprocessor.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Reverse planet"}])
    expected = "".join(causal_lm.stream(prompt, max_length=36))
    answers = []
    for arguments in ([], ["--adapter", str(tmp_path / "adapter")]):
        phi3_ref.main(["Reverse planet", *arguments])
        answers.append(capsys.readouterr().out)
    assert answers[0] == "tenalp\n" and answers[1] == f"{expected}\n" != answers[0]
    with pytest.raises(SystemExit) as error:
        phi3_ref.main(["Reverse planet", "--adapter", str(tmp_path)])
    assert error.value.code == 2
    assert "adapter_config.json is not there" in capsys.readouterr().err
