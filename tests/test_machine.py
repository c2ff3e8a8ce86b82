"""Whatever machine, whatever job: it starts, says so, and ends with one line."""

import errno
import io
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import pytest
import torch
import torchsummary
from helpers import (
    ROOT,
    SMALL,
    THREE_STEPS,
    Disk,
    Outcome,
    assert_same_run,
    change_steps,
    contents,
    raising,
    saved,
)

import dcgan_mnist

REAL_CURVES = dcgan_mnist.PICTURES["loss_curve.png"]  # which the fixture ``run`` replaces
LIMIT = 120  # seconds for which a process may run
TWO_EPOCHS = (*THREE_STEPS, "--epochs", 2)


# ------------------------------------------- decoration -------------------------------------------
@pytest.mark.few(2)
@pytest.mark.parametrize("picture", ["loss_curve.png", "real_samples.png", "training.gif"])
@pytest.mark.parametrize(
    "error",
    [
        ValueError("'module://matplotlib_inline.backend_inline' is not a valid backend"),
        ImportError("cannot import name 'x' from 'matplotlib'"),
        MemoryError(),
        SystemError("a fault of a library"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_picture_that_its_library_cannot_draw_costs_a_warning(
    run, monkeypatch: pytest.MonkeyPatch, picture: str, error: Exception
):
    monkeypatch.setitem(dcgan_mnist.PICTURES, picture, raising(error))
    outcome = run(*TWO_EPOCHS)
    assert (outcome.code, outcome.err) == (0, "")
    assert saved()["epoch"] == 2
    assert not Path("result", picture).exists()
    assert len(outcome.warnings()) == 2
    for warning in outcome.warnings():
        assert str(Path("result", picture)) in warning
        assert type(error).__name__ in warning
        assert str(error) in warning


def test_the_warning_names_the_line_that_is_broken(
    capsys: pytest.CaptureFixture[str],
):
    source = (ROOT / "dcgan_mnist.py").read_text(encoding="utf-8")
    before = source[: source.index("    cells = digits.new_zeros(")]
    line = before.count("\n") + 1
    with dcgan_mnist.only_warned("cannot draw it"):
        dcgan_mnist.grid([7])  # no tensor
    printed = capsys.readouterr().out
    assert printed.startswith("warning: cannot draw it (AttributeError from line ")
    assert f"line {line} of dcgan_mnist.py: " in printed


def test_a_summary_that_cannot_be_printed_costs_a_warning(run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torchsummary, "summary", raising(KeyError("a layer it does not know")))
    outcome = run(*THREE_STEPS, "--epochs", 1, "--output-dir", "fails")
    assert outcome.code == 0
    (warning,) = outcome.warnings()
    assert "no summary of the networks" in warning
    assert "KeyError" in warning
    monkeypatch.setitem(sys.modules, "torchsummary", None)  # as if it were not installed
    outcome = run(*THREE_STEPS, "--epochs", 1, "--output-dir", "missing")
    assert outcome.code == 0
    assert "torchsummary" in outcome.warnings()[0]
    assert_same_run("fails", "missing")


# --------------------------------------- what the machine lacks -----------------------------------
@pytest.mark.parametrize("version", ["2.3.1+cu121", "1.13.0", "2.10.0"])
def test_a_torch_that_is_too_old_is_named_before_anything_else(
    run, monkeypatch: pytest.MonkeyPatch, version: str
):
    monkeypatch.setattr(torch, "__version__", version)
    outcome = run(*THREE_STEPS)
    assert outcome.is_one_line(1, "error: ", version, "2.11", "pip install -r requirements.txt")
    assert contents(".") == {}


@pytest.mark.parametrize("version", ["2.11.0", "2.14.1+cu128", "2.20.0a0+git1234", "3.0.0"])
def test_later_versions_of_torch_serve(run, monkeypatch: pytest.MonkeyPatch, version: str):
    monkeypatch.setattr(torch, "__version__", version)
    dcgan_mnist.check_torch()


def test_the_oldest_torch_is_that_of_the_requirements():
    requirements = (ROOT / "requirements.txt").read_text()
    oldest = re.search(r"^torch>=(\d+)\.(\d+)", requirements, re.MULTILINE)
    assert tuple(map(int, oldest.groups())) == dcgan_mnist.TORCH


@pytest.mark.parametrize("first", [1, 2])
def test_a_folder_where_no_file_can_be_replaced_is_refused_before_training(
    run, disk: Disk, first: int
):
    disk.fail("replace", errno.EPERM, first=first)  # the second time, a file is there
    outcome = run(*THREE_STEPS)
    assert outcome.is_one_line(2, "error: argument --output-dir: result", "not permitted")
    assert contents(".") == {}


@pytest.mark.few(1)
@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_fsync_costs_one_warning(run, disk: Disk, number: int):
    run(*TWO_EPOCHS, "--output-dir", "whole")
    disk.fail("fsync", number)
    outcome = run(*TWO_EPOCHS)
    assert (outcome.code, outcome.err) == (0, "")
    (warning,) = outcome.warnings()
    assert os.strerror(number) in warning
    assert_same_run("result", "whole")


def test_a_disk_that_fails_to_keep_what_is_written_is_no_matter_of_a_warning(run, disk: Disk):
    disk.fail("fsync", errno.EIO)
    outcome = run(*THREE_STEPS)
    assert outcome.is_one_line(2, "error: argument --output-dir: result", "Input/output error")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_fault_of_the_program_keeps_its_traceback(
    run, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    monkeypatch.setattr(dcgan_mnist, "training_step", raising(error))
    with pytest.raises(type(error), match=str(error)):
        run(*THREE_STEPS)


# -------------------------------------------- long jobs -------------------------------------------
@pytest.fixture
def start(run, data_dir: Path, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Return a function that starts a run without end as a process of its own.

    What it prints goes to the files out and err.
    """
    processes = []
    streams = [(tmp_path / name).open("w") for name in ("out", "err")]

    def start(*argv: object, **options: object) -> subprocess.Popen:
        command = [sys.executable, ROOT / "dcgan_mnist.py", *SMALL, "--epochs", "100000"]
        command += ["--batch-size", "20", "--device", "cpu", "--data-dir", data_dir, *argv]
        given = {"stdout": streams[0], "stderr": streams[1]} | options
        environment = {"OMP_NUM_THREADS": "1"} | given.pop("env", {})
        process = subprocess.Popen(
            [str(word) for word in command], env=os.environ | environment, text=True, **given
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait(LIMIT)
    for stream in streams:
        stream.close()


def wait_for(path: Path, text: str, process: subprocess.Popen) -> None:
    """Wait until a process that still runs has written a text to a file."""
    end = time.monotonic() + LIMIT
    while text not in path.read_text():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGINT", "SIGTERM"])
def test_lines_are_in_the_log_when_they_are_printed_and_signals_end_a_run(
    start, run, tmp_path: Path, name: str
):
    process = start(env={"MPLBACKEND": "module://a_backend_that_is_not_installed"})
    wait_for(tmp_path / "out", "Epoch 3/", process)
    process.send_signal(getattr(signal, name))
    assert process.wait(LIMIT) == 128 + getattr(signal, name)
    epoch = saved()["epoch"]
    said = f"stopped: epoch {epoch} is saved; to continue, run the same command with --resume\n"
    assert (tmp_path / "err").read_text() == f"dcgan_mnist.py: {said}"
    assert "warning" not in (tmp_path / "out").read_text()
    assert Path("result/loss_curve.png").exists()
    assert run("--resume", "--epochs", epoch + 1).code == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
def test_signals_that_were_ignored_at_the_start_stay_ignored(start, tmp_path: Path):
    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    process = start(preexec_fn=ignore)
    wait_for(tmp_path / "out", "Epoch 2/", process)
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGINT)
    epoch = saved()["epoch"]
    wait_for(tmp_path / "out", f"Epoch {epoch + 3}/", process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(LIMIT) == 128 + signal.SIGTERM


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such pipes")
def test_a_reader_that_goes_away_ends_the_program_without_a_word(start, run, tmp_path: Path):
    process = start(stdout=subprocess.PIPE)
    for line in process.stdout:
        if line.startswith("Epoch 2/"):
            break
    process.stdout.close()
    assert process.wait(LIMIT) == 141
    assert (tmp_path / "err").read_text() == ""
    epoch = saved()["epoch"]
    assert epoch >= 1
    assert run("--resume", "--epochs", epoch + 1).code == 0


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["checkpoint.pt", "generator_best.pt"])
def test_a_checkpoint_that_cannot_be_written_for_a_moment_is_tried_again(
    run, fake_scores, monkeypatch: pytest.MonkeyPatch, disk: Disk, name: str
):
    fake_scores([9.0, 8.0] * 2, [10, 10] * 2)
    run(*TWO_EPOCHS, "--output-dir", "whole")
    monkeypatch.setattr(dcgan_mnist, "PATIENCE", 10)
    disk.fail(name, errno.EIO, times=20)
    outcome = run(*TWO_EPOCHS)
    assert (outcome.code, outcome.err) == (0, "")
    assert 0 < sum(disk.waits) < 10
    assert_same_run("result", "whole")


def test_after_ten_seconds_the_last_line_names_what_is_saved_and_how_to_go_on(
    run, monkeypatch: pytest.MonkeyPatch, disk: Disk
):
    run(*THREE_STEPS, "--epochs", 1)
    monkeypatch.setattr(dcgan_mnist, "PATIENCE", 10)
    disk.fail("checkpoint.pt")
    outcome = run("--resume", "--epochs", 3)
    assert outcome.is_one_line(
        1, "error: cannot write", "checkpoint.pt", "epoch 1 is saved", "with --resume"
    )
    assert 10 < sum(disk.waits) < 11
    assert saved()["epoch"] == 1


def test_a_full_disk_is_not_waited_for(run, monkeypatch: pytest.MonkeyPatch, disk: Disk):
    monkeypatch.setattr(dcgan_mnist, "PATIENCE", 10)
    disk.fail("checkpoint.pt", errno.ENOSPC)
    outcome = run(*THREE_STEPS)
    assert outcome.is_one_line(1, "error: cannot write", os.strerror(errno.ENOSPC))
    assert disk.waits == []


@pytest.mark.few(3)
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        torch.AcceleratorError("CUDA error: the launch timed out and was terminated"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9.0 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
        MemoryError(),
        OSError(errno.ENOSPC, "No space left on device"),  # for the log, say
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_the_machine_does_in_a_later_epoch_ends_with_the_way_to_go_on(
    run, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    def fail(step: int, stats: torch.Tensor) -> torch.Tensor:
        if step == 5:
            raise error
        return stats

    with monkeypatch.context() as patch:
        change_steps(patch, fail)
        outcome = run(*TWO_EPOCHS)
    reason = str(error) or "out of memory"
    assert outcome.is_one_line(1, f"error: {reason}; epoch 1 is saved; ", "with --resume")
    assert saved()["epoch"] == 1
    assert run("--resume").code == 0
    assert saved()["epoch"] == 2


# ---------------------------------------- streams that are closed ---------------------------------
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_it_trains_where_a_stream_is_closed(run, monkeypatch: pytest.MonkeyPatch, stream: str):
    monkeypatch.setattr(sys, stream, None)
    assert run(*TWO_EPOCHS).code == 0
    assert saved()["epoch"] == 2


class FullFile(io.StringIO):
    """A stream on a disk that is full."""

    def write(self, _: str) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_the_exit_code_tells_also_where_the_last_line_cannot_be_printed(
    run, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "stderr", FullFile())
    assert run("--nope").code == 2


@pytest.mark.parametrize("code", ["bye", 0, None])
def test_only_the_help_page_is_done_without_training(
    run, monkeypatch: pytest.MonkeyPatch, code: object
):
    monkeypatch.setattr(torchsummary, "summary", raising(SystemExit(code)))
    with pytest.raises(SystemExit) as end:
        run(*TWO_EPOCHS)
    assert end.value.code == code
    assert run("--help").code == 0


def test_what_torchrun_left_in_the_environment_ends_with_one_line(
    run, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.delenv("RANK", raising=False)
    assert run("--help").code == 0
    assert run(*TWO_EPOCHS).is_one_line(1, "error: ", "cannot connect", "RANK")


# ---------------------------------- the same command again and again ------------------------------
def leave_nothing() -> None:
    """Leave no folder at all."""


def leave_half_a_file() -> None:
    """Leave what a run leaves that is killed while it writes its first checkpoint."""
    Path("result").mkdir()
    Path(f"result/.checkpoint.pt.{'0' * 32}.tmp").write_bytes(b"half")
    Path("result/generator_best.pt").write_bytes(b"of the first epoch")


def leave_two_half_runs() -> None:
    """Leave what is left if the second run, too, is killed in its first epoch."""
    leave_half_a_file()
    Path("result/previous_001").mkdir()
    Path("result/previous_001/generator_best.pt").write_bytes(b"of the first run")


def leave_drawings() -> None:
    """Leave what --generate draws, here and where a run moved it."""
    Path("result/previous_001").mkdir(parents=True)
    Path("result/generated.png").write_bytes(b"digits")
    Path("result/previous_001/generated.png").write_bytes(b"earlier digits")


def leave_something_else() -> None:
    """Leave a file of the user."""
    Path("result").mkdir()
    Path("result/job.log").write_text("mine")


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "leave",
    [
        leave_nothing,
        leave_half_a_file,
        leave_two_half_runs,
        leave_drawings,
        leave_something_else,
    ],
)
def test_resume_begins_a_run_where_there_is_none_yet_and_says_so(run, leave: Callable[[], None]):
    assert run(*TWO_EPOCHS, "--output-dir", "whole").code == 0
    leave()
    mine = contents("result") if Path("result").exists() else {}
    outcome = run(*SMALL, *TWO_EPOCHS, "--resume")
    assert (outcome.code, outcome.err) == (0, "")
    assert "There is no run in result yet: a new one begins" in outcome.out.splitlines()
    assert set(mine.values()) <= set(contents("result").values())
    again = run(*SMALL, *THREE_STEPS, "--epochs", 3, "--resume")
    assert "Epoch 3/3" in again.out
    assert "Epoch 2/" not in again.out


@pytest.mark.parametrize(
    "name", ["timeline.png", "generated_epoch_001.png", "history.csv", "previous_001/checkpoint.pt"]
)
def test_resume_begins_nothing_where_there_was_a_run(run, name: str):
    path = Path("result", name)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"of a run")
    outcome = run("--resume")
    assert outcome.is_one_line(1, "error: there is no", "checkpoint.pt")
    assert ("previous_001" in outcome.err) == ("previous_001" in name)
    assert contents("result") == {name: b"of a run"}


@pytest.mark.parametrize("flag", ["--epochs", "--data-dir", "--log-every"])
@pytest.mark.parametrize("command", [["--generate", 3], ["--interpolate"], ["--evaluate"]])
def test_flags_of_a_run_are_refused_beside_drawing(run, flag: str, command: list):
    outcome = run(*command, flag, "1")
    assert outcome.is_one_line(2, f"error: {flag} ", command[0])


# -------------------------------------------- notebooks -------------------------------------------
def switch_dtype() -> None:
    """Let new tensors have twice the precision."""
    torch.set_default_dtype(torch.float64)


def switch_device() -> None:
    """Let new tensors lie on another device."""
    torch.set_default_device("meta")


def switch_gradients() -> None:
    """Let no gradients be computed."""
    torch.set_grad_enabled(False)


def switch_autocast() -> None:
    """Let layers and products compute in bf16."""
    torch.set_autocast_enabled("cpu", True)
    torch.autocast_increment_nesting()  # as within a cell's "with torch.autocast"


def switch_deterministic() -> None:
    """Let torch refuse what is not computed the same every time."""
    torch.use_deterministic_algorithms(True)


def switch_style() -> None:
    """Let matplotlib draw light on dark."""
    from matplotlib import style

    style.use("dark_background")


def switch_random_numbers() -> None:
    """Let torch's random numbers be at another place."""
    torch.manual_seed(123)


SWITCHES = [
    switch_dtype,
    switch_device,
    switch_gradients,
    switch_autocast,
    switch_deterministic,
    switch_style,
    switch_random_numbers,
]


def state() -> dict[str, object]:
    """Return all that a cell may have switched."""
    import matplotlib

    return {
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "gradients": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "style": dict(matplotlib.rcParams),
        "random numbers": torch.default_generator.get_state().tolist(),
        "signals": [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)],
        "streams": [(sys.stdout, sys.stderr)],
    }


@pytest.fixture
def put_back() -> Iterator[None]:
    """Put back what a test switches."""
    import matplotlib

    random_numbers = torch.get_rng_state()
    with matplotlib.rc_context():
        yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    if torch.is_autocast_enabled("cpu"):
        torch.set_autocast_enabled("cpu", False)
        torch.autocast_decrement_nesting()
    torch.use_deterministic_algorithms(False)
    torch.set_rng_state(random_numbers)


@pytest.mark.usefixtures("put_back")
@pytest.mark.few(2)
@pytest.mark.parametrize("switch", SWITCHES)
def test_what_a_notebook_has_set_does_not_reach_the_run_and_stays(
    run, monkeypatch: pytest.MonkeyPatch, switch: Callable[[], None]
):
    if switch is switch_style:
        monkeypatch.setitem(dcgan_mnist.PICTURES, "loss_curve.png", REAL_CURVES)
    commands = ((*THREE_STEPS, "--epochs", 1), ("--generate", 3))
    for command in commands:
        assert run(*command, "--output-dir", "clean").code == 0
    switch()
    before = state()
    for command in commands:
        outcome = run(*command, "--output-dir", "switched")
        assert (outcome.code, outcome.err) == (0, "")
        assert outcome.warnings() == []
        assert state() == before
    torch.set_default_device(None)
    assert_same_run("clean", "switched")


def test_autocast_around_main_does_not_reach_what_a_step_computes(
    run, monkeypatch: pytest.MonkeyPatch
):
    products = []

    def multiply(_: int, stats: torch.Tensor) -> torch.Tensor:
        products.append(torch.ones(2, 2) @ torch.ones(2, 2))
        return stats

    change_steps(monkeypatch, multiply)
    with torch.autocast("cpu", torch.bfloat16):
        assert run(*THREE_STEPS, "--epochs", 1).code == 0
        assert torch.is_autocast_enabled("cpu")
    assert {product.dtype for product in products} == {torch.float32}


def test_main_in_a_notebook_means_the_defaults(run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    given = []
    monkeypatch.setattr(dcgan_mnist, "train", lambda options, *_: given.append(options))
    assert dcgan_mnist.main() == 0
    assert dcgan_mnist.main([]) == 0
    assert given[0] == given[1]


def test_the_script_run_by_a_notebook_leaves_signals_and_environment(
    run, data_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    flags = [*SMALL, *THREE_STEPS, "--epochs", 1, "--device", "cpu", "--data-dir", data_dir]
    monkeypatch.setattr(sys, "argv", ["dcgan_mnist.py", *map(str, flags)])
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
    signals = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = [signal.getsignal(signum) for signum in signals]
    with pytest.raises(SystemExit) as end:  # as %run does
        runpy.run_path(str(ROOT / "dcgan_mnist.py"), run_name="__main__")
    assert end.value.code == 0
    assert [signal.getsignal(signum) for signum in signals] == before
    assert os.environ["MPLBACKEND"] == "module://matplotlib_inline.backend_inline"


def test_a_signal_handler_that_is_not_pythons_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(signal, "getsignal", lambda signum: None)  # what Python says of one
    monkeypatch.setattr(signal, "signal", raising(AssertionError("it is replaced")))
    with dcgan_mnist.own_process():
        pass


def test_the_file_pasted_into_a_cell_is_a_library(
    run, data_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    data_dir.rename("MNIST")  # in the current folder
    cell = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", cell)
    source = (ROOT / "dcgan_mnist.py").read_text(encoding="utf-8")
    exec(compile(source, "<cell>", "exec"), cell.__dict__)
    assert "__file__" not in cell.__dict__
    assert capsys.readouterr().out == ""
    flags = [*SMALL, *THREE_STEPS, "--epochs", 1, "--device", "cpu"]
    assert cell.main([str(flag) for flag in flags]) == 0
    out = capsys.readouterr().out
    assert f"Training on 60 pictures from {Path('MNIST').absolute()}" in out
    assert Path("result/checkpoint.pt").exists()


# ----------------------------------- a dry run proves the arithmetic ------------------------------
def deviation(outcome: Outcome) -> float:
    """Return the largest deviation that a dry run names."""
    assert (outcome.code, outcome.err) == (0, "")
    return float(
        re.search(r"^Largest deviation from fp32 on the CPU: (\S+) ", outcome.out, re.M)[1]
    )


@pytest.mark.few(1)
@pytest.mark.parametrize("recipe", ["article", "tuned", "quick"])
def test_a_dry_run_says_how_far_its_steps_are_from_what_is_written(run, recipe: str):
    flags = (*THREE_STEPS, "--recipe", recipe, "--dry-run")
    fp32 = deviation(run(*flags, "--precision", "fp32"))
    bf16 = deviation(run(*flags, "--precision", "bf16"))
    assert fp32 < 0.02
    assert 0.02 < bf16 < 0.5


def wrong_product(original: Callable) -> Callable:
    """Return a product that confuses the channels."""
    return lambda self, images, *rest: original(self, images, *rest).roll(1, dims=1)


def no_last_row(original: Callable) -> Callable:
    """Return a product that leaves out the last row."""

    def forward(self: torch.nn.Module, images: torch.Tensor, *rest: object) -> torch.Tensor:
        results = original(self, images, *rest).clone()
        results[..., -1, :] = 0
        return results

    return forward


@pytest.mark.parametrize("layer", ["ProductConv2d", "ProductConvTranspose2d"])
@pytest.mark.parametrize("fault", [wrong_product, no_last_row])
def test_a_layer_that_computes_wrongly_is_found_by_a_dry_run(
    run, monkeypatch: pytest.MonkeyPatch, layer: str, fault: Callable
):
    kind = getattr(dcgan_mnist, layer)
    monkeypatch.setattr(kind, "forward", fault(kind.forward))
    outcome = run(*THREE_STEPS, "--dry-run", "--precision", "fp32")
    assert outcome.is_one_line(1, "error: cpu in fp32", "differs by", "training_step")
    assert "try --" not in outcome.err  # no flag can help


def test_a_layer_swapped_by_mistake_is_found_by_a_dry_run(run, monkeypatch: pytest.MonkeyPatch):
    def swap(network: torch.nn.Module) -> None:
        for module in network.modules():
            if isinstance(module, torch.nn.LeakyReLU):
                module.negative_slope = 0.1

    monkeypatch.setattr(dcgan_mnist, "use_products", swap)
    outcome = run(*THREE_STEPS, "--dry-run", "--precision", "fp32")
    assert outcome.is_one_line(1, "error: cpu in fp32", "differs by")


def test_a_small_gradient_that_is_wrong_is_found_by_a_dry_run(run, monkeypatch: pytest.MonkeyPatch):
    original = dcgan_mnist.fastest_step

    def fastest_step(gan: dcgan_mnist.DCGAN, graph: bool) -> dcgan_mnist.Step:
        gan.generator.layers[4].weight.register_hook(torch.neg)  # a fiftieth of the largest
        return original(gan, graph)

    monkeypatch.setattr(dcgan_mnist, "fastest_step", fastest_step)
    outcome = run(*THREE_STEPS, "--dry-run", "--precision", "fp32")
    assert outcome.is_one_line(1, "gradient of generator.layers.4.weight differs by")


@pytest.mark.parametrize(("precision", "share"), [("fp32", 0.1), ("bf16", 0.8)])
@pytest.mark.parametrize("name", ["optimizer_d", "optimizer_g"])
def test_an_optimiser_that_computes_wrongly_is_found_by_a_dry_run(
    run, monkeypatch: pytest.MonkeyPatch, name: str, precision: str, share: float
):
    original = dcgan_mnist.fastest_step

    def fastest_step(gan: dcgan_mnist.DCGAN, graph: bool) -> dcgan_mnist.Step:
        getattr(gan, name).param_groups[0]["betas"] = (0.5, 0.9)  # before each step only
        step = original(gan, graph)

        def wrong(real: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
            weights = getattr(gan, name).param_groups[0]["params"]
            before = [weight.detach().clone() for weight in weights]
            stats = step(real, z)
            with torch.no_grad():
                for weight, start in zip(weights, before, strict=True):
                    weight.lerp_(start, share)  # so much less of the update
            return stats

        return wrong

    monkeypatch.setattr(dcgan_mnist, "fastest_step", fastest_step)
    outcome = run(*THREE_STEPS, "--dry-run", "--precision", precision)
    assert outcome.is_one_line(1, f"error: cpu in {precision}", "update of", "differs by")


def test_a_comparison_changes_nothing_in_the_run(run, monkeypatch: pytest.MonkeyPatch):
    flags = (*THREE_STEPS, "--dry-run")
    assert run(*flags, "--output-dir", "compared").code == 0

    with monkeypatch.context() as patch:
        patch.setattr(
            dcgan_mnist.ComparedStep, "__call__", lambda self, real, z: self.step(real, z)
        )
        outcome = run(*flags, "--output-dir", "plain")
    assert outcome.code == 0
    assert "(nothing differs)" in outcome.out
    assert_same_run("compared", "plain")
