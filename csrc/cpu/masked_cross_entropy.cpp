// Cross-entropy of M rows and its gradients (see dllm_kernels/masked_cross_entropy): from logits, with one pass over
// them forward and one backward; and from hidden states, without stored logits.
//
// From hidden states, the vocabulary is cut into tiles of 128 words. The logits of a tile and some rows lie in the
// cache, words by rows. A vector holds one number of each row, so maximum, exponentials and gradient need no sum across
// it.
//     statistics   z = w x;  top = max z, total = sum exp(z - top), and z at the target, kept per row
//     gradients    z again;  g = probability_scale exp(z - top) - target_scale [target];  grad_x += g w, grad_w = g x
// A training step takes four products, and no more memory than the gradients. Threads divide the words; their parts of
// a row are combined in order, so results do not vary from run to run.

#include <cmath>
#include <limits>
#include <mutex>
#include <optional>
#include <vector>

#include "../library.h"
#include "head.h"
#include "parallel.h"

namespace {

using dllm::Buffer;
using dllm::exp_nonpositive;
using dllm::Head;
using dllm::kBlock;
using dllm::kWords;
using dllm::round_up;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr float kLowest = std::numeric_limits<float>::lowest();

struct Rows {
  int64_t M;
  const float* x;          // [M, D]
  const int64_t* at;       // [M], their positions in what has one number for each position
  const int64_t* targets;  // [N]
};

// Statistics of some rows over the words read so far.
struct Statistics {
  explicit Statistics(int64_t M) : top(M, kLowest), total(M, 0.0), target_logit(M, kLowest) {}
  std::vector<float> top;
  std::vector<double> total;
  std::vector<float> target_logit;
};

template <int width>
DLLM_INLINE void find_statistics_of_width(const Head& head, const Rows& rows, const float* x_turned, int64_t begin,
                                          int64_t end, Statistics& stats) {
  const int64_t padded = round_up(rows.M, width);
  const Buffer staged(kWords * head.D), logits(kWords * kBlock);
  float* z = logits.get();
  float top[kBlock], sum[kBlock];
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first = tile * kWords, words = std::min(kWords, head.V - first);
    int64_t w_row;
    const float* w = dllm::read_words(head, first, words, staged.get(), &w_row);
    for (int64_t row = 0; row < rows.M; row += kBlock) {
      const int64_t count = std::min(kBlock, rows.M - row), wide = std::min(kBlock, padded - row);
      dllm::logits_of_tile<width>(head, w, w_row, first, words, x_turned, row, wide, z);
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
        const int64_t place = rows.targets[rows.at[row + n]] - first;
        if (place >= 0 && place < words) stats.target_logit[row + n] = z[place * kBlock + n];
      }
    }
  }
}

DLLM_BY_WIDTH(find_statistics, (const Head& head, const Rows& rows, const float* x_turned, int64_t begin, int64_t end,
                                Statistics& stats),
              (head, rows, x_turned, begin, end, stats))

struct Scales {
  const float *top, *probability, *target;  // [N] each
};

struct Gradients {
  float* x;         // [M, D padded] sums of one thread, or nullptr
  float* weight;    // [V, D] or nullptr
  float* bias;      // [V] or nullptr
  bool add_weight;  // add to the weight's gradient instead of replacing it
};

