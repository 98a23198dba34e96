"""What phi3_ref's tap sees, recorded from KerasHub's and from transformers' models: same names.

Both give every name. KerasHub does so on TensorFlow; on JAX and torch its attention is one fused
operation, and "attention.scores" and "attention.probabilities" do not exist. From transformers the
same two exist with `attn_implementation="eager"` only, which the recorder asks for.

With labels, both give the gradients, too, as `phi3_ref.Trace.record` names them: the reference's
automatic differentiation makes them, of a loss that is Keras's, in float32.
"""

import contextlib
import dataclasses
import itertools
from unittest import mock

import ml_dtypes
import numpy as np

import phi3_ref


def keras_trace(backbone, inputs, y=None, sample_weight=None):
    """Returns the Trace of KerasHub's Phi3Backbone, and of the logits, on `inputs`.

    Args:
        backbone: keras_hub.models.Phi3Backbone; for gradients, on TensorFlow.
        inputs: dict of "token_ids" and "padding_mask", each [B, S].
        y: None, or labels [B, S]: gradients are recorded.
        sample_weight: [B, S] or None.
    """
    from keras import ops
    trace, stack = phi3_ref.Trace(), contextlib.ExitStack()
    tensors = {}  # each name's, as it is used

    def record(name, tensor):
        tensors[name] = tensor
        trace(name, ops.convert_to_numpy(ops.cast(tensor, backbone.compute_dtype)))

    def wrap(owner, method, before=(), after=()):
        """Names `method`'s first argument and its result; a second name is the second call's."""
        original, before, after = getattr(owner, method), [*before], [*after]

        def call(*args, **kwargs):
            if before:
                record(before.pop(0), args[0])
            result = original(*args, **kwargs)
            if after:
                record(after.pop(0), result)
            return result

        stack.enter_context(mock.patch.object(owner, method, call))

    tape = contextlib.nullcontext()
    if y is not None:
        import keras
        import tensorflow as tf
        tape = tf.GradientTape()
    with tape, stack:
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
        record("logits", logits)
        if y is not None:
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(
                y, logits, sample_weight)
    if y is None:
        return trace
    names, variables = list(tensors)[::-1], backbone.weights
    gradients = tape.gradient(loss, [tensors[name] for name in names] + variables)
    gradients = [ops.convert_to_numpy(ops.cast(tf.convert_to_tensor(gradient),
                                               backbone.compute_dtype)) for gradient in gradients]
    for name, gradient in zip(names, gradients, strict=False):
        trace(f"{name}.gradient", gradient)
    weights, config = empty_weights(backbone)
    for (_, view), gradient in zip(phi3_ref.keras_variables(weights, config),
                                   gradients[len(names):], strict=True):
        view[...] = gradient
    for name, gradient in phi3_ref.named_weights(weights):
        trace(f"{name}.weight.gradient", gradient)
    trace.metadata["loss"] = float(loss)
    return trace


def empty_weights(backbone):
    """Returns (tree of zeros in the dtype of the computation, its config), as KerasHub's model."""
    fields = {field.name for field in dataclasses.fields(phi3_ref.Phi3Config)}
    config = phi3_ref.Phi3Config(**{
        **{name: value for name, value in backbone.get_config().items() if name in fields},
        "dtype": backbone.dtype_policy.name})
    return config.build_weights(lambda _, shape: np.zeros(shape, config.compute_dtype)), config


