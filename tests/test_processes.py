"""Several processes started by torchrun, and this process in the place of one of them."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, contents, new_gan, write_split
from test_pictures import FILES
from test_training import batch

import dcgan_mnist

OPTIONS = ("--batch-size", 20, "--device", "cpu", "--no-score")


def torchrun(folder: Path, *options: object) -> subprocess.Popen:
    """Start the small program in two processes on the digits of the data_dir fixture."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [ROOT / "tests" / "shared_program.py", *OPTIONS, *options]
    command += ["--data-dir", folder.parent / "data"]
    return subprocess.Popen(
        list(map(str, command)),
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_go_on_with_the_run_of_one_share_every_batch_and_stay_the_same(run, monkeypatch):
    run(*OPTIONS, "--epochs", 1)
    shutil.copytree("result", "alone")
    process = torchrun(Path.cwd(), "--epochs", 3, "--resume")
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert re.findall(r"^Epoch .*", out, re.MULTILINE) == ["Epoch 2/3", "Epoch 3/3"]
    assert out.count("saved to result") == 2
    assert set(contents(Path("result"))) == FILES | {"generated_epoch_003.png"}

    kept = [torch.load(f"kept_{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert all(map(torch.equal, kept[0]["weights"], kept[1]["weights"]))

    alone = []
    original = dcgan_mnist.training_step
    monkeypatch.setattr(
        dcgan_mnist,
        "training_step",
        lambda gan, real, z: (alone.append((real, z)), original(gan, real, z))[1],
    )
    run("--resume", "--epochs", 3, "--output-dir", "alone")
    for i, (real, z) in enumerate(alone):
        assert torch.equal(torch.cat([share["real"][i] for share in kept]), real)
        assert torch.equal(torch.cat([share["z"][i] for share in kept]), z)
        assert len(kept[0]["z"][i]) == len(kept[1]["z"][i]) == 10

    outcome = run("--resume", "--epochs", 4)
    assert (outcome.code, outcome.err) == (0, "")
    assert torch.load("result/checkpoint.pt", weights_only=True)["epoch"] == 4


def test_a_killed_process_ends_the_job_and_resume_goes_on(run):
    with torchrun(Path.cwd(), "--epochs", 100_000) as process:
        for line in process.stdout:
            if "Epoch 3/" in line:
                break
        process.send_signal(signal.SIGSTOP)  # or torchrun may stop the other one before it notices
        os.kill(int(Path("pid_1").read_text()), signal.SIGKILL)
        seen = ""
        while "dcgan_mnist.py: " not in seen:
            seen += process.stderr.readline()
        process.send_signal(signal.SIGCONT)
        _, err = process.communicate(timeout=30)
    err = seen + err
    assert process.returncode != 0
    assert err.count("dcgan_mnist.py: ") == 1
    assert "dcgan_mnist.py: error: a process of this run has ended; --resume goes on" in err
    saved = torch.load("result/checkpoint.pt", weights_only=True)["epoch"]
    assert saved >= 2
    assert not list(Path("result").glob(".*"))
    outcome = run("--resume", "--epochs", saved + 1)
    assert (outcome.code, outcome.err) == (0, "")
    assert torch.load("result/checkpoint.pt", weights_only=True)["epoch"] == saved + 1


@pytest.fixture
def second_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process take itself for the second of two; the first one is not there."""
    monkeypatch.setattr(dcgan_mnist, "RANK", 1)
    monkeypatch.setattr(dcgan_mnist, "PROCESSES", 2)
    for name in ("init_process_group", "destroy_process_group", "all_reduce"):
        monkeypatch.setattr(dcgan_mnist.dist, name, lambda *_: None)
    digits = torch.zeros(60, 28, 28, dtype=torch.uint8)
    monkeypatch.setattr(dcgan_mnist.dist, "broadcast_object_list", lambda data: data.__setitem__(0, digits))


@pytest.mark.usefixtures("second_of_two")
def test_only_the_first_process_prints_and_writes(run):
    Path("result").mkdir()
    Path("result/timeline.png").write_bytes(b"of the first process")
    for argv, code in ((["--dry-run", *OPTIONS], 0), (["--epochs", "none"], 2)):
        outcome = run(*argv)
        assert (outcome.code, outcome.out, outcome.err) == (code, "", "")
    assert contents(Path()) == {"result/timeline.png": b"of the first process"}


@pytest.mark.usefixtures("second_of_two")
@pytest.mark.parametrize(("digits", "size"), [(60, 15), (61, 20)])
def test_a_batch_that_cannot_be_shared_is_refused(run, tmp_path, monkeypatch, digits: int, size: int):
    write_split(tmp_path / "data", digits)
    monkeypatch.setattr(dcgan_mnist, "RANK", 0)
    monkeypatch.setattr(dcgan_mnist.dist, "broadcast_object_list", lambda _: None)
    outcome = run("--batch-size", size, "--epochs", 1)
    assert outcome.is_one_line(2, "--batch-size", "2 processes")
    assert not Path("result").exists()


def test_gradients_and_figures_are_means_over_the_processes(small_networks, monkeypatch):
    monkeypatch.setattr(dcgan_mnist, "PROCESSES", 2)
    monkeypatch.setattr(dcgan_mnist.dist, "all_reduce", lambda tensor: tensor.add_(3))
    gan = new_gan()
    step = dcgan_mnist.SharedStep(gan)
    seen = []
    gan.optimizer_d.register_step_pre_hook(
        lambda *_: seen.extend(p.grad.clone() for p in gan.discriminator.parameters())
    )
    real, z = batch(6)
    stats = step(real, z)

    twin = new_gan()
    own = []
    twin.optimizer_d.register_step_pre_hook(
        lambda *_: own.extend(p.grad.clone() for p in twin.discriminator.parameters())
    )
    figures = dcgan_mnist.training_step(twin, real[:3], z[:3])
    for shared, single in zip(seen, own, strict=True):
        torch.testing.assert_close(shared, (single + 3) / 2)
    torch.testing.assert_close(stats[0], (figures[0] + 3) / 2)
