"""`backend="cupy"` where something is missing: one error, which says what to do."""

import importlib.metadata
import pathlib
import sys

import cupy_stand_in
import pytest

import phi3_ref

ROOT = pathlib.Path(phi3_ref.__file__).parent
INSTALL = ('pip install "cupy-cuda13x[ctk]>=14", or "cupy-cuda12x[ctk]>=14" where nvidia-smi says '
           "CUDA 12")
INSTALLED = [name for name in ("cupy-cuda12x", "cupy-cuda13x")  # with the tests' requirements
             if any(importlib.metadata.distributions(name=name))]


def versions(monkeypatch, driver, cupy):
    """Put a CuPy built for CUDA `cupy` beside a driver of CUDA `driver`, as CUDA numbers both."""
    monkeypatch.setitem(sys.modules, "cupy", cupy_stand_in)
    runtime = cupy_stand_in.cuda.runtime
    monkeypatch.setattr(runtime, "driverGetVersion", lambda: driver)
    monkeypatch.setattr(runtime, "runtimeGetVersion", lambda: cupy)


@pytest.mark.parametrize("driver, cupy", [
    (13000, 13020), (13020, 13000), (12020, 12090), (13010, 12090)])  # a major version's are alike
def test_a_driver_that_is_new_enough(driver, cupy, monkeypatch):
    """CUDA's own rule: within a major version each driver serves each runtime, later ones too."""
    versions(monkeypatch, driver, cupy)
    assert phi3_ref.load_backend("cupy") is cupy_stand_in


@pytest.mark.parametrize("driver, cupy", [(12080, 13020), (11080, 12090)])
def test_a_driver_that_is_too_old(driver, cupy, monkeypatch):
    """Both versions, and both ways out."""
    versions(monkeypatch, driver, cupy)
    with pytest.raises(RuntimeError) as caught:
        phi3_ref.load_backend("cupy")
    for text in (f"The driver is of CUDA {driver // 1000}, CuPy of CUDA {cupy // 1000}",
                 "update the driver", f"pip uninstall {INSTALLED[0]}; then {INSTALL}"):
        assert text in str(caught.value)


def test_no_cupy(monkeypatch):
    """The command, in both its forms; in `kernels_cuda`, which can be used alone, too."""
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(ImportError) as caught:
        phi3_ref.load_backend("cupy")
    assert INSTALL in str(caught.value)


@pytest.mark.parametrize("others", [["cupy-cuda11x"], ["cupy"], ["cupy", "cupy-cuda11x"]])
def test_two_cupys(others, monkeypatch, tmp_path):
    """Beside the one that the tests install: which to remove, all of them; then what to install."""
    for name in others:
        directory = tmp_path / f"{name.replace('-', '_')}-14.0.0.dist-info"
        directory.mkdir()
        (directory / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 14\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError) as caught:
        phi3_ref.load_backend("cupy")
    packages = " ".join([*others, *INSTALLED])
    assert f"pip uninstall {packages}; then {INSTALL}" in str(caught.value)


def test_a_cupy_without_bfloat16(monkeypatch):
    """CuPy has it since 14."""
    versions(monkeypatch, 12080, 12080)
    monkeypatch.setattr(cupy_stand_in, "__version__", "13.6.0")
    with pytest.raises(ImportError) as caught:
        phi3_ref.load_backend("cupy")
    assert "CuPy 13.6.0 is too old" in str(caught.value) and INSTALL in str(caught.value)


def test_no_gpu_as_cupy_itself_says():
    """The real CuPy: an error that names GPU, driver and the other backend, or the module."""
    try:
        cupy = phi3_ref.load_backend("cupy")
    except RuntimeError as error:
        assert "no NVIDIA GPU" in str(error) and 'backend="numpy"' in str(error)
    else:
        assert cupy.cuda.runtime.getDeviceCount() > 0


def test_the_first_command_installs_no_cupy_and_the_tests_one():
    """Beside a package for another CUDA it would break both; of the tests, NVRTC needs one."""
    def packages(name):
        lines = (ROOT / name).read_text("utf-8").splitlines()
        return [line.split("#")[0] for line in lines if not line.startswith(("#", "-"))]

    assert not [line for line in packages("requirements.txt") if "cupy" in line]
    assert sum("cupy" in line for line in packages("tests/requirements.txt")) == 1
    readme = (ROOT / "README.md").read_text("utf-8")
    for version in (12, 13):
        assert f'.venv/bin/pip install "cupy-cuda{version}x[ctk]>=14"' in readme
