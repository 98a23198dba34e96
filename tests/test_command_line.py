"""The command line, run as a user runs it, and what importing the module costs."""

import contextlib
import fcntl
import json
import os
import pathlib
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import time

import numpy as np
import pytest
import transformers
from references import transformers_model, write_huggingface

import phi3_ref

ROOT = pathlib.Path(phi3_ref.__file__).parent
VOCABULARY = ROOT / "notebooks/presets/phi3_tiny_puzzles_en/assets/tokenizer/vocabulary.spm"


def run(*arguments, stdin="", code=0):
    """Run phi3_ref.py from another directory; return (stdout, stderr)."""
    result = subprocess.run(
        [sys.executable, str(ROOT / "phi3_ref.py"), *arguments],
        input=stdin, capture_output=True, text=True, encoding="utf-8", timeout=120, cwd="/",
    )
    assert result.returncode == code, result
    assert "Traceback" not in result.stderr
    return result.stdout, result.stderr


def random_model(directory, silent):
    """A random causal LM with a tokenizer, saved; the tokens in `silent` never come greedily."""
    tokenizer = phi3_ref.Phi3Tokenizer(VOCABULARY.read_bytes())
    backbone = phi3_ref.Phi3Backbone(
        vocabulary_size=tokenizer.vocabulary_size(), num_layers=2, hidden_dim=32,
        intermediate_dim=48, num_query_heads=4, num_key_value_heads=2,
        max_sequence_length=100_000, pretraining_sequence_length=100_000,
    )
    rng = np.random.default_rng(0)
    weights = [
        rng.normal(0, 0.3, weight.shape) if weight.ndim > 1 else weight
        for weight in backbone.get_weights()
    ]
    weights[1][:, silent] = 0  # logits of zero: some letter's is always larger
    backbone.set_weights(weights)
    model = phi3_ref.Phi3CausalLM(backbone, phi3_ref.Phi3CausalLMPreprocessor(tokenizer))
    model.compile(sampler="greedy")
    model.directory = str(directory)
    model.save_to_preset(directory)
    return model


SPECIAL_AND_BYTES = [*range(259), *range(-11, 0)]


@pytest.fixture(scope="module")
def causal_lm(tmp_path_factory):
    """A random model that says letters for ever."""
    return random_model(tmp_path_factory.mktemp("preset"), SPECIAL_AND_BYTES)


@pytest.fixture(scope="module")
def ending_causal_lm(tmp_path_factory):
    """A random model that says letters until it says <|end|>."""
    silent = [token for token in SPECIAL_AND_BYTES if token != -4]
    model = random_model(tmp_path_factory.mktemp("preset"), silent)
    assert model.preprocessor.tokenizer.vocabulary_size() - 4 == (
        model.preprocessor.tokenizer.token_to_id("<|end|>")
    )
    return model


def chat_prompt(causal_lm, *turns):
    """The chat template of alternating user and assistant turns."""
    roles = ["user", "assistant"] * len(turns)
    return causal_lm.preprocessor.tokenizer.apply_chat_template(
        [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]
    )


def test_the_readmes_first_command():
    """The embedded preset answers, and its answer alone is on standard output."""
    stdout, _ = run("What is 345 + 278?")
    assert stdout == "623\n"


def test_other_questions_of_the_embedded_preset():
    """The two other kinds of question that the README shows."""
    assert run("Reverse planet")[0] == "tenalp\n"
    assert run("Sort planet")[0] == "aelnpt\n"


def test_an_answer_is_what_generate_gives(causal_lm):
    """--preset and --max-length: standard output is `generate`'s text for the chat template."""
    stdout, _ = run(
        "Sort dog", "--preset", causal_lm.directory, "--max-length", "50", "--dtype", "float32"
    )
    prompt = chat_prompt(causal_lm, "Sort dog")
    assert stdout == causal_lm.generate(prompt, 50, strip_prompt=True) + "\n"
    assert len(stdout) > 10


def test_raw_continues_the_prompt_itself(causal_lm):
    """--raw leaves the chat template out."""
    stdout, _ = run("Sort dog", "--raw", "--preset", causal_lm.directory, "--max-length", "40")
    assert stdout == causal_lm.generate("Sort dog", 40, strip_prompt=True) + "\n"
    assert stdout != causal_lm.generate(chat_prompt(causal_lm, "Sort dog"), 40, strip_prompt=True)


