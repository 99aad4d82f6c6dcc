// What kernels of CUDA C++ take from the machine, on a CPU: threads are fibers. A kernel's source stands behind
// this, without its functions of inline assembly, which are here (see cuda_on_cpu.py).
//
// What may come late comes late: copies to shared memory, and what the launch in front wrote, only when nobody
// can go on without (but for what another block sends); an odd seed lets copies come at once. A seed above 1 also draws who runs first. Memory that nobody wrote holds NaN. What a GPU leaves undefined is a fault where it is seen here.
#pragma once
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/mman.h>
#include <ucontext.h>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __maxnreg__(registers)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)
#define __expf expf
#define __logf logf
#define __CUDA_ARCH__ 900

struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(8) float2 { float x, y; };
struct dim3 { unsigned x, y, z; };

namespace machine {

typedef unsigned char byte;
typedef unsigned long long word;
constexpr size_t STACK = 64 << 10, STATIC = 48 << 10, GUARD = 1024;
constexpr int MOST_BLOCKS = 16, MOST_WARPS = 32, MOST_BARRIERS = 64, MOST_ARRAYS = 16;
constexpr unsigned EVERYBODY = 0xFFFFFFFFu;
constexpr word MARK = 0xBA221E2500000000ull;  // of a barrier's word; the rest is its number

struct Range { byte* at; size_t bytes; };
struct Copy;
struct Fiber {
  jmp_buf jump;
  ucontext_t context;
  Fiber* next;
  const char* waits;  // for what
  dim3 thread, block;
  int rank;  // of the block in its cluster
  unsigned cluster_phase;
  Copy *first_copy, *last_copy;  // of sixteen bytes, on their way
  int groups;                           // of them that were ended
  bool begun, arrived;  // arrived: at the cluster's barrier, and has not waited
};
struct Queue { Fiber *first, *last; };
struct Slot { unsigned a[4], b[2]; };
struct Meeting {  // of lanes or threads, for one thing at a time
  int count, need;
  unsigned generation, mask;
  const char* what;
  Queue waiting;
  Slot slots[2][32];
};
struct Copy {
  Copy* next;
  byte* to;
  const byte* from;
  size_t bytes;
  int group;
};
struct Phases {
  word* at;
  unsigned arrivals, pending, phase;
  long bytes;
  Copy *first, *last;
  Queue waiting;
};
struct Block {
  byte* memory;
  Meeting all, some, warps[MOST_WARPS][4];
  Phases barriers[MOST_BARRIERS];
  int barrier_count, live;
  bool begun;
};
struct Array { const char* name; size_t at, bytes; };

static Block* blocks[MOST_BLOCKS];
static Fiber *fibers, *now;
static Queue lanes_of[MOST_BLOCKS * MOST_WARPS];  // that can go on
static int ready[MOST_BLOCKS * MOST_WARPS], ready_count, running;  // warps that have such lanes, and who runs
static unsigned priority[MOST_BLOCKS * MOST_WARPS];
static bool apart;
static byte* stacks;
static size_t fiber_room;
static jmp_buf scheduler, outside;
static dim3 grid, block_size;
static int cluster;
static size_t dynamic;
static unsigned seed;
static word dice;
static unsigned cluster_phase, cluster_count, cluster_size;
static Queue cluster_waiting, producer_waiting;
static bool produced;
static byte** saved;
static const Range *known, *late;
static int known_count, late_count;
static Array arrays[MOST_ARRAYS];
static int array_count;
static size_t array_end;
static char message[600];
static void (*kernel_call)();
static const void* kernel_arguments;

[[noreturn]] static void fault(const char* format, ...) {
  va_list list;
  va_start(list, format);
  int n = vsnprintf(message, 480, format, list);
  va_end(list);
  if (n > 479) n = 479;
  if (now) snprintf(message + n, 100, " (block %u, thread %u)", now->block.x, now->thread.x);
  _longjmp(outside, 1);
}

static unsigned roll(unsigned below) {
  dice ^= dice << 13, dice ^= dice >> 7, dice ^= dice << 17;
  return (unsigned)((dice >> 32) % below);
}
static Block& own() { return *blocks[now->rank]; }

static void append(Queue& q, Fiber* f) {
  f->next = nullptr;
  if (q.first) q.last->next = f;
  else q.first = f;
  q.last = f;
}
static int warp_of(const Fiber* f) { return f->rank * MOST_WARPS + (int)(f->thread.x / 32); }
static void go(Fiber* f) {
  const int warp = warp_of(f);
  if (!lanes_of[warp].first && warp != running) ready[ready_count++] = warp;
  append(lanes_of[warp], f);
}
// A warp's lanes follow one another, as nearly as a GPU keeps them together; unless they are to be apart.
static Fiber* next_fiber() {
  if (running >= 0 && lanes_of[running].first && apart) ready[ready_count++] = running;
  if (running < 0 || !lanes_of[running].first || apart) {
    running = -1;
    if (!ready_count) return nullptr;
    int best = 0;
    if (seed > 1) {  // of a few, which has the highest priority
      best = (int)roll((unsigned)ready_count);
      for (int i = 0; i < 2; ++i) {
        int other = (int)roll((unsigned)ready_count);
        if (priority[ready[other]] > priority[ready[best]]) best = other;
      }
    }
    running = ready[best];
    --ready_count;
    if (seed > 1) ready[best] = ready[ready_count];
    else memmove(ready, ready + 1, sizeof(int) * (size_t)ready_count);
  }
  Queue& q = lanes_of[running];
  Fiber* f = q.first;
  q.first = f->next;
  return f;
}
static void leave() {
  if (!_setjmp(now->jump)) _longjmp(scheduler, 1);
}
static void stay(Queue& q, const char* what) {  // until somebody wakes the queue
  now->waits = what;
  append(q, now);
  leave();
}
static void wake(Queue& q) {
  for (Fiber *f = q.first, *next; f; f = next) next = f->next, go(f);
  q.first = q.last = nullptr;
}

static void open(Meeting& m) {
  m.count = 0, ++m.generation;
  wake(m.waiting);
}
static void meet(Meeting& m, int need, const char* what) {
  if (m.count == 0) m.need = need, m.what = what;
  if (m.need != need) fault("%s of %d threads meets %s of %d", what, need, m.what, m.need);
  if (m.what != what && strcmp(m.what, what)) fault("%s meets %s in a warp", what, m.what);
  if (++m.count == need) return open(m);
  stay(m.waiting, what);
}
// All lanes of a mask, and what each has brought.
static const Slot* lanes_meet(unsigned mask, const char* what, const Slot& slot) {
  const unsigned lane = now->thread.x % 32;
  if (!(mask >> lane & 1)) fault("%s of the lanes %08x by lane %u", what, mask, lane);
  Meeting* m = own().warps[now->thread.x / 32];
  for (int i = 0; m->mask != mask; ++m, ++i) {
    if (i == 3) fault("%s: more sets of lanes than are kept here", what);
    if (m->mask == 0) m->mask = mask;
    if (m->mask == mask) break;
  }
  Slot* slots = m->slots[m->generation & 1];
  slots[lane] = slot;
  meet(*m, __builtin_popcount(mask), what);
  return slots;
}
static unsigned from_lane(const Slot* slots, unsigned mask, unsigned lane) {
  if (!(mask >> lane & 1)) fault("a lane reads lane %u, which is not of the mask %08x", lane, mask);
  return slots[lane].a[0];
}

static bool in_shared(const void* p, size_t bytes) {
  const byte *at = (const byte*)p, *memory = own().memory;
  return at >= memory && at + bytes <= memory + STATIC + dynamic;
}
static void check_global(const void* p, size_t bytes, const char* what) {
  for (int i = 0; i < known_count; ++i)
    if ((byte*)p >= known[i].at && (byte*)p + bytes <= known[i].at + known[i].bytes) return;
  fault("%s of %zu bytes out of any tensor", what, bytes);
}

static Phases& phases_of(Block& block, word* barrier) {
  if ((*barrier & ~0xFFull) != MARK) fault("a barrier that nobody has begun, or that was written over");
  Phases& b = block.barriers[*barrier & 0xFF];
  if (b.at != barrier) fault("a barrier that was copied");
  return b;
}
static Phases& phases(word* barrier) {
  if (!in_shared(barrier, 8) || (size_t)barrier % 8) fault("a barrier out of shared memory");
  return phases_of(own(), barrier);
}
static void settle(Phases& b) {
  if (b.pending || b.bytes) return;
  if (b.first) fault("a phase ends before copies that were not announced");
  b.pending = b.arrivals, ++b.phase;
  wake(b.waiting);
}
static void deliver(Phases& b) {
  while (Copy* c = b.first) {
    memcpy(c->to, c->from, c->bytes);
    b.bytes -= (long)c->bytes;
    b.first = c->next;
    free(c);
  }
  settle(b);
}

static bool deliver_one() {  // copies that somebody waits for
  Phases* found = nullptr;
  int count = 0;
  for (int r = 0; r < cluster; ++r)
    for (int i = 0; i < blocks[r]->barrier_count; ++i) {
      Phases& b = blocks[r]->barriers[i];
      if (b.first && b.waiting.first && (!found || (seed > 1 && roll(++count) == 0))) found = &b;
    }
  if (found) deliver(*found);
  return found;
}
static void bring() {
  for (int i = 0; i < late_count; ++i) memcpy(late[i].at, saved[i], late[i].bytes);
}
static bool produce_all() {
  if (produced || !producer_waiting.first) return false;
  bring();
  produced = true;
  wake(producer_waiting);
  return true;
}
// Nobody can go on: what was late comes.
static bool nothing_runs() {
  if (seed & 2) return produce_all() || deliver_one();
  return deliver_one() || produce_all();
}

static void fiber_main() {
  own().begun = true;
  kernel_call();
  now->waits = nullptr;
  if (now->first_copy) fault("a thread ended before its copies");
  Block& b = own();
  if (b.all.count && b.all.count == --b.all.need) open(b.all);
  --b.live;
  _longjmp(scheduler, 1);
}

static byte* array(const char* name, size_t bytes, size_t align) {
  for (int i = 0; i < array_count; ++i)
    if (!strcmp(arrays[i].name, name)) {
      if (arrays[i].bytes != bytes) fault("two arrays %s in shared memory", name);
      return own().memory + arrays[i].at;
    }
  array_end = (array_end + align - 1) / align * align;
  if (array_count == MOST_ARRAYS || array_end + bytes > STATIC) fault("too much static shared memory");
  arrays[array_count++] = {name, array_end, bytes};
  array_end += bytes;
  return own().memory + arrays[array_count - 1].at;
}
static byte* dynamic_array() { return own().memory + STATIC; }

static void run_cluster(int first) {
  const int threads = (int)block_size.x, all = cluster * threads;
  ready_count = 0, running = -1;
  memset(lanes_of, 0, sizeof lanes_of);
  cluster_phase = cluster_count = 0, cluster_size = (unsigned)all;
  cluster_waiting = producer_waiting = {};
  produced = false;
  for (int i = 0; i < late_count; ++i) {
    memcpy(saved[i], late[i].at, late[i].bytes);
    memset(late[i].at, 0xFF, late[i].bytes);
  }
  for (int r = 0; r < cluster; ++r) {
    Block& b = *blocks[r];
    byte* memory = b.memory;
    memset(&b, 0, sizeof b);
    b.memory = memory, b.live = threads;
    memset(memory, 0xFF, STATIC + dynamic + GUARD);
    for (int w = 0; w < MOST_WARPS; ++w) priority[r * MOST_WARPS + w] = roll(1000);
    for (int t = 0; t < threads; ++t) {
      Fiber& f = fibers[r * threads + t];
      f.begun = f.arrived = false, f.waits = nullptr, f.rank = r, f.first_copy = nullptr, f.groups = 0;
      f.thread = {(unsigned)t, 0, 0}, f.block = {(unsigned)(first + r), 0, 0};
      go(&f);
    }
  }
  for (;;) {
    for (;;) {
      now = next_fiber();
      if (!now) break;
      if (_setjmp(scheduler)) continue;
      if (now->begun) _longjmp(now->jump, 1);
      now->begun = true;
      getcontext(&now->context);
      now->context.uc_stack.ss_sp = stacks + (size_t)(now - fibers) * STACK;
      now->context.uc_stack.ss_size = STACK;
      now->context.uc_link = nullptr;
      makecontext(&now->context, fiber_main, 0);
      setcontext(&now->context);
    }
    if (!nothing_runs()) break;
  }
  for (int i = 0; i < all; ++i)
    if (fibers[i].waits) {
      now = fibers + i;
      fault("waits for ever: %s", now->waits);
    }
  for (int r = 0; r < cluster; ++r) {
    for (int i = 0; i < blocks[r]->barrier_count; ++i)
      if (blocks[r]->barriers[i].first) fault("block %d ended before its copies", first + r);
    for (size_t i = 0; i < GUARD; ++i)
      if (blocks[r]->memory[STATIC + dynamic + i] != 0xFF)
        fault("block %d wrote past its shared memory", first + r);
  }
  if (late_count && !produced) fault("nobody waited for the launch in front");
}

static const char* launch(int count, int threads, int bytes, int in_cluster, unsigned with_seed, bool lanes_apart,
                          const Range* tensors, int tensor_count, const Range* from_front, int front_count) {
  now = nullptr;
  grid = {(unsigned)count, 1, 1}, block_size = {(unsigned)threads, 1, 1};
  cluster = in_cluster, dynamic = (size_t)bytes, seed = with_seed, apart = lanes_apart;
  dice = 88172645463325252ull + with_seed * 7919ull;
  known = tensors, known_count = tensor_count, late = from_front, late_count = front_count;
  array_count = 0, array_end = 0;
  volatile int done = 0;
  saved = (byte**)calloc((size_t)front_count + 1, sizeof(byte*));
  for (int i = 0; i < late_count; ++i) saved[i] = (byte*)malloc(late[i].bytes);
  const char* volatile result = nullptr;
  if (_setjmp(outside) == 0) {
    if (cluster > MOST_BLOCKS || count % cluster || threads % 32 || threads > 32 * MOST_WARPS)
      fault("no such launch");
    const size_t all = (size_t)cluster * (size_t)threads;
    if (all > fiber_room) {
      if (stacks) munmap(stacks, fiber_room * STACK);
      free(fibers);
      fibers = (Fiber*)calloc(all, sizeof(Fiber));
      stacks = (byte*)mmap(nullptr, all * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      fiber_room = all;
    }
    for (int r = 0; r < cluster; ++r) {
      blocks[r] = (Block*)calloc(1, sizeof(Block));
      blocks[r]->memory = (byte*)aligned_alloc(1024, (STATIC + dynamic + GUARD + 1023) / 1024 * 1024);
    }
    const int clusters = count / cluster;  // one after another; with a seed the last first
    for (; done < clusters; done = done + 1) run_cluster((seed ? clusters - 1 - done : done) * cluster);
  } else {
    result = message;
    if (!produced && done < count) bring();
  }
  for (int r = 0; r < cluster && r < MOST_BLOCKS; ++r)
    if (blocks[r]) free(blocks[r]->memory), free(blocks[r]), blocks[r] = nullptr;
  for (int i = 0; i < late_count; ++i) free(saved[i]);
  free(saved);
  now = nullptr;
  return result;
}

// g++ looks at each address and index (-fsanitize): a GPU wants addresses aligned, too.
struct Place { const char* file; unsigned line, column; };

}  // namespace machine

extern "C" [[noreturn, gnu::used]] void __ubsan_handle_type_mismatch_v1_abort(machine::Place* place, size_t at) {
  machine::fault("an address that is not aligned, or null: %zx, line %u of the text", at, place->line);
}
extern "C" [[noreturn, gnu::used]] void __ubsan_handle_out_of_bounds_abort(machine::Place* place, size_t index) {
  machine::fault("an index out of bounds: %zu, line %u of the text", index, place->line);
}

#define threadIdx (machine::now->thread)
#define blockIdx (machine::now->block)
#define gridDim (machine::grid)
#define blockDim (machine::block_size)

// CUDA C++'s own functions.
inline int min(int a, int b) { return a < b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline float rsqrtf(float v) { return 1 / sqrtf(v); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __uint_as_float(unsigned v) {
  float r;
  memcpy(&r, &v, 4);
  return r;
}
inline unsigned __float_as_uint(float v) {
  unsigned r;
  memcpy(&r, &v, 4);
  return r;
}
inline float __int_as_float(int v) { return __uint_as_float((unsigned)v); }
inline int __float_as_int(float v) { return (int)__float_as_uint(v); }
inline int __ffs(int v) { return ffs(v); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __clz(int v) { return v ? __builtin_clz((unsigned)v) : 32; }
inline size_t __cvta_generic_to_shared(const void* p) { return (size_t)p; }
template <class T> inline T __ldcg(const T* p) {
  if ((size_t)p % sizeof(T)) machine::fault("a load of %zu bytes that is not aligned", sizeof(T));
  machine::check_global(p, sizeof(T), "a load");
  return *p;
}
template <class T> inline T __ldg(const T* p) { return __ldcg(p); }
template <class T> inline T __ldcs(const T* p) { return __ldcg(p); }
inline void __threadfence() {}
inline void __threadfence_block() {}

inline void __syncthreads() { machine::meet(machine::own().all, machine::own().live, "__syncthreads"); }
inline void __syncwarp(unsigned mask = machine::EVERYBODY) { machine::lanes_meet(mask, "__syncwarp", {}); }
template <class T> inline machine::Slot slot_of(T v) {
  static_assert(sizeof(T) == 4, "");
  machine::Slot slot = {};
  memcpy(slot.a, &v, 4);
  return slot;
}
template <class T> inline T shuffled(unsigned mask, const char* what, T v, unsigned lane) {
  unsigned bits = machine::from_lane(machine::lanes_meet(mask, what, slot_of(v)), mask, lane);
  memcpy(&v, &bits, 4);
  return v;
}
template <class T> inline T __shfl_sync(unsigned mask, T v, int lane) {
  return shuffled(mask, "__shfl_sync", v, (unsigned)lane & 31);
}
template <class T> inline T __shfl_xor_sync(unsigned mask, T v, int lanes) {
  return shuffled(mask, "__shfl_xor_sync", v, (threadIdx.x & 31) ^ (unsigned)lanes);
}
template <class T> inline T __shfl_up_sync(unsigned mask, T v, unsigned lanes) {
  unsigned lane = threadIdx.x & 31;
  return shuffled(mask, "__shfl_up_sync", v, lane >= lanes ? lane - lanes : lane);
}
template <class T> inline T __shfl_down_sync(unsigned mask, T v, unsigned lanes) {
  unsigned lane = threadIdx.x & 31;
  return shuffled(mask, "__shfl_down_sync", v, lane + lanes < 32 ? lane + lanes : lane);
}
inline unsigned __ballot_sync(unsigned mask, int vote) {
  const machine::Slot* slots = machine::lanes_meet(mask, "__ballot_sync", slot_of<int>(vote != 0));
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) bits |= slots[i].a[0] << i;
  return bits;
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  const machine::Slot* slots = machine::lanes_meet(mask, "__reduce_max_sync", slot_of<unsigned>(value));
  unsigned most = 0;
  for (unsigned lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) most = max(most, slots[lane].a[0]);
  return most;
}
inline int __any_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote) != 0; }
inline int __all_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote) == mask; }

