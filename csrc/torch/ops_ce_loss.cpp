// Cross entropy as torch ops: checks, allocation, and the call of the CPU or the CUDA kernel.
//
// (linear_cross_entropy is a loop over these ops and torch's products: Python defines it.)
#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "ce_loss.h"
#include "torch/documents.h"
#include "torch/overlap.h"
#include "torch/register.h"
#include "torch/stream.h"
#include "torch/string.h"

namespace packops {
namespace {

constexpr const char* kOp = "cross_entropy";

// What most of the schemas have in common, spelled once: in the schema, as parameters, and as arguments.
#define CE_MATHS \
  "Tensor? class_weight=None, float label_smoothing=0.0, float z_loss=0.0, float? softcap=None, float logit_scale=1.0"
#define CE_LABELS                                                                                                 \
  "Tensor labels, *, Tensor? cu_seqlens=None, bool shift=False, str reduction=\"mean\", Tensor? num_items=None, " \
  "int ignore_index=-100, Tensor? token_weight=None, "
// A shard of the vocabulary: its first class, and the number of classes of all shards.
#define CE_SHARD ", int first_class=0, int? vocab_size=None"
#define CE_STATS "Tensor floats, Tensor ints, Tensor counts, Tensor sequence_loss)"
#define MATHS_PARAMETERS \
  OptionalTensor class_weight, double label_smoothing, double z_loss, std::optional<double> softcap, double logit_scale
#define LOSS_PARAMETERS                                                                                            \
  const Tensor &labels, OptionalTensor cu_seqlens, bool shift, StringArgument reduction, OptionalTensor num_items, \
      int64_t ignore_index, OptionalTensor token_weight, MATHS_PARAMETERS
#define MATHS \
  Options { class_weight, label_smoothing, z_loss, softcap, logit_scale }
#define LOSS_INPUTS \
  ForwardInputs { labels, cu_seqlens, shift, reduction, num_items, ignore_index, token_weight, MATHS }

Reduction reduction_of(const std::string& name) {
  if (name == "none") return Reduction::none;
  if (name == "sum") return Reduction::sum;
  if (name == "mean") return Reduction::mean;
  if (name == "seq-mean-token-mean") return Reduction::seq_mean_token_mean;
  if (name == "seq-mean-token-sum") return Reduction::seq_mean_token_sum;
  raise("ValueError", kOp, ": reduction must be none, sum, mean, seq-mean-token-mean or seq-mean-token-sum, got '", name, "'");
}

// The leading `dims` dimensions as at most two with a stride each; false if they need three.
bool collapse(const Tensor& tensor, int64_t dims, RowLayout& layout) {
  int64_t sizes[2] = {1, 1}, strides[2] = {0, 0};  // [0]: inner
  int used = 0;
  for (int64_t i = dims - 1; i >= 0; i--) {
    const int64_t size = tensor.size(i), stride = tensor.stride(i);
    if (size == 1) continue;
    if (used && stride == strides[used - 1] * sizes[used - 1]) {
      sizes[used - 1] *= size;
    } else {
      if (used == 2) return false;
      sizes[used] = size;
      strides[used++] = stride;
    }
  }
  layout = {sizes[0], strides[1], strides[0]};
  return true;
}

bool has_layout(const Tensor& tensor, int64_t dims, bool unit_last_stride, RowLayout& layout) {
  const int64_t last = tensor.dim() - 1;
  return (!unit_last_stride || tensor.size(last) <= 1 || tensor.stride(last) == 1) && collapse(tensor, dims, layout);
}

// The tensor itself, or a contiguous copy if its rows are laid out in a way RowLayout cannot say.
Tensor with_layout(const Tensor& tensor, int64_t dims, bool unit_last_stride, RowLayout& layout) {
  if (has_layout(tensor, dims, unit_last_stride, layout)) return tensor;
  Tensor copy = as_contiguous(tensor);
  collapse(copy, dims, layout);
  return copy;
}

struct Options {
  OptionalTensor class_weight;
  double label_smoothing, z_loss;
  std::optional<double> softcap;
  double logit_scale;
};

// Which part of a vocabulary the logits' columns are; without a size, all of it.
struct Shard {
  int64_t first_class = 0;
  std::optional<int64_t> vocab_size;
};

// The numbers of a weight of a shape, or of one row of as many, in the state's type, from `first` on. `holder` keeps converted ones alive.
const void* weights_of(const CeLossParams& p, const OptionalTensor& weight, const Tensor& logits,
                       const std::vector<int64_t>& shape, const char* name, Tensor& holder, int64_t first = 0) {
  if (!weight) return nullptr;
  check_device(kOp, name, *weight, "logits", logits);
  int64_t numel = 1, longest = 0;
  for (int64_t size : shape) numel *= size;
  for (int64_t i = 0; i < weight->dim(); i++) longest = std::max(longest, weight->size(i));
  const bool is_row = weight->dim() > 0 && longest == numel && weight->numel() == numel;
  PACKOPS_CHECK(is_row || std::ranges::equal(weight->sizes(), shape), ValueError, kOp, ": ", name, " must have shape ",
                tuple_of(shape), " or be one row of ", numel, ", got shape ", shape_of(*weight));
  const DType dtype = kernel_dtype(*weight, kOp, name);
  PACKOPS_CHECK(!is_index(dtype), TypeError, kOp, ": ", name, " must be floating point, got ", dtype_of(*weight));
  const bool is_double = p.logits_dtype == DType::f64;
  holder = as_contiguous(as_dtype(*weight, is_double ? ScalarType::Double : ScalarType::Float));
  return static_cast<const char*>(holder.data_ptr()) + first * size_of(is_double ? DType::f64 : DType::f32);
}

void set_maths(CeLossParams& p, const Options& options, const Tensor& like, Tensor& holder) {
  PACKOPS_CHECK(options.label_smoothing >= 0 && options.label_smoothing <= 1, ValueError, kOp,
                ": label_smoothing must be in [0, 1], got ", options.label_smoothing);
  check_not_negative(kOp, "label_smoothing", options.label_smoothing);
  check_not_negative(kOp, "z_loss", options.z_loss);
  check_positive(kOp, "logit_scale", options.logit_scale);
  if (options.softcap) {
    check_positive(kOp, "softcap", *options.softcap);
    check_positive(kOp, "logit_scale / softcap", options.logit_scale / *options.softcap);
  }
  p.label_smoothing = options.label_smoothing;
  p.z_loss = options.z_loss;
  p.softcap = options.softcap.value_or(0);
  p.logit_scale = options.logit_scale;
  p.class_weight = weights_of(p, options.class_weight, like, {class_count(p)}, "class_weight", holder, p.first_class);
}

// What forward and backward share: the matrix and the maths options. `holder` keeps a converted class_weight alive.
CeLossParams matrix_params(const Tensor& logits, const Options& options, Tensor& holder, const Shard& shard = {}) {
  CeLossParams p;
  PACKOPS_CHECK(logits.dim() >= 1, ValueError, kOp, ": logits must have shape (..., vocab), got a 0-d tensor");
  p.vocab = logits.size(logits.dim() - 1);
  p.rows = 1;
  for (int64_t i = 0; i + 1 < logits.dim(); i++) p.rows *= logits.size(i);
  p.first_class = shard.first_class;
  p.classes = shard.vocab_size.value_or(p.vocab);
  PACKOPS_CHECK(p.first_class >= 0 && p.vocab <= p.classes && p.first_class <= p.classes - p.vocab, ValueError, kOp,
                ": logits of ", p.vocab, " classes from ", p.first_class, " on do not fit into a vocabulary of ", p.classes);
  PACKOPS_CHECK(!shard.vocab_size || p.classes <= int64_t(1) << 24, ValueError, kOp,
                ": a vocabulary over several processes may have at most 2^24 classes, got ", p.classes);
  PACKOPS_CHECK(p.classes > 0 || p.rows == 0, ValueError, kOp, ": logits must have at least one class, got shape ",
                shape_of(logits));
  PACKOPS_CHECK(p.vocab < (int64_t(1) << 31), ValueError, kOp, ": logits may have at most 2^31 - 1 classes, got ", p.vocab);
  PACKOPS_CHECK(p.rows < (int64_t(1) << 31), ValueError, kOp, ": logits may have at most 2^31 - 1 rows, got ", p.rows);
  p.logits_dtype = float_dtype(logits, kOp, "logits");
  set_maths(p, options, logits, holder);
  return p;
}

ScalarType state_type(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Rows of the state tensors; python/packops/ops/ce_loss.py names the same ones.
enum FloatState { kScale, kMax, kSum, kLoss, kFloatStates, kEntropy = kFloatStates, kFloatStatesWithStats };
enum IntState { kTarget, kIntStates, kPrediction = kIntStates, kIntStatesWithStats };

void set_state(CeLossParams& p, const Tensor& floats, const Tensor& ints) {
  auto* f = static_cast<char*>(floats.data_ptr());
  const int64_t bytes = p.rows * int64_t(floats.element_size());
  p.scale = f + kScale * bytes;
  p.row_max = f + kMax * bytes;
  p.row_sum = f + kSum * bytes;
  p.row_loss = f + kLoss * bytes;
  if (floats.size(0) == kFloatStatesWithStats) p.entropy = f + kEntropy * bytes;
  auto* i = static_cast<int32_t*>(ints.data_ptr());
  p.target = i + kTarget * p.rows;
  if (ints.size(0) == kIntStatesWithStats) p.prediction = i + kPrediction * p.rows;
}

// num_items comes in any numeric dtype; the kernels read four of them.
Tensor as_kernel_number(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
    case ScalarType::Double:
    case ScalarType::Int:
    case ScalarType::Long: return tensor;
    case ScalarType::Bool:
    case ScalarType::Byte:
    case ScalarType::Char:
    case ScalarType::Short:
    case ScalarType::Half:
    case ScalarType::BFloat16:
    case ScalarType::UInt16: return as_dtype(tensor, ScalarType::Float);
    case ScalarType::UInt32:
    case ScalarType::UInt64: return as_dtype(tensor, ScalarType::Double);
    default: raise("TypeError", kOp, ": num_items must be a real number, got ", dtype_of(tensor));
  }
}

double host_number(const Tensor& tensor) {
  const Tensor number = as_kernel_number(tensor);
  switch (number.scalar_type()) {
    case ScalarType::Double: return *static_cast<const double*>(number.const_data_ptr());
    case ScalarType::Int: return *static_cast<const int32_t*>(number.const_data_ptr());
    case ScalarType::Long: return double(*static_cast<const int64_t*>(number.const_data_ptr()));
    default: return *static_cast<const float*>(number.const_data_ptr());
  }
}

// Only the CPU looks at the data; CUDA would have to wait for it.
void raise_bad_data(const CeLossStatus& status, const CeLossParams& p) {
  if (status.error == CeLossError::bad_label)
    raise("IndexError", kOp, ": label ", status.value, " at position ", status.index, " is outside [0, ", class_count(p),
          ") and is not ignore_index (", p.ignore_index, ")");
  if (status.error == CeLossError::bad_shards)
    raise("ValueError", kOp, ": the shards of the vocabulary do not line up: ",
          status.index < p.shards ? "rank " + std::to_string(status.index) + " begins at class " : "they end at class ",
          status.value, ", in a vocabulary of ", class_count(p), "; shards that differ in width need shard_sizes");
}

// On the CPU. A host num_items of 0 is legal where nothing is counted; otherwise it would divide the loss by zero.
void prepare_on_cpu(const CeLossParams& p) {
  raise_bad_data(ce_loss_prepare_cpu(p), p);
  if (!p.has_num_items || p.num_items_value > 0) return;
  for (int64_t row = 0; row < p.rows; row++)
    PACKOPS_CHECK(p.target[row] == kIgnored, ValueError, kOp, ": num_items must be positive where rows are counted, got ",
                  p.num_items_value);
}

void run_forward(CeLossParams& p, const Tensor& logits) {
  if (logits.is_cuda()) {
#ifdef PACKOPS_WITH_CUDA
    CudaScope scope(logits);
    Tensor workspace = allocate(logits, {ce_loss_workspace(p)}, ScalarType::Float);
    p.workspace = workspace.data_ptr();
    check_cuda(cudaError_t(ce_loss_forward_cuda(p, scope.stream())), kOp);
#endif
    return;
  }
  prepare_on_cpu(p);
  torch::stable::parallel_for(0, p.rows, 1, [&](int64_t begin, int64_t end) { ce_loss_rows_cpu(p, begin, end); });
  if (!p.partial) ce_loss_reduce_cpu(p);
}

// Rows of a gradient are written where they are; a copy would be lost.
void set_grad(CeLossParams& p, const Tensor& grad) {
  PACKOPS_CHECK(
      has_layout(grad, grad.dim() - 1, true, p.grad_layout), ValueError, kOp,
      ": a gradient written in place needs a contiguous last dimension and at most two strided leading ones, got shape ",
      shape_of(grad), " with strides ", strides_of(grad));
  check_no_overlap(kOp, "what the gradient overwrites", grad);
  p.grad = grad.data_ptr();
}

// Memory for the gradient: of the logits' strides where those are dense (as torch's own operations do) and rows can be written so,
// else contiguous. The fake kernels in Python say the same.
Tensor gradient_like(const Tensor& logits) {
  RowLayout layout;
  if (is_dense(logits) && has_layout(logits, logits.dim() - 1, true, layout))
    return allocate_strided(logits, logits.sizes(), logits.strides().data(), logits.scalar_type());
  return allocate(logits, logits.sizes());
}

struct ForwardInputs {
  Tensor labels;
  OptionalTensor cu_seqlens;
  bool shift;
  std::string reduction;
  OptionalTensor num_items;
  int64_t ignore_index;
  OptionalTensor token_weight;
  Options options;
  Shard shard = {};
};

// What the labels say: targets, documents, denominators. Keeps alive what `params` points to.
struct Rows {
  Tensor labels, token_weight, cu_seqlens, num_items;
};
Rows set_rows(CeLossParams& p, const ForwardInputs& in) {
  Rows rows;
  p.reduction = reduction_of(in.reduction);
  p.labels_dtype = index_dtype(in.labels, kOp, "labels");
  rows.labels = as_contiguous(in.labels);
  p.labels = rows.labels.data_ptr();
  p.ignore_index = in.ignore_index;
  p.shift = in.shift;
  p.token_weight = weights_of(p, in.token_weight, in.labels, {in.labels.sizes().begin(), in.labels.sizes().end()}, "token_weight",
                              rows.token_weight);

  if (in.cu_seqlens) {
    const auto [boundaries, axis] = check_documents(kOp, *in.cu_seqlens, p.rows, "labels", in.labels);
    rows.cu_seqlens = boundaries;
    p.axis = axis;
  } else {
    p.doc_length = in.labels.dim() >= 1 ? in.labels.size(in.labels.dim() - 1) : 1;
    p.axis.documents = 1;  // of rows without tokens, too
    for (int64_t i = 0; i + 1 < in.labels.dim(); i++) p.axis.documents *= in.labels.size(i);
  }

  if (in.num_items) {
    PACKOPS_CHECK(p.reduction != Reduction::none && p.reduction != Reduction::sum, ValueError, kOp,
                  ": num_items replaces the denominator of a mean, but reduction is '", in.reduction, "'");
    PACKOPS_CHECK(in.num_items->numel() == 1, ValueError, kOp, ": num_items must hold one number, got shape ",
                  shape_of(*in.num_items));
    p.has_num_items = true;
    if (in.num_items->is_cpu()) {
      p.num_items_value = host_number(*in.num_items);
      PACKOPS_CHECK(p.num_items_value >= 0 && std::isfinite(p.num_items_value), ValueError, kOp,
                    ": num_items must be positive and finite, got ", p.num_items_value);
    } else {
      check_device(kOp, "num_items", *in.num_items, "labels", in.labels);
      rows.num_items = as_kernel_number(*in.num_items);
      p.num_items = rows.num_items.data_ptr();
      p.num_items_dtype = kernel_dtype(rows.num_items, kOp, "num_items");
    }
  }
  return rows;
}

// loss (of a shard: its partial state), float state, int state, counts, sequence losses (the last two empty without statistics).
// grad: where the gradient goes (may be the logits), or nothing.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward_into(const Tensor& logits, const ForwardInputs& in,
                                                                const OptionalTensor& grad, bool with_stats) {
  Tensor class_weight;
  CeLossParams p = matrix_params(logits, in.options, class_weight, in.shard);
  check_device(kOp, "labels", in.labels, "logits", logits);
  PACKOPS_CHECK(in.labels.dim() == logits.dim() - 1 && in.labels.numel() == p.rows, ValueError, kOp,
                ": labels must have the logits' leading shape, got ", shape_of(in.labels), " for logits ", shape_of(logits));
  for (int64_t i = 0; i < in.labels.dim(); i++)
    PACKOPS_CHECK(in.labels.size(i) == logits.size(i), ValueError, kOp, ": labels must have the logits' leading shape, got ",
                  shape_of(in.labels), " for logits ", shape_of(logits));
  const Rows rows = set_rows(p, in);

  const ScalarType state = state_type(logits);
  Tensor floats = allocate(logits, {with_stats ? kFloatStatesWithStats : kFloatStates, p.rows}, state);
  Tensor ints = allocate(logits, {with_stats ? kIntStatesWithStats : kIntStates, p.rows}, ScalarType::Int);
  Tensor counts = allocate(logits, {with_stats ? 2 : 0}, ScalarType::Long);
  Tensor sequence_loss = allocate(logits, {with_stats ? p.axis.documents : 0}, state);
  Tensor loss = in.shard.vocab_size              ? allocate(logits, {partial_size(p)}, state)
                : p.reduction == Reduction::none ? allocate(logits, in.labels.sizes(), state)
                                                 : allocate(logits, {}, state);
  set_state(p, floats, ints);
  if (with_stats) {
    p.counts = static_cast<int64_t*>(counts.data_ptr());
    p.sequence_loss = sequence_loss.data_ptr();
  }
  (in.shard.vocab_size ? p.partial : p.loss) = loss.data_ptr();

  const Tensor matrix = with_layout(logits, logits.dim() - 1, true, p.logits_layout);
  p.logits = matrix.data_ptr();
  if (grad) set_grad(p, *grad);
  run_forward(p, logits);
  return {loss, floats, ints, counts, sequence_loss};
}

Tensor cross_entropy(const Tensor& logits, LOSS_PARAMETERS) {
  return std::get<0>(forward_into(logits, LOSS_INPUTS, std::nullopt, false));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cross_entropy_stats(const Tensor& logits, LOSS_PARAMETERS) {
  return forward_into(logits, LOSS_INPUTS, std::nullopt, true);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(const Tensor& logits, LOSS_PARAMETERS, bool with_grad,
                                                                   bool with_stats) {
  OptionalTensor grad;
  if (with_grad) grad = gradient_like(logits);
  auto [loss, floats, ints, counts, sequence_loss] = forward_into(logits, LOSS_INPUTS, grad, with_stats);
  return {loss, grad ? *grad : allocate(logits, {0}, logits.scalar_type()), floats, ints, counts, sequence_loss};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward_inplace(Tensor logits, LOSS_PARAMETERS, bool with_stats) {
  return forward_into(logits, LOSS_INPUTS, logits, with_stats);
}

// One process's shard of a vocabulary: what the others must know of it, to go through all of them in the order of their shards.
std::tuple<Tensor, Tensor, Tensor> partial(const Tensor& logits, LOSS_PARAMETERS, int64_t first_class, int64_t vocab_size) {
  ForwardInputs in = LOSS_INPUTS;
  in.shard = {first_class, vocab_size};
  auto [partial, floats, ints, counts, sequence_loss] = forward_into(logits, in, std::nullopt, false);
  return {partial, floats, ints};
}

// The loss from the partial states of all shards; `floats` becomes what the backward needs.
Tensor combine(const Tensor& partials, const Tensor& logits, Tensor floats, const Tensor& ints, StringArgument reduction,
               MATHS_PARAMETERS, int64_t first_class, int64_t vocab_size) {
  Tensor weights;
  CeLossParams p = matrix_params(logits, MATHS, weights, {first_class, vocab_size});
  p.reduction = reduction_of(reduction);
  const ScalarType state = state_type(logits);
  check_device(kOp, "partials", partials, "logits", logits);
  PACKOPS_CHECK(partials.scalar_type() == state && partials.numel() % partial_size(p) == 0 && partials.numel() > 0, ValueError,
                kOp, ": partials must hold ", partial_size(p), " numbers of the loss's dtype for every shard, got shape ",
                shape_of(partials), " of ", dtype_of(partials));
  const Tensor contiguous = as_contiguous(partials);
  p.partials = contiguous.data_ptr();
  p.shards = partials.numel() / partial_size(p);
  set_state(p, floats, ints);
  Tensor loss = p.reduction == Reduction::none ? allocate(logits, logits.sizes().slice(0, logits.dim() - 1), state)
                                               : allocate(logits, {}, state);
  p.loss = loss.data_ptr();
  if (logits.is_cuda()) {
#ifdef PACKOPS_WITH_CUDA
    CudaScope scope(logits);
    check_cuda(cudaError_t(ce_loss_combine_cuda(p, scope.stream())), kOp);
#endif
    return loss;
  }
  raise_bad_data(ce_loss_combine_cpu(p), p);
  ce_loss_reduce_cpu(p);
  return loss;
}

void run_backward(CeLossParams& p, const Tensor& grad, const Tensor& grad_output, const Tensor& floats, const Tensor& ints) {
  set_grad(p, grad);
  set_state(p, floats, ints);
  PACKOPS_CHECK(grad_output.scalar_type() == state_type(grad), TypeError, kOp, ": grad_output must have the loss's dtype, got ",
                dtype_of(grad_output));
  PACKOPS_CHECK(grad_output.numel() == 1 || grad_output.numel() == p.rows, ValueError, kOp,
                ": grad_output must have the loss's shape, got ", shape_of(grad_output));
  const Tensor incoming = with_layout(grad_output, grad_output.dim(), false, p.grad_output_layout);
  p.grad_output = incoming.data_ptr();
  if (grad.is_cuda()) {
#ifdef PACKOPS_WITH_CUDA
    CudaScope scope(grad);
    check_cuda(cudaError_t(ce_loss_backward_cuda(p, scope.stream())), kOp);
#endif
    return;
  }
  torch::stable::parallel_for(0, p.rows, 1, [&](int64_t begin, int64_t end) { ce_loss_backward_cpu(p, begin, end); });
}

Tensor backward(const Tensor& grad_output, const Tensor& logits, const Tensor& floats, const Tensor& ints, MATHS_PARAMETERS,
                int64_t first_class, std::optional<int64_t> vocab_size) {
  Tensor grad = gradient_like(logits), weights;
  CeLossParams p = matrix_params(logits, MATHS, weights, {first_class, vocab_size});
  const Tensor matrix = with_layout(logits, logits.dim() - 1, true, p.logits_layout);
  p.logits = matrix.data_ptr();
  run_backward(p, grad, grad_output, floats, ints);
  return grad;
}

// `grad` holds the gradient for grad_output = 1 and becomes that for grad_output: recomputed from the logits, or scaled where
// they are gone. With holds_gradient = false it holds the logits, and they are overwritten.
void backward_inplace(Tensor grad, const Tensor& grad_output, OptionalTensor logits, const Tensor& floats, const Tensor& ints,
                      bool holds_gradient, MATHS_PARAMETERS, int64_t first_class, std::optional<int64_t> vocab_size) {
  Tensor weights;
  CeLossParams p = matrix_params(grad, MATHS, weights, {first_class, vocab_size});
  p.grad_holds_gradient = holds_gradient;
  Tensor matrix;
  if (logits || !holds_gradient) {
    matrix = with_layout(logits ? *logits : grad, grad.dim() - 1, true, p.logits_layout);
    p.logits = matrix.data_ptr();
  }
  run_backward(p, grad, grad_output, floats, ints);
}

// What every row is scored against and what its loss is multiplied by, before there are any logits: for losses that make theirs
// piece by piece. target (rows,): a class, kIgnored or kBadLabel; scale (rows,); counts {tokens, documents}.
std::tuple<Tensor, Tensor, Tensor> prepare(int64_t vocab, LOSS_PARAMETERS, bool double_precision) {
  PACKOPS_CHECK(vocab < (int64_t(1) << 31), ValueError, kOp, ": there may be at most 2^31 - 1 classes, got ", vocab);
  PACKOPS_CHECK(labels.numel() < (int64_t(1) << 31), ValueError, kOp, ": there may be at most 2^31 - 1 rows, got ",
                labels.numel());
  PACKOPS_CHECK(!double_precision || !labels.is_cuda(), TypeError, kOp, ": float64 is supported on the CPU only");
  CeLossParams p;
  p.rows = labels.numel();
  p.vocab = vocab;
  p.logits_dtype = double_precision ? DType::f64 : DType::f32;
  Tensor weights;
  set_maths(p, MATHS, labels, weights);
  const Rows rows = set_rows(p, LOSS_INPUTS);
  const ScalarType state = double_precision ? ScalarType::Double : ScalarType::Float;
  Tensor target = allocate(labels, {p.rows}, ScalarType::Int);
  Tensor scale = allocate(labels, {p.rows}, state);
  Tensor counts = allocate(labels, {2}, ScalarType::Long);
  p.target = static_cast<int32_t*>(target.data_ptr());
  p.scale = scale.data_ptr();
  p.counts = static_cast<int64_t*>(counts.data_ptr());
  if (labels.is_cuda()) {
#ifdef PACKOPS_WITH_CUDA
    CudaScope scope(labels);
    Tensor workspace = allocate(labels, {ce_loss_workspace(p)}, ScalarType::Float);
    p.workspace = workspace.data_ptr();
    check_cuda(cudaError_t(ce_loss_prepare_cuda(p, scope.stream())), kOp);
#endif
  } else {
    prepare_on_cpu(p);
  }
  return {target, scale, counts};
}

}  // namespace
}  // namespace packops

PACKOPS_SCHEMAS(m) {
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
}

PACKOPS_KERNELS(m) {
  m.impl("cross_entropy", TORCH_BOX(&packops::cross_entropy));
  m.impl("cross_entropy_stats", TORCH_BOX(&packops::cross_entropy_stats));
  m.impl("_cross_entropy_prepare", TORCH_BOX(&packops::prepare));
  m.impl("_cross_entropy_forward", TORCH_BOX(&packops::forward));
  m.impl("_cross_entropy_forward_", TORCH_BOX(&packops::forward_inplace));
  m.impl("_cross_entropy_partial", TORCH_BOX(&packops::partial));
  m.impl("_cross_entropy_combine", TORCH_BOX(&packops::combine));
  m.impl("_cross_entropy_backward", TORCH_BOX(&packops::backward));
  m.impl("_cross_entropy_backward_", TORCH_BOX(&packops::backward_inplace));
}
