"""What `export_to_transformers` writes: the same model and tokenizer, for transformers and for us.

The models come from transformers and from KerasHub, the vocabularies from test_tokenizer.py.
"""

import json
import random
import re
import tracemalloc

import numpy as np
import pytest
import references
import safetensors
import torch
import transformers
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from references import examples
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from test_tokenizer import (
    DIRECTORIES,
    KERAS,
    LLAMA,
    MESSAGES,
    SPECIAL,
    TEXTS,
    keras_vocabulary,
    read_directory,
    train,
    write_json,
    write_microsoft,
)

import phi3_ref

EMBEDDED = "phi3_tiny_puzzles_en"
FACTORS = dict(short_factor=[1.1, 1.2, 1.3], long_factor=[2.0, 4.0, 8.0], rope_theta=10000.0)
MODELS = {  # what each says beside `TINY_HUGGINGFACE`
    "plain": {},
    "tied": dict(tie_word_embeddings=True),
    "window": dict(sliding_window=3),
    "GQA": dict(num_key_value_heads=2),
    "partial rotary": dict(rope_parameters=dict(
        rope_type="default", rope_theta=500.0, partial_rotary_factor=0.5), hidden_size=32),
    "head_dim": dict(head_dim=10),
    "longrope": dict(original_max_position_embeddings=8, rope_parameters=dict(
        FACTORS, rope_type="longrope")),
    "longrope, attention factor": dict(original_max_position_embeddings=8, rope_parameters=dict(
        FACTORS, rope_type="longrope", attention_factor=1.75)),
    "longrope, factor": dict(original_max_position_embeddings=8, rope_parameters=dict(
        FACTORS, rope_type="longrope", factor=3.0)),
    "longrope, partial rotary, tied": dict(
        original_max_position_embeddings=8, tie_word_embeddings=True, hidden_size=48,
        rope_parameters=dict(FACTORS, rope_type="longrope", partial_rotary_factor=0.5)),
}


def loaded(model_class, directory, **settings):
    """What transformers loads, of which every weight must be in the files."""
    model, info = model_class.from_pretrained(
        directory, attn_implementation="eager", output_loading_info=True, **settings)
    assert not info["missing_keys"] and not info["mismatched_keys"], info
    return model.eval(), set(info["unexpected_keys"])


def check_same_model(ours, theirs):
    """Two backbones of ours: settings and weights are equal, bit for bit."""
    assert ours.config == theirs.config
    for one, other in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


# Models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", MODELS)
def test_transformers_gets_its_own_model_back(kind, dtype, tmp_path):
    """Of a model that transformers made: every weight and setting, and so the same logits."""
    references.write_huggingface(
        references.transformers_model(MODELS[kind], dtype), tmp_path / "original")
    model = references.read_huggingface(tmp_path / "original", dtype)
    ours = phi3_ref.Phi3CausalLM.from_preset(tmp_path / "original", dtype=dtype)
    ours.export_to_transformers(tmp_path / "exported")
    again, unexpected = loaded(transformers.AutoModelForCausalLM, tmp_path / "exported")
    assert isinstance(again, transformers.Phi3ForCausalLM) and not unexpected
    assert again.dtype == model.dtype
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
    for length in (8, 12):  # up to longrope's boundary, and beyond it
        token_ids = np.random.default_rng(length).integers(0, 61, (2, length))
        logits = references.transformers_logits(again, token_ids)
        np.testing.assert_array_equal(logits, references.transformers_logits(model, token_ids))
        error = references.relative_error(ours({"token_ids": token_ids}), logits)
        assert error <= references.TOLERANCE[dtype]
    check_same_model(
        phi3_ref.Phi3Backbone.from_preset(tmp_path / "exported", dtype=dtype), ours.backbone)