// The kernels' own functions that are inline assembly for a GPU.
inline void wait_for_producers() {
  if (!machine::produced) machine::stay(machine::producer_waiting, "wait_for_producers");
}
inline void let_next_begin() {  // kernels read before they wait what the launch before the one in front wrote
  if (!machine::produced) machine::fault("the next launch may begin before this one has waited");
}

inline void begin_barrier(machine::word* barrier, unsigned arrivals) {
  machine::Block& block = machine::own();
  if (!machine::in_shared(barrier, 8) || (size_t)barrier % 8) machine::fault("a barrier out of shared memory");
  if (block.barrier_count == machine::MOST_BARRIERS) machine::fault("too many barriers");
  if (arrivals == 0) machine::fault("a barrier of nobody");
  for (int i = 0; i < block.barrier_count; ++i)
    if (block.barriers[i].at == barrier) machine::fault("a barrier begins twice");
  machine::Phases& b = block.barriers[block.barrier_count];
  b.at = barrier, b.arrivals = b.pending = arrivals;
  *barrier = machine::MARK | (unsigned)block.barrier_count++;
}
inline void publish_barriers() {}
inline void arrive_and_expect(machine::word* barrier, unsigned bytes) {
  machine::Phases& b = machine::phases(barrier);
  if (b.pending == 0) machine::fault("more arrive at a barrier than it was begun for");
  --b.pending, b.bytes += bytes;
  machine::settle(b);
}
inline void arrive(machine::word* barrier) { arrive_and_expect(barrier, 0); }
inline void wait_phase(machine::word* barrier, unsigned parity) {
  if (parity > 1) machine::fault("a parity of %u", parity);
  machine::Phases& b = machine::phases(barrier);
  while ((b.phase & 1) == parity) machine::stay(b.waiting, "wait_phase");
}
inline void copy_bulk(void* to, const void* from, unsigned bytes, machine::word* barrier) {
  machine::Phases& b = machine::phases(barrier);
  if (bytes % 16 || (size_t)to % 16 || (size_t)from % 16)
    machine::fault("a copy of %u bytes to ..%zx from ..%zx", bytes, (size_t)to % 16, (size_t)from % 16);
  if (!machine::in_shared(to, bytes)) machine::fault("a copy of %u bytes out of shared memory", bytes);
  machine::check_global(from, bytes, "a copy");
  machine::Copy* c = (machine::Copy*)malloc(sizeof(machine::Copy));
  *c = {nullptr, (machine::byte*)to, (const machine::byte*)from, bytes, 0};
  if (b.first) b.last->next = c;
  else b.first = c;
  b.last = c;
  if (machine::seed & 1) machine::deliver(b);
}
inline void copy_passing(void* to, const void* from, unsigned bytes, machine::word* barrier) {
  copy_bulk(to, from, bytes, barrier);
}
// Sixteens of bytes that a thread copies come when it waits for them; the rest of a sixteen is zeros.
inline void wait_groups(int but) {
  machine::Fiber& f = *machine::now;
  while (f.first_copy && f.first_copy->group < f.groups - but) {
    machine::Copy* c = f.first_copy;
    memset(c->to, 0, 16);
    memcpy(c->to, c->from, c->bytes);
    f.first_copy = c->next;
    free(c);
  }
}
template <int N> inline void wait_groups() { wait_groups(N); }
inline void end_group() { ++machine::now->groups; }
inline void copy_sixteen(void* to, const void* from, unsigned bytes) {
  if (bytes > 16 || (size_t)to % 16 || (size_t)from % 16) machine::fault("a copy of sixteen bytes, not aligned");
  if (!machine::in_shared(to, 16)) machine::fault("a copy of 16 bytes out of shared memory");
  machine::check_global(from, bytes, "a copy");
  machine::Copy* c = (machine::Copy*)malloc(sizeof(machine::Copy));
  machine::Fiber& f = *machine::now;
  *c = {nullptr, (machine::byte*)to, (const machine::byte*)from, bytes, f.groups};
  if (f.first_copy) f.last_copy->next = c;
  else f.first_copy = c;
  f.last_copy = c;
  if (machine::seed & 1) wait_groups(-1);
}
inline void load_matrices(unsigned* r, const unsigned char* row, bool transposed = false) {
  if ((size_t)row % 16 || !machine::in_shared(row, 16)) machine::fault("a matrix's row out of shared memory, or not aligned");
  const size_t at = (size_t)(row - machine::own().memory);
  const machine::Slot* all = machine::lanes_meet(machine::EVERYBODY, "load_matrices", {{(unsigned)at}, {}});
  const unsigned g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  for (unsigned m = 0; m < 4; ++m) {
    const machine::byte* memory = machine::own().memory;
    if (transposed) {
      unsigned short two[2];
      for (unsigned i = 0; i < 2; ++i) memcpy(two + i, memory + all[8 * m + 2 * t + i].a[0] + 2 * g, 2);
      r[m] = (unsigned)two[1] << 16 | two[0];
    } else {
      memcpy(r + m, memory + all[8 * m + g].a[0] + 4 * t, 4);
    }
  }
}
inline void load_transposed(unsigned* r, const unsigned char* row) { load_matrices(r, row, true); }
inline unsigned take_ticket(unsigned* ticket, unsigned last) {
  machine::check_global(ticket, 4, "a ticket");
  const unsigned before = *ticket;
  *ticket = before >= last ? 0 : before + 1;
  return before;
}
inline void sync_some(unsigned threads) { machine::meet(machine::own().some, (int)threads, "sync_some"); }

