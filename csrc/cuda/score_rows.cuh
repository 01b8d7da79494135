// Token and confidence of rows of logits, and which positions are committed (see dllm_kernels/topk_unmask): for each row one
// block, which reads it once, 16 bytes at a time, four such reads of every thread on their way.
//
// A row is cut into segments, 2 KB that a warp reads at once. Of each, shared memory keeps its largest logit, the sum of
// exp(x - largest), and the runner-up or the sum of (x - largest) exp(x - largest). One warp combines them in float64, finds
// the segment of the token, that of the largest logit or the one in which the cumulative probability passes u, and reads it
// again. Filters first search for the value below which a word is dropped, as the Triton kernels do: a range of an ordered
// integer key is halved twice per read. Sums have a fixed order, so that a row gives the same bits in any batch.
#pragma once

#include <cstdint>

#include "numbers.cuh"

namespace dllm {

constexpr int kScoreThreads = 128, kScoreWarps = kScoreThreads / 32, kPacks = 4;
constexpr int kCommitThreads = 256, kFindThreads = 1024;
constexpr int kMostWords = 1 << 20;  // what its segments' numbers leave in shared memory, 80 KB of it at most
constexpr int kSegmentBytes = kPacks * 32 * 16;

enum class Measure { prob, margin, entropy };

struct ScoreArguments {
  const void* logits;
  int64_t stride, R;
  int V;  // at most kMostWords
  const int64_t* rows;      // nullptr: all, in order
  const double* uniform;    // [n, 2]
  const uint32_t* allowed;  // nullptr: all words
  int64_t allowed_stride;
  float temperature;  // 0: the likeliest word
  bool filtered, random;
  int64_t top_k;  // V: no limit
  double top_p;   // infinity: no limit
  int64_t* token;
  float* score;
};

// Numbers in shared memory for each segment of a row: top, total, extra and, of the raw logits, top and total.
constexpr int kTop = 0, kTotal = 1, kExtra = 2, kRawTop = 3, kRawTotal = 4;

template <typename T>
__host__ __device__ inline int segments_of(int V) {
  constexpr int kWords = kSegmentBytes / sizeof(T);
  return (V + kWords - 1) / kWords;
}

// What the warps tell each other of a pass of the search.
struct SearchSums {
  double mass[3][kScoreWarps];
  int count[3][kScoreWarps];
};

template <typename T>
__host__ inline int score_shared_bytes(int V, bool raw) {
  return sizeof(SearchSums) + segments_of<T>(V) * (raw ? 5 : 3) * sizeof(float);
}

__device__ inline float finite(float top) { return top == -infinity() ? 0.0f : top; }  // -inf - -inf would be NaN

template <typename Number, typename Combine>
__device__ Number over_warp(Number x, const Combine& combine) {
  for (int step = 16; step > 0; step /= 2) x = combine(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}
template <typename Number>
__device__ Number sum_of_warp(Number x) {
  return over_warp(x, [](Number a, Number b) { return a + b; });
}

// What a lane holds of a segment.
template <typename T>
struct Held {
  static constexpr int kSize = Pack<T>::kSize;
  Pack<T> packs[kPacks];
  int first;  // word of the first pack's first number; that of pack i is 32 * kSize * i later
  __device__ float value(int i, int j) const { return widen(packs[i].values[j]); }
  __device__ int word(int i, int j) const { return first + (32 * i) * kSize + j; }
};

template <typename T>
class Row {
 public:
  __device__ Row(const T* data, int V)
      : data_(data), V_(V), aligned_(reinterpret_cast<uintptr_t>(data) % 16 == 0) {}

  __device__ int segments() const { return segments_of<T>(V_); }
  __device__ float at(int word) const { return widen(data_[word]); }

  // Past the end of the row comes -infinity. A row that does not begin at a multiple of 16 bytes is read number by number:
  // segments that began elsewhere would give other last bits.
  __device__ Held<T> read(int segment) const {
    Held<T> held;
    held.first = segment * kWords + static_cast<int>(threadIdx.x % 32) * kSize;
    const auto* from = reinterpret_cast<const Pack<T>*>(data_ + held.first);
#pragma unroll
    for (int i = 0; i < kPacks; ++i)
      if (aligned_ && held.word(i, kSize - 1) < V_) held.packs[i] = from[32 * i];
#pragma unroll
    for (int i = 0; i < kPacks; ++i)
      if (!aligned_ || held.word(i, kSize - 1) >= V_)
#pragma unroll
        for (int j = 0; j < kSize; ++j) {
          const int v = held.word(i, j);
          if (v < V_) held.packs[i].values[j] = data_[v];
          else held.packs[i].values[j] = lowest();
        }
    return held;
  }

 private:
  static constexpr int kSize = Pack<T>::kSize, kWords = kSegmentBytes / sizeof(T);
  static __device__ T lowest() {
    if constexpr (sizeof(T) == 4) return -infinity();
    else return T{static_cast<uint16_t>(__is_same(T, BFloat16) ? 0xff80 : 0xfc00)};
  }

  const T* data_;
  int V_;
  bool aligned_;
};

// Which words may be chosen.
struct Restriction {
  const uint32_t* allowed = nullptr;
  float divisor = 0;  // of the logits before they are compared with `cut`; 0: none
  float cut = -infinity();
  int last = 0;  // of the words that equal the cut
  bool has_cut = false;

  __device__ float compared(float z) const { return divisor > 0 ? __fdiv_rn(z, divisor) : z; }
  __device__ bool is_allowed(int v, int V) const {
    return v < V && (!allowed || (allowed[v / 32] >> (v % 32) & 1));
  }
  __device__ bool keeps(float z, int v, int V) const {
    if (!is_allowed(v, V)) return false;
    const float y = compared(z);
    return !has_cut || y > cut || (y == cut && v <= last);
  }
};

struct Part {
  float top, total, extra;
};

// Of the numbers that the lanes of a warp hold; scale: log2(e) / temperature. A NaN or +infinity makes the total NaN.
template <Measure kMeasure, int kCount, typename Value>
__device__ Part part_of(const Value& x, float scale) {
  float top = -infinity(), second = -infinity(), total = 0, extra = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if constexpr (kMeasure == Measure::margin) second = fmaxf(second, fminf(top, x(i)));
    top = fmaxf(top, x(i));
  }
  for (int step = 16; step > 0; step /= 2) {
    const float other = __shfl_xor_sync(kAllLanes, top, step);
    if constexpr (kMeasure == Measure::margin)
      second = fmaxf(fminf(top, other), fmaxf(second, __shfl_xor_sync(kAllLanes, second, step)));
    top = fmaxf(top, other);
  }
  const float shift = finite(top);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float below = (x(i) - shift) * scale, e = exp2_of(below);
    total += e;
    if constexpr (kMeasure == Measure::entropy) extra += e * fmaxf(below, -200.0f);  // not 0 * -infinity
  }
  total = sum_of_warp(total);
  if constexpr (kMeasure == Measure::entropy) extra = sum_of_warp(extra);
  if constexpr (kMeasure == Measure::margin) extra = second;
  return {top, total, extra};
}

