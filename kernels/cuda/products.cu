// Weights times one token's vectors, in one launch: what a layer reads at once.
//
// A part is a matrix, or a stack of experts; a job is some eights of rows of one. A block takes every so-manieth
// job. One of its warps copies the jobs' rows to a ring in shared memory, stage by stage, as far ahead as that has
// room. GROUPS groups of GROUP (4 or 8) warps take the stages in turn; a group shares a stage's columns. One more warp
// adds up what they have of a job and writes it. So the weights of what the launch in front does not decide are on
// their way before that has ended.
//
// NVRTC is given: GROUPS (a power of two), STAGES (a multiple of it, so that a stage is always the same group's);
// PARTS and lists with an entry a part: EIGHTS_OF (of rows of a job: 1, 2 or 4), BITS_OF,
// COLUMNS_OF, COPIES_OF (experts, or 1), ROWS_OF, SUMMED_OF (experts' results are added up), CHOSEN_OF (the part
// is of experts), VECTOR_OF (which vector it reads), TO_OF (what becomes of a result), FOR_OF (bits of the weights
// that will meet it, whose order it is left in, or 0); VECTORS and lists with an entry a vector: V_BITS_OF (of the
// weights that meet it), V_COLUMNS_OF, V_NONE_OF (it is none: a summed part's), V_SOURCE_OF (which input),
// V_NORMED_OF, V_READY_OF (it is left in the weights' order); and EXPERTS, TOP, NORMALIZE, CHOOSE: 1, experts are
// chosen here, when the first part, the router, is done; 2, the launch in front has chosen; 3, one before that has; 0.
// OWN: so many blocks take the first part's jobs, and the others the rest; or 0.
#include "step.cuh"
#include "choice.cuh"

enum { TO_BF16, TO_SQUARED, TO_STREAM, TO_FLOAT };

struct Part {
  const u8* weights;
  const u8* scales;
  const float* factors;  // a matrix's scale, of each expert one
  void* out;
};
struct Arguments {
  Part parts[3];
  const u16* inputs[2];
  const float* norm;
  const u16* stream;   // a result of TO_STREAM is added to
  const u16* addend;   // and to this before, unless it is null
  const float* logits;
  const float* bias;
  int* ids;            // of the chosen, best first
  float* chosen;       // their weights
  u32* ticket;         // zero between launches: blocks that are done with the router count themselves
  float eps, scale;
};

#define LIST(name, ...)                  \
  CONSTANT int name(int i) {             \
    constexpr int list[] = {__VA_ARGS__}; \
    return list[i];                      \
  }
constexpr int P1 = PARTS > 1 ? 1 : 0, P2 = PARTS > 2 ? 2 : 0, V1 = VECTORS > 1 ? 1 : 0, V2 = VECTORS > 2 ? 2 : 0;
LIST(EIGHTS, EIGHTS_OF)
LIST(BITS, BITS_OF)
LIST(ROWS, ROWS_OF)
LIST(COLUMNS, COLUMNS_OF)
LIST(COPIES, COPIES_OF)
LIST(SUMMED, SUMMED_OF)
LIST(CHOSEN, CHOSEN_OF)
LIST(VECTOR, VECTOR_OF)
LIST(TO, TO_OF)
LIST(FOR, FOR_OF)
LIST(V_BITS, V_BITS_OF)
LIST(V_COLUMNS, V_COLUMNS_OF)
LIST(V_NONE, V_NONE_OF)
LIST(V_SOURCE, V_SOURCE_OF)
LIST(V_NORMED, V_NORMED_OF)
LIST(V_READY, V_READY_OF)
constexpr int WARPS = GROUPS * GROUP;

CONSTANT int up_to(int value, int whole) { return (value + whole - 1) / whole * whole; }
CONSTANT int height(int p) { return 8 * EIGHTS(p); }  // rows of a job
CONSTANT int row_bytes(int p) { return COLUMNS(p) * BITS(p) / 8; }
CONSTANT int pieces(int p) {
  int count = BITS(p) == 4 ? 1 : (row_bytes(p) + LONGEST - 1) / LONGEST;
  while (count > 1 && row_bytes(p) % (count * 128)) ++count;
  return count;
}
CONSTANT int piece_bytes(int p) { return row_bytes(p) / pieces(p); }
CONSTANT int pitch(int p) { return pieces(p) == 1 ? piece_bytes(p) : up_to(piece_bytes(p), 128) + 64; }
CONSTANT int steps(int p) { return up_to(piece_bytes(p), 128) / 128; }
CONSTANT int scale_bytes(int p) { return BITS(p) == 4 ? COLUMNS(p) / 16 : 0; }  // of a row
// A summed part's vectors, which are as many as its experts, come stage by stage with the rows.
CONSTANT int vector_in_stage(int p) { return up_to(height(p) * (pitch(p) + scale_bytes(p)) + 128, 128); }
CONSTANT int stage_bytes(int p) { return vector_in_stage(p) + (SUMMED(p) ? up_to(COLUMNS(p) * 2, 128) : 0); }
CONSTANT int stage_size(int p = 0) {
  return p == PARTS ? 0 : stage_bytes(p) > stage_size(p + 1) ? stage_bytes(p) : stage_size(p + 1);
}
CONSTANT int vector_bytes(int v) {  // with zeros to its last step's end
  return up_to(V_COLUMNS(v), columns_of(V_BITS(v))) * 2;
}
CONSTANT int vector_at(int v) { return v == 0 ? 0 : vector_at(v - 1) + (V_NONE(v - 1) ? 0 : vector_bytes(v - 1)); }

