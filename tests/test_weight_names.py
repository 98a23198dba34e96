"""Weights as others name, split, tie and shard them: transformers' logits, or what is missing.

The reference is always what transformers reads from the same directory.
"""

import json
import pathlib
import re

import numpy as np
import pytest
import references as ref
import safetensors.numpy
import torch
import transformers

import phi3_ref

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
TOKEN_IDS = np.random.default_rng(0).integers(3, 50, (2, 16)).astype("int32")
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.5, 2.0],
            "long_factor": [2.0, 4.0, 8.0], "original_max_position_embeddings": 8}


def written(directory, changes=None, **settings):
    """Writes a random Phi3ForCausalLM, and changes its config.json; returns its tensors."""
    ref.write_huggingface(ref.transformers_model(settings), directory, changes)
    return safetensors.numpy.load_file(directory / "model.safetensors")


def rewrite(directory, tensors):
    """Saves `tensors` in place of those that the directory holds."""
    safetensors.numpy.save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def same_logits(directory, reference=None):
    """Asserts that ours and transformers' logits are equal; returns our model."""
    ours = phi3_ref.Phi3CausalLM.from_preset(directory)
    reference = reference or ref.read_huggingface(directory)
    expected = ref.transformers_logits(reference, TOKEN_IDS)
    error = ref.relative_error(ours({"token_ids": TOKEN_IDS}), expected)
    assert error <= ref.TOLERANCE["float32"]
    return ours


# Tied embeddings ---------------------------------------------------------------------------------

def test_a_head_that_differs_is_kept_although_the_config_ties_it(tmp_path):
    """As in transformers, and with one warning, as there. It is then another model's head."""
    tensors = written(tmp_path, {"tie_word_embeddings": True})
    with pytest.warns(UserWarning, match=f"{HEAD}.*not tied") as caught:
        ours = same_logits(tmp_path)
    assert len(caught) == 1
    assert not ours.backbone.tie_word_embeddings
    assert ours.backbone.count_params() == sum(tensor.size for tensor in tensors.values())
    np.testing.assert_array_equal(ours.backbone.weights["reverse_embedding"], tensors[HEAD])


def test_a_copy_of_the_tied_embedding_is_no_second_one(tmp_path):
    """Files of both names and one value stay tied, and say nothing."""
    tensors = written(tmp_path, tie_word_embeddings=True)
    rewrite(tmp_path, tensors | {HEAD: tensors[EMBEDDING]})
    ours = same_logits(tmp_path)
    assert ours.backbone.tie_word_embeddings
    weights = ours.backbone.weights
    assert weights["reverse_embedding"] is weights["token_embedding"]


def test_of_tied_embeddings_either_may_be_there(tmp_path):
    """Tying is symmetric in transformers: the one that is in the file is both."""
    tensors = written(tmp_path, tie_word_embeddings=True)
    rewrite(tmp_path, {HEAD: tensors.pop(EMBEDDING), **tensors})
    assert same_logits(tmp_path).backbone.tie_word_embeddings


def test_an_untied_model_without_a_head_is_none(tmp_path):
    """In transformers it is a random one. Here the causal LM names it, and the backbone goes on."""
    tensors = written(tmp_path, {"tie_word_embeddings": False}, tie_word_embeddings=True)
    assert HEAD not in tensors
    with pytest.raises(ValueError, match=f"no tensor {HEAD}"):
        phi3_ref.Phi3CausalLM.from_preset(tmp_path)
    with pytest.warns(UserWarning, match=f"no tensor {HEAD}"):
        backbone = phi3_ref.Phi3Backbone.from_preset(tmp_path)
    heads = [ref.read_huggingface(tmp_path).lm_head.weight for _ in range(2)]
    assert (heads[0] != heads[1]).any(), ref.seen_with("transformers", "5.24.0")
    hidden_states = backbone({"token_ids": TOKEN_IDS})
    assert not backbone.token_embedding(hidden_states, reverse=True).any()


# Tensors that the index does not list ------------------------------------------------------------

