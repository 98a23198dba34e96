"""Kills, full disks, Ctrl-C, threads, and runs of 20,000 tokens: nothing is lost, nothing grows."""

import concurrent.futures
import functools
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time
import warnings

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

import phi3_ref

TINY = "phi3_tiny_puzzles_en"
CONFIG = dict(
    vocabulary_size=64, num_layers=2, hidden_dim=24, intermediate_dim=40, num_query_heads=6,
    num_key_value_heads=3,
)
ROOT = pathlib.Path(phi3_ref.__file__).parent
QUESTIONS = [f"What is {a} + {b}?" for a, b in [(1, 2), (34, 5), (67, 890), (345, 278)]]
QUESTIONS += ["Reverse planet", "Sort planet", "Reverse abc", "Sort zebra"]


def files_below(directory):
    """The content of every file, by relative path."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in pathlib.Path(directory).rglob("*") if path.is_file()
    }


def tiny(**kwargs):
    """The embedded model, greedy."""
    causal_lm = phi3_ref.Phi3CausalLM.from_preset(TINY, **kwargs)
    causal_lm.compile(sampler="greedy")
    return causal_lm


def prompts():
    """The questions in the form that the model was trained on."""
    tokenizer = phi3_ref.Phi3Tokenizer.from_preset(TINY)
    return [tokenizer.apply_chat_template([dict(role="user", content=question)])
            for question in QUESTIONS]


# Saving: killed, or without room ------------------------------------------------------------------

SAVER = """
import sys
import numpy as np
import phi3_ref

kind, directory = sys.argv[1:]
config = dict(vocabulary_size=256, num_layers=2, hidden_dim=256, intermediate_dim=512,
              num_query_heads=4, num_key_value_heads=2)
model = phi3_ref.Phi3Backbone(**config)
shapes = [weight.shape for weight in model.get_weights()]
value = 0
while True:
    value += 1
    model.set_weights([np.full(shape, value, np.float32) for shape in shapes])
    if kind == "trace":
        trace = phi3_ref.Trace()
        trace.update({f"tensor {i}": weight for i, weight in enumerate(model.get_weights())})
        trace.save(f"{directory}/trace.safetensors")
    else:
        target = directory + ("/preset" if kind == "over" else f"/{value}")
        model.save_to_preset(target)
    print(value, flush=True)
"""


@pytest.mark.parametrize("kind", ["over", "new", "trace"])
def test_a_save_that_is_killed_leaves_whole_files(kind, tmp_path):
    """SIGKILL at random times: what is there afterwards is what one save wrote, old or new."""
    rng, values = random.Random(kind), []
    for attempt in range(10):
        directory = tmp_path / str(attempt)
        directory.mkdir()
        with subprocess.Popen([sys.executable, "-c", SAVER, kind, directory], cwd=ROOT, text=True,
                              stdout=subprocess.PIPE) as saver:
            saver.stdout.readline()  # one save is complete
            time.sleep(rng.uniform(0, 0.1))
            saver.send_signal(signal.SIGKILL)
            last = int((["1"] + saver.stdout.read().split())[-1])
        if kind == "trace":
            saved = list(phi3_ref.Trace.load(directory / "trace.safetensors").values())
        else:
            presets = [path for path in directory.iterdir() if not path.name.startswith(".")]
            newest = max(presets, key=lambda path: 0 if kind == "over" else int(path.name))
            for preset in presets:  # KerasHub's own files, each whole
                phi3_ref.Phi3Backbone.from_preset(preset)
            saved = phi3_ref.Phi3Backbone.from_preset(newest).get_weights()
        found = {float(value) for weight in saved for value in np.unique(weight)}
        assert len(found) == 1 and found <= {last, last + 1}
        values.append((found, last))
    assert len(values) == 10


FULL_DISK = """
import resource, signal, sys
import phi3_ref

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write beyond the limit is an OSError
causal_lm = phi3_ref.Phi3CausalLM.from_preset("phi3_tiny_puzzles_en")
trace = phi3_ref.Trace.record(causal_lm, "What is 1 + 2?")
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
for save in (causal_lm.save_to_preset, causal_lm.export_to_transformers,
             lambda path: trace.save(path + "/trace.safetensors")):
    try:
        save(sys.argv[1])
    except Exception as error:
        print("OSError" if isinstance(error, OSError) else repr(error))
    else:
        print("saved")
