"""A peer that cannot live with the others: it has an environment of its own, and a process that answers on demand.

Public: `Apart`, `python_of`, `version_of`.

    python apart.py TASK ARRAY.npy    # the other side, run by the peer's own Python: one answer for each line it reads
"""

import os
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

import numpy as np

HOME = Path(__file__).resolve().parent / ".venv" / "apart"


def twonn_by_dadapy(x: np.ndarray) -> float:
    from dadapy import Data

    return Data(x, maxk=3, verbose=False).compute_id_2NN(mu_fraction=0.9)[0]


TASKS = {"twonn_by_dadapy": twonn_by_dadapy}


def python_of(peer: str) -> Path:
    """Return the interpreter of a peer's environment."""
    return HOME / peer / "bin" / "python"


def version_of(peer: str) -> str:
    """Return the version that is installed, or nothing."""
    command = [str(python_of(peer)), "-c", f"import importlib.metadata as m; print(m.version({peer!r}))"]
    if not python_of(peer).exists():
        return ""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


class Apart:
    """Call it to run a task on an array in the peer's environment; the array travels once, before any time is taken.

    Args:
        peer: name of the library, as in oracles.txt.
        task: name of a function in TASKS.
        x: what the function takes.
    """

    def __init__(self, peer: str, task: str, x: np.ndarray):
        self.peer, self.ready = peer, ""
        if not python_of(peer).exists():
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "x.npy"
            np.save(path, x)
            command = [str(python_of(peer)), __file__, task, str(path)]
            settings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
            pipe = subprocess.PIPE
            self.worker = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=settings)
            self.ready = self.worker.stdout.readline()  # it has read the array, and is warm
        weakref.finalize(self, self.worker.kill)

    def __call__(self) -> float:
        if not self.ready:
            raise ImportError(f"{self.peer} does not run in an environment of its own")
        self.worker.stdin.write("\n")
        self.worker.stdin.flush()
        answer = self.worker.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.peer} stopped with status {self.worker.wait()}")
        return float(answer)


def answer() -> None:
    """Run the task once to be warm, then once for every line of standard input."""
    task, x = TASKS[sys.argv[1]], np.load(sys.argv[2])
    out, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no answer
    task(x[:100])
    print("ready", file=out, flush=True)
    for _ in sys.stdin:
        print(repr(float(task(x))), file=out, flush=True)


if __name__ == "__main__":
    answer()
