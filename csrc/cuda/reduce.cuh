// What the threads of a block know of a row, put together.
#pragma once

#include <cuda_runtime.h>

namespace dllm {

constexpr float kLowest = -3.4028234663852886e38f;  // not -infinity, of which a difference would be NaN

// Of the numbers seen so far: the largest, and the sum of exp(x - top).
struct ExpSum {
  float top = kLowest, total = 0.0f;
};

// One multiplication and the hardware's 2^x; what is below 2^-126 becomes 0. Of an x <= 0, as here, the error stays within
// a few units of the last place of the largest term.
__device__ inline float exp_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
  return y;
}

__device__ inline ExpSum merge(ExpSum a, ExpSum b) {
  const float top = fmaxf(a.top, b.top);
  return {top, a.total * exp_of(a.top - top) + b.total * exp_of(b.top - top)};
}

// The same in every thread afterwards. `threads` is a multiple of 32, at most 1,024.
template <int threads>
__device__ ExpSum merge_block(ExpSum mine) {
  __shared__ ExpSum of_warp[threads / 32];
  for (int step = 16; step > 0; step /= 2)
    mine = merge(mine, {__shfl_xor_sync(~0u, mine.top, step), __shfl_xor_sync(~0u, mine.total, step)});
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = mine;
  __syncthreads();
  ExpSum all = of_warp[0];
  for (int warp = 1; warp < threads / 32; ++warp) all = merge(all, of_warp[warp]);
  return all;
}

}  // namespace dllm
