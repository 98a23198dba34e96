"""Prints the README's parity tables: `python tests/parity_table.py`, from the repository's root.

For each reference and dtype: the worst difference between it and us over 30 seeded models of three
layers, and how far each is from float64 in the mean. All are max|a - b| / max|b|. The first table
is of what the models compute, the second of the gradients of their weights, the worst of each.
"""

import os
import pathlib
import sys
import warnings

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import numpy as np
import references as ref

MODELS = 30


def table(kinds):
    """Prints a table; `kinds` are (reference, function of dtype and seeds, {dtype: allowed})."""
    print("| reference | dtype | ours against it, worst | allowed | ours against float64, mean "
          "| its own against float64, mean |")
    print("|---|---|---|---|---|---|")
    for name, errors, allowed in kinds:
        for dtype in allowed:
            difference, ours, its = np.array(errors(dtype, range(MODELS))).T
            figures = difference.max(), allowed[dtype], ours.mean(), its.mean()
            print(f"| {name} | {dtype} | " + " | ".join(f"{x:.1e}" for x in figures) + " |",
                  flush=True)


def main():
    warnings.simplefilter("ignore")  # some models are tried past max_sequence_length
    keras, torch = "KerasHub on TensorFlow", "transformers on torch"

    def unmixed(tolerances, factor=1):
        return {dtype: tolerances[dtype] * (1 if dtype == "float32" else factor)
                for dtype in ref.NUMPY_DTYPE}

    table([(keras, ref.keras_errors, ref.TOLERANCE),
           (torch, ref.transformers_errors, unmixed(ref.TOLERANCE))])
    print("\nGradients of all weights:\n")
    # Twice as much in 16 bits, where transformers' norms round once more than ours.
    table([(keras, ref.keras_gradient_errors, ref.GRADIENT_TOLERANCE),
           (torch, ref.transformers_gradient_errors, unmixed(ref.GRADIENT_TOLERANCE, 2))])


if __name__ == "__main__":
    main()
