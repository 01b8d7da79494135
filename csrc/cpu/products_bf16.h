// Products of bf16 numbers with fp32 sums, for processors with AVX512-BF16: twice as many numbers at once as in fp32.
// One factor lies in panels as in products.h, but of pairs of numbers, which one instruction multiplies and adds.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(DLLM_WIDTH)
#define DLLM_BF16_PRODUCTS 1
#include <immintrin.h>
#else
#define DLLM_BF16_PRODUCTS 0
#endif

namespace dllm::bf16 {

constexpr int kWidth = 16, kColumns = 3, kPanel = kColumns * kWidth;
constexpr int64_t kFewRows = 16;  // up to so many, sums along D are faster than panels, whose lanes would be empty

inline bool available() {
#if DLLM_BF16_PRODUCTS
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

inline bool exact(const float* x, int64_t n) {
  uint32_t low = 0;
  for (int64_t i = 0; i < n; ++i) low |= std::bit_cast<uint32_t>(x[i]) & 0xffff;
  return low == 0;
}

// x [M, D] transposed: panels of [D / 2 x rows] pairs, zero up to whole vectors. D is even, all numbers are exact in
// bf16.
inline void pack(const float* x, int64_t M, int64_t D, uint32_t* panels) {
  const int64_t padded = (M + kWidth - 1) / kWidth * kWidth;
  for (int64_t first = 0; first < padded; first += kPanel) {
    const int64_t wide = std::min<int64_t>(kPanel, padded - first);
    for (int64_t k = 0; k < D / 2; ++k)
      for (int64_t m = first; m < first + wide; ++m) {
        const float* pair = x + m * D + 2 * k;
        *panels++ =
            m < M ? std::bit_cast<uint32_t>(pair[0]) >> 16 | (std::bit_cast<uint32_t>(pair[1]) & 0xffff0000) : 0;
      }
  }
}

// x [M, D] in bf16.
inline void narrow(const float* x, int64_t n, uint16_t* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = std::bit_cast<uint32_t>(x[i]) >> 16;
}

#if DLLM_BF16_PRODUCTS
#define DLLM_FOR_BF16 __attribute__((target("arch=x86-64-v4,avx512bf16,prefer-vector-width=512")))

template <int rows, int columns>
DLLM_FOR_BF16 inline void multiply_tile(const torch::headeronly::BFloat16* w, int64_t w_stride, const uint32_t* panel,
                                        int64_t pairs, float* z, int64_t z_stride) {
  __m512 sums[rows][columns] = {};
  for (int64_t k = 0; k < pairs; ++k) {
    __m512bh b[columns];
    for (int j = 0; j < columns; ++j) b[j] = (__m512bh)_mm512_loadu_si512(panel + (k * columns + j) * kWidth);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      int32_t pair;
      std::memcpy(&pair, w + i * w_stride + 2 * k, sizeof(pair));
      const auto a = (__m512bh)_mm512_set1_epi32(pair);
      for (int j = 0; j < columns; ++j) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], a, b[j]);
    }
  }
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < columns; ++j) _mm512_storeu_ps(z + i * z_stride + j * kWidth, sums[i][j]);
}

// z[v * z_stride + m] of `words` words w [words, D] and the M rows in panels; prefetches the words after them.
DLLM_FOR_BF16 inline void multiply(const torch::headeronly::BFloat16* w, int64_t w_stride, int64_t words,
                                   const uint32_t* panels, int64_t M, int64_t D, float* z, int64_t z_stride) {
  const int64_t padded = (M + kWidth - 1) / kWidth * kWidth;
  for (int64_t first = 0; first < padded; first += kPanel) {
    const int64_t columns = std::min<int64_t>(kPanel, padded - first) / kWidth;
    const uint32_t* panel = panels + first * (D / 2);
    int64_t v = 0;
    const auto run = [&]<int rows, int columns>() DLLM_FOR_BF16 {
      for (; v + rows <= words; v += rows) {
        const auto* from = w + v * w_stride;
        if (first == 0)
          for (int64_t i = rows; i < 2 * rows; ++i)
            for (int64_t d = 0; d < D; d += 32) __builtin_prefetch(from + i * w_stride + d);
        multiply_tile<rows, columns>(from, w_stride, panel, D / 2, z + v * z_stride + first, z_stride);
      }
    };
    if (columns == 3) run.template operator()<8, 3>(), run.template operator()<1, 3>();
    if (columns == 2) run.template operator()<8, 2>(), run.template operator()<1, 2>();
    if (columns == 1) run.template operator()<8, 1>(), run.template operator()<1, 1>();
  }
}

constexpr int kAhead = 16;  // words from a tile to those that it prefetches

template <int rows, int words>
DLLM_FOR_BF16 inline void dots_of_tile(const uint16_t* x, const torch::headeronly::BFloat16* w, int64_t w_stride,
                                       int64_t D, float* out, int64_t out_stride) {
  __m512 sums[rows][words] = {};
  for (int64_t d = 0; d < D; d += 2 * kWidth) {
    const __mmask32 inside = D - d >= 2 * kWidth ? ~0u : (1u << (D - d)) - 1;
    __m512bh b[words];
#pragma GCC unroll 4
    for (int v = 0; v < words; ++v) {
      b[v] = (__m512bh)_mm512_maskz_loadu_epi16(inside, w + v * w_stride + d);
      __builtin_prefetch(w + (v + kAhead) * w_stride + d);
    }
#pragma GCC unroll 4
    for (int m = 0; m < rows; ++m) {
      const auto a = (__m512bh)_mm512_maskz_loadu_epi16(inside, x + m * D + d);
#pragma GCC unroll 4
      for (int v = 0; v < words; ++v) sums[m][v] = _mm512_dpbf16_ps(sums[m][v], a, b[v]);
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < rows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < words; ++v) out[m * out_stride + v] = _mm512_reduce_add_ps(sums[m][v]);
}

// out[m * out_stride + v] of `words` words w [words, D] and the rows x [M, D], a few of both at a time.
DLLM_FOR_BF16 inline void dots(const uint16_t* x, int64_t M, const torch::headeronly::BFloat16* w, int64_t w_stride,
                               int64_t words, int64_t D, float* out, int64_t out_stride) {
  constexpr int kRows = 4, kWords = 4;
  const auto all_rows = [&]<int some>(int64_t v) DLLM_FOR_BF16 {
    const auto* from = w + v * w_stride;
    int64_t m = 0;
    for (; m + kRows <= M; m += kRows)
      dots_of_tile<kRows, some>(x + m * D, from, w_stride, D, out + m * out_stride + v, out_stride);
    for (; m < M; ++m) dots_of_tile<1, some>(x + m * D, from, w_stride, D, out + m * out_stride + v, out_stride);
  };
  int64_t v = 0;
  for (; v + kWords <= words; v += kWords) all_rows.template operator()<kWords>(v);
  for (; v < words; ++v) all_rows.template operator()<1>(v);
}
#endif

}  // namespace dllm::bf16
