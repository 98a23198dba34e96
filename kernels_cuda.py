"""Raw CUDA kernels for Phi-3: norms, attention, decoding's products, a training step; launchers.

`rms_norm`, `attention`, `linear`, `silu`, `cross_entropy`, and the derivatives `..._backward`, have
the signatures and the meaning of phi3_ref's, on CuPy arrays in float32, float16 or bfloat16;
`transposed_matmul`, `sum_of_squares` and `adam_step` stand for a line or a few of it. The kernels
stand below as CUDA C++ source, each under a comment that gives its algorithm, its tiling, and what
limits it; they are compiled when they are first used.
`decode_by_graph` makes one launch of a decoding step's many: a CUDA graph. `load_cupy` says what is
missing where CuPy or the GPU is.

Legend, as in phi3_ref: B batch, S query positions, T key positions, H query heads, K key/value
heads, G = H // K, C head_dim, D hidden_dim. The S queries are the last S of the T positions.

A GPU in five terms. A *kernel* is a function run by many *threads*. 32 threads are a *warp*, which
issues one instruction for all of them. A *block* is up to 1024 threads of one multiprocessor that
can wait for each other (`__syncthreads`) and that own some KB of *shared* memory, about as fast as
a cache; registers are faster still and a thread's own. *Global* memory is the large and slow one:
it is read in segments of 32 bytes, so neighbouring threads should read neighbouring bytes, 16 each.

Every sum has a fixed order (no atomics): the same input gives the same bits.

References:

    FlashAttention-2  Dao 2023, https://arxiv.org/abs/2307.08691
    online softmax    Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867
    split keys        Dao et al. 2023 (Flash-Decoding), https://pytorch.org/blog/flash-decoding
    delta's rounding  Qiu and Yao 2025, https://arxiv.org/abs/2510.04212
    PTX instructions  https://docs.nvidia.com/cuda/parallel-thread-execution
"""

import contextlib
import functools
import importlib.metadata
import math

import numpy as np

try:
    import cupy as array_module
except ImportError:  # the launchers say what to install
    array_module = None

# ---- Instructions of the GPU that C++ has no word for --------------------------------------------

# All of the assembly in this file: tests replace this one string by plain C++ and run the kernels
# on the CPU. Below sm_80 there is no cp.async (a plain copy stands in) and no mma of this shape:
# the launchers do not ask for the kernel that uses it.
PRIMITIVES = r"""
// D += A B on the tensor cores: A [16, 16] and B [16, 8] in 16 bits, D [16, 8] in float32, spread
// over the registers of a warp. With g = lane / 4 and t = lane % 4, a lane holds
//     A: a[0] row g, columns 2t and 2t + 1     a[1] row g + 8, the same columns
//        a[2] row g, columns 2t + 8 and + 9    a[3] row g + 8, columns 2t + 8 and + 9
//     B: b[0] rows 2t and 2t + 1, column g     b[1] rows 2t + 8 and 2t + 9, column g
//     D: d[0], d[1] row g, columns 2t, 2t + 1  d[2], d[3] row g + 8, the same columns
template <typename E> __device__ __forceinline__
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#if __CUDA_ARCH__ >= 800
#define MMA(TYPE) asm volatile( \
    "mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 " \
    "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
    : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) \
    : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
#else
#define MMA(TYPE) __trap()
#endif
template <> __device__ __forceinline__ void mma_m16n8k16<__half>(
    float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { MMA("f16"); }
template <> __device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(
    float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { MMA("bf16"); }

// Four 8 x 8 matrices of 16-bit elements, from shared memory to the layout that mma wants. Lane i
// names row i % 8 (16 bytes) of matrix i / 8, and receives in r[m] the elements (lane / 4,
// 2 (lane % 4)) and the one to its right of matrix m; `_trans` transposes each matrix first.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((uint32_t)__cvta_generic_to_shared(shared_row)) : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((uint32_t)__cvta_generic_to_shared(shared_row)) : "memory");
}

// Begin to copy 16 bytes from global to shared memory, past the registers; zeros if not `valid`.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"((uint32_t)__cvta_generic_to_shared(shared)), "l"(global),
                    "r"(valid ? 16 : 0) : "memory");
#else
    *(uint4*)shared = valid ? *(const uint4*)global : make_uint4(0, 0, 0, 0);
#endif
}
// The copies begun since the last commit become one group.
__device__ __forceinline__ void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Wait until at most the N youngest groups of this thread are under way.
template <int N> __device__ __forceinline__ void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory");
#endif
}

// 2^x to about 2 units in the last place, in one instruction.
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
"""

# ---- What the kernels share ----------------------------------------------------------------------

HEADER = r"""
#include <cuda_fp16.h>
#include <cuda_bf16.h>
using uint32_t = unsigned int;  // the run-time compiler has no <cstdint>
""" + PRIMITIVES + r"""
#define UNROLLED _Pragma("unroll")  // a loop of registers must have no loop left at run time

// N elements that one instruction reads or writes; 16 bytes is the most it can.
template <typename E, int N> struct alignas(N * sizeof(E)) Vector { E element[N]; };

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) {  // its 16 bits are float32's first
    return __uint_as_float((unsigned)__bfloat16_as_ushort(x) << 16);  // pairs stay packed till then
}

template <typename E> __device__ __forceinline__ E from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ __half from_float<__half>(float x) {
    return __float2half_rn(x);
}
template <> __device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}

// Sum and maximum over the lanes whose numbers differ only in the bits FROM ... TO / 2 (<1, 8>: 8
// neighbours), which all receive it: in each step, lanes `d` apart exchange what they have.
template <int FROM, int TO> __device__ __forceinline__ float sum_over_lanes(float x) {
    UNROLLED for (int d = FROM; d < TO; d *= 2) x += __shfl_xor_sync(0xffffffff, x, d);
    return x;
}
template <int FROM, int TO> __device__ __forceinline__ float highest_over_lanes(float x) {
    UNROLLED for (int d = FROM; d < TO; d *= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, d));
    return x;
}
"""

ATTENTION_HEADER = HEADER + r"""
// What every attention kernel is given. Strides count elements; the innermost one is 1. `scale` is
// C^-0.5 log2(e), so that exp(score C^-0.5) is exp2(score scale). `mask` is [B, T], or unused.
#define ATTENTION_INPUTS \
    const E* __restrict__ query, const E* __restrict__ key, const E* __restrict__ value, \
    const bool* __restrict__ mask, int has_mask, \
    long long query_b, long long query_s, long long query_h, \
    long long key_b, long long key_t, long long key_k, \
    long long value_b, long long value_t, long long value_k, \
    int S, int T, int H, int K, int C, int window, float scale
// And where it writes: [B, S, H, C], and [B, H, S] or, where nobody asks for it, a null pointer.
#define ATTENTION_OUTPUTS E* __restrict__ output, float* __restrict__ log_sum_exp

// Online softmax. For the keys so far, a query keeps the highest score times `scale`, `peak`; the
// sum `total` of its weights exp2(score scale - peak); and `mixed`, the values times their weights.
// When a new key raises the peak, all old weights are too large by one factor, exp2(new - old), and
// both sums `shrink`. What a query does not see has the score NOTHING, which always weighs 0.
constexpr float NOTHING = -3.4e38f;
struct Rescaling { float shift, shrink; };  // new weights are exp2(score scale - shift)

__device__ __forceinline__ Rescaling raise_peak(float& peak, float highest) {
    const float old = peak;
    peak = fmaxf(old, highest);
    const float shift = peak < -1e30f ? 0.0f : peak;  // before it has seen anything
    return {shift, exp2_approx(old - shift)};
}
__device__ __forceinline__ float weight_of(float score, float scale, float shift) {
    return exp2_approx(fmaf(score, scale, -shift));  // the product is not rounded
}
// log(sum of exp(score C^-0.5)), by which the backward pass finds every probability again:
// exp(score C^-0.5 - it). A query that sees nothing has 0, and probabilities exp(NOTHING - 0) = 0.
constexpr float LN_2 = 0.69314718f;
__device__ __forceinline__ float log_sum_exp_of(float peak, float total) {
    return total == 0.0f ? 0.0f : (peak + log2f(total)) * LN_2;
}
"""

# ---- RMSNorm -------------------------------------------------------------------------------------

RMS_NORM = HEADER + r"""
// y = x / sqrt(mean(x^2) + epsilon) * scale, one block per row.
//
//     x:  | thread 0 | thread 1 | ... | thread n-1 | thread 0 | ...     N elements each
//            item 0     item 0             item 0     item 1
//
// A thread reads ITEMS vectors before it uses the first, so that many reads are under way at once,
// and keeps them in registers until the sum over the row is known. The sum: each thread over its
// elements, each warp by exchanging registers, the block through shared memory.
//
// Per row: x is read once and y written once (`scale` stays in the caches), for 4 D operations:
// about 1 operation per byte in 16 bits, where a GPU could do hundreds. The limit is the memory's
// bandwidth. Only what exceeds the registers of 512 threads (N = 8: D > 16384) is read twice.
template <typename E, int N>
__device__ __forceinline__ float sum_of_squares(Vector<E, N> x) {
    float sum = 0.0f;
    UNROLLED for (int n = 0; n < N; n++) sum += to_float(x.element[n]) * to_float(x.element[n]);
    return sum;
}

template <typename E, int N>
__device__ __forceinline__ Vector<E, N> normalized(Vector<E, N> x, float inverse,
                                                   Vector<E, N> scale) {
    Vector<E, N> y;
    UNROLLED for (int n = 0; n < N; n++)
        y.element[n] = from_float<E>(to_float(x.element[n]) * inverse * to_float(scale.element[n]));
    return y;
}

template <typename E, int N>
__global__ void __launch_bounds__(512) rms_norm(
    const E* __restrict__ x, const E* __restrict__ scale, E* __restrict__ y,
    long long x_row, int D, float epsilon) {
    constexpr int ITEMS = N == 1 ? 16 : 4;
    const auto in = reinterpret_cast<const Vector<E, N>*>(x + blockIdx.x * x_row);
    const auto weight = reinterpret_cast<const Vector<E, N>*>(scale);
    const auto out = reinterpret_cast<Vector<E, N>*>(y + blockIdx.x * (long long)D);
    const int count = D / N, threads = blockDim.x;

    Vector<E, N> held[ITEMS], weights[ITEMS];
    UNROLLED for (int item = 0; item < ITEMS; item++) {
        const int i = threadIdx.x + item * threads;
        if (i < count) held[item] = in[i];
        if (i < count) weights[item] = weight[i];
    }
    float sum = 0.0f;
    UNROLLED for (int item = 0; item < ITEMS; item++)
        if (threadIdx.x + item * threads < count) sum += sum_of_squares(held[item]);
    for (int i = threadIdx.x + ITEMS * threads; i < count; i += threads)
        sum += sum_of_squares(in[i]);

    __shared__ float warp_sum[16];
    sum = sum_over_lanes<1, 32>(sum);
    if (threadIdx.x % 32 == 0) warp_sum[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0.0f;
    for (int warp = 0; warp < threads / 32; warp++) sum += warp_sum[warp];
    const float inverse = 1.0f / sqrtf(sum / D + epsilon);

    UNROLLED for (int item = 0; item < ITEMS; item++) {
        const int i = threadIdx.x + item * threads;
        if (i < count) out[i] = normalized(held[item], inverse, weights[item]);
    }
    for (int i = threadIdx.x + ITEMS * threads; i < count; i += threads)
        out[i] = normalized(in[i], inverse, weight[i]);
}
"""

# ---- RMSNorm, backward ---------------------------------------------------------------------------

RMS_NORM_BACKWARD = HEADER + r"""
// It was y = scale n, where n = x / r and r = sqrt(mean(x^2) + epsilon). Of y', the gradient of y:
//
//     n' = scale y'       x' = (n' - n mean(n' n)) / r       scale' = the sum of y' n over all rows
//
// As in the forward, a row lies in the registers of a block until its sums are known, here of x^2
// and of n' x. But each block takes many rows, one after the other, for the sums down the columns:
//
//                     | thread 0 | thread 1 | ... | thread n-1 | thread 0 | ...   N elements each
//     block 0  row 0  |   y' n   |   y' n   |     |    y' n    |   y' n   |
//              row 1  |    +     |    +     |     |     +      |    +     |   in registers, which
//              row 2  |    +     |    +     |     |     +      |    +     |   stay a thread's own
//         partial[0]  |    =     |    =     |     |     =      |    =     |   written in the end
//     block 1  row 3  |   y' n   |   ...
//              ...
//         partial[1]  |    =     |   ...       a second kernel adds up the partial sums, in order
//
// A row's two sums cross the block together, with one barrier: rows take turns with two places in
// shared memory, and the next barrier stands between a place's last read and its next write.
//
// Per row: x and y' are read once and x' is written once, 3 D elements for 12 D operations: about 2
// operations per byte in 16 bits. The limit is the memory's bandwidth. To these 151 MB of
// [8192, 3072] in 16 bits, 660 blocks (5 of 96 threads on each of 132 multiprocessors) add 8 MB of
// partial sums, written and read; the second kernel finds what was written last in the L2 cache.
// Only what exceeds the registers of 512 threads (N = 8: D > 16384) is read twice, and its partial
// sums are added to where they lie in memory.
//
// Registers are what is short: per element x, y' and a sum in float32, where the forward has x. So
// `scale` is read again at each use, from the caches: no __restrict__ here, for the compiler would
// see that it never changes, keep it, and spill.
template <typename E, int N> __device__ __forceinline__
void add_to_sums(Vector<E, N> gradient, Vector<E, N> x, Vector<E, N> scale,
                 float& squares, float& products) {
    UNROLLED for (int n = 0; n < N; n++) {
        const float wide = to_float(x.element[n]);
        squares += wide * wide;
        products += to_float(gradient.element[n]) * to_float(scale.element[n]) * wide;
    }
}

// Returns x', and adds y' n to the sums. `inverse` is 1 / r, `mean` the row's mean(n' n).
template <typename E, int N> __device__ __forceinline__
Vector<E, N> differentiated(Vector<E, N> gradient, Vector<E, N> x, Vector<E, N> scale,
                            float inverse, float mean, float (&sums)[N]) {
    Vector<E, N> d_x;
    UNROLLED for (int n = 0; n < N; n++) {
        const float d_y = to_float(gradient.element[n]), normed = to_float(x.element[n]) * inverse;
        d_x.element[n] = from_float<E>(
            (d_y * to_float(scale.element[n]) - normed * mean) * inverse);
        sums[n] += d_y * normed;
    }
    return d_x;
}

template <int N> __device__ __forceinline__
void write_sums(float* partial, const float (&sums)[N]) {
    constexpr int M = N < 4 ? N : 4;  // 16 bytes
    UNROLLED for (int n = 0; n < N; n += M) {
        Vector<float, M> part;
        UNROLLED for (int m = 0; m < M; m++) part.element[m] = sums[n + m];
        *reinterpret_cast<Vector<float, M>*>(partial + n) = part;
    }
}

template <typename E, int N>
__global__ void __launch_bounds__(512) rms_norm_backward(
    const E* __restrict__ gradient, const E* __restrict__ x, const E* scale, E* d_x, float* partial,
    long long gradient_row, long long x_row, int rows, int D, float epsilon) {
    constexpr int ITEMS = N == 1 ? 8 : 4;
    const int count = D / N, threads = blockDim.x, warp = threadIdx.x / 32;
    const int first = (long long)blockIdx.x * rows / gridDim.x;  // shares differ by one row at most
    const int end = (blockIdx.x + 1LL) * rows / gridDim.x;
    const auto weight = reinterpret_cast<const Vector<E, N>*>(scale);
    partial += (long long)blockIdx.x * D;
    float sums[ITEMS][N] = {};  // of the columns, as far as they go with the registers
    __shared__ float warp_sums[2][2][16];

    for (int row = first; row < end; row++) {
        const auto in = reinterpret_cast<const Vector<E, N>*>(x + row * x_row);
        const auto d_y = reinterpret_cast<const Vector<E, N>*>(gradient + row * gradient_row);
        const auto out = reinterpret_cast<Vector<E, N>*>(d_x + (long long)row * D);

        Vector<E, N> held[ITEMS], d_held[ITEMS];
        UNROLLED for (int item = 0; item < ITEMS; item++) {
            const int i = threadIdx.x + item * threads;
            if (i < count) held[item] = in[i];
            if (i < count) d_held[item] = d_y[i];
        }
        float squares = 0.0f, products = 0.0f;  // of x^2, of n' x
        UNROLLED for (int item = 0; item < ITEMS; item++) {
            const int i = threadIdx.x + item * threads;
            if (i < count) add_to_sums(d_held[item], held[item], weight[i], squares, products);
        }
        for (int i = threadIdx.x + ITEMS * threads; i < count; i += threads)
            add_to_sums(d_y[i], in[i], weight[i], squares, products);

        float (&turn)[2][16] = warp_sums[row % 2];
        squares = sum_over_lanes<1, 32>(squares);
        products = sum_over_lanes<1, 32>(products);
        if (threadIdx.x % 32 == 0) {
            turn[0][warp] = squares;
            turn[1][warp] = products;
        }
        __syncthreads();
        squares = products = 0.0f;
        for (int w = 0; w < threads / 32; w++) {
            squares += turn[0][w];
            products += turn[1][w];
        }
        const float inverse = 1.0f / sqrtf(squares / D + epsilon), mean = products / D * inverse;

        UNROLLED for (int item = 0; item < ITEMS; item++) {
            const int i = threadIdx.x + item * threads;
            if (i < count)
                out[i] = differentiated(
                    d_held[item], held[item], weight[i], inverse, mean, sums[item]);
        }
        for (int i = threadIdx.x + ITEMS * threads; i < count; i += threads) {
            float in_memory[N] = {};
            if (row > first)
                UNROLLED for (int n = 0; n < N; n++) in_memory[n] = partial[i * N + n];
            out[i] = differentiated(d_y[i], in[i], weight[i], inverse, mean, in_memory);
            write_sums(partial + i * N, in_memory);
        }
    }
    UNROLLED for (int item = 0; item < ITEMS; item++) {
        const int i = threadIdx.x + item * threads;
        if (i < count) write_sums(partial + i * N, sums[item]);
    }
}

// scale', the sum of the `blocks` partial sums: a block has 32 columns, and each of its warps a
// share of the partial sums, 128 bytes at a time; then the first warp adds up what the warps have.
__global__ void __launch_bounds__(512) rms_norm_backward_scale(
    const float* __restrict__ partial, float* __restrict__ d_scale, int blocks, int D) {
    __shared__ float warp_sum[16][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int column = blockIdx.x * 32 + lane, end = blocks * (warp + 1) / warps;
    float sum = 0.0f;
    if (column < D)
        _Pragma("unroll 8")  // so many reads are under way at once
        for (int i = blocks * warp / warps; i < end; i++) sum += partial[(long long)i * D + column];
    warp_sum[warp][lane] = sum;
    __syncthreads();
    if (warp > 0 || column >= D) return;
    sum = 0.0f;
    for (int w = 0; w < warps; w++) sum += warp_sum[w][lane];
    d_scale[column] = sum;
}
"""

