// The kernels of csrc/cuda/decode_attention.cuh on a CPU, as csrc/cuda/attention.cu launches them, for test_attention_cuda.py.
#include "simt.h"

#include "../../csrc/cuda/decode_attention.cuh"

namespace {

template <dllm::Number kNumber, int EP>
int64_t run(dllm::DecodeArguments a, int slots) {
  using Tiles = dllm::DecodeTiles<EP>;
  const int heads = a.kv_heads * a.group;
  a.row_tiles = (a.Lq * a.group + Tiles::kRows - 1) / Tiles::kRows;
  const int64_t programs = a.B * a.kv_heads * a.row_tiles, rows = a.B * a.Lq * heads;
  a.splits = dllm::decode_splits(programs, (a.Lk + Tiles::kColumns - 1) / Tiles::kColumns, slots);
  std::vector<float> parts(a.splits > 1 ? a.splits * rows * (a.E + 1) : 0, NAN);
  a.parts = a.splits > 1 ? parts.data() : nullptr;
  a.part_lse = a.parts + a.splits * rows * a.E;
  for (int64_t i = 0; i < programs * a.splits; ++i) {
    std::fill(std::begin(dllm::dynamic_shared), std::end(dllm::dynamic_shared), 0xffff);
    blockIdx.x = i;
    simt::run_block(Tiles::kThreads, [&] { dllm::decode_attention_kernel<kNumber, EP>(a); });
  }
  for (int64_t i = 0; a.splits > 1 && i < (rows + 3) / 4; ++i) {
    blockIdx.x = i;
    simt::run_block(dllm::kCombineThreads,
                    [&] { dllm::combine_kernel<kNumber>(a.parts, a.part_lse, a.out, rows, a.E, a.splits); });
  }
  return a.splits;
}

}  // namespace

// sizes: B, Lq, Lk, kv_heads, group, E, block_length, slots. Returns the splits, or -1 if something is wrong.
extern "C" int64_t decode_attention(int bf16, const void* query, const void* key, const void* value, const bool* key_mask,
                                    const int64_t* cache_rows, void* out, const int64_t* strides, const int64_t* sizes,
                                    double scale, int64_t* bank_conflicts) {
  const auto data = [](const void* x) { return static_cast<const uint16_t*>(x); };
  dllm::DecodeArguments a{};
  a.query = data(query), a.key = data(key), a.value = data(value), a.out = static_cast<uint16_t*>(out);
  a.key_mask = key_mask, a.cache_rows = cache_rows;
  int64_t* const fields[] = {&a.q_batch, &a.q_row, &a.q_head, &a.k_batch, &a.k_row, &a.k_head, &a.v_batch, &a.v_row, &a.v_head};
  for (int i = 0; i < 9; ++i) *fields[i] = strides[i];
  a.B = sizes[0], a.Lq = sizes[1], a.Lk = sizes[2], a.kv_heads = sizes[3], a.group = sizes[4], a.E = sizes[5];
  a.block_length = sizes[6];
  a.scale = scale * 1.4426950408889634;
  const int slots = sizes[7];
  simt::bank_conflicts = 0;
  int64_t splits = -1;
  try {
    using dllm::Number;
    if (a.E <= 32) splits = bf16 ? run<Number::bf16, 32>(a, slots) : run<Number::fp16, 32>(a, slots);
    else if (a.E <= 64) splits = bf16 ? run<Number::bf16, 64>(a, slots) : run<Number::fp16, 64>(a, slots);
    else if (a.E <= 128) splits = bf16 ? run<Number::bf16, 128>(a, slots) : run<Number::fp16, 128>(a, slots);
    else splits = bf16 ? run<Number::bf16, 256>(a, slots) : run<Number::fp16, 256>(a, slots);
  } catch (const std::exception& error) {
    fprintf(stderr, "%s\n", error.what());
  }
  *bank_conflicts = simt::bank_conflicts;
  return splits;
}
