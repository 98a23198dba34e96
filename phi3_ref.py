"""Phi-3 as explicit array math: one file, read from top to bottom, on NumPy or CuPy.

The first part is a story: the whole model, from token ids to logits and back from the loss to every
gradient, as functions on plain arrays, most of them a few lines long, each derivative under its
function. Nothing is hidden in a framework, and no file is opened in it; kernels_cuda.py has raw
CUDA for what a GPU can do faster. The second part, the appendix, connects the model with the world:
Keras's and Hugging Face's names and files, tokenizers, generation, training on texts, instruments
to compare it with others, a command line. The model computes what KerasHub's `Phi3Backbone` does.

Legend. Shape comments use these letters; small s, t and k are a block's share of S, T and K:

    B  batch                     D  hidden_dim           C  head_dim
    S  query positions           F  intermediate_dim     R  rotary_dim, the rotated part of C
    T  key positions (S <= T)    V  vocabulary_size
    H  query heads               K  key/value heads      G  H // K, query heads per key/value head

Rounding. Where the computation is in 16 bits, matrix products, means, softmax, silu and RoPE's
angles are in float32 nevertheless, and these results are rounded:

    linear               the product, once
    lora                 its sum with the projection
    rms_norm             the normed and scaled vector, once (in transformers before the scale, too)
    RoPE                 cosines and sines; then each product, and each sum of two
    attention            the context, once
    textbook_attention   the scaled query; scores; probabilities; the context
    SwiGLU               silu's result; then the product of gate and intermediate
    residuals, dropout   each result
    weights              in the mixed policies, where they are used
    gradients            where the forward's result was; those of weights never: they are float32
    AdamW                the weights, once a step

References:

    Phi-3           Abdin et al. 2024, https://arxiv.org/abs/2404.14219
    RMSNorm         Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467
    RoPE            Su et al. 2021, https://arxiv.org/abs/2104.09864
    su scaling      Ding et al. 2024 (LongRoPE), https://arxiv.org/abs/2402.13753
    attention       Vaswani et al. 2017, https://arxiv.org/abs/1706.03762
    GQA             Ainslie et al. 2023, https://arxiv.org/abs/2305.13245
    SwiGLU          Shazeer 2020, https://arxiv.org/abs/2002.05202
    AdamW           Loshchilov and Hutter 2017, https://arxiv.org/abs/1711.05101
    KerasHub        https://github.com/keras-team/keras-hub, keras_hub/src/models/phi3
    transformers    https://github.com/huggingface/transformers, src/transformers/models/phi3
"""

import argparse
import collections
import concurrent.futures
import contextlib
import contextvars
import dataclasses
import datetime
import fnmatch
import functools
import glob
import html
import inspect
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import signal
import sys
import threading
import time
import types
import warnings

import ml_dtypes
import numpy as np

# ---- Arrays and dtypes ---------------------------------------------------------------------------

# Each policy: the dtype of the weights, the dtype of the computation. "float64" computes everything
# in float64: the oracle that every other result can be measured against.
DTYPE_POLICIES = {
    "float64": ("float64", "float64"),
    "float32": ("float32", "float32"),
    "float16": ("float16", "float16"),
    "bfloat16": (ml_dtypes.bfloat16, ml_dtypes.bfloat16),
    "mixed_float16": ("float32", "float16"),
    "mixed_bfloat16": ("float32", ml_dtypes.bfloat16),
}


def get_array_module(array):
    """Return the module, `numpy` or `cupy`, whose functions compute on `array`."""
    cupy = sys.modules.get("cupy")  # whoever holds a CuPy array has imported CuPy
    # (In another thread, `import cupy` may be under way: it has no arrays then.)
    return cupy if isinstance(array, getattr(cupy, "ndarray", ())) else np


@functools.lru_cache
def constant(xp, numbers, dtype):
    """Return a tuple of numbers as an array [len(numbers)] of `xp`, sent to a GPU only once."""
    return xp.asarray(numbers, dtype)


def upcast(x):
    """Return `x` in the dtype in which sums run: float64 stays, all else becomes float32."""
    return x if x.dtype == np.float64 else x.astype(np.float32, copy=False)


def kernels_for(x):
    """Return `kernels_cuda` if it computes on arrays like `x`, CuPy's but in float64; else None."""
    if get_array_module(x) is np or x.dtype == np.float64:
        return None
    import kernels_cuda

    return kernels_cuda


def matmul(a, b, wide=False):
    """Return `a @ b`, summed as `upcast` says and, unless `wide`, rounded to the dtype of `a`.

    NumPy has no bfloat16 product and only a slow float16 one; CuPy has no batched bfloat16 one. Two
    matrices of 16 bits, though, a GPU's tensor cores multiply fastest, and sum in float32.
    """
    kernels = kernels_for(a)
    if kernels and a.dtype == b.dtype and a.dtype.itemsize == a.ndim == b.ndim == 2:
        return kernels.transposed_matmul(a.T, b) if wide else a @ b
    product = upcast(a) @ upcast(b)
    return product if wide else product.astype(a.dtype, copy=False)


# ---- The configuration ---------------------------------------------------------------------------


def su_magnitude(stretch, pretraining_sequence_length):
    """Return su scaling's factor on cosines and sines, for a model `stretch` times longer."""
    return math.sqrt(1 + math.log(max(1, stretch)) / math.log(pretraining_sequence_length))


@dataclasses.dataclass(frozen=True)
class Phi3Config:
    """The sizes and settings of a Phi-3, under KerasHub's names.

    Raises:
        ValueError: a value is impossible.
    """

    vocabulary_size: int  # V
    num_layers: int
    hidden_dim: int  # D
    intermediate_dim: int  # F
    num_query_heads: int  # H
    num_key_value_heads: int  # K, divides H
    layer_norm_epsilon: float = 1e-6
    dropout: float = 0.0  # in [0, 1), the fraction dropped in training
    max_sequence_length: int = 4096  # the positions that the model is made for
    pretraining_sequence_length: int = 4096  # longer sequences take su scaling's long factors
    rope_max_wavelength: float = 10000
    rope_scaling_type: str | None = None  # or "su"
    rope_scaling_short_factor: list | None = None  # R / 2 floats, for "su"
    rope_scaling_long_factor: list | None = None  # R / 2 floats, for "su"
    dtype: str = "float32"  # a key of `DTYPE_POLICIES`
    _: dataclasses.KW_ONLY
    fused: bool = True  # False: the textbook functions, and not their fast twins
    # The rest is for Hugging Face checkpoints that KerasHub cannot express.
    head_dim: int | None = None  # C; None becomes D // H
    partial_rotary_factor: float = 1.0  # in (0, 1], the share of C that RoPE rotates
    sliding_window: int | None = None  # see `visible_keys`
    tie_word_embeddings: bool = False  # the output projection is the token embedding
    rope_attention_factor: float | None = None  # None is `su_magnitude`

    def __post_init__(self):
        check_config(self)
        put = functools.partial(object.__setattr__, self)  # for what follows from the fields
        put("head_dim", self.head_dim or self.hidden_dim // self.num_query_heads)
        put("rotary_dim", int(self.head_dim * self.partial_rotary_factor))  # R
        weight_dtype, compute_dtype = DTYPE_POLICIES[self.dtype]
        put("weight_dtype", np.dtype(weight_dtype))
        put("compute_dtype", np.dtype(compute_dtype))

    def uses_long_factors(self, length):
        """Say whether a sequence of `length` positions takes su scaling's long factors."""
        return self.rope_scaling_type == "su" and length > self.pretraining_sequence_length

    def rotary(self, positions, long=False):
        """Return the cosines and sines by which RoPE turns pairs of a head's components.

        Pair i turns by `position * max_wavelength^(-2i / R)` radians. Su scaling makes contexts
        longer: it divides each pair's frequency by a factor of its own, so that far positions stay
        within the angles that the model has learned, and makes the dot products a little larger, so
        that attention over more keys stays as sharp. A sequence beyond the pretraining length takes
        other factors than one within. (Keys that were cached before keep the old ones: whoever
        crosses that length starts a new cache, as `Phi3CausalLM.next_logits` does.)

        For positions [S], [cos, sin] are [S, 1, R / 2] each, in the compute dtype; the 1 broadcasts
        over heads. When they are `long`, `uses_long_factors` says.

        Source: https://arxiv.org/abs/2104.09864, https://arxiv.org/abs/2402.13753; KerasHub's
        `RotaryEmbedding` and `Phi3SuScaledRotaryEmbedding`.
        """
        xp, R = get_array_module(positions), self.rotary_dim
        wide = np.float64 if self.compute_dtype == np.float64 else np.float32
        frequencies = self.rope_max_wavelength ** -(xp.arange(0, R, 2).astype(wide) / R)  # [R / 2]
        magnitude = 1.0
        if self.rope_scaling_type == "su":
            factors = self.rope_scaling_long_factor if long else self.rope_scaling_short_factor
            frequencies = frequencies / constant(xp, tuple(factors), wide)
            stretch = self.max_sequence_length / self.pretraining_sequence_length
            magnitude = self.rope_attention_factor or su_magnitude(
                stretch, self.pretraining_sequence_length)
        angles = positions.astype(wide)[:, None, None] * frequencies  # [S, 1, R / 2]
        tables = xp.cos(angles) * magnitude, xp.sin(angles) * magnitude  # the same shape
        return [table.astype(self.compute_dtype, copy=False) for table in tables]

    def layer_shapes(self):
        """Return {name: shape} of one layer's weights.

        A matrix's rows are outputs, as in Hugging Face's files.
        """
        D, F, C = self.hidden_dim, self.intermediate_dim, self.head_dim
        H, K = self.num_query_heads, self.num_key_value_heads
        return {
            "pre_attention_layernorm": (D,),
            "qkv": ((H + 2 * K) * C, D),  # query, key and value in one product
            "attention_output": (D, H * C),
            "post_attention_layernorm": (D,),
            "feedforward_gate_intermediate": (2 * F, D),  # gate and intermediate in one product
            "feedforward_output": (D, F),
        }

    def count_params(self):
        """Return the number of parameters, an int; tied embeddings count once."""
        layer = sum(math.prod(shape) for shape in self.layer_shapes().values())
        embeddings = (1 if self.tie_word_embeddings else 2) * self.vocabulary_size * self.hidden_dim
        return embeddings + self.num_layers * layer + self.hidden_dim

    def build_weights(self, make):
        """Return the tree of weights, each array made by `make(name, shape)`."""
        V, D = self.vocabulary_size, self.hidden_dim
        tree = {
            "token_embedding": make("token_embedding", (V, D)),
            "transformer_layers": [
                {part: make(f"transformer_layer_{i}.{part}", shape)
                 for part, shape in self.layer_shapes().items()}
                for i in range(self.num_layers)
            ],
            "sequence_output_layernorm": make("sequence_output_layernorm", (D,)),
        }
        tied = self.tie_word_embeddings
        reverse = tree["token_embedding"] if tied else make("reverse_embedding", (V, D))
        return tree | {"reverse_embedding": reverse}


# ---- The layers, as pure functions ---------------------------------------------------------------


# Five functions come in pairs. The textbook's stand here, to be read; their fast twins, computed
# unless a config says `fused=False`, stand after the model. Only the rounding of results differs.
#
# Learning asks of every array: if it changed a little, by how much would the loss? The answer is an
# array of the same shape, its *gradient*, x' in texts and d_x in code. If y = f(x), `f_backward`
# takes y' first and returns x', by the chain rule: x'_j = sum_i y'_i dy_i/dx_j, over each use of x.
# From the loss back to the weights, these sums are all of "backpropagation".


def textbook_linear(x, weight):
    """Apply a dense layer without bias; `x` [..., in], `weight` [out, in] -> [..., out]."""
    return matmul(x, weight.T)


def linear_backward(gradient, x, weight, frozen=False):
    """Return the gradients of `linear`'s x, [..., in], and weight, [out, in]; None if it is frozen.

    Of y_i = sum_j W_ij x_j, dy_i/dx_j = W_ij, so that x'_j = sum_i y'_i W_ij. And each position n
    has used the same W_ij, with its own x_j: W'_ij = sum_n y'_ni x_nj.
    """
    rows, d_y = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, len(weight))  # [n, in], [n, out]
    d_weight = None if frozen else matmul(d_y.T, rows, wide=True)
    return linear(d_y, weight.T).reshape(x.shape), d_weight