"""


@pytest.mark.parametrize("limit", [0, 100, 5_000, 200_000])
@pytest.mark.parametrize("there", [True, False])
def test_a_full_disk_is_an_oserror_and_leaves_what_was_there(limit, there, tmp_path):
    """No file may grow beyond `limit` bytes: the system refuses the write as a full disk does."""
    directory = tmp_path / "preset"
    if there:
        tiny().save_to_preset(directory)
    before = files_below(tmp_path)
    run = subprocess.run([sys.executable, "-c", FULL_DISK, directory, str(limit)], cwd=ROOT,
                         text=True, capture_output=True, check=True)
    assert run.stdout.split() == ["OSError"] * 3, run.stdout + run.stderr
    assert files_below(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["preset"] * there
    assert "Exception ignored" not in run.stderr


# Ctrl-C -------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def ctrl_c_interrupts():
    """As in a terminal: what a shell starts in the background ignores the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt_at(monkeypatch, owner, name, count):
    """Press Ctrl-C in the `count`th call of `owner.name`."""
    function, calls = getattr(owner, name), []

    @functools.wraps(function)
    def interrupted(*args, **kwargs):
        calls.append(name)
        if len(calls) == count:
            signal.raise_signal(signal.SIGINT)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, interrupted)


@pytest.mark.parametrize("count", [1, 7, 60, 120])
@pytest.mark.parametrize("sampler", ["greedy", "beam"])
def test_ctrl_c_in_generate_leaves_the_model_usable(sampler, count, monkeypatch):
    """A forward pass makes 17 matrix products: the 120th is one of the eighth."""
    causal_lm, texts = tiny(), prompts()
    causal_lm.compile(sampler=sampler)
    expected = causal_lm.generate(texts, max_length=60)
    with monkeypatch.context() as patch:
        interrupt_at(patch, phi3_ref, "linear", count)
        with pytest.raises(KeyboardInterrupt):
            causal_lm.generate(texts, max_length=60)
    assert causal_lm.generate(texts, max_length=60) == expected


@pytest.mark.parametrize("count", [1, 20, 60])
def test_ctrl_c_in_stream_leaves_the_model_usable(count, monkeypatch):
    """What was yielded before it was the answer's beginning; a new stream gives it whole."""
    causal_lm, text = tiny(), prompts()[3]
    expected, pieces = "".join(causal_lm.stream(text)), []
    with monkeypatch.context() as patch:
        interrupt_at(patch, phi3_ref, "linear", count)
        with pytest.raises(KeyboardInterrupt):
            for piece in causal_lm.stream(text):
                pieces.append(piece)
    assert expected.startswith("".join(pieces))
    assert "".join(causal_lm.stream(text)) == expected


@pytest.mark.parametrize("count", [1, 4, 9])
@pytest.mark.parametrize("function", ["decoder_layer", "decoder_layer_backward", "upcast"])
def test_ctrl_c_in_fit_leaves_the_model_usable(function, count, monkeypatch):
    """Wherever it comes: the weights are those after some number of whole steps, and go on."""
    def learner():
        causal_lm = tiny(seed=1)
        causal_lm.preprocessor.sequence_length = 20
        causal_lm.compile(phi3_ref.AdamW(1e-3), sampler="greedy")
        return causal_lm

    interrupted, whole = learner(), learner()
    with monkeypatch.context() as patch:
        # Within an update, `upcast` is called for each weight; else hundreds of times in a pass.
        interrupt_at(patch, phi3_ref, function, count * (60 if function == "upcast" else 1))
        with pytest.raises(KeyboardInterrupt):
            interrupted.fit(QUESTIONS, batch_size=2, epochs=3, shuffle=False)
    steps = interrupted.optimizer.iterations
    assert 0 <= steps < 12
    if steps:
        whole.fit(QUESTIONS * 3, batch_size=2, steps_per_epoch=steps, shuffle=False)
    for causal_lm in (interrupted, whole):
        causal_lm.fit(QUESTIONS[:2])
    for found, expected in zip(
            interrupted.backbone.get_weights(), whole.backbone.get_weights(), strict=True):
        np.testing.assert_array_equal(found, expected)
    prompt = prompts()[0]
    assert interrupted.generate(prompt, max_length=40) == whole.generate(prompt, max_length=40)


FITTER = """
import signal, sys
import phi3_ref

signal.signal(signal.SIGINT, signal.default_int_handler)
causal_lm = phi3_ref.Phi3CausalLM.from_preset("phi3_tiny_puzzles_en", seed=1)
causal_lm.preprocessor.sequence_length = 20


def rate(step):
    if step == 2:
        print("begun", flush=True)
    return 1e-3


causal_lm.compile(phi3_ref.AdamW(rate))
try:
    causal_lm.fit(["Sort dog"] * 100_000, batch_size=2, shuffle=False)
except KeyboardInterrupt:
    causal_lm.save_to_preset(sys.argv[1])
    causal_lm.save_optimizer(sys.argv[1] + "/optimizer.safetensors")
    print(causal_lm.optimizer.iterations)
"""


