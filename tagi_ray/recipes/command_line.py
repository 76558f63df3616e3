"""What every job shares: its command line, where it may write, its log lines, and how it ends."""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tagi_ray.config import Experiment
from tagi_ray.errors import ConfigError, TagiError
from tagi_ray.recipes.resolve import FOLDER, dump, load, names


def from_command_line(
    doc: str | None,
    argv: Sequence[str] | None = None,
    extra: Callable[[argparse.ArgumentParser], None] | None = None,
    more: Callable[[Experiment, argparse.Namespace], str] | None = None,
) -> tuple[Experiment, argparse.Namespace]:
    """Return the settings that the command line asks for, and its other arguments.

    With `--dry-run` the settings are printed, and what `more` returns of them, and the process
    ends. `extra` adds options.
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
        sys.stdout.write(dump(experiment) + (f"---\n{more(experiment, arguments)}" if more else ""))
        raise SystemExit(0)
    return experiment, arguments


def lasting(field: str, path: str | Path) -> Path:
    """Return a folder that is written to as an absolute path.

    Raises ConfigError in a submitted job for a relative one, and for one in the submitted folder:
    the job starts in a copy of that folder, which its cluster deletes.
    """
    absolute = Path(path).absolute()
    job: Any = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    runtime: Any = job.get("runtime_env") or {}
    if runtime.get("working_dir") and (
        not Path(path).is_absolute() or absolute.is_relative_to(Path.cwd())
    ):
        raise ConfigError([
            f"{field}={path} would be lost: `ray job submit --working-dir` starts the job in a"
            f" temporary copy of that folder; set {field}=/a/shared/folder"
        ])  # fmt: skip
    return absolute


def run_job(main: Callable[[], str]) -> None:
    """Run a job, whose last line says how it ended; `main` returns what it made, and where.

    An error of ours becomes one sentence and its exit code, a signal that stops the job the exit
    code that shells report for it. Any other error keeps its traceback.
    """
    configure_logging()
    signal.signal(signal.SIGTERM, _exit)
    started = time.monotonic()
    try:
        made = main()
    except TagiError as error:
        lines = str(error).splitlines()
        told = lines if len(lines) > 1 else []
        _end([*told, f"Failed (exit code {error.exit_code}): {'see above.' if told else error}"])
        raise SystemExit(error.exit_code) from error
    except (KeyboardInterrupt, SystemExit) as end:
        number = signal.SIGINT if isinstance(end, KeyboardInterrupt) else signal.SIGTERM
        if isinstance(end, SystemExit) and end.code != number:
            raise  # by the argument parser, which has said why
        _end([f"Stopped after {_since(started)}. The same command continues the run."])
        _leave(128 + number)
    except Exception as error:
        traceback.print_exc()
        _end([f"Failed (exit code 1): {type(error).__name__}; its traceback is above."])
        raise SystemExit(1) from error
    sys.stdout.write(f"Done in {_since(started)}: {made}\n")


def configure_logging() -> None:
    """Write the project's log lines, and other libraries' warnings, plainly to stderr."""
    logging.basicConfig(
        level=logging.WARNING,
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )
    logging.getLogger("tagi_ray").setLevel(logging.INFO)
    out: Any = sys.stdout
    if isinstance(out, io.TextIOWrapper):
        out.reconfigure(line_buffering=True)  # in order with stderr, where both are one file


def _exit(number: int, frame: object) -> None:
    """End as at Ray's own handler of SIGTERM, which replaces this one in `ray.init`."""
    sys.exit(number)


def _leave(code: int) -> NoReturn:
    """End this process without tearing it down, since `ray job stop` kills it after 3 seconds."""
    sys.stdout.flush()
    sys.stderr.flush()
    ray: Any = sys.modules.get("ray")
    if ray is not None:
        ray.shutdown()
    os._exit(code)


def _end(lines: Sequence[str]) -> None:
    sys.stderr.write("".join(f"{line}\n" for line in lines))


def _since(started: float) -> str:
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


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
