"""Settings: pydantic models that refuse unknown keys, read from YAML recipes and overrides."""

from modalora.config.extend import ExtendConfig, NeedleConfig, SearchConfig
from modalora.config.recipes import dump, is_extension, load_extension, load_run, load_stages
from modalora.config.run import (
    FittedRate,
    MediaConfig,
    MeshConfig,
    OptimConfig,
    RunConfig,
    SourceConfig,
    source_names,
)
from modalora.config.strict import check_sizes, parse

__all__ = [
    "ExtendConfig",
    "FittedRate",
    "MediaConfig",
    "MeshConfig",
    "NeedleConfig",
    "OptimConfig",
    "RunConfig",
    "SearchConfig",
    "SourceConfig",
    "check_sizes",
    "dump",
    "is_extension",
    "load_extension",
    "load_run",
    "load_stages",
    "parse",
    "source_names",
]
