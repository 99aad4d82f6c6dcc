// One token's attention in two launches: what both are given. A split is a share of the positions.
//
// NVRTC is given: KV_HEADS, GROUP (queries of a KV head, at most 16), PAGE (positions), SPLITS, FP8; DIM is 128.
#pragma once
#include "step.cuh"

constexpr int DIM = 128, TILE = 16;
constexpr float LOWEST = -3.402823466e38f;  // a score of what is not there: 2^(LOWEST - any other) is 0
static_assert(GROUP <= 16, "");

struct Arguments {
  const u16* q;       // [KV_HEADS * GROUP, DIM]
  const u16* k;       // [KV_HEADS, DIM]
  const u16* v;
  u8* k_pages;        // [pages, PAGE, KV_HEADS, DIM]
  u8* v_pages;
  const int* page_table;
  const long long* position;
  float* sums;        // [KV_HEADS, SPLITS, GROUP, DIM], values times their probabilities
  float* tops;        // [KV_HEADS, SPLITS, GROUP], the largest score, and
  float* weights;     // the sum of 2^(score - top)
  u16* out;           // [KV_HEADS * GROUP, DIM]
  float scale;        // of scores, with log2(e) in it
  float k_scale, v_scale;
};

// Positions of a split: whole tiles.
DEVICE int share_of(int length) { return ((length + TILE - 1) / TILE + SPLITS - 1) / SPLITS * TILE; }
