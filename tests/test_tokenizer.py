"""The tokenizers and their preprocessor give KerasHub's ids, text and arrays, and transformers'.

The vocabularies are trained here: a small SentencePiece BPE with the settings of Phi-3's, and a BPE
over bytes with Phi-4's. The Hugging Face directories hold what Microsoft's do, what transformers 5
makes of them, and the variants found in the wild.
"""

import io
import itertools
import json
import os
import re
import types

import keras_hub
import numpy as np
import pytest
import sentencepiece
import tokenizers
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


KERAS = phi3_ref.Phi3Tokenizer(keras_vocabulary(LLAMA))


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


def write_model(directory, model=LLAMA, **settings):
    """Write the files of Phi-3's tokenizer, less tokenizer.json; return the directory."""
    first = len(ModelProto.FromString(model).pieces)
    ids = {token: first + index for index, token in enumerate(SPECIAL)}
    decoder = {"<unk>": 0, "<s>": 1, "</s>": 2, **ids}
    directory.mkdir(parents=True, exist_ok=True)
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


def write_microsoft(directory, start=False, model=LLAMA):
    """Write Phi-3's files, tokenizer.json with transformers' own conversion of the BPE.

    Args:
        start: bool, whether its post-processor adds the start token.
        model: bytes, the SentencePiece model.
    """
    # The setting is not what counts: the post-processor is.
    write_model(directory, model, add_bos_token=not start)
    tokenizer = transformers.LlamaTokenizer.from_pretrained(directory, add_bos_token=start)
    tokenizer.backend_tokenizer.save(str(directory / "tokenizer.json"))
    replace = dict(type="Replace", pattern={"String": " "}, content="▁")
    steps = [dict(type="Prepend", prepend="▁"), replace]

    def change(content):
        content["model"]["unk_token"] = "<unk>"
        content |= dict(
            pre_tokenizer=None, normalizer=dict(type="Sequence", normalizers=steps))

    edit_json(directory / "tokenizer.json", change)
    return directory


def write_alone(directory, **settings):
    """tokenizer.json alone, with all kinds of flags; `settings` replace its parts."""
    write_microsoft(directory)
    edit_json(directory / "tokenizer.json", lambda content: content.update(
        added_tokens=content["added_tokens"] + [
            flags("<tag>", normalized=True, special=False, rstrip=False) | dict(id=511),
            flags("<left>", lstrip=True) | dict(id=512), flags("<|user") | dict(id=513)],
        **settings))
    for name in ("tokenizer.model", "tokenizer_config.json", "added_tokens.json"):
        (directory / name).unlink()


def metaspace(scheme):
    """The parts of a tokenizer.json that put "▁" before texts in a newer way than Phi-3's."""
    step = dict(type="Metaspace", replacement="▁", prepend_scheme=scheme, split=False)
    return dict(normalizer=None, pre_tokenizer=step)


def save_again(directory, original, **settings):
    """Write what transformers writes when it saves what it has loaded: every fine-tune's files."""
    transformers.AutoTokenizer.from_pretrained(original, **settings).save_pretrained(directory)
    write_json(directory / "config.json", dict(model_type="phi3"))


def write_corrected_flags(directory):
    """tokenizer_config.json has the last word: on flags, on roles, and with tokens of its own."""
    write_microsoft(directory)
    write_json(directory / "special_tokens_map.json", dict(eos_token="<|end|>"))
    edit_json(directory / "tokenizer_config.json", lambda config: (
        config["added_tokens_decoder"].update({"512": flags("<left>"), "511": flags("<tag>")})))
    edit_json(directory / "tokenizer.json", lambda content: [
        token.update(rstrip=False) for token in content["added_tokens"]
    ])


def write_older_settings(directory):
    """Before tokenizer_config.json had the added tokens; with tokens that only it has."""
    write_microsoft(directory, start=True)
    (directory / "added_tokens.json").unlink()
    edit_json(directory / "tokenizer_config.json", lambda config: (
        config.pop("added_tokens_decoder"), config.pop("unk_token"), config.update(
            bos_token="<|system|>", eos_token="<s>",
            pad_token=flags("<tag>", __type="AddedToken"),
            additional_special_tokens=["<left>", "<|user|>"])))
    write_json(directory / "special_tokens_map.json", dict(
        eos_token=flags("<|end|>"), unk_token="<unk>"))


