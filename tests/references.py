"""What the model is compared with: KerasHub, transformers, and the formulas once more in float64.

The formulas at the top are written a second time on purpose, and differently: one row at a time,
rotations as complex numbers, everything in float64. Below them stand builders of small random
models in KerasHub and transformers, and of configurations and inputs to try them on.
"""

import importlib.metadata
import json
import math
import os
import pathlib
import random
import tempfile

import ml_dtypes
import numpy as np

TOLERANCE = {"float32": 2e-6, "float16": 3e-3, "bfloat16": 2e-2}
TOLERANCE["mixed_float16"] = TOLERANCE["float16"]
TOLERANCE["mixed_bfloat16"] = TOLERANCE["bfloat16"]
NUMPY_DTYPE = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
EPSILON = {name: float(ml_dtypes.finfo(dtype).eps) for name, dtype in NUMPY_DTYPE.items()}
GRADIENT_TOLERANCE = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 4e-2}
GRADIENT_TOLERANCE["mixed_float16"] = GRADIENT_TOLERANCE["float16"]
GRADIENT_TOLERANCE["mixed_bfloat16"] = GRADIENT_TOLERANCE["bfloat16"]


def examples(number):
    """Returns how many examples Hypothesis draws: `number`, or EXAMPLES times as many."""
    return number * int(os.environ.get("EXAMPLES", 1))


def seen_with(package, version):
    """Returns what an assertion of a reference's own deviation says where it fails."""
    return (f"So it was with {package} {version}; {importlib.metadata.version(package)} is "
            "installed. If it does otherwise now, so must this test, and the README's table of "
            "where the references disagree.")


def relative_error(ours, reference, mask=None):
    """Returns max|ours - reference| / max|reference| over the rows that `mask` [B, S] shows."""
    ours, reference = np.asarray(ours, "float64"), np.asarray(reference, "float64")
    assert ours.shape == reference.shape, f"{ours.shape} is not {reference.shape}"
    assert np.isfinite(ours).all() and np.isfinite(reference).all()
    if mask is not None:
        rows = np.asarray(mask, bool)
        ours, reference = ours[rows], reference[rows]
    if not np.any(ours) and not np.any(reference):
        return 0.0
    return np.abs(ours - reference).max() / np.abs(reference).max()


def random_labels(choose, vocabulary_size, padding_mask):
    """Returns (y, sample_weight), labels and their weights, for inputs of this padding mask.

    The weights are None, any numbers, the mask, or all zero; `choose` is `random_case`'s.
    """
    rng, kind = np.random.default_rng(choose(list(range(100)))), choose(["none", "any", "mask"])
    shape = np.shape(padding_mask)
    kind = choose([kind] * 9 + ["zeros"])
    weights = {"none": None, "any": rng.uniform(0, 2, shape), "mask": np.array(padding_mask, float),
               "zeros": np.zeros(shape)}[kind]
    return (rng.integers(0, vocabulary_size, shape),
            None if weights is None else weights.astype("float32"))


