"""What KerasHub calls by a name, we call by the same, with its arguments, in its order."""

import inspect

import keras
import keras_hub
import pytest

import phi3_ref

SAMPLERS = ("GreedySampler", "RandomSampler", "TopKSampler", "TopPSampler", "BeamSampler")
CLASSES = {
    name: (getattr(keras_hub.samplers if name in SAMPLERS else keras_hub.models, name),
           getattr(phi3_ref, name))
    for name in (
        "Phi3Backbone", "Phi3Tokenizer", "Phi3CausalLMPreprocessor", "Phi3CausalLM", *SAMPLERS)
}
DIRECTORY = "a directory is called one everywhere here"
FILE = "a preset has one file of a kind"
LABELS = "they come from the text: KerasHub takes None alone"
LAYOUT = "Keras's own layout of a table"
ONLY = "there is one loss and one metric, KerasHub's own"
DATA = "beside what it weighs, as in train_on_batch; 32 is what Keras makes of None"
VALIDATION = "that is `evaluate`"
# Where ours differ, and why. All that is not listed is alike: names, order and defaults. Arguments
# that only we have come after KerasHub's, and have defaults.
DIFFERENT = {
    "Phi3Backbone.save_to_preset": {"preset_dir is directory": DIRECTORY},
    "Phi3Backbone.export_to_transformers": {"path is directory": DIRECTORY},
    "Phi3Backbone.enable_lora": {"no target_layer_names": "query and value, KerasHub's default"},
    "Phi3Backbone.summary": {f"no {name}": LAYOUT for name in (
        "line_length", "positions", "print_fn", "expand_nested", "show_trainable", "layer_range")},
    "Phi3Tokenizer.from_preset": {"no config_file": FILE},
    "Phi3Tokenizer.save_to_preset": {"preset_dir is directory": DIRECTORY},
    "Phi3Tokenizer.export_to_transformers": {"path is directory": DIRECTORY},
    "Phi3Tokenizer.tokenize": {"inputs is text": "what it is"},
    "Phi3Tokenizer.__call__": {"inputs is text": "what it is", "no training": "of no effect there"},
    "Phi3Tokenizer.detokenize": {"inputs is token_ids": "what they are"},
    "Phi3Tokenizer.id_to_token": {"id is token_id": "id is a function of Python's"},
    "Phi3CausalLMPreprocessor.from_preset": {"config_file by name": FILE},
    "Phi3CausalLMPreprocessor.save_to_preset": {"preset_dir is directory": DIRECTORY},
    "Phi3CausalLMPreprocessor.__call__": {
        "no y": LABELS, "no sample_weight": LABELS, "sequence_length by name": LABELS},
    "Phi3CausalLM.compile": {f"no {name}": ONLY for name in ("loss", "weighted_metrics")},
    "Phi3CausalLM.fit": {
        "sample_weight by name": DATA, "batch_size by name": DATA, "batch_size=32": DATA,
        f"x={inspect.Parameter.empty}": "there is nothing to learn without",
        "no validation_data": VALIDATION, "no validation_split": VALIDATION},
    "Phi3CausalLM.evaluate": {
        "sample_weight by name": DATA, "batch_size by name": DATA, "batch_size=32": DATA,
        f"x={inspect.Parameter.empty}": "there is nothing to evaluate without"},
    "Phi3CausalLM.save_to_preset": {"preset_dir is directory": DIRECTORY},
    "Phi3CausalLM.export_to_transformers": {"path is directory": DIRECTORY},
    "BeamSampler.__init__": {
        "return_all_beams by name": "not there: `generate` returns one text for each prompt"},
}


def function(cls, name):
    """The function behind a method of a class, or None."""
    found = inspect.getattr_static(cls, name, None)
    found = found.__func__ if isinstance(found, (classmethod, staticmethod)) else found
    return found if inspect.isfunction(found) else None


def differences(theirs, ours):
    """What a call in KerasHub's way would find otherwise."""
    theirs, ours = ([*inspect.signature(f).parameters.values()][1:] for f in (theirs, ours))
    takes_any = any(p.kind is p.VAR_POSITIONAL for p in theirs)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in ours)
    theirs, ours = ([p for p in side if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
                    for side in (theirs, ours))
    names = [p.name for p in ours]
    for position, parameter in enumerate(theirs):
        name, at = parameter.name, ours[position] if position < len(ours) else None
        if name in names:
            mine = ours[names.index(name)]
            if mine.default != parameter.default:
                yield f"{name}={mine.default}"
            if mine is not at and parameter.kind is not parameter.KEYWORD_ONLY:
                yield f"{name} by name"
        elif at is not None and parameter.default is at.default is parameter.empty:
            yield f"{name} is {at.name}"
        else:
            yield f"{name} by name" if open_ended else f"no {name}"
    for parameter in ours[len(theirs):]:
        if parameter.default is parameter.empty and not takes_any:
            yield f"{parameter.name} is required"


@pytest.mark.parametrize("name", CLASSES)
def test_signatures_are_kerashubs(name):
    """All methods that both have, constructors and calls included."""
    theirs, ours = CLASSES[name]
    methods = [method for method in dir(ours) if not method.startswith("_")]
    compared = 0
    for method in ["__init__", "__call__", *methods]:
        pair = (function(theirs, "call" if method == "__call__" else method),
                function(ours, method))
        # A functional model's call is Keras's, and its class changes as the first one is built.
        functional = method == "__call__" and name in ("Phi3Backbone", "Phi3CausalLM")
        if None not in pair and not functional:
            expected = DIFFERENT.get(f"{name}.{method}", {})
            assert set(differences(*pair)) == set(expected), f"{name}.{method}"
            compared += 1
    assert compared >= 2


def test_adamws_arguments_are_kerass():
    """Those that it has: its names, its order, its defaults; and Adam's, but for the decay."""
    missing = {"amsgrad", "clipvalue", "use_ema", "ema_momentum", "ema_overwrite_frequency",
               "loss_scale_factor", "gradient_accumulation_steps", "name"}
    found = set(differences(keras.optimizers.AdamW.__init__, phi3_ref.AdamW.__init__))
    assert found - {"clipnorm by name", "global_clipnorm by name"} == {f"no {x}" for x in missing}
    ours, adam = (inspect.signature(cls.__init__).parameters for cls in (
        phi3_ref.AdamW, keras.optimizers.Adam))
    for name in ("learning_rate", "beta_1", "beta_2", "epsilon", "clipnorm", "global_clipnorm"):
        assert ours[name].default == adam[name].default


def test_every_difference_is_of_a_method_that_both_have():
    """The table names nothing that is not there."""
    for name in DIFFERENT:
        cls, method = name.split(".")
        theirs, ours = CLASSES[cls]
        assert function(ours, method)
        assert function(theirs, "call" if method == "__call__" else method)
