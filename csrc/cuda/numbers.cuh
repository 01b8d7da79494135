// Numbers of 32 and 16 bits in memory, read and written 16 bytes at a time.
#pragma once

#include <cstdint>

#include "tensor_cores.cuh"

namespace dllm {

constexpr unsigned kAllLanes = ~0u;
constexpr double kLog2E = 1.4426950408889634;

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
__device__ inline float widen(float x) { return x; }
__device__ inline float widen(BFloat16 x) { return widen<Number::bf16>(x.bits); }
__device__ inline float widen(Float16 x) { return widen<Number::fp16>(x.bits); }

template <typename T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T values[kSize];
};

__device__ inline void narrow(float x, float& to) { to = x; }
__device__ inline void narrow(float x, BFloat16& to) { to.bits = static_cast<uint16_t>(pack<Number::bf16>(x, 0)); }
__device__ inline void narrow(float x, Float16& to) { to.bits = static_cast<uint16_t>(pack<Number::fp16>(x, 0)); }

// Two numbers of a pack are rounded by one instruction.
template <typename T>
__device__ inline Pack<T> narrow(const float (&x)[Pack<T>::kSize]) {
  Pack<T> packed;
  if constexpr (sizeof(T) == 4) {
    for (int i = 0; i < Pack<T>::kSize; ++i) packed.values[i] = x[i];
  } else {
    constexpr Number kNumber = __is_same(T, BFloat16) ? Number::bf16 : Number::fp16;
    struct alignas(16) Pairs {
      uint32_t of[4];
    } pairs;
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs.of[i] = pack<kNumber>(x[2 * i], x[2 * i + 1]);
    packed = __builtin_bit_cast(Pack<T>, pairs);
  }
  return packed;
}

__device__ inline float infinity() { return __builtin_bit_cast(float, 0x7f800000); }
__device__ inline float not_a_number() { return __builtin_bit_cast(float, 0x7fc00000); }

}  // namespace dllm
