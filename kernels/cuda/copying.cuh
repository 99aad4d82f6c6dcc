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
    copy_passing(to, from, rows * piece_bytes(P), barrier);
  } else {
#pragma unroll 1
    for (int r = 0; r < rows; ++r) copy_passing(to + r * pitch(P), from + (u64)r * row_bytes(P), piece_bytes(P), barrier);
  }
  constexpr int scales = scale_bytes(P);
  if (scales) copy_passing(to + height(P) * pitch(P), part.scales + row * scales, rows * scales, barrier);
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

// It has nothing else to do: with results to write as well, a job took it as long as the others. A ring that is asked
// for at once makes slow whatever else is on its way, vectors and code above all: no more than IN_FLIGHT stages are,
// until the ring is full, or PACED, always. (A lane for each stage, which waits for another's, would put the warp to
// sleep.)
DEVICE void copy(const Arguments& a, const Shared& s, const Cursor& begin, bool some) {
  const int lane = threadIdx.x & 31;
  if (lane == 0) {
#pragma unroll 1
    for (int i = 0; i < STAGES; ++i)
      begin_barrier(s.full(i), 1), begin_barrier(s.empty(i), 1), begin_barrier(s.done(i), GROUP);
    begin_barrier(s.weighted(), 1);
    publish_barriers();
  }
  __syncthreads();
  const auto take_ids = [&] {
    if (lane < TOP) s.ids()[lane] = __ldcg(a.ids + lane);
    __syncwarp();
  };
  Cursor mine = begin;
  bool left = some;
  int filled = 0;
  const auto fill_ring = [&](bool whole) {  // with their vectors, or without
#pragma unroll 1
    for (; left && filled < STAGES && (whole || CHOOSE == 3 || !mine.chosen()); ++filled) {
      if (lane == 0) {
        if (IN_FLIGHT && filled >= IN_FLIGHT && (whole || !SUMMED(0))) wait_phase(s.full(filled - IN_FLIGHT), 0);
        fill_next(a, s, mine, filled);
        if (whole) fill_next_vector(a, s, mine, filled);
      }
      left = mine.next_stage();
    }
  };
  if (CHOOSE == 3) take_ids();
  fill_ring(false);  // what the launch in front does not decide
  wait_for_producers();
  if (SUMMED(0) && lane < filled) fill_vector<0>(a, s, {0, 0, lane % stages(0)}, lane);
  if (CHOOSE == 2) {
    take_ids();
    fill_ring(true);
  }
  if (lane > 0) return;
  let_next_begin();
  int stage = 0;
  u32 parity = 0;
#pragma unroll 1
  for (; left; left = mine.next_stage()) {
    wait_phase(s.empty(stage), parity);
    if (PACED) {
      const int other = stage - IN_FLIGHT;
      wait_phase(s.full(other < 0 ? other + STAGES : other), other < 0 ? parity : parity ^ 1);
    }
    fill_next(a, s, mine, stage);
    fill_next_vector(a, s, mine, stage);
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
}
