"""Times the model on the CPU: `python tests/bench_cpu.py`, `--quick` in two minutes, `--full`.

Prints one markdown table: what was measured, our time, the same work done by others, the limit and
the target. Limits are measured in the same run: the bare matrix products of the same shapes
through NumPy's `@`, or a plain read of the files. Every peer is compared with phi3_ref, with equal
weights in a small model, before it is timed.

How it is timed. Every program runs in a process of its own, this script with `--worker`, started
once. They take turns, one repetition at a time, so that a drift of the machine hits all alike, and
sleep in between. A repetition has fresh random tokens. Cells are medians with (least..most); the
first repetition of each, which compiles, does not count. Threads are each library's default.

What the products are. A layer's are query-key-value, attention output, gate-intermediate and
feed-forward output; then the logits of each sequence's last position, as generation needs them.
Prefill adds the causal half of attention's two products, per head in blocks of 128 queries with the
keys up to the block's last. Decode is one `W @ x` per weight, without attention. A weight is tried
as [out, in] and as [in, out]; the faster is the limit. Elementwise work is not in it.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import itertools
import json
import math
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PHI3_MINI = dict(vocabulary_size=32064, num_layers=32, hidden_dim=3072, intermediate_dim=8192,
                 num_query_heads=32, num_key_value_heads=32, layer_norm_epsilon=1e-5,
                 max_sequence_length=1 << 17, pretraining_sequence_length=1 << 17)
SMALL = dict(vocabulary_size=101, num_layers=3, hidden_dim=96, intermediate_dim=160,
             num_query_heads=6, num_key_value_heads=3)  # to compare the peers with
TINY = "phi3_tiny_puzzles_en"
WHOLE = dict(layers=4, prompt=512, rounds=5, long=(4096, 8192, 16384), stored_layers=4)
QUICK = dict(layers=2, prompt=256, rounds=3, long=(1024, 2048), stored_layers=1)
NEW = 8  # tokens decoded in each repetition
BATCH = 8  # prompts in a batch, which share the tokens of the single prompt
PEERS = {"KerasHub JAX": ("keras", dict(backend="jax")),
         "KerasHub TensorFlow": ("keras", dict(backend="tensorflow")),
         "KerasHub torch": ("keras", dict(backend="torch")),
         "transformers": ("transformers", dict(dtype="float32"))}
GB = 1e9
failures = []


# The programs, each in a process of its own -------------------------------------------------------
#
# A worker is a function that builds a model and returns its tasks, functions of JSON values. The
# task "run" is one repetition of B prompts of S tokens: it returns the seconds of the prefill, up
# to the last position's logits, and those of each of NEW tokens after it.

def random_tokens(V, *shape):
    return np.random.default_rng().integers(3, V, shape)


def memory(name, file="status"):
    """Returns a line of this process's memory in /proc, in bytes."""
    for line in pathlib.Path("/proc/self", file).read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def random_backbone(config, dtype):
    """Returns phi3_ref's backbone with small random weights, drawn without temporary memory."""
    import phi3_ref
    backbone, block = phi3_ref.Phi3Backbone(**config, dtype=dtype), random_block()

    def draw(shape, stddev):
        array = np.empty(math.prod(shape), backbone.weight_dtype)
        for start in range(0, array.size, block.size):
            array[start:start + block.size] = block[:array.size - start]
        return array.reshape(shape)

    backbone.weights = backbone.build_weights(draw)
    return backbone


def random_block(size=(1 << 22) - 3):
    """Returns random numbers that are repeated to fill weights: values do not change the time."""
    return np.random.default_rng(0).standard_normal(size, np.float32) * np.float32(0.02)


def time_generate(causal_lm, token_ids, new):
    """Returns the seconds of `generate` to the first token's probabilities, and of each one after.

    Args:
        causal_lm: phi3_ref's.
        token_ids: [B, S], or a list of B prompts of different lengths.
        new: int, how many tokens the longest prompt gets after its first one.
    """
    import phi3_ref
    lengths, times = np.array([[len(row)] for row in token_ids]), []
    mask = np.arange(lengths.max() + 1 + new) < lengths
    ids = np.zeros(mask.shape, np.int64)
    ids[mask] = np.concatenate(list(token_ids))

    class Clock(phi3_ref.GreedySampler):
        def get_next_token(self, probabilities):
            times.append(time.perf_counter())
            return super().get_next_token(probabilities)

    causal_lm.compile(Clock())
    start = time.perf_counter()
    causal_lm.generate({"token_ids": ids, "padding_mask": mask}, stop_token_ids=None)
    return times[0] - start, np.diff(times).tolist()