def write_limits(directory):
    """What tokenizer.json says of the length of texts is for training."""
    write_microsoft(directory, start=True)
    edit_json(directory / "tokenizer.json", lambda content: content.update(
        truncation=dict(direction="Right", max_length=3, strategy="LongestFirst", stride=0),
        padding=dict(strategy={"Fixed": 9}, direction="Left", pad_to_multiple_of=None, pad_id=0,
                     pad_type_id=0, pad_token="<unk>")))


PHI4_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|user|>", "<|end|>"]
PHI4_WORDS = (r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
              r"\s*[\r\n]+|\s+(?!\S)|\s+")


def write_bytes(directory, start=False, **settings):
    """A tokenizer like Phi-4's: BPE over bytes, other special tokens, whitespace of both sides."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = tokenizers.pre_tokenizers.Split(tokenizers.Regex(PHI4_WORDS), "isolated")
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([words, level])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.train_from_iterator(CORPUS.splitlines() * 3, tokenizers.trainers.BpeTrainer(
        vocab_size=500, show_progress=False, initial_alphabet=level.alphabet()))
    tokenizer.add_special_tokens([
        tokenizers.AddedToken(token, lstrip=token != "<|end|>", rstrip=True, special=True)
        for token in PHI4_SPECIAL])
    tokenizer.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    if start:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[
                ("<|endoftext|>", tokenizer.token_to_id("<|endoftext|>"))])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    write_json(directory / "config.json", dict(model_type="phi3"))
    write_json(directory / "tokenizer_config.json", dict(
        bos_token="<|endoftext|>", eos_token="<|im_end|>", pad_token="<|endoftext|>",
        unk_token="�", add_bos_token=True, tokenizer_class="GPT2Tokenizer", **settings))
    return directory


def write_word_pieces(directory):
    """BERT's kind: no Phi's, but a tokenizer.json is a tokenizer.json."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    tokenizer.train_from_iterator(CORPUS.splitlines(), tokenizers.trainers.WordPieceTrainer(
        vocab_size=300, show_progress=False, special_tokens=["<unk>", "<|endoftext|>"]))
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    write_json(directory / "config.json", dict(model_type="phi3"))
    write_json(directory / "tokenizer_config.json", dict(eos_token="<|endoftext|>"))


DIRECTORIES = {
    "Microsoft's": write_microsoft,
    "Microsoft's, start token": lambda path: write_microsoft(path, start=True),
    "Microsoft's, other flags": write_corrected_flags,
    "Microsoft's, older": write_older_settings,
    "Microsoft's, limits": write_limits,
    # as `AutoTokenizer.from_pretrained(directory).save_pretrained(path)` writes them
    "transformers 5's": lambda path: save_again(path, write_microsoft(sibling(path), start=True)),
    "transformers 5's, of a model": lambda path: save_again(path, write_model(sibling(path))),
    "transformers 5's, legacy": lambda path: save_again(
        path, write_model(sibling(path)), legacy=True),
    "transformers 5's, normalizing": lambda path: save_again(path, write_model(
        sibling(path), train(normalization_rule_name="nmt_nfkc"), add_bos_token=True)),
    "transformers 5's, bytes": lambda path: save_again(path, write_bytes(sibling(path))),
    "json": write_alone,
    "json, first": lambda path: write_alone(path, **metaspace("first")),
    "json, always": lambda path: write_alone(path, **metaspace("always")),
    "json, never": lambda path: write_alone(path, **metaspace("never")),
    "json, no decoder": lambda path: write_alone(path, decoder=None),
    "bytes": write_bytes,
    "bytes, start token": lambda path: write_bytes(path, start=True),
    "bytes, split": lambda path: write_bytes(
        path, split_special_tokens=True,
        mask_token=flags("<tag>", special=False, __type="AddedToken")),
    "word pieces": write_word_pieces,
}
FAITHFUL = [kind for kind in DIRECTORIES  # of which text comes back
            if "normalizing" not in kind and kind not in ("json, no decoder", "word pieces")]