def test_summary_prints_the_layers_and_exits():
    """--summary needs no prompt: each layer, its shape and the number of parameters."""
    stdout, _ = run("--summary")
    config = json.loads((VOCABULARY.parents[2] / "config.json").read_text())["config"]
    backbone = phi3_ref.Phi3Backbone.from_preset("phi3_tiny_puzzles_en", load_weights=False)
    for text in (
        "token_embedding", f"transformer_layer_{config['num_layers'] - 1}",
        "sequence_output_layernorm", f"{backbone.count_params():,}",
    ):
        assert text in stdout


def test_seeds_repeat(causal_lm):
    """--seed makes random sampling repeat; another seed and another temperature change it."""
    def sample(*arguments):
        return run(
            "Sort dog", "--preset", causal_lm.directory, "--max-length", "60",
            "--sampler", "random", *arguments,
        )[0]

    first = sample("--seed", "1")
    assert first == sample("--seed", "1")
    assert first != sample("--seed", "2")
    assert first != sample("--seed", "1", "--temperature", "0.01")
    prompt = chat_prompt(causal_lm, "Sort dog")
    greedy = causal_lm.generate(prompt, 60, strip_prompt=True) + "\n"
    assert greedy == sample("--seed", "1", "--temperature", "0.0001")


def test_a_huggingface_directory(causal_lm, tmp_path):
    """--preset with a directory that transformers wrote, tokenizer and all."""
    model = transformers_model(
        dict(vocab_size=causal_lm.backbone.vocabulary_size, max_position_embeddings=4096), seed=3
    )
    write_huggingface(model, tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(VOCABULARY.read_bytes())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path, legacy=True)
    tokenizer.save_pretrained(tmp_path)
    ours = phi3_ref.Phi3CausalLM.from_preset(tmp_path)
    ours.compile(sampler="greedy")
    expected = ours.generate(chat_prompt(causal_lm, "Sort dog"), 40, strip_prompt=True)
    stdout, _ = run("Sort dog", "--preset", str(tmp_path), "--max-length", "40")
    assert stdout == expected + "\n"


def test_a_directory_without_a_tokenizer_is_an_error(tmp_path):
    """There is nothing to ask it with: one line says so."""
    write_huggingface(transformers_model({}), tmp_path)
    stdout, stderr = run("Sort dog", "--preset", str(tmp_path), code=2)
    assert stdout == "" and "tokenizer" in stderr and stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["hello", "--preset", "no_such_preset"], "no_such_preset"),
        (["hello", "--dtype", "float8"], "float8"),
        (["hello", "--backend", "torch"], "torch"),
        (["hello", "--sampler", "nucleus"], "nucleus"),
        (["hello", "--temperature", "0"], "temperature"),
        (["hello", "--temperature", "warm"], "warm"),
        (["hello", "--max-length", "0"], "max.length"),
        (["hello", "--max-length", "-5"], "max.length"),
        (["hello", "--seed", "-1"], "seed"),
        (["hello", "--trace", "/dev/null/trace"], "/dev/null"),
        (["hello", "--gradients"], "--gradients needs --trace"),
        (["--gradients"], "--gradients needs --trace"),
        (["--summary", "--gradients"], "--gradients needs --trace"),
        (["--summary", "--adapter", "x"], "--adapter goes with a prompt"),
        (["--compare", "a", "b", "--adapter", "x"], "--adapter goes with a prompt"),
        (["--compare", "one"], "--compare"),
        (["hello", "there"], "there"),
        (["--colour"], "--colour"),
    ],
)
def test_bad_arguments_exit_with_2_and_one_line(arguments, message):
    """Exit code 2, nothing on standard output, and a last line that names what is wrong."""
    stdout, stderr = run(*arguments, code=2)
    lines = stderr.strip().splitlines()
    assert stdout == "" and re.search(message, lines[-1])
    assert len(lines) == 1 or lines[0].startswith("usage:")


def test_help_lists_every_option():
    """--help exits with 0 and names each option."""
    stdout, _ = run("--help")
    for option in (
        "preset", "adapter", "backend", "dtype", "max-length", "sampler", "temperature", "seed",
        "raw", "summary", "trace", "gradients", "compare", "tolerance",
    ):
        assert f"--{option}" in stdout


def test_chat_keeps_the_conversation(ending_causal_lm):
    """Two lines of input: the second answer continues a prompt that holds the whole first turn."""
    model, length = ending_causal_lm, 600

    def answer(*turns):
        text = model.generate(chat_prompt(model, *turns), length, strip_prompt=True)
        assert text.endswith("<|end|>"), "this question is not one that the random model ends"
        return text.removesuffix("<|end|>")

    first = answer("Sort dog")
    second = answer("Sort dog", first, "Reverse cat")
    assert second != answer("Reverse cat")
    stdout, _ = run(
        "--preset", model.directory, "--max-length", str(length), stdin="Sort dog\nReverse cat\n"
    )
    assert stdout == f"{first}\n{second}\n"


