"""The tokenizer and its preprocessor give KerasHub's ids, text and arrays, and transformers'.

The vocabulary is trained here: a small SentencePiece BPE with the settings of Phi-3's. The
Hugging Face directories hold what Phi-3's do, and the variants found in the wild.
"""

import io
import itertools
import json
import re
import types

import keras_hub
import numpy as np
import pytest
import sentencepiece
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from references import examples, seen_with
from sentencepiece.sentencepiece_model_pb2 import ModelProto

import phi3_ref

# Phi-3's, in its order; KerasHub's converter appends them to the vocabulary just so.
SPECIAL = (
    "<|endoftext|> <|assistant|> <|placeholder1|> <|placeholder2|> <|placeholder3|> "
    "<|placeholder4|> <|system|> <|end|> <|placeholder5|> <|placeholder6|> <|user|>"
).split()
CORPUS = """
The quick brown fox jumps over the lazy dog, and the dog did not even wake up from its sleep.
A tokenizer turns text into the pieces of its vocabulary: the more often, the longer the piece.
def hello(name):
    if name is not None:
        print("hello,  " + name)      # two spaces, then      many
        return {"name": name, "length": len(name) + 12345}
What is 345 + 278? It is 623. What is 99 + 1? It is 100, and 0 + 0 is 0; 2024-04-23.
Der schnelle Fuchs springt über den faulen Hund; où est le café? Ça va, señor, à bientôt.
Быстрая лиса прыгает через собаку. 敏捷的棕色狐狸跳过懒狗。 素早い茶色の狐がのろまな犬を飛び越える。
"""
# What texts are made of: added tokens and things like them, spaces of many kinds (some only Python,
# some only Unicode calls so), pieces, characters outside the vocabulary, combining ones.
FRAGMENTS = [
    *SPECIAL, "<s>", "</s>", "<unk>", "<tag>", "<left>", "<|user|", "|>", "<0x41>", "▁", "▁▁",
    " ", "  ", "     ", "\n", "\n\n", "\t", "\r\n", "\x00", "\x1c", "\x1f", "\x85", "\xa0",
    "\u3000", "\u2028", "\ufeff", "\u200d", "e\u0301", "🤖", "👩\u200d🚀", "\ufffd", "敏捷", "汉",
    "é", "лиса", "ж", "The quick", "tokenizer", "pieces of its", "12345", "a", "b",
]
TEXTS = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=4), max_size=20).map("".join)
PHI3_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + "
    "message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\n' + "
    "message['content'] + '<|end|>\n'}}{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n'"
    " + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


def train(**normalization):
    """A SentencePiece model as Llama's, 500 pieces, then bytes; without special tokens."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines() * 3), model_writer=model, model_type="bpe",
        vocab_size=500, byte_fallback=True, character_coverage=0.99, split_digits=True,
        allow_whitespace_only_pieces=True, minloglevel=2, **normalization,
    )
    return model.getvalue()


LLAMA = train(normalization_rule_name="identity", remove_extra_whitespaces=False)


def keras_vocabulary(model, tokens=SPECIAL):
    """The model with special tokens appended as user-defined pieces."""
    model = ModelProto.FromString(model)
    for token in tokens:
        model.pieces.add(piece=token, score=0.0, type=model.SentencePiece.USER_DEFINED)
    return model.SerializeToString()


def flags(content, **changes):
    """The JSON of an added token; Phi-3's strip the whitespace behind them, with few exceptions."""
    token = dict(content=content, lstrip=False, normalized=False, single_word=False, special=True)
    return token | dict(rstrip=content not in ("<|endoftext|>", "<s>", "<unk>")) | changes


