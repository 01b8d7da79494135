"""lm-evaluation-harness: our models under the name `dllm`, in its own command and in `dllm eval`.

lm-eval's main branch finds `HarnessLM` by the entry point of pyproject.toml (its docs/plugins.md); its release 0.4.13
does not yet. With either, `dllm lm_eval ...` is its command with the model and our task files (lm_eval_tasks/) added.
"""

import hashlib
import json
import logging
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

import dllm
from dllm.config.fields import convert, settings_of
from dllm.errors import UserError, did_you_mean, first_line
from dllm.evaluators.held_out import Window
from dllm.evaluators.likelihood import bound_likelihood, score_positions
from dllm.evaluators.runs import check_continues, identify_model
from dllm.files import digest_files, own_folder, write_json
from dllm.generation.canvas import positions_of
from dllm.generation.checks import find_mask_token
from dllm.generation.config import MDMGenerationConfig, published_settings
from dllm.generation.infilling import Gap, fill
from dllm.model.loading import load_with_tokenizer
from dllm.model.tokenizer import begin_text, cut_at_end, decode_after, encode, encode_rendered, protect
from dllm.model.transformer import Transformer
from dllm.model.weights import find_model

TASKS = Path(__file__).with_name("lm_eval_tasks")
LIKELIHOOD_SAMPLES = 128  # LLaDA's eval_llada.py
_GENERATION = {name: its for name, its in settings_of(MDMGenerationConfig).items() if name != "num_return_sequences"}
_LOADING = ("mask_token", "mask_token_id", "trust_remote_code", "layers_backend")
_ARGUMENTS = ("pretrained", "device", "dtype", "batch_size", "likelihood_samples", "mask_token", "trust_remote_code",
              "layers_backend", *_GENERATION)
_LENGTHS = {"max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"}  # lm-eval's names of one setting
_FROM_TASK = {"until", "do_sample", "temperature", "top_p", "top_k", "gap", *_LENGTHS}

logger = logging.getLogger(__name__)


class Request(NamedTuple):
    """A gap to fill; `number` picks its random numbers."""

    gap: Gap
    number: int


