"""Turn the task files of a recipe into shards, a manifest and a tokenizer.

python jobs/prepare_data.py demo
ray job submit --working-dir . -- python jobs/prepare_data.py demo storage=/mnt/shared/runs
"""

from tagi_ray import recipes


def main() -> str:
    experiment, _ = recipes.from_command_line(__doc__)

    from tagi_ray import pipeline  # after the checks: it imports Ray

    return f"shards in {pipeline.prepare_data(experiment)}"


if __name__ == "__main__":
    recipes.run_job(main)
