"""The arithmetic of a run: what `train.precision: auto` stands for on this machine, by a measurement where it must be.

On a CPU bf16 pays where the processor multiplies it natively and the products are large: a probe times one layer and
the head of the model, forward and backward, in both.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from dllm.config.schema import Config
from dllm.files import processor_flags
from dllm.model.families import ModelConfig
from dllm.model.transformer import Transformer
from dllm.training.checkpoint import Checkpoint
from dllm.training.cost import layer_matrices
from dllm.training.distributed import World
from dllm_kernels import linear_masked_cross_entropy

UNITS = ("amx_bf16", "avx512_bf16")  # of x86 processors, see `processor_flags`
WORTH = 1.1  # times faster that bf16 must be, because a probe is noisy and fp32 more exact
_SECONDS, _ROUNDS = 1.0, 5  # of the probe, at most
_TINY, _LARGE = 2**17, 2**23  # elements of a layer's matrices
_SMALL = ModelConfig(family="llama", vocab_size=4096, hidden_size=576, intermediate_size=1536, num_hidden_layers=1,
                     num_attention_heads=9, num_key_value_heads=3, head_dim=64, tie_word_embeddings=True)


@dataclass(frozen=True, slots=True)
class Probe:
    """What one layer and the head took, forward and backward."""

    units: str  # of the processor
    fp32_seconds: float
    bf16_seconds: float

    @property
    def precision(self) -> str:
        return "bf16" if self.fp32_seconds > WORTH * self.bf16_seconds else "fp32"

    def describe(self) -> str:
        return (f"{self.units}: a layer and the head take {1000 * self.bf16_seconds:.0f} ms in bf16, "
                f"{1000 * self.fp32_seconds:.0f} ms in fp32; train.precision=auto takes {self.precision}")


def settle_precision(config: Config, model_config: ModelConfig, resumed: Checkpoint | None,
                     world: World) -> tuple[Config, Probe | None]:
    """The configuration with fp32 or bf16 in the place of auto, and the probe that decided it.

    A resumed run keeps what it had, so that it goes on bit for bit.
    """
    if config.train.precision != "auto":
        return config, None
    chosen, found = "auto" if resumed is None else resumed.state["config"]["train"]["precision"], None
    if chosen == "auto" and world.device.type == "cuda":
        chosen = "bf16"
    elif chosen == "auto":
        if resumed is None:  # else a run older than the probe, which was fp32
            tokens = config.train.micro_batch_size * config.data.max_seq_len
            found = world.from_main(lambda: probe(model_config, tokens))
        chosen = "fp32" if found is None else found.precision
    return replace(config, train=replace(config.train, precision=chosen)), found


def probe(config: ModelConfig = _SMALL, tokens: int = 128) -> Probe | None:
    """Time both arithmetics for about a second, on random weights; None where the processor has no units for bf16, or
    the layers are so small that its casts cost more than its products save.

    A layer too large to be drawn and timed in that, or one of Transformers, is replaced by a smaller one of ours, which
    gains less.
    """
    flags = processor_flags()
    units = next((name for name in UNITS if name in flags), None)
    if units is None or layer_matrices(config) / config.num_hidden_layers < _TINY:
        return None
    one = replace(config, num_hidden_layers=1, first_k_dense_replace=0, vocab_size=min(config.vocab_size, 4096),
                  mask_token_id=None, tie_word_embeddings=True)
    large = layer_matrices(one) * max(1, one.num_experts) > _LARGE
    if large or config.borrowed or one.canvas_length is not None:
        one = _SMALL
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Transformer(one)
        ids = torch.randint(one.vocab_size, (1, min(tokens, 128, one.max_position_embeddings)))
    best = time_both(lambda: step(model, ids))
    return Probe(units, best[False], best[True])


def step(model: Transformer, ids: Tensor) -> None:
    hidden = model.hidden_states(ids)
    masked = torch.arange(ids.shape[1]).unsqueeze(0) % 2 == 0
    linear_masked_cross_entropy(hidden, model.head_weight, ids, masked, reduction="sum").backward()
    model.zero_grad(set_to_none=True)


def time_both(run: Callable[[], None]) -> dict[bool, float]:
    """The least seconds of `run` without and with bf16 autocast, by turns, after a first time that does not count."""
    best = {False: float("inf"), True: float("inf")}
    begin = time.perf_counter()
    for number in range(_ROUNDS + 1):
        for bf16 in best:
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                run()
            best[bf16] = min(best[bf16], time.perf_counter() - start) if number else best[bf16]
        if number and time.perf_counter() - begin > _SECONDS:
            break
    return best


def as_record(found: Probe | None) -> dict | None:
    """Plain values, for a checkpoint's state."""
    return None if found is None else {**asdict(found), "precision": found.precision}
