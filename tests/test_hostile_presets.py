"""Presets that somebody broke or forged: refused by name, at once, or loaded as their files say.

`hostile_presets.Judge` holds every load to all of it: the documented exceptions, a message that
names the preset and stays short, two seconds, no more memory than a correct load and 64 MB, no file
descriptor or temporary file left, no file outside the preset opened, nothing unpickled, and what
loads equal to what an independent reader of the files finds.
"""

import gc
import json
import random
import re

import hostile_presets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

STORED = "is not stored as Keras does: whole, in this file, uncompressed"
ABSENT = "there is no tensor layers/"
ELSEWHERE = "for which the index names"
BESIDE = "which is not a file beside it|has no '"
# Kind of change: what the message says, or None where the preset is still one.
HDF5 = {
    "external link": ABSENT, "external link of a group": ABSENT,
    "external link of layers": f"cannot be those of|{ABSENT}", "soft link": ABSENT,
    "hard link": ABSENT, "cycle": None, "external storage": STORED, "virtual": STORED,
    "virtual of this file": STORED, "gzip bomb": STORED, "text": STORED, "variable length": STORED,
    "compound": STORED, "array items": STORED, "references": STORED, "enum": STORED,
    "wrong shape": r"must be \(.*\)\. Found: \(|" + STORED, "null": "Found: None",
    "compact": STORED, "other floats": STORED,
    "big-endian": None, "astronomical": STORED, "unallocated": STORED, "missing": ABSENT,
    "missing layers": f"cannot be those of|{ABSENT}", "extra": f"unknown tensor|{ELSEWHERE}",
    "group": ABSENT, "named type": ABSENT, "not finite": "has values that are NaN or infinite",
    "huge values": "has values that are NaN or infinite", "many": None,
    "deep": "is no name that Keras gives", "other names": "is no name that Keras gives",
}
SAFETENSORS = {
    "size": "its header has|is not JSON|cannot be read", "offsets": "cannot be read",
    "missing": "cannot be read|there is no tensor", "duplicate": "comes twice",
    "root": "cannot be read", "behind": "cannot be read", "hole": "cannot be read",
    "not finite": "has values that are NaN or infinite",
}
INDEX = {
    "outside": BESIDE, "absolute": BESIDE, "wrong shard": ELSEWHERE, "missing entry": ELSEWHERE,
    "missing shard": "has no 'model", "copied shard": f"is in another file|{ELSEWHERE}",
    "swapped shards": f"is in another file|{ELSEWHERE}", "extra entry": None,
}
VOCABULARY = {
    "more": "The tokenizer has", "none": "SentencePiece",
    "twice": "is already defined", "score": None, "sampling": None,
}
# Kind of change of a tokenizer.json: what may become of it, and what a refusal says.
MALFORMED = "tokenizer.json is malformed"
TOKENIZER = {
    "more": ({"refused"}, "The tokenizer has|gives two tokens one id"),
    "far": ({"refused"}, f"The tokenizer has|gives two tokens one id|{MALFORMED}"),
    "twice": ({"refused", "equal"}, f"gives two tokens one id|{MALFORMED}"),  # equal: with itself
    "template": ({"refused"}, MALFORMED), "model": ({"refused"}, MALFORMED),
    "truncation": ({"equal", "refused"}, "stride set to 5"),  # as transformers does
    "padding": ({"equal"}, ""), "decoder": ({"other tokenizer"}, ""),
    "post_processor": ({"equal", "other settings"}, ""),
    **dict.fromkeys(["fewer", "merges", "regex", "flags", "ids", "normalizer", "pre_tokenizer"], (
        {"equal", "other tokenizer", "refused"}, f"gives two tokens one id|{MALFORMED}")),
}
DIRECTORY = {
    "pickle": "pickles .* are not read|has no 'model", "link": None,
}
CASES = [
    (function, kind, message)
    for function, kinds in (
        (hostile_presets.spoil_hdf5, HDF5), (hostile_presets.spoil_safetensors, SAFETENSORS),
        (hostile_presets.spoil_index, INDEX), (hostile_presets.spoil_vocabulary, VOCABULARY),
        (hostile_presets.spoil_directory, DIRECTORY))
    for kind, message in kinds.items()
]


class OneKind(hostile_presets.Choices):
    """Random choices, except of the kind of change."""

    def __init__(self, source, kind):
        super().__init__(source)
        self.kind = kind

    def pick(self, options):
        return self.kind if self.kind in options else super().pick(options)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    directory = tmp_path_factory.mktemp("hostile")
    (directory / "temporary").mkdir()
    judge = hostile_presets.Judge(*(directory / name for name in ("preset", "canary", "temporary")))
    gc.freeze()  # each case collects garbage: among its own objects, not those of all other tests
    yield judge
    gc.unfreeze()


@pytest.mark.parametrize("name", hostile_presets.PRESETS)
def test_an_unspoilt_preset_loads_as_it_was_saved(judge, name):
    """Settings, weights bit by bit, and tokenization; within the limits that follow."""
    judge.write(name)
    assert judge.outcome(name).kind == "equal"


