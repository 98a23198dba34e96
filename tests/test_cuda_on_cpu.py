"""The emulator of tests/cuda_on_cpu: it computes what CUDA defines, and finds what CUDA forbids."""

import signal
import threading
import time

import cuda_on_cpu
import ml_dtypes
import numpy as np
import pytest

import kernels_cuda

DTYPE = {"__half": np.float16, "__nv_bfloat16": ml_dtypes.bfloat16}


def kernel(code, parameters="float* x", reverse=False):
    """Compiles a kernel of these statements, in which `t` is the thread."""
    return cuda_on_cpu.Kernel(
        f"#include <cuda_fp16.h>\n__global__ void kernel({parameters}) {{\n"
        f"const int t = threadIdx.x;\n{code}\n}}", "kernel", reverse)


def run(code, *arguments, parameters="float* x", blocks=1, threads=32, shared_mem=0):
    """Runs the statements twice, first and last thread first: the arrays end up with equal bits."""
    before = [a.copy() if isinstance(a, np.ndarray) else a for a in arguments]
    for reverse, values in ((True, before), (False, arguments)):
        kernel(code, parameters, reverse)((blocks,), (threads,), values, shared_mem)
    for one, other in zip(before, arguments, strict=True):
        assert one.tobytes() == other.tobytes()


def fails(message, code, *arguments, parameters="float* x", blocks=1, threads=32, shared_mem=0):
    """Runs the statements in both orders: each time the emulator objects."""
    for reverse in (False, True):
        with pytest.raises(cuda_on_cpu.KernelError, match=message):
            kernel(code, parameters, reverse)(
                (blocks,), (threads,), arguments or (zeros(64),), shared_mem)


# One reads before the other writes, or the other way round, or in the midst of a copy.
NO_BARRIER = "data race|nobody wrote|cp.async still writes"


def zeros(count, dtype="float32"):
    return np.zeros(count, dtype)


def normal(*shape, dtype="float32", seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


# Numbers ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, to_float, from_float", [
    ("__half", "__half2float", "__float2half_rn"),
    ("__nv_bfloat16", "__bfloat162float", "__float2bfloat16_rn")])
