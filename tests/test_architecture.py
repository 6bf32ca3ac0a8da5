"""The floor plan as a test: who may import whom, in plain sentences, by reading the source.

Nothing is imported; every file is parsed with `ast`, so the whole check takes a second.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Low to high: a room imports itself and rooms to its left.
ROOMS = (
    "errors",
    "ranges",
    "stores",
    "artifacts",
    "node_disk",
    "node_cache",
    "data",
    "metrics",
    "objectives",
    "model",
    "codes",
    "baselines",
    "retrieval",
    "ranking",
    "evaluation",
    "training",
    "config",
    "recipes",
    "pretrained",
    "report",
    "runs",
    "studies",
    "funnel",
    "serving",
    "cluster",
    "cli",
)
# Outside packages that have one home inside the package.
HOMES = {
    "ray": "karma_ray.cluster",
    "fastapi": "karma_ray.serving",
    "prometheus_client": "karma_ray.serving",
    "transformers": "karma_ray.model.backbones",
    "peft": "karma_ray.model.lora",
    "faiss": ("karma_ray.retrieval", "karma_ray.codes"),
    "mlflow": "karma_ray.runs.tracking",
    "matplotlib": ("karma_ray.report", "karma_ray.studies"),
    "jinja2": ("karma_ray.report", "karma_ray.studies"),
}
VAGUE = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "handler"}
MAX_MODULE_LINES = 300
MAX_FUNCTION_LINES = 60

Sources = dict[str, str]
"""Path relative to the repository root -> text."""


def read_sources(*folders: str) -> Sources:
    return {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for folder in folders
        for path in sorted((ROOT / folder).rglob("*.py"))
    }


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def room_of(module: str) -> str | None:
    """The room of `karma_ray.room[.module]`; None for the package itself and for outsiders.

    `python -m karma_ray.room` parses flags and calls one function, so it stands with the programs.
    """
    parts = module.split(".")
    if parts[-1] == "__main__":
        return "cli"
    return parts[1] if parts[0] == "karma_ray" and len(parts) > 1 else None


def lies_in(module: str, home: str) -> bool:
    return module == home or module.startswith(home + ".")


def homes_of(package: str) -> tuple[str, ...]:
    homes = HOMES[package]
    return (homes,) if isinstance(homes, str) else homes


def imported_modules(text: str, known: set[str]) -> Iterator[str]:
    """Every module that `text` imports, at any depth; `from a import b` is a.b if that is one."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in known else node.module


def edges(sources: Sources) -> dict[str, set[str]]:
    known = {module_name(path) for path in sources}
    return {module_name(path): set(imported_modules(text, known)) for path, text in sources.items()}


def room_complaints(sources: Sources) -> list[str]:
    complaints = []
    for module, targets in edges(sources).items():
        mine = room_of(module)
        if mine is None:
            continue
        if mine not in ROOMS:
            complaints.append(f"{module} lies in no room; the rooms are {', '.join(ROOMS)}")
            continue
        for target in sorted(targets):
            theirs = room_of(target)
            if theirs in ROOMS and ROOMS.index(theirs) > ROOMS.index(mine):
                complaints.append(
                    f"{module} imports {target}; {mine} is a lower room than {theirs}"
                )
    return complaints


def home_complaints(sources: Sources) -> list[str]:
    return [
        f"{module} imports {target}; only {' and '.join(homes_of(package))} may"
        for module, targets in edges(sources).items()
        for target in sorted(targets)
        if (package := target.split(".")[0]) in HOMES
        and not any(lies_in(module, home) for home in homes_of(package))
    ]


FAMILY = re.compile("qwen|llama|mistral|gemma", re.IGNORECASE)


def family_complaints(sources: Sources) -> list[str]:
    return [
        f"{path}:{number} names a family of LLMs; only a module of model/backbones/ may"
        for path, text in sources.items()
        if not path.startswith("karma_ray/model/backbones/")
        for number, line in enumerate(text.splitlines(), 1)
        if FAMILY.search(line)
    ]


def relative_complaints(sources: Sources) -> list[str]:
    return [
        f"{path}:{node.lineno} has a relative import; imports are absolute here"
        for path, text in sources.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and node.level > 0
    ]


def cycle_complaints(sources: Sources) -> list[str]:
    """One sentence per import cycle met by a depth-first walk (imports inside functions count)."""
    graph = edges(sources)
    finished: set[str] = set()
    complaints: list[str] = []

    def visit(module: str, trail: tuple[str, ...]) -> None:
        if module in trail:
            cycle = (*trail[trail.index(module) :], module)
            complaints.append("import cycle: " + " -> ".join(cycle))
            return
        if module in finished or module not in graph:
            return
        for target in sorted(graph[module]):
            visit(target, (*trail, module))
        finished.add(module)

    for module in sorted(graph):
        visit(module, ())
    return complaints


def name_complaints(sources: Sources) -> list[str]:
    complaints = []
    for path in sources:
        stem = Path(path).stem
        if VAGUE & set(stem.split("_")):
            complaints.append(
                f"{path} has a vague name; a module is a noun that says what it holds"
            )
        script = path.split("/")[0] in ("jobs", "benchmarks", "tune_spaces")
        if script and stem in sys.stdlib_module_names:
            complaints.append(f"{path} hides the standard library's {stem}")
    return complaints


