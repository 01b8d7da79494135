// Cross-entropy of M rows of hidden states, and its gradients, without the logits (see dllm_kernels/masked_cross_entropy).
//
// The vocabulary is cut into tiles of 128 words. The logits of a tile and some rows lie in the cache, words by rows, so
// that a vector holds as many rows: maximum, exponentials and gradient need no sums across a vector.
//     statistics   z = w x;  top = max z, total = sum exp(z - top), and z at the target, kept per row
//     gradients    z again;  g = probability_scale exp(z - top) - target_scale [target];  grad_x += g w, grad_w = g x
// so a training step takes four products, and no more memory than the gradients. Threads share out the words; what they
// find of a row is put together in their order, so results do not vary from run to run.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "../checks.h"
#include "numbers.h"
#include "products.h"

namespace {

using dllm::exp_nonpositive;
using dllm::round_up;
using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kWords = 128;       // of a tile
constexpr int64_t kBlock = 192;       // rows whose logits are held at once: whole panels for every vector width
constexpr float kLowest = std::numeric_limits<float>::lowest();

// Memory aligned to vectors and cache lines.
class Buffer {
 public:
  explicit Buffer(int64_t size) : data_(static_cast<float*>(std::aligned_alloc(64, round_up(size, 16) * sizeof(float) + 64))) {
    STD_TORCH_CHECK(data_ != nullptr, "out of memory: ", size, " floats");
  }
  float* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(float* data) const { std::free(data); }
  };
  std::unique_ptr<float, Free> data_;
};

struct Head {
  const void* weight;  // [V, D], rows `stride` elements apart
  ScalarType dtype;
  int64_t V, D, stride;
  const float* bias;  // [V] or nullptr
  float softcap;      // 0: none
};

struct Rows {
  int64_t M;
  const float* x;  // [M, D]
  const int64_t* targets;
};

// What is known of some rows after the words seen so far.
struct Statistics {
  explicit Statistics(int64_t M) : top(M, kLowest), total(M, 0.0), target_logit(M, kLowest) {}
  std::vector<float> top;
  std::vector<double> total;
  std::vector<float> target_logit;
};

// The weights of a tile, fp32 [kWords, D], rows past the vocabulary zero.
DLLM_INLINE const float* read_words(const Head& head, int64_t first, int64_t words, float* buffer, int64_t* row) {
  if (head.dtype == ScalarType::Float && words == kWords) {
    *row = head.stride;
    return static_cast<const float*>(head.weight) + first * head.stride;
  }
  *row = head.D;
  for (int64_t v = 0; v < words; ++v) {
    const int64_t at = (first + v) * head.stride;
    float* to = buffer + v * head.D;
    if (head.dtype == ScalarType::Float) {
      dllm::convert(static_cast<const float*>(head.weight) + at, head.D, to);
    } else if (head.dtype == ScalarType::BFloat16) {
      dllm::convert(static_cast<const BFloat16*>(head.weight) + at, head.D, to);
    } else {
      dllm::convert(static_cast<const Half*>(head.weight) + at, head.D, to);
    }
  }
  std::fill(buffer + words * head.D, buffer + kWords * head.D, 0.0f);
  return buffer;
}

// z [kWords, kBlock], of `rows` rows from row `first_row` on: words first..first + words, bias and soft cap included.
template <int width>
DLLM_INLINE void logits_of_tile(const Head& head, const float* w, int64_t w_row, int64_t first, int64_t words,
                                const float* x_panels, int64_t first_row, int64_t rows, float* z) {
  dllm::multiply<width>(w, w_row, 1, kWords, x_panels + first_row * head.D, head.D, 0, head.D, rows, z, kBlock, false);
  if (head.bias)
    for (int64_t v = 0; v < words; ++v)
      for (int64_t n = 0; n < rows; ++n) z[v * kBlock + n] += head.bias[first + v];
  if (head.softcap > 0)
    for (int64_t v = 0; v < words; ++v)
      for (int64_t n = 0; n < rows; ++n) {
        const float value = z[v * kBlock + n] / head.softcap;
        const float e = exp_nonpositive(-2.0f * std::fabs(value)), tanh = (1.0f - e) / (1.0f + e);
        z[v * kBlock + n] = head.softcap * (value < 0 ? -tanh : tanh);
      }
}

