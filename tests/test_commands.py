"""The commands: train and go on exactly, stop, dry run, generate, interpolate, evaluate."""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo  # an optimiser imports it, which makes a temporary folder
from helpers import (
    DEPTH,
    ROOT,
    RUN_FILES,
    SMALL,
    THREE_STEPS,
    MeanScorer,
    assert_same_run,
    change_steps,
    contents,
    ctrl_c,
    digits_in,
    grey_curves,
    load_script,
    saved,
    size_of,
    stop_at,
    write_idx,
    write_split,
)

import dcgan_mnist

REAL_CURVES = dcgan_mnist.PICTURES["loss_curve.png"]  # which the fixture ``run`` replaces


# ----------------------------------------- going on exactly ---------------------------------------
@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four epochs like those of the fixture ``run``, which nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    write_split(folder / "data", 60)
    argv = [*SMALL, *THREE_STEPS, "--epochs", 4, "--device", "cpu"]
    argv += ["--data-dir", folder / "data", "--output-dir", folder / "result"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(dcgan_mnist.PICTURES, "loss_curve.png", grey_curves)
        assert dcgan_mnist.main([str(option) for option in argv]) == 0
    return folder / "result"


@pytest.mark.few(2)
@pytest.mark.parametrize("stops", [[1], [2], [3], [1, 2], [1, 2, 3]])
def test_a_resumed_run_ends_bit_identical(run, whole: Path, stops: list[int]):
    run(*THREE_STEPS, "--epochs", stops[0])
    for epochs in [*stops[1:], 4]:
        assert run("--resume", "--epochs", epochs).code == 0
    assert_same_run("result", whole)


@pytest.mark.slow
def test_a_resumed_run_draws_the_same_curves(run, monkeypatch):
    monkeypatch.setitem(dcgan_mnist.PICTURES, "loss_curve.png", REAL_CURVES)
    run(*THREE_STEPS, "--epochs", 2, "--output-dir", "whole")
    run(*THREE_STEPS, "--epochs", 1)
    assert run("--resume", "--epochs", 2).code == 0
    assert_same_run("result", "whole")


@pytest.mark.usefixtures("mean_scorer")
def test_a_resumed_run_with_scores_ends_bit_identical(run):
    run(*THREE_STEPS, "--epochs", 3, "--output-dir", "whole")
    run(*THREE_STEPS, "--epochs", 1)
    assert run("--resume", "--epochs", 3).code == 0
    assert_same_run("result", "whole")
    assert set(contents("whole")) == RUN_FILES | {"generated_epoch_003.png", "generator_best.pt"}


def test_a_resumed_run_in_bf16_ends_bit_identical(run):
    bf16 = (*THREE_STEPS, "--precision", "bf16")
    run(*bf16, "--epochs", 2, "--output-dir", "whole")
    run(*bf16, "--epochs", 1)
    run("--resume", "--epochs", 2)
    assert_same_run("result", "whole")


def test_where_a_run_ended_before_its_first_epoch_the_earlier_one_is_named(
    run, monkeypatch: pytest.MonkeyPatch
):
    run(*THREE_STEPS, "--epochs", 1)
    run(*THREE_STEPS, "--epochs", 1)
    with monkeypatch.context() as patch:
        change_steps(patch, lambda number, figures: figures * torch.nan)
        assert run(*THREE_STEPS, "--epochs", 1).code == 1
    earlier = str(Path("result/previous_002"))
    for command in (["--resume"], ["--generate", 3]):
        assert run(*command).is_one_line(1, "error: ", "train first", earlier)
    assert run("--resume", "--epochs", 2, "--output-dir", earlier).code == 0


def test_settings_come_from_the_checkpoint(run):
    shaped = (*THREE_STEPS, "--lr", 0.001, "--beta1", 0.6, "--beta2", 0.9, "--ema", 0.5)
    shaped += ("--generator-steps", 2)
    shaped += ("--seed", 7)
    run(*shaped, "--epochs", 2, "--output-dir", "whole")
    run(*shaped, "--epochs", 1)
    run("--resume", "--epochs", 2)
    assert_same_run("result", "whole")
    run(*THREE_STEPS, "--epochs", 2, "--output-dir", "other")
    assert contents("other")["history.csv"] != contents("whole")["history.csv"]


def test_a_recipe_is_kept_by_a_resumed_run(run):
    tuned = (*THREE_STEPS, "--recipe", "tuned", "--lr", 0.001)
    run(*tuned, "--epochs", 3, "--output-dir", "whole")
    run(*tuned, "--epochs", 1)
    assert run("--resume", "--epochs", 2).code == 0
    assert run("--resume", "--epochs", 3, "--recipe", "tuned").code == 0
    assert_same_run("result", "whole")
    kept = saved()["settings"]
    assert kept["recipe"] == "tuned"
    assert kept["lr"] == 0.001
    assert kept["beta2"] == 0.99


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("name", "kept", "given"),
    [
        ("batch-size", 20, 10),
        ("lr", 0.0002, 0.1),
        ("beta1", 0.5, 0.9),
        ("beta2", 0.999, 0.9),
        ("generator-steps", 1, 2),
        ("ema", 0.05, 0.5),
        ("seed", 0, 1),
        ("width", 4, 128),
        ("latent-dim", 8, 100),
        ("recipe", "article", "tuned"),
        ("split", "test", "train"),
        ("precision", "fp32", "bf16"),
    ],
)
def test_another_value_with_resume_is_refused_naming_both(
    run, name: str, kept: object, given: object
):
    run(*THREE_STEPS, "--epochs", 1, "--precision", "fp32")
    before = contents(".")
    outcome = run("--resume", "--epochs", 2, f"--{name}", given)
    assert outcome.is_one_line(2, f"error: argument --{name}: ", str(kept), str(given))
    assert contents(".") == before
    assert run("--resume", "--epochs", 2, f"--{name}", kept).code == 0