def sibling(path):
    return path.with_name("original")


def read_directory(kind, directory):
    """Write a Hugging Face directory; return transformers' tokenizer, and our preprocessor."""
    DIRECTORIES[kind](directory)
    return types.SimpleNamespace(
        kind=kind, directory=directory,
        theirs=transformers.AutoTokenizer.from_pretrained(directory),
        ours=phi3_ref.Phi3CausalLMPreprocessor.from_preset(directory),
    )


@pytest.fixture(scope="module", params=DIRECTORIES)
def huggingface(request, tmp_path_factory):
    return read_directory(request.param, tmp_path_factory.mktemp("huggingface") / "directory")


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
    pieces = list(tokenizer.pieces.values())
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
@example(token_ids=[KERAS.token_to_id("x"), 1, KERAS.token_to_id("▁the")])  # 1: without a text
def test_keras_text(keras, token_ids):
    """Any ids, broken characters among them, become the text KerasHub makes of them."""
    text = keras.ours.detokenize(token_ids)
    assert text == keras.theirs.detokenize(token_ids)
    check_stream(keras.ours, token_ids)
    assert keras.ours.detokenize(np.array([token_ids, token_ids], "int32")) == [text, text]


@settings(max_examples=examples(80))
@given(text=TEXTS)
@example(text="")
@example(text=" <|user|>\n \nHi  <|end|>\n<|assistant|>")
@example(text="x<tag>y <tag> \nz  <left>")
@example(text="<s> <|endoftext|>x")
@example(text="<|endoftext|>x")
def test_huggingface_ids(huggingface, text):
    """A Hugging Face directory tokenizes as transformers does, with and without start token."""
    expected = huggingface.theirs(text, add_special_tokens=False)["input_ids"]
    assert huggingface.ours.tokenizer(text) == expected
    with_start = huggingface.theirs(text)["input_ids"]
    if huggingface.ours.add_start_token and expected[:1] == with_start[:1]:
        # Theirs has two start tokens now, as no chat that they tokenize has; ours has one.
        assert with_start[0] == with_start[1], seen_with("transformers", "5.24.0")
        with_start = with_start[1:]
    prompt = huggingface.ours.generate_preprocess(text, len(with_start) + 1)
    assert prompt["token_ids"][prompt["padding_mask"]].tolist() == with_start


@settings(max_examples=examples(60))
@given(token_ids=st.lists(st.integers(0, 530) | st.integers(3, 258), max_size=12))
@example(token_ids=[])
@example(token_ids=[3 + 0xF0, 530, 3 + 0x9F, 3 + 0xA4, 3 + 0x96])
@example(token_ids=[3 + 0x20, 3 + 0x41, 3 + 0xFF, 511])
def test_huggingface_text(huggingface, token_ids):
    """Any ids, unknown ones among them, become the text transformers decodes them to."""
    text = huggingface.ours.tokenizer.detokenize(token_ids)
    assert text == huggingface.theirs.decode(mended(huggingface.theirs, token_ids))
    check_stream(huggingface.ours.tokenizer, token_ids)


def mended(tokenizer, token_ids):
    """The ids, "�" spelt out for each byte of no character: so a bad byte spoils no good one."""
    if tokenizer.decode([3 + 0x41]) != "A":  # no bytes
        return token_ids
    left, result = [i for i in token_ids if i < len(tokenizer)], []
    while left:
        run = bytes(i - 3 for i in itertools.takewhile(range(3, 259).__contains__, left[:4]))
        for length in range(1, len(run) + 1):
            try:
                run[:length].decode()
                break
            except UnicodeDecodeError:
                pass
        else:
            length = 0
        result += left[:length] or ([3 + byte for byte in "�".encode()] if run else left[:1])
        del left[: length or 1]
    return result


