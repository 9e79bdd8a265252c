"""Tests of `python -m companion checkup`: what it writes, its exit status, two processes, forty kinds of damage."""

import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from companion.report.command import main

ROOT = Path(__file__).parents[1]
N, D, C = 240, 6, 3


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with everything a check-up takes, entered."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, C, N)
    means = rng.normal(size=(C, D))
    x = (means[y] + rng.normal(size=(N, D))).astype("float32")
    z = (x @ means.T - (means**2).sum(1) / 2).astype("float32")
    p = np.exp(z - z.max(1, keepdims=True))
    p = (p / p.sum(1, keepdims=True)).astype("float32")
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", y)
    np.save(tmp_path / "z.npy", z)
    np.save(tmp_path / "p.npy", p)
    np.save(tmp_path / "o.npy", rng.normal(size=(90, D)).astype("float32") * 6)
    np.savez(tmp_path / "all.npz", x=x, y=y, z=z, w=means.astype("float32"), b=-(means**2).sum(1) / 2)
    np.savez(tmp_path / "one.npz", x=x)
    (tmp_path / "g.csv").write_text("site,sex\n" + "\n".join(f"{'AB'[i % 2]},{'fm'[i % 3 == 0]}" for i in range(N)))
    for name, array in (("xs", x), ("zs", z)):
        (tmp_path / name).mkdir()
        for i, part in enumerate(np.array_split(array, 3)):
            np.save(tmp_path / name / f"part{i}.npy", part)
    monkeypatch.chdir(tmp_path)
    return tmp_path


FULL = "x.npy --labels y.npy --logits z.npy --weight all.npz:w --bias all.npz:b --groups g.csv --ood o.npy"


def run(line, capsys):
    """Run a command line; return its status, what it printed, and its errors."""
    status = main(["checkup", *line.split()])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_everything_at_once(folder, capsys):
    status, out, err = run(f"{FULL} -o report.html --json report.json", capsys)
    assert status == 0
    assert err == ""
    record = json.loads((folder / "report.json").read_text())
    assert {"nc4", "temperature", "group_gap/site", "follows_group/sex", "ood_auroc"} <= set(record["verdicts"])
    assert (folder / "report.html").read_text().startswith("<!DOCTYPE html>")
    for finding in record["findings"]:
        assert finding["key"] in out


@pytest.mark.parametrize(
    "line",
    [
        "one.npz",
        "all.npz --key x",
        "all.npz:x --labels all.npz:y",
        "xs --labels y.npy --logits zs",
        "x.npy --probs p.npy",
    ],
)
def test_forms_of_input(folder, capsys, line):
    status, out, err = run(line, capsys)
    assert (status, err) == (0, "")
    assert "participation_ratio" in out


def test_quiet_prints_nothing(folder, capsys):
    assert run("x.npy --quiet --json r.json", capsys) == (0, "", "")
    assert (folder / "r.json").exists()


@pytest.mark.parametrize(
    ("rules", "status"),
    [
        (["ece>0.9"], 0),
        (["ece<0.9"], 1),
        (["ece > 0.9", "accuracy>=0.1"], 1),
        (["group_gap<=2"], 1),
        (["group_gap/site>2"], 0),
        (["overconfidence<-0.9"], 0),
        (["nc1>1e3"], 0),
        (["ece"], 2),
        (["ece>abc"], 2),
        (["ece>nan"], 2),
        (["nothing>1"], 2),
        ([">1"], 2),
    ],
)
def test_fail_if(folder, capsys, rules, status):
    arguments = [part for rule in rules for part in ("--fail-if", rule)]
    assert main(["checkup", *FULL.split(), "--quiet", *arguments]) == status
    said = capsys.readouterr()
    assert len(said.err.strip().splitlines()) == (status > 0)
    assert "Traceback" not in said.err


def test_a_gate_on_something_that_could_not_be_computed_does_not_pass(folder, capsys):
    status, _, err = run("x.npy --labels y.npy --quiet --fail-if ece>0.05", capsys)
    assert status == 2
    assert "needs labels, and logits" in err


def test_alarms_can_fail_too(folder, capsys):
    y = np.load("y.npy")
    np.save("wrong.npy", np.roll(y, 1))
    assert run("x.npy --labels wrong.npy --logits z.npy --quiet --fail-if alarm", capsys)[0] == 1
    assert run("x.npy --quiet --fail-if alarm", capsys)[0] == 0


