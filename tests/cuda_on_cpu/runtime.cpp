// Runs one kernel on the CPU: blocks one after another, the threads of a block as fibers.
//
// A fiber runs until it waits (at a barrier or an operation of its warp) and the next in the queue
// goes on, so every run is the same. The kernel is compiled as if for ThreadSanitizer, but the
// functions which that instrumentation calls at every load and store stand here and not in its
// library: each access is checked, exactly, against one state and two records per byte.
//
//   state    FORBIDDEN (outside of an array), UNWRITTEN (in this block, nobody wrote it yet),
//            IN_FLIGHT (a cp.async that nobody waited for), READY (by the host), WRITTEN
//   records  who wrote the byte last, and who read it, and when. Two accesses by different threads,
//            at least one a write, are a race unless a __syncthreads, or in one warp a __syncwarp,
//            stands between them. Shuffles, votes, mma and ldmatrix order no memory.
#include "header.h"

#include <array>
#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <link.h>
#include <map>
#include <pthread.h>
#include <set>
#include <sys/mman.h>
#include <sys/time.h>
#include <ucontext.h>
#include <vector>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;
extern "C" __attribute__((visibility("default"))) uint64_t traffic[2];
uint64_t traffic[2];  // see `count`
extern "C" __attribute__((visibility("default"))) char printed[1 << 16];
char printed[1 << 16];  // by the kernel's printf; what is too much is dropped
// This library's first byte, and the one after its last.
extern "C" __attribute__((visibility("hidden"))) char __ehdr_start, _end;

