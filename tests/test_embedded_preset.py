"""The embedded preset: small, readable token by token, nearly always right, and KerasHub's too."""

import importlib.util
import json
import pathlib
import random

import keras
import keras_hub
import numpy as np
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


# How it was trained ------------------------------------------------------------------------------

@pytest.fixture
def recipe():
    """The script that trains it, as a module of its own in each test."""
    file = DIRECTORY.parent / f"train_{NAME}.py"
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def small_recipe(recipe, monkeypatch):
    """The recipe with smaller batches, more checkpoints and fewer questions."""
    for name, value in (("BATCH", 16), ("SAVE_EVERY", 10), ("FRESH_QUESTIONS", 20)):
        monkeypatch.setattr(recipe, name, value)
    return recipe


def files_in(directory):
    """Returns {name: content} of all files under a directory."""
    paths = [path for path in pathlib.Path(directory).rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


# KerasHub leaves the vocabulary's file open.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_an_interrupted_training_ends_at_the_same_bits(small_recipe, tmp_path, monkeypatch, capsys):
    """20 steps, and 20 broken off in the 14th and started again: the same files, byte for byte.

    What they hold is a Keras preset: KerasHub reads the same weights from it.
    """
    command = ["--steps", "20", "--out"]
    small_recipe.main([*command, str(tmp_path / "whole")])
    assert capsys.readouterr().out.count("of 20 right") == 4

    batches = small_recipe.batches

    def until_ctrl_c(tokenizer, step):
        for i, batch in enumerate(batches(tokenizer, step), step):
            if i == 13:
                raise KeyboardInterrupt
            yield batch

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(small_recipe, "batches", until_ctrl_c)
        small_recipe.main([*command, str(tmp_path / "parts")])
    assert "10 of 20 steps" in capsys.readouterr().out
    assert not (tmp_path / "parts" / "config.json").exists()  # no preset before the end

    small_recipe.main([*command, str(tmp_path / "parts")])
    assert "20 of 20 steps; 10 of them" in capsys.readouterr().out
    whole, parts = files_in(tmp_path / "whole"), files_in(tmp_path / "parts")
    assert sorted(whole) == sorted(parts)
    assert [name for name in whole if whole[name] != parts[name]] == []

    theirs = keras_hub.models.Phi3CausalLM.from_preset(str(tmp_path / "whole"))
    ours = phi3_ref.Phi3CausalLM.from_preset(tmp_path / "whole")
    assert json.loads(whole["config.json"])["config"]["dtype"]["config"]["name"] == "bfloat16"
    for a, b in zip(ours.backbone.get_weights(), theirs.backbone.get_weights(), strict=True):
        assert np.array_equal(a, np.asarray(b, "float32"))
    asked, _ = zip(*questions("sort", 20), strict=True)
    rows = ours.preprocessor.generate_preprocess(prompts(asked))
    rows_of_keras = theirs.preprocessor.generate_preprocess(prompts(asked))
    assert np.array_equal(rows["token_ids"], rows_of_keras["token_ids"])


def test_training_begins_with_random_weights_and_learns(small_recipe):
    """Of the first steps the loss falls by a quarter, from that of an even guess."""
    causal_lm = small_recipe.new_model("numpy")
    data = small_recipe.batches(causal_lm.preprocessor.tokenizer, 0)
    x, y, weight = next(data)
    even = np.log(causal_lm.backbone.vocabulary_size) * weight.sum() / weight.size
    before = causal_lm.evaluate([(x, y, weight)])[0]
    assert before == pytest.approx(even, rel=0.01)
    causal_lm.compile(phi3_ref.AdamW(2e-3, weight_decay=0.1, beta_2=0.98))
    causal_lm.fit(data, steps_per_epoch=20)
    assert causal_lm.evaluate([(x, y, weight)])[0] < 0.75 * before


def test_the_recipes_tokenizer_is_the_shipped_one(recipe):
    """SentencePiece, trained again, gives the vocabulary that is in the preset, byte for byte."""
    vocabulary = DIRECTORY / "assets" / "tokenizer" / "vocabulary.spm"
    assert recipe.train_tokenizer().proto == vocabulary.read_bytes()


@pytest.mark.parametrize("steps", [8000, 200])
def test_the_learning_rate_is_kerass(recipe, steps):
    """At every step, Keras's schedule with warm-up and half a cosine has the same rate."""
    warmup = steps // 20
    theirs = keras.optimizers.schedules.CosineDecay(
        0.0, decay_steps=steps - warmup, warmup_target=2e-3, warmup_steps=warmup)
    ours, some = recipe.learning_rate(steps), [*range(0, steps + 1, 7), warmup - 1, warmup, steps]
    for step in some:
        assert ours(step) == pytest.approx(float(theirs(step)), rel=1e-5, abs=1e-9), step


def test_its_batches_are_questions_with_right_answers(recipe, causal_lm):
    """Labels are the tokens that follow; those of the right answer and its <|end|> count."""
    tokenizer = causal_lm.preprocessor.tokenizer
    (x, y, weight), (again, *_) = (next(recipe.batches(tokenizer, 3)) for _ in range(2))
    assert np.array_equal(x["token_ids"], again["token_ids"])
    assert x["token_ids"].shape == y.shape == weight.shape == (128, 36)
    assert np.array_equal(x["token_ids"][:, 1:], y[:, :-1])
    asked = []
    for ids, labels, counted in zip(x["token_ids"], y, weight, strict=True):
        first, last = np.flatnonzero(counted)[[0, -1]]
        assert counted[first:last + 1].all() and not labels[last + 1:].any()
        prompt, answer = tokenizer.detokenize([ids[1:first + 1], labels[first:last + 1]])
        question = prompt.removeprefix("<|user|>\n").removesuffix("<|end|>\n<|assistant|>\n")
        assert prompts([question]) == [prompt] and ids[0] == tokenizer.start_token_id
        words = question.rstrip("?").split()
        if words[0] == "What":
            right = str(int(words[2]) + int(words[4]))
        else:
            right = words[1][::-1] if words[0] == "Reverse" else "".join(sorted(words[1]))
        assert answer == f"{right}<|end|>"
        asked.append(words[0])
    assert 0.35 < asked.count("What") / 128 < 0.65 and {*asked} == {"What", "Reverse", "Sort"}
