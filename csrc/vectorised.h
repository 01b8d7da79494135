// Functions compiled once per instruction set; the loader picks the best for the machine it runs on.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define DLLM_VECTORISED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define DLLM_VECTORISED
#endif

// Inlined into each of the versions; a function called from them would be compiled for the oldest machine only.
#define DLLM_INLINE inline __attribute__((always_inline))
