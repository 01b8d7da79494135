// Launches the kernels of decode_attention.cuh; the Python side has checked what may reach them.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <limits>

#include "../checks.h"
#include "../library.h"
#include "decode_attention.cuh"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "attention: ", cudaGetErrorString(error));
}

template <dllm::Number kNumber, int EP>
void launch(dllm::DecodeArguments a, const Tensor& q, Tensor& out) {
  using Tiles = dllm::DecodeTiles<EP>;
  const auto kernel = dllm::decode_attention_kernel<kNumber, EP>;
  const int device = q.get_device_index(), heads = a.kv_heads * a.group;
  const cudaStream_t stream = current_stream(q);
  int processors = 0;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tiles::kSharedBytes));
  a.row_tiles = (a.Lq * a.group + Tiles::kRows - 1) / Tiles::kRows;
  const int64_t programs = a.B * a.kv_heads * a.row_tiles;
  a.splits = dllm::decode_splits(programs, (a.Lk + Tiles::kColumns - 1) / Tiles::kColumns, 2 * processors);
  const int64_t rows = a.B * a.Lq * heads, grid = programs * a.splits;
  STD_TORCH_CHECK(grid <= std::numeric_limits<int>::max(), "attention: too many rows and heads for one launch");
  a.out = static_cast<uint16_t*>(out.mutable_data_ptr());
  if (a.splits == 1) {
    kernel<<<static_cast<unsigned>(grid), Tiles::kThreads, Tiles::kSharedBytes, stream>>>(a);
    return check(cudaGetLastError());
  }
  Tensor parts = torch::stable::new_empty(q, {a.splits * rows * (a.E + 1)}, ScalarType::Float);  // and their log2-sums
  a.parts = static_cast<float*>(parts.mutable_data_ptr());
  a.part_lse = a.parts + a.splits * rows * a.E;
  kernel<<<static_cast<unsigned>(grid), Tiles::kThreads, Tiles::kSharedBytes, stream>>>(a);
  check(cudaGetLastError());
  constexpr int kRowsInBlock = dllm::kCombineThreads / 32;
  dllm::combine_kernel<kNumber>
      <<<static_cast<unsigned>((rows + kRowsInBlock - 1) / kRowsInBlock), dllm::kCombineThreads, 0, stream>>>(
          a.parts, a.part_lse, a.out, rows, a.E, a.splits);
  check(cudaGetLastError());
}

template <dllm::Number kNumber>
void by_head_size(const dllm::DecodeArguments& a, const Tensor& q, Tensor& out) {
  if (a.E <= 32) return launch<kNumber, 32>(a, q, out);
  if (a.E <= 64) return launch<kNumber, 64>(a, q, out);
  if (a.E <= 128) return launch<kNumber, 128>(a, q, out);
  return launch<kNumber, 256>(a, q, out);
}

void decode_attention(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& key_mask,
                      const std::optional<Tensor>& cache_rows, int64_t block_length, double scale, Tensor out) {
  const bool bf16 = q.scalar_type() == ScalarType::BFloat16;
  for (const Tensor* x : {&q, &k, &v}) {
    dllm::check_rows(*x, 4, "q, k and v");
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(x->const_data_ptr()) % 16 == 0, "attention: want 16-byte alignment");
    STD_TORCH_CHECK(x->scalar_type() == q.scalar_type() && x->get_device_index() == q.get_device_index(),
                    "attention: want one dtype and device");
    for (int d = 0; d < 3; ++d)
      STD_TORCH_CHECK(x->size(d) <= 1 || x->stride(d) % 8 == 0, "attention: want strides that are multiples of 8");
  }
  STD_TORCH_CHECK(bf16 || q.scalar_type() == ScalarType::Half, "attention in CUDA takes bf16 and fp16");
  const int64_t B = q.size(0), Lq = q.size(1), heads = q.size(2), E = q.size(3), Lk = k.size(1), kv_heads = k.size(2);
  STD_TORCH_CHECK(E % 8 == 0 && E >= 8 && E <= 256 && Lk < (1 << 30) && Lq * heads < (1 << 30) && out.is_contiguous(),
                  "attention in CUDA: sizes out of range");
  if (B == 0 || Lq == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const auto data = [](const Tensor& x) { return static_cast<const uint16_t*>(x.const_data_ptr()); };
  dllm::DecodeArguments a{};
  a.query = data(q), a.key = data(k), a.value = data(v);
  if (key_mask) {
    STD_TORCH_CHECK(key_mask->is_contiguous() && key_mask->scalar_type() == ScalarType::Bool, "attention: want a bool mask");
    a.key_mask = static_cast<const bool*>(key_mask->const_data_ptr());
  }
  if (cache_rows) {
    STD_TORCH_CHECK(cache_rows->is_contiguous() && cache_rows->scalar_type() == ScalarType::Long, "attention: want int64 rows");
    a.cache_rows = static_cast<const int64_t*>(cache_rows->const_data_ptr());
  }
  a.q_batch = q.stride(0), a.q_row = q.stride(1), a.q_head = q.stride(2);
  a.k_batch = k.stride(0), a.k_row = k.stride(1), a.k_head = k.stride(2);
  a.v_batch = v.stride(0), a.v_row = v.stride(1), a.v_head = v.stride(2);
  a.B = B, a.Lq = static_cast<int>(Lq), a.Lk = static_cast<int>(Lk), a.E = static_cast<int>(E);
  a.kv_heads = static_cast<int>(kv_heads), a.group = static_cast<int>(heads / kv_heads);
  a.block_length = static_cast<int>(block_length);
  a.scale = static_cast<float>(scale * 1.4426950408889634);
  bf16 ? by_head_size<dllm::Number::bf16>(a, q, out) : by_head_size<dllm::Number::fp16>(a, q, out);
}

}  // namespace

DLLM_LIBRARY_IMPL(CUDA, m) { m.impl("decode_attention_cuda", TORCH_BOX(&decode_attention)); }