def write_json(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")


def edit_json(path, change):
    """Rewrite a JSON file after `change(content)` has altered it."""
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    write_json(path, content)


def write_slow(directory, model=LLAMA, **settings):
    """Write the files of Phi-3's tokenizer, less tokenizer.json; return the directory."""
    first = len(ModelProto.FromString(model).pieces)
    ids = {token: first + index for index, token in enumerate(SPECIAL)}
    decoder = {"<unk>": 0, "<s>": 1, "</s>": 2, **ids}
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.model").write_bytes(model)
    write_json(directory / "config.json", dict(model_type="phi3"))
    write_json(directory / "added_tokens.json", ids)
    config = dict(
        added_tokens_decoder={str(token_id): flags(token) for token, token_id in decoder.items()},
        bos_token="<s>", eos_token="<|endoftext|>", pad_token="<|endoftext|>", unk_token="<unk>",
        add_bos_token=False, add_eos_token=False, legacy=False, tokenizer_class="LlamaTokenizer",
        chat_template=PHI3_TEMPLATE, clean_up_tokenization_spaces=False, padding_side="left",
    )
    write_json(directory / "tokenizer_config.json", config | settings)
    return directory


def write_fast(directory, alone=False, scheme=None, prefix=True, start=False):
    """Write tokenizer.json besides, with transformers' own conversion of the BPE.

    Args:
        alone: bool, remove the other files, and add tokens with other flags.
        scheme: None for Phi-3's own normalizer, else Metaspace's "first", "always" or "never".
        prefix: bool, whether a space is put before text and taken off again.
        start: bool, whether its post-processor adds the start token.
    """
    write_slow(directory, add_bos_token=not start)  # not what counts: the post-processor does
    tokenizer = transformers.LlamaTokenizer.from_pretrained(directory, add_bos_token=start)
    tokenizer.backend_tokenizer.save(str(directory / "tokenizer.json"))
    replace = dict(type="Replace", pattern={"String": " "}, content="▁")
    steps = [dict(type="Prepend", prepend="▁"), replace] if prefix else [replace]

    def change(content):
        content["model"]["unk_token"] = "<unk>"
        content["pre_tokenizer"]["prepend_scheme"] = scheme
        if scheme is None:
            content["pre_tokenizer"] = None
            content["normalizer"] = dict(type="Sequence", normalizers=steps)
        if not prefix:
            content["decoder"]["decoders"].pop()
        if alone:
            content["added_tokens"] += [
                flags("<tag>", normalized=True, special=False, rstrip=False) | dict(id=511),
                flags("<left>", lstrip=True) | dict(id=512),
                flags("<|user") | dict(id=513),
            ]

    edit_json(directory / "tokenizer.json", change)
    if alone:
        for name in ("tokenizer.model", "tokenizer_config.json", "added_tokens.json"):
            (directory / name).unlink()


def write_names_only(directory):
    """tokenizer.model and added_tokens.json: no flags at all."""
    write_slow(directory)
    (directory / "tokenizer_config.json").unlink()


def write_saved_again(directory):
    """What transformers writes when it saves what it has loaded."""
    write_fast(directory.with_name("original"), start=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory.with_name("original"))
    tokenizer.save_pretrained(directory)
    write_json(directory / "config.json", dict(model_type="phi3"))


def write_corrected_flags(directory):
    """tokenizer_config.json has the last word on the flags of added tokens."""
    write_fast(directory)
    edit_json(directory / "tokenizer.json", lambda content: [
        token.update(rstrip=False) for token in content["added_tokens"]
    ])


DIRECTORIES = {
    # tokenizer.model and tokenizer_config.json
    "slow": write_slow,
    "slow, legacy": lambda path: write_slow(path, legacy=True),
    "slow, no prefix": lambda path: write_slow(path, add_prefix_space=False),
    "slow, start token": lambda path: write_slow(path, add_bos_token=True),
    "slow, names only": write_names_only,
    "slow, normalizing": lambda path: write_slow(path, train(normalization_rule_name="nmt_nfkc")),
    # tokenizer.json besides
    "both": write_fast,
    "both, start token": lambda path: write_fast(path, start=True),
    "both, saved again": write_saved_again,
    "both, other flags": write_corrected_flags,
    # tokenizer.json alone
    "json": lambda path: write_fast(path, alone=True),
    "json, start token": lambda path: write_fast(path, alone=True, start=True),
    "json, no prefix": lambda path: write_fast(path, alone=True, prefix=False),
    "json, first": lambda path: write_fast(path, alone=True, scheme="first"),
    "json, always": lambda path: write_fast(path, alone=True, scheme="always"),
    "json, never": lambda path: write_fast(path, alone=True, scheme="never", prefix=False),
}


@pytest.fixture(scope="module", params=DIRECTORIES)
def huggingface(request, tmp_path_factory):
    """A Hugging Face directory: transformers' tokenizer of it, and our preprocessor."""
    directory = tmp_path_factory.mktemp("huggingface") / "directory"
    DIRECTORIES[request.param](directory)
    # AutoTokenizer overrides the class that tokenizer_config.json names, which matters only here.
    slow = request.param.startswith("slow")
    reader = transformers.LlamaTokenizer if slow else transformers.AutoTokenizer
    return types.SimpleNamespace(
        kind=request.param, directory=directory, theirs=reader.from_pretrained(directory),
        ours=phi3_ref.Phi3CausalLMPreprocessor.from_preset(directory),
    )


@pytest.fixture(scope="module", params=["identity", "nmt_nfkc"])
def keras(request):
    """One vocabulary in KerasHub's tokenizer and ours: Phi-3's normalization, or a busy one."""
    plain = request.param == "identity"
    model = train(normalization_rule_name=request.param, remove_extra_whitespaces=not plain)
    vocabulary = keras_vocabulary(model)
    return types.SimpleNamespace(
        theirs=keras_hub.models.Phi3Tokenizer(vocabulary),
        ours=phi3_ref.Phi3Tokenizer(vocabulary), vocabulary=vocabulary,
    )


# Text to ids and back ----------------------------------------------------------------------------


def test_the_vocabulary_is_worth_testing_with():
    """It has merges, runs of spaces, characters as bytes, and is built like Phi-3's."""
    tokenizer = phi3_ref.Phi3Tokenizer(keras_vocabulary(LLAMA))
    pieces = tokenizer.pieces
    assert pieces[:4] == ["<unk>", "<s>", "</s>", "<0x00>"] and pieces[500:] == SPECIAL
    assert max(len(piece) for piece in pieces[:500]) >= 5 and "▁▁▁▁" in pieces
    assert tokenizer("汉") == [tokenizer.token_to_id(p) for p in "▁ <0xE6> <0xB1> <0x89>".split()]


@settings(max_examples=examples(60))
@given(texts=st.lists(TEXTS, max_size=3))
@example(texts=[""])
@example(texts=[" <|user|>\n \nHi  <|end|>\n<|assistant|>"])
def test_keras_ids(keras, texts):
    """A Keras vocabulary tokenizes as KerasHub's Phi3Tokenizer does, single texts and batches."""
    assert keras.ours(texts) == [list(row) for row in keras.theirs(texts)] if texts else True
    for text in texts:
        assert keras.ours(text) == keras.ours.tokenize(text) == keras.theirs(text).tolist()


@settings(max_examples=examples(100))
@given(token_ids=st.lists(st.integers(0, 510) | st.integers(3, 258), max_size=12))
@example(token_ids=[])
@example(token_ids=[1, 3 + 0x20, 0, 3 + 0xF0, 3 + 0x9F, 0, 510])
def test_keras_text(keras, token_ids):
    """Any ids, broken characters among them, become the text KerasHub makes of them."""
    text = keras.ours.detokenize(token_ids)
    assert text == keras.theirs.detokenize(token_ids)
    assert "".join(keras.ours.detokenize_stream(token_ids)) == text
    assert keras.ours.detokenize(np.array([token_ids, token_ids], "int32")) == [text, text]


@settings(max_examples=examples(80))
@given(text=TEXTS)
@example(text="")
@example(text=" <|user|>\n \nHi  <|end|>\n<|assistant|>")
@example(text="x<tag>y <tag> \nz  <left>")
def test_huggingface_ids(huggingface, text):
    """A Hugging Face directory tokenizes as transformers does, with and without start token."""
    expected = huggingface.theirs(text, add_special_tokens=False)["input_ids"]
    assert huggingface.ours.tokenizer(text) == expected
    with_start = huggingface.theirs(text)["input_ids"]
    prompt = huggingface.ours.generate_preprocess(text, len(with_start) + 1)
    assert prompt["token_ids"][prompt["padding_mask"]].tolist() == with_start


@settings(max_examples=examples(60))
@given(token_ids=st.lists(st.integers(0, 530) | st.integers(3, 258), max_size=12))
@example(token_ids=[])
@example(token_ids=[3 + 0xF0, 530, 3 + 0x9F, 3 + 0xA4, 3 + 0x96])
@example(token_ids=[3 + 0x20, 3 + 0x41, 3 + 0xFF, 511])
def test_huggingface_text(huggingface, token_ids):
    """Any ids, unknown ones among them, become the text transformers decodes them to."""
    tokenizer = huggingface.ours.tokenizer
    text = tokenizer.detokenize(token_ids)
    assert text == huggingface.theirs.decode(token_ids)
    assert "".join(tokenizer.detokenize_stream(token_ids)) == text


def test_an_end_token_is_no_start_token(tmp_path):
    """A post-processor that only appends a token adds no start token."""
    tokenizer = transformers.LlamaTokenizer.from_pretrained(write_slow(tmp_path))
    tokenizer.add_eos_token = True
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)("a")["input_ids"][0] != 1
    assert phi3_ref.Phi3CausalLMPreprocessor.from_preset(tmp_path).add_start_token is False