@pytest.mark.parametrize("head", ["a copy", "another"])
def test_what_an_index_does_not_list_is_as_in_a_single_file(head, tmp_path):
    """Old frequencies of RoPE are ignored; a tied head is one only where it is a copy."""
    model = ref.transformers_model({"tie_word_embeddings": True})
    ref.write_huggingface(model, tmp_path, max_shard_size="8KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[0]
    tensors = safetensors.numpy.load_file(shard)
    tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = np.ones(3, "float32")
    tensors[HEAD] = model.model.embed_tokens.weight.detach().numpy() * (2 if head == "another"
                                                                        else 1)
    safetensors.numpy.save_file(tensors, shard, {"format": "pt"})
    if head == "a copy":
        assert same_logits(tmp_path).backbone.tie_word_embeddings
    else:
        with pytest.warns(UserWarning, match="not tied"):
            same_logits(tmp_path)


def test_an_unlisted_weight_is_still_an_error_that_names_it(tmp_path):
    """What the model needs must be where the index says."""
    ref.write_huggingface(ref.transformers_model({}), tmp_path, max_shard_size="8KB")
    path = tmp_path / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    for name in ("model.layers.1.mlp.down_proj.weight", HEAD):
        others = {key: value for key, value in weight_map.items() if key != name}
        path.write_text(json.dumps({"weight_map": others}))
        with pytest.raises(ValueError, match=name):
            phi3_ref.Phi3CausalLM.from_preset(tmp_path)


# Names -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_the_model_without_its_head_saved_alone(tied, sharded, tmp_path):
    """`Phi3Model.save_pretrained` leaves out the prefix; the causal LM says what is missing."""
    model = ref.transformers_model({"tie_word_embeddings": tied})
    model.model.save_pretrained(tmp_path, **({"max_shard_size": "8KB"} if sharded else {}))
    if tied:
        same_logits(tmp_path, reference=model)
        return
    with pytest.raises(ValueError, match=f"no tensor {HEAD}"):
        phi3_ref.Phi3CausalLM.from_preset(tmp_path)
    with pytest.warns(UserWarning, match=HEAD):
        backbone = phi3_ref.Phi3Backbone.from_preset(tmp_path)
    expected = model.model(torch.from_numpy(TOKEN_IDS).long()).last_hidden_state.detach().numpy()
    error = ref.relative_error(backbone({"token_ids": TOKEN_IDS}), expected)
    assert error <= ref.TOLERANCE["float32"]


@pytest.mark.parametrize("cls", ["Phi3ForSequenceClassification", "Phi3ForTokenClassification"])
def test_a_classifier_has_a_backbone(cls, tmp_path):
    """Its hidden states are transformers'; its own head is named, and so is the one it lacks."""
    model = getattr(transformers, cls)(ref.transformers_model({}).config).eval()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"no tensor {HEAD}"):
        phi3_ref.Phi3CausalLM.from_preset(tmp_path)
    with pytest.warns(UserWarning, match=HEAD), pytest.warns(UserWarning, match=r"score\.weight"):
        backbone = phi3_ref.Phi3Backbone.from_preset(tmp_path)
    expected = model.model(torch.from_numpy(TOKEN_IDS).long()).last_hidden_state.detach().numpy()
    error = ref.relative_error(backbone({"token_ids": TOKEN_IDS}), expected)
    assert error <= ref.TOLERANCE["float32"]


def test_a_reward_head_beside_the_language_models(tmp_path):
    """TRL's value head leaves the causal LM what it is; that it is there is said."""
    tensors = written(tmp_path)
    rewrite(tmp_path, tensors | {"v_head.summary.weight": np.ones((1, 24), "float32"),
                                 "v_head.summary.bias": np.ones(1, "float32")})
    with pytest.warns(UserWarning, match=r"v_head\.summary\.weight") as caught:
        same_logits(tmp_path)
    assert len(caught) == 1


@pytest.mark.parametrize("bare", [False, True])
def test_pefts_prefix(bare, tmp_path):
    """A merged model's tensors are read under `base_model.model.`, too."""
    tensors = written(tmp_path, tie_word_embeddings=bare)
    model = ref.read_huggingface(tmp_path)
    rewrite(tmp_path, {f"base_model.model.{name.removeprefix('model.') if bare else name}": tensor
                       for name, tensor in tensors.items()})
    same_logits(tmp_path, reference=model)


