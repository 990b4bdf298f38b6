// Every op schema of packops, in one place. The implementations register themselves in ops_*.cpp; autograd and fake kernels in
// python/packops/_register/. Loading two libraries of one namespace would end the process, so experiments build this file with
// another PACKOPS_NAMESPACE (python/packops/jit.py).
#include "torch/namespace.h"

PACKOPS_LIBRARY(m) {
  // RoPE. _rope is rope without autograd, plus what the backward pass (transposed) and benchmarks (tuning) need.
  m.def(
      "rope(Tensor q, Tensor? k, Tensor cos, Tensor sin, Tensor? position_ids=None, Tensor? cu_seqlens=None, *, str? layout=None, "
      "int? rotary_dim=None, int rotary_offset=0, bool interleaved=False, int[]? mrope_section=None, bool mrope_interleaved=False, "
      "bool per_token_table=False) -> (Tensor, Tensor?)");
  m.def(
      "_rope(Tensor q, Tensor? k, Tensor cos, Tensor sin, Tensor? position_ids=None, Tensor? cu_seqlens=None, str? layout=None, "
      "int? rotary_dim=None, int rotary_offset=0, bool interleaved=False, int[]? mrope_section=None, bool mrope_interleaved=False, "
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
      "Tensor sin, Tensor? position_ids, Tensor? cu_seqlens, float eps, bool zero_centered=False, str? layout=None, int? rotary_dim=None, "
      "int rotary_offset=0, bool interleaved=False, int[]? mrope_section=None, bool mrope_interleaved=False, "
      "bool per_token_table=False) -> (Tensor, Tensor?, Tensor, Tensor?)");
}
