"""notebooks/course.py: its figures, its first cell's search, and judges that call wrong wrong."""

import pathlib
import re
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from test_notebooks import NOTEBOOKS, cells_of

import phi3_ref

matplotlib.use("agg")
ROOT = pathlib.Path(phi3_ref.__file__).parent
sys.path.insert(0, str(ROOT / "notebooks"))
import course  # noqa: E402


def interleaved(x, cos, sin):
    """RoPE on neighbours, right: with a wrong order of components it is still a wrong answer."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return np.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1).reshape(x.shape)


def kernel(name, body, *parameters):
    """Return a kernel's source, in which `i` is the thread's number among all."""
    return (f"__global__ void {name}({', '.join(('const float* x', 'float* y', *parameters))}) {{\n"
            f"int i = blockIdx.x * blockDim.x + threadIdx.x;\n{body} }}")


def transpose(body):
    return kernel("transpose", "int c = i, r = blockIdx.y * blockDim.y + threadIdx.y;\n"
                  f"if (r < rows && c < cols) {body}", "int rows", "int cols")


def without_rope(*parts, everywhere=False):
    """Return an answer to 1.1 that forgets the keys, or which layers were named."""
    def unrotated(layers):
        seen = {}

        def tap(name, array):
            seen[name] = array
            named = everywhere or name.split(".")[0] in layers
            return seen[name.removesuffix("_rotary")] if named and name.endswith(parts) else array

        return tap

    return unrotated


def zeroing(*everywhere):
    """Return an answer to 1.1 that makes queries and keys zeros, before RoPE and after it."""
    def zeroed(layers):
        def tap(name, array):
            compared = ".query" in name or ".key" in name
            inside = compared and name.split(".")[0] in layers
            return 0 * array if inside or name.endswith(everywhere) else array

        return tap

    return zeroed


def partial(scores, values):
    exponentials = np.exp(scores - scores.max())
    return scores.max(), exponentials.sum(), exponentials @ values


def more_heads(copy):
    """Return the embedded backbone with 4 key/value heads, copied like this; None: random ones."""
    backbone = course.puzzles()[0].backbone
    more = phi3_ref.Phi3Backbone.from_config(backbone.get_config() | {
        "num_key_value_heads": 4, "dtype": "float32"})
    if copy:
        weights = backbone.get_weights()
        for index in (4, 5, 13, 14, 22, 23, 31, 32):  # [D, K, C], keys and values
            weights[index] = copy(weights[index], (1, 2, 1))
        more.set_weights(weights)
    return more


SUM_OF_THREE = kernel("sum_of_three", """__shared__ float part[34]; int t = threadIdx.x;
    part[t + 1] = i < n ? x[i] : 0;
    if (t == 0) part[0] = i > 0 ? x[i - 1] : 0;
    if (t == 31) part[33] = i + 1 < n ? x[i + 1] : 0;
    __syncthreads();
    if (i < n) y[i] = part[t] + part[t + 1] + part[t + 2];""", "int n")
RMS_NORM = """__global__ void rms_norm_mine(const float* x, const float* scale, float* y, int rows,
                                            int D, float epsilon) {
    float sum = 0;  // each thread reads the whole row, and once more what it writes
    for (int i = 0; i < D; ++i) sum += x[blockIdx.x * D + i] * x[blockIdx.x * D + i];
    for (int i = threadIdx.x; i < D; i += 32)
        y[blockIdx.x * D + i] = x[blockIdx.x * D + i] * rsqrtf(sum / D + epsilon) * scale[i];
}"""
ATTENTION = """__global__ void %s(const float* query, const float* key, const float* value,
                                  float* out, int S, float scale) {
    int s = blockIdx.x * blockDim.x + threadIdx.x;
    if (s >= S) return;
    float q[32], sum = 0, mixed[32] = {};  // right, but each query reads its keys alone
    for (int c = 0; c < 32; ++c) q[c] = query[s * 32 + c];
    for (int t = 0; t <= s; ++t) {
        float score = 0;
        for (int c = 0; c < 32; ++c) score += q[c] * key[t * 32 + c];
        float p = expf(score * scale);
        sum += p;
        for (int c = 0; c < 32; ++c) mixed[c] += p * value[t * 32 + c];
    }
    for (int c = 0; c < 32; ++c) out[s * 32 + c] = mixed[c] / sum;
}"""
WINDOW = (ATTENTION % "attention_window").replace("float scale", "float scale, int window").replace(
    "int t = 0; t <= s", "int t = max(0, s - window + 1); t <= s")

KEPT = """__global__ void rms_norm_mine(const float* x, const float* scale, float* y, int rows,
                                        int D, float epsilon) {
    constexpr int MOST = 8;
    float4 kept[MOST];
    const float4* in = reinterpret_cast<const float4*>(x + blockIdx.x * D);
    const float4* factors = reinterpret_cast<const float4*>(scale);
    float sum = 0;
    for (int n = 0, i = threadIdx.x; 4 * i < D; ++n, i += 32) {
        float4 v = kept[n] = in[i];
        sum += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
    }
    for (int apart = 16; apart; apart /= 2) sum += __shfl_xor_sync(0xffffffff, sum, apart);
    float factor = rsqrtf(sum / D + epsilon);
    for (int n = 0, i = threadIdx.x; 4 * i < D; ++n, i += 32) {
        float4 v = kept[n], g = factors[i];
        reinterpret_cast<float4*>(y + blockIdx.x * D)[i] = make_float4(
            v.x * factor * g.x, v.y * factor * g.y, v.z * factor * g.z, v.w * factor * g.w);
    }
}"""
UNKNOWN_LENGTH = KEPT.replace("kept[MOST]", "kept[(D + 127) / 128]")

# By exercise: wrong answers that a learner may well give. Each notebook has a part of its own.
WRONG = {
    "0.1": [(26, 8, 32), (8, 26, 128), 8, "(8, 26, 32)"],
    "0.2": [lambda table, ids: table[ids[0]], lambda table, ids: ids, 5],
    "0.3": [lambda z: np.exp(z) / np.exp(z).sum(axis=-1, keepdims=True),
            lambda z: np.exp(z - z.max()) / np.exp(z - z.max()).sum(), lambda z: z / z.sum()],
}
WRONG |= {
    "1.1": [3, lambda layers: None, lambda layers: lambda name, array: array,
            lambda layers: lambda name, array: 0 * array, without_rope("query_rotary"),
            without_rope("query_rotary", "key_rotary", everywhere=True),
            zeroing(), zeroing("attention.value")],
    "1.2": [[10], range(11), range(11, 26), "10 and all after it"],
    "1.3": [1_000_000, lambda *sizes: 1, lambda S, D, F, V, H, K, C, layers: {
        "query, key, value": layers * S * D * 3 * H * C, "scores and context": layers * S * S * C,
        "attention output": layers * S * D * D, "feed-forward": layers * 2 * S * D * F,
        "logits": S * V * D}],
}
WRONG |= {
    "2.1": [lambda x, cos, sin: x, (phi3_ref.rotary_embedding, np.arange(32)),
            (interleaved, np.arange(32)), (interleaved, np.zeros(32, int)),
            (interleaved, np.arange(32).reshape(16, 2).T.reshape(-1))],
    "2.2": [320_000, 10_000, 10_000 * 32 ** (48 / 47) * 1.02, "larger"],
    "2.3": [32, 31, 24 + 7 + 30, 100],
}
WRONG |= {
    "4.1": ["transformer_layer_0", "token_embedding", "logits", "pre_attention_layernorm", 3],
    "4.2": [[1e-3] * 16, [1e-3] * 5, "the residual stream"],
    "4.3": ["transformer_layer_2.feedforward_gate", "logits", "transformer_layer_2", "float16"],
}
WRONG |= {
    "3.1": [(partial, lambda one, other: tuple(a + b for a, b in zip(one, other, strict=True))),
            (lambda s, v: (0, np.exp(s).sum(), np.exp(s) @ v), lambda x, y: (
                0, x[1] + y[1], x[2] + y[2])), 3,
            (partial, lambda one, other: max(one, other, key=lambda triple: triple[0]))],
    "3.2": [np.repeat, course.puzzles()[0].backbone, more_heads(np.tile), more_heads(None)],
    "3.3": [(952, 804913152), (953, 804913152 // 2), (2047, 0), 953],
}
WRONG |= {
    "5.1": [3, kernel("twice", "y[i] = x[i];"), kernel("twice", "y[i] = 2 * x[i];")[11:],
            kernel("twice", "y[i + 1] = 2 * x[i];"), kernel("twice", "while (true) y[i] = 2;"),
            kernel("twice", "if (i == 0) for (int j = 0; j < 32; ++j) y[j] = 2 * x[j];")],
    "5.2": [kernel("twice_all", "y[i] = 2 * x[i];", "int n"),  # no guard
            kernel("twice_all", "int t = threadIdx.x; if (t < n) y[t] = 2 * x[t];", "int n"),
            kernel("twice_all", "if (i < n - 1) y[i] = 2 * x[i];", "int n"),
            kernel("twice_all", "if (i == 0) for (int j = 0; j < n; ++j) y[j] = 2 * x[j];",
                   "int n")],
    "5.3": [transpose("y[r * cols + c] = x[c * rows + r];"), transpose("y[c * rows + r] = x[0];"),
            transpose("y[c * rows + r] = x[r * cols + c];").replace("r < rows &&", ""),
            transpose("for (r = 0; r < rows; ++r) for (c = 0; c < cols; ++c) "
                      "y[c * rows + r] = x[r * cols + c];").replace("r < rows", "r + c == 0", 1)],
    "5.4": [  # three reads; a return before the barrier; no barrier; no neighbours
        kernel("sum_of_three", "if (i < n) y[i] = x[i] + (i ? x[i - 1] : 0) "
               "+ (i + 1 < n ? x[i + 1] : 0);", "int n"),
        SUM_OF_THREE.replace("part[t + 1]", "if (i >= n) return; part[t + 1]", 1),
        SUM_OF_THREE.replace("__syncthreads();", ""), SUM_OF_THREE.replace("x[i - 1]", "0")],
    "5.5": [kernel("total", "float sum = 0; for (int j = 0; j < 256; ++j) sum += "
                   "x[blockIdx.x * 256 + j]; if (threadIdx.x == 0) y[blockIdx.x] = sum;"),
            kernel("total", "float sum = 0; for (int j = 255; j >= 0; --j) sum += "
                   "x[blockIdx.x * 256 + j]; if (threadIdx.x == 0) y[blockIdx.x] = sum;"),
            kernel("total", "if (threadIdx.x == 0) y[blockIdx.x] = x[i];")],
    "5.6": [RMS_NORM, RMS_NORM.replace("sum / D", "sum"), "rms_norm_mine",
            KEPT, UNKNOWN_LENGTH],  # vectors; an array whose length depends on D
    "5.7": [ATTENTION % "attention_32", ATTENTION % "attention_64",
            (ATTENTION % "attention_64").replace("t <= s", "t < s")],
    "5.8": [(ATTENTION % "attention_window").replace("float scale", "float scale, int window"),
            WINDOW.replace("s - window + 1", "s - window"), WINDOW.replace("max(0, ", "(")],
    "5.9": [kernel("silu_mine", "if (i < n) y[i] = x[i];", "int n"),
            kernel("silu_mine", "y[i] = x[i] / (1 + expf(-x[i]));", "int n"),
            kernel("silu_mine", "if (i == 0) for (int j = 0; j < n; ++j) "
                   "y[j] = x[j] / (1 + expf(-x[j]));", "int n"),  # one thread alone
            kernel("silu_mine", "if (threadIdx.x == 0) for (int j = i; j < i + 128 && j < n; ++j) "
                   "y[j] = x[j] / (1 + expf(-x[j]));", "int n"), np.tanh],
}
WRONG |= {
    "6.1": [(3, 1), (2, 3), (3, 3), 3, "32", (3, 4), (3, 2, 1)],
    "6.2": [("add", "0.0"), ("reverse", "1.1"), ("sort", "0.1"), "0.1", ("0.1", "reverse")],
    "6.3": [(13, 13, 25), (12, 20, 25), (13, 20, 21), (13, 20), (4, 4, 4)],
}


def in_the_order_of_training(word, ranks):
    """Cut a word by merging, wrongly, the pair that comes first in the word."""
    tokens = list(word)
    while pairs := [i for i in range(len(tokens) - 1) if tuple(tokens[i : i + 2]) in ranks]:
        tokens[pairs[0] : pairs[0] + 2] = ["".join(tokens[pairs[0] : pairs[0] + 2])]
    return tokens


WRONG |= {
    "7.1": [lambda gradient, x, cap: gradient, lambda gradient, x, cap: 1 - np.tanh(x / cap) ** 2,
            lambda gradient, x, cap: gradient * (1 - np.tanh(x / cap) ** 2) / cap],
    "7.2": [lambda g_a, n_a, g_b, n_b: (g_a + g_b) / 2, lambda g_a, n_a, g_b, n_b: g_a + g_b,
            lambda g_a, n_a, g_b, n_b: n_a * g_a + n_b * g_b],
    "7.3": [lambda gradient, x, scale, epsilon: gradient,
            lambda gradient, x, scale, epsilon: (gradient * scale, (gradient * x).sum((0, 1)),
                                                 gradient.sum((0, 1)))],
    "8.1": [32 * 64 * 16 * 3072, 32 * (32 * 16 * 3072 + 96 * 16), 6_291_456, 2.6, "few"],
    "8.2": [lambda gradient, x, a, b: (gradient @ b @ a, x, x @ a.T),
            lambda gradient, x, a, b: gradient @ b @ a,
            lambda gradient, x, a, b: (gradient @ b @ a, x.T @ gradient, a @ x.T @ gradient)],
    "8.3": [lambda change, r: (change[:r], np.eye(len(change), r)),
            lambda change, r: (np.linalg.svd(change)[2][:r], np.linalg.svd(change)[0][:, :r]),
            lambda change, r: change],
    "9.1": [lambda p, share: p * (p >= share * p.max()), lambda p, share: p,
            lambda p, share: p * (p >= share) / (p * (p >= share)).sum(),
            lambda p, share: p * (p > share * p.max()) / max(p[p > share * p.max()].sum(), 1e-9)],
    "9.2": [1.0, 2.5, "hot"],
    "9.3": [lambda word, ranks: list(word), lambda word, ranks: [word], in_the_order_of_training],
    "10.1": [1.9, 2.03, 2.29, 7.6],
    "10.2": [lambda x, bits: x, lambda x, bits: np.round(x),
             lambda x, bits: np.round((x - x.min()) / (np.ptp(x) / 2**bits)) * np.ptp(x) / 2**bits
             + x.min()],
    "10.3": [lambda w, bits: np.abs(w).max() / (2 ** (bits - 1) - 1), lambda w, bits: w.std(),
             lambda w, bits: 0],
}


@pytest.fixture(scope="module")
def tokenizer():
    return phi3_ref.Phi3Tokenizer.from_preset("phi3_tiny_puzzles_en")


def test_labels_tell_special_tokens_from_letters(tokenizer):
    ids = [tokenizer.start_token_id, *tokenizer("<|user|>\ns +<|end|>")]
    assert course.labels(tokenizer, np.array(ids)) == [
        "<s>", "▁", "<|user|>", "↵", "s", "▁", "+", "<|end|>"]


@pytest.mark.parametrize("parts", [(), ("attention", "kv_cache"), ("gradients", "loss")])
def test_the_map_has_all_parts_and_lights_those_named(parts, monkeypatch):
    drawn = []
    monkeypatch.setattr(course.plt, "show", lambda: drawn.append(course.plt.gcf()))
    course.you_are_here(*parts, large=True)
    texts = {text.get_text(): text for text in drawn[0].axes[0].texts}
    lit = {part for part, (text, *_) in course.PARTS.items() if texts[text].get_color() == "black"}
    assert set(parts) - course.LINES <= lit
    assert all(text.get_fontsize() >= 8 for text in texts.values() if text.get_text())
    drawn[0].canvas.draw()
    edge = drawn[0].bbox
    for text in texts.values():  # nothing is cut off
        box = text.get_window_extent()
        assert edge.x0 <= box.x0 and box.x1 <= edge.x1 and edge.y0 <= box.y0 and box.y1 <= edge.y1
    course.plt.close(drawn[0])


def test_the_map_names_a_part_it_does_not_have():
    with pytest.raises(ValueError, match=r"has no \['attenton'\], but .*'attention'"):
        course.you_are_here("attenton")


@pytest.mark.parametrize(("name", "index"), [(name, index) for name in WRONG
                                             for index in range(len(WRONG[name]))])
def test_wrong_answers_are_called_wrong(name, index, capsys):
    assert course.check(name, WRONG[name][index]) is False
    assert re.match(rf"Exercise {name}: not yet\. \S.*\nHint \d of \d: \S",
                    capsys.readouterr().out)


@pytest.mark.parametrize(("name", "index", "said"), [
    ("2.2", -2, "by 0.4867 radians"), ("5.6", -2, "has vectors"), ("5.6", -1, "variable length"),
    ("5.9", 2, "one thread does it all"), ("5.9", 3, "one thread does it all")])
def test_wrong_answers_hear_why(name, index, said, capsys):
    course.check(name, WRONG[name][index])
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("size", [2.2, 2.17, 2.175])
def test_a_size_to_two_digits_is_right(size):
    assert course.check("10.1", size) is True


@pytest.mark.parametrize(("name", "answer", "said"), [
    ("6.1", "32", "It should be a pair of layer numbers"), ("8.1", 2.6, "A whole number is")])
def test_an_answer_of_another_kind_is_told_so(name, answer, said, capsys):
    assert course.check(name, answer) is False
    assert f"not yet. {said}" in capsys.readouterr().out


def test_every_exercise_has_wrong_answers_and_a_heading():
    headings = re.findall(r"^### Exercise (\d+\.\d) [★☆]{3} \S", "\n".join(
        cell.source for path in NOTEBOOKS for cell in cells_of(path, "markdown")), re.MULTILINE)
    assert sorted(headings) == sorted(course.JUDGES) == sorted(WRONG)
    assert all(len(answers) >= 2 for answers in WRONG.values())


def test_hints_grow_and_nothing_is_raised(capsys, monkeypatch):
    monkeypatch.setattr(course, "wrong_answers", {})
    said = []
    for answer in (None, [0], [1], [2], [3]):
        assert course.check("1.2", answer) is False
        said.append(capsys.readouterr().out)
    assert said[0] == "Exercise 1.2: not answered yet.\n"
    assert ["Hint 1 of 2" in said[1], *("Hint 2 of 2" in text for text in said[2:])] == [True] * 4
    assert course.check("9.99", 1) is False
    assert "no exercise '9.99'" in capsys.readouterr().out


@pytest.mark.parametrize("name, answer", [
    ("1.2", "10 and all after it"), ("1.2", 10), ("2.2", "larger"), ("2.3", [62]), ("3.1", 3),
    ("3.3", 953)])
def test_an_answer_of_another_kind_hears_what_it_should_be(name, answer, capsys):
    course.check(name, answer)
    assert re.match(r".*: not yet\. It should be a (list|number|pair)", capsys.readouterr().out)


@pytest.mark.parametrize("answer, wrong", [
    ("x", "should be numbers"), ([1.0], "has shape [1], and should have [2]"),
    ([1, np.nan], "not finite"), ([1, 3], "not the right numbers, most at index [1]")])
def test_difference_says_what_is_wrong(answer, wrong):
    assert wrong in course.difference(answer, [1, 2])
    assert course.difference([1, 2.0001], [1, 2]) is None


@pytest.mark.parametrize("place", ["", "notebooks", "clone"])
def test_the_first_cell_finds_the_modules_from_any_directory(tmp_path, place):
    """In the repository, in its notebooks, in the directory in which it was cloned; or says so."""
    clone = tmp_path / "clone"
    (clone / "notebooks").mkdir(parents=True)
    (clone / "tests").mkdir()
    for name in ("phi3_ref.py", "kernels_cuda.py", "tests/cuda_on_cpu", "notebooks/course.py"):
        (clone / name).symlink_to(ROOT / name)
    code = cells_of(NOTEBOOKS[0], "code")[0].source.replace("%matplotlib inline", "")

    def run(directory):
        return subprocess.run([sys.executable, "-c", code], cwd=directory, capture_output=True,
                              text=True, env={"MPLBACKEND": "agg", "HOME": str(tmp_path)})

    assert run(tmp_path if place == "clone" else clone / place).returncode == 0
    if place == "clone":
        empty = tmp_path / "clone" / "empty" / "deep"
        (clone / "phi3_ref.py").unlink()
        empty.mkdir(parents=True)
        assert "FileNotFoundError: No phi3_ref.py in" in run(empty).stderr