inline unsigned bf16_of(float v) {  // to nearest, ties to even
  unsigned bits = __float_as_uint(v);
  return v != v ? 0x7FFFu : (bits + 0x7FFFu + (bits >> 16 & 1)) >> 16;
}
inline unsigned two_bf16(float low, float high) { return bf16_of(high) << 16 | bf16_of(low); }
inline float e4m3(unsigned code) {
  const int exponent = (int)(code >> 3 & 15), fraction = (int)(code & 7);
  float v = exponent ? ldexpf(1 + (float)fraction / 8, exponent - 7) : ldexpf((float)fraction / 8, -6);
  if (exponent == 15 && fraction == 7) v = NAN;
  return code & 128 ? -v : v;
}
inline void four_scales(unsigned bytes, float* s) {
  for (int i = 0; i < 4; ++i) s[i] = e4m3(bytes >> 8 * i & 255);
}
inline unsigned pick(unsigned low, unsigned high, unsigned which) {
  unsigned r = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned n = which >> 4 * i & 15, byte = (n & 4 ? high : low) >> 8 * (n & 3) & 255;
    r |= (n & 8 ? (byte >> 7) * 255 : byte) << 8 * i;
  }
  return r;
}
inline unsigned as_fp8(float v) {  // E4M3: to nearest, ties to even, clamped; NaN stays
  const unsigned sign = __float_as_uint(v) >> 31 << 7;
  if (v != v) return 0x7Fu;
  float best = INFINITY;
  unsigned code = 0;
  for (unsigned c = 0; c < 127; ++c) {
    const float far = fabsf(e4m3(c) - fabsf(v));
    if (far < best || (far == best && c % 2 == 0)) best = far, code = c;
  }
  return sign | code;
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned which) {
  const unsigned long long all = (unsigned long long)y << 32 | x;
  unsigned r = 0;
  for (int i = 0; i < 4; ++i) r |= (unsigned)(all >> 8 * (which >> 4 * i & 7) & 255) << 8 * i;
  return r;
}
inline float bf16_product(unsigned a, unsigned b) {  // of two pairs
  return __uint_as_float(a << 16) * __uint_as_float(b << 16) +
         __uint_as_float(a & 0xFFFF0000u) * __uint_as_float(b & 0xFFFF0000u);
}
inline void mma(float* c, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  const machine::Slot* all = machine::lanes_meet(machine::EVERYBODY, "mma", {{a0, a1, a2, a3}, {b0, b1}});
  const unsigned lane = threadIdx.x & 31;
  for (unsigned j = 0; j < 2; ++j)
    for (unsigned t = 0; t < 4; ++t) {
      const machine::Slot &x = all[lane / 4 * 4 + t], &y = all[(2 * (lane % 4) + j) * 4 + t];
      c[j] += bf16_product(x.a[0], y.b[0]) + bf16_product(x.a[2], y.b[1]);
      c[2 + j] += bf16_product(x.a[1], y.b[0]) + bf16_product(x.a[3], y.b[1]);
    }
}