@pytest.mark.parametrize("function, kind, message", CASES,
                         ids=[f"{f.__name__} {kind}" for f, kind, _ in CASES])
def test_a_forged_preset_is_refused_by_name(judge, function, kind, message):
    """Each kind of change, on every preset that it applies to."""
    seen = 0
    for name in judge.presets:
        for seed in range(2):
            judge.write(name)
            arguments = [judge.canary] if function in (
                hostile_presets.spoil_hdf5, hostile_presets.spoil_index,
                hostile_presets.spoil_directory) else []
            if not any(judge.directory.glob("*.h5" if function is hostile_presets.spoil_hdf5
                       else "*.safetensors" if function is hostile_presets.spoil_safetensors
                       else "model*.json" if function is hostile_presets.spoil_index else "*")):
                continue
            if function is hostile_presets.spoil_vocabulary and not any(
                    judge.directory.rglob("*.spm")):
                continue
            function(judge.directory, OneKind(random.Random(seed), kind), *arguments)
            outcome = judge.outcome(name)
            if message is None:
                assert outcome.kind in ("equal", "other weights"), outcome
            else:
                assert outcome.kind == "refused", outcome
                assert re.search(message, outcome.detail, re.DOTALL), outcome
            seen += 1
    assert seen >= 2


@pytest.mark.parametrize("kind", TOKENIZER)
def test_a_forged_tokenizer_json_is_refused_by_name_or_read_as_transformers_does(judge, kind):
    """Whether the library `tokenizers` returns an error, panics, or makes something of it."""
    assert {*TOKENIZER} >= {*hostile_presets.PARTS}
    kinds, message = TOKENIZER[kind]
    for name in judge.presets:
        for seed in range(8):
            judge.write(name)
            if name.startswith("huggingface"):
                hostile_presets.spoil_tokenizer(judge.directory, OneKind(random.Random(seed), kind))
                outcome = judge.outcome(name)
                assert outcome.kind in kinds, outcome
                assert outcome.kind != "refused" or re.search(message, outcome.detail), outcome


def test_a_vocabulary_with_a_piece_that_is_no_utf8_is_refused_by_name(judge):
    """Found by the fuzzer: SentencePiece takes it, and fails when the piece is asked for."""
    for name, file, message in (
            ("keras, float32", "assets/tokenizer/vocabulary.spm", "utf-8"),
            ("huggingface, float32", "tokenizer.json", MALFORMED)):
        judge.write(name)
        path = judge.directory / file
        content = path.read_bytes()
        assert content.count(b"\xe2\x96\x81wor") == 1  # "▁wor"
        path.write_bytes(content.replace(b"\xe2\x96\x81wor", b"\xe2\x96\xf4wor"))
        outcome = judge.outcome(name)
        assert outcome.kind == "refused" and message in outcome.detail, outcome


def test_what_a_library_quotes_is_cut_short(judge):
    """Found by the fuzzer: a refusal that repeated 100,000 characters of a tokenizer.json."""
    name = "huggingface, float32"
    judge.write(name)
    path = judge.directory / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"added_tokens": "x" * 100_000}))
    outcome = judge.outcome(name)
    assert outcome.kind == "refused" and "xxx" in outcome.detail, outcome


def test_the_heap_of_hdf5s_attributes_is_not_read(judge):
    """Found by the fuzzer: the HDF5 library looks for an attribute's text in it, and never ends."""
    name = "keras, bfloat16"
    judge.write(name)
    path = judge.directory / "model.weights.h5"
    content = bytearray(path.read_bytes())
    content[content.index(b"GCOL") + 0x139] ^= 8
    path.write_bytes(content)
    assert judge.outcome(name).kind == "equal"


@pytest.mark.parametrize("weight_map", [{}, {"/layers/phi3_decoder/vars": []}])
@pytest.mark.parametrize("name", ["keras, sharded", "huggingface, sharded"])
def test_an_index_that_names_no_file_is_refused_by_name(judge, name, weight_map):
    """Found by the fuzzer: the message named nothing, either."""
    judge.write(name)
    path, = judge.directory.glob("model*.json")
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    outcome = judge.outcome(name)
    assert outcome.kind == "refused" and f"{path.name} names no file" in outcome.detail, outcome


@settings(max_examples=500)
@given(st.binary(max_size=200))
def test_any_change_of_any_file_is_harmless(judge, source):
    """Hypothesis writes the choices: which preset, which file, which bytes or structure."""
    choices = hostile_presets.Choices(source)
    name = choices.pick(list(judge.presets))
    judge.write(name)
    try:
        change = hostile_presets.mutate(judge.directory, choices.rest, judge.canary)
    except Exception:  # the change does not apply to this file
        return
    outcome = judge.outcome(name)
    assert outcome.kind != "finding", f"{change}: {outcome.detail}"
