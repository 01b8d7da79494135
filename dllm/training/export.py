"""A trained model as a folder to publish: weights, tokenizer, generation defaults, and a record of the run."""

import hashlib
import platform
from importlib.metadata import version
from pathlib import Path

import torch

from dllm.errors import Failure, UserError, first_line
from dllm.files import check_new_folder, write_atomically, write_json
from dllm.model.diffusion_gemma import DiffusionGemma
from dllm.model.loading import is_diffusion_gemma
from dllm.model.tokenizer import load_tokenizer
from dllm.model.transformer import Transformer
from dllm.training.checkpoint import Checkpoint, find_damage, load_latest, read_checkpoint
from dllm.training.metrics import read_lines

MANIFEST = "dllm_run.json"


def export(source: str, folder: Path, dtype: torch.dtype = torch.float32, **tokens) -> Path:
    """Write the newest checkpoint of a run, or a checkpoint, into a new folder that Transformers loads too.

    Args:
        source: train.output_dir of a run, or one of its folders global_step_N.
        dtype: of the weights.
        tokens: mask_token, mask_token_id and trust_remote_code, as `Transformer.from_pretrained` takes them.
    Raises: UserError if there is no such checkpoint, it is damaged or has no weights for others, or the folder is not
        empty; Failure if it cannot be written.
    """
    checkpoint = find_checkpoint(Path(source))
    check_new_folder(folder)
    if not any(checkpoint.hf_folder.glob("*.safetensors")):
        raise UserError(f"{checkpoint.folder} holds no weights for others, because of train.save_hf_weights=false; "
                        "export the last checkpoint of the run")
    kind = DiffusionGemma if is_diffusion_gemma(checkpoint.hf_folder) else Transformer
    model = kind.from_pretrained(checkpoint.hf_folder, dtype=dtype, **tokens)
    tokenizer = load_tokenizer(checkpoint.hf_folder, model.mask_token_id,
                               trust_remote_code=tokens.get("trust_remote_code", False))
    names = ["mask_token_id"] * (model.config.canvas_length is None) + ["eos_token_id", "pad_token_id"]
    defaults = {name: getattr(model.config, name) for name in names}
    model.generation_defaults = {**defaults, **(model.generation_defaults or {})}
    manifest = describe_run(checkpoint.state, checkpoint.folder, model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_json(folder / MANIFEST, manifest)
    write_atomically(folder / "README.md", write_card(manifest, model).encode())
    return folder


def find_checkpoint(source: Path) -> Checkpoint:
    """The newest whole checkpoint in a run's output_dir, or the checkpoint itself.

    Raises: UserError if there is no checkpoint, or it is damaged.
    """
    if (source / "manifest.json").exists():
        if problem := find_damage(source):
            raise UserError(f"{source} is damaged ({problem}); export another checkpoint")
        return read_checkpoint(source)
    newest = load_latest(source / "checkpoints")
    if newest is None:
        raise UserError(f"{source} holds no checkpoint; give the output_dir of a training run, or its folder "
                        "checkpoints/global_step_N")
    return newest


def describe_run(state: dict, folder: Path, model: Transformer) -> dict:
    """The record of the run: its progress, configuration and versions, and a hash of the weights."""
    lines = read_lines(folder.parents[1] / "metrics.jsonl", state["step"])
    measured = [line for line in lines if "validation_loss" in line]
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return {"step": state["step"], "tokens": state["tokens"], "seconds": round(state["seconds"], 1),
            "measured": measured[-1] if measured else None, "config": state["config"],
            "precision_probe": state.get("probe"),
            "parameters": model.count_parameters(), "dtype": str(model.dtype).removeprefix("torch."),
            "weights_sha256": digest.hexdigest(),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in
                                                                  ("dllm", "torch", "transformers", "tokenizers")}}}


def write_card(manifest: dict, model: Transformer) -> str:
    """README.md of the folder, as the hub shows it."""
    train, data, start = (manifest["config"][group] for group in ("train", "data", "model"))
    measured = manifest["measured"] or {}
    rows = [("parameters", f"{manifest['parameters']:,}"), ("family", model.config.family),
            ("objective", train["objective"]), ("steps", f"{manifest['step']:,}"),
            ("tokens", f"{manifest['tokens']:,}"),
            ("trained on", data["train_path"] or "the standard library of Python"),
            ("started from", start["model_path"] or "random weights"), ("seed", train["seed"]),
            *((name.replace("_", " "), f"{value:.4f}") for name, value in measured.items()
              if name.startswith("validation"))]
    base = f"base_model: {start['model_path']}\n" if start["model_path"] and "/" in start["model_path"].strip("/") \
        and not Path(start["model_path"]).exists() else ""
    kind = "masked" if model.config.canvas_length is None else "canvas"
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return (f"---\nlibrary_name: dllm\npipeline_tag: text-generation\ntags: [diffusion-language-model]\n{base}---\n\n"
            f"# A {kind} diffusion language model\n\n| | |\n|---|---|\n{table}\n\n"
            f"Everything that made it, configuration and versions, is in `{MANIFEST}`.\n\n"
            "```python\nimport dllm\n\nmodel = dllm.DiffusionLM.from_pretrained(\"this/repository\")\n```\n\n"
            "On the command line: `dllm sample this/repository --prompt 'def add('`\n")


def push(folder: Path, repository: str, private: bool) -> str:
    """Upload the folder to the Hugging Face hub, as the user who is logged in; returns its address.

    Raises: Failure if the hub refuses or does not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    hub = HfApi()
    try:
        address = hub.create_repo(repository, private=private, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="Add the model")
    except HFValidationError as error:
        raise UserError(f"{repository!r} is no name of a repository: {first_line(error)}") from error
    except LocalTokenNotFoundError as error:
        raise UserError("nobody is logged in to the hub; run hf auth login, or set HF_TOKEN") from error
    except (HfHubHTTPError, OSError) as error:
        raise Failure(f"{folder} is written, but the hub did not take it as {repository}: "
                      f"{first_line(error)}; check the token and the network, then upload it with "
                      "hf upload") from error
    return str(address)
