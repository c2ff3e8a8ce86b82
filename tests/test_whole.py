"""The program whole: real networks, real digits, the real scorer, a terminal, another device."""

import os
import re
import struct
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from helpers import ROOT, SMALL, THREE_STEPS, Outcome, change_steps, digits_in, saved, size_of

import dcgan_mnist


def whole(capsys: pytest.CaptureFixture[str], *argv: str) -> Outcome:
    """Run a command line with real networks, digits and scores."""
    code = dcgan_mnist.main(argv)
    out, err = capsys.readouterr()
    return Outcome(code, out, err)


@pytest.mark.slow
def test_the_record_works_at_full_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    folder = Path("result")
    flags = ("--recipe", "quick", "--dry-run", "--output-dir", str(folder))
    outcome = whole(capsys, *flags)
    assert (outcome.code, outcome.err, outcome.warnings()) == (0, "", [])
    assert "Training on 10,000 pictures" in outcome.out
    assert re.findall(r"Total params: ([\d,]+)", outcome.out) == ["2,169,473", "1,713,025"]
    assert len(re.findall(r"^score: FD \d+\.\d \(floor 4\.9\)", outcome.out, re.MULTILINE)) == 2
    assert size_of(folder / "loss_curve.png") == (1000, 1000)
    real = dcgan_mnist.bundled_digits("test").flatten(1)
    for digit in digits_in(folder / "real_samples.png").flatten(1):
        assert (real == digit).all(dim=1).any()


@pytest.mark.slow
def test_the_included_generator_keeps_its_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    outcome = whole(capsys, "--evaluate")
    assert (outcome.code, outcome.err) == (0, "")
    table = dict(re.findall(r"^([a-z]+) +([\d.]+)", outcome.out, re.MULTILINE))
    ranges = {  # around 7.6, 10, 1, 0.91, 0.77, 0.88, 0.52
        "fd": (6, 9),
        "digits": (10, 10),
        "evenness": (0.98, 1),
        "confident": (0.88, 0.96),
        "density": (0.7, 0.85),
        "coverage": (0.84, 0.92),
        "copies": (0.47, 0.55),
    }
    assert table.keys() == ranges.keys()
    for name, (low, high) in ranges.items():
        assert low <= float(table[name]) <= high, name


# ----------------------------------------- another device -----------------------------------------
def test_a_run_of_a_gpu_goes_on_without_one(run, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:  # where a checkpoint says that its tensors lay
        patch.setattr(torch.serialization, "location_tag", lambda _: "cuda:0")
        assert run(*THREE_STEPS, "--epochs", 1).code == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for command in (["--resume", "--epochs", 2], ["--generate", 3]):
        outcome = run(*command)
        assert (outcome.code, outcome.err) == (0, "")
    assert saved()["epoch"] == 2
    assert dcgan_mnist.load_generator("result")(torch.zeros(1, 8, 1, 1)).device.type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("one", "other"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_run_goes_on_on_another_device(run, one: str, other: str):
    assert run(*THREE_STEPS, "--epochs", 1, "--device", one).code == 0
    outcome = run("--resume", "--epochs", 2, "--device", other)
    assert (outcome.code, outcome.err) == (0, "")
    assert saved()["made_with"]["device"] == other


def test_steps_are_computed_the_same_every_time_and_in_full_fp32(
    run, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)  # as a notebook may set it
    found = set()

    def look(_: int, stats: torch.Tensor) -> torch.Tensor:
        backends = torch.backends
        found.add(backends.cudnn.deterministic)
        found.add(not backends.cudnn.benchmark)
        found.add(backends.cudnn.conv.fp32_precision)
        found.add(backends.cuda.matmul.fp32_precision)
        return stats

    change_steps(monkeypatch, look)
    assert run(*THREE_STEPS, "--epochs", 1).code == 0
    assert found == {True, "ieee"}
    assert torch.backends.cudnn.benchmark


# ------------------------------------------- a terminal ------------------------------------------
@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
def test_a_terminal_shows_a_bar_of_the_steps(data_dir: Path, tmp_path: Path):
    import fcntl
    import pty
    import termios

    terminal, program_side = pty.openpty()
    fcntl.ioctl(program_side, termios.TIOCSWINSZ, struct.pack("4H", 25, 100, 0, 0))
    command = [sys.executable, str(ROOT / "dcgan_mnist.py"), *SMALL, "--epochs", "1"]
    command += ["--batch-size", "20", "--device", "cpu", "--data-dir", str(data_dir)]
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), program_side)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, **streams) as process:
        os.close(program_side)
        timer = threading.Timer(120, process.kill)  # a test must not hang
        timer.start()
        shown = b""
        with suppress(OSError), open(terminal, "rb", buffering=0) as output:
            # Linux says by an OSError that the program has closed its side
            while part := output.read(10_000):
                shown += part
        timer.cancel()
    assert process.returncode == 0
    text = shown.decode()
    assert re.search(r"\rEpoch 1/1: +\d+%\|.*\| \d/3 \[.*step.*\]", text)
    assert "(1/3) ds_loss: " in text