// Every warp measures its segments of a row.
template <typename T, Measure kMeasure, bool kRaw, bool kRestricted>
__device__ void measure_row(const Row<T>& row, const Restriction& restriction, int V, float scale, float* numbers,
                            int room) {
  constexpr int kSize = Pack<T>::kSize, kCount = kPacks * kSize;
  for (int s = threadIdx.x / 32; s < row.segments(); s += kScoreWarps) {
    const Held<T> held = row.read(s);
    const auto plain = [&](int i) { return held.value(i / kSize, i % kSize); };
    constexpr Measure kFirst = kRaw ? Measure::prob : kMeasure;
    Part part;
    if constexpr (kRestricted) {
      float x[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        x[i] = restriction.keeps(plain(i), held.word(i / kSize, i % kSize), V) ? plain(i) : -infinity();
      part = part_of<kFirst, kCount>([&](int i) { return x[i]; }, scale);
    } else {
      part = part_of<kFirst, kCount>(plain, scale);
    }
    if (threadIdx.x % 32 == 0) numbers[kTop * room + s] = part.top, numbers[kTotal * room + s] = part.total;
    if constexpr (kRaw) {
      part = part_of<kMeasure, kCount>(plain, static_cast<float>(kLog2E));
      if (threadIdx.x % 32 == 0) numbers[kRawTop * room + s] = part.top, numbers[kRawTotal * room + s] = part.total;
    }
    if (threadIdx.x % 32 == 0) numbers[kExtra * room + s] = part.extra;
  }
  __syncthreads();
}

// The segments of a row, combined by a warp: the same in every lane.
struct Whole {
  const float *tops, *totals;
  double scale;
  float top;
  double total;

  __device__ Whole(const float* tops, const float* totals, int segments, double scale)
      : tops(tops), totals(totals), scale(scale), top(-infinity()), total(0) {
    for (int s = threadIdx.x % 32; s < segments; s += 32) top = fmaxf(top, tops[s]);
    top = over_warp(top, [](float a, float b) { return fmaxf(a, b); });
    for (int s = threadIdx.x % 32; s < segments; s += 32) total += share(s);
    total = sum_of_warp(total);
  }
  __device__ double below(int s) const { return (static_cast<double>(tops[s]) - finite(top)) * scale; }  // in powers of two
  __device__ double share(int s) const { return totals[s] * exp2(below(s)); }
};

// Places in order, 32 at a time: the first at which the sum of the weights passes the target.
struct Walk {
  double target, before = 0;
  int found = -1, last = -1;  // last: of those with a weight

  // The weight of place first + lane. Afterwards `before` is the sum up to `found` or, if there is none yet, to the end.
  __device__ void step(int first, double weight) {
    const int lane = threadIdx.x % 32;
    double sum = weight;
    for (int step = 1; step < 32; step *= 2) {
      const double more = __shfl_up_sync(kAllLanes, sum, step);
      if (lane >= step) sum += more;
    }
    // Rounded in different orders, a sum may exceed the one before it without a weight in between.
    const unsigned passing = __ballot_sync(kAllLanes, weight > 0 && before + sum > target);
    const unsigned some = __ballot_sync(kAllLanes, weight > 0);
    if (some) last = first + 31 - __clz(some);
    const int lane_found = passing ? __ffs(passing) - 1 : 31;
    if (passing) found = first + lane_found;
    before += __shfl_sync(kAllLanes, passing ? sum - weight : sum, lane_found);
  }
};

// The first word of a row at which the sum of the weights passes the target. Sums of floats need not agree to the last bit:
// if it is never passed, the last word that has a weight. share(s): that of a segment; weight(z, v): that of a word.
template <typename T, typename Share, typename Weight>
__device__ int find_word(const Row<T>& row, double target, const Share& share, const Weight& weight) {
  constexpr int kSize = Pack<T>::kSize;
  const int lane = threadIdx.x % 32;
  Walk segments{target};
  for (int s = 0; s < row.segments() && segments.found < 0; s += 32)
    segments.step(s, s + lane < row.segments() ? share(s + lane) : 0.0);
  if (segments.found < 0) target = infinity();
  const Held<T> held = row.read(max(segments.found < 0 ? segments.last : segments.found, 0));
  Walk packs{target, segments.before};
  int word = -1, last = -1;  // in the lane that has it
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    if (packs.found >= 0) break;
    double sum = 0;
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      const double one = weight(held.value(i, j), held.word(i, j));
      sum += one;
      if (one > 0) last = held.word(i, j);
    }
    packs.step(32 * i, sum);
    if (packs.found == 32 * i + lane) {
      double passed = packs.before;
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const double one = weight(held.value(i, j), held.word(i, j));
        passed += one;
        if (word < 0 && one > 0 && passed > target) word = held.word(i, j);
      }
      if (word < 0) word = last;
    }
  }
  const auto larger = [](int a, int b) { return a > b ? a : b; };
  word = over_warp(word, larger);
  return word >= 0 ? word : over_warp(last, larger);
}

