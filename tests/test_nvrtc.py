"""Every instance of every CUDA kernel compiles for every GPU we name: NVRTC needs no driver.

`pytest -rP tests/test_nvrtc.py` shows each one's registers, spilled bytes and shared memory.
"""

import concurrent.futures
import functools
import multiprocessing
import os
import pathlib
import re
from importlib import metadata

import pytest
from cupy_backends.cuda.libs import nvrtc

import kernels_cuda

NAMES = {source_name: [name for source, name in kernels_cuda.instances()
                       if source == getattr(kernels_cuda, source_name)]
         for source_name in ("RMS_NORM", "RMS_NORM_BACKWARD", "ATTENTION_TILED",
                             "ATTENTION_TENSOR_CORES", "ATTENTION_DECODE",
                             "ATTENTION_BACKWARD_TILED", "ATTENTION_BACKWARD_TENSOR_CORES",
                             "LINEAR", "SILU", "TOKEN_EMBEDDING_BACKWARD", "CROSS_ENTROPY",
                             "SUM_OF_SQUARES", "ADAM_STEP")}
REGISTERS = 65_536  # of one multiprocessor
STATIC_SHARED_MEMORY = 48 << 10  # bytes that a kernel may declare
MOST_SPILLED = 256  # bytes, stores and loads: a few registers, outside of the innermost loops
ARCHITECTURES = ["sm_75", "sm_80", "sm_89", "sm_90", "sm_100", "sm_120"]


def include_directory():
    """Returns where nvidia-cuda-runtime put the headers of 16-bit floats."""
    header, = (file for file in metadata.files("nvidia-cuda-runtime") if file.name == "cuda_fp16.h")
    return pathlib.Path(header.locate()).parent


def compile_for(arch, source, names):
    """Returns NVRTC's log, the PTX, and each instance's name in the compiled code."""
    options = ("-std=c++17", f"--gpu-architecture={arch}", f"-I{include_directory()}",
               "--ptxas-options=-v")
    program = nvrtc.createProgram(source, "kernel.cu", (), ())
    try:
        for name in names:
            nvrtc.addNameExpression(program, name)
        try:
            nvrtc.compileProgram(program, options)
        except nvrtc.NVRTCError as error:
            raise RuntimeError(f"{error}\n{nvrtc.getProgramLog(program)}") from None
        return (nvrtc.getProgramLog(program), nvrtc.getPTX(program),
                {name: nvrtc.getLoweredName(program, name) for name in names})
    finally:
        nvrtc.destroyProgram(program)


def resources(log):
    """Returns registers, spilled bytes and static shared memory of each function in ptxas's log."""
    found = {}
    for name, text in re.findall(r"Compiling entry function '(\w+)'(.*?)Compile time", log, re.S):
        registers, = re.findall(r"Used (\d+) registers", text)
        found[name] = (int(registers), sum(map(int, re.findall(r"(\d+) bytes spill", text))),
                       sum(map(int, re.findall(r"(\d+) bytes smem", text))))
    return found


def test_every_kernel_is_listed():
    assert sum(map(len, NAMES.values())) == len(kernels_cuda.instances())
    assert len({*kernels_cuda.instances()}) == len(kernels_cuda.instances())


@functools.cache
def compile_all():
    """Begins to compile everything; returns the futures by source and GPU."""
    # In processes: NVRTC compiles one program at a time.
    pool = concurrent.futures.ProcessPoolExecutor(
        os.cpu_count(), multiprocessing.get_context("spawn"))
    return {(source_name, arch): pool.submit(
        compile_for, arch, getattr(kernels_cuda, source_name), names)
        for source_name, names in NAMES.items() for arch in ARCHITECTURES}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("source_name", NAMES)
def test_compiles(source_name, arch):
    """No error, no warning, and no more registers and shared memory than a block may have."""
    source, names = getattr(kernels_cuda, source_name), NAMES[source_name]
    log, ptx, lowered = compile_all()[source_name, arch].result()
    assert "warning" not in log and "error" not in log, log
    found = resources(log)
    print(f"{arch:7} registers  spilled  shared bytes")
    for name in names:
        registers, spilled, shared = found[lowered[name]]
        print(f"{'':7} {registers:9}  {spilled:7}  {shared:12}  {name}")
        bounds = re.search(rf"__launch_bounds__\((\d+)[^;{{]*?\b{name.split('<')[0]}\(", source)
        assert registers * int(bounds[1]) <= REGISTERS, name
        assert shared <= STATIC_SHARED_MEMORY and spilled <= MOST_SPILLED, name
    if source_name.endswith("TENSOR_CORES"):  # what cuda_on_cpu replaces is there on a GPU
        for instruction in (b"mma.sync", b"cp.async", b"ldmatrix"):
            assert (instruction in ptx) == (arch != "sm_75" or instruction == b"ldmatrix")


def test_errors_are_shown():
    """What does not compile fails this test's way of compiling, too."""
    source = kernels_cuda.RMS_NORM.replace("sqrtf(sum", "sqrtf(sums")
    assert source != kernels_cuda.RMS_NORM
    with pytest.raises(RuntimeError, match='"sums" is undefined'):
        compile_for("sm_90", source, NAMES["RMS_NORM"])
