"""Train the embedded preset from nothing: `python train_phi3_tiny_puzzles_en.py --out DIRECTORY`.

A Phi-3 of 0.9 million parameters learns three kinds of question, each a different algorithm:

    What is 345 + 278?   ->  623       (0 to 999 each)
    Reverse planet       ->  tenalp    (2 to 8 lower-case letters)
    Sort planet          ->  aelnpt

Everything here is phi3_ref's: the random weights it begins with, every derivative, AdamW, the
preset in Keras's format at the end. (The weights in phi3_tiny_puzzles_en, beside this file, were
trained with KerasHub by the same recipe, and stay as they are: the notebooks speak of what they
have learned.) About an hour on two CPU cores. Every 500 steps the weights and the optimizer's state
go to DIRECTORY/checkpoint: the same command, given again, goes on from there, and ends at the same
bits as if it had never stopped.
"""

import argparse
import io
import math
import pathlib
import random
import shutil
import sys
import time

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import phi3_ref

STEPS, BATCH, CONTEXT, SEED = 8000, 128, 36, 0
SAVE_EVERY, FRESH_QUESTIONS = 500, 300
OPTIMIZER = "optimizer.safetensors"  # its state's file in a checkpoint
LETTERS = "abcdefghijklmnopqrstuvwxyz"
# Phi-3's own special tokens, in its order.
SPECIAL_TOKENS = (
    "<|endoftext|> <|assistant|> <|placeholder1|> <|placeholder2|> <|placeholder3|> "
    "<|placeholder4|> <|system|> <|end|> <|placeholder5|> <|placeholder6|> <|user|>"
).split()


# Questions ----------------------------------------------------------------------------------------


def random_word(rng):
    """Draw 2 to 8 letters."""
    return "".join(rng.choice(LETTERS) for _ in range(rng.randint(2, 8)))


def addition(a, b):
    """Return the question for the sum of two numbers, and its answer; so do the next two."""
    return f"What is {a} + {b}?", str(a + b)


def reversal(word):
    """Return the question for a word backwards, and its answer."""
    return f"Reverse {word}", word[::-1]


def sorting(word):
    """Return the question for a word's letters in order, and its answer."""
    return f"Sort {word}", "".join(sorted(word))


def question(rng):
    """Draw one question and its answer: half of them sums, the hardest to learn."""
    word = random_word(rng)
    # Among 0 to 999, numbers of one or two digits would be too rare to be learned well.
    a, b = (rng.randint(0, rng.choice([9, 99, 999, 999, 999])) for _ in range(2))
    return rng.choice([addition(a, b), addition(a, b), reversal(word), sorting(word)])


KINDS = {  # what it is asked in the end
    "sum": lambda rng: addition(rng.randint(0, 999), rng.randint(0, 999)),
    "small sum": lambda rng: addition(rng.randint(0, 99), rng.randint(0, 99)),
    "reverse": lambda rng: reversal(random_word(rng)),
    "sort": lambda rng: sorting(random_word(rng)),
}


def prompt_for(asked):
    """Put a question into Phi-3's chat format."""
    return f"<|user|>\n{asked}<|end|>\n<|assistant|>\n"


# What it learns with ------------------------------------------------------------------------------


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
    return phi3_ref.Phi3Tokenizer(proto.SerializeToString(deterministic=True))


def batches(tokenizer, step):
    """Yield fresh batches, endlessly, from that of `step` on: inputs, labels, label weights.

    The loss counts the answer and its closing <|end|> only. Causal attention makes a padding mask
    unnecessary: padding comes last and has no weight.
    """
    while True:
        rng = random.Random(f"training step {step}")
        token_ids = np.zeros([BATCH, CONTEXT + 1], "int32")
        weight = np.zeros([BATCH, CONTEXT], "float32")
        for row in range(BATCH):
            asked, answer = question(rng)
            prompt = [tokenizer.start_token_id, *tokenizer(prompt_for(asked))]
            full = [tokenizer.start_token_id, *tokenizer(f"{prompt_for(asked)}{answer}<|end|>")]
            token_ids[row, : len(full)] = full
            weight[row, len(prompt) - 1 : len(full) - 1] = 1
        yield {"token_ids": token_ids[:, :-1]}, token_ids[:, 1:], weight
        step += 1