def test_16_bit_floats(name, to_float, from_float):
    """All 65,536 values convert as in NumPy; so do ties, subnormals and overflows back."""
    dtype = DTYPE[name]
    every = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    wide = zeros(1 << 16)
    code = f"const int i = 256 * blockIdx.x + t; y[i] = {to_float}(x[i]);"
    run(code, every, wide, parameters=f"const {name}* x, float* y", blocks=256, threads=256)
    np.testing.assert_array_equal(wide, every.astype("float32"))

    finite = wide[np.isfinite(wide)]
    halfway = (finite[:-1].astype("float64") + finite[1:]) / 2  # a tie in 16 bits
    with np.errstate(over="ignore"):
        x = np.concatenate([halfway.astype("float32"), np.nextafter(finite, np.float32(np.inf)),
                            normal(999) * np.float32(1e-7), normal(999) * np.float32(1e5),
                            np.float32([0, -0.0, np.inf, -np.inf, 65519.9, 65520, 3.4e38, 1e-45])])
        expected = x.astype(dtype)
    y = zeros(x.size, dtype)
    run(f"const int i = 256 * blockIdx.x + t; if (i < n) y[i] = {from_float}(x[i]);", x, y,
        np.int32(x.size), parameters=f"const float* x, {name}* y, int n",
        blocks=-(-x.size // 256), threads=256)
    np.testing.assert_array_equal(y.view("uint16"), expected.view("uint16"))


def test_exp2():
    """exp2_approx is 2^x, and flushes subnormal results to zero."""
    x, y = np.linspace(-140, 120, 1024, dtype="float32"), zeros(1024)
    run("y[t] = exp2_approx(x[t]);", x, y, parameters="const float* x, float* y", threads=1024)
    normal_range = x >= -126
    np.testing.assert_allclose(y[normal_range], np.exp2(x[normal_range].astype("f8")), rtol=2e-7)
    assert not y[~normal_range].any()


def test_vectors():
    """Vector types move their bytes whole."""
    x, y = normal(128), zeros(128)
    run("reinterpret_cast<float4*>(y)[t] = reinterpret_cast<const float4*>(x)[t];", x, y,
        parameters="const float* x, float* y")
    np.testing.assert_array_equal(x, y)
    run("uint4 v = reinterpret_cast<const uint4*>(x)[t]; v.w = 0;\n"
        "reinterpret_cast<uint2*>(y)[2 * t] = make_uint2(v.x, v.y);\n"
        "reinterpret_cast<uint2*>(y)[2 * t + 1] = make_uint2(v.z, v.w);", x, y,
        parameters="const float* x, float* y")
    np.testing.assert_array_equal(x * (np.arange(128) % 4 != 3), y)


# The matrix instructions --------------------------------------------------------------------------

@pytest.mark.parametrize("name", DTYPE)
def test_mma(name):
    """mma.m16n8k16 is D + A B, with every element in the register that the PTX manual names."""
    a, b = normal(16, 16, dtype=DTYPE[name]), normal(16, 8, dtype=DTYPE[name], seed=1)
    d = normal(16, 8, seed=2)
    expected = d + a.astype("f8") @ b.astype("f8")
    # The manual's formulas, by element: groupID = lane >> 2, threadID_in_group = lane % 4.
    code = """uint32_t a[4], b[2]; float d[4];
        const int group = t >> 2, member = t % 4;
        for (int i = 0; i < 8; i += 2) {
            const int row = (i < 2 || (i >= 4 && i < 6)) ? group : group + 8;
            const int col = member * 2 + (i & 1) + (i >= 4 ? 8 : 0);
            a[i / 2] = A[16 * row + col] | static_cast<uint32_t>(A[16 * row + col + 1]) << 16;
        }
        for (int i = 0; i < 4; i += 2) {
            const int row = member * 2 + (i & 1) + (i >= 2 ? 8 : 0);
            b[i / 2] = B[8 * row + group] | static_cast<uint32_t>(B[8 * (row + 1) + group]) << 16;
        }
        for (int i = 0; i < 4; i++)
            d[i] = D[8 * (i < 2 ? group : group + 8) + member * 2 + (i & 1)];
        mma_m16n8k16<TYPE>(d, a, b);
        for (int i = 0; i < 4; i++)
            D[8 * (i < 2 ? group : group + 8) + member * 2 + (i & 1)] = d[i];"""
    run(code.replace("TYPE", name), a.view("uint16"), b.view("uint16"), d,
        parameters="const uint16_t* A, const uint16_t* B, float* D")
    np.testing.assert_allclose(d, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(count, transposed):
    """Register i of lane l holds row l / 4, columns 2 (l % 4) and one more, of matrix i."""
    matrices = np.random.default_rng(0).permutation(64 * count).astype("uint16")
    out = zeros(32 * count, "uint32")
    # Rows lie in shared memory in another order than the lanes name them: row j of i at 8 j + i.
    run(f"""__shared__ __align__(16) uint16_t rows[{64 * count}];
        for (int i = t; i < {64 * count}; i += 32)
            rows[(i / 8 % 8 * {count} + i / 64) * 8 + i % 8] = x[i];
        __syncwarp();
        uint32_t r[{count}];
        const int l = t % {8 * count};
        ldmatrix_x{count}{"_trans" * transposed}(r, rows + (l % 8 * {count} + l / 8) * 8);
        for (int i = 0; i < {count}; i++) y[32 * i + t] = r[i];""",
        matrices, out, parameters="const uint16_t* x, uint32_t* y")
    expected = matrices.reshape(count, 8, 8)
    if transposed:
        expected = expected.transpose(0, 2, 1)
    np.testing.assert_array_equal(out.view("uint16").reshape(count, 8, 8), expected)


MATMUL = """__shared__ __align__(16) __half a[16][16], b[16][8];
    for (int i = t; i < 256; i += 32) a[i / 16][i % 16] = A[i];
    for (int i = t; i < 128; i += 32) b[i / 8][i % 8] = B[i];
    __syncwarp();
    uint32_t left[4], right[2];
    float d[4] = {};
    ldmatrix_x4(left, &a[t % 16][t / 16 * 8]);
    ldmatrix_x2_trans(right, b[t % 16]);
    mma_m16n8k16<__half>(d, left, right);
    for (int i = 0; i < 4; i++) D[8 * (t / 4 + i / 2 * 8) + t % 4 * 2 + i % 2] = d[i];"""
MATMUL_PARAMETERS = "const __half* A, const __half* B, float* D"


def test_matrix_product():
    """Through ldmatrix and mma, a whole product by way of shared memory."""
    a, b, d = normal(16, 16, dtype="float16"), normal(16, 8, dtype="float16", seed=1), zeros(128)
    run(MATMUL, a, b, d, parameters=MATMUL_PARAMETERS)
    np.testing.assert_allclose(d.reshape(16, 8), a.astype("f8") @ b.astype("f8"), atol=1e-5)
    for message, old, new in [
            ("misaligned", "&a[t % 16][t / 16 * 8]", "&a[t % 16][t / 16 * 8 + 1]"),
            (NO_BARRIER, "__syncwarp();", ""),
            ("deadlock", "mma_m16n8k16<__half>(d, left, right);",
             "if (t < 9) mma_m16n8k16<__half>(d, left, right);"
             " else ldmatrix_x2(right, b[t % 16]);"),
            ("not in shared memory", "b[t % 16])", "B)")]:
        assert MATMUL.count(old) == 1
        fails(message, MATMUL.replace(old, new), a, b, d, parameters=MATMUL_PARAMETERS)


# cp.async -----------------------------------------------------------------------------------------

COPY = """extern __shared__ __align__(16) unsigned char bytes[];
    float* a = reinterpret_cast<float*>(bytes);
    cp_async_16(a + 4 * t, x + 4 * t, t % 2 == 0);
    cp_async_commit();
    cp_async_16(a + 128 + 4 * t, x + 128 + 4 * t, true);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    y[t] = a[127 - t];
    cp_async_wait<0>();
    __syncthreads();
    y[32 + t] = a[128 + 127 - t];"""
COPY_PARAMETERS = "const float* x, float* y"


def test_cp_async():
    """Each wait gives the groups it covers; what is not valid becomes zero."""
    x, y = normal(256), zeros(64)
    run(COPY, x, y, parameters=COPY_PARAMETERS, shared_mem=1024)
    first = x[:128] * (np.arange(128) // 4 % 2 == 0)
    np.testing.assert_array_equal(y, [*first[:95:-1], *x[128:][:95:-1]])


@pytest.mark.parametrize("message, old, new", [
    ("cp.async still writes", "cp_async_wait<1>();\n", ""),
    ("cp.async still writes", "cp_async_wait<1>", "cp_async_wait<2>"),
    ("cp.async still writes", "cp_async_wait<0>();\n", ""),
    ("cp.async still writes", "cp_async_wait<0>", "cp_async_wait<1>"),
    ("cp.async still writes", "    cp_async_commit();\n    cp_async_wait<1>", "cp_async_wait<1>"),
    (NO_BARRIER, "cp_async_wait<0>();\n    __syncthreads();", "cp_async_wait<0>();"),
    (NO_BARRIER, "cp_async_wait<1>();\n    __syncthreads();", "cp_async_wait<1>();"),
    (NO_BARRIER, "cp_async_wait<0>();", "cp_async_16(a + 4 * t, x, true); cp_async_wait<0>();"),
    ("destination: misaligned", "a + 4 * t, x", "a + 4 * t + 2, x"),
    ("source: misaligned", "x + 4 * t, t", "x + 4 * t + 1, t"),
    ("not in shared memory", "cp_async_16(a + 4 * t, x", "cp_async_16(y + 4 * t, x"),
    ("reads 16 bytes out of bounds of global", "x + 128 + 4 * t", "x + 132 + 4 * t"),
    ("writes 16 bytes out of bounds of shared", "a + 128 + 4 * t", "a + 132 + 4 * t")])
def test_cp_async_mistakes(message, old, new):
    assert COPY.count(old) == 1
    fails(message, COPY.replace(old, new), normal(256), zeros(64), parameters=COPY_PARAMETERS,
          shared_mem=1024)


# Warps and barriers -------------------------------------------------------------------------------

@pytest.mark.parametrize("width", [2, 8, 32])
def test_shuffles(width):
    """The four shuffles give each lane the value of the lane that CUDA defines."""
    lanes, code, expected = np.arange(32), "", []
    first = lanes // width * width
    for name, argument, source in (("shfl", 5, first + 5 % width), ("shfl_xor", 3, lanes ^ 3),
                                   ("shfl_down", 3, lanes + 3), ("shfl_up", 3, lanes - 3)):
        code += f"*x = __{name}_sync(0xffffffff, v, {argument}, {width}); x += 32;\n"
        # (an exchange may reach back into an earlier segment, says the manual)
        inside = ((source >= first) | (name == "shfl_xor")) & (source < first + width)
        expected.append(np.where(inside, source, lanes))
    x = zeros(128)
    run(f"x += t; const float v = t;\n{code}", x)
    np.testing.assert_array_equal(x.reshape(4, 32), expected)


def test_votes():
    """Votes see the lanes of the mask; parts of a warp may go separate ways."""
    x = zeros(128, "uint32")
    run("""x += t;
        x[0] = __ballot_sync(0xffffffff, t % 3 == 0);
        if (t < 8) x[32] = __ballot_sync(0xff, t % 2);
        else x[32] = __any_sync(0xffffff00, t == 8) + 2 * __all_sync(0xffffff00, t > 7);
        x[64] = __any_sync(0xffffffff, t > 40);
        x[96] = __all_sync(0xffffffff, t > 0);""", x, parameters="uint32_t* x")
    thirds = sum(1 << i for i in range(0, 32, 3))
    np.testing.assert_array_equal(
        x.reshape(4, 32), [[thirds] * 32, [0xAA] * 8 + [3] * 24, [0] * 32, [0] * 32])


@pytest.mark.parametrize("message, code", [
    ("deadlock.*a shuffle", "if (t != 7) x[t] = __shfl_xor_sync(0xffffffff, x[t], 1);\n"
     "else __syncthreads();"),
    ("lanes that exited|deadlock", "if (t == 7) return; x[t] = __shfl_xor_sync(~0u, x[t], 1);"),
    ("reads lane ., which is not in mask", "if (t < 8) x[t] = __shfl_down_sync(0xff, x[t], 2);"),
    ("not in its own mask", "x[t] = __shfl_xor_sync(0xff, x[t], 1);"),
    ("deadlock", "if (t < 16) __syncwarp(); else x[t] = __shfl_xor_sync(~0u, x[t], 1);")])
def test_warp_mistakes(message, code):
    fails(message, code)


@pytest.mark.parametrize("message, code", [
    ("exit", "if (t < 32) __syncthreads();"),
    ("exit", "if (t % 2) return; __syncthreads();"),
    ("while .* threads wait at another",
     "if (t < 32)\n __syncthreads();\nelse\n __syncthreads();"),
    ("exit|deadlock", "for (int i = 0; i <= t / 32; i++) __syncthreads();")])
def test_barrier_mistakes(message, code):
    fails(message, code, threads=64)


REVERSE = """__shared__ float a[64];
    a[t] = x[t];
    __syncthreads();
    x[t] = a[63 - t];
    __syncthreads();
    a[t ^ 9] = x[t] + 1;
    __syncthreads();
    x[t] = a[t ^ 35];"""


def test_barriers_order_shared_memory():
    """Right with all barriers; a race with any of them dropped, or replaced by a warp's."""
    x = np.arange(64, dtype="float32")
    run(REVERSE, x, threads=64)
    np.testing.assert_array_equal(x, 64 - (np.arange(64) ^ 42))
    parts = REVERSE.split("__syncthreads();")
    for drop in range(3):
        for instead in (";", "__syncwarp();"):
            joints = [instead if i == drop else "__syncthreads();" for i in range(3)] + [""]
            fails(NO_BARRIER, "".join(sum(zip(parts, joints, strict=True), ())), x, threads=64)


def test_warps_order_their_own_memory():
    """Inside of one warp __syncwarp suffices, and nothing less; a part of a warp orders nothing."""
    code = """__shared__ float a[64];
        a[t] = x[t];
        __syncwarp();
        x[t] = a[t ^ 5];"""
    x = np.arange(64, dtype="float32")
    run(code, x, threads=64)
    np.testing.assert_array_equal(x, np.arange(64) ^ 5)
    halves = "__syncwarp(t % 32 < 16 ? 0xffff : ~0xffff);"
    for instead in ("", "__shfl_xor_sync(~0u, 0, 1);", halves):
        fails(NO_BARRIER, code.replace("__syncwarp();", instead).replace("^ 5", "^ 16"), x,
              threads=64)


def test_read_and_write_without_a_winner():
    """Several writers of one value are a race, too; several readers are none."""
    fails("data race: writes shared", "__shared__ float a; a = 1; __syncthreads(); x[t] = a;")
    run("__shared__ float a; if (t == 0) a = 1;\n__syncwarp(); x[t] = a;", zeros(32))


def test_races_in_global_memory():
    """No two threads write one element; what a block reads no other block writes."""
    fails("data race: writes global", "x[t / 2] = t;")
    fails("another block", "x[t] = t;", blocks=2)
    fails("another block (read|wrote)", "if (blockIdx.x) x[t] = t; else x[32 + t] = x[t];",
          blocks=2)
    run("x[t] = t; __syncthreads(); x[32 + t] = x[31 - t];", zeros(64))


# Memory -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("message, code", [
    ("writes 4 bytes out of bounds of global", "x[t + 33] = 0;"),
    ("reads 4 bytes out of bounds of global", "if (t == 0) x[t] = x[t - 1];"),
    ("reads 4 bytes out of bounds of global", "if (x[t + 1000] > 0) x[t] = 0;"),
    ("no memory of the kernel", "x[t + (1ll << 40)] = 0;"),
    ("no memory of the kernel", "x = nullptr; x[t] = 0;"),
    ("misaligned", "float4 v = *reinterpret_cast<float4*>(x + t % 4); x[t] = v.x + v.y;"),
    ("index out of bounds", "__shared__ float a[32]; a[t + 1] = t; x[t] = 0;"),
    ("index out of bounds", "float a[8] = {}; a[t % 9] = 1; x[t] = a[t % 8];"),
    ("reads shared memory that nobody wrote", "__shared__ float a[33]; a[t] = t;\n"
     "__syncthreads(); x[t] = a[t + 1];"),
    ("reads shared memory that nobody wrote", "extern __shared__ float b[]; x[t] = b[t];"),
    ("out of bounds of shared", "extern __shared__ float b[]; b[t + 1] = t;"),
    ("no memory of the kernel|of shared", "extern __shared__ float b[]; b[t - 1] = t;"),
    ("a shift by more", "x[t] = 1 << (t + 1);"),
    ("division by zero", "x[t] = 7 / t;"),
    ("integer overflow", "x[t] = t * 0x7fffffff;")])
def test_memory_mistakes(message, code):
    """What lies outside, what nobody wrote and what is not defined is found at its line."""
    fails(rf"({message}).*\(line \d+", code, zeros(32), shared_mem=128 if "extern" in code else 0)


def test_gaps_of_a_view():
    """A view's gaps belong to somebody else; its elements are found through its strides."""
    fused = normal(4, 3, 8)
    middle, out = fused[:, 1], zeros(32)
    parameters = "const float* x, float* y, int stride"
    gather = kernel("y[t] = x[t / 8 * stride + t % 8];", parameters)
    gather((1,), (32,), (middle, out, np.int32(24)))
    np.testing.assert_array_equal(out.reshape(4, 8), middle)
    with pytest.raises(cuda_on_cpu.KernelError, match="reads 4 bytes out of bounds of global"):
        gather((1,), (32,), (middle, out, np.int32(8)))
    before = fused.copy()
    scatter = kernel("y[t / 8 * stride + t % 8] = x[t];", parameters)
    scatter((1,), (32,), (out + 1, middle, np.int32(24)))
    np.testing.assert_array_equal(fused[:, 1], before[:, 1] + 1)
    np.testing.assert_array_equal(fused[:, ::2], before[:, ::2])


def test_results_of_empty():
    """Of what `empty` made a kernel may read only what it, or a kernel before it, wrote."""
    half = kernel("if (t < n) x[t] = t;", "float* x, int n")
    copy = kernel("y[t] = x[t];", "const float* x, float* y")
    x = cuda_on_cpu.empty(32, np.float32)
    assert not any(cuda_on_cpu.empty(n, np.float16).ctypes.data % 32 for n in range(40))
    assert np.isnan(x).all()
    half((1,), (32,), (x, np.int32(16)))
    assert np.isnan(x).sum() == 16
    with pytest.raises(cuda_on_cpu.KernelError, match="nobody wrote"):
        copy((1,), (32,), (x, zeros(32)))
    y = zeros(16)
    copy((1,), (16,), (x[:16], y))
    half((1,), (32,), (x, np.int32(32)))
    copy((1,), (16,), (x[16:], y))
    np.testing.assert_array_equal(y, np.arange(16, 32))


def test_every_block_begins_with_garbage():
    """A block sees nothing of the block before it in the same shared memory."""
    fails("nobody wrote", "__shared__ float a[32]; if (blockIdx.x == 0) a[t] = 1;\n"
          "x[32 * blockIdx.x + t] = a[t];", blocks=2)


def test_registers_begin_with_garbage():
    """An element of a local array that nobody set is not zero by chance."""
    x = zeros(32)
    run("float v[2]; v[t % 2] = 1; x[t] = v[t / 2 % 2];", x)
    set_before = np.arange(32) % 2 == np.arange(32) // 2 % 2
    assert (x[set_before] == 1).all() and (np.abs(x[~set_before]) > 1e30).all()


def test_crashes_become_exceptions():
    """A stack overflow ends the kernel, not the tests."""
    deep = "__device__ float deep(int n) { float a[999]; a[n % 9] = n; " \
           "return n < 0 ? 0 : deep(n + 1) + a[n % 8]; }\n"
    with pytest.raises(cuda_on_cpu.KernelError, match="crashes"):
        cuda_on_cpu.Kernel(deep + "__global__ void kernel(float* x) { *x = deep(1); }", "kernel")(
            (1,), (32,), (zeros(1),))
    run("x[t] = 1;", zeros(32))


def launch_endless(code, seconds=60):
    cuda_on_cpu.Kernel(f"__global__ void kernel(float* x) {{ int t = threadIdx.x; {code} }}",
                       "kernel", count=True, seconds=seconds)((1,), (32,), (zeros(32),))


@pytest.mark.parametrize("message, code, seconds", [
    ("still runs after 1 seconds", "volatile int i = 1; while (i) {}", 1),
    ("still runs after 1 seconds", "while (true) __syncthreads();", 1),
    ("more than 4194304 segments", "while (x[t] < 1) {}", 30)])  # counting them takes memory
def test_what_never_ends(message, code, seconds):
    """Such a kernel is stopped, and the next one runs."""
    with pytest.raises(cuda_on_cpu.KernelError, match=message):
        launch_endless(code, seconds)
    run("x[t] = 1;", zeros(32))


@pytest.mark.parametrize("thread", ["this", "another"])
@pytest.mark.parametrize("code", ["volatile int i = 1; while (i) {}", "while (x[t] < 1) {}"])
def test_ctrl_c(code, thread):
    """It stops a kernel at once, whichever thread the signal reaches; then it is Python's again."""
    handler = signal.getsignal(signal.SIGINT)
    launch_endless("")  # compiles the emulator
    with pytest.raises(cuda_on_cpu.KernelError):
        launch_endless(code, seconds=1)  # compiles the kernel
    me = threading.get_ident()
    timer = threading.Timer(0.3, lambda: signal.pthread_kill(
        me if thread == "this" else threading.get_ident(), signal.SIGINT))
    timer.start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        launch_endless(code)
    assert time.monotonic() - began < 10  # not a minute
    timer.join()
    assert signal.getsignal(signal.SIGINT) is handler
    run("x[t] = 1;", zeros(32))


# Launches -----------------------------------------------------------------------------------------

def test_indices():
    """Every thread of every block runs once, with CUDA's numbering."""
    x = zeros(5 * 3 * 2 * 4 * 3 * 2, "int32")
    code = """const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
        const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
        x[24 * block + thread] = 24 * block + thread + t - threadIdx.x;"""
    kernel(code, "int* x")((5, 3, 2), (4, 3, 2), (x,))
    np.testing.assert_array_equal(x, np.arange(x.size))


@pytest.mark.parametrize("arguments", [
    (zeros(32),), (zeros(32), np.int64(1)), (zeros(32), np.float32(1)), (zeros(32), 1),
    (zeros(32, "float16"), np.int32(1)), (np.int64(0), np.int32(1)),
    (zeros(32), np.int32(1), np.int32(1))])
def test_arguments_match_parameters(arguments):
    with pytest.raises(cuda_on_cpu.KernelError, match="argument"):
        kernel("x[t] = n;", "float* x, int n")((1,), (32,), arguments)


def test_null_pointers():
    """What need not be given is 0 for a pointer: a kernel can ask, and must not follow it."""
    x = zeros(32)
    run("x[t] = y ? 1 : 2;", x, np.uint64(0), parameters="float* x, float* y")
    assert (x == 2).all()
    fails("no memory of the kernel", "x[t] = y[t];", x, np.uint64(0),
          parameters="float* x, float* y")
    fails("argument 1", "x[t] = 0;", x, np.uint64(8), parameters="float* x, float* y")


@pytest.mark.parametrize("grid, block, shared_mem", [
    ((1,), (1025,), 0), ((1, 65536), (32,), 0), ((0,), (32,), 0), ((1,), (32,), 232_449)])
def test_impossible_launches(grid, block, shared_mem):
    with pytest.raises(cuda_on_cpu.KernelError):
        kernel("extern __shared__ float a[]; x[t] = 1;")(grid, block, (zeros(2000),), shared_mem)


def test_launch_bounds():
    bounded = cuda_on_cpu.Kernel(
        "__global__ void __launch_bounds__(64, 2) kernel(float* x) { *x = 1; }", "kernel")
    with pytest.raises(cuda_on_cpu.KernelError, match="64 is the most"):
        bounded((1,), (96,), (zeros(1),))


@pytest.mark.parametrize("code, message", [
    ("atomicAdd(x, 1.0f);", "the emulator knows no atomicAdd"),
    ('asm("nop;");', "the emulator knows no asm"),
    ("x[t] = nothing_such;", "does not compile: line 4: 'nothing_such' was not declared in this "
     "scope: x\\[t\\] = nothing_such;$"),
    ("int i = t\nx[i] = y;", "does not compile: line 5: expected .,. or .;. before .x.: "
     "x\\[i\\] = y;$"),
    ("float a[8]; memcpy(a, x, 32); x[t] = a[t % 8];", "does not compile"),
    ("float a[blockDim.x]; a[t] = t; x[t] = a[t];", "does not compile: line 4: .*variable length")])
def test_what_does_not_compile(code, message):
    """The message begins with the reason, and names the line of the kernel."""
    with pytest.raises(cuda_on_cpu.KernelError, match=f"^{message}"):
        kernel(code)


@pytest.mark.parametrize("declared", [
    "void kernel(float* x)", "__device__ void kernel(float* x)", "__global__ int kernel(float* x)",
    "__global__ void kernels(float* x)",
    "// __global__ void kernel(float* x)\nvoid kernel(float* x)",
    "__global__ void other(float* x) {}\nvoid kernel(float* x)",
    "/* __global__\nvoid kernel(float* x) */ inline void kernel(float* x)"])
def test_only_global_functions_are_kernels(declared):
    with pytest.raises(cuda_on_cpu.KernelError, match="no kernel: `__global__ void kernel"):
        cuda_on_cpu.Kernel(f"{declared} {{ x[0] = 1; }}", "kernel")
    cuda_on_cpu.Kernel("__global__ static void __launch_bounds__(64)\nkernel (int* x) {}", "kernel")


def test_without_a_compiler(monkeypatch, tmp_path):
    """What is missing, and how to get it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"apt install g\+\+"):
        kernel("x[t] = 12345;")


def test_printf(capsys):
    """A kernel's words appear when it has ended, well or not; what is too much is left out."""
    code = 'if (t < 2) printf("thread %d has %.2f%%\\n", t, x[t]);'
    kernel(code)((1,), (32,), (np.float32([0.5, 12]),))
    assert capsys.readouterr().out == "thread 0 has 0.50%\nthread 1 has 12.00%\n"
    fails("out of bounds", 'printf("%d\\n", t); x[64] = 1;')
    assert capsys.readouterr().out == "0\n31\n"  # first and last thread first
    kernel('for (int i = 0; i < 9999; ++i) printf("0123456789");')((1,), (32,), (zeros(1),))
    assert capsys.readouterr().out == "0123456789" * 6553 + "01234"
    run("x[t] = 1;", zeros(32))
    assert capsys.readouterr().out == ""


def test_emulate_restores():
    """After an error, too, the launchers are as before."""
    names = ("load_kernel", "array_module", "gpu_limits")
    before = [getattr(kernels_cuda, name) for name in names]
    with pytest.raises(ZeroDivisionError), cuda_on_cpu.emulate() as launches:
        x = kernels_cuda.rms_norm(np.ones((2, 8), "float32"), np.ones(8, "float32"), 0.0)
        np.testing.assert_array_equal(x, 1)
        assert [name for name, *_ in launches] == ["rms_norm<float, 4>"]
        raise ZeroDivisionError
    assert before == [getattr(kernels_cuda, name) for name in names]


# What a launch asks of global memory --------------------------------------------------------------

TRAFFIC = """
__global__ void copy(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = x[i];
}
__global__ void copy_vectors(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (4 * i < n) reinterpret_cast<float4*>(y)[i] = reinterpret_cast<const float4*>(x)[i];
}
__global__ void sum_vectors(const float* x, float* y, int n) {
    float4 v = reinterpret_cast<const float4*>(x)[threadIdx.x];
    y[threadIdx.x] = v.x + 2 * v.y + 3 * v.z + 4 * v.w;
}
__global__ void sum_rows(const float* x, float* y, int n) {
    float sum = 0;
    for (int i = 0; i < n; ++i) sum += x[threadIdx.x * n + i];
    y[threadIdx.x] = sum;
}
"""


@pytest.mark.parametrize("name, grid, block, sizes, n, asked, segments", [
    ("copy", 2, 128, (256, 256), 256, 2048, 2048),
    ("copy", 2, 128, (256, 256), 201, 1608, 2 * 832),  # 201 floats touch 26 segments
    ("copy_vectors", 1, 64, (256, 256), 256, 2048, 2048),
    ("sum_vectors", 1, 32, (128, 32), 32, 512 + 128, 512 + 128),
    # Each of 32 loads takes a segment for every thread, eight times what it asks for.
    ("sum_rows", 1, 32, (1024, 32), 32, 4096 + 128, 8 * 4096 + 128),
    # Rows of a segment: a loop's turns are instructions of their own.
    ("sum_rows", 1, 32, (256, 32), 8, 1024 + 128, 8 * 1024 + 128),
])
def test_traffic_is_counted_by_segments_of_a_warp(name, grid, block, sizes, n, asked, segments):
    """By hand: 4 bytes an element, 32 bytes a segment."""
    arrays = []
    for size in sizes:
        memory = np.zeros(4 * size + 64, np.uint8)
        begin = -memory.ctypes.data % 64
        arrays.append(memory[begin : begin + 4 * size].view(np.float32))
    kernel = cuda_on_cpu.Kernel(TRAFFIC, name, count=True)
    for _ in range(2):  # each launch counts from nothing
        kernel((grid,), (block,), (*arrays, np.int32(n)))
        assert kernel.traffic == (asked, segments)
