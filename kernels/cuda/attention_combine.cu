// One token's attention, from what its splits left (attention_split.cu).
#include "attention.cuh"

// A block a query: the splits in their order. A thread has a dimension of every fourth split.
extern "C" __global__ void __launch_bounds__(4 * DIM) attention_combine(const __grid_constant__ Arguments a) {
  __shared__ float sums[4][DIM], weights[4];
  const int d = threadIdx.x % DIM, quarter = threadIdx.x / DIM, head = blockIdx.x / GROUP, row = blockIdx.x % GROUP;
  const int length = (int)*a.position + 1, share = share_of(length), used = (length + share - 1) / share;
  wait_for_producers();
  let_next_begin();
  float top = LOWEST, sum = 0, weight = 0;
  const u64 base = (u64)head * SPLITS * GROUP + row;
  for (int i = 0; i < used; ++i) top = fmaxf(top, __ldcg(a.tops + base + i * GROUP));
#pragma unroll 8
  for (int i = quarter; i < used; i += 4) {
    const float part = exp2f(__ldcg(a.tops + base + i * GROUP) - top);
    weight += part * __ldcg(a.weights + base + i * GROUP);
    sum += part * __ldcg(a.sums + (base + i * GROUP) * DIM + d);
  }
  sums[quarter][d] = sum;
  if (d == 0) weights[quarter] = weight;
  __syncthreads();
  if (quarter > 0) return;
  sum = sums[0][d] + sums[1][d] + sums[2][d] + sums[3][d];
  weight = weights[0] + weights[1] + weights[2] + weights[3];
  a.out[(u64)blockIdx.x * DIM + d] = (u16)two_bf16(sum / weight * a.v_scale, 0);
}