def transformers_trace(model, token_ids, padding_mask=None, y=None, sample_weight=None):
    """Returns the Trace of transformers' Phi3ForCausalLM.

    Args:
        model: transformers.Phi3ForCausalLM.
        token_ids: [B, S].
        padding_mask: [B, S] or None.
        y: None, or labels [B, S]: gradients are recorded.
        sample_weight: [B, S] or None.
    """
    import torch
    from torch.overrides import TorchFunctionMode
    from transformers.models.phi3 import modeling_phi3
    trace, config, attend = phi3_ref.Trace(), model.config, modeling_phi3.eager_attention_forward
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    used = []  # (names, tensor, how it is cut into what has these names) of all that is recorded

    def keep(names, pieces):
        for name, tensor in zip(names, pieces, strict=True):
            array = tensor.detach()
            if tensor.dtype == torch.bfloat16:  # of which torch makes no NumPy array
                array = array.float().numpy().astype(ml_dtypes.bfloat16)
            trace(name, np.asarray(array))

    def record(*names, tensor, shape=lambda tensor: [tensor]):
        """Records `tensor`, which the model goes on with, cut into named pieces by `shape`."""
        keep(names, shape(tensor))
        used.append((names, tensor, shape))

    def result(*names, **kwargs):
        """Returns a hook that records a module's result."""
        return lambda module, args, output: record(*names, tensor=output, **kwargs)

    def cut_qkv(qkv):
        by_head = qkv.unflatten(-1, (heads + 2 * kv_heads, -1))  # [B, S, H + 2K, C]
        return by_head.split([heads, kv_heads, kv_heads], dim=2)

    class Products(TorchFunctionMode):
        """Records the one product by a number in eager attention: that by the scale."""

        def __torch_function__(self, function, types, args=(), kwargs=None):
            product = function(*args, **kwargs or {})
            if function is torch.Tensor.mul:
                record(f"{self.path}.scores", tensor=product)
            return product

    def eager_attention(module, query, key, value, *args, **kwargs):
        path = f"transformer_layer_{module.layer_idx}.attention"
        for name, tensor in (("query_rotary", query), ("key_rotary", key)):
            record(f"{path}.{name}", tensor=tensor, shape=lambda x: [x.transpose(1, 2)])
        products = Products()
        products.path = path
        with products:
            context, probabilities = attend(module, query, key, value, *args, **kwargs)
        record(f"{path}.probabilities", tensor=probabilities)
        record(f"{path}.context", tensor=context)
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
                lambda module, args, path=path: record(
                    f"{path}.attention_residual", tensor=args[0]))
            stack.callback(handle.remove)
            hook(layer.post_attention_layernorm, f"{path}.post_attention_layernorm")
            hook(layer.mlp.gate_up_proj, f"{path}.feedforward_gate",
                 f"{path}.feedforward_intermediate", shape=lambda x: x.chunk(2, dim=-1))
            hook(layer.mlp.down_proj, f"{path}.feedforward_output")
            hook(layer, path)
        hook(model.model.norm, "sequence_output_layernorm")
        hook(model.lm_head, "logits")
        mask = None if padding_mask is None else torch.from_numpy(np.asarray(padding_mask, "int64"))
        with torch.set_grad_enabled(y is not None):
            logits = model(input_ids=torch.from_numpy(np.asarray(token_ids, "int64")),
                           attention_mask=mask, use_cache=False).logits
    if y is None:
        return trace
    y = torch.from_numpy(np.asarray(y, "int64"))
    loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), y.flatten(),
                                             reduction="none")
    if sample_weight is not None:
        loss = loss * torch.from_numpy(np.asarray(sample_weight, "float32")).flatten()
    loss = loss.sum() / y.numel()
    used.reverse()
    parameters = dict(model.named_parameters())  # a tied lm_head is listed once
    gradients = torch.autograd.grad(loss, [tensor for _, tensor, _ in used]
                                    + [*parameters.values()])
    for (names, _, shape), gradient in zip(used, gradients, strict=False):
        keep([f"{name}.gradient" for name in names], shape(gradient))
    by_name = dict(zip(parameters, gradients[len(used):], strict=True))
    ours = {"token_embedding": "model.embed_tokens.weight"}
    for i, part in itertools.product(range(config.num_hidden_layers), LAYER_WEIGHTS):
        ours[f"transformer_layer_{i}.{part}"] = f"model.layers.{i}.{LAYER_WEIGHTS[part]}.weight"
    ours["sequence_output_layernorm"] = "model.norm.weight"
    tied = config.tie_word_embeddings
    ours["reverse_embedding"] = "model.embed_tokens.weight" if tied else "lm_head.weight"
    assert set(by_name) == set(ours.values())
    for name, theirs in ours.items():
        keep([f"{name}.weight.gradient"], [by_name[theirs]])
    trace.metadata["loss"] = loss.item()
    return trace


LAYER_WEIGHTS = {
    "pre_attention_layernorm": "input_layernorm", "qkv": "self_attn.qkv_proj",
    "attention_output": "self_attn.o_proj",
    "post_attention_layernorm": "post_attention_layernorm",
    "feedforward_gate_intermediate": "mlp.gate_up_proj", "feedforward_output": "mlp.down_proj"}