@register_model("dllm")
class HarnessLM(TemplateLM):
    """A masked diffusion model for lm-eval.

    Likelihoods are lower bounds on log p, by Monte Carlo with `likelihood_samples` corrupted copies of each sequence
    (`bound_likelihood`); they depend on the seed and the texts, not on order or batches. A continuation is "greedy" if
    the model writes it itself, one token a step, most confident first. Texts are denoised `batch_size` together.
    `generation` overrides the settings of a task (max_gen_toks, temperature, top_p, top_k). Of a DiffusionGemma the
    likelihoods are exact, by its encoder, and its folder's generation_config.json says how it writes.
    """

    def __init__(self, model: Transformer, tokenizer, *, batch_size: int = 16,
                 likelihood_samples: int = LIKELIHOOD_SAMPLES, source: str | Path | None = None, **generation):
        """
        Args:
            source: the folder of the model, for a hash of its weights in the results.
            generation: fields of MDMGenerationConfig; `seed` defaults to 0, `steps` to the number of tokens.
        """
        super().__init__()
        for name, value, least in (("batch_size", batch_size, 1), ("likelihood_samples", likelihood_samples, 2)):
            if not isinstance(value, int) or value < least:
                raise UserError(f"{name} must be a number of at least {least}, not {value!r}")
        self.model, self.tokenizer, self.source = model, tokenizer, source
        self.batch_size, self.likelihood_samples = batch_size, likelihood_samples
        self.exact = model.config.canvas_length is not None  # DiffusionGemma: its encoder is autoregressive
        folder = published_settings(model.generation_defaults) if self.exact else {}
        folder.pop("max_new_tokens", None)  # the task says it
        self.generation = {"seed": 0, **folder, **generation}
        self.chats = False  # whether the prompts are rendered conversations
        self.config({})  # raises for wrong settings before anything is computed
        find_mask_token(model, self.config({}))
        self._device = model.device

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict, additional_config: dict | None = None) -> "HarnessLM":
        """The model of lm-eval's --model_args, --batch_size and --device; the first override the others.

        Raises: UserError for an unknown argument, a bad value, or a model that cannot be loaded.
        """
        given = {name: value for name, value in (additional_config or {}).items()
                 if value is not None and name != "max_batch_size"}
        if given.get("device") == "cuda:0":  # lm-eval's default, GPU or not
            given["device"] = "auto"
        given |= arg_dict
        for name in given:
            if name not in _ARGUMENTS:
                raise UserError(f"model_args has no {name!r}{did_you_mean(name, _ARGUMENTS) or '.'} It takes "
                                + ", ".join(_ARGUMENTS))
        if "pretrained" not in given:
            raise UserError("model_args needs pretrained=MODEL, a folder or a hub repository as owner/name")
        path, size = given.pop("pretrained"), str(given.pop("batch_size", 16))
        if not size.isdecimal():
            raise UserError(f"batch_size must be a number, not {size!r}: sequences denoised together")
        given = {name: convert(name, value, _GENERATION[name]) if name in _GENERATION else value
                 for name, value in given.items()}
        loading = {name: given.pop(name) for name in _LOADING if name in given}
        model, tokenizer = load_with_tokenizer(path, str(given.pop("device", "auto")), str(given.pop("dtype", "auto")),
                                               **loading)
        return cls(model, tokenizer, batch_size=int(size), source=find_model(path), **given)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> "HarnessLM":
        from lm_eval.utils import simple_parse_args_string

        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    def get_model_info(self) -> dict:
        """The facts about the model in lm-eval's results."""
        files = [] if self.source is None else sorted(Path(self.source).glob("*.safetensors"))
        return {"dllm_version": dllm.__version__, "model_family": self.model.config.family,
                "model_dtype": str(self.model.dtype), "model_weights_sha256": digest_files(files) if files else None,
                "loglikelihood": "log p" if self.exact else "lower bound on log p, by Monte Carlo",
                "likelihood_samples": 0 if self.exact else self.likelihood_samples, "generation": self.generation}

    def config(self, wanted: dict) -> MDMGenerationConfig:
        """The settings of a request: those of the task's generation_kwargs, overridden by those of the model."""
        wanted = {name: value for name, value in wanted.items() if value is not None}
        for name in wanted.keys() - _FROM_TASK:
            _warn_once(f"the task's generation setting {name} means nothing to a diffusion model; it is left out")
        wanted = normalize_gen_kwargs(wanted)
        if self.exact and wanted.pop("temperature", 0):
            _warn_once("the temperatures of this model are t_min and t_max; a task's temperature is left out")
        asked = {"max_new_tokens": wanted["max_gen_toks"], "temperature": float(wanted.get("temperature", 0.0))}
        if asked["temperature"] > 0:
            asked |= {name: wanted[name] for name in ("top_p", "top_k") if wanted.get(name)}
        asked |= self.generation
        config = MDMGenerationConfig(**asked)
        if "gap" in wanted or "steps" in asked:
            return config
        return replace(config, steps=positions_of(self.model, config))

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """Encode with nothing added, whatever is asked, because models train on texts without a first token. Special
        tokens are those that a chat template wrote; any that the text itself spells stay text."""
        return (encode_rendered if self.chats else encode)(self.tokenizer, string).tolist()

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if not self.tokenizer.chat_template:
            raise UserError("this model has no chat template, so it was not trained on conversations; leave "
                            "--apply_chat_template out")
        self.chats = True
        return self.tokenizer.apply_chat_template(
            protect(self.tokenizer, chat_history), tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt)

    def set_cache_hook(self, cache_hook) -> None:
        if cache_hook.dbdict is not None and self.config({}).temperature > 0:
            raise UserError("use_cache would give all repeats of a prompt the same sample; leave it out, or the "
                            "temperature")
        super().set_cache_hook(cache_hook)

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """The text up to the first stop string.

        A request with the setting `gap` fills a gap of that many tokens between `before` and `after` of its document;
        `oracle` takes the length of its `canonical`."""
        seen: Counter[str] = Counter()
        groups: dict[MDMGenerationConfig, list[tuple[int, Request]]] = {}
        for index, request in enumerate(requests):
            context, wanted = request.args[:2]
            config = self.config(wanted)
            number = zlib.crc32(f"{seen[context]} {context}".encode("utf-8", "surrogatepass"))
            seen[context] += 1  # repeats of a prompt differ
            gap = self._read_gap(request, wanted, config) if "gap" in wanted else self._continue(context, config)
            groups.setdefault(config, []).append((index, Request(gap, number)))
        texts = [""] * len(requests)
        with tqdm(total=len(requests), desc="dllm generate_until", disable=disable_tqdm or None) as bar:
            for config, part in groups.items():
                for place, answer in self._fill([request for _, request in part], config):
                    index, request = part[place]
                    until = requests[index].args[1].get("until") or []
                    if "gap" not in requests[index].args[1]:
                        answer = answer[:config.max_new_tokens]  # of whole blocks
                    text = decode_after(self.tokenizer, request.gap.prefix, cut_at_end(self.tokenizer, answer))
                    for stop in filter(None, [until] if isinstance(until, str) else until):
                        text = text.split(stop)[0]
                    texts[index] = text
                    bar.update()
        return texts

    def _continue(self, prompt: str, config: MDMGenerationConfig) -> Gap:
        """A gap after the end of the prompt, which is cut on the left to fit the model."""
        prefix = self._begin(self.tok_encode(prompt))
        gap = positions_of(self.model, config)
        room = self.model.config.max_position_embeddings - gap
        if room < 1:
            raise UserError(f"{config.max_new_tokens} new tokens leave no room for a prompt: the model has "
                            f"{self.model.config.max_position_embeddings} positions; lower max_new_tokens")
        if len(prefix) > room:
            _warn_once(f"prompts of more than {room} tokens are cut on the left, to fit the model's positions")
        return Gap(prefix[-room:], prefix[:0], gap)

    def _begin(self, ids: Sequence[int]) -> Tensor:
        """The prompt [N]; a chat template begins it itself."""
        ids = torch.tensor(ids, dtype=torch.long)
        return ids if self.chats else begin_text(self.tokenizer, ids)

    def _read_gap(self, request, wanted: dict, config: MDMGenerationConfig) -> Gap:
        prefix = encode(self.tokenizer, request.doc["before"])
        suffix = encode(self.tokenizer, request.doc["after"], after=True)
        length = wanted["gap"]
        if length == "oracle":
            length = max(1, len(encode(self.tokenizer, request.doc["canonical"], after=True)))
        if not isinstance(length, int) or length < 1:
            raise UserError(f"gap must be a number of tokens or oracle, not {length!r}")
        most = max(length, 0 if config.expand_token_id is None else config.max_infill_length)
        if (need := len(prefix) + len(suffix) + most) > self.model.config.max_position_embeddings:
            raise UserError(f"a text with its gap needs {need} positions, the model has "
                            f"{self.model.config.max_position_embeddings}")
        return Gap(prefix, suffix, length)

    def _fill(self, requests: Sequence[Request], config: MDMGenerationConfig) -> Iterable[tuple[int, Tensor]]:
        """(index, tokens [length]) of each request, the longest texts first."""
        sizes = [len(gap.prefix) + len(gap.suffix) + gap.length for gap, _ in requests]
        order = sorted(range(len(requests)), key=lambda i: -sizes[i])
        for start in range(0, len(order), self.batch_size):
            batch = order[start:start + self.batch_size]
            filled = fill(self.model, [requests[i].gap for i in batch], config,
                          sequence=torch.tensor([requests[i].number for i in batch]))
            yield from zip(batch, filled.answers, strict=True)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        limit = self.model.config.max_position_embeddings
        pairs = []
        for _, context, continuation in requests:
            if not 0 < len(continuation) < limit:
                raise UserError(f"a continuation of {len(continuation)} tokens cannot be scored: it must have one at "
                                f"least, and with one before it fit the model's {limit} positions")
            context = context or [self.prefix_token_id]  # of a blank, which goes to the continuation
            pairs.append((tuple(context[len(continuation) - limit:]), tuple(continuation)))
        if self.exact:
            return [self._exact(context, continuation) for context, continuation in tqdm(
                pairs, desc="dllm loglikelihood", disable=disable_tqdm or None)]
        written = self._write_surest(pairs)
        return [(self._bound(context, continuation), written[context, len(continuation)] == continuation)
                for context, continuation in tqdm(pairs, desc="dllm loglikelihood", disable=disable_tqdm or None)]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """The likelihood of whole texts, cut into windows that fit the model; the token before a window is given."""
        size = self.model.config.max_position_embeddings - 1
        results = []
        for request in tqdm(requests, desc="dllm loglikelihood_rolling", disable=disable_tqdm or None):
            windows = get_rolling_token_windows(self.tok_encode(request.args[0]), self.prefix_token_id, size, 1)
            results.append(sum(self._bound(*map(tuple, make_disjoint_window(window))) for window in windows))
        return results

    def _exact(self, context: tuple[int, ...], continuation: tuple[int, ...]) -> tuple[float, bool]:
        """log p(continuation | context), and whether each of its tokens is the likeliest after those before."""
        room = self.model.config.max_position_embeddings - len(continuation)
        before = self._begin(context)
        ids = torch.cat((before[max(len(before) - room, 0):], torch.tensor(continuation)))
        scored = torch.arange(len(ids)) >= len(ids) - len(continuation)
        nats, likeliest = score_positions(self.model, [Window(ids, 0, 0)], [scored], len(ids), predict=True,
                                         exact=self.exact)[0]
        return -float(nats.sum()), tuple(likeliest.tolist()) == continuation

    def _bound(self, context: tuple[int, ...], continuation: tuple[int, ...]) -> float:
        """Lower bound on log p(continuation | context). All continuations of a context share a seed, so that choices
        are compared on the same draws; contexts differ in theirs, so that errors average out."""
        if self.exact:
            return self._exact(context, continuation)[0]
        ids = torch.tensor([*context, *continuation])
        scored = torch.arange(len(ids)) >= len(context)
        seed = zlib.crc32(repr((self.generation["seed"], context)).encode())
        return -float(bound_likelihood(self.model, ids, scored=scored.unsqueeze(0), samples=self.likelihood_samples,
                                       seed=seed).nats)

    def _write_surest(self, pairs: Sequence[tuple[tuple, tuple]]) -> dict[tuple, tuple]:
        """The continuation of each (context, length) that the model writes one token a step, most confident first."""
        keys = list(dict.fromkeys((context, len(continuation)) for context, continuation in pairs))
        nothing = torch.empty(0, dtype=torch.long)
        requests = [Request(Gap(torch.tensor(context, dtype=torch.long), nothing, length), 0)
                    for context, length in keys]
        config = MDMGenerationConfig(remasking="low_confidence", threshold=2.0,  # which no confidence reaches
                                     mask_token_id=self.generation.get("mask_token_id"), seed=0)
        return {keys[i]: tuple(answer.tolist()) for i, answer in self._fill(requests, config)}


