"""Times the model on the CPU: `python tests/bench_cpu.py`, `--quick` for less, `--full` for more.

`--only training`, say, measures one group of lines.

Prints a markdown table: what was measured, our time, the same work done by others, the limit and
the target; and at the end the lines that matter most, in short. Limits are measured in the same
run: the bare matrix products of the same shapes through NumPy's `@`, or a plain read of the files.
Every peer's logits, gradients or losses are compared with ours, with equal weights in a small
model, before it is timed (not with `--quick`).

How it is timed. Every program is a process of its own, this script with `--worker`. They take
turns, one repetition at a time, so that a drift of the machine hits all alike, and sleep in
between. A repetition has fresh random tokens; the first, which compiles, does not count. Cells are
medians (least..most). Threads are each library's default.

What the products are. A layer's four: query-key-value, attention's output, gate and intermediate,
feed-forward output; and the logits of each prompt's last position, as generation needs them.
Prefill adds attention's two, per head in blocks of 128 queries with the keys up to the block's last
one. Decode is one `W @ x` per weight, without attention. Weights are tried as [out, in] and as
[in, out]: the faster is the limit. A training step has three of each: the forward's, that of the
input's gradient and that of the weight's, which are its result and so kept to the end; attention's
two become six; and logits are of all positions.
"""

import argparse
import contextlib
import datetime
import functools
import importlib.metadata
import json
import math
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PHI3_MINI = dict(vocabulary_size=32064, num_layers=32, hidden_dim=3072, intermediate_dim=8192,
                 num_query_heads=32, num_key_value_heads=32, layer_norm_epsilon=1e-5,
                 max_sequence_length=1 << 17, pretraining_sequence_length=1 << 17)
SMALL = dict(vocabulary_size=101, num_layers=3, hidden_dim=96, intermediate_dim=160,
             num_query_heads=6, num_key_value_heads=3)  # to check the peers with
TINY = dict(vocabulary_size=312, num_layers=4, hidden_dim=128, intermediate_dim=384,
            num_query_heads=4, num_key_value_heads=2)  # the embedded preset
WHOLE = dict(layers=4, prompt=512, rounds=5, repeats=3, long=(4096, 8192, 16384),
             stored_layers=4, learning_layers=2, learned=(1024, 2048, 4096))
QUICK = dict(layers=1, prompt=256, rounds=3, repeats=1, long=(512, 2048), stored_layers=1,
             learning_layers=1, learned=(512, 1024))
NEW = 4  # tokens decoded in each repetition
BATCH = 8  # prompts in a batch, which have the tokens of the single prompt
PEERS = {"KerasHub JAX": ("keras", dict(backend="jax")),
         "KerasHub TensorFlow": ("keras", dict(backend="tensorflow")),
         "KerasHub torch": ("keras", dict(backend="torch")),
         "transformers": ("transformers", dict(dtype="float32")),
         "llama.cpp": ("llama", dict(dtype="float32"))}
GROUPS = ["speed", "long", "loading", "tiny", "training"]  # of lines
GB = 1e9
failures = []
summary = []  # the short table's lines


# The programs, each in a process of its own -------------------------------------------------------
#
# A worker is a function that prepares something and returns its tasks, functions of JSON values.
# The task "run" computes B prompts of S tokens and returns seconds: those of the prefill, up to the
# last position's logits, then those of each token after it.

def random_tokens(config, B, S):
    return np.random.default_rng().integers(3, config["vocabulary_size"], (B, S))


@functools.cache
def random_block(dtype):
    return (np.random.default_rng(0).standard_normal(1 << 22, np.float32) * 0.02).astype(dtype)


def random_array(shape, dtype=np.float32):
    """Returns the same random numbers over and over: other values would take the same time."""
    block, array = random_block(dtype), np.empty(math.prod(shape), dtype)
    for start in range(0, array.size, block.size):
        array[start:start + block.size] = block[:array.size - start]
    return array.reshape(shape)


def memory_in(file, name):
    """Returns one of the numbers of bytes in a file of /proc."""
    lines = pathlib.Path(file).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def peak_memory():
    return memory_in("/proc/self/status", "VmHWM")


def clear_peak():
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew


def measured(step, before):
    """Returns the seconds of a training step, and its peak beyond `before` in bytes.

    `step` computes gradients, which go when its result does.
    """
    clear_peak()
    start = time.perf_counter()
    gradients = step()
    seconds = time.perf_counter() - start
    del gradients
    return seconds, peak_memory() - before


def random_model(config, dtype):
    import phi3_ref
    shaped = phi3_ref.Phi3Config(**config, dtype=dtype)
    weights = shaped.build_weights(lambda name, shape: random_array(shape, shaped.weight_dtype))
    return phi3_ref.Phi3CausalLM(phi3_ref.Phi3Backbone(**config, dtype=dtype, weights=weights))


def time_generate(causal_lm, prompts, new):
    """Returns the seconds from `prompts` [B, S] to the first probabilities, and to `new` more."""
    import phi3_ref
    ids, times = np.pad(prompts, [(0, 0), (0, new + 1)]), []
    mask = np.broadcast_to(np.arange(ids.shape[1]) < prompts.shape[1], ids.shape)

    class Clock(phi3_ref.GreedySampler):
        def get_next_token(self, probabilities):
            times.append(time.perf_counter())
            return super().get_next_token(probabilities)

    causal_lm.compile(sampler=Clock())
    times.append(time.perf_counter())
    causal_lm.generate({"token_ids": ids, "padding_mask": mask}, stop_token_ids=None)
    return np.diff(times).tolist()


