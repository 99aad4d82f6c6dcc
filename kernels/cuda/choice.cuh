// The choice of experts, by one warp.
#pragma once
#include "machine.cuh"

// In the order of the floats, and never 0.
DEVICE u32 ordered(float v) {
  u32 bits = __float_as_uint(v);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
DEVICE float sigmoid(float v) { return 1 / (1 + __expf(-v)); }

// The BEST (at most 32) of COUNT experts by sigmoid(logit) + bias, best first, of equals the lower number, and their
// weights: sigmoid(logit), which SUM_ONE makes sum to one, times `scale`. A lane has neighbouring experts.
template <int COUNT, int BEST, bool SUM_ONE>
DEVICE void choose(const float* logits, const float* bias, float scale, int* ids, float* chosen) {
  constexpr int EACH = (COUNT + 31) / 32;
  static_assert(BEST <= 32 && BEST <= COUNT, "");
  const int lane = threadIdx.x & 31;
  float score[EACH], beside[EACH];
  u32 key[EACH];  // sigmoid(logit) + bias, in the order of integers; 0: none, or taken
#pragma unroll
  for (int j = 0; j < EACH; ++j) {
    const int e = min(lane * EACH + j, COUNT - 1);
    score[j] = __ldcg(logits + e), beside[j] = bias[e];
  }
#pragma unroll
  for (int j = 0; j < EACH; ++j) {
    score[j] = sigmoid(score[j]);
    key[j] = lane * EACH + j < COUNT ? ordered(score[j] + beside[j]) : 0;
  }
  int own = 0;
  float weight = 0;
#pragma unroll 1
  for (int place = 0; place < BEST; ++place) {
    u32 best = 0;
#pragma unroll
    for (int j = 0; j < EACH; ++j) best = max(best, key[j]);
    const u32 most = __reduce_max_sync(ALL, best);
    const int owner = __ffs(__ballot_sync(ALL, best == most)) - 1;
    bool found = lane != owner;
    int number = 0;
    float its = 0;
#pragma unroll
    for (int j = 0; j < EACH; ++j)
      if (!found && key[j] == most) found = true, number = lane * EACH + j, its = score[j], key[j] = 0;
    number = __shfl_sync(ALL, number, owner), its = __shfl_sync(ALL, its, owner);
    if (lane == place) own = number, weight = its;
  }
  if (SUM_ONE) weight /= warp_sum(weight) + 1e-20f;
  if (lane < BEST) ids[lane] = own, chosen[lane] = weight * scale;
}
