// CUDA's terms as the kernels' source sees them on the CPU; what they do stands in runtime.cpp.
//
// Only what the kernels may use is here, so that anything else fails to compile. The functions
// under "PTX" take the place of kernels_cuda.PRIMITIVES: same names, same signatures, same layouts.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// All shared variables of a kernel lie in its library's thread-local segment, static and dynamic
// ones alike: one range, which the runtime watches.
#define __shared__ static __thread
#define SITE int line = __builtin_LINE()  // a default argument: the line of the call
#define UNCHECKED __attribute__((no_sanitize("thread", "undefined")))

struct uint3 { unsigned x, y, z; };
using dim3 = uint3;
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

#define VECTORS(T, name)                                                                      \
    struct alignas(2 * sizeof(T)) name##2 { T x, y; };                                        \
    struct alignas(16) name##4 { T x, y, z, w; };                                             \
    inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                \
    inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
VECTORS(float, float)
VECTORS(int, int)
VECTORS(unsigned, uint)

// What the runtime offers to this header.
namespace on_cpu {
int lane_id();
uint64_t exchange(unsigned mask, uint64_t bits, int source_lane, int line);
void mma(float* d, const uint32_t* a, const uint32_t* b, bool bfloat16, int line);
void load_matrices(uint32_t* r, const void* row, int count, bool transposed, int line);
void copy_async(void* shared, const void* global, bool valid, int line);
void copy_async_commit();
void copy_async_wait(int newest_groups_still_in_flight);

template <typename To, typename From> inline To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From), "bits_as keeps the size");
    To to;
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
}
template <size_t size> constexpr std::enable_if_t<size <= 16, size_t> small = size;
inline float flush_subnormal(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }
}  // namespace on_cpu