template <int width>
DLLM_INLINE void find_gradients_of_width(const Head& head, const Rows& rows, const Scales& scales,
                                         const float* x_turned, const float* x_panels, int64_t begin,
                                         int64_t end, const Gradients& out) {
  const int64_t D = head.D, wide_D = round_up(D, width), padded = round_up(rows.M, width);
  const Buffer staged(kWords * D), w_panels(kWords * wide_D), w_gradient(kWords * wide_D), logits(kWords * kBlock);
  float* z = logits.get();
  float top[kBlock], scale[kBlock], target_scale[kBlock];
  int64_t place[kBlock];  // of the target in the tile
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first = tile * kWords, words = std::min(kWords, head.V - first);
    int64_t w_row;
    const float* w = dllm::read_words(head, first, words, staged.get(), &w_row);
    if (out.x) dllm::pack<width>(w, w_row, 1, kWords, D, kWords, wide_D, w_panels.get());
    for (int64_t row = 0; row < rows.M; row += kBlock) {
      const int64_t count = std::min(kBlock, rows.M - row), wide = std::min(kBlock, padded - row);
      dllm::logits_of_tile<width>(head, w, w_row, first, words, x_turned, row, wide, z);
      for (int64_t n = 0; n < wide; ++n) {
        const int64_t at = n < count ? rows.at[row + n] : 0;
        top[n] = n < count ? scales.top[at] : 0;
        scale[n] = n < count ? scales.probability[at] : 0;
        target_scale[n] = 0;
        place[n] = n < count ? rows.targets[at] - first : -1;
        if (place[n] < 0 || place[n] >= words) continue;
        const float capped = head.softcap > 0 ? z[place[n] * kBlock + n] / head.softcap : 0;
        target_scale[n] = scales.target[at] * (1.0f - capped * capped);
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
        std::fill(here + count, here + wide, 0.0f);
      }
      for (int64_t v = words; v < kWords; ++v) std::fill(z + v * kBlock, z + v * kBlock + wide, 0.0f);
      for (int64_t n = 0; n < count; ++n)
        if (place[n] >= 0 && place[n] < words) z[place[n] * kBlock + n] -= target_scale[n];
      if (out.bias)
        for (int64_t v = 0; v < words; ++v) {
          float sum = 0;
          for (int64_t n = 0; n < count; ++n) sum += z[v * kBlock + n];
          out.bias[first + v] += sum;
        }
      if (out.x)
        dllm::multiply<width>(z, 1, kBlock, wide, w_panels.get(), kWords, 0, kWords, wide_D, out.x + row * wide_D,
                              wide_D, true);
      if (out.weight)
        dllm::multiply<width>(z, kBlock, 1, kWords, x_panels, padded, row, wide, wide_D, w_gradient.get(), wide_D,
                              row > 0);
    }
    if (!out.weight || rows.M == 0) continue;
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

Rows describe_rows(const Tensor& x, const Tensor& at, const Tensor& targets, const Head& head) {
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous() && x.scalar_type() == ScalarType::Float && x.size(1) == head.D &&
                      at.size(0) == x.size(0),
                  "masked cross-entropy on the CPU takes fp32 rows as long as the weight's, and a position for each");
  return {x.size(0), static_cast<const float*>(x.const_data_ptr()), static_cast<const int64_t*>(at.const_data_ptr()),
          static_cast<const int64_t*>(targets.const_data_ptr())};
}

// Parts of the work in the order of their beginnings, whichever thread did them.
template <typename Part>
class Parts {
 public:
  void add(int64_t begin, Part part) {
    const std::lock_guard<std::mutex> guard(lock_);
    const auto place =
        std::find_if(parts_.begin(), parts_.end(), [&](const auto& other) { return other.first > begin; });
    parts_.insert(place, {begin, std::move(part)});
  }
  const std::vector<std::pair<int64_t, Part>>& in_order() const { return parts_; }

 private:
  std::mutex lock_;
  std::vector<std::pair<int64_t, Part>> parts_;
};

void linear_statistics(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, const Tensor& at,
                       const Tensor& targets, double softcap, Tensor top, Tensor total, Tensor target_logit) {
  const Head head = dllm::describe_head(weight, bias, softcap);
  const Rows rows = describe_rows(x, at, targets, head);
  const Buffer x_turned(round_up(rows.M, dllm::vector_width()) * head.D);
  dllm::pack_rows(rows.x, rows.M, head.D, true, x_turned.get());
  Parts<Statistics> parts;
  dllm::parallel_for(0, (head.V + kWords - 1) / kWords, [&](int64_t begin, int64_t end) {
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
      // Only the thread that has the target's word sets its logit, possibly to NaN.
      if (part.target_logit[n] != kLowest) logit = part.target_logit[n];
    }
    double sum = 0;
    for (const auto& [_, part] : parts.in_order())
      sum += part.total[n] * std::exp(static_cast<double>(part.top[n]) - highest);
    tops[rows.at[n]] = highest, totals[rows.at[n]] = static_cast<float>(sum), logits[rows.at[n]] = logit;
  }
}

