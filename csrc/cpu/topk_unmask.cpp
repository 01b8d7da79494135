// Token and confidence of rows of logits (see dllm_kernels/topk_unmask).
//
// A row of V logits is read block by block: a block fits the first-level cache, so its maximum and then its sums are
// one pass over memory. The sums are relative to the running maximum m and rescaled when it rises:
//     s = sum exp(x - m),   t = sum exp(x - m) (x - m),   entropy: sum p log p = t / s - log s
// Sampling at u takes the first token whose cumulative sum passes u * s; the sums per block tell the block, and only
// that one is read again. top-p and top-k need no sort of the row: a histogram over m - x (1,024 bins) locates the bin
// where each bound falls, and only the elements of that bin are sorted. A NaN makes s, and so the confidence, NaN.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

#include "../checks.h"
#include "../vectorised.h"
#include "numbers.h"

namespace {

using dllm::exp_nonpositive;
using torch::stable::Tensor;

constexpr int64_t kBlock = 1024;  // elements; three fp32 blocks are 12 KB
constexpr int kLanes = 32;        // independent accumulators: two to four vectors, so that additions overlap
constexpr int kBins = 1024;
constexpr float kBinsPerUnit = 32.0f;  // bins span 32 units of logit; what is smaller than exp(-32) shares the last bin
constexpr float kInfinity = std::numeric_limits<float>::infinity();

enum Confidence { kProb, kMargin, kEntropy, kRandom };

struct Settings {
  Confidence confidence;
  float temperature;
  int64_t top_k;
  double top_p;
  bool raw;
};

DLLM_VECTORISED float block_maximum(const float* x, int64_t n) {
  float lanes[kLanes];
  for (int j = 0; j < kLanes; ++j) lanes[j] = -kInfinity;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int j = 0; j < kLanes; ++j) lanes[j] = x[i + j] > lanes[j] ? x[i + j] : lanes[j];
  for (int j = 0; i < n; ++i, ++j) lanes[j] = x[i] > lanes[j] ? x[i] : lanes[j];
  float top = lanes[0];
  for (int j = 1; j < kLanes; ++j) top = lanes[j] > top ? lanes[j] : top;
  return top;
}

// s = sum exp(x - m)
DLLM_VECTORISED double block_sum(const float* x, int64_t n, float m) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int j = 0; j < kLanes; ++j) lanes[j] += exp_nonpositive(x[i + j] - m);
  for (int j = 0; i < n; ++i, ++j) lanes[j] += exp_nonpositive(x[i] - m);
  double s = 0;
  for (int j = 0; j < kLanes; ++j) s += lanes[j];
  return s;
}

// s, and t = sum exp(x - m) (x - m); a term of weight 0 adds 0, also for x = -infinity
DLLM_VECTORISED void block_sum_entropy(const float* x, int64_t n, float m, double* s, double* t) {
  float sums[kLanes] = {}, terms[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int j = 0; j < kLanes; ++j) {
      const float d = x[i + j] - m, e = exp_nonpositive(d);
      sums[j] += e;
      terms[j] += e * (d < -87.0f ? -87.0f : d);
    }
  for (int j = 0; i < n; ++i, ++j) {
    const float d = x[i] - m, e = exp_nonpositive(d);
    sums[j] += e;
    terms[j] += e * (d < -87.0f ? -87.0f : d);
  }
  *s = *t = 0;
  for (int j = 0; j < kLanes; ++j) *s += sums[j], *t += terms[j];
}

DLLM_VECTORISED void block_exp(const float* x, int64_t n, float m, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = exp_nonpositive(x[i] - m);
}

// Returns whether there is a NaN, which falls into the last bin.
DLLM_VECTORISED bool block_bins(const float* x, int64_t n, float m, int32_t* out) {
  int32_t nans = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float bin = (m - x[i]) * kBinsPerUnit;
    out[i] = static_cast<int32_t>(bin < kBins - 1 ? bin : kBins - 1.0f);
    nans |= x[i] != x[i];
  }
  return nans != 0;
}

DLLM_VECTORISED void widen(const torch::headeronly::BFloat16* from, int64_t n, float* to) { dllm::convert(from, n, to); }

DLLM_VECTORISED void widen(const torch::headeronly::Half* from, int64_t n, float* to) { dllm::convert(from, n, to); }

DLLM_VECTORISED void divide(const float* from, int64_t n, float by, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i] / by;
}

