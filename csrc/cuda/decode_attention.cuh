// Few queries against many cached keys (see dllm_kernels/attention): the kernels, without what launches them.
//
// The heads of a group share keys, so the rows of a tile are those of one query position, then of the next: r = i * group + h.
// A block takes a tile of rows and a share of the tiles of keys (flash-decoding): scores, an online softmax and the product
// with the values, both on the tensor cores in fp32, while the next tile of keys is on its way. With more than one share, the
// shares go to fp32 parts with their log2-sums, and the second kernel weighs them together.
//
// Rows of a tile in shared memory are 2 EP bytes, EP the head size padded with zeros to a power of 2. Their 16-byte chunks
// are permuted so that 8 rows of one chunk lie in different banks.
#pragma once

#include "tensor_cores.cuh"

namespace dllm {

constexpr float kNothing = -3.4028234663852886e38f;  // not -infinity, of which a difference would be NaN

struct DecodeArguments {
  const uint16_t *query, *key, *value;  // [B, Lq, heads, E], [cached rows, Lk, kv_heads, E] twice
  const bool* key_mask;                 // [B, Lk], true: may be attended; null: all
  const int64_t* cache_rows;            // [B], null: row b of the queries has row b of the keys
  uint16_t* out;                        // [B, Lq, heads, E]
  float *parts, *part_lse;              // [splits, B, Lq, heads, E] and the same without E; null: one split
  int64_t q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head;  // strides in numbers
  int64_t B;
  int Lq, Lk, kv_heads, group, E, row_tiles, splits;
  int block_length;  // query i is at position Lk - Lq + i and sees the keys up to the end of its block; 0: all
  float scale;       // times log2(e)
};

template <int EP>
struct DecodeTiles {
  static constexpr int kWarps = 4, kThreads = 32 * kWarps, kRows = 16 * kWarps;  // a warp multiplies 16 rows
  static constexpr int kColumns = EP <= 128 ? 64 : 32, kStages = 2;
  static constexpr int kChunks = EP / 8;
  static constexpr int kSharedBytes = (kRows + 2 * kStages * kColumns) * EP * 2;
  static_assert(kColumns <= 64, "the visible keys of a tile are bits of one number");
};

// How many shares of the keys fill `slots` blocks that run at once.
__host__ __device__ inline int decode_splits(int64_t programs, int tiles, int slots) {
  const int64_t splits = programs < slots ? slots / programs : 1;
  return static_cast<int>(splits < tiles ? splits : (tiles > 1 ? tiles : 1));
}

// Place of a chunk of a row, in numbers.
template <int EP>
__device__ inline int chunk_at(int row, int chunk) {
  const int turn = EP == 32 ? row / 2 % 4 : row % 8;  // of 64-byte rows, two lie across the banks
  return row * EP + (chunk ^ turn) * 8;
}

// One past the last key that position p sees.
__device__ inline int keys_seen(const DecodeArguments& a, int p) {
  if (a.block_length == 0) return a.Lk;
  const int end = (p / a.block_length + 1) * a.block_length;
  return end < a.Lk ? end : a.Lk;
}

// Of the keys of a tile, those that exist and are not masked. All lanes of a warp call it.
template <int kColumns>
__device__ inline uint64_t visible_keys(const bool* key_mask, int first, int keys) {
  uint64_t bits = 0;
#pragma unroll
  for (int from = 0; from < kColumns; from += 32) {
    const int j = first + from + threadIdx.x % 32;
    const bool seen = j < keys && (key_mask == nullptr || key_mask[j]);
    bits |= static_cast<uint64_t>(__ballot_sync(~0u, seen)) << from;
  }
  return bits;
}

// The rows of a tile of keys or values whose bit is set, zeros for the others: what is masked may be NaN.
template <int EP>
__device__ inline void copy_keys(uint16_t* tile, const uint16_t* from, int64_t stride, uint64_t bits, int E) {
  using Tiles = DecodeTiles<EP>;
#pragma unroll
  for (int at = 0; at < Tiles::kColumns * Tiles::kChunks; at += Tiles::kThreads) {
    const int row = (at + threadIdx.x) / Tiles::kChunks, chunk = (at + threadIdx.x) % Tiles::kChunks;
    const bool there = (bits >> row & 1) && chunk * 8 < E;
    copy_16_bytes(tile + chunk_at<EP>(row, chunk), from + (there ? row * stride + chunk * 8 : 0), there);
  }
}

template <Number kNumber, int EP>
__global__ void __launch_bounds__(DecodeTiles<EP>::kThreads) decode_attention_kernel(const DecodeArguments a) {
  using Tiles = DecodeTiles<EP>;
  constexpr int kColumns = Tiles::kColumns, kRows = Tiles::kRows, kTile = kColumns * EP;
  constexpr bool kKeepQueries = EP <= 128;  // in registers; of larger heads they are read again for each tile
  extern __shared__ __align__(128) uint16_t dynamic_shared[];
  uint16_t* const q_tile = dynamic_shared;
  uint16_t* const kv_tiles = dynamic_shared + kRows * EP;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  int64_t program = blockIdx.x;  // tiles of rows that read the same keys follow one another
  const int first = static_cast<int>(program % a.row_tiles) * kRows;
  program /= a.row_tiles;
  const int split = static_cast<int>(program % a.splits);
  program /= a.splits;
  const int kv_head = static_cast<int>(program % a.kv_heads);
  const int64_t b = program / a.kv_heads, cached = a.cache_rows == nullptr ? b : a.cache_rows[b];
  const int rows = a.Lq * a.group, before = a.Lk - a.Lq;
  const uint16_t* const keys = a.key + cached * a.k_batch + kv_head * a.k_head;
  const uint16_t* const values = a.value + cached * a.v_batch + kv_head * a.v_head;
  const bool* const key_mask = a.key_mask == nullptr ? nullptr : a.key_mask + b * a.Lk;

  const int last = min(first + kRows, rows) - 1;
  const int seen_by_all = keys_seen(a, before + first / a.group), seen_by_some = keys_seen(a, before + last / a.group);
  const int tiles = (seen_by_some + kColumns - 1) / kColumns, share = (tiles + a.splits - 1) / a.splits;
  const int begin = min(split * share, tiles), end = min(begin + share, tiles);

  for (int at = threadIdx.x; at < kRows * Tiles::kChunks; at += Tiles::kThreads) {
    const int row = at / Tiles::kChunks, chunk = at % Tiles::kChunks, r = first + row;
    const bool there = r < rows && chunk * 8 < a.E;
    const int64_t from = b * a.q_batch + r / a.group * a.q_row + (kv_head * a.group + r % a.group) * a.q_head + chunk * 8;
    copy_16_bytes(q_tile + chunk_at<EP>(row, chunk), a.query + (there ? from : 0), there);
  }
  const auto fetch = [&](int tile) {
    const int j = tile * kColumns;
    const uint64_t bits = visible_keys<kColumns>(key_mask, j, a.Lk);
    uint16_t* const to = kv_tiles + tile % Tiles::kStages * 2 * kTile;
    copy_keys<EP>(to, keys + j * a.k_row, a.k_row, bits, a.E);
    copy_keys<EP>(to + kTile, values + j * a.v_row, a.v_row, bits, a.E);
    return bits;
  };
  uint64_t next_bits = begin < end ? fetch(begin) : 0;
  end_group();

  // A lane has rows lane / 4 and lane / 4 + 8 of its warp's 16; of a product, columns lane % 4 * 2 and the next of each 8.
  const int my_row = first + 16 * warp + lane / 4;
  const bool warp_has_rows = first + 16 * warp < rows;
  int seen[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) seen[half] = keys_seen(a, before + min(my_row + 8 * half, last) / a.group);
  float acc[EP / 8][4] = {}, top[2] = {kNothing, kNothing}, total[2] = {};
  uint32_t q_kept[kKeepQueries ? EP / 16 : 1][4];
  const auto load_queries = [&](uint32_t(&q)[4], int step) {
    load_matrices<false>(q, q_tile + chunk_at<EP>(16 * warp + lane % 16, 2 * step + lane / 16));
  };

  for (int tile = begin; tile < end; ++tile) {
    wait_for_groups<0>();
    __syncthreads();  // the tile has arrived from all threads, and all are done with the one before it
    const uint64_t bits = next_bits;
    if (tile + 1 < end) next_bits = fetch(tile + 1);
    end_group();
    if constexpr (kKeepQueries) {
      if (tile == begin) {
#pragma unroll
        for (int step = 0; step < EP / 16; ++step) load_queries(q_kept[step], step);
      }
    }
    if (bits == 0 || !warp_has_rows) continue;
    const uint16_t* const k_tile = kv_tiles + tile % Tiles::kStages * 2 * kTile;
    const uint16_t* const v_tile = k_tile + kTile;

    float s[kColumns / 8][4] = {};
#pragma unroll
    for (int step = 0; step < EP / 16; ++step) {
      uint32_t q[4];
      if constexpr (kKeepQueries) {
#pragma unroll
        for (int x = 0; x < 4; ++x) q[x] = q_kept[step][x];
      } else {
        load_queries(q, step);
      }
#pragma unroll
      for (int pair = 0; pair < kColumns / 16; ++pair) {
        uint32_t k[4];
        load_matrices<false>(k, k_tile + chunk_at<EP>(16 * pair + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
        multiply_add<kNumber>(s[2 * pair], q, k[0], k[1]);
        multiply_add<kNumber>(s[2 * pair + 1], q, k[2], k[3]);
      }
    }

    const int j = tile * kColumns;
    constexpr uint64_t kAll = kColumns == 64 ? ~uint64_t{0} : (uint64_t{1} << kColumns % 64) - 1;
    const bool whole = bits == kAll && j + kColumns <= seen_by_all;
    float highest[2] = {top[0], top[1]};
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        const int column = 8 * n + lane % 4 * 2 + x % 2;
        s[n][x] *= a.scale;
        if (!whole && !((bits >> column & 1) && j + column < seen[x / 2])) s[n][x] = -INFINITY;
        highest[x / 2] = fmaxf(highest[x / 2], s[n][x]);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int step = 1; step < 4; step *= 2)
        highest[half] = fmaxf(highest[half], __shfl_xor_sync(~0u, highest[half], step));
      const float shrink = exp2_of(top[half] - highest[half]);
      top[half] = highest[half];
      total[half] *= shrink;
#pragma unroll
      for (int n = 0; n < EP / 8; ++n) acc[n][2 * half] *= shrink, acc[n][2 * half + 1] *= shrink;
    }
#pragma unroll
    for (int step = 0; step < kColumns / 16; ++step) {
      uint32_t p[4];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        float(&x)[4] = s[2 * step + n];
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] = exp2_of(x[i] - top[i / 2]), total[i / 2] += x[i];
        p[2 * n] = pack<kNumber>(x[0], x[1]);
        p[2 * n + 1] = pack<kNumber>(x[2], x[3]);
      }
#pragma unroll
      for (int pair = 0; pair < EP / 16; ++pair) {
        uint32_t v[4];
        load_matrices<true>(v, v_tile + chunk_at<EP>(16 * step + lane % 16, 2 * pair + lane / 16));
        multiply_add<kNumber>(acc[2 * pair], p, v[0], v[1]);
        multiply_add<kNumber>(acc[2 * pair + 1], p, v[2], v[3]);
      }
    }
  }

  wait_for_groups<0>();  // where there was no tile, the queries are still on their way
  struct alignas(8) Two {
    float x[2];
  };
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int step = 1; step < 4; step *= 2) total[half] += __shfl_xor_sync(~0u, total[half], step);
    const int r = my_row + 8 * half;
    if (r >= rows) continue;
    const float inverse = total[half] == 0.0f ? 0.0f : 1.0f / total[half];
    const int heads = a.kv_heads * a.group;
    const int64_t row = (b * a.Lq + r / a.group) * heads + kv_head * a.group + r % a.group;
    const int64_t part = split * (a.B * a.Lq * heads) + row;
    if (a.parts != nullptr && lane % 4 == 0) a.part_lse[part] = top[half] + log2f(total[half]);  // of none, -infinity