def test_a_bad_byte_spoils_no_character(tmp_path):
    """As in KerasHub. In transformers it spoils its run of bytes: none is certain till its end."""
    theirs = transformers.AutoTokenizer.from_pretrained(write_microsoft(tmp_path))
    token_ids = [3 + byte for byte in "🤖A".encode() + b"\xff\xe6\xb1"]
    expected = keras_hub.models.Phi3Tokenizer(KERAS.proto).detokenize(token_ids)
    ours = phi3_ref.Phi3Tokenizer.from_preset(tmp_path)
    assert ours.detokenize(token_ids) == KERAS.detokenize(token_ids) == expected == "🤖A���"
    assert theirs.decode(token_ids) == "�" * 8, seen_with("tokenizers", "0.23.3")
    assert theirs.decode(token_ids[5:]) == ours.detokenize(token_ids[5:]) == "���"


@settings(max_examples=examples(40))
@given(text=TEXTS)
def test_huggingface_text_of_a_text(huggingface, text):
    """So do the ids of a text, in which characters are whole more often than not."""
    token_ids = huggingface.theirs(text)["input_ids"]
    assert huggingface.ours.tokenizer.detokenize(token_ids) == huggingface.theirs.decode(token_ids)
    check_stream(huggingface.ours.tokenizer, token_ids)


def test_huggingface_special_tokens(huggingface):
    """Start, end, padding and the unknown are those of transformers, and so are all tokens."""
    ours, theirs = huggingface.ours.tokenizer, huggingface.theirs
    if huggingface.ours.add_start_token:  # what is added counts, whatever has the name
        assert ours.start_token_id == theirs("a")["input_ids"][0]
    else:
        assert ours.start_token_id == theirs.bos_token_id
    assert ours.end_token_id == theirs.eos_token_id
    assert ours.pad_token_id == (theirs.pad_token_id or 0)
    assert ours.token_to_id("no such") == theirs.unk_token_id
    assert ours.vocabulary_size() == len(theirs) and ours.ids == theirs.get_vocab()
    for token, token_id in ours.ids.items():
        assert ours.id_to_token(token_id) == token and ours.token_to_id(token) == token_id


def test_the_forms_differ(tmp_path):
    """What the directories are here for: ids of one text, by the form of its tokenizer.json."""
    text, ids = "The fox<|end|>\n a", {}
    for number, kind in enumerate(DIRECTORIES):
        ids[kind] = tuple(read_directory(kind, tmp_path / f"{number}" / "x").ours.tokenizer(text))
    assert len(set(ids.values())) == 7
    for kind in ("transformers 5's", "transformers 5's, legacy", "Microsoft's, limits"):
        assert ids[kind] == ids["Microsoft's"]
    assert ids["transformers 5's, bytes"] == ids["bytes"] != ids["bytes, split"]


def test_an_end_token_is_no_start_token(tmp_path):
    """A post-processor that only appends a token adds no start token."""
    tokenizer = transformers.LlamaTokenizer.from_pretrained(write_model(tmp_path))
    tokenizer.add_eos_token = True
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)("a")["input_ids"][0] != 1
    assert phi3_ref.Phi3CausalLMPreprocessor.from_preset(tmp_path).add_start_token is False


def test_tokens_that_are_not_there(tmp_path):
    """Settings that name no start and no end token: none is added, none ends an answer."""
    write_alone(tmp_path / "preset")
    tokenizer = phi3_ref.Phi3Tokenizer.from_preset(tmp_path / "preset")
    assert isinstance(tokenizer, phi3_ref.Phi3Tokenizer)
    assert tokenizer.start_token_id is tokenizer.end_token_id is None
    assert tokenizer.special_token_ids == [] and tokenizer.pad_token_id == 0
    preprocessor = phi3_ref.Phi3CausalLMPreprocessor(tokenizer, 8, add_end_token=False)
    assert preprocessor.add_start_token is False
    prompt = preprocessor.generate_preprocess("The fox")
    assert prompt["token_ids"][prompt["padding_mask"]].tolist() == tokenizer("The fox")
    assert preprocessor.generate_postprocess(prompt) == "The fox"
    with pytest.raises(ValueError, match="has no end token"):
        phi3_ref.Phi3CausalLMPreprocessor(tokenizer)