@pytest.mark.parametrize("rename", [
    lambda name: name.replace("o_proj.", "o_proj.base_layer."),
    lambda name: name.replace("o_proj.weight", "o_proj.lora_A.weight")])
def test_an_adapter_that_is_not_merged_is_refused(rename, tmp_path):
    """PEFT's layers beside or around the model's own."""
    tensors = written(tmp_path)
    rewrite(tmp_path, tensors | {f"base_model.model.{rename(name)}": tensors[name]
                                 for name in tensors if "o_proj" in name})
    with pytest.raises(ValueError, match=r"base_layer|lora_A"):
        phi3_ref.Phi3CausalLM.from_preset(tmp_path)


def test_a_tensor_under_two_names_is_refused(tmp_path):
    """With a prefix and without, or fused and split: which one counts, nothing says."""
    tensors = written(tmp_path)
    qkv = tensors["model.layers.0.self_attn.qkv_proj.weight"]
    for name, tensor in {"norm.weight": tensors["model.norm.weight"],
                         "model.layers.0.self_attn.q_proj.weight": qkv[:24]}.items():
        rewrite(tmp_path, tensors | {name: tensor})
        with pytest.raises(ValueError, match=re.escape(name)):
            phi3_ref.Phi3CausalLM.from_preset(tmp_path)


# Llama's and Mistral's ---------------------------------------------------------------------------

SPLIT = {
    "plain": {}, "grouped queries": {"num_key_value_heads": 2}, "head_dim": {"head_dim": 10},
    "tied": {"tie_word_embeddings": True}, "wavelength": {"rope_parameters": {
        "rope_type": "default", "rope_theta": 300.0}},
    "longrope, long side": {"rope_parameters": LONGROPE},
    "longrope, attention_factor": {"rope_parameters": {**LONGROPE, "attention_factor": 1.3}},
    "longrope, of no given length": {"max_position_embeddings": 8, "rope_parameters": {
        key: LONGROPE[key] for key in LONGROPE if key != "original_max_position_embeddings"}},
    "longrope, length at the top": {"rope_parameters": LONGROPE,
                                    "original_max_position_embeddings": 20},
}
DEFAULTS = ("rms_norm_eps", "max_position_embeddings", "num_key_value_heads", "rope_parameters",
            "attention_dropout", "hidden_act", "tie_word_embeddings", "head_dim")


