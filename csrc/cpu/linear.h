// Logits hidden [M, D] weight[V, D]^T + bias of some words, for the rows of a denoising step.
//
// A library's matrix product repacks the weights in every call, which costs as much as the product when M is a few
// dozen. Here the weights are read once, in order. With many rows, a vector holds one number of each row and a weight
// multiplies them all (products.h). Few rows would leave that vector half empty; then every logit is a dot product
// along D, in tiles of 3 rows by 4 words whose twelve accumulators stay in registers. Prefetching loads the next words
// meanwhile. bf16 weights are widened when they are read.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <optional>

#include "head.h"
#include "products_bf16.h"

namespace dllm::dot {

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

// The sums of four vectors at once: adding neighbours of pairs of vectors takes half the steps.
DLLM_INLINE void sum_four(const Vector (&v)[4], float* out) {
  const Vector ab = __builtin_shufflevector(v[0], v[1], 0, 8, 2, 10, 4, 12, 6, 14) +
                    __builtin_shufflevector(v[0], v[1], 1, 9, 3, 11, 5, 13, 7, 15);
  const Vector cd = __builtin_shufflevector(v[2], v[3], 0, 8, 2, 10, 4, 12, 6, 14) +
                    __builtin_shufflevector(v[2], v[3], 1, 9, 3, 11, 5, 13, 7, 15);
  const Vector abcd = __builtin_shufflevector(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13) +
                      __builtin_shufflevector(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15);
  typedef float Quarter __attribute__((vector_size(4 * sizeof(float))));
  const Quarter sums =
      __builtin_shufflevector(abcd, abcd, 0, 1, 2, 3) + __builtin_shufflevector(abcd, abcd, 4, 5, 6, 7);
  std::memcpy(out, &sums, sizeof(sums));
}

DLLM_INLINE float sum(const Vector& v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }

// out[r * out_stride + c] = x[r] . w[c]; the compiler knows rows <= kRows and words <= kWords.
template <int rows, int words, typename T>
DLLM_INLINE void tile(const float* x, int64_t x_stride, const T* w, int64_t w_stride, int64_t D, float* out,
                      int64_t out_stride) {
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

// Multiplies these words with all rows; each tile of rows prefetches a share of the next words.
template <int words, typename T>
DLLM_INLINE void all_rows(const float* x, int64_t M, const T* w, int64_t w_stride, int64_t D, float* out,
                          int64_t out_stride) {
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
DLLM_INLINE void words_of(const float* x, int64_t M, const T* w, int64_t w_stride, int64_t D, int64_t begin,
                          int64_t end, float* out, int64_t out_stride) {
  int64_t v = begin;
  for (; v + kWords <= end; v += kWords)
    all_rows<kWords>(x, M, w + v * w_stride, w_stride, D, out + v - begin, out_stride);
  for (; v < end; ++v) all_rows<1>(x, M, w + v * w_stride, w_stride, D, out + v - begin, out_stride);
}

DLLM_VECTORISED static void multiply(const float* x, int64_t M, const float* w, int64_t w_stride, int64_t D,
                                     int64_t begin, int64_t end, float* out, int64_t out_stride) {
  words_of(x, M, w, w_stride, D, begin, end, out, out_stride);
}

DLLM_VECTORISED static void multiply(const float* x, int64_t M, const BFloat16* w, int64_t w_stride, int64_t D,
                                     int64_t begin, int64_t end, float* out, int64_t out_stride) {
  words_of(x, M, w, w_stride, D, begin, end, out, out_stride);
}

}  // namespace dllm::dot

namespace dllm {

// Logits of the words first..end and M <= kBlock rows, a tile of words at a time.
template <int width>
DLLM_INLINE void multiply_turned_of_width(const Head& head, int64_t M, const float* x_turned, int64_t first,
                                          int64_t end, float* staged, float* z, float* out, int64_t out_stride) {
  for (; first < end; first += kWords, out += kWords) {
    const int64_t words = std::min(kWords, end - first);
    int64_t w_row;
    const float* w = read_words(head, first, words, staged, &w_row);
    logits_of_tile<width>(head, w, w_row, first, words, x_turned, 0, round_up(M, width), z);
    for (int64_t m = 0; m < M; ++m)
      for (int64_t v = 0; v < words; ++v) out[m * out_stride + v] = z[v * kBlock + m];
  }
}

DLLM_BY_WIDTH(multiply_turned, (const Head& head, int64_t M, const float* x_turned, int64_t first, int64_t end,
                                float* staged, float* z, float* out, int64_t out_stride),
              (head, M, x_turned, first, end, staged, z, out, out_stride))

// Logits of M <= kBlock rows x [M, D], in the form that is fastest for this M.
class Product {
 public:
  Product(const Head& head, const float* x, int64_t M) : head_(head), x_(x), M_(M) {
    const bool narrow = head.dtype == ScalarType::BFloat16 && bf16::available() && bf16::exact(x, M * head.D);
    if (narrow && M <= bf16::kFewRows) {
      form_ = kNarrowDots;
      packed_.emplace((M * head.D + 1) / 2);
      bf16::narrow(x, M * head.D, reinterpret_cast<uint16_t*>(packed_->get()));
    } else if (narrow && head.D % 2 == 0) {
      form_ = kPairs;
      packed_.emplace(round_up(M, bf16::kWidth) * head.D / 2);
      bf16::pack(x, M, head.D, reinterpret_cast<uint32_t*>(packed_->get()));
    } else if (3 * M > 2 * vector_width() || head.dtype == ScalarType::Half) {
      form_ = kTurned;
      packed_.emplace(round_up(M, vector_width()) * head.D);
      pack_rows(x, M, head.D, true, packed_->get());
    }
  }

  // Memory of one thread.
  struct Workspace {
    explicit Workspace(const Product& product)
        : staged(product.form_ == kTurned ? kWords * product.head_.D : 0),
          tile(product.form_ == kTurned || product.form_ == kPairs ? kWords * kBlock : 0) {}
    Buffer staged, tile;
  };

  // out[m * out_stride + v - first] for all rows m and the words v in first..end; kWords divides `first`.
  void logits(int64_t first, int64_t end, Workspace& work, float* out, int64_t out_stride) const {
    if (form_ == kTurned)
      return multiply_turned(head_, M_, packed_->get(), first, end, work.staged.get(), work.tile.get(), out,
                             out_stride);
    if (form_ == kPairs) {
      multiply_pairs(first, end, work.tile.get(), out, out_stride);
    } else if (form_ == kNarrowDots) {
      multiply_narrow(first, end, out, out_stride);
    } else if (head_.dtype == ScalarType::Float) {
      dot::multiply(x_, M_, static_cast<const float*>(head_.weight), head_.stride, head_.D, first, end, out,
                    out_stride);
    } else {
      dot::multiply(x_, M_, static_cast<const BFloat16*>(head_.weight), head_.stride, head_.D, first, end, out,
                    out_stride);
    }
    if (head_.bias)
      for (int64_t m = 0; m < M_; ++m)
        for (int64_t v = first; v < end; ++v) out[m * out_stride + v - first] += head_.bias[v];
  }

 private:
  enum Form { kDots, kTurned, kPairs, kNarrowDots };

  void multiply_pairs([[maybe_unused]] int64_t first, [[maybe_unused]] int64_t end, [[maybe_unused]] float* z,
                      [[maybe_unused]] float* out, [[maybe_unused]] int64_t out_stride) const {
#if DLLM_BF16_PRODUCTS
    const auto* w = static_cast<const BFloat16*>(head_.weight);
    const auto* panels = reinterpret_cast<const uint32_t*>(packed_->get());
    for (; first < end; first += kWords, out += kWords) {
      const int64_t words = std::min(kWords, end - first);
      bf16::multiply(w + first * head_.stride, head_.stride, words, panels, M_, head_.D, z, kBlock);
      for (int64_t m = 0; m < M_; ++m)
        for (int64_t v = 0; v < words; ++v) out[m * out_stride + v] = z[v * kBlock + m];
    }
#endif
  }

  void multiply_narrow([[maybe_unused]] int64_t first, [[maybe_unused]] int64_t end, [[maybe_unused]] float* out,
                       [[maybe_unused]] int64_t out_stride) const {
#if DLLM_BF16_PRODUCTS
    const auto* w = static_cast<const BFloat16*>(head_.weight);
    bf16::dots(reinterpret_cast<const uint16_t*>(packed_->get()), M_, w + first * head_.stride, head_.stride,
               end - first, head_.D, out, out_stride);
#endif
  }

  Head head_;
  const float* x_;
  int64_t M_;
  Form form_ = kDots;
  std::optional<Buffer> packed_;
};

}  // namespace dllm
