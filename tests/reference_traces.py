"""What phi3_ref's tap sees, recorded from KerasHub's and from transformers' models: same names.

Both give every name. KerasHub does so on TensorFlow; on JAX and torch its attention is one fused
operation, and "attention.scores" and "attention.probabilities" do not exist. From transformers the
same two exist with `attn_implementation="eager"` only, which the recorder asks for.
"""

import contextlib
from unittest import mock

import ml_dtypes
import numpy as np

import phi3_ref


def keras_trace(backbone, inputs):
    """Returns the Trace of KerasHub's Phi3Backbone, and of the logits, on `inputs`.

    Args:
        backbone: keras_hub.models.Phi3Backbone.
        inputs: dict of "token_ids" and "padding_mask", each [B, S].
    """
    from keras import ops
    trace, stack = phi3_ref.Trace(), contextlib.ExitStack()

    def wrap(owner, method, before=(), after=()):
        """Names `method`'s first argument and its result; a second name is the second call's."""
        original, before, after = getattr(owner, method), [*before], [*after]

        def call(*args, **kwargs):
            if before:
                trace(before.pop(0), ops.convert_to_numpy(args[0]))
            result = original(*args, **kwargs)
            if after:
                trace(after.pop(0), ops.convert_to_numpy(ops.cast(result, backbone.compute_dtype)))
            return result

        stack.enter_context(mock.patch.object(owner, method, call))

    with stack:
        wrap(backbone.token_embedding, "call", after=["token_embedding"])
        for layer in backbone.transformer_layers:
            path, attention = layer.name, layer.attention
            wrap(layer, "call", after=[path])
            for name in ("pre_attention_layernorm", "feedforward_gate_dense",
                         "feedforward_intermediate_dense", "feedforward_output_dense"):
                wrap(getattr(layer, name), "call", after=[f"{path}.{name.removesuffix('_dense')}"])
            wrap(layer.post_attention_layernorm, "call", before=[f"{path}.attention_residual"],
                 after=[f"{path}.post_attention_layernorm"])
            for name in ("query", "key", "value"):
                dense = getattr(attention, f"{name}_dense")
                wrap(dense, "call", after=[f"{path}.attention.{name}"])
            wrap(attention.rotary_embedding_layer, "call",
                 after=[f"{path}.attention.query_rotary", f"{path}.attention.key_rotary"])
            wrap(attention, "_masked_softmax", before=[f"{path}.attention.scores"],
                 after=[f"{path}.attention.probabilities"])  # cast as KerasHub's next line does
            wrap(attention, "_compute_attention", after=[f"{path}.attention.context"])
            wrap(attention.output_dense, "call", after=[f"{path}.attention_output"])
        wrap(backbone.layer_norm, "call", after=["sequence_output_layernorm"])
        hidden_states = backbone(inputs)
    logits = backbone.token_embedding(hidden_states, reverse=True)
    trace("logits", ops.convert_to_numpy(logits))
    return trace


def transformers_trace(model, token_ids, padding_mask=None):
    """Returns the Trace of transformers' Phi3ForCausalLM.

    Args:
        model: transformers.Phi3ForCausalLM.
        token_ids: [B, S].
        padding_mask: [B, S] or None.
    """
    import torch
    from torch.overrides import TorchFunctionMode
    from transformers.models.phi3 import modeling_phi3
    trace, config, attend = phi3_ref.Trace(), model.config, modeling_phi3.eager_attention_forward
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads

    def record(name, tensor):
        array = tensor.detach()
        if tensor.dtype == torch.bfloat16:  # of which torch makes no NumPy array
            array = array.float().numpy().astype(ml_dtypes.bfloat16)
        trace(name, np.asarray(array))

    def result(*names, shape=lambda tensor: [tensor]):
        """Returns a hook that records a module's result, cut into named pieces by `shape`."""
        def hook(module, args, output):
            for name, tensor in zip(names, shape(output), strict=True):
                record(name, tensor)
        return hook

    def cut_qkv(qkv):
        by_head = qkv.unflatten(-1, (heads + 2 * kv_heads, -1))  # [B, S, H + 2K, C]
        return by_head.split([heads, kv_heads, kv_heads], dim=2)

    class Products(TorchFunctionMode):
        """Records the one product by a number in eager attention: that by the scale."""

        def __torch_function__(self, function, types, args=(), kwargs=None):
            product = function(*args, **kwargs or {})
            if function is torch.Tensor.mul:
                record(f"{self.path}.scores", product)
            return product

    def eager_attention(module, query, key, value, *args, **kwargs):
        path = f"transformer_layer_{module.layer_idx}.attention"
        record(f"{path}.query_rotary", query.transpose(1, 2))
        record(f"{path}.key_rotary", key.transpose(1, 2))
        products = Products()
        products.path = path
        with products:
            context, probabilities = attend(module, query, key, value, *args, **kwargs)
        record(f"{path}.probabilities", probabilities)
        record(f"{path}.context", context)
        return context, probabilities

    with contextlib.ExitStack() as stack:
        def hook(module, *names, **kwargs):
            handle = module.register_forward_hook(result(*names, **kwargs))
            stack.callback(handle.remove)

        stack.callback(setattr, config, "_attn_implementation", config._attn_implementation)
        config._attn_implementation = "eager"
        stack.enter_context(
            mock.patch.object(modeling_phi3, "eager_attention_forward", eager_attention))
        hook(model.model.embed_tokens, "token_embedding")
        for i, layer in enumerate(model.model.layers):
            path = f"transformer_layer_{i}"
            hook(layer.input_layernorm, f"{path}.pre_attention_layernorm")
            hook(layer.self_attn.qkv_proj, *(f"{path}.attention.{name}"
                                             for name in ("query", "key", "value")), shape=cut_qkv)
            hook(layer.self_attn.o_proj, f"{path}.attention_output")
            handle = layer.post_attention_layernorm.register_forward_pre_hook(
                lambda module, args, path=path: record(f"{path}.attention_residual", args[0]))
            stack.callback(handle.remove)
            hook(layer.post_attention_layernorm, f"{path}.post_attention_layernorm")
            hook(layer.mlp.gate_up_proj, f"{path}.feedforward_gate",
                 f"{path}.feedforward_intermediate", shape=lambda x: x.chunk(2, dim=-1))
            hook(layer.mlp.down_proj, f"{path}.feedforward_output")
            hook(layer, path)
        hook(model.model.norm, "sequence_output_layernorm")
        hook(model.lm_head, "logits")
        mask = None if padding_mask is None else torch.from_numpy(np.asarray(padding_mask, "int64"))
        with torch.no_grad():
            model(input_ids=torch.from_numpy(np.asarray(token_ids, "int64")), attention_mask=mask,
                  use_cache=False)
    return trace
