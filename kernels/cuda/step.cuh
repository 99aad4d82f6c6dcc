// A step of a product: eight rows, 128 bytes of each, times a vector, by one warp on tensor cores.
//
// An operand has sixteen rows: the first 64 bytes of the eight rows, and the other 64. The vector's columns keep apart
// what must not be added: the two halves, and for four-bit codes each lane's sixteens, which have a scale each.
// Four-bit codes become BF16 times 2^-126 and FP8 BF16 times 2^-120, bit for bit; their vectors are times 2^64, so
// that no product leaves float32's normal range. Sums are float32.
#pragma once
#include "machine.cuh"

constexpr float UP = 18446744073709551616.0f;  // 2^64
CONSTANT float up_of(int bits) { return bits < 16 ? UP : 1.0f; }
CONSTANT int columns_of(int bits) { return 1024 / bits; }  // of a step
CONSTANT float down_of(int bits) { return bits == 4 ? 4611686018427387904.0f : bits == 8 ? 72057594037927936.0f : 1.0f; }

// Eight codes, as pairs (0, 4) (1, 5) (2, 6) (3, 7): sign at bit 15, the other bits at 8 to 6. 4160 is 2^12 + 2^6.
DEVICE void codes(u32 w, u32* pair) {
  pair[0] = (w & 0x000F000Fu) * 4160u & 0x81C081C0u;
  pair[1] = (w & 0x00F000F0u) * 260u & 0x81C081C0u;
  w >>= 8;
  pair[2] = (w & 0x000F000Fu) * 4160u & 0x81C081C0u;
  pair[3] = (w & 0x00F000F0u) * 260u & 0x81C081C0u;
}
// Four FP8, as pairs (0, 2) (1, 3): each with eight times its sign in front, then sign at bit 15, the others at 10 to 4.
DEVICE void bytes(u32 w, u32* pair) {
  pair[0] = pick(w, w, 0xA280) * 16u & 0x87F087F0u;
  pair[1] = pick(w, w, 0xB391) * 16u & 0x87F087F0u;
}

// Where a value lies in a vector for weights of BITS, in the order in which these are decoded.
template <int BITS> DEVICE int place_of(int column) {
  if (BITS == 4) return (column & ~7) + (column & 3) * 2 + (column >> 2 & 1);
  if (BITS == 8) return (column & ~3) + (column & 1) * 2 + (column >> 1 & 1);
  return column;
}
// Eight neighbours into such a vector.
template <int BITS> DEVICE void put_eight(u8* x, int column, const float* v) {
  Words w;
  if (BITS == 4) w = {two_bf16(v[0], v[4]), two_bf16(v[1], v[5]), two_bf16(v[2], v[6]), two_bf16(v[3], v[7])};
  else if (BITS == 8) w = {two_bf16(v[0], v[2]), two_bf16(v[1], v[3]), two_bf16(v[4], v[6]), two_bf16(v[5], v[7])};
  else w = {two_bf16(v[0], v[1]), two_bf16(v[2], v[3]), two_bf16(v[4], v[5]), two_bf16(v[6], v[7])};
  *(Words*)(x + column * 2) = w;
}

// What a lane has of a product. `a` and `b` are sums of the first and the second half for codes, whose lanes t < 2 and
// t >= 2 have the right one; `c` and `d` are the tensor cores' for others; `a` that of float32 weights.
struct Sums {
  float a, b, c[4], d[4];
};

// Where a lane reads the vector of a step, and how far the next step's is; zeros where its column is none. Places in
// shared memory are numbers: the compiler computes pointers in 64 bits.
template <int BITS> DEVICE int lane_vector(int x, int zeros, int lane, int& stride) {
  int g = lane >> 2, t = lane & 3, half;
  stride = columns_of(BITS) * 2;
  if (BITS == 32) return x + t * 8;
  if (BITS == 4) half = g == t ? 0 : g == t + 4 ? 1 : 2;
  else half = g;
  if (half < 2) return x + half * (stride / 2) + t * (stride / 8);
  stride = 0;
  return zeros;
}

