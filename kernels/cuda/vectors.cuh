// The vectors of products.cu, into shared memory: as they are, in the weights' order, or the norm of one.
#pragma once
#include "plan.cuh"

template <int V> DEVICE void put_normed(u8* x, int at, const float* f) {  // in each vector of the norm
  if (V_NORMED(V)) {
    const float up = up_of(V_BITS(V));
    float g[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) g[i] = f[i] * up;
    put_eight<V_BITS(V)>(x + vector_at(V), at, g);
  }
}

CONSTANT int EACH(int columns) { return (columns / 8 + THREADS - 1) / THREADS; }
constexpr int NORM_COLUMNS = V_NORMED(0) ? V_COLUMNS(0) : 8;

DEVICE void widen(const uint4& w, float* f) {
  f[0] = lower(w.x), f[1] = upper(w.x), f[2] = lower(w.y), f[3] = upper(w.y);
  f[4] = lower(w.z), f[5] = upper(w.z), f[6] = lower(w.w), f[7] = upper(w.w);
}

template <int V> DEVICE void load_plain(const Arguments& a, u8* x) {
  if (V_NORMED(V)) return;
  constexpr int all = V_NONE(V) ? 0 : V_COLUMNS(V) / 8, batch = 4;
  const uint4* from = (const uint4*)a.inputs[V_SOURCE(V)];
#pragma unroll 1
  for (int first = threadIdx.x; first < all; first += THREADS * batch) {
    uint4 w[batch];
#pragma unroll
    for (int i = 0; i < batch; ++i) w[i] = __ldcg(from + min(first + i * THREADS, all - 1));
#pragma unroll
    for (int i = 0; i < batch; ++i) {
      int at = first + i * THREADS;
      if (at >= all) break;
      if (V_READY(V)) {
        *(uint4*)(x + vector_at(V) + at * 16) = w[i];
        continue;
      }
      float f[8];
      widen(w[i], f);
#pragma unroll
      for (int k = 0; k < 8; ++k) f[k] *= up_of(V_BITS(V));
      put_eight<V_BITS(V)>(x + vector_at(V), at * 8, f);
    }
  }
}

// The vectors, into shared memory.
DEVICE void prepare(const Arguments& a, u8* x) {
  constexpr int n = EACH(NORM_COLUMNS);
  const int t = threadIdx.x;
  Floats weight[n][2];
  if (V_NORMED(0)) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      int at = min(i * THREADS + t, NORM_COLUMNS / 8 - 1) * 8;
      weight[i][0] = *(const Floats*)(a.norm + at), weight[i][1] = *(const Floats*)(a.norm + at + 4);
    }
  }
  wait_for_producers();
  if (V_NORMED(0)) {
    float f[n][8], square = 0;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      int at = i * THREADS + t;
      uint4 w = at < NORM_COLUMNS / 8 ? __ldcg((const uint4*)a.inputs[0] + at) : uint4{0, 0, 0, 0};
      widen(w, f[i]);
    }
#pragma unroll
    for (int i = 0; i < n; ++i)
#pragma unroll
      for (int k = 0; k < 8; ++k) square += f[i][k] * f[i][k];
    square = warp_sum(square);
    float* sums = (float*)(x - X + RED);  // nobody has left results yet
    if (t % 32 == 0) sums[t / 32] = square;
    sync_some(THREADS);
    square = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) square += sums[w];
    const float root = rsqrtf(square * (1.0f / NORM_COLUMNS) + a.eps);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      int at = i * THREADS + t;
      const float m[8] = {weight[i][0].x, weight[i][0].y, weight[i][0].z, weight[i][0].w,
                          weight[i][1].x, weight[i][1].y, weight[i][1].z, weight[i][1].w};
#pragma unroll
      for (int k = 0; k < 8; ++k) f[i][k] = f[i][k] * root * m[k];
      if (at < NORM_COLUMNS / 8) {
        put_normed<0>(x, at * 8, f[i]);
        if (VECTORS > 1) put_normed<V1>(x, at * 8, f[i]);
        if (VECTORS > 2) put_normed<V2>(x, at * 8, f[i]);
      }
    }
  }
  load_plain<0>(a, x);
  if (VECTORS > 1) load_plain<V1>(a, x);
  if (VECTORS > 2) load_plain<V2>(a, x);
  sync_some(THREADS);
}

// Zeros from the last column to the last step's end.
template <int V> DEVICE void pad(u8* x) {
  constexpr int own = V_COLUMNS(V) * 2, rest = V_NONE(V) ? 0 : (vector_bytes(V) - own) / 16;
  if (threadIdx.x < rest) *(Words*)(x + vector_at(V) + own + threadIdx.x * 16) = {0, 0, 0, 0};
}
