"""Runs the CUDA source of `kernels_cuda` on the CPU, on NumPy arrays, and checks what it does.

    from tests import cuda_on_cpu
    with cuda_on_cpu.emulate():
        kernels_cuda.attention(query, key, value)  # NumPy arrays

The source is compiled by g++ against header.h, which gives CUDA's terms their meaning, and linked
with runtime.cpp, which runs it. `KernelError` is raised, with the line of the kernel, at

- a read or write outside of an array's own elements (a view's gaps belong to another array), of
  shared memory's size, or anywhere else; an address that is not a multiple of the vector's size;
- a read of shared memory that no thread of the block wrote, or of a result of `empty`;
- a read of what cp.async copies before the wait that covers it;
- a data race in shared or global memory: two accesses by different threads, one of them a write,
  without a barrier between them, whether or not they collided in this run;
- a barrier or warp operation that some thread never reaches, two different ones met at once, a
  shuffle from a lane outside of the mask;
- undefined arithmetic: signed overflow, a too long shift, division by zero, an array's bounds;
- a crash, and a kernel that does not end (Ctrl-C ends one, too).

Local arrays that nobody set hold garbage, and so does shared memory at the start of a block. What
`printf` prints appears when the kernel has ended. Not modelled: speed, the rounding inside of mma
and exp2 (here exact, then rounded once), and the memory of the L1 and L2 caches (a race through
them is reported, not replayed).
"""

import atexit
import contextlib
import ctypes
import functools
import hashlib
import math
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
import types
import weakref

import ml_dtypes
import numpy as np

import kernels_cuda

HERE = pathlib.Path(__file__).parent
COMPILE = ["g++", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-U_FORTIFY_SOURCE", "-gdwarf-4",
           "-g1", "-ffp-contract=off", "-I", str(HERE)]
CHECKED = ["-O1", "-fno-store-merging", "-fno-tree-vectorize", "-ftrivial-auto-var-init=pattern",
           "-Wno-unknown-pragmas", "-Werror=vla", "-fno-builtin-printf",
           "--param", "tsan-instrument-func-entry-exit=0",
           "-fsanitize=thread,alignment,bounds,shift,integer-divide-by-zero,signed-integer-overflow"]
MOST_SHARED_MEMORY = 232_448  # bytes per block on sm_90
REDZONE = 4096  # bytes before and after every array
FINISHED, INTERRUPTED = 2, 3  # what a launch returns, as in runtime.cpp


class KernelError(RuntimeError):
    """What a kernel did wrong, and where."""


@functools.cache
def build_directory():
    """Return the directory of this process's compiled kernels."""
    directory = tempfile.mkdtemp(prefix="cuda_on_cpu_")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return pathlib.Path(directory)


def run_compiler(command, source=""):
    """Run g++; raise its errors, each with its line of the kernel's source."""
    if not shutil.which("g++"):
        raise FileNotFoundError(
            "Kernels are compiled for the CPU by g++, on Linux, and it is not installed: "
            "`apt install g++` (Debian, Ubuntu), `dnf install gcc-c++` (Fedora)")
    done = subprocess.run(command, capture_output=True, text=True,
                          env={**os.environ, "LC_ALL": "C"})
    if done.returncode:
        found = re.findall(r"^kernel:(\d+):\d+: (?:fatal )?error: (.*)", done.stderr, re.MULTILINE)
        errors = [f"line {line}: {error}: {source.splitlines()[int(line) - 1].strip()}"
                  for line, error in found]
        raise KernelError("does not compile: " + "\n".join(errors or [done.stderr]))


@functools.cache
def compile_runtime():
    target = build_directory() / "runtime.o"
    run_compiler([*COMPILE, "-O2", "-c", str(HERE / "runtime.cpp"), "-o", str(target)])
    return target


