"""Presets: what others write loads exactly, others load what we write, a bad file is an error."""

import json
import mmap
import os
import pathlib
import re
import shutil
import struct
import subprocess
import sys
import warnings

import h5py
import keras_hub
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from references import (
    NUMPY_DTYPE,
    TINY_HUGGINGFACE,
    keras_backbone,
    keras_output,
    ours_like,
    relative_error,
    transformers_logits,
    transformers_model,
    write_huggingface,
)

import phi3_ref

VOCABULARY = pathlib.Path(phi3_ref.__file__).parent.joinpath(
    "notebooks/presets/phi3_tiny_puzzles_en/assets/tokenizer/vocabulary.spm"
)
CONFIG = dict(
    vocabulary_size=61, num_layers=2, hidden_dim=24, intermediate_dim=40, num_query_heads=6,
    num_key_value_heads=2, max_sequence_length=32, pretraining_sequence_length=8,
    rope_scaling_type="su", rope_scaling_short_factor=[1.0, 1.25],
    rope_scaling_long_factor=[1.5, 6.0], layer_norm_epsilon=1e-5, rope_max_wavelength=5000,
)
INPUTS = {
    "token_ids": np.arange(1, 21, dtype=np.int32).reshape(2, 10),
    "padding_mask": np.array([[1] * 10, [1] * 7 + [0] * 3], np.int32),
}
SHARD = 8e-6  # GB: 8 KB, so that the small models below make several files


