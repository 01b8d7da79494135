// Arithmetic on single numbers; the compiler vectorises loops over it.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../vectorised.h"

namespace dllm {

// exp(x) for x <= 0, relative error below 2e-7: 2^n times a polynomial on [-ln2/2, ln2/2]. 0 below -69, where exp(x) <
// 2^-99: beside the largest word's 1 that is nothing, and its products with weights could be denormal.
DLLM_INLINE float exp_nonpositive(float x) {
  constexpr float kSmallest = -69.0f;
  const float clamped = x < kSmallest ? kSmallest : x;
  const float rounded = clamped * 1.44269504088896341f + 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
  const float n = rounded - 12582912.0f;
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r) * r + r + 1.0f;
  const int32_t exponent = (std::bit_cast<int32_t>(rounded) - 0x4b400000 + 127) << 23;
  const float value = p * std::bit_cast<float>(exponent);
  return x < kSmallest ? 0.0f : value;
}

// to = by * tanh(from / by)
DLLM_INLINE void cap(const float* from, int64_t n, float by, float* to) {
  for (int64_t i = 0; i < n; ++i) {
    const float value = from[i] / by;
    const float e = exp_nonpositive(-2.0f * std::fabs(value)), tanh = (1.0f - e) / (1.0f + e);
    to[i] = by * (value < 0 ? -tanh : tanh);
  }
}

DLLM_INLINE void convert(const float* from, int64_t n, float* to) { std::memcpy(to, from, n * sizeof(float)); }

DLLM_INLINE void convert(const torch::headeronly::BFloat16* from, int64_t n, float* to) {
  const auto* bits = reinterpret_cast<const uint16_t*>(from);
  for (int64_t i = 0; i < n; ++i) to[i] = std::bit_cast<float>(static_cast<uint32_t>(bits[i]) << 16);
}

DLLM_INLINE void convert(const torch::headeronly::Half* from, int64_t n, float* to) {
  const auto* halves = reinterpret_cast<const uint16_t*>(from);
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t half = halves[i], magnitude = half & 0x7fff;
    // Below 2^-14 a half is a multiple of 2^-24. The others have fp32's bits, and an exponent that is 112 too small.
    const float small = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
    const uint32_t large = (magnitude << 13) + (magnitude >= 0x7c00 ? 0x70000000 : 0x38000000);
    const uint32_t bits = magnitude < 0x0400 ? std::bit_cast<uint32_t>(small) : large;
    to[i] = std::bit_cast<float>(bits | (half & 0x8000) << 16);
  }
}

DLLM_INLINE void narrow(const float* from, int64_t n, torch::headeronly::BFloat16* to) {
  auto* out = reinterpret_cast<uint16_t*>(to);
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = std::bit_cast<uint32_t>(from[i]);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to the nearest, ties to even
    out[i] = static_cast<uint16_t>(from[i] != from[i] ? 0x7fc0 : rounded);
  }
}

DLLM_INLINE void narrow(const float* from, int64_t n, torch::headeronly::Half* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<torch::headeronly::Half>(from[i]);
}

}  // namespace dllm
