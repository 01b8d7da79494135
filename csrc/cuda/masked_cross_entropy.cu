// Cross-entropy of rows of logits and its gradient (see dllm_kernels/masked_cross_entropy): one read of each corrupted row
// forward; one read and one write backward, also onto the logits themselves. Rows that are not corrupted are not read.
//
// A block works on a row, in 16-byte accesses, four of them in flight per thread; the numbers before the first 16-byte
// boundary and after the last one are read one by one. With kCapped the logits go through softcap * tanh(z / softcap); it is
// known at compile time, because at the memory's speed there are a dozen instructions to spend on a bf16 number.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <type_traits>

#include "../checks.h"
#include "reduce.cuh"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 512, kInFlight = 4;

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline void narrow(float x, float& to) { to = x; }
__device__ inline void narrow(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }
__device__ inline void narrow(float x, __half& to) { to = __float2half_rn(x); }

// 16 bytes of a row.
template <typename T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T values[kSize];
};

template <bool kCapped>
__device__ float capped(float z, float softcap) {
  return kCapped ? softcap * tanhf(z / softcap) : z;
}

// How many of V numbers from `row` on lie before its first 16-byte boundary.
template <typename T>
__device__ int64_t numbers_before_boundary(const T* row, int64_t V) {
  const int64_t bytes = (16 - reinterpret_cast<uintptr_t>(row) % 16) % 16;
  return min(bytes / static_cast<int64_t>(sizeof(T)), V);
}

template <typename T, bool kCapped>
__global__ void __launch_bounds__(kThreads) statistics_kernel(const T* logits, int64_t stride, const int64_t* targets,
                                                               const bool* corrupted, float softcap, int64_t V, float* top,
                                                               float* total, float* target_logit) {
  const int64_t n = blockIdx.x;
  if (!corrupted[n]) {
    if (threadIdx.x == 0) top[n] = 0, total[n] = 1, target_logit[n] = 0;  // whose loss is 0
    return;
  }
  const T* row = logits + n * stride;
  dllm::ExpSum mine;
  const auto add = [&](float z) { mine = dllm::merge(mine, {capped<kCapped>(z, softcap), 1.0f}); };
  const int64_t before = numbers_before_boundary(row, V), packs = (V - before) / Pack<T>::kSize;
  const auto* body = reinterpret_cast<const Pack<T>*>(row + before);
  for (int64_t first = threadIdx.x; first < packs; first += kThreads * kInFlight) {
    Pack<T> read[kInFlight];
    int count = 0;
#pragma unroll
    for (int i = 0; i < kInFlight; ++i)
      if (first + i * kThreads < packs) read[i] = body[first + i * kThreads], ++count;
    float highest = dllm::kLowest;  // before the cap, which keeps the order
#pragma unroll
    for (int i = 0; i < kInFlight; ++i)
      if (i < count)
        for (T& value : read[i].values) highest = fmaxf(highest, widen(value));
    highest = fmaxf(mine.top, capped<kCapped>(highest, softcap));
    mine.total *= dllm::exp_of(mine.top - highest);
    mine.top = highest;
#pragma unroll
    for (int i = 0; i < kInFlight; ++i)
      if (i < count)
        for (T& value : read[i].values) mine.total += dllm::exp_of(capped<kCapped>(widen(value), softcap) - highest);
  }
  const int64_t rest = before + packs * Pack<T>::kSize;
  if (threadIdx.x < before) add(widen(row[threadIdx.x]));
  if (rest + threadIdx.x < V) add(widen(row[rest + threadIdx.x]));
  const dllm::ExpSum all = dllm::merge_block<kThreads>(mine);
  if (threadIdx.x == 0) {
    const int64_t target = targets[n];
    top[n] = all.top, total[n] = all.total;
    // Out of range, nothing is read, and the loss is to show it.
    target_logit[n] = target >= 0 && target < V ? capped<kCapped>(widen(row[target]), softcap) : __int_as_float(0x7fffffff);
  }
}

template <typename T, bool kCapped>
__global__ void __launch_bounds__(kThreads)
    gradients_kernel(const T* logits, int64_t stride, const int64_t* targets, const bool* corrupted, float softcap, int64_t V,
                     const float* tops, const float* probability_scale, const float* target_scale, T* grad,
                     int64_t grad_stride) {
  const int64_t n = blockIdx.x;
  const bool read = corrupted[n];
  const T* row = logits + n * stride;
  T* out = grad + n * grad_stride;
  const float top = tops[n], scale = probability_scale[n], at_target = target_scale[n];
  const int64_t target = targets[n];
  const auto gradient = [&](float x, bool is_target) {
    const float z = capped<kCapped>(x, softcap);
    const float g = scale * dllm::exp_of(z - top) - (is_target ? at_target : 0.0f);
    return kCapped ? g * (1.0f - (z / softcap) * (z / softcap)) : g;
  };
  const auto one = [&](int64_t v) { narrow(read ? gradient(widen(row[v]), v == target) : 0.0f, out[v]); };
  const int64_t before = numbers_before_boundary(row, V);
  if (numbers_before_boundary(out, V) != before) {  // no boundary of the one is one of the other
    for (int64_t v = threadIdx.x; v < V; v += kThreads) one(v);
    return;
  }
  const int64_t packs = (V - before) / Pack<T>::kSize, rest = before + packs * Pack<T>::kSize;
  const auto* from = reinterpret_cast<const Pack<T>*>(row + before);
  auto* to = reinterpret_cast<Pack<T>*>(out + before);
  for (int64_t first = threadIdx.x; first < packs; first += kThreads * kInFlight) {
    Pack<T> packs_read[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i)
      if (read && first + i * kThreads < packs) packs_read[i] = from[first + i * kThreads];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t place = first + i * kThreads;
      if (place >= packs) continue;
      const int64_t to_target = target - (before + place * Pack<T>::kSize);
      const int here = to_target >= 0 && to_target < Pack<T>::kSize ? static_cast<int>(to_target) : -1;
      Pack<T> written;
#pragma unroll
      for (int j = 0; j < Pack<T>::kSize; ++j)
        narrow(read ? gradient(widen(packs_read[i].values[j]), j == here) : 0.0f, written.values[j]);
      to[place] = written;
    }
  }
  if (threadIdx.x < before) one(threadIdx.x);
  if (rest + threadIdx.x < V) one(rest + threadIdx.x);
}

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_launch() {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "masked cross-entropy: ", cudaGetErrorString(error));
}

