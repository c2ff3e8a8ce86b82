import errno
import fcntl
import multiprocessing
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import small_program
import torch
from conftest import ROOT, contents, new_gan, write_split

import dcgan_mnist

OPTIONS = ("--batch-size", 20, "--log-every", 2)
SMALL_PROGRAM = ROOT / "tests" / "small_program.py"


def assert_same_run(a: str | Path, b: str | Path) -> None:
    first, second = contents(Path(a)), contents(Path(b))
    assert sorted(first) == sorted(second)
    assert [name for name in first if first[name] != second[name]] == []


@pytest.fixture
def whole(run) -> str:
    """A run of four epochs that nothing interrupted."""
    assert run(*OPTIONS, "--epochs", 4, "--output-dir", "whole").code == 0
    return "whole"


@pytest.mark.parametrize("stops", [[1], [2], [3], [1, 2], [1, 2, 3]])
def test_a_resumed_run_ends_bit_identical(run, whole: str, stops: list[int]):
    run(*OPTIONS, "--epochs", stops[0])
    for epochs in [*stops[1:], 4]:
        assert run("--resume", "--epochs", epochs).code == 0
    assert_same_run("result", whole)


def test_a_checkpoint_holds_all_that_is_needed(run):
    run(*OPTIONS, "--epochs", 2)
    state = torch.load("result/checkpoint.pt", weights_only=True)
    assert set(state) == {
        "generator",
        "discriminator",
        "average",
        "optimizer_g",
        "optimizer_d",
        "fixed_noise",
        "epoch",
        "settings",
        "history",
        "samples",
        "best_epoch",
        "best_fd",
    }
    assert state["epoch"] == 2
    assert state["history"].shape == (6, 9)
    options = dcgan_mnist.parse_options(["--device", "cpu"])
    dcgan_mnist.pick_hardware(options)
    assert state["settings"] == {
        "recipe": "article",
        "batch_size": 20,
        "lr": 0.0002,
        "beta1": 0.5,
        "beta2": 0.999,
        "ema": 0.99,
        "seed": 0,
        "split": "test",
        "precision": options.precision,
        "dry_run": False,
    }


def test_shaping_options_come_from_the_checkpoint(run, whole: str):
    shaped = ("--lr", 0.001, "--beta1", 0.6, "--seed", 7, *OPTIONS)
    run(*shaped, "--epochs", 2, "--output-dir", "shaped")
    run(*shaped, "--epochs", 1)
    run("--resume", "--epochs", 2)
    assert_same_run("result", "shaped")


@pytest.mark.parametrize(
    ("name", "kept", "given"),
    [
        ("batch-size", 20, 10),
        ("lr", 0.0002, 0.1),
        ("beta1", 0.5, 0.9),
        ("ema", 0.99, 0.5),
        ("seed", 0, 1),
        ("recipe", "article", "tuned"),
    ],
)
def test_another_value_with_resume_is_refused_naming_both(run, name: str, kept: object, given: object):
    run(*OPTIONS, "--epochs", 1)
    before = contents(Path())
    outcome = run("--resume", "--epochs", 2, f"--{name}", given)
    assert outcome.is_one_line(2, f"--{name}: ", str(kept), str(given))
    assert contents(Path()) == before
    assert run("--resume", "--epochs", 2, f"--{name}", kept).code == 0


def test_another_precision_with_resume_is_refused(run):
    run(*OPTIONS, "--epochs", 1, "--precision", "fp32")
    refused = run("--resume", "--epochs", 2, "--precision", "bf16")
    assert refused.is_one_line(2, "--precision", "fp32", "bf16")
    assert run("--resume", "--epochs", 2, "--precision", "fp32").code == 0


def test_a_run_in_bf16_resumes_bit_identical(run):
    bf16 = (*OPTIONS, "--precision", "bf16")
    run(*bf16, "--epochs", 2, "--output-dir", "whole")
    run(*bf16, "--epochs", 1)
    run("--resume", "--epochs", 2)
    assert_same_run("result", "whole")


def test_another_split_with_resume_is_refused(run):
    run(*OPTIONS, "--epochs", 1)
    assert run("--resume", "--split", "train").is_one_line(2, "--split", "test", "train")


def test_a_complete_run_says_so(run, whole: str):
    before = contents(Path(whole))
    outcome = run("--resume", "--epochs", 4, "--output-dir", whole)
    assert (outcome.code, outcome.err) == (0, "")
    assert "whole already holds 4 epochs" in outcome.out
    assert contents(Path(whole)) == before


