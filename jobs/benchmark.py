"""Measure one of the project's own ways beside the best straightforward alternative.

    python jobs/benchmark.py train_step
    ray job submit --working-dir . -- python jobs/benchmark.py train_step --storage /mnt/shared/runs

Prints a table and writes STORAGE/benchmark/NAME.json. Above 1 in other/ours means that ours costs
less. Leave the machine alone meanwhile.
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter

from tagi_ray import benchmarks, recipes


def main() -> str:
    parser = ArgumentParser(
        description=__doc__,
        epilog=f"benchmarks:\n{benchmarks.summaries()}",
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=benchmarks.BENCHMARKS, help="a benchmark of the list below")
    parser.add_argument("--storage", default="runs", help="folder to write to (default: runs)")
    given = parser.parse_args()
    rows, path = benchmarks.run(given.name, recipes.lasting("--storage", given.storage))
    print(benchmarks.table(rows))
    return f"rows in {path}"


if __name__ == "__main__":
    recipes.run_job(main)