namespace on_cpu {
unsigned char* dynamic_shared();  // these two are in the kernel's part: LAUNCH
void call_kernel(void** values);

namespace {
constexpr unsigned MAX_THREADS = 1024, MAX_SHARED = 232448;  // per block, on sm_90
constexpr size_t STACK = 128 << 10, GUARD = 4096;

// ---- Threads and their queue

struct Post;
using Operation = void (*)(Post**, unsigned mask);
struct Post {  // what a lane hands to an operation of its warp
    Operation operation;
    const char* name;
    unsigned mask;
    int line;
    void* data;
};
struct Copy { char* to; char bytes[16]; int group; };
struct Fiber {
    ucontext_t first;
    jmp_buf next;
    bool started, exited;
    uint3 index;
    const char* waits_at;
    int line;
    int groups;  // committed groups of cp.async
    std::vector<Copy> copies;
};
struct Warp { Post* posts[32]; unsigned present, exited, waiting; uint16_t epoch; };

Fiber fibers[MAX_THREADS];
Warp warps[MAX_THREADS / 32];
int queue[MAX_THREADS + 1], head, tail;
int threads, current, exited, arrived, barrier_line;
unsigned block_number, block_epoch;
bool reversed;
int seconds;
pthread_t kernel_thread;
char* stacks;
void** arguments;
sigjmp_buf back;
enum { FAILED = 1, FINISHED, INTERRUPTED };  // what `back` is called with
char* message;
size_t message_size;
uintptr_t* error_site;
const void* site;  // the instruction of the access that is being checked

[[noreturn]] void fail(int line, const char* format, ...) {
    int n = snprintf(message, message_size, "block (%u, %u, %u), thread (%u, %u, %u): ", blockIdx.x,
                     blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z);
    va_list values;
    va_start(values, format);
    n += vsnprintf(message + n, message_size - n, format, values);
    va_end(values);
    if (line) snprintf(message + n, message_size - n, " (line %d)", line);
    *error_site = line ? 0 : reinterpret_cast<uintptr_t>(site) -
                             reinterpret_cast<uintptr_t>(&__ehdr_start);
    siglongjmp(back, FAILED);
}

// Our timer and Ctrl-C end the kernel at once, but not while the C library is at its own memory.
volatile sig_atomic_t locked, pending;
[[noreturn]] void stop(int number) {
    if (number == SIGVTALRM) fail(0, "still runs after %d seconds", seconds);
    siglongjmp(back, INTERRUPTED);
}
void unlock() {
    locked = 0;
    if (pending) stop(pending);
}
struct Lock {
    Lock() { locked = 1; }
    ~Lock() { unlock(); }
};

void push(int thread) { queue[tail] = thread; tail = (tail + 1) % (MAX_THREADS + 1); }

void push_all(unsigned first, unsigned count, bool (*wanted)(int)) {
    for (unsigned i = 0; i < count; ++i) {
        const int thread = first + (reversed ? count - 1 - i : i);
        if (wanted(thread)) push(thread);
    }
}

[[noreturn]] void report_deadlock() {
    char text[1000] = "";
    int n = 0;
    const Fiber* shown = nullptr;
    for (int i = 0; i < threads && n < 800; ++i) {
        const Fiber& f = fibers[i];
        if (f.exited || (shown && shown->waits_at == f.waits_at && shown->line == f.line)) continue;
        n += snprintf(text + n, sizeof text - n, "; thread (%u, %u, %u) waits at %s, line %d",
                      f.index.x, f.index.y, f.index.z, f.waits_at, f.line);
        shown = &f;
    }
    fail(0, "deadlock: no thread can go on; %d of %d have exited, %d wait at "
         "__syncthreads%s", exited, threads, arrived, text);
}

[[noreturn]] void resume_next() {
    if (head == tail) {
        if (exited == threads) siglongjmp(back, FINISHED);
        report_deadlock();
    }
    current = queue[head];
    head = (head + 1) % (MAX_THREADS + 1);
    Fiber& fiber = fibers[current];
    threadIdx = fiber.index;
    if (fiber.started) _longjmp(fiber.next, 1);
    fiber.started = true;
    setcontext(&fiber.first);
    abort();
}

// Lets the others run until somebody pushes this thread onto the queue.
__attribute__((noinline)) void wait_at(const char* name, int line) {
    fibers[current].waits_at = name;
    fibers[current].line = line;
    if (!_setjmp(fibers[current].next)) resume_next();
}

void fiber_main() {
    call_kernel(arguments);
    fibers[current].exited = true;
    ++exited;
    warps[current / 32].exited |= 1u << current % 32;
    if (arrived) fail(barrier_line, "exits while %d threads wait at a __syncthreads", arrived);
    resume_next();
}

// ---- Memory

enum State : uint8_t { FORBIDDEN, UNWRITTEN, IN_FLIGHT, READY, WRITTEN };
// who: block + 1 in the upper 19 bits, 3 flags, the thread in the lower 10 bits; 0 is the host.
// when: the number of the block's barrier before, then of the warp's.
struct Record {
    uint32_t who, when;
    bool operator!=(const Record& r) const { return (who ^ r.who) | (when ^ r.when); }
};
constexpr uint32_t LANES = 1 << 10, WARPS = 2 << 10, BLOCKS = 4 << 10;  // several of them
struct Cell { Record write, read; };
struct Memory { const char* name; char* begin; size_t size; uint8_t* state; Cell* cells; };
Memory shared = {"shared memory", nullptr, 0, nullptr, nullptr};
Memory global = {"global memory", nullptr, 0, nullptr, nullptr};

uint32_t warp_of(uint32_t who) { return (who & 1023) / 32; }
uint32_t myself() { return (block_number + 1) << 13 | current; }
uint32_t now() { return block_epoch << 16 | warps[current / 32].epoch; }

// Says whether the access `r` happened before what `now` does.
inline bool ordered(Record r, Record now) {
    if (!r.who) return true;
    if ((r.who ^ now.who) >> 13 || r.who & BLOCKS) return false;
    if (r.when >> 16 < now.when >> 16) return true;
    if (r.who & WARPS || warp_of(r.who) != warp_of(now.who)) return false;
    return r.when < now.when || (r.who == now.who && !(r.who & LANES));
}

// Names what two accesses at the same time have in common no longer.
inline uint32_t together_with(Record r, Record now) {
    if ((r.who ^ now.who) >> 13) return BLOCKS;
    return warp_of(r.who) != warp_of(now.who) ? WARPS : LANES;
}

[[noreturn]] void report_race(Record r, const char* before, const char* now, Memory* m, int line) {
    if (r.who & BLOCKS || r.who >> 13 != block_number + 1)
        fail(line, "data race: %s %s that another block %s", now, m->name, before);
    const Fiber& other = fibers[r.who & 1023];
    fail(line, "data race: %s %s that thread (%u, %u, %u)%s %s, with no barrier between", now,
         m->name, other.index.x, other.index.y, other.index.z,
         r.who & (LANES | WARPS) ? " and others" : "", before);
}

// If the host wants to know: how many bytes of global memory the threads ask for, and how many
// segments of 32 bytes that takes, where one instruction of a warp asks for each segment once. That
// instruction is the nth by each of its lanes at one place of the code. (g++ may split a vector of
// 16 bytes: what goes on at another place where the thread's last access ended belongs to it.)
struct Access { uintptr_t end, place, first_place; uint64_t n; };
bool counting;
std::map<uint32_t, Access> last_access;
std::map<std::pair<uint32_t, uintptr_t>, uint32_t> times;
std::set<std::array<uint64_t, 3>> segments;
constexpr size_t MOST_SEGMENTS = 1 << 22;  // a few hundred megabytes

void count(const char* p, size_t size, int line) {
    const Lock lock;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(p);
    const uintptr_t place = line ? line : reinterpret_cast<uintptr_t>(site);
    Access& last = last_access[myself()];
    if (begin != last.end || begin % 16 == 0 || place == last.place)
        last = {0, 0, place, times[{myself(), place}]++};
    last.end = begin + size;
    last.place = place;
    const uint64_t warp = block_number * 32ull + current / 32;
    traffic[0] += size;
    for (uintptr_t segment = begin / 32; segment <= (begin + size - 1) / 32; ++segment)
        traffic[1] += segments.insert({last.first_place, warp << 32 | last.n, segment}).second;
    if (segments.size() > MOST_SEGMENTS)
        fail(line, "asks for more than %zu segments: too many to count, if it ends", MOST_SEGMENTS);
}

void check(Memory* m, const char* p, size_t size, bool write, bool whole_warp, int line) {
    if (counting && m == &global) count(p, size, line);
    const char* verb = write ? "writes" : "reads";
    const Record me_now = {myself() | (whole_warp ? LANES : 0), now()};
    const size_t offset = p - m->begin;
    if (size > m->size - offset) fail(line, "%s out of bounds of %s", verb, m->name);
    // Neighbouring bytes mostly have equal records: each different one is looked at once.
    Record write_before = {}, read_before = {}, read_after = me_now;
    for (size_t i = offset; i < offset + size; ++i) {
        Cell& cell = m->cells[i];
        uint8_t& state = m->state[i];
        if (state == FORBIDDEN)
            fail(line, "%s %zu bytes out of bounds of %s", verb, size, m->name);
        if (state == IN_FLIGHT)
            fail(line, "%s %s that a cp.async still writes: no wait covers it", verb, m->name);
        if (state == UNWRITTEN && !write) fail(line, "reads %s that nobody wrote", m->name);
        if (cell.write != write_before) {
            if (!ordered(cell.write, me_now)) report_race(cell.write, "wrote", verb, m, line);
            write_before = cell.write;
        }
        if (cell.read != read_before) {
            read_before = cell.read;
            read_after = me_now;
            if (!ordered(cell.read, me_now)) {
                if (write) report_race(cell.read, "read", verb, m, line);
                read_after.who = cell.read.who | together_with(cell.read, me_now);
                read_after.when = cell.read.when;
            }
        }
        if (write) {
            cell.write = me_now;
            state = WRITTEN;
        } else {
            cell.read = read_after;
        }
    }
}

Memory* find(const void* p) {
    const char* c = static_cast<const char*>(p);
    if (static_cast<size_t>(c - shared.begin) < shared.size) return &shared;
    if (static_cast<size_t>(c - global.begin) < global.size) return &global;
    return nullptr;
}

void access(const void* p, size_t size, bool write) {
    const char* c = static_cast<const char*>(p);
    if (static_cast<size_t>(c - stacks) < threads * (STACK + GUARD)) return;  // a local variable
    if (Memory* m = find(p)) return check(m, c, size, write, false, 0);
    if (c >= &__ehdr_start && c < &_end) return;  // a constant, threadIdx
    fail(0, "%s %zu bytes at %p, which is no memory of the kernel", write ? "writes" : "reads",
         size, p);
}

void check_16_bytes(const void* p, Memory* m, bool write, bool whole_warp, int line,
                    const char* name) {
    if (find(p) != m) fail(line, "%s: an address that is not in %s", name, m->name);
    if (reinterpret_cast<uintptr_t>(p) % 16)
        fail(line, "%s: misaligned address, not a multiple of 16 bytes", name);
    check(m, static_cast<const char*>(p), 16, write, whole_warp, line);
}

// ---- Operations of a warp

// Waits for the other lanes in `mask`; the last one to arrive does the operation for all.
void together(Operation operation, const char* name, unsigned mask, void* data, int line) {
    Warp& warp = warps[current / 32];
    const unsigned bit = 1u << current % 32;
    if (!(mask & bit)) fail(line, "%s: the lane is not in its own mask %08x", name, mask);
    if (mask & ~warp.present)
        fail(line, "%s: mask %08x names lanes that the block does not have", name, mask);
    if (mask & warp.exited) fail(line, "%s: mask %08x names lanes that exited", name, mask);
    Post post = {operation, name, mask, line, data};
    warp.posts[current % 32] = &post;
    warp.waiting |= bit;
    for (int i = 0; i < 32; ++i) {
        if (!(mask & 1u << i)) continue;
        const Post* other = warp.waiting & 1u << i ? warp.posts[i] : nullptr;
        if (!other || other->operation != operation || other->mask != mask)
            return wait_at(name, line);
    }
    operation(warp.posts, mask);
    warp.waiting &= ~mask;
    static unsigned released;
    released = mask & ~bit;
    push_all(current & ~31, 32, [](int i) { return (released >> i % 32 & 1) != 0; });
}

void synchronize_warp(Post**, unsigned mask) {
    Warp& warp = warps[current / 32];
    if (!((warp.present & ~warp.exited) & ~mask)) ++warp.epoch;  // a part of a warp orders nothing
}

struct Exchange { uint64_t bits, result; int source; };
void exchange_lanes(Post** posts, unsigned mask) {
    for (int i = 0; i < 32; ++i) {
        if (!(mask >> i & 1)) continue;
        Exchange* mine = static_cast<Exchange*>(posts[i]->data);
        if (!(mask >> mine->source & 1))
            fail(posts[i]->line, "shuffle: lane %d reads lane %d, which is not in mask %08x", i,
                 mine->source, mask);
        mine->result = static_cast<Exchange*>(posts[mine->source]->data)->bits;
    }
}
void vote(Post** posts, unsigned mask) {
    unsigned result = 0;
    for (int i = 0; i < 32; ++i)
        if (mask >> i & 1 && *static_cast<unsigned*>(posts[i]->data)) result |= 1u << i;
    for (int i = 0; i < 32; ++i)
        if (mask >> i & 1) *static_cast<unsigned*>(posts[i]->data) = result;
}

// mma.sync.m16n8k16.row.col, lane = 4 * group + member; every register holds two 16-bit items:
//   A [16, 16]  a[r]: row group + 8 * (r % 2), columns 2 * member + 8 * (r / 2) + {0, 1}
//   B [16, 8]   b[r]: rows 2 * member + 8 * r + {0, 1}, column group
//   D [16, 8]   d[i]: row group + 8 * (i / 2), column 2 * member + i % 2
struct Mma { float* d; const uint32_t *a, *b; bool bfloat16; };
void multiply(Post** posts, unsigned) {
    float a[16][16], b[16][8];
    const auto unpack = [](const Mma& m, uint32_t pair, int half) {
        const uint16_t bits = pair >> 16 * half;
        return m.bfloat16 ? __bfloat162float({bits}) : __half2float({bits});
    };
    for (int lane = 0; lane < 32; ++lane) {
        const Mma& m = *static_cast<Mma*>(posts[lane]->data);
        const int group = lane / 4, member = lane % 4;
        for (int half = 0; half < 2; ++half) {
            for (int r = 0; r < 4; ++r)
                a[group + r % 2 * 8][member * 2 + r / 2 * 8 + half] = unpack(m, m.a[r], half);
            for (int r = 0; r < 2; ++r)
                b[member * 2 + r * 8 + half][group] = unpack(m, m.b[r], half);
        }
    }
    for (int row = 0; row < 16; ++row) {
        double sums[8] = {};
        for (int k = 0; k < 16; ++k)
            for (int n = 0; n < 8; ++n) sums[n] += static_cast<double>(a[row][k]) * b[k][n];
        for (int n = 0; n < 8; ++n) {
            const Mma& m = *static_cast<Mma*>(posts[row % 8 * 4 + n / 2]->data);
            float& d = m.d[row / 8 * 2 + n % 2];
            d = static_cast<float>(d + sums[n]);
        }
    }
}

// ldmatrix: lane 8 * i + j names row j of the i-th 8x8 matrix of 16-bit items; register i of
// lane = 4 * group + member gets items 2 * member + {0, 1} of row `group` (.trans: of the column).
struct Load { uint32_t* r; const void* row; int count; bool transposed; };
void load(Post** posts, unsigned) {
    const Load& first = *static_cast<Load*>(posts[0]->data);
    for (int i = 0; i < first.count; ++i) {
        const uint16_t* rows[8];
        for (int j = 0; j < 8; ++j) {
            const Post& post = *posts[8 * i + j];
            const void* row = static_cast<Load*>(post.data)->row;
            check_16_bytes(row, &shared, false, true, post.line, post.name);
            rows[j] = static_cast<const uint16_t*>(row);
        }
        for (int lane = 0; lane < 32; ++lane) {
            const Load& mine = *static_cast<Load*>(posts[lane]->data);
            const int group = lane / 4, item = lane % 4 * 2;
            mine.r[i] = mine.transposed ? rows[item][group] | rows[item + 1][group] << 16
                                        : rows[group][item] | rows[group][item + 1] << 16;
        }
    }
}

// ---- Blocks

void reset_shared_memory(size_t dynamic_size) {
    memset(shared.begin, 0xff, shared.size);  // as floats of any kind: NaN
    memset(shared.state, UNWRITTEN, shared.size);
    size_t used = shared.size;
    if (char* dynamic = reinterpret_cast<char*>(dynamic_shared())) {
        const size_t begin = dynamic - shared.begin;
        memset(shared.state + begin + dynamic_size, FORBIDDEN, MAX_SHARED - dynamic_size);
        if (begin + MAX_SHARED == shared.size) used = begin + dynamic_size;
    }
    memset(static_cast<void*>(shared.cells), 0, used * sizeof(Cell));
}

int run_block(size_t dynamic_size) {
    reset_shared_memory(dynamic_size);
    head = tail = exited = arrived = barrier_line = 0;
    block_epoch = 0;
    memset(static_cast<void*>(warps), 0, sizeof warps);
    for (int i = 0; i < threads; ++i) {
        Fiber& fiber = fibers[i];
        fiber.started = fiber.exited = false;
        fiber.groups = 0;
        fiber.copies.clear();
        const unsigned t = i, x = blockDim.x, y = blockDim.y;
        fiber.index = {t % x, t / x % y, t / x / y};
        warps[i / 32].present |= 1u << i % 32;
        getcontext(&fiber.first);
        fiber.first.uc_stack.ss_sp = stacks + i * (STACK + GUARD) + GUARD;
        fiber.first.uc_stack.ss_size = STACK;
        makecontext(&fiber.first, fiber_main, 0);
    }
    push_all(0, threads, [](int) { return true; });
    const int result = sigsetjmp(back, 1);
    if (!result) {
        unlock();
        resume_next();
    }
    locked = 1;
    return result;
}

thread_local volatile char touched;  // so that this library has thread-local memory, and it exists
int find_shared_memory(dl_phdr_info* info, size_t, void*) {
    if (info->dlpi_addr != reinterpret_cast<uintptr_t>(&__ehdr_start)) return 0;
    for (int i = 0; i < info->dlpi_phnum; ++i)
        if (info->dlpi_phdr[i].p_type == PT_TLS) {
            shared.begin = static_cast<char*>(info->dlpi_tls_data);
            shared.size = info->dlpi_phdr[i].p_memsz;
        }
    return 1;
}

void on_signal(int number) {
    const bool asks = number == SIGVTALRM || number == SIGINT;  // our timer, or Ctrl-C
    if (!pthread_equal(pthread_self(), kernel_thread)) {  // another thread was asked, or crashes
        if (asks) pthread_kill(kernel_thread, number);
        else signal(number, SIG_DFL);
        return;
    }
    if (asks && locked) {
        pending = number;
        return;
    }
    if (asks) stop(number);
    fail(0, "%s", number == SIGSEGV ? "crashes: a stack overflow or a wild address"
                                    : "crashes: an invalid instruction or division");
}
}  // namespace

// ---- What header.h declares

int lane_id() { return current % 32; }
uint64_t exchange(unsigned mask, uint64_t bits, int source_lane, int line) {
    Exchange data = {bits, 0, source_lane};
    together(exchange_lanes, "a shuffle", mask, &data, line);
    return data.result;
}
void mma(float* d, const uint32_t* a, const uint32_t* b, bool bfloat16, int line) {
    Mma data = {d, a, b, bfloat16};
    together(multiply, "mma", 0xffffffff, &data, line);
}
void load_matrices(uint32_t* r, const void* row, int count, bool transposed, int line) {
    Load data = {r, row, count, transposed};
    together(load, transposed ? "ldmatrix.trans" : "ldmatrix", 0xffffffff, &data, line);
}
void copy_async(void* to, const void* from, bool valid, int line) {
    Copy copy = {static_cast<char*>(to), {}, fibers[current].groups};
    if (valid) {
        check_16_bytes(from, &global, false, false, line, "cp.async's source");
        memcpy(copy.bytes, from, 16);
    }
    check_16_bytes(to, &shared, true, false, line, "cp.async's destination");
    memset(to, 0xff, 16);
    memset(shared.state + (copy.to - shared.begin), IN_FLIGHT, 16);
    const Lock lock;
    fibers[current].copies.push_back(copy);
}
void copy_async_commit() { ++fibers[current].groups; }
void copy_async_wait(int newest) {
    std::vector<Copy>& copies = fibers[current].copies;
    size_t done = 0;
    for (; done < copies.size() && copies[done].group < fibers[current].groups - newest; ++done) {
        const size_t offset = copies[done].to - shared.begin;
        memcpy(copies[done].to, copies[done].bytes, 16);
        for (int i = 0; i < 16; ++i) {
            shared.state[offset + i] = WRITTEN;
            shared.cells[offset + i].write = {myself(), now()};
        }
    }
    copies.erase(copies.begin(), copies.begin() + done);
}
}  // namespace on_cpu
using namespace on_cpu;

