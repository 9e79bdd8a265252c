"""Runs the companion side by side with the libraries people would otherwise pick: `make bench`.

    python benchmarks/run.py [--quick] [--only NAME ...] [--threads N]

Builds `benchmarks/.venv` from `oracles.txt` once, measures there, and writes `benchmarks/results/cpu.json` (or
`cuda.json`), from which `make book` draws the page. `--quick` and `--only` write nothing: they are for trying out. The
exit status is 1 when a result disagrees.
"""

import argparse
import hashlib
import importlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import shlex
import subprocess
import sys
import time
import warnings
from datetime import date
from pathlib import Path

from apart import python_of, version_of

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
VENV = HERE / ".venv"
PYTHON = VENV / "bin" / "python"
ORACLES = HERE / "oracles.txt"
THEMES = [
    "bench_dimensionality",
    "bench_collapse",
    "bench_calibration",
    "bench_anomaly",
    "bench_mixup",
    "bench_training",
]
OWN = ["torch", "numpy", "scipy", "scikit-learn", "torchmetrics", "matplotlib", "tqdm", "pyyaml", "safetensors"]
PINNED = ["torch", "scikit-learn", "torchmetrics"]  # what decides the companion's own speed: as in constraints.txt


def oracles(mark: str = "") -> list[str]:
    """Return the requirements of oracles.txt, or those that a mark stands behind."""
    lines = (line.partition("#") for line in ORACLES.read_text(encoding="utf-8").splitlines())
    return [line.strip() for line, _, comment in lines if line.strip() and comment.strip().startswith(mark)]


def apart() -> list[str]:
    """Return those that need an environment of their own."""
    return oracles("apart:")


def environment() -> dict[str, str]:
    """Build the environment of the peers when it is missing or old; return requirement -> why it is missing."""
    stamp = VENV / "oracles.json"
    mark = hashlib.sha256(ORACLES.read_bytes() + (ROOT / "constraints.txt").read_bytes()).hexdigest()
    if stamp.exists():
        known = json.loads(stamp.read_text(encoding="utf-8"))
        if known["mark"] == mark:
            return known["missing"]
    print(f"building {VENV.relative_to(ROOT)}: once, some minutes", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], check=True)
    pins = VENV / "pins.txt"
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins.write_text("\n".join(line for line in lines if line.split("==")[0] in PINNED) + "\n", encoding="utf-8")
    missing: dict[str, str] = {}
    wanted = [line for line in oracles() if line not in apart()]
    remote = [line for line in wanted if " @ " in line]
    if _install(pins, OWN + [line for line in wanted if line not in remote]):
        failed = _install(pins, OWN)
        if failed:
            raise SystemExit(f"what the companion itself needs does not install:\n{failed}")
        remote = wanted
    failures = {line: _install(pins, [line]) for line in remote}
    for line in apart():
        python = python_of(_name(line))
        subprocess.run([sys.executable, "-m", "venv", str(python.parents[1])], check=True)
        failures[line] = _install(None, [line], python)
    for line, failed in failures.items():
        if failed:
            missing[line] = failed
            print(f"NOT INSTALLED: {line}: {failed}", flush=True)
    stamp.write_text(json.dumps({"mark": mark, "missing": missing}), encoding="utf-8")
    return missing


def _name(line: str) -> str:
    return re.split(r"[ <>=@!]", line)[0]


def _install(pins: Path | None, requirements: list[str], python: Path = PYTHON) -> str:
    """Install; return the last line of what went wrong, or nothing."""
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += (["-c", str(pins)] if pins else []) + shlex.split(os.environ.get("PIP_ARGS", ""))
    done = subprocess.run([*command, *requirements], capture_output=True, text=True, check=False)
    lines = [line.strip() for line in done.stderr.splitlines()]
    errors = [line for line in lines if line.lower().startswith(("fatal", "error"))]
    return (
        ""
        if done.returncode == 0
        else (sorted(errors, key=lambda line: "fatal" not in line) or ["pip failed"])[0][:200]
    )