def test_tokenizer_model_alone(tmp_path):
    """Without a tokenizer.json, AutoTokenizer gives our ids, for chats and for plain text."""
    theirs = transformers.AutoTokenizer.from_pretrained(write_slow(tmp_path))
    ours = phi3_ref.Phi3Tokenizer.from_preset(tmp_path)
    for text in ("<|user|>\nThe quick fox?<|end|>\n<|assistant|>\n", "fox", " fox"):
        assert ours(text) == theirs(text)["input_ids"]


# A first space could be the prefix; added tokens take spaces away; "▁" comes back as a space.
PLAIN_TEXTS = TEXTS.map(lambda text: "x" + re.sub("[<▁]", "", text))


@settings(max_examples=examples(20))
@given(text=PLAIN_TEXTS)
def test_huggingface_round_trip(huggingface, text):
    """Text without added tokens survives: bytes stand in for what the vocabulary lacks."""
    assert huggingface.ours.tokenizer.detokenize(huggingface.ours.tokenizer(text)) == text


@settings(max_examples=examples(100))
@given(text=TEXTS.map(lambda text: text.replace("▁", "")))
def test_keras_round_trip(text):
    """So it does with a Keras vocabulary, special tokens and first spaces included."""
    assert KERAS.detokenize(KERAS(text)) == text