def assert_same_weights(ours, reference):
    """Equal bit for bit, shapes and dtypes included."""
    assert len(ours) == len(reference)
    for one, other in zip(ours, reference, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert one.tobytes() == np.ascontiguousarray(other).tobytes()


def files_below(directory):
    """The set of paths of all files below a directory, relative to it."""
    return {
        str(path.relative_to(directory)) for path in pathlib.Path(directory).rglob("*")
        if not path.is_dir()
    }


def edit_json(path, change):
    """Rewrite a JSON file with what `change(content)` returns."""
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


@pytest.fixture(scope="module")
def keras_model():
    """A small KerasHub backbone with su scaling."""
    return keras_backbone(CONFIG, "float32", 3)


@pytest.fixture(scope="module")
def keras_written(keras_model, tmp_path_factory):
    """A directory that KerasHub wrote: float32, one file."""
    directory = tmp_path_factory.mktemp("keras")
    keras_model.save_to_preset(str(directory))
    return directory


@pytest.fixture(scope="module")
def huggingface_model():
    """A small transformers model."""
    return transformers_model({}, "float32", 4)


@pytest.fixture(scope="module")
def huggingface_written(huggingface_model, tmp_path_factory):
    """A directory that transformers wrote: float32, one file."""
    return pathlib.Path(write_huggingface(huggingface_model, tmp_path_factory.mktemp("hf")))


@pytest.fixture
def keras_preset(keras_written, tmp_path):
    """A fresh copy of the KerasHub directory, free to spoil."""
    return pathlib.Path(shutil.copytree(keras_written, tmp_path / "keras"))


@pytest.fixture
def huggingface_preset(huggingface_written, tmp_path):
    """A fresh copy of the transformers directory, free to spoil."""
    return pathlib.Path(shutil.copytree(huggingface_written, tmp_path / "hf"))


# What others write, we load -----------------------------------------------------------------------


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_keras_preset_loads_exactly(dtype, sharded, tmp_path):
    """Weights KerasHub wrote, in one file or several, are bitwise what it holds; so is config."""
    reference = keras_backbone(CONFIG | dict(dropout=0.1), dtype, 0)
    reference.save_to_preset(str(tmp_path), max_shard_size=SHARD if sharded else 10)
    assert (len(list(tmp_path.glob("*.h5"))) > 2) == sharded
    ours = phi3_ref.Phi3Backbone.from_preset(str(tmp_path), dtype=dtype)
    assert_same_weights(ours.get_weights(), reference.get_weights())
    config, expected = ours.get_config(), reference.get_config()
    assert {key: config[key] for key in expected if key != "dtype"} == {
        key: value for key, value in expected.items() if key != "dtype"
    }


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_huggingface_directory_loads_exactly(dtype, sharded, tmp_path):
    """The fused weights that transformers wrote are bitwise what we read, and compute the same."""
    reference = transformers_model({}, dtype, 1)
    write_huggingface(reference, tmp_path, **({"max_shard_size": "8KB"} if sharded else {}))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == sharded
    ours = phi3_ref.Phi3CausalLM.from_preset(tmp_path, dtype=dtype)
    tensors = {}
    for file in tmp_path.glob("*.safetensors"):
        tensors |= safetensors.numpy.load_file(file)
    loaded = dict(phi3_ref.huggingface_tensors(ours.backbone.weights, ours.backbone.config))
    assert loaded.keys() == tensors.keys()
    assert_same_weights([loaded[name] for name in tensors], list(tensors.values()))
    if dtype == "float32":
        expected = transformers_logits(reference, INPUTS["token_ids"])
        assert relative_error(ours({"token_ids": INPUTS["token_ids"]}), expected) < 2e-6


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16", "float64"])
def test_the_dtype_is_the_callers_whatever_the_file_holds(stored, dtype, tmp_path):
    """Weights are cast from the file's dtype to the caller's, which is float32 by default."""
    reference = keras_backbone(CONFIG, stored, 2)
    reference.save_to_preset(str(tmp_path))
    ours = phi3_ref.Phi3Backbone.from_preset(tmp_path, dtype=dtype)
    target = NUMPY_DTYPE.get(dtype or "float32", np.float64)
    expected = [np.asarray(weight).astype(target) for weight in reference.get_weights()]
    assert_same_weights(ours.get_weights(), expected)


def memory_behind(array):
    """The object that owns an array's memory."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array.base if array.base is not None else array


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_safetensors_file_of_the_models_dtype_is_mapped(stored, dtype, tmp_path):
    """Its pages serve as weights, shared by all processes; writing to one leaves the file alone."""
    write_huggingface(transformers_model({}, stored, 1), tmp_path)
    backbone = phi3_ref.Phi3Backbone.from_preset(tmp_path, dtype=dtype)
    weights = dict(phi3_ref.huggingface_tensors(backbone.weights, backbone.config))
    mapped = {name: isinstance(memory_behind(array), mmap.mmap) for name, array in weights.items()}
    assert set(mapped.values()) == {stored == dtype}
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for array in weights.values():
        assert array.flags.aligned and type(array) is np.ndarray
        array[...] = 0
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_an_unaligned_safetensors_file_loads(huggingface_preset, huggingface_model):
    """A header of odd length leaves no tensor where it could be mapped."""
    path = huggingface_preset / "model.safetensors"
    content = path.read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    header = content[8:size].rstrip()
    header += b" " * (1 - len(header) % 2)
    assert len(header) % 2 == 1
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[size:])
    backbone = phi3_ref.Phi3Backbone.from_preset(huggingface_preset)
    state = huggingface_model.state_dict()
    for name, array in phi3_ref.huggingface_tensors(backbone.weights, backbone.config):
        assert array.flags.aligned
        np.testing.assert_array_equal(array, state[name].numpy())


def test_the_older_spelling_of_the_class_loads(keras_preset, keras_model):
    """Presets of KerasNLP, before it was renamed, name `keras_nlp>Phi3Backbone`."""
    edit_json(
        keras_preset / "config.json",
        lambda config: config | {
            "registered_name": "keras_nlp>Phi3Backbone",
            "module": "keras_nlp.src.models.phi3.phi3_backbone",
        },
    )
    ours = phi3_ref.Phi3Backbone.from_preset(keras_preset)
    assert_same_weights(ours.get_weights(), keras_model.get_weights())


def test_load_weights_false_reads_the_configuration_alone(keras_preset, huggingface_preset):
    """The weights are random, by the seed, and no weight file need be there."""
    for directory in (keras_preset, huggingface_preset):
        for path in [*directory.glob("*.h5"), *directory.glob("*.safetensors")]:
            path.unlink()
        one, other = (
            phi3_ref.Phi3Backbone.from_preset(directory, load_weights=False, seed=6)
            for _ in range(2)
        )
        assert_same_weights(one.get_weights(), other.get_weights())
        assert np.std(one.get_weights()[0]) == pytest.approx(0.01, rel=0.1)
        causal_lm = phi3_ref.Phi3CausalLM.from_preset(directory, load_weights=False)
        assert causal_lm.preprocessor is None
        with pytest.raises(FileNotFoundError):
            phi3_ref.Phi3Backbone.from_preset(directory)


def test_the_base_class_infers_the_class(keras_written, keras_model):
    """`Backbone.from_preset` makes a Phi3Backbone; the preset may be a str or a path."""
    for preset in (keras_written, str(keras_written)):
        ours = phi3_ref.Backbone.from_preset(preset)
        assert type(ours) is phi3_ref.Phi3Backbone
        assert_same_weights(ours.get_weights(), keras_model.get_weights())


def test_arguments_override_the_preset(keras_written):
    """Constructor arguments given to `from_preset` win over the config."""
    ours = phi3_ref.Phi3Backbone.from_preset(keras_written, dropout=0.25, dtype="float64")
    assert ours.dropout == 0.25 and ours.num_layers == CONFIG["num_layers"]
    assert ours(INPUTS).dtype == np.float64
    with pytest.raises(TypeError, match="droopout"):
        phi3_ref.Phi3Backbone.from_preset(keras_written, droopout=0.25)


def test_symlinked_files_load(keras_written, huggingface_written, tmp_path):
    """The hubs' caches are directories of links: each file may live anywhere."""
    for source in (keras_written, huggingface_written):
        links = tmp_path / source.name
        links.mkdir()
        for path in source.iterdir():
            (links / path.name).symlink_to(path)
        ours = phi3_ref.Phi3Backbone.from_preset(links)
        direct = phi3_ref.Phi3Backbone.from_preset(source)
        assert_same_weights(ours.get_weights(), direct.get_weights())


# What we write, others load -----------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(
    "policy",
    ["float32", "float16", "bfloat16", "mixed_float16", "mixed_bfloat16", "float64"],
)
def test_keras_loads_what_we_save(policy, dropout, tmp_path):
    """KerasHub reads our directory: bitwise our weights, our configuration, and our results."""
    ours = phi3_ref.Phi3Backbone(**CONFIG, dtype=policy, dropout=dropout, seed=1)
    ours.save_to_preset(tmp_path)
    assert files_below(tmp_path) >= {"config.json", "model.weights.h5"}
    theirs = keras_hub.models.Phi3Backbone.from_preset(str(tmp_path), dtype=policy)
    assert_same_weights(ours.get_weights(), theirs.get_weights())
    assert theirs.dtype_policy.name == policy and theirs.dropout == dropout
    # In float32, whatever was saved: the arithmetic of 16 bits is compared elsewhere.
    plain = keras_hub.models.Phi3Backbone.from_preset(str(tmp_path))
    again = phi3_ref.Phi3Backbone.from_preset(tmp_path)
    error = relative_error(again(INPUTS), keras_output(plain, INPUTS), INPUTS["padding_mask"])
    assert error < 2e-6


