// One token's attention over a paged cache, to which its own key and value are added first: a split's part.
//
// A block has one KV head and a share of the positions, its warps sixteen of these at a time, on tensor cores: queries
// times keys, and probabilities times values. Which position a column is, and which dimension, is so chosen that what
// a lane holds of the one product is what it needs for the next, and that keys and values are read sixteen bytes at a
// time: column 2 t of the first tile of positions is position 4 t, 2 t + 1 is 4 t + 2, of the second tile 4 t + 1 and
// 4 t + 3; column g of values' tile j is dimension 16 g + j; and lane t has dimensions 32 t to 32 t + 31 of keys.
// FP8 values are BF16 times 2^-120 (see step.cuh), so queries and probabilities are times 2^64.
#include "attention.cuh"

constexpr int WARPS = 4;
constexpr float UP_KV = FP8 ? UP : 1.0f, DOWN_KV = down_of(FP8 ? 8 : 16);

DEVICE u64 place_in(const Arguments& a, int head, int position) {  // of a position, in values
  return ((u64)a.page_table[position / PAGE] * PAGE + position % PAGE) * (KV_HEADS * DIM) + head * DIM;
}
DEVICE u32 as_fp8(float v) {  // rounded to nearest, clamped; NaN stays
  u32 r;
  asm("{\n.reg .b16 h;\ncvt.rn.satfinite.e4m3x2.f32 h, %1, %2;\ncvt.u32.u16 %0, h;\n}" : "=r"(r) : "f"(0.0f), "f"(v));
  return r & 0xFF;
}

DEVICE void append(const Arguments& a, int head, int position) {  // by the block's threads, a value each
  const int d = threadIdx.x;
  const u64 at = place_in(a, head, position) + d;
  const u16 key = __ldcg(a.k + head * DIM + d), value = __ldcg(a.v + head * DIM + d);
  if (FP8) {
    a.k_pages[at] = (u8)as_fp8(lower(key) / a.k_scale);
    a.v_pages[at] = (u8)as_fp8(lower(value) / a.v_scale);
  } else {
    ((u16*)a.k_pages)[at] = key;
    ((u16*)a.v_pages)[at] = value;
  }
}

// Two words of the cache as pairs for the tensor cores: FP8 (0, 2) (1, 3), BF16 (0, 1) (2, 3), of four neighbours.
DEVICE void four_of(const u32* w, int i, u32& first, u32& second) {
  if (FP8) {
    u32 pair[2];
    bytes(w[i], pair);
    first = pair[0], second = pair[1];
  } else {
    first = w[2 * i], second = w[2 * i + 1];
  }
}

DEVICE void load_words(u32* w, const u8* from, int sixteens) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i >= sixteens) break;
    uint4 four = __ldcg((const uint4*)from + i);
    w[4 * i] = four.x, w[4 * i + 1] = four.y, w[4 * i + 2] = four.z, w[4 * i + 3] = four.w;
  }
}

// The queries as operand: rows g and g + 8, of four dimensions a step, in the order of `four_of`.
DEVICE void load_queries(const Arguments& a, int head, int lane, u32 q[8][4]) {
  const int g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = g + half * 8;
#pragma unroll
    for (int s = 0; s < 8; ++s) {
      uint2 w = {0, 0};
      if (row < GROUP) w = __ldcg((const uint2*)(a.q + (head * GROUP + row) * DIM + t * 32 + s * 4));
      float f[4] = {lower(w.x) * UP_KV, upper(w.x) * UP_KV, lower(w.y) * UP_KV, upper(w.y) * UP_KV};
      q[s][half] = FP8 ? two_bf16(f[0], f[2]) : two_bf16(f[0], f[1]);
      q[s][half + 2] = FP8 ? two_bf16(f[1], f[3]) : two_bf16(f[2], f[3]);
    }
  }
}

struct State {
  float out[16][4];  // of values' tile j: rows g (0, 1) and g + 8 (2, 3) at columns 2 t and 2 t + 1
  float top[2], weight[2];
};

// Scores of eight positions: rows g and g + 8 at columns 2 t and 2 t + 1.
DEVICE void scores_of(const Arguments& a, int head, int position, bool there, int t, const u32 q[8][4], float* c) {
  u32 w[4 * (FP8 ? 2 : 4)];
#pragma unroll
  for (int i = 0; i < 4 * (FP8 ? 2 : 4); ++i) w[i] = 0;
  if (there) load_words(w, a.k_pages + (place_in(a, head, position) + t * 32) * (FP8 ? 1 : 2), FP8 ? 2 : 4);
#pragma unroll
  for (int s = 0; s < 8; ++s) {
    u32 b0, b1;
    four_of(w, s, b0, b1);
    mma(c, q[s][0], q[s][1], q[s][2], q[s][3], b0, b1);
  }
}

