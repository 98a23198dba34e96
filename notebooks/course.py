"""What the notebooks of the course share: a style of figures, labels, the map, a judge of answers.

`import course` sets the style. `labels` writes tokens as every figure shows them, `you_are_here`
draws the model, `check` judges an answer to an exercise. The judges stand at the end, a section
for each notebook: they compute what is right with phi3_ref, so that no solution is written here.
"""

import functools
import math
import re
import unittest.mock

import matplotlib.pyplot as plt
import ml_dtypes
import numpy as np

import kernels_cuda
import phi3_ref
from tests import cuda_on_cpu

# ---- The style of figures ------------------------------------------------------------------------

# Okabe and Ito's palette, which colour-blind readers can tell apart, and a grey.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, GREY = "#CC79A7", "#56B4E9", "#8C8C8C"
plt.rcParams.update({
    "figure.figsize": (9, 3), "figure.dpi": 110, "figure.constrained_layout.use": True,
    "font.size": 9, "axes.titlesize": 10, "axes.labelsize": 9, "legend.fontsize": 8,
    "xtick.labelsize": 8, "ytick.labelsize": 8, "axes.spines.top": False,
    "axes.spines.right": False, "image.cmap": "cividis",
    "axes.prop_cycle": plt.cycler(color=[BLUE, ORANGE, GREEN, RED, PURPLE, SKY]),
})


def labels(tokenizer, ids):
    """Return the tokens of one row of ids, a list of str: "▁" is a space, "↵" ends a line.

    Special tokens keep their brackets, so that `<s>` is not taken for the letter s.
    """
    tokens = [tokenizer.id_to_token(int(token_id)) for token_id in ids]
    return [token.replace("<0x0A>", "↵").replace("\n", "↵") for token in tokens]


# ---- The map -------------------------------------------------------------------------------------

# Each part of the model: the text in its box, the middle of the box, its width. The residual
# stream runs at height 0, its branches at height 1.
PARTS = {
    "tokenizer": ("tokenizer", 0.6, 1, 1.0),
    "token_embedding": ("embedding", 0.6, 0, 1.0),
    "pre_attention_layernorm": ("norm", 1.95, 1, 0.62),
    "qkv": ("q, k, v", 2.75, 1, 0.66),
    "rope": ("RoPE", 3.55, 1, 0.62),
    "attention": ("attention", 4.5, 1, 0.96),
    "kv_cache": ("KV cache", 4.5, 1.88, 0.96),
    "attention_output": ("output", 5.45, 1, 0.66),
    "post_attention_layernorm": ("norm", 6.5, 1, 0.62),
    "feedforward": ("gate · interm.", 7.5, 1, 1.16),
    "feedforward_output": ("output", 8.55, 1, 0.66),
    "sequence_output_layernorm": ("norm", 9.85, 0, 0.62),
    "logits": ("logits", 10.75, 0, 0.7),
    "sampler": ("sampler", 10.75, 1, 0.8),
    "loss": ("loss", 10.75, -0.85, 0.7),
}
LINES = {"residual_stream", "gradients"}  # parts that are no boxes
WIRES = [  # between boxes, each as its corners
    [(0.6, 0.72), (0.6, 0.28)], [(1.55, 0), (1.55, 1), (1.64, 1)], [(2.26, 1), (2.42, 1)],
    [(3.08, 1), (3.24, 1)], [(3.86, 1), (4.02, 1)], [(4.98, 1), (5.12, 1)],
    [(4.5, 1.28), (4.5, 1.6)], [(4.5, 1.6), (4.5, 1.28)], [(5.78, 1), (5.9, 1), (5.9, 0.13)],
    [(6.1, 0), (6.1, 1), (6.19, 1)], [(6.81, 1), (6.92, 1)], [(8.08, 1), (8.22, 1)],
    [(8.88, 1), (9.0, 1), (9.0, 0.13)], [(10.16, 0), (10.4, 0)], [(10.75, 0.28), (10.75, 0.72)],
    [(10.75, 1.28), (10.75, 2.35), (0.6, 2.35), (0.6, 1.28)],
]
SHAPES = [  # for the large picture: where, and what
    (0.68, 0.5, "[B, S]", "left"), (2.75, 0.56, "[B, S, H + 2K, C]", "center"),
    (4.9, 0.43, "scores [B, H, S, T]\ncontext [B, S, H, C]", "center"),
    (5.1, 1.8, "keys, values [B, T, K, C]", "left"), (7.5, 0.56, "2 x [B, S, F]", "center"),
    (10.83, 0.5, "[B, S, V]", "left"),
]


def you_are_here(*parts, large=False):
    """Draw the whole model; where parts are named, light these and leave the rest grey.

    Args:
        *parts: str, keys of `PARTS` or `LINES`.
        large: bool, draw larger, with the shapes of arrays.
    """
    phi3_ref.require(not (unknown := set(parts) - set(PARTS) - LINES), "The map has no "
                     f"{sorted(unknown)}, but {sorted(PARTS)} and {sorted(LINES)}.")
    lit = set(parts) or set(PARTS) | LINES
    _, axis = plt.subplots(figsize=(9.5, 3.9) if large else (9.5, 2.5))
    wire = dict(color="0.35", linewidth=1, zorder=1)

    def arrow(corners, **style):
        xs, ys = zip(*corners, strict=True)
        axis.plot(xs[:-1], ys[:-1], **wire | style)
        axis.annotate("", corners[-1], corners[-2], arrowprops=dict(
            arrowstyle="->", shrinkA=0, shrinkB=0, color=(wire | style)["color"],
            linewidth=(wire | style)["linewidth"]))

    axis.add_patch(plt.Rectangle((1.38, -0.42), 7.8, 2.64, facecolor="0.96", edgecolor="0.8",
                                 linestyle="--", zorder=0))
    axis.text(9.12, 2.14, "one layer; as many as the model has, one after the other",
              ha="right", va="top", color="0.3", fontsize=8)
    stream = BLUE if "residual_stream" in lit else "0.7"
    arrow([(1.1, 0), (9.54, 0)], color=stream, linewidth=3)
    axis.text(3.6, -0.12, "residual stream" + " x [B, S, D]" * large, color=stream, va="top",
              ha="center", fontsize=8, fontweight="bold" if "residual_stream" in lit else None)
    for corners in WIRES:
        arrow(corners)
    for x in (5.9, 9.0):
        axis.text(x, 0, "+", ha="center", va="center", zorder=3, fontsize=9,
                  bbox=dict(boxstyle="circle,pad=0.12", facecolor="white", edgecolor=stream))
    gradients = RED if "gradients" in lit else "0.7"
    arrow([(10.75, -0.28), (10.75, -0.57)], color="0.35" if "loss" in lit else "0.7")
    arrow([(10.4, -0.85), (0.6, -0.85), (0.6, -0.28)], color=gradients, linestyle=":")
    axis.text(5.6, -0.8, "gradients, backwards through every part", ha="center", va="bottom",
              color=gradients, fontsize=8)
    axis.text(5.6, 2.4, "the chosen token goes behind the text", ha="center", va="bottom",
              color="0.3", fontsize=8)
    for part, (text, x, y, width) in PARTS.items():
        on = part in lit
        axis.add_patch(plt.Rectangle(
            (x - width / 2, y - 0.28), width, 0.56, zorder=2, linewidth=1.6 if on else 1,
            facecolor="#F8DDA4" if on else "white", edgecolor="black" if on else "0.7"))
        axis.text(x, y, text, ha="center", va="center", zorder=3, fontsize=8,
                  color="black" if on else "0.45")
    for x, y, text, side in SHAPES if large else ():
        axis.text(x, y, text, ha=side, va="center", fontsize=8, color="0.25", zorder=4)
    axis.set(xlim=(0, 11.5), ylim=(-1.2, 2.75))
    axis.axis("off")
    plt.show()