@pytest.mark.parametrize("seed", range(5))
def test_transformers_computes_what_keras_does(seed, tmp_path):
    """KerasHub's models, su scaling among them, are the same in transformers."""
    config, inputs = references.random_case(random.Random(seed).choice, full_mask=True)
    model = references.keras_backbone(config, seed=seed)
    references.ours_like(model).export_to_transformers(tmp_path / "exported")
    theirs, unexpected = loaded(transformers.AutoModel, tmp_path / "exported")
    assert isinstance(theirs, transformers.Phi3Model) and unexpected == {"lm_head.weight"}
    with torch.no_grad():
        hidden = theirs(input_ids=torch.from_numpy(inputs["token_ids"]).long()).last_hidden_state
    error = references.relative_error(hidden, references.keras_output(model, inputs))
    assert error <= references.TOLERANCE["float32"]


def test_dropout_is_in_the_same_places(tmp_path):
    """Keras drops after attention and after both blocks: transformers' two settings."""
    backbone = phi3_ref.Phi3Backbone(61, 1, 24, 40, 4, 2, dropout=0.25)
    backbone.export_to_transformers(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.attention_dropout == config.resid_pdrop == 0.25
    assert phi3_ref.Phi3Backbone.from_preset(tmp_path).dropout == 0.25


@pytest.mark.parametrize("policy", phi3_ref.DTYPE_POLICIES)
def test_every_policy_is_exported_as_its_weights_are(policy, tmp_path):
    """NumPy's numbers in the settings do no harm."""
    backbone = phi3_ref.Phi3Backbone(
        np.int64(61), 1, 24, 40, 4, 2, layer_norm_epsilon=np.float32(1e-5), dtype=policy, seed=0)
    backbone.export_to_transformers(tmp_path)
    theirs, _ = loaded(transformers.AutoModel, tmp_path)
    assert str(theirs.dtype) == f"torch.{backbone.weight_dtype}"
    check_same_model(phi3_ref.Phi3Backbone.from_preset(tmp_path, dtype=policy), backbone)


# Files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-5, 2e-9])
def test_shards(size, tmp_path):
    """Weights of more than `max_shard_size` GB are split as transformers splits them."""
    model = references.transformers_model({})
    references.write_huggingface(model, tmp_path / "theirs", max_shard_size=int(size * 2**30))
    ours = phi3_ref.Phi3CausalLM.from_preset(tmp_path / "theirs")
    ours.export_to_transformers(tmp_path / "ours", max_shard_size=size)
    files = [[(path.name, *sorted(safetensors.safe_open(path, "numpy").keys()))
              for path in sorted((tmp_path / name).glob("*.safetensors"))]
             for name in ("ours", "theirs")]
    assert len(files[0]) > 1 and len(files[0]) == len(files[1])
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for file, *names in files[0] for name in names}
    assert index["metadata"]["total_size"] == 4 * ours.backbone.count_params()
    for path in (tmp_path / "ours").glob("*.safetensors"):
        header = int.from_bytes(path.read_bytes()[:8], "little")
        assert header % 8 == 0  # so that arrays can be mapped
        if size == 1e-5:
            assert path.stat().st_size - 8 - header <= size * 2**30
    again, unexpected = loaded(transformers.AutoModelForCausalLM, tmp_path / "ours")
    assert not unexpected
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])
    check_same_model(phi3_ref.Phi3Backbone.from_preset(tmp_path / "ours"), ours.backbone)


def test_weights_are_streamed(tmp_path):
    """Nothing is copied: a model of 8 MB is written with less than 1 MB, its progress bar's."""
    backbone = phi3_ref.Phi3Backbone(4000, 2, 256, 256, 4, 2, dtype="bfloat16", seed=0)
    assert 2 * backbone.count_params() > 5e6
    backbone.export_to_transformers(tmp_path / "first")  # what is imported is not counted
    tracemalloc.start()
    backbone.export_to_transformers(tmp_path / "exported")
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def test_other_weights_in_the_directory(tmp_path):
    """Files that would be read instead of the new ones are refused, and nothing has changed."""
    backbone = phi3_ref.Phi3Backbone(61, 1, 24, 40, 4, 2, seed=0)
    backbone.export_to_transformers(tmp_path)
    backbone.export_to_transformers(str(tmp_path), max_shard_size=None)  # again, over itself
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"holds other weights.*'model.safetensors'"):
        backbone.export_to_transformers(tmp_path, max_shard_size=1e-6)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


