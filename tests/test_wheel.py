"""What is installed is complete: a wheel, used from another folder without the checkout."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib

import pytest

pytest.importorskip("deepspeed")
pytest.importorskip("nvidia.dali")
pytest.importorskip("setuptools")

from ijepa_fast import configs
from ijepa_fast.__main__ import COMMANDS
from tests.launch import PUBLISHED_MASKS, ROOT, unlaunched

OPS = sorted(path.parent.name for path in ROOT.glob("kernels/*/ops.py"))
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "ijepa_fast", "kernels", "configs")
TINY = ["optim.steps=2", "optim.epochs=1", "optim.warmup_epochs=0", "batch_size=8", "data.source=scenes"]
TINY += ["data.scenes=200", "data.scenes_size=32", "data.crop=32", "model.depth=1", "model.predictor_depth=1"]
TINY += ["log.every=1", "log.tensorboard=false", "probe.enabled=false"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder that a wheel of this checkout is installed in, without csrc, which tests of its own cover."""
    root = tmp_path_factory.mktemp("wheel")
    source, target = root / "source", root / "installed"
    source.mkdir()
    for name in SOURCES:  # a copy: a build folder left in the checkout would add files that it no longer has
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-index", "--no-build-isolation", "--no-deps", "-w", root, source]
    subprocess.run(build, check=True, env=os.environ | {"IJEPA_FAST_NO_EXT": "1"})
    (wheel,) = root.glob("*.whl")
    subprocess.run([*pip, "install", "--no-index", "--no-deps", "--target", target, wheel], check=True)
    shutil.rmtree(source)
    # What finds the checkout's extension, where the checkout is installed too.
    hide = "import sys; sys.meta_path[:] = [finder for finder in sys.meta_path if 'editable' not in repr(finder)]"
    (target / "sitecustomize.py").write_text(hide)
    return target


@pytest.fixture
def python(installed, tmp_path):
    """Runs `python ARGUMENTS` in an empty folder, where the wheel comes before every other path."""
    alone = {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TRITON_INTERPRET": "0"}

    def run(*arguments, status=0):
        command = [sys.executable, *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env=unlaunched(**alone), capture_output=True, text=True, timeout=300
        )
        assert done.returncode == status, done.stdout[-3000:] + done.stderr[-3000:]
        return done

    return run


IMPORT = """
import importlib, json, pkgutil, sys
import ijepa_fast
from ijepa_fast import configs, kernels
from ijepa_fast.config import load_config

found = {}
for module in pkgutil.walk_packages(ijepa_fast.__path__, "ijepa_fast."):
    if not module.name.endswith("__main__"):
        found[module.name] = importlib.import_module(module.name).__file__
for name in configs.names():
    load_config(name)
json.dump({"modules": found, "configs": configs.names()}, sys.stdout)
"""


def test_every_module_every_op_and_every_config_is_there(installed, python):
    found = json.loads(python("-c", IMPORT).stdout.splitlines()[-1])
    assert {path for path in found["modules"].values() if not path.startswith(str(installed))} == set()
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in ROOT.glob("ijepa_fast/**/*.py")
        if path.name != "__main__.py"
    }
    assert set(found["modules"]) >= modules - {"ijepa_fast"} | {f"ijepa_fast.kernels.{op}.ops" for op in OPS}
    assert found["configs"] == sorted(path.stem for path in ROOT.glob("configs/*.yaml"))


def test_files_that_are_not_python(installed):
    package = installed / "ijepa_fast"
    assert (package / "py.typed").is_file()
    for path in ROOT.glob("ijepa_fast/report/page.*"):
        assert (package / "report" / path.name).read_bytes() == path.read_bytes()
    assert not [path.name for path in installed.iterdir() if path.name in ("kernels", "configs", "tests", "bench")]


@pytest.mark.parametrize("config", ["quickstart", "mae_cifar10"])
def test_trains_by_the_name_of_a_config(installed, python, tmp_path, config):
    script = (installed / "bin" / "ijepa-fast",) if config == "quickstart" else ("-m", "ijepa_fast")
    more = PUBLISHED_MASKS if config == "quickstart" else []
    done = python(*script, "train", "--config", config, *TINY, *more, f"data.cache={tmp_path}", "runs=here")
    assert "csrc is not built: a step takes about twice as long on a CPU; to build it: pip install" in done.stderr
    steps = [json.loads(line) for line in (tmp_path / "here" / config / "log.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps if "loss" in step] == [1, 2]


def test_an_unknown_name_lists_the_ready_ones(python):
    done = python("-m", "ijepa_fast", "train", "--config", "quickstrat", status=1)
    expected = f"there is no file quickstrat; did you mean quickstart, of the ready ones {', '.join(configs.names())}?"
    assert done.stderr.splitlines()[-1] == f"error: --config: {expected}"


def test_the_console_script_has_every_command(installed, python):
    done = python(installed / "bin" / "ijepa-fast", "--help")
    assert all(f"\n  {name} " in done.stdout for name in COMMANDS)
    assert python(installed / "bin" / "ijepa-fast", "configs").stdout.count("\n") == len(configs.names())
    wrong = python(installed / "bin" / "ijepa-fast", "train", "--config", "quickstart", "lr=1", status=1)
    assert wrong.stderr.startswith("error: lr: there is no such key; did you mean optim.lr?")


def test_extras_and_the_script_are_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"gpu", "science", "wandb", "dev"} <= set(project["optional-dependencies"])
    assert project["scripts"] == {"ijepa-fast": "ijepa_fast.__main__:main"}


def test_the_same_tools_are_installed_before_the_package_everywhere():
    """By the Makefile, .ci/matrix and the Dockerfile: what builds the extension and DeepSpeed without isolation."""
    pages = {name: (ROOT / name).read_text() for name in ("Makefile", ".ci/matrix", "Dockerfile")}
    tools = {name: re.search(r'"setuptools>=\d+" (.*)', text)[0] for name, text in pages.items()}
    assert set(tools.values()) == {'"setuptools>=77" wheel ninja py-cpuinfo numpy'}
    for text in pages.values():
        assert re.search(r"DS_BUILD_OPS=0 \S*\$?\S*pip install .*--no-build-isolation", text)
    left_out = (ROOT / ".dockerignore").read_text().split()
    assert not set(SOURCES) & set(left_out)
