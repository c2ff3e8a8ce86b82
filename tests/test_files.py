"""The output folder: its lock, an earlier run in it, what is written when, and what is loaded."""

import copy
import dataclasses
import errno
import hashlib
import os
import pickle
import random
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers import (
    ROOT,
    RUN_FILES,
    THREE_STEPS,
    Disk,
    assert_same_run,
    batch,
    change_steps,
    contents,
    ctrl_c,
    equal,
    new_gan,
    raising,
    saved,
    write_idx,
)

import dcgan_mnist
from dcgan_mnist import (
    SCORES,
    STATS,
    Failure,
    Generator,
    RunFolder,
    Settings,
    load_generator,
)

DRAWN = sorted(RUN_FILES - {"checkpoint.pt"})
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
    ),
]


# -------------------------------------------- the lock --------------------------------------------
def test_a_second_run_in_the_same_folder_is_refused(run):
    pytest.importorskip("fcntl", reason="Windows can lock no folder")
    run(*THREE_STEPS, "--epochs", 1)
    before = contents(".")
    with closing(RunFolder(Path("result"))) as other:
        other.take()
        for mode in ([], ["--resume", "--epochs", 2]):
            assert run(*mode).is_one_line(1, "error: another run is using result;", "--output-dir")
    assert contents(".") == before
    assert run("--resume", "--epochs", 2).code == 0


def test_resume_during_the_first_epoch_of_another_run_is_refused_for_that_reason(run):
    pytest.importorskip("fcntl", reason="Windows can lock no folder")
    Path("new").mkdir()
    with closing(RunFolder(Path("new"))) as other:
        other.take()
        outcome = run("--resume", "--output-dir", "new")
    assert outcome.is_one_line(1, "error: another run is using new;")


HOLD_LOCK = """
import fcntl, os, sys
fcntl.flock(os.open("result", os.O_RDONLY), fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
"""


def test_the_lock_of_a_killed_process_does_not_keep_a_run_out(run):
    pytest.importorskip("fcntl", reason="Windows can lock no folder")
    Path("result").mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", HOLD_LOCK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        timer = threading.Timer(60, process.kill)  # a test must not hang
        timer.start()
        assert process.stdout.readline() == "locked\n"
        assert run(*THREE_STEPS).is_one_line(1, "another run")
        timer.cancel()
        process.kill()
        process.wait(timeout=60)
        assert run(*THREE_STEPS, "--epochs", 1).code == 0


