"""Every file and field of a preset: read, refused by name, warned of, or harmless, with the reason.

None that decides behaviour is passed over in silence. Each table is first held to what transformers
and KerasHub write, then each of its rows to what becomes of the preset where that field has another
value than its writers' default.
"""

import json
import pathlib
import re
import warnings
from collections import namedtuple

import hostile_presets
import keras_hub
import numpy as np
import pytest
import references as ref
import transformers

import phi3_ref

Read = namedtuple("Read", "value")  # with this value the settings are others, or it is refused
Refused = namedtuple("Refused", "value")  # with this value there is a ValueError that names it
Warned = namedtuple("Warned", "value")  # with this value there is one warning that names it
Harmless = namedtuple("Harmless", "value reason")  # with this value all is as before
Elsewhere = namedtuple("Elsewhere", "tests")  # read; these tests show it

TOKENS = Elsewhere("test_tokenizer.py")
LABELS = "of a classifier's head, of which the weights say that it is none of a causal LM"
ANSWERS = "which of its results a call in transformers returns"
UNUSED = "transformers' Phi3Model does not look at it"

# Hugging Face -------------------------------------------------------------------------------------

HUGGINGFACE_CONFIG = {
    "model_type": Refused("gemma"),
    "vocab_size": Read(62), "hidden_size": Read(48), "intermediate_size": Read(41),
    "num_hidden_layers": Read(4), "num_attention_heads": Read(2), "num_key_value_heads": Read(2),
    "head_dim": Read(8), "rms_norm_eps": Read(1e-3), "attention_dropout": Read(0.1),
    "max_position_embeddings": Read(64), "original_max_position_embeddings": Read(16),
    "sliding_window": Read(3), "tie_word_embeddings": Read(True),
    "rope_parameters": Read({"rope_type": "default", "rope_theta": 500.0}),
    "rope_scaling": Read({"type": "su", "short_factor": [1.0] * 3, "long_factor": [2.0] * 3}),
    "rope_theta": Read(500.0), "partial_rotary_factor": Read(0.67),
    "hidden_act": Refused("gelu"), "attention_bias": Refused(True), "mlp_bias": Refused(True),
    "is_encoder_decoder": Refused(True), "per_layer_config": Refused({"0": {"head_dim": 8}}),
    "transformers_weights": Refused("other.safetensors"),
    "quantization_config": Refused({"quant_method": "awq", "bits": 4}),
    "compression_config": Refused({"format": "int-quantized"}),  # compressed-tensors, at first
    "quantization": Refused({"group_size": 64, "bits": 4}),  # MLX
    "lm_head_bias": Refused(True), "full_attn_mod": Refused(2), "interpolate_factor": Refused(4),
    "resid_pdrop": Warned(0.1),
    "embd_pdrop": Harmless(0.1, UNUSED), "initializer_range": Harmless(0.5, "of random weights"),
    "chunk_size_feed_forward": Harmless(8, UNUSED), "pretraining_tp": Harmless(2, UNUSED),
    "layer_types": Harmless(["full_attention"] * 3, UNUSED),
    "use_cache": Harmless(False, "the cache changes no result"),
    "dtype": Harmless("bfloat16", "the dtype is the caller's, else float32, as in Keras"),
    "torch_dtype": Harmless("bfloat16", "the older name of dtype"),
    "architectures": Harmless(["Phi3ForSequenceClassification"], "the tensors say which head it "
                              "has: see test_weight_names.py"),
    "auto_map": Harmless({"AutoConfig": "configuration_phi3.Phi3Config"}, "code of the preset's "
                         "own, which is never run; Microsoft's computes what transformers does"),
    "id2label": Harmless({"0": "a"}, LABELS), "label2id": Harmless({"a": 0}, LABELS),
    "problem_type": Harmless("regression", LABELS),
    "output_attentions": Harmless(True, ANSWERS), "output_hidden_states": Harmless(True, ANSWERS),
    "return_dict": Harmless(False, ANSWERS),
    "_name_or_path": Harmless("microsoft/phi", "where it came from"),
    "transformers_version": Harmless("4.39.3", "what wrote it"),
    "_attn_implementation": Harmless("sdpa", "how fast it is computed"),
    "eos_token_id": TOKENS,
    "bos_token_id": Harmless(5, "the tokenizer's files say what begins a text, and whether"),
    "pad_token_id": Harmless(5, "under a mask of zeros, any id will do"),
}
LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.5, 2.0], "long_factor": [2.0, 4.0, 8.0]}
ROPE = {  # inside `rope_scaling` or `rope_parameters`
    "type": Refused("linear"), "rope_type": Refused("dynamic"), "rope_theta": Read(500.0),
    "partial_rotary_factor": Read(0.5), "short_factor": Read([1.0, 1.5, 3.0]),
    "long_factor": Read([2.0, 4.0, 9.0]), "factor": Read(5.0), "attention_factor": Read(1.3),
    "original_max_position_embeddings": Read(16), "short_mscale": Refused(1.1),
    "long_mscale": Refused(1.1), "mrope_section": Refused([1, 1, 1]),
    "full_attention": Refused({"rope_type": "default"}),
}
HUGGINGFACE_FILES = {
    **dict.fromkeys(["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                     "tokenizer.model", "chat_template.jinja", "generation_config.json"], TOKENS),
    "config.json": Read(b"{"), "model.safetensors": Read(b"{"),
    "model.safetensors.index.json": Elsewhere("test_presets.py"),
    "adapter_config.json": Refused(b'{"peft_type": "LORA"}'),
    "adapter_model.safetensors": Harmless(b"{", "it stands beside adapter_config.json, or is none"),
    "added_tokens.json": Harmless(b"{", "beside a tokenizer.json transformers reads it no more"),
    "pytorch_model.bin": Harmless(b"{", "a pickle; without safetensors beside it, it is refused"),
    "modeling_phi3.py": Harmless(b"{", "code of the preset's own is never run"),
    "training_args.bin": Harmless(b"{", "of its training"), "README.md": Harmless(b"{", "prose"),
}


@pytest.fixture(scope="module")
def huggingface_files(tmp_path_factory):
    """{name: content} of a directory as transformers writes it, every file that a load asks for."""
    directory = tmp_path_factory.mktemp("huggingface")
    ref.write_huggingface(ref.transformers_model({}), directory)
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def outcome(directory):
    """Returns the config of what loads, and what is said about it: warnings, or a refusal."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            backbone = phi3_ref.Phi3Backbone.from_preset(directory, load_weights=False)
        except ValueError as error:
            return None, [str(error)]
    said = [str(each.message) for each in caught if each.category is UserWarning]
    return (backbone.get_config(), backbone.config), said


def check(row, name, before, after, said):
    """Asserts that what became of a preset is what its table says of the changed `name`."""
    value = getattr(row, "value", None)
    if isinstance(row, Read):
        assert after is None or after != before, f"{name}={value!r} changes nothing"
    elif isinstance(row, Refused):
        assert after is None and re.search(f"{name}|{value}", said[0]), (after, said)
    elif isinstance(row, Warned):
        assert after == before and len(said) == 1 and name in said[0], (after, said)
    else:
        assert isinstance(row, Harmless), row
        assert after == before and not said, (after, said)


def rows(table):
    """Returns the rows that are shown here, for parametrize."""
    return [name for name, row in table.items() if not isinstance(row, Elsewhere)]


def test_the_tables_know_what_transformers_writes(huggingface_files):
    """Each field of its config classes, and each file of its models and tokenizers."""
    for kind in ("Phi3", "Llama", "Mistral"):
        fields = getattr(transformers, f"{kind}Config")().to_dict()
        assert not fields.keys() - HUGGINGFACE_CONFIG.keys()
    keys = transformers.modeling_rope_utils.RopeParameters.__annotations__
    # The rest is what other kinds of RoPE take.
    assert ROPE.keys() >= {*phi3_ref.ROPE_SETTINGS} and keys.keys() & ROPE.keys()
    assert huggingface_files.keys() <= HUGGINGFACE_FILES.keys()
    asked = {*phi3_ref.SMALL_FILES} - KERAS_FILES.keys()
    assert asked <= HUGGINGFACE_FILES.keys()
    for table in (HUGGINGFACE_CONFIG, HUGGINGFACE_FILES, KERAS_CONFIG, KERAS_FILES):
        for row in table.values():
            if isinstance(row, Elsewhere):
                assert pathlib.Path(__file__).with_name(row.tests).exists()


@pytest.mark.parametrize("name", rows(HUGGINGFACE_CONFIG))
def test_fields_of_huggingfaces_config(name, huggingface_files, tmp_path):
    """Each, with another value, does what the table says of it."""
    config = json.loads(huggingface_files["config.json"])
    row = HUGGINGFACE_CONFIG[name]
    if name in ("rope_scaling", "rope_theta", "partial_rotary_factor"):  # the older spelling
        config.pop("rope_parameters")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    before, said = outcome(tmp_path)
    assert not said
    path.write_text(json.dumps(config | {name: row.value}))
    check(row, name, before, *outcome(tmp_path))


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("name", ROPE)
def test_fields_of_rope(name, spelling, huggingface_files, tmp_path):
    """In either spelling. What no Phi-3 has is refused: it may well decide something."""
    config = json.loads(huggingface_files["config.json"])
    config = {key: value for key, value in config.items()
              if key not in ("rope_parameters", "original_max_position_embeddings")}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config | {spelling: LONGROPE}))
    before, said = outcome(tmp_path)
    assert not said
    path.write_text(json.dumps(config | {spelling: LONGROPE | {name: ROPE[name].value}}))
    check(ROPE[name], name, before, *outcome(tmp_path))


@pytest.mark.parametrize("name", rows(HUGGINGFACE_FILES))
def test_files_of_huggingface(name, tmp_path):
    """A file that is no JSON, and no tensors, is refused where it is read."""
    files = hostile_presets.PRESETS["huggingface, float32"]()
    hostile_presets.write(files, tmp_path)
    before = hostile_presets.contents(phi3_ref.Phi3CausalLM.from_preset(tmp_path))
    (tmp_path / name).write_bytes(HUGGINGFACE_FILES[name].value)
    if isinstance(HUGGINGFACE_FILES[name], Harmless):
        after = hostile_presets.contents(phi3_ref.Phi3CausalLM.from_preset(tmp_path))
        assert after == before
    else:
        with pytest.raises(ValueError, match=re.escape(name)):
            phi3_ref.Phi3CausalLM.from_preset(tmp_path)


def test_length_inside_rope_scaling_only(huggingface_files, tmp_path):
    """There transformers takes its default, 4096, and so short factors; we take what is written.

    The authors' code has it beside, where both agree: see test_transformers.py.
    """
    config = json.loads(huggingface_files["config.json"])
    del config["rope_parameters"], config["original_max_position_embeddings"]
    config["rope_scaling"] = LONGROPE | {"original_max_position_embeddings": 16}
    hostile_presets.write(huggingface_files | {"config.json": json.dumps(config).encode()},
                          tmp_path)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    message = ref.seen_with("transformers", "5.24.0")
    assert theirs.rope_parameters["original_max_position_embeddings"] == 4096, message
    assert phi3_ref.Phi3Backbone.from_preset(tmp_path).pretraining_sequence_length == 16


@pytest.mark.parametrize("quantization", [
    {"quant_method": "bitsandbytes", "load_in_4bit": True}, {"load_in_8bit": True},
    {"quant_method": "gptq", "bits": 4}, {"quant_method": "awq"}, {"quant_method": "fp8"}])
def test_a_quantized_checkpoint_is_called_so(quantization, huggingface_files, tmp_path):
    """With its method, and with what to do."""
    config = json.loads(huggingface_files["config.json"]) | {"quantization_config": quantization}
    (tmp_path / "config.json").write_text(json.dumps(config))
    method = str(next(iter(quantization.items())))[1:-1].replace(", ", ": ")
    for cls in (phi3_ref.Phi3Backbone, phi3_ref.Phi3CausalLM):
        with pytest.raises(ValueError, match=rf"quantized.*{method}.*dequantize\(\)"):
            cls.from_preset(tmp_path)


@pytest.mark.parametrize("beside", [True, False])
def test_an_adapter_is_called_so(beside, huggingface_files, tmp_path):
    """Beside its model, which transformers would change by it, or alone, as PEFT saves it."""
    files = huggingface_files if beside else {"adapter_model.safetensors": b""}
    hostile_presets.write(files | {"adapter_config.json": b'{"peft_type": "LORA"}'}, tmp_path)
    for cls in (phi3_ref.Phi3Backbone, phi3_ref.Phi3CausalLM):
        with pytest.raises(ValueError, match=r"adapter_config\.json.*load_adapter\(directory\)"):
            cls.from_preset(tmp_path)


# Keras --------------------------------------------------------------------------------------------

REPEATED = "KerasHub writes the same object to a file of its own, which is read"
DTYPE = {"module": "keras", "registered_name": None}
KERAS_CONFIG = {
    "module": Harmless("x", "registered_name says which class it is"),
    "class_name": Harmless("x", "registered_name says which class it is"),
    "registered_name": Refused("keras_hub>GemmaBackbone"),
    "config": Refused(None),
}
KERAS_BACKBONE = {
    "name": Read("phi"), "trainable": Read(False), "vocabulary_size": Read(62),
    "num_layers": Read(3), "num_query_heads": Read(4), "hidden_dim": Read(48),
    "intermediate_dim": Read(41), "num_key_value_heads": Read(3), "layer_norm_epsilon": Read(1e-3),
    "dropout": Read(0.1), "max_sequence_length": Read(64), "pretraining_sequence_length": Read(9),
    "rope_max_wavelength": Read(500), "rope_scaling_type": Refused("yarn"),
    "rope_scaling_short_factor": Read([1.0] * 2), "rope_scaling_long_factor": Read([3.0] * 2),
    "dtype": Harmless({**DTYPE, "class_name": "DTypePolicy", "config": {"name": "bfloat16"}},
                      "the dtype is the caller's, else float32, as in Keras"),
    "num_experts": Refused(8),
}
KERAS_PREPROCESSOR = {
    "sequence_length": Read(7), "add_start_token": Read(False), "add_end_token": Read(False),
    "tokenizer": TOKENS, "config_file": Harmless("x", "its own name"),
    "name": Harmless("x", "it has no weights"), "trainable": Harmless(False, "it has no weights"),
    "dtype": Harmless("int8", "token ids are integers"),
}
KERAS_TOKENIZER = {
    **dict.fromkeys(["sequence_length", "add_bos", "add_eos"], TOKENS),
    "proto": Harmless("x", "the vocabulary is an asset"),
    "config_file": Harmless("x", "its own name"), "name": Harmless("x", "it has no weights"),
    "trainable": Harmless(False, "it has no weights"),
    "dtype": Harmless("int64", "token ids are integers"),
}
KERAS_FILES = {
    "config.json": Read(b"{"), "model.weights.h5": Read(b"{"), "preprocessor.json": Read(b"{"),
    "assets/tokenizer/vocabulary.spm": Read(b"{"),
    "model.weights.json": Elsewhere("test_presets.py"), "tokenizer.json": TOKENS,
    "task.json": Harmless(b"{", REPEATED),
    "metadata.json": Harmless(b"{", "versions, dates and counts"),
}


@pytest.fixture(scope="module")
def keras_files(tmp_path_factory):
    """{name: content} of a directory as KerasHub writes it for a causal LM."""
    directory = tmp_path_factory.mktemp("keras")
    source = pathlib.Path(phi3_ref.Phi3Backbone.presets["phi3_tiny_puzzles_en"])
    tokenizer = keras_hub.models.Phi3Tokenizer(
        (source / "assets/tokenizer/vocabulary.spm").read_bytes())
    backbone = ref.keras_backbone(dict(
        vocabulary_size=tokenizer.vocabulary_size(), num_layers=2, hidden_dim=24,
        intermediate_dim=40, num_query_heads=6, num_key_value_heads=2, max_sequence_length=32,
        pretraining_sequence_length=8, rope_scaling_type="su", layer_norm_epsilon=1e-5,
        rope_scaling_short_factor=[1.0, 1.25], rope_scaling_long_factor=[1.5, 6.0]))
    preprocessor = keras_hub.models.Phi3CausalLMPreprocessor(tokenizer, sequence_length=12)
    keras_hub.models.Phi3CausalLM(backbone, preprocessor).save_to_preset(str(directory))
    return {str(path.relative_to(directory)): path.read_bytes()
            for path in directory.rglob("*") if path.is_file()}


def preprocessing(directory):
    """Returns what a preset's preprocessor makes of a text."""
    x, y, sample_weight = phi3_ref.Phi3CausalLMPreprocessor.from_preset(directory)(["Sort abc"])
    return [np.asarray(array).tolist() for array in (*x.values(), y, sample_weight)]


def test_the_tables_know_what_keras_writes(keras_files):
    """Each file, and each field of the objects in them."""
    assert keras_files.keys() <= KERAS_FILES.keys()
    for name, table in {"config.json": KERAS_BACKBONE, "preprocessor.json": KERAS_PREPROCESSOR,
                        "tokenizer.json": KERAS_TOKENIZER}.items():
        content = json.loads(keras_files[name])
        assert content.keys() <= KERAS_CONFIG.keys()
        assert content["config"].keys() <= table.keys()
    task = json.loads(keras_files["task.json"])["config"]
    assert task.keys() == {"name", "backbone", "preprocessor"}
    assert task["backbone"] == json.loads(keras_files["config.json"])
    assert task["preprocessor"] == json.loads(keras_files["preprocessor.json"])


@pytest.mark.parametrize("name", [*KERAS_CONFIG, *KERAS_BACKBONE])
def test_fields_of_keras_config(name, keras_files, tmp_path):
    """Each, with another value, does what the table says of it."""
    content, path = json.loads(keras_files["config.json"]), tmp_path / "config.json"
    path.write_text(json.dumps(content))
    before, said = outcome(tmp_path)
    assert not said
    row = {**KERAS_CONFIG, **KERAS_BACKBONE}[name]
    (content if name in KERAS_CONFIG else content["config"])[name] = row.value
    path.write_text(json.dumps(content))
    check(row, name, before, *outcome(tmp_path))


@pytest.mark.parametrize("file, name", [
    *(("preprocessor.json", name) for name in rows(KERAS_PREPROCESSOR)),
    *(("tokenizer.json", name) for name in rows(KERAS_TOKENIZER))])
def test_fields_of_keras_preprocessing(file, name, keras_files, tmp_path):
    """Each, with another value, changes what becomes of a text, or does not."""
    hostile_presets.write(keras_files, tmp_path)
    before, content = preprocessing(tmp_path), json.loads(keras_files[file])
    row = (KERAS_PREPROCESSOR if file == "preprocessor.json" else KERAS_TOKENIZER)[name]
    assert content["config"][name] != row.value
    content["config"][name] = row.value
    (tmp_path / file).write_text(json.dumps(content))
    check(row, name, before, preprocessing(tmp_path), [])


@pytest.mark.parametrize("name", rows(KERAS_FILES))
def test_files_of_keras(name, keras_files, tmp_path):
    """A file that is no JSON, no tensors and no vocabulary is refused where it is read."""
    hostile_presets.write(keras_files | {name: KERAS_FILES[name].value}, tmp_path)
    if isinstance(KERAS_FILES[name], Read):
        with pytest.raises(ValueError, match=re.escape(name) + "|SentencePiece"):
            phi3_ref.Phi3CausalLM.from_preset(tmp_path)
    else:
        phi3_ref.Phi3CausalLM.from_preset(tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_quantized_keras_preset_is_called_so(mode, tmp_path):
    """KerasHub writes the policy of each layer; the weights are integers."""
    model = ref.keras_backbone(dict(
        vocabulary_size=61, num_layers=1, hidden_dim=24, intermediate_dim=40, num_query_heads=4,
        num_key_value_heads=2))
    model.quantize(mode)
    model.save_to_preset(str(tmp_path))
    with pytest.raises(ValueError, match="quantized"):
        phi3_ref.Phi3Backbone.from_preset(tmp_path)