def test_resume_needs_a_checkpoint(run):
    outcome = run("--resume")
    assert outcome.is_one_line(1, "error: ", "result/checkpoint.pt", "train first")
    assert not any(Path().iterdir())


@pytest.fixture(scope="module")
def forks() -> multiprocessing.context.ForkServerContext:
    """Processes forked from one that has imported the program, which takes seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["small_program"])
    return context


KILLS = 20


def test_20_kills_at_random_moments_lose_nothing(forks, tmp_path: Path):
    write_split(tmp_path / "data", 60)
    argv = [str(option) for option in OPTIONS]
    argv += ["--epochs", "5", "--device", "cpu", "--data-dir", str(tmp_path / "data"), "--no-score"]

    def start(folder: Path) -> multiprocessing.Process:
        folder.mkdir(exist_ok=True)
        resume = ["--resume"] if (folder / "result" / "checkpoint.pt").exists() else []
        process = forks.Process(target=small_program.run_silently, args=(folder, argv + resume))
        process.start()
        return process

    whole = start(tmp_path / "whole")
    whole.join()
    assert whole.exitcode == 0
    chance, kills, runs = random.Random(0), 0, 0
    while kills < KILLS:
        folder = tmp_path / f"run {runs}"
        process = start(folder)
        process.join(chance.uniform(0, 0.8))
        process.kill()
        process.join()
        if process.exitcode == 0:
            runs += 1
            assert_same_run(folder / "result", tmp_path / "whole" / "result")
        else:
            assert process.exitcode == -signal.SIGKILL
            kills += 1
    process = start(folder)
    process.join()
    assert process.exitcode == 0
    assert_same_run(folder / "result", tmp_path / "whole" / "result")


@pytest.fixture
def command(tmp_path: Path, data_dir: Path) -> Iterator[subprocess.Popen]:
    """The real command in a process of its own, in the midst of its second epoch."""
    line = [
        sys.executable,
        "-u",
        SMALL_PROGRAM,
        "--epochs",
        "100000",
        "--log-every",
        "1",
        "--no-score",
    ]
    line += ["--batch-size", "1", "--device", "cpu", "--data-dir", data_dir]
    with subprocess.Popen(
        list(map(str, line)),
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        for line in process.stdout:
            if "Epoch 2/" in line:
                break
        assert process.poll() is None
        yield process
        process.kill()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_signal_ends_the_command_with_a_way_to_go_on(command, signum: int):
    command.send_signal(signum)
    out, err = command.communicate()
    assert command.returncode == 128 + signum
    saved = 1 + out.count("saved to result")  # the first epoch was read before
    assert err.count("\n") == 1
    assert re.match(rf"dcgan_mnist.py: stopped: saved up to epoch {saved}; to go on: python ", err)
    assert err.endswith(" --resume\n")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_second_stop_signal_ends_at_once(signum: int):
    handler = signal.getsignal(signum)
    try:
        with pytest.raises(KeyboardInterrupt):
            dcgan_mnist.stop(signum, None)
        assert signal.getsignal(signum) == signal.SIG_DFL
    finally:
        signal.signal(signum, handler)


def interrupt(monkeypatch: pytest.MonkeyPatch, at: int, action) -> list[torch.Tensor]:
    """Have something happen after a training step; return the list of the steps' figures."""
    original, steps = dcgan_mnist.training_step, []

    def step(*args: object) -> torch.Tensor:
        stats = original(*args)
        steps.append(stats)
        return action(stats) if len(steps) == at else stats

    monkeypatch.setattr(dcgan_mnist, "training_step", step)
    return steps


def raise_sigint(stats: torch.Tensor) -> torch.Tensor:
    signal.raise_signal(signal.SIGINT)
    return stats


def test_the_command_that_a_stop_prints_goes_on_exactly(run, whole: str, monkeypatch):
    with monkeypatch.context() as patch:
        steps = interrupt(patch, 7, raise_sigint)
        outcome = run(*OPTIONS, "--epochs", 4)
    assert outcome.is_one_line(130, "stopped: saved up to epoch 2", "to go on: python ")
    assert len(steps) == 7  # of 12
    argv = shlex.split(outcome.err.split("python ", 1)[1])[1:]
    assert "--resume" in argv
    assert run(*argv).code == 0
    assert_same_run("result", whole)


def test_a_stop_in_the_first_epoch_says_that_nothing_is_saved(run, monkeypatch):
    interrupt(monkeypatch, 2, raise_sigint)
    outcome = run(*OPTIONS)
    assert outcome.is_one_line(130, "saved up to epoch 0", "to go on: ")
    assert "--resume" not in outcome.err


