// The kernels of csrc/cuda/cross_entropy_rows.cuh on a CPU, as csrc/cuda/masked_cross_entropy.cu launches them, for
// test_masked_cross_entropy_cuda.py.
#include "simt.h"

#include "../../csrc/cuda/cross_entropy_rows.cuh"

namespace {

void run(int64_t blocks, int threads, const std::function<void()>& body) {
  for (int64_t i = 0; i < blocks; ++i) {
    std::fill(std::begin(dllm::dynamic_shared), std::end(dllm::dynamic_shared), 0xffff);
    blockIdx.x = i;
    simt::run_block(threads, body);
  }
}

// call(T{}, whether capped). bytes of a number: 4 fp32, 2 bf16, 1 fp16.
template <typename Call>
int64_t by_type(int number, double softcap, const Call& call) {
  const auto with = [&](auto zero) { softcap > 0 ? call(zero, std::true_type{}) : call(zero, std::false_type{}); };
  try {
    if (number == 4) with(float{});
    else if (number == 2) with(dllm::BFloat16{});
    else with(dllm::Float16{});
    return 0;
  } catch (const std::exception& error) {
    fprintf(stderr, "%s\n", error.what());
    return -1;
  }
}

}  // namespace

// sizes: N, V, stride of the logits and, for gradients, of grad.
extern "C" int64_t statistics(int number, void* logits, const int64_t* targets, const bool* corrupted, const int64_t* sizes,
                              double softcap, float* top, float* total, float* target_logit) {
  return by_type(number, softcap, [&]<typename T, typename Capped>(T, Capped) {
    run(sizes[0], dllm::kRowThreads, [&] {
      dllm::statistics_kernel<T, Capped::value>(static_cast<T*>(logits), sizes[2], targets, corrupted, softcap, sizes[1], top,
                                                total, target_logit);
    });
  });
}

extern "C" int64_t gradients(int number, void* logits, const int64_t* targets, const bool* corrupted, const int64_t* sizes,
                             double softcap, const float* top, const float* probability, const float* target, void* grad) {
  return by_type(number, softcap, [&]<typename T, typename Capped>(T, Capped) {
    run(sizes[0], dllm::kRowThreads, [&] {
      dllm::gradients_kernel<T, Capped::value>(static_cast<T*>(logits), sizes[2], targets, corrupted, softcap, sizes[1], top,
                                               probability, target, static_cast<T*>(grad), sizes[3]);
    });
  });
}

// kept: packs of a row in shared memory.
extern "C" int64_t loss(int number, void* logits, const int64_t* targets, const float* scale, const float* probability_scale,
                        const int64_t* live, const int64_t* sizes, double softcap, int gradient, int clear, int64_t kept,
                        float* nll) {
  dllm::LossArguments a{};
  a.logits = logits, a.V = sizes[1], a.stride = sizes[2], a.targets = targets, a.scale = scale, a.live = live;
  a.probability_scale = probability_scale, a.softcap = softcap, a.gradient = gradient, a.clear = clear;
  a.kept = kept, a.nll = nll;
  return by_type(number, softcap, [&]<typename T, typename Capped>(T, Capped) {
    run(sizes[0], dllm::kLossThreads, [&] { dllm::loss_kernel<T, Capped::value>(a); });
  });
}
