"""Settings with which published systems decode and cut answers to the code benchmarks; each entry names its source.

A preset has settings for completion and for infilling; the others keep their defaults.
"""

from dataclasses import dataclass, field

CODE_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")  # OpenAI's Codex paper, and lm-eval's humaneval
MBPP_STOPS = ("\nclass", "\n#", "\nif", "\nprint")  # Open-dLLM's mbpp
LENGTHS = (4, 8, 16, 32, 64)  # masked tokens, DreamOn's protocol for an average over fixed lengths


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    generation: dict = field(default_factory=dict)  # fields of MDMGenerationConfig
    samples: int = 1  # samples of each task
    # Length of a gap: tokens, "oracle" (that of the answer), "average" over LENGTHS, or "auto"; None without a gap.
    length: int | str | None = "oracle"
    framed: bool = False  # the text of a gap has the tokenizer's first and last tokens around it
    context: int = 2048  # tokens of the prompt, or around a gap


_MASK_DFM = {"steps": 1000, "alg": "flow", "flow_schedule": "cube", "temperature": 0.8, "top_k": 2, "cfg_scale": 1.5,
             "corrector": (5, 0.25, 0.5)}

PRESETS: dict[str, dict[str, Preset]] = {
    # Open-dLLM's eval/eval_completion/run_eval.sh and eval/eval_infill/run_eval.sh. In the first, top_p does not
    # reach the sampler, and top_k 200 does.
    "open_dllm": {
        "completion": Preset(samples=10, generation={"max_new_tokens": 128, "steps": 128, "temperature": 0.8,
                                                     "alg": "p2", "top_k": 200}),
        "infill": Preset(generation={"steps": 64, "temperature": 0.6, "alg": "p2", "top_p": 0.95, "alg_temp": 0.5})},
    # LLaDA's eval_llada.sh: one block as long as the answer.
    "llada": {
        "completion": Preset(generation={"max_new_tokens": 1024, "steps": 1024, "remasking": "low_confidence"}),
        "infill": Preset(generation={"steps": 512, "remasking": "low_confidence"}, length="average")},
    # Dream's eval_dream_gen.sh.
    "dream": {
        "completion": Preset(generation={"max_new_tokens": 512, "steps": 512, "temperature": 0.2, "top_p": 0.95,
                                         "alg": "entropy"}),
        "infill": Preset(generation={"steps": 512, "temperature": 0.2, "top_p": 0.95, "alg": "entropy"},
                         length="average")},
    # DreamOn's eval_humaneval_infilling.sh. Gaps grow with --expand-token-id, which is the checkpoint's.
    "dreamon": {
        "completion": Preset(generation={"max_new_tokens": 512, "steps": 512, "temperature": 0.2, "top_p": 0.9,
                                         "alg": "entropy"}),
        "infill": Preset(generation={"steps": 256, "temperature": 0.2, "top_p": 0.9, "alg": "entropy"},
                         length="average", framed=True)},
    # The generation_config.json of DiffusionGemma, which fills no gaps.
    "diffusion_gemma": {
        "completion": Preset(generation={"max_new_tokens": 512, "steps": 48, "alg": "entropy_bound"}),
        "infill": Preset(generation={"steps": 48, "alg": "entropy_bound"})},
    # Mask DFM of Edit Flows' table 5 (arXiv:2506.09018), best of its search for pass@1; its answers have up to 1024
    # tokens.
    "mask_dfm": {
        "completion": Preset(generation={"max_new_tokens": 1024, **_MASK_DFM}), "infill": Preset(generation=_MASK_DFM)},
}
