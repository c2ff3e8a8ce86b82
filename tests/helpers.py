"""What several test files share: files in MNIST's format, small networks, looks at a run."""

import errno
import importlib.util
import os
import re
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import IO, NoReturn

import pytest
import torch
from PIL import Image
from torch import nn

import dcgan_mnist

ROOT = Path(dcgan_mnist.__file__).parent
LOG_LINE = re.compile(
    r"\((?P<step>\d+)/(?P<steps>\d+)\) ds_loss: (\d+\.\d{3}) - gn_loss: (\d+\.\d{3})"
    r" - true_out: ([01]\.\d{3}) - fake_out: ([01]\.\d{3})>>([01]\.\d{3})"
)
RUN_FILES = {  # of two epochs without scores
    "real_samples.png",
    "generated_epoch_001.png",
    "generated_epoch_002.png",
    "timeline.png",
    "training.gif",
    "loss_curve.png",
    "history.csv",
    "checkpoint.pt",
}
GRID_SIZE = (604, 304)  # ten digits by five, each 28 pixels and 2 between them, doubled
DEPTH = ("density", "coverage", "copies")
SMALL = ("--width", "4", "--latent-dim", "8")  # networks that take milliseconds on a CPU
THREE_STEPS = ("--batch-size", 20)  # an epoch of the data_dir fixture's digits


@dataclass
class Outcome:
    """What a command of the program came to."""

    code: int
    out: str
    err: str

    def is_one_line(self, code: int, *words: str) -> bool:
        """Whether it ended with this code and one line on stderr with these words."""
        lines = self.err.splitlines()
        return (
            self.code == code
            and len(lines) == 1
            and lines[0].startswith("dcgan_mnist.py: ")
            and all(word in lines[0] for word in words)
        )

    def warnings(self) -> list[str]:
        """Return the lines of the log that warn."""
        return [line for line in self.out.splitlines() if line.startswith("warning: ")]


def raising(error: BaseException) -> Callable[..., NoReturn]:
    """Return a function that raises an error, whatever it is called with."""

    def fail(*_: object, **__: object) -> NoReturn:
        raise error

    return fail


