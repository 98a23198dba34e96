"""What the notebooks of the course share: a style of figures, labels, the map, a judge of answers.

`import course` sets the style. `labels` writes tokens as every figure shows them, `you_are_here`
draws the model, `check` judges an answer to an exercise. The judges stand at the end, a section
for each notebook: they compute what is right with phi3_ref, so that no solution is written here.
"""

import functools
import math
import unittest.mock

import matplotlib.pyplot as plt
import ml_dtypes
import numpy as np

import phi3_ref

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
    "kv_cache": ("KV cache", 4.5, 1.8, 0.96),
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
    [(4.5, 1.28), (4.5, 1.52)], [(5.78, 1), (5.9, 1), (5.9, 0.13)],
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
    zeroth = "transformer_layer_0"
    for layers in ([], [zeroth], [f"transformer_layer_{i}" for i in range(4)]):
        seen, change = phi3_ref.Trace(), answer(layers)
        causal_lm(inputs, tap=lambda *named, change=change, see=seen: see(named[0], change(*named)))
        for i in range(4):
            name = f"transformer_layer_{i}"
            for part in ("query", "key"):
                same = np.array_equal(seen[f"{name}.attention.{part}"],
                                      seen[f"{name}.attention.{part}_rotary"])
                if same != (name in layers):
                    return (f"With layers={layers}, the {part} of layer {i} is "
                            f"{'not rotated any more' if same else 'still rotated'}.")
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
    expected, given = set(np.flatnonzero(change > 1e-5).tolist()), {int(s) for s in answer}
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
    slowest = [phi3_ref.Phi3Config(8, 1, 96, 8, 1, 1, dtype="float64", rope_max_wavelength=base)
               .rotary(np.array([length]))[0][0, 0, -1] for base, length in (
                   (10000, 4096), (float(answer), 131072))]
    angles = np.arccos(slowest)
    if abs(angles[1] / angles[0] - 1) < 0.01:
        return None
    return (f"With it, the slowest pair turns by {angles[1]:.2f} radians in 131,072 positions, and "
            f"should turn by {angles[0]:.2f}.")


@exercise("2.3", "The prompt takes 24 positions, and each further step one; but one step finds "
          "that the sequence has outgrown 30 tokens, and forgets its cache.",
          "Nine tokens are chosen, from the logits at lengths 24 to 32. At length 31 the factors "
          "change: that step computes 31 positions instead of one.")
def judge_boundary(answer):
    """The number of positions that `forward` computes across su scaling's boundary."""
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


# ---- The judges of notebook 6 --------------------------------------------------------------------


# ---- The judges of notebook 7 --------------------------------------------------------------------


# ---- The judges of notebook 8 --------------------------------------------------------------------


# ---- The judges of notebook 9 --------------------------------------------------------------------


# ---- The judges of notebook 10 -------------------------------------------------------------------
