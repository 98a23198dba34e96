"""The embedded preset: small, readable token by token, nearly always right, and KerasHub's too."""

import json
import pathlib
import random

import keras_hub
import pytest

import phi3_ref

NAME = "phi3_tiny_puzzles_en"
DIRECTORY = pathlib.Path(phi3_ref.__file__).parent / "notebooks" / "presets" / NAME
LETTERS, DIGITS = "abcdefghijklmnopqrstuvwxyz", "0123456789"
QUESTIONS = 300


def questions(kind, count=QUESTIONS, seed=2024):
    """Draw `count` questions of one kind, and their answers."""
    rng = random.Random(f"{kind} {seed}")
    for _ in range(count):
        if kind in ("sum", "small sum"):
            largest = 999 if kind == "sum" else 99
            a, b = rng.randint(0, largest), rng.randint(0, largest)
            yield f"What is {a} + {b}?", str(a + b)
            continue
        word = "".join(rng.choice(LETTERS) for _ in range(rng.randint(2, 8)))
        if kind == "reverse":
            yield f"Reverse {word}", word[::-1]
        else:
            yield f"Sort {word}", "".join(sorted(word))


def prompts(asked):
    """Put questions into Phi-3's chat format."""
    return [f"<|user|>\n{question}<|end|>\n<|assistant|>\n" for question in asked]


@pytest.fixture(scope="module")
def causal_lm():
    """The embedded preset, greedy."""
    model = phi3_ref.Phi3CausalLM.from_preset(NAME)
    model.compile(sampler="greedy")
    return model


@pytest.mark.parametrize("kind", ["sum", "small sum", "reverse", "sort"])
def test_99_percent_of_fresh_questions_are_answered_right(causal_lm, kind):
    """Of 300 seeded questions of each kind, greedy answers are right for at least 297."""
    asked, expected = zip(*questions(kind), strict=True)
    answers = causal_lm.generate(prompts(asked), strip_prompt=True)
    answers = [answer.removesuffix("<|end|>").strip() for answer in answers]
    wrong = [row for row in zip(asked, answers, expected, strict=True) if row[1] != row[2]]
    print(f"{kind}: {QUESTIONS - len(wrong)} of {QUESTIONS} right; wrong: {wrong}")
    assert len(wrong) <= 0.01 * QUESTIONS, wrong


# KerasHub leaves the vocabulary's file open.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_keras_gives_the_same_answers(causal_lm):
    """KerasHub, loading the same directory, gives the same 60 texts, character for character."""
    theirs = keras_hub.models.Phi3CausalLM.from_preset(str(DIRECTORY))
    theirs.compile(sampler="greedy", run_eagerly=True)
    asked = [
        question for kind in ("sum", "reverse", "sort") for question, _ in questions(kind, 20, 7)
    ]
    assert causal_lm.generate(prompts(asked)) == theirs.generate(prompts(asked))


def test_the_chat_template_is_the_one_it_was_trained_with(causal_lm):
    """`apply_chat_template` gives the training prompts."""
    tokenizer = causal_lm.preprocessor.tokenizer
    messages = [{"role": "user", "content": "Sort banana"}]
    assert [tokenizer.apply_chat_template(messages)] == prompts(["Sort banana"])


def test_every_letter_and_digit_is_one_token(causal_lm):
    """A word of n letters is n tokens, in any neighbourhood: its attention can be read off."""
    tokenizer = causal_lm.preprocessor.tokenizer
    ids = {character: tokenizer.token_to_id(character) for character in LETTERS + DIGITS}
    assert len(set(ids.values())) == 36 and 0 not in ids.values()
    for kind in ("sum", "reverse", "sort"):
        for question, _ in questions(kind, 20):
            tokens = tokenizer(*prompts([question]))
            for character in LETTERS + DIGITS:
                assert tokens.count(ids[character]) == question.count(character), question


def test_phi3s_special_tokens_are_there(causal_lm):
    """Phi-3's special tokens are single tokens, and what it ends and pads with are KerasHub's."""
    tokenizer = causal_lm.preprocessor.tokenizer
    for token in ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"):
        assert tokenizer.id_to_token(tokenizer.token_to_id(token)) == token
        assert tokenizer.token_to_id(token) in list(tokenizer(token))
    assert tokenizer.start_token_id == tokenizer.token_to_id("<s>") == 1
    assert tokenizer.end_token_id == tokenizer.token_to_id("<|endoftext|>")
    assert tokenizer.pad_token_id == 0


def test_it_is_small_and_complete():
    """Under 3 MB; Keras's files, no more; readable by everybody."""
    files = [path for path in DIRECTORY.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 3e6
    names = {str(path.relative_to(DIRECTORY)) for path in files}
    assert names >= {
        "config.json", "model.weights.h5", "tokenizer.json", "assets/tokenizer/vocabulary.spm",
        "metadata.json",
    }
    assert all(name.endswith((".json", ".h5", ".spm", ".md")) for name in names)


def test_its_configuration(causal_lm):
    """The architecture that the README and the notebooks speak of."""
    config = json.loads((DIRECTORY / "config.json").read_text())
    assert config["registered_name"] == "keras_hub>Phi3Backbone"
    assert config["config"]["dtype"]["config"]["name"] == "bfloat16"
    backbone = causal_lm.backbone
    for name, value in dict(
        num_layers=4, hidden_dim=128, intermediate_dim=384, num_query_heads=4,
        num_key_value_heads=2, rope_scaling_type=None, dropout=0.0,
        vocabulary_size=causal_lm.preprocessor.tokenizer.vocabulary_size(),
    ).items():
        assert getattr(backbone, name) == value
    assert 0.7e6 < backbone.count_params() < 1e6
    assert causal_lm.preprocessor.sequence_length == backbone.max_sequence_length
    longest = max(len(causal_lm.preprocessor.tokenizer(prompt)) for prompt in prompts(
        ["What is 999 + 999?", "Reverse abcdefgh", "Sort abcdefgh"]
    ))
    assert longest + 1 + 9 <= backbone.max_sequence_length  # <s>, the answer and <|end|> fit
