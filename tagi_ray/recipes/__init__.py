"""Recipes: YAML files of changes to the default settings, and the command line over them."""

from tagi_ray.recipes.command_line import (
    configure_logging,
    from_command_line,
    lasting,
    run_job,
)
from tagi_ray.recipes.resolve import changed, dump, json_schema, load, names

__all__ = [
    "changed",
    "configure_logging",
    "dump",
    "from_command_line",
    "json_schema",
    "lasting",
    "load",
    "names",
    "run_job",
]