template <int width>
DLLM_INLINE void find_statistics_of_width(const Head& head, const Rows& rows, const float* x_panels, int64_t begin,
                                          int64_t end, Statistics& stats) {
  const int64_t padded = round_up(rows.M, width);
  const Buffer staged(kWords * head.D), logits(kWords * kBlock);
  float* z = logits.get();
  float top[kBlock], sum[kBlock];
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first = tile * kWords, words = std::min(kWords, head.V - first);
    int64_t w_row;
    const float* w = read_words(head, first, words, staged.get(), &w_row);
    for (int64_t row = 0; row < rows.M; row += kBlock) {
      const int64_t count = std::min(kBlock, rows.M - row), wide = std::min(kBlock, padded - row);
      logits_of_tile<width>(head, w, w_row, first, words, x_panels, row, wide, z);
      for (int64_t n = 0; n < wide; ++n) top[n] = n < count ? stats.top[row + n] : kLowest;
      for (int64_t v = 0; v < words; ++v)
        for (int64_t n = 0; n < wide; ++n) top[n] = z[v * kBlock + n] > top[n] ? z[v * kBlock + n] : top[n];
      for (int64_t n = 0; n < wide; ++n) sum[n] = 0;
      for (int64_t v = 0; v < words; ++v)
        for (int64_t n = 0; n < wide; ++n) sum[n] += exp_nonpositive(z[v * kBlock + n] - top[n]);
      for (int64_t n = 0; n < count; ++n) {
        double& total = stats.total[row + n];
        if (stats.top[row + n] != top[n]) total *= std::exp(static_cast<double>(stats.top[row + n]) - top[n]);
        total += sum[n];
        stats.top[row + n] = top[n];
        const int64_t place = rows.targets[row + n] - first;
        if (place >= 0 && place < words) stats.target_logit[row + n] = z[place * kBlock + n];
      }
    }
  }
}

DLLM_BY_WIDTH(find_statistics, (const Head& head, const Rows& rows, const float* x_panels, int64_t begin, int64_t end,
                                Statistics& stats),
              (head, rows, x_panels, begin, end, stats))

struct Scales {
  const float *top, *probability, *target;  // [M] each
};

struct Gradients {
  float* x;         // [M, D padded] sums of one thread, or nullptr
  float* weight;    // [V, D] or nullptr
  float* bias;      // [V] or nullptr
  bool add_weight;  // to what is there
};