def translate(source, name_expression):
    """Return the C++ that stands for one instance of a kernel: its source between two lines."""
    source = source.replace(kernels_cuda.PRIMITIVES, "\n" * kernels_cuda.PRIMITIVES.count("\n"))
    code = re.sub(r"//.*|/\*(?s:.*?)\*/", "", source)
    if word := re.search(r"\b(asm|atomic\w*|__trap)\b", code):
        raise KernelError(f"the emulator knows no {word[0]}; kernels_cuda.PRIMITIVES may use it")
    name = re.match(r"\w+", name_expression)[0]
    if not re.search(rf"__global__\s[^;{{}}]*?\bvoid\b[^;{{}}]*?\b{name}\s*\(", code):
        raise KernelError(f"no kernel: `__global__ void {name}(` does not stand in the source")
    source = re.sub(r"#include <(cuda_fp16\.h|cuda_bf16\.h|cstdint)>", "", source)
    # extern __shared__ names memory whose size the launch gives: here, as large as it can be.
    source = re.sub(r"\bextern\s+__shared__", "extern __thread", source)
    dynamic = dict(reversed(found) for found in
                   re.findall(r"extern (__thread[^;]*?(\w+))\s*\[\s*\]\s*;", source))
    if len(dynamic) > 1:
        raise KernelError(f"extern __shared__ has several names: {', '.join(dynamic)}")
    definitions = "".join(
        f"extern {declaration}[];\n{declaration}[{MOST_SHARED_MEMORY} / sizeof(*{name})];\n"
        for name, declaration in dynamic.items())
    return (f'#include "header.h"\n#line 1 "kernel"\n{source}\n#line 1 "launch"\n{definitions}'
            f"LAUNCH({next(iter(dynamic), 'nullptr')}, {name_expression})\n")


@functools.cache
def compile_kernel(source, name_expression):
    """Return the path of the library that holds this instance, compiled once per session."""
    text = translate(source, name_expression)
    target = build_directory() / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.so"
    if not target.exists():
        cpp, compiled = target.with_suffix(".cpp"), target.with_suffix(".o")
        cpp.write_text(text)
        run_compiler([*COMPILE, *CHECKED, "-c", str(cpp), "-o", str(compiled)], source)
        run_compiler(["g++", "-shared", "-Wl,-Bsymbolic", "-Wl,-z,defs", str(compiled),
                      str(compile_runtime()), "-o", str(target)])
    return target


