// Launches the kernels of score_rows.cuh; the Python side has checked what may reach them.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "../checks.h"
#include "../library.h"
#include "score_rows.cuh"

namespace {

using dllm::Measure;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "topk_unmask: ", cudaGetErrorString(error));
}

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <typename T>
const T* data(const std::optional<Tensor>& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}

template <typename T, Measure kMeasure, bool kRaw, bool kRestricted>
void launch(const dllm::ScoreArguments& a, int64_t n, const Tensor& logits) {
  const auto kernel = dllm::score_rows_kernel<T, kMeasure, kRaw, kRestricted>;
  const int bytes = dllm::score_shared_bytes<T>(a.V, kRaw);
  if (bytes > 48 << 10)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  kernel<<<static_cast<unsigned>(n), dllm::kScoreThreads, bytes, current_stream(logits)>>>(a);
  check(cudaGetLastError());
}

template <typename T, Measure kMeasure>
void launch(const dllm::ScoreArguments& a, int64_t n, const Tensor& logits, bool raw) {
  const bool restricted = a.allowed || a.filtered;
  if (raw) return restricted ? launch<T, kMeasure, true, true>(a, n, logits) : launch<T, kMeasure, true, false>(a, n, logits);
  restricted ? launch<T, kMeasure, false, true>(a, n, logits) : launch<T, kMeasure, false, false>(a, n, logits);
}

template <typename T>
void launch(const dllm::ScoreArguments& a, int64_t n, const Tensor& logits, int64_t confidence, bool raw) {
  if (confidence == 1) return launch<T, Measure::margin>(a, n, logits, raw);
  if (confidence == 2) return launch<T, Measure::entropy>(a, n, logits, raw);
  launch<T, Measure::prob>(a, n, logits, raw);
}

void score_rows(const Tensor& logits, const std::optional<Tensor>& rows, const std::optional<Tensor>& uniform,
                const std::optional<Tensor>& allowed, Tensor token, Tensor score, int64_t confidence, double temperature,
                bool filtered, int64_t top_k, double top_p, bool raw) {
  dllm::check_rows(logits, 2, "logits");
  if (token.size(0) == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  dllm::ScoreArguments a{};
  a.logits = logits.const_data_ptr();
  a.stride = logits.stride(0), a.R = logits.size(0), a.V = static_cast<int>(logits.size(1));
  a.rows = data<int64_t>(rows), a.uniform = data<double>(uniform), a.allowed = data<uint32_t>(allowed);
  a.allowed_stride = allowed ? allowed->stride(0) : 0;
  a.temperature = static_cast<float>(temperature);
  a.filtered = filtered, a.random = confidence == 3, a.top_k = top_k, a.top_p = top_p;
  a.token = static_cast<int64_t*>(token.mutable_data_ptr()), a.score = static_cast<float*>(score.mutable_data_ptr());
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      return launch<float>(a, token.size(0), logits, confidence, raw);
    case ScalarType::BFloat16:
      return launch<dllm::BFloat16>(a, token.size(0), logits, confidence, raw);
    case ScalarType::Half:
      return launch<dllm::Float16>(a, token.size(0), logits, confidence, raw);
    default:
      STD_TORCH_CHECK(false, "topk_unmask in CUDA takes fp32, bf16 and fp16 logits");
  }
}

void find_rows(const Tensor& tokens, int64_t mask_token_id, bool packed, Tensor masked, Tensor rows) {
  const int64_t n = tokens.numel();
  if (n == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(tokens.get_device_index());
  constexpr int kThreads = dllm::kFindThreads, kSharedBytes = 2 * kThreads / 32 * sizeof(int);
  dllm::find_rows_kernel<<<static_cast<unsigned>((n + kThreads - 1) / kThreads), kThreads, kSharedBytes,
                           current_stream(tokens)>>>(
      data<int64_t>(tokens), mask_token_id, n, packed, static_cast<bool*>(masked.mutable_data_ptr()),
      static_cast<int64_t*>(rows.mutable_data_ptr()));
  check(cudaGetLastError());
}

void commit(const Tensor& tokens, const Tensor& masked, const Tensor& token, const Tensor& confidence, const Tensor& k,
            const std::optional<Tensor>& uniform, double temperature, std::optional<double> threshold, Tensor filled,
            Tensor committed) {
  if (tokens.numel() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(tokens.get_device_index());
  dllm::CommitArguments a{};
  a.tokens = data<int64_t>(tokens), a.token = data<int64_t>(token), a.k = data<int64_t>(k), a.masked = data<bool>(masked);
  a.confidence = data<float>(confidence), a.uniform = data<double>(uniform), a.temperature = temperature;
  a.has_threshold = threshold.has_value(), a.threshold = static_cast<float>(threshold.value_or(0));
  a.L = tokens.size(1), a.tiles = (a.L + dllm::kCommitThreads - 1) / dllm::kCommitThreads;
  a.filled = static_cast<int64_t*>(filled.mutable_data_ptr()), a.committed = static_cast<bool*>(committed.mutable_data_ptr());
  dllm::commit_kernel<<<static_cast<unsigned>(tokens.size(0) * a.tiles), dllm::kCommitThreads,
                        dllm::kCommitThreads * sizeof(double), current_stream(tokens)>>>(a);
  check(cudaGetLastError());
}

}  // namespace

DLLM_LIBRARY_IMPL(CUDA, m) {
  m.impl("score_rows_cuda", TORCH_BOX(&score_rows));
  m.impl("find_rows_cuda", TORCH_BOX(&find_rows));
  m.impl("commit_cuda", TORCH_BOX(&commit));
}
