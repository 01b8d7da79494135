// Token and confidence of rows of logits, which are stored or come from a head (see dllm_kernels/topk_unmask).
//
// One loop scans a row of V logits block by block: maximum, runner-up and the sums relative to the largest so far, m,
//     s = sum exp(x - m),   t = sum exp(x - m) (x - m),   entropy: sum p log p = t / s - log s
// Where a block raises m, which happens about log V times, its sums are computed again. With a head, the logits of a
// block and some rows are multiplied into the cache and scanned there. Sampling at u takes the first token whose
// cumulative sum passes u * s: the sums per block locate its block, and only that block is read, or multiplied, again.
// top-p and top-k need no sort of the row: a histogram over m - x (1,024 bins) locates the bin where each bound falls,
// and only the elements of that bin are sorted. A NaN makes s, and so the confidence, NaN.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "../library.h"
#include "linear.h"
#include "numbers.h"
#include "parallel.h"

namespace {

using dllm::exp_nonpositive;
using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::stable::Tensor;

constexpr int64_t kBlock = 1024;  // words scanned at once, a multiple of the head's tile
constexpr int kLanes = 32;       // independent accumulators: two to four vectors, so that additions overlap
constexpr int64_t kAhead = 8192;  // bytes prefetched
constexpr int kBins = 1024;
constexpr float kBinsPerUnit = 32.0f;  // bins span 32 units of logit; probabilities below exp(-32) share the last bin
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

enum Confidence { kProb, kMargin, kEntropy, kRandom };

struct Settings {
  Confidence confidence;
  float temperature;
  int64_t top_k;
  double top_p;
  bool raw;

  bool sampled() const { return temperature > 0; }
  bool tempered() const { return temperature > 0 && temperature != 1; }
  bool filtered(int64_t V) const { return top_p < 1 || (top_k > 0 && top_k < V); }
};

// Sum of a block, relative to the maximum known at the time.
struct BlockSum {
  double s;
  float m;
};

// Statistics of a row over the words read so far.
struct Statistics {
  float top = -kInfinity, second = -kInfinity;  // the two largest, which may be equal; second only if asked for
  int64_t argmax = 0;                           // the lowest id among equals
  double s = 0, t = 0;                          // t only if asked for

  // Adds the statistics of the words that follow.
  void add(const Statistics& more) {
    if (more.top == -kInfinity) {
      s += more.s;  // 0, or NaN
      return;
    }
    const bool raise = more.top > top;
    second = std::max(raise ? more.second : second, raise ? top : more.top);
    const double shift = raise ? static_cast<double>(top) - more.top : static_cast<double>(more.top) - top;
    const double factor = std::exp(shift);  // 0 of -infinity
    const auto scaled_t = [&](double t, double s) { return factor > 0 ? factor * (t + shift * s) : 0.0; };
    if (raise) {
      t = more.t + scaled_t(t, s), s = more.s + factor * s;
      top = more.top, argmax = more.argmax;
    } else {
      t += scaled_t(more.t, more.s), s += factor * more.s;
    }
  }
};

// Scan over the words of a row; lane j reads every kLanes-th of them.
struct Scan {
  float m = -kInfinity;
  int64_t argmax = 0;
  float top[kLanes], second[kLanes];
  double s[kLanes] = {}, t[kLanes] = {};

  Scan() {
    std::fill_n(top, kLanes, -kInfinity);
    std::fill_n(second, kLanes, -kInfinity);
  }

  Statistics statistics() const {
    Statistics stats{m, -kInfinity, argmax, 0, 0};
    int tops = 0;
    for (int j = 0; j < kLanes; ++j) {
      stats.s += s[j], stats.t += t[j], tops += top[j] == m;
      stats.second = std::max(stats.second, second[j]);
      if (top[j] < m) stats.second = std::max(stats.second, top[j]);
    }
    if (tops > 1) stats.second = m;
    return stats;
  }
};

DLLM_INLINE float as_float(float x) { return x; }
DLLM_INLINE float as_float(BFloat16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.x) << 16); }

