"""Train the teacher adapters of a recipe, many in one bank; finished ones are kept.

python jobs/train_teachers.py demo
ray job submit --working-dir . -- python jobs/train_teachers.py demo storage=/mnt/shared/runs
"""

from tagi_ray import recipes


def main() -> str:
    experiment, _ = recipes.from_command_line(__doc__)

    from tagi_ray import pipeline  # after the checks: it imports Ray

    return f"teachers in {pipeline.train_teachers(experiment)}"


if __name__ == "__main__":
    recipes.run_job(main)