KERAS = phi3_ref.Phi3Tokenizer(keras_vocabulary(LLAMA))


# Streaming ---------------------------------------------------------------------------------------


def pieces_per_token(tokenizer, token_ids):
    """What the stream has yielded by the time it asks for each next token."""
    seen, counts = [], []

    def feed():
        for token_id in token_ids:
            yield token_id
            counts.append("".join(seen))

    for piece in tokenizer.detokenize_stream(feed()):
        seen.append(piece)
    return counts, "".join(seen)


def test_a_stream_never_shows_half_a_character(huggingface):
    """Every moment's text is a beginning of the whole, and at most a run of bytes behind."""
    text = "The 🤖 of 汉 says é: 👩\u200d🚀 go <|user|> a"
    for tokenizer in (KERAS, huggingface.ours.tokenizer):
        token_ids = tokenizer(text)
        shown, whole = pieces_per_token(tokenizer, token_ids)
        assert whole == tokenizer.detokenize(token_ids) and "�" not in "".join(shown)
        for count, token_id in enumerate(token_ids):
            assert whole.startswith(shown[count])
            if not re.fullmatch("<0x..>", tokenizer.id_to_token(token_id)):
                assert shown[count] == tokenizer.detokenize(token_ids[: count + 1])


def test_a_stream_needs_no_end():
    """It decodes what is new, however long the text: an endless one can be watched."""
    token_ids = [KERAS.token_to_id(piece) for piece in ("▁", "a", "<0xC3>", "<0xA9>")]
    stream = KERAS.detokenize_stream(itertools.cycle(token_ids))
    assert "".join(itertools.islice(stream, 10_000)).startswith("aé aé aé")


# Chats -------------------------------------------------------------------------------------------

MESSAGES = st.lists(st.fixed_dictionaries(
    dict(role=st.sampled_from(["system", "user", "assistant"]), content=TEXTS)
), min_size=1, max_size=4)


@settings(max_examples=examples(40))
@given(messages=MESSAGES, prompt=st.booleans())
def test_chat_template(messages, prompt, chat_tokenizer):
    """Conversations read as Phi-3's own template, run by transformers, writes them."""
    expected = chat_tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=prompt
    )
    assert KERAS.apply_chat_template(messages, add_generation_prompt=prompt) == expected


@pytest.fixture(scope="module")
def chat_tokenizer(tmp_path_factory):
    """A tokenizer of transformers, with Phi-3's template."""
    directory = tmp_path_factory.mktemp("chat")
    return transformers.LlamaTokenizer.from_pretrained(write_slow(directory))


