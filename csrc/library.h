// Registration of the operators in the namespace of this build: dllm_kernels_native, or, where Hugging Face's
// kernel-builder builds (it defines CPU_KERNEL or CUDA_KERNEL), a name of its own for each build, because several
// versions may be loaded in one process.
#pragma once

#include <torch/csrc/stable/library.h>

#if defined(CPU_KERNEL) || defined(CUDA_KERNEL)
#define DLLM_NAMESPACE TORCH_EXTENSION_NAME
#else
#define DLLM_NAMESPACE dllm_kernels_native
#endif

// Through one more macro, because torch's do not expand a name that is a macro itself.
#define DLLM_LIBRARY_OF(name, m) STABLE_TORCH_LIBRARY(name, m)
#define DLLM_LIBRARY_IMPL_OF(name, device, m) STABLE_TORCH_LIBRARY_IMPL(name, device, m)
#define DLLM_LIBRARY(m) DLLM_LIBRARY_OF(DLLM_NAMESPACE, m)
#define DLLM_LIBRARY_IMPL(device, m) DLLM_LIBRARY_IMPL_OF(DLLM_NAMESPACE, device, m)