# ---- Attention, any head_dim: the simple kernel --------------------------------------------------

ATTENTION_TILED = ATTENTION_HEADER + r"""
// Attention in float32 on the CUDA cores, for any C, any strides and any GPU. One block takes 64
// queries of one head and up to 128 of the output's columns; it walks over the keys in tiles of 64.
//
//                     keys 0..63   64..127   128..191
//     queries  0..63  [ \       ]                        \ : the diagonal; right of it nothing is
//     queries 64..127 [ visited ][ \      ]                  visible, and no tile is visited
//
// Scores and results are matrix products, done the classic way: 256 threads as 16 x 16, thread
// (ty, tx) holds 4 x 4 scores (queries 4 ty + i, keys tx + 16 j) and 4 x 8 results (the same
// queries, columns 4 tx + 64 j ...) in registers; operands pass through shared memory in slices.
// Each value read from shared memory then serves 4 or 8 multiply-adds. A query's 64 scores lie in
// 16 neighbouring lanes, so its maximum and sum take 4 exchanges; see `raise_peak` for the softmax.
//
// 4 C operations per visible (query, key) pair. A key and its value, 2 C elements, are read for 64
// queries: 128 operations per element, more than enough for the memory to keep up. The limit is the
// float32 units. (Columns beyond 128 compute the scores anew: C = 256 costs 1.5 times as much.)
template <typename E>
__global__ void __launch_bounds__(256) attention_tiled(ATTENTION_INPUTS, ATTENTION_OUTPUTS) {
    constexpr int TILE = 64, SLICE = 32, COLUMNS = 128, VALUES = 16;
    using Four = Vector<float, 4>;
    // 4 floats of padding per row: 8 rows then lie in 8 different groups of banks.
    __shared__ __align__(16) float queries[TILE][SLICE + 4], keys[TILE][SLICE + 4];
    __shared__ __align__(16) float weights[TILE][TILE + 4], values[VALUES][COLUMNS];

    const int chunks = (C + COLUMNS - 1) / COLUMNS;
    const int q0 = (gridDim.x - 1 - blockIdx.x) * TILE;  // the longest rows begin first
    const int h = blockIdx.y / chunks, c0 = blockIdx.y % chunks * COLUMNS, b = blockIdx.z;
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    query += b * query_b + h * query_h;
    key += b * key_b + h / (H / K) * key_k;
    value += b * value_b + h / (H / K) * value_k;
    if (has_mask) mask += (long long)b * T;

    const int offset = T - S;  // the position of query 0
    const int end = offset + (q0 + TILE < S ? q0 + TILE : S);  // no query of the tile sees past it
    const int first = offset + q0 - window + 1;
    float peak[4] = {NOTHING, NOTHING, NOTHING, NOTHING}, total[4] = {}, mixed[4][8] = {};

    for (int t0 = first > 0 ? first / TILE * TILE : 0; t0 < end; t0 += TILE) {
        float score[4][4] = {};
        for (int slice = 0; slice < C; slice += SLICE) {
            __syncthreads();  // everyone is done with the slice before
            for (int i = threadIdx.x; i < TILE * SLICE; i += 256) {
                const int row = i / SLICE, c = slice + i % SLICE;
                queries[row][i % SLICE] = q0 + row < S && c < C
                    ? to_float(query[(q0 + row) * query_s + c]) : 0.0f;
                keys[row][i % SLICE] = t0 + row < T && c < C
                    ? to_float(key[(t0 + row) * key_t + c]) : 0.0f;
            }
            __syncthreads();
            UNROLLED for (int c = 0; c < SLICE; c += 4) {
                Four q[4], k[4];
                UNROLLED for (int i = 0; i < 4; i++) {
                    q[i] = *reinterpret_cast<const Four*>(&queries[4 * ty + i][c]);
                    k[i] = *reinterpret_cast<const Four*>(&keys[tx + 16 * i][c]);
                }
                UNROLLED for (int i = 0; i < 4; i++)
                    UNROLLED for (int j = 0; j < 4; j++)
                        UNROLLED for (int e = 0; e < 4; e++)
                            score[i][j] += q[i].element[e] * k[j].element[e];
            }
        }

        UNROLLED for (int i = 0; i < 4; i++) {
            const int position = offset + q0 + 4 * ty + i;
            float highest = NOTHING;
            UNROLLED for (int j = 0; j < 4; j++) {
                const int t = t0 + tx + 16 * j;
                if (t > position || position - t >= window || t >= T || (has_mask && !mask[t]))
                    score[i][j] = NOTHING;
                highest = fmaxf(highest, score[i][j]);
            }
            const Rescaling r = raise_peak(peak[i], highest_over_lanes<1, 16>(highest) * scale);
            float sum = 0.0f;
            UNROLLED for (int j = 0; j < 4; j++) {
                const float weight = weight_of(score[i][j], scale, r.shift);
                weights[4 * ty + i][tx + 16 * j] = weight;
                sum += weight;
            }
            total[i] = total[i] * r.shrink + sum_over_lanes<1, 16>(sum);
            UNROLLED for (int j = 0; j < 8; j++) mixed[i][j] *= r.shrink;
        }

        for (int part = 0; part < TILE; part += VALUES) {
            __syncthreads();  // everyone has written its weights and is done with the part before
            for (int i = threadIdx.x; i < VALUES * COLUMNS; i += 256) {
                const int row = t0 + part + i / COLUMNS, c = c0 + i % COLUMNS;
                values[i / COLUMNS][i % COLUMNS] =
                    row < T && c < C ? to_float(value[row * value_t + c]) : 0.0f;
            }
            __syncthreads();
            #pragma unroll 4
            for (int t = 0; t < VALUES; t++) {
                const Four v[2] = {*reinterpret_cast<const Four*>(&values[t][4 * tx]),
                                   *reinterpret_cast<const Four*>(&values[t][4 * tx + 64])};
                UNROLLED for (int i = 0; i < 4; i++) {
                    const float weight = weights[4 * ty + i][part + t];
                    UNROLLED for (int j = 0; j < 8; j++)
                        mixed[i][j] += weight * v[j / 4].element[j % 4];
                }
            }
        }
    }

    UNROLLED for (int i = 0; i < 4; i++) {
        const int s = q0 + 4 * ty + i;
        const float inverse = total[i] == 0.0f ? 0.0f : 1.0f / total[i];
        if (log_sum_exp && c0 == 0 && tx == 0 && s < S)
            log_sum_exp[((long long)b * H + h) * S + s] = log_sum_exp_of(peak[i], total[i]);
        UNROLLED for (int j = 0; j < 8; j++) {
            const int c = c0 + 4 * tx + j % 4 + j / 4 * 64;
            if (s < S && c < C)
                output[(((long long)b * S + s) * H + h) * C + c] =
                    from_float<E>(mixed[i][j] * inverse);
        }
    }
}
"""

# ---- Attention, many queries: the tensor cores ---------------------------------------------------

TILES = r"""
// A tile of a block of 128 threads, [ROWS, C_PADDED + 8] in shared memory, from rows in global.
template <typename E, int ROWS, int C_PADDED>
__device__ __forceinline__ void copy_tile(E* tile, const E* source, long long stride, int rows,
                                          int C) {
    // 8 lanes read 128 neighbouring bytes of a row. What lies outside becomes zero.
    const int row0 = threadIdx.x / 8, c0 = threadIdx.x % 8 * 8;
    source += row0 * stride + c0;
    tile += row0 * (C_PADDED + 8) + c0;
    UNROLLED for (int i = 0; i < ROWS; i += 16) {
        UNROLLED for (int j = 0; j < C_PADDED; j += 64)
            if (c0 + j < C_PADDED)
                cp_async_16(tile + i * (C_PADDED + 8) + j, source + j,
                            row0 + i < rows && c0 + j < C);
        source += 16 * stride;
    }
}

__device__ __forceinline__ uint32_t bits(__half x) { return __half_as_ushort(x); }
__device__ __forceinline__ uint32_t bits(__nv_bfloat16 x) { return __bfloat16_as_ushort(x); }

// product [16 M, N] = own other^T: 16 M rows of one tile and N of another, 16 columns at a time.
template <typename E, int C_PADDED, int M, int N> __device__ __forceinline__
void multiply_rows(float (&product)[M][N / 8][4], const E* own, const E* other) {
    constexpr int STRIDE = C_PADDED + 8;
    const int lane = threadIdx.x % 32;
    UNROLLED for (int m = 0; m < M; m++)
        UNROLLED for (int n = 0; n < N / 8; n++)
            UNROLLED for (int i = 0; i < 4; i++) product[m][n][i] = 0.0f;
    UNROLLED for (int c = 0; c < C_PADDED; c += 16) {
        uint32_t a[M][4];
        UNROLLED for (int m = 0; m < M; m++)
            ldmatrix_x4(a[m], own + (16 * m + lane % 16) * STRIDE + c + lane / 16 * 8);
        UNROLLED for (int n = 0; n < N / 8; n += 2) {
            uint32_t x[4];  // other rows 8 n .. 8 n + 15, two right operands
            ldmatrix_x4(x, other + (8 * n + lane / 16 * 8 + lane % 8) * STRIDE
                           + c + lane / 8 % 2 * 8);
            const uint32_t left[2] = {x[0], x[1]}, right[2] = {x[2], x[3]};
            UNROLLED for (int m = 0; m < M; m++) {
                mma_m16n8k16<E>(product[m][n], a[m], left);
                mma_m16n8k16<E>(product[m][n + 1], a[m], right);
            }
        }
    }
}

// sum [16 M, C] += weights [16 M, N] other, 16 rows of `other` at a time. The layout in which mma
// returns a product is the one in which it takes its left operand: weights stay in registers.
template <typename E, int C_PADDED, int M, int N> __device__ __forceinline__
void add_weighted_rows(float (&sum)[M][C_PADDED / 8][4], const float (&weights)[M][N / 8][4],
                       const E* other) {
    constexpr int STRIDE = C_PADDED + 8;
    const int lane = threadIdx.x % 32;
    UNROLLED for (int n = 0; n < N / 8; n += 2) {
        uint32_t a[M][4];
        UNROLLED for (int m = 0; m < M; m++)
            UNROLLED for (int i = 0; i < 4; i++) {  // rows g or g + 8, then the next 8 others
                const float* pair = &weights[m][n + i / 2][i % 2 * 2];
                a[m][i] = bits(from_float<E>(pair[0])) | bits(from_float<E>(pair[1])) << 16;
            }
        UNROLLED for (int c = 0; c < C_PADDED; c += 16) {
            uint32_t x[4];  // columns c .. c + 15, two right operands
            ldmatrix_x4_trans(x, other + (8 * n + lane % 16) * STRIDE + c + lane / 16 * 8);
            const uint32_t left[2] = {x[0], x[1]}, right[2] = {x[2], x[3]};
            UNROLLED for (int m = 0; m < M; m++) {
                mma_m16n8k16<E>(sum[m][c / 8], a[m], left);
                mma_m16n8k16<E>(sum[m][c / 8 + 1], a[m], right);
            }
        }
    }
}
"""