class Kernel:
    """One compiled instance: called as CuPy's kernels are, on NumPy arrays and scalars.

    With `count`, `traffic` then is what the launch asked of global memory: the bytes, and the bytes
    of the 32-byte segments that hold them, each once for what a warp reads or writes together. A
    launch may take `seconds` of the CPU's time.
    """

    def __init__(self, source, name_expression, reverse=False, count=False, seconds=60):
        self.source, self.name, self.reverse, self.count = source, name_expression, reverse, count
        self.seconds = seconds
        self.path = compile_kernel(source, name_expression)
        self.library = ctypes.CDLL(str(self.path))
        self.library.parameters.restype = ctypes.POINTER(ctypes.c_int)
        numbers = self.library.parameters()
        self.parameters = []
        while numbers[len(self.parameters)]:
            self.parameters.append(numbers[len(self.parameters)])
        short = re.match(r"\w+", name_expression)[0]
        bounds = re.search(rf"__launch_bounds__\((\d+)[^)]*\)\s+{short}\b", source)
        self.most_threads = int(bounds[1]) if bounds else 1024

    def __call__(self, grid, block, arguments, shared_mem=0):
        sizes = [*grid, *[1] * (3 - len(grid)), *block, *[1] * (3 - len(block))]
        if min(sizes) < 1 or max(sizes[1:3]) > 65535 or math.prod(sizes[:3]) >= 1 << 19:
            raise KernelError(f"{self.name}: a grid of {grid} blocks of {block} threads")
        if math.prod(sizes[3:]) > self.most_threads:
            raise KernelError(f"{self.name}: {block} threads, {self.most_threads} is the most")
        values, arrays = self.check(arguments)
        memory = Memory(arrays.values())
        for i, address in zip(arrays, memory.addresses, strict=True):
            values[i] = ctypes.c_void_p(address)
        pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(value) for value in values])
        message, where = ctypes.create_string_buffer(2000), ctypes.c_size_t()
        result = self.library.launch(
            (ctypes.c_uint * 6)(*sizes), ctypes.c_uint(shared_mem), pointers,
            ctypes.c_void_p(memory.bytes.ctypes.data), ctypes.c_void_p(memory.state.ctypes.data),
            ctypes.c_size_t(memory.size), int(self.reverse), self.seconds, int(self.count),
            message, ctypes.c_size_t(len(message)), ctypes.byref(where))
        print(ctypes.string_at(self.library.printed).decode(errors="replace"), end="")
        if result == INTERRUPTED:
            raise KeyboardInterrupt
        if result != FINISHED:
            raise KernelError(f"{self.name}: {message.value.decode()}{self.locate(where.value)}")
        asked, segments = (ctypes.c_uint64 * 2).in_dll(self.library, "traffic")
        self.traffic = asked, 32 * segments
        memory.copy_back()

    def check(self, arguments):
        """Compare what the launcher hands over with the kernel's parameters."""
        if len(arguments) != len(self.parameters):
            raise KernelError(f"{self.name}: {len(arguments)} arguments for "
                              f"{len(self.parameters)} parameters")
        values, arrays = [], {}
        for i, (argument, code) in enumerate(zip(arguments, self.parameters, strict=True)):
            if isinstance(argument, np.ndarray) and code >= 1000:
                good = code == 1000 or argument.itemsize == code - 1000
                arrays[i] = argument
                values.append(None)
            elif type(argument) is np.uint64 and argument == 0 and code >= 1000:
                good = True  # a null pointer: whoever follows it, fails
                values.append(ctypes.c_void_p(0))
            else:
                kind = {np.int32: 4, np.int64: 8, np.uint32: 4, np.uint64: 8, np.float32: 104}
                good = kind.get(type(argument)) == code
                values.append(ctypes.create_string_buffer(argument.tobytes(), 8) if good else None)
            if not good:
                raise KernelError(f"{self.name}: argument {i} is {type(argument)} "
                                  f"{getattr(argument, 'dtype', '')}, which its parameter is not")
        return values, arrays

    def locate(self, offset):
        """Name the kernel's line that the instruction before `offset` belongs to."""
        if not offset:
            return ""
        found = subprocess.run(["addr2line", "-i", "-e", str(self.path), hex(offset - 1)],
                               capture_output=True, text=True, check=True).stdout
        lines = re.findall(r"kernel:(\d+)", found)
        if not lines:
            return ""
        return f" (line {lines[0]}: {self.source.splitlines()[int(lines[0]) - 1].strip()})"


UNWRITTEN, READY, WRITTEN = 1, 3, 4  # the states of a byte, as in runtime.cpp
made_by_empty = {}  # id of the memory that `empty` took: the state of each of its bytes


def as_bytes(array):
    """Return a view of `array` as bytes, with one axis more."""
    return array[..., None].view(np.uint8)


def empty(shape, dtype=float):
    """Return what numpy.empty does, full of NaN, and remember that nobody wrote it.

    It begins where a segment does, as arrays on a GPU do, so its traffic is no matter of luck.
    """
    size = np.prod(shape, dtype=int) * np.dtype(dtype).itemsize
    memory = np.full(size + 64, 0xFF, np.uint8)
    made_by_empty[id(memory)] = np.full(memory.size, UNWRITTEN, np.uint8)
    weakref.finalize(memory, made_by_empty.pop, id(memory), None)
    return np.ndarray(shape, dtype, memory, -memory.ctypes.data % 64)


def states_of(array):
    """Return the state of each byte of an array, a view where `empty` made it; else READY."""
    root = array
    while isinstance(root.base, np.ndarray):
        root = root.base
    if id(root) not in made_by_empty:
        return np.uint8(READY)
    return byte_view(made_by_empty[id(root)][array.ctypes.data - root.ctypes.data:], array)


