"""Golden figures of the real checkpoints, run where PHI3_WEIGHTS names their directory.

It may hold `Phi-3-mini-4k-instruct` and `Phi-3-mini-128k-instruct`, each as Hugging Face has it,
and `phi3_mini_4k_instruct_en`, KerasHub's preset. In float32 each takes about 16 GB of memory. The
figures and their tolerances are those of transformers' and KerasHub's own tests.
"""

import json
import os
import pathlib

import numpy as np
import pytest

import phi3_ref

pytestmark = pytest.mark.weights
GOLDEN = json.loads(pathlib.Path(__file__).parent.joinpath("golden/phi3_mini.json").read_text())
HUGGINGFACE = ["Phi-3-mini-4k-instruct", "Phi-3-mini-128k-instruct"]
KERAS = "phi3_mini_4k_instruct_en"
cache = {}


def checkpoint(name):
    """Return the directory of a checkpoint, or skip."""
    directory = pathlib.Path(os.environ["PHI3_WEIGHTS"], name)
    if not directory.is_dir():
        pytest.skip(f"{directory} does not exist")
    return directory


def load(name):
    """Return the causal LM of a checkpoint in float32, or skip; the last one is kept."""
    directory = checkpoint(name)
    if name not in cache:
        cache.clear()  # one model fits into memory, two may not
        cache[name] = phi3_ref.Phi3CausalLM.from_preset(directory)
    return cache[name]


@pytest.mark.parametrize("name", HUGGINGFACE)
def test_logits_are_those_that_transformers_pins(name):
    """The first 30 logits of two positions, rtol = atol = 1e-4."""
    token_ids = np.array(GOLDEN["transformers_logits"]["token_ids"])
    logits = load(name)({"token_ids": token_ids})
    expected = GOLDEN["transformers_logits"][f"microsoft/{name}"]
    np.testing.assert_allclose(logits[0, :2, :30], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", HUGGINGFACE)
def test_greedy_text_is_what_transformers_pins(name):
    """32 new tokens after a system message and a question."""
    causal_lm, golden = load(name), GOLDEN["transformers_generation"]
    tokenizer = causal_lm.preprocessor.tokenizer
    prompt = tokenizer.apply_chat_template(golden["messages"])
    prompt_ids = causal_lm.preprocessor.generate_preprocess([prompt])["padding_mask"]
    causal_lm.compile(sampler="greedy")
    text = causal_lm.generate(prompt, int(np.sum(prompt_ids)) + 32, strip_prompt=True)
    assert text.strip() == golden[f"microsoft/{name}"]


def test_hidden_states_are_those_that_keras_pins():
    """The first four values of the backbone's output at position 0, rtol = atol = 0.01."""
    token_ids = np.array(GOLDEN["kerashub_hidden"]["token_ids"])
    inputs = {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}
    hidden_states = load(KERAS).backbone(inputs)
    np.testing.assert_allclose(
        hidden_states[0, 0, :4], GOLDEN["kerashub_hidden"]["first_values"], rtol=0.01, atol=0.01
    )


@pytest.mark.parametrize("name", [KERAS, *HUGGINGFACE])
def test_token_ids_are_those_that_keras_pins(name):
    """KerasHub's ids of its test sentence, from every checkpoint's own tokenizer files."""
    tokenizer = phi3_ref.Phi3Tokenizer.from_preset(checkpoint(name))
    golden = GOLDEN["kerashub_tokens"]
    assert list(tokenizer(golden["text"])) == golden["ids"]


@pytest.mark.parametrize("name", [KERAS, *HUGGINGFACE])
def test_the_parameters_are_counted(name):
    """3,821,079,552 parameters, in either format."""
    backbone = phi3_ref.Phi3Backbone.from_preset(checkpoint(name), load_weights=False)
    assert backbone.count_params() == 3_821_079_552
