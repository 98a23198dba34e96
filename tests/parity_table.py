"""Prints the README's parity table: `python tests/parity_table.py`, from the repository's root.

For each reference and dtype: the worst difference between it and us over 30 seeded models of three
layers, and how far each is from float64 in the mean. All are max|a - b| / max|b|.
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


def main():
    warnings.simplefilter("ignore")  # some models are tried past max_sequence_length
    print("| reference | dtype | ours against it, worst | allowed | ours against float64, mean "
          "| its own against float64, mean |")
    print("|---|---|---|---|---|---|")
    kinds = [("KerasHub on TensorFlow", ref.keras_errors, ref.TOLERANCE),
             ("transformers on torch", ref.transformers_errors, ref.NUMPY_DTYPE)]
    for name, errors, dtypes in kinds:
        for dtype in dtypes:
            difference, ours, its = np.array(errors(dtype, range(MODELS))).T
            figures = difference.max(), ref.TOLERANCE[dtype], ours.mean(), its.mean()
            print(f"| {name} | {dtype} | " + " | ".join(f"{x:.1e}" for x in figures) + " |",
                  flush=True)


if __name__ == "__main__":
    main()