def change_settings(change: Callable[[dict], object]) -> None:
    """Change what the checkpoint keeps of the settings, as other versions of the program may."""
    content = saved()
    change(content["settings"])
    torch.save(content, "result/checkpoint.pt")


def test_a_setting_that_a_checkpoint_lacks_takes_its_default(run):
    run(*THREE_STEPS, "--epochs", 2, "--output-dir", "whole")
    run(*THREE_STEPS, "--epochs", 1)
    for name in ("ema", "generator_steps", "recipe"):
        change_settings(lambda settings, name=name: settings.pop(name))
    assert run("--generate", 3).code == 0
    Path("result/generated.png").unlink()
    Path("result/generated.npy").unlink()
    outcome = run("--resume", "--epochs", 2, "--ema", 0.5)
    assert outcome.is_one_line(2, "error: argument --ema: ", "0.05", "0.5")
    assert run("--resume", "--epochs", 2).code == 0
    assert_same_run("result", "whole")


class Deeper(dcgan_mnist.Generator):
    """A generator with a layer more, as someone may try."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.layers.append(torch.nn.Conv2d(1, 1, kernel_size=1))


class Wider(dcgan_mnist.Generator):
    """A generator with the same layers, but other sizes."""

    def __init__(self, latent_dim: int, width: int) -> None:
        super().__init__(latent_dim, width + 1)


@pytest.mark.few(2)
@pytest.mark.parametrize("network", [Deeper, Wider])
@pytest.mark.parametrize(
    "command", [["--resume"], ["--generate", 3], ["--interpolate"], ["--evaluate"]]
)
@pytest.mark.usefixtures("known_digits")
def test_a_file_of_other_networks_is_not_called_damaged(
    run, monkeypatch, command: list, network: type
):
    run(*THREE_STEPS, "--epochs", 1)
    before = contents(".")
    monkeypatch.setattr(dcgan_mnist, "Generator", network)
    outcome = run(*command)
    path = Path("result/checkpoint.pt")
    assert outcome.is_one_line(1, f"error: {path} holds other networks than dcgan_mnist.py")
    assert "damaged" not in outcome.err
    assert contents(".") == before


@pytest.mark.few(1)
@pytest.mark.parametrize("begun", ["fp32", "bf16"])
def test_auto_precision_with_resume_is_that_of_the_run_on_any_hardware(
    run, monkeypatch, begun: str
):
    monkeypatch.setattr(dcgan_mnist, "has_bf16", lambda _: begun == "bf16")
    run(*THREE_STEPS, "--epochs", 2, "--output-dir", "whole")
    run(*THREE_STEPS, "--epochs", 1)
    assert saved()["settings"]["precision"] == begun
    monkeypatch.setattr(dcgan_mnist, "has_bf16", lambda _: begun != "bf16")
    outcome = run("--resume", "--epochs", 2, "--precision", "auto")
    assert (outcome.code, outcome.err) == (0, "")
    assert f"on cpu in {begun}" in outcome.out
    assert_same_run("result", "whole")


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["one pixel changed", "one digit less", "fewer than a batch"])
def test_a_run_goes_on_with_no_other_digits_than_its_own(
    run, data_dir: Path, whole: Path, kind: str
):
    run(*THREE_STEPS, "--epochs", 1)
    shutil.copytree(data_dir, "other")
    digits = write_split(data_dir, 60)
    if kind == "one pixel changed":
        digits[59, 27, 27] ^= 1
    elif kind == "one digit less":
        digits = digits[:59]
    else:
        digits = digits[:5]
    write_idx(Path("other/t10k-images-idx3-ubyte"), digits)
    before = contents(".")
    outcome = run("--resume", "--epochs", 4, "--data-dir", "other")
    assert outcome.is_one_line(2, "error: argument --data-dir: ", "holds other pictures")
    assert contents(".") == before

    shutil.copytree(data_dir, "same")
    assert run("--resume", "--epochs", 4, "--data-dir", "same").code == 0
    assert_same_run("result", whole)


@pytest.mark.usefixtures("mean_scorer")
def test_resume_alone_goes_on_to_the_epochs_that_the_run_was_to_have(run, monkeypatch):
    run(*THREE_STEPS, "--epochs", 3, "--output-dir", "whole")
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        run(*THREE_STEPS, "--epochs", 3)
    assert saved()["epoch"] == 1
    assert run("--resume").code == 0
    assert_same_run("result", "whole")
    assert saved()["epochs"] == saved("whole")["epochs"] == 3
    assert run("--resume", "--epochs", 4).code == 0
    outcome = run("--resume")
    assert (outcome.code, outcome.err) == (0, "")
    assert "result already has 4 epochs" in outcome.out


def test_a_finished_run_says_so_and_stays_as_it_is(run, whole: Path):
    shutil.copytree(whole, "result")
    outcome = run("--resume", "--epochs", 4)
    assert (outcome.code, outcome.err) == (0, "")
    assert "result already has 4 epochs" in outcome.out
    assert "larger --epochs" in outcome.out
    assert contents("result") == contents(whole)


def test_the_log_names_the_time_left_after_each_epoch(run, monkeypatch):
    clock = 0

    def change(step: int, stats: torch.Tensor) -> torch.Tensor:
        nonlocal clock
        clock += 60
        return stats

    change_steps(monkeypatch, change)
    monkeypatch.setattr(time, "perf_counter", lambda: clock)
    times = re.compile(r"^saved to result after (\d\d:\d\d), (\d\d:\d\d) left$", re.MULTILINE)
    out = run(*THREE_STEPS, "--epochs", 2).out
    assert times.findall(out) == [("03:00", "03:00"), ("06:00", "00:00")]
    out = run("--resume", "--epochs", 5).out
    assert times.findall(out) == [("03:00", "06:00"), ("06:00", "03:00"), ("09:00", "00:00")]


def test_the_log_names_a_picture_to_look_at_and_shows_the_networks_once(run):
    out = run(*THREE_STEPS, "--epochs", 1, "--output-dir", "mine").out
    assert Path(re.search(r"^After each epoch, look at (.*)$", out, re.MULTILINE)[1]).exists()
    assert out.count("Total params") == 2
    assert "Total params" not in run("--resume", "--epochs", 2, "--output-dir", "mine").out
    assert "look at" not in run("--dry-run").out  # its folder is removed


# --------------------------------------------- stopping -------------------------------------------
@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("step", "signum"), [(4, signal.SIGINT), (8, signal.SIGTERM), (12, signal.SIGINT)]
)
def test_a_stopped_run_says_how_to_go_on_and_goes_on_exactly(
    run, whole: Path, monkeypatch, step: int, signum: int
):
    command = (*THREE_STEPS, "--epochs", 4)
    with monkeypatch.context() as patch:
        taken = stop_at(patch, step, signum)
        with dcgan_mnist.own_process():
            outcome = run(*command)
    epoch = (step - 1) // 3
    says = f"stopped: epoch {epoch} is saved; to continue, run the same command with --resume"
    assert outcome.is_one_line(128 + signum, says)
    assert taken[-1] == step
    assert saved()["epoch"] == epoch
    assert run(*command, "--resume").code == 0
    assert_same_run("result", whole)


def test_a_resumed_run_that_is_stopped_in_its_first_epoch_goes_on_exactly(
    run, whole: Path, monkeypatch
):
    run(*THREE_STEPS, "--epochs", 2)
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        outcome = run("--resume", "--epochs", 4)
    assert outcome.is_one_line(130, "stopped: epoch 2 is saved; ", "--resume")
    assert run("--resume", "--epochs", 4).code == 0
    assert_same_run("result", whole)


def test_a_run_stopped_before_its_first_checkpoint_begins_again(run, whole: Path, monkeypatch):
    command = (*THREE_STEPS, "--epochs", 4)
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        outcome = run(*command)
    assert outcome.is_one_line(130, "stopped: ", "run the same command")
    assert "--resume" not in outcome.err
    assert run(*command).code == 0
    assert_same_run("result", whole)


def test_a_new_run_stopped_in_its_first_epoch_does_not_offer_the_earlier_one(run, monkeypatch):
    run(*THREE_STEPS, "--epochs", 2)
    stop_at(monkeypatch, 2)
    outcome = run(*THREE_STEPS, "--epochs", 2)
    assert outcome.is_one_line(130, "stopped: ", "run the same command")
    assert "--resume" not in outcome.err


@pytest.mark.usefixtures("mean_scorer")
@pytest.mark.parametrize("name", ["load_pictures", "find_scorer", "announce"])
def test_ctrl_c_before_training_ends_with_one_line(run, monkeypatch, name: str):
    monkeypatch.setattr(dcgan_mnist, name, ctrl_c)
    outcome = run()
    assert outcome.is_one_line(130, "stopped: ", "run the same command")
    assert "--resume" not in outcome.err


@pytest.mark.usefixtures("mean_scorer")
@pytest.mark.few(1)
@pytest.mark.parametrize("command", [["--generate", 3], ["--interpolate"], ["--evaluate"]])
def test_ctrl_c_while_drawing_speaks_of_no_training_and_writes_nothing(
    run, monkeypatch, command: list
):
    run(*THREE_STEPS, "--epochs", 1)
    before = contents(".")
    monkeypatch.setattr(dcgan_mnist, "draw", ctrl_c)
    outcome = run(*command)
    assert outcome.is_one_line(130, "stopped: ", "run the same command")
    assert not re.search("train|epoch|resume|saved", outcome.err)
    assert contents(".") == before


# ---------------------------------------- real processes ------------------------------------------
PATIENCE = 120  # seconds after which a process that has not ended is killed


@pytest.fixture(scope="module")
def forks() -> BaseContext:
    """Processes forked from one that has imported the program, which takes seconds."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("needs processes that can be forked")
    from multiprocessing.forkserver import ensure_running

    context = multiprocessing.get_context("forkserver")
    # the last one is what torch's optimisers import when the first one is made, which takes as long
    context.set_forkserver_preload(["dcgan_mnist", "helpers", "torch._dynamo"])
    with pytest.MonkeyPatch.context() as patch:
        # without it the server finds no modules to preload, and says nothing
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        patch.setenv("OMP_NUM_THREADS", "1")
        ensure_running()
        first = context.Process()  # waits for the imports, which a test would take for its own
        first.start()
        first.join(PATIENCE)
    return context