def gradient_noise(trace, config):
    """Returns {name: by how much rounding alone may change the largest of these gradients}.

    Of those inside attention, which may be small differences: p' = g v is a sum whose terms cancel,
    and s'_j = p_j (p'_j - sum p'_i p_i) is zero where all p' are equal; what is left then is the
    rounding of the p' and the p. So it is measured by what is added up, not by what remains.

    Args:
        trace: a Trace with gradients.
        config: its Phi3Config.
    """
    unit = float(ml_dtypes.finfo(config.compute_dtype).eps)
    wide = float(np.finfo("float32").eps) if unit > 1e-10 else unit
    heads, groups = config.num_query_heads, config.num_query_heads // config.num_key_value_heads
    scale, noise = config.head_dim ** -0.5, {}
    length = len(trace["token_embedding"][0])
    turn = np.abs(config.rotary(np.arange(length), config.uses_long_factors(length))).sum(0).max()
    for i in range(config.num_layers):
        path = f"transformer_layer_{i}.attention"
        array = {name: np.abs(np.asarray(trace[f"{path}.{name}"], "float64"))
                 for name in ("probabilities", "probabilities.gradient", "query_rotary",
                              "key_rotary", "value", "context.gradient")}
        key, value = (np.repeat(array[x], groups, axis=2) for x in ("key_rotary", "value"))
        p, dp = array["probabilities"], array["probabilities.gradient"]             # [B, H, S, T]
        size = np.einsum("bshc,bthc->bhst", array["context.gradient"], value)
        noise[f"{path}.probabilities.gradient"] = 4 * unit * size.max(initial=0)
        others = np.abs(1 - p) * size + (p * size).sum(-1, keepdims=True) - p * size
        mean = (p * dp).sum(-1, keepdims=True)
        terms = 4 * p * (unit * others + wide * (dp + mean))          # `others` is 0 where p is 1
        query = np.einsum("bhst,bthc->bshc", terms, key) * scale
        key = np.einsum("bhst,bshc->bthc", terms, array["query_rotary"]) * scale
        key = key.reshape(*key.shape[:2], heads // groups, groups, -1).sum(3)
        for name, value, factor in (("scores", terms, 1), ("query_rotary", query, 1),
                                    ("key_rotary", key, 1), ("query", query, turn),
                                    ("key", key, turn)):
            noise[f"{path}.{name}.gradient"] = factor * value.max(initial=0)
    return noise


def gradients_beyond(theirs, ours, exact, config, factor=1):
    """Returns the rows of `compare(theirs, ours)` that are beyond the tolerance of gradients.

    Three Traces with gradients: another implementation's, ours, and ours in float64. Within are,
    besides what `compare` says: what `gradient_noise` may have changed; and, where the reference
    itself is more than half the tolerance from float64, what is at most twice as far from it.
    `factor` times the tolerance is allowed.
    """
    import phi3_ref
    noise, beyond = gradient_noise(exact, config), []
    for name, size in gradient_noise(theirs, config).items():
        noise[name] = max(noise[name], size)

    def error(a, b):
        return np.abs(np.asarray(a, "float64") - np.asarray(b, "float64")).max(initial=0)

    for row in phi3_ref.compare(theirs, ours).rows:
        name, within = row.name, row.relative_error <= factor * row.tolerance
        if ".gradient" in name and not within:
            assert row.tolerance == GRADIENT_TOLERANCE[row.dtype]
            its = error(theirs[name], exact[name])
            far = its > factor * row.tolerance / 2 * np.abs(exact[name]).max()
            within = row.max_error <= noise.get(name, 0) or (
                far and error(ours[name], exact[name]) <= 2 * its)
        if ".gradient" in name and not within:
            beyond.append(row)
    return beyond


def no_larger(ours, theirs):
    """Says whether errors `ours` are in the mean no larger than `theirs`, but by chance.

    Both come from the same models; two standard errors of the differences are chance.
    """
    excess = np.asarray(ours) - np.asarray(theirs)
    return excess.mean() <= 2 * excess.std() / len(excess) ** 0.5


# The formulas, in float64 ------------------------------------------------------------------------

def exact_rms_norm(x, scale, epsilon):
    x = np.asarray(x, "float64")
    norm = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + epsilon)
    return x / norm * np.asarray(scale, "float64")


def exact_silu(x):
    x = np.asarray(x, "float64")
    return x * np.exp(-np.logaddexp(0.0, -x))


