"""A step of the trainer, with its data, checks and logging, against forward, backward and optimizer in a bare loop."""

import threading
from pathlib import Path

import torch

import dllm.training.trainer as trainer
from dllm.config.reading import load_config
from dllm.config.schema import Config
from dllm.data import open_training_data, read_corpus
from dllm.diffusion_lm import DiffusionLM
from dllm.training.batches import forward, make_batches
from dllm.training.build import choose_model
from dllm.training.metrics import Clock
from dllm.training.optimizer import build_optimizers

STEPS = 3  # of a call


class SteppedRun:
    """A training run in a thread; `advance` lets it take STEPS steps."""

    def __init__(self, config: Config, monkeypatch):
        self.allowed, self.done = threading.Semaphore(0), threading.Semaphore(0)
        tick = Clock.tick

        def wait(clock: Clock) -> None:
            tick(clock)
            self.done.release()
            self.allowed.acquire()

        monkeypatch.setattr(Clock, "tick", wait)
        self.thread = threading.Thread(target=trainer.train, args=(config,))
        self.thread.start()
        self.done.acquire()  # the first step, and the preparation before it

    def advance(self) -> None:
        for _ in range(STEPS):
            self.allowed.release()
            self.done.acquire()

    def finish(self) -> None:
        self.allowed.release(10**6)
        self.thread.join()


def bench_trainer_step(paired, tmp_path, monkeypatch):
    root = Path(__file__).parents[1]
    rounds = 6
    config = load_config(root / "configs/demo.yaml", [
        f"--train.output_dir={tmp_path}", f"--data.train_path={root / 'dllm'}", "--train.device=cpu",
        "--train.max_minutes=", f"--train.max_steps={STEPS * (rounds + 1) + 2}", "--train.num_train_epochs=1000",
        "--train.eval_every=0", "--data.validation_share=0", "--train.save_steps=0"])
    torch.set_num_threads(1)
    run = SteppedRun(config, monkeypatch)

    settings = config.train
    assert run.thread.is_alive(), "the run has ended"
    corpus = read_corpus(config.data)
    tokenizer, model_config, _ = choose_model(config, lambda: corpus, None)
    model = DiffusionLM(model_config)
    rows = open_training_data(corpus, tokenizer, settings.seed, settings.rows_per_step).rows
    optimizers = build_optimizers(model, settings)
    steps = iter(range(1, 10**6))
    prepared = {step: make_batches(rows, step, range(settings.rows_per_step), settings.rows_per_step, settings,
                                   settings.seed, model) for step in range(1, STEPS * (rounds + 1) + 2)}

    def bare_steps() -> None:
        for step in (next(steps) for _ in range(STEPS)):
            batches = prepared[step]
            normaliser = sum(batch.normaliser for batch in batches)
            for batch in batches:
                (forward(model, batch, torch.device("cpu")).loss / normaliser).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

    try:
        paired(ours=run.advance, baseline=bare_steps, rounds=rounds, seconds=None, at_least=1 / 1.05, steps=STEPS)
    finally:
        run.finish()