// exp(x) for -86 <= x <= 0 as 2^n times a polynomial, relative error below 2e-7 near 0 and 6e-7 at -30, which has no
// weight in sums over exp(x). Undefined for x > 0; NaN gives NaN.
DLLM_INLINE float exp_in_sum(float x) {
  // Adding 1.5 * 2^23 + 127 rounds to an integer whose low bits are the exponent of a float.
  const float rounded = x * 1.44269504088896341f + 12583039.0f;
  const float f = x * 1.44269504088896341f - (rounded - 12583039.0f);
  float p = 1.326472731e-3f;
  p = p * f + 9.671512991e-3f;
  p = p * f + 5.550733581e-2f;
  p = p * f + 2.402224243e-1f;
  p = p * f + 6.931470037e-1f;
  p = p * f + 1.0f;
  return p * std::bit_cast<float>(std::bit_cast<int32_t>(rounded) << 23);
}

template <bool first, bool second, bool entropy, typename T>
DLLM_INLINE void scan_lanes(const T* x, float m, float* top, float* next, float* s, float* t) {
  for (int j = 0; j < kLanes; ++j) {
    const float value = as_float(x[j]);
    if constexpr (first && second) {
      const float lower = value < top[j] ? value : top[j];
      next[j] = lower > next[j] ? lower : next[j];
    }
    if constexpr (first) top[j] = value > top[j] ? value : top[j];
    const float below = value - m, d = below < -86.0f ? -86.0f : below, e = exp_in_sum(d);
    s[j] += e;
    if constexpr (entropy) t[j] += e * d;
  }
}

// The sums relative to m, and in the first pass the maxima.
template <bool first, bool second, bool entropy, typename T>
DLLM_INLINE void scan_values(const T* x, int64_t n, float m, float* top, float* next, float* s, float* t) {
  for (int j = 0; j < kLanes; ++j) s[j] = t[j] = 0;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    // Prefetch beyond the current page, where the processor's own prefetching ends.
    if constexpr (first)
      for (int64_t byte = 0; byte < kLanes * static_cast<int64_t>(sizeof(T)); byte += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(x + i) + kAhead + byte);
    scan_lanes<first, second, entropy>(x + i, m, top, next, s, t);
  }
  if (i == n) return;
  float rest[kLanes];
  for (int j = 0; j < kLanes; ++j) rest[j] = i + j < n ? as_float(x[i + j]) : -kInfinity;
  scan_lanes<first, second, entropy>(rest, m, top, next, s, t);
}

template <bool second, bool entropy, typename T>
DLLM_INLINE void scan_block(const T* x, int64_t n, int64_t first_word, Scan& scan, BlockSum* sum) {
  float top[kLanes], next[kLanes], s[kLanes], t[kLanes];
  for (int j = 0; j < kLanes; ++j) top[j] = scan.top[j], next[j] = scan.second[j];
  scan_values<true, second, entropy>(x, n, scan.m, top, next, s, t);
  int raised = 0;
  for (int j = 0; j < kLanes; ++j) raised |= top[j] > scan.m;
  if (raised) {
    float m = scan.m;
    for (int j = 0; j < kLanes; ++j) m = top[j] > m ? top[j] : m;
    int64_t place = 0;
    while (as_float(x[place]) != m) ++place;
    if (scan.m > -kInfinity) {
      const double shift = static_cast<double>(scan.m) - m, factor = std::exp(shift);
      for (int j = 0; j < kLanes; ++j) {
        scan.t[j] = factor > 0 ? factor * (scan.t[j] + shift * scan.s[j]) : 0.0;
        scan.s[j] *= factor;
      }
    }
    scan.m = m, scan.argmax = first_word + place;
    scan_values<false, second, entropy>(x, n, m, top, next, s, t);
  } else if (scan.m == -kInfinity) {  // only -infinity so far, or NaN, for which every comparison is false
    bool nan = false;
    for (int64_t i = 0; i < n; ++i) nan |= as_float(x[i]) != as_float(x[i]);
    for (int j = 0; j < kLanes; ++j) s[j] = nan ? std::numeric_limits<float>::quiet_NaN() : 0.0f, t[j] = 0;
  }
  for (int j = 0; j < kLanes; ++j) {
    scan.top[j] = top[j], scan.s[j] += s[j];
    if constexpr (second) scan.second[j] = next[j];
    if constexpr (entropy) scan.t[j] += t[j];
  }
  if (sum) {
    *sum = {0, scan.m};
    for (int j = 0; j < kLanes; ++j) sum->s += s[j];
  }
}

