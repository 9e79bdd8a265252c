"""How an operation of the companion is held against the libraries people would otherwise pick.

Public: `Comparison`, `compare`, `Growth`, `grow`, `OnCard`, `on_card`, `rate_of_card`.

Results are compared before any time is taken. Runs are interleaved, so that a busy machine slows all of them alike, and
a ratio is the median over rounds of the ratio within a round.
"""

import ctypes
import gc
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

SLOW = 2.5  # seconds from which a peer takes part in two rounds only
LEAST = 5  # rounds, whatever they take


@dataclass
class Comparison:
    """One operation: ours, what others offer, and what it means that results agree.

    Args:
        name: what is computed, and on how much.
        ours: runs the companion.
        peers: name of a library -> runs it. A missing library is an ImportError on the first call.
        agrees: takes our result and a peer's.
        wanted: times the fastest peer's speed that we want to reach, from the design.
        limit: what keeps us below that, where something does.
        differs: peers whose result is known to be another one, and why; they are timed all the same.
    """

    name: str
    ours: Callable[[], Any]
    peers: dict[str, Callable[[], Any]]
    agrees: Callable[[Any, Any], bool]
    wanted: float | None = None
    differs: dict[str, str] = field(default_factory=dict)
    limit: str = ""


def close(relative: float = 1e-3, absolute: float = 1e-6) -> Callable[[Any, Any], bool]:
    """Return a comparison of two numbers, or of two arrays of numbers."""

    def agrees(ours: Any, theirs: Any) -> bool:
        ours, theirs = (torch.as_tensor(v, dtype=torch.float64, device="cpu").nan_to_num() for v in (ours, theirs))
        return ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=relative, atol=absolute)

    return agrees


def compare(case: Comparison, seconds: float, rounds: int) -> dict:
    """Run one comparison and return its record; `failed` in it says that results disagree."""
    record: dict[str, Any] = {"name": case.name, "wanted": case.wanted, "limit": case.limit, "peers": {}}
    print(f"\n{case.name}", flush=True)
    runs, slow = {"ours": case.ours}, set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = case.ours()
        for name, run in case.peers.items():
            entry = record["peers"][name] = _first(case, name, run, ours)
            if "why" not in entry:
                runs[name] = run
                if entry.pop("first") > SLOW:
                    slow.add(name)
        times = _interleaved(runs, slow, seconds, rounds)
    record["ms"], record["rounds"] = _ms(times["ours"]), len(times["ours"])
    for name in runs:
        if name != "ours":
            ratios = [theirs / mine for mine, theirs in zip(times["ours"], times[name])]
            record["peers"][name] |= {"ms": _ms(times[name]), "ratio": round(statistics.median(ratios), 3)}
    timed = {name: entry for name, entry in record["peers"].items() if "ratio" in entry}
    record["fastest"] = min(timed, key=lambda name: timed[name]["ratio"], default=None)
    record["factor"] = timed[record["fastest"]]["ratio"] if timed else None
    record["failed"] = [name for name, entry in record["peers"].items() if entry.get("disagrees")]
    _tell(record)
    return record


def _first(case: Comparison, name: str, run: Callable, ours: Any) -> dict:
    """Run a peer once: is it there, and does it say the same?"""
    start = time.perf_counter()
    try:
        theirs = run()
    except ImportError as error:
        return {"why": f"not installed ({error})"}
    except Exception as error:  # whatever a library does wrong is its result
        return {"why": f"failed: {type(error).__name__}: {error}"[:200]}
    entry: dict[str, Any] = {"first": time.perf_counter() - start}
    if name in case.differs:
        entry["note"] = case.differs[name]
    elif not case.agrees(ours, theirs):
        return {"why": f"disagrees: ours {_short(ours)}, theirs {_short(theirs)}", "disagrees": True}
    return entry