def byte_view(memory, array):
    """Return those bytes of `memory` that `array` would cover if it began there."""
    return np.lib.stride_tricks.as_strided(
        memory, (*array.shape, array.itemsize), (*array.strides, 1))


class Memory:
    """A GPU's global memory, as far as one launch goes: a copy of each array between redzones."""

    def __init__(self, arrays):
        sizes = [(np.lib.array_utils.byte_bounds(array) if array.size else (0, 0), array)
                 for array in arrays]
        self.size = sum(high - low + REDZONE + 64 for (low, high), _ in sizes) + REDZONE
        self.bytes, self.state = (np.zeros(self.size, np.uint8) for _ in range(2))
        self.bytes[...] = 0xFF
        self.parts, self.addresses, end = [], [], 0
        for (low, high), array in sizes:
            if min(array.strides, default=0) < 0:
                raise KernelError("the emulator takes no negative strides")
            begin = end + REDZONE  # and then as aligned as the array itself, up to 64 bytes
            begin += (array.ctypes.data - self.bytes.ctypes.data - begin) % 64
            end = begin + high - low
            data, state = (byte_view(memory[begin:], array) for memory in (self.bytes, self.state))
            data[...] = as_bytes(array)
            # The host may have written an `empty` array, too.
            state[...] = np.where(data != 0xFF, READY, states_of(array))
            self.parts.append((array, data, state))
            self.addresses.append(self.bytes.ctypes.data + begin)

    def copy_back(self):
        """Copy what the kernel wrote to the arrays it was given."""
        for array, data, state in self.parts:
            written = state == WRITTEN
            if not written.any():
                continue
            if any(other is not array and np.may_share_memory(array, other)
                   for other, _, _ in self.parts):
                raise KernelError("the emulator writes no array that overlaps another argument")
            as_bytes(array)[written] = data[written]
            states = states_of(array)
            if states.ndim:
                states[written] = READY


addresses = {}  # that a launcher has asked for, and the arrays that begin there


def address(array):
    """Return where an array begins, and remember whose address it is."""
    addresses[array.ctypes.data] = array
    return array.ctypes.data


# cuBLAS's numbers, other than each other so that they cannot be mistaken.
CUBLAS = types.SimpleNamespace(CUBLAS_OP_N=0, CUBLAS_OP_T=1, CUBLAS_COMPUTE_32F=68,
                               CUBLAS_GEMM_DEFAULT=-1)
RUNTIME = types.SimpleNamespace(CUDA_R_32F=0, CUDA_R_16F=2, CUDA_R_16BF=14)
CUDA_DTYPES = {0: np.dtype(np.float32), 2: np.dtype(np.float16), 14: np.dtype(ml_dtypes.bfloat16)}


