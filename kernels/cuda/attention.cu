// One token's attention over a paged cache, to which its own key and value are added.
//
// A block has one KV head and a share of the positions, which it takes a chunk at a time: a warp multiplies queries by
// keys of eight positions, half a warp makes probabilities of a query's scores, a warp multiplies all by sixteen
// dimensions of the values. What the blocks of a cluster have is put together in one another's shared memory, two
// queries a block; what several clusters have, by the last of them to be ready.
//
// Who calls this has one launch in front that makes q, k and v, which waits for what is in front of it before it lets
// this one begin: what lies in the cache already is older than that, and comes to shared memory before the wait. (One of
// Triton's in front does not wait first. Then the cache is old enough because a step begins with launches that do not
// overlap at all.)
//
// FP8 values are BF16 times 2^-120 (see step.cuh), so queries and probabilities are times 2^64.
//
// NVRTC is given: KV_HEADS, GROUP (queries of a KV head, at most 16), PAGE (positions), FP8, CLUSTER (8 blocks),
// CLUSTERS (of a KV head), ALONE (positions of a block, up to which one cluster does it all); DIM is 128.
#include "cluster.cuh"
#include "step.cuh"

constexpr int DIM = 128, ROWS = 16, WARPS = 8, THREADS = WARPS * 32, OWN = ROWS / CLUSTER;
constexpr int VALUE = FP8 ? 1 : 2, CHUNK = 128 / VALUE, STAGES = 2, NEAR = 4 * CHUNK;
constexpr int NONE = 1 << 30;  // a position of none
constexpr float LOWEST = -3.402823466e38f;  // a score of what is not there: 2^(LOWEST - any other) is 0
constexpr float UP_KV = FP8 ? UP : 1.0f, DOWN_KV = down_of(FP8 ? 8 : 16);
static_assert(GROUP <= ROWS && OWN * DIM == THREADS && WARPS * 16 == DIM && CLUSTER * OWN == ROWS, "");

// Shared memory. Eight rows' sixteens of bytes are of different banks: pitches are odd in sixteens, and of keys and
// values sixteen c of row r lies at c ^ (r % 8). On Hopper it leaves room for 140 KiB, which the launch in front has.
constexpr int PITCH = DIM * VALUE, QUERY = DIM * 2 + 16, SCORE = CHUNK * 4 + 16;
constexpr int NEWEST = STAGES * 2 * CHUNK * PITCH, QUERIES = NEWEST + 2 * PITCH, SCORES = QUERIES + ROWS * QUERY;
constexpr int SHRINK = SCORES + ROWS * SCORE, PARTS = SHRINK + ROWS * 4, STATS = PARTS + CLUSTER * OWN * DIM * 4;
constexpr int ARRIVED = STATS + CLUSTER * OWN * 8, LAST = ARRIVED + 8;

struct Arguments {
  const u16* q;       // [KV_HEADS * GROUP, DIM]
  const u16* k;       // [KV_HEADS, DIM]
  const u16* v;
  u8* k_pages;        // [pages, PAGE, KV_HEADS, DIM]
  u8* v_pages;
  const int* page_table;
  const long long* position;
  float* sums;        // [KV_HEADS, CLUSTERS, ROWS, DIM], values times their probabilities
  float* stats;       // [KV_HEADS, CLUSTERS, ROWS, 2], the largest score, and the sum of 2^(score - it)
  u32* tickets;       // [KV_HEADS, CLUSTER], zeros
  u16* out;           // [KV_HEADS * GROUP, DIM]
  float scale;        // of scores, with log2(e) in it
  float k_scale, v_scale;
};

