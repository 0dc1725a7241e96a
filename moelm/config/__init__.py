"""What a run is (`schema`) and how its YAML is read (`load`)."""

from moelm.config.load import check_config, dump_config, load_config
from moelm.config.schema import (
    BalanceConfig,
    DataConfig,
    DenseFFNConfig,
    ModelConfig,
    MoEFFNConfig,
    OptimConfig,
    RunConfig,
    SourceConfig,
    TokenizerConfig,
    TrainConfig,
)

__all__ = [
    "BalanceConfig",
    "DataConfig",
    "DenseFFNConfig",
    "MoEFFNConfig",
    "ModelConfig",
    "OptimConfig",
    "RunConfig",
    "SourceConfig",
    "TokenizerConfig",
    "TrainConfig",
    "check_config",
    "dump_config",
    "load_config",
]
