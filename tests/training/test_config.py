from __future__ import annotations

from dataclasses import fields, replace

import pytest

from mlx_starflow.errors import StarflowError
from mlx_starflow.training.config import TrainingConfig, TrainingOptions

CONFIG = TrainingConfig(steps=10, batch_size=5)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"accumulate": 3}, "accumulate must be a divisor of batch_size 5, not 3"),
        ({"optimizer": "sgd"}, "optimizer must be one of adamw, adafactor, muon, sinkgd, not 'sgd'"),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, not 'int8'"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
        ({"lr": "fast"}, "lr must be greater than 0, not 'fast'"),
        ({"skip": -1.0}, "skip must be 0 or more"),
    ],
)
def test_settings_out_of_range(setting, message):
    with pytest.raises(StarflowError, match=message):
        replace(CONFIG, **setting)


def test_options_go_over_a_config():
    assert [field.name for field in fields(TrainingOptions)] == [field.name for field in fields(TrainingConfig)]
    assert TrainingOptions().over(CONFIG) == CONFIG
    assert TrainingOptions(lr=0.5, ema=0.0, shard=False).given() == {"lr": 0.5, "ema": 0.0, "shard": False}
    assert TrainingOptions(lr=0.5, ema=0.0).over(CONFIG) == replace(CONFIG, lr=0.5, ema=0.0)
    with pytest.raises(StarflowError, match="lr must be greater than 0"):
        TrainingOptions(lr=-1.0).over(CONFIG)
