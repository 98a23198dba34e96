"""Directories as Hugging Face's transformers writes them: equal logits, equal greedy text."""

import json

import numpy as np
import pytest
import references as ref

import phi3_ref

SHORT, LONG = [1.0, 1.5, 2.0], [2.0, 4.0, 8.0]
ROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": SHORT, "long_factor": LONG}


def longrope(original=8, **rope):
    """Returns the config of a longrope model pretrained with `original` positions."""
    return {"original_max_position_embeddings": original, "rope_parameters": {**ROPE, **rope}}


MODELS = {
    "plain": {},
    "grouped queries": {"num_key_value_heads": 2},
    "one key/value head": {"num_key_value_heads": 1},
    "prime counts": {"num_attention_heads": 7, "hidden_size": 42, "intermediate_size": 43,
                     "num_key_value_heads": 7, "vocab_size": 53},
    "another wavelength": {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},
    "longrope, short side": longrope(original=100),
    "longrope, long side": longrope(original=8),
    "longrope, explicit factor": longrope(factor=5.0),
    "longrope, factor below 1": longrope(factor=0.5),
    "longrope, explicit attention_factor": longrope(attention_factor=1.3),
    "longrope, attention_factor over factor": longrope(attention_factor=0.8, factor=5.0),
    "sliding window": {"sliding_window": 3},
    "sliding window, grouped queries, longrope": {
        "sliding_window": 5, "num_key_value_heads": 2, **longrope()},
    "partial rotary": {"rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.67}},
    "partial rotary, longrope": longrope(
        partial_rotary_factor=0.67, short_factor=SHORT[:2], long_factor=LONG[:2]),
    "tied embeddings": {"tie_word_embeddings": True},
    "explicit head_dim": {"head_dim": 10},
    "explicit head_dim, partial rotary, grouped queries": {
        "head_dim": 8, "num_key_value_heads": 2, "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    "large epsilon": {"rms_norm_eps": 0.1},
}


TOO_LONG = pytest.mark.filterwarnings("ignore:.*max_sequence_length")


def token_ids(batch=2, length=16, seed=0):
    return np.random.default_rng(seed).integers(3, 50, (batch, length)).astype("int32")


def ours(directory, **kwargs):
    return phi3_ref.Phi3CausalLM.from_preset(directory, **kwargs)


def check_logits(directory, dtype="float32", reference=None, mask=None, length=16):
    """Asserts that we and transformers compute equal logits from one directory."""
    reference = reference or ref.read_huggingface(directory, dtype)
    inputs = {"token_ids": token_ids(length=length)}
    if mask is not None:
        inputs["padding_mask"] = mask
    logits = ours(directory, dtype=dtype)(inputs)
    assert logits.dtype == ref.NUMPY_DTYPE[dtype]
    expected = ref.transformers_logits(reference, *inputs.values())
    visible = None if mask is None else mask.cumsum(1) > 0  # rows that see a key
    assert ref.relative_error(logits, expected, visible) <= ref.TOLERANCE[dtype]


# Logits ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_logits(config, tmp_path):
    """What save_pretrained wrote gives transformers' logits, for every kind of Phi-3."""
    model = ref.transformers_model(config)
    check_logits(ref.write_huggingface(model, tmp_path), reference=model)


@pytest.mark.parametrize("name", ["sliding window", "partial rotary", "tied embeddings",
                                  "explicit head_dim", "longrope, explicit attention_factor",
                                  "longrope, explicit factor", "longrope, long side"])
def test_every_setting_matters(name, tmp_path):
    """Without its special setting each model gives other logits: the test above does see it."""
    directory = ref.write_huggingface(ref.transformers_model(MODELS[name]), tmp_path)
    logits = ours(directory)({"token_ids": token_ids()})
    file = tmp_path / "config.json"
    special = ("sliding_window", "rope_parameters", "tie_word_embeddings", "head_dim")
    config = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in config.items() if k not in special}))
    if name in ("tied embeddings", "explicit head_dim"):  # then the tensors do not fit any more
        with pytest.raises(ValueError, match="lm_head" if "tied" in name else "qkv_proj"):
            ours(directory)
    else:
        changed = ours(directory)({"token_ids": token_ids()})
        assert ref.relative_error(changed, logits) > 1e-3