@pytest.mark.parametrize("kind, expected", [
    ("Microsoft's", ["<|endoftext|>", "<|end|>"]), ("json", ["<|endoftext|>", "<|end|>"]),
    ("bytes", ["<|im_end|>", "<|endoftext|>", "<|end|>"]), ("word pieces", ["<|endoftext|>"]),
])
def test_what_ends_an_answer(kind, expected, tmp_path):
    """The tokenizer's own end token, beside Phi-3's where it has them."""
    preprocessor = read_directory(kind, tmp_path / "preset").ours
    size = preprocessor.tokenizer.vocabulary_size()
    backbone = phi3_ref.Phi3Backbone(size, 1, 8, 8, 2, 1, max_sequence_length=16)
    stops = phi3_ref.Phi3CausalLM(backbone, preprocessor).resolve_stop_tokens("auto")
    assert [preprocessor.tokenizer.id_to_token(token_id) for token_id in stops] == expected


def test_a_tokenizer_model_alone(tmp_path):
    """It is refused with what to do, and doing that gives the ids of Microsoft's tokenizer.json."""
    write_model(tmp_path)
    for read in (phi3_ref.Phi3Tokenizer, phi3_ref.Phi3CausalLMPreprocessor, phi3_ref.Phi3CausalLM):
        with pytest.raises(ValueError, match=re.escape(str(tmp_path))) as error:
            read.from_preset(tmp_path)
    call = "AutoTokenizer.from_pretrained(directory, legacy=True).save_pretrained(directory)"
    assert call in str(error.value)
    eval("transformers." + call, dict(transformers=transformers, directory=tmp_path))
    ours = phi3_ref.Phi3Tokenizer.from_preset(tmp_path)
    microsoft = transformers.AutoTokenizer.from_pretrained(write_microsoft(tmp_path / "microsoft"))

    @settings(max_examples=examples(100))
    @given(text=TEXTS)
    @example(text="<|user|>\nThe quick fox?<|end|>\n<|assistant|>\n")
    @example(text=" ▁ x")
    def check(text):
        assert ours(text) == microsoft(text)["input_ids"]

    check()


# A first space could be the prefix; added tokens take spaces away; "▁" comes back as a space.
PLAIN_TEXTS = TEXTS.map(lambda text: "x" + re.sub("[<▁]", "", text))


@pytest.mark.parametrize("huggingface", FAITHFUL, indirect=True)
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


def check_stream(tokenizer, token_ids):
    """The stream shows at every moment all of the text that no later token can change."""
    shown, whole = pieces_per_token(tokenizer, token_ids)
    assert whole == tokenizer.detokenize(token_ids)
    for count, seen in enumerate(shown):
        text = tokenizer.detokenize(token_ids[: count + 1])
        certain = text.rstrip("�")  # which can be the beginning of a character
        assert whole.startswith(seen) and seen == certain


def test_a_stream_never_shows_half_a_character(huggingface):
    """Every moment's text is a beginning of the whole, and at most a character behind."""
    text = "The 🤖 of 汉 says é: 👩\u200d🚀 go <|user|> a"
    for tokenizer in (KERAS, huggingface.ours.tokenizer):
        token_ids = tokenizer(text)
        check_stream(tokenizer, token_ids)
        assert not any("�" in seen for seen in pieces_per_token(tokenizer, token_ids)[0])


def test_a_stream_needs_no_end(huggingface):
    """It decodes what is new, however long the text: an endless one can be watched."""
    for tokenizer in (KERAS, huggingface.ours.tokenizer):
        token_ids = tokenizer(" aé lazy dog")
        stream = tokenizer.detokenize_stream(itertools.cycle(token_ids))
        text = "".join(itertools.islice(stream, 10_000))
        assert len(text) >= 10_000 and text.startswith(tokenizer.detokenize(token_ids * 3))


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
    return transformers.LlamaTokenizer.from_pretrained(write_model(directory))


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


@pytest.mark.filterwarnings("ignore:`max_length`")  # of what is cut, as it is here
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
@pytest.mark.parametrize("kind", [
    kind for kind in DIRECTORIES if kind.startswith(("Micro", "transf")) and "bytes" not in kind])
