"""A toy model's whole evaluation, recorded in evaluation.json by `python -m tests.dllm.evaluators.record_evaluation`.

A model of random weights answers four tasks twice; some samples pass. Everything derives from constants in this file.
"""

import json
import tempfile
from pathlib import Path

import torch

from dllm import cli
from dllm.diffusion_lm import DiffusionLM
from dllm.model.families import ModelConfig
from dllm.model.tokenizer import train_tokenizer

RECORD = Path(__file__).with_name("evaluation.json")
TEXT = "def add(a, b):\n    return a + b\n\n\nclass Pair:\n    x = 1\n    y = 2\n" * 4
# (beginning of the function, its end). After a sign of comment almost everything is right.
TASKS = [("    return a + b  # ", "the sum"), ("    return a + b  # and", " that is all"), ("", "    return a + b"),
         ("    return a", " + b")]
FLAGS = ["--samples", "2", "--steps", "4", "--max-new-tokens", "6", "--batch-size", "3", "--seed", "7",
         "--device", "cpu", "--dtype", "float32"]


def evaluate(folder: Path) -> dict:
    """The result of `dllm eval humaneval`, without fields that depend on the clock and the machine."""
    tokenizer = train_tokenizer([TEXT], 300)
    model = DiffusionLM(ModelConfig(
        family="qwen3", vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, qk_norm=True, tie_word_embeddings=True,
        max_position_embeddings=64, mask_token_id=tokenizer.mask_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    whole = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():  # whole numbers, which every machine draws alike, in 128ths
            weight.copy_(torch.randint(-50, 51, weight.shape, generator=whole) / 128)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"task_id": f"HumanEval/{i}", "prompt": f"def add(a, b):\n{start}", "entry_point": "add",
             "canonical_solution": answer, "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n"}
            for i, (start, answer) in enumerate(TASKS)]
    (folder / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["eval", "humaneval", str(folder / "model"), "--data", str(folder / "tasks.jsonl"),
               "--output-dir", str(folder / "run"), *FLAGS]
    if cli.main(command) != 0:
        raise RuntimeError("the evaluation failed")
    samples = [json.loads(line) for line in (folder / "run" / "samples.jsonl").read_text().splitlines()]
    result = json.loads((folder / "run" / "results.json").read_text())
    manifest = result["manifest"]
    return {
        "torch": manifest["versions"]["torch"],
        "weights": manifest["weights"], "tokenizer": manifest["tokenizer"], "data": manifest["data"]["sha256"],
        "samples": [{key: value for key, value in row.items() if key != "seconds"} for row in samples],
        "verdicts": [row["verdict"] for row in result["results"]],
        "pass@1": result["pass@1"], "intervals_95": result["intervals_95"],
        "unfilled_tokens": result["unfilled_tokens"], "tokens_per_forward": result["speed"]["tokens_per_forward"]}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        RECORD.write_text(json.dumps(evaluate(Path(name)), indent=1) + "\n")
