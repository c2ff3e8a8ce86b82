"""The command line: what is refused, how the program ends, and what it leaves as it was."""

import dataclasses
import itertools
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import (
    ROOT,
    RUN_FILES,
    SMALL,
    THREE_STEPS,
    assert_same_run,
    contents,
    ctrl_c,
    finished,
    raising,
    saved,
)

import dcgan_mnist
from dcgan_mnist import Failure, Settings, setting

SCRIPT = (sys.executable, ROOT / "dcgan_mnist.py")


# ------------------------------------------- wrong input ------------------------------------------
RANGES = {
    "epochs": ("1", "100000"),
    "batch-size": ("1", "60000"),
    "lr": ("1e-08", "1.0"),
    "beta1": ("0.0", "0.9999"),
    "beta2": ("0.0", "0.999999"),
    "generator-steps": ("1", "10"),
    "ema": ("0.0", "0.5"),
    "width": ("1", "1024"),
    "latent-dim": ("2", "10000"),
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


POSITIVE = ["epochs", "batch-size", "lr", "width", "latent-dim", "log-every", "generate"]


@pytest.mark.parametrize("name", POSITIVE)
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
        (["--width", "1025"], ["--width", "1024"]),
        (["--latent-dim", "10001"], ["--latent-dim", "10000"]),
        (["--ema", "0.99"], ["--ema", "0.5"]),
        (["--epochs", "1.5"], ["--epochs", "whole number", "1.5"]),
        (["--split", "both"], ["--split", "both", "train"]),
        (["--device", "abacus"], ["--device", "abacus", "cpu"]),
        (["--precision", "fp8"], ["--precision", "fp8", "bf16"]),
        (["--graph", "on"], ["--graph", "on", "off"]),
        (["--recipe", "secret"], ["--recipe", "secret", "tuned"]),
        (["--batch-size", "61"], ["--batch-size", "60"]),
        (["--epoch", "3"], ["--epoch"]),
        (["--epochs"], ["--epochs"]),
        (["--best"], ["--best", "--generate", "--interpolate", "--evaluate"]),
        (["--best", "--evaluate", "digits.npy"], ["--best", "--evaluate without a file"]),
        (["--generate", "3", "--lr", "0.1"], ["--lr", "--generate"]),
        (["--interpolate", "--recipe", "tuned"], ["--recipe", "--interpolate"]),
        (["--generate", "3", "--width", "4"], ["--width", "--generate"]),
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


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "file", "file/below"])
@pytest.mark.parametrize("command", [["--resume"], ["--generate", 3], ["--interpolate"]])
def test_a_name_that_no_folder_can_have_is_refused_by_every_command(run, command: list, name: str):
    Path("file").write_text("mine")
    assert run(*command, "--output-dir", name).is_one_line(2, "error: argument --output-dir: ")
    assert contents(".") == {"file": b"mine"}


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


def let_devices_compute(monkeypatch: pytest.MonkeyPatch, fault: Exception | None = None) -> None:
    """Stand in for the small sum by which a device shows that it can compute, or that it cannot."""
    original = torch.ones

    def ones(*size: int, device: torch.device | None = None, **options: object) -> torch.Tensor:
        if fault and device is not None and torch.device(device).type == "cuda":
            raise fault
        return original(*size, **options)

    monkeypatch.setattr(torch, "ones", ones)


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_auto_takes_the_fastest_device(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, expected: str
):
    let_devices_compute(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(cuda))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert dcgan_mnist.pick_device("auto").type == expected


