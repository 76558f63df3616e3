"""Score the systems of a trained run on its held-out tasks: predictions, scores and report.

python jobs/evaluate.py demo
ray job submit --working-dir . -- python jobs/evaluate.py demo storage=/mnt/shared/runs
"""

from tagi_ray import recipes


def main() -> str:
    experiment, _ = recipes.from_command_line(__doc__)

    from tagi_ray import pipeline  # after the checks: it imports Ray

    return f"report in {pipeline.evaluate(experiment)}"


if __name__ == "__main__":
    recipes.run_job(main)