inline void prefetch(const void*) {}
inline void cluster_arrive() {
  if (machine::now->arrived) machine::fault("cluster_arrive twice");
  machine::now->arrived = true, machine::now->cluster_phase = machine::cluster_phase;
  if (++machine::cluster_count < machine::cluster_size) return;
  machine::cluster_count = 0, ++machine::cluster_phase;
  machine::wake(machine::cluster_waiting);
}
inline void cluster_wait() {
  if (!machine::now->arrived) machine::fault("cluster_wait without cluster_arrive");
  while (machine::cluster_phase == machine::now->cluster_phase)
    machine::stay(machine::cluster_waiting, "cluster_wait");
  machine::now->arrived = false;
}
inline void send(float* to, int block, const float* v, unsigned bytes, machine::word* barrier) {
  if ((size_t)to % bytes) machine::fault("a store of %u bytes that is not aligned", bytes);
  if (block < 0 || block >= machine::cluster) machine::fault("a store to block %d of the cluster", block);
  if (!machine::in_shared(to, bytes)) machine::fault("a store out of shared memory");
  machine::Block& other = *machine::blocks[block];
  if (!other.begun || !other.live)
    machine::fault("a store to a block that %s", other.begun ? "ended" : "has not begun");
  const auto at = [&](void* own) { return other.memory + ((machine::byte*)own - machine::own().memory); };
  memcpy(at(to), v, bytes);
  machine::Phases& b = machine::phases_of(other, (machine::word*)at(barrier));
  b.bytes -= bytes;
  machine::settle(b);
}
inline void send_one(float* to, int block, float v, machine::word* barrier) { send(to, block, &v, 4, barrier); }
template <class F> inline void send_four(float* to, int block, F v, machine::word* barrier) {
  const float four[4] = {v.x, v.y, v.z, v.w};
  send(to, block, four, 16, barrier);
}
inline void send_two(float* to, int block, float x, float y, machine::word* barrier) {
  const float two[2] = {x, y};
  send(to, block, two, 8, barrier);
}

template <class A> static void machine_call(void (*kernel)(A)) { kernel(*(const A*)machine::kernel_arguments); }
template <class A> static constexpr size_t machine_size(void (*)(A)) { return sizeof(A); }
