// Launches the kernels of cross_entropy_rows.cuh; the Python side has checked what may reach them.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <type_traits>

#include "../checks.h"
#include "../library.h"
#include "cross_entropy_rows.cuh"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check(cudaError_t error) {
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
      return run_capped(dllm::BFloat16{});
    case ScalarType::Half:
      return run_capped(dllm::Float16{});
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
    dllm::statistics_kernel<T, Capped::value><<<logits.size(0), dllm::kRowThreads, dllm::kScratchBytes, current_stream(logits)>>>(
        static_cast<T*>(const_cast<void*>(logits.const_data_ptr())), logits.stride(0),
        static_cast<const int64_t*>(targets.const_data_ptr()), static_cast<const bool*>(corrupted.const_data_ptr()),
        static_cast<float>(softcap), logits.size(1), static_cast<float*>(top.mutable_data_ptr()),
        static_cast<float*>(total.mutable_data_ptr()), static_cast<float*>(target_logit.mutable_data_ptr()));
    check(cudaGetLastError());
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
    dllm::gradients_kernel<T, Capped::value><<<logits.size(0), dllm::kRowThreads, 0, current_stream(logits)>>>(
        static_cast<T*>(const_cast<void*>(logits.const_data_ptr())), logits.stride(0),
        static_cast<const int64_t*>(targets.const_data_ptr()), static_cast<const bool*>(corrupted.const_data_ptr()),
        static_cast<float>(softcap), logits.size(1), pointer(top), pointer(probability_scale), pointer(target_scale),
        static_cast<T*>(grad.mutable_data_ptr()), grad.stride(0));
    check(cudaGetLastError());
  });
}

// Bytes of shared memory that one block can have here.
int shared_bytes(int device) {
  int bytes = 0;
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes;
}

void loss_of_rows(Tensor logits, const Tensor& targets, const Tensor& scale, const std::optional<Tensor>& probability_scale,
                  const std::optional<Tensor>& live, double softcap, bool gradient, bool clear, Tensor nll) {
  check_one_per_row(targets, logits, ScalarType::Long);
  check_one_per_row(scale, logits, ScalarType::Float);
  check_one_per_row(nll, logits, ScalarType::Float);
  if (probability_scale) check_one_per_row(*probability_scale, logits, ScalarType::Float);
  STD_TORCH_CHECK(!live || (live->numel() == 1 && live->scalar_type() == ScalarType::Long), "live is one int64");
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  by_dtype(logits, softcap, [&]<typename T, typename Capped>(T, Capped) {
    if (logits.size(0) == 0) return;
    dllm::LossArguments a{};
    a.logits = logits.mutable_data_ptr(), a.stride = logits.stride(0), a.V = logits.size(1);
    a.targets = static_cast<const int64_t*>(targets.const_data_ptr());
    a.scale = static_cast<const float*>(scale.const_data_ptr());
    a.probability_scale = probability_scale ? static_cast<const float*>(probability_scale->const_data_ptr()) : nullptr;
    a.live = live ? static_cast<const int64_t*>(live->const_data_ptr()) : nullptr;
    a.softcap = static_cast<float>(softcap), a.gradient = gradient, a.clear = clear;
    a.nll = static_cast<float*>(nll.mutable_data_ptr());
    int bytes = dllm::kScratchBytes;
    if (gradient) {
      const int64_t row = a.V * sizeof(T), room = shared_bytes(logits.get_device_index()) - bytes;
      a.kept = static_cast<int>(std::min(row, room) / 16), bytes += 16 * a.kept;
    }
    const auto kernel = dllm::loss_kernel<T, Capped::value>;
    if (bytes > 48 << 10) check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    kernel<<<logits.size(0), dllm::kLossThreads, bytes, current_stream(logits)>>>(a);
    check(cudaGetLastError());
  });
}

}  // namespace

DLLM_LIBRARY_IMPL(CUDA, m) {
  m.impl("cross_entropy_statistics_cuda", TORCH_BOX(&statistics));
  m.impl("cross_entropy_gradients_cuda", TORCH_BOX(&gradients));
  m.impl("cross_entropy_rows_cuda", TORCH_BOX(&loss_of_rows));
}
