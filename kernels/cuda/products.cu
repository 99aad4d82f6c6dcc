// Weights times one token's vectors, in one launch: what a layer reads at once.
//
// A part is a matrix, or a stack of experts; a job is some eights of rows of one. A block takes every so-manieth
// job. One of its warps copies the jobs' rows to a ring in shared memory, stage by stage, as far ahead as that has
// room. GROUPS groups of GROUP (4 or 8) warps take the stages in turn; a group shares a stage's columns. One more warp
// adds up what they have of a job and writes it. So the weights of what the launch in front does not decide are on
// their way before that has ended.
#include "copying.cuh"
#include "vectors.cuh"
#include "writing.cuh"

// Where a group is in the ring: it takes every GROUPS-th stage.
struct Turn {
  int stage;
  u32 parity;
  DEVICE void next() {
    stage += GROUPS;
    if (stage >= STAGES) stage -= STAGES, parity ^= 1;
  }
};

// One job's share of a warp, the `warp`-th of a group. `begin` is the first stage of the job that is the group's, and
// `order` the job's place among results.
template <int P>
DEVICE void consume(const Shared& s, const Cursor& c, int group, int warp, int lane, Turn& turn, int begin, int order) {
  constexpr int bits = BITS(P), eights = EIGHTS(P), all = stages(P);
  const int g = lane >> 2, t = lane & 3;
  Sums sums[eights] = {};
  float total[eights] = {};
  int inner = SINGLE ? 0 : begin;
  if (!SINGLE && inner >= all) return;
  int stride, first = (warp + c.job) & (GROUP - 1);  // the last steps fall to another warp each time
  const int x = lane_vector<bits>(X + vector_at(VECTOR(P)), ZEROS, lane, stride);
#pragma unroll 1
  do {
    const int copy = SUMMED(P) ? inner / pieces(P) : 0, piece = SUMMED(P) ? inner % pieces(P) : inner;
    const int ring = RING + turn.stage * STAGE, all_scales = ring + height(P) * pitch(P);
    const int vector = ring + vector_in_stage(P), past = vector + COLUMNS(P) * 2;
    int w = ring + g * pitch(P) + t * 16 + first * 128, scales = all_scales + g * scale_bytes(P) + t * 4 + first * 16;
    int at = (SUMMED(P) ? lane_vector<bits>(vector, ZEROS, lane, stride) : x) + (piece * steps(P) + first) * stride;
    // A last step may reach past the row, where the vector is zero and codes are numbers, but a scale may be none.
    const int end = all_scales + (g + 1) * scale_bytes(P) - 4;
    constexpr bool odd_scales = bits == 4 && scale_bytes(P) % 16, odd_vector = SUMMED(P) && COLUMNS(P) % columns_of(bits);
    wait_phase(s.full(turn.stage), turn.parity);
#pragma unroll 1
    for (int i = first; i < steps(P); i += GROUP, w += GROUP * 128, scales += GROUP * 16, at += GROUP * stride)
      step<bits, eights>(sums, s.memory + w, 8 * pitch(P), s.memory + (odd_scales ? min(scales, end) : scales),
                         8 * scale_bytes(P), s.memory + (odd_vector && stride && at >= past ? ZEROS : at));
    if (SUMMED(P)) {
      wait_phase(s.weighted(), 0);
      const float factor = s.weights()[copy];
#pragma unroll
      for (int e = 0; e < eights; ++e) {
        if (bits == 8 || bits == 16) total[e] += (sums[e].c[0] + sums[e].d[0] + sums[e].c[3] + sums[e].d[3]) * factor;
        else total[e] += (bits == 4 && t >= 2 ? sums[e].b : sums[e].a) * factor;
        sums[e] = {};
      }
    }
    inner += GROUPS;
    if (inner >= all) {
#pragma unroll
      for (int e = 0; e < eights; ++e) {
        if (SUMMED(P)) sums[e] = {total[e], total[e], {total[e]}};
        float y = row_sum<bits>(sums[e], lane);
        if (t == 0) s.red(order)[group * GROUP * HEIGHT + warp * height(P) + e * 8 + g] = y;
      }
    }
    __syncwarp();
    if (lane == 0) arrive(s.done(turn.stage));
    turn.next();
  } while (inner < all);
}

// As many registers as leave room for the next launch's block; tall jobs want more.
constexpr int LEAST_BLOCKS = HEIGHT == 32 || (HEIGHT == 16 && WARPS == 16) ? 1 : 2;

extern "C" __global__ void __launch_bounds__(THREADS + 64, LEAST_BLOCKS) products(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(128) u8 memory[];
  const Shared s = {memory};
  const int lane = threadIdx.x & 31, warp = __shfl_sync(ALL, threadIdx.x >> 5, 0), group = warp / GROUP;
  Cursor c = Cursor::of_block();
  if (warp >= WARPS) {
    const bool some = c.settle();
    if (warp == WARPS) copy(a, s, c, some);
    else write(a, s, c, some);
    return;
  }
  u8* x = memory + X;
  if (threadIdx.x < 4) ((Words*)(memory + ZEROS))[threadIdx.x] = {0, 0, 0, 0};
  pad<0>(x);
  if (VECTORS > 1) pad<V1>(x);
  if (VECTORS > 2) pad<V2>(x);
  __syncthreads();  // the barriers are there
  prepare(a, x);
  Turn turn = {group, 0};
  int begin = group, order = SINGLE ? group : 0;
  if (SINGLE) c.job += group * c.stride();
#pragma unroll 1
  for (bool left = c.settle(); left; left = c.next_job(TURN)) {
    if (c.part == 0) consume<0>(s, c, group, warp % GROUP, lane, turn, begin, order);
    else if (PARTS > 1 && c.part == 1) consume<P1>(s, c, group, warp % GROUP, lane, turn, begin, order);
    else if (PARTS > 2) consume<P2>(s, c, group, warp % GROUP, lane, turn, begin, order);
    begin = (begin - c.stages()) & (GROUPS - 1);
    order += TURN;
    if (order >= STAGES) order -= STAGES;
  }
}