# ---- CUDA kernels, on the GPU or on the CPU ------------------------------------------------------


@functools.cache
def gpu():
    """Return the module cupy where there is a GPU, else None: kernels then run on the CPU."""
    try:
        return phi3_ref.load_backend("cupy")
    except (ImportError, RuntimeError):
        return None


def aligned(x):
    """Return a copy of `x`, float32, that begins where a segment does, as arrays on a GPU do."""
    memory = np.empty(4 * x.size + 64, np.uint8)
    begin = -memory.ctypes.data % 64
    copy = memory[begin : begin + 4 * x.size].view(np.float32).reshape(x.shape)
    copy[...] = x
    return copy


def launch(source, name, grid, block, *arguments):
    """Run a kernel on NumPy arrays, which it may change, and on numbers of NumPy's types.

    Args:
        source: str, CUDA C++.
        name: str, the kernel's.
        grid: int or tuple, the number of blocks.
        block: int or tuple, the threads of each.
        *arguments: what the kernel's parameters get.

    Returns:
        The bytes of global memory that its threads ask for, and the bytes of the segments that hold
        them, two int. None on a GPU, which does not count.

    Raises:
        cuda_on_cpu.KernelError: on the CPU, with what the kernel did wrong, and the line.
    """
    grid, block = (size if isinstance(size, tuple) else (size,) for size in (grid, block))
    if gpu() is None:
        kernel = cuda_on_cpu.Kernel(source, name, count=True, seconds=5)
        kernel(grid, block, arguments)
        return kernel.traffic
    moved = [gpu().asarray(x) if isinstance(x, np.ndarray) else x for x in arguments]
    kernels_cuda.load_kernel(source, name)(grid, block, tuple(moved))
    for x, on_gpu in zip(arguments, moved, strict=True):
        if isinstance(x, np.ndarray):
            x[...] = on_gpu.get()
    return None


