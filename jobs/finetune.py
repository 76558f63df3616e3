"""Train the hypernetwork, score it on the held-out tasks, and export their adapters.

Runs what is missing before it: data, teachers. The same command again continues the run.

    python jobs/finetune.py demo
    ray job submit --working-dir . -- python jobs/finetune.py demo storage=/mnt/shared/runs
"""

from tagi_ray import recipes


def main() -> None:
    experiment, _ = recipes.from_command_line(__doc__)

    from tagi_ray import pipeline  # after the checks: it imports Ray

    print(f"Run: {pipeline.finetune(experiment)}")


if __name__ == "__main__":
    recipes.run_job(main)