def exact_rotary(x, positions, wavelength, factors=None, magnitude=1.0):
    """Rotates x [B, S, heads, C]: channel pair (i, i + C/2) is one complex number."""
    x = np.asarray(x, "float64")
    half = x.shape[-1] // 2
    frequency = float(wavelength) ** (-np.arange(half) / half)
    if factors is not None:
        frequency = frequency / np.asarray(factors, "float64")
    turn = magnitude * np.exp(1j * np.outer(positions, frequency))          # [S, C/2]
    z = (x[..., :half] + 1j * x[..., half:]) * turn[:, None, :]
    return np.concatenate([z.real, z.imag], axis=-1)


def exact_su_magnitude(max_length, pretraining_length):
    ratio = max_length / pretraining_length
    return 1.0 if ratio <= 1 else math.sqrt(1 + math.log(ratio, pretraining_length))


def exact_attention(query, key, value, padding_mask=None, sliding_window=None):
    """Attention of query [B, S, H, C] to key and value [B, T, K, C], one row at a time."""
    query, key, value = (np.asarray(array, "float64") for array in (query, key, value))
    (batch, queries, heads, dim), (keys, kv_heads) = query.shape, key.shape[1:3]
    out = np.zeros(query.shape)
    for b in range(batch):
        for s in range(queries):
            position = keys - queries + s
            first = 0 if sliding_window is None else max(0, position - sliding_window + 1)
            seen = [t for t in range(first, position + 1)
                    if padding_mask is None or padding_mask[b][t]]
            if not seen:
                continue
            for h in range(heads):
                g = h * kv_heads // heads
                scores = key[b, seen, g] @ query[b, s, h] / math.sqrt(dim)
                weights = np.exp(scores - scores.max())
                out[b, s, h] = weights @ value[b, seen, g] / weights.sum()
    return out


def exact_backbone(config, weights, token_ids, padding_mask=None):
    """Hidden states [B, S, D] of KerasHub's `config` and `get_weights()` list, in float64."""
    weights = iter([np.asarray(weight, "float64") for weight in weights])
    epsilon, length = config["layer_norm_epsilon"], np.shape(token_ids)[1]
    rope = dict(positions=np.arange(length), wavelength=config["rope_max_wavelength"])
    if config.get("rope_scaling_type") == "su":
        short = length <= config["pretraining_sequence_length"]
        rope["factors"] = config[f"rope_scaling_{'short' if short else 'long'}_factor"]
        rope["magnitude"] = exact_su_magnitude(config["max_sequence_length"],
                                               config["pretraining_sequence_length"])
    x = next(weights)[np.asarray(token_ids)]
    next(weights)                                                            # the reverse embedding
    for _ in range(config["num_layers"]):
        normed = exact_rms_norm(x, next(weights), epsilon)
        query, key, value = (np.einsum("bsd,dhc->bshc", normed, next(weights)) for _ in range(3))
        context = exact_attention(exact_rotary(query, **rope), exact_rotary(key, **rope), value,
                                  padding_mask)
        x = x + np.einsum("bshc,hcd->bsd", context, next(weights))
        normed = exact_rms_norm(x, next(weights), epsilon)
        intermediate, gate = normed @ next(weights), normed @ next(weights)
        x = x + (exact_silu(gate) * intermediate) @ next(weights)
    return exact_rms_norm(x, next(weights), epsilon)


# Configurations and inputs -----------------------------------------------------------------------

