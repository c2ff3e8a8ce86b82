import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, contents
from PIL import Image
from test_pictures import digits_in

import dcgan_mnist


@pytest.mark.parametrize("name", ["epochs", "batch-size", "lr", "seed", "log-every", "generate"])
@pytest.mark.parametrize("value", ["-1", "9" * 30, "9" * 5000, "ten", "", "nan", "inf", "1e999"])
def test_numbers_that_make_no_sense_end_with_one_line(run, name: str, value: str):
    outcome = run(f"--{name}={value}")
    assert outcome.is_one_line(2, f"error: argument --{name}: ")
    assert not any(Path().iterdir())


@pytest.mark.parametrize("name", ["epochs", "batch-size", "lr", "log-every", "generate"])
def test_zero_is_refused(run, name: str):
    assert run(f"--{name}=0").is_one_line(2, f"error: argument --{name}: ")
    assert not any(Path().iterdir())


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--beta1", "1"], ["--beta1", "0.9999"]),
        (["--epochs", "1.5"], ["--epochs", "1.5"]),
        (["--split", "both"], ["--split", "both", "train"]),
        (["--device", "abacus"], ["--device", "abacus", "cpu"]),
        (["--batch-size", "61"], ["--batch-size", "60"]),
        (["--epoch", "3"], ["--epoch"]),
        (["--generate", "3", "--dry-run"], ["--generate", "--dry-run"]),
        (["--interpolate", "--dry-run"], ["--interpolate", "--dry-run"]),
        (["--interpolate", "--generate", "3"], ["--interpolate", "--generate"]),
        (["--evaluate", "--resume"], ["--evaluate", "--resume"]),
        (["--recipe", "secret"], ["--recipe", "secret", "tuned"]),
        (["--ema", "1"], ["--ema", "0.9999"]),
        (["--epochs"], ["--epochs"]),
        (["line\nbreak"], ["line break"]),
    ],
)
def test_wrong_input_ends_with_one_line_and_leaves_nothing(run, argv, words):
    if "--device" in argv:
        assert dcgan_mnist.main(argv) == 2
        return
    assert run(*argv).is_one_line(2, "error: ", *words)
    assert not any(Path().iterdir())


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there_ends_with_one_line(capsys, tmp_path, monkeypatch, device: str):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert dcgan_mnist.main(["--device", device]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"dcgan_mnist.py: error: argument --device: this machine has no {device}")
    assert err.count("\n") == 1
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_auto_takes_the_fastest_device(monkeypatch, cuda: bool, mps: bool, expected: str):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    options = dcgan_mnist.parse_options(["--precision", "fp32"])
    assert dcgan_mnist.pick_hardware(options).type == expected


@pytest.mark.parametrize("target", ["file", "file/below", "/proc/nowhere"])
def test_an_output_folder_that_cannot_be_is_refused(run, target: str):
    Path("file").write_text("mine")
    assert run("--output-dir", target).is_one_line(2, "--output-dir", target)
    assert contents(Path()) == {"file": b"mine"}


def test_an_output_folder_that_cannot_be_written_to_is_refused(run, monkeypatch):
    Path("closed").mkdir()
    monkeypatch.setattr(dcgan_mnist.os, "access", lambda *_: False)
    assert run("--output-dir", "closed").is_one_line(2, "--output-dir", "closed")


def test_help_gives_every_default(capsys):
    with pytest.raises(SystemExit) as ended:
        dcgan_mnist.main(["--help"])
    assert ended.value.code == 0
    printed = " ".join(capsys.readouterr().out.split()).replace("- ", "-")
    for name, (default, _, text) in dcgan_mnist.FLAGS.items():
        assert f"--{name.replace('_', '-')}" in printed
        assert f"(default: {default})" in printed
        assert text in printed


def test_dry_run_takes_three_steps_in_each_of_two_epochs(run):
    out = run("--dry-run", "--epochs", 9, "--batch-size", 10, "--log-every", 1).out
    assert [line for line in out.splitlines() if line.startswith("Epoch")] == [
        "Epoch 1/2",
        "Epoch 2/2",
    ]
    assert out.count("/3) ds_loss") == 6


def test_generate_draws_digits_without_training(run):
    run("--epochs", 1, "--batch-size", 20)
    before = contents(Path())
    outcome = run("--generate", 123)
    assert (outcome.code, outcome.err) == (0, "")
    after = contents(Path())
    assert set(after) - set(before) == {"result/generated.npy", "result/generated.png"}
    assert all(after[name] == before[name] for name in before)
    digits = np.load("result/generated.npy")
    assert (digits.shape, digits.dtype) == ((123, 28, 28), np.uint8)
    with Image.open("result/generated.png") as picture:
        assert picture.size == (604, 604)