// 16-bit floats: storage, and conversions that round to the nearest, ties to even.
struct __half { uint16_t bits; };
struct __nv_bfloat16 { uint16_t bits; };
inline float __half2float(__half h) {
    // The exponent's bias grows from 15 to 127 by a multiplication, which subnormals survive.
    float magnitude = on_cpu::bits_as<float>((h.bits & 0x7fffu) << 13) * 0x1p112f;
    if ((h.bits & 0x7c00) == 0x7c00) magnitude = (h.bits & 0x3ff) ? NAN : INFINITY;
    return (h.bits & 0x8000) ? -magnitude : magnitude;
}
inline __half __float2half_rn(float x) {
    return {on_cpu::bits_as<uint16_t>(static_cast<_Float16>(x))};
}
inline float __bfloat162float(__nv_bfloat16 b) {
    return on_cpu::bits_as<float>(static_cast<uint32_t>(b.bits) << 16);
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    const uint32_t bits = on_cpu::bits_as<uint32_t>(x);
    if (x != x) return {0x7fff};
    return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
inline uint16_t __half_as_ushort(__half h) { return h.bits; }
inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 b) { return b.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(uint16_t bits) { return {bits}; }

// The runtime sees no access inside of a real call of memcpy: only sizes that need none.
#define memcpy(to, from, size) __builtin_memcpy(to, from, on_cpu::small<(size)>)

extern "C" int printf(const char* format, ...);

template <typename T> constexpr T min(T a, T b) { return b < a ? b : a; }
template <typename T> constexpr T max(T a, T b) { return a < b ? b : a; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __int_as_float(int x) { return on_cpu::bits_as<float>(x); }
inline float __uint_as_float(unsigned x) { return on_cpu::bits_as<float>(x); }
inline int __float_as_int(float x) { return on_cpu::bits_as<int>(x); }
inline unsigned __float_as_uint(float x) { return on_cpu::bits_as<unsigned>(x); }

// Barriers, shuffles and votes.
void __syncthreads(SITE);
void __syncwarp(unsigned mask = 0xffffffff, SITE);
unsigned __ballot_sync(unsigned mask, int predicate, SITE);
inline int __any_sync(unsigned mask, int predicate, SITE) {
    return __ballot_sync(mask, predicate, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, SITE) {
    return __ballot_sync(mask, !predicate, line) == 0;
}
// A source outside of the lane's own segment of `width` lanes gives the lane's own value.
#define SHUFFLE(name, argument, source, inside)                                               \
    template <typename T>                                                                     \
    inline T name(unsigned mask, T value, argument, int width = 32, SITE) {                   \
        static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves 4 or 8 bytes");      \
        const int lane = on_cpu::lane_id(), first = lane & -width, from = source;             \
        uint64_t bits = 0;                                                                    \
        __builtin_memcpy(&bits, &value, sizeof value);                                        \
        bits = on_cpu::exchange(mask, bits, (inside) ? from : lane, line);                    \
        __builtin_memcpy(&value, &bits, sizeof value);                                        \
        return value;                                                                         \
    }
SHUFFLE(__shfl_sync, int index, first | (index & (width - 1)), true)
SHUFFLE(__shfl_xor_sync, int flip, lane ^ flip, from < first + width)
SHUFFLE(__shfl_down_sync, unsigned delta, lane + static_cast<int>(delta), from < first + width)
SHUFFLE(__shfl_up_sync, unsigned delta, lane - static_cast<int>(delta), from >= first)

// PTX. The arrays are copied, so that the compiler may keep the kernel's own in registers.
template <typename T>
__forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                  SITE) {
    static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>, "16 bits only");
    float d_copy[4] = {d[0], d[1], d[2], d[3]};
    const uint32_t a_copy[4] = {a[0], a[1], a[2], a[3]}, b_copy[2] = {b[0], b[1]};
    on_cpu::mma(d_copy, a_copy, b_copy, std::is_same_v<T, __nv_bfloat16>, line);
    for (int i = 0; i < 4; ++i) d[i] = d_copy[i];
}
#define LDMATRIX(name, count, transposed)                                                     \
    __forceinline__ void name(uint32_t (&r)[count], const void* row, SITE) {                  \
        uint32_t copy[count];                                                                 \
        on_cpu::load_matrices(copy, row, count, transposed, line);                            \
        for (int i = 0; i < count; ++i) r[i] = copy[i];                                       \
    }
LDMATRIX(ldmatrix_x2, 2, false)
LDMATRIX(ldmatrix_x2_trans, 2, true)
LDMATRIX(ldmatrix_x4, 4, false)
LDMATRIX(ldmatrix_x4_trans, 4, true)
inline void cp_async_16(void* shared, const void* global, bool valid, SITE) {
    on_cpu::copy_async(shared, global, valid, line);
}
inline void cp_async_commit() { on_cpu::copy_async_commit(); }
template <int N> inline void cp_async_wait() { on_cpu::copy_async_wait(N); }
inline float exp2_approx(float x) {
    return on_cpu::flush_subnormal(exp2f(on_cpu::flush_subnormal(x)));
}

// How the runtime calls a kernel, and what the launcher must hand over.
namespace on_cpu {
template <typename... P, size_t... I>
UNCHECKED void call_with(void (*kernel)(P...), void** values, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_cv_t<P>*>(values[I])...);
}
template <typename... P> UNCHECKED void call(void (*kernel)(P...), void** values) {
    call_with(kernel, values, std::index_sequence_for<P...>());
}
template <typename T> constexpr int item_size = sizeof(T);
template <> constexpr int item_size<void> = 0;
template <> constexpr int item_size<const void> = 0;
// A parameter in numbers: 1000 + item size of a pointer, 100 + size of a float, size of an integer.
template <typename P> constexpr int describe_one =
    std::is_pointer_v<P> ? 1000 + item_size<std::remove_pointer_t<P>>
                         : sizeof(P) + 100 * std::is_floating_point_v<P>;
template <typename... P> const int* describe(void (*)(P...)) {
    static const int text[] = {describe_one<std::remove_cv_t<P>>..., 0};
    return text;
}
}  // namespace on_cpu
#define LAUNCH(dynamic_shared_memory, ...)                                                    \
    namespace on_cpu {                                                                        \
    unsigned char* dynamic_shared() { return (unsigned char*)dynamic_shared_memory; }         \
    UNCHECKED void call_kernel(void** values) { call(&__VA_ARGS__, values); }                 \
    }                                                                                         \
    extern "C" __attribute__((visibility("default"))) const int* parameters() {               \
        return on_cpu::describe(&__VA_ARGS__);                                                \
    }
