// The warp of products.cu that copies weights to shared memory.
#pragma once
#include "plan.cuh"

// Begin a stage's copies; one lane. A summed part's vector, or all but it.
template <int P> DEVICE void fill_vector(const Arguments& a, const Shared& s, const Cursor& c, int stage) {
  constexpr int bytes = COLUMNS(P) * 2;
  const u8* from = (const u8*)a.inputs[0] + c.inner / pieces(P) * bytes;
  copy_bulk(s.ring(stage) + vector_in_stage(P), from, bytes, s.full(stage));
}
template <int P> DEVICE void fill(const Arguments& a, const Shared& s, const Cursor& c, int stage) {
  int tile = c.job, copy = 0, piece = c.inner;
  if (SUMMED(P)) copy = c.inner / pieces(P), piece = c.inner % pieces(P);
  else if (COPIES(P) > 1) copy = c.job / tiles(P), tile = c.job - copy * tiles(P);
  const Part& part = a.parts[P];
  u64 row = (u64)(CHOSEN(P) ? s.ids()[copy] : 0) * ROWS(P) + tile * height(P);
  int rows = min(height(P), ROWS(P) - tile * height(P));
  u8* to = s.ring(stage);
  u64* barrier = s.full(stage);
  constexpr int vector = SUMMED(P) ? COLUMNS(P) * 2 : 0;
  arrive_and_expect(barrier, rows * (piece_bytes(P) + scale_bytes(P)) + vector);
  const u8* from = part.weights + row * row_bytes(P) + piece * piece_bytes(P);
  if (pieces(P) == 1) {
    copy_bulk(to, from, rows * piece_bytes(P), barrier);
  } else {
#pragma unroll 1
    for (int r = 0; r < rows; ++r) copy_bulk(to + r * pitch(P), from + (u64)r * row_bytes(P), piece_bytes(P), barrier);
  }
  if (BITS(P) == 4) copy_bulk(to + height(P) * pitch(P), part.scales + row * scale_bytes(P), rows * scale_bytes(P), barrier);
}

DEVICE void fill_next(const Arguments& a, const Shared& s, const Cursor& c, int stage) {
  if (c.part == 0) fill<0>(a, s, c, stage);
  else if (PARTS > 1 && c.part == 1) fill<P1>(a, s, c, stage);
  else if (PARTS > 2) fill<P2>(a, s, c, stage);
}
// A summed part is a launch's only one.
DEVICE void fill_next_vector(const Arguments& a, const Shared& s, const Cursor& c, int stage) {
  if (SUMMED(0)) fill_vector<0>(a, s, c, stage);
}

// It has nothing else to do: with results to write as well, a job took it as long as the others.
DEVICE void copy(const Arguments& a, const Shared& s, const Cursor& begin, bool some) {
  const int lane = threadIdx.x & 31;
  Cursor at = begin;
  bool more = some;
  int filled = 0;
  if (lane == 0) {
#pragma unroll 1
    for (int i = 0; i < STAGES; ++i)
      begin_barrier(s.full(i), 1), begin_barrier(s.empty(i), 1), begin_barrier(s.done(i), GROUP);
    begin_barrier(s.weighted(), 1);
    publish_barriers();
  }
  const auto take_ids = [&] {
    if (lane < TOP) s.ids()[lane] = __ldcg(a.ids + lane);
    __syncwarp();
  };
  if (CHOOSE == 3) take_ids();
  // What the launch in front does not decide.
#pragma unroll 1
  for (; more && filled < STAGES && (CHOOSE == 3 || !at.chosen()); ++filled) {
    if (lane == 0) fill_next(a, s, at, filled);
    more = at.next_stage();
  }
  __syncthreads();
  wait_for_producers();
  if (SUMMED(0)) {
    Cursor again = begin;
#pragma unroll 1
    for (int stage = 0; stage < filled; ++stage, again.next_stage())
      if (lane == 0) fill_next_vector(a, s, again, stage);
  }
  if (CHOOSE == 2) take_ids();
#pragma unroll 1
  for (; more && filled < STAGES; ++filled) {
    if (lane == 0) fill_next(a, s, at, filled), fill_next_vector(a, s, at, filled);
    more = at.next_stage();
  }
  if (lane > 0) return;
  let_next_begin();
  int stage = 0;
  u32 parity = 0;
#pragma unroll 1
  for (; more; more = at.next_stage()) {
    wait_phase(s.empty(stage), parity);
    fill_next(a, s, at, stage);
    fill_next_vector(a, s, at, stage);
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
}
