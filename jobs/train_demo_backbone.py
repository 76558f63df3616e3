"""Train the small backbone of the embedded world and write it into the package.

python jobs/train_demo_backbone.py demo_backbone
ray job submit --working-dir . -- python jobs/train_demo_backbone.py demo_backbone \\
    --output /mnt/shared/demo_backbone storage=/mnt/shared/runs
"""

from argparse import ArgumentParser

from tagi_ray import recipes


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--output", help="another folder to write it to")


def main() -> str:
    experiment, given = recipes.from_command_line(__doc__, extra=options)

    from tagi_ray import demo  # after the checks: it imports Ray

    return f"backbone in {demo.train_demo_backbone(experiment, given.output)}"


if __name__ == "__main__":
    recipes.run_job(main)
