// RoPE (rotary position embedding) on query and key heads: the plain interface of rope.cu and rope_cpu.cpp.
//
//   pair (x, y) of a head, angle a = position * frequency:   x' = x cos a - y sin a,   y' = y cos a + x sin a
//
// transposed (the backward pass): the sine is negated. The pairs of a head are its features (i, i + R/2), or with `interleaved`
// (2i, 2i + 1), counted from rotary_offset. The other features pass through bit for bit.
#pragma once

#include <cstdint>

#ifdef PACKOPS_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

#include "common/documents.h"
#include "common/dtype.h"

namespace packops {

// half: a column for each pair. full: a column for each feature, so the two features of a pair have the same number. guessed:
// taken for half a table, since twice its width fits into a head and nobody said more. A table that contradicts this would be
// misread: an error on the CPU (torch/rope_args.h), and on CUDA NaN in the first tokens of every row (RopeCoefficients::finds_misread).
enum class RopeTable : int8_t { half, guessed, full };

// One of q and k. Strides count elements; the features of a head are contiguous.
struct RopeHeads {
  const void* in = nullptr;
  void* out = nullptr;  // == in: in place, only rotated features are written
  int64_t heads = 0;    // 0: no such tensor
  int64_t in_batch = 0, in_token = 0, in_head = 0;
  int64_t out_batch = 0, out_token = 0, out_head = 0;
};

struct RopeParams {
  RopeHeads q, k;
  DType dtype = DType::f32;       // of q and k
  int64_t batch = 1, tokens = 0;  // tokens: of one batch row
  int32_t head_dim = 0, rotary_dim = 0, rotary_offset = 0;
  bool interleaved = false, transposed = false, in_place = false;

  // cos and sin (table_rows, >= rotary_dim / 2), or one row per token when per_token_table. Strides in elements. Pair i has
  // column table_step * i: 2 i in a full-width table of interleaved pairs, whose columns belong to features.
  const void *cos = nullptr, *sin = nullptr;
  DType table_dtype = DType::f32;
  bool per_token_table = false;
  int64_t table_rows = 0;
  int32_t table_step = 1;
  RopeTable table = RopeTable::half;
  int64_t cos_batch = 0, cos_row = 0, sin_batch = 0, sin_row = 0;

  // The position of a token: position_ids, or else its distance from the start of its document (axis, the flattened tokens), or
  // else its index in the batch row. Padding passes through unchanged.
  const void* position_ids = nullptr;
  DType position_dtype = DType::i64;
  int64_t position_axis = 0, position_batch = 0, position_token = 0;  // strides; axis: of the three M-RoPE axes
  PackedAxis axis;                                                    // cu_seqlens may be null

  // M-RoPE: which of three position ids turns a pair. Sections are numbers of pairs.
  bool mrope = false, mrope_interleaved = false;
  int32_t mrope_section[3] = {0, 0, 0};
};

// The M-RoPE axis of pair i: contiguous blocks (Qwen2-VL), or dealt out in turn (Qwen3-VL), where axis 1 takes 1, 4, 7, ... below
// 3 section[1], axis 2 takes 2, 5, 8, ... below 3 section[2], and axis 0 the rest.
PACKOPS_HOST_DEVICE int rope_mrope_axis(const RopeParams& p, int i) {
  if (p.mrope_interleaved) {
    const int axis = i % 3;
    return axis != 0 && i < 3 * p.mrope_section[axis] ? axis : 0;
  }
  return i < p.mrope_section[0] ? 0 : i < p.mrope_section[0] + p.mrope_section[1] ? 1 : 2;
}

// Finds out, row by row, whether a table holds every number twice, in halves or as neighbours, as a full-width table does. A row
// of position 0 says nothing: all its sines are 0.
struct RopeRepetition {
  bool halves = true, neighbours = true, turns = false;

  // sine(i): of column i of `width`.
  template <typename Sine>
  PACKOPS_HOST_DEVICE void add_row(int width, Sine sine) {
    for (int i = 0; i < width / 2 && possible(); i++) {
      halves &= sine(i) == sine(i + width / 2);
      neighbours &= sine(2 * i) == sine(2 * i + 1);
      turns |= sine(i) != 0;
    }
  }
  PACKOPS_HOST_DEVICE bool possible() const { return halves || neighbours; }
  PACKOPS_HOST_DEVICE bool found() const { return turns && possible(); }
};

// A token whose position is outside the table; token -1: there is none.
struct RopeFault {
  int64_t token = -1, position = 0;
};

// Reads every position on the host before rope_cpu may use them. cu_seqlens must be well formed.
RopeFault rope_check_cpu(const RopeParams& params);

// Rotates the flattened tokens [begin, end).
void rope_cpu(const RopeParams& params, int64_t begin, int64_t end);

#ifdef PACKOPS_WITH_CUDA
cudaError_t rope_cuda(const RopeParams& params, cudaStream_t stream);
#endif

}  // namespace packops