@pytest.mark.parametrize("stored_dtype, before", [("<f4", 0), (">f4", 512), ("<f8", 1024)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_large_matrices_of_keras_files(tmp_path, dtype, stored_dtype, before):
    """Mapped, 16 rows at a time: what h5py reads, rounded once, wherever in the file it begins."""
    sizes = dict(vocabulary_size=1030, num_layers=1, hidden_dim=1032, intermediate_dim=32,
                 num_query_heads=6, num_key_value_heads=3)
    model = phi3_ref.Phi3Backbone(**sizes, seed=0)
    model.save_to_preset(tmp_path / "preset")
    path = tmp_path / "preset" / "model.weights.h5"
    with h5py.File(path, "w", userblock_size=before) as file:  # HDF5 lets others write there
        for name, array in phi3_ref.keras_variables(model.weights, model.config):
            file[name] = array.astype(stored_dtype)
    loaded = phi3_ref.Phi3Backbone.from_preset(tmp_path / "preset", dtype=dtype)
    with h5py.File(path) as file:
        for name, array in phi3_ref.keras_variables(loaded.weights, loaded.config):
            stored = file[name][()].astype(loaded.weight_dtype)
            np.testing.assert_array_equal(array, stored, err_msg=name)


# KerasHub leaves the vocabulary's file open.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_keras_loads_our_causal_lm(tmp_path):
    """KerasHub's Phi3CausalLM.from_preset reads ours, tokenizer and all: equal answers."""
    tokenizer = phi3_ref.Phi3Tokenizer(VOCABULARY.read_bytes())
    config = CONFIG | dict(vocabulary_size=tokenizer.vocabulary_size(), max_sequence_length=64)
    backbone = ours_like(keras_backbone(config | dict(pretraining_sequence_length=64)))
    preprocessor = phi3_ref.Phi3CausalLMPreprocessor(tokenizer, sequence_length=30)
    ours = phi3_ref.Phi3CausalLM(backbone, preprocessor)
    ours.save_to_preset(tmp_path)
    theirs = keras_hub.models.Phi3CausalLM.from_preset(str(tmp_path))
    assert theirs.preprocessor.sequence_length == 30
    assert theirs.preprocessor.add_end_token is True
    theirs.compile(sampler="greedy", run_eagerly=True)
    prompts = ["What is 1 + 2?", "Sort banana"]
    expected = theirs.generate(prompts)
    for model in (ours, phi3_ref.Phi3CausalLM.from_preset(tmp_path)):
        model.compile(sampler="greedy")
        assert model.generate(prompts) == expected
    base = keras_hub.models.CausalLM.from_preset(str(tmp_path), load_weights=False)
    assert type(base) is keras_hub.models.Phi3CausalLM
    for cls in (keras_hub.models.Phi3Tokenizer, phi3_ref.Phi3Tokenizer):
        assert list(cls.from_preset(str(tmp_path))(prompts[0])) == tokenizer(prompts[0])


def test_what_keras_saves_as_a_task_loads(tmp_path):
    """KerasHub's whole directory, task.json included, gives the same tokenizer and packing."""
    tokenizer = keras_hub.models.Phi3Tokenizer(VOCABULARY.read_bytes())
    preprocessor = keras_hub.models.Phi3CausalLMPreprocessor(
        tokenizer, sequence_length=12, add_start_token=False, add_end_token=True
    )
    config = CONFIG | dict(vocabulary_size=tokenizer.vocabulary_size())
    theirs = keras_hub.models.Phi3CausalLM(keras_backbone(config), preprocessor)
    theirs.save_to_preset(str(tmp_path))
    ours = phi3_ref.Phi3CausalLM.from_preset(tmp_path).preprocessor
    assert (ours.sequence_length, ours.add_start_token, ours.add_end_token) == (12, False, True)
    (x, *mine), (expected_x, *expected) = ours(["Sort abc", "é"]), preprocessor(["Sort abc", "é"])
    for name in ("token_ids", "padding_mask"):
        np.testing.assert_array_equal(x[name], expected_x[name])
    np.testing.assert_array_equal(mine, expected)


@pytest.mark.parametrize("policy", ["float32", "bfloat16", "float16", "mixed_bfloat16", "float64"])
def test_a_round_trip_is_bitwise(policy, tmp_path):
    """What we save we load: equal weights, configuration and results, bit for bit."""
    ours = phi3_ref.Phi3Backbone(**CONFIG, dtype=policy, dropout=0.1, seed=2)
    ours.save_to_preset(tmp_path)
    again = phi3_ref.Phi3Backbone.from_preset(tmp_path, dtype=policy)
    assert_same_weights(again.get_weights(), ours.get_weights())
    assert again.get_config() == ours.get_config()
    assert again(INPUTS).tobytes() == ours(INPUTS).tobytes()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(
            original_max_position_embeddings=16,
            max_position_embeddings=64,
            rope_parameters=dict(
                rope_type="longrope", rope_theta=10000.0, short_factor=[1.0, 1.1, 1.2],
                long_factor=[1.5, 3.0, 8.0],
            ),
        ),
        dict(tie_word_embeddings=True),
    ],
    ids=["plain", "longrope", "tied"],
)
def test_huggingface_to_keras(changes, tmp_path):
    """The converter KerasHub lacks: transformers' model, through us, gives KerasHub its logits."""
    model = transformers_model(changes, "float32", 7)
    write_huggingface(model, tmp_path / "hf")
    ours = phi3_ref.Phi3CausalLM.from_preset(tmp_path / "hf")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if "tie_word_embeddings" in changes else "error")
        ours.save_to_preset(tmp_path / "keras")
    theirs = keras_hub.models.Phi3CausalLM.from_preset(
        str(tmp_path / "keras"), preprocessor=None
    )
    for length in (9, 20):  # one on each side of longrope's boundary
        token_ids = np.random.default_rng(0).integers(0, 61, (2, length)).astype(np.int32)
        inputs = {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}
        expected = transformers_logits(model, token_ids)
        assert relative_error(keras_output(theirs, inputs), expected) < 2e-6
        assert relative_error(ours(inputs), expected) < 2e-6