// int32 in the order of the floats; bf16 and fp16 fill its upper 16 and 19 bits.
template <typename T>
struct Key {
  static constexpr int kShift = sizeof(T) == 4 ? 0 : __is_same(T, BFloat16) ? 16 : 13;
  static __device__ int32_t flip(int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }
  static __device__ int32_t of(float y) {
    return flip(__builtin_bit_cast(int32_t, y == 0 ? 0.0f : y)) >> kShift;  // -0.0 equals 0.0
  }
  static __device__ float value(int32_t key) {
    return __builtin_bit_cast(float, flip(static_cast<int32_t>(static_cast<uint32_t>(key) << kShift)) & static_cast<int32_t>(~0u << kShift));
  }
};

// Sets the cut of top-p, then top-k: the smallest value for which what is above weighs at most top_p, and counts less than
// top_k. Of its equals the lowest words stay, as many as top-p has room for. The segments have been measured without it.
template <typename T>
__device__ void find_cut(const Row<T>& row, Restriction& restriction, const ScoreArguments& a, float scale, SearchSums& sums,
                         float* numbers, int room) {
  constexpr int kSize = Pack<T>::kSize;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Whole all(numbers + kTop * room, numbers + kTotal * room, row.segments(), scale);
  if (!(all.total > 0)) return;  // NaN too: then all is kept, so that it is found again
  const auto each = [&](const auto& visit) {
    for (int s = warp; s < row.segments(); s += kScoreWarps) {
      const Held<T> held = row.read(s);
#pragma unroll
      for (int i = 0; i < kPacks; ++i)
#pragma unroll
        for (int j = 0; j < kSize; ++j)
          if (restriction.is_allowed(held.word(i, j), a.V)) visit(s, held.value(i, j));
    }
  };
  const double limit = a.top_p * all.total;
  int64_t low = -0x7f800001ll >> Key<T>::kShift, high = 0x7fffffffll >> Key<T>::kShift;  // low: the key of -infinity
  double above = 0;  // mass of the words whose key is more than high
  while (low < high) {
    const int64_t quarters[3] = {low + (high - low) / 4, low + (high - low) / 2, low + (high - low) * 3 / 4};
    float mass[3] = {};
    int count[3] = {};
    each([&](int, float z) {
      const int32_t key = Key<T>::of(restriction.compared(z));
      const float e = exp2_of((z - all.top) * scale);
#pragma unroll
      for (int q = 0; q < 3; ++q)
        if (key > static_cast<int32_t>(quarters[q])) mass[q] += e, ++count[q];
    });
    __syncthreads();  // what the pass before left has been read
#pragma unroll
    for (int q = 0; q < 3; ++q) {
      const double mass_of_warp = sum_of_warp(static_cast<double>(mass[q]));
      const int count_of_warp = sum_of_warp(count[q]);
      if (lane == 0) sums.mass[q][warp] = mass_of_warp, sums.count[q][warp] = count_of_warp;
    }
    __syncthreads();
    int64_t new_low = quarters[2] + 1, new_high = high;
#pragma unroll
    for (int q = 2; q >= 0; --q) {
      double total = 0;
      int64_t words = 0;
      for (int w = 0; w < kScoreWarps; ++w) total += sums.mass[q][w], words += sums.count[q][w];
      if (total <= limit && words < a.top_k) new_high = quarters[q], above = total, new_low = q ? quarters[q - 1] + 1 : low;
    }
    low = new_low, high = new_high;
  }
  restriction.cut = Key<T>::value(static_cast<int32_t>(high));
  restriction.last = a.V;
  const float below = sizeof(T) == 4 ? restriction.cut - restriction.compared(all.top) : restriction.cut - all.top;
  const double weight = exp2(below * (sizeof(T) == 4 ? kLog2E : static_cast<double>(scale)));
  // Of equals that all fit, room is at least their number; of those without weight it is infinite.
  const double left = floor((limit - above) / fmax(weight, 1e-300)) + 1;
  if (left < a.V) {
    const auto equals = [&](float z) { return restriction.compared(z) == restriction.cut; };
    for (int s = warp; s < row.segments(); s += kScoreWarps)
      if (lane == 0) numbers[kExtra * room + s] = 0;
    __syncthreads();
    for (int s = warp; s < row.segments(); s += kScoreWarps) {
      const Held<T> held = row.read(s);
      int count = 0;
#pragma unroll
      for (int i = 0; i < kPacks; ++i)
#pragma unroll
        for (int j = 0; j < kSize; ++j)
          count += restriction.is_allowed(held.word(i, j), a.V) && equals(held.value(i, j));
      count = sum_of_warp(count);
      if (lane == 0) numbers[kExtra * room + s] = static_cast<float>(count);
    }
    __syncthreads();
    restriction.last = find_word(
        row, left - 1, [&](int s) { return static_cast<double>(numbers[kExtra * room + s]); },
        [&](float z, int v) { return restriction.is_allowed(v, a.V) && equals(z) ? 1.0 : 0.0; });
  }
  restriction.has_cut = true;
  __syncthreads();  // before the segments are measured anew
}

