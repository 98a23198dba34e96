"""Training: thirty steps end where KerasHub's do; and what is interrupted, saved or not finite.

KerasHub trains on torch, in a process of its own, which this file is as a program: on TensorFlow,
its embedding's gradient is a list of rows, in which a token that comes twice has two.
"""

import math
import os
import pathlib
import random
import subprocess
import sys

import numpy as np
import pytest
from references import keras_backbone, padding_row, random_case

import phi3_ref

PUZZLES = "phi3_tiny_puzzles_en"
STEPS = 30
RATE = 2e-3
# Each case: the optimizer's arguments, and what its batches have beside token ids and labels.
CASES = {
    "AdamW": (dict(weight_decay=0.004), ""),
    "Adam": (dict(weight_decay=None), ""),
    "decay": (dict(weight_decay=0.5), ""),
    "betas": (dict(weight_decay=None, beta_1=0.7, beta_2=0.98, epsilon=1e-4), ""),
    "clipnorm": (dict(weight_decay=0.004, clipnorm=0.02), ""),
    "global_clipnorm": (dict(weight_decay=0.004, global_clipnorm=0.1), ""),
    "schedule": (dict(weight_decay=0.1), ""),
    "weights": (dict(weight_decay=0.004), "weights"),
    "masks": (dict(weight_decay=0.004), "weights masks"),
    "a weight for each row": (dict(weight_decay=None), "rows"),
}
TEXTS = ["What is 1 + 2?", "Reverse planet", "Sort planet", "Reverse cat", "What is 99 + 801?",
         "Sort zebra", "Sort a"]
LENGTH, BATCH, EPOCHS = 24, 3, 2  # of `fit`: batches of 3, 3 and 1


def cosine_with_warmup(step):
    """The learning rate of "schedule": eight steps up, twenty down along a cosine, then zero."""
    if step < 8:
        return RATE * step / 8
    return RATE * (1 + math.cos(math.pi * min(1, (step - 8) / 20))) / 2


def case_of(name):
    """A model's configuration, and STEPS batches (x, y, sample_weight) of changing shapes."""
    number = list(CASES).index(name)
    rng, kinds = np.random.default_rng(number), CASES[name][1]
    config, _ = random_case(random.Random(number).choice, num_layers=2)
    V, batches = config["vocabulary_size"], []
    for _ in range(STEPS):
        B, S = shape = rng.integers(1, 4), rng.integers(1, 13)
        mask, weight = np.ones(shape, "int32"), None
        if "masks" in kinds:
            names = "ones right left holes zeros".split()
            mask = np.array([padding_row(rng.choice(names), S, rng) for _ in range(B)], "int32")
        if "weights" in kinds:  # a row that sees nothing is not the same in all backends
            weight = (rng.uniform(0, 2, shape) * (rng.random(shape) < 0.8) * mask).astype("float32")
        if "rows" in kinds:
            weight = rng.uniform(0, 2, B).astype("float32")
        ids, y = rng.integers(0, V, (2, *shape)).astype("int32")
        batches.append(({"token_ids": ids, "padding_mask": mask}, y, weight))
    return config, batches


def keras_trains(path):
    """Take the steps of every case with KerasHub, and write what came of it to an .npz file."""
    import keras
    import keras_hub
    found = {}

    def keep(name, model, start, logs):
        found[f"{name}/logs"] = np.array(logs)
        for kind, weights in (("start", start), ("end", model.get_weights())):
            found.update({f"{name}/{kind}/{i:03}": weight for i, weight in enumerate(weights)})

    for name, (settings, _) in CASES.items():
        config, batches = case_of(name)
        backbone = keras_backbone(config)
        model, start, logs = keras_hub.models.Phi3CausalLM(backbone), backbone.get_weights(), []
        rate = RATE if name != "schedule" else keras.optimizers.schedules.CosineDecay(
            0.0, decay_steps=20, warmup_target=RATE, warmup_steps=8)
        settings = {"learning_rate": rate} | settings
        kind = keras.optimizers.AdamW if settings["weight_decay"] else keras.optimizers.Adam
        model.compile(optimizer=kind(**settings))
        for x, y, sample_weight in batches:
            model.reset_metrics()
            if np.ndim(sample_weight) == 1:  # which Keras takes as [B, 1]
                sample_weight = sample_weight[:, None]
            logs.append(model.train_on_batch(x, y, sample_weight))
        keep(name, model, start, logs)

    for name, optimizer in (("fit", keras.optimizers.AdamW(RATE)), ("auto", "auto")):
        model = keras_hub.models.Phi3CausalLM.from_preset(
            phi3_ref.Phi3Backbone.presets[PUZZLES], dtype="float32")
        model.preprocessor.sequence_length = LENGTH
        start = model.get_weights()
        model.compile(optimizer=optimizer)
        history = model.fit(TEXTS, batch_size=BATCH, epochs=EPOCHS, shuffle=False, verbose=0)
        keep(name, model, start, [history.history[key] for key in (
            "loss", "sparse_categorical_accuracy")])
        found[f"{name}/evaluate"] = np.array(model.evaluate(TEXTS, batch_size=BATCH, verbose=0))
    np.savez(path, **found)


if __name__ == "__main__":
    keras_trains(sys.argv[1])
