// Instructions of sm_80 and newer, each as a function. A test puts functions for the CPU in their place (see
// tests/kernels/simt.h), so what uses them names no other instruction.
#ifndef DLLM_TENSOR_CORES
#define DLLM_TENSOR_CORES

#include <cuda_runtime.h>

#include <cstdint>

namespace dllm {

enum class Number { bf16, fp16 };  // of 16 bits, and handled as such

// Two numbers, `low` at the lower address.
template <Number kNumber>
__device__ inline uint32_t pack(float low, float high) {
  uint32_t both;
  if constexpr (kNumber == Number::bf16)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

template <Number kNumber>
__device__ inline float widen(uint16_t x) {
  if constexpr (kNumber == Number::bf16) return __uint_as_float(static_cast<uint32_t>(x) << 16);
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x));
  return value;
}

// 2^x; what is below 2^-126 becomes 0.
__device__ inline float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// c [16, 8] += a [16, 16] b [16, 8], the fragments of a warp as mma.m16n8k16 has them.
template <Number kNumber>
__device__ inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (kNumber == Number::bf16)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Four 8 x 8 matrices of shared memory; lane l points to row l % 8 of matrix l / 8, 16 aligned bytes. A lane gets, of
// each, columns 2 (l % 4) and the next of row l / 4: transposed, of the matrix turned.
template <bool kTransposed>
__device__ inline void load_matrices(uint32_t (&to)[4], const uint16_t* row) {
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// 16 aligned bytes into shared memory, zeros unless `there`; they have arrived after end_group and wait_for_groups.
__device__ inline void copy_16_bytes(uint16_t* to, const uint16_t* from, bool there) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(there ? 16 : 0)
               : "memory");
}
__device__ inline void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int left>  // groups of this thread, the last ones, that may still be on their way
__device__ inline void wait_for_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
}

}  // namespace dllm

#endif
