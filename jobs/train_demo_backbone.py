"""Train the small backbone of the embedded world and write it into the package.

python jobs/train_demo_backbone.py demo_backbone
"""

from tagi_ray import recipes


def main() -> None:
    experiment, _ = recipes.from_command_line(__doc__)

    from tagi_ray import demo  # after the checks: it imports Ray

    print(f"Backbone: {demo.train_demo_backbone(experiment)}")


if __name__ == "__main__":
    recipes.run_job(main)