ATTENTION_TENSOR_CORES = ATTENTION_HEADER + TILES + r"""
// FlashAttention-2 for 16-bit types (sm_80 and newer). One block of 4 warps takes 64 or 128 queries
// of one head; warp w owns 16 or 32 of them (M tiles of 16 rows) for all keys, so that no softmax
// crosses a warp. The block walks over the visible keys in tiles:
//
//     keys and values ->  [tile 0][tile 1][tile 2] ...   two buffers: tile n + 1 is copied
//               warp 0    [      ][      ][ \    ]       (cp.async) while tile n is used
//     queries   warp 1    [      ][      ][    \ ]
//               warp 2    [      ][      ][      ]\      tiles that nobody in the block sees are
//               warp 3    [      ][      ][      ]  \    not read; a warp skips its own, too
//
// Per tile and warp: scores = Q K^T (mma, float32 in registers); mask where the tile crosses the
// diagonal, the window or padding; online softmax, a row being spread over 4 lanes; then mixed +=
// weights V (mma). The layout in which mma returns scores is the one in which it takes its left
// operand, so weights never leave the registers. Tiles lie in shared memory with C padded by zeros
// to C_PADDED and each row by 16 bytes: the 8 rows of an ldmatrix then hit different banks.
//
// 4 C operations per visible (query, key) pair, S^2 / 2 pairs per head where S = T. With 128
// queries per block, the 256 C bytes of a tile serve 32768 C operations: 128 per byte, and the
// blocks of one head find most of them in the L2 cache. The limit is the tensor cores, and what
// keeps them waiting: one exp2 and about ten other instructions for every 4 C operations.
//
// Shared memory: (64 M + 4 KEYS) (C_PADDED + 8) 2 bytes, 80 KB at C = 96 and M = 2.
template <typename E, int C_PADDED, int M>
__global__ void __launch_bounds__(128, 2) attention_tensor_cores(
    ATTENTION_INPUTS, ATTENTION_OUTPUTS) {
    constexpr int KEYS = C_PADDED <= 128 ? 64 : 32, QUERIES = 64 * M, STRIDE = C_PADDED + 8;
    extern __shared__ __align__(16) unsigned char shared[];
    E* queries = reinterpret_cast<E*>(shared);  // [QUERIES][STRIDE]
    E* buffers = queries + QUERIES * STRIDE;    // [2][keys, values][KEYS][STRIDE]

    const int q0 = (gridDim.x - 1 - blockIdx.x) * QUERIES;  // the longest rows begin first
    const int h = blockIdx.y, b = blockIdx.z, k = h / (H / K);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    query += b * query_b + h * query_h + q0 * query_s;
    key += b * key_b + k * key_k;
    value += b * value_b + k * value_k;
    if (has_mask) mask += (long long)b * T;

    const int offset = T - S;  // the position of query 0
    const int end = offset + (q0 + QUERIES < S ? q0 + QUERIES : S);
    const int from = offset + q0 - window + 1;
    const int row0 = warp * 16 * M;  // the warp's queries: q0 + row0 ..., at positions lowest ...
    const int lowest = offset + q0 + row0;
    const int highest = (lowest + 16 * M < end ? lowest + 16 * M : end) - 1;

    float peak[M][2], total[M][2] = {}, mixed[M][C_PADDED / 8][4] = {};  // [.][2]: rows g and g + 8
    UNROLLED for (int m = 0; m < M; m++) peak[m][0] = peak[m][1] = NOTHING;

    auto copy_keys_and_values = [&](int t0, int buffer) {
        E* tile = buffers + buffer * 2 * KEYS * STRIDE;
        copy_tile<E, KEYS, C_PADDED>(tile, key + t0 * key_t, key_t, T - t0, C);
        copy_tile<E, KEYS, C_PADDED>(
            tile + KEYS * STRIDE, value + t0 * value_t, value_t, T - t0, C);
        cp_async_commit();
    };
    int t0 = from > 0 ? from / KEYS * KEYS : 0, buffer = 0;
    copy_tile<E, QUERIES, C_PADDED>(queries, query, query_s, S - q0, C);
    copy_keys_and_values(t0, buffer);

    for (; t0 < end; t0 += KEYS, buffer ^= 1) {
        cp_async_wait<0>();
        __syncthreads();  // this tile is there for everyone, and everyone has left the other one
        if (t0 + KEYS < end) copy_keys_and_values(t0 + KEYS, buffer ^ 1);
        if (t0 > highest || t0 + KEYS <= lowest - window + 1) continue;  // nothing for this warp
        const E* keys = buffers + buffer * 2 * KEYS * STRIDE;
        const E* values = keys + KEYS * STRIDE;

        float score[M][KEYS / 8][4];
        multiply_rows<E, C_PADDED, M, KEYS>(score, queries + row0 * STRIDE, keys);

        // The padding of a tile's keys, as bits: bit i of seen[n] is key t0 + 32 n + i.
        uint32_t seen[KEYS / 32];
        bool partly = t0 + KEYS - 1 > lowest || t0 <= highest - window;
        UNROLLED for (int n = 0; n < KEYS / 32; n++) {
            const int position = t0 + 32 * n + lane;
            seen[n] = has_mask
                ? __ballot_sync(0xffffffff, position < T && mask[position]) : 0xffffffff;
            partly = partly || seen[n] != 0xffffffff;
        }
        if (partly) {
            UNROLLED for (int m = 0; m < M; m++)
                UNROLLED for (int n = 0; n < KEYS / 8; n++)
                    UNROLLED for (int i = 0; i < 4; i++) {
                        const int column = 8 * n + 2 * t + i % 2;
                        const int distance = lowest + 16 * m + g + i / 2 * 8 - (t0 + column);
                        if (distance < 0 || distance >= window
                            || !(seen[n / 4] >> (column % 32) & 1))
                            score[m][n][i] = NOTHING;
                    }
        }

        // Online softmax: scores become weights. Lanes 4 g .. 4 g + 3 share the rows g and g + 8.
        UNROLLED for (int m = 0; m < M; m++)
            UNROLLED for (int i = 0; i < 2; i++) {
                float high = NOTHING;
                UNROLLED for (int n = 0; n < KEYS / 8; n++)
                    high = fmaxf(high, fmaxf(score[m][n][2 * i], score[m][n][2 * i + 1]));
                const Rescaling r = raise_peak(peak[m][i], highest_over_lanes<1, 4>(high) * scale);
                float sum = 0.0f;  // of this lane's columns; lanes are added after the last tile
                UNROLLED for (int n = 0; n < KEYS / 8; n++)
                    UNROLLED for (int e = 2 * i; e < 2 * i + 2; e++) {
                        score[m][n][e] = weight_of(score[m][n][e], scale, r.shift);
                        sum += score[m][n][e];
                    }
                total[m][i] = total[m][i] * r.shrink + sum;
                UNROLLED for (int n = 0; n < C_PADDED / 8; n++) {
                    mixed[m][n][2 * i] *= r.shrink;
                    mixed[m][n][2 * i + 1] *= r.shrink;
                }
            }
        add_weighted_rows<E, C_PADDED, M, KEYS>(mixed, score, values);
    }

    // Divide by the sums and write, by way of the warp's own rows of `queries`, 16 bytes per lane.
    __syncwarp();
    UNROLLED for (int m = 0; m < M; m++)
        UNROLLED for (int i = 0; i < 2; i++) {
            total[m][i] = sum_over_lanes<1, 4>(total[m][i]);
            const float inverse = total[m][i] == 0.0f ? 0.0f : 1.0f / total[m][i];
            E* row = queries + (row0 + 16 * m + g + 8 * i) * STRIDE;
            UNROLLED for (int n = 0; n < C_PADDED / 8; n++)
                *reinterpret_cast<Vector<E, 2>*>(row + 8 * n + 2 * t) = {
                    from_float<E>(mixed[m][n][2 * i] * inverse),
                    from_float<E>(mixed[m][n][2 * i + 1] * inverse)};
        }
    __syncwarp();
    UNROLLED for (int i = 0; i < 16 * M; i += 4)
        UNROLLED for (int j = 0; j < C_PADDED; j += 64) {
            const int row = row0 + i + lane / 8, c = j + lane % 8 * 8, s = q0 + row;
            if (s < S && c < C)
                *reinterpret_cast<Vector<E, 8>*>(
                    output + (((long long)b * S + s) * H + h) * C + c) =
                    *reinterpret_cast<const Vector<E, 8>*>(queries + row * STRIDE + c);
        }
    if (log_sum_exp && t == 0)  // last, when registers are free
        UNROLLED for (int m = 0; m < M; m++)
            UNROLLED for (int i = 0; i < 2; i++) {
                const int s = q0 + row0 + 16 * m + g + 8 * i;
                if (s < S)
                    log_sum_exp[((long long)b * H + h) * S + s] =
                        log_sum_exp_of(peak[m][i], total[m][i]);
            }
}
"""

# ---- Attention, few queries: split keys ----------------------------------------------------------

ATTENTION_DECODE = ATTENTION_HEADER + r"""
// Attention of few queries against a long cache. The S G query rows of one key/value head share its
// keys, up to ROWS of them in one block; the keys are split over blocks, or a single sequence would
// occupy K of a GPU's hundred or more multiprocessors:
//
//     keys of head k  | split 0 | split 1 | split 2 | ...   one block of 4 warps each
//     8 lanes per key:  lane i holds vectors i, i + 8, ... of 16 bytes; the 16 groups of 8 lanes
//                       take 16 neighbouring keys, UNROLL times before any use
//
// Every group runs an online softmax of its own; groups are merged at the end through exchanges and
// shared memory, splits by the kernel `attention_combine`. Partial results are float32.
//
// Reads every key and value once, 2 C elements per (key, head) for 4 C G S operations: with S = 1
// and G = 1 one operation per byte (16 bits). The limit is the memory's bandwidth, up to about 8
// rows; above, the float32 units.
template <typename E, int COLUMNS, int ROWS>
__global__ void __launch_bounds__(128, ROWS == 1 ? 4 : ROWS == 4 && COLUMNS < 256 ? 3 : 2)
attention_decode(ATTENTION_INPUTS, float* __restrict__ partial_mixed,
                 float* __restrict__ partial_sums, int keys_per_split) {
    constexpr int LANES = 8, WARPS = 4, GROUPS = WARPS * 32 / LANES, N = 16 / sizeof(E);
    constexpr int PER_LANE = COLUMNS / (LANES * N), UNROLL = PER_LANE < 4 ? 4 / PER_LANE : 1;
    __shared__ float queries[ROWS][COLUMNS], warp_mixed[WARPS][ROWS][COLUMNS];
    __shared__ float warp_peak[WARPS][ROWS], warp_total[WARPS][ROWS];

    const int G = H / K, rows = S * G, chunks = (rows + ROWS - 1) / ROWS;
    const int k = blockIdx.y / chunks, row0 = blockIdx.y % chunks * ROWS, b = blockIdx.z;
    const int lane = threadIdx.x % LANES, group = threadIdx.x / LANES, warp = threadIdx.x / 32;
    key += b * key_b + k * key_k;
    value += b * value_b + k * value_k;
    if (has_mask) mask += (long long)b * T;
    const int offset = T - S, from = offset - window + 1;  // the first key that query 0 sees
    const int start = (from > 0 ? from : 0) + blockIdx.x * keys_per_split;
    const int end = start + keys_per_split < T ? start + keys_per_split : T;

    // Row r is query r / G, head k G + r % G.
    for (int i = threadIdx.x; i < ROWS * COLUMNS; i += 128) {
        const int r = row0 + i / COLUMNS, c = i % COLUMNS;
        queries[i / COLUMNS][c] = r < rows && c < C
            ? to_float(query[b * query_b + r / G * query_s + (k * G + r % G) * query_h + c]) : 0.0f;
    }
    __syncthreads();

    float peak[ROWS], total[ROWS] = {}, mixed[ROWS][PER_LANE][N] = {};
    int position[ROWS];
    UNROLLED for (int r = 0; r < ROWS; r++) {
        peak[r] = NOTHING;
        position[r] = offset + (row0 + r) / G;
    }
    for (int t0 = start; t0 < end; t0 += GROUPS * UNROLL) {
        // Past the end, the last key is read again and weighs 0; past C, the last columns: the
        // query has zeros there. Reads without a condition are all under way at once.
        Vector<E, N> keys[UNROLL][PER_LANE], values[UNROLL][PER_LANE];
        bool seen[UNROLL];
        UNROLLED for (int u = 0; u < UNROLL; u++) {
            const int wanted = t0 + u * GROUPS + group, t = wanted < end ? wanted : end - 1;
            seen[u] = t == wanted && (!has_mask || mask[t]);
            UNROLLED for (int j = 0; j < PER_LANE; j++) {
                const int column = (j * LANES + lane) * N, c = column < C ? column : C - N;
                keys[u][j] = *reinterpret_cast<const Vector<E, N>*>(key + t * key_t + c);
                values[u][j] = *reinterpret_cast<const Vector<E, N>*>(value + t * value_t + c);
            }
        }
        UNROLLED for (int r = 0; r < ROWS; r++) {
            float score[UNROLL] = {}, highest = NOTHING, sum = 0.0f;
            UNROLLED for (int j = 0; j < PER_LANE; j++)
                UNROLLED for (int n = 0; n < N; n++) {
                    const float q = queries[r][(j * LANES + lane) * N + n];
                    UNROLLED for (int u = 0; u < UNROLL; u++)
                        score[u] += q * to_float(keys[u][j].element[n]);
                }
            UNROLLED for (int u = 0; u < UNROLL; u++) {
                score[u] = sum_over_lanes<1, LANES>(score[u]);
                const int distance = position[r] - (t0 + u * GROUPS + group);
                if (!seen[u] || distance < 0 || distance >= window) score[u] = NOTHING;
                highest = fmaxf(highest, score[u]);
            }
            const Rescaling rescaling = raise_peak(peak[r], highest * scale);
            UNROLLED for (int u = 0; u < UNROLL; u++) {
                score[u] = weight_of(score[u], scale, rescaling.shift);
                sum += score[u];
            }
            total[r] = total[r] * rescaling.shrink + sum;
            UNROLLED for (int j = 0; j < PER_LANE; j++)
                UNROLLED for (int n = 0; n < N; n++) {
                    float& x = mixed[r][j][n];
                    x *= rescaling.shrink;
                    UNROLLED for (int u = 0; u < UNROLL; u++)
                        x += score[u] * to_float(values[u][j].element[n]);
                }
        }
    }

    // The 4 groups of each warp: bring all to the highest peak, then add.
    UNROLLED for (int r = 0; r < ROWS; r++) {
        const float highest = highest_over_lanes<LANES, 32>(peak[r]);
        const float shrink = raise_peak(peak[r], highest).shrink;
        const float sum = sum_over_lanes<LANES, 32>(total[r] * shrink);
        if (threadIdx.x % 32 == 0) {
            warp_peak[warp][r] = peak[r];
            warp_total[warp][r] = sum;
        }
        UNROLLED for (int j = 0; j < PER_LANE; j++)
            UNROLLED for (int n = 0; n < N; n++) {
                const float x = sum_over_lanes<LANES, 32>(mixed[r][j][n] * shrink);
                if (group % 4 == 0) warp_mixed[warp][r][(j * LANES + lane) * N + n] = x;
            }
    }
    __syncthreads();

    // The 4 warps, in the same way. Partial results are [B, K, S G, splits], C values and 2 sums.
    for (int i = threadIdx.x; i < ROWS * COLUMNS; i += 128) {
        const int r = i / COLUMNS, c = i % COLUMNS;
        if (row0 + r >= rows || c >= C) continue;
        float highest = NOTHING, sum = 0.0f, x = 0.0f;
        for (int w = 0; w < WARPS; w++) highest = fmaxf(highest, warp_peak[w][r]);
        for (int w = 0; w < WARPS; w++) {
            float old = warp_peak[w][r];
            const float shrink = raise_peak(old, highest).shrink;
            sum += warp_total[w][r] * shrink;
            x += warp_mixed[w][r][c] * shrink;
        }
        const long long part = (((long long)b * K + k) * rows + row0 + r) * gridDim.x + blockIdx.x;
        partial_mixed[part * C + c] = x;
        if (c == 0) {
            partial_sums[2 * part] = highest;
            partial_sums[2 * part + 1] = sum;
        }
    }
}

// Merge the splits' partial results: one block per query row, one thread per column. Reads C + 2
// floats per row and split, little beside what the kernel before it read; the limit is its launch.
template <typename E>
__global__ void __launch_bounds__(256) attention_combine(
    const float* __restrict__ partial_mixed, const float* __restrict__ partial_sums,
    ATTENTION_OUTPUTS, int S, int H, int K, int C, int splits) {
    const int G = H / K, rows = S * G, r = blockIdx.x % rows, k = blockIdx.x / rows % K;
    const long long b = blockIdx.x / rows / K;
    partial_mixed += (long long)blockIdx.x * splits * C;
    partial_sums += (long long)blockIdx.x * splits * 2;
    float highest = NOTHING, total = 0.0f, x = 0.0f;
    for (int i = 0; i < splits; i++) highest = fmaxf(highest, partial_sums[2 * i]);
    for (int i = 0; i < splits; i++) {
        float peak = partial_sums[2 * i];
        const float shrink = raise_peak(peak, highest).shrink;
        total += partial_sums[2 * i + 1] * shrink;
        if (threadIdx.x < C) x += partial_mixed[(long long)i * C + threadIdx.x] * shrink;
    }
    if (threadIdx.x < C)
        output[((b * S + r / G) * H + k * G + r % G) * C + threadIdx.x] =
            from_float<E>(total == 0.0f ? 0.0f : x / total);
    if (log_sum_exp && threadIdx.x == 0)
        log_sum_exp[(b * H + k * G + r % G) * S + r / G] = log_sum_exp_of(highest, total);
}
"""

