// What the glue of rope and of qk_norm_rope share: shapes and strides of their common arguments into RopeParams, with every
// check.
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "rope_cpu.h"
#include "torch/documents.h"
#include "torch/overlap.h"
#include "torch/rows.h"
#include "torch/string.h"

namespace packops {

using OptionalInts = std::optional<std::vector<int64_t>>;
using OptionalString = std::optional<StringArgument>;

// The arguments that every op of RoPE ends with, spelled once: in the schema, as parameters, and as arguments.
#define ROPE_OPTIONS                                                                      \
  "str? layout=None, int? rotary_dim=None, int rotary_offset=0, bool interleaved=False, " \
  "int[]? mrope_section=None, bool mrope_interleaved=False, bool per_token_table=False"
#define ROPE_PARAMETERS                                                                                                          \
  OptionalString layout, std::optional<int64_t> rotary_dim, int64_t rotary_offset, bool interleaved, OptionalInts mrope_section, \
      bool mrope_interleaved, bool per_token_table
#define ROPE_ARGUMENTS layout, rotary_dim, rotary_offset, interleaved, mrope_section, mrope_interleaved, per_token_table

// The dimensions of q and k.
struct Layout {
  bool has_batch;
  int token, head;
};

inline Layout layout_of(const char* op, const Tensor& q, const OptionalString& name) {
  const std::string text = name ? std::string(*name) : q.dim() == 3 ? "thd" : "bshd";
  PACKOPS_CHECK(text == "thd" || text == "bshd" || text == "bhsd", ValueError, op,
                ": layout must be 'thd', 'bshd' or 'bhsd', got '", text, "'");
  const int64_t dim = text == "thd" ? 3 : 4;
  PACKOPS_CHECK(q.dim() == dim, ValueError, op, ": q must be (T, heads, head_dim) or a 4-D tensor, with layout '", text, "' ",
                dim, "-D, got shape ", shape_of(q));
  if (text == "thd") return {false, 0, 1};
  return text == "bshd" ? Layout{true, 1, 2} : Layout{true, 2, 1};
}

inline RopeHeads heads_of(const char* op, const Tensor& tensor, const Layout& layout, const char* name) {
  PACKOPS_CHECK(has_contiguous_rows(tensor), ValueError, op, ": the last dimension of ", name, " must be contiguous, got stride ",
                tensor.stride(tensor.dim() - 1));
  RopeHeads heads;
  heads.in = tensor.data_ptr();
  heads.heads = tensor.size(layout.head);
  heads.in_batch = layout.has_batch ? tensor.stride(0) : 0;
  heads.in_token = tensor.stride(layout.token);
  heads.in_head = tensor.stride(layout.head);
  return heads;
}

inline void set_output(RopeHeads& heads, const Tensor& out, const Layout& layout) {
  heads.out = out.data_ptr();
  heads.out_batch = layout.has_batch ? out.stride(0) : 0;
  heads.out_token = out.stride(layout.token);
  heads.out_head = out.stride(layout.head);
}

// In place, two features at one address would be rotated twice, in any order.
inline void check_in_place(const char* op, const Tensor& q, const OptionalTensor& k) {
  check_no_overlap(op, "q", q);
  if (!k) return;
  check_no_overlap(op, "k", *k);
  PACKOPS_CHECK(!share_memory(q, *k), ValueError, op,
                ": q and k share memory, so they cannot be rotated in place: clone one, or use inplace=False");
}

// Makes (batch, token) strides of an index or table whose leading dimensions are (T,), (B, S) or (1, S). skip: leading dimensions
// before those; trailing: dimensions after them.
inline void token_strides(const char* op, const Tensor& tensor, int skip, int trailing, const RopeParams& p, const char* name,
                          int64_t* batch_stride, int64_t* token_stride) {
  const int64_t dim = tensor.dim() - skip - trailing, total = p.batch * p.tokens;
  if (dim == 1 && tensor.size(skip) == total) {
    *token_stride = tensor.stride(skip);
    *batch_stride = p.tokens * *token_stride;
    return;
  }
  const bool broadcast = dim == 2 && tensor.size(skip) == 1;
  PACKOPS_CHECK(dim == 2 && (broadcast || tensor.size(skip) == p.batch) && tensor.size(skip + 1) == p.tokens, ValueError, op,
                ": ", name, " must have one entry per token, (", total, ") or ",
                p.batch == 1 ? "" : "(" + std::to_string(p.batch) + ", " + std::to_string(p.tokens) + ") or ", "(1, ", p.tokens,
                ")", skip ? " after the 3 axes" : "", trailing ? " before the features" : "", ", got shape ", shape_of(tensor));
  *token_stride = tensor.stride(skip + 1);
  *batch_stride = broadcast ? 0 : tensor.stride(skip);
}

// The arguments that rope ops share, in the order of their schemas.
struct RopeOptions {
  const char* op;
  const OptionalTensor &position_ids, &cu_seqlens;
  const OptionalString& layout;
  const std::optional<int64_t>& rotary_dim;
  int64_t rotary_offset;
  bool interleaved;
  const OptionalInts& mrope_section;
  bool mrope_interleaved, per_token_table, transposed;
};

// Without rotary_dim a table that fits twice into a head is read as half a table. Hugging Face's tables of partial rotary
// embeddings hold every number twice and would be misread: raise on the host, where that shows.
inline void check_half_table(const char* op, const RopeParams& p) {
  const int width = p.rotary_dim / 2;
  RopeRepetition repetition;
  for (int64_t batch = 0; batch < (p.per_token_table ? p.batch : 1); batch++)
    for (int64_t row = 0; row < p.table_rows && repetition.possible(); row++)
      repetition.add_row(
          width, [&](int i) { return table_at<double>(p.sin, p.table_dtype, batch * p.sin_batch + row * p.sin_row + i); });
  PACKOPS_CHECK(!repetition.found(), ValueError, op, ": cos and sin hold every number twice, as Hugging Face makes them for ",
                width, " rotary features: pass rotary_dim=", width, ", or else they are half a table of ", p.rotary_dim,
                " features");
}

// A table as wide as the rotary features has every number twice, at the two features of a pair. Only one is read: in the other
// order, or with numbers of its own for every feature, the result would be another. A few rows show it.
inline void check_full_table(const char* op, const RopeParams& p) {
  const int pairs = p.rotary_dim / 2;
  for (int64_t batch = 0; batch < (p.per_token_table ? p.batch : 1); batch++)
    for (const int64_t row : {int64_t(1), p.table_rows / 2, p.table_rows - 1}) {
      if (row < 0 || row >= p.table_rows) continue;
      for (int i = 0; i < pairs; i++) {
        const int64_t at = batch * p.sin_batch + row * p.sin_row + i * p.table_step;
        const double of_pair[] = {table_at<double>(p.sin, p.table_dtype, at),
                                  table_at<double>(p.sin, p.table_dtype, at + (p.interleaved ? 1 : pairs))};
        PACKOPS_CHECK(of_pair[0] == of_pair[1] || of_pair[0] != of_pair[0], ValueError, op, ": cos and sin of ", p.rotary_dim,
                      " columns must hold every number twice, at the two features of a pair (",
                      p.interleaved ? "2i and 2i + 1" : "i and i + rotary_dim / 2", "), but row ", row,
                      " of sin does not: for a table", " in the other order pass interleaved=", p.interleaved ? "False" : "True",
                      ", for half a table rotary_dim=", 2 * p.rotary_dim);
      }
    }
}

// Everything but the outputs. boundaries: keeps alive what the parameters point to.
inline RopeParams make_rope_params(const Tensor& q, const OptionalTensor& k, const Tensor& cos, const Tensor& sin,
                                   const RopeOptions& options, const Layout& layout, Tensor& boundaries) {
  const char* op = options.op;
  RopeParams p;
  p.dtype = float_dtype(q, op, "q");
  p.batch = layout.has_batch ? q.size(0) : 1;
  p.tokens = q.size(layout.token);
  const int64_t head_dim = q.size(q.dim() - 1);
  p.q = heads_of(op, q, layout, "q");
  if (k) {
    check_dtype(op, "k", *k, "q", q);
    check_device(op, "k", *k, "q", q);
    PACKOPS_CHECK(k->dim() == q.dim() && (!layout.has_batch || k->size(0) == q.size(0)) && k->size(layout.token) == p.tokens &&
                      k->size(q.dim() - 1) == head_dim,
                  ValueError, op, ": k must have the shape of q except for the number of heads, ", shape_of(q), ", got ",
                  shape_of(*k));
    p.k = heads_of(op, *k, layout, "k");
  }

  check_device(op, "cos", cos, "q", q);
  check_device(op, "sin", sin, "q", q);
  p.table_dtype = kernel_dtype(cos, op, "cos");
  PACKOPS_CHECK(!is_index(p.table_dtype) && sin.scalar_type() == cos.scalar_type(), TypeError, op,
                ": cos and sin must have one floating dtype, got ", dtype_of(cos), " and ", dtype_of(sin));
  p.per_token_table = options.per_token_table;
  const int64_t table_dim = cos.dim();
  PACKOPS_CHECK(table_dim == 2 || (table_dim == 3 && p.per_token_table), ValueError, op, ": cos must be (positions, width)",
                p.per_token_table ? " or (B, S, width)" : "", ", got shape ", shape_of(cos),
                table_dim == 3 && !p.per_token_table ? " (one row per token? then pass per_token_table=True)" : "");
  bool same = sin.dim() == table_dim;
  for (int64_t i = 0; same && i < table_dim; i++) same = sin.size(i) == cos.size(i);
  PACKOPS_CHECK(same, ValueError, op, ": sin must have the shape of cos, ", shape_of(cos), ", got ", shape_of(sin));
  const int64_t width = cos.size(table_dim - 1);
  PACKOPS_CHECK(width <= 1 || (cos.stride(table_dim - 1) == 1 && sin.stride(table_dim - 1) == 1), ValueError, op,
                ": the last dimension of cos and sin must be contiguous");
  const int64_t rotary_dim = options.rotary_dim ? *options.rotary_dim : 2 * width <= head_dim ? 2 * width : width;
  PACKOPS_CHECK(rotary_dim >= 2 && rotary_dim % 2 == 0, ValueError, op, ": the rotary dimension must be even and positive, got ",
                rotary_dim, options.rotary_dim ? "" : " (the width of cos, wider than half of a head)");
  PACKOPS_CHECK(width == rotary_dim || width == rotary_dim / 2, ValueError, op,
                ": cos and sin must have rotary_dim / 2 = ", rotary_dim / 2, " columns, or rotary_dim = ", rotary_dim,
                " as Hugging Face duplicates them, got ", width);
  PACKOPS_CHECK(rotary_dim <= head_dim && options.rotary_offset >= 0 && options.rotary_offset <= head_dim - rotary_dim,
                ValueError, op, ": the rotary features [rotary_offset, rotary_offset + rotary_dim) must lie inside a head of ",
                head_dim, " features, got rotary_offset ", options.rotary_offset, " and rotary_dim ", rotary_dim);
  PACKOPS_CHECK(head_dim <= (1 << 20), ValueError, op, ": head_dim must be at most ", 1 << 20, ", got ", head_dim);
  p.head_dim = int32_t(head_dim);
  p.rotary_dim = int32_t(rotary_dim);
  p.rotary_offset = int32_t(options.rotary_offset);
  p.interleaved = options.interleaved;
  p.table = width == rotary_dim ? RopeTable::full : options.rotary_dim || width % 2 != 0 ? RopeTable::half : RopeTable::guessed;
  p.table_step = options.interleaved && p.table == RopeTable::full ? 2 : 1;
  p.transposed = options.transposed;
  p.cos = cos.data_ptr();
  p.sin = sin.data_ptr();
  if (p.per_token_table) {
    PACKOPS_CHECK(
        !options.position_ids && !options.mrope_section, ValueError, op,
        ": per_token_table=True means row t of cos and sin belongs to token t; position_ids and mrope_section must be None then");
    token_strides(op, cos, 0, 1, p, "cos", &p.cos_batch, &p.cos_row);
    token_strides(op, sin, 0, 1, p, "sin", &p.sin_batch, &p.sin_row);
    p.table_rows = p.tokens;
  } else {
    p.table_rows = cos.size(0);
    p.cos_row = cos.stride(0);
    p.sin_row = sin.stride(0);
  }

  if (q.is_cpu()) {
    if (p.table == RopeTable::full) check_full_table(op, p);
    if (p.table == RopeTable::guessed) check_half_table(op, p);
  }

  p.mrope = options.mrope_section.has_value();
  p.mrope_interleaved = options.mrope_interleaved;
  PACKOPS_CHECK(p.mrope || !p.mrope_interleaved, ValueError, op, ": mrope_interleaved=True needs mrope_section");
  if (p.mrope) {
    const auto& section = *options.mrope_section;
    int64_t left = rotary_dim / 2;  // no sum of widths overflows
    bool fits = section.size() == 3;
    for (int64_t width : section) fits = fits && width >= 0 && width <= left && ((left -= width), true);
    PACKOPS_CHECK(fits && left == 0, ValueError, op,
                  ": mrope_section must be three widths that add up to rotary_dim / 2 = ", rotary_dim / 2, ", got ",
                  tuple_of(section));
    for (int axis = 0; axis < 3; axis++) p.mrope_section[axis] = int32_t(section[axis]);
    PACKOPS_CHECK(options.position_ids, ValueError, op, ": mrope_section needs position_ids of shape (3, ...), got None");
  }
  if (options.position_ids) {
    const Tensor& ids = *options.position_ids;
    check_device(op, "position_ids", ids, "q", q);
    p.position_dtype = index_dtype(ids, op, "position_ids");
    PACKOPS_CHECK(!p.mrope || (ids.dim() >= 2 && ids.size(0) == 3), ValueError, op,
                  ": position_ids must be (3, ...) with mrope_section, got shape ", shape_of(ids));
    token_strides(op, ids, p.mrope ? 1 : 0, 0, p, "position_ids", &p.position_batch, &p.position_token);
    p.position_axis = p.mrope ? ids.stride(0) : 0;
    p.position_ids = ids.data_ptr();
  }
  if (options.cu_seqlens) {
    auto documents = check_documents(op, *options.cu_seqlens, p.batch * p.tokens, "q", q);
    p.axis = documents.axis;
    boundaries = documents.cu_seqlens;
  }
  return p;
}

// Raises if a position is outside the table; on the host only.
inline void check_rope_positions(const char* op, const RopeParams& p) {
  const RopeFault fault = rope_check_cpu(p);
  PACKOPS_CHECK(fault.token < 0, IndexError, op, ": position ", fault.position, " of token ", fault.token,
                " is outside the table of ", p.table_rows, " positions");
}

// Memory for a rotated q or k: of the input's strides where those are dense, as torch's own operations do, but always with
// contiguous features.
inline Tensor empty_heads_like(const Tensor& heads) {
  if (is_dense(heads) && has_contiguous_rows(heads))
    return allocate_strided(heads, heads.sizes(), heads.strides().data(), heads.scalar_type());
  Tensor out = copying(heads, heads.scalar_type(), [&] { return torch::stable::empty_like(heads); });
  return has_contiguous_rows(out) ? out : allocate(heads, heads.sizes());
}

}  // namespace packops
