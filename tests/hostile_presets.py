"""Presets that no writer would write: small valid ones, ways to spoil them, and what became of it.

`PRESETS` builds valid presets in memory. `mutate` spoils a copy of one on disk, driven by a random
generator or by a fuzzer's bytes. `outcome` loads it and says what happened: the same model, a
documented refusal, another valid model that an independent reader of the files confirms, or a
finding. The tests and the fuzzer, `fuzz_presets.py`, share all three.
"""

import contextlib
import ctypes
import io
import json
import math
import os
import pathlib
import pickle
import random
import struct
import sys
import time
import warnings
import zlib
from collections import namedtuple

import h5py
import ml_dtypes
import numpy as np
import safetensors.numpy
import sentencepiece
import tokenizers
import transformers
from sentencepiece.sentencepiece_model_pb2 import ModelProto

import phi3_ref

# Valid presets ------------------------------------------------------------------------------------

MERGES = ["▁ h", "h e", "l l", "▁h e", "▁he ll", "▁ w", "o r", "▁w or"]
LETTERS = "▁dehlorw"
SPECIAL = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"]
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *LETTERS,
          *(merge.replace(" ", "") for merge in MERGES)]
V, D, F, H, K, C, LAYERS = len(PIECES) + len(SPECIAL), 8, 12, 2, 1, 4, 2
TEXTS = ["hello world", "<|user|>\nhe<|end|>\n<|assistant|>\n", "wo x é", ""]


def weights():
    """{Hugging Face's name: float32 array} of a small random model, the same on every call."""
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (V, D)}
    for i in range(LAYERS):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in {
            "input_layernorm": (D,), "self_attn.qkv_proj": ((H + 2 * K) * C, D),
            "self_attn.o_proj": (D, H * C), "post_attention_layernorm": (D,),
            "mlp.gate_up_proj": (2 * F, D), "mlp.down_proj": (D, F)}.items()}
    shapes |= {"model.norm.weight": (D,), "lm_head.weight": (V, D)}
    return {name: rng.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}


def keras_arrays(dtype):
    """{path in Keras's HDF5 file: array} of the same model, as KerasHub lays it out."""
    named = {name: array.astype(dtype) for name, array in weights().items()}
    arrays = {"layers/reversible_embedding/vars/0": named["model.embed_tokens.weight"],
              "layers/reversible_embedding/vars/1": named["lm_head.weight"].T,
              "layers/phi3_layer_norm/vars/0": named["model.norm.weight"]}
    for i in range(LAYERS):
        qkv, o_proj, gate_up, down = (
            named[f"model.layers.{i}.{name}.weight"]
            for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj",
                         "mlp.down_proj"))
        query, key, value = (part.transpose(2, 0, 1) for part in np.split(
            qkv.reshape(H + 2 * K, C, D), [H, H + K]))
        path = f"layers/phi3_decoder_{i}" if i else "layers/phi3_decoder"
        arrays |= {f"{path}/{name}/vars/0": array for name, array in {
            "pre_attention_layernorm": named[f"model.layers.{i}.input_layernorm.weight"],
            "attention/query_dense": query, "attention/key_dense": key,
            "attention/value_dense": value,
            "attention/output_dense": o_proj.reshape(D, H, C).transpose(1, 2, 0),
            "post_attention_layernorm": named[f"model.layers.{i}.post_attention_layernorm.weight"],
            "feedforward_gate_dense": gate_up[:F].T,
            "feedforward_intermediate_dense": gate_up[F:].T,
            "feedforward_output_dense": down.T}.items()}
    return arrays


def hdf5_bytes(arrays):
    """A Keras weights file's content."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        for name, array in arrays.items():
            dataset = file.create_dataset(name, data=np.ascontiguousarray(array))
            if array.dtype == ml_dtypes.bfloat16:
                dataset.attrs["dtype"] = "bfloat16"
    return buffer.getvalue()


def json_bytes(content):
    """A JSON file's content."""
    return json.dumps(content, indent=2, ensure_ascii=False).encode()


def sentencepiece_model(special):
    """A SentencePiece BPE with byte fallback; `special` tokens are appended as pieces."""
    model = ModelProto()
    model.trainer_spec.model_type = model.trainer_spec.BPE
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.remove_extra_whitespaces = False
    Type = model.SentencePiece
    for i, piece in enumerate(PIECES):
        kind = {0: Type.UNKNOWN, 1: Type.CONTROL, 2: Type.CONTROL}.get(i, Type.NORMAL)
        kind = Type.BYTE if 3 <= i < 259 else kind
        model.pieces.add(piece=piece, score=-float(max(0, i - 258)), type=kind)
    for piece in special:
        model.pieces.add(piece=piece, score=0.0, type=Type.USER_DEFINED)
    return model.SerializeToString()


def keras_object(name, config):
    """What Keras's JSON files describe an object by."""
    return {"module": "keras_hub.src.models.phi3", "class_name": name, "config": config,
            "registered_name": f"keras_hub>{name}"}


