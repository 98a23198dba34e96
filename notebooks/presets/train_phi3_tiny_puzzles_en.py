"""Train the embedded preset from nothing: `python train_phi3_tiny_puzzles_en.py`.

A Phi-3 of 0.9 million parameters learns three kinds of question, each a different algorithm:

    What is 345 + 278?   ->  623       (0 to 999 each)
    Reverse planet       ->  tenalp    (2 to 8 lower-case letters)
    Sort planet          ->  aelnpt

It is built and trained with KerasHub and saved as a Keras preset beside this file. Half an hour
on two CPU cores. Needs tests/requirements.txt; TensorFlow is its fastest backend here.
"""

import io
import os
import pathlib
import random

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras
import keras_hub
import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

STEPS, BATCH, CONTEXT = 8000, 128, 36
LETTERS = "abcdefghijklmnopqrstuvwxyz"
# Phi-3's own special tokens, in its order.
SPECIAL_TOKENS = (
    "<|endoftext|> <|assistant|> <|placeholder1|> <|placeholder2|> <|placeholder3|> "
    "<|placeholder4|> <|system|> <|end|> <|placeholder5|> <|placeholder6|> <|user|>"
).split()


def question(rng):
    """Draw one question and its answer: half of them sums, the hardest to learn."""
    word = "".join(rng.choice(LETTERS) for _ in range(rng.randint(2, 8)))
    # Among 0 to 999, numbers of one or two digits would be too rare to be learned well.
    a, b = (rng.randint(0, rng.choice([9, 99, 999, 999, 999])) for _ in range(2))
    total = f"What is {a} + {b}?", str(a + b)
    return rng.choice([
        total, total, (f"Reverse {word}", word[::-1]), (f"Sort {word}", "".join(sorted(word))),
    ])


def train_tokenizer():
    """A SentencePiece model, one piece per character, other characters as UTF-8 bytes.

    It normalizes as Phi-3's does (nothing but a space put before the text) and, as KerasHub's
    converter does for Phi-3, gets the special tokens appended as user-defined pieces.
    """
    rng = random.Random(0)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(question(rng)[0] for _ in range(10_000)), model_writer=model,
        model_type="char", vocab_size=512, hard_vocab_limit=False, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        character_coverage=1.0, minloglevel=2,
    )
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model.getvalue())
    for token in SPECIAL_TOKENS:
        proto.pieces.add(piece=token, score=0.0, type=proto.SentencePiece.USER_DEFINED)
    return keras_hub.models.Phi3Tokenizer(proto.SerializeToString(deterministic=True))


class Questions(keras.utils.PyDataset):
    """Endless fresh batches; the loss counts the answer and its closing <|end|> only."""

    def __init__(self, proto):
        super().__init__()
        self.encode = sentencepiece.SentencePieceProcessor(model_proto=proto).encode

    def __len__(self):
        return STEPS

    def __getitem__(self, step):
        rng = random.Random(f"training step {step}")
        token_ids = np.zeros([BATCH, CONTEXT + 1], "int32")
        weight = np.zeros([BATCH, CONTEXT], "float32")
        for row in range(BATCH):
            asked, answer = question(rng)
            prompt = [1, *self.encode(f"<|user|>\n{asked}<|end|>\n<|assistant|>\n")]
            full = [1, *self.encode(f"<|user|>\n{asked}<|end|>\n<|assistant|>\n{answer}<|end|>")]
            token_ids[row, : len(full)] = full
            weight[row, len(prompt) - 1 : len(full) - 1] = 1
        # Causal attention makes a padding mask unnecessary: padding comes last and has no weight.
        inputs = {"token_ids": token_ids[:, :-1], "padding_mask": np.ones_like(token_ids[:, :-1])}
        return inputs, token_ids[:, 1:], weight


def main():
    """Train, round the weights to bfloat16 and write the preset."""
    keras.utils.set_random_seed(0)
    tokenizer = train_tokenizer()
    config = dict(
        vocabulary_size=tokenizer.vocabulary_size(), num_layers=4, hidden_dim=128,
        intermediate_dim=384, num_query_heads=4, num_key_value_heads=2,
        max_sequence_length=CONTEXT, pretraining_sequence_length=CONTEXT,
    )
    backbone = keras_hub.models.Phi3Backbone(**config)
    causal_lm = keras_hub.models.Phi3CausalLM(backbone)
    model = keras.Model(causal_lm.input, causal_lm.output)
    learning_rate = keras.optimizers.schedules.CosineDecay(
        0.0, decay_steps=STEPS - 400, warmup_target=2e-3, warmup_steps=400
    )
    model.compile(
        optimizer=keras.optimizers.AdamW(
            learning_rate, weight_decay=0.1, beta_1=0.9, beta_2=0.98
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=[keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
    )
    model.fit(Questions(tokenizer.proto))

    saved = keras_hub.models.Phi3Backbone(**config, dtype="bfloat16", name="phi3_backbone")
    saved.set_weights(backbone.get_weights())
    preprocessor = keras_hub.models.Phi3CausalLMPreprocessor(tokenizer, sequence_length=CONTEXT)
    causal_lm = keras_hub.models.Phi3CausalLM(saved, preprocessor)
    causal_lm.save_to_preset(str(pathlib.Path(__file__).parent / "phi3_tiny_puzzles_en"))


if __name__ == "__main__":
    main()