// One number for each row of the logits, on their device: what the kernels take a bare pointer of.
void check_one_per_row(const Tensor& tensor, const Tensor& logits, ScalarType dtype) {
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == logits.size(0) && tensor.is_contiguous() &&
                      tensor.scalar_type() == dtype && tensor.get_device_index() == logits.get_device_index(),
                  "masked cross-entropy in CUDA: want one contiguous number per row, of the right dtype and device");
}

// run(T{}, whether capped) for the dtype of the logits and their cap.
template <typename Run>
void by_dtype(const Tensor& logits, double softcap, const Run& run) {
  dllm::check_rows(logits, 2, "logits");
  const auto run_capped = [&](auto zero) {
    return softcap > 0 ? run(zero, std::true_type{}) : run(zero, std::false_type{});
  };
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      return run_capped(float{});
    case ScalarType::BFloat16:
      return run_capped(__nv_bfloat16{});
    case ScalarType::Half:
      return run_capped(__half{});
    default:
      STD_TORCH_CHECK(false, "masked cross-entropy in CUDA takes fp32, bf16 and fp16 logits");
  }
}

void statistics(const Tensor& logits, const Tensor& targets, const Tensor& corrupted, double softcap, Tensor top,
                Tensor total, Tensor target_logit) {
  check_one_per_row(targets, logits, ScalarType::Long);
  check_one_per_row(corrupted, logits, ScalarType::Bool);
  for (const Tensor* tensor : {&top, &total, &target_logit}) check_one_per_row(*tensor, logits, ScalarType::Float);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  by_dtype(logits, softcap, [&]<typename T, typename Capped>(T, Capped) {
    if (logits.size(0) == 0) return;
    statistics_kernel<T, Capped::value><<<logits.size(0), kThreads, 0, current_stream(logits)>>>(
        static_cast<const T*>(logits.const_data_ptr()), logits.stride(0),
        static_cast<const int64_t*>(targets.const_data_ptr()), static_cast<const bool*>(corrupted.const_data_ptr()),
        static_cast<float>(softcap), logits.size(1), static_cast<float*>(top.mutable_data_ptr()),
        static_cast<float*>(total.mutable_data_ptr()), static_cast<float*>(target_logit.mutable_data_ptr()));
    check_launch();
  });
}

void gradients(const Tensor& logits, const Tensor& targets, const Tensor& corrupted, double softcap, const Tensor& top,
               const Tensor& probability_scale, const Tensor& target_scale, Tensor grad) {
  dllm::check_rows(grad, 2, "grad");
  STD_TORCH_CHECK(grad.scalar_type() == logits.scalar_type() && grad.size(0) == logits.size(0) &&
                      grad.size(1) == logits.size(1) && grad.get_device_index() == logits.get_device_index(),
                  "the gradient has the dtype, shape and device of the logits");
  check_one_per_row(targets, logits, ScalarType::Long);
  check_one_per_row(corrupted, logits, ScalarType::Bool);
  for (const Tensor* tensor : {&top, &probability_scale, &target_scale})
    check_one_per_row(*tensor, logits, ScalarType::Float);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  by_dtype(logits, softcap, [&]<typename T, typename Capped>(T, Capped) {
    if (logits.size(0) == 0) return;
    const auto pointer = [](const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); };
    gradients_kernel<T, Capped::value><<<logits.size(0), kThreads, 0, current_stream(logits)>>>(
        static_cast<const T*>(logits.const_data_ptr()), logits.stride(0),
        static_cast<const int64_t*>(targets.const_data_ptr()), static_cast<const bool*>(corrupted.const_data_ptr()),
        static_cast<float>(softcap), logits.size(1), pointer(top), pointer(probability_scale), pointer(target_scale),
        static_cast<T*>(grad.mutable_data_ptr()), grad.stride(0));
    check_launch();
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dllm_kernels_native, CUDA, m) {
  m.impl("cross_entropy_statistics_cuda", TORCH_BOX(&statistics));
  m.impl("cross_entropy_gradients_cuda", TORCH_BOX(&gradients));
}
