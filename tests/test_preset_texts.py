"""What a preset's files say of texts: what ends an answer, how a chat is written, which tokens
stand before and behind a text. Held to transformers, and in Keras's format to KerasHub.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import time

import keras_hub
import numpy as np
import pytest
import transformers
from references import seen_with, transformers_model, write_huggingface
from test_tokenizer import (
    KERAS,
    LLAMA,
    PHI3_TEMPLATE,
    edit_json,
    keras_vocabulary,
    update,
    write_bytes,
    write_json,
    write_keras_config,
    write_microsoft,
    write_model,
)

import phi3_ref

V = 512  # of the model; the tokenizers have less


@pytest.fixture(scope="module")
def model():
    """A tiny model of transformers."""
    return transformers_model(dict(vocab_size=V, num_hidden_layers=1))


class Dictated(phi3_ref.Sampler):
    """Gives the ids that it is told, one after the other."""

    def __init__(self, token_ids):
        super().__init__()
        self.token_ids = iter(token_ids)

    def get_next_token(self, probabilities):
        return np.array([next(self.token_ids)])


# What ends an answer -----------------------------------------------------------------------------


@pytest.mark.parametrize("write, generation, config, warns", [
    # Microsoft's: <|endoftext|>, <|assistant|>, <|end|>
    (write_microsoft, dict(eos_token_id=[500, 501, 507]), 500, False),
    (write_microsoft, dict(eos_token_id=500), [500], False),
    (write_microsoft, None, [507, 500], False), (write_microsoft, None, 500, False),
    (write_microsoft, dict(eos_token_id=[507]), 507, True),  # not the tokenizer's
    (write_microsoft, dict(eos_token_id=[500, 7]), 507, True),  # not config.json's
    (write_bytes, dict(eos_token_id=502), 500, True),  # a fine-tune's <|im_end|>
    (write_bytes, None, [500, 502], False), (write_bytes, None, 500, True),
])
def test_the_files_say_what_ends_an_answer(write, generation, config, warns, model, tmp_path):
    """The tokens at which transformers stops, with a warning where the files contradict it."""
    write_huggingface(model, write(tmp_path), dict(eos_token_id=config))
    (tmp_path / "generation_config.json").unlink()
    if generation is not None:
        write_json(tmp_path / "generation_config.json", generation)
    read = transformers.Phi3ForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id
    if warns:
        with pytest.warns(UserWarning, match="an answer ends at the tokens") as warned:
            causal_lm = phi3_ref.Phi3CausalLM.from_preset(tmp_path)
        assert len(warned) == 1
    else:
        causal_lm = phi3_ref.Phi3CausalLM.from_preset(tmp_path)
    expected = read if isinstance(read, list) else [read]
    tokenizer = causal_lm.preprocessor.tokenizer
    assert causal_lm.resolve_stop_tokens("auto") == tokenizer.stop_token_ids == expected
    hello = tokenizer("hello")
    for stop in expected:
        causal_lm.compile(sampler=Dictated([*hello, stop, *hello]))
        assert "".join(causal_lm.stream("a", max_length=40)) == tokenizer.detokenize(hello)


@pytest.mark.parametrize("generation, config", [(None, None), ({}, None), ({}, 507)])
def test_files_that_do_not_say_what_ends_an_answer(generation, config, model, tmp_path):
    """There transformers never stops; here another file decides, or Phi-3's two tokens do."""
    write_huggingface(model, write_microsoft(tmp_path), dict(eos_token_id=config))
    (tmp_path / "generation_config.json").unlink()
    if generation is not None:
        write_json(tmp_path / "generation_config.json", generation)
    read = transformers.Phi3ForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id
    assert read is None, seen_with("transformers", "5.24.0")
    edit_json(tmp_path / "tokenizer_config.json", lambda content: content.update(
        eos_token="<|endoftext|>" if config is None else "<|end|>"))
    stops = phi3_ref.Phi3Tokenizer.from_preset(tmp_path).stop_token_ids
    assert stops == ([500, 507] if config is None else [507])