def random_case(choose, num_layers=None, max_length=12, full_mask=False):
    """Returns (config, inputs) for a small model; `choose(list)` makes every choice.

    The choices come from Hypothesis, `lambda options: draw(st.sampled_from(options))`, or from
    `random.Random(seed).choice`.
    """
    kv_heads = choose([1, 2, 3, 5])
    heads = kv_heads * choose([1, 2, 3, 5])
    head_dim = choose([dim for dim in (2, 4, 6, 10, 16, 32) if 8 <= heads * dim <= 100])
    config = dict(
        vocabulary_size=choose([7, 32, 101]),
        num_layers=num_layers or choose([1, 2, 3]),
        hidden_dim=heads * head_dim,
        intermediate_dim=choose([5, 16, 33]),
        num_query_heads=heads,
        num_key_value_heads=kv_heads,
        layer_norm_epsilon=choose([1e-6, 1e-5, 1e-3]),
        rope_max_wavelength=choose([10000, 500, 250000]),
    )
    length, batch = choose(list(range(1, max_length + 1))), choose([1, 2, 3])
    if choose([False, True]):
        pretraining = choose([2, max(length, 2), length + 3, 4 * max_length])
        factors = np.random.default_rng(choose(list(range(100))))
        config.update(
            pretraining_sequence_length=pretraining,
            max_sequence_length=pretraining * choose([1, 2, 32]),
            rope_scaling_type="su",
            rope_scaling_short_factor=factors.uniform(0.8, 2.0, head_dim // 2).tolist(),
            rope_scaling_long_factor=factors.uniform(1.0, 32.0, head_dim // 2).tolist(),
        )
    rng = np.random.default_rng(choose(list(range(100))))
    token_ids = rng.integers(0, config["vocabulary_size"], (batch, length)).astype("int32")
    kinds = ["ones"] if full_mask else ["ones", "right", "left", "holes", "zeros"]
    rows = [padding_row(choose(kinds), length, rng) for _ in range(batch)]
    return config, {"token_ids": token_ids, "padding_mask": np.array(rows, "int32")}


def padding_row(kind, length, rng):
    """Returns one row [S] of 0 and 1: padded on the right or left, with holes, or all of one."""
    position, cut = np.arange(length), rng.integers(0, length + 1)
    return {"ones": position >= 0, "zeros": position < 0, "right": position < cut,
            "left": position >= cut, "holes": rng.random(length) < 0.6}[kind]


def randomized(shape, rng, fan_in):
    """Returns a norm's scale (1-D), far from one, or a kernel of `fan_in` inputs.

    A layer then adds a little less than the residual it adds to, as in trained models: rounding
    errors stay visible, and do not double from layer to layer.
    """
    if len(shape) == 1:
        return rng.uniform(0.5, 1.5, shape)
    return rng.normal(0.0, (2 * fan_in) ** -0.5, shape)


# KerasHub ----------------------------------------------------------------------------------------

def keras_backbone(config, dtype="float32", seed=0):
    """Returns KerasHub's Phi3Backbone with every weight random, norm scales included."""
    import keras_hub
    model = keras_hub.models.Phi3Backbone(**config, dtype=dtype)
    rng = np.random.default_rng(seed)
    weights = []
    for variable in model.weights:
        shape = tuple(variable.shape)
        fan_in = math.prod(shape[:2] if "attention_output" in variable.path else shape[:1])
        if variable.path.endswith("/embeddings"):  # a table, not a product
            fan_in = 0.5
        weights.append(randomized(shape, rng, fan_in))
    model.set_weights(weights)
    return model


def keras_output(model, inputs, **kwargs):
    """Returns the hidden states of KerasHub's `model` as a float64 NumPy array."""
    import keras
    return keras.ops.convert_to_numpy(model(inputs, **kwargs)).astype("float64")


def ours_like(keras_model, dtype=None, **kwargs):
    """Returns phi3_ref's backbone with KerasHub's configuration and weights, `dtype` or its own."""
    import phi3_ref
    config = keras_model.get_config()
    config["dtype"] = dtype or keras_model.dtype_policy.name
    backbone = phi3_ref.Phi3Backbone(**{**config, **kwargs})
    backbone.set_weights(keras_model.get_weights())
    return backbone


def tap_shapes(config, batch_size, length):
    """Returns {name: shape} of all that a tap sees in one pass over [B, S] tokens, in its order."""
    import phi3_ref
    sizes = {"B": batch_size, "S": length, "T": length, "D": config.hidden_dim,
             "F": config.intermediate_dim, "H": config.num_query_heads, "C": config.head_dim,
             "K": config.num_key_value_heads, "V": config.vocabulary_size}
    letters = {"token_embedding": "BSD"}
    for i in range(config.num_layers):
        for name, axes in phi3_ref.LAYER_TAPS.items():
            letters[f"transformer_layer_{i}.{name}".removesuffix(".")] = axes
    letters |= {"sequence_output_layernorm": "BSD", "logits": "BSV"}
    return {name: tuple(sizes[letter] for letter in letters[name]) for name in letters}


def keras_errors(dtype, seeds):
    """Returns (ours against KerasHub, ours against float64, KerasHub against float64) per seed.

    The models have three layers; the rows of a whole batch count, padded or not.
    """
    rows = []
    for seed in seeds:
        config, inputs = random_case(random.Random(seed).choice, num_layers=3)
        model = keras_backbone(config, dtype, seed)
        reference = keras_output(model, inputs)
        ours, exact = ours_like(model)(inputs), ours_like(model, "float64")(inputs)
        rows.append([relative_error(ours, reference), relative_error(ours, exact),
                     relative_error(reference, exact)])
    return rows


def weight_gradients(trace):
    """Returns {name: gradient} of the weights, of a trace with gradients."""
    return {name.removesuffix(".weight.gradient"): array for name, array in trace.items()
            if name.endswith(".weight.gradient")}


def gradient_errors(ours, exact, reference):
    """Returns a row as `keras_errors` does, of the worst of all weights' gradients.

    `ours` and `exact` are trees of gradients, `reference` is a dict.
    """
    import phi3_ref
    ours, exact = dict(phi3_ref.named_weights(ours)), dict(phi3_ref.named_weights(exact))
    assert set(ours) == set(exact) == set(reference)
    return [max(relative_error(a[name], b[name]) for name in ours)
            for a, b in ((ours, reference), (ours, exact), (reference, exact))]


def keras_gradient_errors(dtype, seeds):
    """Returns what `keras_errors` does, of the gradients of all weights."""
    from reference_traces import keras_trace

    import phi3_ref
    rows = []
    for seed in seeds:
        choose = random.Random(seed).choice
        config, inputs = random_case(choose, num_layers=3)
        y, sample_weight = random_labels(choose, config["vocabulary_size"], inputs["padding_mask"])
        model = keras_backbone(config, dtype, seed)
        reference = weight_gradients(keras_trace(model, inputs, y, sample_weight))
        ours, exact = (
            phi3_ref.Phi3CausalLM(ours_like(model, d)).gradients(inputs, y, sample_weight)[1]
            for d in (dtype, "float64"))
        rows.append(gradient_errors(ours, exact, reference))
    return rows


# transformers ------------------------------------------------------------------------------------

TINY_HUGGINGFACE = dict(
    vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128,
    original_max_position_embeddings=128, rms_norm_eps=1e-5, pad_token_id=0, bos_token_id=1,
    eos_token_id=2)


def transformers_model(config, dtype="float32", seed=0):
    """Returns a random Phi3ForCausalLM; `config` overrides what TINY_HUGGINGFACE says."""
    import torch
    import transformers
    settings = transformers.Phi3Config(**{**TINY_HUGGINGFACE, **config})
    settings._attn_implementation = "eager"
    model = transformers.Phi3ForCausalLM(settings).eval()
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():         # a tied lm_head is listed once
            shape = tuple(parameter.shape)
            fan_in = 0.5 if "embed_tokens" in name else shape[-1]
            parameter.copy_(torch.from_numpy(randomized(shape, rng, fan_in)))
    return model.to(getattr(torch, dtype))


def write_huggingface(model, directory, changes=None, **kwargs):
    """Saves `model` as transformers does, then makes `changes` to its config.json (None deletes).

    Further arguments, such as max_shard_size, are save_pretrained's. Returns the directory.
    """
    model.save_pretrained(directory, **kwargs)
    file = pathlib.Path(directory, "config.json")
    config = {**json.loads(file.read_text()), **(changes or {})}
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}, indent=2))
    return str(directory)