# ---- Attention, backward: any head_dim -----------------------------------------------------------

BACKWARD_HEADER = ATTENTION_HEADER + r"""
// The derivative of attention. With the scores s = q k^T / sqrt(C), p = softmax(s), context = p v,
// and ' for the gradient with respect to something:
//
//     v' = p^T context'     p' = context' v^T     s' = p (p' - delta)     delta = sum of p p'
//     q' = s' k / sqrt(C)   k' = s'^T q / sqrt(C)                         over the query's keys
//
// FlashAttention-2's scheme: p is not kept but computed again, a tile at a time, from each row's
// log-sum-exp, which the forward has written. And delta, needed before the first s', is the sum of
// context context' over the columns, as sum_t p_t p'_t = (sum_t p_t v_t) . context'.
//
// In 16 bits that is an estimate, for context was rounded, and p in it. An error e of delta makes
// q' wrong by e sum_t p_t k_t, which is large where all keys have a part in common, and all values:
// with parts three times their spread, 12 times the error of all other roundings (it has ended the
// training of models: Qiu and Yao). But e is known in the end, as sum_t p_t (p'_t - delta), which
// would be 0. So the first kernel sums it, and the `mean` of the keys, sum_t p_t k_t; then it adds
// e to delta, and takes e mean from q'. What the second reads of each query are two float32,
// `statistics`, [B, H, 2, rows], S rounded up to 64 rows:
//
//     [0]  the log-sum-exp to the base 2, so that p is exp2(score scale - it)
//     [1]  delta
//
// Two kernels, so that every gradient is summed in the registers of one block, in a fixed order,
// and nothing is added in memory:
//
//              keys     0..63  64..127  128..191
//     queries   0..63  [ \   ]                     1. a block owns a row of tiles: it walks along
//     queries  64..127 [     ][ \    ]                them, for q' and delta
//     queries 128..191 [     ][      ][ \     ]    2. a block owns a column of tiles: it walks down
//                                                     them, through all G heads that share its
//                                                     keys, for k' and v'
//
// The work that must be done is five products: 10 C operations per visible (query, key) pair, 2.5
// times the forward's. These kernels do eight, 8 C + 8 C = 16 C: scores and p' twice, and the mean
// (not in float32, which needs none: 14 C). The second could sum q', too, but of its 64 keys only:
// 8 C bytes per query, float32 written and read, in the place of 256 C operations. That is 32 per
// byte, where a GPU could do hundreds. Queries that see nothing have p = 0, and so have keys that
// nobody sees: their gradients are zeros.
#define BACKWARD_INPUTS ATTENTION_INPUTS, const E* __restrict__ gradient, \
    long long gradient_b, long long gradient_s, long long gradient_h, \
    float* __restrict__ statistics, int rows
"""

ATTENTION_BACKWARD_TILED = BACKWARD_HEADER + r"""
// The derivative in float32 on the CUDA cores, for any C, any strides and any GPU. Products as in
// `attention_tiled`: 256 threads as 16 x 16; thread (ty, tx) holds 4 x 4 of a tile of scores, 64
// rows that the block owns times 64 others, and 4 x 8 of a gradient: own rows 4 ty + i, columns
// 4 tx + 64 j ... In the first kernel the block owns queries, in the second keys: there all tiles
// are transposed, and the code is the same.
//
// Own and other rows come from the caches, for each tile of 64 x 64 again: 320 C elements for the
// 24576 C operations of the first kernel (in float32), 384 C for 32768 C of the second. That is 77
// and 85 operations per element: the limit is the float32 units. (Columns beyond 128 compute scores
// and p' anew.)
constexpr int TILE = 64, SLICE = 32, COLUMNS = 128, PART = 16;
struct Shared {  // 4 floats of padding per row: 8 rows then lie in 8 different groups of banks
    float own[TILE][SLICE + 4], other[TILE][SLICE + 4];
    float weights[TILE][TILE + 4], part[PART][COLUMNS];
};
using Four = Vector<float, 4>;

// Up to 64 rows of a tile; `count` of them exist.
template <typename E> struct Rows { const E* start; long long stride; int count; };

// product = own other^T, over slices of the C columns.
template <typename E> __device__ __forceinline__
void multiply_rows(float (&product)[4][4], Rows<E> own, Rows<E> other, int C, Shared& shared) {
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    UNROLLED for (int i = 0; i < 4; i++) UNROLLED for (int j = 0; j < 4; j++) product[i][j] = 0.0f;
    for (int slice = 0; slice < C; slice += SLICE) {
        __syncthreads();  // everyone is done with the slice before
        for (int i = threadIdx.x; i < TILE * SLICE; i += 256) {
            const int row = i / SLICE, c = slice + i % SLICE;
            shared.own[row][i % SLICE] = row < own.count && c < C
                ? to_float(own.start[row * own.stride + c]) : 0.0f;
            shared.other[row][i % SLICE] = row < other.count && c < C
                ? to_float(other.start[row * other.stride + c]) : 0.0f;
        }
        __syncthreads();
        #pragma unroll 2
        for (int c = 0; c < SLICE; c += 4) {
            Four a[4], b[4];
            UNROLLED for (int i = 0; i < 4; i++) {
                a[i] = *reinterpret_cast<const Four*>(&shared.own[4 * ty + i][c]);
                b[i] = *reinterpret_cast<const Four*>(&shared.other[tx + 16 * i][c]);
            }
            UNROLLED for (int i = 0; i < 4; i++)
                UNROLLED for (int j = 0; j < 4; j++)
                    UNROLLED for (int e = 0; e < 4; e++)
                        product[i][j] += a[i].element[e] * b[j].element[e];
        }
    }
}

// sum += weights other, columns c0 ... c0 + 127, through shared memory.
template <typename E> __device__ __forceinline__
void add_weighted_rows(float (&sum)[4][8], const float (&weights)[4][4], Rows<E> other, int c0,
                       int C, Shared& shared) {
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    __syncthreads();  // everyone is done with the weights before
    UNROLLED for (int i = 0; i < 4; i++)
        UNROLLED for (int j = 0; j < 4; j++)
            shared.weights[4 * ty + i][tx + 16 * j] = weights[i][j];
    for (int first = 0; first < TILE; first += PART) {
        __syncthreads();  // the weights are there, and everyone is done with the part before
        for (int i = threadIdx.x; i < PART * COLUMNS; i += 256) {
            const int row = first + i / COLUMNS, c = c0 + i % COLUMNS;
            shared.part[i / COLUMNS][i % COLUMNS] = row < other.count && c < C
                ? to_float(other.start[row * other.stride + c]) : 0.0f;
        }
        __syncthreads();
        #pragma unroll 4
        for (int row = 0; row < PART; row++) {
            const Four x[2] = {*reinterpret_cast<const Four*>(&shared.part[row][4 * tx]),
                               *reinterpret_cast<const Four*>(&shared.part[row][4 * tx + 64])};
            UNROLLED for (int i = 0; i < 4; i++) {
                const float weight = shared.weights[4 * ty + i][first + row];
                UNROLLED for (int j = 0; j < 8; j++)
                    sum[i][j] += weight * x[j / 4].element[j % 4];
            }
        }
    }
}

// Write the block's own rows of a gradient, [.., C], times a factor.
template <typename E> __device__ __forceinline__
void write_rows(E* start, long long stride, int count, const float (&sum)[4][8], float factor,
                int c0, int C) {
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    UNROLLED for (int i = 0; i < 4; i++)
        UNROLLED for (int j = 0; j < 8; j++) {
            const int row = 4 * ty + i, c = c0 + 4 * tx + j % 4 + j / 4 * 64;
            if (row < count && c < C) start[row * stride + c] = from_float<E>(sum[i][j] * factor);
        }
}

template <typename E>
__global__ void __launch_bounds__(256) query_gradient_tiled(
    BACKWARD_INPUTS, const E* __restrict__ context, const float* __restrict__ log_sum_exp,
    E* __restrict__ d_query) {
    __shared__ __align__(16) Shared shared;
    const int chunks = (C + COLUMNS - 1) / COLUMNS;
    const int q0 = (gridDim.x - 1 - blockIdx.x) * TILE;  // the longest rows begin first
    const int h = blockIdx.y / chunks, c0 = blockIdx.y % chunks * COLUMNS, k = h / (H / K);
    const long long b = blockIdx.z;
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    const Rows<E> queries = {query + b * query_b + h * query_h + q0 * query_s, query_s, S - q0};
    const Rows<E> gradients = {gradient + b * gradient_b + h * gradient_h + q0 * gradient_s,
                               gradient_s, S - q0};
    key += b * key_b + k * key_k;
    value += b * value_b + k * value_k;
    if (has_mask) mask += b * T;
    statistics += (b * H + h) * 2 * rows + q0;

    const int offset = T - S;  // the position of query 0
    const int end = offset + (q0 + TILE < S ? q0 + TILE : S);  // no query of the tile sees past it
    const int from = offset + q0 - window + 1, first = from > 0 ? from / TILE * TILE : 0;
    float log_sum[4] = {}, delta[4] = {}, error[4] = {};  // error: sum_t p_t (p'_t - delta)
    float sum[4][8] = {}, mean[4][8] = {};
    context += ((b * S + q0) * H + h) * C;
    log_sum_exp += (b * H + h) * S + q0;
    UNROLLED for (int i = 0; i < 4; i++) {
        const int row = 4 * ty + i;
        if (q0 + row < S) {
            log_sum[i] = log_sum_exp[row] / LN_2;
            for (int c = tx; c < C; c += 16)
                delta[i] += to_float(context[(long long)row * H * C + c])
                    * to_float(gradients.start[row * gradient_s + c]);
        }
        delta[i] = sum_over_lanes<1, 16>(delta[i]);
    }

    for (int t0 = first; t0 < end; t0 += TILE) {
        const Rows<E> keys = {key + t0 * key_t, key_t, T - t0};
        const Rows<E> values = {value + t0 * value_t, value_t, T - t0};
        float p[4][4], d_s[4][4];  // at first scores and p'
        multiply_rows(p, queries, keys, C, shared);
        multiply_rows(d_s, gradients, values, C, shared);
        UNROLLED for (int i = 0; i < 4; i++)
            UNROLLED for (int j = 0; j < 4; j++) {
                const int t = t0 + tx + 16 * j, distance = offset + q0 + 4 * ty + i - t;
                const bool seen = distance >= 0 && distance < window && t < T
                    && (!has_mask || mask[t]);
                p[i][j] = weight_of(seen ? p[i][j] : NOTHING, scale, log_sum[i]);
                d_s[i][j] = p[i][j] * (d_s[i][j] - delta[i]);
                error[i] += d_s[i][j];
            }
        add_weighted_rows(sum, d_s, keys, c0, C, shared);
        if constexpr (sizeof(E) == 2) add_weighted_rows(mean, p, keys, c0, C, shared);
    }
    UNROLLED for (int i = 0; i < 4; i++) {
        error[i] = sum_over_lanes<1, 16>(error[i]);
        UNROLLED for (int j = 0; j < 8; j++) sum[i][j] -= error[i] * mean[i][j];
        if (c0 == 0 && tx == 0) {
            statistics[4 * ty + i] = log_sum[i];
            statistics[rows + 4 * ty + i] = delta[i] + error[i];
        }
    }
    write_rows(d_query + ((b * S + q0) * H + h) * C, (long long)H * C, S - q0, sum, scale * LN_2,
               c0, C);
}

template <typename E>
__global__ void __launch_bounds__(256) key_value_gradients_tiled(
    BACKWARD_INPUTS, E* __restrict__ d_key, E* __restrict__ d_value) {
    __shared__ __align__(16) Shared shared;
    const int chunks = (C + COLUMNS - 1) / COLUMNS, G = H / K;
    const int t0 = blockIdx.x * TILE;  // the first keys, which most queries see, begin first
    const int k = blockIdx.y / chunks, c0 = blockIdx.y % chunks * COLUMNS;
    const long long b = blockIdx.z;
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    const Rows<E> keys = {key + b * key_b + k * key_k + t0 * key_t, key_t, T - t0};
    const Rows<E> values = {value + b * value_b + k * value_k + t0 * value_t, value_t, T - t0};
    if (has_mask) mask += b * T;

    // The queries at positions t0 ... t0 + 63 + window - 1, less those that do not exist.
    const int offset = T - S, first = t0 > offset ? (t0 - offset) / TILE * TILE : 0;
    const int last = t0 + TILE - 1 + window - offset, end = last < S ? last : S;
    float d_k[4][8] = {}, d_v[4][8] = {};

    for (int h = k * G; h < k * G + G; h++)
        for (int q0 = first; q0 < end; q0 += TILE) {
            const Rows<E> queries = {query + b * query_b + h * query_h + q0 * query_s, query_s,
                                     S - q0};
            const Rows<E> gradients = {gradient + b * gradient_b + h * gradient_h + q0 * gradient_s,
                                       gradient_s, S - q0};
            const float* log_sum = statistics + (b * H + h) * 2 * rows + q0;
            const float* delta = log_sum + rows;
            float p[4][4], d_s[4][4];  // at first scores and p'; queries past the last are zeros
            multiply_rows(p, keys, queries, C, shared);
            multiply_rows(d_s, values, gradients, C, shared);
            UNROLLED for (int i = 0; i < 4; i++)
                UNROLLED for (int j = 0; j < 4; j++) {
                    const int q = tx + 16 * j, t = t0 + 4 * ty + i;
                    const int distance = offset + q0 + q - t;
                    const bool seen = distance >= 0 && distance < window && t < T
                        && (!has_mask || mask[t]);
                    p[i][j] = weight_of(seen ? p[i][j] : NOTHING, scale, log_sum[q]);
                    d_s[i][j] = p[i][j] * (d_s[i][j] - delta[q]);
                }
            add_weighted_rows(d_v, p, gradients, c0, C, shared);
            add_weighted_rows(d_k, d_s, queries, c0, C, shared);
        }

    const long long start = ((b * T + t0) * K + k) * C, stride = (long long)K * C;
    write_rows(d_key + start, stride, T - t0, d_k, scale * LN_2, c0, C);
    write_rows(d_value + start, stride, T - t0, d_v, 1.0f, c0, C);
}
"""

# ---- Attention, backward: the tensor cores -------------------------------------------------------