// A warp chooses and scores the token of a row whose segments have been measured.
template <typename T, Measure kMeasure, bool kRaw, bool kRestricted>
__device__ void choose(const Row<T>& row, const Restriction& restriction, const ScoreArguments& a, double scale,
                       const float* numbers, int room) {
  constexpr int kSize = Pack<T>::kSize;
  const int lane = threadIdx.x % 32, segments = row.segments();
  const int64_t n = blockIdx.x;
  const auto lowest = [](int x, int y) { return x < y ? x : y; };
  // The first segment that has the row's largest number.
  const auto first_with = [&](const Whole& of) {
    int best = segments - 1;
    for (int s = lane; s < segments; s += 32)
      if (of.tops[s] == of.top) best = min(best, s);
    return over_warp(best, lowest);
  };
  const Whole all(numbers + kTop * room, numbers + kTotal * room, segments, scale);
  int token = a.V - 1;
  const auto value = [&](float z, int v) {
    return !kRestricted || restriction.keeps(z, v, a.V) ? z : -infinity();
  };
  if (a.temperature > 0) {
    const float shift = finite(all.top), scale32 = static_cast<float>(scale);
    token = find_word(
        row, a.uniform[2 * n] * all.total, [&](int s) { return all.share(s); },
        [&](float z, int v) { return static_cast<double>(exp2_of((value(z, v) - shift) * scale32)); });
  } else {
    const Held<T> held = row.read(first_with(all));
#pragma unroll
    for (int i = 0; i < kPacks; ++i)
#pragma unroll
      for (int j = 0; j < kSize; ++j)
        if (value(held.value(i, j), held.word(i, j)) == all.top) token = lowest(token, held.word(i, j));
    token = over_warp(token, lowest);
  }
  token = max(0, min(token, a.V - 1));  // where nothing can be chosen
  const auto confidence = [&](const Whole& of) -> double {
    if constexpr (kMeasure == Measure::prob) {
      return exp2((static_cast<double>(row.at(token)) - of.top) * of.scale) / of.total;
    } else if constexpr (kMeasure == Measure::margin) {
      const int best = first_with(of);
      float second = -infinity();
      for (int s = lane; s < segments; s += 32) second = fmaxf(second, s == best ? numbers[kExtra * room + s] : of.tops[s]);
      second = over_warp(second, [](float x, float y) { return fmaxf(x, y); });
      return (1 - exp2((static_cast<double>(second) - of.top) * of.scale)) / of.total;
    } else {
      double terms = 0;
      for (int s = lane; s < segments; s += 32)
        if (of.share(s) > 0) terms += numbers[kExtra * room + s] * exp2(of.below(s)) + of.share(s) * of.below(s);
      return (sum_of_warp(terms) / of.total - log2(of.total)) / kLog2E;
    }
  };
  double score;
  if (a.random) score = a.uniform[2 * n + 1];
  else if constexpr (kRaw) score = confidence(Whole(numbers + kRawTop * room, numbers + kRawTotal * room, segments, kLog2E));
  else score = confidence(all);
  if (lane == 0) a.token[n] = token, a.score[n] = all.total > 0 ? static_cast<float>(score) : not_a_number();
}