@pytest.mark.parametrize("kind", ["right", "left", "holes"])
@pytest.mark.parametrize("name", ["plain", "sliding window, grouped queries, longrope"])
def test_padding(name, kind, tmp_path):
    """With padding on either side or in between, every row that sees a key has equal logits."""
    model = ref.transformers_model(MODELS[name])
    directory = ref.write_huggingface(model, tmp_path)
    rng = np.random.default_rng(4)
    mask = np.array([ref.padding_row(kind, 16, rng), np.ones(16)], "int64")
    if "window" in name:  # a row whose window is all padding sees nothing: transformers averages
        mask[0, 2::3] = 1
    assert 0 < mask[0].sum() < 16
    check_logits(directory, reference=model, mask=mask)


@pytest.mark.parametrize("name", ["plain", "longrope, long side", "tied embeddings"])
def test_shards(name, tmp_path):
    """A model in many small files, as its index lists them, is the same model."""
    model = ref.transformers_model(MODELS[name])
    directory = ref.write_huggingface(model, tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert not (tmp_path / "model.safetensors").exists()
    check_logits(directory, reference=model)


@pytest.mark.parametrize("computed", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
def test_dtypes(stored, computed, tmp_path):
    """A file of any dtype computes in the caller's: transformers' logits. float32 if none."""
    model = ref.transformers_model(MODELS["grouped queries"], stored)
    directory = ref.write_huggingface(model, tmp_path)
    check_logits(directory, computed)
    backbone = ours(directory).backbone
    assert backbone.dtype_policy == "float32"
    expected = model.model.norm.weight.detach().float().numpy()
    assert (backbone.get_weights()[-1] == expected).all()


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_policies(policy, tmp_path):
    """A mixed policy keeps float32 weights and computes what the 16-bit policy computes."""
    model = ref.transformers_model({})
    directory = ref.write_huggingface(model, tmp_path)
    mixed, half = ours(directory, dtype=policy), ours(directory, dtype=policy[6:])
    assert mixed.backbone.get_weights()[0].dtype == np.float32
    inputs = {"token_ids": token_ids()}
    assert mixed(inputs).dtype == half(inputs).dtype
    assert ref.relative_error(mixed(inputs), half(inputs)) <= ref.TOLERANCE[policy]


@TOO_LONG
@pytest.mark.parametrize("dtype", ref.NUMPY_DTYPE)
def test_error_is_no_larger_than_transformers(dtype):
    """Over 30 models of every kind, the mean error against float64 is no larger than its own."""
    parity, ours, theirs = np.array(ref.transformers_errors(dtype, range(30))).T
    assert parity.max() <= ref.TOLERANCE[dtype]
    assert ref.no_larger(ours, theirs)


# The config's spellings --------------------------------------------------------------------------

@pytest.mark.parametrize("original_is", ["beside rope_scaling", "inside rope_scaling"])
@pytest.mark.parametrize("key", ["type", "rope_type"])
@pytest.mark.parametrize("kind", ["su", "yarn", "longrope"])
def test_rope_scaling_spellings(kind, key, original_is, tmp_path):
    """`rope_scaling` of type su, yarn or longrope is the longrope that `rope_parameters` says."""
    model = ref.transformers_model(longrope(original=8))
    scaling = {key: kind, "short_factor": SHORT, "long_factor": LONG}
    changes = {"rope_parameters": None, "rope_theta": 10000.0, "rope_scaling": scaling}
    if original_is == "inside rope_scaling":
        scaling["original_max_position_embeddings"] = 8
        changes["original_max_position_embeddings"] = None
    check_logits(ref.write_huggingface(model, tmp_path, changes), reference=model)


@pytest.mark.parametrize("rope_scaling", [
    None,
    {"type": "longrope", "short_factor": SHORT[:2], "long_factor": LONG[:2]},
    {"rope_type": "longrope", "short_factor": SHORT[:2], "long_factor": LONG[:2]},
    {"type": "yarn", "short_factor": SHORT[:2], "long_factor": LONG[:2],
     "original_max_position_embeddings": 8},
    {"type": "su", "short_factor": SHORT[:2], "long_factor": LONG[:2],
     "original_max_position_embeddings": 8},
    {"type": "longrope", "short_factor": SHORT[:2], "long_factor": LONG[:2], "factor": 3.0},
], ids=lambda scaling: str(scaling and scaling.get("type", "rope_type")))
def test_old_spelling_that_transformers_reads(rope_scaling, tmp_path):
    """RoPE's entries beside each other, as Phi-4-mini has them: one file, equal logits."""
    model = ref.transformers_model({"original_max_position_embeddings": 8})
    changes = {"rope_parameters": None, "rope_theta": 500.0, "partial_rotary_factor": 0.67,
               "rope_scaling": rope_scaling}
    check_logits(ref.write_huggingface(model, tmp_path, changes))


def test_unknown_rope(tmp_path):
    """A kind of RoPE that no Phi-3 has is refused by name, not computed as something else."""
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    directory = ref.write_huggingface(ref.transformers_model({}), tmp_path,
                                      {"rope_parameters": rope})
    with pytest.raises(ValueError, match="linear"):
        ours(directory)


def test_defaults_of_a_short_config(tmp_path):
    """Entries that transformers may leave out mean to us what they mean to transformers."""
    model = ref.transformers_model({"num_key_value_heads": 4, "max_position_embeddings": 4096,
                                    "original_max_position_embeddings": 4096})
    names = ("num_key_value_heads", "max_position_embeddings", "original_max_position_embeddings",
             "rms_norm_eps", "rope_parameters", "hidden_act", "tie_word_embeddings",
             "attention_dropout", "sliding_window", "dtype", "use_cache", "resid_pdrop")
    directory = ref.write_huggingface(model, tmp_path, dict.fromkeys(names))
    assert not any(name in (tmp_path / "config.json").read_text() for name in names)
    check_logits(directory, reference=model)
    backbone, config = ours(directory).backbone, ref.read_huggingface(directory).config
    assert backbone.layer_norm_epsilon == config.rms_norm_eps
    assert backbone.max_sequence_length == config.max_position_embeddings


# Greedy text -------------------------------------------------------------------------------------

def greedy(directory, prompt, max_length, dtype="float32"):
    """Returns transformers' and our own greedy continuation of `prompt` [B, S], both [B, T]."""
    import torch
    model = ref.read_huggingface(directory, dtype)
    expected = model.generate(
        torch.from_numpy(prompt.astype("int64")), attention_mask=torch.ones(prompt.shape).long(),
        max_new_tokens=max_length - prompt.shape[1], do_sample=False, eos_token_id=None)
    room = [(0, 0), (0, max_length - prompt.shape[1])]
    causal_lm = ours(directory, dtype=dtype)
    causal_lm.compile(sampler="greedy")
    output = causal_lm.generate({"token_ids": np.pad(prompt, room),
                                 "padding_mask": np.pad(np.ones_like(prompt), room)},
                                stop_token_ids=None)
    assert output["padding_mask"].all()
    return expected.numpy(), output["token_ids"]


@pytest.mark.parametrize("name", ["plain", "grouped queries", "sliding window", "tied embeddings",
                                  "partial rotary, longrope", "longrope, short side",
                                  "explicit head_dim"])
def test_greedy_text(name, tmp_path):
    """Greedy generation, one cached position at a time, equals transformers' token for token."""
    directory = ref.write_huggingface(ref.transformers_model(MODELS[name]), tmp_path)
    expected, got = greedy(directory, token_ids(2, 5), 40)
    assert (got == expected).all()
    if name != "tied embeddings":  # which without training echo their last token
        assert len(np.unique(got[:, 5:])) > 5


@pytest.mark.parametrize("prompt_length", [1, 9, 11, 12, 13, 14, 20])
def test_greedy_text_across_the_su_boundary(prompt_length, tmp_path):
    """Generation that outgrows 12 pretraining positions equals transformers' token for token."""
    config = {**longrope(original=12, short_factor=[0.5, 0.6, 0.7]), "num_key_value_heads": 2}
    directory = ref.write_huggingface(ref.transformers_model(config), tmp_path)
    expected, got = greedy(directory, token_ids(2, prompt_length), 36)
    assert (got == expected).all()
    # The boundary does change the text: with short factors all along it would be another.
    changes = {"original_max_position_embeddings": 100,
               "rope_parameters": {**ROPE, "short_factor": [0.5, 0.6, 0.7], "attention_factor":
                                   ref.exact_su_magnitude(128, 12)}}
    other = ref.write_huggingface(ref.transformers_model(config), tmp_path / "short", changes)
    assert (greedy(other, token_ids(2, prompt_length), 36)[1] != got).any()


def test_greedy_text_in_a_sliding_window_across_the_su_boundary(tmp_path):
    """A window and a crossing together: the recomputed cache obeys the window, too."""
    config = {**longrope(original=12), "sliding_window": 5}
    directory = ref.write_huggingface(ref.transformers_model(config), tmp_path)
    expected, got = greedy(directory, token_ids(2, 6), 36)
    assert (got == expected).all()