def finished(command: str | list, folder: Path, **environment: str) -> Outcome:
    """Run a command, on one thread since other tests need the other core, and wait for its end.

    What it prints is in the encoding that the environment names.
    """
    done = subprocess.run(
        command if isinstance(command, str) else [str(word) for word in command],
        shell=isinstance(command, str),
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        encoding=environment.get("PYTHONIOENCODING"),
        text=True,
        timeout=300,
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def load_script(path: Path) -> ModuleType:
    """Import a script that lies in no folder of modules."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_idx(path: Path, values: torch.Tensor) -> None:
    """Write a tensor of uint8 in the format of MNIST's files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">HBB{values.dim()}I", 0, 8, values.dim(), *values.shape)
    path.write_bytes(header + values.numpy().tobytes())


def write_split(data_dir: Path, count: int, split: str = "t10k") -> torch.Tensor:
    """Write a split of random digits in MNIST's format; return the digits."""
    digits = torch.randint(0, 256, (count, 28, 28), generator=torch.Generator().manual_seed(count))
    digits = digits.byte()
    write_idx(data_dir / f"{split}-images-idx3-ubyte", digits)
    return digits


def new_gan(**changes: object) -> dcgan_mnist.DCGAN:
    """Return small untrained networks on the CPU, with other settings only where they are given."""
    settings = dcgan_mnist.Settings(**({"width": 4, "latent_dim": 8} | changes))
    return dcgan_mnist.DCGAN(settings, torch.device("cpu"))


def batch(n: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random images (n, 1, 28, 28) in [-1, 1] and noise, the same for every call."""
    stream = torch.Generator().manual_seed(1)
    images = torch.rand(n, 1, 28, 28, generator=stream) * 2 - 1
    return images, torch.randn(n, 8, 1, 1, generator=stream)


def parameters(network: nn.Module) -> list[torch.Tensor]:
    """Return copies of a network's parameters."""
    return [p.detach().clone() for p in network.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    """Whether two lists of tensors are equal to the bit."""
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def contents(folder: Path | str) -> dict[str, bytes]:
    """Return the bytes of every file below a folder by its path in it."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


class MeanScorer:
    """A scorer without a classifier: the distance is the mean grey level."""

    def __init__(self, content: object, seen: str, device: torch.device) -> None:
        self.unseen = dcgan_mnist.UNSEEN[seen]
        floor = dict.fromkeys((*dcgan_mnist.SCORES, *DEPTH), 1.0)
        self.floors = {2000: floor, 10_000: floor}

    def __call__(self, digits: torch.Tensor) -> dict[str, float]:
        return {"fd": digits.float().mean().item(), "digits": 10, "evenness": 0.9, "confident": 0.5}

    def evaluate(self, digits: torch.Tensor, *_: torch.Tensor) -> dict[str, float]:
        return self(digits) | dict.fromkeys(DEPTH, 0.7)


def equal(a: object, b: object) -> bool:
    """Whether two checkpoints, or parts of them, hold the same values, to the bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        return a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def assert_same_run(a: Path | str, b: Path | str) -> None:
    """Check that two folders hold the same files with the same content, to the bit.

    How many epochs the runs were to have in the end, and where their digits lay, may differ.
    """
    first = contents(a)
    second = contents(b)
    assert sorted(first) == sorted(second)
    for name in first:
        if name.endswith(".pt"):
            one = torch.load(Path(a, name), weights_only=True)
            other = torch.load(Path(b, name), weights_only=True)
            for content in (one, other):
                content.pop("epochs", None)
                content["data"].pop("path")
            assert equal(one, other), name
        else:
            assert first[name] == second[name], name


def saved(folder: Path | str = "result") -> dict:
    """Return what is in the checkpoint of a folder."""
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=True)


def grey_curves(run: dcgan_mnist.Run) -> bytes:
    """Draw curves as plain grey levels, for matplotlib takes longer than all else."""
    stats = torch.stack(list(run.stats.values()))
    return dcgan_mnist.png(Image.fromarray(stats.view(torch.uint8).numpy()))


def size_of(path: Path | str) -> tuple[int, int]:
    """Return the width and height of a picture."""
    with Image.open(path) as picture:
        return picture.size


def digits_in(path: Path | str, rows: int = 5) -> torch.Tensor:
    """Read the digits (rows * 10, 28, 28) out of a picture of a grid."""
    with Image.open(path) as image:
        picture = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    picture = picture.view(-1, GRID_SIZE[0])[::2, ::2]
    cells = [
        picture[2 + 30 * row : 30 * row + 30, 2 + 30 * column : 30 * column + 30]
        for row in range(rows)
        for column in range(10)
    ]
    return torch.stack(cells)


def change_steps(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[int, torch.Tensor], torch.Tensor]
) -> None:
    """Let ``change(number, figures)`` see every training step from 1 on, and give its figures.

    A dry run takes each step twice, to compare them.
    """
    original = dcgan_mnist.training_step
    count = 0

    def step(gan: dcgan_mnist.DCGAN, real: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        return change(count, original(gan, real, z))

    monkeypatch.setattr(dcgan_mnist, "training_step", step)


def stop_at(monkeypatch: pytest.MonkeyPatch, stop: int, signum: int = signal.SIGINT) -> list[int]:
    """Let a signal come after a training step; return the list of steps that are taken."""
    taken: list[int] = []

    def change(step: int, stats: torch.Tensor) -> torch.Tensor:
        taken.append(step)
        if step == stop:
            signal.raise_signal(signum)
        return stats

    change_steps(monkeypatch, change)
    return taken


class Disk:
    """A stand-in for what a file system does, the only one: it fails or is interrupted.

    ``faults`` are called when the file of their name is about to get its new content, or to be
    moved; that of "replace" when any file is about to get it, that of "fsync" when anything is
    written. ``waits`` are the seconds that the program sleeps, which take no time.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.faults: dict[str, Callable[[], None]] = {}
        self.waits: list[float] = []
        replace = Path.replace
        rename = Path.rename
        open_path = Path.open
        fsync = os.fsync

        def replaced(path: Path, target: Path) -> Path:
            self.touch(Path(target).name, "replace")
            return replace(path, target)

        def renamed(path: Path, target: Path) -> Path:
            self.touch(path.name)
            return rename(path, target)

        def opened(path: Path, mode: str = "r", *args: object, **options: object) -> IO:
            if "a" in mode:
                self.touch(path.name)
            return open_path(path, mode, *args, **options)

        def synced(handle: int) -> None:
            self.touch("fsync")
            fsync(handle)

        monkeypatch.setattr(Path, "replace", replaced)
        monkeypatch.setattr(Path, "rename", renamed)
        monkeypatch.setattr(Path, "open", opened)
        monkeypatch.setattr(os, "fsync", synced)
        monkeypatch.setattr(time, "sleep", self.waits.append)
        monkeypatch.setattr(time, "monotonic", lambda: sum(self.waits))

    def touch(self, *names: str) -> None:
        """Do what is to come when a file is changed."""
        for name in names:
            if name in self.faults:
                self.faults[name]()

    def fail(
        self, name: str, number: int = errno.EACCES, times: int = 10**6, first: int = 1
    ) -> None:
        """Fail some times, from the first on that is given, to change the file of a name."""
        fault = raising(OSError(number, os.strerror(number)))
        self.interrupt(name, fault, range(first, first + times))

    def interrupt(self, name: str, act: Callable[[], None], times: Container[int] = (1,)) -> None:
        """Do something the first time, or those given, that the file of a name is changed."""
        count = 0

        def fault() -> None:
            nonlocal count
            count += 1
            if count in times:
                act()

        self.faults[name] = fault


def ctrl_c(*_: object) -> NoReturn:
    """Let this process get the signal of Ctrl-C, in the place of any function."""
    signal.raise_signal(signal.SIGINT)
    raise AssertionError("the signal came to nothing")