def learning_rate(steps, highest=2e-3):
    """Return the learning rate as a function of the step: up in a 20th of all, then half a cosine.

    With the 8,000 steps of the recipe it is Keras's `CosineDecay(0.0, decay_steps=7600,
    warmup_target=2e-3, warmup_steps=400)`.
    """
    warmup = steps // 20

    def rate(step):
        if step < warmup:
            return highest * step / warmup
        return highest * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))

    return rate


def new_model(backend):
    """Return the causal LM with random weights, always the same, and the tokenizer."""
    tokenizer = train_tokenizer()
    backbone = phi3_ref.Phi3Backbone(
        vocabulary_size=tokenizer.vocabulary_size(), num_layers=4, hidden_dim=128,
        intermediate_dim=384, num_query_heads=4, num_key_value_heads=2,
        max_sequence_length=CONTEXT, pretraining_sequence_length=CONTEXT,
        seed=SEED, backend=backend,
    )
    preprocessor = phi3_ref.Phi3CausalLMPreprocessor(tokenizer, sequence_length=CONTEXT)
    return phi3_ref.Phi3CausalLM(backbone, preprocessor)


# Learning, and what has been learned --------------------------------------------------------------


def train(steps, checkpoints, backend):
    """Return the trained causal LM, float32, going on from the last of the checkpoints."""
    optimizer = phi3_ref.AdamW(learning_rate(steps), weight_decay=0.1, beta_1=0.9, beta_2=0.98)
    saved = [int(path.parent.name) for path in checkpoints.glob(f"*/{OPTIMIZER}")]
    if saved:
        last = checkpoints / str(max(saved))
        causal_lm = phi3_ref.Phi3CausalLM.from_preset(last, backend=backend, seed=SEED)
        causal_lm.compile(optimizer)
        causal_lm.load_optimizer(last / OPTIMIZER)
    else:
        causal_lm = new_model(backend)
        causal_lm.compile(optimizer)
    first, start = optimizer.iterations, time.perf_counter()
    data = batches(causal_lm.preprocessor.tokenizer, first)
    while optimizer.iterations < steps:
        step = min(steps, (optimizer.iterations // SAVE_EVERY + 1) * SAVE_EVERY)
        causal_lm.fit(data, steps_per_epoch=step - optimizer.iterations)
        directory = checkpoints / str(step)
        causal_lm.save_to_preset(directory)
        causal_lm.save_optimizer(directory / OPTIMIZER)  # with which the checkpoint is complete
        for path in checkpoints.iterdir():
            if path != directory:
                shutil.rmtree(path)
        print(f"{step} of {steps} steps; {step - first} of them in "
              f"{(time.perf_counter() - start) / 60:.1f} minutes", flush=True)
    return causal_lm


def save_rounded(causal_lm, directory):
    """Write the preset with weights rounded to bfloat16: half the size, the same answers."""
    backbone = causal_lm.backbone
    rounded = phi3_ref.Phi3Backbone(**backbone.get_config() | {"dtype": "bfloat16"})
    rounded.set_weights(backbone.get_weights())
    phi3_ref.Phi3CausalLM(rounded, causal_lm.preprocessor).save_to_preset(directory)


def share_of_right_answers(causal_lm, kind):
    """Ask fresh questions of one kind; return the share of answers that are right."""
    rng = random.Random(f"fresh questions: {kind}")
    asked, expected = zip(*(KINDS[kind](rng) for _ in range(FRESH_QUESTIONS)), strict=True)
    answers = causal_lm.generate([prompt_for(text) for text in asked], strip_prompt=True)
    answers = [answer.removesuffix("<|end|>").strip() for answer in answers]
    return np.mean([a == b for a, b in zip(answers, expected, strict=True)])


def main(arguments=None):
    """Train, round the weights to bfloat16, write the preset, and ask it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="DIRECTORY",
                        help="where the preset goes, and the checkpoints on the way to it")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"default: {STEPS}")
    parser.add_argument("--backend", choices=["numpy", "cupy"], default="numpy")
    options = parser.parse_args(arguments)
    # The learning rate goes by the number of steps: a run of fewer is another run.
    checkpoints = options.out / "checkpoint" / f"{options.steps}_steps"
    causal_lm = train(options.steps, checkpoints, options.backend)
    save_rounded(causal_lm, options.out)
    causal_lm = phi3_ref.Phi3CausalLM.from_preset(options.out, backend=options.backend)
    causal_lm.compile(sampler="greedy")
    for kind in KINDS:
        print(f"{kind}: {share_of_right_answers(causal_lm, kind):.1%} of {FRESH_QUESTIONS} right")


if __name__ == "__main__":
    main()
