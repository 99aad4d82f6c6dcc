// The choice of experts, by one warp.
#pragma once
#include "machine.cuh"

// In the order of the floats, and never 0 but for a NaN.
DEVICE u32 ordered(float v) {
  u32 bits = __float_as_uint(v);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
DEVICE float sigmoid(float v) { return 1 / (1 + __expf(-v)); }

// What is known of an expert.
struct alignas(16) Candidate {
  u32 key;  // sigmoid(logit) + bias, in the order of integers
  int number;
  float score;  // sigmoid(logit)
};

// Of COUNT experts a lane's neighbouring ones: their biases, which come from afar.
template <int COUNT> struct Biases {
  static constexpr int EACH = (COUNT + 31) / 32;
  float of[EACH];
  DEVICE void load(const float* bias) {
#pragma unroll
    for (int j = 0; j < EACH; ++j) of[j] = bias[min((int)(threadIdx.x & 31) * EACH + j, COUNT - 1)];
  }
};

// The BEST (at most 32) of COUNT experts by sigmoid(logit) + bias, best first, of equals the lower number, and their
// weights: sigmoid(logit), which SUM_ONE makes sum to one, times `scale`. A lane has neighbouring experts; the BEST-th
// best of the lanes' best is at most the BEST-th best of all, so that what is less is out. The others, in the order of
// their numbers, each count who is better. (One after the other takes eight microseconds for 22 of 512.)
// Shared memory: `able` for COUNT, `order` for BEST.
template <int COUNT, int BEST, bool SUM_ONE>
DEVICE void choose(const float* logits, const Biases<COUNT>& biases, float scale, Candidate* able, int* order,
                   int* ids, float* chosen) {
  constexpr int EACH = Biases<COUNT>::EACH;
  static_assert(BEST <= 32 && BEST <= COUNT, "");
  const int lane = threadIdx.x & 31;
  float score[EACH];
  u32 key[EACH], best = 0;
#pragma unroll
  for (int j = 0; j < EACH; ++j) score[j] = __ldcg(logits + min(lane * EACH + j, COUNT - 1));
#pragma unroll
  for (int j = 0; j < EACH; ++j) {
    score[j] = sigmoid(score[j]);
    key[j] = lane * EACH + j < COUNT ? ordered(score[j] + biases.of[j]) : 0;
    best = max(key[j], best);
  }
  int rank = 0;
#pragma unroll 8
  for (int i = 0; i < 32; ++i) {
    const u32 other = __shfl_sync(ALL, best, i);
    rank += other > best || (other == best && i < lane);
  }
  const u32 least = __shfl_sync(ALL, best, __ffs(__ballot_sync(ALL, rank == BEST - 1)) - 1);
  int own = 0;
#pragma unroll
  for (int j = 0; j < EACH; ++j) own += key[j] >= least && key[j] != 0;
  int at = own;
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const int other = __shfl_up_sync(ALL, at, lanes);
    at += lane >= lanes ? other : 0;
  }
  const int all = __shfl_sync(ALL, at, 31);
  at -= own;
#pragma unroll
  for (int j = 0; j < EACH; ++j)
    if (key[j] >= least && key[j] != 0) able[at++] = {key[j], lane * EACH + j, score[j]};
  __syncwarp();
#pragma unroll 1
  for (int i = lane; i < all; i += 32) {
    const u32 mine = able[i].key;
    int place = 0;
#pragma unroll 4
    for (int k = 0; k < all; ++k) place += able[k].key > mine || (able[k].key == mine && k < i);
    if (place < BEST) order[place] = i;
  }
  __syncwarp();
  const Candidate mine = able[order[min(lane, BEST - 1)]];
  float weight = lane < BEST ? mine.score : 0;
  if (SUM_ONE) weight /= warp_sum(weight) + 1e-20f;
  if (lane < BEST) ids[lane] = mine.number, chosen[lane] = weight * scale;
}
