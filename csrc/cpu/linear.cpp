// logits [M, V] = hidden [M, D] weight[V, D]^T + bias, stored.
#include "linear.h"

#include "../library.h"
#include "parallel.h"

namespace {

using torch::stable::Tensor;

constexpr int64_t kWordsPerTask = 512;

void linear_rows(const Tensor& hidden, const Tensor& weight, std::optional<Tensor> bias, Tensor logits) {
  dllm::check_rows(weight, 2, "weight");
  dllm::check_rows(logits, 2, "logits");
  STD_TORCH_CHECK(hidden.is_contiguous() && hidden.size(1) == weight.size(1) && logits.size(0) == hidden.size(0) &&
                      logits.size(1) == weight.size(0),
                  "linear_rows_cpu: shapes disagree");
  const dllm::Head head = dllm::describe_head(weight, bias, 0);
  const auto* x = static_cast<const float*>(hidden.const_data_ptr());
  auto* out = static_cast<float*>(logits.mutable_data_ptr());
  for (int64_t row = 0; row < hidden.size(0); row += dllm::kBlock) {
    const dllm::Product product(head, x + row * head.D, std::min(dllm::kBlock, hidden.size(0) - row));
    const int64_t tasks = (head.V + kWordsPerTask - 1) / kWordsPerTask, stride = logits.stride(0);
    dllm::parallel_for(0, tasks, [&](int64_t begin, int64_t end) {
      dllm::Product::Workspace work(product);
      for (int64_t first = begin * kWordsPerTask; first < std::min(end * kWordsPerTask, head.V); first += kWordsPerTask)
        product.logits(first, std::min(first + kWordsPerTask, head.V), work, out + row * stride + first, stride);
    });
  }
}

}  // namespace

DLLM_LIBRARY_IMPL(CPU, m) { m.impl("linear_rows_cpu", TORCH_BOX(&linear_rows)); }
