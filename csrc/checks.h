// Preconditions that the Python side has promised; a failure here is a defect of ours, not of the user's input.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

namespace dllm {

inline void check_rows(const torch::stable::Tensor& tensor, int64_t dims, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == dims && tensor.stride(dims - 1) == 1, name, ": want ", dims,
                  " dimensions, the last contiguous");
}

}  // namespace dllm
