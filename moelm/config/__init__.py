"""What a run is (`schema`, and `model` for its model) and how its YAML is read (`load`)."""

from moelm.config.identity import differing, flatten, identity
from moelm.config.load import check_config, check_section, dump_config, load_config, override, read_tree
from moelm.config.model import (
    BalanceConfig,
    DenseFFNConfig,
    ExpertChoiceRouterConfig,
    HashRouterConfig,
    HierarchicalRouterConfig,
    ModelConfig,
    MoEFFNConfig,
    NoisyTopKRouterConfig,
    RandomRouterConfig,
    SigmoidRouterConfig,
    TopKRouterConfig,
)
from moelm.config.schema import (
    DataConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    SourceConfig,
    StartConfig,
    TokenizerConfig,
    TrainConfig,
)

__all__ = [
    "BalanceConfig",
    "DataConfig",
    "DenseFFNConfig",
    "ExpertChoiceRouterConfig",
    "HashRouterConfig",
    "HierarchicalRouterConfig",
    "MoEFFNConfig",
    "ModelConfig",
    "NoisyTopKRouterConfig",
    "OptimConfig",
    "ParallelConfig",
    "RandomRouterConfig",
    "RunConfig",
    "SigmoidRouterConfig",
    "SourceConfig",
    "StartConfig",
    "TokenizerConfig",
    "TopKRouterConfig",
    "TrainConfig",
    "check_config",
    "check_section",
    "differing",
    "dump_config",
    "flatten",
    "identity",
    "load_config",
    "override",
    "read_tree",
]
