// The CUDA kernels of attention within documents, emulated, against those of the CPU.
#include "attention.h"

#include "attention_launch.h"
#include "check.h"
#include "common/convert.h"
#include "emulator.h"

using namespace packops;

namespace {

struct Problem {
  std::vector<int32_t> cu_seqlens;
  int64_t tokens;
  int32_t heads, kv_heads, head_dim;
  bool causal = true;
  int64_t window = 0;
  double softcap = 0;
  double size = 1;  // of queries: large ones make rows whose weight lies on one key
};

template <typename T>
struct Results {
  std::vector<T> out, grad_q, grad_k, grad_v;
  std::vector<float> lse;
};

template <typename T>
Results<T> run(const Problem& problem, bool cuda) {
  const int64_t dim = problem.head_dim, q_size = problem.tokens * problem.heads * dim,
                kv_size = problem.tokens * problem.kv_heads * dim;
  check::Random random{uint64_t(problem.tokens * 1000 + dim)};
  const auto draw = [&](int64_t count, double size) {
    std::vector<T> x(static_cast<size_t>(count));
    for (T& v : x) v = from_float<T>(float(size * random.normal()));
    return x;
  };
  // q, k and v as slices of one matrix, grad with a gap between heads
  const int64_t row = (problem.heads + 2 * problem.kv_heads) * dim, gap = 8;
  std::vector<T> qkv = draw(problem.tokens * row, 1), grad = draw(problem.tokens * problem.heads * (dim + gap), 1);
  for (int64_t t = 0; t < problem.tokens; t++)
    for (int64_t i = 0; i < problem.heads * dim; i++) {
      T& x = qkv[size_t(t * row + i)];
      x = from_float<T>(float(problem.size) * to_float(x));
    }
  if (const int64_t padding = problem.cu_seqlens.back(); padding < problem.tokens)  // nobody reads it
    for (int64_t i = padding * row; i < problem.tokens * row; i++) qkv[size_t(i)] = from_float<T>(NAN);
  Results<T> r;
  r.out.assign(size_t(q_size), from_float<T>(77)), r.grad_q = r.out;
  r.grad_k.assign(size_t(kv_size), from_float<T>(77)), r.grad_v = r.grad_k;
  r.lse.assign(size_t(problem.tokens * problem.heads), 77);
  AttentionParams p;
  p.q = {qkv.data(), row, dim};
  p.k = {qkv.data() + problem.heads * dim, row, dim};
  p.v = {qkv.data() + (problem.heads + problem.kv_heads) * dim, row, dim};
  p.tokens = problem.tokens, p.heads = problem.heads, p.kv_heads = problem.kv_heads, p.head_dim = problem.head_dim;
  p.dtype = std::is_same_v<T, half_t> ? DType::f16 : DType::bf16;
  p.causal = problem.causal, p.window = problem.window, p.softcap = problem.softcap, p.scale = 1 / std::sqrt(double(dim));
  p.cu_seqlens = problem.cu_seqlens.data(), p.documents = int64_t(problem.cu_seqlens.size()) - 1;
  p.out = r.out.data(), p.lse = r.lse.data();
  p.grad_out = {grad.data(), problem.heads * (dim + gap), dim + gap};
  p.grad_q = r.grad_q.data(), p.grad_k = r.grad_k.data(), p.grad_v = r.grad_v.data();
  std::vector<AttentionTile> tiles(size_t(attention_tiles(p.tokens, p.documents)));
  std::vector<float> delta(r.lse.size());
  p.tiles = tiles.data(), p.delta = delta.data();
  if (cuda) {
    CHECK_EQ(attention_cuda(p, nullptr), cudaSuccess);
    CHECK_EQ(attention_backward_cuda(p, nullptr), cudaSuccess);
  } else {
    attention_cpu(p, 0, (p.documents + 1) * p.kv_heads);
    attention_backward_cpu(p, 0, (p.documents + 1) * p.kv_heads);
  }
  return r;
}

template <typename T>
void compare(const Problem& problem) {
  const Results<T> want = run<T>(problem, false), got = run<T>(problem, true);
  // Weights and g are rounded to T before they are factors of a product; of the sums, whose size is that of the largest, a few units.
  const double unit = std::is_same_v<T, half_t> ? 0x1p-11 : 0x1p-8;
  const auto check = [&](const char* name, const auto& a, const auto& b, double tolerance) {
    double largest = 0, worst = 0;
    for (const auto& x : b) largest = std::max(largest, std::isfinite(to_float(x)) ? std::abs(double(to_float(x))) : 0);
    bool same = true;
    for (size_t i = 0; i < b.size(); i++) {
      const double x = to_float(a[i]), y = to_float(b[i]);
      if (std::isinf(y) || std::isnan(x)) same &= x == y;
      else worst = std::max(worst, std::abs(x - y));
    }
    if (!same || worst > tolerance * largest + 1e-5) {
      std::printf("%s, head_dim %d, %d/%d heads, %lld tokens: off by %g of %g\n", name, problem.head_dim, problem.heads,
                  problem.kv_heads, (long long)problem.tokens, worst, largest);
      CHECK(false);
    }
  };
  check("out", got.out, want.out, 2 * unit);
  check("lse", got.lse, want.lse, 4e-6);
  check("grad_q", got.grad_q, want.grad_q, 3 * unit);
  check("grad_k", got.grad_k, want.grad_k, 3 * unit);
  check("grad_v", got.grad_v, want.grad_v, 3 * unit);
}

}  // namespace

CASE(every_head_dim_and_group) {
  compare<bf16_t>({{0, 1, 71, 71, 199, 200}, 203, 4, 1, 64});
  compare<half_t>({{0, 65, 130}, 130, 2, 1, 64});
  compare<bf16_t>({{0, 64}, 64, 3, 3, 64});
  compare<bf16_t>({{0, 3, 100}, 101, 2, 1, 128});
  compare<half_t>({{0, 130}, 130, 1, 1, 128});
  compare<bf16_t>({{0, 17, 82}, 90, 2, 1, 256});
  compare<half_t>({{0, 66}, 66, 1, 1, 256});
  compare<bf16_t>({{0, 30}, 30, 7, 1, 64});  // teams with heads more and fewer
}
CASE(windows_softcaps_and_both_directions) {
  compare<bf16_t>({{0, 200, 230}, 230, 2, 2, 64, true, 1});
  compare<bf16_t>({{0, 200, 230}, 230, 2, 2, 64, true, 70});
  compare<bf16_t>({{0, 150}, 150, 2, 1, 128, true, 64});
  compare<bf16_t>({{0, 200, 230}, 240, 2, 1, 64, false});
  compare<bf16_t>({{0, 70}, 70, 2, 1, 128, false});
  compare<bf16_t>({{0, 100}, 100, 2, 1, 64, true, 0, 5.0, 8});
  compare<bf16_t>({{0, 100}, 100, 2, 1, 256, true, 40, 50.0, 30});
}
CASE(weights_on_one_key) {
  compare<bf16_t>({{0, 150}, 150, 2, 1, 64, true, 0, 0, 60});
  compare<half_t>({{0, 150}, 150, 2, 1, 128, true, 0, 0, 60});
}