_warned: set[str] = set()


def _warn_once(text: str) -> None:
    if text not in _warned:
        _warned.add(text)
        logger.warning(text)


def run_command_line(arguments: Sequence[str]) -> int:
    """Run lm-eval's own command with the model `dllm` and our task files."""
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    setup_logging()
    sys.argv = ["lm_eval", *arguments]  # the only thing that the command reads
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

    others: further names for the suggestion in the error.
    Raises: UserError if there is no such task.
    """
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=[str(TASKS), *([include_path] if include_path else [])])
    if name not in manager.all_tasks:
        near = did_you_mean(name, [*others, *manager.all_tasks])
        raise UserError(f"there is no task {name!r}{near or '.'} See dllm eval --help and dllm lm_eval ls tasks; "
                        "--include-path names a folder with more task files")
    return manager


def evaluate_task(lm: HarnessLM, name: str, manager, folder: str | Path, *, limit: int | None = None,
                  num_fewshot: int | None = None, apply_chat_template: bool = False, unsafe_code: bool = False) -> dict:
    """Run a task of lm-eval in a folder. Writes manifest.json before it, and results.json with every sample after it.

    Returns: the record of results.json.
    Raises: UserError if the folder has another run, or the data of the task is unavailable.
    """
    import lm_eval
    from lm_eval.utils import handle_non_serializable

    folder = Path(folder)
    digest, count = digest_documents(name, manager, limit)
    manifest = {
        "task": name, "preset": None, "data": {"source": "lm-eval", "sha256": digest}, "generation": lm.generation,
        "samples": 1, "length": None, "stops": (), "batch_size": lm.batch_size, "tasks": count,
        **identify_model(lm.model, lm.tokenizer, lm.source), "likelihood_samples": lm.likelihood_samples,
        "num_fewshot": num_fewshot, "limit": limit, "apply_chat_template": apply_chat_template}
    manifest["versions"]["lm_eval"] = lm_eval.__version__
    with own_folder(folder):
        check_continues(folder, manifest)
        write_json(folder / "manifest.json", manifest)
        try:
            results = lm_eval.simple_evaluate(
                lm, tasks=[name], task_manager=manager, limit=limit, num_fewshot=num_fewshot,
                apply_chat_template=apply_chat_template, fewshot_as_multiturn=apply_chat_template,
                confirm_run_unsafe_code=unsafe_code)
        except ValueError as error:
            if "marked as unsafe" in str(error):
                raise UserError(f"{name} runs the model's code outside our sandbox; give --unsafe-code if you trust it "
                                "that far, or take one of dllm's own tasks") from None
            raise
        results = json.loads(json.dumps(results, default=handle_non_serializable))
        record = {"task": name, "results": results["results"], "groups": results.get("groups", {}),
                  "samples_scored": results["n-samples"], "higher_is_better": results["higher_is_better"],
                  "task_versions": results["versions"], "config": results["config"], "manifest": manifest,
                  "samples": results["samples"]}
        write_json(folder / "results.json", record)
        return record


def digest_documents(name: str, manager, limit: int | None) -> tuple[str, int]:
    """The SHA-256 of a task's documents, the first `limit` of each of its parts, and their number."""
    from lm_eval.utils import handle_non_serializable

    try:
        parts = manager.load([name])["tasks"].values()
    except (OSError, ImportError) as error:
        raise UserError(f"the data of {name} cannot be had ({first_line(error)})") from error
    documents = [document for part in parts for document in list(part.eval_docs)[:limit]]
    digest = hashlib.sha256()
    for document in documents:
        digest.update(json.dumps(document, sort_keys=True, default=handle_non_serializable).encode())
    return digest.hexdigest(), len(documents)