def test_keras_presets_stop_as_kerashub_does(tmp_path):
    """At <|endoftext|>, and at <|end|> where there is one, whatever Hugging Face's files say."""
    for tokens, stops in ((["<|endoftext|>", "<|end|>"], [500, 501]), (["<|endoftext|>"], [500])):
        phi3_ref.Phi3Tokenizer(keras_vocabulary(LLAMA, tokens)).save_to_preset(tmp_path)
        write_keras_config(tmp_path)
        write_json(tmp_path / "generation_config.json", dict(eos_token_id=7))
        assert phi3_ref.Phi3Tokenizer.from_preset(tmp_path).stop_token_ids == stops


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("value", ["x", 1.5, [1, None], [[1]], True, {"a": 1}])
def test_what_is_no_stop_token(file, value, model, tmp_path):
    """It is refused, and the file named; the model loads without its tokenizer."""
    write_huggingface(model, write_microsoft(tmp_path))
    edit_json(tmp_path / file, lambda content: content.update(eos_token_id=value))
    with pytest.raises(ValueError, match=rf"{file}: `eos_token_id` must be .*preprocessor=None"):
        phi3_ref.Phi3CausalLM.from_preset(tmp_path)
    assert phi3_ref.Phi3CausalLM.from_preset(tmp_path, preprocessor=None).preprocessor is None


@pytest.mark.parametrize("stops", [
    (7, 9), {7, 9}, frozenset([9]), np.array([7, 9]), np.array([9], "uint8"), [np.int64(9)],
    range(7, 10), dict.fromkeys([9]), iter([9, 8]),
])
def test_any_integers_stop_an_answer(stops, model, tmp_path):
    """A list, a set, an array, a range, an iterator, of any kind of integers."""
    write_huggingface(model, write_microsoft(tmp_path))
    causal_lm = phi3_ref.Phi3CausalLM.from_preset(tmp_path, preprocessor=None)
    causal_lm.compile(sampler=Dictated([300, 9, 300, 300]))
    prompt = {"token_ids": np.full((1, 6), 4), "padding_mask": np.arange(6)[None] < 2}
    result = causal_lm.generate(prompt, stop_token_ids=stops)
    assert result["padding_mask"].tolist() == [[True] * 4 + [False] * 2]


@pytest.mark.parametrize("stops", [
    np.array(9), np.int64(9), np.array([9.0]), np.array([[9]]), [True], "9", [None],
    np.array([512]),
])
def test_what_is_no_list_of_integers(stops, model, tmp_path):
    """A number alone, a float, a bool, a matrix, an id outside of the vocabulary."""
    write_huggingface(model, write_microsoft(tmp_path))
    causal_lm = phi3_ref.Phi3CausalLM.from_preset(tmp_path, preprocessor=None)
    prompt = {"token_ids": np.full((1, 6), 4), "padding_mask": np.arange(6)[None] < 2}
    with pytest.raises(ValueError, match="`stop_token_ids`"):
        causal_lm.generate(prompt, stop_token_ids=stops)


# How a chat is written ---------------------------------------------------------------------------

OLDER_PHI3 = (  # the start token, and the assistant's turn opened in the user's
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') %}{{'<|user|>' "
    "+ '\n' + message['content'] + '<|end|>' + '\n' + '<|assistant|>' + '\n'}}{% elif "
    "(message['role'] == 'assistant') %}{{message['content'] + '<|end|>' + '\n'}}{% endif %}"
    "{% endfor %}")
