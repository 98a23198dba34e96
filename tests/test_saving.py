"""Saving in Keras's format: sharded as KerasHub does, and refused only where Keras would differ."""

import inspect
import json

import h5py
import keras_hub
import numpy as np
import pytest
import references as ref

import phi3_ref

CONFIG = dict(
    vocabulary_size=61, num_layers=3, hidden_dim=24, intermediate_dim=40, num_query_heads=4,
    num_key_value_heads=2, max_sequence_length=32, pretraining_sequence_length=8)
SHARD = 8e-6  # GB: 8 KB; the largest weight has 5,856 bytes in float32


def weight_files(directory):
    return sorted(path.name for path in directory.glob("model*"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [SHARD, 2e-5, 10, None])
def test_shards_load_in_keras(size, dtype, tmp_path):
    """As many files as KerasHub writes, none too large; KerasHub and we read our weights back."""
    theirs = ref.keras_backbone(CONFIG, dtype)
    ours = ref.ours_like(theirs)
    theirs.save_to_preset(str(tmp_path / "theirs"), max_shard_size=size)
    ours.save_to_preset(tmp_path / "ours", max_shard_size=size)
    files = weight_files(tmp_path / "ours")
    assert abs(len(files) - len(weight_files(tmp_path / "theirs"))) <= 1  # their order is another
    assert ("model.weights.json" in files) == (size not in (10, None))
    assert ("model.weights.h5" in files) == (size in (10, None))
    for path in (tmp_path / "ours").glob("*.h5"):
        stored = []
        with h5py.File(path) as file:
            file.visititems(lambda _, item, stored=stored: stored.append(
                item.nbytes if isinstance(item, h5py.Dataset) else 0))
        assert size is None or 0 < sum(stored) <= size * 2**30
    if size not in (10, None):
        index, expected = (json.loads((tmp_path / name / "model.weights.json").read_text())
                           for name in ("ours", "theirs"))
        assert index["metadata"] == expected["metadata"]
        assert index["weight_map"].keys() == expected["weight_map"].keys()
    for cls in (phi3_ref.Phi3Backbone, keras_hub.models.Phi3Backbone):
        again = cls.from_preset(str(tmp_path / "ours"), dtype=dtype)
        for one, other in zip(again.get_weights(), ours.get_weights(), strict=True):
            assert np.asarray(one).tobytes() == other.tobytes()


def test_a_causal_lm_is_sharded_too(tmp_path):
    """Its argument is KerasHub's, with KerasHub's default."""
    causal_lm = phi3_ref.Phi3CausalLM(phi3_ref.Phi3Backbone(**CONFIG))
    causal_lm.save_to_preset(tmp_path, max_shard_size=SHARD)
    assert "model_00001.weights.h5" in weight_files(tmp_path)
    for cls in ("Phi3Backbone", "Phi3CausalLM"):
        expected, default = (
            inspect.signature(getattr(module, cls).save_to_preset).parameters["max_shard_size"]
            for module in (keras_hub.models, phi3_ref))
        assert default.default == expected.default == 10


def test_shards_over_a_single_file_are_what_is_loaded(tmp_path):
    """Readers take a single file first: an older one does not stay. Nor do shards count after."""
    one, other = (phi3_ref.Phi3Backbone(**CONFIG, seed=seed) for seed in (1, 2))
    one.save_to_preset(tmp_path)
    for backbone, size in ((other, SHARD), (one, 10)):
        backbone.save_to_preset(tmp_path, max_shard_size=size)
        for cls in (phi3_ref.Phi3Backbone, keras_hub.models.Phi3Backbone):
            again = cls.from_preset(str(tmp_path))
            np.testing.assert_array_equal(again.get_weights()[0], backbone.get_weights()[0])


@pytest.mark.parametrize("size, message", [
    (1e-6, "1,.*bytes of layers|5,856 bytes of layers"), (0, "Received: 0"), (-1, "Received: -1"),
    (float("nan"), "nan"), ("1GB", "1GB"), (True, "True")])
def test_a_shard_size_that_cannot_be(size, message, tmp_path):
    """Too small for one weight, as in Keras, or no size at all: nothing is written."""
    with pytest.raises(ValueError, match=message):
        phi3_ref.Phi3Backbone(**CONFIG).save_to_preset(tmp_path / "preset", max_shard_size=size)
    assert not list(tmp_path.iterdir())
    if size == 1e-6:
        with pytest.raises(ValueError, match="exceeds the maximum shard size"):
            ref.keras_backbone(CONFIG).save_to_preset(str(tmp_path), max_shard_size=size)


# Su scaling's factor -----------------------------------------------------------------------------

ROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.5, 2.0],
        "long_factor": [2.0, 4.0, 8.0]}
USUAL = ref.exact_su_magnitude(128, 8)


@pytest.mark.parametrize("explicit", [
    {"factor": 16.0}, {"factor": 16}, {"attention_factor": USUAL},
    {"factor": 16, "attention_factor": float(f"{USUAL:.8f}")}], ids=str)
def test_an_explicit_factor_that_keras_computes_too_is_saved(explicit, tmp_path):
    """What a checkpoint spells out and follows from its lengths: KerasHub's logits, from ours."""
    model = ref.transformers_model({"original_max_position_embeddings": 8,
                                    "rope_parameters": ROPE | explicit})
    ref.write_huggingface(model, tmp_path / "hf")
    ours = phi3_ref.Phi3CausalLM.from_preset(tmp_path / "hf")
    ours.save_to_preset(tmp_path / "keras")
    theirs = keras_hub.models.Phi3CausalLM.from_preset(str(tmp_path / "keras"), preprocessor=None)
    for length in (6, 20):
        token_ids = np.random.default_rng(0).integers(3, 50, (2, length)).astype("int32")
        inputs = {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}
        expected = ref.transformers_logits(model, token_ids)
        assert ref.relative_error(ours(inputs), expected) <= ref.TOLERANCE["float32"]
        assert ref.relative_error(ref.keras_output(theirs, inputs), expected) <= 2e-6


@pytest.mark.parametrize("explicit", [{"factor": 15.9}, {"attention_factor": 1.0},
                                      {"attention_factor": USUAL * 1.00001}], ids=str)
def test_an_explicit_factor_that_keras_would_not_compute_is_refused(explicit, tmp_path):
    """By name; and the constructor's arguments give it back."""
    model = ref.transformers_model({"original_max_position_embeddings": 8,
                                    "rope_parameters": ROPE | explicit})
    ref.write_huggingface(model, tmp_path / "hf")
    backbone = phi3_ref.Phi3Backbone.from_preset(tmp_path / "hf")
    with pytest.raises(ValueError, match="rope_attention_factor"):
        backbone.save_to_preset(tmp_path / "keras")
    again = phi3_ref.Phi3Backbone.from_config(backbone.get_config())
    assert again.rope_attention_factor == backbone.rope_attention_factor


# What is not there -------------------------------------------------------------------------------

def test_what_is_no_preset_is_a_value_error_as_in_keras(tmp_path):
    """KerasHub's own tests ask for it; for Python it is a file that is not there."""
    (tmp_path / "empty").mkdir()
    for preset in ("clowntown", str(tmp_path / "empty")):
        for models in (keras_hub.models, phi3_ref):
            with pytest.raises(ValueError, match=preset):
                models.Phi3Backbone.from_preset(preset)
        with pytest.raises(FileNotFoundError, match=preset):
            phi3_ref.Phi3CausalLM.from_preset(preset)