// Probabilities of sixteen positions, in two parts each (BF16 alone has three digits), times values.
DEVICE void add_values(const Arguments& a, int head, int first, int end, int lane, const u32* high, const u32* low, State& s) {
  const int g = lane >> 2, t = lane & 3;
  u32 w[4][FP8 ? 4 : 8];
#pragma unroll
  for (int p = 0; p < 4; ++p) {
    const int position = first + 4 * t + p;
#pragma unroll
    for (int i = 0; i < (FP8 ? 4 : 8); ++i) w[p][i] = 0;
    if (position < end) load_words(w[p], a.v_pages + (place_in(a, head, position) + g * 16) * (FP8 ? 1 : 2), FP8 ? 1 : 2);
  }
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    u32 b0, b1;
    if (FP8) {
      const u32 which = j % 4 | (4 + j % 4) << 4;  // byte j of two words
      u32 pair[2], left = __byte_perm(w[0][j / 4], w[1][j / 4], which), right = __byte_perm(w[2][j / 4], w[3][j / 4], which);
      bytes(__byte_perm(left, right, 0x5410), pair);
      b0 = pair[0], b1 = pair[1];
    } else {
      const u32 which = j % 2 ? 0x7632 : 0x5410;
      b0 = __byte_perm(w[0][j / 2], w[2][j / 2], which);
      b1 = __byte_perm(w[1][j / 2], w[3][j / 2], which);
    }
    mma(s.out[j], high[0], high[1], high[2], high[3], b0, b1);
    mma(s.out[j], low[0], low[1], low[2], low[3], b0, b1);
  }
}

DEVICE void attend(const Arguments& a, int head, int first, int end, int lane, const u32 q[8][4], State& s) {
  const int g = lane >> 2, t = lane & 3;
  float c[2][4] = {};
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
    const int position = first + 4 * (g >> 1) + (g & 1) * 2 + tile;
    scores_of(a, head, position, position < end, t, q, c[tile]);
  }
  u32 high[4], low[4];
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // rows g and g + 8
    float score[4], most = s.top[half];
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // positions 4 t, 4 t + 2, 4 t + 1, 4 t + 3
      const int position = first + 4 * t + (i & 1) * 2 + (i >> 1);
      score[i] = position < end ? c[i >> 1][half * 2 + (i & 1)] * (a.scale * DOWN_KV) : LOWEST;
      most = fmaxf(most, score[i]);
    }
    most = fmaxf(most, __shfl_xor_sync(ALL, most, 1));
    most = fmaxf(most, __shfl_xor_sync(ALL, most, 2));
    const float shrink = exp2f(s.top[half] - most);  // 0 at first, for a tile has at least one position
    float sum = 0, p[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) p[i] = exp2f(score[i] - most), sum += p[i];
    s.weight[half] = s.weight[half] * shrink + sum;  // of this lane's positions
    s.top[half] = most;
#pragma unroll
    for (int j = 0; j < 16; ++j) s.out[j][half * 2] *= shrink, s.out[j][half * 2 + 1] *= shrink;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float x = p[2 * i] * UP_KV, y = p[2 * i + 1] * UP_KV;
      high[half + 2 * i] = two_bf16(x, y);
      low[half + 2 * i] = two_bf16(x - lower(high[half + 2 * i]), y - upper(high[half + 2 * i]));
    }
  }
  add_values(a, head, first, end, lane, high, low, s);
}

// What a block's warps have, as one; each has its own top.
DEVICE void leave(const Arguments& a, int head, int split, int lane, int warp, State& s, float* memory) {
  const int g = lane >> 2, t = lane & 3;
  float *tops = memory, *weights = memory + WARPS * 16, *sums = memory + 2 * WARPS * 16;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float weight = s.weight[half];
    weight += __shfl_xor_sync(ALL, weight, 1);
    weight += __shfl_xor_sync(ALL, weight, 2);
    if (t == 0) tops[warp * 16 + g + half * 8] = s.top[half], weights[warp * 16 + g + half * 8] = weight;
#pragma unroll
    for (int j = 0; j < 16; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) sums[(warp * 16 + g + half * 8) * DIM + 16 * (2 * t + i) + j] = s.out[j][half * 2 + i];
  }
  __syncthreads();
  const u64 base = (u64)(head * SPLITS + split) * GROUP;
  const int d = threadIdx.x;
#pragma unroll 1
  for (int row = 0; row < GROUP; ++row) {
    float top = LOWEST, weight = 0, sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) top = fmaxf(top, tops[w * 16 + row]);
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      const float part = exp2f(tops[w * 16 + row] - top);
      weight += part * weights[w * 16 + row];
      sum += part * sums[(w * 16 + row) * DIM + d];
    }
    a.sums[(base + row) * DIM + d] = sum * DOWN_KV;
    if (d == 0) a.tops[base + row] = top, a.weights[base + row] = weight;
  }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32) attention_split(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(16) u8 memory[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, head = blockIdx.x / SPLITS, part = blockIdx.x % SPLITS;
  const int length = (int)*a.position + 1, share = share_of(length), first = part * share, end = min(first + share, length);
  // The cache is brought near: but for the newest position, what lies there is older than the launch in front.
  for (int at = first + threadIdx.x; at < end; at += WARPS * 32) {
    const u64 place = place_in(a, head, at) * (FP8 ? 1 : 2);
    prefetch(a.k_pages + place);
    prefetch(a.v_pages + place);
  }
  wait_for_producers();
  let_next_begin();
  if (first >= length) return;
  if (end == length) {
    append(a, head, length - 1);
    __syncthreads();
  }
  u32 q[8][4];
  load_queries(a, head, lane, q);
  State s;
#pragma unroll
  for (int half = 0; half < 2; ++half) s.top[half] = LOWEST, s.weight[half] = 0;
#pragma unroll
  for (int j = 0; j < 16; ++j) s.out[j][0] = s.out[j][1] = s.out[j][2] = s.out[j][3] = 0;
#pragma unroll 1
  for (int at = first + warp * TILE; at < end; at += WARPS * TILE) attend(a, head, at, end, lane, q, s);
  leave(a, head, part, lane, warp, s, (float*)memory);
}