ATTENTION_BACKWARD_TENSOR_CORES = BACKWARD_HEADER + TILES + r"""
// The derivative for 16-bit types (sm_80 and newer), C up to 128. Warps, tiles and copies are those
// of `attention_tensor_cores`: one of a block's 4 warps has 16 of the block's own rows to itself,
// and the others pass by in two buffers. In the first kernel own rows are queries, in the second
// keys, whose tiles of scores are transposed. Then both kernels are the same two products,
//
//     [own, others] = own rows . other rows            scores, p'       (multiply_rows)
//     [own, C] += [own, others] other rows             q', k', v'       (add_weighted_rows)
//
//     1. own  query | context'    others  key   | value           q'   += s' key
//                                                                 mean += p  key
//     2. own  key   | value       others  query | context'        k'   += s'^T query
//                                                                 v'   += p^T context'
//
// and what mma returns is, rounded to 16 bits, the left operand that it takes: p and s' never leave
// the registers, no tile is transposed in memory, and no sum crosses a warp.
//
// Per other row, 4 C bytes of it serve 8 C 64 operations: 128 per byte, which the L2 cache can
// feed. (Two sums of C columns fill a warp's registers: hence 64 own rows, and not 128.) The limit
// is the tensor cores, and next to them shared memory: an mma of 4096 operations needs 256 bytes of
// right operand, which s' and p share in the first kernel.
//
// Shared memory: (128 + 4 OTHERS) (C_PADDED + 8) 2 bytes, and statistics in the second kernel.

// Write a warp's rows of a gradient, times a factor, by way of its own rows of a tile.
template <typename E, int C_PADDED> __device__ __forceinline__
void write_rows(E* start, long long stride, int count, int C,
                const float (&sum)[C_PADDED / 8][4], float factor, E* own) {
    constexpr int STRIDE = C_PADDED + 8;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    __syncwarp();
    UNROLLED for (int i = 0; i < 2; i++)
        UNROLLED for (int n = 0; n < C_PADDED / 8; n++)
            *reinterpret_cast<Vector<E, 2>*>(own + (g + 8 * i) * STRIDE + 8 * n + 2 * t) = {
                from_float<E>(sum[n][2 * i] * factor), from_float<E>(sum[n][2 * i + 1] * factor)};
    __syncwarp();
    UNROLLED for (int i = 0; i < 16; i += 4)
        UNROLLED for (int j = 0; j < C_PADDED; j += 64) {
            const int row = i + lane / 8, c = j + lane % 8 * 8;
            if (row < count && c < C)
                *reinterpret_cast<Vector<E, 8>*>(start + row * stride + c) =
                    *reinterpret_cast<const Vector<E, 8>*>(own + row * STRIDE + c);
        }
}

template <typename E, int C_PADDED>
__global__ void __launch_bounds__(128, 2) query_gradient_tensor_cores(
    BACKWARD_INPUTS, const E* __restrict__ context, const float* __restrict__ log_sum_exp,
    E* __restrict__ d_query) {
    constexpr int QUERIES = 64, KEYS = C_PADDED <= 96 ? 64 : 32, STRIDE = C_PADDED + 8;
    extern __shared__ __align__(16) unsigned char shared[];
    E* queries = reinterpret_cast<E*>(shared);  // [QUERIES][STRIDE]
    E* gradients = queries + QUERIES * STRIDE;
    E* buffers = gradients + QUERIES * STRIDE;  // [2][keys, values][KEYS][STRIDE]

    const int q0 = (gridDim.x - 1 - blockIdx.x) * QUERIES;  // the longest rows begin first
    const int h = blockIdx.y, k = h / (H / K);
    const long long b = blockIdx.z;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    query += b * query_b + h * query_h + q0 * query_s;
    gradient += b * gradient_b + h * gradient_h + q0 * gradient_s;
    key += b * key_b + k * key_k;
    value += b * value_b + k * value_k;
    if (has_mask) mask += b * T;

    const int offset = T - S;  // the position of query 0
    const int end = offset + (q0 + QUERIES < S ? q0 + QUERIES : S);
    const int from = offset + q0 - window + 1;
    const int row0 = warp * 16;  // the warp's queries: q0 + row0 ..., at positions lowest ...
    const int lowest = offset + q0 + row0;
    const int highest = (lowest + 16 < end ? lowest + 16 : end) - 1;

    auto copy_keys_and_values = [&](int t0, int buffer) {
        E* tile = buffers + buffer * 2 * KEYS * STRIDE;
        copy_tile<E, KEYS, C_PADDED>(tile, key + t0 * key_t, key_t, T - t0, C);
        copy_tile<E, KEYS, C_PADDED>(
            tile + KEYS * STRIDE, value + t0 * value_t, value_t, T - t0, C);
        cp_async_commit();
    };
    int t0 = from > 0 ? from / KEYS * KEYS : 0, buffer = 0;
    copy_tile<E, QUERIES, C_PADDED>(queries, query, query_s, S - q0, C);
    copy_tile<E, QUERIES, C_PADDED>(gradients, gradient, gradient_s, S - q0, C);
    copy_keys_and_values(t0, buffer);

    // [2]: rows g and g + 8, each spread over 4 lanes, which read 64 neighbouring bytes.
    float log_sum[2] = {}, delta[2] = {}, error[2] = {};  // error: sum_t p_t (p'_t - delta)
    context += ((b * S + q0) * H + h) * C;
    log_sum_exp += (b * H + h) * S + q0;
    UNROLLED for (int r = 0; r < 2; r++) {
        const int row = row0 + g + 8 * r;
        if (q0 + row < S) {
            log_sum[r] = log_sum_exp[row] / LN_2;
            for (int c = 8 * t; c < C; c += 32) {
                const auto x = *reinterpret_cast<const Vector<E, 8>*>(
                    context + (long long)row * H * C + c);
                const auto d_x = *reinterpret_cast<const Vector<E, 8>*>(
                    gradient + row * gradient_s + c);
                UNROLLED for (int n = 0; n < 8; n++)
                    delta[r] += to_float(x.element[n]) * to_float(d_x.element[n]);
            }
        }
        delta[r] = sum_over_lanes<1, 4>(delta[r]);
    }

    float sums[2][C_PADDED / 8][4] = {};  // q' and the mean key
    for (; t0 < end; t0 += KEYS, buffer ^= 1) {
        cp_async_wait<0>();
        __syncthreads();  // this tile is there for everyone, and everyone has left the other one
        if (t0 + KEYS < end) copy_keys_and_values(t0 + KEYS, buffer ^ 1);
        if (t0 > highest || t0 + KEYS <= lowest - window + 1) continue;  // nothing for this warp
        const E* keys = buffers + buffer * 2 * KEYS * STRIDE;
        const E* values = keys + KEYS * STRIDE;

        float p[1][KEYS / 8][4], d_p[1][KEYS / 8][4], weights[2][KEYS / 8][4];
        multiply_rows<E, C_PADDED, 1, KEYS>(p, queries + row0 * STRIDE, keys);  // at first scores
        multiply_rows<E, C_PADDED, 1, KEYS>(d_p, gradients + row0 * STRIDE, values);

        // The padding of a tile's keys, as bits: bit i of seen[n] is key t0 + 32 n + i.
        uint32_t seen[KEYS / 32];
        bool partly = t0 + KEYS - 1 > lowest || t0 <= highest - window;
        UNROLLED for (int n = 0; n < KEYS / 32; n++) {
            const int position = t0 + 32 * n + lane;
            seen[n] = has_mask
                ? __ballot_sync(0xffffffff, position < T && mask[position]) : 0xffffffff;
            partly = partly || seen[n] != 0xffffffff;
        }
        if (partly) {
            UNROLLED for (int n = 0; n < KEYS / 8; n++)
                UNROLLED for (int e = 0; e < 4; e++) {
                    const int column = 8 * n + 2 * t + e % 2;
                    const int distance = lowest + g + e / 2 * 8 - (t0 + column);
                    if (distance < 0 || distance >= window || !(seen[n / 4] >> (column % 32) & 1))
                        p[0][n][e] = NOTHING;
                }
        }
        UNROLLED for (int n = 0; n < KEYS / 8; n++)
            UNROLLED for (int e = 0; e < 4; e++) {
                weights[1][n][e] = weight_of(p[0][n][e], scale, log_sum[e / 2]);
                weights[0][n][e] = weights[1][n][e] * (d_p[0][n][e] - delta[e / 2]);
                error[e / 2] += weights[0][n][e];
            }
        add_weighted_rows<E, C_PADDED, 2, KEYS>(sums, weights, keys);  // s' and p
    }

    float d_q[C_PADDED / 8][4];
    statistics += (b * H + h) * 2 * rows + q0;
    UNROLLED for (int r = 0; r < 2; r++) {
        error[r] = sum_over_lanes<1, 4>(error[r]);
        UNROLLED for (int n = 0; n < C_PADDED / 8; n++)
            UNROLLED for (int e = 2 * r; e < 2 * r + 2; e++)
                d_q[n][e] = sums[0][n][e] - error[r] * sums[1][n][e];
        if (t == 0) {
            statistics[row0 + g + 8 * r] = log_sum[r];
            statistics[rows + row0 + g + 8 * r] = delta[r] + error[r];
        }
    }
    write_rows<E, C_PADDED>(d_query + ((b * S + q0 + row0) * H + h) * C, (long long)H * C,
                            S - q0 - row0, C, d_q, scale * LN_2, queries + row0 * STRIDE);
}

template <typename E, int C_PADDED>
__global__ void __launch_bounds__(128, 2) key_value_gradients_tensor_cores(
    BACKWARD_INPUTS, E* __restrict__ d_key, E* __restrict__ d_value) {
    constexpr int KEYS = 64, QUERIES = C_PADDED <= 96 ? 64 : 32, STRIDE = C_PADDED + 8;
    extern __shared__ __align__(16) unsigned char shared[];
    E* keys = reinterpret_cast<E*>(shared);  // [KEYS][STRIDE]
    E* values = keys + KEYS * STRIDE;
    E* buffers = values + KEYS * STRIDE;     // [2][queries, gradients][QUERIES][STRIDE]
    float* numbers = reinterpret_cast<float*>(buffers + 4 * QUERIES * STRIDE);  // [2][2][QUERIES]

    const int t0 = blockIdx.x * KEYS;  // the first keys, which most queries see, begin first
    const int k = blockIdx.y, G = H / K;
    const long long b = blockIdx.z;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    query += b * query_b + k * G * query_h;
    gradient += b * gradient_b + k * G * gradient_h;
    statistics += (b * H + k * G) * 2 * rows;
    key += b * key_b + k * key_k + t0 * key_t;
    value += b * value_b + k * value_k + t0 * value_t;
    if (has_mask) mask += b * T;

    // The queries at positions t0 ... t0 + 63 + window - 1, less those that do not exist.
    const int offset = T - S, first = t0 > offset ? (t0 - offset) / QUERIES * QUERIES : 0;
    const int last = t0 + KEYS - 1 + window - offset, end = last < S ? last : S;
    const int tiles = end > first ? (end - first + QUERIES - 1) / QUERIES : 0;  // of each head
    const int row0 = warp * 16, lowest = t0 + row0;  // the warp's first key
    bool seen[2];  // keys g and g + 8
    UNROLLED for (int r = 0; r < 2; r++) {
        const int position = lowest + g + 8 * r;
        seen[r] = position < T && (!has_mask || mask[position]);
    }

    auto copy_queries_and_gradients = [&](int i) {  // i runs through the tiles of all heads
        const int head = i / tiles, q0 = first + i % tiles * QUERIES;
        E* tile = buffers + i % 2 * 2 * QUERIES * STRIDE;
        copy_tile<E, QUERIES, C_PADDED>(
            tile, query + head * query_h + q0 * query_s, query_s, S - q0, C);
        copy_tile<E, QUERIES, C_PADDED>(
            tile + QUERIES * STRIDE, gradient + head * gradient_h + q0 * gradient_s, gradient_s,
            S - q0, C);
        if (threadIdx.x < QUERIES / 2) {  // 4 numbers each
            const int which = threadIdx.x / (QUERIES / 4), q = threadIdx.x % (QUERIES / 4) * 4;
            cp_async_16(numbers + (i % 2 * 2 + which) * QUERIES + q,
                        statistics + (2LL * head + which) * rows + q0 + q, true);
        }
        cp_async_commit();
    };
    if (tiles > 0) {  // else no query sees these keys
        copy_tile<E, KEYS, C_PADDED>(keys, key, key_t, T - t0, C);
        copy_tile<E, KEYS, C_PADDED>(values, value, value_t, T - t0, C);
        copy_queries_and_gradients(0);
    }

    float d_k[1][C_PADDED / 8][4] = {}, d_v[1][C_PADDED / 8][4] = {};
    for (int i = 0; i < tiles * G; i++) {
        cp_async_wait<0>();
        __syncthreads();  // this tile is there for everyone, and everyone has left the other one
        if (i + 1 < tiles * G) copy_queries_and_gradients(i + 1);
        const int from = offset + first + i % tiles * QUERIES;  // the position of the first query
        if (from + QUERIES <= lowest || from >= lowest + 15 + window) continue;
        const E* queries = buffers + i % 2 * 2 * QUERIES * STRIDE;
        const E* gradients = queries + QUERIES * STRIDE;
        const float* log_sum = numbers + i % 2 * 2 * QUERIES;
        const float* delta = log_sum + QUERIES;

        float p[1][QUERIES / 8][4], d_s[1][QUERIES / 8][4];  // at first scores and p'
        multiply_rows<E, C_PADDED, 1, QUERIES>(p, keys + row0 * STRIDE, queries);
        const bool partly = from < lowest + 15 || from + QUERIES - 1 >= lowest + window
            || !seen[0] || !seen[1];
        if (partly) {
            UNROLLED for (int n = 0; n < QUERIES / 8; n++)
                UNROLLED for (int e = 0; e < 4; e++) {
                    const int distance = from + 8 * n + 2 * t + e % 2 - (lowest + g + e / 2 * 8);
                    if (distance < 0 || distance >= window || !seen[e / 2]) p[0][n][e] = NOTHING;
                }
        }
        UNROLLED for (int n = 0; n < QUERIES / 8; n++)
            UNROLLED for (int e = 0; e < 4; e++)
                p[0][n][e] = weight_of(p[0][n][e], scale, log_sum[8 * n + 2 * t + e % 2]);
        add_weighted_rows<E, C_PADDED, 1, QUERIES>(d_v, p, gradients);
        multiply_rows<E, C_PADDED, 1, QUERIES>(d_s, values + row0 * STRIDE, gradients);
        UNROLLED for (int n = 0; n < QUERIES / 8; n++)
            UNROLLED for (int e = 0; e < 4; e++)
                d_s[0][n][e] = p[0][n][e] * (d_s[0][n][e] - delta[8 * n + 2 * t + e % 2]);
        add_weighted_rows<E, C_PADDED, 1, QUERIES>(d_k, d_s, queries);
    }

    const long long start = ((b * T + lowest) * K + k) * C, stride = (long long)K * C;
    write_rows<E, C_PADDED>(d_key + start, stride, T - lowest, C, d_k[0], scale * LN_2,
                            keys + row0 * STRIDE);
    write_rows<E, C_PADDED>(d_value + start, stride, T - lowest, C, d_v[0], 1.0f,
                            values + row0 * STRIDE);
}
"""

# ---- Products of few rows ------------------------------------------------------------------------

LINEAR = HEADER + r"""
// y = x W^T for up to ROWS rows x, as decoding has: each warp computes 2 outputs.
//
//     weight, row o     | lane 0 | lane 1 | ... | lane 31 | lane 0 | ...     N elements each
//     weight, row o + 1 | lane 0 | lane 1 | ... | lane 31 | lane 0 | ...
//     x, every row      | lane 0 | lane 1 | ... | lane 31 | lane 0 | ...
//
// A lane reads UNROLL vectors of both weight rows before it uses the first, multiplies them with
// the same columns of every x, and adds in float32; at the end the 32 lanes' sums are added.
//
// The weight is read once, for 2 ROWS operations per element: with one row in 16 bits 1 operation
// per byte. The limit is the memory's bandwidth. The x are small and come from the caches, once for
// two outputs: with 8 rows 4 bytes of x per byte of the weight, about what an L1 cache can give.
template <typename E, int N, int ROWS>
__global__ void __launch_bounds__(128) linear(
    const E* __restrict__ x, const E* __restrict__ weight, E* __restrict__ y,
    long long x_row, long long weight_row, int rows, int in, int out) {
    constexpr int OUTPUTS = 2, STEP = 32 * N, UNROLL = ROWS == 8 ? 2 : 4;
    const int lane = threadIdx.x % 32, o = (blockIdx.x * 4 + threadIdx.x / 32) * OUTPUTS;
    const E* start[OUTPUTS];  // past the end, the last row is read again, and not written
    UNROLLED for (int j = 0; j < OUTPUTS; j++)
        start[j] = weight + (o + j < out ? o + j : out - 1) * weight_row;

    float sum[OUTPUTS][ROWS] = {};
    for (int i0 = lane * N; i0 < in; i0 += STEP * UNROLL) {
        Vector<E, N> w[UNROLL][OUTPUTS] = {};
        UNROLLED for (int u = 0; u < UNROLL; u++)
            UNROLLED for (int j = 0; j < OUTPUTS; j++)
                if (i0 + u * STEP < in)
                    w[u][j] = *reinterpret_cast<const Vector<E, N>*>(start[j] + i0 + u * STEP);
        UNROLLED for (int u = 0; u < UNROLL; u++)
            UNROLLED for (int r = 0; r < ROWS; r++) {
                const int i = i0 + u * STEP;
                if (r >= rows || i >= in) continue;
                const auto v = *reinterpret_cast<const Vector<E, N>*>(x + r * x_row + i);
                UNROLLED for (int j = 0; j < OUTPUTS; j++)
                    UNROLLED for (int n = 0; n < N; n++)
                        sum[j][r] += to_float(w[u][j].element[n]) * to_float(v.element[n]);
            }
    }
    UNROLLED for (int j = 0; j < OUTPUTS; j++)
        UNROLLED for (int r = 0; r < ROWS; r++) {
            const float total = sum_over_lanes<1, 32>(sum[j][r]);
            if (lane == 0 && r < rows && o + j < out)
                y[(long long)r * out + o + j] = from_float<E>(total);
        }
}
"""