def rms_norm_by(source, name="rms_norm_mine"):
    """Return a function like `phi3_ref.rms_norm` that launches a kernel, a block for each row."""

    def rms_norm(x, scale, epsilon):
        D, y = x.shape[-1], aligned(np.full(x.shape, np.nan))
        launch(source, name, x.size // D, 32, aligned(x), aligned(scale), y,
               np.int32(x.size // D), np.int32(D), np.float32(epsilon))
        return y

    return rms_norm


def silu_by(source, name="silu_mine"):
    """Return a function like `phi3_ref.silu` that launches a kernel, a thread for each number."""

    def silu(x):
        y = aligned(np.full(x.shape, np.nan))
        launch(source, name, -(-x.size // 128), 128, aligned(x), y, np.int32(x.size))
        return y

    return silu


# ---- Exercises that judge their answers ----------------------------------------------------------

JUDGES = {}  # by exercise: the judge, and its hints, each larger than the one before
wrong_answers = {}  # by exercise: how many so far


def exercise(name, *hints):
    """Register a judge: it takes an answer and returns None if that is right, else what is not."""

    def register(judge):
        JUDGES[name] = judge, hints
        return judge

    return register


def check(exercise, answer):
    """Say whether an answer is right, and if not, what is wrong, with a larger hint each time.

    Args:
        exercise: str, as "1.2".
        answer: what the exercise asks for; None where there is no answer yet.

    Returns:
        bool, whether it is right.
    """
    if exercise not in JUDGES:
        print(f"There is no exercise {exercise!r}; there are {', '.join(JUDGES)}.")
        return False
    if answer is None:
        print(f"Exercise {exercise}: not answered yet.")
        return False
    judge, hints = JUDGES[exercise]
    try:
        wrong = judge(answer)
    except Exception as error:  # of the reader's function, or of an answer of another kind
        wrong = f"Judging it ended with {type(error).__name__}: {error}"
    if wrong is None:
        print(f"Exercise {exercise}: right.")
        return True
    count = wrong_answers[exercise] = wrong_answers.get(exercise, 0) + 1
    number = min(count, len(hints))
    print(f"Exercise {exercise}: not yet. {wrong}\n"
          f"Hint {number} of {len(hints)}: {hints[number - 1]}")
    return False


def difference(answer, expected, tolerance=1e-4, what="Your answer"):
    """Return None where an answer holds the expected numbers, else a text that says what is wrong.

    Args:
        answer: what NumPy makes an array of.
        expected: the same, with the right numbers.
        tolerance: float, the largest error allowed, relative to the largest expected number.
        what: str, names the answer in the text.
    """
    answer, expected = np.asarray(answer), np.asarray(expected)
    if answer.dtype.kind not in "biufc" and answer.dtype.name != "bfloat16":
        return f"{what} should be numbers, and is of {answer.dtype}."
    if answer.shape != expected.shape:
        return f"{what} has shape {list(answer.shape)}, and should have {list(expected.shape)}."
    if not np.isfinite(answer.astype(complex)).all():
        return f"{what} holds numbers that are not finite."
    errors = np.abs(answer.astype(complex) - expected)
    if errors.size == 0 or errors.max() <= tolerance * np.abs(expected).max():
        return None
    place = [int(i) for i in np.unravel_index(errors.argmax(), errors.shape)]
    where = f", most at index {place}" if place else ""
    return f"{what} is not the right number{'s' if place else ''}{where}."


@functools.cache
def puzzles(dtype="float32"):
    """Return the embedded `Phi3CausalLM` and its tokenizer, for judges."""
    causal_lm = phi3_ref.Phi3CausalLM.from_preset("phi3_tiny_puzzles_en", dtype=dtype)
    return causal_lm, causal_lm.preprocessor.tokenizer


def ids_of(question):
    """Return the token ids [1, S] of a question to the embedded model in the chat format."""
    tokenizer = puzzles()[1]
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}])
    return np.array([[tokenizer.start_token_id, *tokenizer(prompt)]])


# ---- The judges of notebook 0 --------------------------------------------------------------------


@exercise("0.1", "x @ w.T has a row for each row of x, and a column for each row of w.",
          "The product is [26, 256], which becomes [26, 8, 32]; then the first two axes change "
          "places.")
def judge_shape(answer):
    """The shape of a product that is cut into heads."""
    expected = np.zeros((26, 128)) @ np.zeros((256, 128)).T
    return difference(answer, expected.reshape(26, 8, 32).transpose(1, 0, 2).shape, 0)


@exercise("0.2", "table[3] is row 3. What is table[np.array([[3, 4], [5, 6]])]?",
          "Index the table with the whole array of ids; no loop is needed.")
def judge_look_up(answer):
    """`answer(table, ids)` is `table[ids]`."""
    rng = np.random.default_rng(1)
    table, ids = rng.standard_normal((9, 5)), rng.integers(0, 9, (2, 4))
    return difference(answer(table, ids), table[ids], 1e-12, "The result")


@exercise("0.3", "axis=-1 sums over each row; keepdims=True keeps the axis for the division.",
          "Subtract each row's maximum before np.exp, so that the largest exponential is 1.")
def judge_softmax(answer):
    """`answer(z)` is softmax over the last axis, large numbers included."""
    z = np.random.default_rng(1).standard_normal((3, 2, 7))
    for factor, which in ((1, "small"), (1000, "large")):
        with np.errstate(all="ignore"):
            given = answer(factor * z)
        wrong = difference(given, phi3_ref.softmax(factor * z), 1e-9, f"The result of {which} z")
        if wrong:
            return wrong
    return None


# ---- The judges of notebook 1 --------------------------------------------------------------------


@exercise("1.1", "A tap is called with ....attention.query before ....attention.query_rotary.",
          "Keep each query and key when you see it; where its rotated twin comes, in one of "
          "`layers`, return the kept one, and in all other cases return the array itself.")
def judge_tap_without_rope(answer):
    """`answer(layers)` returns a tap that takes RoPE out of the layers of these names."""
    if not callable(answer):
        return f"It should be a function of `layers` that returns a tap, and is {answer!r:.60}."
    causal_lm, inputs = puzzles()[0], {"token_ids": ids_of("What is 512 + 39?")}

    def both_sides(change):
        """Return what the model hands to a tap, and what it gets back, two dicts of arrays."""
        given, back = {}, {}

        def tap(name, array):
            given[name] = array.copy()
            back[name] = change(name, array)
            return back[name]

        causal_lm(inputs, tap=tap)
        return given, back

    for layers in ([], ["transformer_layer_0"], [f"transformer_layer_{i}" for i in range(4)]):
        given, back = both_sides(answer(layers))
        for name, array in back.items():
            layer, _, part = name.partition(".")
            before = given[name.removesuffix("_rotary")]
            if layer in layers and part.endswith("_rotary"):
                if np.array_equal(array, given[name]):
                    return f"With layers={layers}, {name} is still rotated."
                if not np.array_equal(array, before):
                    return f"With layers={layers}, {name} is not what it was before the rotation."
            elif not np.array_equal(array, given[name]):
                return f"With layers={layers}, {name} is changed, and should stay as it is."
    return None


@exercise("1.2", "Call `backbone` twice, and compare the two results position by position.",
          "A position sees itself and what stands before it. np.abs(one - other).max(axis=-1)[0] "
          "is each position's change; np.flatnonzero finds those above 1e-5.")
def judge_changed_positions(answer):
    """The positions whose result changes when token 10 does."""
    backbone = puzzles()[0].backbone
    one = ids_of("What is 345 + 278?")
    other = one.copy()
    other[0, 10] = puzzles()[1].token_to_id("9")
    change = np.abs(backbone({"token_ids": one}) - backbone({"token_ids": other})).max(axis=-1)[0]
    expected = set(np.flatnonzero(change > 1e-5).tolist())
    try:
        given = {int(s) for s in answer}
    except (TypeError, ValueError):
        return f"It should be a list of positions, and is {answer!r:.60}."
    if given == expected:
        return None
    wrong = sorted(given ^ expected)[0]
    return f"Position {wrong} {'does not change' if wrong in given else 'changes, too'}."


@exercise("1.3", "Each position takes one multiplication for each number of each weight matrix.",
          "Scores: every query [C] with every key [C], for each of H heads, S times S; the context "
          "takes as many again. The feed-forward network has three matrices of D times F.")
def judge_multiplications(answer):
    """`answer(S, D, F, V, H, K, C, layers)` is the dict of multiplications by operation."""
    if not callable(answer):
        return f"It should be a function of (S, D, F, V, H, K, C, layers), and is {answer!r:.60}."
    S, D, F, V, H, K, C, layers = 5, 24, 28, 11, 6, 2, 8, 3
    config = phi3_ref.Phi3Config(V, layers, D, F, H, K, head_dim=C)
    size = {name: math.prod(shape) for name, shape in config.layer_shapes().items()}
    expected = {
        "query, key, value": layers * S * size["qkv"],
        "scores and context": layers * 2 * S * S * H * C,
        "attention output": layers * S * size["attention_output"],
        "feed-forward": layers * S * (
            size["feedforward_gate_intermediate"] + size["feedforward_output"]),
        "logits": S * V * D,
    }
    given = answer(S, D, F, V, H, K, C, layers)
    if not isinstance(given, dict) or set(given) != set(expected):
        return f"It should return a dict with the keys {list(expected)}."
    for part, count in expected.items():
        if given[part] != count:
            return f"The count of {part!r} is too {'large' if given[part] > count else 'small'}."
    return None


# ---- The judges of notebook 2 --------------------------------------------------------------------


@exercise("2.1", "Where rotary_embedding takes the two halves of the components, take the even and "
          "the odd ones; the results go back to the same places.",
          "Component 2i of the new order must be component i of the old one, and 2i + 1 must be "
          "i + 16: the order begins 0, 16, 1, 17.")
def judge_interleaved(answer):
    """(interleaved, order): RoPE on neighbours, and the components' order that makes it Phi-3's."""
    if not isinstance(answer, tuple | list) or len(answer) != 2 or not callable(answer[0]):
        return "It should be a pair: a function of (x, cos, sin), and the order of the components."
    interleaved, order = answer
    rng = np.random.default_rng(1)
    x, angles = rng.standard_normal((2, 7, 3, 32)), rng.uniform(0, 6, (7, 1, 16))
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)
    expected = np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)
    wrong = difference(interleaved(x.copy(), np.cos(angles), np.sin(angles)), expected,
                       what="interleaved's result")
    if wrong:
        return wrong
    if sorted(order) != list(range(32)):
        return "The order should hold each of 0 to 31 once."
    halves = phi3_ref.rotary_embedding(x, np.cos(angles), np.sin(angles))
    ordered = interleaved(x[..., order], np.cos(angles), np.sin(angles))
    return difference(ordered, halves[..., order], what="interleaved in that order")


@exercise("2.2", "The slowest pair of 48 is i = 47. Its frequency must become 32 times smaller.",
          "Solve (base / 10000) ** (2 * 47 / 96) == 32 for the base.")
def judge_base(answer):
    """The base with which pair 47 turns in 131,072 positions as far as before in 4,096."""
    if np.ndim(answer) or isinstance(answer, str):
        return f"It should be a number, and is {answer!r:.60}."
    slowest = [phi3_ref.Phi3Config(8, 1, 96, 8, 1, 1, dtype="float64", rope_max_wavelength=base)
               .rotary(np.array([length]))[0][0, 0, -1] for base, length in (
                   (10000, 4096), (float(answer), 131072))]
    angles = np.arccos(slowest)
    if abs(angles[1] / angles[0] - 1) < 0.01:
        return None
    return (f"With it, the slowest pair turns by {angles[1]:.4f} radians in 131,072 positions, "
            f"and should turn by {angles[0]:.4f}.")


@exercise("2.3", "The prompt takes 24 positions, and each further step one; but one step finds "
          "that the sequence has outgrown 30 tokens, and forgets its cache.",
          "Nine tokens are chosen, from the logits at lengths 24 to 32. At length 31 the factors "
          "change: that step computes 31 positions instead of one.")