TEMPLATES = {
    "Phi-3's": PHI3_TEMPLATE,
    "Phi-3's, older": OLDER_PHI3,
    "ChatML": (
        "{% for message in messages %}\n  {% if loop.first and messages[0]['role'] != 'system' %}\n"
        "{{- '<|im_start|>system\nYou are a helper.<|im_end|>\n' }}{% endif %}\n{{ '<|im_start|>' +"
        " message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"),
    "Phi-4's": (
        "{% for message in messages %}{% if (message['role'] == 'system') %}{{'<|im_start|>system"
        "<|im_sep|>' + message['content'] + '<|im_end|>'}}{% elif (message['role'] == 'user') %}"
        "{{'<|im_start|>user<|im_sep|>' + message['content'] + '<|im_end|>'}}{% elif "
        "(message['role'] == 'assistant') %}{{'<|im_start|>assistant<|im_sep|>' + "
        "message['content'] + '<|im_end|>'}}{% endif %}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"),
    "Phi-4-mini's": (
        "{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message and "
        "message['tools'] is not none %}{{ '<|' + message['role'] + '|>' + message['content'] + "
        "'<|tool|>' + message['tools'] + '<|/tool|>' + '<|end|>' }}{% else %}{{ '<|' + "
        "message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"),
    "names": "{{ [bos_token, eos_token, unk_token, pad_token, sep_token, tools, documents] }}",
    "loop controls": (
        "{% for message in messages %}\n    {% if loop.index > 2 %}\n    {% break %}\n    "
        "{% endif %}\n{{ message.content | trim }}\r\n{% endfor %}\n"),
    "tojson": (
        "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ messages[0] | tojson("
        "ensure_ascii=True, separators=(',', ':'), sort_keys=True) }}"),
    "namespace": (
        "{% set ns = namespace(n=1, self=2) %}{% for message in messages %}{% set ns.n = ns.n * 3 "
        "%}{% endfor %}{{ ns.n + ns.self }}{{ dict(a=1) }}{{ dict.fromkeys('ab', 2) }}"),
    "generation": (
        "{% for message in messages %}{% generation %}{% set x = message.content %}{{ x }}"
        "{% endgeneration %}\n{% endfor %}{{ x }}"),
    "the day": "{{ strftime_now('%d %b %Y') }}",
    "what is there": (
        "{% for m in messages %}{{ m.keys() | list }}{{ m.tools is defined }}{{ m.extra }}"
        "{{ m.content is string }}{% endfor %}"),
    "<html>": "{{ '<&>' }}{{ messages[0].content | e }}",
}
CHAT = [
    dict(role="system", content=" Be brief & <b>kind</b>.\n", tools='[{"name": "f"}]'),
    dict(role="user", content="Où est le café? 🤖 ", extra={"b": [1, 2.5, None], "a": "é"}),
    dict(role="assistant", content="{{ here }}", tools=None), dict(role="user", content="<|end|>"),
]


def chat_directory(path, template, write=write_bytes, **settings):
    """A directory with this chat template; the day of both calls of a test is one."""
    write(path)
    update("tokenizer_config.json", chat_template=template, **settings)(path)
    if time.strftime("%H:%M") == "23:59":
        time.sleep(61)
    return path


@pytest.mark.parametrize("write", [write_microsoft, write_bytes])
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chat_is_written_as_transformers_writes_it(template, write, tmp_path):
    """With the model's own template, with and without the prompt to answer."""
    chat_directory(tmp_path, TEMPLATES[template], write)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = phi3_ref.Phi3Tokenizer.from_preset(tmp_path)
    for messages in (CHAT, CHAT[1:], CHAT[1:2]):
        for prompt in (True, False):
            expected = theirs.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt)
            assert ours.apply_chat_template(messages, add_generation_prompt=prompt) == expected


def test_where_a_template_stands(tmp_path):
    """In the settings, alone or as one of several; in chat_template.jinja, which comes first."""
    named = [dict(name="tool_use", template="no"), dict(name="default", template="A{{ 1 }}\n")]
    for template, warns in ((named, False), (None, False), ("old", True)):
        chat_directory(tmp_path, template)
        if template is not named:
            (tmp_path / "chat_template.jinja").write_text("é{{ 2 }}\r\n\n", "utf-8", newline="")
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        if warns:
            with pytest.warns(UserWarning, match="chat_template.jinja is read"):
                ours = phi3_ref.Phi3Tokenizer.from_preset(tmp_path)
        else:
            ours = phi3_ref.Phi3Tokenizer.from_preset(tmp_path)
        expected = theirs.apply_chat_template(CHAT, tokenize=False)
        assert ours.apply_chat_template(CHAT) == expected == ("A1" if template is named else "é2\n")