def matrix_by_columns(start, rows, columns, leading, cuda_type, name):
    """Return the array that begins at an address, and where in it the matrix's elements lie.

    Element (i, j) is the one i + j * leading from the start. KernelError if one is not the array's.
    """
    dtype = CUDA_DTYPES[cuda_type]
    array = addresses.get(start)
    if array is None or array.dtype != dtype:
        raise KernelError(f"gemmEx: {name} is no array of {dtype}: {getattr(array, 'dtype', None)}")
    if leading < max(1, rows):
        raise KernelError(f"gemmEx: {name} has {rows} rows, but a leading dimension of {leading}")
    wanted = np.arange(rows)[:, None] + np.arange(columns) * leading
    own = sum(np.ogrid[tuple(map(slice, array.shape))][axis] * (stride // array.itemsize)
              for axis, stride in enumerate(array.strides))
    own = np.broadcast_to(own, array.shape).reshape(-1)
    if not np.isin(wanted, own).all():
        raise KernelError(f"gemmEx: {name} of [{rows}, {columns}], {leading} apart, leaves its "
                          f"array, of shape {array.shape}")
    return array, np.lib.stride_tricks.as_strided(
        array, (rows, columns), (array.itemsize, leading * array.itemsize))


def gemm_ex(handle, op_a, op_b, m, n, k, alpha, a, a_type, lda, b, b_type, ldb, beta, c, c_type,
            ldc, compute, algorithm):
    """What NVIDIA says of cublasGemmEx: C = alpha op(A) op(B) + beta C, matrices by columns.

    op(A) is [m, k], op(B) [k, n], C [m, n]; with CUBLAS_OP_N, op(A) is A, with CUBLAS_OP_T its
    transpose. alpha and beta lie on the host, in float32, as `compute` is.
    https://docs.nvidia.com/cuda/cublas/#cublasgemmex
    """
    supported = {(2, 2, 0), (14, 14, 0), (2, 2, 2), (14, 14, 14), (0, 0, 0)}
    if (handle, compute, algorithm) != ("handle", 68, -1) or (
            a_type, b_type, c_type) not in supported:
        raise KernelError(f"gemmEx: types {a_type, b_type, c_type}, compute {compute}")
    factors = [addresses[pointer].reshape(-1)[0] for pointer in (alpha, beta)]
    if any(factor.dtype != np.float32 for factor in factors):
        raise KernelError("gemmEx: alpha and beta must be float32")
    operands = []
    for name, op, start, dtype, leading, shape in (("A", op_a, a, a_type, lda, (m, k)),
                                                   ("B", op_b, b, b_type, ldb, (k, n))):
        _, matrix = matrix_by_columns(start, *shape[:: -1 if op else 1], leading, dtype, name)
        operands.append((matrix.T if op else matrix).astype(np.float32))
    array, result = matrix_by_columns(c, m, n, ldc, c_type, "C")
    product = factors[0] * (operands[0] @ operands[1])
    result[...] = product if factors[1] == 0 else product + factors[1] * result
    states = states_of(array)
    if states.ndim:
        states[...] = READY


class ArrayModule(types.ModuleType):
    """NumPy, but for `empty` and the product of cuBLAS."""

    def __getattr__(self, name):
        return getattr(np, name)


array_module = ArrayModule("numpy")
array_module.empty = empty
array_module.cuda = types.SimpleNamespace(
    runtime=RUNTIME, cublas=CUBLAS, device=types.SimpleNamespace(
        get_cublas_handle=lambda: "handle"))
CUBLAS.gemmEx = gemm_ex


@contextlib.contextmanager
def emulate(capability=90, multiprocessors=4, reverse=False, edit=None, traffic=None):
    """Let the launchers of `kernels_cuda` take NumPy arrays, and run their kernels on the CPU.

    Args:
        capability: int, the compute capability that the launchers see, 90 for sm_90.
        multiprocessors: int, how many they see.
        reverse: bool, whether threads and blocks run from the last to the first. A right kernel
            gives the same bits.
        edit: function from a kernel's source to another, to see what the checks find; or None.
        traffic: list that gets each launch's `Kernel.traffic`, or None.

    Yields:
        list of the launches: each a tuple of the instance's name, the grid and the block.
    """
    launches = []

    def load_kernel(source, name_expression):
        source = edit(source) if edit else source
        kernel = Kernel(source, name_expression, reverse, count=traffic is not None)

        def launch(grid, block, arguments, shared_mem=0):
            launches.append((name_expression, grid, block))
            kernel(grid, block, arguments, shared_mem)
            if traffic is not None:
                traffic.append(kernel.traffic)
        return launch

    replaced = {"load_kernel": load_kernel, "array_module": array_module, "address": address,
                "gpu_limits": lambda: (capability, multiprocessors, MOST_SHARED_MEMORY)}
    saved = {name: getattr(kernels_cuda, name) for name in replaced}
    vars(kernels_cuda).update(replaced)
    try:
        yield launches
    finally:
        vars(kernels_cuda).update(saved)
        addresses.clear()