# ---- SiLU ----------------------------------------------------------------------------------------

SILU = HEADER + r"""
// y = x s, where s = 1 / (1 + e^-x), and its derivative, x' = y' s (1 + x (1 - s)). Each thread has
// N neighbouring elements; rows may be parts of longer ones, as the gate is of the fused product.
//
// In 16 bits, y takes 4 bytes per element (x read, y written), x' takes 6. Step by step, as NumPy
// has it, with every intermediate in float32 written and read again, they were 48 and 102. The
// limit is the memory's bandwidth.
template <typename E, int N> __device__ __forceinline__
Vector<E, N> silu_of(Vector<E, N> x) {
    Vector<E, N> y;
    UNROLLED for (int n = 0; n < N; n++) {
        const float wide = to_float(x.element[n]);  // where e^-x is infinite, the limit: -0
        y.element[n] = from_float<E>(wide / (1.0f + expf(-wide)));
    }
    return y;
}

template <typename E, int N>
__global__ void __launch_bounds__(256) silu(
    const E* __restrict__ x, E* __restrict__ y, long long x_row, int D) {
    const int i = blockIdx.y * 256 + threadIdx.x;
    const long long row = blockIdx.x;
    if (i >= D / N) return;
    reinterpret_cast<Vector<E, N>*>(y + row * D)[i] =
        silu_of(reinterpret_cast<const Vector<E, N>*>(x + row * x_row)[i]);
}

template <typename E, int N>
__global__ void __launch_bounds__(256) silu_backward(
    const E* __restrict__ gradient, const E* __restrict__ x, E* __restrict__ d_x,
    long long gradient_row, long long x_row, int D) {
    const int i = blockIdx.y * 256 + threadIdx.x;
    const long long row = blockIdx.x;
    if (i >= D / N) return;
    const auto d_y = reinterpret_cast<const Vector<E, N>*>(gradient + row * gradient_row)[i];
    const auto held = reinterpret_cast<const Vector<E, N>*>(x + row * x_row)[i];
    Vector<E, N> result;
    UNROLLED for (int n = 0; n < N; n++) {
        const float wide = to_float(held.element[n]), s = 1.0f / (1.0f + expf(-wide));
        result.element[n] = from_float<E>(
            to_float(d_y.element[n]) * (s * (1.0f + wide * (1.0f - s))));
    }
    reinterpret_cast<Vector<E, N>*>(d_x + row * D)[i] = result;
}
"""

# ---- The embedding, backward ---------------------------------------------------------------------

TOKEN_EMBEDDING_BACKWARD = HEADER + r"""
// Row v of the table's gradient sums the rows of `gradient` at the positions where the id v stood.
// `order` lists the positions by their ids, and those of one id from first to last: a run each.
//
//     ids[order]    0  0  0  0  0  0  0  0  0  7  9  9  9      run of 0, of 7, of 9
//     block         0  .  .  .  .  .  .  .  .  9 10  .  .      . finds that it begins no run
//     block 0: warp 0  1  2  3  4  5  6  7  0                  then the warps' sums, in order
//
// One block per position and 32 N columns. Only the block at the beginning of a run does anything:
// its 8 warps take the run's positions in turn, so that a frequent id, such as that of padding, is
// not one long chain: with the 12 blocks of 3072 columns in 16 bits, 4,096 equal ids are 96 warps,
// that read 512 rows each, 16 bytes a lane, 4 rows at once. No two blocks write the same elements,
// and each sum has one order.
//
// Bytes, for [4096, 3072] in 16 bits: 25 MB are read, at most 50 MB written; the table of 32,064
// rows, 394 MB of zeros, is the most of it. The sorting is of 4,096 numbers.
template <typename E, int N>
__global__ void __launch_bounds__(256) token_embedding_backward(
    const E* __restrict__ gradient, const long long* __restrict__ ids,
    const long long* __restrict__ order, float* __restrict__ table, long long gradient_row,
    int count, int D) {
    constexpr int WARPS = 8, HELD = 4;
    const int first = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int column = (blockIdx.y * 32 + lane) * N;
    const long long id = ids[order[first]];
    if (first > 0 && ids[order[first - 1]] == id) return;

    float sum[N] = {};
    bool more = true;
    for (int i = first + warp; more; i += WARPS * HELD) {
        Vector<E, N> held[HELD];
        bool same[HELD];
        UNROLLED for (int h = 0; h < HELD; h++) {
            const int j = i + h * WARPS;
            same[h] = j < count && ids[order[j]] == id;
            if (same[h] && column < D)
                held[h] = *reinterpret_cast<const Vector<E, N>*>(
                    gradient + order[j] * gradient_row + column);
        }
        UNROLLED for (int h = 0; h < HELD; h++)
            if (same[h] && column < D)
                UNROLLED for (int n = 0; n < N; n++) sum[n] += to_float(held[h].element[n]);
        more = same[HELD - 1];
    }

    __shared__ float sums[WARPS][N][32];
    UNROLLED for (int n = 0; n < N; n++) sums[warp][n][lane] = sum[n];
    __syncthreads();
    if (warp > 0 || column >= D) return;
    UNROLLED for (int n = 0; n < N; n++) {
        float total = 0.0f;
        UNROLLED for (int w = 0; w < WARPS; w++) total += sums[w][n][lane];
        table[id * D + column + n] = total;
    }
}
"""

# ---- Cross entropy -------------------------------------------------------------------------------

CROSS_ENTROPY = HEADER + r"""
// Of a row of logits l and its label, the share w / N times -log p_label, and the gradient of l,
// w / N (p - (v == label)), where p = softmax(l); one block per row. Each thread goes over its
// vectors with an online softmax, a running peak and the total of e^(l - peak), which shrinks where
// the peak rises; the block brings them to one peak. With it, the row is read again, and gone over
// element by element.
//
// In 16 bits, 4 bytes per logit: read once from memory, the second time mostly from the L2 cache
// (64 KB a row of 32,064), and written once. Step by step, as NumPy has it: 50, and in float32 a
// copy of the logits, the largest array of a step. The limit is the memory's bandwidth.
template <typename E, int N>
__global__ void __launch_bounds__(512) cross_entropy(
    const E* __restrict__ logits, const long long* __restrict__ labels,
    const float* __restrict__ share, float* __restrict__ loss, E* __restrict__ gradient,
    long long logits_row, int V) {
    constexpr int HELD = 4;
    const long long row = blockIdx.x;
    const auto in = reinterpret_cast<const Vector<E, N>*>(logits + row * logits_row);
    const auto out = reinterpret_cast<Vector<E, N>*>(gradient + row * V);
    const int count = V / N, threads = blockDim.x, warps = threads / 32;

    float peak = -3.4e38f, total = 0.0f;  // lower than any number; exp(-infinity - peak) is 0
    for (int i = threadIdx.x; i < count; i += threads * HELD) {
        Vector<E, N> held[HELD];
        UNROLLED for (int h = 0; h < HELD; h++)
            if (i + h * threads < count) held[h] = in[i + h * threads];
        UNROLLED for (int h = 0; h < HELD; h++) {
            if (i + h * threads >= count) continue;
            const float old = peak;
            UNROLLED for (int n = 0; n < N; n++) peak = fmaxf(peak, to_float(held[h].element[n]));
            total *= expf(old - peak);
            UNROLLED for (int n = 0; n < N; n++) total += expf(to_float(held[h].element[n]) - peak);
        }
    }
    __shared__ float warp_peak[16], warp_total[16];
    const float own = peak;
    peak = highest_over_lanes<1, 32>(peak);
    if (threadIdx.x % 32 == 0) warp_peak[threadIdx.x / 32] = peak;
    __syncthreads();
    for (int w = 0; w < warps; w++) peak = fmaxf(peak, warp_peak[w]);
    total = sum_over_lanes<1, 32>(total * expf(own - peak));
    if (threadIdx.x % 32 == 0) warp_total[threadIdx.x / 32] = total;
    __syncthreads();
    total = 0.0f;
    for (int w = 0; w < warps; w++) total += warp_total[w];

    const long long label = labels[row];
    const float part = share[row], inverse = 1.0f / total;
    if (threadIdx.x == 0)
        loss[row] = part * (logf(total) - (to_float(logits[row * logits_row + label]) - peak));
    for (int i = threadIdx.x; i < count; i += threads) {
        const Vector<E, N> x = in[i];
        Vector<E, N> d_x;
        UNROLLED for (int n = 0; n < N; n++) {
            const float p = expf(to_float(x.element[n]) - peak) * inverse;
            d_x.element[n] = from_float<E>((i * N + n == label ? p - 1.0f : p) * part);
        }
        out[i] = d_x;
    }
}
"""

# ---- A sum of squares ----------------------------------------------------------------------------

SUM_OF_SQUARES = HEADER + r"""
// The sum of x^2, which says whether a gradient is finite, and how long it is. Blocks take vectors
// in turn, each thread HELD at once; then a second launch, of one block, adds up the partial sums.
// Every element is read once, 4 bytes; CuPy's vdot writes and reads the squares, too: 12 bytes. The
// limit is the memory's bandwidth.
template <int N, bool SQUARE>
__global__ void __launch_bounds__(512) sum_of(
    const float* __restrict__ x, float* __restrict__ partial, long long count) {
    constexpr int HELD = 4;
    const auto in = reinterpret_cast<const Vector<float, N>*>(x);
    const long long step = 512LL * gridDim.x;
    float sum = 0.0f;
    for (long long i = blockIdx.x * 512LL + threadIdx.x; i < count; i += step * HELD) {
        Vector<float, N> held[HELD] = {};
        UNROLLED for (int h = 0; h < HELD; h++)
            if (i + h * step < count) held[h] = in[i + h * step];
        UNROLLED for (int h = 0; h < HELD; h++)
            UNROLLED for (int n = 0; n < N; n++)
                sum += SQUARE ? held[h].element[n] * held[h].element[n] : held[h].element[n];
    }
    __shared__ float warp_sum[16];
    sum = sum_over_lanes<1, 32>(sum);
    if (threadIdx.x % 32 == 0) warp_sum[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x > 0) return;
    sum = 0.0f;
    for (int warp = 0; warp < 16; warp++) sum += warp_sum[warp];
    partial[blockIdx.x] = sum;
}
"""

# ---- AdamW ---------------------------------------------------------------------------------------

ADAM_STEP = HEADER + r"""
// One step of AdamW with one array, of which each thread takes N neighbouring elements:
//
//     g = gradient factor    m += (1 - beta_1) (g - m)    v += (1 - beta_2) (g^2 - v)
//     weight = weight decay - rate m / (sqrt(v) + epsilon)
//
// Per element, weight, gradient, m and v are read and all but the gradient written: 28 bytes, or 24
// with weights in 16 bits. Step by step, as NumPy has it, every intermediate is written and read
// again: 136 and 140 bytes, in 14 kernels. The limit is the memory's bandwidth.
template <typename E, int N>
__global__ void __launch_bounds__(256) adam_step(
    E* __restrict__ weight, const float* __restrict__ gradient, float* __restrict__ m,
    float* __restrict__ v, const float* __restrict__ factor, long long count, float decay,
    float rate, float new_1, float new_2, float epsilon) {
    const long long i = blockIdx.x * 256LL + threadIdx.x;
    if (i >= count) return;
    const auto weights = reinterpret_cast<Vector<E, N>*>(weight) + i;
    const auto means = reinterpret_cast<Vector<float, N>*>(m) + i;
    const auto squares = reinterpret_cast<Vector<float, N>*>(v) + i;
    Vector<E, N> w = *weights;
    Vector<float, N> mean = *means, square = *squares;
    const auto given = reinterpret_cast<const Vector<float, N>*>(gradient)[i];
    const float shrink = *factor;
    UNROLLED for (int n = 0; n < N; n++) {
        const float g = given.element[n] * shrink;
        mean.element[n] += new_1 * (g - mean.element[n]);
        square.element[n] += new_2 * (g * g - square.element[n]);
        w.element[n] = from_float<E>(
            to_float(w.element[n]) * decay
            - rate * mean.element[n] / (sqrtf(square.element[n]) + epsilon));
    }
    *weights = w;
    *means = mean;
    *squares = square;
}
"""

# ---- Compiling and launching ---------------------------------------------------------------------

TYPES = {"float32": "float", "float16": "__half", "bfloat16": "__nv_bfloat16"}  # NumPy's, CUDA's
# The instances of the templates: (C_PADDED, M) of the tensor cores' kernel, (COLUMNS, ROWS) of the
# decode kernel with the blocks that a multiprocessor's registers hold (its __launch_bounds__).
TENSOR_CORE_TILES = [(C, M) for C in (32, 64, 80, 96, 128, 160, 192, 256) for M in (1, 2)
                     if M == 1 or C <= 128]
BACKWARD_COLUMNS = (32, 64, 96, 128)  # C_PADDED of its derivative
DECODE_BLOCKS = {(64, 1): 4, (64, 4): 3, (64, 8): 2, (128, 1): 4, (128, 4): 3, (128, 8): 2,
                 (256, 1): 4, (256, 4): 2}
LINEAR_ROWS = (1, 2, 4, 8)


def instances():
    """Return every (source, name expression) that the launchers can ask `load_kernel` for."""
    found = [(RMS_NORM_BACKWARD, "rms_norm_backward_scale")]
    found += [(SUM_OF_SQUARES, f"sum_of<{N}>") for N in ("1, true", "4, true", "1, false")]
    for E in TYPES.values():
        found += [(ADAM_STEP, f"adam_step<{E}, {N}>") for N in (1, 4)]
        for N in (1, 4 if E == "float" else 8):
            found += [(SILU, f"{name}<{E}, {N}>") for name in ("silu", "silu_backward")]
            found += [(TOKEN_EMBEDDING_BACKWARD, f"token_embedding_backward<{E}, {N}>")]
            found += [(CROSS_ENTROPY, f"cross_entropy<{E}, {N}>")]
            found += [(RMS_NORM, f"rms_norm<{E}, {N}>")]
            found += [(RMS_NORM_BACKWARD, f"rms_norm_backward<{E}, {N}>")]
            found += [(LINEAR, f"linear<{E}, {N}, {rows}>") for rows in LINEAR_ROWS]
        found += [(ATTENTION_TILED, f"attention_tiled<{E}>")]
        found += [(ATTENTION_BACKWARD_TILED, f"{name}_tiled<{E}>")
                  for name in ("query_gradient", "key_value_gradients")]
        found += [(ATTENTION_DECODE, f"attention_combine<{E}>")]
        found += [(ATTENTION_DECODE, f"attention_decode<{E}, {columns}, {rows}>")
                  for columns, rows in DECODE_BLOCKS]
        if E != "float":
            found += [(ATTENTION_TENSOR_CORES, f"attention_tensor_cores<{E}, {C}, {M}>")
                      for C, M in TENSOR_CORE_TILES]
            found += [(ATTENTION_BACKWARD_TENSOR_CORES, f"{name}_tensor_cores<{E}, {C}>")
                      for name in ("query_gradient", "key_value_gradients")
                      for C in BACKWARD_COLUMNS]
    return found


