"""Measure one of the project's own ways beside the best straightforward alternative.

    python jobs/benchmark.py train_step

Prints a table and writes runs/benchmark/NAME.json. Above 1 in other/ours means that ours costs
less. Leave the machine alone meanwhile.
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter

from tagi_ray import benchmark, recipes


def main() -> None:
    parser = ArgumentParser(
        description=__doc__,
        epilog=f"benchmarks:\n{benchmark.summaries()}",
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=benchmark.BENCHMARKS, help="a benchmark of the list below")
    rows, path = benchmark.run(parser.parse_args().name)
    print(benchmark.table(rows))
    print(f"Rows: {path}")


if __name__ == "__main__":
    recipes.run_job(main)