def test_keras_loads_a_huggingface_tokenizer(kind, tmp_path):
    """Saved, its tokens keep their ids, and KerasHub tokenizes what is plain text as before."""
    huggingface = read_directory(kind, tmp_path / "directory")
    if kind.startswith("transformers"):  # which does not write it
        model = (sibling(huggingface.directory) / "tokenizer.model").read_bytes()
        (huggingface.directory / "tokenizer.model").write_bytes(model)
    huggingface.ours.save_to_preset(tmp_path / "keras")
    write_keras_config(tmp_path / "keras")
    theirs = keras_hub.models.Phi3CausalLMPreprocessor.from_preset(str(tmp_path / "keras"))
    again = phi3_ref.Phi3CausalLMPreprocessor.from_preset(tmp_path / "keras")
    assert theirs.tokenizer.get_vocabulary() == list(again.tokenizer.pieces.values())
    assert again.tokenizer.ids == huggingface.theirs.get_vocab()
    assert theirs.add_start_token == again.add_start_token == huggingface.ours.add_start_token
    assert list(theirs.tokenizer(TEXT)) == again.tokenizer(TEXT)
    plain = "The quick fox: 🤖汉 and 12345 pieces"
    assert again.tokenizer(plain) == huggingface.ours.tokenizer(plain)
    if kind in ("Microsoft's", "transformers 5's"):  # what KerasHub's own converter makes
        assert again.tokenizer.proto == KERAS.proto


def spoil_model(change):
    """A change of a directory: its SentencePiece model, after `change(model)`."""
    def spoil(path):
        model = ModelProto.FromString((path / "tokenizer.model").read_bytes())
        change(model)
        (path / "tokenizer.model").write_bytes(model.SerializeToString())
    return spoil


@pytest.mark.parametrize("write, spoil, message", [
    (write_microsoft, lambda path: (path / "tokenizer.model").unlink(),
     "Put the tokenizer.model that it was made from beside it"),
    (write_bytes, lambda path: None, "Put the tokenizer.model that it was made from beside it"),
    (write_bytes, lambda path: (path / "tokenizer.model").write_bytes(LLAMA),
     "tokenizer.model has no place for the token '!' at 0"),
    (write_microsoft, spoil_model(lambda model: model.pieces.pop()),
     "tokenizer.model has no place for the token .* at 499"),
    (write_microsoft, spoil_model(lambda model: model.pieces.add(piece="x", type=1)),
     "tokenizer.model has no place for the token '<|endoftext|>' at 500"),
    (write_microsoft, spoil_model(lambda model: setattr(model.pieces[300], "piece", "other")),
     "tokenizer.model has no place for the token .* at 300"),
    (write_microsoft, lambda path: (path / "tokenizer.model").write_bytes(b"no model"),
     "tokenizer.model is malformed"),
    (write_microsoft, lambda path: os.truncate(path / "tokenizer.model", 2**26),
     "tokenizer.model has 67,108,864 bytes"),
])
def test_what_keras_cannot_express(write, spoil, message, tmp_path):
    """Saving without the model that tokenizer.json was made from is an error that asks for it."""
    write(tmp_path / "preset")
    spoil(tmp_path / "preset")
    preprocessor = phi3_ref.Phi3CausalLMPreprocessor.from_preset(tmp_path / "preset")
    backbone = phi3_ref.Phi3Backbone(514, 1, 8, 8, 2, 1)
    for part in (preprocessor, preprocessor.tokenizer,
                 phi3_ref.Phi3CausalLM(backbone, preprocessor)):
        with pytest.raises(ValueError, match=f"preset/.*{message}"):
            part.save_to_preset(tmp_path / "keras")
    assert [path.name for path in tmp_path.iterdir()] == ["preset"]


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