def read_huggingface(directory, dtype="float32"):
    """Returns what transformers reads from `directory`, with its explicit attention."""
    import torch
    import transformers
    return transformers.Phi3ForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, dtype), attn_implementation="eager").eval()


def transformers_logits(model, token_ids, padding_mask=None):
    """Returns the logits [B, S, V] of transformers' `model` as a float64 NumPy array."""
    import torch
    mask = None if padding_mask is None else torch.from_numpy(np.asarray(padding_mask, "int64"))
    with torch.no_grad():
        result = model(input_ids=torch.from_numpy(np.asarray(token_ids, "int64")),
                       attention_mask=mask)
    return result.logits.double().numpy()


def random_huggingface(choose):
    """Returns (config, token_ids) for `transformers_model`; see `random_case`."""
    config, inputs = random_case(choose, num_layers=3, full_mask=True)
    theta, heads = float(config["rope_max_wavelength"]), config["num_query_heads"]
    result = dict(
        vocab_size=config["vocabulary_size"], hidden_size=config["hidden_dim"],
        intermediate_size=config["intermediate_dim"], num_attention_heads=heads,
        num_key_value_heads=config["num_key_value_heads"],
        rms_norm_eps=config["layer_norm_epsilon"], sliding_window=choose([None, None, 1, 4]),
        tie_word_embeddings=choose([False, True]),
        rope_parameters={"rope_type": "default", "rope_theta": theta})
    if config.get("rope_scaling_type"):
        result.update(
            max_position_embeddings=config["max_sequence_length"],
            original_max_position_embeddings=config["pretraining_sequence_length"],
            rope_parameters={"rope_type": "longrope", "rope_theta": theta,
                             "short_factor": config["rope_scaling_short_factor"],
                             "long_factor": config["rope_scaling_long_factor"]})
    elif choose([False, True]):
        result["head_dim"] = choose([4, 8, 12])
        result["rope_parameters"]["partial_rotary_factor"] = choose([0.5, 1.0])
    return result, inputs["token_ids"]