def keras_preset(dtype, sharded=False):
    """{path: content} of a Keras preset."""
    tokenizer = keras_object("Phi3Tokenizer", {"dtype": "int32", "config_file": "tokenizer.json",
                                               "proto": None})
    config = dict(
        name="phi3_backbone", trainable=True, vocabulary_size=V, num_layers=LAYERS,
        num_query_heads=H, hidden_dim=D, intermediate_dim=F, num_key_value_heads=K,
        dtype={"module": "keras", "class_name": "DTypePolicy", "config": {"name": dtype},
               "registered_name": None},
        layer_norm_epsilon=1e-5, dropout=0.0, max_sequence_length=64,
        pretraining_sequence_length=16, rope_max_wavelength=10000, rope_scaling_type="su",
        rope_scaling_short_factor=[1.0, 1.25], rope_scaling_long_factor=[1.5, 4.0])
    files = {
        "config.json": json_bytes(keras_object("Phi3Backbone", config)),
        "tokenizer.json": json_bytes(tokenizer),
        "preprocessor.json": json_bytes(keras_object("Phi3CausalLMPreprocessor", {
            "tokenizer": tokenizer, "config_file": "preprocessor.json", "sequence_length": 32,
            "add_start_token": True, "add_end_token": False})),
        "assets/tokenizer/vocabulary.spm": sentencepiece_model(SPECIAL),
    }
    arrays = keras_arrays({"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}[dtype])
    if not sharded:
        return files | {"model.weights.h5": hdf5_bytes(arrays)}
    weight_map, names = {}, list(arrays)
    for number in range(3):
        name = f"model_{number:05}.weights.h5"
        # The second embedding goes to another shard than the first: Keras then gives a list.
        part = names[:1] if number == 0 else names[1:12] if number == 1 else names[12:]
        files[name] = hdf5_bytes({path: arrays[path] for path in part})
        for path in part:
            layer = "/" + path.rpartition("/")[0]
            before = weight_map.get(layer)
            weight_map[layer] = [before, name] if before else name
    index = {"metadata": {"total_size": sum(array.nbytes for array in arrays.values())},
             "weight_map": weight_map}
    return files | {"model.weights.json": json_bytes(index)}


def flags(content, token_id):
    """An added token, as in tokenizer.json."""
    return dict(id=token_id, content=content, single_word=False, lstrip=False,
                rstrip=content in SPECIAL[1:], normalized=False, special=True)


def tokenizer_json(kind, ids):
    """The content of a tokenizer.json: "Microsoft's", "transformers 5's", or of "bytes"."""
    start = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    one, other = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    replace = dict(type="Replace", pattern={"String": " "}, content="▁")
    metaspace = dict(type="Metaspace", replacement="▁", prepend_scheme="first", split=False)
    content = dict(
        version="1.0", truncation=None, padding=None,
        added_tokens=[flags(token, ids[token]) for token in PIECES[:3] + SPECIAL],
        normalizer=dict(type="Sequence",
                        normalizers=[dict(type="Prepend", prepend="▁"), replace]),
        pre_tokenizer=None,
        post_processor=dict(
            type="TemplateProcessing", single=[start, one], pair=[start, one, other],
            special_tokens={"<s>": dict(id="<s>", ids=[ids["<s>"]], tokens=["<s>"])}),
        decoder=dict(type="Sequence", decoders=[
            dict(type="Replace", pattern={"String": "▁"}, content=" "), dict(type="ByteFallback"),
            dict(type="Fuse"), dict(type="Strip", content=" ", start=1, stop=0)]),
        model=dict(type="BPE", unk_token="<unk>", fuse_unk=True, byte_fallback=True,
                   vocab={piece: ids[piece] for piece in PIECES}, merges=MERGES))
    if kind == "transformers 5's":
        content |= dict(normalizer=dict(type="Sequence", normalizers=[replace]),
                        pre_tokenizer=dict(type="Sequence", pretokenizers=[metaspace]))
    elif kind == "bytes":
        level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
        split = dict(type="Split", pattern={"Regex": r" ?\p{L}+|\s+|[^\s\p{L}]+"},
                     behavior="Isolated", invert=False)
        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        # In place of 256 pieces for bytes and those that begin with "▁".
        pieces = PIECES[:3] + alphabet + [piece.replace("▁", "Ġ") for piece in PIECES[259:]
                                          if piece not in alphabet and piece != "▁"]
        content |= dict(
            normalizer=None, decoder=level, post_processor=level,
            pre_tokenizer=dict(type="Sequence", pretokenizers=[split, level]),
            model=dict(type="BPE", vocab={piece: i for i, piece in enumerate(pieces)},
                       merges=[merge.replace("▁", "Ġ") for merge in MERGES]))
        for token_id, token in enumerate(content["added_tokens"][3:], len(pieces)):
            token["id"] = token_id
    return content


def huggingface_preset(dtype, kind, sharded=False):
    """{path: content} of a Hugging Face directory; sharded: with longrope."""
    ids = {piece: token_id for token_id, piece in enumerate(PIECES + SPECIAL)}
    config = dict(
        architectures=["Phi3ForCausalLM"], model_type="phi3", hidden_act="silu", hidden_size=D,
        intermediate_size=F, vocab_size=V, num_hidden_layers=LAYERS, num_attention_heads=H,
        num_key_value_heads=K, rms_norm_eps=1e-5, max_position_embeddings=64,
        original_max_position_embeddings=16, tie_word_embeddings=False, attention_dropout=0.0,
        sliding_window=None, torch_dtype=dtype, bos_token_id=1)
    fast = tokenizer_json(kind, ids)
    config |= dict(eos_token_id=next(
        token["id"] for token in fast["added_tokens"] if token["content"] == SPECIAL[0]))
    settings = dict(bos_token="<s>", eos_token=SPECIAL[0], pad_token=SPECIAL[0], unk_token="<unk>",
                    model_max_length=64, clean_up_tokenization_spaces=False)
    files = {"tokenizer.json": json_bytes(fast)}
    if kind == "Microsoft's":
        settings |= dict(add_bos_token=True, legacy=False, tokenizer_class="LlamaTokenizer")
        settings["added_tokens_decoder"] = {
            str(token["id"]): {name: token[name] for name in token if name != "id"}
            for token in fast["added_tokens"]}
        files |= {
            "tokenizer.model": sentencepiece_model([]),
            "added_tokens.json": json_bytes({token: ids[token] for token in SPECIAL}),
            "special_tokens_map.json": json_bytes({
                name: settings[name] for name in settings if name.endswith("_token")
                and name != "add_bos_token"})}
    else:
        settings["tokenizer_class"] = "TokenizersBackend"
    files["tokenizer_config.json"] = json_bytes(settings)
    arrays = {name: array.astype({"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}[dtype])
              for name, array in weights().items()}
    if not sharded:
        rope = dict(rope_type="default", rope_theta=10000.0)
        return files | {
            "config.json": json_bytes(config | dict(rope_parameters=rope)),
            "model.safetensors": safetensors.numpy.save(arrays, {"format": "pt"}),
        }
    rope = dict(type="longrope", short_factor=[1.0, 1.25], long_factor=[1.5, 4.0])
    files["config.json"] = json_bytes(config | dict(rope_scaling=rope, rope_theta=10000.0))
    weight_map, names = {}, list(arrays)
    for number in range(3):
        name = f"model-{number + 1:05}-of-00003.safetensors"
        part = names[5 * number : 5 * number + 5]
        files[name] = safetensors.numpy.save({key: arrays[key] for key in part}, {"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": sum(array.nbytes for array in arrays.values())},
             "weight_map": weight_map}
    return files | {"model.safetensors.index.json": json_bytes(index)}


PRESETS = {
    "keras, float32": lambda: keras_preset("float32"),
    "keras, bfloat16": lambda: keras_preset("bfloat16"),
    "keras, sharded": lambda: keras_preset("float32", sharded=True),
    "huggingface, float32": lambda: huggingface_preset("float32", "Microsoft's"),
    "huggingface, bfloat16": lambda: huggingface_preset("bfloat16", "bytes"),
    "huggingface, sharded": lambda: huggingface_preset("float32", "transformers 5's", sharded=True),
}


def write(files, directory):
    """Make the directory hold these files and nothing else."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for path in sorted(directory.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


# What to do next ----------------------------------------------------------------------------------


class Choices:
    """Decisions, drawn from a `random.Random` or read from a fuzzer's bytes (zero at their end)."""

    def __init__(self, source):
        self.random = source if isinstance(source, random.Random) else None
        self.rest = b"" if self.random else bytes(source)

    def bytes(self, size):
        if self.random:
            return self.random.randbytes(size)
        taken, self.rest = self.rest[:size], self.rest[size:]
        return taken.ljust(size, b"\0")

    def below(self, bound):
        """An integer of at least 0 and less than `bound`."""
        if self.random:
            return self.random.randrange(bound)
        size = (bound.bit_length() + 7) // 8
        return int.from_bytes(self.bytes(size), "little") % bound

    def pick(self, options):
        return options[self.below(len(options))]


# Spoiling bytes -----------------------------------------------------------------------------------

INTERESTING = [
    number.to_bytes(size, order, signed=number < 0)
    for number in (-1, 0, 1, 2**7, 2**15, 2**31 - 1, 2**31, 2**62, 2**63 - 1, -(2**63), 100)
    for size in (1, 2, 4, 8) if -(2 ** (8 * size - 1)) <= number < 2 ** (8 * size)
    for order in ("little", "big")
]


def flip(content, choices):
    content = bytearray(content)
    for _ in range(choices.pick([1, 1, 2, 8])):
        if content:
            content[choices.below(len(content))] ^= 1 << choices.below(8)
    return bytes(content)


def flip_in_head(content, choices):
    return flip(content[:512], choices) + content[512:]


def truncate(content, choices):
    return content[: choices.below(len(content) + 1)]


def insert(content, choices):
    at = choices.below(len(content) + 1)
    return content[:at] + choices.bytes(1 + choices.below(16)) + content[at:]


def delete(content, choices):
    at = choices.below(len(content) + 1)
    return content[:at] + content[at + 1 + choices.below(16) :]


def duplicate(content, choices):
    start = choices.below(len(content) + 1)
    part = content[start : start + 1 + choices.below(256)]
    at = choices.below(len(content) + 1)
    return content[:at] + part + content[at:]


def overwrite(content, choices):
    value, at = choices.pick(INTERESTING), choices.below(len(content) + 1)
    return content[:at] + value + content[at + len(value) :]


def random_bytes(content, choices):
    return choices.bytes(choices.below(400))


def empty(content, choices):
    return b""


def zeros_behind(content, choices):
    return content + bytes(1 << choices.pick([0, 3, 12, 20]))


BYTES = [flip, flip, flip, flip_in_head, truncate, insert, delete, duplicate, overwrite, overwrite,
         random_bytes, empty, zeros_behind]


def spoil_bytes(directory, choices):
    """Change the bytes of one file, or swap two files; the name of the change."""
    names = files_of(directory)
    kind = choices.below(len(BYTES) + 3)
    if kind < len(BYTES):
        path = directory / choices.pick(names)
        path.write_bytes(BYTES[kind](path.read_bytes(), choices))
        return BYTES[kind].__name__
    one, other = directory / choices.pick(names), directory / choices.pick(names)
    if kind == len(BYTES):
        first, second = one.read_bytes(), other.read_bytes()
        one.write_bytes(second)
        other.write_bytes(first)
        return "swap"
    if kind == len(BYTES) + 1:
        os.truncate(one, choices.pick([2**27, 10 * 2**30]))  # sparse: takes no disk
        return "sparse"
    one.unlink()
    return "remove"


def files_of(directory):
    """The names of a directory's files, sorted; not of those that were made too large to read."""
    return sorted(str(path.relative_to(directory)) for path in regular(directory, "*"))


def regular(directory, pattern):
    """The paths of such files: not of what would block when it is read, or take all memory."""
    return sorted(path for path in directory.rglob(pattern)
                  if path.is_file() and path.stat().st_size < 2**26)


# Spoiling JSON ------------------------------------------------------------------------------------

# JSON texts to put in a value's place.
JSON_VALUES = [
    "null", "true", "false", "0", "-1", "1", "2", "3", "0.5", "-0.0", "1.0", "1e308", "1e-400",
    "1e400", "-1e400", "NaN", "Infinity", "-Infinity", str(2**31), str(2**32), str(2**63),
    str(2**64), str(10**15), "-" + str(2**63), "1" + "0" * 4000, "1" + "0" * 5000, '""', '"x"',
    '"1"', '"\\u0000"', '"\\ud800"', '"../config.json"', '"/etc/passwd"', '"' + "x" * 100_000 + '"',
    "[]", "[[]]", "[null]", "[1, 1]", "[1e400, -1]", "[" + "1," * 10_000 + "1]", "{}",
    '{"a": {}}', '{"config": null}', "[" * 100_000, "[" * 100_000 + "]" * 100_000,
    '{"a":' * 100_000 + "1" + "}" * 100_000, "nul", "'x'", '"\x01"', "01", "+1", ".5", "0x10",
]
RAW = "\ue000the value\ue000"  # stands for a JSON text until the file is written


def json_nodes(content, choices):
    """A (container, key) somewhere in a JSON value, as likely near the root as at a leaf."""
    node = None
    while isinstance(content, (dict, list)) and content:
        keys = list(content) if isinstance(content, dict) else range(len(content))
        key = choices.pick(keys)
        node, content = (content, key), content[key]
        if choices.below(4) == 0:
            break
    return node


def spoil_json(directory, choices):
    """Change the structure of one JSON file; the name of the change."""
    path = directory / choices.pick([n for n in files_of(directory) if n.endswith(".json")])
    text = path.read_text()
    content = json.loads(text)
    kind = choices.pick(["value", "value", "value", "value", "drop", "add", "duplicate", "root",
                         "utf8", "rename", "swap values", "bom", "utf16"])
    container, key = json_nodes(content, choices)
    if kind == "value":
        container[key] = RAW
        text = json.dumps(content).replace(json.dumps(RAW), choices.pick(JSON_VALUES))
    elif kind == "drop":
        del container[key]
        text = json.dumps(content)
    elif kind == "add":
        if isinstance(container, dict):
            names = ["unknown", "", "head_dim", "sliding_window", "rope_attention_factor",
                     "partial_rotary_factor", "tie_word_embeddings", "backend", "seed", "fused",
                     "self", "rope_scaling", "rope_parameters", "registered_name", "model_type",
                     "factor", "attention_factor", "quantization_config", "dtype", "name"]
            container[choices.pick(names)] = RAW
        else:
            container.append(RAW)
        text = json.dumps(content).replace(json.dumps(RAW), choices.pick(JSON_VALUES))
    elif kind == "duplicate":
        if isinstance(container, dict):
            twice = f"{json.dumps(key)}: {choices.pick(JSON_VALUES)}, {json.dumps(RAW)}"
            value = json.dumps(container.pop(key))
            container[RAW] = None
            text = json.dumps(content).replace(
                f"{json.dumps(RAW)}: null", f"{twice}: null".replace(
                    f"{json.dumps(RAW)}: null", f"{json.dumps(key)}: {value}"))
    elif kind == "root":
        text = choices.pick(JSON_VALUES)
    elif kind == "rename":
        if isinstance(container, dict):
            container[choices.pick([key.upper(), key + " ", "", key[:-1]])] = container.pop(key)
        text = json.dumps(content)
    elif kind == "swap values":
        other, other_key = json_nodes(content, choices)
        container[key], other[other_key] = other[other_key], container[key]
        try:
            text = json.dumps(content)
        except (ValueError, RecursionError):  # one contained the other
            text = "{}"
    content = text.encode("utf-8", "surrogatepass")
    if kind == "utf8":
        at = choices.below(len(content))
        wrong = choices.pick([b"\xff", b"\xc0\x80", b"\xed\xa0\x80"])
        content = content[:at] + wrong + content[at:]
    elif kind == "bom":
        content = b"\xef\xbb\xbf" + content
    elif kind == "utf16":
        content = text.encode("utf-16")
    path.write_bytes(content)
    return f"JSON {kind}"


# Spoiling safetensors -----------------------------------------------------------------------------


def read_safetensors(path):
    """(header, body) of a safetensors file."""
    content = path.read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:size]), content[size:]


def write_safetensors(path, header, body, size=None):
    """Write one, with a header given as an object or as bytes, and perhaps a lie about its size."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + body)


def spoil_safetensors(directory, choices):
    """Change the structure of one safetensors file; the name of the change."""
    path = choices.pick(regular(directory, "*.safetensors"))
    header, body = read_safetensors(path)
    names = [name for name in header if name != "__metadata__"]
    name, other = choices.pick(names), choices.pick(names)
    entry, size = header[name], None
    numbers = [-1, 0, 1, 3, 2**31, 2**62, 2**63, 2**64 - 1, 2**64, 10**30, 1.5, "4", None, True, []]
    kind = choices.pick(["size", "offsets", "dtype", "shape", "missing", "extra", "duplicate",
                         "rename", "metadata", "root", "behind", "hole", "not finite", "value"])
    if kind == "size":
        text = json.dumps(header).encode()
        size = choices.pick([0, 1, 7, len(text) - 1, len(text) + 1, len(text) + len(body),
                             len(text) + len(body) + 1, 2**32, 2**62, 2**63, 2**64 - 1,
                             100_000_001])
    elif kind == "offsets":
        start, end = entry["data_offsets"]
        entry["data_offsets"] = choices.pick([
            header[other]["data_offsets"], [end, start], [start, end + 4], [start + 4, end + 4],
            [start - 4, end - 4], [start, start], [len(body), len(body) + end - start],
            [start], [start, end, end], [], None, [choices.pick(numbers), end],
            [start, choices.pick(numbers)], [choices.pick(numbers), choices.pick(numbers)]])
    elif kind == "dtype":
        entry["dtype"] = choices.pick(["F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL",
                                       "F8_E4M3", "C64", "F4", "XYZ", "", "f32", None, 5, []])
    elif kind == "shape":
        shape = entry["shape"]
        entry["shape"] = choices.pick([
            shape[::-1], [math.prod(shape)], [*shape, 1], [1, *shape], [], None, "8",
            [choices.pick(numbers), *shape[1:]], [*shape[:-1], choices.pick(numbers)],
            [2**62, 2**62], [0, 2**63], header[other]["shape"], [n + 1 for n in shape]])
    elif kind == "missing":
        del header[name]
    elif kind == "extra":
        header[choices.pick(["extra", "model.layers.7.mlp.down_proj.weight", "\0", "",
                             "model.layers.0.self_attn.rotary_emb.inv_freq"])] = dict(entry)
    elif kind == "duplicate":
        double = f', {json.dumps(name)}: {json.dumps(header[other])}}}'
        header = (json.dumps(header)[:-1] + double).encode()
    elif kind == "rename":
        header[other] = header.pop(name)
    elif kind == "metadata":
        header["__metadata__"] = choices.pick([None, [], {"a": 1}, {"a": "x" * 10**6}, {"": ""}, 5])
    elif kind == "root":
        header = choices.pick([b"", b"[]", b"null", b"{}", b"[" * 100_000, b'{"a":' * 100_000,
                               b"\xff\xff", b" " * 100_000, json.dumps(header).encode("utf-16")])
    elif kind == "behind":
        body += choices.pick([b"\0", bytes(4), bytes(10**6)])
    elif kind == "hole":
        body = bytes(4) + body
        for each in names:
            header[each]["data_offsets"] = [offset + 4 for offset in header[each]["data_offsets"]]
    elif kind == "not finite":
        start, end = entry["data_offsets"]
        pattern = {"F32": [b"\0\0\xc0\x7f", b"\0\0\x80\xff"], "BF16": [b"\xc0\x7f", b"\x80\xff"],
                   "F64": [bytes(6) + b"\xf8\x7f", bytes(6) + b"\xf0\xff"]}
        value = choices.pick(pattern[entry["dtype"]])
        at = start + len(value) * choices.below((end - start) // len(value))
        body = body[:at] + value + body[at + len(value) :]
    elif kind == "value":
        entry[choices.pick(["dtype", "shape", "data_offsets", "extra"])] = RAW
        text = json.dumps(header).replace(json.dumps(RAW), choices.pick(JSON_VALUES))
        header = text.encode("utf-8", "surrogatepass")
    write_safetensors(path, header, body, size)
    return f"safetensors {kind}"


# Spoiling HDF5 ------------------------------------------------------------------------------------


def zeros_compressed(size):
    """`size` zero bytes, a multiple of 1 MiB, as zlib compresses them; takes no memory."""
    compress = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = compress.compress(bytes(2**20)) + compress.flush(zlib.Z_FULL_FLUSH)
    checksum = (size % 65521) << 16 | 1  # Adler-32 of zeros
    return b"\x78\xda" + block * (size >> 20) + b"\x03\x00" + struct.pack(">I", checksum)


def gzip_bomb(file, name):
    """A tensor of the right shape whose only chunk has 1 GiB: a megabyte on disk."""
    shape = file[name].shape
    del file[name]
    chunk = (2**28 // math.prod(shape[1:]), *shape[1:])
    dataset = file.create_dataset(name, shape, "f4", chunks=chunk, maxshape=(None,) * len(shape),
                                  compression="gzip")
    size = math.prod(chunk) * 4
    content = zeros_compressed(-(-size // 2**20) * 2**20)
    dataset.id.write_direct_chunk((0,) * len(shape), content)


def replace_dataset(file, name, data=None, **settings):
    """Put another dataset in the place of one."""
    del file[name]
    if data is not None:
        settings["data"] = data
    return file.create_dataset(name, **settings)


def replace_type(file, name, kind, layout=h5py.h5d.CONTIGUOUS):
    """Put another dataset in the place of one: HDF5's own description of its items, its layout."""
    shape, parent = file[name].shape, file[name].parent
    del file[name]
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    settings.set_layout(layout)
    dataset = h5py.h5d.create(parent.id, name.rsplit("/", 1)[1].encode(), kind,
                              h5py.h5s.create_simple(shape), settings)
    dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, np.ones(shape, np.float32))


def other_floats():
    """Floats of four bytes that no processor has, but HDF5 describes and converts."""
    biased, denormal = h5py.h5t.IEEE_F32LE.copy(), h5py.h5t.IEEE_F32LE.copy()
    biased.set_ebias(120)
    denormal.set_norm(h5py.h5t.NORM_NONE)
    return [biased, denormal]


def virtual(file, name, source, source_name):
    """A virtual dataset of the right shape, over a dataset of another file (or this: ".")."""
    shape, dtype = file[name].shape, file[name].dtype
    layout = h5py.VirtualLayout(shape, dtype)
    layout[...] = h5py.VirtualSource(source, source_name, shape, dtype)
    del file[name]
    file.create_virtual_dataset(name, layout)


def external_storage(file, name, path):
    """A dataset whose bytes are another file's."""
    shape, dtype = file[name].shape, file[name].dtype
    size = math.prod(shape) * dtype.itemsize
    replace_dataset(file, name, shape=shape, dtype=dtype, external=[(str(path), 0, size)])


def link(file, name, target):
    """A link in the place of a dataset or of the group that holds it."""
    del file[name]
    file[name] = target


def lie(file, name, dtype):
    """An attribute that calls the items something else."""
    file[name].attrs["dtype"] = dtype


HDF5 = {
    "external link": lambda file, name, canary, choices: link(
        file, name, h5py.ExternalLink(str(canary / "other.weights.h5"), name)),
    "external link of a group": lambda file, name, canary, choices: link(
        file, name.rpartition("/")[0], h5py.ExternalLink(
            str(canary / "other.weights.h5"), name.rpartition("/")[0])),
    "external link of layers": lambda file, name, canary, choices: link(
        file, "layers", h5py.ExternalLink(str(canary / "other.weights.h5"), "layers")),
    "soft link": lambda file, name, canary, choices: link(
        file, name, h5py.SoftLink(choices.pick(
            ["/" + name, "/nowhere", "/layers", "/layers/phi3_layer_norm/vars/0"]))),
    "hard link": lambda file, name, canary, choices: link(
        file, name, file[choices.pick(["/", "layers", "layers/phi3_layer_norm/vars/0"])]
        if name != "layers/phi3_layer_norm/vars/0" else file["/"]),
    "cycle": lambda file, name, canary, choices: file["layers"].__setitem__("again", file["/"]),
    "external storage": lambda file, name, canary, choices: external_storage(
        file, name, canary / "other.bin"),
    "virtual": lambda file, name, canary, choices: virtual(
        file, name, str(canary / "other.weights.h5"), name),
    "virtual of this file": lambda file, name, canary, choices: virtual(
        file, name, ".", "layers/phi3_layer_norm/vars/0"),
    "gzip bomb": lambda file, name, canary, choices: gzip_bomb(file, name),
    "wrong dtype": lambda file, name, canary, choices: replace_dataset(
        file, name, np.zeros(file[name].shape, choices.pick(
            ["i4", "i8", "u1", "?", "c8", "V2", "V4", "S4", "f2", "f8", "g"]))),
    "text": lambda file, name, canary, choices: replace_dataset(
        file, name, shape=file[name].shape, dtype=h5py.string_dtype()),
    "variable length": lambda file, name, canary, choices: replace_dataset(
        file, name, shape=file[name].shape, dtype=h5py.vlen_dtype("f4")),
    "compound": lambda file, name, canary, choices: replace_dataset(
        file, name, shape=file[name].shape, dtype=[("a", "f4"), ("b", "i2")]),
    "array items": lambda file, name, canary, choices: replace_dataset(
        file, name, shape=file[name].shape, dtype="(3,)f4"),
    "references": lambda file, name, canary, choices: replace_dataset(
        file, name, shape=file[name].shape, dtype=h5py.ref_dtype),
    "enum": lambda file, name, canary, choices: replace_dataset(
        file, name, shape=file[name].shape, dtype=h5py.enum_dtype({"a": 1}, "i1")),
    "big-endian": lambda file, name, canary, choices: replace_dataset(
        file, name, np.ones(file[name].shape, ">f4")),
    "compact": lambda file, name, canary, choices: replace_type(
        file, name, h5py.h5t.IEEE_F32LE, h5py.h5d.COMPACT),
    "other floats": lambda file, name, canary, choices: replace_type(
        file, name, choices.pick(other_floats())),
    "wrong shape": lambda file, name, canary, choices: replace_dataset(
        file, name, np.zeros(choices.pick([
            file[name].shape[::-1] + (1,), (), (0,), (math.prod(file[name].shape),),
            (file[name].shape[0] + 1, *file[name].shape[1:])]), "f4")),
    "null": lambda file, name, canary, choices: replace_dataset(file, name, h5py.Empty("f4")),
    "astronomical": lambda file, name, canary, choices: replace_dataset(
        file, name, shape=(2**40, 2**16), dtype="f4", chunks=choices.pick([None, (2**10, 2**10)])),
    "unallocated": lambda file, name, canary, choices: replace_dataset(
        file, name, shape=file[name].shape, dtype="f4"),
    "lie": lambda file, name, canary, choices: lie(file, name, choices.pick(
        ["bfloat16", "float32", "float64", "float16", "int8", "", "x" * 5000, 5, 1.5, b"bfloat16",
         b"\xff", ["bfloat16"], h5py.Empty("S1"), np.zeros((2, 2))])),
    "missing": lambda file, name, canary, choices: file.__delitem__(name),
    "missing layers": lambda file, name, canary, choices: file.__delitem__("layers"),
    "extra": lambda file, name, canary, choices: file.create_dataset(
        choices.pick(["extra", "layers/phi3_decoder_7/vars/0", "layers/phi3_decoder/vars/0"]),
        data=np.zeros(3, "f4")),
    "group": lambda file, name, canary, choices: (file.__delitem__(name), file.create_group(name)),
    "named type": lambda file, name, canary, choices: link(file, name, np.dtype("f4")),
    "not finite": lambda file, name, canary, choices: replace_dataset(
        file, name, np.full(file[name].shape, choices.pick([np.nan, np.inf, -np.inf]), "f4")),
    "huge values": lambda file, name, canary, choices: replace_dataset(
        file, name, np.full(file[name].shape, choices.pick([1e39, 1e300]), "f8")),
    "many": lambda file, name, canary, choices: [
        file.create_group(f"many/{i}") for i in range(2000)],
    "deep": lambda file, name, canary, choices: file.create_group("/".join(["a"] * 3000)),
    "other names": lambda file, name, canary, choices: file.create_dataset(
        b"\xff\xfe", data=np.zeros(3, "f4")),
}


def spoil_hdf5(directory, choices, canary):
    """Change the structure of one HDF5 file; the name of the change."""
    path = choices.pick(regular(directory, "*.h5"))
    kind = choices.pick(list(HDF5))
    names = []
    with h5py.File(path, "r+") as file:
        file.visititems(lambda name, item: names.append(name)
                        if isinstance(item, h5py.Dataset) else None)
        HDF5[kind](file, choices.pick(names), canary, choices)
    return f"HDF5 {kind}"


# Spoiling an index, the vocabulary, the directory -------------------------------------------------


def spoil_index(directory, choices, canary):
    """Make the index of a sharded preset contradict its shards; the name of the change."""
    path = choices.pick(regular(directory, "model*.json"))
    index = json.loads(path.read_text())
    weight_map = index["weight_map"]
    key, other = choices.pick(list(weight_map)), choices.pick(list(weight_map))
    shards = sorted({name for value in weight_map.values()
                     for name in (value if isinstance(value, list) else [value])})
    suffix = shards[0].partition(".")[2]
    kind = choices.pick(["outside", "absolute", "wrong shard", "missing entry", "extra entry",
                         "missing shard", "copied shard", "extra shard", "odd", "swapped shards"])
    if kind == "outside":
        weight_map[key] = choices.pick([
            f"../{canary.name}/other.{suffix}", f"x/../../{canary.name}/other.{suffix}", "..", ".",
            f"./{shards[0]}", "../" + directory.name + "/" + shards[0], "x\\..\\y", "a\0b"])
    elif kind == "absolute":
        weight_map[key] = choices.pick([str(canary / f"other.{suffix}"), "/dev/zero", "/dev/stdin",
                                        "/proc/self/mem", "~/x", "hf://a/b"])
    elif kind == "wrong shard":
        weight_map[key] = choices.pick(shards)
    elif kind == "missing entry":
        del weight_map[key]
    elif kind == "extra entry":
        weight_map["extra"] = shards[0]
    elif kind == "missing shard":
        (directory / choices.pick(shards)).unlink()
    elif kind in ("copied shard", "extra shard"):
        target = "model-extra." + suffix if kind == "extra shard" else choices.pick(shards)
        (directory / target).write_bytes((directory / choices.pick(shards)).read_bytes())
    elif kind == "odd":
        weight_map[key] = choices.pick([None, 5, [], [[]], {}, "", "config.json", "x" * 10_000, [
            weight_map[other]], [None], True, "assets", ["model_00000.weights.h5"] * 3])
    elif kind == "swapped shards":
        one, two = directory / choices.pick(shards), directory / choices.pick(shards)
        first, second = one.read_bytes(), two.read_bytes()
        one.write_bytes(second)
        two.write_bytes(first)
    path.write_bytes(json_bytes(index))
    return f"index {kind}"


def spoil_vocabulary(directory, choices):
    """Change a SentencePiece model's pieces and settings; the name of the change."""
    path = choices.pick(regular(directory, "*.spm"))
    model = ModelProto.FromString(path.read_bytes())
    piece = model.pieces[choices.below(len(model.pieces))]
    other = model.pieces[choices.below(len(model.pieces))]
    kind = choices.pick(["more", "fewer", "none", "text", "score", "type", "twice", "algorithm",
                         "charsmap", "ids", "normalizer", "sampling", "order"])
    if kind == "more":
        for i in range(choices.pick([1, 10, 1000])):
            model.pieces.add(piece=f"more{i}", score=-1e3, type=piece.NORMAL)
    elif kind == "fewer":
        del model.pieces[choices.below(len(model.pieces)) :]
    elif kind == "none":
        del model.pieces[:]
    elif kind == "text":
        piece.piece = choices.pick(["", " ", "\0", "▁", "<s>", "x" * 100_000, "<0x00>", "<0x100>",
                                    "\ufffd", "<|endoftext|>", "\n"])
    elif kind == "score":
        piece.score = choices.pick([math.nan, math.inf, -math.inf, 3e38, -1.0])
    elif kind == "type":
        piece.type = choices.pick([piece.NORMAL, piece.UNKNOWN, piece.CONTROL, piece.USER_DEFINED,
                                   piece.UNUSED, piece.BYTE])
    elif kind == "twice":
        piece.piece = other.piece
    elif kind == "algorithm":
        model.trainer_spec.model_type = choices.pick([1, 3, 4])
    elif kind == "charsmap":
        model.normalizer_spec.precompiled_charsmap = choices.pick([
            b"\xff" * 7, b"\0" * 4, b"\x04\0\0\0" + choices.bytes(4) + b"\0",
            struct.pack("<I", 2**31) + bytes(64), struct.pack("<I", 1024) + choices.bytes(1100)])
    elif kind == "ids":
        for name in ("unk_id", "bos_id", "eos_id", "pad_id"):
            setattr(model.trainer_spec, name, choices.pick([-1, 0, 5, 10**6, -(2**31)]))
    elif kind == "normalizer":
        model.normalizer_spec.add_dummy_prefix = choices.below(2)
        model.normalizer_spec.remove_extra_whitespaces = choices.below(2)
        model.normalizer_spec.escape_whitespaces = choices.below(2)
        model.trainer_spec.treat_whitespace_as_suffix = choices.below(2)
        model.trainer_spec.byte_fallback = choices.below(2)
    elif kind == "sampling":
        model.trainer_spec.vocab_size = choices.pick([-1, 0, 2**31 - 1])
        model.trainer_spec.unk_surface = choices.pick(["", "\0", "x" * 10**5])
    elif kind == "order":
        (piece.piece, other.piece) = (other.piece, piece.piece)
    path.write_bytes(model.SerializeToString())
    return f"vocabulary {kind}"


# Parts of a tokenizer.json that are valid each, but not everywhere.
CHARSMAP = dict(type="Precompiled", precompiled_charsmap="")
BERT = dict(type="WordPiece", prefix="##", cleanup=True)
STRIP = dict(type="Strip", content=" ", start=2**40, stop=2**40)
PARTS = {
    "normalizer": [CHARSMAP, dict(type="Lowercase"), dict(type="NFKC"), dict(
        type="Replace", pattern={"Regex": "(a*)*b"}, content="x"), dict(
        type="Replace", pattern={"String": ""}, content="xx"), dict(type="Prepend", prepend="")],
    "pre_tokenizer": [dict(type="FixedLength", length=0), dict(type="Whitespace"), dict(
        type="Digits", individual_digits=True), dict(type="Split", pattern={"Regex": ""},
                                                     behavior="Isolated", invert=False)],
    "decoder": [STRIP, BERT, dict(type="Fuse"), dict(type="BPEDecoder", suffix="</w>"), dict(
        type="CTC", pad_token="h", word_delimiter_token="e", cleanup=True)],
    "post_processor": [dict(type="RobertaProcessing", sep=["x", 99], cls=["y", 98],
                            trim_offsets=True, add_prefix_space=True)],
    "truncation": [dict(direction="Right", max_length=1, strategy="LongestFirst", stride=0), dict(
        direction="Right", max_length=0, strategy="LongestFirst", stride=5)],
    "padding": [dict(strategy={"Fixed": 10**9}, direction="Left", pad_to_multiple_of=None, pad_id=0,
                     pad_type_id=0, pad_token="x")],
    "model": [dict(type="Unigram", unk_id=7, vocab=[["a", 0.0]]), dict(
        type="Unigram", unk_id=None, vocab=[["h", -1.0]]), dict(
        type="WordLevel", vocab={"a": 0}, unk_token="no"), dict(
        type="WordPiece", vocab={"a": 0}, unk_token="no", continuing_subword_prefix="##",
        max_input_chars_per_word=100)],
}


def spoil_tokenizer(directory, choices):
    """Change what a tokenizer.json stands for; the name of the change."""
    path = directory / "tokenizer.json"
    content = json.loads(path.read_bytes())
    model, added = content["model"], content["added_tokens"]
    kind = choices.pick(["more", "fewer", "merges", "far", "twice", "template", "regex", "flags",
                         "ids", *PARTS])
    if kind == "more":
        count = choices.pick([10, 1000])
        model["vocab"] |= {f"more{i}": V + i for i in range(count)}
    elif kind == "fewer":
        del model["vocab"][choices.pick(list(model["vocab"]))]
    elif kind == "merges":
        model["merges"] = model["merges"][::-1] + choices.pick([[], ["no such"], ["h"], [["h"]]])
    elif kind == "far":
        piece = choices.pick(list(model["vocab"]))
        model["vocab"][piece] = choices.pick([2**32 - 1, 2**31, 10**6])
    elif kind == "twice":
        piece, other = (choices.pick(list(model["vocab"])) for _ in range(2))
        model["vocab"][piece] = model["vocab"][other]
    elif kind == "template":
        content["post_processor"] = dict(
            type="TemplateProcessing", single=["<s>:0", "$A:0"], pair=["$A:0", "$B:1"],
            special_tokens=choices.pick([
                {}, {"<s>": dict(id="<s>", ids=[1, 1], tokens=["<s>", "<s>"])},
                {"<s>": dict(id="<s>", ids=[2**32 - 1], tokens=["<s>"])}]))
    elif kind == "regex":
        content["pre_tokenizer"] = dict(
            type="Split", behavior="Isolated", invert=False,
            pattern={"Regex": choices.pick(["(", "(h*)*x", "(?<=.*)", "\\p{No}", "[" * 1000])})
    elif kind == "flags":
        token = choices.pick(added)
        token[choices.pick(["lstrip", "rstrip", "normalized", "single_word", "special"])] = (
            choices.pick([True, False, None, 1]))
    elif kind == "ids":
        choices.pick(added)["id"] = choices.pick([0, 5, V, 2**31, -1])
    else:
        content[kind] = choices.pick(PARTS[kind])
    path.write_bytes(json_bytes(content))
    return f"tokenizer {kind}"


class Payload:
    """What a pickle runs when it is loaded: it makes a file in the canary directory."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (pathlib.Path.touch, (self.path,))


def spoil_directory(directory, choices, canary):
    """Put something else in a file's place; the name of the change."""
    path = directory / choices.pick(files_of(directory))
    kind = choices.pick(["remove", "pickle", "directory", "fifo", "link to itself", "other kind",
                         "link to a device", "dangling link", "link", "another preset"])
    if kind == "pickle":
        for name in files_of(directory):
            if name.endswith((".h5", ".safetensors")):
                (directory / name).unlink()
        content = pickle.dumps(Payload(canary / "unpickled"))
        (directory / "pytorch_model.bin").write_bytes(content)
        return kind
    if kind == "another preset":
        files = PRESETS[choices.pick(list(PRESETS))]()
        name = choices.pick(sorted(files))
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(files[name])
        return kind
    content = path.read_bytes()
    path.unlink()
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "link to itself":
        path.symlink_to(path.name)
    elif kind == "dangling link":
        path.symlink_to("nowhere")
    elif kind == "link to a device":
        path.symlink_to(choices.pick(["/dev/zero", "/dev/null", "/dev/full"]))
    elif kind == "link":  # as in a hub's cache: not hostile
        (directory / "blobs").mkdir()
        (directory / "blobs" / "x").write_bytes(content)
        path.symlink_to(directory / "blobs" / "x")
    elif kind == "other kind":
        path.write_bytes(choices.pick([
            b"PK\x03\x04" + bytes(100), b"\x80\x04N.", b"<!DOCTYPE html><p>404",
            b"\x89HDF\r\n\x1a\n",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", b"GGUF" * 8,
            b"\x1f\x8b\x08" + bytes(20), b"\x89HDF\r\n\x1a\n" + bytes(2000)]))
    return f"{kind} in its place" if kind != "remove" else kind


def mutate(directory, source, canary):
    """Spoil a preset once or twice.

    Args:
        directory: path of a valid preset, which is changed in place.
        source: random.Random, or bytes, that make the choices.
        canary: path of the directory that no load may look into.

    Returns:
        str, what was done.
    """
    choices, done = Choices(source), []
    for _ in range(choices.pick([1, 1, 1, 2])):
        if not all(path.is_file() or path.is_dir() for path in directory.rglob("*")):
            break  # what the first has left, a FIFO or /dev/zero, would keep its reader for ever
        kinds = [spoil_bytes, spoil_bytes, spoil_json, spoil_directory]
        if regular(directory, "*.safetensors"):
            kinds += [spoil_safetensors, spoil_safetensors]
        if regular(directory, "*.h5"):
            kinds += [spoil_hdf5, spoil_hdf5]
        if regular(directory, "model*.json"):
            kinds += [spoil_index]
        if regular(directory, "*.spm"):
            kinds += [spoil_vocabulary]
        if regular(directory, "tokenizer_config.json") and regular(directory, "tokenizer.json"):
            kinds += [spoil_tokenizer]
        spoil = choices.pick(kinds)
        takes_canary = spoil in (spoil_directory, spoil_hdf5, spoil_index)
        try:
            done.append(spoil(directory, choices, *([canary] if takes_canary else [])))
        except Exception:  # the second change may not suit what the first has left
            if not done:
                raise
    return " + ".join(done)


def make_canary(directory):
    """Fill the directory that no load may look into with files that would serve as shards."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "other.weights.h5").write_bytes(hdf5_bytes(keras_arrays(np.float32)))
    (directory / "other.safetensors").write_bytes(safetensors.numpy.save(weights()))
    (directory / "other.bin").write_bytes(bytes(V * D * 4))
    return directory


# What became of it --------------------------------------------------------------------------------

Outcome = namedtuple("Outcome", "kind detail")  # kind: one of KINDS
KINDS = ("equal", "refused", "other weights", "other settings", "other tokenizer", "finding")
DOCUMENTED = (ValueError, FileNotFoundError, phi3_ref.PresetNotFoundError)
SECONDS, MEGABYTES = 2.0, 64  # of processor time, and beyond what a correct load takes


class Watch:
    """What the process opens, by Python's audit events, and what is opened in the canary.

    The latter by inotify, which also sees what C libraries open.
    """

    def __init__(self, canary):
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.fd = self.libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        IN_ACCESS, IN_OPEN, IN_CREATE = 0x1, 0x20, 0x100
        mask = IN_ACCESS | IN_OPEN | IN_CREATE
        assert self.libc.inotify_add_watch(self.fd, os.fsencode(canary), mask) > 0
        self.opened, self.armed = [], False
        sys.addaudithook(self.audit)

    def audit(self, event, arguments):
        if self.armed and event in ("open", "os.listdir", "os.scandir", "pickle.find_class",
                                    "os.system", "subprocess.Popen", "socket.connect"):
            self.opened.append((event, arguments[0]))

    @contextlib.contextmanager
    def looking(self):
        self.opened.clear()
        self.drain()
        self.armed = True
        try:
            yield
        finally:
            self.armed = False

    def drain(self):
        """Whether anything happened in the canary since the last call."""
        try:
            return bool(os.read(self.fd, 65536))
        except BlockingIOError:
            return False

    def outside(self, directory):
        """What was opened that is neither below the directory nor Python's own."""
        allowed = tuple(map(str, (directory, sys.prefix, sys.base_prefix, "/proc/self/",
                                  pathlib.Path(phi3_ref.__file__).parent)))
        files = ("open", "os.listdir", "os.scandir")
        found = [(event, path) for event, path in self.opened
                 if event not in files or not (
                     isinstance(path, int)
                     or os.path.abspath(os.fsdecode(path)).startswith(allowed))]
        return found + ([("inotify", "canary")] if self.drain() else [])


def contents(causal_lm):
    """(settings, weights, tokenization) of a loaded model, each comparable with ==."""
    backbone = causal_lm.backbone
    settings = {name: value for name, value in (vars(backbone) | vars(backbone.config)).items()
                if name not in ("config", "xp", "weights", "calls", "training_seed")}
    arrays = {name: (str(array.dtype), array.shape, array.tobytes())
              for name, array in phi3_ref.huggingface_tensors(backbone.weights, backbone.config)}
    preprocessor = causal_lm.preprocessor
    if preprocessor is None:
        return settings, arrays, None
    tokenizer = preprocessor.tokenizer
    tokens = [tokenizer(text) for text in TEXTS]
    settings |= {name: getattr(preprocessor, name) for name in (
        "sequence_length", "add_start_token", "add_end_token")}
    texts = [tokenizer.detokenize(row) for row in tokens]
    return settings, arrays, (sorted(tokenizer.pieces.items()), tokens, texts)


def peak_memory():
    """The most memory the process has held since `forget_peak_memory`, in MB."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def forget_peak_memory():
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def open_descriptors():
    return len(os.listdir("/proc/self/fd"))


def stored_arrays(directory, names, keras):
    """{name: float32 array} as h5py and safetensors read a preset's files, every name in one."""
    whole, index = (("model.weights.h5", "model.weights.json") if keras else
                    ("model.safetensors", "model.safetensors.index.json"))
    files = [whole]
    if not (directory / whole).is_file():  # before shards, as in KerasHub and transformers
        files = json.loads((directory / index).read_bytes())["weight_map"].values()
    found = {}
    for path in {directory / name for item in files
                 for name in (item if isinstance(item, list) else [item])}:
        if path.suffix == ".safetensors":
            arrays = safetensors.numpy.load_file(path)
            found |= {name: arrays[name].astype(np.float32) for name in names & arrays.keys()}
        else:
            with h5py.File(path, "r") as file:
                for name in names:
                    if name in file:
                        array = file[name][()]
                        array = array.view(ml_dtypes.bfloat16) if array.dtype == "V2" else array
                        found[name] = array.astype(np.float32)
    return found


def different(causal_lm, before, directory):
    """The Outcome of a load that gave another model than was saved: is it what the files say?"""
    backbone = causal_lm.backbone
    settings, arrays, tokenization = contents(causal_lm)
    kinds = []
    if arrays != before[1]:
        keras = bool([*directory.glob("*.h5")]) and backbone.weights is not None
        keras = keras and "model_type" not in json.loads((directory / "config.json").read_bytes())
        views = dict((phi3_ref.keras_variables if keras else phi3_ref.huggingface_tensors)(
            backbone.weights, backbone.config))
        if not all(np.isfinite(array).all() for array in views.values()):
            return Outcome("finding", "loaded weights that are not finite")
        try:
            stored = stored_arrays(directory, views.keys(), keras)
        except Exception as error:
            return Outcome("finding", f"loaded what its own library cannot read: {error!r}")
        for name, view in views.items():
            if name not in stored or not np.array_equal(stored[name], view):
                return Outcome("finding", f"{name} is not what the file holds")
        kinds.append("other weights")
    if tokenization != before[2]:
        if tokenization is not None:
            tokenizer = causal_lm.preprocessor.tokenizer
            size = tokenizer.vocabulary_size()
            if size > backbone.vocabulary_size:
                return Outcome("finding", f"{size} tokens, {backbone.vocabulary_size} embeddings")
            vocabulary = regular(directory, "*.spm")
            if type(tokenizer) is phi3_ref.HuggingFaceTokenizer:
                try:
                    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
                except KeyError as error:  # of what the library itself does without
                    assert str(error) == "'added_tokens'"
                    theirs = transformers.PreTrainedTokenizerFast(
                        tokenizer_file=str(directory / "tokenizer.json"))
                theirs.model_max_length = 1000  # with which it compares, whatever the file says
                read = [theirs(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
                if [read, [theirs.decode(row) for row in read]] != list(tokenization[1:]):
                    return Outcome("finding", "tokenizes otherwise than transformers")
            elif vocabulary:
                processor = sentencepiece.SentencePieceProcessor(
                    model_proto=vocabulary[0].read_bytes())
                flags = dict(add_bos=tokenizer.add_bos, add_eos=tokenizer.add_eos)
                read = [processor.encode(text, **flags) for text in TEXTS]
                if tokenizer.sequence_length:
                    read = [(row + [0] * tokenizer.sequence_length)[: tokenizer.sequence_length]
                            for row in read]
                if read != tokenization[1]:
                    return Outcome("finding", "tokenizes otherwise than SentencePiece")
        kinds.append("other tokenizer")
    if settings != before[0]:
        kinds.append("other settings")
        wrong = misread(directory, settings)
        if wrong:
            return Outcome("finding", f"config.json says otherwise: {wrong}")
    return Outcome(kinds[-1], " and ".join(kinds)) if kinds else Outcome("equal", "")


def misread(directory, settings):
    """What config.json states plainly and the model has otherwise: {name: (stated, found)}."""
    config = json.loads((directory / "config.json").read_bytes())
    if "model_type" in config:
        names = {"vocab_size": "vocabulary_size", "num_hidden_layers": "num_layers",
                 "hidden_size": "hidden_dim", "intermediate_size": "intermediate_dim",
                 "num_attention_heads": "num_query_heads", "rms_norm_eps": "layer_norm_epsilon",
                 "max_position_embeddings": "max_sequence_length",
                 "sliding_window": "sliding_window", "attention_dropout": "dropout",
                 "tie_word_embeddings": "tie_word_embeddings"}
        if not settings["tie_word_embeddings"]:  # where the file holds two that differ, they count
            del names["tie_word_embeddings"]
        stated = {names[name]: config[name] for name in names if name in config}
    else:
        stated = {name: value for name, value in config["config"].items() if name != "dtype"}
    return {name: (value, settings[name]) for name, value in stated.items()
            if repr(settings[name]) != repr(value)}  # so that True is not 1, and NaN is NaN


class Judge:
    """Says what becomes of spoilt presets; one per process and preset.

    Args:
        directory: path, where presets are written to.
        canary: path, see `make_canary`.
        temporary: path of the empty directory that TMPDIR names.
    """

    def __init__(self, directory, canary, temporary):
        self.directory, self.temporary = pathlib.Path(directory), pathlib.Path(temporary)
        self.canary = make_canary(pathlib.Path(canary))
        self.watch = Watch(self.canary)
        self.presets = {name: build() for name, build in PRESETS.items()}
        self.references, self.peaks = {}, {}
        for name in [*self.presets, *self.presets]:  # twice: imports come with the first loads
            self.write(name)
            forget_peak_memory()
            before = peak_memory()
            causal_lm = phi3_ref.Phi3CausalLM.from_preset(self.directory)
            self.references[name] = contents(causal_lm)
            self.generate(causal_lm)
            self.peaks[name] = peak_memory() - before

    def write(self, name):
        write(self.presets[name], self.directory)

    def generate(self, causal_lm):
        """Two tokens, from ids and from text."""
        causal_lm.compile(sampler="greedy")
        inputs = {"token_ids": np.array([[1, 4, 0, 0]]), "padding_mask": np.array([[1, 1, 0, 0]])}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # large weights overflow
            warnings.simplefilter("ignore", UserWarning)
            tokens = causal_lm.generate(inputs, stop_token_ids=None)["token_ids"]
            assert tokens.shape == (1, 4)
            if causal_lm.preprocessor is not None:
                text = causal_lm.generate("hello", max_length=8)
                assert isinstance(text, str)

    def outcome(self, name):
        """The Outcome of loading what `self.directory` holds, made from the preset `name`."""
        import gc

        gc.collect()
        descriptors, error, causal_lm, detail = open_descriptors(), None, None, []
        forget_peak_memory()
        memory, start = peak_memory(), time.process_time()
        unraisable = []
        sys.unraisablehook = lambda problem: unraisable.append(str(problem.exc_value))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with self.watch.looking():
                try:
                    causal_lm = phi3_ref.Phi3CausalLM.from_preset(self.directory)
                except BaseException as raised:
                    error, trace = raised, raised.__traceback__
                    while trace.tb_next:
                        trace = trace.tb_next
                    where = f"{trace.tb_frame.f_code.co_name}:{trace.tb_lineno}"
            seconds, growth = time.process_time() - start, peak_memory() - memory
            outside = self.watch.outside(self.directory)
            if error is None:
                result = self.judge_model(causal_lm, name)
            else:
                result = self.judge_error(error, where)
            del error, causal_lm
            trace = None
            left_open = open_descriptors() - descriptors
            if left_open:
                gc.collect()
                detail.append(f"{left_open} descriptors left open"
                              f" ({open_descriptors() - descriptors} after gc)")
        sys.unraisablehook = sys.__unraisablehook__
        detail += [f"warned: {each.category.__name__}: {each.message}" for each in caught
                   if not issubclass(each.category, UserWarning)]
        detail += [f"unraisable: {each}" for each in unraisable]
        if seconds > SECONDS:
            detail.append(f"{seconds:.1f} s")
        if growth > self.peaks[name] + MEGABYTES:
            detail.append(f"{growth:.0f} MB of memory")
        if outside:
            detail.append(f"opened {outside[:3]}")
        if (self.canary / "unpickled").exists():
            (self.canary / "unpickled").unlink()
            detail.append("unpickled")
        for path in [*self.temporary.iterdir(), *self.directory.rglob("*.tmp")]:
            detail.append(f"left {path.name}")
        return Outcome("finding", "; ".join(detail) + f" [{result.kind}]") if detail else result

    def judge_model(self, causal_lm, name):
        try:
            self.generate(causal_lm)
            return different(causal_lm, self.references[name], self.directory)
        except BaseException as error:
            trace = error.__traceback__
            while trace.tb_next:
                trace = trace.tb_next
            where = f"{trace.tb_frame.f_code.co_name}:{trace.tb_lineno}"
            # Some faults of a tokenizer.json show only where a text comes upon them.
            if f"{self.directory / 'tokenizer.json'} is malformed" in str(error):
                return self.judge_error(error, where)
            return Outcome("finding", f"loaded, then {type(error).__name__} in {where}: "
                                      f"{str(error)[:200]}")

    def judge_error(self, error, where):
        message, found = str(error), f"{type(error).__name__} in {where}: {str(error)[:200]!r}"
        if type(error) not in DOCUMENTED:
            return Outcome("finding", f"undocumented {found}")
        if len(message) >= 2000:
            return Outcome("finding", f"message of {len(message)} characters: {found}")
        if str(self.directory) not in message:
            return Outcome("finding", f"message without a path: {found}")
        return Outcome("refused", message)