template <typename T>
DLLM_INLINE void scan_for(Confidence confidence, const T* x, int64_t n, int64_t first_word, Scan& scan, BlockSum* sum) {
  if (confidence == kMargin) return scan_block<true, false>(x, n, first_word, scan, sum);
  if (confidence == kEntropy) return scan_block<false, true>(x, n, first_word, scan, sum);
  scan_block<false, false>(x, n, first_word, scan, sum);
}

DLLM_VECTORISED void scan_words(Confidence confidence, const float* x, int64_t n, int64_t first_word, Scan& scan,
                                BlockSum* sum) {
  scan_for(confidence, x, n, first_word, scan, sum);
}

DLLM_VECTORISED void scan_words(Confidence confidence, const BFloat16* x, int64_t n, int64_t first_word, Scan& scan,
                                BlockSum* sum) {
  scan_for(confidence, x, n, first_word, scan, sum);
}

DLLM_VECTORISED void block_exp(const float* x, int64_t n, float m, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = exp_nonpositive(x[i] - m);
}

// Returns whether there is a NaN; NaNs fall into the last bin.
DLLM_VECTORISED bool block_bins(const float* x, int64_t n, float m, int32_t* out) {
  int32_t nans = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float bin = (m - x[i]) * kBinsPerUnit;
    out[i] = static_cast<int32_t>(bin < kBins - 1 ? bin : kBins - 1.0f);
    nans |= x[i] != x[i];
  }
  return nans != 0;
}

DLLM_VECTORISED bool any_at_least(const float* x, int64_t n, float value) {
  int32_t any = 0;
  for (int64_t i = 0; i < n; ++i) any |= x[i] >= value;
  return any != 0;
}

DLLM_VECTORISED void widen(const BFloat16* from, int64_t n, float* to) { dllm::convert(from, n, to); }

DLLM_VECTORISED void widen(const Half* from, int64_t n, float* to) { dllm::convert(from, n, to); }

DLLM_VECTORISED void divide(const float* from, int64_t n, float by, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i] / by;
}

// to = from, with -infinity where the bit is 0.
DLLM_VECTORISED void forbid(const float* from, int64_t n, const uint32_t* bits, float* to) {
  for (int64_t i = 0; i < n; i += 32)
    for (int64_t j = 0; j < std::min<int64_t>(32, n - i); ++j)
      to[i + j] = bits[i / 32] >> j & 1 ? from[i + j] : -kInfinity;
}

// Applied to logits before they are scored: division by the temperature (as in the reference), and -infinity for words
// that are not allowed.
struct Tempering {
  float temperature;     // 0: no division
  const uint32_t* bits;  // allowed words of this row, or nullptr

  bool none() const { return temperature == 0 && !bits; }

  // `buffer` may equal `logits`.
  const float* apply(const float* logits, int64_t first_word, int64_t n, float* buffer) const {
    if (temperature > 0) divide(logits, n, temperature, buffer), logits = buffer;
    if (bits) forbid(logits, n, bits + first_word / 32, buffer), logits = buffer;
    return logits;
  }
};

// A row of stored logits, read in blocks of fp32.
template <typename T>
class Row {
 public:
  Row(const T* data, int64_t size, Tempering tempering) : data_(data), size_(size), tempering_(tempering) {}

  int64_t size() const { return size_; }
  int64_t blocks() const { return (size_ + kBlock - 1) / kBlock; }
  int64_t length(int64_t block) const { return std::min(kBlock, size_ - block * kBlock); }

  const float* read(int64_t block, float* buffer) const {
    const T* from = data_ + block * kBlock;
    const float* values;
    if constexpr (std::is_same_v<T, float>) {
      values = from;
    } else {
      widen(from, length(block), buffer);
      values = buffer;
    }
    return tempering_.apply(values, block * kBlock, length(block), buffer);
  }