def torchrun(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    """Let the environment be what torchrun gives to one of two processes on this machine."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a run")
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "29500")


def test_processes_on_a_mac_compute_on_its_cpu_because_mps_cannot_share_gradients(
    monkeypatch: pytest.MonkeyPatch,
):
    let_devices_compute(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    torchrun(monkeypatch, rank=1)
    assert dcgan_mnist.pick_device("auto") == torch.device("cpu")
    with pytest.raises(dcgan_mnist.WrongInput, match="no mps"):
        dcgan_mnist.pick_device("mps")


@pytest.mark.parametrize(
    "fault",
    [
        torch.AcceleratorError("CUDA error: no kernel image is available\nCompile with ..."),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB"),
        torch.cuda.DeferredCudaCallError("CUDA call failed lazily at initialization"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_gpu_that_cannot_compute_is_told_of_before_training(
    run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fault: Exception
):
    let_devices_compute(monkeypatch, fault)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    outcome = run("--device", "cuda")
    reason = " ".join(str(fault).split())
    told = f"error: argument --device: cannot compute on cuda:0 ({reason})"
    assert outcome.is_one_line(2, told, "pytorch.org", "cpu")
    assert contents(".") == {}
    assert dcgan_mnist.pick_device("auto") == torch.device("cpu")
    warning = capsys.readouterr().out
    assert warning.startswith("warning: ")
    assert reason in warning
    assert warning.endswith("computing on cpu instead\n")


def test_every_process_of_a_machine_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch):
    let_devices_compute(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for rank in (0, 1):
        torchrun(monkeypatch, rank)
        assert dcgan_mnist.pick_device("cuda") == torch.device("cuda", rank)
    torchrun(monkeypatch, rank=2)
    with pytest.raises(OSError, match="GPU"):
        dcgan_mnist.pick_device("cuda")


def test_what_an_earlier_job_left_in_the_environment_changes_nothing(
    run, monkeypatch: pytest.MonkeyPatch
):
    connecting = AssertionError("it waits for processes that nobody has started")
    monkeypatch.setattr(torch.distributed, "init_process_group", raising(connecting))
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert run(*THREE_STEPS, "--epochs", 1, "--output-dir", "clean").code == 0
    torchrun(monkeypatch, rank=1)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    outcome = run(*THREE_STEPS, "--epochs", 1, "--output-dir", "left")
    assert (outcome.code, outcome.err) == (0, "")
    assert "saved to left" in outcome.out
    assert_same_run("clean", "left")
    let_devices_compute(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert dcgan_mnist.pick_device("auto") == torch.device("cuda", 0)


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


@pytest.mark.parametrize(
    ("flags", "graph"), [([], True), (["--graph", "auto"], True), (["--graph", "off"], False)]
)
def test_graph_off_trains_without_a_cuda_graph_and_only_then(
    run, monkeypatch: pytest.MonkeyPatch, flags: list[str], graph: bool
):
    original = dcgan_mnist.fastest_step
    asked = []

    def step(gan: dcgan_mnist.DCGAN, graph: bool = True) -> dcgan_mnist.Step:
        asked.append(graph)
        return original(gan, graph)

    monkeypatch.setattr(dcgan_mnist, "fastest_step", step)
    assert run(*THREE_STEPS, "--epochs", 1, *flags).code == 0
    assert asked == [graph]


@pytest.mark.parametrize(("before", "after"), [("auto", "off"), ("off", "auto")])
def test_a_run_goes_on_with_and_without_a_cuda_graph(run, before: str, after: str):
    assert run(*THREE_STEPS, "--epochs", 1, "--graph", before).code == 0
    outcome = run("--resume", "--epochs", 2, "--graph", after)
    assert (outcome.code, outcome.err) == (0, "")
    assert saved()["epoch"] == 2


# -------------------------------------- the help and the flags ------------------------------------
@dataclasses.dataclass(frozen=True)
class NewSettings(Settings):
    """The settings and one more of every kind."""

    dropout: float = setting(0.25, "share of the features to leave out", low=0.0, high=0.9)
    layers: int = setting(4, "layers of a network", low=2, high=6)
    loss: str = setting("cross-entropy", "what to minimise", choices=("cross-entropy", "hinge"))
    labels: bool = setting(True, "tell the networks what digit it is")
    note: str = setting("none", "what the run is for")


def new_default(name: str, default: object) -> object:
    """Return the field of a setting with another default."""
    (field,) = (field for field in dataclasses.fields(Settings) if field.name == name)
    return dataclasses.field(default=default, metadata=field.metadata)


@dataclasses.dataclass(frozen=True)
class OtherSettings(NewSettings):
    """The same settings with other defaults."""

    recipe: str = new_default("recipe", "tuned")
    batch_size: int = new_default("batch_size", 7)
    lr: float = new_default("lr", 0.125)
    beta1: float = new_default("beta1", 0.25)
    beta2: float = new_default("beta2", 0.75)
    generator_steps: int = new_default("generator_steps", 3)
    ema: float = new_default("ema", 0.125)
    width: int = new_default("width", 5)
    latent_dim: int = new_default("latent_dim", 9)
    seed: int = new_default("seed", 12)
    split: str = new_default("split", "train")


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


def test_a_line_in_settings_is_a_flag_that_a_run_keeps(run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dcgan_mnist, "Settings", NewSettings)
    flags = ["--dropout", 0.5, "--layers", 3, "--loss", "hinge", "--no-labels", "--note", "a try"]
    new = {"dropout": 0.5, "layers": 3, "loss": "hinge", "labels": False, "note": "a try"}
    outcome = run(*THREE_STEPS, "--epochs", 1, *flags)
    assert (outcome.code, outcome.err) == (0, "")
    assert new.items() <= saved()["settings"].items()
    assert run("--resume", "--epochs", 2, *flags).code == 0
    assert run("--resume", "--epochs", 3).code == 0
    assert new.items() <= saved()["settings"].items()


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--dropout", "1"], ["--dropout", "a number from 0.0 to 0.9"]),
        (["--layers", "2.5"], ["--layers", "a whole number from 2 to 6"]),
        (["--loss", "luck"], ["--loss", "luck", "hinge"]),
        (["--labels", "yes"], ["yes"]),
        (["--resume", "--dropout", "0.5"], ["--dropout", "0.5", "0.25"]),
        (["--resume", "--no-labels"], ["--labels", "False", "True"]),
        (["--generate", "3", "--note", "x"], ["--note is a training flag", "--generate"]),
    ],
)
def test_what_is_wrong_with_a_new_setting_ends_with_one_line(
    run, monkeypatch: pytest.MonkeyPatch, argv: list[str], words: list[str]
):
    monkeypatch.setattr(dcgan_mnist, "Settings", NewSettings)
    assert run(*THREE_STEPS, "--epochs", 1).code == 0
    before = contents(".")
    assert run(*argv).is_one_line(2, "error: ", *words)
    assert contents(".") == before


def test_a_run_from_before_a_setting_was_added_goes_on_with_its_default(
    run, monkeypatch: pytest.MonkeyPatch
):
    assert run(*THREE_STEPS, "--epochs", 1).code == 0
    monkeypatch.setattr(dcgan_mnist, "Settings", NewSettings)
    outcome = run("--resume", "--epochs", 2)
    assert (outcome.code, outcome.err) == (0, "")
    assert saved()["settings"]["dropout"] == 0.25


# ------------------------------------------ how it ends -------------------------------------------
@pytest.mark.parametrize(
    ("place", "hint"),
    [
        ("pick_device", "to try again, run the same command"),
        ("load_pictures", "to try again, run the same command"),
        ("fastest_step", "to try again, run the same command"),
        ("training_step", "to try again, run the same command"),
        ("draw", "to try again, run the same command"),
        ("grid", "epoch 1 is saved; to continue, run the same command with --resume"),
        ("animation", "epoch 1 is saved; to continue, run the same command with --resume"),
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


@pytest.mark.parametrize("optimised", [[], pytest.param(["-OO"], marks=pytest.mark.slow)])
def test_the_command_itself_returns_the_exit_code(tmp_path: Path, optimised: list[str]):
    python, program = SCRIPT
    outcome = finished([python, *optimised, program, "--epochs", "none"], tmp_path)
    assert outcome.is_one_line(2, "error: argument --epochs")
    assert outcome.out == ""


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
        "TF32": (
            torch.backends.cudnn.conv.fp32_precision,
            torch.backends.cuda.matmul.fp32_precision,
        ),
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
        (ctrl_c, 130),
    ],
    ids=["done", "diverged", "failed", "full", "memory", "Ctrl-C", "SIGINT"],
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
    ("argv", "code"),
    [(["--epochs", "0"], 2), (["--generate", "3", "--output-dir", "none"], 1)],
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
    torchrun(monkeypatch, rank=1)
    before = unusual_surroundings()
    outcome = run("--epochs", 0)
    assert (outcome.code, outcome.out, outcome.err) == (2, "", "")
    assert surroundings() == before


# ----------------------------------- what the console cannot show ---------------------------------
FOLDER = "résultat 数字"
SHOWN = {
    "ascii": r"r\xe9sultat \u6570\u5b57",
    "cp932": r"r\xe9sultat 数字",  # Japanese has no accents
}


@pytest.mark.slow
@pytest.mark.parametrize("encoding", SHOWN)
def test_a_console_that_lacks_characters_shows_escapes_instead(
    tmp_path: Path, data_dir: Path, encoding: str
):
    options = ["--data-dir", data_dir, "--device", "cpu", "--output-dir", FOLDER]
    options += [*SMALL, *THREE_STEPS, "--epochs", 1]
    outcome = finished([*SCRIPT, *options], tmp_path, PYTHONIOENCODING=encoding)
    assert (outcome.code, outcome.err) == (0, "")
    assert f"saved to {SHOWN[encoding]} after" in outcome.out
    assert saved(tmp_path / FOLDER)["epoch"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("encoding", SHOWN)
def test_a_failure_too_is_said_on_a_console_that_lacks_characters(tmp_path: Path, encoding: str):
    options = ["--generate", 3, "--output-dir", FOLDER]
    outcome = finished([*SCRIPT, *options], tmp_path, PYTHONIOENCODING=encoding)
    assert outcome.is_one_line(1, f"error: there is no {SHOWN[encoding]}")
    assert outcome.out == ""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows may not allow paths so long")
def test_long_folders_whose_names_are_not_ascii_serve_for_digits_and_output(run, data_dir: Path):
    digits = Path(*["数字" * 20] * 5)
    shutil.copytree(data_dir, digits)
    output = Path(*["résultat" * 10] * 5)
    assert min(len(str(digits.absolute())), len(str(output))) > 260
    begin = (*THREE_STEPS, "--epochs", 1, "--data-dir", digits)
    for command in (begin, ("--resume", "--epochs", 2, "--data-dir", digits), ("--generate", 3)):
        outcome = run(*command, "--output-dir", output)
        assert (outcome.code, outcome.err) == (0, "")
    assert set(contents(output)) == RUN_FILES | {"generated.npy", "generated.png"}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_folder_whose_name_is_no_text_can_be_written_to(tmp_path: Path, data_dir: Path):
    folder = os.fsdecode(b"\xff")
    options = ["--data-dir", data_dir, "--device", "cpu", "--output-dir", folder]
    outcome = finished([*SCRIPT, *SMALL, *THREE_STEPS, "--epochs", 1, *options], tmp_path)
    assert (outcome.code, outcome.err) == (0, "")
    assert saved(tmp_path / folder)["epoch"] == 1