def _interleaved(runs: dict, slow: set, seconds: float, rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    for i in range(rounds):
        for name, run in runs.items():
            if name in slow and i >= 2:
                continue
            gc.collect()
            times[name].append(_seconds(run))
        if i + 1 >= LEAST and time.perf_counter() - start > seconds:
            break
    return times


def _seconds(run: Callable) -> float:
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def _ms(times: list[float]) -> float:
    return round(1e3 * statistics.median(times), 3)


def _short(value: Any) -> str:
    value = torch.as_tensor(value).flatten()
    return f"{value[0]:.6g}" if len(value) == 1 else f"{len(value)} numbers, the first {value[0]:.6g}"


def _tell(record: dict) -> None:
    print(f"  {'companion':28s} {record['ms']:10.1f} ms   median of {record['rounds']}")
    for name, entry in record["peers"].items():
        line = entry.get("why") or f"{entry['ms']:10.1f} ms   x {entry['ratio']:.2f}"
        print(f"  {name:28s} {line}" + (f"   ({entry['note']})" if "note" in entry else ""))
    if record["factor"]:
        wanted = f", wanted {record['wanted']}" if record["wanted"] else ""
        print(f"  factor {record['factor']:.2f}{wanted}", flush=True)


@dataclass
class Growth:
    """How time and memory of an operation grow along one axis.

    Args:
        name: of the operation.
        axis: what grows, as the axis of a plot says it.
        sizes: along the axis.
        prepare: from a size to what runs.
    """

    name: str
    axis: str
    sizes: list[int]
    prepare: Callable[[int], Callable[[], Any]]


def grow(curve: Growth, repeats: int) -> dict:
    """Return the record of a curve: milliseconds and peak memory beyond the input at each size."""
    record: dict[str, Any] = {"name": curve.name, "axis": curve.axis, "points": []}
    print(f"\n{curve.name}: {curve.axis}", flush=True)
    for size in curve.sizes:
        run = curve.prepare(size)
        run()
        with peak_memory() as peak:
            run()
        times = [_seconds(run) for _ in range(repeats)]
        record["points"].append({"size": size, "ms": _ms(times), "mb": peak()})
        mb = f"{peak():10.1f} MB" if peak() is not None else "memory not measured here"
        print(f"  {size:10d} {_ms(times):10.1f} ms {mb}", flush=True)
    return record


class peak_memory:
    """Measures by how much memory rises inside the block; None where the system does not say."""

    def __enter__(self) -> Callable[[], float | None]:
        self.result: float | None = None
        self.cuda = torch.cuda.is_available()
        gc.collect()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before: float | None = torch.cuda.memory_allocated() / 1e6
        else:
            self.before = None
            try:
                ctypes.CDLL("libc.so.6").malloc_trim(0)  # what earlier runs left counts as used otherwise
                Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak so far becomes what is in use
                self.before = _status("VmRSS")
            except OSError:
                pass
        return lambda: self.result

    def __exit__(self, *error: Any) -> None:
        if self.before is not None:
            peak = torch.cuda.max_memory_allocated() / 1e6 if self.cuda else _status("VmHWM")
            self.result = round(max(0.0, peak - self.before), 1)


def _status(name: str) -> float:
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(name))
    return int(line.split()[1]) * 1024 / 1e6


@dataclass
class OnCard:
    """Something too large for a processor, and what it moves and computes.

    Args:
        name: what is computed, and on how much.
        prepare: returns what runs; called on a machine with a cuda device only.
        flops: floating-point operations of a run, 0 when memory is the limit.
        bytes: that have to be read at least, 0 when arithmetic is the limit.
    """

    name: str
    prepare: Callable[[], Callable[[], Any]]
    flops: float = 0.0
    bytes: float = 0.0


def on_card(case: OnCard, card: dict, repeats: int = 3) -> dict:
    """Run on the graphics card; the record holds the share of what the card was seen to do."""
    run = case.prepare()
    run()
    with peak_memory() as peak:
        seconds = _seconds(run)
    seconds = statistics.median([seconds, *(_seconds(run) for _ in range(repeats - 1))])
    record: dict[str, Any] = {"name": case.name, "ms": round(1e3 * seconds, 2), "mb": peak()}
    if case.flops:
        record |= {"tflops": case.flops / seconds / 1e12, "share": case.flops / seconds / card["flops"]}
    if case.bytes:
        record |= {"gb_per_s": case.bytes / seconds / 1e9, "share": case.bytes / seconds / card["bytes"]}
    print(f"{case.name}: {record}", flush=True)
    del run
    torch.cuda.empty_cache()
    return record


def rate_of_card() -> dict:
    """Return what this card does at its best: float32 operations and bytes per second, measured."""
    a = torch.randn(8192, 8192, device="cuda")
    out = torch.empty_like(a)
    data = torch.zeros(2**28, device="cuda")  # 1 GiB
    for _ in range(2):
        torch.mm(a, a, out=out)
        data.sum()
    product = min(_seconds(lambda: torch.mm(a, a, out=out)) for _ in range(5))
    read = min(_seconds(data.sum) for _ in range(5))
    return {"flops": 2 * 8192**3 / product, "bytes": data.numel() * 4 / read}


def attempt(makers: list[Callable[[bool], Any]], quick: bool) -> Iterator[tuple[str, Any, str]]:
    """Yield name, case and reason for each maker: no case where the companion has no such function yet."""
    for make in makers:
        try:
            yield make.__name__, make(quick), ""
        except ImportError as error:
            yield make.__name__, None, str(error)