// A row in blocks of fp32, divided by the temperature (as the reference does; 0 stands for no division).
template <typename T>
class Row {
 public:
  Row(const T* data, int64_t size, float temperature) : data_(data), size_(size), temperature_(temperature) {}

  int64_t size() const { return size_; }
  int64_t blocks() const { return (size_ + kBlock - 1) / kBlock; }
  int64_t length(int64_t block) const { return std::min(kBlock, size_ - block * kBlock); }

  const float* read(int64_t block, float* buffer) const {
    const T* from = data_ + block * kBlock;
    const int64_t n = length(block);
    // The next block comes from memory while this one is worked on.
    const char* next = reinterpret_cast<const char*>(from + kBlock);
    for (int64_t line = 0; line < kBlock * static_cast<int64_t>(sizeof(T)); line += 64) __builtin_prefetch(next + line);
    const float* values;
    if constexpr (std::is_same_v<T, float>) {
      values = from;
    } else {
      widen(from, n, buffer);
      values = buffer;
    }
    if (temperature_ > 0 && temperature_ != 1) {
      divide(values, n, temperature_, buffer);
      values = buffer;
    }
    return values;
  }

 private:
  const T* data_;
  int64_t size_;
  float temperature_;
};

struct Statistics {
  float top = -kInfinity, second = -kInfinity;  // the two largest, which may be equal
  int64_t argmax = 0;
  double s = 0, t = 0;  // t only if asked for
};

// Sums of each block, relative to the maximum known at the time.
struct BlockSum {
  double s;
  float m;
};

void update_top(const float* x, int64_t n, int64_t offset, Statistics& stats) {
  for (int64_t i = 0; i < n; ++i) {
    if (x[i] > stats.top) {
      stats.second = stats.top;
      stats.top = x[i];
      stats.argmax = offset + i;
    } else if (x[i] > stats.second) {
      stats.second = x[i];
    }
  }
}

template <typename T>
Statistics summarise(const Row<T>& row, bool entropy, bool sums, std::vector<BlockSum>* block_sums) {
  Statistics stats;
  alignas(64) float buffer[kBlock];
  for (int64_t block = 0; block < row.blocks(); ++block) {
    const float* x = row.read(block, buffer);
    const int64_t n = row.length(block);
    if (block_maximum(x, n) > stats.second) {
      const float before = stats.top;
      update_top(x, n, block * kBlock, stats);
      if (stats.top > before && stats.s > 0) {
        const double shift = static_cast<double>(before) - stats.top, factor = std::exp(shift);
        stats.t = factor * (stats.t + shift * stats.s);
        stats.s *= factor;
      }
    }
    double s = 0, t = 0;
    if (stats.top > -kInfinity) {
      if (entropy) {
        block_sum_entropy(x, n, stats.top, &s, &t);
      } else if (sums) {
        s = block_sum(x, n, stats.top);
      }
    }
    stats.s += s;
    stats.t += t;
    if (block_sums) (*block_sums)[block] = {s, stats.top};
  }
  return stats;
}

// What the filters keep: tokens above `value`, and those equal to it whose id is at most `last_equal`.
struct Cut {
  float value = -kInfinity;
  int64_t last_equal = std::numeric_limits<int64_t>::max();
  bool nan = false;  // the row has one

  bool keeps(float x, int64_t id) const { return x > value || (x == value && id <= last_equal); }
};

struct Element {
  float x;
  int64_t id;
};

template <typename T>
std::vector<Element> elements_of_bin(const Row<T>& row, float m, int32_t bin) {
  std::vector<Element> found;
  alignas(64) float buffer[kBlock];
  alignas(64) int32_t bins[kBlock];
  for (int64_t block = 0; block < row.blocks(); ++block) {
    const float* x = row.read(block, buffer);
    const int64_t n = row.length(block);
    block_bins(x, n, m, bins);
    for (int64_t i = 0; i < n; ++i)
      if (bins[i] == bin) found.push_back({x[i], block * kBlock + i});
  }
  std::sort(found.begin(), found.end(),
            [](const Element& a, const Element& b) { return a.x != b.x ? a.x > b.x : a.id < b.id; });
  return found;
}

