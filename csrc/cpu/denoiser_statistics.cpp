// Sampled and likeliest token, entropy, log-normaliser and expected embedding of M rows of hidden states, without stored
// logits (see dllm_kernels/denoiser_statistics).
//
// One pass over the words, a tile of 128 at a time: the capped and tempered logits z of a tile and some rows lie in the
// cache, words by rows, so that a vector holds one number of each row. With the largest so far, m,
//     s = sum exp(z - m),   t = sum exp(z - m) (z - m),   soft = sum exp(z - m) w
// and where a tile raises m, the sums so far are scaled, as in flash attention with the head as keys and values. In the
// end entropy = log s - t / s. To sample at u, the sums of the tiles locate the one in which the cumulative sum passes
// u * s, and that tile alone is multiplied again. Threads divide the words; their parts of a row are combined in order.
// A NaN or +inf makes s NaN.

#include <cmath>
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

using dllm::Buffer;
using dllm::exp_nonpositive;
using dllm::Head;
using dllm::kBlock;
using dllm::kWords;
using dllm::round_up;
using torch::stable::Tensor;

constexpr float kLowest = std::numeric_limits<float>::lowest();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Rows {
  int64_t M;
  const float* x;            // [M, D]
  const float* temperature;  // [M]
  const double* uniform;     // [M]
};

// The sum of exp(z - m) over a tile's words.
struct TileSum {
  float s, m;
};

// One thread's sums over the words from tile `begin` on.
struct Part {
  Part(int64_t begin, int64_t M, int64_t soft_size)
      : begin(begin), top(M, kLowest), argmax(M, 0), s(M, 0.0), t(M, 0.0), soft(soft_size) {
    std::fill(soft.get(), soft.get() + soft_size, 0.0f);
  }
  int64_t begin;
  std::vector<float> top;
  std::vector<int32_t> argmax;  // the lowest id among equals
  std::vector<double> s, t;
  Buffer soft;  // [M, D], both rounded up to whole vectors, or nothing
};

// z [words, rows]: becomes exp(z - m), where m is the largest of `top` and z. top, argmax, s and t are [rows].
DLLM_INLINE void scan_tile(float* z, int64_t first, int64_t words, int64_t rows, const float* temperature, float* top,
                           int32_t* argmax, float* s, float* t) {
  for (int64_t v = 0; v < words; ++v) {
    float* here = z + v * kBlock;
    const auto word = static_cast<int32_t>(first + v);
    for (int64_t n = 0; n < rows; ++n) {
      const float value = here[n] / temperature[n];
      here[n] = value;
      argmax[n] = value > top[n] ? word : argmax[n];
      top[n] = value > top[n] ? value : top[n];
    }
  }
  for (int64_t n = 0; n < rows; ++n) s[n] = t[n] = 0;
  for (int64_t v = 0; v < words; ++v) {
    float* here = z + v * kBlock;
    for (int64_t n = 0; n < rows; ++n) {
      const float below = here[n] - top[n], d = below < -100.0f ? -100.0f : below, e = exp_nonpositive(d);
      here[n] = e;
      s[n] += e;
      t[n] += e * d;
    }
  }
}