// Sixteen bytes to shared memory, so many from `from` and zeros. A thread waits for its own but the last N groups.
DEVICE void copy_sixteen(void* to, const void* from, u32 bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(place(to)), "l"(from), "r"(bytes) : "memory");
}
DEVICE void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> DEVICE void wait_groups() { asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory"); }
// Four matrices of eight rows of sixteen bytes; lane 8 m + i knows row i of the m-th. Lane 4 g + t gets the t-th four
// bytes of row g, or transposed the g-th two bytes of the rows 2 t and 2 t + 1.
DEVICE void load_matrices(u32* r, const u8* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(place(row)) : "memory");
}
DEVICE void load_transposed(u32* r, const u8* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(place(row)) : "memory");
}
DEVICE u32 as_fp8(float v) {  // rounded to nearest, clamped; NaN stays
  u32 r;
  asm("{\n.reg .b16 h;\ncvt.rn.satfinite.e4m3x2.f32 h, %1, %2;\ncvt.u32.u16 %0, h;\n}" : "=r"(r) : "f"(0.0f), "f"(v));
  return r & 0xFF;
}

struct Block {
  u8* memory;
  int head, first, count, newest;  // positions: the first, how many, which of them is the new token's (or none)
  DEVICE u8* keys(int stage) const { return memory + stage * 2 * CHUNK * PITCH; }
  DEVICE u8* values(int stage) const { return keys(stage) + CHUNK * PITCH; }
};

DEVICE u64 place_in(const Arguments& a, int head, int page, int position) {  // of a position, in bytes
  return (((u64)page * PAGE + position % PAGE) * KV_HEADS + head) * (DIM * VALUE);
}

// Begin to copy a chunk's keys and values, with zeros where no old position is.
DEVICE void copy_chunk(const Arguments& a, const Block& b, int at, int stage) {
  constexpr int SIXTEENS = DIM * VALUE / 16, TURN = THREADS / SIXTEENS, TURNS = CHUNK / TURN;
  const int thread = threadIdx.x, row = thread / SIXTEENS, byte = thread % SIXTEENS * 16;
  const int turned = byte ^ row % 8 * 16, old = min(b.count, b.newest) - at;
  int page[TURNS];
#pragma unroll
  for (int i = 0; i < TURNS; ++i) {
    page[i] = 0;
    if (row + i * TURN < old) page[i] = __ldcg(a.page_table + (b.first + at + row + i * TURN) / PAGE);
  }
#pragma unroll
  for (int i = 0; i < TURNS; ++i) {
    const int r = row + i * TURN, bytes = r < old ? 16 : 0;
    const u64 from = place_in(a, b.head, page[i], b.first + at + r) + byte;
    copy_sixteen(b.keys(stage) + r * PITCH + turned, a.k_pages + (bytes ? from : 0), bytes);
    copy_sixteen(b.values(stage) + r * PITCH + turned, a.v_pages + (bytes ? from : 0), bytes);
  }
}

// Queries to shared memory, a thread eight dimensions, as the keys' bytes are decoded; the new key and value there and
// to the cache, a thread one dimension of either.
DEVICE void load_new(const Arguments& a, const Block& b) {
  const int thread = threadIdx.x, row = thread / 16, eight = thread % 16, d = thread % DIM;
  const bool owner = b.newest < b.count, value = thread >= DIM;
  uint4 w = {0, 0, 0, 0};
  u32 fresh = 0;
  if (row < GROUP) w = __ldcg((const uint4*)(a.q + (b.head * GROUP + row) * DIM) + eight);
  if (owner) fresh = __ldcg((value ? a.v : a.k) + b.head * DIM + d);
  const u32 pairs[4] = {w.x, w.y, w.z, w.w};
  u8* to = b.memory + QUERIES + row * QUERY;
  if (FP8) {
    u32 even[4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const u32 x = pairs[2 * i], y = pairs[2 * i + 1];
      even[i] = two_bf16(lower(x) * UP, lower(y) * UP);
      even[2 + i] = two_bf16(upper(x) * UP, upper(y) * UP);
    }
    to += eight / 2 * 32 + eight % 2 * 8;
    *(Pair*)to = {even[0], even[1]};
    *(Pair*)(to + 16) = {even[2], even[3]};
  } else {
    *(Words*)(to + eight * 16) = {w.x, w.y, w.z, w.w};
  }
  if (!owner) return;
  const int position = b.first + b.newest;
  const u64 at = place_in(a, b.head, __ldcg(a.page_table + position / PAGE), position) + d * VALUE;
  u8 *near = b.memory + NEWEST + value * PITCH + d * VALUE, *far = (value ? a.v_pages : a.k_pages) + at;
  if (FP8) fresh = as_fp8(lower(fresh) / (value ? a.v_scale : a.k_scale));
  if (FP8) *near = *far = (u8)fresh;
  else *(u16*)near = *(u16*)far = (u16)fresh;
}

