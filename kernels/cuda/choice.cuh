// The choice of experts, by one warp.
#pragma once
#include "machine.cuh"

// In the order of the floats, and never 0.
DEVICE u32 ordered(float v) {
  u32 bits = __float_as_uint(v);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
DEVICE float sigmoid(float v) { return 1 / (1 + __expf(-v)); }

// The TOP (at most 32) best of EXPERTS by sigmoid(logit) + bias, best first, of equals the lower number, and their
// weights. A lane has neighbouring experts; the TOP-th best of the lanes' best is at most the TOP-th best of all, so
// that what is less is out. The others, in the order of their numbers, each count who is better.
template <int COUNT, int BEST, bool SUM_ONE>
DEVICE void choose(const float* logits, const float* bias, float scale, u32* keys, int* numbers, int* ids, float* weights) {
  constexpr int EACH = (COUNT + 31) / 32;
  static_assert(BEST <= 32 && BEST <= COUNT, "");
  const int lane = threadIdx.x & 31;
  u32 key[EACH], best = 0;
#pragma unroll
  for (int j = 0; j < EACH; ++j) {
    int e = lane * EACH + j;
    key[j] = e < COUNT ? ordered(sigmoid(__ldcg(logits + e)) + bias[e]) : 0;
    best = key[j] > best ? key[j] : best;
  }
  int rank = 0;
#pragma unroll 4
  for (int i = 0; i < 32; ++i) {
    u32 other = __shfl_sync(ALL, best, i);
    rank += other > best || (other == best && i < lane);
  }
  u32 least = __shfl_sync(ALL, best, __ffs(__ballot_sync(ALL, rank == BEST - 1)) - 1);
  int own = 0;
#pragma unroll
  for (int j = 0; j < EACH; ++j) own += key[j] >= least && key[j] != 0;
  int before = own;
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    int other = __shfl_up_sync(ALL, before, lanes);
    before += lane >= lanes ? other : 0;
  }
  const int all = __shfl_sync(ALL, before, 31);
  before -= own;
#pragma unroll
  for (int j = 0; j < EACH; ++j)
    if (key[j] >= least && key[j] != 0) keys[before] = key[j], numbers[before++] = lane * EACH + j;
  __syncwarp();
#pragma unroll 1
  for (int i = lane; i < all; i += 32) {
    u32 mine = keys[i];
    int place = 0;
#pragma unroll 4
    for (int k = 0; k < all; ++k) place += keys[k] > mine || (keys[k] == mine && k < i);
    if (place < BEST) ids[place] = numbers[i];
  }
  __syncwarp();
  float weight = lane < BEST ? sigmoid(__ldcg(logits + ids[lane])) : 0;
  float total = SUM_ONE ? warp_sum(weight) + 1e-20f : 1;
  if (lane < BEST) weights[lane] = weight / total * scale;
  __syncwarp();
}