def test_generate_one_gives_a_picture_of_one_digit(run):
    run("--epochs", 1, "--batch-size", 20)
    run("--generate", 1)
    assert np.load("result/generated.npy").shape == (1, 28, 28)
    with Image.open("result/generated.png") as picture:
        assert picture.size == (56, 56)


def test_generate_follows_the_seed(run):
    run("--epochs", 3, "--batch-size", 10, "--lr", 0.02)
    drawn = []
    for seed in (0, 0, 1):
        run("--generate", 5, "--seed", seed)
        drawn.append(np.load("result/generated.npy"))
    assert (drawn[0] == drawn[1]).all()
    assert (drawn[0] != drawn[2]).any()


def test_generate_needs_a_checkpoint(run):
    assert run("--generate", 5).is_one_line(1, "error: ", "result/checkpoint.pt", "train first")
    assert not any(Path().iterdir())


def test_interpolate_draws_ten_walks_without_training(run):
    run("--epochs", 2, "--batch-size", 10, "--lr", 0.02)
    before = contents(Path())
    outcome = run("--interpolate")
    assert (outcome.code, outcome.err) == (0, "")
    after = contents(Path())
    assert set(after) - set(before) == {"result/interpolation.png"}
    assert all(after[name] == before[name] for name in before)
    rows = digits_in(Path("result/interpolation.png"), rows=10).view(10, 10, 28, 28)
    run("--generate", 20)
    ends = torch.from_numpy(np.load("result/generated.npy")).int()
    assert (rows[:, 0] - ends[:10]).abs().max() <= 1
    assert (rows[:, -1] - ends[10:]).abs().max() <= 1
    run("--interpolate", "--seed", 1)
    assert contents(Path())["result/interpolation.png"] != after["result/interpolation.png"]


def test_interpolate_needs_a_checkpoint(run):
    assert run("--interpolate").is_one_line(1, "error: ", "result/checkpoint.pt", "train first")


def test_walks_go_along_the_sphere_in_equal_steps():
    stream = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 5, 100, 1, 1, generator=stream)
    steps = dcgan_mnist.walk(a, b).view(5, 10, 100)
    torch.testing.assert_close(steps[:, 0], a.flatten(1))
    torch.testing.assert_close(steps[:, -1], b.flatten(1))
    a, b = torch.eye(100)[:2].view(2, 1, 100, 1, 1)
    steps = dcgan_mnist.walk(3 * a, 3 * b).view(10, 100)
    torch.testing.assert_close(steps.norm(dim=1), torch.full((10,), 3.0))
    angles = torch.atan2(steps[:, 1], steps[:, 0])
    torch.testing.assert_close(angles, torch.linspace(0, torch.pi / 2, 10))


def test_generating_many_digits_takes_bounded_memory(run, monkeypatch):
    run("--epochs", 1, "--batch-size", 20)
    sizes = []
    original = dcgan_mnist.Generator.forward

    def spy(self: dcgan_mnist.Generator, z: torch.Tensor) -> torch.Tensor:
        sizes.append(len(z))
        return original(self, z)

    monkeypatch.setattr(dcgan_mnist.Generator, "forward", spy)
    assert run("--generate", 10_000).code == 0
    assert max(sizes) <= 500
    assert np.load("result/generated.npy").shape == (10_000, 28, 28)


def test_a_second_run_replaces_the_first_but_keeps_its_networks(run):
    assert "Replacing" not in run("--epochs", 3, "--batch-size", 20, "--seed", 1).out
    first = contents(Path("result"))
    mine = {"notes.txt": b"a", "generated_epoch_1.png": b"b", "example/timeline.png": b"c"}
    for name, content in mine.items():
        (Path("result") / name).parent.mkdir(exist_ok=True)
        (Path("result") / name).write_bytes(content)
    outcome = run("--epochs", 2, "--batch-size", 20, "--seed", 2)
    assert [line for line in outcome.out.splitlines() if "Replacing" in line] == [
        "Replacing the earlier run in result; checkpoint.previous.pt keeps its networks"
    ]
    second = contents(Path("result"))
    assert "generated_epoch_003.png" not in second
    assert second["checkpoint.previous.pt"] == first["checkpoint.pt"]
    assert second["checkpoint.pt"] != first["checkpoint.pt"]
    assert {name: second[name] for name in mine} == mine


def test_wrong_input_does_not_touch_an_earlier_run(run):
    run("--epochs", 1, "--batch-size", 20)
    before = contents(Path())
    assert run("--batch-size", 61).code == 2
    assert run("--epochs", 0).code == 2
    assert contents(Path()) == before


def test_the_command_itself_returns_the_exit_code(tmp_path: Path):
    command = [sys.executable, str(ROOT / "dcgan_mnist.py"), "--epochs", "none"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("dcgan_mnist.py: error: argument --epochs")
    assert done.stderr.count("\n") == 1