def test_help_has_examples_and_the_program_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "companion", "checkup", "--help"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert "examples:" in done.stdout
    assert "--fail-if" in done.stdout
    assert "torchrun" in done.stdout
    bad = subprocess.run([sys.executable, "-m", "companion"], capture_output=True, text=True, check=False, cwd=ROOT)
    assert bad.returncode == 2
    assert len(bad.stderr.strip().splitlines()) == 1


def test_two_processes_give_the_answer_of_one(folder, capsys):
    inputs = "xs --labels y.npy --logits zs --weight all.npz:w --bias all.npz:b --groups g.csv --ood o.npy --sample 100"
    assert run(f"{inputs} --json one.json --device cpu", capsys)[0] == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "companion", "checkup", *inputs.split(), "--json", "two.json", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("rows, 6 columns") == 1, "each process printed"
    one, two = (json.loads((folder / f"{name}.json").read_text()) for name in ("one", "two"))
    assert two["about"]["processes"] == 2
    assert one["verdicts"] == two["verdicts"]
    assert one["skipped"] == two["skipped"]
    for a, b in zip(one["findings"], two["findings"]):
        for name in ("value", "low", "high", "normal_low", "normal_high", "rows"):
            same = b[name] == a[name] or b[name] == pytest.approx(a[name], rel=1e-5, abs=1e-7)
            assert same, (a["key"], name, a[name], b[name])


# --- damage -----------------------------------------------------------------------------------------------------------


