"""Execute the chapters whose outputs are stale, in parallel, and write their notebooks.

    python tools/execute.py [chapters] [--jobs N] [--all]

A chapter is stale when its code cells or its own module changed since its outputs were made.
"""

import argparse
import multiprocessing
import os
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

sys.path.insert(0, str(Path(__file__).resolve().parent))
import pairs

TIMEOUT = 600  # seconds a cell
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
NOISE = re.compile(r"^.*(running over TCP|ipykernel|Debugger warning|frozen modules|PYDEVD).*\n?", flags=re.M)


@dataclass
class Result:
    """What came of executing one chapter."""

    text: str
    seconds: float
    kilobytes: float = 0.0
    error: str = ""


def run(text: Path) -> Result:
    """Execute one chapter and write its notebook; on an error nothing is written."""
    start = time.perf_counter()
    notebook = pairs.paired(text)
    mark = pairs.fingerprint(notebook, text)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT,
        kernel_name="python3",
        record_timing=False,
        extra_arguments=["--log-level=ERROR"],  # a warning about TCP on each start otherwise
        resources={"metadata": {"path": str(text.parent)}},
    )
    try:
        client.execute()
    except CellExecutionError as error:
        return Result(str(text), time.perf_counter() - start, error=_where(notebook, ANSI.sub("", str(error))))
    except (CellTimeoutError, DeadKernelError) as error:
        return Result(
            str(text), time.perf_counter() - start, error=_where(notebook, f"{type(error).__name__}: {error}")
        )
    seconds = time.perf_counter() - start
    clean(notebook)
    if pairs.fingerprint(pairs.paired(text), text) != mark:
        return Result(str(text), seconds, error="the text or the module changed while the chapter ran: run it again")
    notebook.metadata["companion"] = {"sha256": mark}
    content = pairs.written(notebook)
    text.with_suffix(".ipynb").write_text(content, encoding="utf-8")
    return Result(str(text), seconds, len(content.encode()) / 1000)


def clean(notebook: nbformat.NotebookNode) -> None:
    """Make two runs of a notebook alike: no times, merged streams, no noise of the kernel on stderr."""
    notebook.metadata.pop("language_info", None)
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        cell.metadata.pop("execution", None)
        outputs: list[nbformat.NotebookNode] = []
        for output in cell.outputs:
            if output.output_type == "stream":
                if output.name == "stderr":
                    output.text = NOISE.sub("", output.text)
                if not output.text:
                    continue
                same = [o for o in outputs if o.output_type == "stream" and o.name == output.name]
                if same:
                    same[0].text += output.text
                    continue
            outputs.append(output)
        cell.outputs = outputs


def budget(text: Path) -> float:
    """Return the seconds a chapter may take: 15 and 8 per paper, at most 90."""
    from companion import papers

    count = len(papers.papers(chapter=text.stem)) if text.stem in papers.chapters() else 0
    return min(90.0, 15.0 + 8.0 * count)


def _where(notebook: nbformat.NotebookNode, message: str) -> str:
    ran = [i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code" and cell.get("execution_count")]
    return f"in cell {ran[-1] if ran else 0}:\n{message.strip()}"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status: 1 when a chapter failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", help="texts or notebooks of chapters; all stale ones when none is named")
    parser.add_argument("--jobs", type=int, default=1, help="how many chapters at a time")
    parser.add_argument("--all", action="store_true", help="fresh chapters too")
    given = parser.parse_args(arguments)
    if given.jobs < 1:
        parser.error(f"expected at least one job, got {given.jobs}")
    if os.environ.get("COMPANION_SEED", "0").strip() != "0":
        parser.error("outputs are committed for base seed 0: unset COMPANION_SEED (make notebooks-test honours it)")
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # one thread a kernel: more make each other slower

    texts = pairs.named(given.paths)
    todo = [text for text in texts if given.all or given.paths or pairs.stale(text)]
    for text in texts:
        if text not in todo and pairs.sync(text):
            print(f"wrote {pairs.shown(text.with_suffix('.ipynb'))} (text only)")
    print(f"{len(texts)} chapter(s), {len(todo)} to execute")
    failed = over = 0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=min(given.jobs, max(1, len(todo))), mp_context=context) as pool:
        futures = [pool.submit(run, text) for text in todo]
        for done, future in enumerate(as_completed(futures), start=1):
            result = future.result()
            name = pairs.shown(Path(result.text))
            if result.error:
                failed += 1
                print(f"[{done}/{len(todo)}] {name} FAILED after {result.seconds:.0f} s {result.error}", flush=True)
                continue
            allowed = budget(Path(result.text))
            late, fat = result.seconds > allowed, result.kilobytes * 1000 > pairs.MAX_BYTES
            over += late or fat
            note = f" OVER BUDGET ({allowed:.0f} s, {pairs.MAX_BYTES / 1000:.0f} kB)" if late or fat else ""
            print(f"[{done}/{len(todo)}] {name} {result.seconds:.0f} s, {result.kilobytes:.0f} kB{note}", flush=True)
    if over:
        print(f"{over} chapter(s) over budget")
    if failed:
        print(f"{failed} chapter(s) failed; their notebooks are as they were", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
