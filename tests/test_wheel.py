"""The wheel holds the whole checkout, and its commands run where there is nothing else of it."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.strategies import make_spec, write_dataset

ROOT = Path(__file__).parent.parent
PACKAGES = ("logitshards", "shards", "student_train", "teacher_dump")
COMMANDS = ("dump-logits", "train-student", "inspect-shards")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]

pytestmark = pytest.mark.slow


def run(*words, cwd):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    result = subprocess.run(
        list(map(str, words)), cwd=cwd, env=clean, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # A copy: what an earlier build left in the checkout would get into the wheel.
    left_out = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info")
    shutil.copytree(ROOT, folder / "source", ignore=left_out)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder)
    run(*PIP, "wheel", *options, folder / "source", cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The `bin` of a fresh environment that borrows only the dependencies of this one."""
    environment = tmp_path_factory.mktemp("fresh") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=environment.parent)
    python = environment / "bin" / "python"
    install = ("--python", python, "install", "--no-deps", "--no-index", wheel)
    run(*PIP, *install, cwd=environment.parent)
    (packages,) = environment.glob("lib/python*/site-packages")
    # As a line of a .pth file, a folder is searched last, and its own .pth files (those of an
    # editable installation) are not read.
    borrowed = sysconfig.get_paths()["purelib"]
    (packages / "borrowed.pth").write_text(f"{borrowed}\n")
    return environment / "bin"


def test_the_wheel_holds_every_module_and_nothing_else(wheel):
    expected = {"cli.py"}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*"):
            if "__pycache__" not in path.parts and path.is_file():
                expected.add(path.relative_to(ROOT).as_posix())
    assert {f"{package}/py.typed" for package in PACKAGES} <= expected
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert found == expected


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_wheel_answers(installed, tmp_path, command):
    number = run(installed / command, "--version", cwd=tmp_path).split()
    assert number == ["logitshards", run_python(installed, "print(l.__version__)", tmp_path)]
    assert f"Usage: {command}" in run(installed / command, "--help", cwd=tmp_path)


def test_the_wheel_reads_a_dataset_from_another_folder(installed, tmp_path):
    dataset = tmp_path / "data" / "dataset"
    dataset.parent.mkdir()
    write_dataset(dataset, make_spec(), train=5)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert "train" in run(installed / "inspect-shards", dataset, cwd=elsewhere)
    code = f"print(l.__file__, len(l.open({str(dataset)!r})['train']))"
    file, length = run_python(installed, code, elsewhere).split()
    assert Path(file).is_relative_to(installed.parent)
    assert length == "5"


def run_python(folder, code, cwd):
    return run(folder / "python", "-c", f"import logitshards as l; {code}", cwd=cwd).strip()