@pytest.mark.parametrize(
    "extra", [dict(head_dim=6), dict(partial_rotary_factor=0.5), dict(rope_attention_factor=1.5)]
)
def test_what_keras_cannot_express_is_not_saved(extra, tmp_path):
    """Saving a model that KerasHub would compute otherwise is an error that says why."""
    plain = {name: value for name, value in CONFIG.items() if "rope_scaling" not in name}
    backbone = phi3_ref.Phi3Backbone(**plain, **extra)
    with pytest.raises(ValueError, match=next(iter(extra))):
        backbone.save_to_preset(tmp_path / "preset")
    assert not files_below(tmp_path)


def test_a_sliding_window_is_dropped_with_a_warning(tmp_path):
    """KerasHub's config has no place for it: the rest is saved. One of all positions is none."""
    phi3_ref.Phi3Backbone(**CONFIG, sliding_window=32).save_to_preset(tmp_path / "all")
    backbone = phi3_ref.Phi3Backbone(**CONFIG, sliding_window=5, seed=0)
    with pytest.warns(UserWarning, match="sliding window"):
        backbone.save_to_preset(tmp_path)
    assert phi3_ref.Phi3Backbone.from_preset(tmp_path).sliding_window is None
    theirs = keras_hub.models.Phi3Backbone.from_preset(str(tmp_path))
    assert_same_weights(backbone.get_weights(), theirs.get_weights())


# Bad files are errors that name what is bad -------------------------------------------------------


def refuse(directory, *names, error=ValueError, cls=phi3_ref.Phi3Backbone):
    """Assert that loading fails and that the message contains every name."""
    with pytest.raises(error) as caught:
        cls.from_preset(directory)
    for name in names:
        assert str(name) in str(caught.value), caught.value


@pytest.mark.parametrize(
    "change, name",
    [
        (lambda c: c | {"registered_name": "keras_hub>GemmaBackbone"}, "GemmaBackbone"),
        (lambda c: c | {"registered_name": "Functional"}, "Functional"),
        (lambda c: {"config": c["config"]}, "config.json"),
        (lambda c: {"registered_name": c["registered_name"]}, "config"),
        (lambda c: [], "config.json"),
        (lambda c: c | {"config": 5}, "config.json"),
        (lambda c: c | {"config": c["config"] | {"num_experts": 8}}, "num_experts"),
        (lambda c: c | {"config": c["config"] | {"rope_scaling_type": "yarn"}}, "yarn"),
        (lambda c: c | {"config": c["config"] | {"num_layers": "two"}}, "num_layers"),
        (
            lambda c: c | {"config": {k: v for k, v in c["config"].items() if k != "num_layers"}},
            "num_layers",
        ),
    ],
)
def test_a_bad_keras_config_is_an_error_that_names_it(keras_preset, change, name):
    """Another class, an unknown, impossible or missing argument, an unknown rope type."""
    edit_json(keras_preset / "config.json", change)
    refuse(keras_preset, name)


