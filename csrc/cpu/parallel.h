// Parallel loops whose threads treat denormal numbers as zero.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

namespace dllm {

// The thread's floating-point control register. The memory clobbers keep loads and stores, and so the arithmetic
// between them, on their side of a switch.
#if defined(__SSE2__)
using FloatState = uint32_t;                             // MXCSR
constexpr FloatState kFlush = 1u << 15 | 1u << 6;        // FTZ: denormal results are 0; DAZ: denormal operands are
inline void read_state(FloatState& state) { asm volatile("stmxcsr %0" : "=m"(state) : : "memory"); }
inline void write_state(FloatState state) { asm volatile("ldmxcsr %0" : : "m"(state) : "memory"); }
#elif defined(__aarch64__)
using FloatState = uint64_t;                             // FPCR
constexpr FloatState kFlush = 1u << 24;                  // FZ: results and operands, those of fp16 excepted
inline void read_state(FloatState& state) { asm volatile("mrs %0, fpcr" : "=r"(state) : : "memory"); }
inline void write_state(FloatState state) { asm volatile("msr fpcr, %0" : : "r"(state) : "memory"); }
#else
using FloatState = int;
constexpr FloatState kFlush = 0;
inline void read_state(FloatState& state) { state = 0; }
inline void write_state(FloatState) {}
#endif

// While it lives, denormal numbers are zero in this thread: they are below any tolerance, and Intel's cores take a
// hundred times as long for each of them. The destructor restores the caller's state.
class FlushDenormals {
 public:
  FlushDenormals() {
    read_state(before_);
    write_state(before_ | kFlush);
  }
  ~FlushDenormals() { write_state(before_); }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
  FloatState before_;
};

// body(first, last) for parts of begin..end, on PyTorch's threads.
template <typename Body>
void parallel_for(int64_t begin, int64_t end, const Body& body) {
  torch::stable::parallel_for(begin, end, 1, [&](int64_t first, int64_t last) {
    const FlushDenormals flush;
    body(first, last);
  });
}

}  // namespace dllm