def test_ctrl_c_at_a_random_time_leaves_whole_steps(tmp_path):
    """From outside, as at a terminal: the moments that are saved are of the weights that are."""
    rng = random.Random(5)
    for attempt in range(2):
        directory = tmp_path / str(attempt)
        with subprocess.Popen([sys.executable, "-c", FITTER, directory], cwd=ROOT, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE) as fitter:
            assert fitter.stdout.readline() == "begun\n"
            time.sleep(rng.uniform(0, 0.3))
            fitter.send_signal(signal.SIGINT)
            stdout, stderr = fitter.communicate(timeout=60)
        assert "fit: interrupted in epoch " in stderr and "Traceback" not in stderr
        steps = int(stdout)
        causal_lm = tiny(seed=1)
        causal_lm.preprocessor.sequence_length = 20
        causal_lm.compile(phi3_ref.AdamW(1e-3))
        causal_lm.fit(["Sort dog"] * 2 * steps, batch_size=2, shuffle=False)
        saved = phi3_ref.Phi3CausalLM.from_preset(directory)
        saved.load_optimizer(directory / "optimizer.safetensors")
        assert saved.optimizer.iterations == steps
        for found, expected in zip(
                saved.backbone.get_weights(), causal_lm.backbone.get_weights(), strict=True):
            np.testing.assert_array_equal(found, expected)
        for name, moments in causal_lm.optimizer.moments.items():
            np.testing.assert_array_equal(moments, saved.optimizer.moments[name])


def test_saving_an_optimizer_that_is_killed_or_has_no_room(tmp_path):
    """The file that was there stays whole until the new one takes its place."""
    causal_lm, path = tiny(), tmp_path / "optimizer.safetensors"
    causal_lm.preprocessor.sequence_length = 20
    causal_lm.fit(QUESTIONS[:2])
    causal_lm.save_optimizer(path)
    before = files_below(tmp_path)
    code = """
import resource, signal, sys
import phi3_ref

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
causal_lm = phi3_ref.Phi3CausalLM.from_preset("phi3_tiny_puzzles_en")
causal_lm.load_optimizer(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, resource.RLIM_INFINITY))
try:
    causal_lm.save_optimizer(sys.argv[1])
except OSError:
    print("OSError")
"""
    run = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, text=True,
                         capture_output=True, check=True)
    assert run.stdout == "OSError\n", run.stderr
    assert files_below(tmp_path) == before


@pytest.mark.parametrize("count", [1, 5, 19])
def test_ctrl_c_while_loading_leaves_no_file_open(count, monkeypatch, tmp_path):
    """There is no backbone then, and the files are closed."""
    phi3_ref.Phi3Backbone(**CONFIG, seed=1).save_to_preset(tmp_path)
    with monkeypatch.context() as patch:
        interrupt_at(patch, phi3_ref, "is_finite", count)
        with pytest.raises(KeyboardInterrupt):
            phi3_ref.Phi3Backbone.from_preset(tmp_path)
    open_files = [path.resolve() for path in pathlib.Path("/proc/self/fd").iterdir()]
    assert not [path for path in open_files if path.is_relative_to(tmp_path)]


# Threads ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["greedy", "beam"])
@pytest.mark.parametrize("sliding_window", [None, 6])
def test_threads_that_share_a_model_get_what_one_thread_gets(sampler, sliding_window):
    """Eight threads, each with prompts of its own, three times over."""
    causal_lm, texts = tiny(sliding_window=sliding_window), prompts() * 3
    causal_lm.compile(sampler=sampler)
    expected = [causal_lm.generate(text, max_length=60) for text in texts]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda text: causal_lm.generate(text, max_length=60), texts))
        streams = list(pool.map(lambda text: "".join(tiny().stream(text)), texts))
    assert found == expected
    assert streams == ["".join(tiny().stream(text)) for text in texts[:8]] * 3


def test_threads_share_random_weights():
    """Whichever threads come first, the weights are those that the seed draws."""
    for seed in range(5):
        backbone, barrier = phi3_ref.Phi3Backbone(**CONFIG, seed=seed), threading.Barrier(8)

        def hidden_states(_, backbone=backbone, barrier=barrier):
            barrier.wait()
            return backbone({"token_ids": np.arange(12).reshape(2, 6)})

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            results = list(pool.map(hidden_states, range(8)))
        alone = phi3_ref.Phi3Backbone(**CONFIG, seed=seed)
        for result in results:
            np.testing.assert_array_equal(result, alone({"token_ids": np.arange(12).reshape(2, 6)}))


