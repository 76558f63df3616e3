"""Pretrain the hypernetwork of a recipe on raw text, which finetuning then starts from.

python jobs/pretrain.py sni_t5_base pretrain.path=texts
ray job submit --working-dir . -- python jobs/pretrain.py sni_t5_base storage=/mnt/shared/runs
"""

from tagi_ray import recipes


def main() -> str:
    experiment, _ = recipes.from_command_line(__doc__)

    from tagi_ray import pipeline  # after the checks: it imports Ray

    return f"checkpoints in {pipeline.pretrain(experiment)}"


if __name__ == "__main__":
    recipes.run_job(main)
