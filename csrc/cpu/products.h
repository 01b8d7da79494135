// Products of small dense matrices on one core: one factor lies in panels, the sums stay in registers.
//
// A panel is up to 3 vectors wide and holds its columns row by row, so that the inner loop reads it in order:
//     matrix [K x N], N a multiple of the vector width -> panels of [K x kPanel], the last one narrower.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../vectorised.h"

namespace dllm {

// Vectors hold `width` floats. The sums take 24 of AVX-512's 32 registers, and 12 of the 16 of AVX2 and SSE.
template <int width>
struct Tile {
  static constexpr int kRows = width == 16 ? 8 : 6, kColumns = width == 16 ? 3 : 2, kPanel = kColumns * width;
  typedef float Vector __attribute__((vector_size(width * sizeof(float))));
};

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// c[i][j] = (add ? c[i][j] : 0) + sum over k < K of a(i, k) panel[k][j], for `rows` rows i and all columns j of the
// panel.
template <int width, int rows, int columns>
DLLM_INLINE void multiply_tile(const float* a, int64_t a_row, int64_t a_step, const float* panel, int64_t K, float* c,
                               int64_t c_row, bool add) {
  using Vector = typename Tile<width>::Vector;
  Vector sums[rows][columns] = {};  // copied vector by vector, because the compiler would keep a whole array in memory
  if (add)
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < columns; ++j) std::memcpy(&sums[i][j], c + i * c_row + j * width, sizeof(Vector));
  for (int64_t k = 0; k < K; ++k) {
    Vector b[columns];
    for (int j = 0; j < columns; ++j) std::memcpy(&b[j], panel + (k * columns + j) * width, sizeof(Vector));
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const float factor = a[i * a_row + k * a_step];
      for (int j = 0; j < columns; ++j) sums[i][j] += factor * b[j];
    }
  }
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < columns; ++j) std::memcpy(c + i * c_row + j * width, &sums[i][j], sizeof(Vector));
}

// c [M x N] = (add ? c : 0) + a [M x K] b [K x N], where a(i, k) = a[i * a_row + k * a_step], and M is even, a multiple
// of 8 with width 16. b is the rows first..first + K of a matrix of `height` rows in panels. With the first panel,
// `ahead` floats of each of the next rows of a are prefetched.
template <int width>
DLLM_INLINE void multiply(const float* a, int64_t a_row, int64_t a_step, int64_t M, const float* panels, int64_t height,
                          int64_t first, int64_t K, int64_t N, float* c, int64_t c_row, bool add, int64_t ahead = 0) {
  using T = Tile<width>;
  for (int64_t n = 0; n < N; n += T::kPanel) {
    const int64_t columns = std::min<int64_t>(T::kPanel, N - n) / width;
    const float* panel = panels + n * height + first * columns * width;
    for (int64_t m = 0; m < M;) {
      const float* factors = a + m * a_row;
      float* out = c + m * c_row + n;
      if (n == 0)
        for (int64_t i = 0; i < T::kRows; ++i)
          for (int64_t k = 0; k < ahead; k += 16) __builtin_prefetch(factors + (T::kRows + i) * a_row + k);
      const auto run = [&]<int rows>() __attribute__((always_inline)) {
        if (columns == T::kColumns) {
          multiply_tile<width, rows, T::kColumns>(factors, a_row, a_step, panel, K, out, c_row, add);
        } else if (columns == 2) {
          multiply_tile<width, rows, 2>(factors, a_row, a_step, panel, K, out, c_row, add);
        } else {
          multiply_tile<width, rows, 1>(factors, a_row, a_step, panel, K, out, c_row, add);
        }
        m += rows;
      };
      m + T::kRows <= M ? run.template operator()<T::kRows>() : run.template operator()<2>();
    }
  }
}

// Panels of a matrix [K x columns], from(k, j) = from[k * row + j * step], with zeros up to N columns and K_padded
// rows.
template <int width>
DLLM_INLINE void pack(const float* from, int64_t row, int64_t step, int64_t K, int64_t columns, int64_t K_padded,
                      int64_t N, float* panels) {
  constexpr int64_t kTogether = 8;  // rows read side by side, so that the processor's prefetching follows each
  for (int64_t first = 0; first < K_padded; first += kTogether)
    for (int64_t n = 0; n < N; n += Tile<width>::kPanel) {
      const int64_t wide = std::min<int64_t>(Tile<width>::kPanel, N - n);
      const int64_t there = std::clamp<int64_t>(columns - n, 0, wide);
      float* panel = panels + n * K_padded + first * wide;
      for (int64_t k = first; k < std::min(first + kTogether, K_padded); ++k, panel += wide) {
        const float* source = from + k * row + n * step;
        const int64_t some = k < K ? there : 0;
        if (step == 1 && some == Tile<width>::kPanel) {
          std::memcpy(panel, source, Tile<width>::kPanel * sizeof(float));  // of a known size: no call
        } else {
          for (int64_t j = 0; j < some; ++j) panel[j] = source[j * step];
        }
        std::fill(panel + some, panel + wide, 0.0f);
      }
    }
}

}  // namespace dllm
