// The head on the CPU: logits of a tile of words and some rows of hidden states, held in the cache.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdlib>
#include <memory>
#include <optional>

#include "../checks.h"
#include "numbers.h"
#include "products.h"

namespace dllm {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;

constexpr int64_t kWords = 128;  // words of a tile
constexpr int64_t kBlock = 192;  // rows whose logits are held at once: whole panels for every vector width

// Memory aligned to cache lines.
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : data_(static_cast<float*>(std::aligned_alloc(64, round_up(size, 16) * sizeof(float) + 64))) {
    STD_TORCH_CHECK(data_ != nullptr, "out of memory: ", size, " floats");
  }
  float* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(float* data) const { std::free(data); }
  };
  std::unique_ptr<float, Free> data_;
};

struct Head {
  const void* weight;  // [V, D], rows `stride` elements apart
  ScalarType dtype;
  int64_t V, D, stride;
  const float* bias;  // [V] or nullptr
  float softcap;      // 0: none
};

// The weights of a tile, fp32 [kWords, D], zero past the vocabulary; `row` becomes the distance of its rows.
DLLM_INLINE const float* read_words(const Head& head, int64_t first, int64_t words, float* buffer, int64_t* row) {
  if (head.dtype == ScalarType::Float && words == kWords) {
    *row = head.stride;
    return static_cast<const float*>(head.weight) + first * head.stride;
  }
  *row = head.D;
  for (int64_t v = 0; v < words; ++v) {
    const int64_t at = (first + v) * head.stride;
    float* to = buffer + v * head.D;
    if (head.dtype == ScalarType::Float) {
      convert(static_cast<const float*>(head.weight) + at, head.D, to);
    } else if (head.dtype == ScalarType::BFloat16) {
      convert(static_cast<const BFloat16*>(head.weight) + at, head.D, to);
    } else {
      convert(static_cast<const Half*>(head.weight) + at, head.D, to);
    }
  }
  std::fill(buffer + words * head.D, buffer + kWords * head.D, 0.0f);
  return buffer;
}

// z [kWords, kBlock]: logits of the words first..first + words and of `rows` rows from `first_row` on, with bias and
// soft cap.
template <int width>
DLLM_INLINE void logits_of_tile(const Head& head, const float* w, int64_t w_row, int64_t first, int64_t words,
                                const float* x_turned, int64_t first_row, int64_t rows, float* z) {
  multiply<width>(w, w_row, 1, kWords, x_turned + first_row * head.D, head.D, 0, head.D, rows, z, kBlock, false,
                  w_row);
  if (head.bias)
    for (int64_t v = 0; v < words; ++v)
      for (int64_t n = 0; n < rows; ++n) z[v * kBlock + n] += head.bias[first + v];
  if (head.softcap > 0)
    for (int64_t v = 0; v < words; ++v) cap(z + v * kBlock, rows, head.softcap, z + v * kBlock);
}

// Panels of the rows, transposed ([D x rows], rows side by side) or as they are ([rows x D]).
template <int width>
DLLM_INLINE void pack_rows_of_width(const float* x, int64_t M, int64_t D, bool turned, float* panels) {
  const int64_t padded = round_up(M, width), wide_D = round_up(D, width);
  if (turned) {
    pack<width>(x, 1, D, D, M, D, padded, panels);
  } else {
    pack<width>(x, D, 1, M, D, padded, wide_D, panels);
  }
}

DLLM_BY_WIDTH(pack_rows, (const float* x, int64_t M, int64_t D, bool turned, float* panels), (x, M, D, turned, panels))

template <int width>
DLLM_INLINE void width_of_width(int& out) {
  out = width;
}

DLLM_BY_WIDTH(width, (int& out), (out))

inline int vector_width() {
  int out;
  width(out);
  return out;
}

inline Head describe_head(const torch::stable::Tensor& weight, const std::optional<torch::stable::Tensor>& bias,
                          double softcap) {
  check_rows(weight, 2, "weight");
  const auto dtype = weight.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "the head on the CPU takes fp32, bf16 and fp16 weights");
  return {weight.const_data_ptr(), dtype, weight.size(0), weight.size(1), weight.stride(0),
          bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr, static_cast<float>(softcap)};
}

}  // namespace dllm