// Shared memory.
constexpr int HEIGHT = up_to(height(0) > height(P1) ? height(0) : height(P1), height(P2));  // powers of two
// Where a lane's part of a vector is none, it reads zeros, from banks that the others of its eight do not touch.
constexpr int RED = 512, CHOICE = RED + STAGES * WARPS * HEIGHT * 4;  // ids, weights
constexpr int ZEROS = up_to(CHOICE + 256, 128) + 96, X = ZEROS + 160;
constexpr int RING = up_to(X + vector_at(VECTORS), 128), STAGE = stage_size();
constexpr int THREADS = WARPS * 32;  // but for the warps that copy and write
static_assert(STAGES <= 16 && STAGES % GROUPS == 0, "a stage is always the same group's");

CONSTANT int tiles(int p) { return (ROWS(p) + height(p) - 1) / height(p); }
CONSTANT int jobs(int p) { return tiles(p) * (SUMMED(p) ? 1 : COPIES(p)); }
CONSTANT int stages(int p) { return pieces(p) * (SUMMED(p) ? COPIES(p) : 1); }  // of a job
constexpr bool SINGLE = stages(0) == 1 && stages(P1) == 1 && stages(P2) == 1;  // every job is a stage
constexpr int TURN = SINGLE ? GROUPS : 1;
constexpr int FIRST_JOBS = jobs(0), SECOND_JOBS = PARTS > 1 ? jobs(P1) : 0, THIRD_JOBS = PARTS > 2 ? jobs(P2) : 0;

// Where a block is in its work: a job of a part, and in it a stage's worth. A summed part's job has all experts'
// rows.
struct Cursor {
  int job, part, inner;
  DEVICE static bool in_own() { return OWN > 0 && blockIdx.x < OWN; }
  DEVICE static int stride() { return OWN == 0 ? (int)gridDim.x : in_own() ? OWN : (int)gridDim.x - OWN; }
  DEVICE static Cursor of_block() {
    return {OWN == 0 || in_own() ? (int)blockIdx.x : (int)blockIdx.x - OWN + FIRST_JOBS, 0, 0};
  }
  DEVICE bool settle() {  // which part the job is of; false past the end
    if (part == 0 && job >= FIRST_JOBS) {
      if (in_own()) return false;
      job -= FIRST_JOBS, part = 1;
    }
    if (PARTS > 1 && part == 1 && job >= SECOND_JOBS) job -= SECOND_JOBS, part = 2;
    if (PARTS > 2 && part == 2 && job >= THIRD_JOBS) part = 3;
    return part < PARTS;
  }
  DEVICE int stages() const { return part == 0 ? ::stages(0) : PARTS > 1 && part == 1 ? ::stages(P1) : ::stages(P2); }
  DEVICE bool chosen() const { return part == 0 ? CHOSEN(0) : PARTS > 1 && part == 1 ? CHOSEN(P1) : CHOSEN(P2); }
  DEVICE bool next_job(int turn = 1) {
    inner = 0;
    job += stride() * turn;
    return settle();
  }
  DEVICE bool next_stage() { return ++inner < stages() || next_job(); }
};

struct Shared {
  u8* memory;
  DEVICE u64* full(int stage) const { return (u64*)memory + stage; }
  DEVICE u64* empty(int stage) const { return (u64*)memory + 16 + stage; }
  DEVICE u64* done(int stage) const { return (u64*)memory + 32 + stage; }  // by its group; then its results are read
  DEVICE u64* weighted() const { return (u64*)memory + 48; }  // the chosen experts' weights are there
  DEVICE float* red(int stage) const { return (float*)(memory + RED) + stage * WARPS * HEIGHT; }
  DEVICE int* ids() const { return (int*)(memory + CHOICE); }
  DEVICE float* weights() const { return (float*)(memory + CHOICE + 128); }
  DEVICE u8* ring(int stage) const { return memory + RING + stage * STAGE; }
};

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

// The warp that copies. It has nothing else to do: a job's worth of it takes as long as a job.
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

// The warp that writes results.
DEVICE void write(const Arguments& a, const Shared& s, const Cursor& begin, bool some) {
  const int lane = threadIdx.x & 31;
  Cursor at = begin;
  float factors[3] = {1, 1, 1};
#pragma unroll
  for (int p = 0; p < PARTS; ++p)
    if (BITS(p) < 16 && !CHOSEN(p)) factors[p] = *a.parts[p].factors;
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
  const int routers = min(FIRST_JOBS, OWN ? OWN : (int)gridDim.x);
  if (blockIdx.x >= routers) return;
  __syncwarp();  // all lanes have written their logits
  const u32 before = __shfl_sync(ALL, lane == 0 ? take_ticket(a.ticket, routers - 1) : 0, 0);
  if (before < routers - 1) return;
  Candidate* able = (Candidate*)s.ring(0);  // the block's stages are done with
  static_assert(CHOOSE != 1 || EXPERTS * (int)sizeof(Candidate) <= STAGES * STAGE, "");
  choose<EXPERTS, TOP, NORMALIZE>(a.logits, a.bias, a.scale, able, s.ids(), a.ids, a.chosen);
#endif
}

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