def exit_code(process: BaseProcess) -> int:
    """Start a process and wait for its end."""
    process.start()
    process.join(PATIENCE)
    if process.exitcode is None:
        process.kill()
        pytest.fail("a process does not end")
    return process.exitcode


def run_silently(folder: Path, argv: list[str]) -> None:
    """Run a command line in a folder as the script does, but print to a file there."""
    os.chdir(folder)
    with (
        Path("printed.txt").open("a") as file,
        redirect_stdout(file),
        redirect_stderr(file),
        dcgan_mnist.own_process(),
    ):
        code = dcgan_mnist.main(argv)
    sys.exit(code)


def stop_twice(folder: Path, argv: list[str], first: int, second: int) -> None:
    """Run a command line that gets a second signal while it ends because of the first one."""

    def step(*_: object) -> torch.Tensor:
        try:
            signal.raise_signal(first)
        finally:
            signal.raise_signal(second)

    dcgan_mnist.training_step = step
    run_silently(folder, argv)


@pytest.mark.slow
@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_process_at_once(
    forks: BaseContext, data_dir: Path, tmp_path: Path, first: int, second: int
):
    argv = [*SMALL, "--device", "cpu", "--data-dir", str(data_dir)]
    process = forks.Process(target=stop_twice, args=(tmp_path, argv, first, second))
    assert exit_code(process) == -second


def run_quickly(folder: Path, argv: list[str]) -> None:
    """Run a command line with scores and pictures that take no time."""
    dcgan_mnist.PICTURES["loss_curve.png"] = grey_curves
    dcgan_mnist.find_scorer = lambda *_: MeanScorer({}, "test", torch.device("cpu"))
    run_silently(folder, argv)