def worker_ours(config, dtype):
    import phi3_ref
    causal_lm = phi3_ref.Phi3CausalLM(random_backbone(config, dtype))
    V = config["vocabulary_size"]

    def run(B, S):
        return time_generate(causal_lm, random_tokens(V, B, S), NEW)

    def ragged(B, S):
        """Times the hidden states of a padded batch without and with a mask, and `generate`."""
        lengths = np.linspace(S // 8, S, B).astype(int)
        inputs = {"token_ids": random_tokens(V, B, S)}
        masked = {**inputs, "padding_mask": np.arange(S) < lengths[:, None]}
        prompts = [row[:n] for row, n in zip(inputs["token_ids"], lengths, strict=True)]
        seconds = []
        for call in (lambda: causal_lm.backbone(inputs), lambda: causal_lm.backbone(masked),
                     lambda: time_generate(causal_lm, inputs["token_ids"], 0),
                     lambda: time_generate(causal_lm, prompts, 0)):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        return seconds

    return {"run": run, "ragged": ragged}


def worker_long(config):
    """One long prompt: the seconds of all and of attention, and memory beyond weights and cache."""
    import phi3_ref
    causal_lm, seconds = phi3_ref.Phi3CausalLM(random_backbone(config, "float32")), []
    attention = phi3_ref.attention

    def timed_attention(*args, **kwargs):
        start = time.perf_counter()
        result = attention(*args, **kwargs)
        seconds.append(time.perf_counter() - start)
        return result

    phi3_ref.attention = timed_attention

    def run(S):
        seconds.clear()
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        total, _ = time_generate(causal_lm, random_tokens(config["vocabulary_size"], 1, S), 0)
        D, layers = config["hidden_dim"], config["num_layers"]
        cache = layers * 2 * (S + 1) * D * 4  # K is H
        weights = causal_lm.backbone.count_params() * 4
        assert len(seconds) == layers, "attention was not called once per layer"
        return total, sum(seconds), memory("VmHWM") - weights - cache

    return {"run": run}


def worker_products(config):
    """The limit: the products alone."""
    D, F, V = config["hidden_dim"], config["intermediate_dim"], config["vocabulary_size"]
    H, C, L = config["num_query_heads"], D // config["num_query_heads"], config["num_layers"]
    shapes = [(3 * D, D), (D, D), (2 * F, D), (D, F)] * L + [(V, D)]
    block = random_block()
    weights = [np.resize(block, shape) for shape in shapes]

    def linear(rows, last):
        """Returns the seconds in both layouts; the weights' memory is read as either."""
        inputs = {(rows, n): np.resize(block, (rows, n)) for n in (D, F)}
        inputs[last, D] = np.resize(block, (last, D))
        seconds = []
        for out_in in (True, False):
            seconds.append(0.0)
            for i, weight in enumerate(weights):
                n = last if i == len(weights) - 1 else rows
                x = inputs[n, weight.shape[1]]
                w = weight.T if out_in else weight.reshape(weight.shape[::-1])
                start = time.perf_counter()
                if n > 1:
                    x @ w
                elif out_in:
                    weight @ x[0]
                else:
                    x[0] @ w
                seconds[-1] += time.perf_counter() - start
        return seconds

    def attention(S, heads=H):
        """Returns the seconds of one layer's products, measured on some of the heads."""
        query, key, value = np.resize(block, (3, heads, S, C))
        scores = np.resize(block, (128, S))
        start = time.perf_counter()
        for head in range(heads):
            for first in range(0, S, 128):
                last = min(first + 128, S)
                query[head, first:last] @ key[head, :last].T
                scores[:last - first, :last] @ value[head, :last]
        return (time.perf_counter() - start) * H / heads

    def run(B, S):
        causal = L * sum(attention(S) for _ in range(B))
        return [x + causal for x in linear(B * S, B)], [linear(1, 1) for _ in range(NEW)]

    def long(rows, S):
        """Returns the seconds per token of the linear products and of attention's."""
        return min(linear(rows, 1)) / rows, L * attention(S, min(H, 4)) / S

    return {"run": run, "long": long}


def worker_tiny(new):
    """The embedded preset: the seconds per decoded token of ours, and of its products alone."""
    import phi3_ref
    causal_lm = phi3_ref.Phi3CausalLM.from_preset(TINY)
    backbone = causal_lm.backbone
    V, layers = backbone.vocabulary_size, backbone.num_layers
    H, K, C = backbone.num_query_heads, backbone.num_key_value_heads, backbone.head_dim
    matrices = [array.T for _, array in backbone.huggingface_tensors(backbone.weights)
                if array.ndim == 2][1:]  # but for the embedding, which is looked up
    rows = {len(matrix): np.ones((1, len(matrix)), np.float32) for matrix in matrices}
    query, key = np.ones((K, H // K, C), np.float32), np.ones((K, new // 2 + 4, C), np.float32)

    def run():
        seconds = time_generate(causal_lm, random_tokens(V, 1, 4), new)[1]
        start = time.perf_counter()
        for _ in range(new):
            for matrix in matrices:
                rows[len(matrix)] @ matrix
            for _ in range(layers):
                query @ key.transpose(0, 2, 1) @ key
        return statistics.median(seconds), (time.perf_counter() - start) / new

    return {"run": run}


def check_peer(backbone, prefill, decode):
    """Asserts that a peer's logits, after a prompt and after NEW tokens, are phi3_ref's."""
    import references

    import phi3_ref
    causal_lm = phi3_ref.Phi3CausalLM(backbone)
    causal_lm.compile("greedy")
    S = 150  # more than one of attention's blocks
    prompt = random_tokens(backbone.vocabulary_size, 1, S)
    ids = np.pad(prompt, ((0, 0), (0, NEW)))
    ids = causal_lm.generate({"token_ids": ids, "padding_mask": np.arange(S + NEW)[None] < S},
                             stop_token_ids=None)["token_ids"]
    for part, theirs in ((prompt, prefill(prompt)), (ids, decode(prompt))):
        error = references.relative_error(theirs, causal_lm({"token_ids": part})[:, -1])
        assert error <= references.TOLERANCE["float32"], f"logits differ from ours by {error:.1e}"


def worker_keras(config, backend):
    """KerasHub: prompts through its backbone, new tokens through its cache, compiled as it does."""
    os.environ["KERAS_BACKEND"] = backend
    import keras
    import keras_hub
    import references
    ops = keras.ops

    def compiled(function, model):
        """Returns `function` as KerasHub's `make_generate_function` would compile it."""
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

        return lambda *args: stateless([v.value for v in model.variables], *args)

    def functions(backbone, S):
        """Returns the functions of a prompt [B, S] and of the NEW tokens after it."""
        causal_lm = keras_hub.models.Phi3CausalLM(backbone, preprocessor=None)

        def prefill(token_ids, padding_mask):
            x = backbone({"token_ids": token_ids, "padding_mask": padding_mask})
            return backbone.token_embedding(x[:, -1], reverse=True)

        def decode(token, logits, cache):
            def step(i, state):
                token, _, cache = state
                logits, _, cache = causal_lm.call_with_cache(token, cache, S + i)
                return ops.cast(ops.argmax(logits, -1), "int32"), logits[:, -1], cache

            return ops.fori_loop(0, NEW, step, (token, logits, cache))

        return causal_lm, compiled(prefill, backbone), compiled(decode, backbone)

    def empty_cache(backbone, B, S):
        heads = backbone.num_key_value_heads
        shape = B, backbone.num_layers, 2, S + NEW, heads, backbone.hidden_dim // (
            backbone.num_query_heads)
        return ops.zeros(shape)

    def tensors(token_ids):
        return ops.convert_to_tensor(token_ids, "int32"), ops.ones(token_ids.shape, "int32")

    small = references.keras_backbone(SMALL)
    causal_lm, prefill, decode = functions(small, 150)

    def decode_after(prompt):
        cache = causal_lm.call_with_cache(tensors(prompt)[0], empty_cache(small, 1, 150), 0)[2]
        logits = prefill(*tensors(prompt))
        token = ops.cast(ops.argmax(logits, -1), "int32")[:, None]
        return ops.convert_to_numpy(decode(token, logits, cache)[1])

    check_peer(references.ours_like(small),
               lambda prompt: ops.convert_to_numpy(prefill(*tensors(prompt))), decode_after)

    model = keras_hub.models.Phi3Backbone(**config, dtype="float32")
    prepared = {}

    def run(B, S):
        if S not in prepared:
            prepared[S] = *functions(model, S)[1:], empty_cache(model, B, S)
        prefill, decode, cache = prepared[S]
        inputs = tensors(random_tokens(config["vocabulary_size"], B, S))
        start = time.perf_counter()
        logits = prefill(*inputs)
        ops.convert_to_numpy(logits)
        middle = time.perf_counter()
        _, logits, cache = decode(inputs[0][:, -1:], logits, cache)
        ops.convert_to_numpy(logits)
        end = time.perf_counter()
        prepared[S] = prefill, decode, cache
        return middle - start, [(end - middle) / NEW]

    return {"run": run}


def worker_transformers(config, dtype):
    """Hugging Face's transformers as its `generate` runs it: eager, with a growing cache."""
    import references
    import torch
    import transformers

    import phi3_ref

    def step(model, token_ids, cache):
        with torch.inference_mode():
            return model(input_ids=torch.as_tensor(token_ids), past_key_values=cache,
                         use_cache=True, logits_to_keep=1).logits[:, -1]

    def decode_after(prompt):
        cache = transformers.DynamicCache(config=small.config)
        logits = step(small, prompt, cache)
        for _ in range(NEW):
            logits = step(small, logits.argmax(-1, keepdim=True), cache)
        return logits.numpy()

    small = references.transformers_model(dict(max_position_embeddings=4096,
                                               original_max_position_embeddings=4096))
    small.set_attn_implementation("sdpa")
    with tempfile.TemporaryDirectory() as directory:
        references.write_huggingface(small, directory)
        check_peer(phi3_ref.Phi3Backbone.from_preset(directory),
                   lambda prompt: step(small, prompt, None).numpy(), decode_after)
    torch.set_default_dtype(getattr(torch, dtype))
    model = transformers.Phi3ForCausalLM(transformers.Phi3Config(
        vocab_size=config["vocabulary_size"], num_hidden_layers=config["num_layers"],
        hidden_size=config["hidden_dim"], intermediate_size=config["intermediate_dim"],
        num_attention_heads=config["num_query_heads"], pad_token_id=0,
        num_key_value_heads=config["num_key_value_heads"])).eval()

    def run(B, S):
        cache, times = transformers.DynamicCache(config=model.config), [time.perf_counter()]
        logits = step(model, random_tokens(config["vocabulary_size"], B, S), cache)
        for _ in range(NEW):
            times.append(time.perf_counter())
            logits = step(model, logits.argmax(-1, keepdim=True), cache)
        times.append(time.perf_counter())
        first, *others = np.diff(times).tolist()
        return first, others

    return {"run": run}


def serve(name, options):
    """Runs a worker: a task in, its result out, one line of JSON each."""
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print is no answer

    def answer(function, *args):
        try:
            result = {"result": function(*args)}
        except ModuleNotFoundError as error:
            result = {"error": f"absent: {error.name}"}
        except Exception as error:
            traceback.print_exc()
            result = {"error": " ".join(f"failed: {type(error).__name__} {error}".split())[:100]}
        print(json.dumps(result), file=pipe, flush=True)

    tasks = {}
    answer(lambda: tasks.update(globals()[f"worker_{name}"](**options)))
    for line in sys.stdin:
        task, args = json.loads(line)
        answer(tasks[task], *args)


# Files --------------------------------------------------------------------------------------------

def worker_write(directory, config, form, dtype):
    """Writes a random checkpoint tensor by tensor, in Keras's or Hugging Face's format."""
    import h5py

    import phi3_ref
    directory = pathlib.Path(directory)
    backbone = phi3_ref.Phi3Backbone(**config, dtype=dtype)
    block = random_block().astype(backbone.weight_dtype)
    shapes = backbone.weight_shapes()

    def write():
        if form == "keras":
            with h5py.File(directory / "model.weights.h5", "w") as file:
                for name, array in backbone.keras_variables(shapes):
                    dataset = file.create_dataset(name, data=np.resize(block, array.shape))
                    if dtype == "bfloat16":
                        dataset.attrs["dtype"] = dtype
            content = {"registered_name": "keras_hub>Phi3Backbone",
                       "config": backbone.get_config()}
        else:
            write_shards()
            content = {
                "model_type": "phi3", "vocab_size": backbone.vocabulary_size,
                "num_hidden_layers": backbone.num_layers, "hidden_size": backbone.hidden_dim,
                "intermediate_size": backbone.intermediate_dim, "rms_norm_eps": 1e-5,
                "num_attention_heads": backbone.num_query_heads,
                "num_key_value_heads": backbone.num_key_value_heads}
        (directory / "config.json").write_text(json.dumps(content))

    def write_shards(limit=2 << 30):
        shards, weight_map = [[]], {}
        for name, array in backbone.huggingface_tensors(shapes):
            if sum(a.nbytes for _, a in shards[-1]) + array.nbytes > limit:
                shards.append([])
            shards[-1].append((name, array))
        for i, shard in enumerate(shards):
            file, offset, header = f"model-{i + 1:05}-of-{len(shards):05}.safetensors", 0, {}
            for name, array in shard:
                header[name] = {"dtype": "BF16" if dtype == "bfloat16" else "F32",
                                "shape": array.shape,
                                "data_offsets": [offset, offset + array.nbytes]}
                offset, weight_map[name] = offset + array.nbytes, file
            text = json.dumps(header).encode()
            text += b" " * (-len(text) % 64 + 56)  # the tensors begin at a multiple of 64
            with open(directory / file, "wb") as out:
                out.write(len(text).to_bytes(8, "little") + text)
                for _, array in shard:
                    np.resize(block, array.shape).tofile(out)
        index = {"weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))

    return {"write": write}


def worker_load(directory, dtype):
    """Loads a checkpoint: the seconds, and the peak of memory beyond the model's own bytes."""
    import phi3_ref
    loaded = []

    def load():
        start = time.perf_counter()
        loaded.append(phi3_ref.Phi3CausalLM.from_preset(directory, dtype=dtype))
        seconds = time.perf_counter() - start
        backbone = loaded[0].backbone
        return seconds, memory("VmHWM") - backbone.count_params() * backbone.weight_dtype.itemsize

    def generate(S, new):
        """Returns the seconds, and the peak of memory of all so far."""
        ids = random_tokens(loaded[0].backbone.vocabulary_size, 1, S)
        return *time_generate(loaded[0], ids, new), memory("VmHWM")

    def shares():
        """Touches every weight; returns this process's share of its memory, and the memory."""
        backbone = loaded[0].backbone
        for _, array in backbone.huggingface_tensors(backbone.weights):
            array.sum()
        return memory("Pss", "smaps_rollup"), memory("Rss", "smaps_rollup")

    return {"load": load, "generate": generate, "shares": shares, "touch": lambda: shares() and 0}


def worker_plain(directory, dtype):
    """The limit of loading: every byte read once, and converted where the dtype asks for it."""

    def read():
        start, kept = time.perf_counter(), []
        for path in pathlib.Path(directory).glob("model*"):
            if path.suffix == ".json":
                continue
            count = path.stat().st_size // 2
            with open(path, "rb", buffering=0) as file:
                if dtype == "bfloat16":
                    kept.append(np.fromfile(file, np.uint16, count))
                    continue
                kept.append(np.empty(count, np.uint32))
                piece, done = np.empty(1 << 17, np.uint16), 0
                while size := file.readinto(piece) // 2:  # bfloat16 is float32's upper half
                    np.left_shift(piece[:size], 16, out=kept[-1][done:done + size],
                                  dtype=np.uint32)
                    done += size
        return time.perf_counter() - start

    return {"read": read}


# Taking turns -------------------------------------------------------------------------------------

class Worker:
    """A worker's process. Its answers are results, or say in words what went wrong."""

    def __init__(self, name, **options):
        # Idle threads must not spin while another program has its turn.
        environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0",
                                    "TF_CPP_MIN_LOG_LEVEL": "3"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", name, json.dumps(options)], env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            stderr=None if os.environ.get("BENCH_VERBOSE") else subprocess.DEVNULL)
        self.problem = None

    def receive(self):
        if self.problem is None:
            line = self.process.stdout.readline()
            answer = json.loads(line) if line else {
                "error": f"failed: the process ended, {self.process.wait()}"}
            self.problem = answer.get("error")
        return self.problem or answer["result"]

    def send(self, task, *args):
        if self.problem is None:
            self.process.stdin.write(json.dumps([task, args]) + "\n")
            self.process.stdin.flush()

    def ask(self, task, *args):
        self.send(task, *args)
        return self.receive()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def free_memory():
    for line in pathlib.Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024


def start(stack, programs):
    """Returns {name: Worker} of {name: (worker, options)}, those that memory is left for."""
    workers, taken = {}, 0
    for name, (worker, options) in programs.items():
        itemsize = 2 if "16" in options.get("dtype", "") else 4
        need = 1.5 * itemsize * parameters(options["config"])
        if taken + need > free_memory():
            print(f"{name} left out: {need / GB:.1f} GB of memory needed", file=sys.stderr)
            continue
        taken += need
        workers[name] = stack.enter_context(Worker(worker, **options))
    for worker in workers.values():
        worker.receive()
    return workers


def take_turns(workers, rounds, task, *args):
    """Returns {name: results of the rounds, or what went wrong}; a first round does not count."""
    for worker in workers.values():
        worker.send(task, *args)
    for worker in workers.values():
        worker.receive()
    found = {name: [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            found[name].append(worker.ask(task, *args))
    return {name: workers[name].problem or results for name, results in found.items()}


def parameters(config):
    D, F, V = config["hidden_dim"], config["intermediate_dim"], config["vocabulary_size"]
    return config["num_layers"] * (4 * D + 3 * F) * D + 2 * V * D


# The table ----------------------------------------------------------------------------------------

COLUMNS = ["what", "ours", *PEERS, "limit", "ours / limit", "ours / fastest peer", "target",
           "reached"]


def row(what, ours, peers=None, limit=None, unit=1, targets=()):
    """Prints one measurement.

    `ours`, `limit` and the peers are samples, or say what is wrong; `unit` is what they are divided
    by. `targets` are (what "ours" is compared with, the most it may be in its unit or multiples).
    """
    if isinstance(ours, str) and not ours.startswith("absent"):
        failures.append(f"{what}: {ours}")
    peers = peers or {}

    def middle(samples):
        known = samples and not isinstance(samples, str)
        return statistics.median(samples) / unit if known else None

    def text(samples):
        if middle(samples) is None:
            return samples or ""
        spread = f" ({min(samples) / unit:.3g}..{max(samples) / unit:.3g})"
        return f"{middle(samples):.3g}" + spread * (len(samples) > 1)

    fastest = min(filter(None, map(middle, peers.values())), default=None)
    others = {"limit": middle(limit), "fastest peer": fastest, "": 1}
    ratios = {name: middle(ours) / other if middle(ours) and other else None
              for name, other in others.items()}
    reached = ["not measured" if ratios[name] is None else "yes" if ratios[name] <= most else "NO"
               for name, most in targets]
    print("|", " | ".join([
        what, text(ours), *(text(peers.get(name)) for name in PEERS), text(limit),
        *(f"{ratios[name]:.2f}" if ratios[name] else "" for name in ("limit", "fastest peer")),
        ", ".join(f"<= {most:g}" + f" x {name}" * bool(name) for name, most in targets),
        ", ".join(reached)]), "|", flush=True)


def part(results, *path):
    """Returns one entry of every result, or the words that stand in their place."""
    if isinstance(results, str) or results is None:
        return results
    for key in path:
        results = [result[key] for result in results]
    return results


def every(results):
    """Returns the decoded tokens' seconds of all rounds."""
    found = part(results, 1)
    return found if isinstance(found, str) or found is None else list(itertools.chain(*found))


def faster(layouts):
    """Returns the samples of the faster layout, of samples [seconds as [out, in], as [in, out]]."""
    return min((part(layouts, i) for i in (0, 1)), key=statistics.median)


def bench_speed(size):
    """Lines 1, 2, 3 and 5; returns a note."""
    layers, S, rounds = size["layers"], size["prompt"], size["rounds"]
    config = dict(PHI3_MINI, num_layers=layers)
    with contextlib.ExitStack() as stack:
        workers = start(stack, {"ours": ("ours", dict(config=config, dtype="float32")),
                                "products": ("products", dict(config=config))})
        with contextlib.ExitStack() as peer_stack:
            peers = start(peer_stack, {name: (worker, dict(config=config, **options))
                                       for name, (worker, options) in PEERS.items()})
            found = take_turns(workers | peers, rounds, "run", 1, S)
        ours, products = found["ours"], found["products"]
        peers = {name: found.get(name, "left out: memory") for name in PEERS}
        prefills, decodes = part(products, 0), every(products)
        row(f"1. prefill, {layers} layers, {S} tokens, float32, s", part(ours, 0),
            {name: part(results, 0) for name, results in peers.items()}, faster(prefills),
            targets=[("limit", 1.1), ("fastest peer", 1)])
        row(f"2. decode after them, {layers} layers, float32, ms per token", every(ours),
            {name: every(results) for name, results in peers.items()}, faster(decodes), 1e-3,
            [("limit", 1.1), ("fastest peer", 0.67)])
        bench_batch(workers, BATCH, S // BATCH, rounds)
        bench_16_bits(stack, workers["ours"], config, S, rounds)
    as_out_in, as_in_out = (
        f"prefill {statistics.median(part(prefills, i)):.3g} s, "
        f"decode {statistics.median(part(decodes, i)) * 1e3:.3g} ms per token" for i in (0, 1))
    return f"Products with weights as [out, in]: {as_out_in}; as [in, out]: {as_in_out}."


def bench_batch(workers, B, S, rounds):
    found = take_turns(workers, rounds, "run", B, S)
    row(f"3. prefill, {B} prompts of {S} tokens, s", part(found["ours"], 0),
        limit=faster(part(found["products"], 0)), targets=[("limit", 1.15)])
    ragged = take_turns({"ours": workers["ours"]}, rounds, "ragged", B, S)["ours"]
    for i, call in ((0, "backbone"), (2, "generate, to the longest prompt's first token")):
        row(f"3. ragged: prompts of {S // 8} to {S} tokens, padded; {call}; limit: all of {S}, s",
            part(ragged, i + 1), limit=part(ragged, i), targets=[("limit", 1.05)])


def bench_16_bits(stack, ours, config, S, rounds):
    programs = {dtype: ("ours", dict(config=config, dtype=dtype))
                for dtype in ("bfloat16", "float16")}
    programs["transformers"] = "transformers", dict(config=config, dtype="bfloat16")
    found = take_turns({"float32": ours} | start(stack, programs), rounds, "run", 1, S)
    for dtype in ("bfloat16", "float16"):
        peers = {"transformers": found.get("transformers")} if dtype == "bfloat16" else {}
        row(f"5. prefill, {dtype}; limit: ours in float32, s", part(found.get(dtype), 0),
            {name: part(results, 0) for name, results in peers.items()}, part(found["float32"], 0))
        row(f"5. decode, {dtype}; limit: ours in float32, ms per token", every(found.get(dtype)),
            {name: every(results) for name, results in peers.items()}, every(found["float32"]),
            1e-3)


def bench_long(size):
    """Line 4, each length once."""
    config = dict(PHI3_MINI, num_layers=2)
    with contextlib.ExitStack() as stack:
        workers = start(stack, {"ours": ("long", dict(config=config)),
                                "products": ("products", dict(config=config))})
        workers["ours"].ask("run", 256)
        first = None
        for S in size["long"]:
            ours = workers["ours"].ask("run", S)
            linear, attention = workers["products"].ask("long", min(S, 4096), S)
            if isinstance(ours, str):
                row(f"4. prefill of {S:,} tokens", ours)
                continue
            total, attending, beyond = ours
            other = (total - attending) / S
            first = first or other
            row(f"4. prefill of {S:,} tokens, 2 layers: ms per token without attention; target: "
                f"that of {size['long'][0]:,}", [other], limit=[linear], unit=1e-3,
                targets=[("", 1.1 * first * 1e3)])
            row(f"4. prefill of {S:,} tokens, 2 layers: attention, ms per token", [attending / S],
                limit=[attention], unit=1e-3)
            row(f"4. prefill of {S:,} tokens, 2 layers: memory beyond weights and cache, GB",
                [beyond], unit=GB, targets=[("", 3)])


def bench_loading(layers, rounds, directory, full=False):
    """Line 6: both formats, one after the other; with `full`, the loaded model also runs."""
    config = dict(PHI3_MINI, num_layers=layers)
    size = 2 * parameters(config) / GB
    for form in ("huggingface", "keras"):
        with checkpoint(directory, config, form, "bfloat16") as path:
            for dtype in ("float32", "bfloat16"):
                plain, ours, ran = [], [], []
                for _ in range(rounds):
                    with Worker("plain", directory=path, dtype=dtype) as worker:
                        worker.receive()
                        plain.append(worker.ask("read"))
                    with Worker("load", directory=path, dtype=dtype) as worker:
                        worker.receive()
                        ours.append(worker.ask("load"))
                        if full:
                            ran.append(worker.ask("generate", 16, 4))
                what = f"6. loading {size:.1f} GB of bfloat16, {form}, as {dtype}"
                ours, ran = ([next((x for x in y if isinstance(x, str)), None) or y
                              for y in (ours, ran)])
                row(f"{what}; limit: reading and converting, s", part(ours, 0), limit=plain)
                row(f"{what}: peak memory beyond the model, GB", part(ours, 1), unit=GB,
                    targets=[("", 1)])
                if full:
                    row(f"   then a prefill of 16 tokens, {dtype}, s", part(ran, 0))
                    row(f"   then 4 tokens, {dtype}, s per token", every(ran))
                    row(f"   peak memory of all that, {dtype}, GB", part(ran, 2), unit=GB)


def bench_sharing(directory):
    """Line 6: two processes with one float32 file."""
    with (checkpoint(directory, dict(PHI3_MINI, num_layers=1), "huggingface", "float32") as path,
          Worker("load", directory=path, dtype="float32") as one,
          Worker("load", directory=path, dtype="float32") as two):
        for worker in (one, two):
            worker.receive()
            worker.ask("load")
        one.ask("shares")
        found = two.ask("shares")
        found = found if isinstance(found, str) else [found]
        row("6. second process on a float32 safetensors file: its share of memory; limit: its "
            "memory, GB", part(found, 0), limit=part(found, 1), unit=GB, targets=[("limit", 0.6)])


@contextlib.contextmanager
def checkpoint(directory, config, form, dtype):
    """Writes random files to a directory of their own, and removes it at the end."""
    with tempfile.TemporaryDirectory(dir=directory) as path:
        need = parameters(config) * (2 if dtype == "bfloat16" else 4)
        if shutil.disk_usage(path).free < need + GB:
            sys.exit(f"{path} has no {need / GB:.1f} GB left")
        with Worker("write", directory=path, config=config, form=form, dtype=dtype) as worker:
            worker.receive()
            problem = worker.ask("write")
            if problem:
                sys.exit(f"writing {form}: {problem}")
        yield path


def bench_tiny(rounds):
    """Line 7."""
    with Worker("tiny", new=31) as worker:
        worker.receive()
        found = take_turns({"tiny": worker}, 5 * rounds, "run")["tiny"]
    overhead = found if isinstance(found, str) else [ours - alone for ours, alone in found]
    row("7. embedded preset, decode, ms per token", part(found, 0), limit=part(found, 1), unit=1e-3)
    row("7. embedded preset, decode: Python's overhead, ms per token", overhead, unit=1e-3,
        targets=[("", 0.7)])
    code = ("import time, numpy; start = time.perf_counter(); import phi3_ref; "
            "print(time.perf_counter() - start)")
    seconds = [float(subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, text=True,
                                    capture_output=True).stdout) for _ in range(rounds + 1)]
    row("7. import phi3_ref, beyond NumPy, s", seconds[1:], targets=[("", 0.3)])


# The command line ---------------------------------------------------------------------------------

def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def print_machine():
    information = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in information
                  if line.startswith("model name")), "unknown")
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    blas = np.show_config("dicts")["Build Dependencies"]["blas"]
    print(f"\n{model}, {len(os.sched_getaffinity(0))} cores, {total / GB:.0f} GB; Python "
          f"{sys.version.split()[0]}, {blas['name']} {blas['version']}")
    print(", ".join(f"{name} {version(name)}" for name in (
        "numpy", "ml_dtypes", "keras", "keras-hub", "jax", "tensorflow", "torch", "transformers")))
    print(datetime.datetime.now().astimezone().isoformat(timespec="minutes"))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="smaller models, shorter prompts, fewer rounds")
    add("--full", action="store_true",
        help="load and run 3.8 billion parameters, too: 24 GB of memory, 8 GB of disk")
    add("--directory", help="where to write random checkpoints (default: a temporary one)")
    add("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        serve(options.worker[0], json.loads(options.worker[1]))
        return 0
    size, start = QUICK if options.quick else WHOLE, time.perf_counter()
    print("|", " | ".join(COLUMNS), "|\n" + "|---" * len(COLUMNS) + "|")
    note = bench_speed(size)
    bench_long(size)
    bench_loading(size["stored_layers"], size["rounds"], options.directory)
    bench_sharing(options.directory)
    if options.full:
        bench_loading(PHI3_MINI["num_layers"], 1, options.directory, full=True)
    bench_tiny(size["rounds"])
    print(f"\n{note}")
    for failure in failures:
        print(f"\nFAILED {failure}")
    print_machine()
    print(f"{time.perf_counter() - start:.0f} s in all")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