template <typename T, Measure kMeasure, bool kRaw, bool kRestricted>
__global__ void __launch_bounds__(kScoreThreads, kRaw || kRestricted ? 4 : 5) score_rows_kernel(ScoreArguments a) {
  extern __shared__ __align__(128) uint16_t dynamic_shared[];
  const int64_t n = blockIdx.x, at = a.rows ? a.rows[n] : n;
  if (at < 0 || at >= a.R) {
    if (threadIdx.x == 0) a.token[n] = 0, a.score[n] = at < 0 ? -infinity() : not_a_number();
    return;
  }
  SearchSums& sums = *reinterpret_cast<SearchSums*>(dynamic_shared);
  float* const numbers = reinterpret_cast<float*>(dynamic_shared + sizeof(SearchSums) / sizeof(uint16_t));
  const Row<T> row(static_cast<const T*>(a.logits) + at * a.stride, a.V);
  const int room = segments_of<T>(a.V);
  const double scale = a.temperature > 0 ? kLog2E / a.temperature : kLog2E;
  Restriction restriction;
  if constexpr (kRestricted) {
    if (a.allowed) restriction.allowed = a.allowed + n * a.allowed_stride;
    if (a.filtered) {
      if (sizeof(T) == 4 && a.temperature > 0) restriction.divisor = a.temperature;  // 16-bit logits keep their order
      measure_row<T, Measure::prob, false, true>(row, restriction, a.V, static_cast<float>(scale), numbers, room);
      find_cut(row, restriction, a, static_cast<float>(scale), sums, numbers, room);
    }
  }
  measure_row<T, kMeasure, kRaw, kRestricted>(row, restriction, a.V, static_cast<float>(scale), numbers, room);
  if (threadIdx.x < 32) choose<T, kMeasure, kRaw, kRestricted>(row, restriction, a, scale, numbers, room);
}

