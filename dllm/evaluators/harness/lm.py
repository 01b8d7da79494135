"""lm-evaluation-harness: our models under the name `dllm`, in its own command and in `dllm eval`.

lm-eval's main branch finds `HarnessLM` by the entry point of pyproject.toml (its docs/plugins.md); its release 0.4.13
does not yet. With either, `dllm lm_eval ...` is its command with the model and our task files (lm_eval_tasks/) added.
"""

import difflib
import hashlib
import json
import logging
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import dllm
from dllm.checkpoint import write_json
from dllm.errors import UserError
from dllm.evaluators.generating import (
    RunSettings,
    check_same_run,
    describe,
    hash_files,
)
from dllm.evaluators.perplexity import bound_likelihood
from dllm.evaluators.presets import Preset
from dllm.evaluators.tasks import TaskSet
from dllm.model import DiffusionLM, find_model, load_with_tokenizer
from dllm.sampler import MDMGenerationConfig, denoise, find_mask_token
from dllm.tokenizer import cut_at_end, decode_after, encode

TASKS = Path(__file__).with_name("lm_eval_tasks")
LIKELIHOOD_SAMPLES = 128  # LLaDA's eval_llada.py
_GENERATION = tuple(field.name for field in fields(MDMGenerationConfig)
                    if field.name not in ("num_return_sequences", "output_history", "constraint"))
_ARGUMENTS = ("pretrained", "device", "dtype", "batch_size", "likelihood_samples", *_GENERATION)
_FROM_TASK = {"until", "do_sample", "max_gen_toks", "temperature", "top_p", "top_k", "gap"}

logger = logging.getLogger(__name__)


class Gap(NamedTuple):
    """Tokens before and after `length` masked positions. `number` picks its random numbers."""

    before: Tensor  # [P] int64
    after: Tensor  # [S]
    length: int
    number: int


