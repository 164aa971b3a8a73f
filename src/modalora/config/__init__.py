"""Settings: pydantic models that refuse unknown keys, read from YAML recipes and overrides."""

from modalora.config.extend import ExtendConfig, GuideConfig, NeedleConfig, ScoresConfig, SearchConfig
from modalora.config.recipes import dump, is_extension, load_chain_start, load_extension, load_run, load_stages
from modalora.config.run import (
    ChainConfig,
    FittedRate,
    MediaConfig,
    MeshConfig,
    OptimConfig,
    RunConfig,
    SourceConfig,
    StageConfig,
    source_names,
)
from modalora.config.strict import Settings, check_sizes, parse

__all__ = [
    "ChainConfig",
    "ExtendConfig",
    "FittedRate",
    "GuideConfig",
    "MediaConfig",
    "MeshConfig",
    "NeedleConfig",
    "OptimConfig",
    "RunConfig",
    "ScoresConfig",
    "SearchConfig",
    "Settings",
    "SourceConfig",
    "StageConfig",
    "check_sizes",
    "dump",
    "is_extension",
    "load_chain_start",
    "load_extension",
    "load_run",
    "load_stages",
    "parse",
    "source_names",
]