@pytest.mark.parametrize(
    "message",
    [
        "hello", {"role": "user"}, {"content": "hello"}, {"role": "tool", "content": "hello"},
        {"role": "user", "content": None}, {"role": "user", "content": ["hello"]},
        {"role": "user", "content": "hello", "tools": []}, {"role": ["user"], "content": "hello"},
    ],
)
def test_bad_messages(message):
    """What the template has no place for is an error that shows it."""
    with pytest.raises(ValueError, match=re.escape(repr(message))):
        KERAS.apply_chat_template([{"role": "user", "content": "hello"}, message])


def test_an_empty_conversation(chat_tokenizer):
    """No messages are an error, as in transformers."""
    for tokenizer in (chat_tokenizer, KERAS):
        with pytest.raises(ValueError, match="at least one message"):
            tokenizer.apply_chat_template([])


# The preprocessor --------------------------------------------------------------------------------


def assert_equal_arrays(ours, reference):
    """Equal nests of dicts, tuples and arrays: values, shapes and dtypes."""
    if isinstance(reference, dict):
        assert ours.keys() == reference.keys()
        ours, reference = ours.values(), reference.values()
    if not hasattr(reference, "shape"):
        for one, other in zip(ours, reference, strict=True):
            assert_equal_arrays(one, other)
        return
    reference = np.asarray(reference)
    assert ours.dtype == reference.dtype and ours.shape == reference.shape
    np.testing.assert_array_equal(ours, reference)


def preprocessors(keras, **settings):
    """KerasHub's and ours."""
    theirs = keras_hub.models.Phi3CausalLMPreprocessor(keras.theirs, **settings)
    return theirs, phi3_ref.Phi3CausalLMPreprocessor(keras.ours, **settings)


@settings(max_examples=examples(40))
@given(
    texts=TEXTS | st.lists(TEXTS, min_size=1, max_size=3), length=st.integers(1, 20),
    override=st.none() | st.integers(1, 20), start=st.booleans(), end=st.booleans(),
)
def test_training_arrays(keras, texts, length, override, start, end):
    """Inputs, labels and weights equal KerasHub's: cut, padded, with and without end tokens."""
    theirs, ours = preprocessors(
        keras, sequence_length=length, add_start_token=start, add_end_token=end
    )
    expected = theirs(texts, sequence_length=override)
    assert_equal_arrays(ours(texts, sequence_length=override), expected)


@settings(max_examples=examples(40))
@given(
    texts=TEXTS | st.lists(TEXTS, min_size=1, max_size=3), length=st.integers(1, 20),
    override=st.none() | st.integers(1, 20), end=st.booleans(),
)
def test_prompt_arrays(keras, texts, length, override, end):
    """So are prompts, which never get an end token."""
    theirs, ours = preprocessors(
        keras, sequence_length=length, add_start_token=True, add_end_token=end
    )
    expected = theirs.generate_preprocess(texts, sequence_length=override)
    assert_equal_arrays(ours.generate_preprocess(texts, override), expected)


def test_a_prompt_without_start_token(keras):
    """`add_start_token=False` holds for prompts too; KerasHub forgets it there."""
    theirs, ours = preprocessors(keras, sequence_length=4, add_start_token=False)
    prompt = ours.generate_preprocess("a")
    assert prompt["token_ids"][prompt["padding_mask"]].tolist() == keras.ours("a")
    theirs = np.asarray(theirs.generate_preprocess("a")["token_ids"])
    assert theirs[0] == keras.ours.start_token_id, seen_with("keras-hub", "0.32.0")


@settings(max_examples=examples(40))
@given(rows=st.lists(
    st.lists(st.tuples(st.integers(0, 510) | st.sampled_from([1, 500]), st.booleans()),
             min_size=6, max_size=6), min_size=1, max_size=3,
))
def test_arrays_to_text(keras, rows):
    """Ids become KerasHub's text again: less what is masked, start and end tokens."""
    theirs, ours = preprocessors(keras)
    token_ids, mask = np.moveaxis(np.array(rows), -1, 0)
    batch = {"token_ids": token_ids.astype("int32"), "padding_mask": mask.astype(bool)}
    texts = ours.generate_postprocess(batch)
    assert texts == list(theirs.generate_postprocess(batch))
    first = {name: array[0] for name, array in batch.items()}
    assert ours.generate_postprocess(first) == texts[0]


# Saving and loading ------------------------------------------------------------------------------

TEXT = " The <|user|>\n quick  fox: 🤖汉<|end|>\n<|endoftext|>"


