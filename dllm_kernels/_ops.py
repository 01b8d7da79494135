"""The namespace of the operators that Python registers. kernel-builder puts its own module in this place, with a
namespace for each build."""


def add_op_namespace_prefix(name: str) -> str:
    return f"dllm_kernels::{name}"