def worker_ours(config, dtype):
    causal_lm = random_model(config, dtype)

    def ragged(B, S):
        """Returns the seconds of the backbone without and with padding."""
        ids, lengths = random_tokens(config, B, S), np.linspace(S // 8, S, B).astype(int)
        padded = {"token_ids": ids, "padding_mask": np.arange(S) < lengths[:, None]}
        times = [time.perf_counter()]
        for inputs in ({"token_ids": ids}, padded):
            causal_lm.backbone(inputs)
            times.append(time.perf_counter())
        return list(np.diff(times))

    def gradients(S, recompute=False):
        causal_lm.compile(recompute=recompute)
        before = resting_memory()
        ids, labels = random_tokens(config, 1, S), random_tokens(config, 1, S)
        return measured(lambda: causal_lm.gradients({"token_ids": ids}, labels), before)

    @functools.cache
    def resting_memory():
        """Returns the memory in use between steps, once a first one has loaded what they need."""
        causal_lm.gradients({"token_ids": np.ones((1, 1), int)}, np.ones((1, 1), int))
        return memory_in("/proc/self/status", "VmRSS")

    return {"run": lambda B, S: time_generate(causal_lm, random_tokens(config, B, S), NEW),
            "ragged": ragged, "gradients": gradients}


def worker_long(config):
    """One long prompt: the seconds of all and of attention; memory beyond weights and cache."""
    import phi3_ref
    causal_lm, attention, seconds = random_model(config, "float32"), phi3_ref.attention, []

    def timed_attention(*args, **kwargs):
        start = time.perf_counter()
        result = attention(*args, **kwargs)
        seconds.append(time.perf_counter() - start)
        return result

    phi3_ref.attention = timed_attention

    def run(S):
        seconds.clear()
        clear_peak()
        total = sum(time_generate(causal_lm, random_tokens(config, 1, S), 0))
        assert seconds and not len(seconds) % config["num_layers"], "attention is not all timed"
        cache = config["num_layers"] * 2 * (S + 1) * config["hidden_dim"] * 4
        return total, sum(seconds), peak_memory() - 4 * parameters(config) - cache

    return {"run": run}


def worker_products(config):
    """The limit: the products alone."""
    D, F, V = config["hidden_dim"], config["intermediate_dim"], config["vocabulary_size"]
    H, L, C = config["num_query_heads"], config["num_layers"], D // config["num_query_heads"]
    *weights, logits = map(random_array, [(3 * D, D), (D, D), (2 * F, D), (D, F)] * L + [(V, D)])

    def linear(rows, prompts, out_in):
        """Returns seconds; [in, out] is the same memory, read otherwise."""
        inputs, seconds = {n: random_array((rows, n)) for n in (D, F)}, 0.0
        for weight in (*weights, logits):
            x = inputs[weight.shape[1]][:prompts if weight is logits else None]
            w = weight.T if out_in else weight.reshape(weight.shape[::-1])
            start = time.perf_counter()
            _ = x @ w if len(x) > 1 else w.T @ x[0] if out_in else x[0] @ w
            seconds += time.perf_counter() - start
        return seconds

    def attention(S, heads=H):
        """Returns the seconds of all layers, measured on some heads of one."""
        (query, key, value), scores = random_array((3, heads, S, C)), random_array((128, S))
        start = time.perf_counter()
        for head in range(heads):
            for first in range(0, S, 128):
                last = min(first + 128, S)
                _ = query[head, first:last] @ key[head, :last].T
                _ = scores[:last - first, :last] @ value[head, :last]
        return L * H / heads * (time.perf_counter() - start)

    def run(B, S):
        """Returns the seconds of both layouts."""
        attended = sum(attention(S) for _ in range(B))
        return [[linear(B * S, B, out_in) + attended, *(linear(1, 1, out_in) for _ in range(NEW))]
                for out_in in (True, False)]

    def long(S, rows=1024):
        return linear(rows, 1, True) * S / rows, attention(S, heads=2)

    return {"run": run, "long": long}


def worker_training_products(config):
    """The limit of a training step: three products per weight, six of attention's."""
    D, F, V = config["hidden_dim"], config["intermediate_dim"], config["vocabulary_size"]
    H, K, L = config["num_query_heads"], config["num_key_value_heads"], config["num_layers"]
    C, G = D // H, H // K
    layer = [((H + 2 * K) * C, D), (D, D), (2 * F, D), (D, F)]
    weights = list(map(random_array, layer * L + [(V, D)]))

    def linear(rows, out_in):
        """Returns seconds; [in, out] is the same memory, read otherwise."""
        arrays = {n: random_array((rows, n)) for weight in weights for n in weight.shape}
        seconds, gradients = 0.0, []
        for weight in weights:
            x, y = arrays[weight.shape[1]], arrays[weight.shape[0]]
            w = weight if out_in else weight.reshape(weight.shape[::-1]).T
            start = time.perf_counter()
            _ = x @ w.T
            _ = y @ w
            gradients.append(y.T @ x if out_in else x.T @ y)
            seconds += time.perf_counter() - start
        return seconds

    def attention(B, S):
        """Returns the seconds of all layers, measured on one: causal blocks that stay in cache."""
        (query, gradient), (key, value) = (random_array((2, B * K, n, C)) for n in (S * G, S))
        heads, seconds = max(1, 2**18 // (G * min(S, 128) * S)), 0.0
        for first in range(0, S, 128):
            last = min(first + 128, S)
            for head in range(0, B * K, heads):
                some, rows = slice(head, head + heads), slice(first * G, last * G)
                q, g = query[some, rows], gradient[some, rows]  # [k, G * s, C]
                k, v = key[some, :last], value[some, :last]  # [k, t, C]
                start = time.perf_counter()
                scores = q @ k.swapaxes(1, 2)
                _ = scores @ v
                slopes = g @ v.swapaxes(1, 2)
                _ = scores.swapaxes(1, 2) @ g
                _ = slopes.swapaxes(1, 2) @ q
                _ = slopes @ k
                seconds += time.perf_counter() - start
        return L * seconds

    def run(B, S):
        """Returns the seconds of both layouts."""
        attended = attention(B, S)
        return [linear(B * S, out_in) + attended for out_in in (True, False)]

    return {"run": run}


def random_batch(config, B, S):
    """Returns inputs, labels and label weights; a third of the labels counts."""
    ids, labels = random_tokens(config, B, S), random_tokens(config, B, S)
    weight = np.random.default_rng().random((B, S)) < 1 / 3
    inputs = {"token_ids": ids.astype("int32"), "padding_mask": np.ones(ids.shape, "int32")}
    return inputs, labels.astype("int32"), weight.astype("float32")


LEARNING = dict(learning_rate=1e-3, weight_decay=0.1, beta_1=0.9, beta_2=0.98)  # AdamW's


def timed_step(model, batch):
    start = time.perf_counter()
    loss, _ = model.train_on_batch(*batch)
    seconds = time.perf_counter() - start
    assert np.isfinite(loss)
    return seconds


def worker_ours_training(config):
    """Training steps of a small model, AdamW included."""
    import phi3_ref
    causal_lm = phi3_ref.Phi3CausalLM(phi3_ref.Phi3Backbone(**config, seed=0))
    causal_lm.compile(phi3_ref.AdamW(**LEARNING))
    return {"run": lambda B, S: timed_step(causal_lm, random_batch(config, B, S))}


def worker_keras_training(config, backend):
    """KerasHub's training steps, compiled as Keras does by default."""
    os.environ["KERAS_BACKEND"] = backend
    import keras
    import keras_hub

    def compiled(backbone):
        model = keras_hub.models.Phi3CausalLM(backbone, preprocessor=None)
        model.compile(
            optimizer=keras.optimizers.AdamW(**LEARNING),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            weighted_metrics=[keras.metrics.SparseCategoricalAccuracy()])
        return model

    def check():
        """Asserts that it learns what ours does: the losses of some steps from equal weights."""
        import references

        import phi3_ref
        backbone = references.keras_backbone(SMALL)
        ours, theirs = phi3_ref.Phi3CausalLM(references.ours_like(backbone)), compiled(backbone)
        ours.compile(phi3_ref.AdamW(**LEARNING))
        batch = random_batch(SMALL, 3, 12)
        for step in range(5):
            losses = [float(model.train_on_batch(*batch)[0]) for model in (ours, theirs)]
            assert abs(losses[0] - losses[1]) <= 1e-3 * losses[0], f"step {step}: losses {losses}"

    model = compiled(keras_hub.models.Phi3Backbone(**config, dtype="float32"))
    return {"run": lambda B, S: timed_step(model, random_batch(config, B, S)), "check": check}


def worker_tiny():
    """The embedded preset's seconds per decoded token, and those of its products alone."""
    import phi3_ref
    causal_lm, new = phi3_ref.Phi3CausalLM.from_preset("phi3_tiny_puzzles_en"), 31
    backbone = causal_lm.backbone
    H, K, C = backbone.num_query_heads, backbone.num_key_value_heads, backbone.head_dim
    named = phi3_ref.huggingface_tensors(backbone.weights, backbone.config)
    matrices = [x.T for name, x in named if x.ndim == 2 and name != "model.embed_tokens.weight"]
    rows = {len(matrix): random_array((1, len(matrix))) for matrix in matrices}
    query, key = random_array((K, H // K, C)), random_array((K, 4 + new // 2, C))

    def run():
        seconds = time_generate(causal_lm, random_tokens(backbone.get_config(), 1, 4), new)[1:]
        start = time.perf_counter()
        for _ in range(new):
            for matrix in matrices:
                _ = rows[len(matrix)] @ matrix
            for _ in range(backbone.num_layers):
                _ = query @ key.transpose(0, 2, 1) @ key
        return statistics.median(seconds), (time.perf_counter() - start) / new

    return {"run": run}


def check_peer(backbone, prefill, decode):
    """Asserts that a peer's logits, after a prompt and after NEW tokens more, are ours."""
    import references

    import phi3_ref
    causal_lm, S = phi3_ref.Phi3CausalLM(backbone), 150  # more than one of attention's blocks
    causal_lm.compile(sampler="greedy")
    prompt = random_tokens(backbone.get_config(), 1, S)
    inputs = {"token_ids": np.pad(prompt, ((0, 0), (0, NEW))),
              "padding_mask": np.arange(S + NEW)[None] < S}
    ids = causal_lm.generate(inputs, stop_token_ids=None)["token_ids"]
    for seen, theirs in ((prompt, prefill(prompt)), (ids, decode(prompt))):
        error = references.relative_error(theirs, causal_lm({"token_ids": seen})[:, -1])
        assert error <= references.TOLERANCE["float32"], f"logits differ from ours by {error:.1e}"


def worker_keras(config, backend):
    """KerasHub: prompts through its backbone, then tokens through its cache, compiled as it does.

    Prefill leaves out the cache, and the logits of all positions but the last: its cheapest way.
    """
    os.environ["KERAS_BACKEND"] = backend
    import keras
    import keras_hub
    ops = keras.ops

    def compiled(function, model):
        """Returns `function` as KerasHub's `make_generate_function` compiles such."""
        if backend == "torch":
            import torch
            return torch.no_grad()(function)
        if backend == "tensorflow":
            import tensorflow
            return tensorflow.function(function, jit_compile=True)
        import jax

        @jax.jit
        def stateless(values, *args):
            with keras.StatelessScope(list(zip(model.variables, values, strict=True))):
                return function(*args)

        return lambda *args: stateless([variable.value for variable in model.variables], *args)

    def programs(backbone):
        causal_lm = keras_hub.models.Phi3CausalLM(backbone, preprocessor=None)

        def prefill(inputs):
            return backbone.token_embedding(backbone(inputs)[:, -1], reverse=True)

        def decode(token, logits, cache, index):
            def step(i, state):
                token, _, cache = state
                logits, _, cache = causal_lm.call_with_cache(token, cache, index + i)
                return ops.cast(ops.argmax(logits, -1), "int32"), logits[:, -1], cache

            return ops.fori_loop(0, NEW, step, (token, logits, cache))[1]

        return causal_lm, compiled(prefill, backbone), compiled(decode, backbone)

    def tensors(ids):
        ids = ops.convert_to_tensor(ids, "int32")
        return {"token_ids": ids, "padding_mask": ops.ones_like(ids)}

    def check():
        import references
        backbone = references.keras_backbone(SMALL)
        causal_lm, prefill, decode = programs(backbone)

        def decoded(prompt):
            padded = np.pad(prompt, ((0, 0), (0, NEW)))
            _, cache = causal_lm._build_cache(ops.convert_to_tensor(padded, "int32"))
            logits = prefill(tensors(prompt))
            token = ops.cast(ops.argmax(logits, -1), "int32")[:, None]
            return ops.convert_to_numpy(decode(token, logits, cache, prompt.shape[1]))

        check_peer(references.ours_like(backbone),
                   lambda prompt: ops.convert_to_numpy(prefill(tensors(prompt))), decoded)

    # Drawing its own takes longer than what is measured.
    keras.initializers.RandomNormal.__call__ = (
        lambda _, shape, dtype=None: ops.convert_to_tensor(random_array(shape), dtype))
    _, prefill, decode = programs(keras_hub.models.Phi3Backbone(**config, dtype="float32"))

    def run(B, S):
        inputs = tensors(random_tokens(config, B, S))
        heads = config["num_key_value_heads"], config["hidden_dim"] // config["num_query_heads"]
        cache = ops.ones((B, config["num_layers"], 2, S + NEW, *heads))
        times = [time.perf_counter()]
        logits = prefill(inputs)
        ops.convert_to_numpy(logits)
        times.append(time.perf_counter())
        ops.convert_to_numpy(decode(inputs["token_ids"][:, -1:], logits, cache, S))
        times.append(time.perf_counter())
        first, others = np.diff(times)
        return [first, others / NEW]

    return {"run": run, "check": check}


def worker_transformers(config, dtype):
    """Hugging Face's transformers as its `generate` runs it: eager, with a growing cache."""
    import torch
    import transformers
    from transformers.initialization import no_init_weights

    def step(model, ids, cache):
        with torch.inference_mode():
            return model(input_ids=torch.as_tensor(ids), past_key_values=cache, use_cache=True,
                         logits_to_keep=1).logits[:, -1]

    def steps(model, ids):
        """Yields the logits after the prompt and after each of NEW tokens."""
        cache = transformers.DynamicCache(config=model.config)
        for _ in range(1 + NEW):
            logits = step(model, ids, cache)
            yield logits
            ids = logits.argmax(-1, keepdim=True)

    def check():
        import references

        import phi3_ref
        small = references.transformers_model(dict(max_position_embeddings=4096,
                                                   original_max_position_embeddings=4096))
        small.set_attn_implementation("sdpa")  # its default
        with tempfile.TemporaryDirectory() as directory:
            references.write_huggingface(small, directory)
            check_peer(phi3_ref.Phi3Backbone.from_preset(directory),
                       lambda prompt: next(steps(small, prompt)).numpy(),
                       lambda prompt: list(steps(small, prompt))[-1].numpy())

    settings = transformers.Phi3Config(**huggingface_config(config), pad_token_id=0)
    with no_init_weights():  # which takes seconds
        model = transformers.Phi3ForCausalLM(settings).eval()
    for parameter in model.parameters():
        array = torch.from_numpy(random_array(parameter.shape))
        parameter.data = array.to(getattr(torch, dtype))

    def run(B, S):
        times = [time.perf_counter()]
        times += [time.perf_counter() for _ in steps(model, random_tokens(config, B, S))]
        return np.diff(times).tolist()

    def learn(model, ids, labels):
        """Computes the gradients anew; returns the loss."""
        logits = model(input_ids=torch.as_tensor(ids), use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[0], torch.as_tensor(labels)[0])
        loss.backward()
        return loss

    def check_gradients():
        import references

        import phi3_ref
        small = references.transformers_model({}).train()
        with tempfile.TemporaryDirectory() as directory:
            references.write_huggingface(small, directory)
            ours = phi3_ref.Phi3CausalLM.from_preset(directory)
        ids, labels = (random_tokens({"vocabulary_size": 61}, 1, 100) for _ in range(2))
        _, gradients = ours.gradients({"token_ids": ids}, labels)
        gradients = dict(phi3_ref.huggingface_tensors(gradients, ours.backbone.config))
        for attention in ("sdpa", "eager"):
            small.set_attn_implementation(attention)
            small.zero_grad()
            learn(small, ids, labels)
            for name, parameter in small.named_parameters():
                error = references.relative_error(gradients[name], parameter.grad.numpy())
                assert error <= phi3_ref.GRADIENT_TOLERANCES["float32"], (
                    f"the gradient of {name} differs from ours by {error:.1e}")

    def gradients(S, attention):
        model.train()
        model.set_attn_implementation(attention)
        before = resting_memory()
        ids, labels = random_tokens(config, 1, S), random_tokens(config, 1, S)
        seconds, beyond = measured(lambda: learn(model, ids, labels).item(), before)
        model.zero_grad()
        return seconds, beyond

    @functools.cache
    def resting_memory():
        """Returns the memory in use between steps, once a first one has loaded what they need."""
        learn(model, np.ones((1, 1), int), np.ones((1, 1), int))
        model.zero_grad()
        return memory_in("/proc/self/status", "VmRSS")

    return {"run": run, "check": check, "gradients": gradients,
            "check_gradients": check_gradients}


def worker_llama(config, dtype):
    """llama.cpp by llama-cpp-python, with both of a random model's files and cache in `dtype`.

    It is no part of tests/requirements.txt: `pip install llama-cpp-python gguf` compiles it.
    """
    import ctypes

    import gguf
    import llama_cpp

    types = {"float32": gguf.GGMLQuantizationType.F32, "bfloat16": gguf.GGMLQuantizationType.BF16}
    names = {"token_embedding": "token_embd", "pre_attention_layernorm": "attn_norm",
             "qkv": "attn_qkv", "attention_output": "attn_output",
             "post_attention_layernorm": "ffn_norm", "feedforward_gate_intermediate": "ffn_up",
             "feedforward_output": "ffn_down", "sequence_output_layernorm": "output_norm",
             "reverse_embedding": "output"}

    def load(config, weights, dtype, flash=-1):
        """Returns a context of the model with our tree of weights, by way of a GGUF file.

        llama.cpp chooses its attention unless `flash` is 0; its fast one rounds to float16.
        """
        import phi3_ref
        with tempfile.TemporaryDirectory() as directory:
            path = pathlib.Path(directory) / "model.gguf"
            writer = gguf.GGUFWriter(path, "phi3")
            writer.add_context_length(4096)
            writer.add_embedding_length(config["hidden_dim"])
            writer.add_feed_forward_length(config["intermediate_dim"])
            writer.add_block_count(config["num_layers"])
            writer.add_head_count(config["num_query_heads"])
            writer.add_head_count_kv(config["num_key_value_heads"])
            writer.add_layer_norm_rms_eps(config.get("layer_norm_epsilon", 1e-6))
            writer.add_rope_dimension_count(config["hidden_dim"] // config["num_query_heads"])
            writer.add_rope_freq_base(10000.0)
            writer.add_vocab_size(config["vocabulary_size"])
            writer.add_tokenizer_model("no_vocab")
            for name, array in phi3_ref.named_weights(weights):
                layer, _, part = name.rpartition(".")
                block = f"blk.{layer.rpartition('_')[2]}." if layer else ""
                narrow = dtype == "bfloat16" and array.ndim == 2  # norms are in float32 always
                array = array.view(np.uint8) if narrow else array.astype(np.float32)
                writer.add_tensor(f"{block}{names[part]}.weight", array,
                                  raw_dtype=types["bfloat16"] if narrow else None)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            model = llama_cpp.llama_model_load_from_file(
                str(path).encode(), llama_cpp.llama_model_default_params())
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = 1024
        options.n_threads = options.n_threads_batch = len(os.sched_getaffinity(0))
        options.flash_attn_type = flash
        options.type_k = options.type_v = int(types[dtype])
        context = llama_cpp.llama_init_from_model(model, options)
        if not context:
            raise RuntimeError("llama.cpp has made no context")
        return context

    def step(context, ids, V):
        """Returns the logits [V] after the last of `ids`."""
        array = (ctypes.c_int32 * len(ids))(*map(int, ids))
        if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(ids))):
            raise RuntimeError("llama_decode has failed")
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), (V,))

    def steps(context, ids, V):
        """Yields the logits after the prompt and after each of NEW tokens."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        for _ in range(1 + NEW):
            yield (logits := step(context, ids, V))
            ids = [logits.argmax()]

    def check():
        import phi3_ref
        backbone, V = phi3_ref.Phi3Backbone(**SMALL, seed=0), SMALL["vocabulary_size"]
        small = load(SMALL, backbone.weights, "float32", flash=0)
        check_peer(backbone, lambda prompt: next(steps(small, prompt[0], V)).copy()[None],
                   lambda prompt: list(steps(small, prompt[0], V))[-1].copy()[None])

    context = load(config, random_model(config, dtype).backbone.weights, dtype)

    def run(B, S):
        ids, times = random_tokens(config, B, S)[0], [time.perf_counter()]
        times += [time.perf_counter() for _ in steps(context, ids, config["vocabulary_size"])]
        return np.diff(times).tolist()

    return {"run": run, "check": check}


def huggingface_config(config):
    return {"vocab_size": config["vocabulary_size"], "hidden_size": config["hidden_dim"],
            "intermediate_size": config["intermediate_dim"],
            "num_hidden_layers": config["num_layers"],
            "num_attention_heads": config["num_query_heads"],
            "num_key_value_heads": config["num_key_value_heads"]}


def worker_write(config, dtype, form, directory):
    """Writes a random checkpoint of Keras's or Hugging Face's form, tensor by tensor."""
    import h5py

    import phi3_ref
    backbone = phi3_ref.Phi3Backbone(**config, dtype=dtype, weights={})
    directory, kind = pathlib.Path(directory), {"bfloat16": "BF16", "float32": "F32"}[dtype]
    zero = np.zeros((), backbone.weight_dtype)
    shapes = backbone.config.build_weights(lambda name, shape: np.broadcast_to(zero, shape))

    def write_keras():
        with h5py.File(directory / "model.weights.h5", "w") as file:
            for name, array in phi3_ref.keras_variables(shapes, backbone.config):
                dataset = file.create_dataset(name, data=random_array(array.shape, array.dtype))
                dataset.attrs["dtype"] = dtype
        return {"registered_name": "keras_hub>Phi3Backbone", "config": backbone.get_config()}

    def write_huggingface(limit=2 << 30):
        shards, weight_map = [[]], {}
        for name, array in phi3_ref.huggingface_tensors(shapes, backbone.config):
            if sum(other.nbytes for _, other in shards[-1]) + array.nbytes > limit:
                shards.append([])
            shards[-1].append((name, array))
        for i, shard in enumerate(shards):
            file, end, header = f"model-{i + 1:05}-of-{len(shards):05}.safetensors", 0, {}
            for name, array in shard:
                start, end, weight_map[name] = end, end + array.nbytes, file
                header[name] = dict(dtype=kind, shape=array.shape, data_offsets=[start, end])
            text = json.dumps(header).encode()
            text += b" " * (-len(text) % 64 + 56)  # tensors begin at a multiple of 64, after 8
            with open(directory / file, "wb") as out:
                out.write(len(text).to_bytes(8, "little") + text)
                for _, array in shard:
                    random_array(array.shape, array.dtype).tofile(out)
        index = directory / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
        return {"model_type": "phi3", **huggingface_config(config)}

    def write():
        content = write_keras() if form == "Keras" else write_huggingface()
        (directory / "config.json").write_text(json.dumps(content))
        os.sync()  # or the disk is busy while the files are read

    return {"run": write}


def worker_load(directory, dtype):
    import phi3_ref
    start = time.perf_counter()
    causal_lm = phi3_ref.Phi3CausalLM.from_preset(directory, dtype=dtype)
    backbone = causal_lm.backbone
    for _, array in phi3_ref.huggingface_tensors(backbone.weights, backbone.config):
        array.view(np.uint8).reshape(-1)[::4096].max()  # every page: a mapped file is read only now
    seconds = time.perf_counter() - start
    beyond = peak_memory() - backbone.count_params() * backbone.weight_dtype.itemsize

    def run():
        """Returns the seconds of loading and its peak beyond the model; then of 16 + 4 tokens."""
        ids = random_tokens(backbone.get_config(), 1, 16)
        first, *others = time_generate(causal_lm, ids, 4)
        return seconds, beyond, first, statistics.median(others), peak_memory()

    def share():
        """Returns this process's share of the memory that it uses, and that memory."""
        return [memory_in("/proc/self/smaps_rollup", name) for name in ("Pss", "Rss")]

    return {"run": run, "share": share}


def worker_lora(directory):
    """LoRA on a stored bfloat16 model, whose weights stay mapped from its files."""
    import phi3_ref
    causal_lm = phi3_ref.Phi3CausalLM.from_preset(directory, dtype="bfloat16")
    causal_lm.backbone.enable_lora(8)
    causal_lm.compile(phi3_ref.AdamW(1e-4), recompute=True)

    def run(S):
        """Returns the seconds of a forward pass and of a step, and the peak of all memory."""
        config = causal_lm.backbone.get_config()
        ids, labels = random_tokens(config, 1, S), random_tokens(config, 1, S)
        start = time.perf_counter()
        causal_lm({"token_ids": ids})
        forward = time.perf_counter() - start
        return forward, timed_step(causal_lm, ({"token_ids": ids}, labels)), peak_memory()

    return {"run": run}


def worker_read(directory, dtype):
    """The limit of loading: reads every byte once, converts it for float32, and keeps the result.

    (A virtual machine can need longer for fresh memory than for reading and converting.)
    """
    start = time.perf_counter()
    paths = [path for path in pathlib.Path(directory).iterdir() if path.suffix != ".json"]
    size = sum(path.stat().st_size for path in paths) // 2
    kept = np.empty(size, np.uint32 if dtype == "float32" else np.uint16)
    piece, end = np.empty(1 << 17, np.uint16), 0
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(piece) // 2:
                part = kept[end : end + count]
                if dtype == "float32":  # whose upper half is a bfloat16
                    np.left_shift(piece[:count], 16, out=part, dtype=np.uint32)
                else:
                    part[...] = piece[:count]
                end += count
    seconds = time.perf_counter() - start
    return {"run": lambda: seconds}


def serve(name, options):
    """Runs a worker: a task in, its result out, one line of JSON each."""
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print is no answer

    def answer(function, *args):
        try:
            found = {"result": function(*args)}
        except ModuleNotFoundError as error:
            found = {"problem": f"absent: {error.name}"}
        except Exception as error:
            words = " ".join(f"failed: {type(error).__name__} {error}".split())
            found = {"problem": words.replace("|", "/")[:150]}
        print(json.dumps(found), file=pipe, flush=True)

    tasks = {}
    answer(lambda: tasks.update(globals()[f"worker_{name}"](**options)))
    for line in sys.stdin:
        task, args = json.loads(line)
        answer(tasks[task], *args)


# Taking turns -------------------------------------------------------------------------------------

class Worker:
    """A worker's process."""

    def __init__(self, name, **options):
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", name, json.dumps(options)], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            # Idle threads must not spin while another program has its turn.
            env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"})

    def send(self, task, *args):
        print(json.dumps([task, args]), file=self.process.stdin, flush=True)

    def receive(self):
        line = self.process.stdout.readline() or '{"problem": "failed: the process has ended"}'
        answer = json.loads(line)
        if "problem" in answer:
            raise RuntimeError(answer["problem"])
        return answer["result"]

    def ask(self, task, *args):
        self.send(task, *args)
        return self.receive()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()  # the libraries' own ends take seconds
        self.process.communicate()


def only(name, task="run", *args, **options):
    """Returns the result of one task in a process of its own."""
    with Worker(name, **options) as worker:
        worker.receive()
        return worker.ask(task, *args)


def parameters(config):
    D, F, V = config["hidden_dim"], config["intermediate_dim"], config["vocabulary_size"]
    return config["num_layers"] * (4 * D + 3 * F + 2) * D + 2 * V * D + D


def start(stack, config, programs, *tasks):
    """Starts programs, {name: (worker, options)}, and has each do the given tasks once.

    Returns {name: Worker}, and {name: why not} of those that were not there, failed, or for which
    there was no memory.
    """
    workers, problems, left = {}, {}, memory_in("/proc/meminfo", "MemAvailable")
    for name, (worker, options) in programs.items():
        need = 1.2 * parameters(config) * (2 if options.get("dtype", "").endswith("16") else 4)
        left -= need
        if left < 0:
            problems[name] = f"left out: needs {need / GB:.1f} GB of memory"
        else:
            workers[name] = stack.enter_context(Worker(worker, config=config, **options))
    for task in (None, *tasks):
        for worker in workers.values() if task else ():
            worker.send(*task)
        for name, worker in list(workers.items()):
            try:
                worker.receive()
            except RuntimeError as problem:
                del workers[name]
                problems[name] = str(problem)
                if not problems[name].startswith("absent"):
                    failures.append(f"{name}: {problem}")
    return workers, problems


def take_turns(workers, rounds, *task):
    """Returns {name: array with the numbers of each round}."""
    found = [{name: worker.ask(*task) for name, worker in workers.items()} for _ in range(rounds)]
    return {name: np.array([results[name] for results in found]) for name in workers}


# The table ----------------------------------------------------------------------------------------

def row(what, ours, limit=None, peers=None, unit=1, targets=(), short=None):
    """Prints one measurement.

    `ours`, `limit` and the peers are arrays, which are divided by `unit`; a peer may be words that
    say why there is none. `targets` are pairs: what ours is compared with ("limit", "fastest peer",
    or "", the number itself), and the most that it may be. `short` names it in the short table.
    """
    def text(samples, spread=True):
        if samples is None or isinstance(samples, str):
            return samples or ""
        least_most = f" ({np.min(samples) / unit:.3g}..{np.max(samples) / unit:.3g})"
        return f"{np.median(samples) / unit:.3g}" + least_most * (spread and np.size(samples) > 1)

    peers = peers or {}
    medians = [np.median(samples) for samples in peers.values() if not isinstance(samples, str)]
    ratios = {"": np.median(ours) / unit}
    if limit is not None:
        ratios["limit"] = np.median(ours) / np.median(limit)
    if medians:
        ratios["fastest peer"] = np.median(ours) / min(medians)
    wanted = [f"<= {most:.3g}" + f" x {name}" * bool(name) for name, most in targets]
    reached = ["not measured" if name not in ratios else "yes" if ratios[name] <= most else "NO"
               for name, most in targets]
    columns = ours, *(peers.get(name) for name in PEERS), limit
    shares = [f"{ratios[to]:.2f}" if to in ratios else "" for to in ("limit", "fastest peer")]
    print("|", " | ".join([what, *map(text, columns), *shares, ", ".join(wanted),
                           ", ".join(reached)]), "|", flush=True)
    if short:
        summary.append([short, *(text(samples, spread=False) for samples in columns), *shares])


def prefill_of(results):
    return results if isinstance(results, str) else results[..., 0]


def decode_of(results):
    return results if isinstance(results, str) else results[..., 1:]


def faster(samples):
    """Returns the samples [rounds, layouts, …] of the layout whose median is least."""
    return min(samples.swapaxes(0, 1), key=np.median)


def bench_speed(size):
    """Lines 1, 2, 3 and 5; returns a remark."""
    S, rounds, config = size["prompt"], size["rounds"], PHI3_MINI | {"num_layers": size["layers"]}
    run, check = ("run", 1, S), [("check",)] * (size is WHOLE)
    with contextlib.ExitStack() as stack:
        workers, _ = start(stack, config, {"ours": ("ours", dict(dtype="float32")),
                                           "products": ("products", {})}, run)
        with contextlib.ExitStack() as peer_stack:
            peers, problems = start(peer_stack, config, PEERS, *check, run)
            peers = take_turns(workers | peers, rounds, *run) | problems
        ours, products = peers.pop("ours"), peers.pop("products")
        what = f"num_layers={size['layers']}, float32"
        row(f"1. prefill of {S} tokens, {what}, s", prefill_of(ours), faster(prefill_of(products)),
            {name: prefill_of(results) for name, results in peers.items()},
            targets=[("limit", 1.1), ("fastest peer", 1)],
            short=f"prefill of {S} tokens, {what}, s; limit: its products")
        row(f"2. decode after them, {what}, ms per token", decode_of(ours),
            faster(decode_of(products)),
            {name: decode_of(results) for name, results in peers.items()}, 1e-3,
            [("limit", 1.1), ("fastest peer", 0.67)], "decode, ms per token; limit: its products")
        bench_batch(workers, BATCH, S // BATCH, size["repeats"])
        bench_16_bits(stack, workers["ours"], config, size["repeats"], run)
    layouts = [f"{np.median(prefill_of(products)[:, i]):.3g} s and "
               f"{np.median(decode_of(products)[:, i]) * 1e3:.3g} ms" for i in (0, 1)]
    return (f"Products of prefill and decode with weights as [out, in]: {layouts[0]}; "
            f"as [in, out]: {layouts[1]}.")


def bench_batch(workers, B, S, rounds):
    found = take_turns(workers, rounds, "run", B, S)
    row(f"3. prefill of {B} prompts of {S} tokens, s", prefill_of(found["ours"]),
        faster(prefill_of(found["products"])), targets=[("limit", 1.15)])
    full, ragged = take_turns({"ours": workers["ours"]}, rounds, "ragged", B, S)["ours"].T
    row(f"3. prompts of {S // 8} to {S} tokens, padded; limit: all of {S}, s", ragged, full,
        targets=[("limit", 1.05)])


def bench_16_bits(stack, ours, config, rounds, run):
    workers, problems = start(stack, config, {
        "bfloat16": ("ours", dict(dtype="bfloat16")), "float16": ("ours", dict(dtype="float16")),
        "transformers": ("transformers", dict(dtype="bfloat16")),
        "llama.cpp": ("llama", dict(dtype="bfloat16"))}, run)
    found = take_turns({"float32": ours} | workers, rounds, *run) | problems
    prefill, decode = ("prefill, s", prefill_of, 1), ("decode, ms per token", decode_of, 1e-3)
    for dtype, other, peers, (what, of, unit), targets in (
            ("bfloat16", "float32", ["transformers", "llama.cpp"], prefill, [("limit", 1.1)]),
            ("bfloat16", "float32", ["transformers", "llama.cpp"], decode, [("fastest peer", 1.5)]),
            ("float16", "bfloat16", [], prefill, []),
            ("float16", "bfloat16", [], decode, [("limit", 2)])):
        what = f"{dtype} {what}; limit: ours in {other}"
        row(f"5. {what}", of(found[dtype]), of(found[other]),
            {name: of(found[name]) for name in peers}, unit, targets, what)


def bench_long(lengths):
    """Line 4, each length once."""
    config, first = PHI3_MINI | {"num_layers": 2}, None
    with (Worker("long", config=config) as ours, Worker("products", config=config) as products):
        ours.receive(), products.receive()
        ours.ask("run", 128), products.ask("long", 128)
        for S in lengths:
            total, attended, beyond = ours.ask("run", S)
            linear, attention = products.ask("long", S)
            other, what = (total - attended) / S, f"4. prefill of {S:,} tokens, num_layers=2: "
            first = first or other
            row(f"{what}ms per token, less attention; target: 1.1 x that of {lengths[0]:,}", other,
                linear / S, unit=1e-3, targets=[("", 1100 * first)])
            row(f"{what}attention, ms per token", attended / S, attention / S, unit=1e-3)
            row(f"{what}memory beyond weights and cache, GB", beyond, unit=GB, targets=[("", 3)])


@contextlib.contextmanager
def checkpoint(config, dtype, form, directory):
    """Writes random files to a directory of their own, which goes at the end."""
    with tempfile.TemporaryDirectory(dir=directory) as path:
        only("write", config=config, dtype=dtype, form=form, directory=path)
        yield path


def bench_loading(layers, rounds, directory, whole=False):
    """Line 6, one form after the other; `whole` is all of Phi-3-mini, which has to run, too."""
    config = PHI3_MINI | {"num_layers": layers}
    for form in ("Hugging Face", "Keras"):
        with checkpoint(config, "bfloat16", form, directory) as path:
            for dtype, most in (("float32", 24), ("bfloat16", 10)):
                files = dict(directory=path, dtype=dtype)
                limit, seconds, beyond, prefill, decode, peak = np.array([
                    [only("read", **files), *only("load", **files)] for _ in range(rounds)]).T
                what = f"6. {form} bfloat16, {2 * parameters(config) / GB:.1f} GB, as {dtype}: "
                row(f"{what}loading; limit: plain read and conversion, s", seconds, limit,
                    targets=[("limit", 4)],
                    short=f"loading {what[3:-2]}, s; limit: plain read and conversion")
                row(f"{what}peak of memory beyond the model, GB", beyond, unit=GB,
                    targets=[("", 1)])
                if whole:
                    row(f"{what}prefill of 16 tokens, s", prefill)
                    row(f"{what}decode, ms per token", decode, unit=1e-3)
                    row(f"{what}peak of memory with these, GiB", peak, unit=1 << 30,
                        targets=[("", most)])
            if whole and form == "Hugging Face":
                with Worker("lora", directory=path) as worker:
                    worker.receive()
                    forward, step, peak = worker.ask("run", 512)
                what = "11. LoRA of rank 8, bfloat16, a step of 512 tokens with recompute=True: "
                row(f"{what}limit: the forward alone, s", step, forward)
                row(f"{what}peak of memory, the model included, GiB", peak, unit=1 << 30,
                    targets=[("", 14)])


def bench_sharing(directory):
    """Line 6: a second process with the same float32 file."""
    config = PHI3_MINI | {"num_layers": 1, "vocabulary_size": 1000}  # half a gigabyte
    with checkpoint(config, "float32", "Hugging Face", directory) as path:
        files = dict(directory=path, dtype="float32")
        with Worker("load", **files) as first, Worker("load", **files) as second:
            first.receive(), second.receive()
            share, memory = second.ask("share")
        row("6. float32 safetensors in a second process: its share of memory; limit: its memory, "
            "GB", share, memory, unit=GB, targets=[("limit", 0.6)])


def bench_tiny(rounds):
    """Line 7."""
    with Worker("tiny") as worker:
        worker.receive()
        ours, products = take_turns({"": worker}, 10 * rounds, "run")[""].T
    row("7. embedded preset: decode, ms per token", ours, products, unit=1e-3)
    row("7. embedded preset: decode less products, ms per token", ours - products, unit=1e-3,
        targets=[("", 0.7)])
    code = ("import time, numpy; start = time.perf_counter(); import phi3_ref; "
            "print(time.perf_counter() - start)")
    seconds = [float(subprocess.check_output([sys.executable, "-c", code], cwd=ROOT))
               for _ in range(1 + 3 * rounds)]
    row("7. import phi3_ref beyond NumPy, s", seconds[1:], targets=[("", 0.3)])


def bench_training_step(size):
    """Line 8."""
    S, rounds = size["prompt"], size["repeats"]
    config = PHI3_MINI | {"num_layers": size["learning_layers"]}
    with contextlib.ExitStack() as stack:
        workers, _ = start(stack, config, {"ours": ("ours", dict(dtype="float32"))},
                           ("gradients", S))
        products, _ = start(stack, config, {"": ("training_products", {})}, ("run", 1, S))
        peers, problems = start(stack, config, {"transformers": PEERS["transformers"]},
                                *[("check_gradients",)] * (size is WHOLE), ("gradients", S, "sdpa"))
        ours, limit, sdpa, eager = [], [], [], []
        for _ in range(rounds):
            ours.append(workers["ours"].ask("gradients", S)[0])
            limit.append(products[""].ask("run", 1, S))
            for peer in peers.values():
                sdpa.append(peer.ask("gradients", S, "sdpa")[0])
                eager.append(peer.ask("gradients", S, "eager")[0])
        limit = faster(np.array(limit))
        what = f"8. forward and backward of {S} tokens, num_layers={size['learning_layers']}, "
        row(f"{what}float32, s", ours, limit, {"transformers": sdpa} if sdpa else problems,
            targets=[("limit", 1.15), ("fastest peer", 1)],
            short=f"{what[3:]}s; limit: its products")
        if eager:
            row(f"{what}transformers with eager attention, s", ours, limit,
                {"transformers": eager})


def bench_tiny_training(size, B=128, S=36):
    """Line 9."""
    programs = {"ours": ("ours_training", {}), "products": ("training_products", {})}
    programs |= {name: ("keras_training", options)
                 for name, (worker, options) in PEERS.items() if worker == "keras"}
    with contextlib.ExitStack() as stack:
        checked = list(programs)[2:] if size is WHOLE else []
        workers, problems = {}, {}
        for name, program in programs.items():
            found, problem = start(stack, TINY, {name: program},
                                   *[("check",)] * (name in checked), ("run", B, S))
            workers, problems = workers | found, problems | problem
        found = take_turns(workers, 5 * size["repeats"], "run", B, S) | problems
        ours, products = found.pop("ours"), found.pop("products")
        row(f"9. embedded preset: training step with AdamW, {B} x {S} tokens, ms", ours,
            faster(products), found, 1e-3, [("fastest peer", 1)],
            f"training step of the embedded preset, {B} x {S} tokens, ms; limit: its products")


def bench_training_memory(size):
    """Line 10, each length once; transformers with eager attention."""
    config = PHI3_MINI | {"num_layers": size["learning_layers"]}
    what, lengths = f"num_layers={size['learning_layers']}, GB", size["learned"]
    largest, peers = lengths[-1], {}
    try:
        with Worker("transformers", config=config, dtype="float32") as peer:
            peer.receive()
            for S in lengths[-2:]:
                free = memory_in("/proc/meminfo", "MemAvailable")
                # Scores grow with the square of the length: at most four times as much.
                if S // 2 in peers and 4 * peers[S // 2] > free - 4 * parameters(config):
                    peers[S] = "left out: no memory"
                else:
                    peers[S] = peer.ask("gradients", S, "eager")[1]
    except RuntimeError as problem:
        peers = dict.fromkeys(lengths, str(problem))
        if not str(problem).startswith("absent"):
            failures.append(f"transformers: {problem}")
    with Worker("ours", config=config, dtype="float32") as ours:
        ours.receive()
        found = {}
        for S in lengths:
            found[S] = ours.ask("gradients", S)[1]
            half, peer = found.get(S // 2), peers.get(S)
            row(f"10. memory of a training step of {S:,} tokens beyond the weights"
                f"{f'; limit: that of {S // 2:,}' if half else ''}, {what}",
                found[S], half, {"transformers": peer} if peer else {}, GB,
                [("limit", 2.2)] * bool(half) + [("fastest peer", 1)] * bool(peer),
                largest == S and f"memory of a training step of {S:,} tokens, GB; limit: of half")
        row(f"10. the same of {largest:,} tokens with recompute=True; limit: without, {what}",
            ours.ask("gradients", largest, True)[1], found[largest], unit=GB)


# The command line ---------------------------------------------------------------------------------

def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def print_machine():
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), "unknown")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB
    blas = np.show_config("dicts")["Build Dependencies"]["blas"]
    print(f"\n{cpu}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GB; Python "
          f"{sys.version.split()[0]}, NumPy's BLAS {blas['name']} {blas['version']}")
    print(", ".join(f"{name} {version(name)}" for name in (
        "numpy", "ml_dtypes", "keras", "keras-hub", "jax", "tensorflow", "torch", "transformers",
        "llama-cpp-python")))
    print(datetime.datetime.now().astimezone().isoformat(timespec="minutes"))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--quick", action="store_true",
        help="under two minutes: a smaller model, shorter prompts, fewer repetitions")
    add("--full", action="store_true",
        help="also load and run 3.8 billion parameters: 24 GB of memory, 8 GB of disk")
    add("--only", choices=GROUPS, help="only lines 1, 2, 3 and 5; 4; 6; 7; or 8 to 10")
    add("--directory", help="where to write random checkpoints (default: the temporary directory)")
    add("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        serve(options.worker[0], json.loads(options.worker[1]))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # temporary files go then, too
    size, start = QUICK if options.quick else WHOLE, time.perf_counter()
    print("|", " | ".join(["measurement", "ours", *PEERS, "limit", "ours / limit",
                           "ours / fastest peer", "target", "reached"]), "|\n" + "|---" * 11 + "|")
    wanted, remark = [options.only] if options.only else GROUPS, ""
    if "speed" in wanted:
        remark = bench_speed(size)
    if "long" in wanted:
        bench_long(size["long"])
    if "loading" in wanted:
        bench_loading(size["stored_layers"], size["repeats"], options.directory)
        bench_sharing(options.directory)
    if "tiny" in wanted:
        bench_tiny(size["repeats"])
    if "training" in wanted:
        bench_training_step(size)
        bench_tiny_training(size)
        bench_training_memory(size)
    if options.full:
        bench_loading(PHI3_MINI["num_layers"], 1, options.directory, whole=True)
    print("\nIn short:\n")
    titles = ["measurement", "ours", *PEERS, "limit", "ours / limit", "ours / fastest peer"]
    for cells in (titles, ["---"] * len(titles), *summary):
        print("|", " | ".join(cells), "|")
    print(f"\n{remark}" if remark else "")
    for failure in failures:
        print(f"\nFAILED {failure}")
    print_machine()
    print(f"{time.perf_counter() - start:.0f} s in all")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