// N times eight rows over the same vector. w: row g at 16 t, and `next` bytes further row g of the next eight;
// scales: row g at 4 t, likewise; x: `lane_vector`.
template <int BITS, int N>
DEVICE void step(Sums* s, const u8* w, int next, const u8* scales, int next_scales, const u8* x) {
  u32 l[N][4], h[N][4];
#pragma unroll
  for (int e = 0; e < N; ++e) {
    Words low = *(const Words*)(w + e * next), high = *(const Words*)(w + e * next + 64);
    l[e][0] = low.x, l[e][1] = low.y, l[e][2] = low.z, l[e][3] = low.w;
    h[e][0] = high.x, h[e][1] = high.y, h[e][2] = high.z, h[e][3] = high.w;
  }
  if (BITS == 4) {
    float scale[N][4];
#pragma unroll
    for (int e = 0; e < N; ++e) four_scales(*(const u32*)(scales + e * next_scales), scale[e]);
#pragma unroll
    for (int group = 0; group < 2; ++group) {
      float c[N][4] = {};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        Words v = *(const Words*)(x + group * 32 + i * 16);
#pragma unroll
        for (int e = 0; e < N; ++e) {
          u32 p[4], q[4];
          codes(l[e][2 * group + i], p);
          codes(h[e][2 * group + i], q);
          mma(c[e], p[0], q[0], p[1], q[1], v.x, v.y);
          mma(c[e], p[2], q[2], p[3], q[3], v.z, v.w);
        }
      }
#pragma unroll
      for (int e = 0; e < N; ++e) {
        s[e].a = fmaf(c[e][1], scale[e][2 + group], fmaf(c[e][0], scale[e][group], s[e].a));
        s[e].b = fmaf(c[e][3], scale[e][2 + group], fmaf(c[e][2], scale[e][group], s[e].b));
      }
    }
  } else if (BITS == 8) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      Words v = *(const Words*)(x + i * 16);
#pragma unroll
      for (int e = 0; e < N; ++e) {
        u32 p[4], q[4];
        bytes(l[e][2 * i], p);
        bytes(h[e][2 * i], q);
        bytes(l[e][2 * i + 1], p + 2);
        bytes(h[e][2 * i + 1], q + 2);
        mma(s[e].c, p[0], q[0], p[1], q[1], v.x, v.y);
        mma(s[e].d, p[2], q[2], p[3], q[3], v.z, v.w);
      }
    }
  } else if (BITS == 16) {
    Words v = *(const Words*)x;
#pragma unroll
    for (int e = 0; e < N; ++e) {
      mma(s[e].c, l[e][0], h[e][0], l[e][1], h[e][1], v.x, v.y);
      mma(s[e].d, l[e][2], h[e][2], l[e][3], h[e][3], v.z, v.w);
    }
  } else {
    Pair v = *(const Pair*)x, u = *(const Pair*)(x + 32);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      s[e].a += __uint_as_float(l[e][0]) * lower(v.x) + __uint_as_float(l[e][1]) * upper(v.x);
      s[e].a += __uint_as_float(l[e][2]) * lower(v.y) + __uint_as_float(l[e][3]) * upper(v.y);
      s[e].a += __uint_as_float(h[e][0]) * lower(u.x) + __uint_as_float(h[e][1]) * upper(u.x);
      s[e].a += __uint_as_float(h[e][2]) * lower(u.y) + __uint_as_float(h[e][3]) * upper(u.y);
    }
  }
}

// The sum of row g, in lanes t = 0.
template <int BITS> DEVICE float row_sum(const Sums& s, int lane) {
  if (BITS == 8 || BITS == 16) return s.c[0] + s.d[0] + s.c[3] + s.d[3];
  float v = BITS == 4 && (lane & 2) ? s.b : s.a;
  v += __shfl_xor_sync(ALL, v, 1);
  return v + __shfl_xor_sync(ALL, v, 2);
}