@pytest.mark.parametrize("size", [0, -1, "10GB", True, float("nan")])
def test_a_bad_shard_size(size, tmp_path):
    """`max_shard_size` is a number of GB, as KerasHub's."""
    backbone = phi3_ref.Phi3Backbone(61, 1, 24, 40, 4, 2, seed=0)
    with pytest.raises(ValueError, match="max_shard_size"):
        backbone.export_to_transformers(tmp_path / "new", max_shard_size=size)
    assert not list(tmp_path.iterdir())


# Tokenizers of Keras presets ---------------------------------------------------------------------

VOCABULARIES = {
    "BPE": lambda: keras_vocabulary(LLAMA),
    "BPE, fewer special tokens": lambda: keras_vocabulary(LLAMA, SPECIAL[:2]),
    "characters": lambda: phi3_ref.Phi3Tokenizer.from_preset(EMBEDDED).proto,
}


@pytest.fixture(scope="module", params=[(kind, start) for kind in VOCABULARIES
                                        for start in (True, False)], ids=str)
def exported(request, tmp_path_factory):
    """Our tokenizer, transformers' of the exported files, ours of them, and the start tokens."""
    kind, start = request.param
    directory = tmp_path_factory.mktemp("exported")
    ours = phi3_ref.Phi3Tokenizer(VOCABULARIES[kind]())
    ours.export_to_transformers(directory, add_start_token=start)
    write_json(directory / "config.json", dict(model_type="phi3"))
    again = phi3_ref.Phi3CausalLMPreprocessor.from_preset(directory)
    assert again.add_start_token is start
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    return ours, theirs, again.tokenizer, [ours.start_token_id] if start else []


@settings(max_examples=examples(100))
@given(text=TEXTS)
@example(text="")
@example(text=" ")
@example(text=" <|user|>")
@example(text=" <|user|>\n \nHi  <|end|>\n<|assistant|>")
@example(text="<|user|><|user|>")
@example(text="<|user|><0x41><|end|>The quick<0x0A>")
@example(text="<|endoftext|>a<|endoftext|> b")
@example(text="▁▁a ▁b")
def test_ids_and_texts(exported, text):
    """The ids of any text, and its text again, are those of our tokenizer in transformers."""
    ours, theirs, again, start = exported
    ids = ours(text)
    # see `test_texts_that_differ`
    assume(not re.search("<s>|</s>|<unk>", text) and ids not in ours(SPECIAL))
    assert theirs(text, add_special_tokens=False)["input_ids"] == ids
    assert theirs(text)["input_ids"] == start + ids
    assert again(text) == ids
    if ours.unknown_token_id not in ids:
        assert theirs.decode(ids) == ours.detokenize(ids)


@settings(max_examples=examples(40))
@given(messages=MESSAGES, prompt=st.booleans())
def test_chats(exported, messages, prompt):
    """The chat template gives our text, and the ids that our model answers to."""
    ours, theirs, _, start = exported
    assume(not re.search("<s>|</s>|<unk>", str(messages)))
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    expected = ours.apply_chat_template(messages, add_generation_prompt=prompt)
    assert text == (phi3_ref.START_TOKEN if start else "") + expected
    ids = theirs.apply_chat_template(messages, add_generation_prompt=prompt)["input_ids"]
    assert ids == start + ours(expected)


def test_special_tokens(exported):
    """Their ids, names and roles; an answer is decoded without them."""
    ours, theirs, again, _ = exported
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id, theirs.pad_token_id) == (
        ours.start_token_id, ours.end_token_id, ours.unknown_token_id, ours.pad_token_id)
    assert theirs.get_vocab() == again.ids == ours.ids
    assert theirs.model_input_names == ["input_ids", "attention_mask"]  # as the model's arguments
    for name in ("start_token_id", "end_token_id", "unknown_token_id", "pad_token_id"):
        assert getattr(again, name) == getattr(ours, name)
    for token in ("<s>", "</s>", "<unk>", *SPECIAL):
        ids = [ours.start_token_id, *ours("a"), ours.token_to_id(token)]
        assert theirs.decode(ids, skip_special_tokens=True) == "a"