template <int width>
DLLM_INLINE void find_gradients_of_width(const Head& head, const Rows& rows, const Scales& scales, const float* x_turned,
                                         const float* x_panels, int64_t begin, int64_t end, const Gradients& out) {
  const int64_t D = head.D, wide_D = round_up(D, width), padded = round_up(rows.M, width);
  const Buffer staged(kWords * D), w_panels(kWords * wide_D), w_gradient(kWords * wide_D), logits(kWords * kBlock);
  float* z = logits.get();
  float top[kBlock], scale[kBlock], target_scale[kBlock];
  int64_t place[kBlock];  // of the target in the tile
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first = tile * kWords, words = std::min(kWords, head.V - first);
    int64_t w_row;
    const float* w = read_words(head, first, words, staged.get(), &w_row);
    if (out.x) dllm::pack<width>(w, w_row, 1, kWords, D, kWords, wide_D, w_panels.get());
    for (int64_t row = 0; row < rows.M; row += kBlock) {
      const int64_t count = std::min(kBlock, rows.M - row), wide = std::min(kBlock, padded - row);
      logits_of_tile<width>(head, w, w_row, first, words, x_turned, row, wide, z);
      for (int64_t n = 0; n < wide; ++n) {
        top[n] = n < count ? scales.top[row + n] : 0;
        scale[n] = n < count ? scales.probability[row + n] : 0;
        target_scale[n] = 0;
        place[n] = n < count ? rows.targets[row + n] - first : -1;
        if (place[n] < 0 || place[n] >= words) continue;
        const float capped = head.softcap > 0 ? z[place[n] * kBlock + n] / head.softcap : 0;
        target_scale[n] = scales.target[row + n] * (1.0f - capped * capped);
      }
      for (int64_t v = 0; v < words; ++v) {
        float* here = z + v * kBlock;
        if (head.softcap > 0) {
          for (int64_t n = 0; n < wide; ++n) {
            const float value = here[n] / head.softcap;
            here[n] = scale[n] * exp_nonpositive(here[n] - top[n]) * (1.0f - value * value);
          }
        } else {
          for (int64_t n = 0; n < wide; ++n) here[n] = scale[n] * exp_nonpositive(here[n] - top[n]);
        }
      }
      std::fill(z + words * kBlock, z + kWords * kBlock, 0.0f);
      for (int64_t v = 0; v < words; ++v) std::fill(z + v * kBlock + count, z + v * kBlock + wide, 0.0f);
      for (int64_t n = 0; n < count; ++n)
        if (place[n] >= 0 && place[n] < words) z[place[n] * kBlock + n] -= target_scale[n];
      if (out.bias)
        for (int64_t v = 0; v < words; ++v) {
          float sum = 0;
          for (int64_t n = 0; n < count; ++n) sum += z[v * kBlock + n];
          out.bias[first + v] += sum;
        }
      if (out.x)
        dllm::multiply<width>(z, 1, kBlock, wide, w_panels.get(), kWords, 0, kWords, wide_D, out.x + row * wide_D, wide_D,
                              true);
      if (out.weight)
        dllm::multiply<width>(z, kBlock, 1, kWords, x_panels, padded, row, wide, wide_D, w_gradient.get(), wide_D, row > 0);
    }
    if (out.weight)
      for (int64_t v = 0; v < words; ++v) {
        const float* from = w_gradient.get() + v * wide_D;
        float* to = out.weight + (first + v) * D;
        if (out.add_weight) {
          for (int64_t d = 0; d < D; ++d) to[d] += from[d];
        } else {
          std::memcpy(to, from, D * sizeof(float));
        }
      }
  }
}

DLLM_BY_WIDTH(find_gradients, (const Head& head, const Rows& rows, const Scales& scales, const float* x_turned,
                               const float* x_panels, int64_t begin, int64_t end, const Gradients& out),
              (head, rows, scales, x_turned, x_panels, begin, end, out))

// The rows turned (a panel holds rows side by side, [D x rows]) or as they are ([rows x D]).
template <int width>
DLLM_INLINE void pack_rows_of_width(const Rows& rows, int64_t D, bool turned, float* panels) {
  const int64_t padded = round_up(rows.M, width), wide_D = round_up(D, width);
  if (turned) {
    dllm::pack<width>(rows.x, 1, D, D, rows.M, D, padded, panels);
  } else {
    dllm::pack<width>(rows.x, D, 1, rows.M, D, padded, wide_D, panels);
  }
}

DLLM_BY_WIDTH(pack_rows, (const Rows& rows, int64_t D, bool turned, float* panels), (rows, D, turned, panels))

template <int width>
DLLM_INLINE void width_of_width(int& out) {
  out = width;
}

DLLM_BY_WIDTH(width, (int& out), (out))

int vector_width() {
  int out;
  width(out);
  return out;
}

Head describe_head(const Tensor& weight, const std::optional<Tensor>& bias, double softcap) {
  dllm::check_rows(weight, 2, "weight");
  const auto dtype = weight.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "masked cross-entropy on the CPU takes fp32, bf16 and fp16 weights");
  return {weight.const_data_ptr(), dtype, weight.size(0), weight.size(1), weight.stride(0),
          bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr, static_cast<float>(softcap)};
}

Rows describe_rows(const Tensor& x, const Tensor& targets, const Head& head) {
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous() && x.scalar_type() == ScalarType::Float && x.size(1) == head.D &&
                      targets.size(0) == x.size(0),
                  "masked cross-entropy on the CPU takes fp32 rows, as long as those of the weight, and a target for each");
  return {x.size(0), static_cast<const float*>(x.const_data_ptr()), static_cast<const int64_t*>(targets.const_data_ptr())};
}