// top-p, then top-k. `s` is the sum over the whole row relative to its maximum `m`.
template <typename T>
Cut find_cut(const Row<T>& row, float m, const Settings& settings, std::vector<double>& mass,
             std::vector<int64_t>& count) {
  const bool by_mass = settings.top_p < 1;
  const bool by_count = settings.top_k > 0 && settings.top_k < row.size();
  std::fill(mass.begin(), mass.end(), 0.0);
  std::fill(count.begin(), count.end(), 0);
  alignas(64) float buffer[kBlock], e[kBlock];
  alignas(64) int32_t bins[kBlock];
  bool nan = false;
  for (int64_t block = 0; block < row.blocks(); ++block) {
    const float* x = row.read(block, buffer);
    const int64_t n = row.length(block);
    nan |= block_bins(x, n, m, bins);
    if (by_mass) {
      block_exp(x, n, m, e);
      for (int64_t i = 0; i < n; ++i) mass[bins[i]] += e[i];
    }
    if (by_count)
      for (int64_t i = 0; i < n; ++i) ++count[bins[i]];
  }
  Cut cut;
  if (nan) {
    cut.nan = true;
    return cut;
  }
  if (by_mass) {
    double total = 0;
    for (double bin : mass) total += bin;
    // A token is dropped if the mass before it is above the bound, so the last one kept is where the mass passes it.
    const double bound = settings.top_p * total;
    double before = 0;
    int32_t bin = 0;
    while (bin < kBins - 1 && before + mass[bin] <= bound) before += mass[bin++];
    const std::vector<Element> elements = elements_of_bin(row, m, bin);
    for (const Element& element : elements) {
      if (before > bound) break;
      cut.value = element.x, cut.last_equal = element.id;
      before += exp_nonpositive(element.x - m);
    }
  }
  if (by_count) {
    int64_t before = 0;
    int32_t bin = 0;
    while (bin < kBins - 1 && before + count[bin] < settings.top_k) before += count[bin++];
    const std::vector<Element> elements = elements_of_bin(row, m, bin);
    const float kth = elements[settings.top_k - before - 1].x;
    if (kth > cut.value) cut.value = kth, cut.last_equal = std::numeric_limits<int64_t>::max();
  }
  return cut;
}

// Statistics of the tokens that the cut keeps; the maximum and its place do not change.
template <typename T>
Statistics summarise_kept(const Row<T>& row, const Statistics& all, const Cut& cut, std::vector<BlockSum>& block_sums) {
  Statistics kept = all;
  kept.s = kept.t = 0;
  if (!(all.second > cut.value || all.second == cut.value)) kept.second = -kInfinity;
  bool second_equal = all.second == cut.value;  // whether it is kept depends on its id
  int64_t equal_kept = 0;
  alignas(64) float buffer[kBlock], e[kBlock];
  for (int64_t block = 0; block < row.blocks(); ++block) {
    const float* x = row.read(block, buffer);
    const int64_t n = row.length(block);
    double s = 0;
    if (block_maximum(x, n) >= cut.value) {
      for (int64_t i = 0; i < n; ++i) {
        if (!cut.keeps(x[i], block * kBlock + i)) continue;
        const float d = x[i] - all.top;
        e[0] = exp_nonpositive(d);
        s += e[0];
        if (e[0] > 0) kept.t += static_cast<double>(e[0]) * d;
        equal_kept += x[i] == cut.value;
      }
    }
    kept.s += s;
    block_sums[block] = {s, all.top};
  }
  if (second_equal && equal_kept < (all.top == all.second ? 2 : 1)) kept.second = -kInfinity;
  if (cut.nan) kept.s = std::numeric_limits<double>::quiet_NaN();
  return kept;
}

// The first kept token whose cumulative sum passes u times the whole.
template <typename T>
int64_t sample(const Row<T>& row, const Statistics& stats, const std::vector<BlockSum>& block_sums, const Cut& cut,
               double u) {
  auto mass = [&](int64_t block) {
    const BlockSum& sum = block_sums[block];
    return sum.s == 0 ? 0.0 : sum.s * std::exp(static_cast<double>(sum.m) - stats.top);
  };
  double total = 0;
  for (int64_t block = 0; block < row.blocks(); ++block) total += mass(block);
  const double wanted = u * total;
  double before = 0;
  int64_t block = 0, last = row.blocks() - 1;
  while (last > 0 && mass(last) == 0) --last;
  while (block < last && before + mass(block) <= wanted) before += mass(block++);
  alignas(64) float buffer[kBlock], e[kBlock];
  const float* x = row.read(block, buffer);
  const int64_t n = row.length(block);
  block_exp(x, n, stats.top, e);
  int64_t token = stats.argmax;
  for (int64_t i = 0; i < n; ++i) {
    if (e[i] == 0 || !cut.keeps(x[i], block * kBlock + i)) continue;
    token = block * kBlock + i;
    before += e[i];
    if (before > wanted) break;
  }
  return token;
}

