// Every op schema of packops, in one place. The implementations register themselves in ops_*.cpp; autograd and fake kernels in
// python/packops/_register/. Loading two libraries of one namespace would end the process, so experiments build this file with
// another PACKOPS_NAMESPACE (python/packops/jit.py).
//
// (linear_cross_entropy is a loop over these ops and torch's products: python/packops/_register/linear_ce_loss.py defines it.)
//
// Public ops carry plain names; those with a leading underscore are what Python's autograd formulas are made of.
#include "torch/namespace.h"

#define CE_LABELS                                                                                                 \
  "Tensor labels, *, Tensor? cu_seqlens=None, bool shift=False, str reduction=\"mean\", Tensor? num_items=None, " \
  "int ignore_index=-100, Tensor? token_weight=None, "
#define CE_MATHS \
  "Tensor? class_weight=None, float label_smoothing=0.0, float z_loss=0.0, float? softcap=None, float logit_scale=1.0"

// A shard of the vocabulary: its first class, and the classes of all shards.
#define CE_SHARD ", int first_class=0, int? vocab_size=None"

#define CE_STATS "Tensor floats, Tensor ints, Tensor counts, Tensor sequence_loss)"

#define ATTENTION_RULE "bool causal=True, int? window=None, float? softcap=None, float? scale=None"