void __syncthreads(int line) {
    if (exited) fail(line, "a __syncthreads that %d threads never reach: they exited", exited);
    if (arrived && line != barrier_line)
        fail(line, "a __syncthreads while %d threads wait at another one, line %d", arrived,
             barrier_line);
    barrier_line = line;
    if (++arrived < threads) return wait_at("__syncthreads", line);
    arrived = 0;
    ++block_epoch;
    for (Warp& warp : warps) warp.epoch = 0;
    push_all(0, threads, [](int i) { return i != current; });
}
void __syncwarp(unsigned mask, int line) {
    together(synchronize_warp, "__syncwarp", mask, nullptr, line);
}
unsigned __ballot_sync(unsigned mask, int predicate, int line) {
    unsigned data = predicate != 0;
    together(vote, "a vote", mask, &data, line);
    return data;
}

extern "C" int printf(const char* format, ...) {
    const Lock lock;
    const size_t used = strlen(printed);
    va_list values;
    va_start(values, format);
    const int n = vsnprintf(printed + used, sizeof printed - used, format, values);
    va_end(values);
    return n;
}

#define EXPORT extern "C" __attribute__((visibility("default")))

// Returns FINISHED, INTERRUPTED by Ctrl-C, or FAILED with the error in `text` and the offset of its
// instruction in this library.
EXPORT int launch(const unsigned* sizes, unsigned dynamic_size, void** values, char* memory,
                  uint8_t* state, size_t size, int backwards, int cpu_seconds, int count_traffic,
                  char* text, size_t text_size, uintptr_t* where) {
    gridDim = {sizes[0], sizes[1], sizes[2]};
    blockDim = {sizes[3], sizes[4], sizes[5]};
    threads = blockDim.x * blockDim.y * blockDim.z;
    arguments = values;
    reversed = backwards;
    counting = count_traffic;
    traffic[0] = traffic[1] = 0;
    seconds = cpu_seconds;
    message = text;
    message_size = text_size;
    error_site = where;
    *where = 0;
    touched = 1;
    *printed = '\0';
    locked = 1;
    pending = 0;
    dl_iterate_phdr(find_shared_memory, nullptr);
    const size_t fixed = shared.size - (dynamic_shared() ? MAX_SHARED : 0);
    if (fixed + dynamic_size > MAX_SHARED || (dynamic_size && !dynamic_shared())) {
        snprintf(text, text_size, "%u bytes of dynamic shared memory do not fit", dynamic_size);
        return FAILED;
    }
    const size_t stacks_size = threads * (STACK + GUARD);
    stacks = static_cast<char*>(mmap(nullptr, stacks_size, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    for (int i = 0; i < threads; ++i) mprotect(stacks + i * (STACK + GUARD), GUARD, PROT_NONE);
    global.begin = memory;
    global.size = size;
    global.state = state;
    global.cells = static_cast<Cell*>(calloc(size, sizeof(Cell)));
    shared.state = static_cast<uint8_t*>(malloc(shared.size));
    shared.cells = static_cast<Cell*>(calloc(shared.size, sizeof(Cell)));

    static char signal_stack[64 << 10];
    stack_t new_stack = {}, old_stack;
    new_stack.ss_sp = signal_stack;
    new_stack.ss_size = sizeof signal_stack;
    sigaltstack(&new_stack, &old_stack);
    const int numbers[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGVTALRM, SIGINT};
    struct sigaction action = {}, old_actions[6];
    action.sa_handler = on_signal;
    action.sa_flags = SA_ONSTACK;
    for (int i = 0; i < 6; ++i) sigaction(numbers[i], &action, &old_actions[i]);
    itimerval timer = {{0, 0}, {seconds, 0}}, no_timer = {};
    setitimer(ITIMER_VIRTUAL, &timer, nullptr);
    kernel_thread = pthread_self();
    const unsigned blocks = gridDim.x * gridDim.y * gridDim.z;
    int result = FINISHED;
    for (unsigned i = 0; result == FINISHED && i < blocks; ++i) {
        block_number = reversed ? blocks - 1 - i : i;
        blockIdx = {block_number % gridDim.x, block_number / gridDim.x % gridDim.y,
                    block_number / gridDim.x / gridDim.y};
        result = run_block(dynamic_size);
    }
    setitimer(ITIMER_VIRTUAL, &no_timer, nullptr);
    for (int i = 0; i < 6; ++i) sigaction(numbers[i], &old_actions[i], nullptr);
    sigaltstack(&old_stack, nullptr);
    last_access.clear();
    times.clear();
    segments.clear();
    free(global.cells);
    free(shared.state);
    free(shared.cells);
    munmap(stacks, stacks_size);
    return pending == SIGINT ? INTERRUPTED : result;
}

// ---- What the compiler's instrumentation calls: before every load and store, and where the
// arithmetic is undefined in C++ (a misaligned address, an index outside of an array, ...).

#define CHECK(size)                                                                           \
    EXPORT void __tsan_read##size(void* p) {                                                  \
        site = __builtin_return_address(0); access(p, size, false);                           \
    }                                                                                         \
    EXPORT void __tsan_write##size(void* p) {                                                 \
        site = __builtin_return_address(0); access(p, size, true);                            \
    }                                                                                         \
    EXPORT void __tsan_unaligned_read##size(void* p) {                                        \
        site = __builtin_return_address(0); access(p, size, false);                           \
    }                                                                                         \
    EXPORT void __tsan_unaligned_write##size(void* p) {                                       \
        site = __builtin_return_address(0); access(p, size, true);                            \
    }
CHECK(1) CHECK(2) CHECK(4) CHECK(8) CHECK(16)
EXPORT void __tsan_read_range(void* p, size_t size) {
    site = __builtin_return_address(0); access(p, size, false);
}
EXPORT void __tsan_write_range(void* p, size_t size) {
    site = __builtin_return_address(0); access(p, size, true);
}
EXPORT void __tsan_init() {}
EXPORT void __tsan_func_entry(void*) {}
EXPORT void __tsan_func_exit() {}

struct Source { const char* file; uint32_t line, column; };
#define UNDEFINED(handler, what)                                                              \
    EXPORT void __ubsan_handle_##handler(Source* s, ...) { fail(s->line, what); }
UNDEFINED(type_mismatch_v1, "misaligned address")
UNDEFINED(out_of_bounds, "index out of bounds of an array")
UNDEFINED(shift_out_of_bounds, "a shift by more than the type's bits")
UNDEFINED(divrem_overflow, "integer division by zero")
UNDEFINED(add_overflow, "integer overflow in +")
UNDEFINED(sub_overflow, "integer overflow in -")
UNDEFINED(mul_overflow, "integer overflow in *")
UNDEFINED(negate_overflow, "integer overflow in -")