def size_complaints(sources: Sources) -> list[str]:
    complaints = []
    for path, text in sources.items():
        lines = text.count("\n")
        if lines > MAX_MODULE_LINES:
            complaints.append(f"{path} has {lines} lines; {MAX_MODULE_LINES} is the limit")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    complaints.append(
                        f"{path}: {node.name} has {length} lines; {MAX_FUNCTION_LINES} is the limit"
                    )
    return complaints


PACKAGE_CHECKS = (
    room_complaints,
    home_complaints,
    family_complaints,
    relative_complaints,
    cycle_complaints,
    name_complaints,
    size_complaints,
)


@pytest.mark.parametrize("check", PACKAGE_CHECKS, ids=lambda check: check.__name__)
def test_the_package_keeps_to_the_floor_plan(check) -> None:
    complaints = check(read_sources("karma_ray"))
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize("check", (name_complaints, size_complaints, relative_complaints))
def test_jobs_benchmarks_and_spaces_are_named_and_sized_well(check) -> None:
    complaints = check(read_sources("jobs", "benchmarks", "tune_spaces"))
    assert not complaints, "\n".join(complaints)


def test_jobs_reach_the_backbone_and_the_index_only_through_the_package() -> None:
    complaints = [
        f"{module} imports {target}; a job calls functions of the package"
        for module, targets in edges(read_sources("jobs")).items()
        for target in sorted(targets)
        if target.split(".")[0] in ("transformers", "faiss", "matplotlib")
    ]
    assert not complaints, "\n".join(complaints)


def test_a_script_runs_the_package_that_it_stands_beside() -> None:
    """Another checkout may be installed; `python jobs/train.py` has only jobs/ on its path."""
    first = "sys.path.insert(0, "
    complaints = [
        f"{path} imports karma_ray before it puts the repository first on the path"
        for path, text in read_sources("jobs", "benchmarks").items()
        if '__name__ == "__main__"' in text
        and not 0 <= text.find(first) < text.find("\nfrom karma_ray")
    ]
    assert not complaints, "\n".join(complaints)


PLANTED = {
    "a low room reaches up": (
        room_complaints,
        {"karma_ray/data/catalog.py": "from karma_ray.training import loop\n"},
        "karma_ray.data.catalog imports karma_ray.training; data is a lower room than training",
    ),
    "a new room without a place": (
        room_complaints,
        {"karma_ray/attic/box.py": ""},
        "karma_ray.attic.box lies in no room",
    ),
    "ray inside a loss": (
        home_complaints,
        {"karma_ray/objectives/action.py": "def loss():\n    import ray.train\n"},
        "karma_ray.objectives.action imports ray.train; only karma_ray.cluster may",
    ),
    "transformers outside the backbone": (
        home_complaints,
        {"karma_ray/model/karma.py": "from transformers import AutoModel\n"},
        "karma_ray.model.karma imports transformers; only karma_ray.model.backbones may",
    ),
    "a family's name in a loss": (
        family_complaints,
        {"karma_ray/training/flops.py": "COST = 1  # of a Qwen3 layer\n"},
        "karma_ray/training/flops.py:1 names a family of LLMs",
    ),
    "a relative import": (
        relative_complaints,
        {"karma_ray/data/splits.py": "from . import schema\n"},
        "karma_ray/data/splits.py:1 has a relative import",
    ),
    "two modules import each other": (
        cycle_complaints,
        {
            "karma_ray/data/one.py": "from karma_ray.data import two\n",
            "karma_ray/data/two.py": "from karma_ray.data.one import thing\n",
        },
        "import cycle: karma_ray.data.one -> karma_ray.data.two -> karma_ray.data.one",
    ),
    "a vague name": (name_complaints, {"karma_ray/data/utils.py": ""}, "has a vague name"),
    "a job that hides the profiler": (
        name_complaints,
        {"jobs/profile.py": ""},
        "jobs/profile.py hides the standard library's profile",
    ),
    "a module that never ends": (
        size_complaints,
        {"karma_ray/data/long.py": "x = 1\n" * 301},
        "karma_ray/data/long.py has 301 lines; 300 is the limit",
    ),
    "a function that never ends": (
        size_complaints,
        {"karma_ray/data/deep.py": "def f():\n" + "    x = 1\n" * 61},
        "karma_ray/data/deep.py: f has 62 lines; 60 is the limit",
    ),
}


@pytest.mark.parametrize("plant", PLANTED)
def test_a_planted_violation_is_caught(plant: str) -> None:
    check, sources, sentence = PLANTED[plant]
    complaints = check(sources)
    assert len(complaints) == 1
    assert sentence in complaints[0]


def test_a_tidy_house_has_no_complaints() -> None:
    sources = {
        "karma_ray/data/schema.py": "from karma_ray.errors import InputError\nimport pyarrow\n",
        "karma_ray/cluster/training.py": "import ray.train\nfrom karma_ray.training import loop\n",
        "karma_ray/training/loop.py": "import torch\nfrom karma_ray.data import schema\n",
    }
    assert [complaint for check in PACKAGE_CHECKS for complaint in check(sources)] == []
