"""Settings every test shares: the reference's backend, Hypothesis, and what may be skipped."""

import os

os.environ["KERAS_BACKEND"] = "tensorflow"  # before anything imports keras
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest
from hypothesis import HealthCheck, settings

# The same examples on every run, so that a failure is a change of the code and not of the dice.
# `pytest --hypothesis-profile=explore` rolls new ones; EXAMPLES=20 draws 20 times as many.
common = dict(deadline=None, print_blob=True, database=None,
              suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
settings.register_profile("deterministic", derandomize=True, **common)
settings.register_profile("explore", derandomize=False, **common)
settings.load_profile("deterministic")


def why_no_gpu():
    """Returns why the tests marked `gpu` cannot run here, or None where they can."""
    try:
        import cupy
        return None if cupy.cuda.runtime.getDeviceCount() else "no CUDA device"
    except ImportError:
        return "cupy is not installed"
    except Exception as error:  # cupy's own error types exist only where cupy does
        return f"no usable CUDA device: {error}"


def pytest_collection_modifyitems(items):
    no_gpu = why_no_gpu() if any(item.get_closest_marker("gpu") for item in items) else None
    no_weights = None if os.environ.get("PHI3_WEIGHTS") else "PHI3_WEIGHTS names no directory"
    for marker, reason in (("gpu", no_gpu), ("weights", no_weights)):
        for item in items:
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
