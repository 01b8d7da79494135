// Runs the blocks of a CUDA kernel on a CPU: its threads as coroutines of one thread, each until it waits for others, and each
// warp as far as it comes before the next one starts: so that what lacks a barrier is overtaken.
// What csrc/cuda/tensor_cores.cuh has in instructions is here as PTX's manual describes it. 16-byte copies arrive when they are
// waited for, and not before; reads of eight rows of a matrix that meet in a bank of shared memory are counted.
#define DLLM_TENSOR_CORES  // in place of csrc/cuda/tensor_cores.cuh
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
using std::max, std::min;

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx;

namespace simt {

struct Copy {
  uint16_t* to;
  std::array<uint16_t, 8> data;
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
  unsigned exchanges = 0;
  std::vector<std::vector<Copy>> groups{{}};  // the last one is not ended
};

using Lanes = std::array<std::array<uint64_t, 6>, 32>;

struct Block {
  std::vector<Thread> threads;
  std::vector<int> arrived, generation;  // at the barrier of each warp and, the last, of the block
  std::vector<std::array<Lanes, 2>> exchanged;
  ucontext_t scheduler;
  std::function<void()> body;
  bool progress = false;
};
inline Block* block;
inline int64_t bank_conflicts = 0;

inline Thread& self() { return block->threads[threadIdx.x]; }

inline void yield() { swapcontext(&self().context, &block->scheduler); }

inline void barrier(int which, int size) {
  const int before = block->generation[which];
  if (++block->arrived[which] == size) {
    block->arrived[which] = 0, ++block->generation[which];
    block->progress = true;
    return;
  }
  while (block->generation[which] == before) yield();
}

// What every lane of the warp gives.
inline const Lanes& exchange(const std::array<uint64_t, 6>& mine) {
  const int warp = threadIdx.x / 32;
  Lanes& all = block->exchanged[warp][self().exchanges++ % 2];
  all[threadIdx.x % 32] = mine;
  barrier(warp, 32);
  return all;
}

inline void run_thread() {
  block->body();
  self().done = true;
  block->progress = true;
}

inline void run_block(int threads, const std::function<void()>& body) {
  Block here;
  block = &here;
  here.threads = std::vector<Thread>(threads);
  here.arrived.resize(threads / 32 + 1), here.generation.resize(threads / 32 + 1), here.exchanged.resize(threads / 32);
  here.body = body;
  for (Thread& thread : here.threads) {
    constexpr size_t kStack = 1 << 16;
    thread.stack.reset(new char[kStack]);
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get(), thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = &here.scheduler;
    makecontext(&thread.context, run_thread, 0);
  }
  for (bool left = true; left;) {
    left = false;
    bool progress = false;
    for (int warp = 0; warp < threads / 32; ++warp) {
      do {
        here.progress = false;
        for (int i = 32 * warp; i < 32 * warp + 32; ++i) {
          if (here.threads[i].done) continue;
          left = true;
          threadIdx.x = i;
          swapcontext(&here.scheduler, &here.threads[i].context);
        }
        progress |= here.progress;
      } while (here.progress);
    }
    if (left && !progress) throw std::runtime_error("the threads wait for one another");
  }
}

inline float of_bf16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return std::isnan(x) ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float of_fp16(uint16_t x) {
  _Float16 value;
  std::memcpy(&value, &x, 2);
  return value;
}

inline uint16_t to_fp16(float x) {
  const _Float16 value = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &value, 2);
  return bits;
}

}  // namespace simt

inline void __syncthreads() { simt::barrier(simt::block->generation.size() - 1, simt::block->threads.size()); }

namespace simt {

// What lane `from` of the warp gives.
template <typename T>
T of_lane(T x, int from) {
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof(T));
  bits = exchange({bits})[from][0];
  std::memcpy(&x, &bits, sizeof(T));
  return x;
}

}  // namespace simt

template <typename T>
T __shfl_sync(unsigned, T x, int from) {
  return simt::of_lane(x, from);
}