@pytest.mark.parametrize(
    "change, name",
    [
        (dict(model_type="gemma"), "gemma"),
        (dict(hidden_act="gelu"), "gelu"),
        (dict(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)), "dynamic"),
        (dict(rope_parameters=None, rope_scaling=dict(type="linear", factor=2.0)), "linear"),
        (dict(hidden_size=None), "hidden_size"),
        (dict(num_attention_heads="four"), "four"),
        (dict(rope_parameters="plain"), "config.json"),
    ],
)
def test_a_bad_huggingface_config_is_an_error_that_names_it(huggingface_preset, change, name):
    """Another model, or arithmetic that Phi-3 does not have, is refused by its name."""
    edit_json(
        huggingface_preset / "config.json",
        lambda c: {k: v for k, v in (c | change).items() if v is not None},
    )
    refuse(huggingface_preset, name)


def spoil_keras(path, case, name):
    """Spoil one tensor of a Keras HDF5 file."""
    with h5py.File(path, "r+") as file:
        shape = file[name].shape
        if case == "extra":
            file["layers/phi3_decoder_7/vars/0"] = np.zeros(3, np.float32)
        else:
            del file[name]
        if case == "misshapen":
            file[name] = np.zeros((shape[0] + 1, *shape[1:]), np.float32)
        if case == "transposed":
            file[name] = np.zeros(shape[::-1], np.float32)
        if case == "integer":
            file[name] = np.zeros(shape, np.int32)
        if case == "opaque":
            file[name] = np.zeros(shape, "V2")
        if case == "not finite":
            file[name] = np.full(shape, np.nan, np.float32)


def spoil_huggingface(path, case, name):
    """Spoil one tensor of a safetensors file."""
    tensors = safetensors.numpy.load_file(path)
    tensor = tensors.pop(name) if case != "extra" else None
    if case == "extra":
        tensors["model.layers.7.input_layernorm.weight"] = np.zeros(3, np.float32)
    if case == "misshapen":
        tensors[name] = np.zeros((tensor.shape[0] + 1, *tensor.shape[1:]), np.float32)
    if case == "transposed":
        tensors[name] = np.ascontiguousarray(tensor.T)
    if case == "integer":
        tensors[name] = tensor.astype(np.int32)
    if case == "float8":
        tensors[name] = tensor.astype(ml_dtypes.float8_e4m3fn)
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("case", ["missing", "misshapen", "transposed", "integer", "opaque"])
@pytest.mark.parametrize(
    "name",
    [
        "layers/phi3_decoder_1/attention/key_dense/vars/0",
        "layers/reversible_embedding/vars/1",
        "layers/phi3_decoder/feedforward_gate_dense/vars/0",
    ],
)
def test_a_bad_keras_tensor_is_an_error_that_names_it(keras_preset, case, name):
    """Missing, misshapen and of a dtype that is no weight's: the tensor and its file are named."""
    spoil_keras(keras_preset / "model.weights.h5", case, name)
    refuse(keras_preset, name, "model.weights.h5")


def test_an_extra_keras_tensor_is_an_error_that_names_it(keras_preset):
    """A tensor that no layer takes is not passed over."""
    spoil_keras(keras_preset / "model.weights.h5", "extra", "layers/phi3_layer_norm/vars/0")
    refuse(keras_preset, "layers/phi3_decoder_7/vars/0", "model.weights.h5")


@pytest.mark.parametrize("case", ["missing", "misshapen", "transposed", "integer", "float8"])
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.self_attn.qkv_proj.weight", "lm_head.weight",
        "model.layers.0.mlp.gate_up_proj.weight",
    ],
)
def test_a_bad_huggingface_tensor_is_an_error_that_names_it(huggingface_preset, case, name):
    """Missing, misshapen and of a dtype that is no weight's: the tensor and its file are named."""
    spoil_huggingface(huggingface_preset / "model.safetensors", case, name)
    refuse(huggingface_preset, name, "model.safetensors", cls=phi3_ref.Phi3CausalLM)
    if (case, name) != ("missing", "lm_head.weight"):  # the backbone alone does without
        refuse(huggingface_preset, name, "model.safetensors")


def test_an_extra_huggingface_tensor_is_an_error_that_names_it(huggingface_preset):
    """A tensor that no layer takes is not passed over, save for the one below."""
    spoil_huggingface(huggingface_preset / "model.safetensors", "extra", "model.norm.weight")
    refuse(huggingface_preset, "model.layers.7.input_layernorm.weight", "model.safetensors")


def test_old_checkpoints_inverse_frequencies_are_ignored(huggingface_preset):
    """Early conversions also stored RoPE's frequencies, which follow from the config."""
    expected = phi3_ref.Phi3Backbone.from_preset(huggingface_preset).get_weights()
    path = huggingface_preset / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    for layer in range(3):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    safetensors.numpy.save_file(tensors, path)
    ours = phi3_ref.Phi3Backbone.from_preset(huggingface_preset)
    assert_same_weights(ours.get_weights(), expected)


