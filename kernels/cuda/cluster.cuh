// Blocks of a cluster, which write in one another's shared memory.
#pragma once
#include "machine.cuh"

// A barrier of all; but what threads have stored before may be seen later. (One that releases waits for all of it.)
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
DEVICE u32 place_at(const void* in_shared, int block) {
  u32 at;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(place(in_shared)), "r"(block));
  return at;
}
// To the shared memory of a block; the bytes' arrival counts at the barrier there. No fence is needed.
DEVICE void send_one(float* to, int block, float v, u64* barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];"
               :: "r"(place_at(to, block)), "f"(v), "r"(place_at(barrier, block)) : "memory");
}
DEVICE void send_two(float* to, int block, float x, float y, u64* barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];"
               :: "r"(place_at(to, block)), "f"(x), "f"(y), "r"(place_at(barrier, block)) : "memory");
}
DEVICE void send_four(float* to, int block, Floats v, u64* barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];"
               :: "r"(place_at(to, block)), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(place_at(barrier, block))
               : "memory");
}