def test_without_a_template(tmp_path):
    """A chat has Phi-3's form, where transformers gives none."""
    ours = phi3_ref.Phi3Tokenizer.from_preset(write_bytes(tmp_path))
    messages = [dict(role="user", content="a")]
    assert ours.apply_chat_template(messages) == KERAS.apply_chat_template(messages)
    with pytest.raises(ValueError, match="chat_template is not set"):
        transformers.AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(messages)


@pytest.mark.parametrize("template, message", [
    ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ("{% if %}", "Expected an expression"), ("{{ messages[0].content + 1 }}", "TypeError"),
    ("{{ nothing.there }}", "'nothing' is undefined"),
    ("{{ ''.__class__.__mro__ }}", "unsafe"), ("{{ messages.append(1) }}", "SecurityError"),
    ("{% for i in range(10 ** 9) %}{% endfor %}", "OverflowError"), ("{{ 1 / 0 }}", "Division"),
    ("{{ namespace(__x=1) }}", "SecurityError"),
    ("{% set ns = namespace() %}{% set ns._x = 1 %}", "SecurityError"),
    ("{{ dict.mro() }}", "no attribute 'mro'"), ("{% include 'tokenizer.json' %}", "no loader"),
    ("{% generation %}", "TemplateSyntaxError"), ({"a": "x", "b": "y"}, "no default chat template"),
    (5, "TypeError"),
])
def test_templates_that_fail(template, message, tmp_path):
    """What a template raises, and what it may not do, is an error that names it."""
    ours = phi3_ref.Phi3Tokenizer.from_preset(chat_directory(tmp_path / "preset", template))
    with pytest.raises(ValueError, match=f"preset.*{message}"):
        ours.apply_chat_template(CHAT)


@pytest.mark.parametrize("content", [[5], [{"name": "default"}], [{"template": "x"}]])
def test_malformed_lists_of_templates(content, tmp_path):
    """They are an error that names the file."""
    with pytest.raises(ValueError, match=r"tokenizer_config\.json .* is malformed"):
        phi3_ref.Phi3Tokenizer.from_preset(chat_directory(tmp_path, content))


def test_a_template_that_is_no_text(tmp_path):
    """So is a file that is no UTF-8."""
    write_bytes(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"chat_template\.jinja is malformed: UnicodeDecodeError"):
        phi3_ref.Phi3Tokenizer.from_preset(tmp_path)


@pytest.mark.parametrize("messages", [
    [], "hello", ["hello"], None, [CHAT[0], None], [dict(role="user", content=object())],
    [dict(role="user", content=b"x")], {"role": "user", "content": "x"},
])
def test_what_is_no_conversation(messages, tmp_path):
    """A template sees plain data: lists, dicts, strings, numbers."""
    ours = phi3_ref.Phi3Tokenizer.from_preset(chat_directory(tmp_path, PHI3_TEMPLATE))
    with pytest.raises(ValueError, match="conversation"):
        ours.apply_chat_template(messages)


def test_a_chat_has_one_start_token(tmp_path):
    """Where the template writes it, too: the ids are those of transformers' chats."""
    chat_directory(tmp_path, OLDER_PHI3, lambda path: write_microsoft(path, start=True))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    preprocessor = phi3_ref.Phi3CausalLMPreprocessor.from_preset(tmp_path, sequence_length=100)
    text = preprocessor.tokenizer.apply_chat_template(CHAT)
    expected = theirs.apply_chat_template(CHAT, return_dict=False)
    assert expected[0] == 1 and theirs(text)["input_ids"] == [1, *expected]
    prompt = preprocessor.generate_preprocess(text)
    assert prompt["token_ids"][prompt["padding_mask"]].tolist() == expected
    x, _, _ = preprocessor(text, sequence_length=5)
    assert x["token_ids"].tolist() == expected[:5]