def test_a_drive_that_has_no_locks_costs_a_warning_and_not_the_run(run, monkeypatch):
    fcntl = pytest.importorskip("fcntl", reason="Windows can lock no folder")

    def flock(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    for mode in ([], ["--resume"]):
        outcome = run(*mode, "--epochs", 1 + len(mode))
        assert (outcome.code, outcome.err) == (0, "")
        (warning,) = outcome.warnings()
        assert "cannot lock result" in warning
        assert os.strerror(errno.ENOLCK) in warning
    assert saved()["epoch"] == 2


def test_a_system_without_locks_runs_too(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    outcome = run(*THREE_STEPS, "--epochs", 1)
    assert (outcome.code, outcome.err, outcome.warnings()) == (0, "", [])


def test_an_error_in_training_is_not_taken_for_another_run(run, monkeypatch):
    def step(*_: object) -> torch.Tensor:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(dcgan_mnist, "training_step", step)
    outcome = run(*THREE_STEPS)
    assert outcome.is_one_line(1, os.strerror(errno.EAGAIN))
    assert "another run" not in outcome.err


# ----------------------------------------- an earlier run -----------------------------------------
MINE = {
    "notes.txt": b"a",
    "training.csv": b"b",
    "history.pt": b"c",
    "checkpoint.png": b"d",
    "generated_epoch_0001.png": b"e",
    "generated_epoch_000.png": b"f",
    "generated_epoch_1.png": b"g",
    "generated_epoch_001.gif": b"h",
    ".notes.txt.tmp": b"i",
    "example/timeline.png": b"j",
}


def write_mine(folder: str = "result") -> None:
    """Put files of the user into a folder."""
    for name, content in MINE.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def below(name: str, files: dict[str, bytes]) -> dict[str, bytes]:
    """Return files with the paths that they have in the folder above."""
    return {f"{name}/{path}": content for path, content in files.items()}


@pytest.mark.usefixtures("mean_scorer")
def test_a_new_run_moves_all_of_an_earlier_one_and_nothing_else(run):
    run(*THREE_STEPS, "--epochs", 3)
    for command in (["--generate", 3], ["--interpolate"], ["--evaluate"]):
        assert run(*command).code == 0
    first = contents("result")
    write_mine()

    second_run = (*THREE_STEPS, "--epochs", 2, "--seed", 2)
    outcome = run(*second_run)
    assert outcome.code == 0
    moved = [line for line in outcome.out.splitlines() if "previous_001" in line]
    assert str(Path("result/previous_001")) in moved[0]
    run(*second_run, "--output-dir", "second")
    second = contents("second")
    assert contents("result") == second | MINE | below("previous_001", first)

    outcome = run(*THREE_STEPS, "--epochs", 1, "--seed", 3)
    assert "previous_002" in outcome.out
    assert "previous_001" not in outcome.out
    run(*THREE_STEPS, "--epochs", 1, "--seed", 3, "--output-dir", "third")
    kept = below("previous_001", first) | below("previous_002", second)
    assert contents("result") == contents("third") | MINE | kept


def test_the_latest_of_a_thousand_earlier_runs_is_named(run):
    for number in (999, 1000):
        folder = Path(f"result/previous_{number}")
        folder.mkdir(parents=True)
        (folder / "checkpoint.pt").touch()
    assert run("--generate", 3).is_one_line(1, "error: there is no", "previous_1000")


@pytest.mark.parametrize("folder", ["result", "my runs"])
def test_the_command_that_goes_on_with_a_moved_run_is_named_and_works(run, folder: str):
    run(*THREE_STEPS, "--epochs", 2, "--output-dir", "whole")
    run(*THREE_STEPS, "--epochs", 1, "--output-dir", folder)
    out = run(*THREE_STEPS, "--epochs", 1, "--seed", 2, "--output-dir", folder).out
    new = contents(folder)["checkpoint.pt"]
    command = re.search(r"^To go on with that run: (.*)$", out, re.MULTILINE)[1]
    python, program, *argv = shlex.split(command, posix=sys.platform != "win32")
    argv = [word.strip('"') for word in argv]  # of the shell of Windows
    assert python == "python"
    assert Path(program) == ROOT / "dcgan_mnist.py"
    # the command finds the run's digits without the --data-dir that ``run`` adds
    assert dcgan_mnist.main([*argv, "--epochs", "2", "--device", "cpu"]) == 0
    assert_same_run(Path(folder, "previous_001"), "whole")
    assert contents(folder)["checkpoint.pt"] == new


def test_a_command_is_quoted_for_the_shell_of_this_system(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    assert dcgan_mnist.command_line("--output-dir", "it's mine").endswith("""'it'"'"'s mine'""")
    monkeypatch.setattr(sys, "platform", "win32")
    command = dcgan_mnist.command_line("--output-dir", r"my runs\previous_001")
    assert command.startswith("python ")
    assert command.endswith(r'--output-dir "my runs\previous_001"')


def test_beside_the_program_a_command_names_it_without_its_folder(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert dcgan_mnist.command_line("--resume") == "python dcgan_mnist.py --resume"


def test_drawings_without_a_checkpoint_are_moved_too_but_cannot_be_gone_on_with(run):
    Path("result").mkdir()
    Path("result/generated.png").write_bytes(b"drawn")
    outcome = run(*THREE_STEPS, "--epochs", 1)
    assert contents("result")["previous_001/generated.png"] == b"drawn"
    assert "--resume" not in outcome.out


def test_pictures_of_epochs_beyond_a_thousand_are_moved_too(run):
    run(*THREE_STEPS, "--epochs", 1)
    pictures = ["generated_epoch_1000.png", "generated_epoch_12345.png"]
    for name in pictures:
        shutil.copy("result/generated_epoch_001.png", Path("result", name))
    assert run(*THREE_STEPS, "--epochs", 1).code == 0
    for name in pictures:
        assert Path("result/previous_001", name).exists()
        assert not Path("result", name).exists()


def test_a_first_run_moves_nothing(run):
    write_mine()
    out = run(*THREE_STEPS, "--epochs", 1).out
    assert "earlier run" not in out
    assert not Path("result/previous_001").exists()
    assert contents("result").items() >= MINE.items()


@pytest.fixture
def earlier_run(run) -> dict[str, bytes]:
    """A run of two epochs in the folder, and files of the user beside it."""
    run(*THREE_STEPS, "--epochs", 2)
    write_mine()
    return contents(".")


@pytest.mark.few(2)
@pytest.mark.parametrize("name", sorted(RUN_FILES))
def test_an_earlier_run_that_cannot_be_moved_whole_stays_whole(
    run, earlier_run: dict[str, bytes], disk: Disk, name: str
):
    disk.fail(name)
    outcome = run(*THREE_STEPS)
    assert outcome.is_one_line(1, "error: cannot move", "previous_001", "Permission denied")
    assert "close any program that has its files open" in outcome.err
    assert contents(".") == earlier_run
    assert not Path("result/previous_001").exists()


def test_ctrl_c_while_an_earlier_run_is_moved_leaves_it_whole(
    run, earlier_run: dict[str, bytes], disk: Disk
):
    disk.interrupt("history.csv", ctrl_c)
    assert run(*THREE_STEPS).is_one_line(130, "stopped: ", "the same command")
    assert contents(".") == earlier_run
    assert not Path("result/previous_001").exists()


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["--batch-size", 61], 2),
        (["--epochs", 0], 2),
        (["--epoch", 3], 2),
        (["--best"], 2),
        (["--device", "cuda"], 2),
        (["--data-dir", "broken"], 2),
    ],
)
def test_a_run_that_cannot_begin_moves_nothing(
    run, earlier_run: dict[str, bytes], monkeypatch, argv: list, code: int
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    write_idx(Path("broken/t10k-images-idx3-ubyte"), torch.zeros(3, 9, 9, dtype=torch.uint8))
    before = contents(".")
    assert run(*argv).is_one_line(code, "error: ")
    assert contents(".") == before
    assert not Path("result/previous_001").exists()


def write_half(name: str, age: int) -> str:
    """Leave a file half written so many seconds ago; return its name."""
    path = Path("result", name)
    path.write_bytes(b"half")
    os.utime(path, (time.time() - age,) * 2)
    return path.name


@pytest.mark.few(1)
@pytest.mark.parametrize("command", [[], ["--resume", "--epochs", 3], ["--generate", 3]])
def test_what_killed_commands_left_half_written_goes_once_it_is_an_hour_old(
    run, earlier_run: dict[str, bytes], command: list
):
    number = "0123456789abcdef" * 2
    ours = ("checkpoint.pt", "generated_epoch_007.png", "history.csv", "generated.npy")
    for name in (*ours, "digits_score.json", f".checkpoint.pt.{number}.tmp"):
        write_half(f".{name}.{number}.tmp", age=3700)
    young = write_half(f".checkpoint.pt.{number[::-1]}.tmp", age=3500)  # of a command at work
    others = [
        write_half(name, age=10**6)
        for name in (
            f".notes.txt.{number}.tmp",
            f".generated_epoch_7.png.{number}.tmp",
            f".checkpoint.pt.{number[1:]}.tmp",
            f".checkpoint.pt.{number}.tmp.txt",
            f"checkpoint.pt.{number}.tmp",
            ".checkpoint.pt.tmp",
        )
    ]
    options = [] if command else [*THREE_STEPS, "--epochs", 1]
    outcome = run(*command, *options)
    assert (outcome.code, outcome.err) == (0, "")
    left = {path.name for path in Path("result").rglob("*.tmp*")}
    assert left == {*others, young, ".notes.txt.tmp"}


def test_two_commands_that_write_the_same_file_at_once_both_succeed(tmp_path: Path):
    written = [bytes([number]) * 10**6 for number in range(8)]
    with ThreadPoolExecutor() as pool:
        list(pool.map(partial(RunFolder(tmp_path).write, "generated.npy"), written))
    (left,) = contents(tmp_path).values()
    assert left in written


# ----------------------------------------- what is written ----------------------------------------
def test_a_file_that_windows_holds_for_a_moment_is_replaced_all_the_same(
    run, monkeypatch: pytest.MonkeyPatch, disk: Disk
):
    run(*THREE_STEPS, "--epochs", 2, "--output-dir", "whole")
    monkeypatch.setattr(dcgan_mnist, "SHORT_PATIENCE", 1.5)  # as on Windows
    for name in RUN_FILES - {"history.csv"}:  # to which it adds
        disk.fail(name, times=3)
    outcome = run(*THREE_STEPS, "--epochs", 2)
    assert (outcome.code, outcome.err, outcome.warnings()) == (0, "", [])
    assert_same_run("result", "whole")
    assert 0 < max(disk.waits) < 1


@pytest.mark.usefixtures("disk")
def test_a_folder_whose_probe_windows_holds_for_a_moment_is_usable(
    run, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(dcgan_mnist, "SHORT_PATIENCE", 1.5)
    refusals = [PermissionError(errno.EACCES, "held by a scanner")] * 3
    original = Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if refusals:
            raise refusals.pop()
        original(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    outcome = run(*THREE_STEPS, "--epochs", 1)
    assert (outcome.code, outcome.err, refusals) == (0, "", [])


def hold_by_epoch(monkeypatch: pytest.MonkeyPatch, disk: Disk, names: dict[int, str]) -> None:
    """Let a file be held open in each of some epochs of three steps."""

    def change(step: int, stats: torch.Tensor) -> torch.Tensor:
        epoch = (step + 2) // 3
        disk.faults.clear()
        if epoch in names:
            disk.fail(names[epoch])
        return stats

    change_steps(monkeypatch, change)


def test_what_cannot_be_drawn_costs_a_warning_and_is_drawn_after_the_next_epoch(
    run, disk: Disk, monkeypatch
):
    names = {
        1: "generated_epoch_001.png",
        2: "history.csv",
        3: "loss_curve.png",
        4: "real_samples.png",
        5: "timeline.png",
        6: "training.gif",
    }
    run(*THREE_STEPS, "--epochs", 7, "--output-dir", "whole")
    hold_by_epoch(monkeypatch, disk, names)
    outcome = run(*THREE_STEPS, "--epochs", 7)
    assert (outcome.code, outcome.err) == (0, "")
    for name, warning in zip(names.values(), outcome.warnings(), strict=True):
        assert f"cannot write {Path('result', name)} (Permission denied)" in warning
    assert_same_run("result", "whole")


def test_what_could_not_be_drawn_is_drawn_by_resume_of_the_finished_run(
    run, disk: Disk, monkeypatch
):
    run(*THREE_STEPS, "--epochs", 2, "--output-dir", "whole")
    for name in DRAWN:
        disk.fail(name)
    outcome = run(*THREE_STEPS, "--epochs", 2)
    assert (outcome.code, outcome.err) == (0, "")
    for name in DRAWN:
        assert f"cannot write {Path('result', name)} (Permission denied)" in outcome.out
    assert list(contents("result")) == ["checkpoint.pt"]

    disk.faults.clear()
    change_steps(monkeypatch, lambda *_: pytest.fail("a finished run trains no more"))
    outcome = run("--resume", "--epochs", 2)
    assert (outcome.code, outcome.err, outcome.warnings()) == (0, "", [])
    assert_same_run("result", "whole")


def test_missing_pictures_of_a_finished_run_are_drawn_again_by_resume(run):
    run(*THREE_STEPS, "--epochs", 2)
    before = contents("result")
    one_by_one = [[name] for name in DRAWN]
    for missing in [*one_by_one, DRAWN]:
        for name in missing:
            Path("result", name).unlink()
        assert run("--resume", "--epochs", 2).code == 0
        assert contents("result") == before


def test_the_history_grows_after_each_epoch_and_what_was_there_stays(run, monkeypatch):
    path = Path("result/history.csv")
    seen = []

    def change(step: int, stats: torch.Tensor) -> torch.Tensor:
        if step % 3 == 1 and step > 1:  # an epoch has ended
            seen.append((path.stat().st_ino, path.read_bytes()))
        return stats

    change_steps(monkeypatch, change)
    run(*THREE_STEPS, "--epochs", 3)
    run("--resume", "--epochs", 5)
    seen.append((path.stat().st_ino, path.read_bytes()))
    assert len(seen) == 5
    assert len({number for number, _ in seen}) == 1  # it is the same file, not one in its place
    for (_, before), (_, after) in pairwise(seen):
        assert after.startswith(before)
    for epoch, (_, content) in enumerate(seen, start=1):
        header, *rows = content.decode().splitlines()
        assert header.startswith("epoch,step,ds_loss,")
        expected = [f"{n},{step}" for n in range(1, epoch + 1) for step in (1, 2, 3)]
        assert [",".join(row.split(",")[:2]) for row in rows] == expected


def end_of_epoch(content: bytes, epoch: int) -> int:
    """Return how long a history of three steps an epoch was after an epoch."""
    return len(b"".join(content.splitlines(keepends=True)[: 1 + 3 * epoch]))


HISTORY_FAULTS = {  # what becomes of the history of two epochs
    "deleted": lambda _: None,
    "empty": lambda _: b"",
    "cut in a row": lambda content: content[:-5],
    "cut in the first epoch": lambda content: content[: end_of_epoch(content, 1) // 2],
    "without its last epoch": lambda content: content[: end_of_epoch(content, 1)],
    "without its first epoch": lambda content: content[end_of_epoch(content, 1) :],
    "with the start of another epoch": lambda content: content + b"3,1,0.",
    "with a line more": lambda content: b"my run\n" + content,
}


def spoil(path: Path, fault: str) -> None:
    """Do to a history what the user may have done, or a kill."""
    content = HISTORY_FAULTS[fault](path.read_bytes())
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)


@pytest.mark.slow
def test_a_history_that_is_not_as_it_was_is_whole_after_the_next_epoch(run, monkeypatch):
    run(*THREE_STEPS, "--epochs", 3, "--output-dir", "whole")
    whole = contents("whole")["history.csv"]
    for fault in HISTORY_FAULTS:

        def change(step: int, stats: torch.Tensor, fault: str = fault) -> torch.Tensor:
            if step == 8:  # in the third epoch
                spoil(Path(fault, "history.csv"), fault)
            return stats

        with monkeypatch.context() as patch:
            change_steps(patch, change)
            outcome = run(*THREE_STEPS, "--epochs", 3, "--output-dir", fault)
        assert (outcome.code, outcome.err, outcome.warnings()) == (0, "", [])
        assert contents(fault)["history.csv"] == whole, fault


def test_a_history_that_is_not_as_it_was_is_whole_after_resume(run):
    run(*THREE_STEPS, "--epochs", 3, "--output-dir", "whole")
    whole = contents("whole")["history.csv"]
    run(*THREE_STEPS, "--epochs", 2)
    path = Path("result/history.csv")
    before = path.read_bytes()
    for fault in HISTORY_FAULTS:
        shutil.copytree("result", fault)
        spoil(path, fault)
        assert run("--resume").code == 0  # of the finished run
        assert path.read_bytes() == before, fault
        spoil(Path(fault, "history.csv"), fault)
        assert run("--resume", "--epochs", 3, "--output-dir", fault).code == 0
        assert contents(fault)["history.csv"] == whole, fault


def add_half(epoch: int) -> None:
    """Add half of an epoch to the history."""
    with open("result/history.csv", "ab") as file:
        file.write(f"{epoch},1,0.69".encode())


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_run_that_ends_half_way_through_adding_to_the_history_is_whole_after_resume(
    run, disk: Disk, epoch: int
):
    def end() -> None:
        add_half(epoch)
        ctrl_c()

    run(*THREE_STEPS, "--epochs", 3, "--output-dir", "whole")
    disk.interrupt("history.csv", end, times=[epoch])
    assert run(*THREE_STEPS, "--epochs", 3).is_one_line(130, f"epoch {epoch} is saved")
    assert contents("result")["history.csv"].endswith(b"0.69")
    disk.faults.clear()
    assert run("--resume").code == 0
    assert_same_run("result", "whole")


def test_a_disk_that_is_full_for_a_while_costs_a_warning_and_no_line_of_the_history(
    run, disk: Disk
):
    def fail() -> None:
        add_half(2)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run(*THREE_STEPS, "--epochs", 3, "--output-dir", "whole")
    disk.interrupt("history.csv", fail, times=[2])
    outcome = run(*THREE_STEPS, "--epochs", 3)
    assert (outcome.code, outcome.err) == (0, "")
    (warning,) = outcome.warnings()
    assert f"cannot write {Path('result/history.csv')} (No space left on device)" in warning
    assert_same_run("result", "whole")


def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_keeps_the_last_one(
    run, disk: Disk, monkeypatch
):
    run(*THREE_STEPS, "--epochs", 1, "--output-dir", "one")
    run(*THREE_STEPS, "--epochs", 2, "--output-dir", "whole")
    hold_by_epoch(monkeypatch, disk, {2: "checkpoint.pt"})
    outcome = run(*THREE_STEPS, "--epochs", 2)
    path = Path("result/checkpoint.pt")
    assert outcome.is_one_line(1, f"error: cannot write {path} (Permission denied)")
    assert_same_run("result", "one")
    disk.faults.clear()
    assert run("--resume", "--epochs", 2).code == 0
    assert_same_run("result", "whole")


def test_a_best_generator_that_cannot_be_written_ends_the_run_and_keeps_the_last_one(
    run, disk: Disk, fake_scores, monkeypatch
):
    fake_scores([30.0], [10])
    run(*THREE_STEPS, "--epochs", 1, "--output-dir", "one")
    fake_scores([30.0, 20.0], [10, 10])
    hold_by_epoch(monkeypatch, disk, {2: "generator_best.pt"})
    outcome = run(*THREE_STEPS, "--epochs", 2)
    path = Path("result/generator_best.pt")
    assert outcome.is_one_line(1, f"error: cannot write {path} (Permission denied)")
    assert_same_run("result", "one")


@pytest.mark.parametrize("name", ["real_samples.png", "generated_epoch_001.png", "history.csv"])
def test_the_checkpoint_of_an_epoch_is_there_before_its_pictures(run, disk: Disk, name: str):
    disk.interrupt(name, ctrl_c)
    assert run(*THREE_STEPS).is_one_line(130, "stopped: epoch 1 is saved")
    assert saved()["epoch"] == 1
    assert not Path("result", name).exists()


def test_the_best_generator_is_there_before_the_checkpoint_of_its_epoch(
    run, fake_scores, disk: Disk
):
    fake_scores([30.0, 20.0], [10, 10])
    disk.interrupt("checkpoint.pt", ctrl_c, times=[2])
    outcome = run(*THREE_STEPS, "--epochs", 2)
    assert outcome.is_one_line(130, "stopped: epoch 1 is saved")
    assert saved()["epoch"] == 1
    best = torch.load("result/generator_best.pt", weights_only=True)
    assert best["epoch"] == 2


def test_ctrl_c_while_a_file_is_written_leaves_no_part_of_it(run, disk: Disk, monkeypatch):
    def change(step: int, stats: torch.Tensor) -> torch.Tensor:
        if step == 3:  # the last one of its epoch
            disk.interrupt("fsync", ctrl_c)
        return stats

    run(*THREE_STEPS, "--epochs", 1)
    before = contents("result")
    change_steps(monkeypatch, change)
    assert run("--resume", "--epochs", 2).is_one_line(
        130, "stopped: epoch 1 is saved", "the same command"
    )
    assert contents("result") == before


def test_a_disk_that_gets_full_keeps_what_was_there(run, disk: Disk, monkeypatch):
    def change(step: int, stats: torch.Tensor) -> torch.Tensor:
        if step == 4:
            disk.fail("fsync", errno.ENOSPC)
        return stats

    run(*THREE_STEPS, "--epochs", 1, "--output-dir", "one")
    change_steps(monkeypatch, change)
    outcome = run(*THREE_STEPS, "--epochs", 3)
    assert outcome.is_one_line(1, "error: cannot write", "checkpoint.pt", "No space left")
    assert_same_run("result", "one")


def test_a_folder_deleted_during_the_run_ends_with_one_line(run, monkeypatch):
    def change(step: int, stats: torch.Tensor) -> torch.Tensor:
        if step == 5:
            shutil.rmtree("result")
        return stats

    change_steps(monkeypatch, change)
    assert run(*THREE_STEPS).is_one_line(1, "error: cannot write", "checkpoint.pt", "No such file")


# ------------------------------------------- checkpoints ------------------------------------------
@pytest.fixture
def checkpoint(run, mean_scorer: None) -> Path:
    """The checkpoint of a run of one epoch, beside the best generator."""
    run(*THREE_STEPS, "--epochs", 1)
    return Path("result/checkpoint.pt")


def test_a_checkpoint_says_what_it_is_and_where_it_comes_from(run, data_dir: Path):
    data = os.path.relpath(data_dir)
    flags = ("--seed", 7, "--precision", "fp32", "--epochs", 2, "--data-dir", data)
    run(*THREE_STEPS, *flags)
    checkpoint = saved()
    assert checkpoint["format"] == dcgan_mnist.FORMAT == 5
    assert checkpoint["epoch"] == 2
    expected = Settings(batch_size=20, seed=7, precision="fp32", width=4, latent_dim=8)
    assert checkpoint["settings"] == dataclasses.asdict(expected)
    digits = dcgan_mnist.load_pictures(data_dir, "test")[0]
    sha256 = hashlib.sha256(digits.numpy().tobytes()).hexdigest()
    path = Path(checkpoint["data"].pop("path"))
    assert checkpoint["data"] == {"sha256": sha256}
    assert path.is_absolute()
    assert path.samefile(data_dir)
    assert checkpoint["made_with"] == {"torch": torch.__version__, "device": "cpu"}
    assert len(checkpoint["stats"]["ds_loss"]) == 6


def test_what_is_saved_is_what_is_read(tmp_path: Path):
    gan = new_gan(seed=3, lr=0.01)
    stats = dcgan_mnist.training_step(gan, *batch())
    gan.epoch = 1
    digits = torch.zeros(60, 28, 28, dtype=torch.uint8)
    run = dcgan_mnist.Run(gan, digits, data_dir=None, epochs=3)
    run.add(stats[None], {"fd": 30.0})
    content = run.checkpoint()
    folder = RunFolder(tmp_path)
    folder.save("checkpoint.pt", content)
    path = tmp_path / "checkpoint.pt"
    read = dcgan_mnist.read_checkpoint(path)
    assert equal(read, content | {"settings": gan.settings})

    other = dcgan_mnist.Run(new_gan(lr=0.01), digits, data_dir=None, epochs=3)
    other.restore(read, path)
    other.gan.settings = gan.settings
    assert equal(other.checkpoint(), content)
    assert other.gan.steps == 1
    assert torch.equal(other.samples(1), run.samples(1))
    assert other.table() == run.table()
    assert other.best_epoch == 1


def test_a_checkpoint_from_before_a_setting_or_a_figure_goes_on_without_it(run, checkpoint: Path):
    content = saved()
    del content["settings"]["ema"]
    del content["steps"]
    del content["stats"]["gn_loss"]
    del content["scores"]["fd"]
    torch.save(content, checkpoint)
    outcome = run("--resume", "--epochs", 2)
    assert (outcome.code, outcome.err, outcome.warnings()) == (0, "", [])
    content = saved()
    assert content["settings"]["ema"] == Settings.ema
    gn_loss = content["stats"]["gn_loss"]
    assert gn_loss.isnan().tolist() == [True] * 3 + [False] * 3
    assert content["scores"]["fd"].isnan().tolist() == [True, False]
    assert content["stats"]["ds_loss"].isfinite().all()

    header, *rows = Path("result/history.csv").read_text().splitlines()
    assert sorted(header.split(",")) == sorted({"epoch", "step", *STATS, *SCORES})
    for column, before in {"gn_loss": 3, "fd": 3, "ds_loss": 0}.items():
        cells = [row.split(",")[header.split(",").index(column)] for row in rows]
        assert [cell == "nan" for cell in cells] == [True] * before + [False] * (6 - before)
    assert Path("result/generator_best.pt").exists()  # of epoch 2: the first one has no FD


ANOTHER_VERSION = "is from another version of this program"
DAMAGED = "is damaged or is not a checkpoint of this program"
OTHER_NETWORKS = "holds other networks than dcgan_mnist.py"


def assert_refused(run: Callable, data: bytes, *words: str) -> None:
    """Check that no command takes a checkpoint, changes a file or makes one."""
    path = Path("result/checkpoint.pt")
    path.write_bytes(data)
    before = contents(".")
    for mode in (["--resume", "--epochs", 9], ["--generate", 3], ["--interpolate"], ["--evaluate"]):
        assert run(*mode).is_one_line(1, f"error: {path} ", *words)
        assert contents(".") == before


def test_checkpoints_of_earlier_formats_are_said_to_be_of_another_version(run, checkpoint: Path):
    content = saved()
    for name in ("data", "stats", "scores", "packed_samples"):
        del content[name]
    for name in ("width", "latent_dim"):
        del content["settings"][name]
    content |= {"digits_sha256": "", "samples": [], "best_epoch": 1, "best_fd": 30.0}
    content["history"] = dict.fromkeys(STATS, torch.zeros(3))
    for number in (4, 3, 2):
        torch.save(content | {"format": number}, checkpoint)
        assert_refused(run, checkpoint.read_bytes(), ANOTHER_VERSION, f"it has format {number}")

    content["fixed_noise"] = torch.zeros(50, 8, 1, 1)
    content["history"] = torch.zeros(3, 9)
    for name in ("format", "made_with"):
        del content[name]
    torch.save(content, checkpoint)
    data = checkpoint.read_bytes()
    sealed = data[:-2] + b"\x20\0" + bytes(32)  # the zip archive's comment was a check sum
    assert_refused(run, sealed, ANOTHER_VERSION)


def test_a_checkpoint_of_a_later_format_is_said_to_be_of_another_version(run, checkpoint: Path):
    content = saved()
    content["format"] += 1
    torch.save(content, checkpoint)
    assert_refused(run, checkpoint.read_bytes(), ANOTHER_VERSION)


def test_a_checkpoint_with_a_setting_of_another_version_is_said_to_be_of_that(
    run, checkpoint: Path
):
    content = saved()
    content["settings"]["curriculum"] = True
    torch.save(content, checkpoint)
    assert_refused(run, checkpoint.read_bytes(), ANOTHER_VERSION, "no setting named curriculum")


# -------------------------------------------- damage ----------------------------------------------
@pytest.fixture
def is_refused(checkpoint: Path) -> Callable[[bytes], bool]:
    """Tell whether a file is refused as a checkpoint; if not, it must load as what was saved."""
    content = saved()
    content["settings"] = Settings(**content["settings"])

    def is_refused(data: bytes) -> bool:
        checkpoint.write_bytes(data)
        try:
            read = dcgan_mnist.read_checkpoint(checkpoint)
        except Failure as failure:
            reason = str(failure)
        else:
            assert equal(read, content)
            return False
        assert reason.startswith(f"{checkpoint} is ")
        return True

    return is_refused


def flipped(data: bytes, bit: int) -> bytes:
    """Return a copy of a file with one bit flipped."""
    copied = bytearray(data)
    copied[bit // 8] ^= 1 << bit % 8
    return bytes(copied)


def test_checkpoints_cut_at_every_kilobyte_are_refused(run, checkpoint: Path, is_refused):
    sound = checkpoint.read_bytes()
    assert not is_refused(sound)
    cuts = [sound[:size] for size in range(0, len(sound), 1024)]
    assert len(cuts) > 100
    for data in cuts:
        assert is_refused(data)
    for data in [cuts[0], cuts[1], cuts[-1], sound[:-1]]:
        assert_refused(run, data, "damaged")


def test_checkpoints_with_one_of_200_bits_flipped_are_refused_or_load_unchanged(
    run, checkpoint: Path, is_refused
):
    sound = checkpoint.read_bytes()
    chance = random.Random(0)
    refused = []
    for _ in range(200):
        data = flipped(sound, chance.randrange(8 * len(sound)))
        if is_refused(data):
            refused.append(data)
    assert len(refused) > 100  # the others lie in the padding between tensors
    for data in refused[:5]:
        assert_refused(run, data)


def test_a_damaged_best_generator_is_refused_too(run, checkpoint: Path):
    best = Path("result/generator_best.pt")
    sound = best.read_bytes()
    for data in (b"", sound[: len(sound) // 2], flipped(sound, 4 * len(sound))):
        best.write_bytes(data)
        outcome = run("--generate", 3, "--best")
        assert outcome.is_one_line(1, f"error: {best} is damaged")
        with pytest.raises(Failure, match="is damaged"):
            load_generator("result", best=True)


class Bomb:
    """An object that writes a file when it is unpickled."""

    def __reduce__(self) -> tuple:
        return Path.write_text, (Path("exploded"), "!")


FOREIGN = {
    "empty": b"",
    "a picture": b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(5000),
    "a pickle": pickle.dumps(Bomb()),
    "zeros": bytes(5000),
    "an empty archive": b"PK\x05\x06" + bytes(18),
}


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", FOREIGN)
def test_files_that_are_no_checkpoints_are_refused(run, checkpoint: Path, kind: str):
    assert_refused(run, FOREIGN[kind], DAMAGED)
    assert not Path("exploded").exists()


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_checkpoint_is_not_called_damaged_where_memory_is_used_up(
    run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    monkeypatch.setattr(torch, "load", raising(error))
    for command in (["--resume", "--epochs", 9], ["--generate", 3]):
        outcome = run(*command)
        assert outcome.is_one_line(1, "error: ", "memory")
        assert DAMAGED not in outcome.err


def test_bytes_after_the_end_of_a_checkpoint_change_nothing(checkpoint: Path, is_refused):
    sound = checkpoint.read_bytes()
    for tail in (b"\0", b"\n", sound):
        is_refused(sound + tail)  # or it loads as what was saved


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "fault", ["code", "code in the settings", "no average", "no epoch", "no check sum", "a list"]
)
def test_sound_files_that_hold_something_else_are_refused(run, checkpoint: Path, fault: str):
    content = saved()
    if fault == "code":
        content["epoch"] = Bomb()
    elif fault == "code in the settings":
        content["settings"]["width"] = Bomb()
    elif fault == "no average":
        del content["average"]
    elif fault == "no epoch":
        del content["epoch"]
    elif fault == "no check sum":
        del content["data"]
    elif fault == "a list":
        content = [1, 2]
    torch.save(content, checkpoint)
    assert_refused(run, checkpoint.read_bytes(), DAMAGED)
    assert not Path("exploded").exists()


def test_a_checkpoint_that_lacks_any_part_is_refused_by_resume_which_changes_nothing(
    run, checkpoint: Path
):
    sound = saved()
    # without a format, it is of the first one; without steps, it is an older one
    for name in sound.keys() - {"format", "steps"}:
        content = sound.copy()
        del content[name]
        torch.save(content, checkpoint)
        before = contents(".")
        outcome = run("--resume", "--epochs", 9)
        assert outcome.is_one_line(1, f"error: {checkpoint} ", name)
        assert contents(".") == before


@pytest.mark.few(2)
@pytest.mark.parametrize("fault", ["wider", "with a layer more", "without a bias", "of a size"])
def test_weights_of_other_networks_are_not_taken_for_damage(run, checkpoint: Path, fault: str):
    content = saved()
    if fault == "wider":
        content["average"] = Generator(8, 6).state_dict()
    elif fault == "with a layer more":
        content["average"]["layers.12.weight"] = torch.zeros(3)
    elif fault == "without a bias":
        del content["average"]["layers.0.bias"]
    elif fault == "of a size":
        content["settings"]["width"] = 6
    torch.save(content, checkpoint)
    assert_refused(run, checkpoint.read_bytes(), OTHER_NETWORKS, "train again")


def test_a_best_generator_is_no_checkpoint_to_go_on_with(run, checkpoint: Path):
    shutil.copyfile("result/generator_best.pt", checkpoint)
    before = contents(".")
    outcome = run("--resume", "--epochs", 2)
    assert outcome.is_one_line(1, f"error: {checkpoint} {DAMAGED}")
    assert contents(".") == before


# ----------------------------------------- load_generator -----------------------------------------
def noise(count: int = 16) -> torch.Tensor:
    """Return noise for the small networks, the same for every call."""
    stream = torch.Generator().manual_seed(1)
    return torch.randn(count, 8, 1, 1, generator=stream)


@pytest.mark.parametrize("device", DEVICES)
def test_a_trained_generator_is_there_in_three_lines(run, device: str):
    run(*THREE_STEPS, "--epochs", 2)
    generator = load_generator("result", device=device)
    z = noise().to(device)
    images = generator(z)
    assert images.shape == (16, 1, 28, 28)
    assert images.device.type == device
    assert images.dtype == torch.float32
    assert images.abs().max() <= 1
    assert not images.requires_grad
    assert torch.equal(generator(z), images)
    assert torch.allclose(generator(z[:1]), images[:1], atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_loaded_generator_is_a_plain_module_in_fp32(run, precision: str, tmp_path: Path):
    run(*THREE_STEPS, "--epochs", 1, "--precision", precision)
    generator = load_generator("result")
    images = generator(noise())
    assert all(value.dtype != torch.bfloat16 for value in generator.state_dict().values())
    plain = Generator(8, 4)
    plain.load_state_dict(saved()["average"])
    assert torch.allclose(plain.eval()(noise()), images, atol=1e-6)  # bf16 would be 1e-3 away

    torch.save(generator, tmp_path / "generator.pt")
    copies = [
        copy.deepcopy(generator),
        pickle.loads(pickle.dumps(generator)),
        torch.load(tmp_path / "generator.pt", weights_only=False),
    ]
    for other in copies:
        assert torch.equal(other(noise()), images)
        with torch.no_grad():
            other.layers[-2].bias += 1
        assert not torch.equal(other(noise()), images)
    assert torch.equal(generator(noise()), images)


def test_loading_a_generator_leaves_random_numbers_alone(run):
    run(*THREE_STEPS, "--epochs", 1)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    load_generator("result")
    assert torch.equal(torch.get_rng_state(), before)


def test_the_last_or_the_best_epochs_generator_can_be_had(run, fake_scores):
    fake_scores([10.0, 20.0, 10.0], [10, 10, 10])
    run(*THREE_STEPS, "--epochs", 2, "--lr", 0.01)
    run(*THREE_STEPS, "--epochs", 1, "--lr", 0.01, "--output-dir", "one")
    best = load_generator(Path("result"), best=True)
    last = load_generator("result")
    assert torch.equal(best(noise()), load_generator("one")(noise()))
    assert not torch.equal(best(noise()), last(noise()))


@pytest.mark.parametrize("best", [False, True])
def test_no_generator_to_load_is_said(tmp_path: Path, best: bool):
    with pytest.raises(Failure, match="train first"):
        load_generator(tmp_path, best)
    assert contents(tmp_path) == {}
