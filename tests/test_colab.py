"""On Colab: an environment with what is preinstalled there, an empty folder, a first cell that fetches the companion.

The environment is made of the very files of this one, but only of the packages that Colab has and what they require,
so that it costs seconds and no download; the companion and its other requirements are installed by the notebook.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from urllib.parse import quote

import nbformat
import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PREINSTALLED = ("torch", "numpy", "scipy", "scikit-learn", "matplotlib", "pandas", "ipykernel")
ABSENT = ("companion", "torchmetrics", "safetensors", "jupytext", "nbval", "sphinx", "pytest")
FIRST = "book/calibration/recalibration.ipynb"
LISTED = re.findall(r"file:\s*(\S+\.ipynb)", (ROOT / "_toc.yml").read_text())


def closure(names):
    """The installed distributions that some of them require, by name, themselves included."""
    found, todo = {}, list(names)
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # required on other systems only
        for line in found[name].requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({**default_environment(), "extra": ""}):
                todo.append(requirement.name)
    return found


def place(source, target):
    """The same file a second time: a hard link where that is possible, so that removing one leaves the other."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except FileExistsError:
        pass
    except OSError:
        target.write_bytes(source.read_bytes())


@pytest.fixture(scope="module")
def colab(tmp_path_factory):
    """The python of an environment like Colab's."""
    home = tmp_path_factory.mktemp("colab", numbered=True)
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True, capture_output=True)
    python = home / "bin" / "python"
    where = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip())
    for distribution in closure(PREINSTALLED).values():
        for file in distribution.files or ():
            source = Path(distribution.locate_file(file))
            if ".." not in file.parts and "__pycache__" not in file.parts and source.is_file():
                place(source, site / file)
    return python


def looks(python, names):
    """Which of some modules a python finds."""
    code = "import importlib.util as u, json, sys; print(json.dumps([n for n in sys.argv[1:] if u.find_spec(n)]))"
    done = subprocess.run(
        [str(python), "-c", code, *names], check=True, capture_output=True, text=True, cwd=python.parent
    )
    return eval(done.stdout)


def run_there(python, notebook, folder, monkeypatch):
    """Run a notebook with that python in an empty folder, the companion coming from this repository's commits."""
    from nbclient import NotebookClient

    kernel = folder / "jupyter" / "kernels" / "colab"
    kernel.mkdir(parents=True)
    argv = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "colab", "language": "python"}))
    empty = folder / "empty"
    empty.mkdir()
    monkeypatch.setenv("JUPYTER_PATH", str(folder / "jupyter"))
    monkeypatch.setenv("COMPANION_URL", "git+file://localhost" + quote(str(ROOT)))
    # pip splits this variable at spaces, which the path of the repository may hold
    constraints = shutil.copy(ROOT / "constraints.txt", folder)
    monkeypatch.setenv("PIP_CONSTRAINT", str(constraints))
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")  # the repository may belong to another user, as in a container
    monkeypatch.setenv("GIT_CONFIG_KEY_0", "safe.directory")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "*")
    for name in ("PYTHONPATH", "VIRTUAL_ENV", "COMPANION_SEED"):
        monkeypatch.delenv(name, raising=False)
    book = nbformat.read(notebook, as_version=4)
    NotebookClient(book, timeout=600, kernel_name="colab", resources={"metadata": {"path": str(empty)}}).execute()
    errors = [o for c in book.cells for o in c.get("outputs", []) if o.output_type == "error"]
    assert not errors
    assert not list(empty.iterdir()), f"the notebook left files behind: {list(empty.iterdir())}"


@pytest.mark.site
def test_the_environment_has_what_colab_has_and_nothing_of_ours(colab):
    modules = ["torch", "numpy", "scipy", "sklearn", "matplotlib", "pandas", "ipykernel"]
    assert looks(colab, modules) == modules
    assert looks(colab, ABSENT) == []


@pytest.mark.site
def test_one_chapter_runs_on_colab(colab, tmp_path, monkeypatch):
    if not LISTED:
        pytest.skip("no chapter is listed in _toc.yml yet")
    run_there(colab, ROOT / (FIRST if FIRST in LISTED else LISTED[0]), tmp_path, monkeypatch)
    assert looks(colab, ["companion"]) == ["companion"]


@pytest.mark.slow
@pytest.mark.parametrize("name", LISTED)
def test_every_chapter_runs_on_colab(colab, name, tmp_path, monkeypatch):
    run_there(colab, ROOT / name, tmp_path, monkeypatch)
