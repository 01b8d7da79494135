// The kernels of csrc/cuda/score_rows.cuh on a CPU, as csrc/cuda/topk_unmask.cu launches them, for test_topk_unmask_cuda.py.
#include "simt.h"

#include "../../csrc/cuda/score_rows.cuh"

namespace {

using dllm::Measure;

void run(int64_t blocks, int threads, const std::function<void()>& body) {
  for (int64_t i = 0; i < blocks; ++i) {
    std::fill(std::begin(dllm::dynamic_shared), std::end(dllm::dynamic_shared), 0xffff);
    blockIdx.x = i;
    simt::run_block(threads, body);
  }
}

template <typename T, Measure kMeasure>
void score(const dllm::ScoreArguments& a, int64_t n, bool raw) {
  const bool restricted = a.allowed || a.filtered;
  run(n, dllm::kScoreThreads, [&] {
    if (raw) restricted ? dllm::score_rows_kernel<T, kMeasure, true, true>(a) : dllm::score_rows_kernel<T, kMeasure, true, false>(a);
    else restricted ? dllm::score_rows_kernel<T, kMeasure, false, true>(a) : dllm::score_rows_kernel<T, kMeasure, false, false>(a);
  });
}

template <typename T>
void score(const dllm::ScoreArguments& a, int64_t n, int confidence, bool raw) {
  if (confidence == 1) score<T, Measure::margin>(a, n, raw);
  else if (confidence == 2) score<T, Measure::entropy>(a, n, raw);
  else score<T, Measure::prob>(a, n, raw);
}

int64_t outcome(const std::function<void()>& body) {
  try {
    body();
    return 0;
  } catch (const std::exception& error) {
    fprintf(stderr, "%s\n", error.what());
    return -1;
  }
}

}  // namespace

// bytes of a number: 4 fp32, 2 bf16, 1 fp16. sizes: n, R, V, stride, stride of allowed, top_k.
extern "C" int64_t score_rows(int number, const void* logits, const int64_t* rows, const double* uniform,
                              const uint32_t* allowed, int64_t* token, float* score_of, const int64_t* sizes, int confidence,
                              int filtered, int raw, double temperature, double top_p) {
  dllm::ScoreArguments a{};
  a.logits = logits, a.rows = rows, a.uniform = uniform, a.allowed = allowed, a.token = token, a.score = score_of;
  a.R = sizes[1], a.V = static_cast<int>(sizes[2]), a.stride = sizes[3], a.allowed_stride = sizes[4], a.top_k = sizes[5];
  a.temperature = static_cast<float>(temperature), a.top_p = top_p, a.filtered = filtered, a.random = confidence == 3;
  return outcome([&] {
    if (number == 4) score<float>(a, sizes[0], confidence, raw);
    else if (number == 2) score<dllm::BFloat16>(a, sizes[0], confidence, raw);
    else score<dllm::Float16>(a, sizes[0], confidence, raw);
  });
}

extern "C" int64_t find_rows(const int64_t* tokens, int64_t mask_token_id, int64_t n, int packed, bool* masked, int64_t* rows) {
  return outcome([&] {
    run((n + dllm::kFindThreads - 1) / dllm::kFindThreads, dllm::kFindThreads,
        [&] { dllm::find_rows_kernel(tokens, mask_token_id, n, packed, masked, rows); });
  });
}

extern "C" int64_t commit(const int64_t* tokens, const bool* masked, const int64_t* token, const float* confidence,
                          const int64_t* k, const double* uniform, double temperature, int has_threshold, double threshold,
                          int64_t B, int64_t L, int64_t* filled, bool* committed) {
  dllm::CommitArguments a{};
  a.tokens = tokens, a.masked = masked, a.token = token, a.confidence = confidence, a.k = k, a.uniform = uniform;
  a.temperature = temperature, a.has_threshold = has_threshold, a.threshold = static_cast<float>(threshold);
  a.L = L, a.tiles = (L + dllm::kCommitThreads - 1) / dllm::kCommitThreads, a.filled = filled, a.committed = committed;
  return outcome([&] { run(B * a.tiles, dllm::kCommitThreads, [&] { dllm::commit_kernel(a); }); });
}