def judge_boundary(answer):
    """The number of positions that `forward` computes across su scaling's boundary."""
    if np.ndim(answer) or isinstance(answer, str):
        return f"It should be a number, and is {answer!r:.60}."
    causal_lm = phi3_ref.Phi3CausalLM.from_preset(
        "phi3_tiny_puzzles_en", rope_scaling_type="su", rope_scaling_short_factor=[1.0] * 16,
        rope_scaling_long_factor=[1.0] * 16, rope_attention_factor=1.0,
        pretraining_sequence_length=30)
    causal_lm.compile(sampler="greedy")
    computed, forward = [], phi3_ref.forward

    def counting_forward(weights, config, token_ids, **others):
        computed.append(token_ids.shape[1])
        return forward(weights, config, token_ids, **others)

    prompt = puzzles()[1].apply_chat_template([{"role": "user", "content": "Reverse elephant"}])
    with unittest.mock.patch.object(phi3_ref, "forward", counting_forward):
        causal_lm.generate(prompt, max_length=36)
    if answer == sum(computed):
        return None
    return f"It computes {'more' if answer < sum(computed) else 'fewer'}."


# ---- The judges of notebook 3 --------------------------------------------------------------------


@exercise("3.1", "m is the largest score of a part, total the sum of e^(score - m), output the sum "
          "of e^(score - m) times its value.",
          "In merge, m is the larger of both; what stands in the unit of another m is multiplied "
          "by e^(that m - m), totals and outputs alike.")
def judge_merging(answer):
    """`partial(scores, values)` and `merge(one, other)`, of triples (m, total, output)."""
    if not isinstance(answer, tuple | list) or len(answer) != 2:
        return f"It should be a pair of functions, and is {answer!r:.60}."
    partial, merge = answer
    rng = np.random.default_rng(31)
    scores, values = 300 * rng.standard_normal(1000), rng.standard_normal((1000, 32))
    cuts = slice(0, 100), slice(100, 450), slice(450, 1000)
    for scale in (0.01, 1):  # in the second, e^score overflows
        with np.errstate(over="ignore", invalid="ignore"):
            x, y, z = (partial(scale * scores[cut], values[cut]) for cut in cuts)
            merged = {"(x, y), z": merge(merge(x, y), z), "z, (y, x)": merge(z, merge(y, x))}
        expected = phi3_ref.softmax(scale * scores) @ values
        for order, (_, total, output) in merged.items():
            if wrong := difference(output / total, expected, what=f"output / total of {order}"):
                return wrong + " (The scores go up to 900.)" * (scale == 1)
    return None


@exercise("3.2", "Each key and value head is there twice; query heads 0 and 1 read head 0, 2 and 3 "
          "read head 1.",
          "np.repeat(weights[index], 2, axis=1) for index in (2 + 9 * layer + 2, and + 3).")
def judge_heads(answer):
    """A backbone with as many key/value heads as query heads, and the embedded preset's result."""
    backbone, inputs = puzzles()[0].backbone, {"token_ids": ids_of("What is 345 + 278?")}
    if not isinstance(answer, phi3_ref.Phi3Backbone):
        return f"It should be a Phi3Backbone, and is {answer!r:.60}."
    if answer.num_key_value_heads != 4:
        return f"It has {answer.num_key_value_heads} key/value heads, not 4."
    return difference(answer(inputs), backbone(inputs), what="Its result")


@exercise("3.3", "Query s sees itself and the window - 1 keys before it. (b) asks for the bytes of "
          "one token times a number of tokens.",
          "s - (W - 1) is the first key; a token takes 2 * layers * K * C * 2 bytes.")
def judge_window(answer):
    """The first key that query 2,999 sees in a window of 2,047, and the window's bytes."""
    if not isinstance(answer, tuple | list) or len(answer) != 2:
        return f"It should be a pair of numbers, and is {answer!r:.60}."
    seen = phi3_ref.visible_keys(np.array([2999]), np.arange(3000), 2047)[0]
    mini = phi3_ref.Phi3Config(32064, 32, 3072, 8192, 32, 32, dtype="bfloat16")
    expected = int(seen.argmax()), int(seen.sum()) * phi3_ref.KVCache(mini, 1, 1).arrays.nbytes
    for part, given, right in zip("ab", answer, expected, strict=True):
        if given != right:
            return f"({part}) is too {'large' if given > right else 'small'}."
    return None


# ---- The judges of notebook 4 --------------------------------------------------------------------


def traced_puzzle(tap=None, dtype="float64", **changed):
    """Return the Trace of notebook 4's prompt through the embedded model, changed or tapped."""
    trace = phi3_ref.Trace()
    causal_lm = puzzles(dtype)[0]
    if changed:
        causal_lm = phi3_ref.Phi3CausalLM.from_preset(
            "phi3_tiny_puzzles_en", dtype=dtype, **changed)
    with np.errstate(all="ignore"):
        causal_lm({"token_ids": ids_of("What is 345 + 278?")},
                  tap=lambda *named: trace(named[0], tap(*named) if tap else named[1]))
    return trace


@exercise("4.1", "Epsilon is read by every RMSNorm. Which tensor is the first that one computes?",
          "The first layer normalizes the embedding before attention: the name is the layer's, a "
          "dot, and the first of phi3_ref.LAYER_TAPS.")
def judge_first_wrong(answer):
    """The first tensor that is wrong where epsilon is 1e-3."""
    wrong = phi3_ref.compare(traced_puzzle(), traced_puzzle(layer_norm_epsilon=1e-3),
                             tolerance=1e-5)
    if answer == wrong.first.name:
        return None
    place = [row.name for row in wrong.rows]
    if answer not in place:
        return f"{answer!r:.60} is not the name of a tensor, as {place[5]!r} is."
    early = place.index(answer) < place.index(wrong.first.name)
    return f"{answer} is {'still right' if early else 'wrong, too, but not the first'}."


@exercise("4.2", "Each of the 16 numbers: the norm of the logits' error over the norm of the "
          "oracle's logits.", "Round only tensors whose name is in of_stage[stage], in all four "
          "layers; return all others unchanged. The model is models['float64'].")
def judge_costs(answer):
    """The error of the logits when one kind of tensor is rounded to bfloat16, for all kinds."""
    reference, expected = traced_puzzle()["logits"], []
    for stage in phi3_ref.LAYER_TAPS:
        rounded = {f"transformer_layer_{i}.{stage}".removesuffix(".") for i in range(4)}

        def tap(name, array, rounded=rounded):
            return array.astype(ml_dtypes.bfloat16).astype(float) if name in rounded else array

        error = traced_puzzle(tap)["logits"] - reference
        expected.append(np.linalg.norm(error) / np.linalg.norm(reference))
    return difference(answer, expected, tolerance=0.01)


@exercise("4.3", "The two tensors that you multiply stay finite. What is made of them?",
          "Gate and intermediate are multiplied with each other; the first tensor with a name "
          "behind that product is the network's output.")
def judge_first_not_finite(answer):
    """The first tensor that is not finite in float16 when layer 2's gates are 256 times larger."""
    patched = {f"transformer_layer_2.feedforward_{part}" for part in ("gate", "intermediate")}
    trace = traced_puzzle(lambda name, array: array * array.dtype.type(
        256 if name in patched else 1), "float16")
    first = next(name for name, array in trace.items() if not np.isfinite(array).all())
    if answer == first:
        return None
    if answer not in trace:
        return f"{answer!r:.60} is not the name of a tensor, as {first.split('.')[0]!r} is."
    finite = np.isfinite(trace[answer]).all()
    return f"{answer} is {'finite' if finite else 'not finite, but another was before it'}."


# ---- The judges of notebook 5 --------------------------------------------------------------------


