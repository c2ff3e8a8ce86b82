"""The fixtures: small data, stand-ins for the scorer, and the program run in this process."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers import SMALL, Disk, MeanScorer, Outcome, grey_curves, write_split

import dcgan_mnist

torch.set_num_threads(1)  # the tests run in two processes, see .ci/run
dcgan_mnist.FITTED = 100  # 1,000 take a quarter of a small run's time


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave the cases of a test marked with few(n) to the slow tests, but for the first n."""
    cases: Counter[Callable] = Counter()
    for item in items:
        few = item.get_closest_marker("few")
        if few is None:
            continue
        (n,) = few.args
        cases[item.function] += 1
        if cases[item.function] > n:
            item.add_marker("slow")


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """A data folder with a test split of 60 random digits."""
    write_split(tmp_path / "data", 60)
    return tmp_path / "data"


@pytest.fixture
def quick_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the program write grey_curves instead of its own, which take longer than all else."""
    monkeypatch.setitem(dcgan_mnist.PICTURES, "loss_curve.png", grey_curves)


@pytest.fixture
def run(
    quick_curves: None,
    data_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., Outcome]:
    """Run the program in an empty folder: a new run is SMALL, and on 60 digits unless given others.

    These are not MNIST's, so that a run goes without scores unless a fixture fakes them.
    """
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(dcgan_mnist, "PATIENCE", 0)  # with disks that fail

    def run(*argv: object) -> Outcome:
        options = [str(option) for option in argv]
        draws = bool({"--generate", "--interpolate", "--evaluate"} & set(options))
        if not draws and "--resume" not in options:
            options = [*SMALL, *options]
        if not draws and "--data-dir" not in options:
            options += ["--data-dir", str(data_dir)]
        if "--device" not in options:
            options += ["--device", "cpu"]
        capsys.readouterr()
        code = dcgan_mnist.main(options)
        out, err = capsys.readouterr()
        return Outcome(code, out, err)

    return run


@pytest.fixture
def fake_scores(
    mean_scorer: None, monkeypatch: pytest.MonkeyPatch
) -> Callable[[list[float], list[int]], None]:
    """Return a function that has the next epochs scored with given distances and digits."""

    def fake(distances: list[float], digits: list[int]) -> None:
        scores: Iterator[tuple[float, int]] = iter(zip(distances, digits, strict=True))

        def score(*_: object) -> dict[str, float]:
            fd, count = next(scores)
            return {"fd": fd, "digits": count, "evenness": 0.9, "confident": 0.5}

        monkeypatch.setattr(MeanScorer, "__call__", score)

    return fake


@pytest.fixture
def known_digits(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the program take the data_dir fixture's digits for MNIST's test split."""
    digits = dcgan_mnist.load_pictures(data_dir, "test")[0]
    monkeypatch.setitem(dcgan_mnist.SPLIT_OF_DIGITS, dcgan_mnist.sha256_of(digits), "test")


@pytest.fixture
def mean_scorer(known_digits: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the program take the data_dir fixture's digits for MNIST's, and use a MeanScorer."""
    monkeypatch.setattr(dcgan_mnist, "Scorer", MeanScorer)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    """A disk that does what a test says."""
    return Disk(monkeypatch)
