"""Attention's backward kernels, executed on the CPU, against the formulas in float64; mutants."""

import cuda_on_cpu
import numpy as np
import pytest
import references as ref
import test_kernels_on_cpu as on_cpu
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels_on_cpu import DTYPES, TYPES, Case

import kernels_cuda
import phi3_ref

NAMES = "query_gradient", "key_value_gradients"


def arguments(case):
    """Returns the gradient of the result, laid out as the query is, and attention's arguments."""
    query, key, value, mask, window = case.inputs()
    gradient = Case(**{**vars(case), "mask": "none", "size": 1.0, "seed": case.seed + 100}
                    ).inputs()[0]
    return gradient, query, key, value, mask, window


def expected(inputs):
    """Returns the exact gradients, and of each how large what is added up in it may be.

    s'_t = p_t (p'_t - sum p p') is zero where all p' are alike, a query's gradient where it sees
    one key: what is left is rounding, which is measured by the terms and not by their sum.
    """
    gradient, query, key, value = (array.astype("float64") for array in inputs[:4])
    tape = phi3_ref.Tape()
    phi3_ref.textbook_attention(query, key, value, *inputs[4:], tap=tape)
    (B, S, H, C), (T, K) = query.shape, key.shape[1:3]
    p, G = tape["probabilities"], H // K
    d_p = np.einsum("bshc,bthc->bhst", gradient, value.repeat(G, 2))
    d_s = p * (d_p - (p * d_p).sum(-1, keepdims=True))
    by_head = key.repeat(G, 2)

    def sum_heads(x):
        return x.reshape(B, T, K, G, C).sum(3)

    exact = (np.einsum("bhst,bthc->bshc", d_s, by_head) * C**-0.5,
             sum_heads(np.einsum("bhst,bshc->bthc", d_s, query)) * C**-0.5,
             sum_heads(np.einsum("bhst,bshc->bthc", p, gradient)))
    terms = p * (abs(d_p) + (p * abs(d_p)).sum(-1, keepdims=True))
    sizes = (np.einsum("bhst,bthc->bshc", terms, abs(by_head)) * C**-0.5,
             sum_heads(np.einsum("bhst,bshc->bthc", terms, abs(query))) * C**-0.5,
             sum_heads(np.einsum("bhst,bshc->bthc", p, abs(gradient))))
    # exp() turns an absolute error of a score, here relative to the largest, into a relative one.
    worse = max(1.0, abs(tape["scores"]).max() / 8)
    return exact, [worse * size.max() for size in sizes]


def run(inputs, **options):
    """Returns the three gradients and the kernels' names."""
    with cuda_on_cpu.emulate(**options) as launches:
        results = kernels_cuda.attention_backward(*inputs)
    return results, [name for name, *_ in launches]


def check(case, **options):
    """Compares one case with the formulas; returns the names of the kernels that ran."""
    inputs = arguments(case)
    before = [array.tobytes() for array in inputs[:4]]
    results, names = run(inputs, **options)
    for what, like, result, exact, size in zip(
            ("query", "key", "value"), inputs[1:4], results, *expected(inputs), strict=True):
        assert result.dtype == like.dtype and result.shape == like.shape
        assert result.flags.c_contiguous and np.isfinite(result.astype("float32")).all()
        error = abs(result.astype("float64") - exact).max()
        assert error <= ref.TOLERANCE[case.dtype] * size, f"{names}, {what}: {error / size}"
    blind = ~visible(case, inputs).any(-1)  # [B, S]
    assert not results[0][blind].astype("float32").any(), "a query that sees no key"
    unseen = ~visible(case, inputs).any(-2)  # [B, T]
    assert not any(x[unseen].astype("float32").any() for x in results[1:]), "a key nobody sees"
    assert before == [array.tobytes() for array in inputs[:4]]
    return names


def visible(case, inputs):
    """Returns which of the T keys each of the S queries sees, [B, S, T]."""
    distance = np.arange(case.T - case.S, case.T)[:, None] - np.arange(case.T)
    seen = (distance >= 0) & (distance < (case.window or case.T))
    return seen & (np.ones((case.B, 1, 1), bool) if inputs[4] is None
                   else inputs[4].astype(bool)[:, None])