// Scores of eight positions: rows g and g + 8 at columns 2 t and 2 t + 1. Four sums, so that none waits for another.
DEVICE void scores_of(const u8* keys, int sixteen, const u32 q[8][4], float* score) {
  float c[4][4] = {};
#pragma unroll
  for (int j = 0; j < 2 * VALUE; ++j) {
    u32 w[4], pair[2];
    load_matrices(w, keys + (sixteen ^ 4 * j) * 16);
#pragma unroll
    for (int i = 0; i < 4 / VALUE; ++i) {
      if (FP8) bytes(w[i], pair);
      else pair[0] = w[2 * i % 4], pair[1] = w[2 * i % 4 + 1];
      const u32* x = q[4 / VALUE * j + i];
      mma(c[FP8 ? i : 2 * (j % 2) + i], x[0], x[1], x[2], x[3], pair[0], pair[1]);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) score[i] = (c[0][i] + c[1][i]) + (c[2][i] + c[3][i]);
}

// A thread's sixteenth of a row of scores; probabilities take the scores' place, in two parts of BF16 (which alone has
// three digits): the high ones, then the low ones.
struct Softmax {
  float top, weight;  // of the row; of this thread's positions
  DEVICE void chunk(const Block& b, int left, float scale) {
    const int thread = threadIdx.x, row = thread / 16, c = thread % 16;
    u8* scores = b.memory + SCORES + row * SCORE;
    float p[CHUNK / 16], most = top;
#pragma unroll
    for (int i = 0; i < CHUNK / 32; ++i) {
      const float2 two = *(const float2*)(scores + (i * 32 + c * 2) * 4);
      p[2 * i] = i * 32 + c * 2 < left ? two.x * scale : LOWEST;
      p[2 * i + 1] = i * 32 + c * 2 + 1 < left ? two.y * scale : LOWEST;
      most = fmaxf(most, fmaxf(p[2 * i], p[2 * i + 1]));
    }
#pragma unroll
    for (int lanes = 1; lanes < 16; lanes *= 2) most = fmaxf(most, __shfl_xor_sync(ALL, most, lanes));  // all have read
    const float shrink = exp2f(top - most);  // 0 at first, for a chunk has at least one position
    if (c == 0) ((float*)(b.memory + SHRINK))[row] = shrink;
    top = most, weight *= shrink;
#pragma unroll
    for (int i = 0; i < CHUNK / 32; ++i) {
      float x = exp2f(p[2 * i] - most), y = exp2f(p[2 * i + 1] - most);
      weight += x + y;
      x *= UP_KV, y *= UP_KV;
      const u32 high = two_bf16(x, y);
      *(u32*)(scores + (i * 16 + c) * 4) = high;
      *(u32*)(scores + CHUNK * 2 + (i * 16 + c) * 4) = two_bf16(x - lower(high), y - upper(high));
    }
  }
};

// Probabilities of 32 positions times a warp's sixteen values. Its columns are, FP8, the even and the odd ones.
DEVICE void add_values(const u8* values, const u8* other, const u8* scores, float out[2][2][4]) {
  u32 b[2][2][2];  // of either sixteen positions, of either eight columns
  if (FP8) {
    u32 w[4], pair[2];
    load_transposed(w, values);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      bytes(w[i], pair);
      b[i / 2][0][i % 2] = pair[0], b[i / 2][1][i % 2] = pair[1];
    }
  } else {
    load_transposed(b[0][0], values);
    load_transposed(b[1][0], other);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int part = 0; part < 2; ++part) {  // high, low
      u32 p[4];
      load_matrices(p, scores + half * 32 + part * CHUNK * 2);
#pragma unroll
      for (int j = 0; j < 2; ++j) mma(out[part][j], p[0], p[1], p[2], p[3], b[half][j][0], b[half][j][1]);
    }
}