def test_texts_that_differ(exported):
    """Every Hugging Face tokenizer takes "<s>" in a text for the token; and a token alone."""
    ours, theirs, again, _ = exported
    for tokenizer in (lambda text: theirs(text, add_special_tokens=False)["input_ids"], again):
        assert tokenizer("a<s>b") == [*ours("a"), ours.start_token_id, *ours("b")] != ours("a<s>b")
        assert tokenizer("<|endoftext|>") == ours("<|endoftext|>")[-1:]


def test_an_exported_tokenizer_is_saved_for_keras_again(tmp_path):
    """tokenizer.model is the vocabulary, with all of its pieces: llama.cpp's converter reads it."""
    KERAS.export_to_transformers(tmp_path)
    write_json(tmp_path / "config.json", dict(model_type="phi3"))
    assert (tmp_path / "tokenizer.model").read_bytes() == KERAS.proto
    pieces = ModelProto.FromString(phi3_ref.Phi3Tokenizer.from_preset(tmp_path).proto).pieces
    assert list(pieces) == list(ModelProto.FromString(KERAS.proto).pieces)


@pytest.mark.parametrize("change", [
    dict(model_type=1), dict(treat_whitespace_as_suffix=True), dict(add_dummy_prefix=False),
    dict(remove_extra_whitespaces=True), dict(escape_whitespaces=False), "nmt_nfkc"], ids=str)
def test_a_vocabulary_of_another_kind(change, tmp_path):
    """What cannot be converted exactly is refused, before anything is written."""
    proto = ModelProto.FromString(KERAS.proto)
    if isinstance(change, str):  # a table of characters, of which `tokenizers` makes another use
        name, other = "precompiled_charsmap", train(normalization_rule_name=change)
        value = ModelProto.FromString(other).normalizer_spec.precompiled_charsmap
        proto.normalizer_spec.precompiled_charsmap = value
    else:
        (name, value), = change.items()
        spec = proto.trainer_spec if hasattr(proto.trainer_spec, name) else proto.normalizer_spec
        setattr(spec, name, value)
    causal_lm = phi3_ref.Phi3CausalLM(
        phi3_ref.Phi3Backbone(511, 1, 8, 8, 2, 1, seed=0),
        phi3_ref.Phi3CausalLMPreprocessor(phi3_ref.Phi3Tokenizer(proto.SerializeToString())))
    with pytest.raises(ValueError, match=rf"of Phi-3's kind .* another \['{name}'\]"):
        causal_lm.export_to_transformers(tmp_path / "new")
    assert not list(tmp_path.iterdir())


# Causal LMs --------------------------------------------------------------------------------------


def test_the_embedded_preset_answers_in_transformers(tmp_path):
    """With its chat template, and it stops by itself: the answers are ours."""
    ours = phi3_ref.Phi3CausalLM.from_preset(EMBEDDED)
    ours.compile(sampler="greedy")
    ours.export_to_transformers(tmp_path / "exported")
    model, _ = loaded(transformers.AutoModelForCausalLM, tmp_path / "exported")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    for question, answer in [("What is 345 + 278?", "623"), ("Sort planet", "aelnpt")]:
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        ids = model.generate(**prompt, max_length=36, do_sample=False)[0]
        new = ids[prompt["input_ids"].shape[1] :]
        assert tokenizer.decode(new, skip_special_tokens=True) == answer
        text = ours.preprocessor.tokenizer.apply_chat_template(messages)
        assert tokenizer.decode(new) == ours.generate(text, strip_prompt=True)
    again = phi3_ref.Phi3CausalLM.from_preset(tmp_path / "exported")
    check_same_model(again.backbone, ours.backbone)
    assert again.preprocessor.add_start_token is True
    assert again.resolve_stop_tokens("auto") == ours.resolve_stop_tokens("auto")
    again.compile(sampler="greedy")
    assert again.generate(text, 36) == ours.generate(text, 36)