#pragma unroll
    for (int n = 0; n < EP / 8; ++n) {
      const int e = 8 * n + lane % 4 * 2;
      const float x = acc[n][2 * half] * inverse, y = acc[n][2 * half + 1] * inverse;
      if (e >= a.E) continue;
      if (a.parts != nullptr)
        *reinterpret_cast<Two*>(a.parts + part * a.E + e) = {x, y};
      else
        *reinterpret_cast<uint32_t*>(a.out + row * a.E + e) = pack<kNumber>(x, y);
    }
  }
}

constexpr int kCombineThreads = 128;  // a warp takes a row of E numbers

template <Number kNumber>
__global__ void __launch_bounds__(kCombineThreads)
    combine_kernel(const float* parts, const float* part_lse, uint16_t* out, int64_t rows, int E, int splits) {
  struct alignas(16) Four {
    float x[4];
  };
  struct alignas(8) Packed {
    uint32_t x[2];
  };
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kCombineThreads / 32) + threadIdx.x / 32;
  if (row >= rows) return;
  float top = kNothing, total = 0.0f;
  for (int split = 0; split < splits; ++split) top = fmaxf(top, part_lse[split * rows + row]);
  for (int split = 0; split < splits; ++split) total += exp2_of(part_lse[split * rows + row] - top);
  const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
  for (int e = 4 * lane; e < E; e += 4 * 32) {
    float sum[4] = {};
#pragma unroll 4
    for (int split = 0; split < splits; ++split) {
      const float weight = exp2_of(part_lse[split * rows + row] - top) * inverse;
      const Four part = *reinterpret_cast<const Four*>(parts + (split * rows + row) * E + e);
#pragma unroll
      for (int x = 0; x < 4; ++x) sum[x] += weight * part.x[x];
    }
    *reinterpret_cast<Packed*>(out + row * E + e) = {{pack<kNumber>(sum[0], sum[1]), pack<kNumber>(sum[2], sum[3])}};
  }
}

}  // namespace dllm