void linear_gradients(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, const Tensor& at,
                      const Tensor& targets, double softcap, const Tensor& top, const Tensor& probability_scale,
                      const Tensor& target_scale, std::optional<Tensor> grad_x, std::optional<Tensor> grad_weight,
                      std::optional<Tensor> grad_bias, bool add) {
  const Head head = dllm::describe_head(weight, bias, softcap);
  const Rows rows = describe_rows(x, at, targets, head);
  const int64_t padded = round_up(rows.M, dllm::vector_width()), wide_D = round_up(head.D, dllm::vector_width());
  const Buffer x_turned(padded * head.D), x_panels(grad_weight ? padded * wide_D : 0);
  dllm::pack_rows(rows.x, rows.M, head.D, true, x_turned.get());
  if (grad_weight) dllm::pack_rows(rows.x, rows.M, head.D, false, x_panels.get());
  const auto pointer = [](const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); };
  const auto out = [](std::optional<Tensor>& tensor) {
    return tensor ? static_cast<float*>(tensor->mutable_data_ptr()) : nullptr;
  };
  const Scales scales{pointer(top), pointer(probability_scale), pointer(target_scale)};
  Parts<Buffer> parts;
  dllm::parallel_for(0, (head.V + kWords - 1) / kWords, [&](int64_t begin, int64_t end) {
    Buffer mine(grad_x ? padded * wide_D : 0);
    if (grad_x) std::fill(mine.get(), mine.get() + padded * wide_D, 0.0f);
    find_gradients(head, rows, scales, x_turned.get(), x_panels.get(), begin, end,
                   {grad_x ? mine.get() : nullptr, out(grad_weight), out(grad_bias), add});
    if (grad_x) parts.add(begin, std::move(mine));
  });
  if (!grad_x) return;
  const dllm::FlushDenormals flush;
  float* to = out(grad_x);
  for (int64_t n = 0; n < rows.M; ++n)
    for (int64_t d = 0; d < head.D; ++d) {
      float sum = 0;
      for (const auto& [_, part] : parts.in_order()) sum += part.get()[n * wide_D + d];
      to[n * head.D + d] = sum;
    }
}

struct Logits {
  const void* data;  // [N, V], rows `stride` elements apart
  ScalarType dtype;
  int64_t V, stride;
  float softcap;  // 0: none
  const int64_t *rows, *targets;  // [M] and [N]
};

constexpr int64_t kPart = 1024;  // logits of a row processed at once, in the cache

// fp32 logits first..first + count of a row, capped; in `buffer` unless they can be read in place.
DLLM_INLINE const float* read_part(const Logits& logits, int64_t row, int64_t first, int64_t count, float* buffer) {
  const int64_t at = row * logits.stride + first;
  const float* x = buffer;
  if (logits.dtype == ScalarType::Float) {
    x = static_cast<const float*>(logits.data) + at;
  } else if (logits.dtype == ScalarType::BFloat16) {
    dllm::convert(static_cast<const dllm::BFloat16*>(logits.data) + at, count, buffer);
  } else {
    dllm::convert(static_cast<const dllm::Half*>(logits.data) + at, count, buffer);
  }
  if (logits.softcap == 0) return x;
  dllm::cap(x, count, logits.softcap, buffer);
  return buffer;
}

template <int width>
DLLM_INLINE void statistics_of_row_of_width(const Logits& logits, int64_t m, float* top_out, float* total_out,
                                            float* target_logit) {
  constexpr int lanes = 2 * width;
  alignas(64) float buffer[kPart];
  float top = kLowest;
  double total = 0;
  for (int64_t first = 0; first < logits.V; first += kPart) {
    const int64_t count = std::min(kPart, logits.V - first);
    const float* x = read_part(logits, logits.rows[m], first, count, buffer);
    float highest[lanes], sums[lanes] = {};
    for (int j = 0; j < lanes; ++j) highest[j] = top;
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes)
      for (int j = 0; j < lanes; ++j) highest[j] = x[i + j] > highest[j] ? x[i + j] : highest[j];
    for (int j = 0; i + j < count; ++j) highest[j] = x[i + j] > highest[j] ? x[i + j] : highest[j];
    const float before = top;
    for (int j = 0; j < lanes; ++j) top = highest[j] > top ? highest[j] : top;
    if (top != before) total *= std::exp(static_cast<double>(before) - top);
    for (i = 0; i + lanes <= count; i += lanes)
      for (int j = 0; j < lanes; ++j) sums[j] += exp_nonpositive(x[i + j] - top);
    for (int j = 0; i + j < count; ++j) sums[j] += exp_nonpositive(x[i + j] - top);
    for (int j = 0; j < lanes; ++j) total += sums[j];
    const int64_t place = logits.targets[logits.rows[m]] - first;
    if (place >= 0 && place < count) *target_logit = x[place];
  }
  *top_out = top;
  *total_out = static_cast<float>(total);
}

