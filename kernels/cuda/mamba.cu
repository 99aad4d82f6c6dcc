// A Mamba-2 layer's step for one token between its projections: convolution, recurrence, gated norm.
//
// A cluster of blocks has a group of heads, because a group is normalised as one; a block has some rows of the state,
// four a warp at a time. What no launch writes is read before the one in front has ended.
//
// NVRTC is given: HEADS, SIZE (rows of a head), STATES (128), HEAD_GROUPS, CLUSTER (blocks of a group), WARPS.
#include "cluster.cuh"

constexpr int INNER = HEADS * SIZE, GROUP_ROWS = INNER / HEAD_GROUPS, ROWS = GROUP_ROWS / CLUSTER;
constexpr int CHANNELS = INNER + 2 * HEAD_GROUPS * STATES, OWN = ROWS + 2 * STATES;  // of the convolution; a block's
constexpr int THREADS = WARPS * 32, PASSES = ROWS / (4 * WARPS), TURNS = (OWN + THREADS - 1) / THREADS;
static_assert(STATES == 128 && ROWS % (4 * WARPS) == 0 && SIZE % 4 == 0, "");
constexpr int MOST_REGISTERS = PASSES > 1 ? 88 : __CUDA_ARCH__ == 900 ? 64 : 72;  // next to a launch of products

struct Arguments {
  const u16* projected;      // z, x, B, C, dt
  const float* conv_weight;  // [CHANNELS, 4]
  const float* conv_bias;
  u16* conv_state;           // [CHANNELS, 3]
  const float* a_log;
  const float* d;
  const float* dt_bias;
  float* state;              // [INNER, STATES]
  const float* norm;
  u16* out;
  float eps;
};

DEVICE float silu(float v) { return __fdividef(v, 1 + __expf(-v)); }
DEVICE float softplus(float v) {
  const float z = __expf(-fabsf(v));  // log(1 + z) by its series where 1 + z would lose what z has
  return fmaxf(v, 0) + (z < 0.03125f ? z * (1 - z * (0.5f - z * (1 / 3.0f - z * 0.25f))) : __logf(1 + z));
}
DEVICE float widened(u16 v) { return __uint_as_float((u32)v << 16); }