  void scan_block(int64_t block, Confidence confidence, Scan& scan, BlockSum* sum) const {
    if constexpr (!std::is_same_v<T, Half>)
      if (tempering_.none())
        return scan_words(confidence, data_ + block * kBlock, length(block), block * kBlock, scan, sum);
    alignas(64) float buffer[kBlock];
    scan_words(confidence, read(block, buffer), length(block), block * kBlock, scan, sum);
  }

 private:
  const T* data_;
  int64_t size_;
  Tempering tempering_;
};

// A row of a head's logits, multiplied when they are read.
class HeadRow {
 public:
  HeadRow(const dllm::Head& head, const float* x, Tempering tempering)
      : V_(head.V), product_(head, x, 1), work_(product_), tempering_(tempering) {}

  int64_t blocks() const { return (V_ + kBlock - 1) / kBlock; }
  int64_t length(int64_t block) const { return std::min(kBlock, V_ - block * kBlock); }

  const float* read(int64_t block, float* buffer) {
    const int64_t first = block * kBlock, n = length(block);
    product_.logits(first, first + n, work_, buffer, n);
    return tempering_.apply(buffer, first, n, buffer);
  }

 private:
  int64_t V_;
  dllm::Product product_;
  dllm::Product::Workspace work_;
  Tempering tempering_;
};

template <typename T>
Statistics summarise(const Row<T>& row, Confidence confidence, std::vector<BlockSum>* sums) {
  Scan scan;
  for (int64_t block = 0; block < row.blocks(); ++block)
    row.scan_block(block, confidence, scan, sums ? sums->data() + block : nullptr);
  return scan.statistics();
}