@register_model("dllm")
class HarnessLM(TemplateLM):
    """A masked diffusion model for lm-eval.

    Likelihoods are lower bounds on log p, by Monte Carlo with `likelihood_samples` corrupted copies of each sequence
    (`bound_likelihood`); they depend on the seed and the texts, not on order or batches. "Greedy" is a continuation
    that the model writes itself, its surest token first, one a step. Texts are denoised `batch_size` together; what
    a task asks (max_gen_toks, temperature, top_p, top_k) holds where `generation` does not say otherwise.
    """

    def __init__(self, model: DiffusionLM, tokenizer, *, batch_size: int = 16,
                 likelihood_samples: int = LIKELIHOOD_SAMPLES, source: str | Path | None = None, **generation):
        """
        Args:
            source: the model's folder, whose weights the results have a hash of.
            generation: fields of MDMGenerationConfig; `seed` is 0 where it is not given, `steps` as many as tokens.
        """
        super().__init__()
        for name, value, least in (("batch_size", batch_size, 1), ("likelihood_samples", likelihood_samples, 2)):
            if not isinstance(value, int) or value < least:
                raise UserError(f"{name} must be a number of at least {least}, not {value!r}")
        self.model, self.tokenizer, self.source = model, tokenizer, source
        self.batch_size, self.likelihood_samples = batch_size, likelihood_samples
        self.generation = {"seed": 0, **generation}
        self.config({})  # what is wrong with it is said before anything is computed
        find_mask_token(model, self.config({}))
        self._device = model.device

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict, additional_config: dict | None = None) -> "HarnessLM":
        """From lm-eval's --model_args, --batch_size and --device, of which the first go before the others.

        Raises: UserError for an unknown argument, a bad value, or a model that cannot be loaded.
        """
        given = {name: value for name, value in (additional_config or {}).items()
                 if value is not None and name != "max_batch_size"}
        if given.get("device") == "cuda:0":  # lm-eval's default, GPU or not
            given["device"] = "auto"
        given |= arg_dict
        for name in given:
            if name not in _ARGUMENTS:
                near = difflib.get_close_matches(name, _ARGUMENTS, n=1)
                raise UserError(f"model_args has no {name!r}{f'; did you mean {near[0]}?' if near else ''} It takes "
                                + ", ".join(_ARGUMENTS))
        if "pretrained" not in given:
            raise UserError("model_args needs pretrained=MODEL, a folder or a hub repository as owner/name")
        path, size = given.pop("pretrained"), str(given.pop("batch_size", 16))
        if not size.isdecimal():
            raise UserError(f"batch_size must be a number, not {size!r}: sequences denoised together")
        given = {name: None if value == "none" and name != "cache" else value for name, value in given.items()}
        model, tokenizer = load_with_tokenizer(path, str(given.pop("device", "auto")), str(given.pop("dtype", "auto")))
        return cls(model, tokenizer, batch_size=int(size), source=find_model(path), **given)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> "HarnessLM":
        from lm_eval.utils import simple_parse_args_string

        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    def get_model_info(self) -> dict:
        """What lm-eval's results say of the model."""
        files = [] if self.source is None else sorted(Path(self.source).glob("*.safetensors"))
        return {"dllm_version": dllm.__version__, "model_family": self.model.config.family,
                "model_dtype": str(self.model.dtype), "model_weights_sha256": hash_files(files) if files else None,
                "loglikelihood": "lower bound on log p, by Monte Carlo",
                "likelihood_samples": self.likelihood_samples, "generation": self.generation}

    def config(self, wanted: dict) -> MDMGenerationConfig:
        """The settings for a request: those of the model, then those of the task's generation_kwargs."""
        for name in wanted.keys() - _FROM_TASK:
            _warn_once(f"the task's generation setting {name} means nothing to a diffusion model; it is left out")
        wanted = normalize_gen_kwargs(wanted)
        asked = {"max_new_tokens": wanted["max_gen_toks"], "temperature": float(wanted.get("temperature", 0.0))}
        if asked["temperature"] > 0:
            asked |= {name: wanted[name] for name in ("top_p", "top_k") if wanted.get(name)}
        asked |= self.generation
        if "gap" not in wanted:
            asked.setdefault("steps", asked["max_new_tokens"])
        try:
            return MDMGenerationConfig(**asked)
        except TypeError as error:  # text where a number is wanted, say
            raise UserError(f"model_args has a value of the wrong kind ({error}): {asked}") from None

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """Without special tokens, whatever is asked: models are trained on texts without a first token of their own."""
        return encode(self.tokenizer, string).tolist()

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if not self.tokenizer.chat_template:
            raise UserError("this model has no chat template, so it was not trained on conversations; leave "
                            "--apply_chat_template out")
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt)

    def set_cache_hook(self, cache_hook) -> None:
        if cache_hook.dbdict is not None and self.config({}).temperature > 0:
            raise UserError("use_cache would give all repeats of a prompt the same sample; leave it out, or the "
                            "temperature")
        super().set_cache_hook(cache_hook)

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """The text up to the first stop string. A request whose settings have `gap` fills the gap between its
        document's `before` and `after`: with so many tokens, or with `oracle` those of its `canonical`."""
        seen: Counter[str] = Counter()
        groups: dict[MDMGenerationConfig, list[tuple[int, Gap]]] = {}
        for index, request in enumerate(requests):
            context, wanted = request.args[:2]
            config = self.config(wanted)
            number = zlib.crc32(f"{seen[context]} {context}".encode("utf-8", "surrogatepass"))
            seen[context] += 1  # repeats of a prompt differ
            groups.setdefault(config, []).append((index, self._gap(request, wanted, config, number)))
        texts = [""] * len(requests)
        with tqdm(total=len(requests), desc="dllm generate_until", disable=disable_tqdm or None) as bar:
            for config, part in groups.items():
                for place, answer in self._fill([gap for _, gap in part], config):
                    index, gap = part[place]
                    until = requests[index].args[1].get("until") or []
                    text = decode_after(self.tokenizer, gap.before, cut_at_end(self.tokenizer, answer))
                    for stop in [until] if isinstance(until, str) else until:
                        text = text.split(stop)[0]
                    texts[index] = text
                    bar.update()
        return texts

    def _gap(self, request, wanted: dict, config: MDMGenerationConfig, number: int) -> Gap:
        if "gap" not in wanted:
            before = self._tensor(request.args[0])
            room = self.model.config.max_position_embeddings - config.max_new_tokens
            if room < 1:
                raise UserError(f"{config.max_new_tokens} new tokens leave no room for a prompt: the model has "
                                f"{self.model.config.max_position_embeddings} positions; lower max_new_tokens")
            if len(before) > room:
                _warn_once(f"prompts of more than {room} tokens are cut on the left, to fit the model's positions")
            return Gap(before[-room:], before[:0], config.max_new_tokens, number)
        before, after = self._tensor(request.doc["before"]), self._tensor(request.doc["after"])
        length = wanted["gap"]
        if length == "oracle":
            length = max(1, len(self.tok_encode(request.doc["canonical"])))
        if not isinstance(length, int) or length < 1:
            raise UserError(f"gap must be a number of tokens or oracle, not {length!r}")
        most = max(length, 0 if config.expand_token_id is None else config.max_infill_length)
        if (need := len(before) + len(after) + most) > self.model.config.max_position_embeddings:
            raise UserError(f"a text with its gap needs {need} positions, the model has "
                            f"{self.model.config.max_position_embeddings}")
        return Gap(before, after, length, number)

    def _fill(self, gaps: Sequence[Gap], config: MDMGenerationConfig) -> Iterable[tuple[int, Tensor]]:
        """(index, tokens [length]) of each gap, the longest texts first."""
        mask = find_mask_token(self.model, config)
        order = sorted(range(len(gaps)), key=lambda i: -(len(gaps[i].before) + len(gaps[i].after) + gaps[i].length))
        for start in range(0, len(order), self.batch_size):
            batch = order[start:start + self.batch_size]
            rows = [torch.cat((gap.before, torch.full((gap.length,), mask), gap.after))
                    for gap in (gaps[i] for i in batch)]
            # A cache wants the positions to fill in the same columns, and a gap that grows moves what is after it.
            side = "right" if config.expand_token_id is not None else "left"
            canvas = pad_sequence(rows, batch_first=True, padding_side=side)
            visible = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side).bool()
            out = denoise(self.model, canvas, config, visible, sequence=torch.tensor([gaps[i].number for i in batch]))
            if out.attention_mask is not None:
                visible = out.attention_mask.cpu()
            for i, row, real in zip(batch, out.sequences.cpu(), visible, strict=True):
                row = row[real]
                yield i, row[len(gaps[i].before):len(row) - len(gaps[i].after)]

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        limit = self.model.config.max_position_embeddings
        pairs = []
        for _, context, continuation in requests:
            if not 0 < len(continuation) < limit:
                raise UserError(f"a continuation of {len(continuation)} tokens cannot be scored: it must have one at "
                                f"least, and with one before it fit the model's {limit} positions")
            pairs.append((tuple(context[len(continuation) - limit:]), tuple(continuation)))
        written = self._write_surest(pairs)
        return [(self._bound(context, continuation), written[context, len(continuation)] == continuation)
                for context, continuation in tqdm(pairs, desc="dllm loglikelihood", disable=disable_tqdm or None)]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, cut into windows that fit the model, each given its first token (or the end of text)."""
        size = self.model.config.max_position_embeddings - 1
        results = []
        for request in tqdm(requests, desc="dllm loglikelihood_rolling", disable=disable_tqdm or None):
            windows = get_rolling_token_windows(self.tok_encode(request.args[0]), self.prefix_token_id, size, 1)
            results.append(sum(self._bound(*map(tuple, make_disjoint_window(window))) for window in windows))
        return results

    def _bound(self, context: tuple[int, ...], continuation: tuple[int, ...]) -> float:
        """Lower bound on log p(continuation | context). The seed is the same for all continuations of a context, so
        that choices are compared on the same draws, and another for another context, so that errors average out."""
        ids = torch.tensor([*context, *continuation])
        scored = torch.arange(len(ids)) >= len(context)
        seed = zlib.crc32(repr((self.generation["seed"], context)).encode())
        return -float(bound_likelihood(self.model, ids, scored=scored.unsqueeze(0), samples=self.likelihood_samples,
                                       seed=seed).nats)

    def _write_surest(self, pairs: Sequence[tuple[tuple, tuple]]) -> dict[tuple, tuple]:
        """By (context, length) the continuation that is written one token a step, the surest first."""
        keys = list(dict.fromkeys((context, len(continuation)) for context, continuation in pairs))
        none = torch.zeros(0, dtype=torch.long)
        gaps = [Gap(torch.tensor(context, dtype=torch.long), none, length, 0) for context, length in keys]
        config = MDMGenerationConfig(steps=max((length for _, length in keys), default=1), remasking="low_confidence",
                                     mask_token_id=self.generation.get("mask_token_id"), seed=0)
        return {keys[i]: tuple(answer.tolist()) for i, answer in self._fill(gaps, config)}

    def _tensor(self, text: str) -> Tensor:
        return torch.tensor(self.tok_encode(text), dtype=torch.long)


_warned: set[str] = set()


def _warn_once(text: str) -> None:
    if text not in _warned:
        _warned.add(text)
        logger.warning(text)


def run_command_line(arguments: Sequence[str]) -> int:
    """lm-eval's own command, which then knows the model `dllm` and our task files."""
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    setup_logging()
    sys.argv = ["lm_eval", *arguments]  # it reads nothing else
    command = HarnessCLI()
    try:
        args = command.parse_args()
    except SystemExit as end:
        return end.code
    if hasattr(args, "include_path"):
        args.include_path = [str(TASKS), *([args.include_path] if args.include_path else [])]
    command.execute(args)
    return 0


