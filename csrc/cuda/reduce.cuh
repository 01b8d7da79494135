// What the threads of a block know of a row, put together.
#pragma once

#include "numbers.cuh"

namespace dllm {

constexpr float kLowest = -3.4028234663852886e38f;  // not -infinity, of which a difference would be NaN

// Of the numbers seen so far: the largest, and the sum of exp(x - top).
struct ExpSum {
  float top = kLowest, total = 0.0f;
};

// Of an x <= 0, as here, the error stays within a few units of the last place of the largest term.
__device__ inline float exp_of(float x) { return exp2_of(x * static_cast<float>(kLog2E)); }

__device__ inline ExpSum merge(ExpSum a, ExpSum b) {
  const float top = fmaxf(a.top, b.top);
  return {top, a.total * exp_of(a.top - top) + b.total * exp_of(b.top - top)};
}

// The same in every thread afterwards. `threads` is a multiple of 32; of_warp, in shared memory, has room for one of each warp.
__device__ inline ExpSum merge_block(ExpSum mine, int threads, ExpSum* of_warp) {
  for (int step = 16; step > 0; step /= 2)
    mine = merge(mine, {__shfl_xor_sync(kAllLanes, mine.top, step), __shfl_xor_sync(kAllLanes, mine.total, step)});
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = mine;
  __syncthreads();
  ExpSum all = of_warp[0];
  for (int warp = 1; warp < threads / 32; ++warp) all = merge(all, of_warp[warp]);
  return all;
}

}  // namespace dllm