class Evil:
    """Writes a file when it is unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path("unpickled"),))


def truncate(name, keep):
    data = Path(name).read_bytes()
    Path(name).write_bytes(data[: int(len(data) * keep)])


def patch(name, change):
    array = np.load(name)
    array = change(array)
    np.save(name, array)


def at(value):
    def change(array):
        array[17, 2] = value
        return array

    return change


def pickled_npy():
    np.save("x.npy", np.array([Evil()], dtype=object), allow_pickle=True)


def pickled_npz():
    np.savez("one.npz", x=np.array([[Evil()]], dtype=object))


def raw_pickle():
    Path("x.npy").write_bytes(pickle.dumps(Evil()))


def bad_zip():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x.npy", b"not an array")
    Path("one.npz").write_bytes(buffer.getvalue())


def header_lies():
    data = Path("x.npy").read_bytes()
    Path("x.npy").write_bytes(data.replace(b"(240, 6)", b"(940, 6)"))


def huge_header():
    data = Path("x.npy").read_bytes()
    Path("x.npy").write_bytes(data.replace(b"(240, 6), }    ", b"(999999999, 6), }", 1)[: len(data)])


def shard_of_other_width():
    np.save("xs/part9.npy", np.zeros((4, D + 1), "float32"))


def write(name, data):
    Path(name).write_bytes(data)


X, XY, XYZ = "x.npy", "x.npy --labels y.npy", "x.npy --labels y.npy --logits z.npy"
DAMAGE = {
    "missing features": (lambda: os.remove("x.npy"), X),
    "missing labels": (lambda: os.remove("y.npy"), XY),
    "missing logits": (lambda: os.remove("z.npy"), XYZ),
    "missing outliers": (lambda: None, f"{X} --ood nowhere.npy"),
    "missing groups": (lambda: None, f"{XYZ} --groups nowhere.csv"),
    "missing weight": (lambda: None, f"{XYZ} --weight nowhere.npy"),
    "missing bias": (lambda: None, f"{XYZ} --weight all.npz:w --bias nowhere.npy"),
    "empty file": (lambda: write("x.npy", b""), X),
    "text": (lambda: write("x.npy", b"1,2,3\n4,5,6\n"), X),
    "cut off npy": (lambda: truncate("x.npy", 0.6), X),
    "cut off header": (lambda: write("x.npy", Path("x.npy").read_bytes()[:20]), X),
    "header that promises more": (header_lies, X),
    "header that promises far too much": (huge_header, X),
    "cut off npz": (lambda: truncate("one.npz", 0.5), "one.npz"),
    "npz with rubbish inside": (bad_zip, "one.npz"),
    "several arrays, no name": (lambda: None, "all.npz"),
    "no such array": (lambda: None, "all.npz:features"),
    "safetensors rubbish": (lambda: write("x.safetensors", b"\xff" * 300), "x.safetensors"),
    "another suffix": (lambda: write("x.pt", pickle.dumps(Evil())), "x.pt"),
    "pickled npy": (pickled_npy, X),
    "pickled npz": (pickled_npz, "one.npz"),
    "pickle with another name": (raw_pickle, X),
    "empty folder": (lambda: os.mkdir("nothing"), "nothing"),
    "shards of two widths": (shard_of_other_width, "xs"),
    "shards of two kinds": (lambda: np.savez("xs/more.npz", x=np.zeros((2, D))), "xs"),
    "one dimension": (lambda: patch("x.npy", lambda x: x[:, 0]), X),
    "three dimensions": (lambda: patch("x.npy", lambda x: x[None]), X),
    "no rows": (lambda: patch("x.npy", lambda x: x[:0]), X),
    "no columns": (lambda: patch("x.npy", lambda x: x[:, :0]), X),
    "NaN": (lambda: patch("x.npy", at(np.nan)), X),
    "infinity": (lambda: patch("x.npy", at(np.inf)), X),
    "complex numbers": (lambda: patch("x.npy", lambda x: x + 1j), X),
    "strings": (lambda: patch("x.npy", lambda x: x.astype(str)), X),
    "dates": (lambda: patch("x.npy", lambda x: x.astype("int64").astype("datetime64[s]")), X),
    "too few labels": (lambda: patch("y.npy", lambda y: y[:-1]), XY),
    "labels as floats": (lambda: patch("y.npy", lambda y: y + 0.5), XY),
    "negative labels": (lambda: patch("y.npy", lambda y: y - 1), XY),
    "one-hot labels": (lambda: patch("y.npy", lambda y: np.eye(C, dtype=int)[y]), XY),
    "a label beyond the logits": (lambda: patch("y.npy", lambda y: y + 2), XYZ),
    "logits of other rows": (lambda: patch("z.npy", lambda z: z[:-3]), XYZ),
    "logits of one column": (lambda: patch("z.npy", lambda z: z[:, :1]), XYZ),
    "logits with NaN": (lambda: patch("z.npy", at(np.nan)), XYZ),
    "probabilities called logits": (lambda: None, f"{XY} --logits p.npy"),
    "logits called probabilities": (lambda: None, f"{XY} --probs z.npy"),
    "logits and probabilities": (lambda: None, f"{XYZ} --probs p.npy"),
    "a weight of another width": (lambda: np.save("w.npy", np.ones((C, D + 1))), f"{XYZ} --weight w.npy"),
    "a weight of other classes": (lambda: np.save("w.npy", np.ones((C + 1, D))), f"{XYZ} --weight w.npy"),
    "a bias alone": (lambda: None, f"{XYZ} --bias all.npz:b"),
    "outliers of another width": (lambda: patch("o.npy", lambda o: o[:, 1:]), f"{X} --ood o.npy"),
    "outliers with NaN": (lambda: patch("o.npy", at(np.nan)), f"{X} --ood o.npy"),
    "groups of other rows": (lambda: write("g.csv", b"site\nA\nB\n"), f"{XYZ} --groups g.csv"),
    "ragged groups": (lambda: write("g.csv", b"a,b\n1,2\n3\n"), f"{XYZ} --groups g.csv"),
    "groups that are no text": (lambda: write("g.csv", b"\xff\xfe\x00\x80" * 9), f"{XYZ} --groups g.csv"),
    "no such device": (lambda: None, f"{X} --device toaster"),
    "no such option": (lambda: None, f"{X} --colour"),
    "a sample of nothing": (lambda: None, f"{X} --sample 0"),
    "a sample that is no number": (lambda: None, f"{X} --sample many"),
    "a folder to write to": (lambda: os.mkdir("out"), f"{X} -o out"),
    "nowhere to write to": (lambda: None, f"{X} --json no/such/place.json"),
}


def test_there_are_at_least_forty_kinds_of_damage():
    assert len(DAMAGE) >= 40


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_one_clear_line_and_status_2(folder, capsys, kind):
    damage, line = DAMAGE[kind]
    damage()
    status, out, err = run(f"{line} --quiet" if "--colour" not in line else line, capsys)
    assert status == 2, out
    assert out == ""
    assert len(err.strip().splitlines()) == 1, err
    assert err.startswith("companion: error: ")
    assert "please report" not in err, err
    assert len(err) > 35, "says nothing"
    assert not (folder / "unpickled").exists(), "something was unpickled"


def test_an_error_of_ours_is_one_line_too(folder, capsys, monkeypatch):
    monkeypatch.setattr("companion.report.examination.LENSES", (lambda summary, seed: 1 / 0,))
    status, _, err = run(X, capsys)
    assert status == 2
    assert "ZeroDivisionError" in err
    assert len(err.strip().splitlines()) == 1