template <int width>
DLLM_INLINE void scan_words_of_width(const Head& head, const Rows& rows, const float* x_turned, bool soft,
                                     int64_t begin, int64_t end, Part& part, TileSum* sums) {
  const int64_t D = head.D, wide_D = round_up(D, width), padded = round_up(rows.M, width);
  const Buffer staged(kWords * D), panels(soft ? kWords * wide_D : 0), logits(kWords * kBlock);
  float* z = logits.get();
  alignas(64) float temperature[kBlock], top[kBlock], s[kBlock], t[kBlock];
  alignas(64) int32_t argmax[kBlock];
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first = tile * kWords, words = std::min(kWords, head.V - first);
    int64_t w_row;
    const float* w = dllm::read_words(head, first, words, staged.get(), &w_row);
    if (soft) dllm::pack<width>(w, w_row, 1, kWords, D, kWords, wide_D, panels.get());
    for (int64_t row = 0; row < rows.M; row += kBlock) {
      const int64_t count = std::min(kBlock, rows.M - row), wide = std::min(kBlock, padded - row);
      dllm::logits_of_tile<width>(head, w, w_row, first, words, x_turned, row, wide, z);
      for (int64_t n = 0; n < wide; ++n) {
        const bool there = n < count;
        temperature[n] = there ? rows.temperature[row + n] : 1;
        top[n] = there ? part.top[row + n] : 0, argmax[n] = there ? part.argmax[row + n] : 0;
      }
      scan_tile(z, first, words, wide, temperature, top, argmax, s, t);
      for (int64_t n = 0; n < count; ++n) {
        const int64_t m = row + n;
        double &all_s = part.s[m], &all_t = part.t[m];
        if (part.top[m] != top[n]) {
          const double shift = static_cast<double>(part.top[m]) - top[n], factor = std::exp(shift);
          all_t = factor > 0 ? factor * (all_t + shift * all_s) : 0.0, all_s *= factor;
          if (float* to = part.soft.get() + m * wide_D; soft)
            for (int64_t d = 0; d < wide_D; ++d) to[d] *= static_cast<float>(factor);
        }
        all_s += s[n], all_t += t[n];
        part.top[m] = top[n], part.argmax[m] = argmax[n];
        sums[tile * rows.M + m] = {s[n], top[n]};
      }
      if (!soft) continue;
      for (int64_t v = words; v < kWords; ++v) std::fill(z + v * kBlock, z + v * kBlock + wide, 0.0f);
      dllm::multiply<width>(z, 1, kBlock, wide, panels.get(), kWords, 0, kWords, wide_D,
                            part.soft.get() + row * wide_D, wide_D, true);
    }
  }
}

DLLM_BY_WIDTH(scan_words, (const Head& head, const Rows& rows, const float* x_turned, bool soft, int64_t begin,
                           int64_t end, Part& part, TileSum* sums),
              (head, rows, x_turned, soft, begin, end, part, sums))

struct Statistics {
  float top = kLowest;
  int64_t argmax = 0;
  double s = 0, t = 0;
};

Statistics combine(const std::vector<Part>& parts, int64_t m) {
  Statistics all;
  for (const Part& part : parts)
    if (part.top[m] > all.top) all.top = part.top[m], all.argmax = part.argmax[m];
  for (const Part& part : parts) {
    const double shift = static_cast<double>(part.top[m]) - all.top, factor = std::exp(shift);
    all.s += factor * part.s[m];
    if (factor > 0) all.t += factor * (part.t[m] + shift * part.s[m]);
  }
  return all;
}

// The first word of row m whose cumulative sum passes u times the total; the last that has a probability if rounding
// lets none pass.
int64_t sample(const Head& head, const Rows& rows, int64_t m, const Statistics& stats, const TileSum* sums) {
  const int64_t tiles = (head.V + kWords - 1) / kWords;
  const auto mass = [&](int64_t tile) {
    const TileSum& sum = sums[tile * rows.M + m];
    return sum.s == 0 ? 0.0 : sum.s * std::exp(static_cast<double>(sum.m) - stats.top);
  };
  double total = 0, before = 0;
  for (int64_t tile = 0; tile < tiles; ++tile) total += mass(tile);
  const double wanted = rows.uniform[m] * total;
  int64_t tile = 0, last = tiles - 1;
  while (last > 0 && mass(last) == 0) --last;
  while (tile < last && before + mass(tile) <= wanted) before += mass(tile++);
  Head uncapped = head;
  uncapped.softcap = 0;
  const dllm::Product product(uncapped, rows.x + m * head.D, 1);
  dllm::Product::Workspace work(product);
  alignas(64) float z[kWords];
  const int64_t first = tile * kWords, words = std::min(kWords, head.V - first);
  product.logits(first, first + words, work, z, kWords);
  if (head.softcap > 0) dllm::cap(z, words, head.softcap, z);
  int64_t token = stats.argmax;
  for (int64_t v = 0; v < words; ++v) {
    // The product's sums are in another order than the first time: the largest may be a little above the maximum.
    const float e = exp_nonpositive(std::min(z[v] / rows.temperature[m] - stats.top, 0.0f));
    if (e == 0) continue;
    token = first + v, before += e;
    if (before > wanted) break;
  }
  return token;
}

