"""The digits: what is bundled, downloads, damaged files, images, random streams."""

import gc
import gzip
import hashlib
import http.server
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import ROOT, contents, write_split
from torchvision.datasets import MNIST

from dcgan_mnist import load_digits, random_stream, to_images

IMAGES = "t10k-images-idx3-ubyte"
LABELS = "t10k-labels-idx1-ubyte"
BUNDLED = {
    IMAGES: "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    LABELS: "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
TRAIN_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
DAMAGED = {  # which of the data_dir fixture's files, and what becomes of its bytes
    "truncated": (IMAGES, lambda whole: whole[: len(whole) // 2]),
    "one byte short": (IMAGES, lambda whole: whole[:-1]),
    "too long": (IMAGES, lambda whole: whole + b"\0"),
    "empty": (IMAGES, lambda _: b""),
    "header only": (IMAGES, lambda whole: whole[:16]),
    "a JPEG": (IMAGES, lambda _: b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(1000)),
    "images of 32 x 32": (
        IMAGES,
        lambda whole: whole[:8] + bytes([0, 0, 0, 32, 0, 0, 0, 32]) + bytes(60 * 32 * 32),
    ),
    "labels for images": (IMAGES, lambda _: bytes([0, 0, 8, 1, 0, 0, 0, 60]) + bytes(60)),
    "59 labels": (LABELS, lambda whole: whole[:7] + bytes([59]) + whole[8:-1]),
    "text": (LABELS, lambda _: b"<html>403 Forbidden</html>"),
}


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse every socket."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Let torchvision download a split of 30 digits from a folder on this machine instead."""
    folder = tmp_path / "mirror"
    write_split(folder, 30, split="train")
    resources = []
    for path in sorted((folder / "MNIST" / "raw").iterdir()):
        packed = gzip.compress(path.read_bytes())
        (folder / f"{path.name}.gz").write_bytes(packed)
        resources.append((f"{path.name}.gz", hashlib.md5(packed).hexdigest()))
    resources += [(f"{IMAGES}.gz", ""), (f"{LABELS}.gz", "")]

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(folder))

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        serve = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        serve.start()
        monkeypatch.setattr(MNIST, "resources", resources)
        monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        yield folder
        server.shutdown()
    gc.collect()  # torchvision leaves sockets open, of which Python would warn in another test


def test_the_bundled_split_is_whole():
    for name, expected in BUNDLED.items():
        path = ROOT / "MNIST" / "MNIST" / "raw" / name
        assert hashlib.sha256(path.read_bytes()).hexdigest() == expected
    digits, labels = load_digits(ROOT / "MNIST", "test")
    assert digits.shape == (10_000, 28, 28)
    assert digits.dtype == torch.uint8
    assert labels.unique().tolist() == list(range(10))


def test_the_default_data_needs_no_network(tmp_path: Path):
    code = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise SystemExit('a socket was opened')\n"
        "socket.socket.__init__ = socket.getaddrinfo = refuse\n"
        "import dcgan_mnist\n"
        "dcgan_mnist.SCORER_EPOCHS = 1\n"
        "dcgan_mnist.SCORED = 100\n"
        "sys.exit(dcgan_mnist.main(['--dry-run', '--device', 'cpu']))\n"
    )
    # on one thread, for the other tests need the other core
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Training on 10,000 digits on cpu in " in done.stdout
    assert "The dry run went well" in done.stdout
    assert not any(tmp_path.iterdir())


@pytest.mark.usefixtures("no_network")
def test_a_failed_download_says_which_files_to_place_and_where(run, data_dir: Path):
    outcome = run("--split", "train")
    raw = str(data_dir / "MNIST" / "raw")
    assert outcome.is_one_line(1, "error: ", *TRAIN_FILES, raw, "Network is unreachable")
    assert not Path("result").exists()


@pytest.mark.usefixtures("no_network")
def test_a_missing_file_is_named(run, data_dir: Path):
    (data_dir / "MNIST" / "raw" / LABELS).unlink()
    outcome = run()
    assert outcome.is_one_line(1, "error: ", LABELS, "place")


def test_the_training_split_is_downloaded_once_and_alone(run, mirror: Path, data_dir: Path):
    train = ("--split", "train", "--dry-run", "--batch-size", 8)
    assert "Training on 30 digits" in run(*train).out
    fetched = {path.name for path in (data_dir / "MNIST" / "raw").iterdir()} - set(BUNDLED)
    assert fetched == {*TRAIN_FILES, *(f"{name}.gz" for name in TRAIN_FILES)}
    for path in mirror.glob("*.gz"):
        path.unlink()
    again = run(*train)
    assert (again.code, again.err) == (0, "")


@pytest.mark.parametrize("fault", ["gone", "wrong"])
def test_a_mirror_that_fails_ends_with_one_line(run, mirror: Path, fault: str):
    for path in mirror.glob("*.gz"):
        if fault == "gone":
            path.unlink()
        else:
            path.write_bytes(b"not the data")
    outcome = run("--split", "train")
    assert outcome.code == 1
    assert "Traceback" not in outcome.err
    last = outcome.err.splitlines()[-1]  # after torchvision's progress bar
    assert last.startswith("dcgan_mnist.py: error: ")
    assert all(name in last for name in TRAIN_FILES)


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_or_foreign_files_end_with_one_line(run, data_dir: Path, kind: str):
    raw = data_dir / "MNIST" / "raw"
    name, damage = DAMAGED[kind]
    path = raw / name
    path.write_bytes(damage(path.read_bytes()))
    before = contents(data_dir)
    outcome = run()
    assert outcome.is_one_line(1, "error: ", IMAGES, str(raw), "damaged")
    assert contents(data_dir) == before
    assert not Path("result").exists()


def test_other_data_in_the_same_files_just_works(run, data_dir: Path):
    digits, labels = load_digits(data_dir, "test")
    assert torch.equal(digits, write_split(data_dir, 60))
    assert labels.tolist() == [i % 10 for i in range(60)]
    assert digits.dtype == torch.uint8
    assert "Training on 60 digits" in run("--dry-run", "--batch-size", 20).out


def test_images_go_from_minus_one_for_black_to_one_for_white():
    digits = torch.tensor([255, 0, 255], dtype=torch.uint8).view(3, 1, 1).expand(3, 28, 28)
    images = to_images(digits)
    assert images.shape == (3, 1, 28, 28)
    assert images[:, 0, 0, 0].tolist() == [1.0, -1.0, 1.0]


def test_epochs_and_seeds_have_their_own_random_numbers():
    noises = [
        torch.randn(1, generator=random_stream(seed, stream)).item()
        for seed in (0, 1)
        for stream in (-2, -1, 0, 1, 2)
    ]
    assert len(set(noises)) == len(noises)
    first = torch.randn(4, generator=random_stream(3, 7))
    assert torch.equal(first, torch.randn(4, generator=random_stream(3, 7)))