def write_keras_config(directory):
    """The least config.json that makes a directory a Keras preset of Phi-3."""
    module = "keras_hub.src.models.phi3.phi3_backbone"
    config = dict(module=module, class_name="Phi3Backbone", config={})
    write_json(directory / "config.json", config | dict(registered_name="keras_hub>Phi3Backbone"))


# KerasHub leaves the vocabulary's file open.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize("start, end", [(True, False), (False, True)])
def test_keras_loads_what_we_save(tmp_path, start, end):
    """A Keras vocabulary, saved, is the same in KerasHub and in ours; settings too."""
    settings = dict(sequence_length=17, add_start_token=start, add_end_token=end)
    phi3_ref.Phi3CausalLMPreprocessor(KERAS, **settings).save_to_preset(tmp_path)
    write_keras_config(tmp_path)
    for library in (keras_hub.models, phi3_ref):
        loaded = library.Phi3CausalLMPreprocessor.from_preset(str(tmp_path))
        assert {name: getattr(loaded, name) for name in settings} == settings
        assert loaded.tokenizer.proto == KERAS.proto
        assert list(loaded.tokenizer(TEXT)) == KERAS(TEXT)
        changed = library.Phi3CausalLMPreprocessor.from_preset(str(tmp_path), sequence_length=5)
        assert changed.sequence_length == 5 and changed.add_end_token == end
        assert list(library.Phi3Tokenizer.from_preset(str(tmp_path))(TEXT)) == KERAS(TEXT)


# KerasHub leaves the vocabulary's file open.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_keras_loads_a_huggingface_tokenizer(huggingface, tmp_path):
    """Saved, its tokens keep their ids, and KerasHub tokenizes what is plain text as before."""
    huggingface.ours.save_to_preset(tmp_path)
    write_keras_config(tmp_path)
    theirs = keras_hub.models.Phi3CausalLMPreprocessor.from_preset(str(tmp_path))
    again = phi3_ref.Phi3CausalLMPreprocessor.from_preset(tmp_path)
    assert theirs.tokenizer.get_vocabulary() == again.tokenizer.pieces
    ids = huggingface.theirs.get_vocab()
    assert again.tokenizer.pieces == sorted(ids, key=ids.get)
    assert theirs.add_start_token == again.add_start_token == huggingface.ours.add_start_token
    assert list(theirs.tokenizer(TEXT)) == again.tokenizer(TEXT)
    plain = "The quick fox: 🤖汉 and 12345 pieces"
    assert again.tokenizer(plain) == huggingface.ours.tokenizer(plain)
    if huggingface.kind == "both":  # as good as the vocabulary that KerasHub's converter makes
        assert again.tokenizer(TEXT + "</s> <s>  <unk>") == KERAS(TEXT + "</s> <s>  <unk>")


def test_what_a_tokenizer_tells(keras):
    """Ids, tokens and sizes are KerasHub's."""
    for name in ("start_token_id", "end_token_id", "pad_token_id"):
        assert getattr(keras.ours, name) == getattr(keras.theirs, name)
    assert sorted(keras.ours.special_token_ids) == sorted(keras.theirs.special_token_ids)
    assert keras.ours.vocabulary_size() == keras.theirs.vocabulary_size() == 511
    for token_id in range(511):
        token = keras.theirs.id_to_token(token_id)
        assert keras.ours.id_to_token(token_id) == token
        assert keras.ours.token_to_id(token) == token_id == keras.theirs.token_to_id(token)
    assert keras.ours.token_to_id("no such") == keras.theirs.token_to_id("no such") == 0


# Errors ------------------------------------------------------------------------------------------


def byte_level(directory):
    """A tokenizer.json like Phi-4's: a BPE over bytes."""
    write_fast(directory, alone=True)
    edit_json(directory / "tokenizer.json", lambda c: c["model"].update(byte_fallback=False))


@pytest.mark.parametrize("write", [
    lambda path: (path.mkdir(), write_json(path / "config.json", dict(model_type="phi3"))),
    lambda path: (path.mkdir(), write_keras_config(path)),
    byte_level,
])
def test_no_sentencepiece_tokenizer(write, tmp_path):
    """No files, or another kind of tokenizer: no preprocessor, and an error for who insists."""
    write(tmp_path / "preset")
    assert phi3_ref.Phi3CausalLMPreprocessor.from_preset(tmp_path / "preset") is None
    with pytest.raises(ValueError, match="preset' has no SentencePiece tokenizer"):
        phi3_ref.Phi3Tokenizer.from_preset(tmp_path / "preset")


