// Cross-entropy of rows of logits and its gradient (see dllm_kernels/masked_cross_entropy), a block for each row, in 16-byte
// accesses, four of them in flight per thread; the numbers before the first 16-byte boundary and after the last one are read one
// by one. Rows that are not corrupted, or not live, are not read.
//
// statistics_kernel and gradients_kernel are the forward and the backward from logits: one read, then one read and one write.
// loss_kernel does both at once, onto the logits themselves. Its second reading is from shared memory as far as a row fits
// there, and else from the cache, which holds the rest of the rows at work, because a multiprocessor works on one row at a time.
//
// With kCapped the logits go through softcap * tanh(z / softcap); it is known at compile time, because at the memory's speed
// there are a dozen instructions to spend on a bf16 number.
#pragma once

#include <cstdint>

#include "reduce.cuh"

namespace dllm {

constexpr int kRowThreads = 512, kLossThreads = 1024, kInFlight = 4;
constexpr int kScratchBytes = kLossThreads / 32 * sizeof(ExpSum);  // of shared memory, before what loss_kernel keeps of a row

template <bool kCapped>
__device__ float capped(float z, float softcap) {
  return kCapped ? softcap * tanhf(z / softcap) : z;
}

// A row of V numbers: those before its first 16-byte boundary, packs, and the rest.
template <typename T>
struct Span {
  __device__ Span(T* row, int64_t V) : first(row), V(V) {
    const int64_t bytes = (16 - reinterpret_cast<uintptr_t>(row) % 16) % 16;
    before = min(bytes / static_cast<int64_t>(sizeof(T)), V);
    packs = (V - before) / Pack<T>::kSize;
  }
  __device__ Pack<T>* body() const { return reinterpret_cast<Pack<T>*>(first + before); }
  __device__ int64_t word_of(int64_t pack) const { return before + pack * Pack<T>::kSize; }

  // run(v) for the numbers outside of packs.
  template <typename Run>
  __device__ void for_others(const Run& run) const {
    const int64_t thread = threadIdx.x, rest = word_of(packs);
    if (thread < before) run(thread);
    if (rest + thread < V) run(rest + thread);
  }

  T* first;
  int64_t V, before, packs;
};

// Largest number and sum of exponentials of a row, the same in every thread. keep(place, pack) sees each pack.
template <typename T, bool kCapped, int kThreads, typename Keep>
__device__ ExpSum sum_row(const Span<T>& row, float softcap, ExpSum* scratch, const Keep& keep) {
  ExpSum mine;
  const Pack<T>* body = row.body();
  for (int64_t first = threadIdx.x; first < row.packs; first += kThreads * kInFlight) {
    Pack<T> read[kInFlight];
    int count = 0;
#pragma unroll
    for (int i = 0; i < kInFlight; ++i)
      if (first + i * kThreads < row.packs) read[i] = body[first + i * kThreads], ++count;
    float highest = kLowest;  // before the cap, which keeps the order
#pragma unroll
    for (int i = 0; i < kInFlight; ++i)
      if (i < count) {
        for (const T& value : read[i].values) highest = fmaxf(highest, widen(value));
        keep(first + i * kThreads, read[i]);
      }
    highest = fmaxf(mine.top, capped<kCapped>(highest, softcap));
    mine.total *= exp_of(mine.top - highest);
    mine.top = highest;
#pragma unroll
    for (int i = 0; i < kInFlight; ++i)
      if (i < count)
        for (const T& value : read[i].values) mine.total += exp_of(capped<kCapped>(widen(value), softcap) - highest);
  }
  row.for_others([&](int64_t v) { mine = merge(mine, {capped<kCapped>(widen(row.first[v]), softcap), 1.0f}); });
  return merge_block(mine, kThreads, scratch);
}

// The gradient of a logit, before the cap.
template <bool kCapped>
struct Gradient {
  float top, probability, target, softcap;  // as in dllm_kernels/masked_cross_entropy/rows.py

  __device__ float of(float logit, bool is_target) const {
    const float z = capped<kCapped>(logit, softcap);
    const float g = probability * exp_of(z - top) - (is_target ? target : 0.0f);
    return kCapped ? g * (1.0f - (z / softcap) * (z / softcap)) : g;
  }

