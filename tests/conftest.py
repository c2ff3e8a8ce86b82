"""What the tests share: small networks, small data, and the program run in this process."""

import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import dcgan_mnist

torch.set_num_threads(1)  # the tests run in two processes, see .pytest.ini

ROOT = Path(dcgan_mnist.__file__).parent
LOG_LINE = re.compile(
    r"\((?P<step>\d+)/(?P<steps>\d+)\) ds_loss: (\d+\.\d{3}) - gn_loss: (\d+\.\d{3})"
    r" - true_out: ([01]\.\d{3}) - fake_out: ([01]\.\d{3})>>([01]\.\d{3})"
)


def write_idx(path: Path, values: torch.Tensor) -> None:
    """Write a tensor of uint8 in the format of MNIST's files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">HBB{values.dim()}I", 0, 8, values.dim(), *values.shape)
    path.write_bytes(header + values.numpy().tobytes())


def write_split(data_dir: Path, count: int, split: str = "t10k") -> torch.Tensor:
    """Write a split of random digits where the program looks for MNIST; return the digits."""
    digits = torch.randint(0, 256, (count, 28, 28), generator=torch.Generator().manual_seed(count))
    digits = digits.byte()
    raw = data_dir / "MNIST" / "raw"
    write_idx(raw / f"{split}-images-idx3-ubyte", digits)
    write_idx(raw / f"{split}-labels-idx1-ubyte", torch.arange(count).remainder(10).byte())
    return digits


@pytest.fixture
def small_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the program's networks small enough for a CPU to train in milliseconds."""
    monkeypatch.setattr(dcgan_mnist, "WIDTH", 4)
    monkeypatch.setattr(dcgan_mnist, "LATENT_DIM", 8)


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """A data folder with a test split of 60 random digits."""
    write_split(tmp_path / "data", 60)
    return tmp_path / "data"


@dataclass
class Outcome:
    code: int
    out: str
    err: str

    def is_one_line(self, code: int, *words: str) -> bool:
        """Whether the program ended with this code and one line on stderr with these words."""
        lines = self.err.splitlines()
        return (
            self.code == code
            and len(lines) == 1
            and lines[0].startswith("dcgan_mnist.py: ")
            and all(word in lines[0] for word in words)
        )


@pytest.fixture
def run(
    small_networks: None,
    data_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., Outcome]:
    """Run the program in an empty folder, with small networks and 60 digits unless given others.

    Unless asked for they leave out the scores, which take longer than all else.
    """
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def run(*argv: object, scored: bool = False) -> Outcome:
        options = [str(option) for option in argv] + ["--no-score"] * (not scored)
        if "--data-dir" not in options:
            options += ["--data-dir", str(data_dir)]
        capsys.readouterr()
        code = dcgan_mnist.main([*options, "--device", "cpu"])
        out, err = capsys.readouterr()
        return Outcome(code, out, err)

    return run


@pytest.fixture
def fake_scores(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that has the next epochs scored with given distances and digits."""

    def fake(distances: list[float], digits: list[int]) -> None:
        scores: Iterator[tuple[float, int]] = iter(zip(distances, digits, strict=True))

        def score(_: torch.Tensor) -> dict[str, float]:
            fd, count = next(scores)
            return {"fd": fd, "digits": count, "evenness": 0.9, "confident": 0.5}

        monkeypatch.setattr(dcgan_mnist, "Scorer", lambda _: score)

    return fake


def new_gan(**changes: object) -> dcgan_mnist.DCGAN:
    """Return untrained networks on the CPU, with the default settings but for the changes."""
    settings = {name: dcgan_mnist.FLAGS[name][0] for name in dcgan_mnist.SETTINGS}
    settings |= {"precision": "fp32"} | changes
    return dcgan_mnist.DCGAN(settings, torch.device("cpu"))


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file below a folder by its path in it."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
