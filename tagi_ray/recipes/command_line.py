"""What every job shares: its command line, its log lines on stderr, and how it ends."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence

from tagi_ray.config import Experiment
from tagi_ray.errors import TagiError
from tagi_ray.recipes.resolve import FOLDER, dump, load, names

INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def from_command_line(
    doc: str | None,
    argv: Sequence[str] | None = None,
    extra: Callable[[argparse.ArgumentParser], None] | None = None,
) -> tuple[Experiment, argparse.Namespace]:
    """Return the settings that the command line asks for, and its other arguments.

    With `--dry-run` the settings are printed and the process ends. `extra` adds options.
    """
    parser = argparse.ArgumentParser(
        description=doc,
        epilog=_epilog(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="a recipe of the list below, or the path of a .yaml file")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.field=value",
        help="change a setting of the recipe",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved settings and start nothing"
    )
    if extra:
        extra(parser)
    arguments = parser.parse_intermixed_args(argv)
    experiment = load(arguments.recipe, arguments.overrides)
    if arguments.dry_run:
        sys.stdout.write(dump(experiment))
        raise SystemExit(0)
    return experiment, arguments


def run_job(main: Callable[[], None]) -> None:
    """Run a job; an error of ours becomes one sentence on stderr and its exit code."""
    configure_logging()
    try:
        main()
    except TagiError as error:
        sys.stderr.write(f"{error}\n")
        raise SystemExit(error.exit_code) from error
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted. The same command continues the run.\n")
        raise SystemExit(INTERRUPTED) from None


def configure_logging() -> None:
    """Write the project's log lines, and other libraries' warnings, plainly to stderr."""
    logging.basicConfig(
        level=logging.WARNING,
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )
    logging.getLogger("tagi_ray").setLevel(logging.INFO)


def _epilog() -> str:
    width = max(map(len, names()))
    recipes = "\n".join(f"  {name:<{width}}  {_summary(name)}" for name in names())
    return (
        f"recipes:\n{recipes}\n\n"
        "overrides:\n"
        "  section.field=value changes one setting; the value is YAML, so numbers may be written\n"
        "  1e-4, lists [q,v] and nothing as null. For example:\n"
        "    lora.rank=8 finetune.optimizer.learning_rate=1e-4 'lora.targets=[q,v]' seeds=[0,1]\n"
        "  --dry-run shows every setting. The name of a run (name=...) is its identity: the same\n"
        "  command again continues it."
    )


def _summary(name: str) -> str:
    """Return the first comment of a recipe besides the schema line of editors."""
    lines = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    comments = (line.lstrip("# ") for line in lines if line.startswith("# "))
    return next((text for text in comments if not text.startswith("yaml-language-server")), "")