// The filters keep tokens above `value`, and tokens equal to it whose id is at most `last_equal`.
struct Cut {
  float value = -kInfinity;
  int64_t last_equal = std::numeric_limits<int64_t>::max();
  bool nan = false;  // the row has a NaN

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

// The cut of top-p, then of top-k; m is the maximum of the row.
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
    // A token is dropped if the mass before it is above the bound, so the mass passes the bound at the last token kept.
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

// Statistics of the tokens that the cut keeps; the maximum and its position do not change.
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
    if (any_at_least(x, n, cut.value)) {
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
  if (cut.nan) kept.s = kNaN;
  return kept;
}

// The first kept token whose cumulative sum passes u times the total.
template <typename Row>
int64_t sample(Row& row, const Statistics& stats, const BlockSum* block_sums, const Cut& cut, double u) {
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

// The confidence of the token whose logit is `chosen`, from the statistics of its row.
float confidence_of(Confidence confidence, const Statistics& stats, double chosen) {
  if (confidence == kProb) return static_cast<float>(std::exp(chosen - stats.top) / stats.s);
  if (confidence == kMargin)
    return static_cast<float>((1 - std::exp(static_cast<double>(stats.second) - stats.top)) / stats.s);
  return static_cast<float>(stats.t / stats.s - std::log(stats.s));
}

struct Workspace {
  std::vector<BlockSum> block_sums;
  std::vector<double> mass;
  std::vector<int64_t> count;
};

template <typename T>
void score_row(const T* data, int64_t V, const double* uniform, const uint32_t* bits, const Settings& settings,
               Workspace& work, int64_t* token, float* score) {
  const Row<T> row(data, V, {settings.tempered() ? settings.temperature : 0, bits});
  Statistics stats = summarise(row, settings.confidence, settings.sampled() ? &work.block_sums : nullptr);
  Cut cut;
  if (settings.filtered(V)) {
    cut = find_cut(row, stats.top, settings, work.mass, work.count);
    stats = summarise_kept(row, stats, cut, work.block_sums);
  }
  *token = settings.sampled() ? sample(row, stats, work.block_sums.data(), cut, uniform[0]) : stats.argmax;
  if (!(stats.s > 0)) {  // 0 or NaN
    *score = static_cast<float>(kNaN);
  } else if (settings.confidence == kRandom) {
    *score = static_cast<float>(uniform[1]);
  } else {
    const bool untouched = !settings.tempered() && !bits && !settings.filtered(V);
    if (settings.raw && !untouched) stats = summarise(Row<T>(data, V, {0, nullptr}), settings.confidence, nullptr);
    const float x = static_cast<float>(data[*token]);
    const bool as_it_is = settings.raw || !settings.tempered();
    *score = confidence_of(settings.confidence, stats, as_it_is ? x : x / settings.temperature);
  }
}

// Inputs and outputs of a call for each row, besides the logits or the head; optional ones are nullptr.
struct Rows {
  const double* uniform;  // [n, 2]
  const uint32_t* bits;   // [n, ceil(V / 32)]
  int64_t bits_stride;
  int64_t* token;  // [n]
  float* score;    // [n]

  const double* uniform_of(int64_t row) const { return uniform ? uniform + 2 * row : nullptr; }
  const uint32_t* bits_of(int64_t row) const { return bits ? bits + row * bits_stride : nullptr; }
};

template <typename T>
void score_all(const Tensor& logits, const int64_t* index, const Rows& rows, int64_t count, const Settings& settings) {
  const int64_t V = logits.size(1), stride = logits.stride(0);
  const T* data = static_cast<const T*>(logits.const_data_ptr());
  dllm::parallel_for(0, count, [&](int64_t begin, int64_t end) {
    Workspace work{std::vector<BlockSum>((V + kBlock - 1) / kBlock), std::vector<double>(kBins),
                   std::vector<int64_t>(kBins)};
    for (int64_t row = begin; row < end; ++row)
      score_row(data + (index ? index[row] : row) * stride, V, rows.uniform_of(row), rows.bits_of(row), settings, work,
                rows.token + row, rows.score + row);
  });
}

Rows check_and_describe(int64_t V, const std::optional<Tensor>& uniform, const std::optional<Tensor>& allowed,
                        Tensor& token, Tensor& score, const Settings& settings) {
  const int64_t n = token.size(0);
  STD_TORCH_CHECK(score.size(0) == n && token.is_contiguous() && score.is_contiguous(), "one token and score per row");
  STD_TORCH_CHECK(uniform.has_value() || (!settings.sampled() && settings.confidence != kRandom),
                  "randomness needs uniforms");
  STD_TORCH_CHECK(!uniform || (uniform->is_contiguous() && uniform->size(0) == n), "two uniforms per row");
  STD_TORCH_CHECK(!allowed || (allowed->size(0) == n && allowed->size(1) == (V + 31) / 32 && allowed->stride(1) == 1),
                  "the bits of the allowed words, per row");
  return {uniform ? static_cast<const double*>(uniform->const_data_ptr()) : nullptr,
          allowed ? static_cast<const uint32_t*>(allowed->const_data_ptr()) : nullptr, allowed ? allowed->stride(0) : 0,
          static_cast<int64_t*>(token.mutable_data_ptr()), static_cast<float*>(score.mutable_data_ptr())};
}

void score_rows(const Tensor& logits, std::optional<Tensor> index, std::optional<Tensor> uniform,
                std::optional<Tensor> allowed, Tensor token, Tensor score, int64_t confidence, double temperature,
                int64_t top_k, double top_p, bool raw) {
  dllm::check_rows(logits, 2, "logits");
  const Settings settings{static_cast<Confidence>(confidence), static_cast<float>(temperature), top_k, top_p, raw};
  const Rows rows = check_and_describe(logits.size(1), uniform, allowed, token, score, settings);
  STD_TORCH_CHECK(index ? index->is_contiguous() && index->size(0) == token.size(0) : logits.size(0) == token.size(0),
                  "one token per row");
  const auto* places = index ? static_cast<const int64_t*>(index->const_data_ptr()) : nullptr;
  switch (logits.scalar_type()) {
    case torch::headeronly::ScalarType::Float:
      return score_all<float>(logits, places, rows, token.size(0), settings);
    case torch::headeronly::ScalarType::BFloat16:
      return score_all<BFloat16>(logits, places, rows, token.size(0), settings);
    case torch::headeronly::ScalarType::Half:
      return score_all<Half>(logits, places, rows, token.size(0), settings);
    default:
      STD_TORCH_CHECK(false, "score_rows_cpu takes fp32, bf16 and fp16");
  }
}

// One thread's scans of the words from block `begin` on.
struct Part {
  int64_t begin;
  std::vector<Scan> tempered, raw;  // one a row; raw is empty where it equals tempered
};

void linear_score_block(const dllm::Head& head, const float* x, int64_t first_row, int64_t M, const Rows& rows,
                        const Settings& settings) {
  const int64_t blocks = (head.V + kBlock - 1) / kBlock;
  const float temperature = settings.tempered() ? settings.temperature : 0;
  const bool raw = settings.raw && (temperature > 0 || rows.bits);
  const auto tempering = [&](int64_t m) { return Tempering{temperature, rows.bits_of(first_row + m)}; };
  const dllm::Product product(head, x, M);
  std::vector<BlockSum> sums(settings.sampled() ? M * blocks : 0);
  std::vector<Part> parts;
  std::mutex mutex;
  dllm::parallel_for(0, blocks, [&](int64_t begin, int64_t end) {
    dllm::Product::Workspace work(product);
    const dllm::Buffer logits(M * kBlock);
    Part part{begin, std::vector<Scan>(M), std::vector<Scan>(raw ? M : 0)};
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kBlock, n = std::min(kBlock, head.V - first);
      product.logits(first, first + n, work, logits.get(), kBlock);
      for (int64_t m = 0; m < M; ++m) {
        float* z = logits.get() + m * kBlock;
        if (raw) scan_words(settings.confidence, z, n, first, part.raw[m], nullptr);
        scan_words(settings.confidence, tempering(m).apply(z, first, n, z), n, first, part.tempered[m],
                   sums.empty() ? nullptr : &sums[m * blocks + block]);
      }
    }
    const std::lock_guard<std::mutex> lock(mutex);
    parts.push_back(std::move(part));
  });
  std::sort(parts.begin(), parts.end(), [](const Part& a, const Part& b) { return a.begin < b.begin; });
  dllm::parallel_for(0, M, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      Statistics tempered, untouched;
      for (const Part& part : parts) {
        tempered.add(part.tempered[m].statistics());
        if (raw) untouched.add(part.raw[m].statistics());
      }
      const double* uniform = rows.uniform_of(first_row + m);
      int64_t token = tempered.argmax;
      float chosen = tempered.top;
      HeadRow row(head, x + m * head.D, tempering(m));
      alignas(64) float buffer[kBlock];
      if (settings.sampled()) {
        token = sample(row, tempered, &sums[m * blocks], Cut(), uniform[0]);
        chosen = row.read(token / kBlock, buffer)[token % kBlock];
      }
      if (raw) chosen = HeadRow(head, x + m * head.D, {0, nullptr}).read(token / kBlock, buffer)[token % kBlock];
      float score = static_cast<float>(kNaN);
      if (tempered.s > 0)
        score = settings.confidence == kRandom ? static_cast<float>(uniform[1])
                                               : confidence_of(settings.confidence, raw ? untouched : tempered, chosen);
      rows.token[first_row + m] = token, rows.score[first_row + m] = score;
    }
  });
}