struct Share { float top, weight, sum; };
template <int N> DEVICE Share together(const Share (&shares)[N]) {
  Share all = {LOWEST, 0, 0};
#pragma unroll
  for (int i = 0; i < N; ++i) all.top = fmaxf(all.top, shares[i].top);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float part = exp2f(shares[i].top - all.top);
    all.weight += part * shares[i].weight, all.sum += part * shares[i].sum;
  }
  return all;
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 2)
attention(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(128) u8 memory[];
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3;
  const int rank = blockIdx.x % CLUSTER, number = blockIdx.x / CLUSTER, cluster = number % CLUSTERS;
  const int head = number / CLUSTERS;
  const int length = (int)__ldcg(a.position) + 1, eights = (length + 7) / 8;
  const int all_blocks = CLUSTER * CLUSTERS, blocks = length <= CLUSTER * ALONE ? CLUSTER : all_blocks;
  const int share = (eights + blocks - 1) / blocks * 8, used = (length - 1) / (share * CLUSTER) + 1;
  if (cluster >= used) {
    wait_for_producers();
    let_next_begin();
    return;
  }
  const int first = (cluster * CLUSTER + rank) * share;
  const bool owner = first < length && first + share >= length;  // of the new token's position
  const Block b = {memory, head, first, max(0, min(share, length - first)), owner ? length - 1 - first : NONE};
  u64* arrived = (u64*)(memory + ARRIVED);  // what the blocks of the cluster have of this one's queries
  if (tid == 0) {
    begin_barrier(arrived, 1);
    publish_barriers();
    arrive_and_expect(arrived, CLUSTER * OWN * (DIM + 2) * 4);
  }
  cluster_arrive();
#pragma unroll 1
  for (int stage = 0; stage < STAGES; ++stage) {
    if (stage * CHUNK < b.count) copy_chunk(a, b, stage * CHUNK, stage);
    end_group();
  }
#pragma unroll 1
  for (int i = STAGES * CHUNK + tid / VALUE; i < min(b.count, STAGES * CHUNK + NEAR); i += THREADS / VALUE) {
    const u64 from = place_in(a, head, __ldcg(a.page_table + (first + i) / PAGE), first + i) + tid % VALUE * 128;
    prefetch(a.k_pages + from);
    prefetch(a.v_pages + from);
  }
  cluster_wait();
  wait_for_producers();
  let_next_begin();
  load_new(a, b);
  Softmax softmax = {LOWEST, 0};
  float out[2][2][4] = {};
  int stage = 0;
#pragma unroll 1
  for (int at = 0; at < b.count; at += CHUNK, stage ^= 1) {
    wait_groups<0>();
    __syncthreads();
    if (at > 0) {  // the chunk before is done with
      if (at + CHUNK < b.count) copy_chunk(a, b, at + CHUNK, stage ^ 1);
      end_group();
    }
    const int left = min(CHUNK, b.count - at), newest = b.newest - at;
    u32 q[8][4];
#pragma unroll
    for (int s = 0; s < 8; ++s)
      load_matrices(q[s], memory + QUERIES + lane % 16 * QUERY + lane / 16 * 16 + s * 32);
#pragma unroll 1
    for (int row = warp * 8 + lane % 8; row - lane % 8 < left; row += WARPS * 8) {
      const bool is_new = row == newest;
      const u8* keys = is_new ? memory + NEWEST : b.keys(stage) + row * PITCH;
      float score[4];
      scores_of(keys, lane / 8 ^ (is_new ? 0 : lane % 8), q, score);
      float* to = (float*)(memory + SCORES + g * SCORE) + row - lane % 8 + 2 * t;
      *(float2*)to = {score[0], score[1]};
      *(float2*)(to + 8 * SCORE / 4) = {score[2], score[3]};
    }
    __syncthreads();
    softmax.chunk(b, left, a.scale * DOWN_KV);
    __syncthreads();
    const float* shrink = (const float*)(memory + SHRINK);
#pragma unroll
    for (int i = 0; i < 16; ++i) out[i / 8][i / 4 % 2][i % 4] *= shrink[g + i % 4 / 2 * 8];
#pragma unroll 1
    for (int from = 0; from < left; from += 32) {
      const u8 *values[2], *fresh = memory + NEWEST + PITCH;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = from + (FP8 ? lane : i * 16 + lane % 16);
        const bool is_new = row == newest;
        values[i] = is_new ? fresh : b.values(stage) + row * PITCH;
        values[i] += ((FP8 ? warp : warp * 2 + lane / 16) ^ (is_new ? 0 : lane % 8)) * 16;
      }
      add_values(values[0], values[1], memory + SCORES + lane % 16 * SCORE + lane / 16 * 16 + from * 2, out);
    }
  }
  // A lane's columns are four neighbours, as they are numbered from here to the end.
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = g + half * 8;
    float v[2][2];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      v[i / 2][i % 2] = (out[0][i / 2][half * 2 + i % 2] + out[1][i / 2][half * 2 + i % 2]) * DOWN_KV;
    Floats four = {v[0][0], v[0][1], v[1][0], v[1][1]};
    if (FP8) four = {v[0][0], v[1][0], v[0][1], v[1][1]};
    float* to = (float*)(memory + PARTS) + (rank * OWN + row % OWN) * DIM + warp * 16 + t * 4;
    send_four(to, row / OWN, four, arrived);
  }