void denoiser_statistics(const Tensor& hidden, const Tensor& weight, const Tensor& temperature, const Tensor& uniform,
                         double softcap, Tensor token, Tensor argmax, Tensor entropy, Tensor log_normaliser,
                         std::optional<Tensor> soft) {
  const Head head = dllm::describe_head(weight, std::nullopt, softcap);
  const int64_t M = hidden.size(0), D = head.D, tiles = (head.V + kWords - 1) / kWords;
  STD_TORCH_CHECK(hidden.is_contiguous() && hidden.size(1) == D && temperature.is_contiguous() &&
                      uniform.is_contiguous() && temperature.size(0) == M && uniform.size(0) == M,
                  "denoiser_statistics_cpu: shapes disagree");
  const Rows rows{M, static_cast<const float*>(hidden.const_data_ptr()),
                  static_cast<const float*>(temperature.const_data_ptr()),
                  static_cast<const double*>(uniform.const_data_ptr())};
  const int64_t padded = round_up(M, dllm::vector_width()), wide_D = round_up(D, dllm::vector_width());
  const Buffer x_turned(padded * D);
  dllm::pack_rows(rows.x, M, D, true, x_turned.get());
  std::vector<TileSum> sums(tiles * M);
  std::vector<Part> parts;
  std::mutex mutex;
  dllm::parallel_for(0, tiles, [&](int64_t begin, int64_t end) {
    Part part(begin, M, soft ? padded * wide_D : 0);
    scan_words(head, rows, x_turned.get(), soft.has_value(), begin, end, part, sums.data());
    const std::lock_guard<std::mutex> lock(mutex);
    parts.push_back(std::move(part));
  });
  std::sort(parts.begin(), parts.end(), [](const Part& a, const Part& b) { return a.begin < b.begin; });
  auto* tokens = static_cast<int64_t*>(token.mutable_data_ptr());
  auto* argmaxes = static_cast<int64_t*>(argmax.mutable_data_ptr());
  auto* entropies = static_cast<float*>(entropy.mutable_data_ptr());
  auto* normalisers = static_cast<float*>(log_normaliser.mutable_data_ptr());
  float* softs = soft ? static_cast<float*>(soft->mutable_data_ptr()) : nullptr;
  dllm::parallel_for(0, M, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const Statistics stats = combine(parts, m);
      const bool possible = stats.s > 0;  // not NaN
      argmaxes[m] = stats.argmax;
      tokens[m] = possible ? sample(head, rows, m, stats, sums.data()) : stats.argmax;
      entropies[m] = possible ? static_cast<float>(std::log(stats.s) - stats.t / stats.s) : kNaN;
      normalisers[m] = possible ? static_cast<float>(stats.top + std::log(stats.s)) : kNaN;
      if (!softs) continue;
      float* to = softs + m * D;
      std::fill(to, to + D, 0.0f);
      for (const Part& part : parts) {
        const auto share = static_cast<float>(std::exp(static_cast<double>(part.top[m]) - stats.top) / stats.s);
        const float* from = part.soft.get() + m * wide_D;
        for (int64_t d = 0; d < D; ++d) to[d] += share * from[d];
      }
    }
  });
}

}  // namespace

DLLM_LIBRARY_IMPL(CPU, m) { m.impl("denoiser_statistics_cpu", TORCH_BOX(&denoiser_statistics)); }
