"""What is installed elsewhere is whole: the package, its yaml, its licence and its command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
from rlhf_cli.config import compose, conf_dir, recipe
print(conf_dir())
print(recipe(compose(["algo=ppo", "data=hh"])).group)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """A folder into which the built wheel was installed."""
    folder = tmp_path_factory.mktemp("wheel")
    built, target = folder / "built", folder / "target"
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet"]
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(built)]
    subprocess.run([*build, str(root)], check=True, capture_output=True)
    subprocess.run([*pip, "--target", str(target), *map(str, built.glob("*.whl"))], check=True)
    return target


def test_an_installed_wheel_composes_from_its_own_yaml(installed: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == [str(installed / "rlhf_cli" / "conf"), "hh-embedded-nano"], done


def test_a_wheel_has_every_file_of_the_package_and_of_conf(installed: Path, root: Path) -> None:
    def files(folder: Path) -> set[str]:
        found = (path for path in folder.rglob("*") if path.is_file())
        return {p.relative_to(folder).as_posix() for p in found if "__pycache__" not in p.parts}

    package = files(installed / "rlhf_cli")
    assert files(root / "conf") == files(installed / "rlhf_cli" / "conf")
    assert {name for name in package if not name.startswith("conf/")} == files(root / "rlhf_cli")
    assert list(installed.glob("*.dist-info/licenses/LICENSE"))
    assert (installed / "bin" / "rlhf").exists()