@pytest.mark.parametrize("write", [
    lambda path: (path.mkdir(), write_json(path / "config.json", dict(model_type="phi3"))),
    lambda path: (path.mkdir(), write_keras_config(path)),
])
def test_no_tokenizer(write, tmp_path):
    """No files: no preprocessor, and an error for who insists on one."""
    write(tmp_path / "preset")
    assert phi3_ref.Phi3CausalLMPreprocessor.from_preset(tmp_path / "preset") is None
    with pytest.raises(ValueError, match="preset' has no tokenizer"):
        phi3_ref.Phi3Tokenizer.from_preset(tmp_path / "preset")


def update(name, **changes):
    """A change of a directory: replace entries of a JSON file."""
    return lambda path: edit_json(path / name, lambda content: content.update(changes))


def spoil_token(**changes):
    """A change of a directory: the flags of an added token in tokenizer_config.json."""
    return lambda path: edit_json(path / "tokenizer_config.json", lambda content: (
        content["added_tokens_decoder"]["510"].update(changes)))


CHARSMAP = dict(type="Precompiled", precompiled_charsmap="")
TEMPLATE = dict(  # of a token with an id that nobody has: the library panics when it encodes
    type="TemplateProcessing", single=[{"SpecialToken": {"id": "<s>", "type_id": 0}}] * 2 + [
        {"Sequence": {"id": "A", "type_id": 0}}], pair=[{"Sequence": {"id": "A", "type_id": 0}}],
    special_tokens={"<s>": dict(id="<s>", ids=[1], tokens=["<s>"])})


@pytest.mark.parametrize("spoil, message", [
    (update("tokenizer.json", normalizer={"type": "Uppercase"}), "tokenizer.json is malformed"),
    (update("tokenizer.json", normalizer=CHARSMAP), "tokenizer.json is malformed: PanicException"),
    (update("tokenizer.json", pre_tokenizer=dict(type="FixedLength", length=0)),
     "tokenizer.json is malformed: PanicException"),
    (update("tokenizer.json", post_processor=TEMPLATE), "puts more than one token before a text"),
    (update("tokenizer.json", added_tokens=None), "tokenizer.json is malformed"),
    (update("tokenizer.json", model={
        "type": "WordLevel", "vocab": {"x": 0}, "unk_token": "y"}), "Missing [UNK] token"),
    (lambda path: edit_json(
        path / "tokenizer.json", lambda content: content["model"].pop("merges")), "malformed"),
    (lambda path: edit_json(
        path / "tokenizer.json", lambda content: content["model"]["vocab"].pop("a")),
     "Token `a` out of vocabulary"),
    (lambda path: edit_json(
        path / "tokenizer.json", lambda content: content["model"]["vocab"].update(x9=400)),
     "tokenizer.json gives two tokens one id"),
    (lambda path: (path / "tokenizer.json").write_text("[]"), "tokenizer.json is malformed"),
    (lambda path: (path / "tokenizer.json").write_text("{"), "tokenizer.json is malformed"),
    (lambda path: (path / "tokenizer.json").write_text(""), "tokenizer.json is malformed"),
    (lambda path: (path / "tokenizer.json").write_text('{"a":' * 10**5), "malformed"),
    (lambda path: (path / "tokenizer.json").write_bytes(b"\xff\xfe{}"), "malformed"),
    (lambda path: os.truncate(path / "tokenizer.json", 2**26), "67,108,864 bytes"),
    (spoil_token(lstrip=None), "tokenizer_config.json"),
    (spoil_token(content=5), "tokenizer_config.json"),
    (update("tokenizer_config.json", added_tokens_decoder={"x": flags("x")}),
     "tokenizer_config.json"),
    (update("tokenizer_config.json", added_tokens_decoder=[]), "tokenizer_config.json"),
    (update("tokenizer_config.json", bos_token=5), "tokenizer_config.json"),
    (update("tokenizer_config.json", eos_token={"text": "x"}), "tokenizer_config.json"),
    (update("tokenizer_config.json", extra_special_tokens=5), "tokenizer_config.json"),
    (update("tokenizer_config.json", split_special_tokens="no"), "tokenizer_config.json"),
    (lambda path: (path / "tokenizer_config.json").write_text("[]"), "tokenizer_config.json"),
    (lambda path: (write_json(path / "tokenizer_config.json", {}),
                   write_json(path / "special_tokens_map.json", [])), "special_tokens_map.json"),
])
def test_malformed_huggingface_files(spoil, message, tmp_path):
    """Files that cannot be right are an error that names them and what is wrong."""
    write_microsoft(tmp_path / "preset")
    spoil(tmp_path / "preset")
    with pytest.raises(ValueError, match=f"preset/.*{re.escape(message)}"):
        phi3_ref.Phi3Tokenizer.from_preset(tmp_path / "preset")