def test_a_trace_of_a_run(causal_lm, tmp_path):
    """--trace: the forward pass over the prompt, in a file; the answer is the same as without."""
    path = tmp_path / "new" / "trace.safetensors"
    arguments = ("Sort dog", "--preset", causal_lm.directory, "--dtype", "bfloat16")
    stdout, stderr = run(*arguments, "--max-length", "50", "--trace", str(path))
    assert (stdout, stderr) == run(*arguments, "--max-length", "50")
    model = phi3_ref.Phi3CausalLM.from_preset(causal_lm.directory, dtype="bfloat16")
    prompt = chat_prompt(causal_lm, "Sort dog")
    expected = phi3_ref.Trace.record(model, prompt)
    trace = phi3_ref.Trace.load(path)
    assert trace.metadata == expected.metadata and trace.metadata["prompt"] == prompt
    assert phi3_ref.compare(expected, trace, tolerance=0).first is None
    assert list(trace) == list(expected)
    run(*arguments, "--max-length", "6", "--trace", str(path), code=1)  # a prompt that is cut, too
    assert phi3_ref.Trace.load(path)["logits"].shape[1] == 6


def test_a_trace_with_gradients(causal_lm, tmp_path):
    """--gradients: both passes, the loss that of each next token; the answer is the same."""
    path = tmp_path / "trace.safetensors"
    arguments = ("Sort dog", "--preset", causal_lm.directory, "--max-length", "50")
    assert run(*arguments, "--trace", str(path), "--gradients") == run(*arguments)
    model = phi3_ref.Phi3CausalLM.from_preset(causal_lm.directory)
    prompt = chat_prompt(causal_lm, "Sort dog")
    expected = phi3_ref.Trace.record(model, prompt, max_length=50, y="next")
    trace, forward = phi3_ref.Trace.load(path), phi3_ref.Trace.record(model, prompt, max_length=50)
    assert trace.metadata == expected.metadata and trace.keys() == expected.keys()
    assert phi3_ref.compare(expected, trace, tolerance=0).first is None
    assert list(trace)[: len(forward)] == list(forward)
    backward = list(trace)[len(forward):]
    assert backward[0] == "logits.gradient" and backward[-1] == "token_embedding.weight.gradient"
    assert all(name.endswith(".gradient") for name in backward)
    weights = [name for name in backward if name.endswith(".weight.gradient")]
    assert len(backward) - len(weights) == len(forward)
    assert len(weights) == len(dict(phi3_ref.named_weights(model.backbone.weights)))
    # The loss, once more: of each token but the first, given those before it.
    (ids,), logits = trace.metadata["token_ids"], trace["logits"][0].astype(float)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    loss = -log_p[np.arange(len(ids) - 1), ids[1:]].sum() / len(ids)
    assert abs(trace.metadata["loss"] - loss) < 1e-5 * loss

    name = "transformer_layer_1.attention.scores.gradient"
    bad = tmp_path / "bad.safetensors"
    trace[name][0, 3, 2, 1] += np.abs(trace[name]).max()
    trace["transformer_layer_0.qkv.weight.gradient"] *= 2  # which comes of a later step
    trace.save(bad)
    stdout, _ = run("--compare", str(path), str(bad), code=1)
    first, before = stdout.splitlines()[-2:]
    assert first.startswith(f"{name}: ")
    assert before == "Right until transformer_layer_1.attention.probabilities.gradient"


def test_a_trace_of_a_chat(ending_causal_lm, tmp_path):
    """In a chat, --trace leaves the last prompt's: the whole conversation's."""
    model, path = ending_causal_lm, str(tmp_path / "trace.safetensors")
    stdout, _ = run("--preset", model.directory, "--max-length", "600", "--trace", path,
                    stdin="Sort dog\nReverse cat\n")
    first, _ = stdout.splitlines()
    prompt = chat_prompt(model, "Sort dog", first, "Reverse cat")
    assert phi3_ref.Trace.load(path).metadata["prompt"] == prompt


