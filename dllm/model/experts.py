"""Feed-forward layers: SwiGLU, and a mixture of experts in its place (arXiv:1701.06538)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dllm.model import liger
from dllm.model.families import ModelConfig
from dllm.model.liger import LigerLayer


class SwiGLU(LigerLayer):
    """silu(gate) * up (arXiv:2002.05202)."""

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return liger.silu_times(gate, up) if self.by_liger(gate) else F.silu(gate) * up


class FeedForward(SwiGLU):
    """down(silu(gate(x)) * up(x))"""

    def __init__(self, config: ModelConfig, width: int):
        super().__init__()
        D, M = config.hidden_size, width
        self.gate_proj = nn.Linear(D, M, bias=config.mlp_bias)
        self.up_proj = nn.Linear(D, M, bias=config.mlp_bias)
        self.down_proj = nn.Linear(M, D, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.gated(self.gate_proj(x), self.up_proj(x)))


class Router(nn.Module):
    """Which experts a token goes to, and their weights; all in fp32."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        nn.init.normal_(self.weight, std=config.initializer_range)
        bias = torch.zeros(config.num_experts) if config.router_bias else None
        self.register_buffer("expert_bias", bias)  # set by balancing, not by gradients

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [N, D] -> weights [N, k] fp32 and experts [N, k] int64.

        softmax: the k largest probabilities, with the bias in them, are the weights (OLMoE's form). sigmoid: the bias
        takes part in choosing alone, groups of experts are chosen first by their two best (DeepSeek-V3's form).
        """
        config, bias = self.config, self.expert_bias
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.weight.float())
        if config.router_score == "softmax":
            scores = logits.softmax(-1)
            scores = scores if bias is None else scores + bias
            choice = scores
        else:
            scores = logits.sigmoid()
            choice = scores if bias is None else scores + bias
        if config.n_group > 1:
            groups = choice.unflatten(-1, (config.n_group, -1))
            best = groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(-1).topk(config.topk_group, dim=-1).indices
            kept = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter_(-1, best, True)
            choice = groups.masked_fill(~kept.unsqueeze(-1), -torch.inf).flatten(-2)
        experts = choice.topk(config.num_experts_per_tok, dim=-1).indices
        weights = scores.gather(-1, experts)
        if config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * config.routed_scaling_factor, experts


class Experts(SwiGLU):
    """The SwiGLUs of all experts, each projection one tensor [experts, out, in]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        n, D, M = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_proj, self.up_proj = (nn.Parameter(torch.empty(n, M, D)) for _ in range(2))
        self.down_proj = nn.Parameter(torch.empty(n, D, M))
        for weight in self.parameters():
            nn.init.normal_(weight, std=config.initializer_range)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """x [rows, D] sorted by expert; ends [experts] int32, where each one's rows end."""
        gate, up, down = (weight.transpose(1, 2).to(x.dtype) for weight in
                          (self.gate_proj, self.up_proj, self.down_proj))
        inner = self.gated(F.grouped_mm(x, gate, offs=ends), F.grouped_mm(x, up, offs=ends))
        return F.grouped_mm(inner, down, offs=ends)


class MixtureOfExperts(nn.Module):
    """Each token goes to a few experts (arXiv:1701.06538), and to those that all tokens share.

    The rows are sorted by expert, so that each projection of all experts is one grouped product.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = None
        if config.num_shared_experts:
            self.shared_experts = FeedForward(config, config.moe_intermediate_size * config.num_shared_experts)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        weights, experts = self.gate(rows)
        order = experts.flatten().argsort(stable=True)
        ends = torch.bincount(experts.flatten(), minlength=len(self.gate.weight)).cumsum(0).int()
        outputs = self.experts(rows[order // experts.shape[1]], ends)[order.argsort()].unflatten(0, experts.shape)
        out = (outputs * weights.unsqueeze(-1).to(outputs.dtype)).sum(1).view_as(x)
        return out if self.shared_experts is None else out + self.shared_experts(x)