# Tokens before and behind a text -----------------------------------------------------------------


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("end", [False, True])
def test_a_post_processor_says_what_is_added(start, end, tmp_path):
    """Training texts have transformers' ids; prompts the same, less an end token."""
    tokenizer = transformers.LlamaTokenizer.from_pretrained(write_model(tmp_path))
    tokenizer.add_bos_token, tokenizer.add_eos_token = start, end
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    # The settings beside it do not count, as in transformers.
    update("tokenizer_config.json", add_bos_token=not start, add_eos_token=not end)(tmp_path)
    expected = transformers.AutoTokenizer.from_pretrained(tmp_path)("The fox")["input_ids"]
    assert (expected[0] == 1, expected[-1] == 500) == (start, end)
    ours = phi3_ref.Phi3CausalLMPreprocessor.from_preset(tmp_path, sequence_length=30)
    assert (ours.add_start_token, ours.add_end_token) == (start, end)
    x, _, _ = ours("The fox")
    assert x["token_ids"][x["padding_mask"]].tolist() == expected
    prompt = ours.generate_preprocess("The fox")
    prompt = prompt["token_ids"][prompt["padding_mask"]].tolist()
    assert prompt == expected[: len(expected) - end]


def test_a_post_processor_may_add_another_end_token(tmp_path):
    """What it adds is the end token, whatever has the name; two are refused."""
    token = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    processor = dict(type="TemplateProcessing", single=[text, token], pair=[text],
                     special_tokens={"</s>": dict(id="</s>", ids=[2], tokens=["</s>"])})
    write_microsoft(tmp_path)
    update("tokenizer.json", post_processor=processor)(tmp_path)
    ours = phi3_ref.Phi3CausalLMPreprocessor.from_preset(tmp_path, sequence_length=30)
    x, _, _ = ours("The fox")
    expected = transformers.AutoTokenizer.from_pretrained(tmp_path)("The fox")["input_ids"]
    assert x["token_ids"][x["padding_mask"]].tolist() == expected and expected[-1] == 2
    update("tokenizer.json", post_processor=processor | dict(single=[text, token, token]))(tmp_path)
    with pytest.raises(ValueError, match="puts more than one token behind a text"):
        phi3_ref.Phi3Tokenizer.from_preset(tmp_path)


KERAS_SETTINGS = [
    dict(add_bos=True), dict(add_eos=True), dict(sequence_length=3), dict(sequence_length=12),
    dict(add_bos=True, add_eos=True, sequence_length=9), {},
]


@pytest.mark.filterwarnings("ignore:`max_length`")  # prompts are cut to the length that is set
# KerasHub leaves the vocabulary's file open.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("settings", KERAS_SETTINGS)
def test_a_keras_tokenizers_settings(settings, alone, tmp_path):
    """tokenizer.json's flags and length: KerasHub's ids, from its files and after saving ours."""
    theirs = keras_hub.models.Phi3Tokenizer(KERAS.proto, **settings)
    part = theirs if alone else keras_hub.models.Phi3CausalLMPreprocessor(theirs, 7)
    part.save_to_preset(str(tmp_path))
    write_keras_config(tmp_path)
    ours = phi3_ref.Phi3CausalLMPreprocessor.from_preset(tmp_path)
    assert ours.add_end_token is True and ours.sequence_length == (1024 if alone else 7)
    ours.save_to_preset(tmp_path / "again")
    write_keras_config(tmp_path / "again")
    for directory in (tmp_path, tmp_path / "again"):
        theirs = keras_hub.models.Phi3CausalLMPreprocessor.from_preset(str(directory))
        ours = phi3_ref.Phi3CausalLMPreprocessor.from_preset(directory)
        for text in ("The fox", "", "The quick brown fox <|end|>"):
            assert ours.tokenizer(text) == list(theirs.tokenizer(text))
            for call in ("__call__", "generate_preprocess"):
                got, expected = getattr(ours, call)(text), getattr(theirs, call)(text)
                got, expected = (x if call != "__call__" else x[0] for x in (got, expected))
                for name in ("token_ids", "padding_mask"):
                    np.testing.assert_array_equal(got[name], np.asarray(expected[name]))