DEVICE Floats load_state(const float* p) {
  float4 v = __ldcg((const float4*)p);
  return {v.x, v.y, v.z, v.w};
}
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __maxnreg__(MOST_REGISTERS) mamba(const __grid_constant__ Arguments a) {
  __shared__ __align__(16) float convolved[OWN], sums[WARPS], squares[CLUSTER];
  __shared__ __align__(8) u64 there[1];
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, group = blockIdx.x / CLUSTER, rank = blockIdx.x % CLUSTER;
  const int first = group * GROUP_ROWS + rank * ROWS, row = first + warp * 4 + lane / 8;  // and 4 WARPS on each pass
  if (tid == 0) {
    begin_barrier(there, 1);
    publish_barriers();
    arrive_and_expect(there, CLUSTER * 4);
  }
  __syncthreads();
  cluster_arrive();  // blocks of the cluster run, and have a barrier
  float rate[PASSES], skip[PASSES], bias[PASSES], weight[PASSES];
#pragma unroll
  for (int p = 0; p < PASSES; ++p) {
    const int head = (row + p * 4 * WARPS) / SIZE;
    rate[p] = -__expf(a.a_log[head]), skip[p] = a.d[head], bias[p] = a.dt_bias[head];
    weight[p] = a.norm[row + p * 4 * WARPS];
  }
  Floats taps[TURNS];
  float conv_bias[TURNS];
  int channel[TURNS];
#pragma unroll
  for (int i = 0; i < TURNS; ++i) {
    int own = tid + i * THREADS;
    channel[i] = own < ROWS ? first + own : INNER + (group + (own - ROWS) / STATES * HEAD_GROUPS) * STATES + (own - ROWS) % STATES;
    if (own >= OWN) channel[i] = first;
    taps[i] = *(const Floats*)(a.conv_weight + channel[i] * 4);
    conv_bias[i] = a.conv_bias[channel[i]];
  }
  Floats s[PASSES][4];
  u16 before[TURNS][3];
  // The state is only brought near: who calls this twice in a row wrote it in the launch in front.
  if (lane % 8 == 0) {
#pragma unroll
    for (int p = 0; p < PASSES; ++p)
#pragma unroll
      for (int j = 0; j < 4; ++j) prefetch(a.state + (u64)(row + p * 4 * WARPS) * STATES + j * 32);
  }
  u16 now[TURNS], z[PASSES], dt[PASSES];
  float gated[PASSES];
  cluster_wait();
  wait_for_producers();
  let_next_begin();
#pragma unroll
  for (int p = 0; p < PASSES; ++p)
#pragma unroll
    for (int j = 0; j < 4; ++j)
      s[p][j] = load_state(a.state + (u64)(row + p * 4 * WARPS) * STATES + j * 32 + lane % 8 * 4);
#pragma unroll
  for (int i = 0; i < TURNS; ++i) {
    now[i] = __ldcg(a.projected + INNER + channel[i]);
#pragma unroll
    for (int k = 0; k < 3; ++k) before[i][k] = __ldcg(a.conv_state + channel[i] * 3 + k);
  }
#pragma unroll
  for (int p = 0; p < PASSES; ++p) {
    z[p] = __ldcg(a.projected + row + p * 4 * WARPS);
    dt[p] = __ldcg(a.projected + INNER + CHANNELS + (row + p * 4 * WARPS) / SIZE);
  }
#pragma unroll
  for (int i = 0; i < TURNS; ++i) {
    float total = conv_bias[i];
    total += widened(before[i][0]) * taps[i].x;
    total += widened(before[i][1]) * taps[i].y;
    total += widened(before[i][2]) * taps[i].z;
    total += widened(now[i]) * taps[i].w;
    if (tid + i * THREADS < OWN) convolved[tid + i * THREADS] = rounded(silu(total));
  }
  __syncthreads();
  float decay[PASSES], entering[PASSES], y[PASSES];
#pragma unroll
  for (int p = 0; p < PASSES; ++p) {
    const float step = softplus(widened(dt[p]) + bias[p]);
    decay[p] = __expf(step * rate[p]), entering[p] = convolved[warp * 4 + lane / 8 + p * 4 * WARPS] * step, y[p] = 0;
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const Floats b = *(const Floats*)(convolved + ROWS + j * 32 + lane % 8 * 4);
    const Floats c = *(const Floats*)(convolved + ROWS + STATES + j * 32 + lane % 8 * 4);
#pragma unroll
    for (int p = 0; p < PASSES; ++p) {
      Floats& v = s[p][j];
      v.x = v.x * decay[p] + entering[p] * b.x, v.y = v.y * decay[p] + entering[p] * b.y;
      v.z = v.z * decay[p] + entering[p] * b.z, v.w = v.w * decay[p] + entering[p] * b.w;
      y[p] += v.x * c.x + v.y * c.y + v.z * c.z + v.w * c.w;
    }
  }
  float square = 0;
#pragma unroll
  for (int p = 0; p < PASSES; ++p) {
#pragma unroll
    for (int lanes = 1; lanes < 8; lanes *= 2) y[p] += __shfl_xor_sync(ALL, y[p], lanes);
    const float x = convolved[warp * 4 + lane / 8 + p * 4 * WARPS];
    gated[p] = rounded(y[p] + x * skip[p]) * silu(widened(z[p]));
    square += gated[p] * gated[p];
  }
  square += __shfl_xor_sync(ALL, square, 8);
  square += __shfl_xor_sync(ALL, square, 16);
  if (lane == 0) sums[warp] = square;
  __syncthreads();
  if (tid < CLUSTER) {
    float own = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) own += sums[w];
    send_one(squares + rank, tid, own, there);
  }
#pragma unroll
  for (int p = 0; p < PASSES; ++p)
#pragma unroll
    for (int j = 0; j < 4; ++j)
      *(Floats*)(a.state + (u64)(row + p * 4 * WARPS) * STATES + j * 32 + lane % 8 * 4) = s[p][j];
  wait_phase(there, 0);
  float total = 0;
#pragma unroll
  for (int i = 0; i < CLUSTER; ++i) total += squares[i];
  const float root = rsqrtf(total * (1.0f / GROUP_ROWS) + a.eps);
  if (lane % 8 == 0) {
#pragma unroll
    for (int p = 0; p < PASSES; ++p) a.out[row + p * 4 * WARPS] = (u16)two_bf16(gated[p] * root * weight[p], 0);
  }
  // All blocks of the group have read what the convolution had before.
#pragma unroll
  for (int i = 0; i < TURNS; ++i) {
    const int own = tid + i * THREADS;
    if (own < ROWS || (own < OWN && rank == 0)) {
      u16* state = a.conv_state + channel[i] * 3;
      state[0] = before[i][1], state[1] = before[i][2], state[2] = now[i];
    }
  }
}