DLLM_BY_WIDTH(statistics_of_row, (const Logits& logits, int64_t m, float* top, float* total, float* target_logit),
              (logits, m, top, total, target_logit))

template <int width>
DLLM_INLINE void gradients_of_row_of_width(const Logits& logits, int64_t m, const Scales& scales, void* out,
                                           int64_t out_stride) {
  alignas(64) float buffer[kPart], gradient[kPart];
  const int64_t row = logits.rows[m];
  const float top = scales.top[row], scale = scales.probability[row];
  for (int64_t first = 0; first < logits.V; first += kPart) {
    const int64_t count = std::min(kPart, logits.V - first), at = row * out_stride + first;
    const float* x = read_part(logits, row, first, count, buffer);
    float* g = logits.dtype == ScalarType::Float ? static_cast<float*>(out) + at : gradient;
    for (int64_t i = 0; i < count; ++i) g[i] = scale * exp_nonpositive(x[i] - top);
    const int64_t place = logits.targets[row] - first;
    if (place >= 0 && place < count) g[place] -= scales.target[row];
    if (logits.softcap > 0)
      for (int64_t i = 0; i < count; ++i) g[i] *= 1.0f - (x[i] / logits.softcap) * (x[i] / logits.softcap);
    if (logits.dtype == ScalarType::BFloat16) dllm::narrow(g, count, static_cast<dllm::BFloat16*>(out) + at);
    if (logits.dtype == ScalarType::Half) dllm::narrow(g, count, static_cast<dllm::Half*>(out) + at);
  }
}

DLLM_BY_WIDTH(gradients_of_row, (const Logits& logits, int64_t m, const Scales& scales, void* out, int64_t out_stride),
              (logits, m, scales, out, out_stride))

Logits describe_logits(const Tensor& logits, const Tensor& rows, const Tensor& targets, double softcap) {
  dllm::check_rows(logits, 2, "logits");
  const auto dtype = logits.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "masked cross-entropy on the CPU takes fp32, bf16 and fp16 logits");
  return {logits.const_data_ptr(), dtype, logits.size(1), logits.stride(0), static_cast<float>(softcap),
          static_cast<const int64_t*>(rows.const_data_ptr()), static_cast<const int64_t*>(targets.const_data_ptr())};
}

void statistics(const Tensor& logits, const Tensor& rows, const Tensor& targets, double softcap, Tensor top,
                Tensor total, Tensor target_logit) {
  const Logits from = describe_logits(logits, rows, targets, softcap);
  auto *tops = static_cast<float*>(top.mutable_data_ptr()), *totals = static_cast<float*>(total.mutable_data_ptr());
  auto* target_logits = static_cast<float*>(target_logit.mutable_data_ptr());
  dllm::parallel_for(0, rows.size(0), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const int64_t row = from.rows[m];
      statistics_of_row(from, m, tops + row, totals + row, target_logits + row);
    }
  });
}

void gradients(const Tensor& logits, const Tensor& rows, const Tensor& targets, double softcap, const Tensor& top,
               const Tensor& probability_scale, const Tensor& target_scale, Tensor grad) {
  const Logits from = describe_logits(logits, rows, targets, softcap);
  const auto pointer = [](const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); };
  const Scales scales{pointer(top), pointer(probability_scale), pointer(target_scale)};
  dllm::check_rows(grad, 2, "grad");
  dllm::parallel_for(0, rows.size(0), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) gradients_of_row(from, m, scales, grad.mutable_data_ptr(), grad.stride(0));
  });
}

}  // namespace

DLLM_LIBRARY_IMPL(CPU, m) {
  m.impl("cross_entropy_statistics_cpu", TORCH_BOX(&statistics));
  m.impl("cross_entropy_gradients_cpu", TORCH_BOX(&gradients));
  m.impl("linear_cross_entropy_statistics_cpu", TORCH_BOX(&linear_statistics));
  m.impl("linear_cross_entropy_gradients_cpu", TORCH_BOX(&linear_gradients));
}
