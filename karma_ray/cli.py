"""The command line of all jobs: flags, exit codes and configuration."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from karma_ray import pretrained, recipes
from karma_ray.artifacts import RunFolder, absolute, join, read_json
from karma_ray.config import (
    Config,
    assigned,
    describe_fields,
    flattened,
    from_dict,
    from_home,
    overlaid,
    override,
    to_dict,
)
from karma_ray.errors import InputError, KarmaRayError
from karma_ray.stores import failure

if TYPE_CHECKING:
    from karma_ray.runs.executor import Executor


class _Parser(argparse.ArgumentParser):
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, and expand `~/` in every path, also after `=`."""
        found, rest = super().parse_known_args(args, namespace)
        for name, value in vars(found).items():
            if isinstance(value, str):
                setattr(found, name, from_home(value))
            elif isinstance(value, list):
                setattr(found, name, [from_home(v) if isinstance(v, str) else v for v in value])
        return found, rest

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def parser(description: str, *, config: bool = False) -> argparse.ArgumentParser:
    """Return a parser; with `config` it has --recipe, --seed, --set and --config, with help."""
    result = _Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(
            f"recipes:\n{recipes.describe_recipes()}\n\n"
            f"fields for --set, with defaults:\n{describe_fields()}"
            if config
            else None
        ),
    )
    if config:
        result.add_argument("--recipe", help="a recipe of the list below")
        result.add_argument("--seed", type=int, help="seed of the run (default 0)")
        result.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="PATH=VALUE",
            dest="assignments",
            help="override one field, for example training.steps=500 (repeatable)",
        )
        result.add_argument("--config", metavar="FILE.json", help="start from a saved config.json")
    return result


def load_config(arguments: argparse.Namespace, default_recipe: str) -> Config:
    """Return the configuration that the flags describe; raises InputError.

    It is suited to the origin of its weights (`pretrained.PRETRAINED`) in fields that neither flags
    set nor a file says that names a pretrained LLM itself. A file of a small model that starts from
    an LLM by `--set` is suited as a recipe is, because its values are for small random weights.
    What a file that was written by hand does not say is as in its recipe.
    """
    said: set[str] = set()
    if arguments.config:
        if arguments.recipe:
            raise InputError("--recipe", arguments.recipe, "cannot be combined with --config")
        file = read_json(arguments.config)
        config, written = from_dict(file), {name for name, _ in flattened(file)}
        if not written.issuperset(pretrained.PRETRAINED):  # as no saved one
            if config.recipe not in recipes.names():
                raise InputError("config recipe", config.recipe, choices=recipes.names())
            config = overlaid(recipes.build(config.recipe), file)
        if pretrained.starts_from_llm(config):
            said = written
    else:
        config = recipes.build(arguments.recipe or default_recipe)
    if arguments.seed is not None:
        config = from_dict({**to_dict(config), "seed": arguments.seed})
    config = override(config, arguments.assignments)
    if said.issuperset(pretrained.PRETRAINED):  # as every saved one: its checkpoint is not read
        return config
    return pretrained.suited_to_weights(config, said | assigned(arguments.assignments))


def cache_flag(flags: argparse.ArgumentParser) -> None:
    """Add --cache, the folder that all runs share."""
    flags.add_argument(
        "--cache", metavar="URI",
        help="folder or URI of what runs share: the toy shop, warmed-up weights, floors (default: "
        "runs/cache, or `cache` beside a remote run)",
    )  # fmt: skip


def default_out(recipe: str) -> str:
    """Return `runs/<recipe>-<time>`."""
    return join("runs", f"{recipe}-{time.strftime('%Y%m%d-%H%M%S')}")


def train(argv: list[str] | None, description: str, load_executor: Callable[[], Executor]) -> None:
    """Train by flags, for jobs/train.py with an executor on Ray and karma_ray.runs without.

    The executor is loaded after the flags are read: a mistake in them, or --help, need not wait for
    all that training imports.
    """
    flags = parser(description, config=True)
    flags.add_argument("--data", help="data folder or URI (default: the built-in toy shop)")
    flags.add_argument("--out", help="run folder or URI (default: runs/<recipe>-<time>)")
    flags.add_argument("--resume", action="store_true", help="continue the unfinished run in --out")
    flags.add_argument(
        "--init-from", metavar="RUN", help="train the model (and configuration) of this run further"
    )
    flags.add_argument(
        "--vectors", metavar="RUN",
        help="finished run whose item vectors a CTR model reads: as similarities (ctr_simtier), "
        "to search a long history (ctr_qarm), as text (ctr_sarm), as they are (ctr_ocarm)",
    )  # fmt: skip
    flags.add_argument(
        "--codes", metavar="FOLDER",
        help="semantic ids for ctr_qarm (default: item_codes/ of the run of --vectors)",
    )  # fmt: skip
    flags.add_argument(
        "--profile", action="store_true", help="write a trace of three steps to RUN/profile"
    )
    cache_flag(flags)
    arguments = flags.parse_args(argv)
    if arguments.init_from and not (arguments.recipe or arguments.config):
        from karma_ray.runs.continuation import Parent

        arguments.config = RunFolder(Parent.open(arguments.init_from).run).config
    config = load_config(arguments, "karma_text" if arguments.data else "toy")
    if arguments.vectors:
        config = override(config, [f"ranking.vectors={absolute(arguments.vectors)}"])
    if arguments.codes:
        config = override(config, [f"ranking.codes={absolute(arguments.codes)}"])
    if arguments.profile:
        config = override(config, ["training.profile=true"])
    out = arguments.out or default_out(config.recipe)
    from karma_ray.report.terminal import summary
    from karma_ray.runs.node_hours import NodeHours
    from karma_ray.runs.pipeline import train_run

    executor = load_executor()
    with NodeHours(out, executor.count_nodes):
        train_run(
            config, arguments.data, out, resume=arguments.resume, init_from=arguments.init_from,
            cache=arguments.cache, executor=executor,
        )  # fmt: skip
    print(summary(out))


def run(main: Callable[[list[str] | None], Any], argv: list[str] | None = None) -> NoReturn:
    """Run a job: exit code 0 on success, 2 on bad input with a message, 1 on failure."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("faiss").setLevel(logging.WARNING)  # it tells how it was loaded
    try:
        main(argv)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KarmaRayError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        if (sentence := failure(error)) is None:
            raise
        print(f"error: {sentence}", file=sys.stderr)
        sys.exit(1)
    sys.exit(0)