def wrong_kernel(source, name, grid, block, inputs, expected, *numbers):
    """Launch a kernel with the parameters (inputs..., result, numbers...).

    Returns:
        None where the result is `expected`, else a text that says what is wrong; and what `launch`
        returns.
    """
    if not isinstance(source, str):
        return f"It should be the source of a kernel, a str, and is {source!r:.60}.", None
    result = aligned(np.full(expected.shape, np.nan))
    sizes = f"With {' and '.join(str(list(x.shape)) for x in inputs)} numbers"
    try:
        traffic = launch(source, name, grid, block, *map(aligned, inputs), result, *numbers)
    except cuda_on_cpu.KernelError as error:
        return f"{sizes} it was stopped: {error}", None
    wrong = np.argwhere(~np.isclose(result, expected, rtol=1e-4, atol=1e-5))
    if len(wrong) == 0:
        return None, traffic
    at = tuple(int(i) for i in wrong[0])
    unwritten = " (which nobody wrote)" if np.isnan(result[at]) else ""
    return (f"{sizes}, {len(wrong)} of {result.size} numbers are wrong, first that at index "
            f"{list(at)}: {result[at]:.6g}{unwritten}, not {expected[at]:.6g}."), traffic


def one_thread_alone(traffic, count):
    """Return a text if each of `count` numbers took segments of its own, else None.

    Threads of a warp that work at the same time share segments, also in a transpose. On a GPU,
    `traffic` is None, and nothing is said.
    """
    if traffic and traffic[1] > 32 * count:
        return "The numbers are right, but one thread does it all: let each do its own number."
    return None


@exercise("5.1", "Thread `threadIdx.x` has the number `x[threadIdx.x]`; no loop is needed.",
          "int i = threadIdx.x; then one assignment to y[i].")
def judge_map(answer):
    """The source of `twice(x, y)`, a block of 32 threads: y[i] = 2 x[i]."""
    x = np.random.default_rng(51).standard_normal(32)
    wrong, traffic = wrong_kernel(answer, "twice", 1, 32, [x], 2 * x)
    return wrong or one_thread_alone(traffic, 32)


@exercise("5.2", "Which number is a thread's? In front of its block stand blockIdx.x whole blocks.",
          "int i = blockIdx.x * blockDim.x + threadIdx.x; and nothing is done where i >= n.")
