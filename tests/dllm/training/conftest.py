"""Short runs of tiny models, for the tests of training."""

import pytest

from dllm.config.schema import Config, DataGroup, ModelGroup, TrainGroup


@pytest.fixture
def make_short_run(corpus, tmp_path):
    """Makes the configuration of a run from keys of its train group."""
    def make(**train_keys) -> Config:
        keys = {"output_dir": str(tmp_path / "run"), "lr": 3e-3, "micro_batch_size": 4, "num_train_epochs": 100,
                "device": "cpu", "use_tensorboard": False, "precision": "fp32", **train_keys}
        model = ModelGroup(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                           num_attention_heads=2, num_key_value_heads=1)
        return Config(model=model, data=DataGroup(train_path=str(corpus), max_seq_len=48, validation_share=0.1),
                      train=TrainGroup(**keys))
    return make
