"""The command line: what is refused, how the program ends, and what it leaves as it was."""

import dataclasses
import errno
import io
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from helpers import ROOT, RUN_FILES, THREE_STEPS, contents, saved

import dcgan_mnist
from dcgan_mnist import Failure, Settings


def raising(error: BaseException) -> Callable[..., NoReturn]:
    """Return a function that raises an error, whatever it is called with."""

    def fail(*_: object, **__: object) -> NoReturn:
        raise error

    return fail


# ------------------------------------------- wrong input ------------------------------------------
RANGES = {
    "epochs": ("1", "100000"),
    "batch-size": ("1", "60000"),
    "lr": ("1e-08", "1.0"),
    "beta1": ("0.0", "0.9999"),
    "beta2": ("0.0", "0.999999"),
    "generator-steps": ("1", "10"),
    "ema": ("0.0", "0.5"),
    "seed": ("0", "4294967295"),
    "log-every": ("1", "1000000"),
    "generate": ("1", "100000"),
}
NO_NUMBERS = ["-1", "9" * 30, "9" * 5000, "ten", "", "nan", "inf", "1e999", "1 2"]


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("value", NO_NUMBERS, ids=[value[:30] for value in NO_NUMBERS])
def test_numbers_that_make_no_sense_end_with_one_line_that_says_the_range(
    run, name: str, value: str
):
    low, high = RANGES[name]
    outcome = run(f"--{name}={value}")
    assert outcome.is_one_line(2, f"error: argument --{name}: must be a ", f"from {low} to {high}")
    assert contents(".") == {}


@pytest.mark.parametrize("name", ["epochs", "batch-size", "lr", "log-every", "generate"])
def test_zero_is_refused_where_it_makes_no_sense(run, name: str):
    low, high = RANGES[name]
    assert run(f"--{name}=0").is_one_line(2, f"error: argument --{name}: ", f"from {low} to {high}")
    assert contents(".") == {}


@pytest.mark.parametrize("name", RANGES)
def test_both_ends_of_a_range_are_in_it(name: str):
    for end in RANGES[name]:
        options = dcgan_mnist.parse_options([f"--{name}", end])
        assert str(getattr(options, name.replace("-", "_"))) == end


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--beta1", "1"], ["--beta1", "0.9999"]),
        (["--ema", "0.99"], ["--ema", "0.5"]),
        (["--epochs", "1.5"], ["--epochs", "whole number", "1.5"]),
        (["--split", "both"], ["--split", "both", "train"]),
        (["--device", "abacus"], ["--device", "abacus", "cpu"]),
        (["--precision", "fp8"], ["--precision", "fp8", "bf16"]),
        (["--recipe", "secret"], ["--recipe", "secret", "tuned"]),
        (["--batch-size", "61"], ["--batch-size", "60"]),
        (["--epoch", "3"], ["--epoch"]),
        (["--epochs"], ["--epochs"]),
        (["--best"], ["--best", "--generate", "--interpolate", "--evaluate"]),
        (["--best", "--evaluate", "digits.npy"], ["--best", "--evaluate without a file"]),
        (["--generate", "3", "--lr", "0.1"], ["--lr", "--generate"]),
        (["--interpolate", "--recipe", "tuned"], ["--recipe", "--interpolate"]),
        (["--evaluate", "--split", "train"], ["--split", "--evaluate"]),
        (["--digit", "7"], ["--digit", "--generate N"]),
        (["--evaluate", "--digit", "7"], ["--digit", "--generate N"]),
        (["--generate", "3", "--digit", "10"], ["--digit", "from 0 to 9"]),
        (["line\nbreak"], ["line break"]),
    ],
)
def test_wrong_input_ends_with_one_line_and_leaves_nothing(run, argv: list[str], words: list[str]):
    assert run(*argv).is_one_line(2, "error: ", *words)
    assert contents(".") == {}


MODES = [["--resume"], ["--dry-run"], ["--generate", "3"], ["--interpolate"], ["--evaluate"]]


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(MODES, 2)))
def test_only_one_thing_can_be_asked_for(run, one: list[str], other: list[str]):
    outcome = run(*one, *other)
    assert outcome.is_one_line(2, f"{one[0]} and {other[0]} cannot be combined")
    assert contents(".") == {}


def test_wrong_input_does_not_touch_an_earlier_run(run):
    run(*THREE_STEPS, "--epochs", 1)
    before = contents(".")
    assert run("--batch-size", 61).code == 2
    assert run("--epochs", 0).code == 2
    assert run("--resume", "--lr", 0.1).code == 2
    assert contents(".") == before


