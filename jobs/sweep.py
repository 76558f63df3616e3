"""Sweep settings of a recipe with Ray Tune: loss weights, LoRA rank and targets, fusion, any field.

Trials share shards and teachers, are compared on the validation tasks, and stopped early where they
are worse than others; the best one and the recipe's own are scored on the held-out tasks. Leaves
trials.csv, best.yaml (a recipe for finetune) and sweep.html. The same command continues a sweep.

    python jobs/sweep.py demo --space lambda1_rank finetune.steps=200 finetune.valid_every=50
    python jobs/sweep.py runs/mine/config.yaml --space my_space.yaml
    ray job submit --working-dir . -- python jobs/sweep.py demo storage=/mnt/shared/runs
"""

import argparse

from tagi_ray import recipes, space
from tagi_ray.config import Experiment


def main() -> str:
    experiment, arguments = recipes.from_command_line(__doc__, extra=_options, more=_space)
    tried = space.load_space(arguments.space, experiment)

    from tagi_ray.sweep import sweep  # after the checks: it imports Ray

    return f"report in {sweep(experiment, tried)}"


def _options(parser: argparse.ArgumentParser) -> None:
    told = f"one of {', '.join(space.names())}, or the path of a .yaml file (default: %(default)s)"
    parser.add_argument("--space", default="lambda1_rank", metavar="SPACE", help=told)


def _space(experiment: Experiment, arguments: argparse.Namespace) -> str:
    return space.as_text(space.load_space(arguments.space, experiment))


if __name__ == "__main__":
    recipes.run_job(main)
