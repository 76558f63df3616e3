"""Train the hypernetwork, score it on the held-out tasks, and export their adapters.

Runs what is missing before it: data, teachers. The same command again continues the run.

    python jobs/finetune.py demo
    python jobs/finetune.py sni_t5_xl --plan    # parameters, memory, tokens, downloads
    ray job submit --working-dir . -- python jobs/finetune.py demo storage=/mnt/shared/runs
"""

import argparse

from tagi_ray import recipes


def main() -> str:
    experiment, arguments = recipes.from_command_line(__doc__, extra=_options)
    if arguments.plan:
        from tagi_ray import plan

        print(plan.as_text(plan.plan(experiment)), end="")
        raise SystemExit(0)

    from tagi_ray import pipeline  # after the checks: it imports Ray

    return f"report in {pipeline.finetune(experiment)}"


def _options(parser: argparse.ArgumentParser) -> None:
    told = "print what the run would take, memory by ZeRO stage included, and start nothing"
    parser.add_argument("--plan", action="store_true", help=told)


if __name__ == "__main__":
    recipes.run_job(main)