def test_what_only_a_text_shows_to_be_malformed(tmp_path):
    """Where the library fails later, on some texts, the file is named then."""
    write_word_pieces(tmp_path)
    edit_json(tmp_path / "tokenizer.json", lambda content: content.update(
        added_tokens=[], model=content["model"] | dict(unk_token="<no>")))
    tokenizer = phi3_ref.Phi3Tokenizer.from_preset(tmp_path)
    assert tokenizer("The fox") == transformers.AutoTokenizer.from_pretrained(tmp_path)(
        "The fox")["input_ids"]
    with pytest.raises(ValueError, match=r"tokenizer\.json is malformed: .*UNK"):
        tokenizer("🤖")


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError, OSError])
def test_what_is_not_the_files_fault(error, monkeypatch, tmp_path):
    """An interruption, say, is not taken for a panic of the library."""
    tokenizer = phi3_ref.Phi3Tokenizer.from_preset(write_bytes(tmp_path))

    class Interrupted:
        def encode(self, *args, **kwargs):
            raise error

    monkeypatch.setattr(tokenizer, "tokenizer", Interrupted())
    with pytest.raises(error):
        tokenizer("a")


def test_spaces_around_punctuation(tmp_path):
    """Where transformers mends them, it is refused; for a BPE the setting does nothing."""
    for write, name in ((write_bytes, "bytes"), (write_word_pieces, "words")):
        write(tmp_path / name)
        update("tokenizer_config.json", clean_up_tokenization_spaces=True)(tmp_path / name)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "bytes")
    token_ids = theirs("a . b , c")["input_ids"]
    ours = phi3_ref.Phi3Tokenizer.from_preset(tmp_path / "bytes")
    assert ours.detokenize(token_ids) == theirs.decode(token_ids) == "a . b , c"
    with pytest.raises(ValueError, match=r"words/tokenizer_config\.json: .* must be false"):
        phi3_ref.Phi3Tokenizer.from_preset(tmp_path / "words")


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


def test_bad_arguments(tmp_path):
    """What is no text, no token id, no length is an error."""
    for text in (None, 5, ["a", 5], [["a"]], b"a"):
        with pytest.raises(ValueError, match="`text`"):
            KERAS(text)
        with pytest.raises(ValueError, match="`text`"):
            phi3_ref.Phi3CausalLMPreprocessor(KERAS)(text)
    for tokenizer in (KERAS, phi3_ref.Phi3Tokenizer.from_preset(write_bytes(tmp_path))):
        for text in ("\ud800", ["a", "a\udcffb"]):  # halves of surrogate pairs
            with pytest.raises(ValueError, match="surrogates not allowed"):
                tokenizer(text)
    for token_id in (-1, 511):
        with pytest.raises(ValueError, match=str(token_id)):
            KERAS.id_to_token(token_id)
    for length in (0, -1, 1.5, "8", None):
        with pytest.raises(ValueError, match="sequence_length"):
            phi3_ref.Phi3CausalLMPreprocessor(KERAS, sequence_length=length)


def test_a_truncation_that_cannot_be_is_refused_as_by_transformers(tmp_path):
    """Truncation is switched off, but a tokenizer.json with an impossible one is not whole."""
    write_microsoft(tmp_path)
    impossible = dict(max_length=0, stride=5, strategy="LongestFirst", direction="Right")
    edit_json(tmp_path / "tokenizer.json", lambda content: content.update(truncation=impossible))
    with pytest.raises(ValueError, match="stride"):
        transformers.AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer\.json is malformed.*stride"):
        phi3_ref.Phi3Tokenizer.from_preset(tmp_path)
