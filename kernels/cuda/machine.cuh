// What the kernels take from the machine: each a few instructions, so that the rest is C++.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
struct alignas(16) Words { u32 x, y, z, w; };
struct alignas(16) Floats { float x, y, z, w; };
struct alignas(8) Pair { u32 x, y; };

#define DEVICE __device__ __forceinline__
#define CONSTANT constexpr __host__ __device__
#define ALL 0xFFFFFFFFu

DEVICE u32 place(const void* in_shared) { return (u32)__cvta_generic_to_shared(in_shared); }

// Programmatic dependent launch. A launch may begin before the one in front of it has ended; what that one wrote can
// be read after `wait_for_producers`. The next launch may begin once every block has said `let_next_begin`.
DEVICE void wait_for_producers() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DEVICE void let_next_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// A barrier in shared memory: a phase ends when so many have arrived, and all bytes that were announced.
DEVICE void begin_barrier(u64* barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" :: "r"(place(barrier)), "r"(arrivals) : "memory");
}
DEVICE void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void arrive(u64* barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" :: "r"(place(barrier)) : "memory");
}
DEVICE void arrive_and_expect(u64* barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" :: "r"(place(barrier)), "r"(bytes) : "memory");
}
DEVICE void wait_phase(u64* barrier, u32 parity) {
  asm volatile("{\n.reg .pred done;\nagain: mbarrier.try_wait.parity.shared.b64 done, [%0], %1, %2;\n@!done bra again;\n}"
               :: "r"(place(barrier)), "r"(parity), "r"(10000000) : "memory");
}
// Copy whole sixteens of bytes to shared memory; their arrival counts at the barrier.
DEVICE void copy_bulk(void* to, const void* from, u32 bytes, u64* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               :: "r"(place(to)), "l"(from), "r"(bytes), "r"(place(barrier)) : "memory");
}
// As `copy_bulk`, of what nobody reads again: of what the second cache holds it is the first to go.
DEVICE void copy_passing(void* to, const void* from, u32 bytes, u64* barrier) {
  asm volatile("{\n.reg .b64 policy;\ncreatepolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
               "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
               "[%0], [%1], %2, [%3], policy;\n}"
               :: "r"(place(to)), "l"(from), "r"(bytes), "r"(place(barrier)) : "memory");
}
// How many came before; 0 again after the last. What the warp wrote before is seen by who comes later.
DEVICE u32 take_ticket(u32* ticket, u32 last) {
  u32 before;
  asm volatile("atom.inc.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(before) : "l"(ticket), "r"(last) : "memory");
  return before;
}
DEVICE void prefetch(const void* p) {  // its line, to the second cache
  asm volatile("prefetch.global.L2 [%0];" :: "l"(p));
}
// A barrier of so many of a block's threads.
DEVICE void sync_some(u32 threads) { asm volatile("bar.sync 1, %0;" :: "r"(threads) : "memory"); }

DEVICE float lower(u32 pair) { return __uint_as_float(pair << 16); }  // of two BF16
DEVICE float upper(u32 pair) { return __uint_as_float(pair & 0xFFFF0000u); }
DEVICE u32 two_bf16(float low, float high) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
DEVICE float rounded(float v) { return lower(two_bf16(v, 0)); }

// Four E4M3 values, the lowest byte first; exact.
DEVICE void four_scales(u32 bytes, float* s) {
  asm("{\n.reg .b32 p, q;\n.reg .b16 l, u, a, b, c, d;\nmov.b32 {l, u}, %4;\n"
      "cvt.rn.f16x2.e4m3x2 p, l;\ncvt.rn.f16x2.e4m3x2 q, u;\nmov.b32 {a, b}, p;\nmov.b32 {c, d}, q;\n"
      "cvt.f32.f16 %0, a;\ncvt.f32.f16 %1, b;\ncvt.f32.f16 %2, c;\ncvt.f32.f16 %3, d;\n}"
      : "=f"(s[0]), "=f"(s[1]), "=f"(s[2]), "=f"(s[3]) : "r"(bytes));
}

// Of each of the four lower nibbles of `which` a byte: of the eight of `low` and `high` the one that its bits 2 to
// 0 name; with bit 3 set, eight times that one's highest bit.
DEVICE u32 pick(u32 low, u32 high, u32 which) {
  u32 r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(low), "r"(high), "r"(which));
  return r;
}

// c += a b of 16 x 16 and 16 x 8 BF16. Lane 4 g + t holds of a the rows g (a0, a2) and g + 8 (a1, a3), of b the column
// g, of both columns (rows of b) 2 t, 2 t + 1 (a0, a1, b0) and 8 more (a2, a3, b1); of c row g (c0, c1) and g + 8
// (c2, c3) at columns 2 t and 2 t + 1.
DEVICE void mma(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

DEVICE float warp_sum(float v) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) v += __shfl_xor_sync(ALL, v, lanes);
  return v;
}
