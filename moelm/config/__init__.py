"""The configuration of a run, and its loading from YAML."""

from moelm.config.checks import describe_ineffective
from moelm.config.diff import differing, flatten, trajectory_settings
from moelm.config.ffn import (
    BalanceConfig,
    DenseFFNConfig,
    ExpertChoiceRouterConfig,
    HashRouterConfig,
    HierarchicalRouterConfig,
    MoEFFNConfig,
    NoisyTopKRouterConfig,
    RandomRouterConfig,
    SigmoidRouterConfig,
    TopKRouterConfig,
)
from moelm.config.load import (
    apply_overrides,
    check_config,
    check_section,
    dump_config,
    format_override,
    load_config,
    read_tree,
    refuse_overrides,
)
from moelm.config.model import ModelConfig
from moelm.config.rope import LinearRopeConfig, Llama3RopeConfig, YarnRopeConfig
from moelm.config.run import (
    DataConfig,
    InitFromConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    SourceConfig,
    TokenizerConfig,
    TrainConfig,
)
from moelm.config.schema import config_schema

__all__ = [
    "BalanceConfig",
    "DataConfig",
    "DenseFFNConfig",
    "ExpertChoiceRouterConfig",
    "HashRouterConfig",
    "HierarchicalRouterConfig",
    "InitFromConfig",
    "LinearRopeConfig",
    "Llama3RopeConfig",
    "MoEFFNConfig",
    "ModelConfig",
    "NoisyTopKRouterConfig",
    "OptimConfig",
    "ParallelConfig",
    "RandomRouterConfig",
    "RunConfig",
    "SigmoidRouterConfig",
    "SourceConfig",
    "TokenizerConfig",
    "TopKRouterConfig",
    "TrainConfig",
    "YarnRopeConfig",
    "apply_overrides",
    "check_config",
    "check_section",
    "config_schema",
    "describe_ineffective",
    "differing",
    "dump_config",
    "flatten",
    "format_override",
    "load_config",
    "read_tree",
    "refuse_overrides",
    "trajectory_settings",
]