@functools.cache
def load_kernel(source, name_expression):
    """Compile one instance of a kernel's template for this GPU; return it, ready to launch.

    Args:
        source: str, CUDA C++.
        name_expression: str, such as "rms_norm<__half, 8>".

    Returns:
        A function (grid, block, arguments, shared_mem=0): tuples of up to 3 int, a tuple of arrays
        and NumPy scalars, and the bytes of dynamic shared memory.
    """
    module = array_module.RawModule(
        code=source, options=("-std=c++17",), name_expressions=(name_expression,))
    kernel = module.get_function(name_expression)
    # More than 48 KB must be asked for; asking for all that a block may have costs nothing.
    kernel.max_dynamic_shared_size_bytes = gpu_limits()[2] - kernel.shared_size_bytes
    return kernel


@functools.cache
def gpu_limits():
    """Return the GPU's compute capability (90: 9.0), multiprocessors, shared bytes per block."""
    device = array_module.cuda.Device()
    return (int(device.compute_capability), device.attributes["MultiProcessorCount"],
            device.attributes["MaxSharedMemoryPerBlockOptin"])


def require(condition, message, error=ValueError):
    """Raise `error` with `message` unless `condition` holds."""
    if not condition:
        raise error(message)


INSTALL = ('pip install "cupy-cuda13x[ctk]>=14", or "cupy-cuda12x[ctk]>=14" where nvidia-smi says '
           "CUDA 12")


def load_cupy():
    """Return CuPy, or say what stands in its way and what to do.

    Raises:
        ImportError: CuPy is missing, too old for bfloat16, or there twice.
        RuntimeError: there is no GPU, or its driver is older than CuPy.
    """
    packages = [name for name in ("cupy", "cupy-cuda11x", "cupy-cuda12x", "cupy-cuda13x")
                if any(importlib.metadata.distributions(name=name))]
    remove = f"pip uninstall {' '.join(packages) or 'cupy'}"
    require(len(packages) < 2, "Each of these packages breaks the other, as both bring CuPy: "
            f"{remove}; then {INSTALL}", ImportError)
    try:
        import cupy
    except ImportError as error:
        raise ImportError(f"A GPU needs CuPy: {INSTALL}. ({error})") from error
    require(int(cupy.__version__.split(".")[0]) >= 14,
            f"CuPy {cupy.__version__} is too old: {INSTALL}", ImportError)
    runtime = cupy.cuda.runtime
    driver, built_for = runtime.driverGetVersion() // 1000, runtime.runtimeGetVersion() // 1000
    require(driver == 0 or driver >= built_for,  # 0: there is no driver
            f"The driver is of CUDA {driver}, CuPy of CUDA {built_for}: update the driver, or "
            f"{remove}; then {INSTALL}", RuntimeError)
    try:
        runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        raise RuntimeError("CuPy finds no NVIDIA GPU with its driver: install the driver, or "
                           f'choose backend="numpy". ({error})') from error
    return cupy


def check_array(name, array, shape, like=None, dtype=None):
    """Check an array's type, its shape (None: any) and, if given, that it matches the array `like`.

    Args:
        name: str, the argument's.
        array: what was passed.
        shape: tuple of int or None.
        like: array whose device `array` must share, and whose dtype, unless `array` is a mask.
        dtype: str, what it must be of in the place of the dtype of `like`; or None.
    """
    require(array_module is not None, f"The kernels need CuPy and an NVIDIA GPU: {INSTALL}",
            ImportError)
    require(isinstance(array, array_module.ndarray), f"`{name}` must be a "
            f"{array_module.__name__}.ndarray. Received: {type(array)}", TypeError)
    wanted = ", ".join("any" if size is None else str(size) for size in shape)
    require(len(array.shape) == len(shape) and all(
        want in (None, size) for want, size in zip(shape, array.shape, strict=True)),
        f"`{name}` must be of shape ({wanted}). Received: {array.shape}")
    if like is not None:
        here, there = (getattr(a, "device", None) for a in (array, like))
        require(here == there, f"`{name}` must be on {there}, as the first argument is. "
                f"Received: {here}")
    if name == "padding_mask":
        return
    dtypes = dtype or (" or ".join(TYPES) if like is None else like.dtype.name)
    require(array.dtype.name in dtypes.split(" or "),
            f"`{name}` must be of dtype {dtypes}. Received: {array.dtype}")
    require(array.size == 0 or array.shape[-1] == 1 or array.strides[-1] == array.itemsize,
            f"`{name}` must be contiguous in its last axis. Received: strides {array.strides}")


def address(array):
    """Return where in memory an array begins, an int."""
    return array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr


def in_vectors(*arrays):
    """Say whether each array's rows, along its last axis, are whole 16-byte vectors, aligned."""
    def is_aligned(array):
        return all(step % 16 == 0 for step in (
            address(array), array.shape[-1] * array.itemsize, *(
                stride for stride, size in zip(array.strides[:-1], array.shape[:-1], strict=True)
                if size > 1)))
    return all(map(is_aligned, arrays))