void linear_score_rows(const Tensor& hidden, const Tensor& weight, std::optional<Tensor> bias,
                       std::optional<Tensor> uniform, std::optional<Tensor> allowed, Tensor token, Tensor score,
                       int64_t confidence, double temperature, bool raw) {
  const dllm::Head head = dllm::describe_head(weight, bias, 0);
  STD_TORCH_CHECK(hidden.is_contiguous() && hidden.size(1) == head.D && hidden.size(0) == token.size(0),
                  "linear_score_rows_cpu: shapes disagree");
  const Settings settings{static_cast<Confidence>(confidence), static_cast<float>(temperature), 0, 1.0, raw};
  const Rows rows = check_and_describe(head.V, uniform, allowed, token, score, settings);
  const auto* x = static_cast<const float*>(hidden.const_data_ptr());
  for (int64_t row = 0; row < hidden.size(0); row += dllm::kBlock)
    linear_score_block(head, x + row * head.D, row, std::min(dllm::kBlock, hidden.size(0) - row), rows, settings);
}

}  // namespace

DLLM_LIBRARY_IMPL(CPU, m) {
  m.impl("score_rows_cpu", TORCH_BOX(&score_rows));
  m.impl("linear_score_rows_cpu", TORCH_BOX(&linear_score_rows));
}
