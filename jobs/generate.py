"""Generate the adapter of an instruction, or of each in a JSONL file, with a trained run.

python jobs/generate.py demo --instruction "Take the red words ..." --output adapter
ray job submit --working-dir . -- python jobs/generate.py demo --path some.jsonl storage=/mnt/runs
"""

from argparse import ArgumentParser

from tagi_ray import recipes
from tagi_ray.errors import ConfigError


def options(parser: ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--instruction", help="text of one instruction")
    source.add_argument("--path", help="JSONL file with one instruction per line")
    parser.add_argument("--output", help="folder of the adapters (in the run's, if not given)")


def main() -> str:
    experiment, given = recipes.from_command_line(__doc__, extra=options)
    if not (given.instruction or given.path):
        raise ConfigError(["command line: give --instruction TEXT or --path FILE"])

    from tagi_ray import pipeline  # after the checks: it imports torch

    result = pipeline.generate(
        experiment, instruction=given.instruction, path=given.path, output=given.output
    )
    return f"adapters in {result}"


if __name__ == "__main__":
    recipes.run_job(main)