def test_bad_shards_are_errors_that_name_them(keras_model, huggingface_model, tmp_path):
    """A shard that is missing, or that lacks what the index promises, is named."""
    keras_model.save_to_preset(str(tmp_path / "keras"), max_shard_size=SHARD)
    write_huggingface(huggingface_model, tmp_path / "hf", max_shard_size="8KB")
    for directory in (tmp_path / "keras", tmp_path / "hf"):
        shards = sorted([*directory.glob("model*.h5"), *directory.glob("model*.safetensors")])
        lost, kept = shards[1], shards[1].read_bytes()
        lost.unlink()
        refuse(directory, lost.name, error=FileNotFoundError)
        shutil.copy(shards[0], lost)
        refuse(directory)
        lost.write_bytes(kept)
        phi3_ref.Phi3Backbone.from_preset(directory)


@pytest.mark.parametrize("weight_map", [None, [], "model", {"a": None}, {"a": 5}, {"a": [[]]}])
def test_a_malformed_index_is_an_error_that_names_it(
    keras_preset, huggingface_preset, weight_map
):
    """Whatever an index holds that is no map to file names, the message names the index."""
    for directory, single, index in [
        (keras_preset, "model.weights.h5", "model.weights.json"),
        (huggingface_preset, "model.safetensors", "model.safetensors.index.json"),
    ]:
        (directory / single).unlink()
        (directory / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        refuse(directory, index)


@pytest.mark.parametrize("outside", ["../outside", "{parent}/outside", "sub/../../outside"])
def test_an_index_cannot_point_outside_the_directory(
    keras_model, huggingface_model, tmp_path, outside
):
    """A shard's path that leaves the directory is refused even where the file is there and good."""
    keras_model.save_to_preset(str(tmp_path / "keras"), max_shard_size=SHARD)
    write_huggingface(huggingface_model, tmp_path / "hf", max_shard_size="8KB")
    for index, suffix in [
        (tmp_path / "keras" / "model.weights.json", ".weights.h5"),
        (tmp_path / "hf" / "model.safetensors.index.json", ".safetensors"),
    ]:
        shard = sorted(index.parent.glob(f"model*{suffix}"))[1]
        target = outside.format(parent=tmp_path) + suffix
        (index.parent / "sub").mkdir()
        shutil.move(shard, tmp_path / f"outside{suffix}")
        index.write_text(index.read_text().replace(shard.name, target))
        refuse(index.parent, target)


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, -1])
def test_a_truncated_file_is_an_error_that_names_it(
    keras_written, huggingface_written, tmp_path, keep
):
    """An interrupted download, cut anywhere, is found out: the message names the file."""
    for source in (keras_written, huggingface_written):
        for number, path in enumerate(sorted(source.iterdir())):
            if path.name in ("metadata.json", "generation_config.json"):
                continue
            directory = pathlib.Path(shutil.copytree(source, tmp_path / f"{source.name}{number}"))
            content = path.read_bytes()
            length = int(len(content) * keep) if isinstance(keep, float) else keep
            (directory / path.name).write_bytes(content[:length])
            refuse(directory, path.name)


def test_a_safetensors_header_cannot_lie(huggingface_preset):
    """A header longer than the file, or offsets beyond its end or that do not fit, are refused."""
    path = huggingface_preset / "model.safetensors"
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    body = content[8 + length :]
    path.write_bytes(struct.pack("<Q", 2**62) + content[8:])
    refuse(huggingface_preset, "model.safetensors")
    for name, change in [
        ("model.norm.weight", dict(data_offsets=[0, len(body) * 2])),
        ("lm_head.weight", dict(data_offsets=[0, 4])),
        ("lm_head.weight", dict(data_offsets=[-8, 8])),
    ]:
        text = json.dumps(header | {name: header[name] | change}).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + body)
        refuse(huggingface_preset, "model.safetensors")


def test_a_missing_preset_is_an_error_that_names_it(tmp_path):
    """A directory that is not there, is empty, or is a misspelt name."""
    for preset in (tmp_path / "nowhere", tmp_path, "phi3_mini_4k_instruct_de"):
        with pytest.raises((FileNotFoundError, ValueError), match=pathlib.Path(preset).name):
            phi3_ref.Phi3CausalLM.from_preset(preset)


# Saving is all or nothing -------------------------------------------------------------------------


class DiskFull(OSError):
    """What the fourth tensor meets."""


def test_a_save_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    """No partial weights and no temporary files, and what had been saved before still loads."""
    old = phi3_ref.Phi3Backbone(**CONFIG, seed=0)
    new = phi3_ref.Phi3Backbone(**CONFIG, seed=1)
    old.save_to_preset(tmp_path / "old")
    before = files_below(tmp_path / "old")
    create, calls = h5py.Group.create_dataset, []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) % 4 == 0:
            raise DiskFull("no space left")
        return create(*args, **kwargs)

    monkeypatch.setattr(h5py.Group, "create_dataset", failing)
    for name in ("old", "new"):
        with pytest.raises(DiskFull):
            new.save_to_preset(tmp_path / name)
    monkeypatch.undo()
    assert files_below(tmp_path / "old") == before
    assert not [name for name in files_below(tmp_path / "new") if name != "config.json"]
    ours = phi3_ref.Phi3Backbone.from_preset(tmp_path / "old")
    assert_same_weights(ours.get_weights(), old.get_weights())