#pragma unroll
  for (int lanes = 1; lanes < 16; lanes *= 2) softmax.weight += __shfl_xor_sync(ALL, softmax.weight, lanes);
  if (tid % 16 == 0) {
    float* to = (float*)(memory + STATS) + (rank * OWN + tid / 16 % OWN) * 2;
    send_two(to, tid / 16 / OWN, softmax.top, softmax.weight, arrived);
  }
  wait_phase(arrived, 0);
  const int thread = tid, own = thread / DIM, column = thread % DIM, row = rank * OWN + own;
  Share shares[CLUSTER];
#pragma unroll
  for (int i = 0; i < CLUSTER; ++i) {
    const float2 two = ((const float2*)(memory + STATS))[i * OWN + own];
    shares[i] = {two.x, two.y, ((const float*)(memory + PARTS))[(i * OWN + own) * DIM + column]};
  }
  Share all = together(shares);
  if (used > 1) {
    const u64 base = (u64)head * CLUSTERS * ROWS + row;
    a.sums[(base + cluster * ROWS) * DIM + column] = all.sum;
    if (column == 0) *(float2*)(a.stats + (base + cluster * ROWS) * 2) = {all.top, all.weight};
    __syncthreads();
    u32* last = (u32*)(memory + LAST);
    if (tid == 0) *last = take_ticket(a.tickets + head * CLUSTER + rank, used - 1) == used - 1;
    __syncthreads();
    if (!*last) return;
    Share clusters[CLUSTERS];
#pragma unroll
    for (int i = 0; i < CLUSTERS; ++i) {
      const u64 from = base + min(i, used - 1) * ROWS;
      const float2 two = __ldcg((const float2*)a.stats + from);
      clusters[i] = {i < used ? two.x : LOWEST, i < used ? two.y : 0, __ldcg(a.sums + from * DIM + column)};
    }
    all = together(clusters);
  }
  const int i = column % 4, d = FP8 ? column : column / 16 * 16 + i / 2 * 8 + column / 4 % 4 * 2 + i % 2;
  const float value = __fdividef(all.sum, all.weight) * a.v_scale;
  if (row < GROUP) a.out[(head * GROUP + row) * DIM + d] = (u16)two_bf16(value, 0);
}
