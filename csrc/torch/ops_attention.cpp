// Attention within documents: checks, allocation, registration.
#include <cmath>
#include <optional>
#include <tuple>

#include "attention.h"
#include "torch/forest.h"
#include "torch/register.h"

namespace packops {
namespace {

constexpr const char* kOp = "attention";

// The arguments that forward and backward share, in the order of their schemas.
struct AttentionOptions {
  bool causal;
  std::optional<int64_t> window;
  std::optional<double> softcap, scale;
};

// Whether a dimension is one row over and over.
bool is_expanded(const Tensor& tensor) {
  const auto repeats = [&](int64_t i) { return tensor.size(i) > 1 && tensor.stride(i) == 0; };
  return repeats(0) || repeats(1);
}

// What the kernels read: the tensor itself, or a copy where a row is not contiguous or, on CUDA, does not begin at 16 bytes or is
// expanded, since a kernel may read it by a tensor map.
Tensor set_input(const Tensor& tensor, Heads* heads) {
  bool fits = tensor.size(2) <= 1 || tensor.stride(2) == 1;
  if (tensor.is_cuda()) {
    const auto places =
        reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) | uintptr_t(tensor.stride(0) * 2) | uintptr_t(tensor.stride(1) * 2);
    fits = fits && places % 16 == 0 && !is_expanded(tensor);
  }
  const Tensor read = fits ? tensor : contiguous_copy(tensor);
  *heads = {read.const_data_ptr(), read.stride(0), read.stride(1)};
  return read;
}

// The problem, with the tensors that its pointers lead to.
struct Attention {
  AttentionParams params;
  Tensor q, k, v, cu_seqlens;
};

Attention prepare(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens, const AttentionOptions& options) {
  PACKOPS_CHECK(q.dim() == 3, ValueError, kOp, ": q must have shape (tokens, heads, head_dim), got ", shape_of(q));
  const int64_t dim = q.size(2);
  AttentionParams p;
  p.dtype = kernel_dtype(q, kOp, "q");
  if (q.is_cuda()) {
    PACKOPS_CHECK(p.dtype == DType::f16 || p.dtype == DType::bf16, TypeError, kOp,
                  ": on CUDA q must be float16 or bfloat16, got ", dtype_of(q));
    PACKOPS_CHECK(attention_takes(dim), ValueError, kOp, ": on CUDA head_dim must be a multiple of 8 up to 256, got q of shape ",
                  shape_of(q));
  }
  PACKOPS_CHECK(!is_index(p.dtype), TypeError, kOp, ": q must be float32, float16, bfloat16 or float64, got ", dtype_of(q));
  PACKOPS_CHECK(q.size(0) < int64_t(1) << 30, ValueError, kOp, ": q must have fewer than 2^30 tokens, got ", q.size(0));
  PACKOPS_CHECK(k.dim() == 3 && k.size(0) == q.size(0) && k.size(2) == dim && k.size(1) > 0 && q.size(1) % k.size(1) == 0,
                ValueError, kOp, ": k must have the shape of q except for heads, whose number divides that of q, ", shape_of(q),
                ", got ", shape_of(k));
  PACKOPS_CHECK(v.dim() == 3 && v.size(0) == k.size(0) && v.size(1) == k.size(1) && v.size(2) == dim, ValueError, kOp,
                ": v must have the shape of k, ", shape_of(k), ", got ", shape_of(v));
  for (const auto& [tensor, name] : {std::pair(k, "k"), std::pair(v, "v")}) {
    check_dtype(kOp, name, tensor, "q", q);
    check_device(kOp, name, tensor, "q", q);
  }
  PACKOPS_CHECK(!options.window || (*options.window >= 1 && options.causal), ValueError, kOp,
                ": window must be at least 1, and needs causal, got ", *options.window, options.causal ? "" : " without causal");
  if (options.softcap) check_positive(kOp, "softcap", *options.softcap);
  if (options.scale) check_positive(kOp, "scale", *options.scale);
  p.tokens = q.size(0), p.heads = int32_t(q.size(1)), p.kv_heads = int32_t(k.size(1)), p.head_dim = int32_t(dim);
  p.causal = options.causal;
  p.window = options.window && *options.window < p.tokens ? *options.window : 0;
  p.softcap = options.softcap.value_or(0);
  p.scale = options.scale.value_or(1 / std::sqrt(double(dim)));

  const auto [boundaries, axis] = check_documents(kOp, cu_seqlens, p.tokens, "q", q);
  Attention a{p, set_input(q, &p.q), set_input(k, &p.k), set_input(v, &p.v), boundaries};
  p.axis = axis;
  a.params = p;
  return a;
}

void run(const AttentionParams& p, const Tensor& q, bool backward) {
  if (q.is_cpu()) {
    const auto work = backward ? attention_backward_cpu : attention_cpu;
    return torch::stable::parallel_for(0, (p.axis.documents + 1) * p.kv_heads, 1,
                                       [&](int64_t begin, int64_t end) { work(p, begin, end); });
  }
#ifdef PACKOPS_WITH_CUDA
  const CudaScope scope(q);
  check_cuda((backward ? attention_backward_cuda : attention_cuda)(p, scope.stream()), kOp);
#endif
}

// Numbers that sums of queries need.
int64_t parts_of(const AttentionParams& p, const Tensor& q, bool backward) {
#ifdef PACKOPS_WITH_CUDA
  if (!q.is_cpu()) {
    const CudaScope scope(q);
    return attention_parts(p, backward);
  }
#endif
  return 0;
}

int64_t lse_parts(const Tensor& q) { return q.is_cuda() ? 1 : 2; }

void set_forest(AttentionParams& p, const PackedForestParams& forest) {
  p.prefixes = {forest.segments, forest.subtree_ends, forest.trees, forest.positions, forest.ends};
}

// Behind the tiles there is room for one more: for the counter `drawn` of the forward, and this.
int32_t* longest_of(const AttentionParams& p) {
  return reinterpret_cast<int32_t*>(p.tiles + attention_tiles(p.tokens, p.axis.documents)) + 1;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, OptionalTensor parents,
                                                     bool causal, std::optional<int64_t> window, std::optional<double> softcap,
                                                     std::optional<double> scale) {
  Attention a = prepare(q, k, v, cu_seqlens, {causal, window, softcap, scale});
  AttentionParams& p = a.params;
  Tensor numbers;
  if (parents) {
    PACKOPS_CHECK(causal, ValueError, kOp, ": parents needs causal: what continues a prefix comes after it");
    PackedForestParams forest;
    forest.axis = p.axis, forest.tokens = p.tokens;
    numbers = make_forest(kOp, forest, *parents, a.cu_seqlens);
    set_forest(p, forest);
  } else {
    numbers = allocate(q, {0}, ScalarType::Int);
  }
  const Tensor out = allocate(q, {p.tokens, p.heads, p.head_dim});
  const Tensor lse =
      allocate(q, {lse_parts(q), p.heads, p.tokens}, p.dtype == DType::f64 ? ScalarType::Double : ScalarType::Float);
  const Tensor tiles =
      allocate(q, {q.is_cuda() ? attention_tiles(p.tokens, p.axis.documents) + 1 : 0, kAttentionTileNumbers}, ScalarType::Int);
  p.out = out.mutable_data_ptr();
  p.lse = lse.mutable_data_ptr();
  p.tiles = static_cast<AttentionTile*>(tiles.mutable_data_ptr());
  p.drawn = reinterpret_cast<unsigned*>(p.tiles + attention_tiles(p.tokens, p.axis.documents));
  p.longest = longest_of(p);
  const Tensor parts = allocate(q, {parents ? parts_of(p, q, false) : 0}, ScalarType::Float);
  p.parts = static_cast<float*>(parts.mutable_data_ptr());
  run(p, q, false);
  return {out, lse, tiles, numbers};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
                                                      Tensor tiles, Tensor numbers, Tensor cu_seqlens, bool causal,
                                                      std::optional<int64_t> window, std::optional<double> softcap,
                                                      std::optional<double> scale) {
  Attention a = prepare(q, k, v, cu_seqlens, {causal, window, softcap, scale});
  AttentionParams& p = a.params;
  const Tensor read_numbers = as_contiguous(numbers);
  if (numbers.numel() > 0) {
    PackedForestParams forest;
    forest.axis = p.axis, forest.tokens = p.tokens;
    use_forest(kOp, forest, read_numbers, a.cu_seqlens);
    set_forest(p, forest);
  }
  const auto check_shape = [&](const Tensor& tensor, const char* name) {
    PACKOPS_CHECK(tensor.dim() == 3 && tensor.size(0) == p.tokens && tensor.size(1) == p.heads && tensor.size(2) == p.head_dim,
                  ValueError, kOp, ": ", name, " must have the shape of q, ", shape_of(q), ", got ", shape_of(tensor));
    check_dtype(kOp, name, tensor, "q", q);
    check_device(kOp, name, tensor, "q", q);
  };
  check_shape(grad_out, "grad_out");
  check_shape(out, "out");
  PACKOPS_CHECK(lse.dim() == 3 && lse.size(0) == lse_parts(q) && lse.size(1) == p.heads && lse.size(2) == p.tokens &&
                    lse.scalar_type() == (p.dtype == DType::f64 ? ScalarType::Double : ScalarType::Float) &&
                    lse.device() == q.device(),
                ValueError, kOp, ": lse must be that of the forward pass");
  PACKOPS_CHECK(q.is_cpu() || (tiles.numel() == kAttentionTileNumbers * (attention_tiles(p.tokens, p.axis.documents) + 1) &&
                               tiles.scalar_type() == ScalarType::Int && tiles.device() == q.device()),
                ValueError, kOp, ": tiles must be those of the forward pass");
  const Tensor read_grad = set_input(grad_out, &p.grad_out), read_out = as_contiguous(out);
  const Tensor read_lse = as_contiguous(lse), read_tiles = as_contiguous(tiles);
  const Tensor delta = allocate(q, {q.is_cuda() ? p.heads * p.tokens + 1 : 0}, ScalarType::Float);
  const Tensor grad_q = allocate(q, {p.tokens, p.heads, p.head_dim});
  const Tensor grad_k = allocate(q, {p.tokens, p.kv_heads, p.head_dim});
  const Tensor grad_v = allocate(q, {p.tokens, p.kv_heads, p.head_dim});
  p.out = const_cast<void*>(read_out.const_data_ptr());
  p.lse = const_cast<void*>(read_lse.const_data_ptr());
  p.tiles = static_cast<AttentionTile*>(const_cast<void*>(read_tiles.const_data_ptr()));
  p.longest = longest_of(p);
  p.delta = static_cast<float*>(delta.mutable_data_ptr());
  const int64_t sums = parts_of(p, q, true), counters = sums ? 2 * p.heads * attention_tiles(p.tokens, p.axis.documents) : 0;
  const Tensor parts = allocate(q, {sums}, ScalarType::Float), added = allocate(q, {counters}, ScalarType::Int);
  p.parts = static_cast<float*>(parts.mutable_data_ptr());
  p.added = static_cast<int32_t*>(added.mutable_data_ptr());
  p.drawn = reinterpret_cast<unsigned*>(p.delta + p.heads * p.tokens);
  p.grad_q = grad_q.mutable_data_ptr();
  p.grad_k = grad_k.mutable_data_ptr();
  p.grad_v = grad_v.mutable_data_ptr();
  run(p, q, true);
  return {grad_q, grad_k, grad_v};
}

// What a caller wants of it: the result alone.
Tensor attention_output(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, OptionalTensor parents, bool causal,
                        std::optional<int64_t> window, std::optional<double> softcap, std::optional<double> scale) {
  return std::get<0>(attention(q, k, v, cu_seqlens, parents, causal, window, softcap, scale));
}

}  // namespace
}  // namespace packops

#define ATTENTION_RULE "bool causal=True, int? window=None, float? softcap=None, float? scale=None"

PACKOPS_SCHEMAS(m) {
  m.def("attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor? parents=None, *, " ATTENTION_RULE ") -> Tensor");
  // Made once for both passes: tiles, what the CUDA kernels cut the documents into, and the numbers of a forest.
  m.def("_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor? parents, " ATTENTION_RULE
        ") -> (Tensor out, Tensor lse, Tensor tiles, Tensor forest)");
  m.def(
      "_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor tiles, "
      "Tensor forest, Tensor cu_seqlens, " ATTENTION_RULE ") -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");
}

PACKOPS_KERNELS(m) {
  m.impl("attention", TORCH_BOX(&packops::attention_output));
  m.impl("_attention", TORCH_BOX(&packops::attention));
  m.impl("_attention_backward", TORCH_BOX(&packops::attention_backward));
}