def machine() -> dict[str, str | int]:
    """Describe the machine."""
    import torch

    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(encoding="utf-8"), flags=re.M)
        name = found[1].strip() if found else name
    return {
        "processor": name,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "card": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """Return the versions of the companion, of what it stands on and of the peers that are installed."""
    from companion._version import __version__

    found = {"feature-geometry": __version__}
    for line in ["torch", "numpy", "scipy", "scikit-learn", "torchmetrics", *oracles()]:
        name = _name(line)
        if line in apart():
            found[name] = version_of(name)
            continue
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    return found


def declare_missing_operators() -> None:
    """Let torchvision be imported when it was built for another torch than the one here.

    Half of the peers import it. Its compiled operators do not load then; nothing measured here needs them.
    """
    import torch

    declared = []
    while True:
        try:
            importlib.import_module("torchvision")
            break
        except ImportError:
            return
        except RuntimeError as error:
            operator = re.search(r"operator (torchvision::\w+) does not exist", str(error))
            if not operator or operator[1] in declared:
                return
            declared.append(operator[1])
            torch.library.define(operator[1], "(Tensor a, Tensor b, float c) -> Tensor")
            for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
                del sys.modules[name]
    if declared:
        print(
            "torchvision: its compiled operators do not load with this torch; measured is what needs none", flush=True
        )


def measure(quick: bool, only: list[str], out: Path, missing: dict[str, str]) -> int:
    """Measure everything in this process and write the record; return the exit status."""
    import torch
    from side_by_side import attempt, compare, grow, on_card, rate_of_card

    warnings.simplefilter("ignore")  # those of the peers; the companion's own tests turn its warnings into errors
    logging.disable(logging.WARNING)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    declare_missing_operators()
    cuda = torch.cuda.is_available()
    record: dict = {"date": date.today().isoformat(), "machine": machine(), "missing": missing, "absent": {}}
    record |= {"comparisons": [], "growth": [], "on_card": []}
    seconds, rounds, repeats = (0.0, 2, 1) if quick else (6.0, 9, 3)
    themes = [importlib.import_module(name) for name in THEMES]

    def wanted(makers):
        return [make for make in makers if not only or any(word in make.__name__ for word in only)]

    for theme in themes:
        for name, case, why in attempt(wanted(theme.COMPARISONS), quick):
            if case is None:
                record["absent"][name] = why
                print(f"\nleft out: {name}: {why}", flush=True)
                continue
            record["comparisons"].append(compare(case, seconds, rounds) | {"theme": theme.__name__[6:]})
        for name, curve, why in attempt(wanted(theme.GROWTH), quick):
            if curve is None:
                record["absent"][name] = why
                continue
            record["growth"].append(grow(curve, repeats))
        for make in wanted(theme.ON_CARD):
            case = make()
            if cuda:
                record["card"] = record.get("card") or rate_of_card()
                record["on_card"].append(on_card(case, record["card"]))
            else:
                record["on_card"].append({"name": case.name, "why": "not measured: no GPU"})
    record["versions"] = versions()
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for line, why in missing.items():
        print(f"not installed: {line}: {why}")
    failed = {row["name"]: row["failed"] for row in record["comparisons"] if row["failed"]}
    for name, peers in failed.items():
        print(f"DISAGREES: {name}: {', '.join(peers)}", file=sys.stderr)
    return 1 if failed else 0


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, two rounds: does everything run?")
    parser.add_argument("--only", nargs="+", default=[], help="parts of names of functions in bench_*.py")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="all cores by default")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.out:
        missing = json.loads(sys.stdin.read())
        return measure(given.quick, given.only, given.out, missing)
    missing = environment()
    threads = {name: str(given.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    settings = {**os.environ, **threads, "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1", "MPLBACKEND": "agg"}
    start, written = time.perf_counter(), VENV / "record.json"
    command = [str(PYTHON), str(HERE / "run.py"), "--out", str(written)]
    command += ["--quick"] * given.quick + (["--only", *given.only] if given.only else [])
    done = subprocess.run(command, input=json.dumps(missing), env=settings, text=True, check=False)
    print(f"\n{time.perf_counter() - start:.0f} s")
    if done.returncode == 0 and not given.quick and not given.only:
        record = json.loads(written.read_text(encoding="utf-8"))
        name = "cuda" if record["machine"]["card"] else "cpu"
        (HERE / "results").mkdir(exist_ok=True)
        (HERE / "results" / f"{name}.json").write_text(written.read_text(encoding="utf-8"), encoding="utf-8")
        print(f"wrote benchmarks/results/{name}.json; `make book` draws the page")
    return done.returncode


if __name__ == "__main__":
    raise SystemExit(main())