def run_of(folder: Path) -> Path:
    """Return the result of a run without what was begun before its first checkpoint."""
    for path in folder.glob("result/previous_*"):
        assert "checkpoint.pt" not in contents(path)
        shutil.rmtree(path)
    return folder / "result"


def epochs_done(folder: Path) -> int:
    """Return how many epochs of a run in a folder are saved."""
    run = run_of(folder)
    return saved(run)["epoch"] if (run / "checkpoint.pt").exists() else 0


@pytest.mark.few(1)
@pytest.mark.parametrize("kills", [2, 30])
def test_kills_at_random_moments_lose_nothing(
    forks: BaseContext, data_dir: Path, tmp_path: Path, kills: int
):
    options = ["--epochs", "5", "--device", "cpu", "--data-dir", str(data_dir)]

    def run(folder: Path, seconds: float = PATIENCE) -> int:
        """Begin or go on with a run; kill it after some seconds, unless it has ended."""
        folder.mkdir(exist_ok=True)
        for path in folder.glob("result/.*.tmp"):  # half written by a command that was killed
            os.utime(path, (0, 0))  # long ago, so that the next one removes it
        begun = epochs_done(folder)
        argv = ["--resume"] if begun else [*SMALL, "--batch-size", "20"]
        process = forks.Process(target=run_quickly, args=(folder, argv + options))
        process.start()
        process.join(seconds)
        process.kill()
        process.join(PATIENCE)
        assert epochs_done(folder) >= begun
        return process.exitcode

    start = time.monotonic()
    assert run(tmp_path / "whole") == 0
    duration = time.monotonic() - start
    chance = random.Random(0)
    runs = 0
    while kills > 0:
        folder = tmp_path / f"run {runs}"
        code = run(folder, chance.uniform(0, duration))
        if code == 0:
            assert_same_run(run_of(folder), tmp_path / "whole" / "result")
            runs += 1
        else:
            assert code == -signal.SIGKILL
            kills -= 1
    folder = tmp_path / f"run {runs}"
    assert run(folder) == 0
    assert_same_run(run_of(folder), tmp_path / "whole" / "result")


