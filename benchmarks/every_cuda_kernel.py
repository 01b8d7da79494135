"""A small call of every CUDA C++ kernel, for compute-sanitizer: odd sizes, unaligned rows, and masks."""

import torch

from dllm_kernels import bidirectional_attention, linear_masked_cross_entropy, masked_cross_entropy, topk_unmask


def main() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(3, (2, 37), device="cuda")
    k = torch.tensor([5, 40], device="cuda")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        logits = torch.randn(2, 37, 1003, device="cuda").to(dtype)
        allowed = torch.rand(1003, device="cuda") < 0.5
        for confidence in ("prob", "margin", "entropy"):
            for settings in ({}, {"temperature": 0.7, "confidence_of": "raw"}, {"temperature": 0.9, "top_p": 0.8},
                             {"allowed": allowed, "selection_temperature": 0.5}):
                topk_unmask(logits, tokens, 0, k, confidence=confidence, backend="cuda", **settings)
        topk_unmask(logits[tokens == 0], tokens, 0, k, backend="cuda")
        logits.requires_grad_()
        for softcap in (None, 30.0):
            masked_cross_entropy(logits, tokens, tokens == 0, softcap=softcap, backend="cuda").backward()
        hidden, head = (torch.randn(*shape, 8, device="cuda").to(dtype).requires_grad_()
                        for shape in ((2, 37), (1003,)))
        for scored in (tokens < 20, tokens > 0):
            linear_masked_cross_entropy(hidden, head, tokens, scored, backend="cuda").backward()
    for E in (32, 64, 128, 256):
        for queries, keys in ((1, 5), (17, 130)):
            q, cached = torch.randn(2, queries, 4, E, device="cuda"), torch.randn(2, 3, keys, 2, E, device="cuda")
            q, (key, value) = q.bfloat16(), cached.bfloat16()
            key_mask = torch.rand(2, keys, device="cuda") < 0.7
            rows = torch.tensor([2, 0], device="cuda")
            bidirectional_attention(q, key[:2], value[:2], backend="cuda")
            bidirectional_attention(q, key, value, key_mask=key_mask, cache_rows=rows, backend="cuda")
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