def test_saving_over_a_preset_replaces_it(keras_model, tmp_path):
    """A smaller model saved over KerasHub's sharded one is what is loaded afterwards, by both."""
    keras_model.save_to_preset(str(tmp_path), max_shard_size=SHARD)
    ours = phi3_ref.Phi3Backbone(**CONFIG | dict(num_layers=1), seed=5)
    ours.save_to_preset(tmp_path)
    for cls in (phi3_ref.Phi3Backbone, keras_hub.models.Phi3Backbone):
        assert_same_weights(cls.from_preset(str(tmp_path)).get_weights(), ours.get_weights())


def test_saving_a_model_that_was_loaded_from_the_same_directory(tmp_path):
    """Loaded weights do not live in the file: they survive its being replaced."""
    phi3_ref.Phi3Backbone(**CONFIG, seed=5).save_to_preset(tmp_path)
    ours = phi3_ref.Phi3Backbone.from_preset(tmp_path)
    expected = ours.get_weights()
    ours.save_to_preset(tmp_path)
    assert_same_weights(phi3_ref.Phi3Backbone.from_preset(tmp_path).get_weights(), expected)
    assert_same_weights(ours.get_weights(), expected)


# Memory -------------------------------------------------------------------------------------------

LARGE = dict(
    vocab_size=8000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=5,
    num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=128,
    original_max_position_embeddings=128, rope_parameters=dict(rope_type="default", rope_theta=1e4),
    model_type="phi3", hidden_act="silu", rms_norm_eps=1e-5, tie_word_embeddings=False,
)
PEAK = """
import pathlib, sys
import h5py, phi3_ref

def peak():  # MB; unlike getrusage's, this high-water mark is not inherited from the parent
    return int(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024

before = peak()
model = phi3_ref.Phi3Backbone.from_preset(sys.argv[1], dtype=sys.argv[2])
size = model.count_params() * model.weight_dtype.itemsize / 2**20
print(peak() - before - size, size)
"""


@pytest.fixture(scope="module")
def large_presets(tmp_path_factory):
    """The same 84 million parameters in both formats, and as a Llama; bfloat16."""
    D, F, V = (LARGE[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    shapes = {"model.embed_tokens.weight": (V, D), "lm_head.weight": (V, D)}
    shapes["model.norm.weight"] = (D,)
    for i in range(LARGE["num_hidden_layers"]):
        shapes |= {
            f"model.layers.{i}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (D,), "self_attn.qkv_proj": (3 * D, D),
                "self_attn.o_proj": (D, D), "post_attention_layernorm": (D,),
                "mlp.gate_up_proj": (2 * F, D), "mlp.down_proj": (D, F),
            }.items()
        }
    huggingface, keras = tmp_path_factory.mktemp("large"), tmp_path_factory.mktemp("large")
    tensors = {name: np.ones(shape, ml_dtypes.bfloat16) for name, shape in shapes.items()}
    safetensors.numpy.save_file(tensors, huggingface / "model.safetensors")
    (huggingface / "config.json").write_text(json.dumps(LARGE))
    phi3_ref.Phi3Backbone.from_preset(huggingface, dtype="bfloat16").save_to_preset(keras)
    split = tmp_path_factory.mktemp("large")
    for name in [name for name in tensors if "qkv_proj" in name or "gate_up_proj" in name]:
        parts = "q_proj k_proj v_proj" if "qkv_proj" in name else "gate_proj up_proj"
        whole, parts = tensors.pop(name), parts.split()
        for part, array in zip(parts, np.split(whole, len(parts)), strict=True):
            tensors[re.sub("qkv_proj|gate_up_proj", part, name)] = array
    safetensors.numpy.save_file(tensors, split / "model.safetensors")
    (split / "config.json").write_text(json.dumps(LARGE | {"model_type": "llama"}))
    yield {"huggingface": huggingface, "keras": keras, "split": split}
    for directory in (huggingface, keras, split):
        shutil.rmtree(directory)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("layout", ["huggingface", "keras", "split"])
def test_loading_never_holds_two_copies(large_presets, layout, dtype):
    """The peak of loading 160 MB of bfloat16 is the model in its own dtype plus 150 MB at most."""
    result = subprocess.run(
        [sys.executable, "-c", PEAK, str(large_presets[layout]), dtype],
        capture_output=True, text=True, check=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(pathlib.Path(phi3_ref.__file__).parent)},
    )
    overhead, size = map(float, result.stdout.split())
    assert size > 150 and overhead < 150, f"{overhead:.0f} MB beside the model's {size:.0f} MB"


# The hubs -----------------------------------------------------------------------------------------