# ---------------------------------------------- dry run -------------------------------------------
@pytest.fixture
def temporary(tmp_path: Path, monkeypatch) -> Path:
    """A folder in which temporary folders are made."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_a_dry_run_leaves_a_finished_run_alone_and_nothing_else_behind(run, temporary: Path):
    run(*THREE_STEPS, "--epochs", 2)
    before = contents(".")
    outcome = run("--dry-run", *THREE_STEPS)
    assert (outcome.code, outcome.err) == (0, "")
    assert "The dry run went well" in outcome.out
    assert contents(".") == before
    assert [path.name for path in Path().iterdir()] == ["result"]
    assert not any(temporary.iterdir())


def test_a_dry_run_in_an_empty_folder_leaves_it_empty(run, temporary: Path):
    assert run("--dry-run").code == 0
    assert not any(Path().iterdir())
    assert not any(temporary.iterdir())


@pytest.mark.parametrize("fault", ["it diverges", "it is stopped", "its batches are too large"])
def test_a_dry_run_that_fails_leaves_nothing_behind(run, temporary: Path, monkeypatch, fault: str):
    argv = ["--dry-run"]
    if fault == "it diverges":
        change_steps(monkeypatch, lambda _, stats: stats * torch.inf)
    elif fault == "it is stopped":
        stop_at(monkeypatch, 3)
    else:
        argv += ["--batch-size", 61]
    outcome = run(*argv)
    assert outcome.code in (1, 2, 130)
    assert outcome.is_one_line(outcome.code)
    assert "--resume" not in outcome.err
    assert "is removed" not in outcome.out
    assert "went well" not in outcome.out
    assert not any(Path().iterdir())
    assert not any(temporary.iterdir())


def test_a_dry_run_takes_three_steps_in_each_of_two_epochs(run):
    out = run("--dry-run", "--epochs", 9, "--batch-size", 10, "--log-every", 1).out
    epochs = [line for line in out.splitlines() if line.startswith("Epoch")]
    assert epochs == ["Epoch 1/2", "Epoch 2/2"]
    assert out.count("/3) ds_loss") == 6


def test_a_dry_run_writes_to_a_folder_that_is_named(run, temporary: Path):
    assert run("--dry-run", "--output-dir", "dry").code == 0
    assert set(contents("dry")) == RUN_FILES
    assert not any(temporary.iterdir())


def test_a_dry_run_is_refused_where_a_run_is(run):
    run(*THREE_STEPS, "--epochs", 1)
    before = contents(".")
    outcome = run("--dry-run", "--output-dir", "result")
    assert outcome.is_one_line(2, "error: argument --output-dir: ", "result already holds")
    assert contents(".") == before


def test_a_dry_run_cannot_be_gone_on_with(run):
    run("--dry-run", "--output-dir", "dry")
    before = contents(".")
    outcome = run("--resume", "--output-dir", "dry")
    assert outcome.is_one_line(2, "error: argument --resume: ", "dry run")
    assert contents(".") == before


# ---------------------------------------------- drawing -------------------------------------------
def drawn(folder: str = "result") -> np.ndarray:
    """Return the digits that --generate drew last."""
    return np.load(Path(folder, "generated.npy"))


def drawn_by(generator: dcgan_mnist.Generator, count: int) -> np.ndarray:
    """Return the digits that --generate draws with a generator in fp32."""
    latent_dim = generator.layers[0].in_channels
    z = dcgan_mnist.make_noise(count, latent_dim, 0, dcgan_mnist.DRAWING)
    return dcgan_mnist.draw(generator, z).numpy()


def test_generate_draws_digits_without_training(run):
    run(*THREE_STEPS, "--epochs", 1)
    before = contents(".")
    outcome = run("--generate", 123)
    assert (outcome.code, outcome.err) == (0, "")
    paths = [Path("result", name) for name in ("generated.png", "generated.npy")]
    assert outcome.out == f"saved {paths[0]} and {paths[1]}\n"
    after = contents(".")
    assert set(after) - set(before) == {"result/generated.npy", "result/generated.png"}
    assert after.items() >= before.items()
    assert drawn().shape == (123, 28, 28)
    assert drawn().dtype == np.uint8
    assert size_of("result/generated.png") == (604, 604)
    first = digits_in("result/generated.png", rows=10)
    assert torch.equal(first, torch.from_numpy(drawn()[:100]))


def test_generate_one_gives_a_picture_of_one_digit(run):
    run(*THREE_STEPS, "--epochs", 1)
    run("--generate", 1)
    assert drawn().shape == (1, 28, 28)
    assert size_of("result/generated.png") == (64, 64)


def test_generate_follows_the_seed(run):
    run("--epochs", 3, "--batch-size", 10, "--lr", 0.02, "--seed", 3)
    digits = []
    for seed in ([], ["--seed", 0], ["--seed", 1]):
        assert run("--generate", 5, *seed).code == 0
        digits.append(drawn())
    assert (digits[0] == digits[1]).all()
    assert (digits[0] != digits[2]).any()


@pytest.mark.usefixtures("mean_scorer")
def test_generate_draws_what_was_scored_last(run, monkeypatch):
    scored = []

    class Spy(MeanScorer):
        def __call__(self, digits: torch.Tensor) -> dict[str, float]:
            scored.append(digits)
            return super().__call__(digits)

    monkeypatch.setattr(dcgan_mnist, "Scorer", Spy)
    run(*THREE_STEPS, "--epochs", 3, "--lr", 0.01)
    run("--generate", 20)
    assert (drawn() == scored[-1][:20].numpy()).all()
    assert (drawn() != scored[0][:20].numpy()).any()


@pytest.mark.parametrize(("width", "latent_dim"), [(3, 5), (5, 3)])
def test_a_generator_of_any_size_draws_in_python_what_the_command_draws(
    run, width: int, latent_dim: int
):
    size = ("--width", width, "--latent-dim", latent_dim)
    run(*THREE_STEPS, "--epochs", 1, "--lr", 0.02, "--precision", "fp32", *size)
    run("--generate", 20)
    generator = dcgan_mnist.load_generator("result")
    assert generator.layers[0].in_channels == latent_dim
    assert generator.layers[-2].in_channels == width
    assert (drawn() == drawn_by(generator, 20)).all()


def test_generate_draws_in_the_precision_of_the_run_on_any_hardware(run, monkeypatch):
    run(*THREE_STEPS, "--epochs", 1, "--precision", "bf16", "--lr", 0.02)
    digits = []
    for there in (True, False):
        monkeypatch.setattr(dcgan_mnist, "has_bf16", lambda _, there=there: there)
        assert run("--generate", 50).code == 0
        digits.append(drawn())
    assert (digits[0] == digits[1]).all()
    generator = dcgan_mnist.load_generator("result")
    z = dcgan_mnist.make_noise(50, 8, 0, dcgan_mnist.DRAWING)
    assert (digits[0] != dcgan_mnist.draw(generator, z, "fp32").numpy()).any()


def test_generating_many_digits_takes_bounded_memory(run, monkeypatch):
    run(*THREE_STEPS, "--epochs", 1)
    sizes = []
    original = dcgan_mnist.Generator.forward

    def spy(self: dcgan_mnist.Generator, z: torch.Tensor) -> torch.Tensor:
        sizes.append(len(z))
        return original(self, z)

    monkeypatch.setattr(dcgan_mnist.Generator, "forward", spy)
    assert run("--generate", 10_000).code == 0
    assert max(sizes) <= 500
    assert drawn().shape == (10_000, 28, 28)


def judge_as(monkeypatch: pytest.MonkeyPatch, kind: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Let the classifier be 0.9 sure that a drawing is the digit ``kind(drawings)``, (n,)."""

    def judge(_: object, digits: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, torch.nn.functional.one_hot(kind(digits), 10).double() * 0.9

    monkeypatch.setattr(dcgan_mnist.Classifier, "judge", judge)


def sum_of_pixels(digits: torch.Tensor) -> torch.Tensor:
    """Return a number from 0 to 9 for each drawing (n, 28, 28)."""
    return digits.flatten(1).long().sum(dim=1) % 10


@pytest.mark.few(1)
@pytest.mark.parametrize("digit", [0, 7])
def test_generate_draws_only_the_digit_asked_for(run, monkeypatch, digit: int):
    run(*THREE_STEPS, "--epochs", 1, "--lr", 0.02)
    judge_as(monkeypatch, sum_of_pixels)
    before = contents("result")
    outcome = run("--generate", 450, "--digit", digit)
    assert (outcome.code, outcome.err) == (0, "")
    chosen = drawn()
    assert chosen.shape == (450, 28, 28)
    assert chosen.dtype == np.uint8
    assert (sum_of_pixels(torch.from_numpy(chosen)) == digit).all()
    assert len(np.unique(chosen, axis=0)) > 400
    assert set(contents("result")) - set(before) == {"generated.npy", "generated.png"}
    run("--generate", 450, "--digit", digit)
    assert (drawn() == chosen).all()
    run("--generate", 450, "--digit", digit, "--seed", 1)
    assert (drawn() != chosen).any()


@pytest.mark.parametrize(("in_200", "code"), [(200, 0), (201, 1)])
def test_a_digit_that_is_too_rare_is_one_clear_line_and_nothing_is_written(
    run, monkeypatch, in_200: int, code: int
):
    run(*THREE_STEPS, "--epochs", 1)
    before = contents("result")
    judge_as(monkeypatch, lambda digits: 3 * (torch.arange(1, len(digits) + 1) % in_200 == 0))
    outcome = run("--generate", 5, "--digit", 3)
    assert outcome.code == code
    if code == 1:
        assert outcome.is_one_line(1, "error: only 9 of 2,000 drawings are a clear 3")
        assert contents("result") == before


def test_interpolate_draws_ten_walks_without_training(run):
    run("--epochs", 2, "--batch-size", 10, "--lr", 0.02)
    before = contents(".")
    outcome = run("--interpolate")
    assert (outcome.code, outcome.err) == (0, "")
    after = contents(".")
    assert set(after) - set(before) == {"result/interpolation.png"}
    assert after.items() >= before.items()
    rows = digits_in("result/interpolation.png", rows=10).view(10, 10, 28, 28)
    run("--generate", 20)
    ends = torch.from_numpy(drawn()).int()
    assert (rows[:, 0] - ends[:10]).abs().max() <= 1
    assert (rows[:, -1] - ends[10:]).abs().max() <= 1
    run("--interpolate", "--seed", 1)
    assert contents(".")["result/interpolation.png"] != after["result/interpolation.png"]


def test_walks_go_along_the_sphere_in_equal_steps():
    stream = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 5, 100, 1, 1, generator=stream)
    steps = dcgan_mnist.walk(a, b).view(5, 10, 100)
    torch.testing.assert_close(steps[:, 0], a.flatten(1))
    torch.testing.assert_close(steps[:, -1], b.flatten(1))
    a, b = 3 * torch.eye(100)[:2].view(2, 1, 100, 1, 1)
    steps = dcgan_mnist.walk(a, b).view(10, 100)
    torch.testing.assert_close(steps.norm(dim=1), torch.full((10,), 3.0))
    angles = torch.atan2(steps[:, 1], steps[:, 0])
    torch.testing.assert_close(angles, torch.linspace(0, torch.pi / 2, 10))