def divide_up(a, b):
    """Return a / b, rounded up."""
    return -(-a // b)


def rms_norm(x, scale, epsilon):
    """Divide each vector by its root mean square, then scale its components: phi3_ref's `rms_norm`.

    Args:
        x: [..., D], float32, float16 or bfloat16, on the GPU.
        scale: [D], in the dtype of `x`.
        epsilon: float, added to the mean square.

    Returns:
        Like `x`, contiguous; computed in float32, rounded once.
    """
    check_array("x", x, (None,) * max(1, getattr(x, "ndim", 1)))
    D = x.shape[-1]
    check_array("scale", scale, (D,), like=x)
    y = array_module.empty(x.shape, x.dtype)
    if x.size == 0:
        return y
    rows = x.reshape(-1, D)  # a copy only where no single stride leads through all rows
    N = 16 // x.itemsize if in_vectors(rows, scale) else 1
    threads = min(512, 32 * divide_up(D, 32 * N * (16 if N == 1 else 4)))
    load_kernel(RMS_NORM, f"rms_norm<{TYPES[x.dtype.name]}, {N}>")(
        (len(rows),), (threads,), (rows, scale, y, np.int64(rows.strides[0] // x.itemsize),
                                   np.int32(D), np.float32(epsilon)))
    return y


def rms_norm_backward(gradient, x, scale, epsilon):
    """Return the gradients of `rms_norm`'s x and scale: phi3_ref's `rms_norm_backward`.

    Args:
        gradient: [..., D], in the dtype of `x`; that of the result.
        x: [..., D], float32, float16 or bfloat16, on the GPU.
        scale: [D], in the dtype of `x`.
        epsilon: float, added to the mean square.

    Returns:
        The first like `x`, contiguous; computed in float32, rounded once. The second [D], float32.
    """
    check_array("x", x, (None,) * max(1, getattr(x, "ndim", 1)))
    D = x.shape[-1]
    check_array("gradient", gradient, x.shape, like=x)
    check_array("scale", scale, (D,), like=x)
    d_x = array_module.empty(x.shape, x.dtype)
    if x.size == 0:
        return d_x, array_module.zeros(D, np.float32)
    gradients, rows = gradient.reshape(-1, D), x.reshape(-1, D)  # as in `rms_norm`
    N = 16 // x.itemsize if in_vectors(gradients, rows, scale) else 1
    threads = min(512, 32 * divide_up(D, 32 * N * (8 if N == 1 else 4)))
    # As many blocks as surely run at once: 512 threads of 128 registers fill a multiprocessor.
    blocks = min(len(rows), gpu_limits()[1] * (512 // threads))
    partial, d_scale = (array_module.empty(shape, np.float32) for shape in ((blocks, D), D))
    load_kernel(RMS_NORM_BACKWARD, f"rms_norm_backward<{TYPES[x.dtype.name]}, {N}>")(
        (blocks,), (threads,), (
            gradients, rows, scale, d_x, partial,
            *(np.int64(a.strides[0] // x.itemsize) for a in (gradients, rows)),
            *map(np.int32, (len(rows), D)), np.float32(epsilon)))
    load_kernel(RMS_NORM_BACKWARD, "rms_norm_backward_scale")(
        (divide_up(D, 32),), (32 * min(16, blocks),),
        (partial, d_scale, *map(np.int32, (blocks, D))))
    return d_x, d_scale


def attention_inputs(query, key, value, padding_mask, sliding_window):
    """Check the arguments of `attention`; return what ATTENTION_INPUTS lists."""
    check_array("query", query, (None,) * 4)
    B, S, H, C = query.shape
    check_array("key", key, (B, None, None, C), like=query)
    T, K = key.shape[1:3]
    check_array("value", value, key.shape, like=query)
    require(K and H % K == 0, f"`query` must have a multiple of `key`'s {K} heads. Received: {H}")
    require(S <= T, f"`query` must have at most `key`'s {T} positions. Received: {S}")
    require(sliding_window is None or sliding_window >= 0,
            f"`sliding_window` must be None or at least 0 (none). Received: {sliding_window}")
    has_mask = padding_mask is not None
    if has_mask:
        check_array("padding_mask", padding_mask, (B, T), like=query)
        mask = array_module.ascontiguousarray(padding_mask, dtype=bool)
    else:
        mask = array_module.empty(1, bool)  # the kernels do not look at it
    strides = [stride // query.itemsize for array in (query, key, value)
               for stride in array.strides[:3]]
    window, scale = min(sliding_window or T, T), np.float32(max(C, 1)**-0.5 * math.log2(math.e))
    return (query, key, value, mask, np.int32(has_mask), *map(np.int64, strides),
            *map(np.int32, (S, T, H, K, C, window)), scale)


def attention(query, key, value, padding_mask=None, sliding_window=None, log_sum_exp=None):
    """Causal grouped-query attention that never holds the score matrix: phi3_ref's `attention`.

    Args:
        query: [B, S, H, C], float32, float16 or bfloat16, on the GPU; the queries are the last S of
            the T positions. It may be a slice of the fused projection, and so may the next two.
        key: [B, T, K, C]; query head h reads key/value head h // (H // K).
        value: [B, T, K, C].
        padding_mask: [B, T], bool or 0/1, or None; keys with 0 are seen by nobody.
        sliding_window: int or None; a query sees itself and the `sliding_window - 1` keys before.
        log_sum_exp: [B, H, S], float32, contiguous, to be filled with log(sum(exp(score))) over the
            keys that a query sees, 0 where it sees none; or None.

    Returns:
        [B, S, H, C], contiguous, in the dtype of `query`. Rows that see no key are zero.
    """
    inputs = attention_inputs(query, key, value, padding_mask, sliding_window)
    (B, S, H, C), (T, K) = query.shape, key.shape[1:3]
    if log_sum_exp is not None:
        check_array("log_sum_exp", log_sum_exp, (B, H, S), query, "float32")
        require(log_sum_exp.flags.c_contiguous, "`log_sum_exp` must be contiguous, as it is "
                f"written. Received: strides {log_sum_exp.strides}")
    output = array_module.empty((B, S, H, C), query.dtype)
    if output.size == 0:
        return output

    E, G = TYPES[query.dtype.name], H // K
    capability, multiprocessors, shared_memory = gpu_limits()
    fast = C <= 256 and in_vectors(query, key, value)
    outputs = output, np.uint64(0) if log_sum_exp is None else log_sum_exp  # 0: a null pointer

    if fast and S <= 8:
        columns = next(columns for columns in (64, 128, 256) if columns >= C)
        rows = 1 if S * G == 1 else 4 if S * G <= 4 or columns == 256 else 8
        heads = K * divide_up(S * G, rows)
        # As many blocks as run at once, each with at least one round of 64 keys.
        keys = min(T, (sliding_window or T) + S - 1)
        blocks = DECODE_BLOCKS[columns, rows] * multiprocessors
        splits = max(1, min(blocks // (B * heads), divide_up(keys, 64)))
        per_split = divide_up(keys, splits)
        splits = divide_up(keys, per_split)
        mixed, sums = (array_module.empty((B * K * S * G, splits, size), np.float32)
                       for size in (C, 2))
        load_kernel(ATTENTION_DECODE, f"attention_decode<{E}, {columns}, {rows}>")(
            (splits, heads, B), (128,), (*inputs, mixed, sums, np.int32(per_split)))
        load_kernel(ATTENTION_DECODE, f"attention_combine<{E}>")(
            (B * K * S * G,), (32 * divide_up(C, 32),),
            (mixed, sums, *outputs, *map(np.int32, (S, H, K, C, splits))))
        return output

    if fast and query.itemsize == 2 and capability >= 80:
        padded = next(columns for columns, _ in TENSOR_CORE_TILES if columns >= C)
        for M in (2, 1):  # 128 queries per block if there is work for all with so few, else 64
            tiles = divide_up(S, 64 * M)
            shared = (64 * M + 4 * (64 if padded <= 128 else 32)) * (padded + 8) * 2
            enough = M == 1 or tiles * H * B >= 2 * multiprocessors
            if (padded, M) in TENSOR_CORE_TILES and enough and shared <= shared_memory:
                load_kernel(ATTENTION_TENSOR_CORES, f"attention_tensor_cores<{E}, {padded}, {M}>")(
                    (tiles, H, B), (128,), (*inputs, *outputs), shared_mem=shared)
                return output

    load_kernel(ATTENTION_TILED, f"attention_tiled<{E}>")(
        (divide_up(S, 64), H * divide_up(C, 128), B), (256,), (*inputs, *outputs))
    return output


def attention_backward(gradient, query, key, value, padding_mask=None, sliding_window=None,
                       context=None, log_sum_exp=None):
    """Return the gradients of attention's query, key and value: phi3_ref's `attention_backward`.

    Args:
        gradient: [B, S, H, C], that of the result, in the dtype of `query`.
        query, key, value, padding_mask, sliding_window: as for `attention`.
        context: [B, S, H, C], what `attention` has returned, in the dtype of `query`.
        log_sum_exp: [B, H, S], float32, what it has filled. Without the two it is called again.

    Returns:
        [B, S, H, C], [B, T, K, C] and [B, T, K, C], contiguous, in the dtype of `query`; summed in
        float32, rounded once. Queries that see no key, and keys that nobody sees, have zeros.
    """
    inputs = attention_inputs(query, key, value, padding_mask, sliding_window)
    (B, S, H, C), (T, K) = query.shape, key.shape[1:3]
    check_array("gradient", gradient, query.shape, like=query)
    d_query, d_key, d_value = (array_module.empty(array.shape, query.dtype)
                               for array in (query, key, value))
    if key.size == 0:
        return d_query, d_key, d_value

    if context is None or log_sum_exp is None:
        log_sum_exp = array_module.empty((B, H, S), np.float32)
        context = attention(query, key, value, padding_mask, sliding_window, log_sum_exp)
    check_array("context", context, query.shape, like=query)
    check_array("log_sum_exp", log_sum_exp, (B, H, S), query, "float32")
    context, log_sum_exp = map(array_module.ascontiguousarray, (context, log_sum_exp))
    E, rows = TYPES[query.dtype.name], 64 * divide_up(S, 64)
    statistics = array_module.empty((B, H, 2, rows), np.float32)
    inputs += (gradient, *(np.int64(stride // query.itemsize) for stride in gradient.strides[:3]),
               statistics, np.int32(rows))

    if (query.itemsize == 2 and gpu_limits()[0] >= 80 and C <= 128
            and in_vectors(gradient, query, key, value, context)):
        padded = next(columns for columns in BACKWARD_COLUMNS if columns >= C)
        source, others = ATTENTION_BACKWARD_TENSOR_CORES, 64 if padded <= 96 else 32
        shared = (128 + 4 * others) * (padded + 8) * 2
        if query.size:
            load_kernel(source, f"query_gradient_tensor_cores<{E}, {padded}>")(
                (divide_up(S, 64), H, B), (128,), (*inputs, context, log_sum_exp, d_query),
                shared_mem=shared)
        load_kernel(source, f"key_value_gradients_tensor_cores<{E}, {padded}>")(
            (divide_up(T, 64), K, B), (128,), (*inputs, d_key, d_value),
            shared_mem=shared + 4 * others * 4)
        return d_query, d_key, d_value

    chunks = divide_up(C, 128)
    if query.size:
        load_kernel(ATTENTION_BACKWARD_TILED, f"query_gradient_tiled<{E}>")(
            (divide_up(S, 64), H * chunks, B), (256,), (*inputs, context, log_sum_exp, d_query))
    load_kernel(ATTENTION_BACKWARD_TILED, f"key_value_gradients_tiled<{E}>")(
        (divide_up(T, 64), K * chunks, B), (256,), (*inputs, d_key, d_value))
    return d_query, d_key, d_value


def linear(x, weight):
    """Apply a dense layer without bias to up to 8 vectors: phi3_ref's `linear`.

    Args:
        x: [..., in], float32, float16 or bfloat16, on the GPU; at most 8 vectors.
        weight: [out, in], in the dtype of `x`.

    Returns:
        [..., out], in the dtype of `x`; summed in float32, rounded once.
    """
    check_array("x", x, (None,) * max(1, getattr(x, "ndim", 1)))
    size = x.shape[-1]
    check_array("weight", weight, (None, size), like=x)
    rows, out = x.reshape(-1, size), len(weight)
    require(len(rows) <= LINEAR_ROWS[-1],
            f"`x` must be of at most {LINEAR_ROWS[-1]} vectors. Received: {len(rows)}")
    y = array_module.empty((len(rows), out), x.dtype)
    if y.size:
        N = 16 // x.itemsize if in_vectors(rows, weight) else 1
        most = next(most for most in LINEAR_ROWS if most >= len(rows))
        load_kernel(LINEAR, f"linear<{TYPES[x.dtype.name]}, {N}, {most}>")(
            (divide_up(out, 8),), (128,), (
                rows, weight, y, *(np.int64(a.strides[0] // x.itemsize) for a in (rows, weight)),
                *map(np.int32, (len(rows), size, out))))
    return y.reshape(*x.shape[:-1], out)


def transposed_matmul(x, y):
    """Multiply two matrices of 16 bits as `x.T @ y`, summed by the tensor cores, in float32.

    CuPy's own product rounds to 16 bits; cuBLAS, which it calls, need not.

    Args:
        x: [n, M], float16 or bfloat16, on the GPU.
        y: [n, N], in the dtype of `x`.

    Returns:
        [M, N], float32.

    Source: https://docs.nvidia.com/cuda/cublas, cublasGemmEx.
    """
    check_array("x", x, (None, None))
    (n, M), N = x.shape, y.shape[-1]
    check_array("y", y, (n, N), like=x)
    if 0 in (n, M, N):
        return array_module.zeros((M, N), np.float32)
    require(x.itemsize == 2, f"`x` must be of 16 bits. Received: {x.dtype}")
    x, y = map(array_module.ascontiguousarray, (x, y))
    product = array_module.empty((M, N), np.float32)
    cuda, numbers = array_module.cuda, np.array([1, 0], np.float32)
    runtime, cublas = cuda.runtime, cuda.cublas
    dtype = runtime.CUDA_R_16F if x.dtype == np.float16 else runtime.CUDA_R_16BF
    # To cuBLAS, which reads by columns, every matrix of ours is its transpose. It is to write the
    # product's, y^T x, [N, M]: y^T is what it sees of y, x what it sees of x transposed.
    cublas.gemmEx(
        cuda.device.get_cublas_handle(), cublas.CUBLAS_OP_N, cublas.CUBLAS_OP_T, N, M, n,
        address(numbers), address(y), dtype, N, address(x), dtype, M,
        address(numbers[1:]), address(product), runtime.CUDA_R_32F, N,
        cublas.CUBLAS_COMPUTE_32F, cublas.CUBLAS_GEMM_DEFAULT)
    return product


def silu(x):
    """Return `x * sigmoid(x)`: phi3_ref's `silu`.

    Args:
        x: [..., F], float32, float16 or bfloat16, on the GPU.

    Returns:
        Like `x`, contiguous; computed in float32, rounded once.
    """
    return by_rows("silu", x)


def silu_backward(gradient, x):
    """Return the gradient of `silu`'s x: phi3_ref's `silu_backward`.

    Args:
        gradient: [..., F], in the dtype of `x`; that of the result.
        x: [..., F], float32, float16 or bfloat16, on the GPU.

    Returns:
        Like `x`, contiguous; computed in float32, rounded once.
    """
    return by_rows("silu_backward", gradient, x)


def by_rows(name, *arrays):
    """Launch a kernel of SILU's: rows of the arrays, and of a new one like them."""
    *_, x = arrays
    check_array("x", x, (None,) * max(1, getattr(x, "ndim", 1)))
    check_array("gradient", arrays[0], x.shape, like=x)
    result, D = array_module.empty(x.shape, x.dtype), x.shape[-1]
    if x.size:
        rows = [array.reshape(-1, D) for array in arrays]  # as in `rms_norm`
        N = 16 // x.itemsize if in_vectors(*rows) else 1
        load_kernel(SILU, f"{name}<{TYPES[x.dtype.name]}, {N}>")(
            (len(rows[0]), divide_up(D, 256 * N)), (256,), (
                *rows, result, *(np.int64(a.strides[0] // x.itemsize) for a in rows), np.int32(D)))
    return result


def token_embedding_backward(gradient, token_ids, vocabulary_size):
    """Return the gradient of the table of embeddings: phi3_ref's `token_embedding_backward`.

    Args:
        gradient: [..., D], float32, float16 or bfloat16, on the GPU.
        token_ids: [...], int in [0, vocabulary_size), on the GPU.
        vocabulary_size: int, V.

    Returns:
        [V, D], float32: row v sums `gradient` over where the id v stood.
    """
    check_array("gradient", gradient, (None,) * max(1, getattr(gradient, "ndim", 1)))
    D = gradient.shape[-1]
    require(token_ids.shape == gradient.shape[:-1] and token_ids.dtype.kind in "iu",
            f"`token_ids` must be integers of shape {gradient.shape[:-1]}. Received: "
            f"{token_ids.dtype} of shape {token_ids.shape}")
    table = array_module.zeros((vocabulary_size, D), np.float32)
    if gradient.size:
        rows = gradient.reshape(-1, D)
        ids = token_ids.reshape(-1).astype(np.int64, copy=False)
        order = array_module.argsort(ids, kind="stable")
        N = 16 // gradient.itemsize if in_vectors(rows) else 1
        name = f"token_embedding_backward<{TYPES[gradient.dtype.name]}, {N}>"
        load_kernel(TOKEN_EMBEDDING_BACKWARD, name)(
            (len(rows), divide_up(D, 32 * N)), (256,), (
                rows, ids, order, table, np.int64(rows.strides[0] // gradient.itemsize),
                *map(np.int32, (len(rows), D))))
    return table


def cross_entropy(logits, labels, sample_weight=None):
    """Return the loss, and the gradient of the logits: phi3_ref's `cross_entropy`.

    Args:
        logits: [B, S, V], float32, float16 or bfloat16, on the GPU.
        labels: [B, S], int in [0, V), on the GPU; at least one.
        sample_weight: [B, S] on the GPU, or None for ones.

    Returns:
        loss, float32, without axes; and the gradient, like `logits`, contiguous; computed in
        float32, rounded once.
    """
    check_array("logits", logits, (None,) * max(1, getattr(logits, "ndim", 1)))
    V, N = logits.shape[-1], labels.size
    for name, array in (("labels", labels), ("sample_weight", sample_weight)):
        require(array is None or array.shape == logits.shape[:-1],
                f"`{name}` must be of shape {logits.shape[:-1]}. Received: "
                f"{getattr(array, 'shape', None)}")
    require(labels.dtype.kind in "iu" and N,
            f"`labels` must be integers, at least one. Received: {N} of {labels.dtype}")
    share = array_module.ones(N) if sample_weight is None else sample_weight.reshape(-1)
    share = share.astype(np.float32) / np.float32(N)
    rows, labels = logits.reshape(N, V), labels.reshape(-1).astype(np.int64, copy=False)
    losses, gradient = (array_module.empty(shape, dtype) for shape, dtype in (
        (N, np.float32), (logits.shape, logits.dtype)))
    vector = 16 // logits.itemsize if in_vectors(rows) else 1
    threads = min(512, 32 * divide_up(V, 32 * vector))
    load_kernel(CROSS_ENTROPY, f"cross_entropy<{TYPES[logits.dtype.name]}, {vector}>")(
        (N,), (threads,), (rows, labels, share, losses, gradient,
                           np.int64(rows.strides[0] // logits.itemsize), np.int32(V)))
    return losses.sum(), gradient


def sum_of_squares(x):
    """Return the sum of the squares of `x`, as `vdot(x, x)` does.

    Args:
        x: of any shape, float32, on the GPU, contiguous.

    Returns:
        float32, without axes.
    """
    check_array("x", x, (None,) * max(1, getattr(x, "ndim", 1)))
    require(x.dtype == np.float32 and x.flags.c_contiguous,
            f"`x` must be float32 and contiguous. Received: {x.dtype}, strides {x.strides}")
    if not x.size:
        return array_module.zeros((), np.float32)
    x = x.reshape(-1)
    N = 4 if in_vectors(x) else 1
    # Four blocks of 512 threads fill a multiprocessor.
    blocks = min(4 * gpu_limits()[1], divide_up(x.size, 512 * N))
    partial, total = (array_module.empty(size, np.float32) for size in (blocks, 1))
    for name, source, target, count, grid in ((f"{N}, true", x, partial, x.size // N, blocks),
                                              ("1, false", partial, total, blocks, 1)):
        load_kernel(SUM_OF_SQUARES, f"sum_of<{name}>")(
            (grid,), (512,), (source, target, np.int64(count)))
    return total.reshape(())


def adam_step(weight, gradient, m, v, factor, decay, rate, beta_1, beta_2, epsilon):
    """Take a step of `AdamW` with one array, in place: the lines at the end of its `update`.

    Args:
        weight: of any shape, float32, float16 or bfloat16, on the GPU, contiguous.
        gradient: like `weight`, float32, and so for the running means `m` and `v`.
        factor: float, or a float32 array on the GPU without axes: what the gradient is cut by.
        decay: float, what remains of the weight; 1 without weight decay.
        rate: float, the learning rate, corrected for the means' beginning.
        beta_1: float, how much m keeps of itself, and so for `beta_2` and v.
        epsilon: float, beside the root of v.
    """
    check_array("weight", weight, (None,) * max(1, getattr(weight, "ndim", 1)))
    if not isinstance(factor, array_module.ndarray):
        factor = array_module.full((), factor, np.float32)
    check_array("gradient", gradient, weight.shape)
    require(gradient.dtype == np.float32,
            f"`gradient` must be of dtype float32. Received: {gradient.dtype}")
    for name, array, shape in (("m", m, weight.shape), ("v", v, weight.shape),
                               ("factor", factor.reshape(-1), (1,))):
        check_array(name, array, shape, like=gradient)
    arrays = weight, gradient, m, v
    require(all(array.flags.c_contiguous for array in arrays),
            "`weight`, `gradient`, `m` and `v` must be contiguous.")
    if weight.size:
        arrays = [array.reshape(-1) for array in arrays]
        N = 4 if in_vectors(*arrays) else 1
        count = weight.size // N
        load_kernel(ADAM_STEP, f"adam_step<{TYPES[weight.dtype.name]}, {N}>")(
            (divide_up(count, 256),), (256,), (*arrays, factor, np.int64(count), *map(
                np.float32, (decay, rate, 1 - beta_1, 1 - beta_2, epsilon))))


def capture(function):
    """Record what `function` launches as a CUDA graph, which the GPU then runs without Python.

    A graph launches what was recorded: the same kernels, addresses and numbers. So what changes
    from run to run must lie in arrays, which are written in between. `function` is called twice:
    once to compile its kernels, once to be recorded. It must not wait for the GPU, copy from or to
    the host, or call cuBLAS, which CuPy does not record.

    Args:
        function: function without arguments that returns arrays on the GPU.

    Returns:
        A function without arguments: it launches the graph, and returns those same arrays, whose
        contents are new. The memory of all arrays in between stays the graph's own.
    """
    cuda = array_module.cuda
    stream, pool = cuda.Stream(non_blocking=True), cuda.MemoryPool()
    cuda.get_current_stream().synchronize()  # what `function` reads may still be under way
    with cuda.using_allocator(pool.malloc), stream:
        function()
        stream.synchronize()
        stream.begin_capture()
        try:
            result = function()
        finally:
            graph = stream.end_capture()

    def replay():
        graph.launch()
        return result
    replay.memory = pool  # of the arrays that `function` let go of; the graph writes to them
    return replay


SLOTS_PER_GRAPH = 1024  # of a KV cache: so many tokens are decoded before the next record


class NextPosition:
    """A KV cache, as the model's forward pass sees it while a step of decoding is recorded.

    A record is fixed, numbers and addresses. So the slot of the new position is an array, and
    attention goes over `room` slots, more than are taken, with a mask of those that are seen.
    """

    def __init__(self, cache, room):
        self.arrays, self.first, self.length = cache.arrays, cache.first, cache.length
        self.room, self.window = room, cache.window
        self.slot = array_module.full(1, cache.length - cache.first)

    def begin(self, count):
        """Return the new position, [1], and see to the mask."""
        distance = self.slot[:, None] - array_module.arange(self.room)  # [1, room]
        visible = (distance >= 0) & (distance < (self.window or math.inf))
        self.mask = visible.repeat(self.arrays.shape[2], 0)  # [B, room]
        return self.slot + self.first

    def append(self, layer, key, value):
        """Write one layer's new key and value, [B, 1, K, C]; return what `attention` takes."""
        keys, values = self.arrays[layer, :, :, : self.room]
        keys[:, self.slot] = key
        values[:, self.slot] = value
        return keys, values, self.mask, None


def decode_by_graph(forward, weights, config, token_ids, cache, total):
    """Call `forward` for one more position of a KV cache by a CUDA graph, recorded when need be.

    A step of decoding is a thousand small kernels, and Python takes longer to launch them than the
    GPU to run them. Recorded once, they are launched as one, until the slots that the record sees
    are taken, a sliding window has moved, or su scaling changes its factors.

    Args:
        forward: phi3_ref's function, whose first arguments follow.
        weights: see `forward`, and so for `config`.
        token_ids: [B, 1], int.
        cache: KVCache, which also keeps the last record, as `graph`. A record has the weights'
            addresses: of another tree it is made anew; of other arrays in the same tree it is not.
        total: int, the positions with the new one.

    Returns:
        [B, 1, D]; the next call writes its result into the same array.
    """
    cache.begin(1)
    slot, room = cache.length - cache.first, cache.arrays.shape[3]
    room = min((slot // SLOTS_PER_GRAPH + 1) * SLOTS_PER_GRAPH, room)
    record_for = room, cache.first, config.uses_long_factors(total), id(weights)
    if getattr(cache, "graph_for", None) != record_for:
        ids, next_position = token_ids.copy(), NextPosition(cache, room)
        step = functools.partial(forward, weights, config, ids, cache=next_position, total=total)
        cache.graph = capture(step), ids, next_position.slot, weights  # which the record reads
        cache.graph_for = record_for
    graph, ids, slots, _ = cache.graph
    ids[...] = token_ids
    slots[...] = slot
    hidden_states = graph()
    cache.length = total
    return hidden_states


@contextlib.contextmanager
def memory_for(what):
    """Say, where the GPU's memory runs out within, for what, and how much was needed and free.

    Raises:
        MemoryError: in the place of CuPy's own.
    """
    try:
        yield
    except array_module.cuda.memory.OutOfMemoryError as error:  # which says what was needed
        free = array_module.cuda.runtime.memGetInfo()[0]
        free += array_module.get_default_memory_pool().free_bytes()
        raise MemoryError(f"{what}: {error} {free:,} bytes are free on the GPU.") from error
