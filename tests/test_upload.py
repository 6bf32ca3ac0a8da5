"""What `ray job submit --working-dir .` uploads, by Ray's own packaging: the code and no more."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MEBIBYTE = 2**20


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    from ray._private.runtime_env.packaging import create_package

    target = tmp_path_factory.mktemp("upload") / "package.zip"
    create_package(str(ROOT), target, include_gitignore=True, excludes=[])
    return target


def test_the_upload_is_small_and_holds_the_code_alone(package) -> None:
    assert package.stat().st_size < 5 * MEBIBYTE
    names = zipfile.ZipFile(package).namelist()
    assert {"jobs/train.py", "karma_ray/recipes.py", "tune_spaces/lambdas.py"} <= set(names)
    tops = {name.split("/")[0] for name in names}
    assert not tops & {".git", ".venv", ".ci", "data", "docs", "runs", "tests", "deploy"}


def test_modules_of_the_package_are_not_left_behind(package) -> None:
    """`/data/` means a folder of tables beside the code, not karma_ray/data."""
    names = set(zipfile.ZipFile(package).namelist())
    tracked = subprocess.run(
        ["git", "ls-files", "karma_ray", "jobs", "tune_spaces"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert not [name for name in tracked if name not in names and (ROOT / name).exists()]


def test_every_job_starts_from_the_upload(package, tmp_path) -> None:
    """`--help` imports what a job imports, from the unpacked folder alone."""
    with zipfile.ZipFile(package) as archive:
        archive.extractall(tmp_path)
    code = (
        "import runpy, sys, pathlib\n"
        "for path in sorted(pathlib.Path('jobs').glob('*.py')):\n"
        "    sys.path[:] = [p for p in sys.path if p not in ('', '.')]\n"
        "    runpy.run_path(str(path), run_name='loaded')\n"
        "import karma_ray\nprint(karma_ray.__file__)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == str(tmp_path / "karma_ray" / "__init__.py")