def test_a_porters_two_commands(causal_lm, tmp_path):
    """A trace, another, and where they part: exit code 0 within tolerance, 1 and a name beyond."""
    ours, port, bad = (str(tmp_path / f"{name}.safetensors") for name in ("ours", "port", "bad"))
    arguments = ("Sort dog", "--preset", causal_lm.directory, "--max-length", "40")
    run(*arguments, "--trace", ours)
    trace = phi3_ref.Trace.load(ours)
    for name in trace:
        trace[name] = trace[name] * np.float32(1 + 2**-21)  # a port's rounding errors
    trace.save(port)
    name = "transformer_layer_1.attention.scores"
    trace[name][0, 3, 2, 1] += 0.5
    trace["logits"] += 1
    trace.save(bad)

    stdout, _ = run("--compare", ours, port)
    assert stdout.splitlines()[-1] == "All 35 tensors are within tolerance."
    stdout, stderr = run("--compare", ours, bad, code=1)
    first, before = stdout.splitlines()[-2:]
    assert stderr == "" and first.startswith(f"{name}: ") and "[0, 3, 2, 1]" in first
    assert before == "Right until transformer_layer_1.attention.key_rotary"
    stdout, _ = run("--compare", ours, port, "--tolerance", "1e-7", code=1)
    assert stdout.splitlines()[-1].startswith("token_embedding: ")
    run("--compare", ours, bad, "--tolerance", "100")