def transformers_errors(dtype, seeds):
    """Returns what `keras_errors` does, of the logits, against transformers."""
    import phi3_ref
    rows = []
    for seed in seeds:
        config, token_ids = random_huggingface(random.Random(seed).choice)
        model = transformers_model(config, dtype, seed)
        reference = transformers_logits(model, token_ids)
        with tempfile.TemporaryDirectory() as directory:
            write_huggingface(model, directory)
            ours, exact = (
                phi3_ref.Phi3CausalLM.from_preset(directory, dtype=d)({"token_ids": token_ids})
                for d in (dtype, "float64"))
        rows.append([relative_error(ours, reference), relative_error(ours, exact),
                     relative_error(reference, exact)])
    return rows


def transformers_gradient_errors(dtype, seeds):
    """Returns what `keras_errors` does, of the gradients of all weights, against transformers."""
    from reference_traces import transformers_trace

    import phi3_ref
    rows = []
    for seed in seeds:
        choose = random.Random(seed).choice
        config, token_ids = random_huggingface(choose)
        y, sample_weight = random_labels(choose, config["vocab_size"], np.ones(token_ids.shape))
        model = transformers_model(config, dtype, seed)
        model.model.embed_tokens.padding_idx = None  # whose row torch gives no gradient
        reference = weight_gradients(
            transformers_trace(model, token_ids, None, y, sample_weight))
        with tempfile.TemporaryDirectory() as directory:
            write_huggingface(model, directory)
            ours, exact = (
                phi3_ref.Phi3CausalLM.from_preset(directory, dtype=d).gradients(
                    {"token_ids": token_ids}, y, sample_weight)[1] for d in (dtype, "float64"))
        rows.append(gradient_errors(ours, exact, reference))
    return rows