def judge_guard(answer):
    """The source of `twice_all(x, y, n)`, blocks of 32 threads: y[i] = 2 x[i]."""
    for n in (64, 100, 5):
        x = np.random.default_rng(52).standard_normal(n)
        wrong, traffic = wrong_kernel(answer, "twice_all", -(-n // 32), 32, [x], 2 * x,
                                      np.int32(n))
        if wrong := wrong or one_thread_alone(traffic, n):
            return wrong
    return None


@exercise("5.3", "x counts columns, y counts rows, for blocks and for threads. Guard both.",
          "Row r, column c of x [rows, cols] is x[r * cols + c]. y has `rows` columns: there the "
          "same number stands at y[c * rows + r].")
def judge_transpose(answer):
    """The source of `transpose(x, y, rows, cols)`, blocks of (8, 4) threads."""
    for rows, cols in ((4, 8), (8, 24), (5, 19)):
        x = np.random.default_rng(53).standard_normal((rows, cols))
        wrong, traffic = wrong_kernel(answer, "transpose", (-(-cols // 8), -(-rows // 4)), (8, 4),
                                      [x], x.T, np.int32(rows), np.int32(cols))
        if wrong := wrong or one_thread_alone(traffic, x.size):
            return wrong
    return None


@exercise("5.4", "Each thread stores its own number in shared memory, the first and the last also "
          "the neighbours outside; numbers outside of x are 0. All wait, then add.",
          "__shared__ float part[34]; thread t stores part[t + 1] = i < n ? x[i] : 0. No thread "
          "may return before __syncthreads: guard the reads and the writes instead.")
def judge_sum_of_three(answer):
    """The source of `sum_of_three(x, y, n)`, blocks of 32 threads that read each number once."""
    for n in (32, 96, 100, 5):
        blocks, x = -(-n // 32), np.random.default_rng(54).standard_normal(n)
        wrong, traffic = wrong_kernel(answer, "sum_of_three", blocks, 32, [x],
                                      np.convolve(x, [1, 1, 1], "same"), np.int32(n))
        least = 4 * (n + 2 * (blocks - 1) + n)
        if wrong or (traffic and traffic[0] > least):
            return wrong or (f"The numbers are right, but with n = {n} it asks for {traffic[0]} "
                             f"bytes of global memory; {least} are enough.")
    return None


@exercise("5.5", "First 128 threads add the number 128 places further to their own, then 64 the "
          "number 64 places further, and so on; after each step all wait.",
          "for (int half = 128; half > 0; half /= 2) { if (t < half) part[t] += part[t + half]; "
          "__syncthreads(); } Before it, all store their number and wait; after it, thread 0 "
          "writes.")
def judge_total(answer):
    """The source of `total(x, y)`, for each row of 256 numbers a block of 256 threads."""
    x = np.random.default_rng(55).uniform(1, 2, (3, 256))
    wrong, _ = wrong_kernel(answer, "total", 3, 256, [x], x.sum(axis=1))
    if wrong:
        return wrong
    x = np.ones((1, 256))
    x[0, 128] = 2**24  # in the middle, for sums from either end; in float32, 2^24 + 1 is 2^24
    y = aligned(np.zeros(1))
    launch(answer, "total", 1, 256, aligned(x), y)
    if y[0] < 2**24 + 200:
        return (f"Of 2^24 and 255 ones it makes 2^24 + {y[0] - 2**24:.0f}: who adds one number "
                "after the other loses the ones to rounding. Add pairs, then pairs of pairs.")
    return None


def judge_rms_norm(source, name="rms_norm_mine"):
    """Check an RMSNorm kernel, a block of 32 threads for each row; None or what is wrong.

    Also return its segments' bytes as a multiple of the least; None on a GPU.
    """
    rng, traffic = np.random.default_rng(56), None
    for rows, D in ((4, 32), (3, 100), (5, 1024)):
        x, scale = rng.standard_normal((rows, D)), rng.uniform(0.5, 2, D)
        expected = phi3_ref.textbook_rms_norm(x, scale, 1e-6)
        wrong, traffic = wrong_kernel(source, name, rows, 32, [x, scale], expected,
                                      np.int32(rows), np.int32(D), np.float32(1e-6))
        if wrong:
            return wrong, None
    return None, traffic and traffic[1] / (3 * 4 * rows * D)  # x, y and, for each row, the scale


@exercise("5.6", "A thread meets the numbers i = threadIdx.x, + 32, + 64, ...: at most 32 of them. "
          "Both loops meet the same ones, so the first can keep them for the second.",
          "float kept[32]; let both loops count n from 0 to 31, with i = threadIdx.x + 32 * n and "
          "a `break` where i >= D; put `#pragma unroll` before each.")
def judge_read_once(answer):
    """The source of `rms_norm_mine`, a warp for each row, which reads x once."""
    wrong, ratio = judge_rms_norm(answer)
    if wrong or (ratio and ratio > 1.01):
        return wrong or f"It is right, but takes {ratio:.2f} x the least bytes."
    if re.search(r"float\d", re.sub(r"//.*|/\*(?s:.*?)\*/", "", answer)):
        return "It is right, but has vectors: do without."
    return None


def causal_attention(S, sliding_window=None):
    """Return random [query, key, value], each [S, 32], and the attention of this one head."""
    arrays = list(np.random.default_rng(57).standard_normal((3, S, 32)))
    batches = (x[None, :, None] for x in arrays)
    return arrays, phi3_ref.textbook_attention(*batches, None, sliding_window)[0, :, 0]


@exercise("5.7", "Change `first`, who fetches which rows of a tile, and where the last tile is. "
          "Two warps share the rows: one the even, one the odd ones.",
          "first = blockIdx.x * 64; s = first + threadIdx.x; lane = threadIdx.x % 32, "
          "warp = threadIdx.x / 32; `row = warp; ...; row += 2`; and the tiles end where the last "
          "query of the block does: tile < first + 64 && tile < S.")
def judge_attention_64(answer):
    """The source of `attention_64`, blocks of 64 threads and queries."""
    for S in (64, 128, 96):
        inputs, expected = causal_attention(S)
        blocks = -(-S // 64)
        wrong, traffic = wrong_kernel(answer, "attention_64", blocks, 64, inputs, expected,
                                      np.int32(S), np.float32(32**-0.5))
        most = 4 * (2 * S * 32 + 2 * 32 * 64 * blocks * (blocks + 1) // 2)
        if wrong or (traffic and traffic[0] > most):
            return wrong or (f"The numbers are right, but with S = {S} it asks for {traffic[0]} "
                             f"bytes; with 64 queries to a tile {most} are enough.")
    return None


@exercise("5.8", "Only the place where the loop over the keys begins changes.",
          "A query sees itself and window - 1 keys before it, but none before key 0: "
          "int t = max(0, s - window + 1).")
def judge_attention_window(answer):
    """The source of `attention_window`, rung 2 with one more parameter, `int window`."""
    for S, window in ((64, 10), (64, 1), (32, 99)):
        inputs, expected = causal_attention(S, window)
        wrong, traffic = wrong_kernel(answer, "attention_window", S // 32, 32, inputs, expected,
                                      np.int32(S), np.float32(32**-0.5), np.int32(window))
        pairs = sum(min(s + 1, window) for s in range(S))
        most = 4 * (2 * S * 32 + 2 * 32 * pairs)
        if wrong or (traffic and traffic[0] > most):
            return wrong or (f"The numbers are right, but with S = {S} and a window of {window} it "
                             f"asks for {traffic[0]} bytes; {most} are enough.")
    return None


@exercise("5.9", "It is exercise 5.2 with another formula: x / (1 + e^(-x)).",
          "int i = blockIdx.x * blockDim.x + threadIdx.x; and where i < n: "
          "y[i] = x[i] / (1 + expf(-x[i]));")
def judge_silu(answer):
    """The source of `silu_mine(x, y, n)`, which takes its place in the model."""
    x = np.linspace(-90, 90, 200)
    wrong, traffic = wrong_kernel(answer, "silu_mine", 2, 128, [x], x / (1 + np.exp(-x)),
                                  np.int32(200))
    if wrong := wrong or one_thread_alone(traffic, 200):
        return wrong
    causal_lm, inputs = puzzles()[0], {"token_ids": ids_of("What is 345 + 278?")}
    expected = causal_lm(inputs)
    with unittest.mock.patch.object(phi3_ref, "silu", silu_by(answer)):
        return difference(causal_lm(inputs), expected, what="The array of the model's logits")

# ---- The judges of notebook 6 --------------------------------------------------------------------


@functools.cache
def solved(task, count=40):
    """Return ids [count, S] of questions to the embedded model with their answers, and of others.

    Numbers have three digits and words six letters, so that a position means the same in all. The
    others share no letter of their word with the first.
    """
    rng, pairs = np.random.default_rng(60), []
    for _ in range(count):
        a, b, c, d = (int(number) for number in rng.integers(100, 500, 4))
        letters = "".join(rng.permutation(list("abcdefghijklmnopqrstuvwxyz"))[:12])
        words = letters[:6], letters[6:]
        pairs.append({
            "add": [(f"What is {x} + {y}?", str(x + y)) for x, y in ((a, b), (c, d))],
            "reverse": [(f"Reverse {word}", word[::-1]) for word in words],
            "sort": [(f"Sort {word}", "".join(sorted(word))) for word in words],
        }[task])
    tokenizer = puzzles()[1]
    return [np.array([[tokenizer.start_token_id, *tokenizer(tokenizer.apply_chat_template(
        [{"role": "user", "content": question}]) + answer)] for question, answer in column])
        for column in zip(*pairs, strict=True)]


def taking(changes):
    """Return a tap that takes from `changes` {name: (index, values)} the values at the index."""

    def tap(name, array):
        if name in changes:
            index, values = changes[name]
            array = array.copy()
            array[index] = np.broadcast_to(values, array.shape)[index]
        return array

    return tap


def right_tokens(ids, n, tap):
    """Return [N, n], bool: whether the model predicts each of the answers' n tokens."""
    logits = puzzles()[0]({"token_ids": ids}, tap=tap)
    return logits[:, -n - 1 : -1].argmax(axis=-1) == ids[:, -n:]


@functools.cache
def right_without_networks():
    """Return [4, 2]: digits right without a layer's feed-forward network, if no carry, or one."""
    ids, tokenizer = solved("add", 100)[0], puzzles()[1]
    value = {tokenizer.token_to_id(digit): int(digit) for digit in "0123456789"}
    a, b = (np.vectorize(value.get)(ids[:, at]) for at in ([12, 13, 14], [18, 19, 20]))
    total = a @ [100, 10, 1] + b @ [100, 10, 1]
    digits = total[:, None] // [100, 10] % 10  # of the answers, and with the carries left out:
    carry = digits != (a + b)[:, :2] % 10
    record, rows = phi3_ref.Trace("*feedforward_output"), []
    right_tokens(ids, 3, record)
    for name, array in record.items():
        tap = taking({name: (np.s_[:], array.mean(axis=0, keepdims=True))})
        right = right_tokens(ids, 3, tap)[:, :2]
        rows.append([right[~carry].mean(), right[carry].mean()])
    return np.array(rows)


@exercise("6.1", "Print for each layer the share of right digits without and with a carry, and "
          "compare the two numbers of a layer.",
          "The first layer is the one with the largest difference of the two shares. Of the other "
          "three, one has both shares far below 1.")
def judge_networks(answer):
    """The layer that adds the carry, and that which digits with and without a carry miss alike."""
    answer = answer.tolist() if isinstance(answer, np.ndarray) else answer
    if not isinstance(answer, tuple | list) or len(answer) != 2 or not set(answer) <= {0, 1, 2, 3}:
        return "It should be a pair of layer numbers, such as (0, 1)."
    shares = right_without_networks()
    adds = int((shares[:, 0] - shares[:, 1]).argmax())
    others = [layer for layer in range(4) if layer != adds]
    says = min(others, key=lambda layer: shares[layer].sum())
    for layer, expected in zip(answer, (adds, says), strict=True):
        if layer != expected:
            plain, carried = shares[layer]
            return (f"Of a hundred other sums without layer {layer}'s network, {plain:.0%} of the "
                    f"digits that get no carry are right, and {carried:.0%} of those that get one.")
    return None


@functools.cache
def zero_and_mean():
    """Return {(task, head): the share of right answers with the head's context zero, and mean}."""
    shares = {}
    for task, n in (("add", 3), ("reverse", 6), ("sort", 6)):
        ids, record = solved(task)[0], phi3_ref.Trace("*attention.context")
        right_tokens(ids, n, record)
        for layer, (name, array) in enumerate(record.items()):
            for head in range(4):
                shares[task, f"{layer}.{head}"] = [
                    right_tokens(ids, n, taking({name: (np.s_[:, :, head], values)})).all(1).mean()
                    for values in (np.zeros(1, array.dtype), array.mean(axis=0, keepdims=True))]
    return shares


@exercise("6.2", "Make the table [3, 16] with zeros, subtract the notebook's `ablation`, and look "
          "for the largest absolute value.",
          "np.unravel_index(np.abs(zeroed - ablation).argmax(), zeroed.shape) gives its row, a "
          "task of TASKS, and its column, a head of NAMES.")
def judge_zero(answer):
    """The task and head at which zero and mean differ most in right answers."""
    shares = zero_and_mean()
    largest = max(shares, key=lambda pair: abs(np.subtract(*shares[pair])))
    if tuple(answer) == largest:
        return None
    if tuple(answer) not in shares:
        return 'It should be a pair of a task and a head, such as ("add", "3.0").'
    zero, mean = shares[tuple(answer)]
    return f"There {zero:.0%} are right with zero, {mean:.0%} with the mean: others differ more."


@functools.cache
def places_of_the_fifth_letter():
    """Return for layers 0, 1 and 2 the position whose residual stream moves it most."""
    (source, target), record = solved("reverse"), phi3_ref.Trace()
    right_tokens(source, 6, record)
    rows, places = np.arange(len(source)), []
    for layer in range(3):
        name, leads = f"transformer_layer_{layer}", []
        for s in range(12, 27):
            tap = taking({name: (np.s_[:, s], record[name])})
            logits = puzzles()[0]({"token_ids": target}, tap=tap)[:, -3]  # the fifth of six
            leads.append((logits[rows, source[:, -2]] - logits[rows, target[:, -2]]).mean())
        places.append(12 + int(np.argmax(leads)))
    return places


@exercise("6.3", "The fifth letter of the answer is index 4 of what `moved` returns. Take the "
          "position with the largest value, not the value.",
          "12 + int(at.argmax()), where `at` has one value for each position from 12 on; once for "
          "each of LAYERS[:3].")
def judge_letter(answer):
    """The positions at which the fifth letter of a reversal is after layers 0, 1 and 2."""
    for layer, (given, place) in enumerate(
            zip(answer, places_of_the_fifth_letter(), strict=True)):
        if given != place:
            return f"After layer {layer} another position than {given} moves it most."
    return None


# ---- The judges of notebook 7 --------------------------------------------------------------------


def central_differences(function, x, gradient, h=1e-5):
    """Return the gradient of x, given that of `function(x)`, by two values for each number of x."""
    result = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[i] = h
        result[i] = ((function(x + step) - function(x - step)) * gradient).sum() / (2 * h)
    return result


@exercise("7.1", "Of y = f(x), each number for itself, x' is y' times df/dx.",
          "The derivative of c tanh(x / c) is c (1 - tanh(x / c)^2) / c.")
def judge_soft_cap(answer):
    """`answer(gradient, x, cap)` is the gradient of x, where y = cap tanh(x / cap)."""
    rng = np.random.default_rng(0)
    for cap in (1.0, 30.0):
        x, gradient = rng.normal(size=(2, 3, 4)) * [[[cap]], [[1]]]
        expected = central_differences(lambda x, cap=cap: cap * np.tanh(x / cap), x, gradient)
        given = answer(gradient, x, cap)
        if wrong := difference(given, expected, 1e-6, f"The result, cap {cap:g},"):
            return wrong
    return None


@exercise("7.2", "n_a times g_a is the gradient of the sum over batch A.",
          "Add the gradients of both sums, and divide by the number of all tokens that count.")
def judge_accumulation(answer):
    """`answer(g_a, n_a, g_b, n_b)` is the gradient of the mean over both batches."""
    causal_lm, ids = puzzles("float64")[0], np.repeat(ids_of("Sort planet"), 2, axis=0)
    counts = np.zeros((2, ids.shape[1] - 1))
    counts[0, -3:] = counts[1, -9:] = 1  # three tokens that count, and nine

    def gradient(weight):
        scaled = weight * weight.size / weight.sum()  # the library's loss is over all labels
        _, tree = causal_lm.gradients({"token_ids": ids[:, :-1]}, ids[:, 1:], scaled)
        return tree["transformer_layers"][3]["qkv"]

    parts = [gradient(counts * [[row == 0], [row == 1]]) for row in range(2)]
    return difference(answer(parts[0], 3, parts[1], 9), gradient(counts), 1e-9, "The gradient")


@exercise("7.3", "Compute c' from y' as `norm_backward` does, with c in the place of x.",
          "c_i = x_i - sum_j x_j / D, so x'_j = c'_j - mean(c'). The scale's gradient is the sum "
          "of y' n over all vectors, the bias's that of y'.")
def judge_layer_norm(answer):
    """`answer(gradient, x, scale, epsilon)` is LayerNorm's derivative: of x, scale and bias."""
    rng = np.random.default_rng(0)
    x, gradient, scale = (rng.normal(size=size) for size in ((2, 3, 5), (2, 3, 5), 5))

    def layer_norm(x, scale, bias):
        centred = x - x.mean(axis=-1, keepdims=True)
        return scale * centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 0.1) + bias

    bias, given = np.zeros(5), answer(gradient, x, scale, 0.1)
    if not isinstance(given, tuple | list) or len(given) != 3:
        return "It should return three arrays: the gradients of x, of the scale and of the bias."
    expected = {
        "x": central_differences(lambda x: layer_norm(x, scale, bias), x, gradient),
        "the scale": central_differences(lambda scale: layer_norm(x, scale, bias), scale, gradient),
        "the bias": central_differences(lambda bias: layer_norm(x, scale, bias), bias, gradient)}
    for (name, numbers), mine in zip(expected.items(), given, strict=True):
        if wrong := difference(mine, numbers, 1e-6, f"The gradient of {name}"):
            return wrong
    return None


# ---- The judges of notebook 8 --------------------------------------------------------------------


@exercise("8.1", "Each of the H query heads and K value heads of a layer has an A, [r, D].",
          "Add up, for one layer, (H + K) r D numbers of A and 2 C r of B; times 32 layers.")
def judge_adapter_size(answer):
    """How many weights of Phi-3-mini learn with LoRA of rank 16."""
    config = phi3_ref.Phi3Config(32064, 32, 3072, 8192, 32, 32)
    weights = config.build_weights(lambda name, shape: np.broadcast_to(0, shape))
    tree = phi3_ref.with_adapters(weights, config, 16, lambda shape, _: np.broadcast_to(0, shape))
    count = sum(array.size for array in phi3_ref.adapters(tree).values())
    if not float(answer).is_integer():
        return f"A whole number is wanted, and this one is {answer}."
    if int(answer) == count:
        return None
    return f"{int(answer):,} are too {'many' if answer > count else 'few'}."


@exercise("8.2", "Go back through B first: low = A x has the gradient y' B.",
          "b's gradient is y'^T low, [C, r]; with low' = y' b, a's is low'^T x and x's is low' a.")
def judge_lora_backward(answer):
    """`answer(gradient, x, a, b)` is the derivative of one head's B (A x): of x, a and b."""
    rng = np.random.default_rng(0)
    x, a, b, gradient = (rng.normal(size=size) for size in ((5, 6), (2, 6), (4, 2), (5, 4)))
    given = answer(gradient, x, a, b)
    if not isinstance(given, tuple | list) or len(given) != 3:
        return "It should return three arrays: the gradients of x, of a and of b."
    expected = {"x": central_differences(lambda x: x @ a.T @ b.T, x, gradient),
                "a": central_differences(lambda a: x @ a.T @ b.T, a, gradient),
                "b": central_differences(lambda b: x @ a.T @ b.T, b, gradient)}
    for (name, numbers), mine in zip(expected.items(), given, strict=True):
        if wrong := difference(mine, numbers, 1e-6, f"The gradient of {name}"):
            return wrong
    return None


@exercise("8.3", "The singular value decomposition sorts a matrix's directions by their size.",
          "Of u, s, v keep the first r columns of u, numbers of s and rows of v; multiply s into "
          "one of the two.")
def judge_best_rank(answer):
    """`answer(change, r)` is (a, b), the factors of the nearest matrix of rank r."""
    rng = np.random.default_rng(0)
    change = rng.normal(size=(8, 5)) @ rng.normal(size=(5, 20)) + 0.1 * rng.normal(size=(8, 20))
    for r in (1, 3, 8):
        a, b = answer(change.copy(), r)
        if np.shape(a) != (r, 20) or np.shape(b) != (8, r):
            return (f"Of a change [8, 20] and rank {r}, a should be [{r}, 20] and b [8, {r}], and "
                    f"they are {list(np.shape(a))} and {list(np.shape(b))}.")
        least = np.sqrt((np.linalg.svd(change, compute_uv=False)[r:] ** 2).sum())
        error = np.linalg.norm(change - b @ a)
        if error > 1.001 * least + 1e-9:
            return f"With rank {r} the error is {error:.3f}, and could be {least:.3f}."
    return None


# ---- The judges of notebook 9 --------------------------------------------------------------------


def first_logits(question):
    """Return the logits [V] of the embedded model's first token of an answer."""
    return puzzles()[0]({"token_ids": ids_of(question)})[0, -1]


@exercise("9.1", "What stays is what is at least p times the largest probability.",
          "Set the others to zero with np.where, then divide by the sum.")
def judge_min_p(answer):
    """`answer(probabilities, p)` keeps what is at least p times as probable as the best."""
    for temperature, p in ((1, 0.5), (1, 0.95), (3, 0.02), (5, 0.1), (1, 0), (1, 1)):
        probabilities = phi3_ref.softmax(first_logits("What is 399?") / temperature)
        kept = probabilities * (probabilities >= p * probabilities.max())
        if wrong := difference(answer(probabilities.copy(), p), kept / kept.sum(), 1e-5,
                               f"The result for p = {p:g}"):
            return wrong
    return None


@exercise("9.2", "Begin with a temperature that is too low and one that is too high.",
          "Take the middle; if its entropy is below two bits, it is the new low one, else the new "
          "high one. It lies between 1 and 2.5.")
def judge_two_bits(answer):
    """The temperature at which the first token of `What is 399?` is worth two bits."""
    p = phi3_ref.softmax(first_logits("What is 399?").astype(float) / float(answer))
    bits = -(p * np.log2(np.maximum(p, 1e-300))).sum()
    if abs(bits - 2) < 0.01:
        return None
    return f"At temperature {float(answer):.3f} the entropy is {bits:.2f} bits."


@exercise("9.3", "Of the pairs that the word has now, merge the one with the lowest rank.",
          "`merged(tokens, pair)` merges every place where the pair stands. Look at the pairs "
          "again after each merge; stop where none is in `ranks`.")
def judge_bpe(answer):
    """`answer(word, ranks)` cuts a word as the library does that has these merges."""
    import tokenizers

    merges = ["a b", "b c", "ab c", "c a", "abc ab", "a a", "aa aa", "b a", "c c"]
    pairs = [tuple(merge.split()) for merge in merges]
    vocabulary = {token: i for i, token in enumerate(["a", "b", "c", "d", *map("".join, pairs)])}
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, pairs))
    ranks, rng = {pair: rank for rank, pair in enumerate(pairs)}, np.random.default_rng(0)
    for length in (1, 2, 3, 5, 8, 12, 12, 12, 12, 20, 20, 20):
        word = "".join(rng.choice(list("abcd"), length, p=[0.4, 0.3, 0.25, 0.05]))
        given, expected = list(answer(word, dict(ranks))), library.encode(word).tokens
        if given != expected:
            return f"With the merges {', '.join(merges)}, the word {word} is cut into {given}."
    return None


# ---- The judges of notebook 10 -------------------------------------------------------------------


@exercise("10.1", "4 bits, and 16 more for every 64 weights, are 4.25 bits a weight.",
          "Add up the matrices of `layer_shapes()`, times 32, and V times D once: those have "
          "4.25 / 8 bytes each. The rest of `count_params()` has 2 bytes each.")
def judge_size(answer):
    """Phi-3-mini's size in GB, matrices and output projection in int4 with groups of 64."""
    config = phi3_ref.Phi3Config(32064, 32, 3072, 8192, 32, 32)
    matrices = config.vocabulary_size * config.hidden_dim + config.num_layers * sum(
        math.prod(shape) for shape in config.layer_shapes().values() if len(shape) == 2)
    size = (matrices * 4.25 / 8 + 2 * (config.count_params() - matrices)) / 1e9
    return difference(float(answer), size, 0.02, "The size")  # two digits are enough


@exercise("10.2", "2^bits levels have 2^bits - 1 steps between them.",
          "round((x - min) / step) counts steps from the lowest level; times step, plus min, is "
          "the level itself.")
def judge_zero_point(answer):
    """`answer(x, bits)` rounds to 2^bits levels from the least to the greatest of x."""
    rng = np.random.default_rng(0)
    for bits, low, high in ((8, 0, 6), (4, 2, 3), (3, -5, 1), (2, -9, -8)):
        x = rng.uniform(low, high, (7, 9))
        levels = np.linspace(x.min(), x.max(), 2**bits)
        nearest = levels[np.abs(x[..., None] - levels).argmin(axis=-1)]
        given = np.asarray(answer(x.copy(), bits))
        if wrong := difference(given - x.min(), nearest - x.min(), 1e-6,
                               f"The result for {bits} bits, {low} to {high},"):
            return wrong
    return None


@exercise("10.3", "Compute the sum of squares for many scales, and take the best.",
          "m s, the largest number that can be written, lies between a tenth of max|w| and all of "
          "it; a few hundred scales in between are enough.")
def judge_clipping(answer):
    """`answer(w, bits)` is the scale with the least sum of squared errors, tails cut."""
    rng = np.random.default_rng(0)

    def error(w, s, m):
        return ((w - s * np.clip(np.round(w / s), -m, m)) ** 2).sum()

    for bits, draw in ((4, rng.normal), (3, rng.normal), (2, rng.laplace), (4, rng.laplace)):
        w = draw(size=256)
        m = 2 ** (bits - 1) - 1
        least = min(error(w, s, m) for s in np.abs(w).max() / m * np.linspace(0.02, 1, 1500))
        given = float(answer(w.copy(), bits))
        if not given > 0:
            return f"A scale is greater than zero, and this one is {given:g}."
        if error(w, given, m) > 1.02 * least:
            return (f"With {bits} bits the sum of squares is {error(w, given, m):.2f}, and could "
                    f"be {least:.2f}.")
    return None
