// What a launch of products.cu is compiled for: its parts and vectors, where all lies in shared memory, and where a
// block is in its work.
//
// NVRTC is given: GROUPS (a power of two) of GROUP warps, STAGES (a multiple of GROUPS, so that a stage is always the
// same group's), LONGEST (bytes of a row that are copied at once, but for codes), IN_FLIGHT (stages that are on their
// way at once while the ring is filled, or 0 for all) and PACED (also later);
// PARTS and lists with an entry a part: EIGHTS_OF (of rows of a job: 1, 2 or 4), BITS_OF, COLUMNS_OF, COPIES_OF
// (experts, or 1), ROWS_OF, SUMMED_OF (experts' results are added up), CHOSEN_OF (the part is of experts), VECTOR_OF
// (which vector it reads), TO_OF (what becomes of a result), FOR_OF (bits of the weights that will meet it, whose order
// it is left in, or 0); VECTORS and lists with an entry a vector: V_BITS_OF (of the
// weights that meet it), V_COLUMNS_OF, V_NONE_OF (it is none: a summed part's), V_SOURCE_OF (which input),
// V_NORMED_OF, V_READY_OF (it is left in the weights' order); and EXPERTS, TOP, NORMALIZE, CHOOSE: 1, experts are
// chosen here, when the first part, the router, is done; 2, the launch in front has chosen; 3, one before that has; 0.
// OWN: so many blocks take the first part's jobs, and the others the rest; or 0.
#pragma once
#include "step.cuh"

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
CONSTANT int beyond(int p) { return BITS(p) == 4 || piece_bytes(p) % 128 ? 128 : 0; }  // what a last step may read
CONSTANT int vector_in_stage(int p) { return up_to(height(p) * (pitch(p) + scale_bytes(p)) + beyond(p), 128); }
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
static_assert(GROUP >= 4 && GROUP % 4 == 0 && WARPS + 2 <= 32, "whole fours of warps, and those that copy and write");
static_assert(IN_FLIGHT <= STAGES && (IN_FLIGHT || !PACED), "");
static_assert(PARTS == 1 || !(SUMMED(0) || SUMMED(P1) || SUMMED(P2)), "a sum is alone");
static_assert((!P1 || TO(P1) != TO_STREAM) && (!P2 || TO(P2) != TO_STREAM), "only the first is added to the stream");
static_assert(CHOOSE > 1 || !(CHOSEN(0) || CHOSEN(P1) || CHOSEN(P2)), "of the chosen, who knows them");
static_assert(V_NORMED(0) || !(V_NORMED(V1) || V_NORMED(V2)), "vector 0 is what is normed");

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