template <typename T>
T __shfl_xor_sync(unsigned, T x, int step) {
  return simt::of_lane(x, threadIdx.x % 32 ^ step);
}

template <typename T>
T __shfl_up_sync(unsigned, T x, int step) {
  const int lane = threadIdx.x % 32;
  return simt::of_lane(x, lane < step ? lane : lane - step);
}

inline unsigned __ballot_sync(unsigned, bool set) {
  unsigned bits = 0;
  const simt::Lanes& all = simt::exchange({set});
  for (int lane = 0; lane < 32; ++lane) bits |= static_cast<unsigned>(all[lane][0]) << lane;
  return bits;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(unsigned x) { return __builtin_ffs(x); }
inline float __fdiv_rn(float x, float y) { return x / y; }

namespace dllm {

enum class Number { bf16, fp16 };

alignas(128) inline uint16_t dynamic_shared[227 << 9];

template <Number kNumber>
float widen(uint16_t x) {
  return kNumber == Number::bf16 ? simt::of_bf16(x) : simt::of_fp16(x);
}

template <Number kNumber>
uint32_t pack(float low, float high) {
  const auto narrow = [](float x) { return kNumber == Number::bf16 ? simt::to_bf16(x) : simt::to_fp16(x); };
  return narrow(low) | static_cast<uint32_t>(narrow(high)) << 16;
}

inline float exp2_of(float x) { return x < -126 ? 0.0f : std::exp2(x); }

template <Number kNumber>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const simt::Lanes& all = simt::exchange({a[0], a[1], a[2], a[3], b0, b1});
  const int lane = threadIdx.x % 32;
  const auto half = [](uint64_t pair, int which) { return widen<kNumber>(static_cast<uint16_t>(pair >> 16 * which)); };
  for (int x = 0; x < 4; ++x) {
    const int row = lane / 4 + 8 * (x / 2), column = lane % 4 * 2 + x % 2;
    for (int k = 0; k < 16; ++k)
      c[x] += half(all[row % 8 * 4 + k % 8 / 2][row / 8 + 2 * (k / 8)], k % 2) *
              half(all[column * 4 + k % 8 / 2][4 + k / 8], k % 2);
  }
}

template <bool kTransposed>
void load_matrices(uint32_t (&to)[4], const uint16_t* row) {
  const simt::Lanes& all = simt::exchange({reinterpret_cast<uint64_t>(row)});
  const int lane = threadIdx.x % 32;
  for (int matrix = 0; matrix < 4; ++matrix) {
    const auto number = [&](int i, int j) {
      return reinterpret_cast<const uint16_t*>(all[8 * matrix + i][0])[j];
    };
    const int i = lane / 4, j = lane % 4 * 2;
    to[matrix] = kTransposed ? number(j, i) | static_cast<uint32_t>(number(j + 1, i)) << 16
                             : number(i, j) | static_cast<uint32_t>(number(i, j + 1)) << 16;
    if (lane == 0) {
      unsigned banks = 0;
      for (int r = 0; r < 8; ++r) {
        if (all[8 * matrix + r][0] % 16) throw std::runtime_error("a row of a matrix is not aligned to 16 bytes");
        banks |= 1u << all[8 * matrix + r][0] / 16 % 8;
      }
      simt::bank_conflicts += banks != 255;
    }
  }
}

inline void copy_16_bytes(uint16_t* to, const uint16_t* from, bool there) {
  simt::Copy copy{to, {}};
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16)
    throw std::runtime_error("a copy is not aligned to 16 bytes");
  if (there) std::memcpy(copy.data.data(), from, 16);
  std::memset(to, 0xff, 16);  // NaN until it has arrived
  simt::self().groups.back().push_back(copy);
}

inline void end_group() { simt::self().groups.emplace_back(); }

template <int left>
void wait_for_groups() {
  auto& groups = simt::self().groups;
  while (groups.size() > left + 1) {
    for (const simt::Copy& copy : groups.front()) std::memcpy(copy.to, copy.data.data(), 16);
    groups.erase(groups.begin());
  }
}

}  // namespace dllm
