// logits [M, V] = hidden [M, D] weight[V, D]^T + bias, for the rows of a denoising step.
//
// A library's matrix product repacks the weights for every call, which for M of a few dozen costs as much as the product.
// Here the weights are read once, in order, as they are. From some rows on they are turned, so that a vector holds
// as many rows and a weight multiplies them all (products.h); fewer would leave it half empty, so then every number is a
// dot product along D, in tiles of 3 rows by 4 words whose twelve accumulators stay in registers. While some words are
// worked on, the next ones come from memory. bf16 weights are widened on the way.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <optional>

#include "head.h"

namespace {

using dllm::BFloat16;
using torch::stable::Tensor;

constexpr int kWidth = 8, kRows = 3, kWords = 4;
typedef float Vector __attribute__((vector_size(kWidth * sizeof(float))));
typedef uint32_t Bits __attribute__((vector_size(kWidth * sizeof(uint32_t))));
typedef uint16_t Halves __attribute__((vector_size(kWidth * sizeof(uint16_t))));

DLLM_INLINE void load(const float* from, Vector& to) { std::memcpy(&to, from, sizeof(to)); }

DLLM_INLINE void load(const BFloat16* from, Vector& to) {
  Halves halves;
  std::memcpy(&halves, from, sizeof(halves));
  const Bits bits = __builtin_convertvector(halves, Bits) << 16;
  std::memcpy(&to, &bits, sizeof(to));
}

// The sums of four vectors, together: adding neighbours of pairs of vectors takes half the steps of one after the other.
DLLM_INLINE void sum_four(const Vector (&v)[4], float* out) {
  const Vector ab = __builtin_shufflevector(v[0], v[1], 0, 8, 2, 10, 4, 12, 6, 14) +
                    __builtin_shufflevector(v[0], v[1], 1, 9, 3, 11, 5, 13, 7, 15);
  const Vector cd = __builtin_shufflevector(v[2], v[3], 0, 8, 2, 10, 4, 12, 6, 14) +
                    __builtin_shufflevector(v[2], v[3], 1, 9, 3, 11, 5, 13, 7, 15);
  const Vector abcd = __builtin_shufflevector(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13) +
                      __builtin_shufflevector(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15);
  typedef float Quarter __attribute__((vector_size(4 * sizeof(float))));
  const Quarter sums = __builtin_shufflevector(abcd, abcd, 0, 1, 2, 3) + __builtin_shufflevector(abcd, abcd, 4, 5, 6, 7);
  std::memcpy(out, &sums, sizeof(sums));
}

DLLM_INLINE float sum(const Vector& v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }

// out[r * out_stride + c] = x[r] . w[c], for rows <= kRows and words <= kWords, both known to the compiler.
template <int rows, int words, typename T>
DLLM_INLINE void tile(const float* x, int64_t x_stride, const T* w, int64_t w_stride, int64_t D, float* out, int64_t out_stride) {
  Vector sums[rows][words] = {};
  int64_t d = 0;
  for (; d + kWidth <= D; d += kWidth) {
    Vector a[rows], b;
    for (int r = 0; r < rows; ++r) load(x + r * x_stride + d, a[r]);
    for (int c = 0; c < words; ++c) {
      load(w + c * w_stride + d, b);
      for (int r = 0; r < rows; ++r) sums[r][c] += a[r] * b;
    }
  }
  for (int r = 0; r < rows; ++r) {
    float totals[words];
    if constexpr (words == 4) {
      sum_four(sums[r], totals);
    } else {
      for (int c = 0; c < words; ++c) totals[c] = sum(sums[r][c]);
    }
    for (int64_t rest = d; rest < D; ++rest)
      for (int c = 0; c < words; ++c) totals[c] += x[r * x_stride + rest] * static_cast<float>(w[c * w_stride + rest]);
    std::memcpy(out + r * out_stride, totals, sizeof(totals));
  }
}

// While these words meet the rows, the next ones come from memory, a share of them with each tile of rows.
template <int words, typename T>
DLLM_INLINE void all_rows(const float* x, int64_t M, const T* w, int64_t w_stride, int64_t D, float* out, int64_t out_stride) {
  constexpr int64_t kLine = 64;
  const char* next = reinterpret_cast<const char*>(w + words * w_stride);
  const int64_t bytes = words * w_stride * static_cast<int64_t>(sizeof(T)), tiles = (M + kRows - 1) / kRows;
  const int64_t share = (bytes / kLine / tiles + 1) * kLine;
  for (int64_t m = 0; m < M; next += share) {
    for (int64_t line = 0; line < share; line += kLine) __builtin_prefetch(next + line);
    if (m + kRows <= M) {
      tile<kRows, words>(x + m * D, D, w, w_stride, D, out + m * out_stride, out_stride);
      m += kRows;
    } else {
      tile<1, words>(x + m * D, D, w, w_stride, D, out + m * out_stride, out_stride);
      ++m;
    }
  }
}

template <typename T>
DLLM_INLINE void words_of(const float* x, int64_t M, const T* w, int64_t w_stride, int64_t D, int64_t begin, int64_t end,
                          float* out, int64_t out_stride) {
  int64_t v = begin;
  for (; v + kWords <= end; v += kWords) all_rows<kWords>(x, M, w + v * w_stride, w_stride, D, out + v, out_stride);
  for (; v < end; ++v) all_rows<1>(x, M, w + v * w_stride, w_stride, D, out + v, out_stride);
}

DLLM_VECTORISED void multiply(const float* x, int64_t M, const float* w, int64_t w_stride, int64_t D, int64_t begin, int64_t end,
                              float* out, int64_t out_stride) {
  words_of(x, M, w, w_stride, D, begin, end, out, out_stride);
}

DLLM_VECTORISED void multiply(const float* x, int64_t M, const BFloat16* w, int64_t w_stride, int64_t D, int64_t begin, int64_t end,
                              float* out, int64_t out_stride) {
  words_of(x, M, w, w_stride, D, begin, end, out, out_stride);
}

// Words of tiles begin..end for M <= dllm::kBlock rows.
template <int width>
DLLM_INLINE void multiply_turned_of_width(const dllm::Head& head, int64_t M, const float* x_turned, int64_t begin,
                                          int64_t end, float* out, int64_t out_stride) {
  const dllm::Buffer staged(dllm::kWords * head.D), tile(dllm::kWords * dllm::kBlock);
  const float* z = tile.get();
  for (int64_t first = begin * dllm::kWords; first < std::min(end * dllm::kWords, head.V); first += dllm::kWords) {
    const int64_t words = std::min(dllm::kWords, head.V - first);
    int64_t w_row;
    const float* w = dllm::read_words(head, first, words, staged.get(), &w_row);
    dllm::logits_of_tile<width>(head, w, w_row, first, words, x_turned, 0, dllm::round_up(M, width), tile.get());
    for (int64_t m = 0; m < M; ++m)
      for (int64_t v = 0; v < words; ++v) out[m * out_stride + first + v] = z[v * dllm::kBlock + m];
  }
}

DLLM_BY_WIDTH(multiply_turned, (const dllm::Head& head, int64_t M, const float* x_turned, int64_t begin, int64_t end,
                                float* out, int64_t out_stride),
              (head, M, x_turned, begin, end, out, out_stride))

void run_turned(const Tensor& hidden, const dllm::Head& head, Tensor& logits) {
  const int64_t M = hidden.size(0), stride = logits.stride(0);
  const dllm::Buffer x_turned(dllm::round_up(std::min(M, dllm::kBlock), dllm::vector_width()) * head.D);
  for (int64_t row = 0; row < M; row += dllm::kBlock) {
    const int64_t rows = std::min(dllm::kBlock, M - row);
    dllm::pack_rows(static_cast<const float*>(hidden.const_data_ptr()) + row * head.D, rows, head.D, true, x_turned.get());
    auto* out = static_cast<float*>(logits.mutable_data_ptr()) + row * stride;
    torch::stable::parallel_for(0, (head.V + dllm::kWords - 1) / dllm::kWords, 1, [&](int64_t begin, int64_t end) {
      multiply_turned(head, rows, x_turned.get(), begin, end, out, stride);
    });
  }
}

template <typename T>
void run(const Tensor& hidden, const Tensor& weight, const float* bias, Tensor& logits) {
  const int64_t M = hidden.size(0), D = hidden.size(1), V = weight.size(0), stride = logits.stride(0);
  const auto* x = static_cast<const float*>(hidden.const_data_ptr());
  const auto* w = static_cast<const T*>(weight.const_data_ptr());
  auto* out = static_cast<float*>(logits.mutable_data_ptr());
  const int64_t per_task = 256;  // words
  torch::stable::parallel_for(0, (V + per_task - 1) / per_task, 1, [&](int64_t first, int64_t last) {
    const int64_t begin = first * per_task, end = std::min(last * per_task, V);
    multiply(x, M, w, weight.stride(0), D, begin, end, out, stride);
    if (bias)
      for (int64_t m = 0; m < M; ++m)
        for (int64_t v = begin; v < end; ++v) out[m * stride + v] += bias[v];
  });
}

void linear_rows(const Tensor& hidden, const Tensor& weight, std::optional<Tensor> bias, Tensor logits) {
  dllm::check_rows(weight, 2, "weight");
  dllm::check_rows(logits, 2, "logits");
  STD_TORCH_CHECK(hidden.is_contiguous() && hidden.size(1) == weight.size(1) && logits.size(0) == hidden.size(0) &&
                      logits.size(1) == weight.size(0),
                  "linear_rows_cpu: shapes disagree");
  const dllm::Head head = dllm::describe_head(weight, bias, 0);
  if (3 * hidden.size(0) > 2 * dllm::vector_width() || head.dtype == dllm::ScalarType::Half) {
    run_turned(hidden, head, logits);
  } else if (head.dtype == dllm::ScalarType::Float) {
    run<float>(hidden, weight, head.bias, logits);
  } else {
    run<BFloat16>(hidden, weight, head.bias, logits);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dllm_kernels_native, CPU, m) { m.impl("linear_rows_cpu", TORCH_BOX(&linear_rows)); }