struct Workspace {
  std::vector<BlockSum> block_sums;
  std::vector<double> mass;
  std::vector<int64_t> count;
};

template <typename T>
float value_at(const T* data, int64_t token, float temperature) {
  const float x = static_cast<float>(data[token]);
  return temperature > 0 && temperature != 1 ? x / temperature : x;
}

template <typename T>
void score_row(const T* data, int64_t V, const double* uniform, const Settings& settings, Workspace& work,
               int64_t* token, float* score) {
  const bool sampled = settings.temperature > 0;
  const bool filtered = settings.top_p < 1 || (settings.top_k > 0 && settings.top_k < V);
  const bool of_filtered = !settings.raw && settings.confidence != kRandom;
  const Row<T> row(data, V, settings.temperature);
  const bool entropy = settings.confidence == kEntropy && of_filtered && !filtered;
  const bool sums = sampled || (of_filtered && !filtered);
  Statistics stats = summarise(row, entropy, sums, sampled ? &work.block_sums : nullptr);
  Cut cut;
  if (filtered && (sampled || of_filtered)) {
    cut = find_cut(row, stats.top, settings, work.mass, work.count);
    stats = summarise_kept(row, stats, cut, work.block_sums);
  }
  *token = sampled ? sample(row, stats, work.block_sums, cut, uniform[0]) : stats.argmax;
  if (settings.confidence == kRandom) {
    *score = static_cast<float>(uniform[1]);
    return;
  }
  float temperature = settings.temperature;
  if (settings.raw) {
    temperature = 0;
    stats = summarise(Row<T>(data, V, 0), settings.confidence == kEntropy, true, nullptr);
  }
  const double chosen = value_at(data, *token, temperature);
  switch (settings.confidence) {
    case kProb:
      *score = static_cast<float>(std::exp(chosen - stats.top) / stats.s);
      break;
    case kMargin:
      *score = static_cast<float>((1 - std::exp(static_cast<double>(stats.second) - stats.top)) / stats.s);
      break;
    default:
      *score = static_cast<float>(stats.t / stats.s - std::log(stats.s));
  }
}

template <typename T>
void score_all(const Tensor& logits, const double* uniform, int64_t* token, float* score, const Settings& settings) {
  const int64_t V = logits.size(1), stride = logits.stride(0);
  const T* data = static_cast<const T*>(logits.const_data_ptr());
  torch::stable::parallel_for(0, logits.size(0), 1, [&](int64_t begin, int64_t end) {
    Workspace work{std::vector<BlockSum>((V + kBlock - 1) / kBlock), std::vector<double>(kBins),
                   std::vector<int64_t>(kBins)};
    for (int64_t row = begin; row < end; ++row) {
      const double* draws = uniform ? uniform + 2 * row : nullptr;
      score_row(data + row * stride, V, draws, settings, work, token + row, score + row);
    }
  });
}

void score_rows(const Tensor& logits, std::optional<Tensor> uniform, Tensor token, Tensor score, int64_t confidence,
                double temperature, int64_t top_k, double top_p, bool raw) {
  dllm::check_rows(logits, 2, "logits");
  STD_TORCH_CHECK(token.size(0) == logits.size(0) && score.size(0) == logits.size(0), "one token and score per row");
  const Settings settings{static_cast<Confidence>(confidence), static_cast<float>(temperature), top_k, top_p, raw};
  STD_TORCH_CHECK(uniform.has_value() || (temperature == 0 && confidence != kRandom), "randomness needs uniforms");
  const double* draws = uniform ? static_cast<const double*>(uniform->const_data_ptr()) : nullptr;
  auto* tokens = static_cast<int64_t*>(token.mutable_data_ptr());
  auto* scores = static_cast<float*>(score.mutable_data_ptr());
  switch (logits.scalar_type()) {
    case torch::headeronly::ScalarType::Float:
      return score_all<float>(logits, draws, tokens, scores, settings);
    case torch::headeronly::ScalarType::BFloat16:
      return score_all<torch::headeronly::BFloat16>(logits, draws, tokens, scores, settings);
    case torch::headeronly::ScalarType::Half:
      return score_all<torch::headeronly::Half>(logits, draws, tokens, scores, settings);
    default:
      STD_TORCH_CHECK(false, "score_rows_cpu takes fp32, bf16 and fp16");
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dllm_kernels_native, CPU, m) { m.impl("score_rows_cpu", TORCH_BOX(&score_rows)); }