# KerasHub leaves the vocabulary's file open.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_a_keras_preprocessors_own_copy_of_the_settings(tmp_path):
    """Where it contradicts tokenizer.json, KerasHub's preprocessor goes by it: with a warning."""
    phi3_ref.Phi3CausalLMPreprocessor(KERAS).save_to_preset(tmp_path)
    write_keras_config(tmp_path)
    edit_json(tmp_path / "preprocessor.json", lambda content: (
        content["config"]["tokenizer"]["config"].update(add_eos=True)))
    theirs = keras_hub.models.Phi3CausalLMPreprocessor.from_preset(str(tmp_path))
    with pytest.warns(UserWarning, match="has the tokenizer with .*add_eos") as warned:
        ours = phi3_ref.Phi3CausalLMPreprocessor.from_preset(tmp_path)
    assert len(warned) == 1
    assert ours.tokenizer("The fox") == list(theirs.tokenizer("The fox")) != KERAS("The fox")


def test_exchanged_files_of_a_keras_preset_are_named(tmp_path):
    """A preprocessor's `sequence_length` is not a tokenizer's: each file says what it describes."""
    source = pathlib.Path(phi3_ref.Phi3Backbone.presets["phi3_tiny_puzzles_en"])
    shutil.copytree(source, tmp_path / "preset")
    names = ["tokenizer.json", "preprocessor.json"]
    for name, other in zip(names, reversed(names), strict=True):
        shutil.copyfile(source / other, tmp_path / "preset" / name)
    with pytest.raises(ValueError, match=r"preprocessor\.json must describe a Phi3CausalLMPrepr"):
        phi3_ref.Phi3Tokenizer.from_preset(tmp_path / "preset")


@pytest.mark.parametrize("settings, message", [
    (dict(add_bos=2), "`add_bos`"), (dict(add_eos="no"), "`add_eos`"),
    (dict(sequence_length=-1), "`sequence_length`"),
    (dict(sequence_length="x"), "`sequence_length`"),
])
def test_bad_settings_of_a_keras_tokenizer(settings, message, tmp_path):
    """They are an error that names the preset and the setting."""
    with pytest.raises(ValueError, match=message):
        phi3_ref.Phi3Tokenizer(KERAS.proto, **settings)
    KERAS.save_to_preset(tmp_path)
    write_keras_config(tmp_path)
    edit_json(tmp_path / "tokenizer.json", lambda content: content["config"].update(settings))
    with pytest.raises(ValueError, match=f"{tmp_path.name}.*{message}"):
        phi3_ref.Phi3Tokenizer.from_preset(tmp_path)


# Texts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["\ud800", "a\udcffb", "\ud83e\udd16", ["a", "\udfff"]])
def test_half_a_character_is_named(text, tmp_path):
    """A lone surrogate is no text to KerasHub and transformers either; here the error shows it."""
    for tokenizer in (KERAS, phi3_ref.Phi3Tokenizer.from_preset(write_bytes(tmp_path))):
        with pytest.raises(ValueError, match=r"`text` is not Unicode.*\\ud"):
            tokenizer(text)
    for theirs in (keras_hub.models.Phi3Tokenizer(KERAS.proto),
                   transformers.AutoTokenizer.from_pretrained(tmp_path)):
        with pytest.raises((ValueError, TypeError)):
            theirs(text)


@pytest.mark.parametrize("dtype", ["U", object])
def test_arrays_of_strings(dtype):
    """They are what lists of strings are, as in KerasHub."""
    texts = ["The fox", "", "a dog <|end|>"]
    theirs = keras_hub.models.Phi3CausalLMPreprocessor(
        keras_hub.models.Phi3Tokenizer(KERAS.proto), 9)
    ours = phi3_ref.Phi3CausalLMPreprocessor(KERAS, 9)
    array = np.array(texts, dtype)
    assert KERAS(array) == [list(row) for row in theirs.tokenizer(array)]
    np.testing.assert_array_equal(ours(array)[0]["token_ids"], np.asarray(
        theirs(array)[0]["token_ids"]))
    assert KERAS(np.array("The fox")) == KERAS("The fox")
    one = ours.generate_preprocess(np.array("The fox"))
    assert one["token_ids"].tolist() == ours.generate_preprocess("The fox")["token_ids"].tolist()
    causal_lm = phi3_ref.Phi3CausalLM(phi3_ref.Phi3Backbone(511, 1, 8, 8, 2, 1, seed=0), ours)
    causal_lm.compile(sampler="greedy")
    assert causal_lm.generate(array) == causal_lm.generate(texts)
    for bad in (np.array([1, 2]), np.array([["a"]]), np.array(["a", None])):
        with pytest.raises(ValueError, match="`text`"):
            KERAS(bad)