def split_model(kind, **settings):
    """Returns a random LlamaForCausalLM or MistralForCausalLM."""
    settings = {**ref.TINY_HUGGINGFACE, **settings}
    if "original_max_position_embeddings" not in settings.get("rope_parameters", {}):
        settings.pop("original_max_position_embeddings")
    config = getattr(transformers, f"{kind}Config")(**settings, attn_implementation="eager")
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    rng = np.random.default_rng(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shape = tuple(parameter.shape)
            parameter.copy_(torch.from_numpy(ref.randomized(
                shape, rng, 0.5 if "embed_tokens" in name else shape[-1])))
    return model


def read_split(kind, directory):
    """Returns what transformers reads from a directory as Llama or Mistral."""
    return getattr(transformers, f"{kind}ForCausalLM").from_pretrained(
        directory, dtype="float32", attn_implementation="eager").eval()


@pytest.mark.filterwarnings("ignore:.*max_sequence_length")
@pytest.mark.parametrize("settings", SPLIT.values(), ids=SPLIT)
@pytest.mark.parametrize("kind", ["Llama", "Mistral"])
def test_split_projections(kind, settings, tmp_path):
    """A Phi-3 under Llama's or Mistral's names: their logits, in transformers, from the files."""
    split_model(kind, **settings).save_pretrained(tmp_path)
    assert "q_proj" in str(safetensors.numpy.load_file(tmp_path / "model.safetensors").keys())
    same_logits(tmp_path, reference=read_split(kind, tmp_path))


@pytest.mark.parametrize("kind, window", [("Mistral", 3), ("Llama", 3)])
def test_a_sliding_window_is_mistrals_and_not_llamas(kind, window, tmp_path):
    """Each as its class in transformers: one applies the field, the other does not look at it."""
    split_model(kind, sliding_window=window).save_pretrained(tmp_path)
    ours = same_logits(tmp_path, reference=read_split(kind, tmp_path))
    assert ours.backbone.sliding_window == (window if kind == "Mistral" else None)


@pytest.mark.parametrize("kind", ["Llama", "Mistral"])
def test_defaults_of_a_short_split_config(kind, tmp_path):
    """What their config.json may leave out is what their class says, not what Phi-3's does."""
    split_model(kind, hidden_size=16, num_attention_heads=8, num_key_value_heads=8
                ).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    names = (*DEFAULTS, "sliding_window")
    path.write_text(json.dumps({key: config[key] for key in config if key not in names}))
    reference = read_split(kind, tmp_path)
    backbone = same_logits(tmp_path, reference=reference).backbone
    assert backbone.layer_norm_epsilon == reference.config.rms_norm_eps
    assert backbone.max_sequence_length == reference.config.max_position_embeddings
    assert backbone.sliding_window == getattr(reference.config, "sliding_window", None)


@pytest.mark.parametrize("kind", ["Llama", "Mistral"])
@pytest.mark.parametrize("changes, name", [
    ({"attention_bias": True}, "attention_bias"), ({"mlp_bias": True}, "mlp_bias"),
    ({"hidden_act": "gelu"}, "gelu"), ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    *(({"rope_parameters": {"rope_type": rope, "rope_theta": 1e4, "factor": 2.0}}, rope)
      for rope in ("llama3", "yarn", "linear", "dynamic", "su"))])
def test_what_is_llamas_alone_is_refused_by_name(kind, changes, name, tmp_path):
    """Biases and kinds of RoPE that no Phi-3 has."""
    split_model(kind).save_pretrained(tmp_path)
    path = pathlib.Path(tmp_path, "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=name):
        phi3_ref.Phi3CausalLM.from_preset(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_split_names_under_phi3s_own_type(dtype, tmp_path):
    """The same model, its fused weights cut into their parts, is the same bit for bit."""
    settings = {"num_key_value_heads": 2}
    tensors = written(tmp_path / "fused", **settings)
    written(tmp_path / "split", **settings)
    rows = {"qkv_proj": {"q_proj": (0, 24), "k_proj": (24, 36), "v_proj": (36, 48)},
            "gate_up_proj": {"gate_proj": (0, 40), "up_proj": (40, 80)}}
    for name in list(tensors):
        for fused, parts in rows.items():
            if fused in name:
                whole = tensors.pop(name)
                tensors |= {name.replace(fused, part): whole[start:end]
                            for part, (start, end) in parts.items()}
    rewrite(tmp_path / "split", tensors)
    fused, split = (phi3_ref.Phi3CausalLM.from_preset(tmp_path / name, dtype=dtype)
                    for name in ("fused", "split"))
    for one, other in zip(fused.backbone.get_weights(), split.backbone.get_weights(), strict=True):
        assert one.tobytes() == other.tobytes()
    for name in ("k_proj", "gate_proj"):  # of two that are swapped, the sum of rows is right
        key = f"model.layers.1.{'mlp' if 'gate' in name else 'self_attn'}.{name}.weight"
        spoilt = {n: tensor for n, tensor in tensors.items() if n != key}
        rewrite(tmp_path / "split", spoilt)
        with pytest.raises(ValueError, match=f"no tensor {key}"):
            phi3_ref.Phi3CausalLM.from_preset(tmp_path / "split")
    key = "model.layers.1.self_attn.{}_proj.weight"
    rewrite(tmp_path / "split", tensors | {key.format("q"): tensors[key.format("k")],
                                           key.format("k"): tensors[key.format("q")]})
    with pytest.raises(ValueError, match=r"q_proj\.weight must be \(24, 24\)"):
        phi3_ref.Phi3CausalLM.from_preset(tmp_path / "split")
