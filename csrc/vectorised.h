// Functions compiled once per instruction set; the loader picks the best one for the machine.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define DLLM_VECTORISED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define DLLM_VECTORISED
#endif

// Defines name(parameters), which calls name_of_width<width>(arguments) with the machine's vector width: 16, 8 or 4
// floats. The template's code must be always inlined. DLLM_WIDTH=8, for example, fixes the width everywhere (a test
// does so).
#if defined(DLLM_WIDTH)
#define DLLM_BY_WIDTH(name, parameters, arguments)                                                        \
  __attribute__((target("arch=x86-64-v3"))) inline void name parameters { name##_of_width<DLLM_WIDTH> arguments; }
#elif defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define DLLM_BY_WIDTH(name, parameters, arguments)                                                        \
  __attribute__((target("arch=x86-64-v4,prefer-vector-width=512"))) inline void name##_16 parameters {    \
    name##_of_width<16> arguments;                                                                        \
  }                                                                                                       \
  __attribute__((target("arch=x86-64-v3"))) inline void name##_8 parameters {                             \
    name##_of_width<8> arguments;                                                                         \
  }                                                                                                       \
  inline void name parameters {                                                                           \
    if (__builtin_cpu_supports("x86-64-v4")) return name##_16 arguments;                                  \
    if (__builtin_cpu_supports("x86-64-v3")) return name##_8 arguments;                                   \
    name##_of_width<4> arguments;                                                                         \
  }
#else
#define DLLM_BY_WIDTH(name, parameters, arguments) \
  inline void name parameters { name##_of_width<4> arguments; }
#endif

// Inlined into each version, because a function that they call would be compiled for the oldest machine only.
#define DLLM_INLINE inline __attribute__((always_inline))
