"""The wheel and the source distribution: the package, whole, and nothing else."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import fastblocks
import fastblocks.kernels

ROOT = Path(fastblocks.__file__).parent.parent
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"


def sources():
    """Every file that an installation has, by its path there."""
    package = {path: f"fastblocks/{path.relative_to(ROOT / 'fastblocks')}" for path in (ROOT / "fastblocks").rglob("*")}
    kernels = Path(fastblocks.kernels.__path__[0])
    package |= {path: f"fastblocks/kernels/{path.relative_to(kernels)}" for path in kernels.rglob("*")}
    return {name for path, name in package.items() if path.suffix == ".py" or path.name == "py.typed"}


def run(*command, cwd, **environment):
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=os.environ | environment)
    if "Could not find a version" in done.stderr or "No matching distribution" in done.stderr:
        pytest.skip(f"the build backend cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(source distribution, wheel), the wheel built from the source distribution."""
    folder = tmp_path_factory.mktemp("built")
    clone = folder / "clone"
    clone.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone / name)
    for name in ("fastblocks", "kernels", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, clone / name)
    backend = folder / "backend"
    run(sys.executable, "-m", "pip", "install", "-q", "--target", str(backend), "setuptools>=77", cwd=folder)
    run(sys.executable, "-c", BUILD, str(folder), cwd=clone, PYTHONPATH=str(backend))
    (sdist,) = folder.glob("*.tar.gz")
    pip = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", str(folder), str(sdist))
    run(*pip, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


def test_the_wheel_is_the_package(built):
    names = set(zipfile.ZipFile(built[1]).namelist())
    assert {name for name in names if ".dist-info/" not in name} == sources()
    assert any(name.endswith("LICENSE") for name in names)


def test_the_source_distribution_has_what_it_is_built_from_and_no_more(built):
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if archive.getmember(name).isfile()}
    top = {name.partition("/")[0] for name in names}
    assert {name.replace("kernels/", "fastblocks/kernels/", 1) if name.startswith("kernels/") else name
            for name in names if name.startswith(("fastblocks/", "kernels/"))} == sources()  # fmt: skip
    assert top <= {
        "fastblocks", "kernels", "fastblocks_audio.egg-info", "setup.py", "setup.cfg", "pyproject.toml",
        "README.md", "LICENSE", "PKG-INFO",
    }  # fmt: skip


def test_an_installation_has_its_kernels(built, tmp_path):
    zipfile.ZipFile(built[1]).extractall(tmp_path / "site")
    code = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]
import fastblocks, fastblocks.kernels
from fastblocks.kernels.operator import all_operators
print(fastblocks.__file__, fastblocks.kernels.__file__, sorted(all_operators()))
"""
    said = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert said.count(str(tmp_path / "site" / "fastblocks")) == 2 and "rope_attention" in said