@pytest.mark.parametrize("kind", DIRECTORIES)
def test_a_hugging_face_directory_keeps_its_tokenizer(kind, tmp_path):
    """Its own files are copied, byte for byte; the stop tokens are those of the original."""
    read = read_directory(kind, tmp_path / "preset")
    if not read.theirs.chat_template:
        (read.directory / "chat_template.jinja").write_text("a template")
    size = read.ours.tokenizer.vocabulary_size()
    backbone = phi3_ref.Phi3Backbone(size, 1, 8, 8, 2, 1, seed=0)
    ours = phi3_ref.Phi3CausalLM(backbone, read.ours)
    ours.export_to_transformers(tmp_path / "exported")
    for path in read.directory.iterdir():
        if path.name != "config.json":
            assert (tmp_path / "exported" / path.name).read_bytes() == path.read_bytes()
    again = phi3_ref.Phi3CausalLM.from_preset(tmp_path / "exported")
    check_same_model(again.backbone, backbone)
    assert again.resolve_stop_tokens("auto") == ours.resolve_stop_tokens("auto")
    assert again.preprocessor.add_start_token == read.ours.add_start_token
    model, _ = loaded(transformers.AutoModelForCausalLM, tmp_path / "exported")
    assert model.config.vocab_size == size
    stops = model.generation_config.eos_token_id
    assert stops == (ours.resolve_stop_tokens("auto") or None)
    assert model.config.bos_token_id == read.ours.tokenizer.start_token_id


def test_generation_settings_are_kept(tmp_path):
    """What generation_config.json of the original says of sampling is copied."""
    directory = write_microsoft(tmp_path / "preset")
    write_json(directory / "generation_config.json", dict(
        do_sample=True, temperature=0.5, eos_token_id=[500, 507]))
    preprocessor = phi3_ref.Phi3CausalLMPreprocessor.from_preset(directory)
    backbone = phi3_ref.Phi3Backbone(511, 1, 8, 8, 2, 1, seed=0)
    phi3_ref.Phi3CausalLM(backbone, preprocessor).export_to_transformers(tmp_path / "exported")
    config = transformers.GenerationConfig.from_pretrained(tmp_path / "exported")
    assert config.do_sample and config.temperature == 0.5 and config.eos_token_id == [500, 507]


def test_a_start_token_that_cannot_be_exported(tmp_path):
    """A Hugging Face tokenizer's own files say whether there is one; a warning says so."""
    tokenizer = phi3_ref.Phi3Tokenizer.from_preset(write_microsoft(tmp_path / "preset"))
    backbone = phi3_ref.Phi3Backbone(511, 1, 8, 8, 2, 1, seed=0)
    causal_lm = phi3_ref.Phi3CausalLM(backbone, phi3_ref.Phi3CausalLMPreprocessor(tokenizer))
    with pytest.warns(UserWarning, match="add_start_token=True"):
        causal_lm.export_to_transformers(tmp_path / "exported")


def test_without_a_preprocessor(tmp_path):
    """A causal LM that has none is exported without tokenizer, and read back so."""
    backbone = phi3_ref.Phi3Backbone(61, 1, 24, 40, 4, 2, seed=0)
    phi3_ref.Phi3CausalLM(backbone).export_to_transformers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert phi3_ref.Phi3CausalLM.from_preset(tmp_path).preprocessor is None


@pytest.mark.parametrize("setting", [dict(sequence_length=9), dict(add_bos=True),
                                     dict(add_eos=True)])
def test_settings_of_a_keras_tokenizer_are_not_lost_silently(setting, tmp_path):
    """What tokenizer.json of transformers' form would not do is refused by name."""
    proto = phi3_ref.Phi3Tokenizer.from_preset("phi3_tiny_puzzles_en").proto
    with pytest.raises(ValueError, match=next(iter(setting))):
        phi3_ref.Phi3Tokenizer(proto, **setting).export_to_transformers(tmp_path / "new")
    assert not (tmp_path / "new").exists()