  // Of the pack whose first number is at `distance` before the target.
  template <typename T>
  __device__ Pack<T> of_pack(const Pack<T>& read, int64_t distance) const {
    const int here = distance >= 0 && distance < Pack<T>::kSize ? static_cast<int>(distance) : -1;
    float g[Pack<T>::kSize];
#pragma unroll
    for (int j = 0; j < Pack<T>::kSize; ++j) g[j] = of(widen(read.values[j]), j == here);
    return narrow<T>(g);
  }
};

template <typename T, bool kCapped>
__global__ void __launch_bounds__(kRowThreads)
    statistics_kernel(T* logits, int64_t stride, const int64_t* targets, const bool* corrupted, float softcap, int64_t V,
                      float* top, float* total, float* target_logit) {
  extern __shared__ __align__(128) uint16_t dynamic_shared[];
  const int64_t n = blockIdx.x;
  if (!corrupted[n]) {
    if (threadIdx.x == 0) top[n] = 0, total[n] = 1, target_logit[n] = 0;  // whose loss is 0
    return;
  }
  const Span<T> row(logits + n * stride, V);
  const ExpSum all = sum_row<T, kCapped, kRowThreads>(row, softcap, reinterpret_cast<ExpSum*>(dynamic_shared),
                                                      [](int64_t, const Pack<T>&) {});
  if (threadIdx.x == 0) {
    const int64_t target = targets[n];
    top[n] = all.top, total[n] = all.total;
    // Out of range, nothing is read, and the loss is to show it.
    target_logit[n] = target >= 0 && target < V ? capped<kCapped>(widen(row.first[target]), softcap) : not_a_number();
  }
}

template <typename T, bool kCapped>
__global__ void __launch_bounds__(kRowThreads)
    gradients_kernel(T* logits, int64_t stride, const int64_t* targets, const bool* corrupted, float softcap, int64_t V,
                     const float* tops, const float* probability_scale, const float* target_scale, T* grad,
                     int64_t grad_stride) {
  const int64_t n = blockIdx.x, target = targets[n];
  const bool read = corrupted[n];
  const Span<T> row(logits + n * stride, V), out(grad + n * grad_stride, V);
  const Gradient<kCapped> gradient{tops[n], probability_scale[n], target_scale[n], softcap};
  const auto one = [&](int64_t v) { narrow(read ? gradient.of(widen(row.first[v]), v == target) : 0.0f, out.first[v]); };
  if (out.before != row.before) {  // no boundary of the one is one of the other
    for (int64_t v = threadIdx.x; v < V; v += kRowThreads) one(v);
    return;
  }
  for (int64_t first = threadIdx.x; first < row.packs; first += kRowThreads * kInFlight) {
    Pack<T> packs[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i)
      if (read && first + i * kRowThreads < row.packs) packs[i] = row.body()[first + i * kRowThreads];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t place = first + i * kRowThreads;
      if (place < row.packs) out.body()[place] = read ? gradient.of_pack(packs[i], target - row.word_of(place)) : Pack<T>{};
    }
  }
  row.for_others(one);
}

struct LossArguments {
  void* logits;
  int64_t stride, V;
  const int64_t* targets;
  const float* scale;
  const float* probability_scale;  // nullptr: none
  const int64_t* live;             // rows from here on are not live; nullptr: all are
  float softcap;
  bool gradient, clear;  // clear: write zeros in the rows that are not live
  int kept;              // packs of a row that shared memory has room for
  float* nll;
};

template <typename T, bool kCapped>
__global__ void __launch_bounds__(kLossThreads, 1) loss_kernel(const LossArguments a) {
  extern __shared__ __align__(128) uint16_t dynamic_shared[];
  const int64_t n = blockIdx.x, target = a.targets[n];
  const Span<T> row(static_cast<T*>(a.logits) + n * a.stride, a.V);
  if (a.live && n >= *a.live) {
    if (threadIdx.x == 0) a.nll[n] = 0;
    if (!a.clear) return;
    for (int64_t place = threadIdx.x; place < row.packs; place += kLossThreads) row.body()[place] = Pack<T>{};
    row.for_others([&](int64_t v) { narrow(0.0f, row.first[v]); });
    return;
  }
  Pack<T>* const kept = reinterpret_cast<Pack<T>*>(dynamic_shared + kScratchBytes / sizeof(uint16_t));
  const ExpSum all = sum_row<T, kCapped, kLossThreads>(
      row, a.softcap, reinterpret_cast<ExpSum*>(dynamic_shared), [&](int64_t place, const Pack<T>& pack) {
        if (a.gradient && place < a.kept) kept[place] = pack;
      });
  // Out of range, nothing is read, and the loss is to show it.
  const float at_target =
      target >= 0 && target < a.V ? capped<kCapped>(widen(row.first[target]), a.softcap) : not_a_number();
  const float nll = logf(all.total) + (all.top - at_target);
  if (threadIdx.x == 0) a.nll[n] = nll;
  if (!a.gradient) return;
  float scale = a.scale[n];
  if (a.probability_scale) scale += a.probability_scale[n] * exp_of(-nll);
  const Gradient<kCapped> gradient{all.top, scale / all.total, scale, a.softcap};
  __syncthreads();  // every thread has read the target's logit
  constexpr int kNear = kInFlight / 2;  // from nearby, so that fewer reads under way suffice
  for (int64_t first = threadIdx.x; first < row.packs; first += kLossThreads * kNear) {
    Pack<T> packs[kNear];
#pragma unroll
    for (int i = 0; i < kNear; ++i) {
      const int64_t place = first + i * kLossThreads;
      if (place < row.packs) packs[i] = place < a.kept ? kept[place] : row.body()[place];
    }
#pragma unroll
    for (int i = 0; i < kNear; ++i) {
      const int64_t place = first + i * kLossThreads;
      if (place < row.packs) row.body()[place] = gradient.of_pack(packs[i], target - row.word_of(place));
    }
  }
  row.for_others([&](int64_t v) { narrow(gradient.of(widen(row.first[v]), v == target), row.first[v]); });
}

}  // namespace dllm
