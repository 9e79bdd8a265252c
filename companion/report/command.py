"""The check-up on the command line: `python -m companion checkup features.npy --labels labels.npy ...`.

Public: `main`. Exit status 0: done; 1: a condition of `--fail-if` holds; 2: bad input, with one line that says what.
"""

import argparse
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["main"]

EXAMPLES = """examples:
  python -m companion checkup features.npy
  python -m companion checkup features.npz --labels labels.npy --logits logits.npy -o report.html --json report.json
  python -m companion checkup run.npz:features --labels run.npz:labels --logits run.npz:logits --groups people.csv
  python -m companion checkup shards/ --labels labels.npy --weight head.npz:weight --bias head.npz:bias --ood other.npy
  python -m companion checkup features.npy --labels labels.npy --probs probs.npy --fail-if "ece>0.05" --fail-if alarm
  torchrun --nproc-per-node 2 -m companion checkup shards/ --labels labels.npy --logits logits/ --json report.json

files are .npy, .npz, .safetensors or a folder of them (one long matrix, read piece by piece); FILE:NAME picks an
array. Nothing is unpickled. Exit status: 0 done, 1 a condition of --fail-if holds, 2 bad input."""

CONDITION = re.compile(r"\s*([\w/.\- ]+?)\s*(>=|<=|>|<)\s*(\S+)\s*")
COMPARE = {
    ">": lambda a, b: a > b,
    "<": lambda a, b: a < b,
    ">=": lambda a, b: a >= b,
    "<=": lambda a, b: a <= b,
}


class _Refused(Exception):
    """Bad input, in one line."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _Refused(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m companion", description="The companion of the Feature Geometry book.")
    commands = parser.add_subparsers(dest="command", metavar="checkup", required=True)
    one = commands.add_parser(
        "checkup",
        help="ask the book's questions of your own model",
        description="Ask the book's questions of your own model: whatever the files at hand allow.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    one.add_argument("features", help="(n, d): what the last layer reads")
    one.add_argument("--labels", metavar="FILE", help="(n,) true classes, whole numbers")
    one.add_argument("--logits", metavar="FILE", help="(n, C), before the softmax")
    one.add_argument("--probs", metavar="FILE", help="(n, C), instead of logits")
    one.add_argument("--weight", metavar="FILE", help="(C, d) of the last layer")
    one.add_argument("--bias", metavar="FILE", help="(C,) of the last layer")
    one.add_argument("--groups", metavar="FILE", help="columns that should not matter: .csv with names, or .npy")
    one.add_argument("--ood", metavar="FILE", help="(m, d): features of what the model was not made for")
    one.add_argument("--key", metavar="NAME", help="which array of files that hold several")
    one.add_argument("-o", "--output", metavar="FILE", help="write one self-contained page")
    one.add_argument("--json", metavar="FILE", help="write everything as JSON")
    one.add_argument(
        "--fail-if", metavar="RULE", action="append", default=[], help='"ece>0.05" or "alarm"; may be repeated'
    )
    one.add_argument("--sample", metavar="N", type=int, default=5000, help="rows for what is quadratic (5000)")
    one.add_argument("--seed", metavar="N", type=int, default=0, help="of the sample and of resampling (0)")
    one.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (auto)")
    one.add_argument("--quiet", action="store_true", help="no bars and no table")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status.

    Args:
        arguments: without the program's name; None takes those of the process.

    >>> main(["checkup", "no such file.npy"])
    2
    """
    try:
        return _run(_parser().parse_args(arguments))
    except (_Refused, ValueError, TypeError, OSError, MemoryError, RuntimeError) as error:
        line = " ".join(str(error).split()) or type(error).__name__
        print(f"companion: error: {line}", file=sys.stderr)
        return 2
    except Exception as error:  # a gate must never see a traceback; what it was is said all the same
        line = " ".join(str(error).split())
        print(f"companion: error: {type(error).__name__}: {line}: please report this", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("companion: stopped", file=sys.stderr)
        return 130


def _run(given: argparse.Namespace) -> int:
    rules = [_rule(text) for text in given.fail_if]
    for path in (given.output, given.json):
        if path is not None and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
            raise _Refused(f"{path} cannot be written: its folder does not exist, or it is a folder")
    import torch.distributed as dist

    from companion.report.examination import checkup

    several = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    device = given.device
    if several:
        dist.init_process_group("gloo")  # only small sums travel, on the cpu
        device = _own_device(device)
    try:
        found = checkup(
            given.features,
            given.labels,
            logits=given.logits,
            probs=given.probs,
            weight=given.weight,
            bias=given.bias,
            groups=given.groups,
            outliers=given.ood,
            key=given.key,
            sample=given.sample,
            seed=given.seed,
            device=device,
            progress=False if given.quiet else None,
        )
        first = not dist.is_initialized() or dist.get_rank() == 0
        if first:
            _write(found, given)
        failed = [text for text, rule in zip(given.fail_if, rules) if _holds(found, *rule)]
        if first:
            for text in failed:
                print(f"companion: failed: {text}", file=sys.stderr)
        return 1 if failed else 0
    finally:
        if several:
            dist.destroy_process_group()


def _own_device(device: str) -> str:
    import torch

    from companion import runtime

    chosen = runtime.device(device)
    if chosen.type == "cuda" and chosen.index is None:
        return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    return str(chosen)


def _write(found: Any, given: argparse.Namespace) -> None:
    if given.output:
        found.to_html(given.output)
    if given.json:
        found.to_json(given.json)
    if not given.quiet:
        print(found)


def _rule(text: str) -> tuple[str, str, float]:
    if text.strip() in ("alarm", "watch"):
        return text.strip(), "", 0.0
    match = CONDITION.fullmatch(text)
    try:
        bound = float(match[3]) if match else math.nan
    except ValueError:
        bound = math.nan
    if match is None or math.isnan(bound):
        raise _Refused(f'expected --fail-if like "ece>0.05" or "alarm", got {text!r}')
    return match[1], match[2], bound


def _holds(found: Any, key: str, sign: str, bound: float) -> bool:
    if not sign:
        states = ("alarm",) if key == "alarm" else ("alarm", "watch")
        return any(f.verdict in states for f in found.findings)
    rows = [f for f in found.findings if f.key == key or f.key.split("/")[0] == key]
    if not rows:
        why = found.why_not(key)
        known = ", ".join(f.key for f in found.findings)
        raise _Refused(f"--fail-if asks for {key}, which was not computed: {why or f'there are {known}'}")
    return any(COMPARE[sign](f.value, bound) for f in rows)