@pytest.mark.parametrize("command", [["--generate", 5], ["--interpolate"], ["--evaluate"]])
@pytest.mark.parametrize(
    ("best", "name"), [([], "checkpoint.pt"), (["--best"], "generator_best.pt")]
)
def test_drawing_needs_a_trained_generator_and_leaves_nothing_without(
    run, tmp_path: Path, monkeypatch, command: list, best: list[str], name: str
):
    monkeypatch.setattr(dcgan_mnist, "EXAMPLE", tmp_path / "the program came without it.pt")
    path = Path("result", name)
    assert run(*command, *best).is_one_line(1, f"error: there is no {path}", "train first")
    assert not any(Path().iterdir())


# -------------------------------------- the included generator ------------------------------------
@pytest.fixture
def small_example(run, tmp_path: Path, monkeypatch) -> Path:
    """A small trained generator in the place of the one that comes with the program.

    That one takes half a minute to draw the digits of a score.
    """
    maker = load_script(ROOT / "result" / "example" / "make_example.py")
    folder = tmp_path / "trained"
    run(*THREE_STEPS, "--epochs", 2, "--lr", 0.02, "--precision", "bf16", "--output-dir", folder)
    path = folder / "generator.pt"
    torch.save(maker.rounded(dcgan_mnist.read_checkpoint(folder / "checkpoint.pt")), path)
    monkeypatch.setattr(dcgan_mnist, "EXAMPLE", path)
    return path


@pytest.mark.usefixtures("mean_scorer")
@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("command", "names"),
    [
        (["--generate", 3], ["generated.npy", "generated.png"]),
        (["--interpolate"], ["interpolation.png"]),
        (["--evaluate"], ["nearest.png", "score.json"]),
    ],
)
@pytest.mark.parametrize("best", [[], ["--best"]])
def test_without_a_run_the_included_generator_draws_and_one_line_says_so(
    run, small_example: Path, command: list, names: list[str], best: list[str]
):
    outcome = run(*command, *best)
    assert (outcome.code, outcome.err) == (0, "")
    line = f"result holds no run: using the included generator, {small_example}"
    assert outcome.out.splitlines().count(line) == 1
    assert list(contents(".")) == [f"result/{name}" for name in names]


def test_an_included_generator_is_that_of_its_run_with_rounded_weights(small_example: Path):
    content = dcgan_mnist.read_checkpoint(small_example)
    whole = saved(small_example.parent)
    run = dcgan_mnist.load_generator(small_example.parent).state_dict()
    loaded = dcgan_mnist.load_generator().state_dict()
    for name, weight in content["average"].items():
        assert weight.dtype in (torch.float16, torch.int64)
        assert loaded[name].dtype == run[name].dtype
        assert torch.equal(loaded[name], run[name].to(weight.dtype).to(run[name].dtype))
    assert content["settings"].precision == "fp32"
    for name in ("epoch", "data", "made_with"):
        assert content[name] == whole[name]


def test_the_included_generator_draws_the_same_digits_as_in_python(run):
    outcome = run("--generate", 20)
    assert str(ROOT / "result" / "example" / "generator.pt") in outcome.out
    assert (drawn() == drawn_by(dcgan_mnist.load_generator(), 20)).all()


def test_a_run_in_the_output_folder_comes_before_the_included_generator(run):
    run(*THREE_STEPS, "--epochs", 1, "--precision", "fp32")
    outcome = run("--generate", 20)
    assert "included" not in outcome.out
    own = drawn_by(dcgan_mnist.load_generator("result"), 20)
    assert (drawn() == own).all()
    assert (own != drawn_by(dcgan_mnist.load_generator(), 20)).any()


@pytest.mark.parametrize("folder", ["named", "result"])
def test_a_named_folder_without_a_run_stays_an_error(run, folder: str):
    Path("named").mkdir()
    path = Path(folder, "checkpoint.pt")
    for command in (["--generate", 3], ["--interpolate"], ["--evaluate"]):
        outcome = run(*command, "--output-dir", folder)
        assert outcome.is_one_line(1, f"error: there is no {path}", "train first")
    assert contents(".") == {}


# --------------------------------------------- evaluate -------------------------------------------
def score(of_file: str = "") -> dict:
    """Return what is in the file with the score of the run, or of a file."""
    name = f"{of_file}_score.json" if of_file else "score.json"
    return json.loads(Path("result", name).read_text())