@pytest.fixture
def huggingface_hub_files(monkeypatch, tmp_path_factory):
    """Serve `snapshot_download` from a directory; the list of (repository, name) it fetched."""
    import huggingface_hub

    asked, served, cache = [], {}, tmp_path_factory.mktemp("cache")

    def download(repo_id, *, allow_patterns, **kwargs):
        names = huggingface_hub.utils.filter_repo_objects(
            files_below(served["directory"]), allow_patterns=allow_patterns
        )
        for name in names:
            asked.append((repo_id, name))
            (cache / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(served["directory"] / name, cache / name)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked, served


@pytest.mark.parametrize("load_weights", [True, False])
@pytest.mark.parametrize("sharded", [True, False])
def test_hf_handles_ask_for_the_files_of_the_repository(
    huggingface_hub_files, huggingface_model, tmp_path, sharded, load_weights
):
    """`hf://organization/name`: every file comes from that repository; weights only if wanted."""
    asked, served = huggingface_hub_files
    served["directory"] = tmp_path
    write_huggingface(huggingface_model, tmp_path, **({"max_shard_size": "8KB"} if sharded else {}))
    model = phi3_ref.Phi3CausalLM.from_preset("hf://acme/tiny-phi", load_weights=load_weights)
    assert {repository for repository, _ in asked} == {"acme/tiny-phi"}
    files = {name for _, name in asked}
    weights = {path.name for path in tmp_path.glob("*.safetensors")}
    assert "config.json" in files and files & weights == (weights if load_weights else set())
    assert model.preprocessor is None
    if load_weights:
        local = phi3_ref.Phi3CausalLM.from_preset(tmp_path)
        assert_same_weights(model.backbone.get_weights(), local.backbone.get_weights())


def test_each_small_file_is_looked_for_once(keras_preset, huggingface_preset, monkeypatch):
    """And is one of those that a hub is asked for before."""
    asked, file = [], phi3_ref.Preset.file
    monkeypatch.setattr(
        phi3_ref.Preset, "file", lambda preset, name: asked.append(name) or file(preset, name)
    )
    for directory in (keras_preset, huggingface_preset):
        phi3_ref.Phi3CausalLM.from_preset(directory, load_weights=False)
        assert asked.count("config.json") == 1
        assert len(set(asked)) == len(asked) and set(asked) <= set(phi3_ref.SMALL_FILES)
        asked.clear()


def test_hf_handles_serve_keras_presets_too(huggingface_hub_files, keras_written, keras_model):
    """A repository in Keras's format, as `keras_hub.upload_preset` makes it."""
    asked, served = huggingface_hub_files
    served["directory"] = keras_written
    ours = phi3_ref.Backbone.from_preset("hf://keras/phi3_tiny")
    assert_same_weights(ours.get_weights(), keras_model.get_weights())
    assert ("keras/phi3_tiny", "model.weights.h5") in asked


@pytest.mark.parametrize("load_weights", [True, False])
@pytest.mark.parametrize(
    "preset, handle",
    [
        ("phi3_mini_4k_instruct_en", "keras/phi3/keras/phi3_mini_4k_instruct_en/2"),
        ("phi3_mini_128k_instruct_en", "keras/phi3/keras/phi3_mini_128k_instruct_en/2"),
        ("kaggle://acme/phi3/keras/tiny/1", "acme/phi3/keras/tiny/1"),
        ("kaggle://acme/phi3/keras/tiny", "acme/phi3/keras/tiny"),
    ],
)
def test_kaggle_handles_ask_for_the_files_of_the_model(
    preset, handle, load_weights, keras_written, keras_model, monkeypatch
):
    """Built-in names and `kaggle://` handles: KerasHub's own; weights only if wanted."""
    import kagglehub
    import requests
    from kagglehub.exceptions import KaggleApiHTTPError

    asked = []

    def download(handle, path=None, **kwargs):
        assert path, "the whole model was asked for"
        asked.append((handle, path))
        if not (keras_written / path).exists():
            response = requests.Response()
            response.status_code = 404
            raise KaggleApiHTTPError(f"404 Client Error. {path}", response)
        return str(keras_written / path)

    monkeypatch.setattr(kagglehub, "model_download", download)
    ours = phi3_ref.Phi3CausalLM.from_preset(preset, load_weights=load_weights)
    assert {asked_handle for asked_handle, _ in asked} == {handle}
    files = {path for _, path in asked}
    assert "config.json" in files and ("model.weights.h5" in files) == load_weights
    if load_weights:
        assert_same_weights(ours.backbone.get_weights(), keras_model.get_weights())


def test_a_malformed_handle_is_an_error_that_names_it():
    """Unknown schemes and handles of the wrong length are refused; nothing is downloaded."""
    for preset, name in [
        ("kaggle://acme/phi3", "acme/phi3"), ("hf://acme/a/b", "acme/a/b"), ("s3://a/b", "s3"),
        ("hf://acme/a@", "no revision"),
    ]:
        with pytest.raises(ValueError, match=name):
            phi3_ref.Phi3Backbone.from_preset(preset)


def test_built_in_names_are_listed():
    """`presets` lists KerasHub's names and the embedded one, each of 3,821,079,552 parameters."""
    names = set(keras_hub.models.Phi3Backbone.presets)
    assert set(phi3_ref.Phi3Backbone.presets.keys()) == names | {"phi3_tiny_puzzles_en"}


assert TINY_HUGGINGFACE["vocab_size"] == CONFIG["vocabulary_size"]  # INPUTS suits both