# Long runs ----------------------------------------------------------------------------------------


@given(window=st.integers(1, 9), chunk=st.integers(1, 12), data=st.data())
def test_a_cache_that_drops_what_left_the_window_changes_nothing(window, chunk, data):
    """Any sequence of forward passes gives the hidden states of one pass over everything."""
    backbone = phi3_ref.Phi3Backbone(**CONFIG, seed=3, dtype="float64", sliding_window=window)
    length = data.draw(st.integers(1, 60))
    token_ids = np.random.default_rng(length).integers(0, 64, (2, length))
    whole = backbone({"token_ids": token_ids})
    cache = phi3_ref.KVCache(backbone.config, 2, length, chunk)
    assert cache.arrays.shape[3] <= min(length, window + max(window, chunk))
    while cache.length < length:
        start = cache.length
        count = data.draw(st.integers(1, min(chunk, length - start)))
        found = phi3_ref.forward(backbone.weights, backbone.config,
                                 token_ids[:, start : start + count], cache=cache)
        np.testing.assert_allclose(found, whole[:, start : start + count], rtol=0, atol=1e-12)


def test_generation_beyond_the_caches_room_equals_generation_without_a_cache():
    """2,600 tokens with a window of 16: room for 2,064, so that the cache is moved once."""
    backbone = phi3_ref.Phi3Backbone(**CONFIG, seed=4, dtype="float64", sliding_window=16)
    causal_lm = phi3_ref.Phi3CausalLM(backbone)
    causal_lm.compile(sampler="greedy")
    inputs = {"token_ids": np.full((1, 2600), 5), "padding_mask": np.arange(2600)[None] < 7}
    token_ids = causal_lm.generate(inputs, stop_token_ids=None)["token_ids"]
    logits = causal_lm({"token_ids": token_ids})
    np.testing.assert_array_equal(token_ids[0, 7:], logits[0, 6:-1].argmax(axis=-1))
    assert len(np.unique(token_ids)) > 3


def test_twenty_thousand_tokens_take_no_more_memory_than_four_thousand():
    """The embedded model with a window of 64 tokens, one token at a time, to the 20,000th."""

    def resident():  # bytes
        status = pathlib.Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmRSS:")[1].split()[0])

    causal_lm = tiny(sliding_window=64)
    token_ids, prompt_mask = np.zeros((1, 20_000), np.int64), np.arange(20_000)[None] < 9
    sizes = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The sequence outgrows", UserWarning)
        for count, _ in enumerate(causal_lm.steps(token_ids, prompt_mask), 10):
            if count in (4_000, 12_000, 20_000):
                sizes[count] = resident()
    # The whole cache would be 2 KB a token: 33 MB more.
    assert sizes[12_000] - sizes[4_000] < 2e6 and sizes[20_000] - sizes[4_000] < 2e6, sizes


def test_a_trace_that_replaces_the_file_it_was_loaded_from(tmp_path):
    """Loading copies: the arrays stay as they were when the file is replaced."""
    first, second = phi3_ref.Trace(), phi3_ref.Trace()
    first["logits"], second["logits"] = np.ones((3, 5)), np.zeros((3, 5))
    first.save(tmp_path / "trace.safetensors")
    loaded = phi3_ref.Trace.load(tmp_path / "trace.safetensors")
    second.save(tmp_path / "trace.safetensors")
    np.testing.assert_array_equal(loaded["logits"], np.ones((3, 5)))
    stored = safetensors.numpy.load_file(tmp_path / "trace.safetensors")
    np.testing.assert_array_equal(stored["logits"], np.zeros((3, 5)))


FORKER = """
import os, signal
import ml_dtypes, numpy as np, phi3_ref

weight, ids = np.ones((2048, 1024), ml_dtypes.bfloat16), np.ones((128, 36), int)
causal_lm = phi3_ref.Phi3CausalLM.from_preset("phi3_tiny_puzzles_en")

def work():
    assert (phi3_ref.linear(weight[:1], weight) == 1024).all()
    causal_lm.train_on_batch({"token_ids": ids}, ids)

work()
child = os.fork()
if child == 0:
    signal.alarm(60)  # ends what waits for ever
    work()
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
work()
"""


def test_a_forked_process_computes_on():
    """It has none of the threads that its parent has started, and must not wait for them."""
    run = subprocess.run([sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKER],
                         cwd=ROOT, text=True, capture_output=True, timeout=120)
    assert run.returncode == 0, run.stderr