@pytest.mark.usefixtures("mean_scorer")
def test_evaluate_scores_the_run_with_10_000_digits(run):
    run(*THREE_STEPS, "--epochs", 1)
    before = contents("result")
    outcome = run("--evaluate")
    assert (outcome.code, outcome.err) == (0, "")
    after = contents("result")
    assert set(after) - set(before) == {"score.json", "nearest.png"}
    assert after.items() >= before.items()
    of_run = score()
    assert of_run["count"] == 10_000
    assert of_run["of"] == str(Path("result/checkpoint.pt"))
    assert of_run["seen"] == "test"
    assert of_run["compared_with"] == "train"
    assert of_run["scorer_sha256"] == dcgan_mnist.SCORER_SHA256
    assert of_run["floor"]["copies"] == 1.0
    assert f"fd{of_run['fd']:>16.4g}{1:>14}" in outcome.out

    run("--generate", 10_000)
    run("--evaluate", "result/generated.npy")
    of_file = score("generated")
    assert of_file["of"] == str(Path("result/generated.npy"))
    for name in (*dcgan_mnist.SCORES, *DEPTH, "floor", "count", "seen"):
        assert of_file[name] == of_run[name]


@pytest.mark.usefixtures("mean_scorer")
def test_a_score_tells_of_which_run_it_is(run):
    run(*THREE_STEPS, "--epochs", 2, "--seed", 3, "--recipe", "tuned")
    for best in ([], ["--best"]):
        assert run("--evaluate", *best).code == 0
        of_run = score()
        checkpoint = torch.load(of_run["of"], weights_only=True)
        assert of_run["settings"] == checkpoint["settings"]
        assert of_run["settings"]["seed"] == 3
        assert of_run["epoch"] == checkpoint["epoch"]
        assert of_run["torch"] == torch.__version__


@pytest.mark.usefixtures("mean_scorer")
@pytest.mark.few(1)
@pytest.mark.parametrize("best", [[], ["--best"]])
def test_a_run_on_other_digits_is_not_scored(run, data_dir: Path, best: list[str]):
    run(*THREE_STEPS, "--epochs", 1)  # these count as MNIST's here
    write_split(data_dir, 50)
    run("--batch-size", 25, "--epochs", 1)
    if best:
        Path("result/checkpoint.pt").rename("result/generator_best.pt")
    before = contents("result")
    outcome = run("--evaluate", *best)
    assert outcome.is_one_line(
        2, "error: argument --evaluate: ", "the run in result", "cannot be scored"
    )
    assert contents("result") == before


@pytest.mark.slow
def test_evaluate_scores_real_digits_as_well_as_their_floor(run, tmp_path: Path):
    digits = dcgan_mnist.some(dcgan_mnist.bundled_digits("test"), 2000)
    np.save(tmp_path / "real.npy", digits.numpy())
    outcome = run("--evaluate", tmp_path / "real.npy", "--output-dir", "new/folder")
    assert (outcome.code, outcome.err) == (0, "")
    of_file = json.loads(Path("new/folder/real_score.json").read_text())
    assert of_file["count"] == 2000
    assert outcome.warnings() == []
    for name, floor in of_file["floor"].items():
        assert of_file[name] == pytest.approx(floor, rel=0.02)
    rows = {line.split()[0]: line.split()[1:] for line in outcome.out.splitlines()[2:-2]}
    assert list(rows) == [*dcgan_mnist.SCORES, *DEPTH]
    assert rows["digits"] == ["10", "10"]
    assert set(contents("new/folder")) == {"real_score.json", "real_nearest.png"}


@pytest.mark.usefixtures("mean_scorer")
@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("count", "warned"), [(20, True), (1999, True), (2000, False), (3000, False)]
)
def test_few_digits_are_warned_of_and_stand_beside_as_many_real_ones(run, count: int, warned: bool):
    real = dcgan_mnist.bundled_digits("train")
    np.save("digits.npy", real[:count].numpy())
    outcome = run("--evaluate", "digits.npy", "--split", "train")
    floor = 1.0 if count == 2000 else dcgan_mnist.some(real, count).float().mean().item()
    assert score("digits")["floor"]["fd"] == floor
    assert score("digits")["seen"] == "train"
    assert f"{count:,} digits of a model that has seen MNIST's train split" in outcome.out
    assert re.search(rf"^fd +\S+ +{floor:.4g}$", outcome.out, re.MULTILINE)
    assert len(outcome.warnings()) == warned
    if warned:
        assert f"FD depends on the number of pictures, and {count:,} " in outcome.warnings()[0]


@pytest.mark.usefixtures("mean_scorer")
def test_dark_digits_on_light_are_warned_of(run):
    digits = dcgan_mnist.bundled_digits("test")[:2000]
    np.save("light.npy", digits.numpy())
    np.save("dark.npy", 255 - digits.numpy())
    assert run("--evaluate", "light.npy").warnings() == []
    (warning,) = run("--evaluate", "dark.npy").warnings()
    assert "dark.npy is darker in the middle" in warning
    assert "MNIST is light on dark" in warning

    digits = torch.zeros(2000, 28, 28, dtype=torch.uint8)
    digits[:, 2] = 255  # belongs to neither
    digits[:, 7:21, 7:21] = 50  # the middle
    rim = torch.ones(28, 28, dtype=torch.bool)
    rim[2:-2, 2:-2] = False
    digits[:, rim] = 48
    np.save("between.npy", digits.numpy())
    assert run("--evaluate", "between.npy").warnings() == []