def find_task(name: str, include_path: str | None = None, others: Sequence[str] = ()):
    """lm-eval's task manager, with the task or group in it.

    others: names that could be meant as well.
    Raises: UserError if it knows none of this name.
    """
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=[str(TASKS), *([include_path] if include_path else [])])
    if name not in manager.all_tasks:
        near = difflib.get_close_matches(name, [*others, *manager.all_tasks], n=1)
        raise UserError(f"there is no task {name!r}{f'; did you mean {near[0]}?' if near else ''} See dllm eval --help "
                        "and dllm lm_eval ls tasks; a folder with task files can be named with --include-path")
    return manager


def evaluate_task(lm: HarnessLM, name: str, manager, folder: str | Path, *, limit: int | None = None,
                  num_fewshot: int | None = None, apply_chat_template: bool = False, unsafe_code: bool = False) -> dict:
    """A task of lm-eval's, as a run in a folder: manifest.json before it, results.json with every sample after it.

    Returns: the record of results.json.
    Raises: UserError if the folder has another run, or the task's data cannot be had.
    """
    import lm_eval
    from lm_eval.utils import handle_non_serializable

    folder = Path(folder)
    try:
        loaded = manager.load([name])["tasks"]
    except (OSError, ImportError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"the data of {name} cannot be had ({reason})") from error
    digest, count = hashlib.sha256(), 0
    for task in loaded.values():
        docs = list(task.eval_docs)[:limit]
        count += len(docs)
        for doc in docs:
            digest.update(json.dumps(doc, sort_keys=True, default=handle_non_serializable).encode())
    tasks = TaskSet(name=name, tasks={}, source="lm-eval", md5="", sha256=digest.hexdigest())
    manifest = describe(lm.model, lm.tokenizer, tasks, RunSettings(batch_size=lm.batch_size), Preset(), lm.config({}),
                        lm.source, count)
    manifest |= {"preset": None, "length": None, "data": {"source": "lm-eval", "sha256": digest.hexdigest()},
                 "generation": lm.generation, "likelihood_samples": lm.likelihood_samples, "num_fewshot": num_fewshot,
                 "limit": limit, "apply_chat_template": apply_chat_template}
    manifest["versions"]["lm_eval"] = lm_eval.__version__
    check_same_run(folder, manifest)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "manifest.json", manifest)
    try:
        results = lm_eval.simple_evaluate(
            lm, tasks=[name], task_manager=manager, limit=limit, num_fewshot=num_fewshot,
            apply_chat_template=apply_chat_template, fewshot_as_multiturn=apply_chat_template,
            confirm_run_unsafe_code=unsafe_code)
    except ValueError as error:
        if "marked as unsafe" in str(error):
            raise UserError(f"{name} runs what the model writes, outside our sandbox; give --unsafe-code if you trust "
                            "it that far, or take one of dllm's own tasks") from None
        raise
    results = json.loads(json.dumps(results, default=handle_non_serializable))
    record = {"task": name, "results": results["results"], "groups": results.get("groups", {}),
              "samples_scored": results["n-samples"], "higher_is_better": results["higher_is_better"],
              "task_versions": results["versions"], "config": results["config"], "manifest": manifest,
              "samples": results["samples"]}
    write_json(folder / "results.json", record)
    return record