def test_ctrl_c_before_training_is_no_traceback(run, monkeypatch):
    def interrupted(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(dcgan_mnist, "load_digits", interrupted)
    assert run().is_one_line(130, "stopped: ")


def test_a_full_disk_ends_with_one_line_and_keeps_the_last_checkpoint(run, tmp_path: Path):
    disk = Path("disk")
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a small disk")
    try:
        outcome = run(*OPTIONS, "--epochs", 30, "--output-dir", "disk/result")
        assert outcome.is_one_line(1, "error: cannot write disk/result/", "No space left")
        assert not list(disk.rglob("*.tmp"))
        epochs = outcome.out.count("saved to disk/result")
        assert 1 <= epochs < 30
        shutil.copytree("disk/result", "result")
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    run(*OPTIONS, "--epochs", epochs + 1, "--output-dir", "whole")
    assert run("--resume", "--epochs", epochs + 1).code == 0
    assert contents(Path("result"))["checkpoint.pt"] == contents(Path("whole"))["checkpoint.pt"]


@pytest.mark.parametrize("name", ["generated_epoch_002.png", "history.csv", "checkpoint.pt"])
def test_a_failed_write_keeps_what_was_there(run, monkeypatch, name: str):
    run(*OPTIONS, "--epochs", 1)
    before = contents(Path("result"))

    def fsync(handle: int) -> None:
        if name in str(Path(f"/proc/self/fd/{handle}").readlink()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    outcome = run("--resume", "--epochs", 2)
    assert outcome.is_one_line(1, f"error: cannot write result/{name}", "No space left")
    after = contents(Path("result"))
    assert after["checkpoint.pt"] == before["checkpoint.pt"]
    assert after.get(name) == before.get(name)
    assert not [name for name in after if name.endswith(".tmp")]


def test_a_folder_deleted_during_the_run_ends_with_one_line(run, monkeypatch):
    def delete(stats: torch.Tensor) -> torch.Tensor:
        shutil.rmtree("result")
        return stats

    interrupt(monkeypatch, 5, delete)
    assert run(*OPTIONS).is_one_line(1, "error: cannot write result/", "No such file")


def seal(path: Path) -> None:
    """Give what torch.save wrote the check sum of a true checkpoint."""
    data = bytearray(path.read_bytes())
    data[-2:] = dcgan_mnist.CHECKSUM_LENGTH.to_bytes(2, "little")
    path.write_bytes(bytes(data) + dcgan_mnist.hashlib.sha256(data).digest())


class Bomb:
    def __reduce__(self) -> tuple:
        return Path.write_text, (Path("exploded"), "!")


def assert_refused(run, data: bytes) -> None:
    """Check that neither --resume nor --generate takes a checkpoint, or changes it."""
    path = Path("result/checkpoint.pt")
    path.write_bytes(data)
    files = sorted(contents(Path()))
    for mode in (("--resume", "--epochs", 9), ("--generate", 3)):
        outcome = run(*mode)
        assert outcome.is_one_line(1, "error: result/checkpoint.pt is ")
        assert path.read_bytes() == data
        assert sorted(contents(Path())) == files


@pytest.fixture
def sound(run) -> bytes:
    """The bytes of a sound checkpoint, in place."""
    run(*OPTIONS, "--epochs", 1)
    return Path("result/checkpoint.pt").read_bytes()


def test_checkpoints_cut_at_every_kilobyte_are_refused(run, sound: bytes):
    cuts = range(0, len(sound), 1024)
    assert len(cuts) > 100
    for cut in cuts:
        assert_refused(run, sound[:cut])


def test_checkpoints_with_one_of_200_bits_flipped_are_refused(run, sound: bytes):
    chance = random.Random(0)
    for _ in range(200):
        bit = chance.randrange(8 * len(sound))
        data = bytearray(sound)
        data[bit // 8] ^= 1 << bit % 8
        assert_refused(run, bytes(data))


def test_files_that_are_no_checkpoints_are_refused(run, sound: bytes):
    assert_refused(run, b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(5000))
    assert_refused(run, pickle.dumps(Bomb()))
    assert_refused(run, sound + b"\0")
    assert_refused(run, bytes(10))


@pytest.mark.parametrize("fault", ["code", "older layout", "newer layout", "other size", "no dictionary"])
def test_sealed_checkpoints_of_another_kind_are_refused(run, sound: bytes, fault: str):
    state = torch.load("result/checkpoint.pt", weights_only=True)
    if fault == "code":
        state["epoch"] = Bomb()
    elif fault == "older layout":
        del state["average"]
    elif fault == "newer layout":
        state["settings"]["curriculum"] = True
    elif fault == "other size":
        state["average"] = dcgan_mnist.Generator(8, 6).state_dict()
    elif fault == "no dictionary":
        state = [1, 2]
    path = Path("forged.pt")
    torch.save(state, path)
    seal(path)
    data = path.read_bytes()
    path.unlink()
    assert_refused(run, data)
    assert not Path("exploded").exists()


def test_a_loss_that_is_not_finite_stops_the_run_before_the_next_checkpoint(run, monkeypatch):
    run(*OPTIONS, "--epochs", 2, "--output-dir", "whole")
    interrupt(monkeypatch, 8, lambda stats: stats * torch.tensor([1, torch.inf, 1, 1, 1]))
    outcome = run(*OPTIONS, "--epochs", 4)
    assert outcome.is_one_line(1, "error: diverged", "at step 2 of Epoch 3/4", "--lr")
    assert Path("result/checkpoint.pt").read_bytes() == Path("whole/checkpoint.pt").read_bytes()


def test_a_weight_that_is_not_finite_stops_the_run_too(run, monkeypatch):
    gans = []
    original = dcgan_mnist.DCGAN.__init__

    def spy(self: dcgan_mnist.DCGAN, *args: object) -> None:
        original(self, *args)
        gans.append(self)

    def spoil(stats: torch.Tensor) -> torch.Tensor:
        gans[0].generator.layers[0].weight.data[0, 0] = torch.nan
        return stats

    monkeypatch.setattr(dcgan_mnist.DCGAN, "__init__", spy)
    interrupt(monkeypatch, 3, spoil)
    assert run(*OPTIONS).is_one_line(1, "diverged", "at step 3 of Epoch 1/10")
    assert not Path("result/checkpoint.pt").exists()


def test_figures_are_read_only_at_log_lines_and_at_the_end_of_an_epoch(run, monkeypatch):
    reads, steps = [], interrupt(monkeypatch, 0, None)
    original = torch.nn.utils.get_total_norm

    def spy(weights: list[torch.Tensor]) -> torch.Tensor:
        reads.append(len(steps))
        return original(weights)

    monkeypatch.setattr(torch.nn.utils, "get_total_norm", spy)
    run("--batch-size", 10, "--log-every", 4, "--epochs", 1)
    assert reads == [1, 5, 6]


def test_a_second_run_into_the_same_folder_is_refused(run):
    run(*OPTIONS, "--epochs", 1)
    before = contents(Path("result"))
    with dcgan_mnist.folder_lock(Path("result")):
        for mode in ((), ("--resume", "--epochs", 2)):
            assert run(*mode).is_one_line(1, "error: another run is using result")
    assert contents(Path("result")) == before
    assert run("--resume", "--epochs", 2).code == 0


def hold_lock(folder: Path, ready) -> None:
    lock = os.open(folder, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    ready.set()
    signal.pause()


def test_the_lock_of_a_killed_run_does_not_block(run, forks):
    Path("result").mkdir()
    ready = forks.Event()
    process = forks.Process(target=hold_lock, args=(Path("result").resolve(), ready))
    process.start()
    assert ready.wait(60)
    assert run(*OPTIONS).is_one_line(1, "another run")
    process.kill()
    process.join()
    assert run(*OPTIONS, "--epochs", 1).code == 0


def test_half_written_files_of_a_killed_run_are_removed(run):
    run(*OPTIONS, "--epochs", 1)
    for name in (".checkpoint.pt.tmp", ".generated_epoch_007.png.tmp", ".mine.tmp"):
        (Path("result") / name).write_bytes(b"half")
    run(*OPTIONS, "--epochs", 2)
    left = [path.name for path in Path("result").iterdir() if path.name.startswith(".")]
    assert left == [".mine.tmp"]


@pytest.mark.usefixtures("small_networks")
def test_a_checkpoint_survives_a_round_trip(tmp_path: Path):
    gan = new_gan(seed=3)
    stream = torch.Generator().manual_seed(0)
    z = torch.randn(5, dcgan_mnist.LATENT_DIM, 1, 1, generator=stream)
    dcgan_mnist.training_step(gan, torch.rand(5, 1, 28, 28, generator=stream), z)
    for name in ("a.pt", "b.pt"):
        dcgan_mnist.save_checkpoint(gan, tmp_path / name)
        gan = dcgan_mnist.load_checkpoint(tmp_path / name, torch.device("cpu"))
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