def lora(x, a, b):
    """Return what LoRA adds to a projection of x: y = W x + B (A x), of which only A and B learn.

    W is large, and frozen. They are small, as the rank r of B A is, and in float32: `x` is
    [..., D], `a` is [heads r, D], `b`, for all heads, [C, r]; the result is [..., heads, C].

    Source: https://arxiv.org/abs/2106.09685; Keras's `EinsumDense.enable_lora`, with alpha = r.
    """
    r = b.shape[1]
    low = textbook_linear(upcast(x), a).reshape(*x.shape[:-1], len(a) // r, r)  # [..., heads, r]
    return textbook_linear(low, b)


def lora_backward(gradient, x, a, b):
    """Return the gradients of `lora`'s x, a and b: those of its two products."""
    low = textbook_linear(upcast(x), a).reshape(*gradient.shape[:-1], b.shape[1])  # as there
    d_low, d_b = linear_backward(upcast(gradient), low, b)
    d_x, d_a = linear_backward(d_low.reshape(*x.shape[:-1], len(a)), upcast(x), a)
    return d_x, d_a, d_b


def textbook_rms_norm(x, scale, epsilon):
    """Divide each vector by its root mean square, then scale its components.

    Args:
        x: [..., D], a floating-point array.
        scale: [D].
        epsilon: float, added to the mean square.

    Returns:
        Like `x`.

    Source: https://arxiv.org/abs/1910.07467; KerasHub's `Phi3LayerNorm`.
    """
    wide_x = upcast(x)
    mean_square = (wide_x * wide_x).mean(axis=-1, keepdims=True)
    normed = wide_x / (mean_square + epsilon) ** 0.5
    normed *= upcast(scale)  # in place: touching fresh memory costs as much as the arithmetic
    return normed.astype(x.dtype, copy=False)


def textbook_rms_norm_backward(gradient, x, scale, epsilon):
    """Return the gradients of `rms_norm`'s x, like `x`, and scale, [D].

    It was y = scale n, where n = x / r and r = (mean(x^2) + epsilon)^(1/2). So n' = scale y'. Each
    x_j acts on its own n_j, by 1 / r; and on all n_i through r, by -x_i / r^2 dr/dx_j, where
    dr/dx_j = x_j / (D r). Together, with x = r n, x' = (n' - n mean(n' n)) / r: with epsilon 0
    that is n' without its part along n, for the norm then hides how long x is. And scale' is the
    sum of y' n over all positions.
    """
    wide_x, d_y = upcast(x), upcast(gradient)
    r = ((wide_x * wide_x).mean(axis=-1, keepdims=True) + epsilon) ** 0.5  # [..., 1]
    n, d_n = wide_x / r, d_y * upcast(scale)
    d_x = (d_n - n * (d_n * n).mean(axis=-1, keepdims=True)) / r
    d_scale = (d_y * n).reshape(-1, len(scale)).sum(axis=0)
    return d_x.astype(x.dtype, copy=False), d_scale


def rotary_embedding(x, cos, sin):
    """Rotate pairs of components of `x`, [B, S, heads, C], by their position's angles (RoPE).

    Component i pairs with component i + R / 2 (halves, not interleaved); what lies beyond R stays
    as it is. `cos` and `sin`, each [S, 1, R / 2], are those of `Phi3Config.rotary`.
    """
    xp, half = get_array_module(x), cos.shape[-1]
    x1, x2 = x[..., :half], x[..., half : 2 * half]  # [B, S, heads, R / 2]
    turned = [x1 * cos - x2 * sin, x2 * cos + x1 * sin]
    return xp.concatenate([*turned, x[..., 2 * half :]], axis=-1)


def rotary_embedding_backward(gradient, cos, sin):
    """Return the gradient of `rotary_embedding`'s x: the result's, rotated back.

    Of y1 = x1 cos - x2 sin and y2 = x2 cos + x1 sin, x1' = y1' cos + y2' sin, and
    x2' = y2' cos - y1' sin: the same with -sin. (Su scaling's magnitude multiplies both ways.)
    """
    return rotary_embedding(gradient, cos, -sin)


def softmax(scores, visible=None):
    """Return the softmax of `scores`, [..., T] in float32 or float64, over the last axis.

    What is not `visible`, bool and broadcast to `scores`, gets probability zero: a row that sees
    nothing gives zeros. (KerasHub's fused path averages all values there.)
    """
    xp = get_array_module(scores)
    if scores.size == 0:  # which has no largest element
        return scores
    if visible is not None:
        scores = xp.where(visible, scores, -math.inf)
    row_max = scores.max(axis=-1, keepdims=True)  # [..., 1]
    # exp(x - max) cannot overflow. Where nothing is visible, max is -inf and exp(-inf - 0) is 0.
    exponentials = xp.exp(scores - xp.where(row_max == -math.inf, 0, row_max))
    total = exponentials.sum(axis=-1, keepdims=True)
    return exponentials / xp.where(total == 0, 1, total)


def softmax_backward(gradient, probabilities):
    """Return the gradient of `softmax`'s scores; `gradient` is that of its result, `probabilities`.

    Of p_i = e^(s_i) / sum_j e^(s_j), dp_i/ds_j = p_i ((i == j) - p_j), so that
    s'_j = p_j (p'_j - sum_i p'_i p_i). Where p_j is 0, for what is not visible, s'_j is 0, too.
    """
    return probabilities * (gradient - (gradient * probabilities).sum(axis=-1, keepdims=True))


def visible_keys(query_positions, key_positions, sliding_window=None, padding_mask=None):
    """Say which keys each query may see: none that come later, left the window, or are padding.

    Positions are [S] and [T]. With a `sliding_window`, a query sees itself and `sliding_window - 1`
    keys before; in the mask, [..., T], 0 is padding. Returns [S, T], bool, or [..., S, T].
    """
    distance = query_positions[:, None] - key_positions
    visible = (distance >= 0) & (distance < (sliding_window or math.inf))
    return visible if padding_mask is None else visible & (padding_mask[..., None, :] != 0)


# Looking inside: attention, layers and the model take a `tap`, a function (name, array) -> array.
# They call it with each named intermediate, and go on with what it returns: one mechanism to
# record, compare, patch and switch off. Where it is `no_tap`, they need not have all intermediates.


def no_tap(name, array):
    """Return `array`: the tap of those who do not look."""
    return array


def prefixed(tap, prefix):
    """Return a tap that calls `tap` with `prefix` and a dot before each name."""
    return tap if tap is no_tap else lambda name, array: tap(f"{prefix}.{name}", array)


class Tape(dict):
    """A tap that keeps every array, no copy of it: what derivatives need of the forward.

    Of who looks at the same time it keeps what that tap returns. It has `arrays` from the start.
    """

    def __init__(self, looking=no_tap, **arrays):
        super().__init__(arrays)
        self.looking = looking

    def __call__(self, name, array):
        """Keep what the looking tap returns for `array`, and return it."""
        self[name] = array = self.looking(name, array)
        return array


def textbook_attention(query, key, value, padding_mask=None, sliding_window=None, tap=no_tap):
    """Causal grouped-query attention, step by step, with the whole score matrix in memory.

    Args:
        query: [B, S, H, C]; the queries are the last S of the T positions.
        key, value: [B, T, K, C]; query head h reads key/value head h // G.
        padding_mask: [B, T], 1 for a token, 0 for padding, which nobody sees; None is all ones.
        sliding_window: int or None; see `visible_keys`.
        tap: called with "scores", before the mask, and "probabilities", each [B, H, S, T].

    Returns:
        [B, S, H, C], in the dtype of `query`. Rows that see no key are zero.

    Source: https://arxiv.org/abs/1706.03762, https://arxiv.org/abs/2305.13245; KerasHub's
    `Phi3Attention`, which rounds in 16 bits as often, but scales the product.
    """
    xp = get_array_module(query)
    (B, S, H, C), (T, K) = query.shape, key.shape[1:3]
    # Scaled before the product, as in `attention`: q·k itself can exceed float16's 65,504.
    query = query * xp.asarray(C**-0.5, query.dtype)
    # The G query heads of a group share one key/value head: an axis of size 1 broadcasts over them.
    query = query.reshape(B, S, K, H // K, C).transpose(0, 2, 3, 1, 4)  # [B, K, G, S, C]
    key = key.transpose(0, 2, 3, 1)[:, :, None]  # [B, K, 1, C, T]
    value = value.transpose(0, 2, 1, 3)[:, :, None]  # [B, K, 1, T, C]

    scores = tap("scores", matmul(query, key).reshape(B, H, S, T))  # from [B, K, G, S, T]
    visible = visible_keys(xp.arange(T - S, T), xp.arange(T), sliding_window, padding_mask)
    visible = visible[..., None, :, :]  # [1, S, T] or [B, 1, S, T], for all heads
    probabilities = softmax(upcast(scores), visible).astype(query.dtype, copy=False)
    probabilities = tap("probabilities", probabilities)
    context = matmul(probabilities.reshape(B, K, H // K, S, T), value)  # [B, K, G, S, C]
    return context.transpose(0, 3, 1, 2, 4).reshape(B, S, H, C)


def textbook_attention_backward(gradient, query, key, value, padding_mask=None, sliding_window=None,
                                tap=no_tap, tape=()):
    """Return the gradients of attention's query, key and value, each like it.

    It was s = q k^T / C^(1/2), p = softmax(s), context = p v. As in `linear`, v' = p^T context',
    p' = context' v^T; with s' of `softmax_backward`, q' = s' k / C^(1/2), k' = s'^T q / C^(1/2). No
    mask is needed: what it hid has p = 0. Keys and values sum over the G heads that read them.

    Args:
        gradient: [B, S, H, C], that of the result.
        query, key, value, padding_mask, sliding_window: as for `textbook_attention`.
        tap: called with the gradients of "probabilities" and "scores", each [B, H, S, T].
        tape: dict, what the forward has tapped; without its "probabilities" it is called again.
    """
    (B, S, H, C), (T, K) = query.shape, key.shape[1:3]
    if "probabilities" not in tape:
        tape = Tape()
        textbook_attention(query, key, value, padding_mask, sliding_window, tape)
    scale = get_array_module(query).asarray(C**-0.5, query.dtype)
    # As in the forward, but the group beside its queries, so that products sum over both.
    query, d_context = (
        x.reshape(B, S, K, H // K, C).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, C)
        for x in (query * scale, gradient))  # [B, K, GS, C]
    key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 3, 1)  # [B, K, T, C], [..., C, T]
    p = tape["probabilities"].reshape(B, K, -1, T)  # [B, K, GS, T]

    d_value = matmul(p.swapaxes(2, 3), d_context)  # of context = p v; [B, K, T, C]
    d_p = tap("probabilities", matmul(d_context, value).reshape(B, H, S, T))
    wide_p = upcast(tape["probabilities"])  # rounded, they do not add up to 1, on which s' relies
    total = wide_p.sum(axis=-1, keepdims=True)
    d_s = softmax_backward(upcast(d_p), wide_p / (total + (total == 0)))
    d_s = tap("scores", d_s.astype(query.dtype, copy=False)).reshape(p.shape)
    d_query = matmul(d_s, key) * scale  # of s = q k^T; [B, K, GS, C]
    d_key = matmul(d_s.swapaxes(2, 3), query)  # [B, K, T, C]
    d_query = d_query.reshape(B, K, H // K, S, C).transpose(0, 3, 1, 2, 4).reshape(B, S, H, C)
    return d_query, d_key.transpose(0, 2, 1, 3), d_value.transpose(0, 2, 1, 3)


def silu(x):
    """Return `x * sigmoid(x)`, rounded once; any shape."""
    if kernels := kernels_for(x):
        return kernels.silu(x)
    wide_x, xp = upcast(x), get_array_module(x)
    y = -wide_x  # then, in place, exp(-x), 1 + exp(-x) and x / (1 + exp(-x)): twice as fast
    with np.errstate(over="ignore"):  # where exp(-x) is inf, the quotient is -0: the limit
        xp.exp(y, out=y)
    y += 1
    return xp.divide(wide_x, y, out=y).astype(x.dtype, copy=False)


def silu_backward(gradient, x):
    """Return the gradient of `silu`'s x.

    Of y = x s, where s = 1 / (1 + e^(-x)) and ds/dx = s (1 - s): x' = y' s (1 + x (1 - s)).
    """
    if gradient.dtype == x.dtype and (kernels := kernels_for(x)):  # a tap can change the dtype
        return kernels.silu_backward(gradient, x)
    wide_x, xp = upcast(x), get_array_module(x)
    s = -wide_x
    with np.errstate(over="ignore"):
        xp.exp(s, out=s)
    s += 1
    xp.divide(1, s, out=s)
    slope = 1 - s  # then, in place, x (1 - s), 1 + x (1 - s), s (1 + x (1 - s)) and x'
    slope *= wide_x
    slope += 1
    slope *= s
    slope *= upcast(gradient)
    return slope.astype(x.dtype, copy=False)


def dropout(x, rate, rng, tap=no_tap):
    """Zero each element with probability `rate` and divide the others by `1 - rate`.

    `rng` is a random generator of the module of `x`, in training; None leaves `x` as it is. The tap
    is called with "dropout", bool like `x`: what is kept.
    """
    if rng is None or rate == 0:
        return x
    keep = tap("dropout", rng.random(x.shape, dtype=np.float32) >= rate)
    return (upcast(x) * keep / (1 - rate)).astype(x.dtype, copy=False)


def dropout_backward(gradient, rate, keep):
    """Return the gradient of `dropout`'s x: the same zeros, the same factor; None keeps all."""
    if keep is None:
        return gradient
    return (upcast(gradient) * keep / (1 - rate)).astype(gradient.dtype, copy=False)


def functions_for(config):
    """Return `linear`, `rms_norm`, `attention`, and the last two's derivatives: fast, or not."""
    if config.fused:
        return linear, rms_norm, attention, (rms_norm_backward, attention_backward)
    return textbook_linear, textbook_rms_norm, textbook_attention, (
        textbook_rms_norm_backward, textbook_attention_backward)


# What a tap is called with in each layer, in order, and the shapes in the legend's letters. The
# last is the layer's result, whose name is the layer's alone; the model taps it. (Where dropout
# drops, also "attention.dropout", "attention_output.dropout" and "feedforward_output.dropout".)
LAYER_TAPS = {
    "pre_attention_layernorm": "BSD", "attention.query": "BSHC", "attention.key": "BSKC",
    "attention.value": "BSKC", "attention.query_rotary": "BSHC", "attention.key_rotary": "BSKC",
    "attention.scores": "BHST", "attention.probabilities": "BHST", "attention.context": "BSHC",
    "attention_output": "BSD", "attention_residual": "BSD", "post_attention_layernorm": "BSD",
    "feedforward_gate": "BSF", "feedforward_intermediate": "BSF", "feedforward_output": "BSD",
    "": "BSD",
}


def decoder_layer(x, weights, config, rotary, padding_mask=None, cache=None, index=0, rng=None,
                  tap=no_tap):
    """One transformer layer: attention, then a gated feed-forward network, each added to `x`.

    Args:
        x: [B, S, D], as is the result.
        weights: dict of arrays as `Phi3Config.layer_shapes` lists them, in the dtype of `x`; maybe
            with "query_lora_a", "query_lora_b", "value_lora_a" and "value_lora_b", see `lora`.
        config, rotary: Phi3Config; its `rotary` of the S positions.
        padding_mask: [B, S] or None; see `textbook_attention`. Not with a cache.
        cache: KVCache or None; what holds the keys and values of the positions before.
        index, rng: int, the layer's place in the cache; see `dropout`.
        tap: called with all of `LAYER_TAPS` but the last.

    Source: KerasHub's `Phi3Decoder`.
    """
    linear, rms_norm, attention, _ = functions_for(config)
    (B, S, _), H, K = x.shape, config.num_query_heads, config.num_key_value_heads
    C, F = config.head_dim, config.intermediate_dim

    normed = rms_norm(x, weights["pre_attention_layernorm"], config.layer_norm_epsilon)
    normed = tap("pre_attention_layernorm", normed)
    all_heads = linear(normed, weights["qkv"]).reshape(B, S, H + 2 * K, C)
    for part, heads in ("query", slice(H)), ("value", slice(-K, None)):
        if f"{part}_lora_a" in weights:
            change = lora(normed, weights[f"{part}_lora_a"], weights[f"{part}_lora_b"])
            all_heads[:, :, heads] = upcast(all_heads[:, :, heads]) + change
    query = tap("attention.query", all_heads[:, :, : -2 * K])  # [B, S, H, C]
    key = tap("attention.key", all_heads[:, :, -2 * K : -K])  # [B, S, K, C]
    value = tap("attention.value", all_heads[:, :, -K:])
    query = tap("attention.query_rotary", rotary_embedding(query, *rotary))
    key = tap("attention.key_rotary", rotary_embedding(key, *rotary))
    seen = key, value, padding_mask, config.sliding_window  # what attention takes after the query
    if cache is not None:
        seen = cache.append(index, key, value)  # the same, with the keys and values of before
    # Who looks sees inside of attention, the textbook's. A tape does not: it would keep S x T.
    blind = isinstance(tap, Tape) and tap.looking is no_tap
    inside = {"tap": no_tap if blind else prefixed(tap, "attention")}
    if blind and config.fused:  # of each row of T it keeps one number
        empty = get_array_module(x).empty((B, H, S), upcast(x[:0]).dtype)
        inside["log_sum_exp"] = tap["attention.log_sum_exp"] = empty
    context = tap("attention.context", attention(query, *seen, **inside))
    context = dropout(context, config.dropout, rng, prefixed(tap, "attention"))  # as KerasHub's
    output = linear(context.reshape(B, S, H * C), weights["attention_output"])
    output = tap("attention_output", output)
    output = dropout(output, config.dropout, rng, prefixed(tap, "attention_output"))
    x = tap("attention_residual", x + output)

    normed = rms_norm(x, weights["post_attention_layernorm"], config.layer_norm_epsilon)
    normed = tap("post_attention_layernorm", normed)
    gate_intermediate = linear(normed, weights["feedforward_gate_intermediate"])  # [B, S, 2F]
    gate = tap("feedforward_gate", gate_intermediate[..., :F])
    intermediate = tap("feedforward_intermediate", gate_intermediate[..., F:])
    gated = silu(gate)  # SwiGLU: silu(gate) * intermediate, [B, S, F]
    gated *= intermediate  # in place: the array is silu's own
    output = tap("feedforward_output", linear(gated, weights["feedforward_output"]))
    return x + dropout(output, config.dropout, rng, prefixed(tap, "feedforward_output"))


def decoder_layer_backward(gradient, weights, config, rotary, padding_mask, tape, tap=no_tap):
    """Return the gradients of `decoder_layer`'s x, [B, S, D], and of its weights, a dict like them.

    Read it beside the forward, from its last line to its first. Where x went two ways, the residual
    and a branch, its gradient is the sum of what comes back. With LoRA all but the adapters is
    frozen, and not in the dict.

    Args:
        gradient: [B, S, D], that of the layer's result.
        weights, config, rotary, padding_mask: as for the forward.
        tape: Tape, the forward's tap; and "x", the forward's x.
        tap: called with the gradients of all of `LAYER_TAPS` but the last, from last to first.
    """
    *_, (rms_norm_backward, attention_backward) = functions_for(config)
    xp, (B, S, _), rate = get_array_module(gradient), gradient.shape, config.dropout
    epsilon, gradients, frozen = config.layer_norm_epsilon, {}, "query_lora_a" in weights

    d_output = dropout_backward(gradient, rate, tape.get("feedforward_output.dropout"))
    d_output = tap("feedforward_output", d_output)
    gate, intermediate = tape["feedforward_gate"], tape["feedforward_intermediate"]
    activated = silu(gate)
    d_gated, gradients["feedforward_output"] = linear_backward(
        d_output, activated * intermediate, weights["feedforward_output"], frozen)
    # Of activated * intermediate, each is the other's derivative.
    d_intermediate = tap("feedforward_intermediate", d_gated * activated)
    d_gate = tap("feedforward_gate", silu_backward(d_gated * intermediate, gate))
    d_normed, gradients["feedforward_gate_intermediate"] = linear_backward(
        xp.concatenate([d_gate, d_intermediate], axis=-1), tape["post_attention_layernorm"],
        weights["feedforward_gate_intermediate"], frozen)
    d_normed = tap("post_attention_layernorm", d_normed)
    d_branch, gradients["post_attention_layernorm"] = rms_norm_backward(
        d_normed, tape["attention_residual"], weights["post_attention_layernorm"], epsilon)
    gradient = tap("attention_residual", gradient + d_branch)

    d_output = dropout_backward(gradient, rate, tape.get("attention_output.dropout"))
    d_output = tap("attention_output", d_output)
    context, keep = tape["attention.context"], tape.get("attention.dropout")
    kept = dropout_backward(context, rate, keep)  # the forward's again: the same function
    d_kept, gradients["attention_output"] = linear_backward(
        d_output, kept.reshape(B, S, -1), weights["attention_output"], frozen)
    d_context = dropout_backward(d_kept.reshape(context.shape), rate, keep)
    d_query, d_key, d_value = attention_backward(
        tap("attention.context", d_context), tape["attention.query_rotary"],
        tape["attention.key_rotary"], tape["attention.value"], padding_mask, config.sliding_window,
        prefixed(tap, "attention"), {name.removeprefix("attention."): tape[name] for name in tape})
    d_key = rotary_embedding_backward(tap("attention.key_rotary", d_key), *rotary)
    d_query = rotary_embedding_backward(tap("attention.query_rotary", d_query), *rotary)
    d_value, d_key = tap("attention.value", d_value), tap("attention.key", d_key)
    d_query = tap("attention.query", d_query)
    d_normed, gradients["qkv"] = linear_backward(
        xp.concatenate([d_query, d_key, d_value], axis=2).reshape(B, S, -1),
        tape["pre_attention_layernorm"], weights["qkv"], frozen)
    for part, d_part in (("query", d_query), ("value", d_value)) if frozen else ():
        a, b = f"{part}_lora_a", f"{part}_lora_b"
        d_x, gradients[a], gradients[b] = lora_backward(
            d_part, tape["pre_attention_layernorm"], weights[a], weights[b])
        d_normed = (upcast(d_normed) + d_x).astype(d_normed.dtype, copy=False)
    d_normed = tap("pre_attention_layernorm", d_normed)
    d_branch, gradients["pre_attention_layernorm"] = rms_norm_backward(
        d_normed, tape["x"], weights["pre_attention_layernorm"], epsilon)
    return gradient + d_branch, {
        name: gradients[name] for name in weights if "_lora_" in name or not frozen}


# ---- The KV cache --------------------------------------------------------------------------------


class KVCache:
    """The rotated keys and the values of all positions so far, so that each is computed once.

    With a sliding window W, the oldest are dropped where room runs out: no later query sees more
    than the W - 1 positions before it, so that memory stays the same however long the text gets.

    Args:
        config, batch_size: Phi3Config; int, B.
        max_length: int, the most positions of a sequence.
        chunk: int or None, the most that come at once; then a sliding window bounds the room.
        xp: the module, `numpy` or `cupy`, that the arrays are of.
    """

    def __init__(self, config, batch_size, max_length, chunk=None, xp=np):
        self.window = config.sliding_window
        if self.window and chunk:  # room for a second window: positions are moved only rarely
            max_length = min(max_length, self.window + max(self.window, chunk))
        heads = config.num_key_value_heads, config.head_dim
        shape = config.num_layers, 2, batch_size, max_length, *heads
        self.arrays = xp.zeros(shape, config.compute_dtype)  # [layers, 2, B, room, K, C]
        self.first = 0  # the oldest position that is still here
        self.length = 0  # positions so far; the model advances it after the last layer

    def begin(self, count):
        """Make room for `count` more positions, if need be, and return them: [count], int."""
        check_room(self, count)
        stored = self.length - self.first
        if self.window and stored + count > self.arrays.shape[3]:
            kept = min(stored, self.window - 1)  # the next query sees these, and itself
            for layer in self.arrays:
                layer[:, :, :kept] = layer[:, :, stored - kept : stored].copy()  # they may overlap
            self.first = self.length - kept
        return get_array_module(self.arrays).arange(self.length, self.length + count)

    def append(self, layer, key, value):
        """Write one layer's new keys and values, [B, S, K, C]; return what their queries may see.

        That is what `attention` takes after the query: keys and values [B, T, K, C] of all
        positions that are here, no padding mask, and the sliding window.
        """
        start = self.length - self.first
        end = start + key.shape[1]
        keys, values = self.arrays[layer, :, :, :end]  # views, each [B, T, K, C]
        keys[:, start:] = key
        values[:, start:] = value
        return keys, values, None, self.window

    def select(self, rows):
        """Keep the given rows of the batch, [B] int, in that order (beam search)."""
        taken = self.arrays[:, :, :, : self.length - self.first]
        taken[...] = taken[:, :, get_array_module(taken).asarray(rows)]


# ---- The model -----------------------------------------------------------------------------------


def cast(weight, config):
    """Return `weight` in the compute dtype: a copy in the mixed policies only."""
    return weight.astype(config.compute_dtype, copy=False)


def cast_layer(layer, config):
    """Return a dict of a layer's weights in the compute dtype, but LoRA's as they are."""
    return {name: weight if "_lora_" in name else cast(weight, config)
            for name, weight in layer.items()}


def token_embedding(weights, config, token_ids):
    """Return the vectors [B, S, D] of token ids [B, S]."""
    return cast(weights["token_embedding"][token_ids], config)


def token_embedding_backward(gradient, token_ids, vocabulary_size):
    """Return the gradient of the table, [V, D]; row v sums `gradient` over where the id v stood."""
    if kernels := kernels_for(gradient):
        return kernels.token_embedding_backward(gradient, token_ids, vocabulary_size)
    xp, rows = get_array_module(gradient), upcast(gradient).reshape(-1, gradient.shape[-1])
    ids = xp.unique(token_ids)
    occurrences = ids[:, None] == token_ids.reshape(-1)  # [distinct ids, B * S]
    table = xp.zeros((vocabulary_size, rows.shape[-1]), rows.dtype)
    table[ids] = occurrences.astype(rows.dtype) @ rows
    return table


def reverse_embedding(weights, config, hidden_states):
    """Return the logits [B, S, V] of the next token, given hidden states [B, S, D]."""
    linear, *_ = functions_for(config)
    return linear(hidden_states, cast(weights["reverse_embedding"], config))


def layer_rng(array, seed, i):
    """Return the random generator of layer i's dropout, on the device of `array`; or None."""
    return None if seed is None else get_array_module(array).random.default_rng([*seed, i])


def forward(weights, config, token_ids, padding_mask=None, cache=None, total=None, seed=None,
            tap=no_tap, tapes=None, recompute=False):
    """Compute the hidden states of token ids, all at once or the next ones of a cached sequence.

    `reverse_embedding` makes logits of them. They are [B, S, D], in the compute dtype.

    Args:
        weights, config: the tree of `Phi3Config.build_weights`; the Phi3Config.
        token_ids: [B, S], int, on the device of the weights.
        padding_mask: [B, S] or None; see `textbook_attention`. Not with a cache.
        cache: KVCache or None; the S positions come after those that it holds, and into it.
        total: int, the length of a prompt that comes in several calls, so that all take the same su
            factors; None: the positions so far, these included.
        seed: tuple of ints, in training: the same drops the same elements; None drops nothing.
        tap: called with "token_embedding", "transformer_layer_0" and so on, what is inside of each
            layer (see `LAYER_TAPS`), and "sequence_output_layernorm".
        tapes: None, or a list, to which what `backward` needs is appended: a Tape of each layer.
        recompute: bool; True keeps only each layer's input on the tapes. `backward` then computes
            the layer again: a third more work, and the memory of one layer. (A tap must then not
            change arrays: the second time it is not called.)

    Source: https://arxiv.org/abs/2404.14219; KerasHub's `Phi3Backbone`.
    """
    S = token_ids.shape[1]
    check_cache(cache, padding_mask)
    positions = get_array_module(token_ids).arange(S) if cache is None else cache.begin(S)
    length = S if cache is None else cache.length + S
    rotary = config.rotary(positions, config.uses_long_factors(total or length))
    x = tap("token_embedding", token_embedding(weights, config, token_ids))  # [B, S, D]
    for i, layer in enumerate(weights["transformer_layers"]):
        layer = cast_layer(layer, config)
        layer_tap = prefixed(tap, f"transformer_layer_{i}")
        if tapes is not None:
            tapes.append(Tape(layer_tap, x=x))
            layer_tap = layer_tap if recompute else tapes[i]
        rng = layer_rng(token_ids, seed, i)
        x = decoder_layer(x, layer, config, rotary, padding_mask, cache, i, rng, layer_tap)
        x = tap(f"transformer_layer_{i}", x)
    if cache is not None:
        cache.length = length
    if tapes is not None:
        tapes.append(Tape(x=x))
    _, rms_norm, *_ = functions_for(config)
    scale = cast(weights["sequence_output_layernorm"], config)
    return tap("sequence_output_layernorm", rms_norm(x, scale, config.layer_norm_epsilon))


def backward(gradient, weights, config, token_ids, padding_mask, seed, tapes, tap=no_tap):
    """Return the gradients of the weights that `forward` used, a tree like theirs.

    Args:
        gradient: [B, S, D], that of the forward's result.
        weights, config, token_ids, padding_mask, seed: as for the forward.
        tapes: what the forward has made of an empty list; each is let go of when it is used.
        tap: called with the gradient of each array that the forward has tapped (but dropout's
            choices), from last to first, by the same name; what it returns is used instead.
    """
    xp, S, d_layers = get_array_module(token_ids), token_ids.shape[1], []
    rotary = config.rotary(xp.arange(S), config.uses_long_factors(S))
    *_, (rms_norm_backward, _) = functions_for(config)
    gradient, d_scale = rms_norm_backward(
        tap("sequence_output_layernorm", gradient), tapes.pop()["x"],
        cast(weights["sequence_output_layernorm"], config), config.layer_norm_epsilon)
    for i in reversed(range(config.num_layers)):
        layer = cast_layer(weights["transformer_layers"][i], config)
        tape, name = tapes.pop(), f"transformer_layer_{i}"
        if len(tape) == 1:  # its x alone: recompute
            tape.looking = no_tap
            decoder_layer(tape["x"], layer, config, rotary, padding_mask,
                          rng=layer_rng(token_ids, seed, i), tap=tape)
        gradient, d_layer = decoder_layer_backward(
            tap(name, gradient), layer, config, rotary, padding_mask, tape, prefixed(tap, name))
        d_layers.insert(0, d_layer)
    gradient = tap("token_embedding", gradient)
    if "query_lora_a" in layer:  # all else is frozen
        return {"transformer_layers": d_layers}
    d_table = token_embedding_backward(gradient, token_ids, config.vocabulary_size)
    return {"token_embedding": d_table, "transformer_layers": d_layers,
            "sequence_output_layernorm": d_scale}


# ---- Learning ------------------------------------------------------------------------------------


def cross_entropy(logits, labels, sample_weight=None):
    """Return how badly the labels were foreseen, and the gradient of the logits.

    The loss is sum(w -log p) / N, where p is softmax's probability of the label, w its weight and N
    the number of labels (not of weights: Keras's choice). With logits l, -log p_label is
    log(sum_v e^(l_v)) - l_label, whose derivative by l_v is p_v - (v == label): what was foreseen
    less what came. So l'_v = w / N (p_v - (v == label)).

    Args:
        logits: [B, S, V].
        labels: [B, S], int in [0, V); at least one.
        sample_weight: [B, S], w, or None for ones.

    Returns:
        loss, float32 or float64, without axes; and the gradient, like `logits`.

    Source: Keras's `SparseCategoricalCrossentropy(from_logits=True)`.
    """
    if kernels := kernels_for(logits):
        return kernels.cross_entropy(logits, labels, sample_weight)
    xp, N, rows = get_array_module(logits), labels.size, logits.reshape(labels.size, -1)
    x = rows - upcast(rows).max(axis=-1, keepdims=True)  # see `softmax`; wide in any policy
    share = xp.ones(N) if sample_weight is None else sample_weight
    share = share.astype(x.dtype).reshape(N, 1) / N  # w / N
    own = xp.arange(N), labels.reshape(N)  # each position's label
    of_label = x[own]
    xp.exp(x, out=x)
    total = x.sum(axis=-1, keepdims=True)  # [N, 1]
    loss = (share[:, 0] * (xp.log(total[:, 0]) - of_label)).sum()
    x /= total  # p
    x[own] -= 1
    x *= share
    return loss, x.reshape(logits.shape).astype(logits.dtype, copy=False)


def weight_of_right(logits, labels, sample_weight):
    """Return the sum of the weights of those labels [B, S] whose logits [B, S, V] are largest."""
    return ((logits.argmax(axis=-1) == labels) * sample_weight).sum()


def loss_and_gradients(weights, config, token_ids, labels, sample_weight=None, padding_mask=None,
                       seed=None, recompute=False, tap=no_tap, gradient_tap=no_tap):
    """Compute the loss of a batch, and how every weight that is not frozen would change it.

    Args:
        weights, config, token_ids, padding_mask, seed, recompute: as for `forward`.
        labels: [B, S], int, the token that comes after each position.
        sample_weight: [B, S], how much each label counts, or None for ones.
        tap: called with what `forward` taps, and "logits"; where it changes an array, gradients
            pass as if it had not.
        gradient_tap: called with the gradient of each of these, from last to first.

    Returns:
        loss and accuracy, without axes; and a tree like `weights`, float32 or float64, in which
        tied embeddings are one array, and with LoRA the adapters alone.
    """
    xp, tapes, pieces = get_array_module(token_ids), [], [...]
    hidden_states = forward(weights, config, token_ids, padding_mask, seed=seed, tap=tap,
                            tapes=tapes, recompute=recompute)
    weight = xp.ones(labels.shape) if sample_weight is None else sample_weight
    frozen = "query_lora_a" in weights["transformer_layers"][0]
    if frozen and tap is gradient_tap is no_tap:
        # Logits, the largest array of all, are made where a label counts, a few at a time.
        where = xp.nonzero(weight)
        pieces = [tuple(index[start : start + 512] for index in where)
                  for start in range(0, len(where[0]), 512)]
    loss, right, d_hidden = *xp.zeros(2), xp.zeros(hidden_states.shape, hidden_states.dtype)
    for piece in pieces:
        x, y, share = hidden_states[piece], labels[piece], weight[piece]
        logits = tap("logits", reverse_embedding(weights, config, x))
        right += weight_of_right(logits, y, share)
        piece_loss, gradient = cross_entropy(logits, y, share * (y.size / labels.size))
        del logits
        d_hidden[piece], d_projection = linear_backward(
            gradient_tap("logits", gradient), x, cast(weights["reverse_embedding"], config), frozen)
        del gradient  # as large; the layers' come now
        loss += piece_loss
    accuracy = right / xp.maximum(weight.sum(), 1e-7)
    gradients = backward(d_hidden, weights, config, token_ids, padding_mask, seed, tapes,
                         gradient_tap)
    if config.tie_word_embeddings and not frozen:  # used twice: its gradient is the sum of both
        gradients["token_embedding"] += d_projection
        d_projection = gradients["token_embedding"]
    return loss, accuracy, gradients | ({} if frozen else {"reverse_embedding": d_projection})


@dataclasses.dataclass(eq=False)
class AdamW:
    """Adam: each weight steps against its gradient's mean, in units of that gradient's usual size.

    m and v are running means of the gradient g and of g^2, which keep beta_1 and beta_2 of
    themselves in each step; having begun at zero they are too small, and divided by 1 - beta^step.
    Then w -= learning_rate (m / (v^(1/2) + epsilon) + weight_decay w). (As Keras has it, epsilon
    stands beside the v^(1/2) that is still too small.) A value that is impossible is a ValueError.

    Source: https://arxiv.org/abs/1412.6980, https://arxiv.org/abs/1711.05101; Keras's `AdamW`.
    """

    learning_rate: float = 0.001  # or a function of the number of steps that were taken before
    weight_decay: float | None = 0.004  # None is Adam
    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-7
    clipnorm: float | None = None  # a longer gradient, of one array of `unfused`, is cut to this
    global_clipnorm: float | None = None  # the same, of all gradients together

    def __post_init__(self):
        self.iterations, self.moments = 0, {}  # steps so far; {name: [m, v]}
        check_optimizer(self)

    def update(self, weights, gradients):
        """Take one step: change `weights` in place; both are dicts as `unfused` makes them."""
        rate = self.learning_rate
        rate = check_learning_rate(rate(self.iterations) if callable(rate) else rate)
        for name, g in gradients.items():
            if name not in self.moments:  # all are made before anything changes
                self.moments[name] = [get_array_module(g).zeros_like(g) for _ in range(2)]
        self.iterations = step = self.iterations + 1
        corrected = rate * math.sqrt(1 - self.beta_2**step) / (1 - self.beta_1**step)
        decay = 1 - rate * (self.weight_decay or 0)
        clip = self.clipnorm or self.global_clipnorm
        squares = {name: (g * g).sum() for name, g in gradients.items()} if clip else {}
        if self.global_clipnorm:
            squares = dict.fromkeys(squares, sum(squares.values()))
        for name, weight in weights.items():
            xp, g, (m, v) = get_array_module(weight), gradients[name], self.moments[name]
            factor = clip / xp.maximum(xp.sqrt(squares[name]), clip) if clip else 1
            if kernels := kernels_for(g):
                kernels.adam_step(weight, g, m, v, factor, decay, corrected, self.beta_1,
                                  self.beta_2, self.epsilon)
                continue
            arrays, size = (weight, g, m, v), max(1, 2**15 * len(weight) // weight.size)
            for start in range(0, len(weight), size):  # so few rows at once that they stay in cache
                w, g, m, v = (array[start : start + size] for array in arrays)
                g = g * factor
                m += (1 - self.beta_1) * (g - m)
                v += (1 - self.beta_2) * (g * g - v)
                w[...] = upcast(w) * decay - corrected * m / (v**0.5 + self.epsilon)


# ---- The same, faster ----------------------------------------------------------------------------


def upcast_weight(weight):
    """Return `upcast(weight)`; float16, which NumPy converts bit by bit, 4 times faster."""
    if weight.dtype != np.float16 or not is_finite(weight):
        return upcast(weight)
    # Sign, exponent and fraction go where float32 has them. It reads 2^(e - 15) as 2^(e - 127).
    bits = np.left_shift(weight.view(np.int16), 13, dtype=np.int32)
    bits &= np.int32(-0x70002000)  # in place: fresh memory costs as much as the arithmetic
    return np.multiply(bits.view(np.float32), np.float32(2.0**112), out=bits.view(np.float32))


def linear(x, weight):
    """Compute `textbook_linear` as fast as the hardware and its libraries multiply."""
    rows = x.reshape(-1, x.shape[-1])  # [n, in]
    narrow, few, kernels = x.dtype.itemsize == 2, len(rows) < 128, kernels_for(x)
    if kernels and len(rows) <= kernels.LINEAR_ROWS[-1] and weight.flags.c_contiguous:
        product = kernels.linear(rows, weight)
    elif get_array_module(x) is not np or (not narrow and not 1 < len(rows) < 128):
        product = rows @ weight.T  # in 16 bits on a GPU only, whose tensor cores sum in float32
    else:
        # A piece of the weight at a time. In 16 bits only a piece is upcast at once; for few rows
        # one that stays in cache (3 times faster). For up to 8, each core takes its own pieces, and
        # dot products one by one, for which BLAS starts no threads to wait for (1.7 times faster on
        # two). And for 2 to 127 rows BLAS is up to 1.8 times faster if a piece comes first.
        rows, product = upcast(rows), np.empty((len(rows), len(weight)), x.dtype)  # [n, out]
        dots = narrow and len(rows) <= 8
        size = max(1, 2**20 // x.shape[-1]) if dots else 128 if few and narrow else 512

        def multiply(start):
            piece = upcast_weight(weight[start : start + size])
            product[:, start : start + size] = (
                np.vecdot(rows[:, None], piece) if dots else  # [n, 1, in], [size, in] -> [n, size]
                (piece @ rows.T).T if few else rows @ piece.T)

        on_cores(multiply, range(0, len(weight), size), dots)
    return product.reshape(*x.shape[:-1], len(weight))


def rms_norm(x, scale, epsilon):
    """Compute `textbook_rms_norm`, on a GPU in one pass over memory."""
    check_rms_norm(x, scale)
    if kernels := kernels_for(x):
        return kernels.rms_norm(x, scale, epsilon)
    return textbook_rms_norm(x, scale, epsilon)


def rms_norm_backward(gradient, x, scale, epsilon):
    """Compute `textbook_rms_norm_backward`, on a GPU in one pass over memory."""
    if gradient.dtype == x.dtype and (kernels := kernels_for(x)):  # a tap can change the dtype
        return kernels.rms_norm_backward(gradient, x, scale, epsilon)
    return textbook_rms_norm_backward(gradient, x, scale, epsilon)


def attention_blocks(query, key, padding_mask, sliding_window):
    """Yield the blocks that meet in `attention`: where in the query, where in the keys, visible.

    Visible is [s, t] or [b, 1, 1, s, t]. Arguments are `attention`'s, but query [B, S, K, G, C].
    """
    xp, (B, S, K, G, _), T, block = get_array_module(query), query.shape, key.shape[1], 128
    # As much at once as keeps its scores in cache (2^18 of float32 are 1 MiB): of a long prompt one
    # head, of short ones many, or where few queries or keys meet. Sizes may be 0, hence max(1, …).
    heads = max(1, 2**18 // max(1, G * min(S, block) * T))
    batch = max(1, heads // K)
    for row, start in itertools.product(range(0, B, batch), range(0, S, block)):
        rows, stop = slice(row, row + batch), min(start + block, S)
        # The block's keys are those at t = last - first positions, its queries the last s of them.
        last = T - S + stop
        first = max(0, T - S + start - sliding_window + 1) if sliding_window else 0
        positions = xp.arange(first, last)
        mask = None if padding_mask is None else padding_mask[rows, None, None, first:last]
        visible = visible_keys(positions[start - stop :], positions, sliding_window, mask)
        for head in range(0, K, heads):
            shared = slice(head, head + heads)  # k of the K key/value heads
            yield (rows, slice(start, stop), shared), (rows, slice(first, last), shared), visible


def by_head(block):
    """Return a block [b, s, k, G, C], or [b, t, k, C], as wide rows of each head, [b, k, Gs, C]."""
    rows = get_array_module(block).moveaxis(upcast(block), 1, -2)  # [b, k, G, s, C]
    return rows.reshape(*rows.shape[:2], -1, rows.shape[-1])


def put_by_head(block, rows):
    """Write rows [b, k, Gs, C] into a block [b, s, k, G, C]."""
    b, s, k, G, C = block.shape
    block[...] = rows.reshape(b, k, G, s, C).transpose(0, 3, 1, 2, 4)


def block_exponentials(rows, keys, visible, shift=None):
    """Return exp(score - shift), [b, k, Gs, t], and the shift: if None, each query's largest."""
    xp = get_array_module(rows)
    scores = rows @ keys.swapaxes(2, 3)
    by_query = scores.reshape(*rows.shape[:2], -1, *visible.shape[-2:])  # [b, k, G, s, t], a view
    xp.copyto(by_query, -math.inf, where=~visible)
    if shift is None:
        shift = scores.max(axis=-1, keepdims=True)  # [b, k, Gs, 1]
        shift = xp.where(shift == -math.inf, 0, shift)
    scores -= shift
    return xp.exp(scores, out=scores), shift


def attention(query, key, value, padding_mask=None, sliding_window=None, tap=no_tap,
              log_sum_exp=None):
    """Compute `textbook_attention` without ever holding the score matrix, unless a tap asks for it.

    Queries are taken in blocks, each with the keys up to its last one only, for a few heads at a
    time: memory grows with T, not with S x T, and of a prompt's products about half are never
    computed. Inside a block everything is float32 (float64 for the oracle), rounded at the end.
    Beside that, `log_sum_exp`, [B, H, S] in such a dtype, or None, is filled with each query's
    log(sum(exp(score))) over the keys that it sees, 0 if none.

    Raises:
        ValueError: the shapes do not fit together.

    Source: https://arxiv.org/abs/2205.14135 (FlashAttention) for the idea; it cuts keys, too.
    """
    check_attention(query, key, value, padding_mask, sliding_window)
    if tap is not no_tap:
        return textbook_attention(query, key, value, padding_mask, sliding_window, tap)
    if kernels := kernels_for(query):
        return kernels.attention(query, key, value, padding_mask, sliding_window, log_sum_exp)
    xp, (B, S, H, C), K = get_array_module(query), query.shape, key.shape[2]
    query = query.reshape(B, S, K, H // K, C)
    context = xp.empty_like(query)
    for queries, keys, visible in attention_blocks(query, key, padding_mask, sliding_window):
        rows = by_head(query[queries]) * C**-0.5  # [b, k, Gs, C]
        exponentials, row_max = block_exponentials(rows, by_head(key[keys]), visible)
        total = exponentials.sum(axis=-1, keepdims=True)
        total += total == 0  # of a query that sees nothing
        put_by_head(context[queries], exponentials @ by_head(value[keys]) / total)  # not [Gs, t]
        if log_sum_exp is not None:
            by_query = log_sum_exp.reshape(B, K, H // K, S, 1).transpose(0, 3, 1, 2, 4)
            put_by_head(by_query[queries], row_max + xp.log(total))
    return context.reshape(B, S, H, C)


def attention_backward(gradient, query, key, value, padding_mask=None, sliding_window=None,
                       tap=no_tap, tape=()):
    """Compute `textbook_attention_backward` block by block, probabilities again with each block.

    So memory grows with T, as in `attention`; with a tap or given probabilities, with S x T. Each p
    is exp(score) / sum(exp(score)): exp(score - log_sum_exp), with what `attention` has filled.
    """
    check_attention(query, key, value, padding_mask, sliding_window)
    if tap is not no_tap or "probabilities" in tape:
        return textbook_attention_backward(gradient, query, key, value, padding_mask,
                                           sliding_window, tap, tape)
    xp, (B, S, H, C), K = get_array_module(query), query.shape, key.shape[2]
    if "log_sum_exp" not in tape:
        tape = {"log_sum_exp": xp.empty((B, H, S), upcast(key[:0]).dtype)}
        tape["context"] = attention(query, key, value, padding_mask, sliding_window, **tape)
    if kernels := kernels_for(query):
        return kernels.attention_backward(gradient, query, key, value, padding_mask, sliding_window,
                                          tape["context"], tape["log_sum_exp"])
    query, gradient = (x.reshape(B, S, K, H // K, C) for x in (query, gradient))
    by_query = tape["log_sum_exp"].reshape(B, K, H // K, S, 1).transpose(0, 3, 1, 2, 4)
    d_query = xp.empty_like(query)
    d_key, d_value = xp.zeros((2, *key.shape), upcast(key[:0]).dtype)
    for queries, keys, visible in attention_blocks(query, key, padding_mask, sliding_window):
        rows, d_context = by_head(query[queries]) * C**-0.5, by_head(gradient[queries])
        k, v = by_head(key[keys]), by_head(value[keys])  # [b, k, t, C]; rows: [b, k, Gs, C]
        p, _ = block_exponentials(rows, k, visible, by_head(by_query[queries]))
        d_value[keys] += (p.swapaxes(2, 3) @ d_context).swapaxes(1, 2)
        d_s = d_context @ v.swapaxes(2, 3)  # at first that of p, [b, k, Gs, t]; then, in place,
        d_s -= (d_s * p).sum(axis=-1, keepdims=True)  # softmax_backward
        d_s *= p
        d_key[keys] += (d_s.swapaxes(2, 3) @ rows).swapaxes(1, 2)
        put_by_head(d_query[queries], d_s @ k * C**-0.5)
    return d_query.reshape(B, S, H, C), *(x.astype(key.dtype, copy=False) for x in (d_key, d_value))


# ==== Here the story ends. What follows connects it with the world. ===============================

# ---- Names and layouts ---------------------------------------------------------------------------


def named_weights(weights):
    """Yield (name, array) of a tree of weights, under the names that `build_weights` gives.

    LoRA's adapters are "transformer_layer_0.query_lora_a" and so on.
    """
    for name, value in weights.items():
        if name == "transformer_layers":
            for i, layer in enumerate(value):
                for part, array in layer.items():
                    yield f"transformer_layer_{i}.{part}", array
        else:
            yield name, value


def tree_of(arrays):
    """Return the tree of weights of which `named_weights` yields the items of the dict `arrays`."""
    tree = {}
    for name, array in arrays.items():
        layer, _, part = name.rpartition(".")
        place = tree
        if layer:
            layers, i = tree.setdefault("transformer_layers", []), int(layer.rpartition("_")[2])
            layers += [{}] * (i == len(layers))
            place = layers[i]
        place[part] = array
    return tree


def keras_variables(weights, config):
    """Yield (path in Keras's HDF5 file, view of that shape) in the order of `get_weights()`.

    The views share memory with `weights`: reading them converts to Keras's layout, writing to
    them converts from it. (LoRA's adapters stand behind their weights, and are in no such file.)

    Args:
        weights: a tree as `Phi3Config.build_weights` makes it.
        config: the Phi3Config whose tree it is.
    """
    D, C = config.hidden_dim, config.head_dim
    H, K = config.num_query_heads, config.num_key_value_heads
    yield "layers/reversible_embedding/vars/0", weights["token_embedding"]  # [V, D]
    yield "layers/reversible_embedding/vars/1", weights["reverse_embedding"].T  # [D, V]
    for i, layer in enumerate(weights["transformer_layers"]):
        path = f"layers/phi3_decoder_{i}" if i else "layers/phi3_decoder"
        qkv = layer["qkv"].reshape(H + 2 * K, C, D).transpose(2, 0, 1)  # [D, H + 2K, C]
        output = layer["attention_output"].reshape(D, H, C).transpose(1, 2, 0)  # [H, C, D]
        gate, intermediate = layer["feedforward_gate_intermediate"].reshape(2, -1, D)  # [F, D]
        yield f"{path}/pre_attention_layernorm/vars/0", layer["pre_attention_layernorm"]
        yield f"{path}/attention/query_dense/vars/0", qkv[:, :H]
        yield from keras_adapter(layer, "query", f"{path}/attention/query_dense")
        yield f"{path}/attention/key_dense/vars/0", qkv[:, H : H + K]
        yield f"{path}/attention/value_dense/vars/0", qkv[:, H + K :]
        yield from keras_adapter(layer, "value", f"{path}/attention/value_dense")
        yield f"{path}/attention/output_dense/vars/0", output
        yield f"{path}/post_attention_layernorm/vars/0", layer["post_attention_layernorm"]
        yield f"{path}/feedforward_intermediate_dense/vars/0", intermediate.T
        yield f"{path}/feedforward_gate_dense/vars/0", gate.T
        yield f"{path}/feedforward_output_dense/vars/0", layer["feedforward_output"].T
    yield "layers/phi3_layer_norm/vars/0", weights["sequence_output_layernorm"]


def keras_adapter(layer, part, path):
    """Yield (path, view in Keras's layout) of one of a layer's LoRA adapters, if it has any."""
    if f"{part}_lora_a" in layer:
        a, b = layer[f"{part}_lora_a"], layer[f"{part}_lora_b"]
        a = a.reshape(-1, b.shape[1], a.shape[1])  # [heads, r, D]
        yield f"{path}/lora_kernel_a", a.transpose(2, 0, 1)  # [D, heads, r]
        yield f"{path}/lora_kernel_b", b.T  # [r, C]


def adapters(weights):
    """Return {name: array} of a tree's LoRA adapters, which learn while all else is frozen."""
    return {name: array for name, array in named_weights(weights) if "_lora_" in name}


def lora_variables(weights):
    """Yield (path in KerasHub's .lora.h5 file, view of that shape) of a tree's LoRA adapters.

    KerasHub numbers the layers that have weights: of a decoder layer's 11, those of value and query
    are the eighth and the tenth.
    """
    for i, layer in enumerate(weights["transformer_layers"]):
        for part, place in (("value", 8), ("query", 10)):
            yield from keras_adapter(layer, part, f"lora/{11 * i + place}/vars")


def with_adapters(weights, config, rank, make):
    """Return a tree with the weights and LoRA's adapters, made by `make(shape, inputs)`.

    The adapters are in the dtype of gradients. `inputs` is Keras's number of A's; for B it is None.
    """
    arrays, D = dict(named_weights(weights)), config.hidden_dim
    parts = ("query", config.num_query_heads), ("value", config.num_key_value_heads)
    for i, (part, heads) in itertools.product(range(config.num_layers), parts):
        name = f"transformer_layer_{i}.{part}_lora"
        arrays[f"{name}_a"] = make((heads * rank, D), heads * D)
        arrays[f"{name}_b"] = make((config.head_dim, rank), None)
    return tree_of(arrays)


def merged(weights, config):
    """Return a tree without LoRA's adapters: their products are in its weights, rounded once."""
    H, K, arrays = config.num_query_heads, config.num_key_value_heads, dict(named_weights(weights))
    for i, layer in enumerate(weights["transformer_layers"]):
        if "query_lora_a" in layer:
            arrays[f"transformer_layer_{i}.qkv"] = qkv = layer["qkv"].copy()
            query, _, value = split(qkv, (H, K, K))
            for part, weight in (("query", query), ("value", value)):
                a, b = (arrays.pop(f"transformer_layer_{i}.{part}_lora_{x}") for x in "ab")
                change = b @ a.reshape(-1, b.shape[1], a.shape[1])  # [heads, C, D]
                with np.errstate(over="ignore"):  # `is_finite` says it, and where
                    weight[...] = upcast(weight) + change.reshape(weight.shape)
            require(is_finite(qkv), f"transformer_layer_{i}.qkv, with LoRA's adapters in it and as "
                    f"{qkv.dtype}, has values that are NaN or infinite")
    return tree_of(arrays)


def split(array, shares):
    """Yield views of an array's rows, one after the other, in proportion to `shares`."""
    rows = len(array) // sum(shares)
    for share in shares:
        yield array[: share * rows]
        array = array[share * rows :]


def unfused(tree, config):
    """Return {name: view} of a tree's arrays, as they are thought of: query, key, value, and so on.

    Tied embeddings are in it once; and where there are LoRA adapters, nothing else.
    """
    if learning := adapters(tree):
        return learning
    H, K, views = config.num_query_heads, config.num_key_value_heads, {}
    both = {"feedforward_gate": 1, "feedforward_intermediate": 1}
    fused = {"qkv": {"query": H, "key": K, "value": K}, "feedforward_gate_intermediate": both}
    for name, array in named_weights(tree):
        layer, _, part = name.rpartition(".")
        if part in fused:
            names = [f"{layer}.{piece}" for piece in fused[part]]
            views |= zip(names, split(array, fused[part].values()), strict=True)
        elif not (config.tie_word_embeddings and name == "reverse_embedding"):
            views[name] = array
    return views


HUGGINGFACE_NAMES = {  # of the tree's names; {} is a layer's index
    "token_embedding": "model.embed_tokens.weight",
    "pre_attention_layernorm": "model.layers.{}.input_layernorm.weight",
    "qkv": "model.layers.{}.self_attn.qkv_proj.weight",
    "attention_output": "model.layers.{}.self_attn.o_proj.weight",
    "post_attention_layernorm": "model.layers.{}.post_attention_layernorm.weight",
    "feedforward_gate_intermediate": "model.layers.{}.mlp.gate_up_proj.weight",
    "feedforward_output": "model.layers.{}.mlp.down_proj.weight",
    "sequence_output_layernorm": "model.norm.weight",
    "reverse_embedding": "lm_head.weight",
}


def huggingface_name(name):
    """Return Hugging Face's name of a weight, for the one that `named_weights` gives."""
    layer, _, part = name.rpartition(".")
    return HUGGINGFACE_NAMES[part].format(layer.removeprefix("transformer_layer_"))


def huggingface_tensors(weights, config):
    """Yield (Hugging Face's name, array) of every weight but LoRA's: their layout is ours.

    Args:
        weights: a tree as `Phi3Config.build_weights` makes it.
        config: the Phi3Config whose tree it is.
    """
    for name, array in named_weights(weights):
        if "_lora_" not in name and not (
                name == "reverse_embedding" and config.tie_word_embeddings):
            yield huggingface_name(name), array


def split_tensors(name, array, config):
    """Yield (name, view) of the parts in which Llama's and Mistral's files hold a fused weight.

    Other weights have none. Arguments: what `huggingface_tensors` yields, and its Phi3Config.
    """
    H, K = config.num_query_heads, config.num_key_value_heads
    for fused, parts, shares in (("qkv_proj", ("q_proj", "k_proj", "v_proj"), (H, K, K)),
                                 ("gate_up_proj", ("gate_proj", "up_proj"), (1, 1))):
        if fused in name:
            for part, view in zip(parts, split(array, shares), strict=True):
                yield name.replace(fused, part), view


def name_in_causal_lm(name):
    """Return the name that a tensor of a Hugging Face file has in that of a plain causal LM."""
    name = name.removeprefix("base_model.model.")  # which PEFT puts before all
    # The model without its output projection, saved alone, leaves out its own name.
    bare = name.partition(".")[0] in ("embed_tokens", "layers", "norm")
    return f"model.{name}" if bare else name


# What a config.json may leave out, by model type. Llama and Mistral compute what Phi-3 does, and
# many a Phi-3 is published as one of them.
HUGGINGFACE_DEFAULTS = {
    "phi3": {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
    "llama": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    "mistral": {"rms_norm_eps": 1e-6, "max_position_embeddings": 131072, "num_key_value_heads": 8,
                "sliding_window": 4096},
}
# What would make it another model if it had another value.
HUGGINGFACE_CONSTANTS = {
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "is_encoder_decoder": False,
    "per_layer_config": None, "transformers_weights": None,
    "lm_head_bias": False, "full_attn_mod": 1, "interpolate_factor": 1,  # in Phi-4-mini's
}
ROPE_SETTINGS = {
    "rope_type", "type", "rope_theta", "partial_rotary_factor", "short_factor", "long_factor",
    "factor", "attention_factor", "original_max_position_embeddings",
}


def arguments_from_huggingface(config):
    """Return `Phi3Backbone`'s arguments for a Hugging Face config.json, in either spelling of RoPE.

    Args:
        config: dict, with `rope_theta` and `rope_scaling`, or with `rope_parameters`.

    Raises:
        KeyError: an entry is missing.
        ValueError: the model is not one that `Phi3Backbone` computes.

    Source: transformers' `Phi3Config`, `LlamaConfig`, `MistralConfig` and
    `_compute_longrope_parameters`.
    """
    phi3 = config["model_type"] == "phi3"
    config = {**HUGGINGFACE_DEFAULTS[config["model_type"]], **config}
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    rope = {"rope_theta": config.get("rope_theta", 10000),
            "partial_rotary_factor": config.get("partial_rotary_factor", 1.0), **rope}
    kind = rope.get("rope_type", rope.get("type")) or "default"
    # "su" and "yarn" are what the first Phi-3 checkpoints called LongRoPE; Llama's yarn is another.
    require(kind in ("default", "longrope") or (phi3 and kind in ("su", "yarn")),
            f"RoPE of type {kind!r} is not Phi-3's")
    require(rope.keys() <= ROPE_SETTINGS,
            f"RoPE's settings {sorted(rope.keys() - ROPE_SETTINGS)} are not Phi-3's")
    require(phi3 or rope["partial_rotary_factor"] == 1, "`partial_rotary_factor` must be 1, or "
            f"`model_type` 'phi3'. Found: {rope['partial_rotary_factor']!r}")
    for name, value in HUGGINGFACE_CONSTANTS.items():
        require(config.get(name, value) == value,
                f"`{name}` must be {value!r}. Found: {config.get(name)!r}")
    for name in ("quantization_config", "compression_config", "quantization"):  # the last is MLX's
        require(not config.get(name), f"the model is quantized (`{name}`: {config.get(name)!r:.99})"
                ", and not computed so here. Take the model that it was made from, or let "
                "transformers write one: model.dequantize().save_pretrained(directory)")
    dropout, longest = config.get("attention_dropout", 0.0), config["max_position_embeddings"]
    if config.get("resid_pdrop", dropout) != dropout:
        warnings.warn(f"`resid_pdrop` ({config['resid_pdrop']}) is not used: the only dropout, in "
                      f"training, is `attention_dropout` ({dropout}).", stacklevel=4)
    arguments = {
        "vocabulary_size": config["vocab_size"],
        "num_layers": config["num_hidden_layers"],
        "hidden_dim": config["hidden_size"],
        "intermediate_dim": config["intermediate_size"],
        "num_query_heads": config["num_attention_heads"],
        "num_key_value_heads": config.get("num_key_value_heads") or config["num_attention_heads"],
        "layer_norm_epsilon": config["rms_norm_eps"],
        "dropout": dropout,
        "max_sequence_length": longest,
        "pretraining_sequence_length": config.get(
            "original_max_position_embeddings", rope.get("original_max_position_embeddings",
                                                         4096 if phi3 else longest)
        ),
        "rope_max_wavelength": rope["rope_theta"],
        "head_dim": config.get("head_dim"),
        "partial_rotary_factor": rope["partial_rotary_factor"],
        # Llama's class does not look at it.
        "sliding_window": None if config["model_type"] == "llama" else config.get("sliding_window"),
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
    }
    if kind != "default":
        arguments["rope_scaling_type"] = "su"
        arguments["rope_scaling_short_factor"] = rope["short_factor"]
        arguments["rope_scaling_long_factor"] = rope["long_factor"]
        arguments["rope_attention_factor"] = rope.get("attention_factor")
        if rope.get("attention_factor") is None and rope.get("factor") is not None:
            arguments["rope_attention_factor"] = su_magnitude(
                rope["factor"], arguments["pretraining_sequence_length"]
            )
    return arguments


# ---- Checks --------------------------------------------------------------------------------------


def require(condition, message, *received):
    """Raise ValueError with `message`, cut off where it gets long, unless `condition` holds.

    What may be large, and takes time to write out, is `received`: only then is it added.
    """
    if not condition:
        message += "".join(f" Received: {value!r}" for value in received)
        raise ValueError(message if len(message) < 1000 else message[:1000] + " …")


def require_int(name, value, low=1, optional=False):
    """Raise ValueError unless the argument `name` is an integer of 64 bits and at least `low`."""
    require((optional and value is None) or (is_int(value) and low <= value < 2**63),
            f"`{name}` must be {'None or ' * optional}an integer in [{low}, 2^63). "
            f"Received: {value!r}")


def require_bool(name, value):
    """Raise ValueError unless the argument `name` is True or False."""
    require(isinstance(value, bool), f"`{name}` must be True or False. Received: {value!r}")


def is_int(value):
    """Say whether `value` is an integer; a bool is not."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def is_number(value):
    """Say whether `value` is a number that float32 can hold; a bool is not."""
    number = is_int(value) or isinstance(value, (float, np.floating))
    return number and abs(value) <= float(np.finfo(np.float32).max)  # NaN is not


def check_config(config):
    """Raise ValueError unless a `Phi3Config` is possible; the message names what is wrong."""

    def check(names, valid, what):
        for name in names.split():
            value = getattr(config, name)
            require(valid(value), f"`{name}` must be {what}. Received: {value!r}")

    def is_size(value):
        return is_int(value) and 1 <= value < 2**63

    check("vocabulary_size num_layers hidden_dim intermediate_dim num_query_heads "
          "num_key_value_heads max_sequence_length pretraining_sequence_length",
          is_size, "an integer in [1, 2^63)")
    check("head_dim sliding_window", lambda x: x is None or is_size(x),
          "None or an integer in [1, 2^63)")
    check("fused tie_word_embeddings", lambda x: isinstance(x, bool), "True or False")
    check("layer_norm_epsilon", lambda x: is_number(x) and x >= 0, "a number in [0, inf)")
    check("dropout", lambda x: is_number(x) and 0 <= x < 1, "a number in [0, 1)")
    check("rope_max_wavelength", lambda x: is_number(x) and x >= 1, "a number in [1, inf)")
    check("partial_rotary_factor", lambda x: is_number(x) and 0 < x <= 1, "a number in (0, 1]")
    check("rope_attention_factor", lambda x: x is None or (is_number(x) and x > 0),
          "None or a number in (0, inf)")
    check("rope_scaling_type", lambda x: x in (None, "su"), 'None or "su"')
    check("dtype", lambda x: isinstance(x, str) and x in DTYPE_POLICIES,
          f"one of {list(DTYPE_POLICIES)}")
    D, H, K = config.hidden_dim, config.num_query_heads, config.num_key_value_heads
    require(H % K == 0, f"`num_key_value_heads` ({K}) must divide `num_query_heads` ({H}).")
    require(config.head_dim or D % H == 0,
            f"`num_query_heads` ({H}) must divide `hidden_dim` ({D}).")
    C = config.head_dim or D // H
    R = int(C * config.partial_rotary_factor)
    require(R > 0 and R % 2 == 0,
            "RoPE rotates pairs: `head_dim` times `partial_rotary_factor` must be even. "
            f"Received: {C} and {config.partial_rotary_factor}")
    if config.rope_scaling_type == "su":
        check("pretraining_sequence_length", lambda x: x > 1, "more than 1")
        check("rope_scaling_short_factor rope_scaling_long_factor",
              lambda factors: isinstance(factors, (list, tuple)) and len(factors) == R // 2
              and all(is_number(factor) and np.float32(factor) > 0 for factor in factors),
              f"a list of {R // 2} positive numbers, one for each pair that RoPE rotates")
    layers = config.num_layers * (4 * H * C + 3 * config.intermediate_dim + 2)
    require(D * (2 * config.vocabulary_size + layers) < 2**60,
            "No memory holds a model of this size.")


def check_rms_norm(x, scale):
    """Raise ValueError unless `rms_norm`'s arrays fit together."""
    require(scale.shape == x.shape[-1:],
            f"`scale` must be [D] for `x` [..., D]. Received: {scale.shape} and {x.shape}")


def check_attention(query, key, value, padding_mask, sliding_window):
    """Raise ValueError unless `attention`'s arguments fit together."""
    require(query.ndim == key.ndim == 4 and key.shape == value.shape
            and query.shape[::3] == key.shape[::3]  # B and C
            and query.shape[1] <= key.shape[1]
            and key.shape[2] > 0 and query.shape[2] % key.shape[2] == 0
            and (padding_mask is None or padding_mask.shape == key.shape[:2]),
            "`query` must be [B, S, H, C], `key` and `value` [B, T, K, C], `padding_mask` [B, T], "
            "with S <= T, and K must divide H. Received: "
            f"{[None if x is None else x.shape for x in (query, key, value, padding_mask)]}")
    require_int("sliding_window", sliding_window, optional=True)


def check_cache(cache, padding_mask):
    """Raise ValueError if `forward` gets a padding mask beside a cache."""
    require(cache is None or padding_mask is None, "`padding_mask` must be None beside a cache.")


def check_room(cache, count):
    """Raise ValueError unless a KVCache, less what left its window, takes `count` positions."""
    stored, room = cache.length - cache.first, cache.arrays.shape[3]
    kept = min(stored, cache.window - 1) if cache.window else stored
    require(kept + count <= room, f"The cache has room for {room} positions: {kept} are taken, "
            f"and {count} more came.")


def check_inputs(inputs, vocabulary_size):
    """Return a model's inputs as host arrays: token ids [B, S], int64, and padding mask, bool."""
    require(isinstance(inputs, dict) and "token_ids" in inputs,
            'inputs must be a dict with "token_ids".', inputs)
    try:
        token_ids, padding_mask = to_numpy(inputs["token_ids"]), inputs.get("padding_mask")
        ones = np.ones(token_ids.shape)
        padding_mask = ones if padding_mask is None else to_numpy(padding_mask)
    except ValueError as error:  # rows of unequal length
        raise ValueError(f"`token_ids` and `padding_mask` must be arrays: {error}") from error
    require(token_ids.ndim == 2 and np.issubdtype(token_ids.dtype, np.integer),
            "`token_ids` must be integers of shape [B, S]. "
            f"Received: {token_ids.dtype} of shape {token_ids.shape}")
    require(((token_ids >= 0) & (token_ids < vocabulary_size)).all(),
            f"`token_ids` must be in [0, {vocabulary_size}). "
            f"Received: {token_ids.min(initial=0)} to {token_ids.max(initial=0)}")
    require(padding_mask.shape == token_ids.shape and padding_mask.dtype.kind in "biuf"
            and np.isin(padding_mask, (0, 1)).all(),
            f"`padding_mask` must be 0 or 1, of token_ids' shape {token_ids.shape}, not "
            f"{padding_mask.shape}.", padding_mask)
    return token_ids.astype(np.int64), padding_mask.astype(bool)


def check_tap(tap):
    """Return what the story takes as `tap` for what its users give: a function, or None."""
    if tap is None:
        return no_tap

    def checked(name, array):
        array = tap(name, array)
        require(array is not None,
                f"The tap returned None for {name!r}: it must return the array to go on with.")
        return array

    return checked


def check_optimizer(optimizer):
    """Raise ValueError unless an `AdamW`'s settings are possible."""
    def check(names, valid, what):
        for name in names.split():
            value = getattr(optimizer, name)
            require(valid(value), f"`{name}` must be {what}. Received: {value!r}")

    check("learning_rate", lambda x: callable(x) or (is_number(x) and x >= 0),
          "a number in [0, inf), or a function of the step")
    check("beta_1 beta_2", lambda x: is_number(x) and 0 <= x < 1, "a number in [0, 1)")
    check("epsilon", lambda x: is_number(x) and x > 0, "a number in (0, inf)")
    check("weight_decay clipnorm global_clipnorm", lambda x: x is None or (is_number(x) and x >= 0),
          "None or a number in [0, inf)")  # 0 is none, as in Keras
    require(optimizer.clipnorm is None or optimizer.global_clipnorm is None,
            "Of `clipnorm` and `global_clipnorm`, one must be None.")


def check_learning_rate(rate):
    """Return a step's learning rate as a float; ValueError unless it is finite."""
    rate = float(rate)  # a schedule of Keras's gives a tensor
    require(math.isfinite(rate), f"`learning_rate` must be finite. Received: {rate}")
    return rate


def warn_of_length(config, start, end):
    """Warn once, when the positions [start, end) leave those that the model is made for."""
    if start <= config.max_sequence_length < end:
        warnings.warn(f"The sequence outgrows max_sequence_length={config.max_sequence_length}.",
                      stacklevel=3)


def to_numpy(array):
    """Return `array` in the host's memory, as a NumPy array."""
    return array.get() if hasattr(array, "get") else np.asarray(array)


def sum_of_squares(x):
    """Return the sum of the squares of `x`; any shape."""
    if kernels := kernels_for(x):
        return kernels.sum_of_squares(x)
    return get_array_module(x).vdot(x, x)


def to_floats(*numbers):
    """Return numbers, arrays without axes, as floats; from a GPU in one copy, waiting once."""
    xp = get_array_module(numbers[0])
    return to_numpy(xp.stack([xp.asarray(number, np.float64) for number in numbers])).tolist()


def to_array(name, value):
    """Return `to_numpy(value)`; ValueError that names the argument if it is no array."""
    try:
        return to_numpy(value)
    except ValueError as error:  # rows of unequal length
        raise ValueError(f"`{name}` must be an array: {error}") from error


@functools.cache
def threads_for(purpose, process):
    """Return a thread for each core, kept with its memory; `process`, as a fork has none of them.

    Each purpose has its own, so that none can wait for a task that stands in line behind it.
    """
    return concurrent.futures.ThreadPoolExecutor(os.cpu_count())


def on_cores(function, items, parallel=True):
    """Call a function of each item: one after the other, or if `parallel` each core its share."""
    cores = min(os.cpu_count() or 1, 8, len(items)) if parallel else 1

    def share(core):
        for item in items[core::cores]:
            function(item)

    if cores < 2:
        return share(0)
    threads = threads_for("on_cores", os.getpid())
    others = [threads.submit(contextvars.copy_context().run, share, core)  # with np.errstate
              for core in range(1, cores)]
    try:
        share(0)
    finally:
        concurrent.futures.wait(others)
    for other in others:
        other.result()  # raises what it raised


def load_backend(backend):
    """Return the module that a backend's name, "numpy" or "cupy", stands for."""
    require(backend in ("numpy", "cupy"),
            f'`backend` must be "numpy" or "cupy". Received: {backend!r}')
    if backend == "numpy":
        return np
    import kernels_cuda

    return kernels_cuda.load_cupy()


def memory_for(what, xp):
    """Return a context in which a GPU's running out of memory says for what, and what is free."""
    if xp is np:
        return contextlib.nullcontext()
    import kernels_cuda

    return kernels_cuda.memory_for(what)


def dtype_policy_name(dtype):
    """Return the name of a dtype policy given as a name, a dtype, or Keras's object or config."""
    name = "float32" if dtype is None else getattr(dtype, "name", dtype)
    if isinstance(name, dict):
        name = (name.get("config") or {}).get("name")
    elif not isinstance(name, str):
        with contextlib.suppress(TypeError):
            name = np.dtype(name).name
    return name if isinstance(name, str) else dtype


# ---- The backbone --------------------------------------------------------------------------------


def random_weights(config, seed=None, xp=np):
    """Return a tree of random weights, distributed as KerasHub's: norms are ones."""
    rng = np.random.default_rng(seed)
    xp.empty(config.count_params(), config.weight_dtype)  # too large a model fails here, at once

    def make(name, shape):
        if len(shape) == 1:
            return xp.ones(shape, config.weight_dtype)
        stddev = np.float32(0.01 if name.endswith("embedding") else 0.02)
        normal = rng.standard_normal(shape, np.float32) * stddev
        return xp.asarray(normal.astype(config.weight_dtype, copy=False))

    return config.build_weights(make)


class Phi3Backbone:
    """Phi-3 without its output projection: token ids to hidden states.

    The sizes and settings are `Phi3Config`'s, each of which is an attribute here, too.

    Args:
        vocabulary_size, …, rope_scaling_long_factor: see `Phi3Config`.
        dtype: a key of `DTYPE_POLICIES`, a dtype, or Keras's policy; None is "float32".
        name: str.
        trainable: bool; False: `Phi3CausalLM.fit` leaves the weights as they are.
        backend: "numpy" or "cupy", where the weights live and the model computes.
        seed: int or None, for random weights, dropout and `fit`'s shuffling.
        weights: a tree as `Phi3Config.build_weights` makes it, to be used as it is; None draws
            random weights.
        fused, …, rope_attention_factor: see `Phi3Config`.

    Raises:
        MemoryError: there is less memory than the weights need.
        TypeError: an argument is unknown.
        ValueError: an argument's value is impossible.

    Source: https://arxiv.org/abs/2404.14219; KerasHub's `Phi3Backbone`.
    """

    presets = {  # the built-in names, and where they are
        "phi3_mini_4k_instruct_en": "kaggle://keras/phi3/keras/phi3_mini_4k_instruct_en/2",
        "phi3_mini_128k_instruct_en": "kaggle://keras/phi3/keras/phi3_mini_128k_instruct_en/2",
        "phi3_tiny_puzzles_en": str(
            pathlib.Path(__file__).parent / "notebooks" / "presets" / "phi3_tiny_puzzles_en"
        ),
    }

    def __init__(
        self, vocabulary_size, num_layers, hidden_dim, intermediate_dim, num_query_heads,
        num_key_value_heads, layer_norm_epsilon=1e-6, dropout=0.0, max_sequence_length=4096,
        pretraining_sequence_length=4096, rope_max_wavelength=10000, rope_scaling_type=None,
        rope_scaling_short_factor=None, rope_scaling_long_factor=None, dtype=None, *,
        name="phi3_backbone", trainable=True, backend="numpy", seed=None, weights=None, fused=True,
        head_dim=None, partial_rotary_factor=1.0, sliding_window=None, tie_word_embeddings=False,
        rope_attention_factor=None,
    ):
        require_bool("trainable", trainable)
        require_int("seed", seed, low=0, optional=True)
        self.name, self.trainable, self.seed = name, trainable, seed
        self.config = Phi3Config(
            vocabulary_size, num_layers, hidden_dim, intermediate_dim, num_query_heads,
            num_key_value_heads, layer_norm_epsilon, dropout, max_sequence_length,
            pretraining_sequence_length, rope_max_wavelength, rope_scaling_type,
            rope_scaling_short_factor, rope_scaling_long_factor, dtype_policy_name(dtype),
            fused=fused, head_dim=head_dim, partial_rotary_factor=partial_rotary_factor,
            sliding_window=sliding_window, tie_word_embeddings=tie_word_embeddings,
            rope_attention_factor=rope_attention_factor,
        )
        self.dtype_policy, self.xp = self.config.dtype, load_backend(backend)
        weight_seed, self.training_seed = map(int, np.random.SeedSequence(seed).generate_state(2))
        self.calls = 0  # in training, each of which drops other elements
        if weights is None:
            with self.memory_for_weights():
                weights = random_weights(self.config, weight_seed, self.xp)
        self.weights = weights

    def __setattr__(self, name, value):
        require(name not in Phi3Config.__dataclass_fields__,
                f"`{name}` is fixed: build another backbone, with `weights=backbone.weights`.")
        super().__setattr__(name, value)

    def __getattr__(self, name):  # what is no attribute of its own: as `backbone.hidden_dim`
        if name == "config":  # of an instance that is being copied, say, and has none yet
            raise AttributeError(name)
        return getattr(self.config, name)

    def __call__(self, inputs, training=False, tap=None):
        """Compute the hidden states of a batch of sequences.

        Args:
            inputs: dict of "token_ids" [B, S], int, and "padding_mask" [B, S], 1 for a token and 0
                for padding, which may be left out (all ones).
            training: bool; True applies dropout.
            tap: None, or a function (name, array) -> array that is called with every named
                intermediate; what it returns is used instead. Names are Keras's layer paths, such
                as "transformer_layer_0.attention.query". Attention then runs step by step.

        Returns:
            [B, S, D], in the compute dtype.

        Raises:
            ValueError: an input has the wrong shape, dtype or range.
        """
        token_ids, padding_mask = check_inputs(inputs, self.vocabulary_size)
        warn_of_length(self.config, 0, token_ids.shape[1])
        mask = None if padding_mask.all() else self.xp.asarray(padding_mask)
        self.calls += bool(training)
        seed = (self.training_seed, 0, self.calls) if training else None
        return forward(self.weights, self.config, self.xp.asarray(token_ids), mask, seed=seed,
                       tap=check_tap(tap))

    def token_embedding(self, inputs, reverse=False):
        """Look up token ids' vectors, or project hidden states onto the vocabulary.

        Args:
            inputs: [B, S] int token ids; with `reverse=True`, [B, S, D] hidden states.
            reverse: bool.

        Returns:
            [B, S, D], or the logits [B, S, V], in the compute dtype.
        """
        function = reverse_embedding if reverse else token_embedding
        return function(self.weights, self.config, inputs)

    def memory_for_weights(self):
        """Return a context in which the weights' memory is taken; see `memory_for`."""
        size = self.config.count_params() * self.config.weight_dtype.itemsize
        return memory_for(f"the {size:,} bytes of the weights, {self.config.dtype}", self.xp)

    def get_weights(self):
        """Return copies of the weights, a list of NumPy arrays in KerasHub's order and shapes."""
        return [np.array(to_numpy(view)) for _, view in keras_variables(self.weights, self.config)]

    def set_weights(self, weights):
        """Replace the weights by a list of arrays like that of `get_weights()`.

        Raises:
            ValueError: the list's length, or the shape or dtype of the array that is named.
        """
        with self.memory_for_weights():
            ours = self.config.build_weights(
                lambda name, shape: self.xp.empty(shape, self.config.weight_dtype))
            ours = tree_of(dict(named_weights(ours)) | {
                name: self.xp.empty_like(array) for name, array in adapters(self.weights).items()})
        views = list(keras_variables(ours, self.config))
        require(len(weights) == len(views),
                f"`weights` must have {len(views)} arrays. Received: {len(weights)}")
        for (path, view), weight in zip(views, weights, strict=True):
            weight = self.xp.asarray(weight)
            require(weight.shape == view.shape and np.can_cast(weight.dtype, "f8", "same_kind"),
                    f"{path} must be real numbers, {view.shape}. "
                    f"Received: {weight.dtype}, {weight.shape}")
            view[...] = weight
        if self.tie_word_embeddings:
            require(np.array_equal(to_numpy(weights[1]).T, to_numpy(weights[0])),
                    "With `tie_word_embeddings`, weights[1] must be weights[0] transposed.")
        self.weights = ours

    def count_params(self):
        """Return the number of parameters, LoRA's among them; tied embeddings count once."""
        return self.config.count_params() + sum(x.size for x in adapters(self.weights).values())

    def summary(self):
        """Print a table of the weights: name, shape, parameters and bytes; and how many learn."""
        print(f'Model "{self.name}", {self.dtype} policy')
        print(f"{'layer':<50}{'shape [out, in]':>18}{'parameters':>15}{'bytes':>17}")
        rows = {}
        for name, shape in named_weights(self.build_weights(lambda name, shape: shape)):
            if name != "reverse_embedding" or not self.tie_word_embeddings:
                rows[name] = shape, self.weight_dtype.itemsize
        learning = {name: (x.shape, x.itemsize) for name, x in adapters(self.weights).items()}
        rows |= learning
        learning = (learning or rows) if self.trainable else {}
        for name, (shape, size) in rows.items():
            count = math.prod(shape)
            print(f"{name:<50}{list(shape)!s:>18}{count:>15,}{count * size:>17,}")
        frozen = [name for name in rows if name not in learning]
        for what, names in (("trainable", learning), ("frozen", frozen), ("total", rows)):
            counts = {name: math.prod(rows[name][0]) for name in names}
            size = sum(count * rows[name][1] for name, count in counts.items())
            print(f"{what:<68}{sum(counts.values()):>15,}{size:>17,}")

    def enable_lora(self, rank):
        """Freeze the weights, and add adapters to the query and value projections, which learn.

        The model computes what it did, for B begins with zeros. What the optimizer has learned is
        of the weights: `compile` it anew.

        Args:
            rank: int, r; see `lora`.

        Raises:
            MemoryError: there is less memory than the adapters need.
            ValueError: `rank` is no positive integer, or LoRA is enabled already.

        Source: KerasHub's `Backbone.enable_lora`.
        """
        require_int("rank", rank)
        require(not adapters(self.weights), "LoRA is already enabled. It can only be once.")
        dtype = upcast(np.empty(0, self.weight_dtype)).dtype
        rng = np.random.default_rng([self.training_seed, 2, 1])

        def make(shape, inputs):  # Keras's "he_uniform", and "zeros"
            limit = math.sqrt(6 / inputs) if inputs else 0
            return self.xp.asarray(rng.uniform(-limit, limit, shape), dtype)

        self.weights = with_adapters(self.weights, self.config, rank, make)
        self.trainable = True

    def save_lora_weights(self, filepath):
        """Write LoRA's adapters to a file that KerasHub loads; its name ends in ".lora.h5".

        Raises:
            OSError: the file cannot be written.
            ValueError: LoRA is not enabled, or the name has another end.
        """
        views, path = dict(lora_variables(self.weights)), pathlib.Path(filepath)
        require(views, "LoRA is not enabled: call `enable_lora(rank)` first.")
        require(path.name.endswith(".lora.h5"),
                f'The filename must end in ".lora.h5". Received: {filepath}')
        rank = self.weights["transformer_layers"][0]["query_lora_b"].shape[1]
        with staged(path.parent) as temporary:
            write_hdf5(temporary / path.name, [("lora/vars/rank", np.array(rank)), *views.items()])

    def load_lora_weights(self, filepath):
        """Take LoRA's adapters from a file, KerasHub's or ours; they are enabled if need be.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, or its adapters are of another rank or another model.
        """
        self.weights, self.trainable = read_lora(
            pathlib.Path(filepath), self.weights, self.config, self.xp), True

    def load_adapter(self, directory):
        """Merge an adapter that PEFT saved into the weights.

        Adapters of `enable_lora` stay beside them. Weights that are mapped from a file are copied
        where they change. Each is rounded once.

        Args:
            directory: str or path, with adapter_config.json and adapter_model.safetensors.

        Raises:
            FileNotFoundError: the directory or one of its files is not there.
            MemoryError: there is less memory than the changed weights need.
            ValueError: a file is damaged, or its adapter is of another model, or of a kind that
                cannot be merged; the weights are as they were.

        Source: PEFT's `LoraModel.merge_and_unload`.
        """
        with memory_for("weights with the adapter in them", self.xp):
            self.weights = merge_adapter(
                pathlib.Path(directory), self.weights, self.config, self.xp)

    def get_config(self):
        """Return the constructor's arguments as a dict in KerasHub's form."""
        dtype = {"module": "keras", "class_name": "DTypePolicy", "config": {"name": self.dtype},
                 "registered_name": None}
        names = ["vocabulary_size", "num_layers", "num_query_heads", "hidden_dim",
                 "intermediate_dim", "num_key_value_heads", "layer_norm_epsilon", "dropout",
                 "max_sequence_length", "pretraining_sequence_length", "rope_max_wavelength",
                 "rope_scaling_type", "rope_scaling_short_factor", "rope_scaling_long_factor"]
        # What KerasHub does not know appears only where it says something.
        implied = {"head_dim": self.hidden_dim / self.num_query_heads, "partial_rotary_factor": 1,
                   "sliding_window": None, "tie_word_embeddings": False,
                   "rope_attention_factor": None}
        if self.rope_scaling_type == "su" and self.rope_attention_factor:
            stretch = self.max_sequence_length / self.pretraining_sequence_length
            usual = su_magnitude(stretch, self.pretraining_sequence_length)
            if math.isclose(self.rope_attention_factor, usual, rel_tol=1e-7):
                del implied["rope_attention_factor"]
        names += [name for name, value in implied.items() if getattr(self, name) != value]
        config = {"name": self.name, "trainable": self.trainable, "dtype": dtype}
        for name in names:
            value = getattr(self, name)
            config[name] = value.item() if isinstance(value, np.generic) else value
        return config

    @classmethod
    def from_config(cls, config):
        """Build a backbone with random weights from what `get_config()` returned."""
        return cls(**config)

    @classmethod
    def from_preset(cls, preset, load_weights=True, **kwargs):
        """Build a backbone from a preset.

        Args:
            preset: a built-in name (a key of `presets`), "kaggle://…", "hf://organization/name"
                or "hf://organization/name@revision" (a branch, a tag or a commit), or a directory,
                in Keras's or Hugging Face's format.
            load_weights: bool; False leaves them random.
            **kwargs: arguments of the constructor that override the preset's. The dtype is float32
                unless given here, whatever the files hold.

        Returns:
            Phi3Backbone.

        Raises:
            FileNotFoundError: the preset, or a file that it needs, does not exist. (Where it is the
                preset, this is a ValueError, too, as in KerasHub.)
            MemoryError: there is less memory free than the weights need.
            OSError: a file cannot be read; the hub cannot be reached (ConnectionError), or asks for
                a log-in or for consent (PermissionError).
            ValueError: a file's content is not that of a Phi-3, or an argument's value is
                impossible.
        """
        preset = Preset(preset)
        require(not (load_weights and "weights" in kwargs), "`weights` needs load_weights=False.")
        nothing_yet = {"weights": {}} if load_weights else {}
        try:
            backbone = cls(**nothing_yet, **{**preset.backbone_config(), "dtype": None, **kwargs})
        except ValueError as error:
            raise ValueError(f"{preset.name}/config.json, with the arguments given: "
                             f"{str(error)[:500]}") from error
        if load_weights:
            with backbone.memory_for_weights():
                backbone.config, backbone.weights = read_weights(
                    preset, backbone.config, backbone.xp)
        return backbone

    def save_to_preset(self, directory, max_shard_size=10):
        """Write the configuration and weights to `directory` in Keras's format.

        LoRA's adapters are merged into what is written.

        Args:
            directory: str or path; made if need be.
            max_shard_size: number or None; more GB (2^30 bytes) of weights than this go to several
                files of at most so many. None is no limit.

        Raises:
            OSError: a file cannot be written.
            ValueError: Keras's format cannot express the model, or the tokenizer; a single weight
                is larger than `max_shard_size`.
        """
        config = self.get_config()
        for name in ("head_dim", "partial_rotary_factor", "rope_attention_factor"):
            require(name not in config, f"Keras's format cannot express `{name}`.")
        config.pop("tie_word_embeddings", None)  # Keras's file holds both embeddings
        if (config.pop("sliding_window", None) or math.inf) < self.max_sequence_length:
            warnings.warn("Keras's format knows no sliding window: it is left out.", stacklevel=2)
        with staged(directory) as temporary:
            write_weights(temporary, merged(self.weights, self.config), self.config,
                          max_shard_size)
            write_json(temporary / "config.json",
                       keras_object("models.phi3.phi3_backbone", "Phi3Backbone", config))

    def export_to_transformers(self, directory, max_shard_size=10):
        """Write the model to `directory` in Hugging Face's format, which transformers loads.

        The output projection is among the weights, as `AutoModelForCausalLM` needs it; LoRA's
        adapters are merged into them.

        Args:
            directory: str or path; made if need be.
            max_shard_size: number or None; more GB (2^30 bytes) of weights become several files.

        Raises:
            OSError: a file cannot be written.
            ValueError: `directory` holds weights in files of other names; the tokenizer is of a
                kind that cannot be converted.

        Source: KerasHub's `Backbone.export_to_transformers`, which does not know Phi-3.
        """
        export_model(directory, self, None, max_shard_size)


Backbone = Phi3Backbone  # whose `from_preset`, in KerasHub, picks the class that a config names


# ---- Tokenizer and preprocessor ------------------------------------------------------------------


START_TOKEN, END_TOKEN = "<s>", "<|endoftext|>"
ROLES = ("system", "user", "assistant")
SPECIAL_TOKENS = (  # the names that Hugging Face's settings and chat templates give them
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
TOKENIZER_SETTINGS = ("sequence_length", "add_bos", "add_eos")
PREPROCESSOR_SETTINGS = ("sequence_length", "add_start_token", "add_end_token")


class Phi3Tokenizer:
    """Text to token ids and back, with SentencePiece: the tokenizer of a Keras preset.

    A space is written "▁", and one is put before the text. BPE then merges neighbouring pieces,
    best score first, beginning with single characters; a character that is no piece becomes its
    UTF-8 bytes, "<0x00>" to "<0xFF>". Special tokens such as "<|user|>" are pieces that no merge
    crosses.

    Args:
        proto: a SentencePiece model with the special tokens: its path, or its content as bytes.
        sequence_length: int, the length that all ids are cut or padded to, or None.
        add_bos: bool, put SentencePiece's own start token before every text.
        add_eos: bool, put its end token, which is not "<|endoftext|>", behind every text.

    Raises:
        ValueError: `proto` is no SentencePiece model, or lacks "<s>" or "<|endoftext|>"; another
            argument's value is impossible.

    Source: KerasHub's `Phi3Tokenizer`.
    """

    def __init__(self, proto, sequence_length=None, add_bos=False, add_eos=False):
        import sentencepiece

        require_int("sequence_length", sequence_length, optional=True)
        require_bool("add_bos", add_bos)
        require_bool("add_eos", add_eos)
        self.sequence_length, self.add_bos, self.add_eos = sequence_length, add_bos, add_eos
        name = "`proto`" if isinstance(proto, bytes) else str(proto)
        self.proto = proto if isinstance(proto, bytes) else read_small(pathlib.Path(proto))
        self.processor = sentencepiece.SentencePieceProcessor()
        try:
            self.processor.load_from_serialized_proto(self.proto)
            token_ids = range(self.processor.vocab_size())
            self.pieces = {token_id: self.processor.id_to_piece(token_id) for token_id in token_ids}
        except Exception as error:  # SentencePiece raises its own
            raise ValueError(f"{name} is not a SentencePiece model: {error}") from error
        self.ids = {piece: token_id for token_id, piece in self.pieces.items()}
        for token in (START_TOKEN, END_TOKEN):
            require(token in self.ids, f"{name} lacks the special token {token!r}")
        self.start_token_id, self.end_token_id = self.ids[START_TOKEN], self.ids[END_TOKEN]
        self.pad_token_id, self.unknown_token_id = 0, self.processor.unk_id()
        self.stop_token_ids = self.phi3_stop_token_ids()

    def phi3_stop_token_ids(self):
        """Return the ids that end an answer: the end token, and Phi-3's where there are any."""
        ids = (self.end_token_id, *map(self.ids.get, (END_TOKEN, "<|end|>")))
        return [token_id for token_id in dict.fromkeys(ids) if token_id is not None]

    def encode(self, text):
        """Return the token ids of one string."""
        ids = self.processor.encode(text, add_bos=self.add_bos, add_eos=self.add_eos)
        length = self.sequence_length or len(ids)
        return ids[:length] + [self.pad_token_id] * (length - len(ids))

    def decode(self, token_ids):
        """Return the text of token ids, all of them in the vocabulary."""
        return self.processor.decode(token_ids)

    def tokenize(self, text):
        """Return the token ids of a str, or a list of them for a list or array of str."""
        text = text.tolist() if isinstance(text, np.ndarray) else text
        texts = [text] if isinstance(text, str) else text
        require(isinstance(texts, (list, tuple)) and all(isinstance(item, str) for item in texts),
                "`text` must be a string or a list of strings.", text)
        require(not any(re.search("[\ud800-\udfff]", item) for item in texts),  # of no UTF-8, say
                "`text` is not Unicode: surrogates not allowed.", text)
        return self.encode(text) if isinstance(text, str) else [self.encode(item) for item in text]

    __call__ = tokenize

    def detokenize(self, token_ids):
        """Return the text of a sequence of token ids, or a list of texts for a batch of them.

        A byte that belongs to no character becomes "�"; ids outside the vocabulary are left out.
        """
        if len(token_ids) and np.ndim(token_ids[0]):
            return [self.detokenize(row) for row in token_ids]
        return self.decode([i for i in map(int, token_ids) if i in self.pieces])

    def detokenize_stream(self, token_ids):
        """Yield the text of token ids in pieces, each as soon as no later token can change it.

        Joined, the pieces are `detokenize(list(token_ids))`.
        """
        # A token's text depends on what is before it: at the start, its space is left out. Of that,
        # one token with a text of its own is enough: decode behind it, and leave out its text.
        waiting, shown = [], 0
        for token_id in (i for i in map(int, token_ids) if i in self.pieces):
            waiting.append(token_id)
            text = self.decode(waiting)
            certain = len(text.rstrip("�"))  # "�" may be the beginning of a character
            if certain > shown:
                yield text[shown:certain]
                shown = certain
            context = self.decode(waiting[-1:])
            if context and certain == len(text):
                waiting, shown = waiting[-1:], len(context)
        if rest := self.decode(waiting)[shown:]:
            yield rest

    @property
    def special_token_ids(self):
        """The ids that are no part of an answer's text: those of the start and end tokens."""
        return [i for i in (self.start_token_id, self.end_token_id) if i is not None]

    def token_to_id(self, token):
        """Return the id of a token; of an unknown one, that of "<unk>" or None."""
        return self.ids.get(token, self.unknown_token_id)

    def id_to_token(self, token_id):
        """Return the token with this id."""
        require(token_id in self.pieces, f"there is no token with the id {token_id!r}")
        return self.pieces[token_id]

    def vocabulary_size(self):
        """Return how many ids there are, unused ones in between included; a model may have more."""
        return max(self.pieces, default=-1) + 1

    def apply_chat_template(self, messages, add_generation_prompt=True):
        """Return a conversation in the form that Phi-3 was trained on.

        Args:
            messages: list of {"role": "system", "user" or "assistant", "content": str}.
            add_generation_prompt: bool; True ends with the assistant's turn to speak, False with
                "<|endoftext|>".

        Raises:
            ValueError: a message is not of that form.
        """
        require(messages, "a conversation has at least one message")
        text = ""
        for message in messages:
            require(isinstance(message, dict) and message.keys() == {"role", "content"}
                    and message["role"] in ROLES and isinstance(message["content"], str),
                    f'A message is {{"role": one of {ROLES}, "content": str}}.', message)
            text += f"<|{message['role']}|>\n{message['content']}<|end|>\n"
        return text + ("<|assistant|>\n" if add_generation_prompt else END_TOKEN)

    @classmethod
    def from_preset(cls, preset):
        """Build the tokenizer of a preset; see `Phi3Backbone.from_preset`.

        A Keras preset tokenizes as KerasHub does, a Hugging Face directory as transformers does.
        """
        tokenizer, _ = load_tokenizer(Preset(preset))
        require(tokenizer is not None, f"preset {str(preset)!r} has no tokenizer")
        return tokenizer

    def save_to_preset(self, directory):
        """Write the tokenizer to `directory` in Keras's format; see `Phi3Backbone.save_to_preset`.

        That of a Hugging Face directory needs the `tokenizer.model` there. Its added tokens become
        pieces, at the same ids, and lose their flags.
        """
        proto = self.proto
        with staged(directory) as temporary:
            write_json(temporary / "tokenizer.json", self.keras_object())
            assets = temporary / "assets" / "tokenizer"
            assets.mkdir(parents=True)
            (assets / "vocabulary.spm").write_bytes(proto)

    def export_to_transformers(self, directory, add_start_token=True):
        """Write what transformers' `AutoTokenizer` loads; see `Phi3Backbone`'s method.

        Its ids and texts are the same, but for two kinds of texts: "<s>", "</s>" and "<unk>" in a
        text are tokens there, and no "▁" is put before a text that is one special token alone.

        Args:
            directory: str or path; made if need be.
            add_start_token: bool, put "<s>" before every text, and every conversation.
        """
        tokenizer, config = convert_tokenizer(self, add_start_token)
        with staged(directory) as temporary:
            (temporary / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), "utf-8")
            write_json(temporary / "tokenizer_config.json", config)
            (temporary / "tokenizer.model").write_bytes(self.proto)  # for llama.cpp's converter

    def keras_object(self):
        """Return the dict that describes the tokenizer in Keras's JSON files."""
        config = {"dtype": "int32", "config_file": "tokenizer.json", "proto": None}
        settings = {name: getattr(self, name, None) for name in TOKENIZER_SETTINGS}
        config |= {name: value for name, value in settings.items() if value}
        return keras_object("models.phi3.phi3_tokenizer", "Phi3Tokenizer", config)


class HuggingFaceTokenizer(Phi3Tokenizer):
    """The tokenizer of a Hugging Face directory, which transformers' library `tokenizers` runs.

    tokenizer.json describes it whole: Phi-3's BPE over characters, Phi-4's over bytes, or another.
    Special tokens are *added tokens*: cut out of the text first, with the whitespace that their
    flags give them; the segments between are encoded one by one.

    Args:
        preset: Preset, in Hugging Face's format, with a tokenizer.json.

    Raises:
        ValueError: a file is malformed. Encoding raises it, too, where only a text shows that.

    Source: transformers' `TokenizersBackend`, and `_from_pretrained` of its base class.
    """

    def __init__(self, preset):
        import tokenizers

        self.preset, self.path = preset, preset.file("tokenizer.json")
        content, config = read_small(self.path), preset.json("tokenizer_config.json") or {}
        if "added_tokens_decoder" not in config:  # the oldest settings lack it, and the newest
            config |= preset.json("special_tokens_map.json") or {}
        with malformed(self.path):
            self.tokenizer = tokenizers.Tokenizer.from_buffer(content)
            if self.tokenizer.truncation:  # an impossible one is refused, as by transformers
                self.tokenizer.enable_truncation(**self.tokenizer.truncation)
            self.tokenizer.no_truncation()
            self.tokenizer.no_padding()
        with malformed(f"{preset.name}/tokenizer_config.json or special_tokens_map.json"):
            self.special_tokens = self.add_tokens(config)
            self.tokenizer.encode_special_tokens = config.get("split_special_tokens", False)
        ids = {name: self.tokenizer.token_to_id(t) for name, t in self.special_tokens.items()}
        self.unknown_token_id = ids.get("unk_token")
        self.pad_token_id = ids.get("pad_token") or 0  # under a mask of zeros, any id will do
        # transformers mends the spaces around punctuation, if asked to, but never those of a BPE.
        require(not config.get("clean_up_tokenization_spaces")
                or isinstance(self.tokenizer.model, tokenizers.models.BPE),
                f"{preset.name}/tokenizer_config.json: clean_up_tokenization_spaces must be false")
        self.ids = self.tokenizer.get_vocab(with_added_tokens=True)
        self.pieces = {token_id: piece for piece, token_id in self.ids.items()}
        require(len(self.pieces) == len(self.ids), f"{self.path} gives two tokens one id")
        # Whether texts get a start and an end token, and which, is what the post-processor does to
        # one. Beside a tokenizer.json, transformers takes no heed of add_bos_token, add_eos_token.
        with malformed(self.path):
            encoding = self.tokenizer.encode("a", add_special_tokens=True)
        added = encoding.special_tokens_mask
        before = sum(itertools.takewhile(bool, added))
        behind = sum(itertools.takewhile(bool, reversed(added[before:])))
        require(before < 2, f"{self.path} puts more than one token before a text")
        require(behind < 2, f"{self.path} puts more than one token behind a text")
        self.adds_start_token, self.adds_end_token = bool(before), bool(behind)
        self.start_token_id = encoding.ids[0] if before else ids.get("bos_token")
        self.end_token_id = encoding.ids[-1] if behind else ids.get("eos_token")
        self.stop_token_ids = self.read_stop_token_ids() or self.phi3_stop_token_ids()
        self.chat_template = self.read_chat_template(config)
        # {token id: byte}, in the order of the bytes, if the tokenizer has such tokens.
        names = [f"<0x{byte:02X}>" for byte in range(256)]
        self.bytes = {self.ids[name]: byte for byte, name in enumerate(names) if name in self.ids}
        with malformed(self.path):
            if len(self.bytes) < 256 or self.tokenizer.decode([self.ids["<0x41>"]]) != "A":
                self.bytes = {}

    def add_tokens(self, config):
        """Add the tokens that the settings have beside tokenizer.json's, and give them their flags.

        Returns:
            {"bos_token": the start token, …}, those of SPECIAL_TOKENS that there are.
        """
        from tokenizers import AddedToken

        def flags_of(token):  # a str, or a dict that transformers has marked as an AddedToken
            token = token if isinstance(token, dict) else {"content": token, "special": True}
            return {name: flag for name, flag in token.items() if name != "__type"}

        decoder = {int(i): flags for i, flags in config.get("added_tokens_decoder", {}).items()}
        tokens = [AddedToken(**decoder[token_id]) for token_id in sorted(decoder)]
        known = {*map(str, tokens), *map(str, self.tokenizer.get_added_tokens_decoder().values())}
        names = [*SPECIAL_TOKENS, *(name for name, token in config.items()
                                    if name.endswith("_token") and isinstance(token, (str, dict)))]
        named = {name: flags_of(config[name]) | {"special": True} for name in names
                 if config.get(name) is not None}
        extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
        extra = map(flags_of, extra.values() if isinstance(extra, dict) else extra)
        tokens += [AddedToken(**flags) for flags in (*named.values(), *extra)
                   if flags["content"] not in known]
        self.tokenizer.add_tokens(tokens)
        return {name: named[name]["content"] for name in SPECIAL_TOKENS if name in named}

    def read_stop_token_ids(self):
        """Return the ids that end an answer by the model's files; none, where they name none."""
        own = self.end_token_id
        found = {"generation_config.json": self.preset.json("generation_config.json") or {},
                 "config.json": self.preset.config, "tokenizer_config.json": {"eos_token_id": own}}
        for name, content in found.items():
            ids = content.get("eos_token_id")
            found[name] = ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
            require(all(map(is_int, ids)), f"{self.preset.name}/{name}: `eos_token_id` must be an "
                    f"integer, or a list of them. Received: {ids!r}")
        stops = found["generation_config.json"] or found["config.json"]
        others = {name: ids for name, ids in found.items() if stops and set(ids) - set(stops)}
        if others:
            warnings.warn(f"preset {self.preset.name!r}: an answer ends at the tokens {stops}, as "
                          f"in transformers, and not also at these: {others}", stacklevel=2)
        return stops

    def read_chat_template(self, config):
        """Return the model's chat template, a dict of several by their names, or None."""
        template, path = config.get("chat_template"), self.preset.file("chat_template.jinja")
        with malformed(f"{self.preset.name}/tokenizer_config.json or chat_template.jinja"):
            if isinstance(template, list):
                template = {item["name"]: item["template"] for item in template}
            if path is None:
                return template
            text = read_small(path).decode()
        if template not in (None, text):
            warnings.warn(f"{path} is read, as in transformers, and not the other chat template in "
                          "tokenizer_config.json.", stacklevel=2)
        return text

    def apply_chat_template(self, messages, add_generation_prompt=True):
        """Return a conversation as the model's chat template writes it.

        Without one, and for `add_generation_prompt`, see `Phi3Tokenizer.apply_chat_template`.

        Args:
            messages: list of {"role": str, "content": str}; which roles, and what other keys and
                JSON values there are, is the template's business.

        Raises:
            ValueError: the template is malformed, or a message is not of the form that it takes.
        """
        template = self.chat_template
        if template is None:
            return super().apply_chat_template(messages, add_generation_prompt)
        if isinstance(template, dict):
            require("default" in template, f"{self.preset.name} has no default chat template: its "
                    f"names are {sorted(template)}")
            template = template["default"]
        require(isinstance(messages, (list, tuple)) and len(messages) > 0
                and all(isinstance(message, dict) for message in messages),
                "a conversation is a list of at least one message, a dict.", messages)
        with malformed(f"the chat template of {self.preset.name}, or the conversation,"):
            # As plain data: a template may not call the methods of any object. None is no value.
            messages = json.loads(json.dumps([
                {name: value for name, value in message.items() if value is not None}
                for message in messages]))
            return render(template, messages=messages, tools=None, documents=None,
                          add_generation_prompt=add_generation_prompt, **self.special_tokens)

    def encode(self, text):
        """Return the token ids of one string."""
        with malformed(self.path):
            return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, token_ids):
        """Return the text of token ids, all of them in the vocabulary.

        A byte that belongs to no character becomes "�", as with SentencePiece. (The library alone,
        and so transformers, spoils the whole run of bytes that it stands in: no character of a run
        would be certain before its end.)
        """
        ids = []
        for are_bytes, run in itertools.groupby(token_ids, self.bytes.__contains__):
            if are_bytes:  # spell "�" out
                text = bytes(map(self.bytes.get, run)).decode(errors="surrogateescape")
                run = map([*self.bytes].__getitem__, re.sub("[\udc80-\udcff]", "�", text).encode())
            ids += run
        with malformed(self.path):
            return self.tokenizer.decode(ids, skip_special_tokens=False)

    def export_to_transformers(self, directory, add_start_token=None):
        """Copy the tokenizer's own files; whether they add a start token, they say themselves."""
        if add_start_token not in (None, self.adds_start_token):
            warnings.warn(f"add_start_token={add_start_token} is left out: the tokenizer's own "
                          "files are exported, and they say otherwise.", stacklevel=2)
        with staged(directory) as temporary:
            for path in filter(None, map(self.preset.file, TOKENIZER_FILES)):
                shutil.copyfile(path, temporary / path.name)

    @property
    def proto(self):
        """The vocabulary in Keras's format: tokenizer.model, with the added tokens behind it."""
        from sentencepiece.sentencepiece_model_pb2 import ModelProto

        path = self.preset.file("tokenizer.model")
        require(path is not None, f"{self.path}: Keras's format takes a SentencePiece model. Put "
                "the tokenizer.model that it was made from beside it, if there is one.")
        content = read_small(path)
        with malformed(path):
            model = ModelProto.FromString(content)
        added = self.tokenizer.get_added_tokens_decoder()
        for token_id, piece in sorted(self.pieces.items()):
            if token_id == len(model.pieces) and token_id in added:
                model.pieces.add(piece=piece, score=0.0, type=model.SentencePiece.USER_DEFINED)
            require(token_id < len(model.pieces) and model.pieces[token_id].piece == piece,
                    f"{path} has no place for the token {piece!r} at {token_id}, where "
                    "tokenizer.json has it")
        with malformed(path):  # which lacks a special token that Keras needs, say
            return Phi3Tokenizer(model.SerializeToString(deterministic=True)).proto


def render(template, **values):
    """Return what a chat template makes of `values`, in the sandbox where transformers runs it.

    Source: transformers' `_cached_compile_jinja_template`.
    """
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}  # what is in it, training learns; here it is like all the rest

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    class Namespace(jinja2.utils.Namespace):  # an object whose attributes, but for Python's own,
        def __init__(self, /, *args, **kwargs):  # a template can set
            super().__init__()
            for name, value in dict(*args, **kwargs).items():
                self[name] = value

        def __setitem__(self, name, value):
            if name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a namespace takes no {name!r}")
            super().__setitem__(name, value)

    class Dict:  # not the class `dict`, with all that can be reached from it
        __call__, fromkeys = staticmethod(dict), staticmethod(dict.fromkeys)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)  # jinja2's own escapes HTML

    sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    sandbox.filters["tojson"] = tojson
    sandbox.globals |= dict(
        dict=Dict(), namespace=Namespace, raise_exception=raise_exception,
        strftime_now=lambda format: datetime.datetime.now().strftime(format))
    return sandbox.from_string(template).render(values)


@contextlib.contextmanager
def malformed(path):
    """Turn what a library raises over the content of a file into a ValueError that names it."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError, OSError):
        raise
    except BaseException as error:  # so is a panic of `tokenizers`, which is written in Rust
        raise ValueError(f"{path} is malformed: {error!r:.500}") from error


def keras_config(name, content, class_name):
    """Return `config` of an object of KerasHub's that JSON describes; {} where there is none."""
    config = {} if content is None else isinstance(content, dict) and content.get("config", {})
    require(isinstance(config, dict), f"{name} has no object `config`")
    found = (content or {}).get("class_name", class_name)
    require(found == class_name, f"{name} must describe a {class_name}. Found: {found!r}")
    return config


def load_tokenizer(preset):
    """Return a Preset's tokenizer or None, and a dict of what it says of its preprocessor."""
    if preset.format == "keras":
        proto = preset.file("assets/tokenizer/vocabulary.spm")
        file = f"{preset.name}/preprocessor.json"
        config = keras_config(
            file, preset.json("preprocessor.json"), "Phi3CausalLMPreprocessor")
        own = keras_config(
            f"{preset.name}/tokenizer.json", preset.json("tokenizer.json"), "Phi3Tokenizer")
        copy = keras_config(
            f"{file}'s `tokenizer`", config.get("tokenizer") or {"config": own}, "Phi3Tokenizer")
        own, copy = ({name: settings[name] for name in TOKENIZER_SETTINGS if settings.get(name)}
                     for settings in (own, copy))
        if own != copy:
            warnings.warn(f"{file} has the tokenizer with {copy}, as KerasHub then does, and "
                          f"tokenizer.json with {own}.", stacklevel=2)
        config = {name: config[name] for name in PREPROCESSOR_SETTINGS if name in config}
        try:
            return (None if proto is None else Phi3Tokenizer(proto, **copy)), config
        except ValueError as error:
            raise ValueError(f"{preset.name}'s tokenizer: {error}") from error
    if preset.file("tokenizer.json") is None:
        # How a tokenizer.model's added tokens are cut out of a text, it does not say.
        require(preset.file("tokenizer.model") is None,
                f"preset {preset.name!r} has a tokenizer.model and no tokenizer.json. Put Phi-3's "
                "own beside it, or let transformers write one that gives the same ids: "
                "AutoTokenizer.from_pretrained(directory, legacy=True).save_pretrained(directory)")
        return None, {}
    tokenizer = HuggingFaceTokenizer(preset)
    return tokenizer, {"add_start_token": tokenizer.adds_start_token,
                       "add_end_token": tokenizer.adds_end_token}


class Phi3CausalLMPreprocessor:
    """Strings to the padded arrays that a causal LM takes, and back.

    Args:
        tokenizer: Phi3Tokenizer.
        sequence_length: int, the length that every sequence is cut or padded to.
        add_start_token: bool, put "<s>", or the tokenizer's other start token, before every text;
            False where it has none.
        add_end_token: bool, put "<|endoftext|>", or its other end token, behind every text; never
            before generation.

    Raises:
        ValueError: an argument's value is impossible.

    Source: KerasHub's `Phi3CausalLMPreprocessor`, which adds the start token before generation
    even where `add_start_token` is False.
    """

    def __init__(self, tokenizer, sequence_length=1024, add_start_token=True, add_end_token=True):
        require_int("sequence_length", sequence_length)
        require_bool("add_start_token", add_start_token)
        require_bool("add_end_token", add_end_token)
        require(not add_end_token or tokenizer.end_token_id is not None,
                "`add_end_token` must be False: the tokenizer has no end token")
        self.tokenizer, self.sequence_length = tokenizer, sequence_length
        self.add_start_token = add_start_token and tokenizer.start_token_id is not None
        self.add_end_token = add_end_token

    def pack(self, texts, length, add_end_token, room=None):
        """Return token ids, int32, and padding mask, bool: [B, length], or [length] for a str.

        What is longer is cut. Of prompts that leave less than `room`, an int, a warning says so.
        """
        # A chat template may write the start token itself. transformers then adds none to a chat,
        # but a second one to the same text alone, which no model was trained with: not so here.
        # (In a Keras preset the text "<s>" is no token; KerasHub adds two where it is set to.)
        once = isinstance(self.tokenizer, HuggingFaceTokenizer)
        texts = texts.tolist() if isinstance(texts, np.ndarray) else texts
        rows = self.tokenizer([texts] if isinstance(texts, str) else texts)
        start = [self.tokenizer.start_token_id] if self.add_start_token else []
        end = [self.tokenizer.end_token_id] if add_end_token else []
        rows = [ids if once and ids[:1] == start else start + ids for ids in rows]
        token_ids = np.full((len(rows), length), self.tokenizer.pad_token_id, "int32")
        padding_mask = np.zeros(token_ids.shape, bool)
        lengths = [len(ids) + len(end) for ids in rows]
        long = 0 if room is None else sum(n > length - room for n in lengths)
        if long:
            warnings.warn(f"`max_length`={length} leaves no room for an answer to {long} of "
                          f"{len(rows)} prompts: the longest has {max(lengths)} tokens, and what "
                          f"is beyond {length} is cut.", stacklevel=4 if room else 3)
        for row, ids in enumerate(rows):
            packed = ids[: length - len(end)] + end
            token_ids[row, : len(packed)] = packed
            padding_mask[row, : len(packed)] = True
        row = 0 if isinstance(texts, str) else slice(None)
        return token_ids[row], padding_mask[row]

    def __call__(self, x, sequence_length=None):
        """Return inputs, labels and label weights for training.

        Args:
            x: str, or list of B str.
            sequence_length: int; None is the preprocessor's.

        Returns:
            x: dict of "token_ids", int32, and "padding_mask", bool, both [B, sequence_length].
            y: int32, like `token_ids`: at each position, the token that follows.
            sample_weight: bool, like `y`: False where none follows.
        """
        require_int("sequence_length", sequence_length, optional=True)
        length = sequence_length or self.sequence_length
        token_ids, padding_mask = self.pack(x, length + 1, self.add_end_token)
        x = {"token_ids": token_ids[..., :-1], "padding_mask": padding_mask[..., :-1]}
        return x, token_ids[..., 1:].copy(), padding_mask[..., 1:].copy()  # to be changed freely

    def generate_preprocess(self, x, sequence_length=None):
        """Return prompts as `__call__` does, but without end token and labels; warn of any cut."""
        require_int("sequence_length", sequence_length, optional=True)
        length = sequence_length or self.sequence_length
        token_ids, padding_mask = self.pack(x, length, False, room=0)
        return {"token_ids": token_ids, "padding_mask": padding_mask}

    def generate_postprocess(self, x):
        """Return the text of "token_ids" under "padding_mask", less the start and end tokens.

        Args:
            x: dict of arrays [B, S] or [S].

        Returns:
            list of B str, or str.
        """
        token_ids = to_numpy(x["token_ids"])
        visible = to_numpy(x["padding_mask"]).astype(bool)
        visible = visible & ~np.isin(token_ids, self.tokenizer.special_token_ids)
        if token_ids.ndim == 1:
            return self.tokenizer.detokenize(token_ids[visible])
        rows = zip(token_ids, visible, strict=True)
        return [self.tokenizer.detokenize(row[mask]) for row, mask in rows]

    @classmethod
    def from_preset(cls, preset, **kwargs):
        """Build the preprocessor of a preset, or None if it has no tokenizer.

        Args:
            preset: see `Phi3Backbone.from_preset`, also for what is raised.
            **kwargs: arguments of the class to use instead of the preset's.
        """
        preset = Preset(preset)
        tokenizer, config = load_tokenizer(preset)
        try:
            return None if tokenizer is None else cls(tokenizer, **{**config, **kwargs})
        except ValueError as error:
            raise ValueError(f"{preset.name}'s preprocessor: {error}") from error

    def save_to_preset(self, directory):
        """Write preprocessor and tokenizer to `directory`; see `Phi3Backbone.save_to_preset`."""
        config = {"tokenizer": self.tokenizer.keras_object(), "config_file": "preprocessor.json"}
        for name in PREPROCESSOR_SETTINGS:
            config[name] = getattr(self, name)
        module = "models.phi3.phi3_causal_lm_preprocessor"
        content = keras_object(module, "Phi3CausalLMPreprocessor", config)
        with staged(directory) as temporary:
            write_json(temporary / "preprocessor.json", content)
            self.tokenizer.save_to_preset(temporary)


# ---- The causal LM and its samplers --------------------------------------------------------------


class Sampler:
    """The rule that chooses the next token; base class of KerasHub's, and of your own.

    Args:
        temperature: float > 0; the logits are divided by it.
        seed: int or None, for the random choices.

    Source: KerasHub's `keras_hub/src/samplers`.
    """

    k = None  # int: only the k most probable tokens are candidates
    p = None  # float: of these, only the first whose probabilities sum to more than p

    def __init__(self, temperature=1.0, seed=None):
        require(is_number(temperature) and temperature > 0,
                f"`temperature` must be a number > 0. Received: {temperature!r}")
        require_int("seed", seed, low=0, optional=True)
        self.temperature = temperature
        self.rng = np.random.default_rng(seed)

    def get_next_token(self, probabilities):
        """Return one token per row, [B] int, drawn by probabilities [B, V], float32."""
        xp, V = get_array_module(probabilities), probabilities.shape[-1]
        weights, tokens = probabilities, xp.broadcast_to(xp.arange(V), probabilities.shape)
        if self.k is not None or self.p is not None:
            weights, tokens = top_k(probabilities, self.k or V)
        if self.p is not None:
            kept = weights.cumsum(axis=-1) <= self.p
            kept[:, 1:] = kept[:, :-1].copy()  # the token that exceeds p stays, too
            kept[:, 0] = True
            weights = weights * kept
        # The candidates lie side by side on a line, as wide as they weigh: take a random point.
        ends = weights.cumsum(axis=-1, dtype=np.float64)
        point = xp.asarray(self.rng.random((len(weights), 1))) * ends[:, -1:]
        index = (ends <= point).sum(axis=-1, keepdims=True)
        return xp.take_along_axis(tokens, index, axis=-1)[:, 0]


class GreedySampler(Sampler):
    """Choose the most probable token."""

    def get_next_token(self, probabilities):
        """Return the most probable token of each row, [B] int."""
        return probabilities.argmax(axis=-1)


class RandomSampler(Sampler):
    """Draw from the whole distribution."""

    def __init__(self, seed=None, **kwargs):
        super().__init__(seed=seed, **kwargs)


class TopKSampler(Sampler):
    """Draw from the `k` most probable tokens; https://arxiv.org/abs/1805.04833."""

    def __init__(self, k=5, seed=None, **kwargs):
        super().__init__(seed=seed, **kwargs)
        require_int("k", k)
        self.k = k


class TopPSampler(Sampler):
    """Draw from the fewest most probable of the `k` most probable tokens that sum to more than `p`.

    Source: https://arxiv.org/abs/1904.09751.
    """

    def __init__(self, p=0.1, k=None, seed=None, **kwargs):
        super().__init__(seed=seed, **kwargs)
        require(is_number(p) and 0 <= p <= 1, f"`p` must be in [0, 1]. Received: {p!r}")
        require_int("k", k, optional=True)
        self.p, self.k = p, k


class BeamSampler(Sampler):
    """Keep the most probable continuations of each prompt; return the best.

    Args:
        num_beams: int, how many.
        **kwargs: those of `Sampler`.

    As in KerasHub, what is drawn after a stop token counts, and so does what is drawn, and thrown
    away, while a longer prompt of the batch still stands: search for one prompt at a time.
    """

    def __init__(self, num_beams=5, **kwargs):
        super().__init__(**kwargs)
        require_int("num_beams", num_beams)
        self.num_beams = num_beams


SAMPLERS = {
    "greedy": GreedySampler,
    "random": RandomSampler,
    "top_k": TopKSampler,
    "top_p": TopPSampler,
    "beam": BeamSampler,
}


def top_k(values, k):
    """Return the `k` largest of each row, largest first, and their places; [B, N] -> 2 x [B, k]."""
    xp = get_array_module(values)
    order = xp.argsort(-values, axis=-1, kind="stable")[:, :k]
    return xp.take_along_axis(values, order, axis=-1), order


class Phi3CausalLM:
    """Phi-3 with its output projection and, if it has a preprocessor, its tokenizer.

    Args:
        backbone: Phi3Backbone.
        preprocessor: Phi3CausalLMPreprocessor or None (token ids in, token ids out).

    Raises:
        ValueError: the tokenizer has more tokens than the backbone has embeddings.

    Source: KerasHub's `Phi3CausalLM` and `CausalLM`.
    """

    def __init__(self, backbone, preprocessor=None):
        if preprocessor is not None:
            tokens = preprocessor.tokenizer.vocabulary_size()
            require(tokens <= backbone.vocabulary_size,
                    f"The tokenizer has {tokens} tokens, the backbone {backbone.vocabulary_size}.")
        self.backbone = backbone
        self.preprocessor = preprocessor
        self.compile()

    @classmethod
    def from_preset(cls, preset, load_weights=True, **kwargs):
        """Build a causal LM from a preset; arguments and errors of `Phi3Backbone.from_preset`.

        `preprocessor`, a further argument, stands in for the preset's, whose files are then not
        read; None: token ids in, token ids out. It is None where the preset has no tokenizer.
        """
        preset = Preset(preset)
        preset.needs_head = True
        advice = "With preprocessor=None, from_preset reads the model without its tokenizer."
        try:
            preprocessor = (kwargs.pop("preprocessor") if "preprocessor" in kwargs
                            else Phi3CausalLMPreprocessor.from_preset(preset))
        except ValueError as error:
            raise ValueError(f"{error} {advice}") from error
        backbone = Phi3Backbone.from_preset(preset, load_weights, **kwargs)
        try:
            return cls(backbone, preprocessor)
        except ValueError as error:
            raise ValueError(f"preset {preset.name!r}: {error} {advice}") from error

    def save_to_preset(self, directory, max_shard_size=10):
        """Write backbone and preprocessor to `directory`; see `Phi3Backbone.save_to_preset`."""
        with staged(directory) as temporary:
            if self.preprocessor is not None:  # first, as this may be refused
                self.preprocessor.save_to_preset(temporary)
            self.backbone.save_to_preset(temporary, max_shard_size)

    def export_to_transformers(self, directory, max_shard_size=10):
        """Write what `AutoModelForCausalLM` and `AutoTokenizer` load; see `Phi3Backbone`'s method.

        The tokenizer's part is described at `Phi3Tokenizer.export_to_transformers`.
        """
        export_model(directory, self.backbone, self, max_shard_size)

    def compile(self, optimizer="auto", sampler="top_k", recompute=False):
        """Choose how `fit` learns, and how `generate` picks tokens.

        Args:
            optimizer: an AdamW, or "auto": a new one, Adam with a learning rate of 2e-5.
            sampler: a key of `SAMPLERS`, or a Sampler.
            recompute: bool; True learns in the memory of one layer, and in a third more time.

        Raises:
            ValueError: an argument is nothing of the kind.
        """
        if isinstance(sampler, str) and sampler in SAMPLERS:
            sampler = SAMPLERS[sampler]()
        require(isinstance(sampler, Sampler),
                f"`sampler` must be one of {list(SAMPLERS)} or a Sampler. Received: {sampler!r}")
        if isinstance(optimizer, str) and optimizer == "auto":
            optimizer = AdamW(2e-5, None)
        require(isinstance(optimizer, AdamW),
                f'`optimizer` must be "auto" or an AdamW, and a sampler be named: `sampler=…`. '
                f"Received: {optimizer!r}")
        require_bool("recompute", recompute)
        self.optimizer, self.sampler, self.recompute = optimizer, sampler, recompute

    def __call__(self, inputs, training=False, tap=None):
        """Return the logits [B, S, V] of a batch; arguments and errors of the backbone's call."""
        hidden_states = self.backbone(inputs, training=training, tap=tap)
        logits = self.backbone.token_embedding(hidden_states, reverse=True)
        return check_tap(tap)("logits", logits)

    def generate(
        self, inputs, max_length=None, stop_token_ids="auto", strip_prompt=False, tap=None
    ):
        """Continue prompts until each has produced a stop token, or the buffer is full.

        A batch starts at the end of its shortest prompt; longer prompts are never overwritten.

        Args:
            inputs: str, list of str, or a dict of "token_ids" and "padding_mask" [B, max_length]
                with the prompts on the left and zeros in the mask where there is room.
            max_length: int, tokens of prompt and answer together; None is the preprocessor's
                `sequence_length`. Not for a dict, whose length it is.
            stop_token_ids: "auto" (those of Hugging Face's generation_config.json or config.json;
                where these name none, and in Keras's format, the tokenizer's end token,
                <|endoftext|> and <|end|>), None, or any integers: a list, a set, an array, …
            strip_prompt: bool; True returns the new text only.
            tap: None, or a function as for `Phi3Backbone.__call__`, called with the same names in
                every forward pass: the first over the prompt, arrays [B, S, …], then one over each
                new token but the last, arrays [B, 1, …] and scores [B, H, 1, T] (where su scaling
                changes its factors: over all tokens again). "logits" are those of a pass's last
                position, [B, 1, V], from which the next token is chosen.

        Returns:
            str, list of str, or a dict like `inputs` whose mask ends after the stop token.

        Raises:
            ValueError: an argument has the wrong shape or value.
        """
        ids = isinstance(inputs, dict)
        token_ids, prompt_mask = self.prepare(inputs, max_length)
        stop_token_ids, tap = self.resolve_stop_tokens(stop_token_ids), check_tap(tap)
        if isinstance(self.sampler, BeamSampler):
            token_ids = self.beam_search(token_ids, prompt_mask, stop_token_ids, tap)
        else:
            for _ in self.steps(token_ids, prompt_mask, stop_token_ids, tap):
                pass
        padding_mask = np.ones_like(prompt_mask)
        if stop_token_ids is not None:
            stops = np.isin(token_ids, stop_token_ids) & ~prompt_mask
            padding_mask = stops.cumsum(axis=1) - stops == 0  # up to the first, inclusive
        if strip_prompt:
            padding_mask &= ~prompt_mask
            if ids:  # the answers move to the left
                order = np.argsort(~padding_mask, axis=1, kind="stable")
                token_ids = np.take_along_axis(token_ids, order, axis=1)
                padding_mask = np.take_along_axis(padding_mask, order, axis=1)
        outputs = {"token_ids": token_ids, "padding_mask": padding_mask}
        if ids:
            return outputs
        texts = self.preprocessor.generate_postprocess(outputs)
        return texts[0] if isinstance(inputs, str) else texts

    def stream(self, prompt, max_length=None, stop_token_ids="auto", tap=None):
        """Yield the answer to one prompt as text, piece by piece, without its stop token.

        Args:
            prompt: str.
            max_length: see `generate`, and so for `stop_token_ids` and `tap`.

        Yields:
            str; joined, they are what `generate(prompt, strip_prompt=True)` returns, less the stop.
        """
        require(not isinstance(self.sampler, BeamSampler),
                "Beam search knows its answer only at the end: it cannot stream.")
        require(isinstance(prompt, str), "`prompt` must be a string.", prompt)
        token_ids, prompt_mask = self.prepare(prompt, max_length)
        stop_token_ids = self.resolve_stop_tokens(stop_token_ids)
        steps = self.steps(token_ids, prompt_mask, stop_token_ids, check_tap(tap))
        tokens = (int(tokens[0]) for tokens in steps)
        unprinted = {*(stop_token_ids or ()), *self.preprocessor.tokenizer.special_token_ids}
        printed = (token for token in tokens if token not in unprinted)
        return self.preprocessor.tokenizer.detokenize_stream(printed)

    def prepare(self, inputs, max_length):
        """Return `generate`'s inputs as token ids and prompt mask, host arrays [B, max_length]."""
        require_int("max_length", max_length, optional=True)
        ids = isinstance(inputs, dict)
        if ids:
            require(max_length is None, "`max_length` is for strings: a dict has its own length.")
        else:
            require(self.preprocessor is not None,
                    "Strings need a preprocessor, and this model has none: pass a dict.")
            texts = [inputs] if isinstance(inputs, str) else inputs
            length = max_length or self.preprocessor.sequence_length
            token_ids, padding_mask = self.preprocessor.pack(texts, length, False, room=1)
            inputs = {"token_ids": token_ids, "padding_mask": padding_mask}
        token_ids, prompt_mask = check_inputs(inputs, self.backbone.vocabulary_size)
        lengths = prompt_mask.sum(axis=1)
        require(lengths.all() and len(lengths) > 0,
                f"Every prompt needs at least one token. Received: {lengths.tolist()} tokens.")
        require((prompt_mask[:, 1:] <= prompt_mask[:, :-1]).all(),
                "`padding_mask` must be ones, for the prompt, then zeros, where there is room.")
        full = int((lengths == token_ids.shape[1]).sum())
        if ids and full:  # of strings, `pack` has said so
            warnings.warn(f"{full} of {len(lengths)} prompts leave no room for an answer in "
                          f"`token_ids` of shape {token_ids.shape}.", stacklevel=3)
        return token_ids, prompt_mask

    def resolve_stop_tokens(self, stop_token_ids):
        """Return `generate`'s stop tokens as a list of ints, or None."""
        if isinstance(stop_token_ids, str) and stop_token_ids == "auto":
            require(self.preprocessor is not None,
                    '`stop_token_ids="auto"` needs a preprocessor, and this model has none: '
                    "pass None or the token ids.")
            return self.preprocessor.tokenizer.stop_token_ids
        if stop_token_ids is None:
            return None
        vocabulary = range(self.backbone.vocabulary_size)
        ids = list(stop_token_ids) if np.iterable(stop_token_ids) else [None]
        require(all(is_int(token_id) and token_id in vocabulary for token_id in ids),
                f'`stop_token_ids` must be "auto", None or integers in {vocabulary}, as a list, '
                f"say. Received: {stop_token_ids!r}")
        return ids

    def next_logits(self, token_ids, index, cache=None, tap=no_tap):
        """Return the logits [B, V] for position `index`, and the cache of all positions before it.

        The prompt is computed in chunks, so that activations take no more memory than one chunk's;
        each later position is computed alone. But where a sequence outgrows the pretraining length,
        su scaling changes RoPE's factors, and the cached keys, rotated with the short ones, are
        computed anew with the long ones: as the model's authors do. (KerasHub goes by the buffer's
        length for the prompt, and never changes while it decodes.)
        """
        from tqdm import tqdm

        weights, config, xp = self.backbone.weights, self.backbone.config, self.backbone.xp
        warn_of_length(config, 0 if cache is None else cache.length, index)
        chunk = 2048 if tap is no_tap else token_ids.shape[1]  # a tap sees the prompt whole
        if cache is None:
            with memory_for(f"a KV cache of {token_ids.shape[1]} positions", xp):
                cache = KVCache(config, *token_ids.shape, chunk, xp)
        elif config.uses_long_factors(index) and not config.uses_long_factors(cache.length):
            cache.first = cache.length = 0  # start over
        starts = range(cache.length, index, chunk)
        for start in tqdm(starts, "prompt", delay=1, leave=False, disable=len(starts) == 1):
            new_ids = xp.asarray(token_ids[:, start : min(start + chunk, index)])  # [B, S]
            kernels = kernels_for(cache.arrays)
            # (A graph records no products of cuBLAS, which LoRA's are.)
            by_graph = (kernels and config.fused and tap is no_tap and not adapters(weights)
                        and new_ids.shape[1] == 1 and len(new_ids) <= kernels.LINEAR_ROWS[-1])
            if by_graph:
                hidden_states = kernels.decode_by_graph(
                    forward, weights, config, new_ids, cache, index)
            else:
                hidden_states = forward(weights, config, new_ids, cache=cache, total=index, tap=tap)
        logits = reverse_embedding(weights, config, hidden_states[:, -1:])
        return tap("logits", logits)[:, 0], cache

    def probabilities(self, logits):
        """Return the softmax of `logits` / temperature over the last axis, in float32."""
        return softmax(upcast(logits) / self.sampler.temperature)

    def steps(self, token_ids, prompt_mask, stop_token_ids=None, tap=no_tap):
        """Fill `token_ids` [B, max_length] in place, yielding each position's tokens [B]."""
        index, cache = int(prompt_mask.sum(axis=1).min()), None
        done = np.zeros(len(token_ids), bool)
        while index < token_ids.shape[1] and not done.all():
            logits, cache = self.next_logits(token_ids, index, cache, tap)
            tokens = to_numpy(self.sampler.get_next_token(self.probabilities(logits)))
            in_prompt = prompt_mask[:, index]
            token_ids[:, index] = np.where(in_prompt, token_ids[:, index], tokens)
            if stop_token_ids is not None:
                done |= np.isin(token_ids[:, index], stop_token_ids) & ~in_prompt
            yield token_ids[:, index]
            index += 1

    def beam_search(self, token_ids, prompt_mask, stop_token_ids, tap):
        """Return the most probable continuation of each prompt that beam search finds.

        Source: KerasHub's `BeamSampler`, with which it agrees token for token.
        """
        beams, (B, max_length) = self.sampler.num_beams, token_ids.shape
        token_ids, prompt_mask = token_ids.repeat(beams, axis=0), prompt_mask.repeat(beams, axis=0)
        xp = self.backbone.xp
        log_probability = xp.full((B, beams), -1e9, np.float32)
        log_probability[:, 0] = 0  # all beams start alike: only the first counts
        index, cache = int(prompt_mask.sum(axis=1).min()), None
        done = np.zeros(B * beams, bool)
        while index < max_length and not done.all():
            logits, cache = self.next_logits(token_ids, index, cache, tap)
            with np.errstate(divide="ignore"):  # log(0) is -inf, as it should be
                candidates = xp.log(self.probabilities(logits))  # [B * beams, V]
            V = candidates.shape[-1]
            candidates = candidates.reshape(B, beams, V) + log_probability[:, :, None]
            log_probability, best = top_k(candidates.reshape(B, beams * V), beams)
            best = to_numpy(best)  # [B, beams], the best first
            parents = (best // V + beams * np.arange(B)[:, None]).reshape(-1)  # [B * beams]
            token_ids, done = token_ids[parents], done[parents]
            cache.select(parents)
            in_prompt = prompt_mask[:, index]
            token_ids[:, index] = np.where(in_prompt, token_ids[:, index], (best % V).reshape(-1))
            if stop_token_ids is not None:
                done |= np.isin(token_ids[:, index], stop_token_ids) & ~in_prompt
            index += 1
        return token_ids[::beams]

    def labelled(self, x, y=None, sample_weight=None):
        """Return a batch, checked: inputs as a dict, labels, and their weights or None."""
        if y is None:
            x = [x] if isinstance(x, str) else x
            require(self.preprocessor is not None and isinstance(x, (list, tuple, np.ndarray))
                    and all(isinstance(text, str) for text in x),
                    "Without `y`, `x` must be strings, and the model have a preprocessor.")
            require(sample_weight is None, "`sample_weight` needs `y`: that of strings is made.")
            x, y, sample_weight = self.preprocessor(list(x))
        V = self.backbone.vocabulary_size
        token_ids, padding_mask = check_inputs(x, V)
        y = to_array("y", y)
        require(y.shape == token_ids.shape and y.dtype.kind in "iu" and y.size
                and y.min() >= 0 and y.max() < V,
                f"`y` must be integers in [0, {V}), of token_ids' shape {token_ids.shape}, not "
                f"empty. Received: {y.dtype} of shape {y.shape}")
        if sample_weight is not None:
            sample_weight = to_array("sample_weight", sample_weight)
            require(sample_weight.shape in (y.shape, y.shape[:1]) and sample_weight.dtype.kind in
                    "biuf" and np.isfinite(sample_weight).all(),
                    f"`sample_weight` must be finite numbers of shape {y.shape} or {y.shape[:1]}. "
                    f"Received: {sample_weight.dtype} of shape {sample_weight.shape}")
            sample_weight = np.broadcast_to(sample_weight.reshape(len(y), -1), y.shape)
        return {"token_ids": token_ids, "padding_mask": padding_mask}, y, sample_weight

    def learn(self, x, y, sample_weight, training, tap=no_tap, gradient_tap=no_tap):
        """Return loss, accuracy and gradients, on the device, of a batch from `labelled`."""
        backbone, xp, looks = self.backbone, self.backbone.xp, (tap, gradient_tap)
        ids, mask = x["token_ids"], None if x["padding_mask"].all() else x["padding_mask"]
        warn_of_length(backbone.config, 0, y.shape[1])
        weight = np.ones(y.shape) if sample_weight is None else sample_weight.astype(np.float64)

        @np.errstate(all="ignore")  # what is not finite is found by `train_on_batch`
        def compute(rows):
            # Dropout goes by the step, so that what is interrupted goes on as if it had not been.
            seed = backbone.training_seed, 1, self.optimizer.iterations, rows.start
            share = len(y[rows]) / len(y)  # of the loss, which is a mean
            return loss_and_gradients(
                backbone.weights, backbone.config, xp.asarray(ids[rows]), xp.asarray(y[rows]),
                xp.asarray(weight[rows] * share), None if mask is None else xp.asarray(mask[rows]),
                seed if training else None, self.recompute, *looks)

        # A small model's layers are small arrays, for which a core alone is faster than two that
        # wait for each other: so the batch is cut, about 1024 positions to a piece, and each
        # core takes the next (embedded preset, batch of 128: 0.12 s a step for 0.24 s).
        count = len(y) * y.shape[1] // 1024
        small = xp is np and count > 1 and backbone.count_params() < 2**24
        if small and looks == (no_tap, no_tap):
            size = -(-len(y) // count)
            pieces = [slice(start, start + size) for start in range(0, len(y), size)]
            with blas_threads().limit(limits=1, user_api="blas"):
                parts = list(threads_for("learn", os.getpid()).map(compute, pieces))
        else:
            pieces = [slice(0, len(y))]
            with memory_for(f"the gradients of {y.size:,} positions", xp):
                parts = [compute(pieces[0])]
        loss, gradients = sum(part[0] for part in parts), parts[0][2]
        for _, _, part in parts[1:]:
            for view, other in zip(unfused(gradients, backbone.config).values(),
                                   unfused(part, backbone.config).values(), strict=True):
                view += other
        right = sum(part[1] * float(weight[rows].sum())
                    for part, rows in zip(parts, pieces, strict=True))
        return loss, right / max(float(weight.sum()), 1e-7), gradients

    def gradients(self, x, y=None, sample_weight=None, training=True, tap=None, gradient_tap=None):
        """Return the loss of a batch, and by how much each weight would change it.

        Args:
            x: B strings, for the preprocessor; or, with `y`, a dict as for the backbone.
            y: [B, S], int, the labels: at each position, the token that follows.
            sample_weight: [B, S] or [B], how much each label counts; None is all ones.
            training: bool; True applies dropout, that of the next training step.
            tap: see `Phi3Backbone.__call__`; where it changes an array, gradients pass as if not.
            gradient_tap: called likewise with the gradient of each of the arrays that a tap sees,
                under the same name, from last to first.

        Returns:
            The loss, a float: sum(sample_weight * cross entropy) / (B S); and the gradients, a tree
            of arrays like `backbone.weights` (with LoRA, of the adapters alone), in float32 (in the
            "float64" policy, float64).

        Raises:
            ValueError: an input has the wrong shape, dtype or range.
        """
        require(tap is None or not self.recompute,
                "A tap sees each array once: compile with recompute=False.")
        batch = self.labelled(x, y, sample_weight)
        loss, _, gradients = self.learn(*batch, training, check_tap(tap), check_tap(gradient_tap))
        return *to_floats(loss), gradients

    @np.errstate(all="ignore")  # what is not finite is one error, below
    def train_on_batch(self, x, y=None, sample_weight=None):
        """Take one step of the optimizer; arguments as for `gradients`, but dropout is applied.

        Returns:
            [loss, accuracy], floats: of the batch, before the step; accuracy is the share, weighted
            by `sample_weight`, of labels that the model holds for the most probable.

        Raises:
            FloatingPointError: the loss or a gradient is infinite or NaN; no weight has changed.
            ValueError: an input has the wrong shape, dtype or range; the policy is a float16 one.
        """
        config, xp = self.backbone.config, self.backbone.xp
        require(config.compute_dtype != np.float16,
                f"A {config.dtype} model does not train: float16's smallest number is 6e-8, and "
                "gradients are smaller. Take mixed_bfloat16 or float32.")
        batch, weights = self.labelled(x, y, sample_weight), unfused(self.backbone.weights, config)
        loss, accuracy, gradients = self.learn(*batch, training=True)
        gradients = unfused(gradients, config)
        squares = sum(map(sum_of_squares, gradients.values()))
        loss, accuracy, squares = to_floats(loss, accuracy, squares)
        if not math.isfinite(loss + squares):
            self.find_not_finite(batch, loss)
        if not self.backbone.trainable:
            warnings.warn("The model does not have any trainable weights.", stacklevel=2)
            return [loss, accuracy]
        narrow = any(weight.dtype.itemsize == 2 for weight in weights.values())
        if narrow and not self.optimizer.iterations:
            warnings.warn("bfloat16 weights have 8 bits: a step smaller than a 256th of a weight "
                          "may be lost. Take mixed_bfloat16.", stacklevel=2)
        require(all(name in weights and moment.shape == weights[name].shape
                    for name, (moment, _) in self.optimizer.moments.items()),
                "The optimizer has learned another model: give `compile` a new one.")
        with uninterrupted(), memory_for("a step of the optimizer", xp):
            self.optimizer.update(weights, gradients)
        return [loss, accuracy]

    def find_not_finite(self, batch, loss):
        """Compute a step again, and raise FloatingPointError at the first tensor not finite."""
        xp = self.backbone.xp
        found = f"the loss is {loss}" if not math.isfinite(loss) else "a weight's gradient is bad"

        def look(name, array, suffix=""):
            if not xp.isfinite(upcast(array)).all():
                raise FloatingPointError(
                    f"Step {self.optimizer.iterations}: {found}; the first tensor that is not "
                    f"finite is {name}{suffix}. The weights are as they were before.")
            return array

        for name, array in named_weights(self.backbone.weights):
            look(name, array, ".weight")
        recompute, self.recompute = self.recompute, False
        try:
            _, _, gradients = self.learn(*batch, True, look,
                                         functools.partial(look, suffix=".gradient"))
        finally:
            self.recompute = recompute
        look("the loss", xp.asarray(loss))
        for name, array in named_weights(gradients):
            look(name, array, ".weight.gradient")
        for name, array in named_weights(gradients):
            look(name, sum_of_squares(array), ".weight.gradient's square")

    def fit(self, x, y=None, sample_weight=None, batch_size=32, epochs=1, steps_per_epoch=None,
            shuffle=True):
        """Learn from examples, batch by batch, epoch by epoch; a progress bar says how well.

        Args:
            x: list of strings; or, with `y`, a dict as for the backbone, of all examples; or
                batches, each a list of strings or a tuple (x, y) or (x, y, sample_weight), from any
                iterable: an iterator goes on in the next epoch, anything else begins again.
            y: see `gradients`, and so for `sample_weight`.
            batch_size: int, examples in a step; the last of an epoch may have fewer.
            epochs: int, how often to go through all.
            steps_per_epoch: int, the most steps in an epoch; None is no limit.
            shuffle: bool, take strings or arrays in an order that follows from the backbone's seed
                and the number of steps so far.

        Returns:
            An object with `history`: {"loss": [...], "sparse_categorical_accuracy": [...]}, each
            epoch's means over its examples and over its labels.

        Raises:
            FloatingPointError, ValueError: see `train_on_batch`.
            KeyboardInterrupt: by Ctrl-C, between two steps; the model is as the last one left it.
        """
        for name, value in (("batch_size", batch_size), ("epochs", epochs)):
            require_int(name, value)
        require_int("steps_per_epoch", steps_per_epoch, optional=True)
        require_bool("shuffle", shuffle)
        history = {"loss": [], "sparse_categorical_accuracy": []}
        what, steps = f"epoch 1/{epochs}", self.optimizer.iterations
        try:
            for epoch in range(epochs):
                what, steps = f"epoch {epoch + 1}/{epochs}", self.optimizer.iterations
                order = np.random.default_rng([self.backbone.training_seed, steps])
                batches = self.batches(x, y, sample_weight, batch_size, order if shuffle else None)
                means = self.run(self.train_on_batch, batches, steps_per_epoch, what)
                if means is None and epoch:
                    warnings.warn(f"The data ended before {what}.", stacklevel=2)
                    break
                require(means, "There is nothing to learn from.")
                for name, mean in zip(history, means, strict=True):
                    history[name].append(mean)
        except KeyboardInterrupt:
            print(f"fit: interrupted in {what}, after {self.optimizer.iterations - steps} of "
                  "its steps; the model is as the last of them left it.", file=sys.stderr)
            raise
        return types.SimpleNamespace(history=history)

    def evaluate(self, x, y=None, sample_weight=None, batch_size=32):
        """Return [loss, accuracy], means over examples as for `fit`, which nothing changes."""
        def test_on_batch(x, y, sample_weight):
            logits, xp = self(x), self.backbone.xp
            weight = np.ones(y.shape) if sample_weight is None else sample_weight
            y, weight = xp.asarray(y), xp.asarray(weight, np.float64)
            loss, _ = cross_entropy(logits, y, weight)
            right = weight_of_right(logits, y, weight)
            return to_floats(loss, right / xp.maximum(weight.sum(), 1e-7))

        require_int("batch_size", batch_size)
        batches = self.batches(x, y, sample_weight, batch_size)
        means = self.run(test_on_batch, batches, None, "evaluate")
        require(means, "There is nothing to evaluate.")
        return means

    def batches(self, x, y, sample_weight, batch_size, rng=None):
        """Return the number of batches, or None, and an iterable of them, as `labelled` has them.

        `rng`, a random generator, shuffles strings and arrays.
        """
        x = [x] if isinstance(x, str) else x
        require(y is not None or (hasattr(x, "__iter__") and not isinstance(x, dict)),
                "Without `y`, `x` must be strings, or batches.", x)
        require(y is not None or sample_weight is None, "`sample_weight` needs `y`.")

        def batch_of(batch):
            batch = batch if isinstance(batch, tuple) else (batch,)
            require(len(batch) <= 3 and not isinstance(batch[0], str),
                    "A batch in `x` must be a list of strings, or a tuple (x, y) or "
                    "(x, y, sample_weight).", batch)
            return self.labelled(*batch)

        if y is not None:
            x, y, sample_weight = self.labelled(x, y, sample_weight)
        elif not (hasattr(x, "__len__") and all(isinstance(text, str) for text in x)):
            return None, map(batch_of, x)
        count = len(x) if y is None else len(y)
        order = np.arange(count) if rng is None else rng.permutation(count)

        def cut():
            for start in range(0, count, batch_size):
                rows = order[start : start + batch_size]
                if y is None:
                    yield self.labelled([x[row] for row in rows])
                else:
                    yield ({name: array[rows] for name, array in x.items()}, y[rows],
                           None if sample_weight is None else sample_weight[rows])

        return -(-count // batch_size), cut()

    def run(self, step, batches, most, what):
        """Call `step` for each batch, at `most` so many; return mean loss and accuracy, or None."""
        from tqdm import tqdm

        total, batches = batches
        total = min((n for n in (total, most) if n is not None), default=None)
        sums, tokens, start = np.zeros(4), 0, time.perf_counter()
        with tqdm(total=total, desc=what, unit="step", delay=1) as bar:
            for batch in itertools.islice(batches, most):
                loss, accuracy = step(*batch)
                _, y, sample_weight = batch
                counted = y.size if sample_weight is None else float(sample_weight.sum())
                sums += len(y) * loss, len(y), counted * accuracy, counted
                tokens += y.size
                means = [float(sums[0] / sums[1]), float(sums[2] / max(sums[3], 1e-7))]
                bar.set_postfix_str(f"loss {means[0]:.4g}, accuracy {means[1]:.4f}, "
                                    f"{tokens / (time.perf_counter() - start):,.0f} tokens/s",
                                    refresh=False)
                bar.update()
        if most and 0 < bar.n < most:
            warnings.warn(f"The data ended after {bar.n} of {most} steps.", stacklevel=3)
        return means if bar.n else None

    def save_optimizer(self, path):
        """Write the optimizer's state, steps and moments, to a safetensors file; or OSError.

        With the weights (`save_to_preset`) and the backbone's seed, training goes on from there bit
        for bit; the settings (learning rate and so on) are `compile`'s.
        """
        arrays = [("iterations", np.array(float(self.optimizer.iterations)))]
        for name, moments in self.optimizer.moments.items():
            arrays += zip((f"{name}.momentum", f"{name}.velocity"), moments, strict=True)
        path = pathlib.Path(path)
        with staged(path.parent) as temporary:
            write_safetensors(temporary / path.name, arrays)

    def load_optimizer(self, path):
        """Take up the state that `save_optimizer` wrote; ValueError if it is of another model."""
        import safetensors

        xp, moments = self.backbone.xp, {}
        try:
            stored = open_safetensors(path, None)
        except (safetensors.SafetensorError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} cannot be read: {str(error)[:500]}") from error
        weights = unfused(self.backbone.weights, self.backbone.config)
        names = [f"{name}.{kind}" for name in weights for kind in ("momentum", "velocity")]
        require(set(stored) in ({"iterations"}, {"iterations", *names}),
                f"{path} has other tensors than this model's: "
                f"{sorted(set(stored) ^ {'iterations', *names})[:4]} …")
        steps = stored["iterations"].read()
        require(steps.shape == () and 0 <= steps < 2**53 and steps % 1 == 0,
                f"{path}: iterations must be a number of steps. Received: {steps!r}")
        for name, weight in weights.items() if len(stored) > 1 else ():
            dtype, moments[name] = upcast(weight[:0]).dtype, []
            for kind in ("momentum", "velocity"):
                array = stored[f"{name}.{kind}"].read()
                require(array.shape == weight.shape and array.dtype == dtype and is_finite(array),
                        f"{path}: {name}.{kind} must be finite {dtype} of shape {weight.shape}. "
                        f"Received: {array.dtype} of shape {array.shape}")
                moments[name].append(xp.asarray(array))
        self.optimizer.iterations, self.optimizer.moments = int(steps), moments


@functools.cache
def blas_threads():
    """Return what controls the threads of NumPy's products."""
    import threadpoolctl

    return threadpoolctl.ThreadpoolController()


@contextlib.contextmanager
def uninterrupted():
    """Hold back Ctrl-C until what is under way is complete."""
    if threading.current_thread() is not threading.main_thread():  # which alone is interrupted
        yield
        return
    signals, before = [], signal.getsignal(signal.SIGINT)
    if before is None:  # not Python's: it could not be put back
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: signals.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if signals:
            signal.raise_signal(signal.SIGINT)  # for whoever handles it, or ignores it


# ---- Instruments: traces and comparison ----------------------------------------------------------


# The largest errors, relative to the reference's largest value, of correct models of three layers.
TOLERANCES = {"float64": 1e-12, "float32": 2e-6, "float16": 3e-3, "bfloat16": 2e-2}
GRADIENT_TOLERANCES = {"float64": 1e-11, "float32": 1e-5, "float16": 1e-2, "bfloat16": 4e-2}


def execution_order(name):
    """Return a key that sorts names as the model computes them, unknown ones at the end.

    First the arrays of the forward pass, then, from last to first, their gradients, each followed
    by that of the weight to which it leads.
    """
    stem, _, forward_pass = name.partition("@")
    stem, back = stem.removesuffix(".gradient"), stem.endswith(".gradient")
    weight, stem = back and stem.endswith(".weight"), stem.removesuffix(".weight" if back else "")
    layer, stage = re.fullmatch(r"(?s)(?:transformer_layer_(\d+)\.?)?(.*)", stem).groups()
    if weight:
        stage = re.sub("^(query|value)_lora_[ab]$", r"attention.\1", stage)
        stage = {"qkv": "attention.query", "feedforward_gate_intermediate": "feedforward_gate",
                 "reverse_embedding": "logits"}.get(stage, stage)
    stages = ["token_embedding", *LAYER_TAPS, "sequence_output_layernorm", "logits"]
    place = stages.index(stage) if stage in stages else len(stages)
    layer = int(layer) if layer else math.inf if place else -1
    order = (-layer, -place) if back and place < len(stages) else (layer, place)
    return int(forward_pass) if forward_pass.isdigit() else 0, back, *order, weight


class Trace(dict):
    """A tap that records: {name: NumPy array}, in the order of the model's computation.

    A name that comes again, in a later forward pass, is kept as "name@1", then "name@2": after
    `generate(prompt, tap=trace)`, "logits" chose the first new token and "logits@1" the second.

    Args:
        names: str or list of str, which to keep: glob patterns of whole names. "*.scores" keeps the
            first pass's scores, "*.scores*" every pass's.
        dtype: None, or a dtype to convert to.
    """

    def __init__(self, names="*", dtype=None):
        super().__init__()
        self.names, self.dtype = [names] if isinstance(names, str) else names, dtype
        self.metadata = {}  # saved with the arrays
        self.passes, self.size = collections.Counter(), 0  # how often each name came; bytes kept

    def __repr__(self):
        return f"<Trace of {len(self)} arrays, {sum(x.nbytes for x in self.values()):,} bytes>"

    def keeps(self, name):
        """Say whether one of the patterns matches `name`."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.names)

    def __call__(self, name, array):
        """Keep a copy of `array` if its name is one to keep; return it."""
        key = f"{name}@{self.passes[name]}" if self.passes[name] else name
        self.passes[name] += 1
        if self.keeps(key):
            self[key] = np.array(to_numpy(array), self.dtype, order="C")
            before, self.size = self.size, self.size + self[key].nbytes
            if before <= 1e9 < self.size:
                warnings.warn(f"The trace takes over 1 GB by {key!r}, and grows; choose "
                              "`names` for a smaller.", stacklevel=2)
        return array

    @classmethod
    def record(cls, causal_lm, inputs, names="*", dtype=None, max_length=None, y=None,
               sample_weight=None):
        """Record one forward pass; configuration and inputs go into the metadata.

        With labels, the backward pass, too: each array's gradient as "<its name>.gradient", and
        each weight's as "<its name>.weight.gradient", rounded to the dtype of the computation.

        Args:
            causal_lm: Phi3CausalLM.
            inputs: a prompt or a list of them, cut to `max_length` tokens as by `generate`, or a
                dict as for `Phi3Backbone.__call__`.
            names: see `Trace`, and so for `dtype`.
            max_length: int; None is the preprocessor's `sequence_length`.
            y: None, labels [B, S], or "next": the token that follows, where one does.
            sample_weight: see `Phi3CausalLM.gradients`.
        """
        trace, backbone = cls(names, dtype), causal_lm.backbone
        trace.metadata = {"config": backbone.get_config()}
        if not isinstance(inputs, dict):
            require(causal_lm.preprocessor, "Strings need a preprocessor: pass a dict.")
            trace.metadata["prompt"] = inputs
            texts = [inputs] if isinstance(inputs, str) else inputs
            inputs = causal_lm.preprocessor.generate_preprocess(texts, max_length)
            used = inputs["padding_mask"].any(axis=0)
            inputs = {name: array[:, used] for name, array in inputs.items()}
        token_ids, padding_mask = check_inputs(inputs, backbone.vocabulary_size)
        trace.metadata["token_ids"] = token_ids.tolist()
        trace.metadata["padding_mask"] = padding_mask.astype(int).tolist()
        if isinstance(y, str) and y == "next":
            y, follows = np.roll(token_ids, -1, axis=1), np.roll(padding_mask, -1, axis=1)
            follows[:, -1] = False
            sample_weight = (padding_mask & follows).astype(np.float32)
        if y is None:
            causal_lm(inputs, tap=trace)
        else:
            loss, gradients = causal_lm.gradients(
                inputs, y, sample_weight, training=False, tap=trace,
                gradient_tap=lambda name, array: trace(f"{name}.gradient", array))
            for name, array in named_weights(gradients):
                trace(f"{name}.weight.gradient", cast(array, backbone.config))
            trace.metadata |= {"loss": loss, "y": np.asarray(y).tolist()}
            if sample_weight is not None:
                trace.metadata["sample_weight"] = np.asarray(sample_weight, float).tolist()
        require(trace, f"No name matches {names!r}.")
        return trace

    def save(self, path):
        """Write the arrays, and the metadata as JSON texts, to a safetensors file; or OSError."""
        import safetensors.numpy

        arrays = {name: np.asarray(to_numpy(self[name]), order="C") for name in self}
        metadata = {key: json.dumps(value) for key, value in self.metadata.items()}
        path = pathlib.Path(path)
        with staged(path.parent) as temporary:
            try:
                safetensors.numpy.save_file(arrays, temporary / path.name, metadata)
            except safetensors.SafetensorError as error:
                raise OSError(f"{path} cannot be written: {error}") from error

    @classmethod
    def load(cls, path):
        """Read a trace, or any safetensors file; OSError or ValueError if that cannot be done."""
        import safetensors

        trace = cls()
        try:
            stored = open_safetensors(path, None)
            for name in sorted(stored, key=execution_order):
                trace[name] = np.array(stored[name].read())  # a copy: the file may change
            with safetensors.safe_open(path, framework="numpy") as file:
                texts = file.metadata() or {}
        except (safetensors.SafetensorError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        for key, text in texts.items():
            trace.metadata[key] = text
            with contextlib.suppress(ValueError, RecursionError):  # another's need not be JSON
                trace.metadata[key] = json.loads(text)
        return trace


# One tensor's comparison. The error is largest at `index`, where `values` are the reference's and
# the other's. If shapes differ or are empty, `index` is None, `values` are the shapes, numbers NaN.
Row = collections.namedtuple("Row", "name shape dtype max_error relative_error ulps cosine "
                             "tolerance within index values")


class Comparison:
    """What `compare` finds; printed, and shown in Jupyter, as a table.

    `rows` has a Row per tensor, in execution order; `first` is the first Row beyond tolerance, or
    None; `only_in_reference` and `only_in_other` are the names without a partner.
    """

    def __init__(self, rows, only_in_reference, only_in_other):
        self.rows, self.first = rows, next((row for row in rows if not row.within), None)
        self.only_in_reference, self.only_in_other = only_in_reference, only_in_other

    def table(self):
        """Return the table as lists of strings, the headings first."""
        headings = ["name", "", "shape", "dtype", "max error", "relative", "ulps", "cosine"]
        return [headings] + [
            [row.name, "" if row.within else "<-", str(list(row.shape)), row.dtype,
             f"{row.max_error:.1e}", f"{row.relative_error:.1e}", f"{row.ulps:.3g}",
             f"{row.cosine:.7f}"] for row in self.rows]

    def summary(self):
        """Return the lines below the table: where the two part, and what was not compared."""
        def listed(names):
            return f"{len(names)}: {', '.join(names[:4])}" + ", …" * (len(names) > 4)

        row, lines = self.first, [f"All {len(self.rows)} tensors are within tolerance."]
        if row is not None:
            beyond = sum(not row.within for row in self.rows)
            found, values = "different shapes", row.values
            if row.index is not None:
                found = (f"relative error {row.relative_error:.1e} > {row.tolerance:.1e}, "
                         f"largest at {list(row.index)}")
                values = [f"{value:.7g}" for value in values]
            lines = [f"Beyond tolerance (<-): {beyond} of {len(self.rows)} tensors, the first is",
                     f"{row.name}: {found}: {values[0]} in the reference, {values[1]} in the other"]
            before = [row.name for row in self.rows[: self.rows.index(row)]]
            last = execution_order(before[-1]) if before else (-1,)
            between = [name for name in self.only_in_reference
                       if last < execution_order(name) < execution_order(row.name)]
            lines += [f"Right until {name}" for name in before[-1:]]
            if between:
                where = "between the two" if before else "before it"
                lines.append(f"Not compared {where}, {listed(between)}")
        for side, names in (("reference", self.only_in_reference), ("other", self.only_in_other)):
            if names:
                lines.append(f"Only in the {side}, {listed(names)}")
        return lines

    def __repr__(self):
        table = self.table()
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])])
                 for cells in table]
        return "\n".join(lines + self.summary())

    def _repr_html_(self):
        rows = ["".join(f"<td>{'<b>' * bool(cells[1])}{html.escape(cell)}" for cell in cells)
                for cells in self.table()]
        lines = map(html.escape, self.summary())
        return f"<table><tr>{'<tr>'.join(rows)}</table>{'<br>'.join(lines)}"


def compare(reference, other, mapping=None, tolerance=None):
    """Compare two sets of named tensors: where do they part first, and by how much?

    Args:
        reference: a Trace, the path of a safetensors file, or any dict of arrays.
        other: the same.
        mapping: None, or {name in the reference: name in the other, or (name, function)}, where
            `function` brings the other's array into the reference's layout.
        tolerance: float, the largest error relative to the reference's largest absolute value;
            None is that of `TOLERANCES`, or `GRADIENT_TOLERANCES`, for the less precise dtype.

    Returns:
        Comparison. Of each tensor in both: the largest absolute error; the same relative to the
        reference's largest absolute value, and in units in the last place of that value in the less
        precise dtype; the cosine of the two as vectors.

    Raises:
        OSError, ValueError: a file cannot be read, the two have no name in common, or a name in
            `mapping` is not in that of the two to which it belongs.
    """
    require(tolerance is None or (is_number(tolerance) and tolerance >= 0),
            f"`tolerance` must be None or a number >= 0. Received: {tolerance!r}")
    reference, other = (
        Trace.load(side) if isinstance(side, (str, os.PathLike)) else side
        for side in (reference, other)
    )
    mapping = {name: partner if isinstance(partner, tuple) else (partner, np.asarray)
               for name, partner in (mapping or {}).items()}
    for side, tensors, names in (("reference", reference, mapping),
                                 ("other", other, [partner for partner, _ in mapping.values()])):
        missing = [name for name in names if name not in tensors]
        require(not missing, f"`mapping` names {missing[:3]}, of which the {side} has none. It has "
                f"{list(tensors)[:3]} …")
    rows, only_in_reference, partners = [], [], set()
    for name in sorted(reference, key=execution_order):
        partner, function = mapping.get(name, (name, np.asarray))
        partners.add(partner)
        if partner in other:
            array = function(to_numpy(other[partner]))
            rows.append(compare_arrays(name, to_numpy(reference[name]), array, tolerance))
        else:
            only_in_reference.append(name)
    require(rows, f"No name in common: {list(reference)[:3]} … and {list(other)[:3]} …")
    return Comparison(rows, only_in_reference, [name for name in other if name not in partners])


def compare_arrays(name, reference, other, tolerance):
    """Return the Row of one tensor; see `compare`."""
    dtypes = [array.dtype.name for array in (reference, other)]
    dtype = max((name if name in TOLERANCES else "float64" for name in dtypes), key=TOLERANCES.get)
    if tolerance is None:
        tolerance = (GRADIENT_TOLERANCES if ".gradient" in name else TOLERANCES)[dtype]
    shape = reference.shape
    if shape != other.shape or 0 in shape:
        shapes, same = (list(shape), list(other.shape)), shape == other.shape
        return Row(name, shape, dtype, *[math.nan] * 4, tolerance, same, None, shapes)
    reference, other = reference.astype(np.float64), other.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.where(reference == other, 0, np.abs(reference - other))
        error[np.isnan(error)] = math.inf  # NaN on either side, or on both
        index = np.unravel_index(error.argmax(), shape)
        largest = np.abs(reference[np.isfinite(reference)]).max(initial=0)
        relative_error = error[index] / largest if error[index] else 0.0
        norms = np.linalg.norm(reference) * np.linalg.norm(other)
        cosine = (reference * other).sum() / norms if norms else float(not error.any())
    precision = ml_dtypes.finfo(dtype)
    ulp = math.ldexp(precision.eps, max(math.frexp(largest)[1] - 1, precision.minexp))
    return Row(name, shape, dtype, float(error[index]), float(relative_error),
               float(error[index] / ulp), float(cosine), tolerance,
               bool(relative_error <= tolerance), tuple(map(int, index)),
               (float(reference[index]), float(other[index])))


# ---- Presets: reading and writing ----------------------------------------------------------------


TOKENIZER_FILES = (  # Hugging Face's
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja",
)
# All that a preset says of its model, but the weights. Hugging Face is asked for exactly these: in
# its patterns "*" matches "/" as well, and so whole directories of a trainer's checkpoints.
SMALL_FILES = (
    "config.json", "generation_config.json", "adapter_config.json", "model.safetensors.index.json",
    *TOKENIZER_FILES,  # and Keras's:
    "preprocessor.json", "assets/tokenizer/vocabulary.spm", "model.weights.json",
)


# In each format, the file that holds all weights, and the index of several.
WEIGHT_FILES = {
    "keras": ("model.weights.h5", "model.weights.json"),
    "huggingface": ("model.safetensors", "model.safetensors.index.json"),
}


class PresetNotFoundError(FileNotFoundError, ValueError):
    """There is no such preset: for Python a file that is not there, for KerasHub a wrong value."""


class Preset:
    """The files of a preset: a local directory, or a hub's, which its client fetches and keeps.

    Args:
        preset: see `Phi3Backbone.from_preset`; or a Preset, which is used again.

    Raises:
        ConnectionError: the hub cannot be reached, or answers with an error; as all of its methods.
        FileNotFoundError: there is no such preset, or it has no config.json.
        PermissionError: the hub asks for a log-in, or for consent to the model's terms.
        ValueError: the handle is malformed, or config.json is not that of a Phi-3; or the preset is
            an adapter to another.
    """

    needs_head = False  # a causal LM does: it sets this to True

    def __init__(self, preset):
        if isinstance(preset, Preset):
            vars(self).update(vars(preset))
            return
        self.name = str(preset)
        location = Phi3Backbone.presets.get(self.name, self.name)
        self.scheme, _, self.handle = location.rpartition("://")
        require(self.scheme in ("", "kaggle", "hf"), f"preset {self.name!r}: unknown scheme")
        if not self.scheme and not os.path.isdir(self.handle):
            raise PresetNotFoundError(
                f"The embedded preset {self.name!r} is not beside phi3_ref.py: copy it from the "
                f"repository to {location}, or choose another." if self.name != location else
                f"There is no preset {self.name!r}. A preset is one of {list(Phi3Backbone.presets)}"
                ", a directory, kaggle://…, hf://organization/name or hf://…@revision."
            )
        self.directory = pathlib.Path(self.handle)
        self.fetch(*SMALL_FILES)
        self.config = self.json("config.json")
        self.format = "keras" if "registered_name" in (self.config or {}) else "huggingface"
        require(self.format == "keras" or self.file("adapter_config.json") is None,
                f"{self.name}/adapter_config.json: an adapter is not applied here. Load its model, "
                "from a directory without it, and then backbone.load_adapter(directory).")
        if self.config is None:
            raise PresetNotFoundError(f"preset {self.name!r} has no config.json")
        found = self.config.get("registered_name", self.config.get("model_type"))
        known = "keras_hub>Phi3Backbone", "keras_nlp>Phi3Backbone", *HUGGINGFACE_DEFAULTS
        require(found in known,
                f"{self.name}/config.json is not that of a Phi-3: it says {found!r}")

    def fetch(self, *names):
        """Fetch those of a Hugging Face repository's files that there are, always of one commit."""
        if self.scheme != "hf":  # `file` fetches Kaggle's one by one
            return
        import huggingface_hub

        repository, at, revision = self.handle.partition("@")
        require(revision or not at, f"preset {self.name!r} has no revision after the @")
        patterns = [glob.escape(name) for name in names]
        with self.hub_errors(names[0]):
            self.directory = pathlib.Path(huggingface_hub.snapshot_download(
                repository, revision=revision or None, allow_patterns=patterns
            ))
        self.handle = f"{repository}@{self.directory.name}"  # whose name is the commit

    def file(self, name):
        """Return the local path of one of the preset's files, or None where it has none."""
        if self.scheme != "kaggle":
            path = self.directory / name
            return path if path.is_file() else None
        import kagglehub

        try:
            with self.hub_errors(name):
                return pathlib.Path(kagglehub.model_download(self.handle, name))
        except (FileNotFoundError, ValueError) as error:
            # There is no such file, says the hub; or its cache, where that has the whole model.
            absent = re.search("404 Client Error|is not present in", str(error))
            if absent and name != "config.json":
                return None
            raise

    @contextlib.contextmanager
    def hub_errors(self, name):
        """Turn what a hub's client raises, each its own, into what `Preset` documents."""
        try:
            yield
        except Exception as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            malformed = isinstance(error, ValueError) and not isinstance(error, OSError)
            if malformed or getattr(error, "errno", None):  # or the disk is full, say
                raise
            kind, advice = {
                401: (PermissionError, "check the name, or log in"),
                403: (PermissionError, "accept the model's terms on its page, and log in"),
                404: (FileNotFoundError, "check the name, and the revision if it says one"),
            }.get(status, (ConnectionError, "try again; what was fetched before is kept"))
            raise kind(f"{name} of preset {self.name!r}: {advice}. {error}") from error

    def json(self, name):
        """Return the object in one of the preset's JSON files, or None where there is no file."""
        path = self.file(name)
        return None if path is None else read_json(path)

    def backbone_config(self):
        """Return the constructor arguments of `Phi3Backbone` that config.json stands for."""
        if self.format == "huggingface":
            try:
                return arguments_from_huggingface(self.config)
            except KeyError as error:
                raise ValueError(f"it lacks {error}") from error
            except (ArithmeticError, TypeError) as error:
                raise ValueError(f"it is malformed: {error}") from error
        arguments = self.config.get("config")
        require(isinstance(arguments, dict), "it has no object `config`")
        parameters = inspect.signature(Phi3Backbone).parameters
        unknown = arguments.keys() - (parameters.keys() - {"backend", "fused", "seed", "weights"})
        require(not unknown, f"unknown arguments {sorted(unknown)}")
        dtype = arguments.get("dtype")
        policy = dtype.get("class_name") if isinstance(dtype, dict) else "DTypePolicy"
        require(policy == "DTypePolicy", f"its `dtype` is a {policy}: the model is quantized, and "
                "not computed so here. Take the model that it was made from.")
        lacking = [name for name, parameter in parameters.items()
                   if parameter.default is parameter.empty and name not in arguments]
        require(not lacking, f"it lacks {lacking}")
        return arguments

    def weight_files(self):
        """Return the paths of the files that hold the weights, and the map of the index or None.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: an index is malformed, or names a file outside the preset.
        """
        single, index = WEIGHT_FILES[self.format]
        self.fetch(single, index)
        path = self.file(single)
        if path is not None:  # before the index, as in KerasHub and transformers
            return [path], None
        shards = self.json(index)
        if shards is None:
            raise FileNotFoundError(f"preset {self.name!r} has neither {single} nor {index}; "
                                    "pickles (.bin) are not read, as they can run any code")
        weight_map, names = shards.get("weight_map"), []
        require(isinstance(weight_map, dict), f"{self.name}/{index} has no map `weight_map`")
        for item in weight_map.values():
            # Keras gives a list of files where a layer is spread over several.
            names += item if isinstance(item, list) else [item]
        for name in names:
            require(isinstance(name, str) and pathlib.PurePath(name).name == name[:255],
                    f"{self.name}/{index} names {name!r}, which is not a file beside it")
        require(names, f"{self.name}/{index} names no file")
        names = sorted(set(names))
        self.fetch(*names)
        paths = [self.file(name) for name in names]
        if None in paths:
            name = names[paths.index(None)]
            raise FileNotFoundError(f"preset {self.name!r} has no {name!r}")
        return paths, weight_map


def read_small(path):
    """Return the content of a file that has no reason to be large, as bytes."""
    size = path.stat().st_size
    require(size <= 2**25, f"{path} has {size:,} bytes; at most {2**25:,} are read")
    return path.read_bytes()


def read_json(path):
    """Return the object in a JSON file."""
    content = read_small(path)
    try:
        content = parse_json(content)
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, nested too deeply
        raise ValueError(f"{path} is not JSON: {error}") from error
    require(isinstance(content, dict), f"{path} must hold an object, not a {type(content)}")
    return content


def parse_json(text):
    """Return what a JSON text, as UTF-8 bytes, stands for; a key may not come twice."""

    def unique(pairs):
        keys = collections.Counter(key for key, _ in pairs)
        require(len(keys) == len(pairs), f"the key {keys.most_common(1)} comes twice")
        return dict(pairs)

    return json.loads(text.decode("utf-8"), object_pairs_hook=unique)


# A tensor in a file, not read yet: where it is, what it is, and the function that reads it.
StoredTensor = collections.namedtuple("StoredTensor", "path shape dtype read")


FLOATS = ("float64", "float32", "float16", "bfloat16")  # dtypes that weights may have in files


def open_hdf5(path, stack):
    """Return {name: StoredTensor} of a Keras weights file, which `stack` closes."""
    import h5py

    file, found = stack.enter_context(h5py.File(path, "r")), {}

    def visit(name, item):  # called for what the file itself holds; links are not followed
        require(isinstance(name, str) and name.count("/") < 9,  # bytes are no UTF-8
                f"{name!r} is no name that Keras gives")
        if isinstance(item, h5py.Dataset):
            # What lies in another file has no place here; what is compressed could swell.
            # And what is mapped must have an address, and be the floats that NumPy has.
            dtype, offset = item.dtype, item.id.get_offset()
            require(item.chunks is None and not item.external and not item.is_virtual
                    and item.id.get_storage_size() == item.nbytes
                    and (offset is not None or item.nbytes == 0)
                    and (dtype.kind != "f" or item.id.get_type() == h5py.h5t.py_create(dtype)),
                    f"{name} is not stored as Keras does: whole, in this file, uncompressed")
            if dtype.name == "void16" and "dtype" in item.attrs:
                # HDF5 has none: Keras writes opaque items of two bytes, and an attribute. What that
                # says is not read: the HDF5 library may never return from a damaged one.
                dtype = np.dtype(ml_dtypes.bfloat16)
            read = functools.partial(map_tensor, path, offset, item.shape, dtype)
            found[name] = StoredTensor(path, item.shape, dtype.name, read)

    file.visititems(visit)
    return found


def open_safetensors(path, _):
    """Return {name: StoredTensor} of a safetensors file, which is closed again."""
    import safetensors

    with open(path, "rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        require(header_size <= 2**25, f"its header has {header_size:,} bytes, more than {2**25:,}")
        header = parse_json(file.read(header_size))
    with safetensors.safe_open(path, framework="numpy"):
        pass  # the library checks what the header says: lengths, ranges, no overlap, no gap
    dtypes = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
              "I64": "int64", "I32": "int32"}
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        shape, dtype = tuple(entry["shape"]), dtypes.get(entry["dtype"], entry["dtype"])
        start = 8 + header_size + entry["data_offsets"][0]
        read = functools.partial(map_tensor, path, start, shape, dtype)
        found[name] = StoredTensor(path, shape, dtype, read)
    return found


def map_tensor(path, start, shape, dtype):
    """Return the array of that shape and dtype that begins at byte `start` of a file.

    It is mapped, not read: its pages are read when they are first used, and all processes that use
    them share them. Writing to the array copies the page, and never changes the file. (Where it
    is not aligned it is read, as BLAS takes aligned arrays only.)
    """
    if start % np.dtype(dtype).itemsize:
        return np.fromfile(path, dtype, math.prod(shape), offset=start).reshape(shape)
    return np.asarray(np.memmap(path, dtype, mode="c", offset=start, shape=shape))


def read_weights(preset, config, xp):
    """Return a preset's weights as a tree on `xp`, read tensor by tensor, and the config it fits.

    This is `config`, save where that ties an output projection which the file holds as another.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged; a tensor is missing, unknown, or of the wrong shape or dtype.
    """
    keras = preset.format == "keras"
    open_file = open_hdf5 if keras else open_safetensors
    named_arrays = keras_variables if keras else huggingface_tensors
    require(not (keras and config.tie_word_embeddings), f"{preset.name} is in Keras's format, "
            "which holds two embeddings: `tie_word_embeddings` must be False.")
    tied, (embedding, head) = config.tie_word_embeddings, map(
        huggingface_name, ("token_embedding", "reverse_embedding"))

    def is_superfluous(name):  # old checkpoints hold RoPE's frequencies, some a tied head
        return name.endswith(".rotary_emb.inv_freq") or (tied and name == head)

    with contextlib.ExitStack() as stack:
        found, (paths, weight_map) = {}, preset.weight_files()
        for path in paths:
            try:
                tensors = open_file(path, stack)
            except Exception as error:  # h5py and safetensors each raise their own
                raise ValueError(f"{path} cannot be read: {str(error)[:500]}") from error
            for stored_name, tensor in tensors.items():
                name = stored_name if keras else name_in_causal_lm(stored_name)
                require(name not in found,
                        f"{path}: {name} is in another file or under another name, too")
                found[name] = tensor
                if weight_map is not None and not is_superfluous(name):
                    # Keras's lists groups; one may be spread over files.
                    group = "/" + name.rpartition("/")[0]
                    files = weight_map.get(group if keras else stored_name)
                    require(path.name in (files if isinstance(files, list) else [files]),
                            f"{path} holds {name}, for which the index names {files!r}")
        # Of tied embeddings one may be there, either; or both, and then they may be different.
        if tied and embedding not in found and head in found:
            found[embedding] = found.pop(head)
        if tied and head in found:
            config = dataclasses.replace(config, tie_word_embeddings=False)
        # Everything is checked before memory is taken.
        where = ", ".join(map(str, paths[:3])) + ", …" * (len(paths) > 3)
        require(config.num_layers <= len(found),
                f"{where}: {len(found)} tensors cannot be those of {config.num_layers} layers")
        zero = np.zeros((), config.weight_dtype)  # of any shape, it takes no memory
        shapes = config.build_weights(lambda name, shape: np.broadcast_to(zero, shape))
        expected = {}
        for name, array in named_arrays(shapes, config):
            parts = dict(split_tensors(name, array, config))
            split = name not in found and parts.keys() & found.keys()
            expected.update(parts if split else {name: array})
        if head in expected and head not in found and not preset.needs_head:
            del expected[head]
            warnings.warn(f"{where}: there is no tensor {head}: logits would all be zero.",
                          stacklevel=3)
        for name, array in expected.items():
            require(name in found, f"{where}: there is no tensor {name}")
            path, shape, dtype, _ = found[name]
            require(dtype in FLOATS,
                    f"{path}: {name} must be floating-point, not quantized. Found: {dtype}")
            require(shape == array.shape, f"{path}: {name} must be {array.shape}. Found: {shape}")
        unused = {name for name in found.keys() - expected.keys() if not is_superfluous(name)}
        for name in unused:  # heads for classes, answers (transformers'), rewards (TRL's) may be
            require(name.split(".")[0] in ("score", "classifier", "qa_outputs", "v_head"),
                    f"{found[name].path}: unknown tensor {name!r}")
        if unused:
            warnings.warn(f"{where}: no use is made of {sorted(unused)}.", stacklevel=3)

        def read(name, array=None):
            try:
                stored = xp.asarray(found[name].read())
            except (OSError, RuntimeError, ValueError) as error:
                raise ValueError(f"{found[name].path}: {name} cannot be read: {error}") from error
            if array is None:  # what is of the right dtype, and not for a GPU, is used as it is
                array = stored.astype(config.weight_dtype, copy=False)
            else:  # a matrix of Keras's lies the other way: 16 rows at once fill whole cache lines
                def write(rows):
                    array[rows] = stored[rows].astype(array.dtype, copy=False)

                size = 16 if xp is np else len(stored)
                pieces = [slice(start, start + size) for start in range(0, len(stored), size)]
                on_cores(write, pieces, array.size >= 2**20)
            require(is_finite(array), f"{found[name].path}: {name}, as {array.dtype}, "
                    "has values that are NaN or infinite")
            return array

        stack.enter_context(np.errstate(over="ignore"))  # `is_finite` says it, and where
        if keras:
            weights = config.build_weights(lambda name, shape: xp.empty(shape, config.weight_dtype))
            for name, array in progress(keras_variables(weights, config), "loading"):
                read(name, array)
            return config, weights
        arrays = {}
        for name, array in progress(huggingface_tensors(shapes, config), "loading"):
            if name in expected:
                arrays[name] = read(name)
            else:  # it is read part by part; or it is the head that is not there
                arrays[name] = xp.zeros(array.shape, array.dtype)
                for part, view in split_tensors(name, arrays[name], config):
                    read(part, view)
        if tied and head in arrays:
            if bool(xp.array_equal(arrays[embedding], arrays[head])):
                config = dataclasses.replace(config, tie_word_embeddings=True)
            else:
                warnings.warn(f"{preset.name}/config.json ties {head} to {embedding}, but they "
                              "differ in the file: they are not tied.", stacklevel=3)
        return config, config.build_weights(lambda name, shape: arrays[huggingface_name(name)])


def read_lora(path, weights, config, xp):
    """Return a tree with the weights and the LoRA adapters of a .lora.h5 file; or ValueError."""
    with contextlib.ExitStack() as stack:
        try:
            stored = open_hdf5(path, stack)
        except FileNotFoundError:
            raise
        except Exception as error:  # h5py raises its own
            raise ValueError(f"{path} cannot be read: {str(error)[:500]}") from error
        rank = stored.pop("lora/vars/rank", None)
        require(rank is not None and rank.shape == () and rank.dtype in ("int32", "int64"),
                f"{path} has no integer lora/vars/rank: it is none of KerasHub's LoRA files")
        rank, enabled = int(rank.read()), weights["transformer_layers"][0].get("query_lora_b")
        require(0 < rank < 2**31, f"{path}: the rank must be positive. Found: {rank}")
        require(enabled is None or enabled.shape[1] == rank, f"{path} has adapters of rank {rank}, "
                f"but `enable_lora({0 if enabled is None else enabled.shape[1]})` was called.")
        dtype = upcast(np.empty(0, config.weight_dtype)).dtype
        zero = np.zeros((), dtype)  # of any shape, it takes no memory
        expected = dict(lora_variables(with_adapters(
            weights, config, rank, lambda shape, _: np.broadcast_to(zero, shape))))
        require(stored.keys() == expected.keys(), f"{path} has adapters of other layers than this "
                f"model's: {sorted(stored.keys() ^ expected.keys())[:4]} …")
        for name, array in expected.items():
            found = stored[name]
            require(found.shape == array.shape and found.dtype in FLOATS, f"{path}: {name} must be "
                    f"floating-point, {array.shape}. Found: {found.dtype}, {found.shape}")
        tree = with_adapters(weights, config, rank, lambda shape, _: xp.empty(shape, dtype))
        for name, view in lora_variables(tree):
            try:
                array = stored[name].read().astype(dtype)
            except (OSError, RuntimeError, ValueError) as error:
                raise ValueError(f"{path}: {name} cannot be read: {error}") from error
            require(is_finite(array), f"{path}: {name} has values that are NaN or infinite")
            view[...] = xp.asarray(array)
        return tree


# Of PEFT's settings, those that are read below, and those that change nothing of a merged model.
ADAPTER_SETTINGS = {
    "alpha_pattern", "bias", "exclude_modules", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "lora_alpha", "peft_type", "r", "rank_pattern", "target_modules",
    "use_rslora",
    "auto_mapping", "base_model_name_or_path", "eva_config", "inference_mode", "loftq_config",
    "lora_dropout", "megatron_core", "peft_version", "qalora_group_size", "revision", "task_type",
}


def read_adapter_settings(path):
    """Return PEFT's adapter_config.json as a dict, checked: what cannot be merged is refused."""
    settings = {"r": 8, "lora_alpha": 8, "init_lora_weights": True, **read_json(path)}

    def check(name, valid, what):
        value = settings.setdefault(name, None)
        require(valid(value), f"{path}: `{name}` must be {what}. Found: {value!r:.99}")

    def is_rank(x):
        return is_int(x) and 0 < x < 2**31

    def is_list(x, of):
        return x is None or (isinstance(x, list) and all(isinstance(item, of) for item in x))

    def is_pattern(x, valid):  # of any regular expression, as PEFT has it, some take forever
        return x is None or (isinstance(x, dict) and all(
            re.fullmatch(r"\^?(\w|\\?\.)+", key) and valid(value) for key, value in x.items()))

    for name, value in settings.items():
        require(name in ADAPTER_SETTINGS or not value,
                f"{path}: an adapter with `{name}` ({value!r:.99}) cannot be merged here.")
    check("peft_type", lambda x: x == "LORA", "'LORA', which alone can be merged here")
    check("bias", lambda x: x in (None, "none"), "'none': Phi-3 has no biases")
    check("init_lora_weights", lambda x: x in (None, True, False, "gaussian", "eva", "orthogonal"),
          "one that leaves the model's weights as they are. (PEFT converts others: "
          "save_pretrained(…, path_initial_model_for_weight_conversion=…).)")
    check("use_rslora", lambda x: x in (None, True, False), "true or false")
    check("r", is_rank, "a positive integer")
    check("lora_alpha", is_number, "a number")
    check("rank_pattern", lambda x: is_pattern(x, is_rank), "integers by modules' names")
    check("alpha_pattern", lambda x: is_pattern(x, is_number), "numbers by modules' names")
    for name in ("target_modules", "exclude_modules"):
        check(name, lambda x: isinstance(x, str) or is_list(x, str), "a string or a list of names")
    check("layers_to_transform", lambda x: is_int(x) or is_list(x, int), "integers")
    check("layers_pattern", lambda x: x in (None, "", [], "layers", ["layers"]), "'layers'")
    return settings


def read_adapter(directory, weights, config):
    """Return {module: (A, B, scale)} of an adapter that PEFT saved, where W becomes W + scale B A.

    Modules have Hugging Face's names, of fused weights or of their parts.
    """
    paths = directory / "adapter_config.json", directory / "adapter_model.safetensors"
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there; an adapter that PEFT saved has it. "
                                    "(Pickles, .bin, are not read, as they can run any code.)")
    settings, path = read_adapter_settings(paths[0]), paths[1]
    try:
        stored = open_safetensors(path, None)
    except Exception as error:  # safetensors raises its own
        raise ValueError(f"{path} cannot be read: {str(error)[:500]}") from error
    found, shapes, result = {}, {}, {}
    for name, tensor in stored.items():
        module, _, kind = name_in_causal_lm(name).rpartition(".lora_")
        pair = found.setdefault(module, {})
        require(kind in ("A.weight", "B.weight") and kind not in pair,
                f"{path}: {name!r} is not the A or the B of a module, or is so once more.")
        pair[kind] = tensor
    ends = {module.rpartition(".")[2] for module in found}
    for name, array in huggingface_tensors(weights, config):
        parts = dict(split_tensors(name, array, config))
        adapted = {part.split(".")[-2] for part in parts} & ends  # in this layer, or in another
        for part, view in (parts if adapted else {name: array}).items():
            if view.ndim == 2 and "embed_tokens" not in part:  # a table is no product
                shapes[part.removesuffix(".weight")] = view.shape

    def called(module):  # all ends of its name, and the whole with PEFT's mark of a beginning
        steps = module.split(".")
        return {f"^{module}", *(".".join(steps[i:]) for i in range(len(steps)))}

    def is_adapted(module):
        layer, layers = re.search(r"\.(\d+)\.", module), settings["layers_to_transform"]
        layers = [layers] if is_int(layers) else layers
        return (not called(module).isdisjoint(settings["target_modules"])
                and called(module).isdisjoint(settings["exclude_modules"] or ())
                and (not layers or module in settings["target_modules"]
                     or (layer is not None and int(layer[1]) in layers)))

    expected = found.keys() & shapes.keys()  # of a pattern, or "all-linear": PEFT saved them all
    if isinstance(settings["target_modules"], list) and not isinstance(
            settings["exclude_modules"], str):
        expected = set(filter(is_adapted, shapes))
    require(found.keys() == expected, f"{path} adapts other modules than this model has and "
            f"{paths[0].name} names: {sorted(found.keys() ^ expected)[:4]} …")
    patterns = [{key.replace("\\.", "."): (place, value)
                 for place, (key, value) in enumerate((settings[name] or {}).items())}
                for name in ("rank_pattern", "alpha_pattern")]
    for module, (rows, columns) in shapes.items():
        if module in found:
            rank, alpha = (
                min((pattern[end] for end in called(module) & pattern.keys()),
                    default=(0, settings[default]))[1]
                for pattern, default in zip(patterns, ("r", "lora_alpha"), strict=True))
            pair = []
            for kind, shape in (("A.weight", (rank, columns)), ("B.weight", (rows, rank))):
                tensor, name = found[module].get(kind), f"{module}.lora_{kind}"
                require(tensor is not None, f"{path}: there is no tensor {name}")
                require(tensor.dtype in FLOATS and tensor.shape == shape, f"{path}: {name} must be "
                        f"floating-point, {shape}. Found: {tensor.dtype}, {tensor.shape}")
                pair.append(tensor.read())
                require(is_finite(pair[-1]), f"{path}: {name} has values that are NaN or infinite")
            scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
            result[module] = *pair, scale
    return result


def merge_adapter(directory, weights, config, xp):
    """Return a tree in whose weights are an adapter's changes, rounded once."""
    adapter, arrays = read_adapter(directory, weights, config), dict(named_weights(weights))
    for name, array in progress(named_weights(weights), "merging"):
        if "_lora_" in name:
            continue
        whole = huggingface_name(name)
        names = {part for part, _ in ((whole, array), *split_tensors(whole, array, config))
                 if part.removesuffix(".weight") in adapter}
        if names:
            arrays[name] = array.copy()
            views = {whole: arrays[name], **dict(split_tensors(whole, arrays[name], config))}
            for part in names:
                *pair, scale = adapter[part.removesuffix(".weight")]
                weight = upcast(views[part])
                a, b = (xp.asarray(array).astype(weight.dtype) for array in pair)
                with np.errstate(over="ignore"):  # `is_finite` says it, and where
                    views[part][...] = weight + b @ a * scale
            require(is_finite(arrays[name]), f"{directory}: {whole}, with the adapter and as "
                    f"{array.dtype}, has values that are NaN or infinite")
    return tree_of(arrays)


def is_finite(array):
    """Say whether no value is NaN or infinite; as fast as memory, and without taking any."""
    # IEEE's bits, read as integers, sort like the numbers: infinity lies above all finite ones, and
    # NaNs above it; the negative ones come last if the integers are unsigned.
    for kind, limit in (("i", math.inf), ("u", -math.inf)):
        bits = f"{kind}{array.dtype.itemsize}"
        if int(array.view(bits).max()) >= int(np.array(limit, array.dtype).view(bits)):
            return False
    return True


def in_shards(named_arrays, max_shard_size):
    """Return (name, array) pairs as lists of at most so many GB (2^30 bytes) each; None: as one.

    An array that is larger stands alone.
    """
    require(max_shard_size is None or (is_number(max_shard_size) and max_shard_size > 0),
            f"`max_shard_size` must be None or a positive number. Received: {max_shard_size!r}")
    shards, filled = [[]], 0
    for name, array in named_arrays:
        filled += array.nbytes
        if shards[-1] and filled > (max_shard_size or math.inf) * 2**30:
            shards.append([])
            filled = array.nbytes
        shards[-1].append((name, array))
    return shards


def write_weights(directory, weights, config, max_shard_size):
    """Write weights to HDF5 files as Keras lays them out: one, or several and their index."""
    single, index = WEIGHT_FILES["keras"]
    shards, weight_map = in_shards(keras_variables(weights, config), max_shard_size), {}
    for number, shard in enumerate(shards):
        size = sum(array.nbytes for _, array in shard)
        require(size <= (max_shard_size or math.inf) * 2**30, "`max_shard_size` "
                f"({max_shard_size}) is less than the {size:,} bytes of {shard[0][0]}.")
        path = directory / (single if len(shards) == 1 else f"model_{number:05}.weights.h5")
        write_hdf5(path, progress(shard, "saving"))
        for name, _ in shard:
            files = weight_map.setdefault("/" + name.rpartition("/")[0], [])
            files += [path.name] * (path.name not in files)
    if len(shards) > 1:
        total = sum(array.nbytes for shard in shards for _, array in shard)
        write_json(directory / index, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_hdf5(path, named_arrays):
    """Write (name, array) pairs to an HDF5 file, as Keras does."""
    import h5py

    try:
        with h5py.File(path, "w") as file:
            for name, array in named_arrays:
                dataset = file.create_dataset(name, data=np.asarray(to_numpy(array), order="C"))
                if array.dtype == ml_dtypes.bfloat16:
                    dataset.attrs["dtype"] = "bfloat16"
    except RuntimeError as error:  # what h5py raises where a file cannot be closed
        raise OSError(f"{path} cannot be written: {error}") from error


def export_model(directory, backbone, causal_lm, max_shard_size):
    """Write a model in Hugging Face's format; `causal_lm` is None for the backbone alone."""
    config, preprocessor = backbone.config, causal_lm and causal_lm.preprocessor
    weights = merged(backbone.weights, config)
    shards = safetensors_files(in_shards(huggingface_tensors(weights, config), max_shard_size))
    stale = {path.name for path in pathlib.Path(directory).glob("*.safetensors*")} - shards.keys()
    require(not stale, f"{directory} holds other weights, which would be read instead of these, "
            f"or beside them: {sorted(stale)}")
    token_ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    with staged(directory) as temporary:
        if preprocessor is not None:  # first, as this may be refused
            tokenizer = preprocessor.tokenizer
            tokenizer.export_to_transformers(temporary, preprocessor.add_start_token)
            token_ids = {"bos_token_id": tokenizer.start_token_id,
                         "eos_token_id": tokenizer.end_token_id,
                         "pad_token_id": tokenizer.pad_token_id}
            # What a Hugging Face directory says there beside (of sampling, say) is kept.
            name, source = "generation_config.json", getattr(tokenizer, "preset", None)
            kept = (source and source.json(name)) or {}
            stops = {"eos_token_id": causal_lm.resolve_stop_tokens("auto") or None}
            write_json(temporary / name, token_ids | kept | stops)
        write_json(temporary / "config.json", huggingface_config(config) | token_ids)
        for name, content in shards.items():
            write = write_json if name.endswith(".json") else write_safetensors
            write(temporary / name, content)


def safetensors_files(shards):
    """Return {file name: list of (name, array)} as Hugging Face names shards, and their index."""
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    files = {f"model-{i:05}-of-{len(shards):05}.safetensors": shard
             for i, shard in enumerate(shards, start=1)}
    weight_map = {name: file for file, shard in files.items() for name, _ in shard}
    total = sum(array.nbytes for shard in shards for _, array in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return files | {"model.safetensors.index.json": index}


def write_safetensors(path, named_arrays):
    """Write a list of (name, array) to one file, array by array: there is no copy of them all."""
    dtypes = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    header, end = {"__metadata__": {"format": "pt"}}, 0  # without it, transformers refuses the file
    for name, array in named_arrays:
        start, end = end, end + array.nbytes
        header[name] = {"dtype": dtypes[array.dtype.name], "shape": array.shape,
                        "data_offsets": [start, end]}
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)  # so that the arrays are aligned
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for _, array in progress(named_arrays, "saving"):
            to_numpy(array).tofile(file)


def huggingface_config(config):
    """Return Hugging Face's config.json, a dict: the inverse of `arguments_from_huggingface`.

    RoPE is spelled as in the first Phi-3 checkpoints, which every reader knows.
    """
    rope_scaling = None
    if config.rope_scaling_type == "su":
        rope_scaling = {"type": "longrope", "short_factor": config.rope_scaling_short_factor,
                        "long_factor": config.rope_scaling_long_factor}
        if config.rope_attention_factor is not None:
            rope_scaling["attention_factor"] = config.rope_attention_factor
    return {
        "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "hidden_act": "silu",
        "torch_dtype": config.weight_dtype.name,
        "vocab_size": config.vocabulary_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_dim,
        "intermediate_size": config.intermediate_dim,
        "num_attention_heads": config.num_query_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.layer_norm_epsilon,
        "attention_dropout": config.dropout, "resid_pdrop": config.dropout,
        "max_position_embeddings": config.max_sequence_length,
        "original_max_position_embeddings": config.pretraining_sequence_length,
        "rope_theta": config.rope_max_wavelength,
        "rope_scaling": rope_scaling,
        "partial_rotary_factor": config.partial_rotary_factor,
        "sliding_window": config.sliding_window,
        "tie_word_embeddings": config.tie_word_embeddings,
    }


CHAT_TEMPLATE = (  # `apply_chat_template`, in Jinja
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + "
    "'<|end|>\\n' }}{% endfor %}{{ '<|assistant|>\\n' if add_generation_prompt else eos_token }}"
)


def convert_tokenizer(tokenizer, add_start_token):
    """Return a SentencePiece vocabulary as a `tokenizers.Tokenizer`, and tokenizer_config.json.

    Source: transformers' `SpmConverter`; what differs makes ids and texts SentencePiece's.
    """
    from sentencepiece.sentencepiece_model_pb2 import ModelProto
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors

    set_here = {name for name in TOKENIZER_SETTINGS if getattr(tokenizer, name)}
    require(not set_here, f"A tokenizer with {sorted(set_here)} cannot be exported.")
    proto = ModelProto.FromString(tokenizer.proto)
    kind, trainer, spaces = proto.SentencePiece, proto.trainer_spec, proto.normalizer_spec
    phi3s = {"add_dummy_prefix": True, "escape_whitespaces": True,
             "remove_extra_whitespaces": False, "precompiled_charsmap": b""}
    others = [name for name, value in phi3s.items() if getattr(spaces, name) != value]
    others += ["treat_whitespace_as_suffix"] * trainer.treat_whitespace_as_suffix
    others += ["model_type"] * (trainer.model_type not in (trainer.BPE, trainer.CHAR))
    require(not others, "Only a vocabulary of Phi-3's kind can be exported: BPE or characters, "
            f"which change nothing in a text but its spaces. This one has another {others}.")
    # Of neighbours that can be merged, SentencePiece takes those that give the best score.
    ranks = {piece.piece: (-piece.score, token_id) for token_id, piece in enumerate(proto.pieces)
             if piece.type == kind.NORMAL and trainer.model_type == trainer.BPE}
    merges = sorted((rank, piece[:i], piece[i:]) for piece, rank in ranks.items()
                    for i in range(1, len(piece)) if piece[:i] in ranks and piece[i:] in ranks)
    result = Tokenizer(models.BPE(
        vocab=tokenizer.ids, merges=[merge[1:] for merge in merges], unk_token=trainer.unk_piece,
        fuse_unk=True, byte_fallback=trainer.byte_fallback))
    # A token that is `normalized` is cut out of a text in which "▁" stands for spaces, and before
    # all: as SentencePiece does. "<s>" is not: it comes before that first "▁".
    special = {token_id: AddedToken(piece.piece, special=True,
                                    normalized=piece.type == kind.USER_DEFINED)
               for token_id, piece in enumerate(proto.pieces)
               if piece.type in (kind.UNKNOWN, kind.CONTROL, kind.USER_DEFINED)}
    # To be found there, the tokens are normalized, too: without a "▁".
    token = "|".join(re.escape(token.content) for token in special.values())
    result.normalizer = normalizers.Sequence([
        normalizers.Replace(" ", "▁"), normalizers.Prepend("▁"),
        normalizers.Replace(Regex(rf"\A▁(?=({token})\z)"), "")])
    result.add_tokens(list(special.values()))
    result.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", left=1)])
    if add_start_token:
        result.post_processor = processors.TemplateProcessing(
            single=f"{START_TOKEN} $A", special_tokens=[(START_TOKEN, tokenizer.start_token_id)])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],  # transformers 4 adds another
        "add_bos_token": add_start_token, "add_eos_token": False,
        "chat_template": ("{{ bos_token }}" if add_start_token else "") + CHAT_TEMPLATE,
    }
    roles = {"bos_token": tokenizer.start_token_id, "eos_token": tokenizer.end_token_id,
             "unk_token": tokenizer.unknown_token_id, "pad_token": tokenizer.pad_token_id}
    for role, token_id in roles.items():
        if token_id in special:  # with its flags: a mere name would give it others
            config[role] = {"__type": "AddedToken", **special[token_id].__getstate__()}
    return result, config


def progress(named_arrays, what):
    """Yield (name, array) pairs, with a progress bar of bytes on stderr if it takes a while."""
    from tqdm import tqdm

    pairs = list(named_arrays)
    total = sum(array.nbytes for _, array in pairs)
    with tqdm(total=total, desc=what, unit="B", unit_scale=True, delay=1) as bar:
        for name, array in pairs:
            yield name, array
            bar.update(array.nbytes)


@contextlib.contextmanager
def staged(directory):
    """Give a temporary directory to write to; at the end its files move to `directory`.

    A directory that did not exist appears at once; in one that did, each file is replaced whole. A
    failure while they are written changes nothing, one while they move may leave some moved.
    """
    directory = pathlib.Path(directory).resolve()
    there = directory.is_dir()
    parent = directory if there else directory.parent
    temporary = parent / f".{directory.name}.{os.urandom(8).hex()}.tmp"
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if there:
            for path in filter(pathlib.Path.is_file, sorted(temporary.rglob("*"))):
                target = directory / path.relative_to(temporary)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, target)
                for single, index in WEIGHT_FILES.values():
                    if path.name == index:  # in whose place an older single file would be read
                        target.with_name(single).unlink(missing_ok=True)
        else:
            os.rename(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path, content):
    """Write a dict to a JSON file."""
    path.write_text(json.dumps(content, indent=4, default=np.generic.item), encoding="utf-8")


def keras_object(module, class_name, config):
    """Return the dict by which Keras's JSON files describe an object of KerasHub's."""
    return {"module": f"keras_hub.src.{module}", "class_name": class_name, "config": config,
            "registered_name": f"keras_hub>{class_name}"}


# ---- The command line ----------------------------------------------------------------------------


def main(arguments=None):
    """Answer a prompt, or chat; see `python phi3_ref.py --help`."""
    parser = argparse.ArgumentParser(
        prog="phi3_ref.py", description="Ask a Phi-3. Without a prompt: chat until end of input."
    )
    add = parser.add_argument
    add("prompt", nargs="?", help="what to ask; the answer goes to standard output")
    add("--preset", default="phi3_tiny_puzzles_en", help="name, directory, kaggle:// or hf://")
    add("--adapter", metavar="DIR", help="a LoRA adapter that PEFT saved, to be merged")
    add("--backend", default="numpy", choices=("numpy", "cupy"))
    add("--dtype", help=f"one of {', '.join(DTYPE_POLICIES)} (default: float32)")
    add("--max-length", type=int, help="tokens of conversation and answer together")
    add("--sampler", default="greedy", choices=[name for name in SAMPLERS if name != "beam"])
    add("--temperature", type=float, default=1.0)
    add("--seed", type=int, help="makes random choices repeatable")
    add("--raw", action="store_true", help="continue the text as it is, without chat template")
    add("--summary", action="store_true", help="print the model's weights and exit")
    add("--trace", metavar="FILE", help="write every named intermediate of the forward pass over "
        "the prompt (in a chat: the last one) to this safetensors file")
    add("--gradients", action="store_true", help="with --trace: and their gradients, of the loss "
        "in foreseeing each next token of the prompt")
    add("--compare", nargs=2, metavar=("REFERENCE", "OTHER"), help="compare two such files, print "
        "where they part, and exit: with 0 within tolerance, else with 1")
    add("--tolerance", type=float, help="for --compare: largest error, relative to the reference's "
        "largest value (default: by dtype)")
    options = parser.parse_args(arguments)
    try:
        require(options.trace or not options.gradients, "--gradients needs --trace")
        require(not (options.adapter and (options.compare or options.summary)),
                "--adapter goes with a prompt, not with --compare or --summary")
        if options.compare:
            comparison = compare(*options.compare, tolerance=options.tolerance)
            print(comparison)
            sys.exit(0 if comparison.first is None else 1)
        if options.summary:
            Phi3Backbone.from_preset(
                options.preset, False, dtype=options.dtype, weights={}).summary()  # needs none
            return
        sampler = SAMPLERS[options.sampler](temperature=options.temperature, seed=options.seed)
        causal_lm = Phi3CausalLM.from_preset(
            options.preset, dtype=options.dtype, backend=options.backend
        )
        if options.adapter:
            causal_lm.backbone.load_adapter(options.adapter)
        require(causal_lm.preprocessor, f"preset {options.preset!r} has no tokenizer to ask with")
        causal_lm.compile(sampler=sampler)
        max_length = options.max_length
        if max_length is None:
            max_length = min(causal_lm.backbone.max_sequence_length, 4096)
        if options.prompt is None:
            print("Ctrl-D (end of input) ends the chat, Ctrl-C an answer.", file=sys.stderr)
            if options.preset == parser.get_default("preset"):
                print('This small model answers "What is 345 + 278?" (0 to 999), "Reverse planet" '
                      'and "Sort planet" (2 to 8 letters), and nothing else.', file=sys.stderr)
        chat(causal_lm, options.prompt, max_length, options.raw, options.trace,
             "next" if options.gradients else None)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)  # as a shell reports an interrupt
    except (ImportError, MemoryError, OSError, RuntimeError, ValueError) as error:
        parser.exit(2, f"phi3_ref.py: {error}\n")


def chat(causal_lm, prompt, max_length, raw, trace_path, labels):
    """Answer `prompt`, or if it is None each line of standard input as one conversation.

    Answers alone go to standard output, piece by piece. Where the conversation takes more than
    three quarters of `max_length` tokens, its oldest turns are forgotten. With a `trace_path`,
    each prompt's trace is written there; with `labels`, gradients, too: see `Trace.record`. At a
    terminal, Ctrl-C stops an answer and not the chat.
    """
    tokenizer, messages = causal_lm.preprocessor.tokenizer, []
    for line in read_lines() if prompt is None else [prompt]:
        messages.append({"role": "user", "content": line})
        answer = ""
        try:
            text = line if raw else tokenizer.apply_chat_template(messages)
            while not raw and len(messages) > 1 and len(tokenizer(text)) > 0.75 * max_length:
                del messages[:2]
                text = tokenizer.apply_chat_template(messages)
            if trace_path:
                Trace.record(causal_lm, text, max_length=max_length, y=labels).save(trace_path)
            for piece in causal_lm.stream(text, max_length=max_length):
                print(piece, end="", flush=True)
                answer += piece
        except KeyboardInterrupt:
            if prompt is not None or not sys.stdin.isatty():
                raise
        print()
        messages.append({"role": "assistant", "content": answer})
    if prompt is not None and not answer:
        sys.exit("phi3_ref.py: The answer is empty.")  # and the exit code 1


def read_lines():
    """Yield the lines of standard input, asking for each; at a terminal, Ctrl-C clears one."""
    terminal = sys.stdin.isatty()
    asking = contextlib.redirect_stdout(sys.stderr)  # where standard output takes answers alone
    if terminal and sys.stdout.isatty():
        asking = contextlib.nullcontext()
        with contextlib.suppress(ImportError):  # Windows has none, and needs none
            import readline  # noqa: F401  from now on `input` edits lines and recalls earlier ones
    while True:
        try:
            with asking:
                line = input(">>> ")
        except UnicodeDecodeError as error:
            raise ValueError(f"standard input is not text: {error}") from error
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            if not terminal:
                raise
            print(file=sys.stderr)
        else:
            yield line


if __name__ == "__main__":
    # One line each and only once, without a line of this file.
    warnings.simplefilter("once", UserWarning)
    warnings.formatwarning = lambda message, *_, **__: f"phi3_ref.py: {message}\n"
    main()