PACKOPS_LIBRARY(m) {
  m.def("cross_entropy(Tensor logits, " CE_LABELS CE_MATHS ") -> Tensor");
  m.def("cross_entropy_stats(Tensor logits, " CE_LABELS CE_MATHS ") -> (Tensor loss, " CE_STATS);
  m.def("_cross_entropy_prepare(SymInt vocab, " CE_LABELS CE_MATHS
        ", bool double_precision=False) -> (Tensor target, Tensor scale, Tensor counts)");
  m.def("_cross_entropy_forward(Tensor logits, " CE_LABELS CE_MATHS
        ", bool with_grad=False, bool with_stats=False) -> (Tensor loss, Tensor grad_logits, " CE_STATS);
  m.def("_cross_entropy_forward_(Tensor(a!) logits, " CE_LABELS CE_MATHS ", bool with_stats=False) -> (Tensor loss, " CE_STATS);
  m.def("_cross_entropy_backward(Tensor grad_output, Tensor logits, Tensor floats, Tensor ints, *, " CE_MATHS CE_SHARD
        ") -> Tensor");
  m.def(
      "_cross_entropy_backward_(Tensor(a!) grad_logits, Tensor grad_output, Tensor? logits, Tensor floats, Tensor ints, *, "
      "bool holds_gradient=True, " CE_MATHS CE_SHARD ") -> ()");
  m.def("_cross_entropy_partial(Tensor logits, " CE_LABELS CE_MATHS
        ", int first_class, int vocab_size) -> (Tensor partial, Tensor floats, Tensor ints)");
  m.def(
      "_cross_entropy_combine(Tensor partials, Tensor logits, Tensor(a!) floats, Tensor ints, *, str "
      "reduction=\"mean\", " CE_MATHS ", int first_class, int vocab_size) -> Tensor");

  m.def("packed_metadata(Tensor cu_seqlens, SymInt total_tokens) -> (Tensor position_ids, Tensor seq_idx)");
  m.def(
      "packed_labels(Tensor labels, Tensor cu_seqlens, *, bool shift=True, int ignore_index=-100) -> (Tensor target, Tensor "
      "counts)");

  // Attention within documents. tiles: what the kernels of CUDA cut the documents into, once for both passes.
  m.def("_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, " ATTENTION_RULE
        ") -> (Tensor out, Tensor lse, Tensor tiles)");
  m.def(
      "_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor tiles, Tensor "
      "cu_seqlens, " ATTENTION_RULE ") -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");

  // The gate of a gated MLP. _gated_activation is the same without autograd; the backward op makes what it is asked for.
  m.def("gated_activation(Tensor gate, Tensor up, *, str activation=\"silu\") -> Tensor");
  m.def("_gated_activation(Tensor gate, Tensor up, str activation) -> Tensor");
  m.def(
      "_gated_activation_backward(Tensor grad, Tensor gate, Tensor up, str activation, bool with_product=True, bool "
      "with_gate=True, "
      "bool with_up=True) -> (Tensor? product, Tensor? grad_gate, Tensor? grad_up)");

  // RMS norm of rows; _rms_norm is the same without autograd.
  m.def("rms_norm(Tensor x, Tensor weight, *, float eps, bool zero_centered=False) -> Tensor");
  m.def("_rms_norm(Tensor x, Tensor weight, float eps, bool zero_centered) -> Tensor");
  m.def(
      "_rms_norm_backward(Tensor grad, Tensor x, Tensor weight, float eps, bool zero_centered) -> (Tensor grad_x, Tensor "
      "grad_weight)");

  // RoPE. _rope is rope without autograd, plus what the backward pass (transposed) and benchmarks (tuning) need.
  m.def(
      "rope(Tensor q, Tensor? k, Tensor cos, Tensor sin, Tensor? position_ids=None, Tensor? cu_seqlens=None, *, str? "
      "layout=None, "
      "int? rotary_dim=None, int rotary_offset=0, bool interleaved=False, int[]? mrope_section=None, bool "
      "mrope_interleaved=False, "
      "bool per_token_table=False) -> (Tensor, Tensor?)");
  m.def(
      "_rope(Tensor q, Tensor? k, Tensor cos, Tensor sin, Tensor? position_ids=None, Tensor? cu_seqlens=None, str? layout=None, "
      "int? rotary_dim=None, int rotary_offset=0, bool interleaved=False, int[]? mrope_section=None, bool "
      "mrope_interleaved=False, "
      "bool per_token_table=False, bool transposed=False, int[]? tuning=None) -> (Tensor, Tensor?)");
  m.def(
      "rope_(Tensor(a!) q, Tensor(b!)? k, Tensor cos, Tensor sin, Tensor? position_ids=None, Tensor? cu_seqlens=None, *, "
      "str? layout=None, int? rotary_dim=None, int rotary_offset=0, bool interleaved=False, int[]? mrope_section=None, "
      "bool mrope_interleaved=False, bool per_token_table=False) -> ()");
  m.def(
      "_rope_(Tensor(a!) q, Tensor(b!)? k, Tensor cos, Tensor sin, Tensor? position_ids=None, Tensor? cu_seqlens=None, "
      "str? layout=None, int? rotary_dim=None, int rotary_offset=0, bool interleaved=False, int[]? mrope_section=None, "
      "bool mrope_interleaved=False, bool per_token_table=False, bool transposed=False, int[]? tuning=None) -> ()");

  // RMS norm of the heads, then RoPE. _qk_norm_rope is the same without autograd.
  m.def(
      "qk_norm_rope(Tensor q, Tensor? k, Tensor q_weight, Tensor? k_weight, Tensor cos, Tensor sin, Tensor? position_ids=None, "
      "Tensor? cu_seqlens=None, *, float eps, bool zero_centered=False, str? layout=None, int? rotary_dim=None, "
      "int rotary_offset=0, bool interleaved=False, int[]? mrope_section=None, bool mrope_interleaved=False, "
      "bool per_token_table=False) -> (Tensor, Tensor?)");
  m.def(
      "_qk_norm_rope(Tensor q, Tensor? k, Tensor q_weight, Tensor? k_weight, Tensor cos, Tensor sin, Tensor? position_ids, "
      "Tensor? cu_seqlens, float eps, bool zero_centered=False, str? layout=None, int? rotary_dim=None, "
      "int rotary_offset=0, bool interleaved=False, int[]? mrope_section=None, bool mrope_interleaved=False, "
      "bool per_token_table=False) -> (Tensor, Tensor?)");
  m.def(
      "_qk_norm_rope_backward(Tensor q_grad, Tensor? k_grad, Tensor q, Tensor? k, Tensor q_weight, Tensor? k_weight, Tensor cos, "
      "Tensor sin, Tensor? position_ids, Tensor? cu_seqlens, float eps, bool zero_centered=False, str? layout=None, int? "
      "rotary_dim=None, "
      "int rotary_offset=0, bool interleaved=False, int[]? mrope_section=None, bool mrope_interleaved=False, "
      "bool per_token_table=False) -> (Tensor, Tensor?, Tensor, Tensor?)");
}
