"""Runs a script in two processes that meet over gloo, to hold streamed metrics to the answer of one process."""

import subprocess
import sys
from pathlib import Path

HEAD = """
import sys, torch, torch.distributed as dist
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
"""
TAIL = """
torch.save(out, f"{folder}/out{rank}.pt")
dist.barrier()
dist.destroy_process_group()
"""


def run_two(script: str, folder: Path) -> list[Path]:
    """Run `script` as `rank` 0 and as `rank` 1, with `folder` known; return the files with what it leaves in `out`."""
    (folder / "worker.py").write_text(HEAD + script + TAIL)
    root = str(Path(__file__).resolve().parents[1])
    commands = [[sys.executable, "-W", "ignore", str(folder / "worker.py"), str(r), str(folder)] for r in (0, 1)]
    workers = [subprocess.Popen(c, cwd=root, stderr=subprocess.PIPE, text=True) for c in commands]
    for worker in workers:
        _, said = worker.communicate(timeout=120)
        assert worker.returncode == 0, said
    return [folder / "out0.pt", folder / "out1.pt"]