@pytest.mark.usefixtures("mean_scorer")
def test_the_score_of_a_file_and_that_of_a_run_stand_side_by_side_and_stay_where_they_are(run):
    run(*THREE_STEPS, "--epochs", 1)
    run("--evaluate")
    before = contents("result")
    np.savez("my.model.npz", dcgan_mnist.bundled_digits("test")[:2000].numpy())
    outcome = run("--evaluate", "my.model.npz")
    files = {"my.model_score.json", "my.model_nearest.png"}
    assert set(contents("result")) - set(before) == files
    assert contents("result").items() > before.items()
    assert all(str(Path("result", name)) in outcome.out for name in files)
    of_file = {name: contents("result")[name] for name in files}
    run(*THREE_STEPS, "--epochs", 1)
    assert contents("result").items() > of_file.items()
    assert "previous_001/score.json" in contents("result")


@pytest.mark.usefixtures("mean_scorer")
@pytest.mark.few(1)
@pytest.mark.parametrize("split", ["test", "train"])
def test_nearest_shows_digits_above_the_real_ones_nearest_to_them(run, split: str):
    real = dcgan_mnist.bundled_digits(split)
    digits = real[20:40].clone()
    digits[:, :3] = 9
    np.save("digits.npy", digits.numpy())
    assert run("--evaluate", "digits.npy", "--split", split).code == 0
    rows = digits_in("result/digits_nearest.png", rows=4).view(4, 10, 28, 28)
    assert torch.equal(rows[0], digits[:10])
    assert torch.equal(rows[1], real[20:30])
    assert torch.equal(rows[2], digits[10:])
    assert torch.equal(rows[3], real[30:40])


class Bomb:
    """An object that writes a file when it is unpickled."""

    def __reduce__(self) -> tuple:
        return Path.write_text, (Path("exploded"), "!")


FIVE = np.full((5, 28, 28), 9, np.uint8)
NO_DIGITS = {
    "float": np.zeros((5, 28, 28)),
    "flat": np.zeros((5, 784), np.uint8),
    "colour": np.zeros((5, 28, 28, 3), np.uint8),
    "code": np.array([Bomb()]),
    "one": np.full((1, 28, 28), 9, np.uint8),
    "none": np.zeros((0, 28, 28), np.uint8),
    "black": np.zeros((5, 28, 28), np.uint8),
    "zeros and ones": np.arange(5 * 784, dtype=np.uint8).reshape(5, 28, 28) % 2,
}


@pytest.mark.usefixtures("mean_scorer")
@pytest.mark.parametrize(
    "kind", ["missing", "text", "picture", "arrays", "archive", "folder", *NO_DIGITS]
)
def test_files_that_hold_no_digits_are_refused(run, kind: str):
    path = Path("digits.npy")
    if kind == "text":
        path.write_text("digits")
    elif kind == "picture":
        dcgan_mnist.grid(torch.zeros(1, 28, 28).byte()).save(path, "PNG")
    elif kind == "arrays":
        with path.open("wb") as file:
            np.savez(file, one=FIVE, two=FIVE)
    elif kind == "archive":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("digits.txt", "7")
    elif kind == "folder":
        path.mkdir()
    elif kind in NO_DIGITS:
        np.save(path, NO_DIGITS[kind])
    outcome = run("--evaluate", path)
    accepted = (".npy", ".npz", "uint8", "(n, 28, 28)")
    assert outcome.is_one_line(2, "error: argument --evaluate: ", "digits.npy", *accepted)
    assert "pickle" not in outcome.err or kind == "code"
    assert not Path("result").exists()
    assert not Path("exploded").exists()


# ------------------------------------------ the best epoch ----------------------------------------
def test_the_generator_of_the_best_epoch_is_kept_named_and_draws(run, fake_scores):
    run(*THREE_STEPS, "--epochs", 2, "--output-dir", "two")
    fake_scores([30.0, 20.0, 25.0], [10] * 3)
    out = run(*THREE_STEPS, "--epochs", 3).out
    last_line = "The best epoch was 2; --generate N --best draws from its generator_best.pt"
    assert out.splitlines()[-1] == last_line
    for command in (["--generate", 5], ["--interpolate"]):
        assert run(*command, "--output-dir", "two").code == 0
        assert run(*command, "--best").code == 0
    walks = contents("two")["interpolation.png"]
    assert (drawn("two") == drawn()).all()
    assert contents("result")["interpolation.png"] == walks
    for command in (["--generate", 5], ["--interpolate"]):
        assert run(*command).code == 0
    assert (drawn("two") != drawn()).any()
    assert contents("result")["interpolation.png"] != walks


def test_the_best_epoch_is_remembered_by_a_resumed_run(run, fake_scores):
    fake_scores([20.0, 30.0], [10] * 2)
    run(*THREE_STEPS, "--epochs", 2)
    best = contents("result")["generator_best.pt"]
    fake_scores([25.0], [10])
    out = run("--resume", "--epochs", 3).out
    assert "The best epoch was 1" in out
    assert contents("result")["generator_best.pt"] == best
    fake_scores([15.0], [10])
    out = run("--resume", "--epochs", 4).out
    assert "The best epoch" not in out  # it is the last one, which draws anyway
    assert torch.load("result/generator_best.pt", weights_only=True)["epoch"] == 4


def test_a_new_run_does_not_draw_with_the_best_generator_of_an_earlier_one(
    run, fake_scores, monkeypatch
):
    fake_scores([20.0], [10])
    run(*THREE_STEPS, "--epochs", 1)
    monkeypatch.setattr(dcgan_mnist, "SPLIT_OF_DIGITS", {})  # the next one will have no scores
    run(*THREE_STEPS, "--epochs", 1)
    outcome = run("--generate", 3, "--best")
    assert outcome.is_one_line(2, "error: argument --best: the run in result has no scores")


@pytest.mark.parametrize("argv", [[], ["--resume"], ["--dry-run"], ["--evaluate", "digits.npy"]])
def test_best_without_something_to_draw_is_refused(run, argv: list[str]):
    run(*THREE_STEPS, "--epochs", 1)
    np.save("digits.npy", np.zeros((5, 28, 28), np.uint8))
    before = contents(".")
    outcome = run("--best", *argv)
    assert outcome.is_one_line(2, "error: --best", "--generate", "--interpolate", "--evaluate")
    assert contents(".") == before
