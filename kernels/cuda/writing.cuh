// The warp of products.cu that adds up what the others have of a job, and writes it; and at the end chooses experts.
#pragma once
#include "choice.cuh"
#include "plan.cuh"

// A job's results, in the first lanes, to where they go.
template <int P>
DEVICE void finish(const Arguments& a, const Shared& s, const Cursor& c, float y, float factor, u32 before, u32 add) {
  const Part& part = a.parts[P];
  int tile = c.job, copy = 0, lane = threadIdx.x & 31;
  if (!SUMMED(P) && COPIES(P) > 1) copy = c.job / tiles(P), tile = c.job - copy * tiles(P);
  if (lane >= height(P) || tile * height(P) + lane >= ROWS(P)) return;
  const int row = copy * ROWS(P) + tile * height(P) + lane;
  y *= down_of(BITS(P)) * (SUMMED(P) ? 1.0f : CHOSEN(P) ? s.weights()[copy] : factor);
  if (TO(P) == TO_FLOAT) {
    ((float*)part.out)[row] = y;
    return;
  }
  y = rounded(y);
  if (TO(P) == TO_SQUARED) y = fmaxf(y, 0), y *= y;
  if (TO(P) == TO_STREAM) {
    if (a.addend) y = rounded(y + lower(add));
    y += lower(before);
  }
  if (FOR(P)) y *= up_of(FOR(P));
  const int at = FOR(P) ? copy * ROWS(P) + place_of<FOR(P)>(row - copy * ROWS(P)) : row;
  ((u16*)part.out)[at] = (u16)two_bf16(y, 0);
}

// What the warps of the groups that took a job's stages left of it, from group `first` on.
template <int P> DEVICE float collect(const float* red, int first, int lane) {
  float y = 0;
#pragma unroll
  for (int i = 0; i < (stages(P) < GROUPS ? stages(P) : GROUPS); ++i)
#pragma unroll
    for (int e = 0; e < EIGHTS(P) * GROUP / 4; ++e) y += red[(first + i) % GROUPS * GROUP * HEIGHT + e * 32 + lane];
  if (EIGHTS(P) < 2) y += __shfl_xor_sync(ALL, y, 8);
  if (EIGHTS(P) < 4) y += __shfl_xor_sync(ALL, y, 16);
  return y;
}

DEVICE void write(const Arguments& a, const Shared& s, const Cursor& begin, bool some) {
  const int lane = threadIdx.x & 31;
  Cursor at = begin;
  float factors[3] = {1, 1, 1};
#pragma unroll
  for (int p = 0; p < PARTS; ++p)
    if (BITS(p) < 16 && !CHOSEN(p)) factors[p] = *a.parts[p].factors;
#if CHOOSE == 1
  const int routers = min(FIRST_JOBS, OWN ? OWN : (int)gridDim.x);
  Biases<EXPERTS> biases;
  if (blockIdx.x < routers) biases.load(a.bias);
#endif
  __syncthreads();
#if CHOOSE > 1
  constexpr int of = CHOSEN(P2) ? P2 : CHOSEN(P1) ? P1 : 0;
  if (CHOOSE == 2) wait_for_producers();
  if (lane < TOP) {
    const float factor = BITS(of) < 16 ? a.parts[of].factors[__ldcg(a.ids + lane)] : 1;
    s.weights()[lane] = factor * (SUMMED(of) ? __ldcg(a.chosen + lane) : 1);
  }
  __syncwarp();
  if (lane == 0) arrive(s.weighted());
#endif
  wait_for_producers();
  int stage = 0, first = 0, order = 0;  // of the job: its first stage's group, its place among results
  u32 parity = 0;
#pragma unroll 1
  for (bool left = some; left; left = at.next_stage()) {
    const bool last = SINGLE || at.inner + 1 == at.stages();
    u32 before = 0, add = 0;
    if (TO(0) == TO_STREAM && last && lane < height(0) && at.job * height(0) + lane < ROWS(0)) {
      before = __ldcg(a.stream + at.job * height(0) + lane);
      if (a.addend) add = __ldcg(a.addend + at.job * height(0) + lane);
    }
    wait_phase(s.done(stage), parity);
    float y = 0;
    if (last) {
      if (at.part == 0) y = collect<0>(s.red(order), first, lane);
      else if (PARTS > 1 && at.part == 1) y = collect<P1>(s.red(order), first, lane);
      else if (PARTS > 2) y = collect<P2>(s.red(order), first, lane);
    }
    __syncwarp();  // a lane that still waits for this stage must not see its next phase
    if (lane == 0) arrive(s.empty(stage));
    if (last) {
      if (at.part == 0) finish<0>(a, s, at, y, factors[0], before, add);
      else if (PARTS > 1 && at.part == 1) finish<P1>(a, s, at, y, factors[P1], before, add);
      else if (PARTS > 2) finish<P2>(a, s, at, y, factors[P2], before, add);
      first = (first + at.stages()) % GROUPS;
      if (++order == STAGES) order = 0;
    }
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
#if CHOOSE == 1
  if (blockIdx.x >= routers) return;
  __syncwarp();  // all lanes have written their logits
  const u32 before = __shfl_sync(ALL, lane == 0 ? take_ticket(a.ticket, routers - 1) : 0, 0);
  if (before < routers - 1) return;
  __syncwarp();  // what lane 0 has seen is seen by all
  Candidate* able = (Candidate*)s.ring(0);  // the block's stages are done with
  static_assert(CHOOSE != 1 || EXPERTS * (int)sizeof(Candidate) <= STAGES * STAGE, "");
  choose<EXPERTS, TOP, NORMALIZE>(a.logits, biases, a.scale, able, s.ids(), a.ids, a.chosen);
#endif
}