@pytest.mark.parametrize("reference, other, message", [
    ("ours", "none", "none.safetensors"), ("none", "ours", "none.safetensors"),
    ("ours", "damaged", "damaged.safetensors"), ("ours", "stranger", "No name in common"),
])
def test_files_that_cannot_be_compared(reference, other, message, tmp_path):
    """A missing or damaged file, or one of other names: exit code 2 and one line."""
    trace_of(logits=np.ones(3)).save(tmp_path / "ours.safetensors")
    trace_of(x=np.ones(3)).save(tmp_path / "stranger.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"not a header")
    paths = (str(tmp_path / f"{name}.safetensors") for name in (reference, other))
    stdout, stderr = run("--compare", *paths, code=2)
    assert stdout == "" and message in stderr and stderr.count("\n") == 1


def trace_of(**arrays):
    """A Trace of these arrays."""
    trace = phi3_ref.Trace()
    trace.update(arrays)
    return trace


def test_end_of_input_ends_the_chat():
    """No input at all: exit code 0 and nothing on standard output."""
    assert run(stdin="")[0] == ""


def test_an_interrupt_ends_cleanly(causal_lm):
    """Ctrl-C in the middle of an answer: exit code 130, no traceback, the text so far is out."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "phi3_ref.py"), "Sort dog", "--preset", causal_lm.directory,
         "--max-length", "90000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # A suite that runs in the background of a shell ignores interrupts, and so would its child.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        start = process.stdout.read(3)  # generation has begun, and has minutes to go
        process.send_signal(signal.SIGINT)
        rest, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode in (0, 130)
    assert "Traceback" not in stderr
    expected = causal_lm.generate(chat_prompt(causal_lm, "Sort dog"), 40, strip_prompt=True)
    assert (start + rest).startswith(expected[:3])


def test_importing_the_module_imports_no_heavy_package():
    """The packages for files, hubs, tokenizers and GPUs wait until they are needed."""
    code = (
        "import sys, numpy; before = set(sys.modules); import phi3_ref;"
        "print(sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    stdout = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    imported = set(json.loads(stdout.replace("'", '"')))
    assert "phi3_ref" in imported
    heavy = (
        "cupy h5py sentencepiece kagglehub huggingface_hub tqdm safetensors requests matplotlib "
        "torch tensorflow keras keras_hub transformers tokenizers jinja2 scipy kernels_cuda"
    )
    assert not imported & set(heavy.split())


# The chat at a terminal ---------------------------------------------------------------------------


class Terminal:
    """A chat in a pseudo-terminal of its own: keys go in as bytes, what it shows comes out."""

    def __init__(self, *arguments, stdout=None):
        self.keys, terminal = os.openpty()

        def own_it():  # so that Ctrl-C reaches the chat as a signal
            os.setsid()
            fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
            signal.signal(signal.SIGINT, signal.SIG_DFL)

        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "phi3_ref.py"), *arguments], stdin=terminal,
            stdout=stdout or terminal, stderr=terminal, preexec_fn=own_it, cwd="/",
            env=os.environ | {"TERM": "dumb", "INPUTRC": "/dev/null"})
        os.close(terminal)
        self.shown = ""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.keys)

    def press(self, keys):
        os.write(self.keys, keys.encode())

    def wait_for(self, pattern):
        """Read until `pattern` is shown after what was waited for before; return what came."""
        end = time.monotonic() + 60
        while not (found := re.search(pattern, self.shown)):
            ready, _, _ = select.select([self.keys], [], [], max(0, end - time.monotonic()))
            assert ready, (pattern, self.shown)
            self.shown += os.read(self.keys, 4096).decode(errors="replace")
        came, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return came

    def wait(self):
        """Wait for its end; return the exit code and what was shown meanwhile."""
        with contextlib.suppress(OSError):
            while piece := os.read(self.keys, 4096).decode(errors="replace"):
                self.shown += piece
        return self.process.wait(60), self.shown


def test_a_chat_at_a_terminal_edits_and_recalls_lines():
    """Ctrl-A goes to a line's beginning, the arrow brings the last back, Ctrl-D ends it all."""
    with Terminal() as chat:
        start = chat.wait_for(">>> ")
        assert start.count("What is 345 + 278?") == 1 and start.count("\r\n") == 2
        chat.press("ort dog\x01S\n")
        chat.wait_for("\\ndgo\r\n>>> ")
        chat.press("\x1b[A\n")
        chat.wait_for("Sort dog\r\ndgo\r\n>>> ")
        chat.press("\x04")
        code, shown = chat.wait()
    assert code == 0 and shown.endswith("\n") and "Traceback" not in shown


def test_ctrl_c_clears_a_line():
    """What was typed is gone, and the chat goes on."""
    with Terminal() as chat:
        chat.wait_for(">>> ")
        chat.press("Reverse planet")
        chat.wait_for("planet")
        time.sleep(0.5)  # a signal between two keys of readline's waits for a third, in any Python
        chat.press("\x03")
        chat.wait_for("\n>>> ")
        chat.press("Sort dog\n")
        chat.wait_for("\ndgo\r\n>>> ")
        chat.press("\x04")
        assert chat.wait()[0] == 0


def test_ctrl_c_stops_an_answer(causal_lm):
    """Of a model that never ends; what it said is part of the conversation that goes on."""
    expected = causal_lm.generate(chat_prompt(causal_lm, "Sort dog"), 40, strip_prompt=True)[:5]
    with Terminal("--preset", causal_lm.directory, "--max-length", "90000") as chat:
        assert "What is" not in chat.wait_for(">>> ")  # that is for the embedded model
        for shown in (f"Sort dog\r\n{expected}", "Sort dog\r\n"):
            chat.press("Sort dog\n")
            chat.wait_for(re.escape(shown))
            chat.wait_for("[a-z]")  # it is answering
            chat.press("\x03")
            chat.wait_for("\r\n>>> ")
        chat.press("\x04")
        code, shown = chat.wait()
    assert code == 0 and "Traceback" not in shown


def test_answers_alone_go_to_a_file(tmp_path):
    """Asked at a terminal, with standard output elsewhere: prompts stay on the terminal."""
    with open(tmp_path / "answers", "wb") as answers, Terminal(stdout=answers) as chat:
        chat.wait_for(">>> ")
        chat.press("Sort dog\n")
        chat.wait_for("Sort dog\r\n>>> ")
        chat.press("\x04")
        assert chat.wait()[0] == 0
    assert (tmp_path / "answers").read_text() == "dgo\n"


# What does not fit, and what is not there ---------------------------------------------------------


def test_a_prompt_that_is_cut_is_a_line_of_its_own(tmp_path):
    """With the numbers, once, even with a trace; and an answer that is empty is no success."""
    trace = str(tmp_path / "trace.safetensors")
    _, stderr = run("Sort planet", "--max-length", "4", "--trace", trace, code=1)
    lines = stderr.splitlines()
    assert len(lines) == 2 and all(line.startswith("phi3_ref.py: ") for line in lines)
    length = len(phi3_ref.Trace.record(
        phi3_ref.Phi3CausalLM.from_preset("phi3_tiny_puzzles_en"),
        phi3_ref.Phi3Tokenizer.from_preset("phi3_tiny_puzzles_en").apply_chat_template(
            [{"role": "user", "content": "Sort planet"}])).metadata["token_ids"][0])
    assert "`max_length`=4 " in lines[0] and f"{length} tokens" in lines[0]
    assert "empty" in lines[1] and "Warning" not in stderr


def test_phi3_ref_copied_alone(tmp_path):
    """It says that the embedded preset is not beside it, and where it should be."""
    shutil.copy(ROOT / "phi3_ref.py", tmp_path)
    result = subprocess.run([sys.executable, str(tmp_path / "phi3_ref.py"), "Sort dog"],
                            capture_output=True, text=True, cwd="/")
    assert result.returncode == 2 and result.stdout == "" and result.stderr.count("\n") == 1
    for text in ("not beside phi3_ref.py", str(tmp_path / "notebooks" / "presets")):
        assert text in result.stderr