def change_token(path, token_id, **changes):
    """Change an added token of tokenizer_config.json; `number` moves it to another id."""
    def change(content):
        token = content["added_tokens_decoder"].pop(str(token_id))
        content["added_tokens_decoder"][str(changes.pop("number", token_id))] = token | changes
    edit_json(path / "tokenizer_config.json", change)


def update(name, **changes):
    """A change of a directory: replace entries of a JSON file."""
    return lambda path: edit_json(path / name, lambda content: content.update(changes))


@pytest.mark.parametrize("slow, spoil, message", [
    (True, lambda path: change_token(path, 510, number=511), "<|user|>"),
    (True, lambda path: change_token(path, 2, content="</x>"), "</x>"),
    (True, lambda path: change_token(path, 510, single_word=True), "single_word"),
    (True, update("tokenizer_config.json", added_tokens_decoder={"510": {}}), "content"),
    (True, update("added_tokens.json", **{"<x>": -1}), "<x>"),
    (True, lambda path: (path / "tokenizer.model").write_bytes(b"no model"), "DecodeError"),
    (True, lambda path: (path / "tokenizer.model").write_bytes(b""), "cannot add"),
    (False, update("tokenizer.json", normalizer={"type": "Lowercase"}), "Lowercase"),
    (False, update("tokenizer.json", pre_tokenizer={"type": "Whitespace"}), "Whitespace"),
    (False, update("tokenizer.json", decoder={"type": "Metaspace"}), "decoders"),
    (False, update("tokenizer.json", added_tokens=None), "tokenizer"),
    (False, lambda path: edit_json(
        path / "tokenizer.json", lambda content: content["model"].pop("merges")), "merges"),
    (False, lambda path: edit_json(
        path / "tokenizer.json", lambda content: content["model"]["vocab"].pop("a")), "the id"),
    (False, update("tokenizer.json", model={
        "byte_fallback": True, "merges": [], "vocab": {"<unk>": 0, "a": 1}}), "<s>"),
    (False, lambda path: (path / "tokenizer.json").write_text("[]"), "tokenizer.json"),
    (False, lambda path: (path / "tokenizer.json").write_text("{"), "tokenizer.json"),
])
def test_malformed_huggingface_files(slow, spoil, message, tmp_path):
    """Files that cannot be right are an error that names the directory and what is wrong."""
    (write_slow if slow else write_fast)(tmp_path / "preset")
    spoil(tmp_path / "preset")
    with pytest.raises(ValueError, match=f"preset.*{re.escape(message)}"):
        phi3_ref.Phi3Tokenizer.from_preset(tmp_path / "preset")


@pytest.mark.parametrize("content, message", [
    (b"", "not a SentencePiece model"), (b"no model", "not a SentencePiece model"),
    (LLAMA, re.escape("'<|endoftext|>'")),
    (keras_vocabulary(LLAMA, SPECIAL[1:]), re.escape("'<|endoftext|>'")),
])
def test_bad_vocabularies(content, message, tmp_path):
    """A file that is no model, or lacks a special token, is named; so is a missing file."""
    with pytest.raises(ValueError, match="`proto`.*" + message):
        phi3_ref.Phi3Tokenizer(content)
    (tmp_path / "vocabulary.spm").write_bytes(content)
    with pytest.raises(ValueError, match=r"vocabulary\.spm.*" + message):
        phi3_ref.Phi3Tokenizer(tmp_path / "vocabulary.spm")
    with pytest.raises(FileNotFoundError, match=r"missing\.spm"):
        phi3_ref.Phi3Tokenizer(str(tmp_path / "missing.spm"))


def test_bad_arguments():
    """What is no text, no token id, no length is an error."""
    for text in (None, 5, ["a", 5], [["a"]], b"a"):
        with pytest.raises(ValueError, match="`text`"):
            KERAS(text)
        with pytest.raises(ValueError, match="`text`"):
            phi3_ref.Phi3CausalLMPreprocessor(KERAS)(text)
    for token_id in (-1, 511):
        with pytest.raises(ValueError, match=str(token_id)):
            KERAS.id_to_token(token_id)
    for length in (0, -1, 1.5, "8", None):
        with pytest.raises(ValueError, match="sequence_length"):
            phi3_ref.Phi3CausalLMPreprocessor(KERAS, sequence_length=length)