def test_byte_tokens_stream_character_by_character(tmp_path):
    """Each of 16 characters outside of the vocabulary comes as soon as its last byte does."""
    text = "汉字" * 8
    for tokenizer in (KERAS, phi3_ref.Phi3Tokenizer.from_preset(write_microsoft(tmp_path))):
        token_ids, pieces = tokenizer(text), []
        assert len(token_ids) == 1 + 3 * len(text)

        def feed(token_ids=token_ids, pieces=pieces):
            for count, token_id in enumerate(token_ids):
                assert len(pieces) == max(count - 1, 0) // 3
                yield token_id

        for piece in tokenizer.detokenize_stream(feed()):
            pieces.append(piece)
        assert pieces == list(text)


# A tokenizer that is not ours ---------------------------------------------------------------------


def test_a_tokenizer_does_not_block_the_weights(model, tmp_path):
    """`preprocessor=None` loads the model without it, as in KerasHub; the error says so."""
    write_huggingface(model, write_microsoft(tmp_path))
    expected = phi3_ref.Phi3CausalLM.from_preset(tmp_path, preprocessor=None)
    other = phi3_ref.Phi3CausalLMPreprocessor(KERAS)
    assert phi3_ref.Phi3CausalLM.from_preset(tmp_path, preprocessor=other).preprocessor is other
    expected.save_to_preset(tmp_path / "keras")
    assets = tmp_path / "keras" / "assets" / "tokenizer"
    assets.mkdir(parents=True)
    (assets / "vocabulary.spm").write_bytes(LLAMA)  # without <|endoftext|>
    (tmp_path / "tokenizer.json").write_text("{}")
    inputs = {"token_ids": np.array([[1, 2, 3]])}
    for directory in (tmp_path, tmp_path / "keras"):
        with pytest.raises(ValueError, match=r"(er\.json|ary\.spm).*preprocessor=None"):
            phi3_ref.Phi3CausalLM.from_preset(directory)
        causal_lm = phi3_ref.Phi3CausalLM.from_preset(directory, preprocessor=None)
        np.testing.assert_array_equal(causal_lm(inputs), expected(inputs))


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path):
    """So it is where the two do not fit together."""
    model = transformers_model(dict(vocab_size=100, num_hidden_layers=1))
    write_huggingface(model, write_microsoft(tmp_path), dict(eos_token_id=500))
    write_json(tmp_path / "generation_config.json", {})
    with pytest.raises(ValueError, match=r"511 tokens, the backbone 100\..*preprocessor=None"):
        phi3_ref.Phi3CausalLM.from_preset(tmp_path)
    assert phi3_ref.Phi3CausalLM.from_preset(tmp_path, preprocessor=None).preprocessor is None


@pytest.mark.parametrize("setting, message", [
    (dict(PYTHONIOENCODING="utf-8:strict"),
     "standard input is not text: 'utf-8' codec can't decode byte 0xff in position 5"),
    # where Python lets them through
    (dict(LC_ALL="POSIX"), "`text` is not Unicode: surrogates not allowed"),
])
def test_standard_input_that_is_no_text(setting, message):
    """Bytes that are no UTF-8 end the chat with one line that says so."""
    run = subprocess.run([sys.executable, phi3_ref.__file__], input=b"Sort \xff dog\n",
                         capture_output=True, env=os.environ | setting)
    assert run.returncode == 2 and run.stdout == b""
    assert message in run.stderr.decode().splitlines()[-1]