// Parts of the work, in order, whoever did them.
template <typename Part>
class Parts {
 public:
  void add(int64_t begin, Part part) {
    const std::lock_guard<std::mutex> guard(lock_);
    const auto place = std::find_if(parts_.begin(), parts_.end(), [&](const auto& other) { return other.first > begin; });
    parts_.insert(place, {begin, std::move(part)});
  }
  const std::vector<std::pair<int64_t, Part>>& in_order() const { return parts_; }

 private:
  std::mutex lock_;
  std::vector<std::pair<int64_t, Part>> parts_;
};

void linear_statistics(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, const Tensor& targets,
                       double softcap, Tensor top, Tensor total, Tensor target_logit) {
  const Head head = describe_head(weight, bias, softcap);
  const Rows rows = describe_rows(x, targets, head);
  const Buffer x_turned(round_up(rows.M, vector_width()) * head.D);
  pack_rows(rows, head.D, true, x_turned.get());
  Parts<Statistics> parts;
  torch::stable::parallel_for(0, (head.V + kWords - 1) / kWords, 1, [&](int64_t begin, int64_t end) {
    Statistics mine(rows.M);
    find_statistics(head, rows, x_turned.get(), begin, end, mine);
    parts.add(begin, std::move(mine));
  });
  auto *tops = static_cast<float*>(top.mutable_data_ptr()), *totals = static_cast<float*>(total.mutable_data_ptr());
  auto* logits = static_cast<float*>(target_logit.mutable_data_ptr());
  for (int64_t n = 0; n < rows.M; ++n) {
    float highest = kLowest, logit = kLowest;
    for (const auto& [_, part] : parts.in_order()) {
      highest = std::max(highest, part.top[n]);
      // Only the thread that has the target's word has found it; a NaN is to be seen too.
      if (part.target_logit[n] != kLowest) logit = part.target_logit[n];
    }
    double sum = 0;
    for (const auto& [_, part] : parts.in_order())
      sum += part.total[n] * std::exp(static_cast<double>(part.top[n]) - highest);
    tops[n] = highest, totals[n] = static_cast<float>(sum), logits[n] = logit;
  }
}

void linear_gradients(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, const Tensor& targets,
                      double softcap, const Tensor& top, const Tensor& probability_scale, const Tensor& target_scale,
                      std::optional<Tensor> grad_x, std::optional<Tensor> grad_weight, std::optional<Tensor> grad_bias,
                      bool add) {
  const Head head = describe_head(weight, bias, softcap);
  const Rows rows = describe_rows(x, targets, head);
  const int64_t padded = round_up(rows.M, vector_width()), wide_D = round_up(head.D, vector_width());
  const Buffer x_turned(padded * head.D), x_panels(grad_weight ? padded * wide_D : 0);
  pack_rows(rows, head.D, true, x_turned.get());
  if (grad_weight) pack_rows(rows, head.D, false, x_panels.get());
  const auto pointer = [](const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); };
  const auto out = [](std::optional<Tensor>& tensor) {
    return tensor ? static_cast<float*>(tensor->mutable_data_ptr()) : nullptr;
  };
  const Scales scales{pointer(top), pointer(probability_scale), pointer(target_scale)};
  Parts<Buffer> parts;
  torch::stable::parallel_for(0, (head.V + kWords - 1) / kWords, 1, [&](int64_t begin, int64_t end) {
    Buffer mine(grad_x ? padded * wide_D : 0);
    if (grad_x) std::fill(mine.get(), mine.get() + padded * wide_D, 0.0f);
    find_gradients(head, rows, scales, x_turned.get(), x_panels.get(), begin, end,
                   {grad_x ? mine.get() : nullptr, out(grad_weight), out(grad_bias), add});
    if (grad_x) parts.add(begin, std::move(mine));
  });
  if (!grad_x) return;
  float* to = out(grad_x);
  for (int64_t n = 0; n < rows.M; ++n)
    for (int64_t d = 0; d < head.D; ++d) {
      float sum = 0;
      for (const auto& [_, part] : parts.in_order()) sum += part.get()[n * wide_D + d];
      to[n * head.D + d] = sum;
    }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dllm_kernels_native, CPU, m) {
  m.impl("linear_cross_entropy_statistics_cpu", TORCH_BOX(&linear_statistics));
  m.impl("linear_cross_entropy_gradients_cpu", TORCH_BOX(&linear_gradients));
}