@pytest.mark.parametrize("target", ["file", "file/below", "x" * 300, "a\0b"])
def test_an_output_folder_that_cannot_be_is_refused(run, target: str):
    Path("file").write_text("mine")
    assert run("--output-dir", target).is_one_line(2, "--output-dir", str(Path(target)))
    assert contents(".") == {"file": b"mine"}


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "file/below"])
@pytest.mark.parametrize("command", [["--resume"], ["--generate", 3], ["--interpolate"]])
def test_a_name_that_no_folder_can_have_is_refused_by_every_command(run, command: list, name: str):
    Path("file").write_text("mine")
    assert run(*command, "--output-dir", name).is_one_line(2, "error: argument --output-dir: ")
    assert contents(".") == {"file": b"mine"}


def test_an_output_folder_that_cannot_be_written_to_is_refused(
    run, monkeypatch: pytest.MonkeyPatch
):
    Path("closed").mkdir()

    def touch(self: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "touch", touch)
    assert run("--output-dir", "closed").is_one_line(2, "--output-dir", "closed", "Permission")
    assert contents(".") == {}


# ------------------------------------------ the hardware ------------------------------------------
@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there_ends_with_one_line(
    run, monkeypatch: pytest.MonkeyPatch, device: str
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    outcome = run("--device", device)
    assert outcome.is_one_line(2, f"error: argument --device: this machine has no {device}", "cpu")
    assert contents(".") == {}


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_auto_takes_the_fastest_device(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, expected: str
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(cuda))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert dcgan_mnist.pick_device("auto", local_rank=0).type == expected


def test_every_process_of_a_machine_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    devices = [dcgan_mnist.pick_device("cuda", local_rank) for local_rank in (0, 1)]
    assert devices == [torch.device("cuda", 0), torch.device("cuda", 1)]
    with pytest.raises(OSError, match="GPU"):
        dcgan_mnist.pick_device("cuda", local_rank=2)


def test_bf16_where_it_is_slow_costs_one_warning_and_not_the_run(
    run, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    outcome = run(*THREE_STEPS, "--epochs", 2, "--precision", "bf16")
    assert (outcome.code, outcome.err) == (0, "")
    (line,) = outcome.warnings()
    assert "cpu" in line
    assert "bf16" in line
    assert set(contents("result")) == RUN_FILES


# --------------------------------------------- the help -------------------------------------------
@dataclasses.dataclass(frozen=True)
class OtherSettings(Settings):
    """The settings with other defaults."""

    recipe: str = "tuned"
    batch_size: int = 7
    lr: float = 0.125
    beta1: float = 0.25
    beta2: float = 0.75
    generator_steps: int = 3
    ema: float = 0.25
    seed: int = 12
    split: str = "train"


@pytest.mark.parametrize("defaults", [Settings, OtherSettings])
def test_help_gives_the_default_of_every_flag(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, defaults: type[Settings]
):
    monkeypatch.setattr(dcgan_mnist, "Settings", defaults)
    monkeypatch.setenv("COLUMNS", "1000")
    assert dcgan_mnist.main(["--help"]) == 0
    printed = capsys.readouterr().out
    flags = re.findall(r"^  (?:-h, )?(--[a-z0-9-]+)(.*?)(?=^  -|^\S|\Z)", printed, re.M | re.S)
    described = dict(flags)
    assert len(described) == len(flags)
    in_use = vars(defaults()) | vars(dcgan_mnist.parse_options([]))
    in_use["output_dir"] = dcgan_mnist.OUTPUT_DIR
    in_use["epochs"] = 10
    in_use["data_dir"] = "MNIST, beside the program"
    in_use["help"] = "off"
    assert {f"--{name.replace('_', '-')}" for name in in_use} == described.keys()
    for name, default in in_use.items():
        (shown,) = re.findall(r"\(default: (.+)\)$", described[dcgan_mnist.flag(name)], re.M)
        assert default in (None, False) or shown == str(default)


# ------------------------------------------ how it ends -------------------------------------------
@pytest.mark.parametrize(
    ("place", "hint"),
    [
        ("pick_device", "to start over, run the same command"),
        ("load_digits", "to start over, run the same command"),
        ("fastest_step", "to start over, run the same command"),
        ("training_step", "to start over, run the same command"),
        ("draw", "to start over, run the same command"),
        ("grid", "epoch 1 is saved; to continue, run the same command with --resume"),
        ("curves", "epoch 1 is saved; to continue, run the same command with --resume"),
    ],
)
def test_ctrl_c_anywhere_ends_with_one_line_that_says_how_to_go_on(
    run, monkeypatch: pytest.MonkeyPatch, place: str, hint: str
):
    monkeypatch.setattr(dcgan_mnist, place, raising(KeyboardInterrupt()))
    try:
        outcome = run(*THREE_STEPS, "--epochs", 2)
    except KeyboardInterrupt:  # which would end all tests
        pytest.fail("it ended with a traceback")
    assert outcome.is_one_line(130, f"dcgan_mnist.py: stopped: {hint}")


def test_it_trains_in_a_thread_other_than_the_first(run):
    with ThreadPoolExecutor() as pool:
        outcome = pool.submit(run, *THREE_STEPS, "--epochs", 2).result()
    assert (outcome.code, outcome.err) == (0, "")
    assert set(contents("result")) == RUN_FILES


def test_the_command_itself_returns_the_exit_code(tmp_path: Path):
    command = [sys.executable, str(ROOT / "dcgan_mnist.py"), "--epochs", "none"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("dcgan_mnist.py: error: argument --epochs")
    assert done.stderr.count("\n") == 1


# ------------------------------------ what it leaves as it was ------------------------------------
def surroundings() -> dict[str, object]:
    """Return all that a program that calls ``main`` may rely on."""
    return {
        "folder": Path.cwd(),
        "files": contents("."),
        "temporary files": contents(tempfile.gettempdir()),
        "streams": (sys.stdout, sys.stderr),
        "error handlers": (sys.stdout.errors, sys.stderr.errors),
        "signal handlers": (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)),
        "deterministic": torch.backends.cudnn.deterministic,
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "random numbers": torch.get_rng_state().tolist(),
    }


def unusual_surroundings() -> dict[str, object]:
    """Let the streams have error handlers that the program would not set; return all there is."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")
    return surroundings()


@pytest.fixture(params=[False, True])
def deterministic_or_not(
    request: pytest.FixtureRequest,
    run: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Let torch compute the same every time or not, and temporary files be found."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", request.param)


def send(signum: int) -> Callable[..., NoReturn]:
    """Return a function that lets this process get a signal."""

    def send_it(*_: object) -> NoReturn:
        signal.raise_signal(signum)
        raise AssertionError("the signal came to nothing")

    return send_it


@pytest.mark.usefixtures("deterministic_or_not")
@pytest.mark.parametrize(
    ("step", "code"),
    [
        (lambda *_: torch.full((5,), 0.5), 0),
        (lambda *_: torch.full((5,), torch.nan), 1),
        (raising(Failure("the world got in the way")), 1),
        (raising(OSError(28, "No space left on device")), 1),
        (raising(torch.OutOfMemoryError("CUDA out of memory")), 1),
        (raising(KeyboardInterrupt()), 130),
        (send(signal.SIGINT), 130),
        (send(signal.SIGTERM), 143),
    ],
    ids=["done", "diverged", "failed", "full", "memory", "Ctrl-C", "SIGINT", "SIGTERM"],
)
def test_everything_is_as_before_after_a_run_however_it_ends(
    run, monkeypatch: pytest.MonkeyPatch, step: Callable, code: int
):
    monkeypatch.setattr(dcgan_mnist, "training_step", step)
    before = unusual_surroundings()
    outcome = run(*THREE_STEPS, "--dry-run")
    assert surroundings() == before
    assert outcome.code == code
    assert len(outcome.err.splitlines()) == (code != 0)


@pytest.mark.usefixtures("deterministic_or_not")
@pytest.mark.parametrize(
    ("argv", "code"), [(["--epochs", "0"], 2), (["--generate", "3"], 1), (["--resume"], 1)]
)
def test_everything_is_as_before_after_a_command_that_cannot_be(run, argv: list[str], code: int):
    before = unusual_surroundings()
    assert run(*argv).code == code
    assert surroundings() == before


@pytest.mark.usefixtures("deterministic_or_not")
def test_everything_is_as_before_after_a_fault_of_the_program_or_the_help(
    run, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(dcgan_mnist, "training_step", raising(ZeroDivisionError()))
    before = unusual_surroundings()
    with pytest.raises(ZeroDivisionError):
        run(*THREE_STEPS, "--dry-run")
    run("--help")
    assert surroundings() == before


@pytest.mark.usefixtures("deterministic_or_not")
def test_everything_is_as_before_in_a_process_that_prints_nothing(
    run, monkeypatch: pytest.MonkeyPatch
):
    for name, value in torchrun_environment(RANK="1").items():
        monkeypatch.setenv(name, value)
    before = unusual_surroundings()
    outcome = run("--epochs", 0)
    assert (outcome.code, outcome.out, outcome.err) == (2, "", "")
    assert surroundings() == before


# ------------------------------------ the environment of torchrun ---------------------------------
def torchrun_environment(**changes: str | None) -> dict[str, str]:
    """Return what torchrun says to the first of two processes, but for changes; None: nothing."""
    complete = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29500",
    }
    return {name: value for name, value in (complete | changes).items() if value is not None}


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RANK": "1"}, ["WORLD_SIZE", "torchrun"]),
        ({"WORLD_SIZE": "2"}, ["RANK", "torchrun"]),
        (torchrun_environment(WORLD_SIZE=None), ["WORLD_SIZE", "torchrun"]),
        (torchrun_environment(RANK=None), ["RANK", "torchrun"]),
        (torchrun_environment(MASTER_ADDR=None), ["MASTER_ADDR", "torchrun"]),
        (torchrun_environment(MASTER_PORT=None), ["MASTER_PORT", "torchrun"]),
        (torchrun_environment(RANK="one"), ["'one'"]),
        (torchrun_environment(RANK=""), ["''"]),
        (torchrun_environment(RANK="9" * 5000), []),
        (torchrun_environment(WORLD_SIZE="two"), ["'two'"]),
        (torchrun_environment(LOCAL_RANK="zero"), ["'zero'"]),
        (torchrun_environment(RANK="2"), ["RANK=2", "WORLD_SIZE=2", "torchrun"]),
        (torchrun_environment(RANK="-1"), ["RANK=-1", "torchrun"]),
        (torchrun_environment(WORLD_SIZE="0"), ["WORLD_SIZE=0", "torchrun"]),
    ],
)
def test_half_an_environment_of_torchrun_is_refused_with_one_line(
    run, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], words: list[str]
):
    monkeypatch.setattr(torch.distributed, "init_process_group", raising(AssertionError()))
    for name in torchrun_environment():
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert run("--epochs", 1).is_one_line(2, "error: ", *words)
    assert contents(".") == {}


# ----------------------------------- what the console cannot show ---------------------------------
FOLDER = "résultat 数字"
SHOWN = {
    "ascii": r"r\xe9sultat \u6570\u5b57",
    "cp932": r"r\xe9sultat 数字",  # Japanese has no accents
}


@pytest.mark.parametrize("encoding", SHOWN)
def test_a_console_that_lacks_characters_shows_escapes_instead(
    run, monkeypatch: pytest.MonkeyPatch, encoding: str
):
    console = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", console)
    assert run(*THREE_STEPS, "--epochs", 1, "--output-dir", FOLDER).code == 0
    console.flush()
    assert f"saved to {SHOWN[encoding]} after" in console.buffer.getvalue().decode(encoding)
    assert saved(FOLDER)["epoch"] == 1


@pytest.mark.parametrize("encoding", SHOWN)
def test_a_process_whose_console_lacks_characters_ends_well(
    tmp_path: Path, data_dir: Path, encoding: str
):
    command = [sys.executable, ROOT / "tests" / "small_program.py", "--data-dir", data_dir]
    command += ["--epochs", "1", "--device", "cpu", "--output-dir", FOLDER]
    changes = {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | changes, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert f"saved to {SHOWN[encoding]} after" in done.stdout.decode(encoding)


@pytest.mark.parametrize("encoding", SHOWN)
def test_a_failure_too_is_said_on_a_console_that_lacks_characters(
    run, monkeypatch: pytest.MonkeyPatch, encoding: str
):
    console = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stderr", console)
    assert run("--generate", 3, "--output-dir", FOLDER).code == 1
    console.flush()
    line = console.buffer.getvalue().decode(encoding)
    assert line.startswith(f"dcgan_mnist.py: error: there is no {SHOWN[encoding]}")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows may not allow paths so long")
def test_long_folders_whose_names_are_not_ascii_serve_for_digits_and_output(run, data_dir: Path):
    digits = Path(*["数字" * 20] * 5)
    shutil.copytree(data_dir, digits)
    output = Path(*["résultat" * 10] * 5)
    assert min(len(str(digits.absolute())), len(str(output))) > 260
    folders = ("--data-dir", digits, "--output-dir", output)
    for command in ([*THREE_STEPS, "--epochs", 1], ["--resume", "--epochs", 2], ["--generate", 3]):
        outcome = run(*command, *folders)
        assert (outcome.code, outcome.err) == (0, "")
    assert set(contents(output)) == RUN_FILES | {"generated.npy", "generated.png"}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_folder_whose_name_is_no_text_can_be_written_to(run):
    folder = os.fsdecode(b"\xff")
    outcome = run(*THREE_STEPS, "--epochs", 1, "--output-dir", folder)
    assert (outcome.code, outcome.err) == (0, "")
    assert saved(folder)["epoch"] == 1