// Which tokens are masked, and the row of the logits of each: its place or, packed, the number of masked ones before it; -1
// where not masked. A block counts those before its own.
__global__ void __launch_bounds__(kFindThreads)
    find_rows_kernel(const int64_t* tokens, int64_t mask_token_id, int64_t n, bool packed, bool* masked, int64_t* rows) {
  extern __shared__ __align__(128) uint16_t dynamic_shared[];
  int* const of_warp = reinterpret_cast<int*>(dynamic_shared);
  constexpr int kWarps = kFindThreads / 32;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t here = static_cast<int64_t>(blockIdx.x) * kFindThreads, i = here + threadIdx.x;
  const bool is_mask = i < n && tokens[i] == mask_token_id;
  const unsigned in_warp = __ballot_sync(kAllLanes, is_mask);
  int64_t place = i;
  if (packed) {
    int earlier = 0;
    for (int64_t j = threadIdx.x; j < here; j += kFindThreads) earlier += tokens[j] == mask_token_id;
    earlier = sum_of_warp(earlier);
    if (lane == 0) of_warp[warp] = earlier, of_warp[kWarps + warp] = __popc(in_warp);
    __syncthreads();
    place = __popc(in_warp & ((1u << lane) - 1));
    for (int w = 0; w < kWarps; ++w) place += of_warp[w] + (w < warp ? of_warp[kWarps + w] : 0);
  }
  if (i < n) masked[i] = is_mask, rows[i] = is_mask ? place : -1;
}

struct CommitArguments {
  const int64_t *tokens, *token, *k;
  const bool* masked;
  const float* confidence;
  const double* uniform;  // [B, L, 2], read if temperature > 0
  double temperature;
  bool has_threshold;
  float threshold;
  int64_t L, tiles;  // tiles of kCommitThreads positions in a row
  int64_t* filled;
  bool* committed;
};

// A position's rank is the number of those ahead of it: of higher scores, or as high and earlier.
__global__ void __launch_bounds__(kCommitThreads) commit_kernel(CommitArguments a) {
  extern __shared__ __align__(128) uint16_t dynamic_shared[];
  double* const scores = reinterpret_cast<double*>(dynamic_shared);
  const int64_t row = blockIdx.x / a.tiles, i = blockIdx.x % a.tiles * kCommitThreads + threadIdx.x;
  const auto score_of = [&](int64_t j) -> double {  // NaN, which is ahead of nothing, where it cannot be committed
    const int64_t at = row * a.L + j;
    if (j >= a.L || !a.masked[at]) return not_a_number();
    const double c = a.confidence[at];
    return a.temperature > 0 ? c / a.temperature - log(-log(a.uniform[2 * at + 1])) : c;
  };
  const double mine = score_of(i);
  int64_t rank = 0;
  for (int64_t start = 0; start < a.L; start += kCommitThreads) {
    __syncthreads();
    scores[threadIdx.x] = score_of(start + threadIdx.x);
    __syncthreads();
    for (int j = 0; j < kCommitThreads; ++j) rank += scores[j] > mine || (scores[j] == mine && start + j < i);
  }
  if (i >= a.L) return;
  const int64_t at = row * a.L + i;
  const bool chosen = mine == mine && (rank < a.k[row] || (a.has_threshold && a.confidence[at] >= a.threshold));
  a.committed[at] = chosen;
  a.filled[at] = chosen ? a.token[at] : a.tokens[at];
}

}  // namespace dllm
