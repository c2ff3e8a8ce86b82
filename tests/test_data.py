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
from conftest import ROOT, contents, write_idx, write_split
from torchvision.datasets import MNIST

from dcgan_mnist import load_digits

BUNDLED = {
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
TRAIN_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")


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
    resources += [("t10k-images-idx3-ubyte.gz", ""), ("t10k-labels-idx1-ubyte.gz", "")]

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(folder))

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(MNIST, "resources", resources)
        monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        yield folder
        server.shutdown()


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
        "import socket, sys, runpy\n"
        "def refuse(*a, **k): raise SystemExit('a socket was opened')\n"
        "socket.socket.__init__ = socket.getaddrinfo = refuse\n"
        "sys.argv = ['dcgan_mnist.py', '--dry-run', '--device', 'cpu']\n"
        f"runpy.run_path({str(ROOT / 'dcgan_mnist.py')!r}, run_name='__main__')\n"
    )
    command = [sys.executable, "-c", code]
    env = os.environ | {"OMP_NUM_THREADS": "1"}  # the other tests need the other core
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Training on 10,000 digits on cpu in " in done.stdout
    assert (tmp_path / "result" / "generated_epoch_002.png").exists()


@pytest.mark.usefixtures("no_network")
def test_a_failed_download_says_which_files_to_place_and_where(run, data_dir: Path):
    outcome = run("--split", "train")
    raw = str(data_dir / "MNIST" / "raw")
    assert outcome.is_one_line(1, "error: ", *TRAIN_FILES, raw, "Network is unreachable")
    assert not Path("result").exists()


@pytest.mark.usefixtures("no_network")
def test_a_missing_file_is_named(run, data_dir: Path):
    (data_dir / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()
    outcome = run()
    assert outcome.is_one_line(1, "error: ", "t10k-labels-idx1-ubyte", "place")


def test_the_training_split_is_downloaded_once_and_alone(run, mirror: Path, data_dir: Path):
    assert "Training on 30 digits" in run("--split", "train", "--dry-run", "--batch-size", 8).out
    fetched = {path.name for path in (data_dir / "MNIST" / "raw").iterdir()} - set(BUNDLED)
    assert fetched == {*TRAIN_FILES, *(f"{name}.gz" for name in TRAIN_FILES)}
    for path in mirror.glob("*.gz"):
        path.unlink()
    again = run("--split", "train", "--dry-run", "--batch-size", 8)
    assert (again.code, again.err) == (0, "")


@pytest.mark.parametrize("fault", ["gone", "wrong"])
def test_a_mirror_that_fails_ends_with_one_line(run, mirror: Path, fault: str):
    for path in mirror.glob("*.gz"):
        path.unlink() if fault == "gone" else path.write_bytes(b"not the data")
    outcome = run("--split", "train")
    assert outcome.code == 1
    assert "Traceback" not in outcome.err
    last = outcome.err.splitlines()[-1]
    assert last.startswith("dcgan_mnist.py: error: ")
    assert all(name in last for name in TRAIN_FILES)


def damage(kind: str, raw: Path) -> None:
    images, labels = (raw / name for name in sorted(BUNDLED))
    whole = images.read_bytes()
    if kind == "truncated":
        images.write_bytes(whole[: len(whole) // 2])
    elif kind == "one byte short":
        images.write_bytes(whole[:-1])
    elif kind == "too long":
        images.write_bytes(whole + b"\0")
    elif kind == "empty":
        images.write_bytes(b"")
    elif kind == "header only":
        images.write_bytes(whole[:16])
    elif kind == "a JPEG":
        images.write_bytes(b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(1000))
    elif kind == "text":
        labels.write_text("<html>403 Forbidden</html>")
    elif kind == "other size":
        write_idx(images, torch.zeros(60, 32, 32, dtype=torch.uint8))
    elif kind == "fewer labels":
        write_idx(labels, torch.zeros(59, dtype=torch.uint8))
    elif kind == "swapped":
        images.write_bytes(labels.read_bytes())


@pytest.mark.parametrize(
    "kind",
    [
        "truncated",
        "one byte short",
        "too long",
        "empty",
        "header only",
        "a JPEG",
        "text",
        "other size",
        "fewer labels",
        "swapped",
    ],
)
def test_damaged_or_foreign_files_end_with_one_line(run, data_dir: Path, kind: str):
    raw = data_dir / "MNIST" / "raw"
    damage(kind, raw)
    before = contents(data_dir)
    outcome = run()
    assert outcome.is_one_line(1, "error: ", "t10k-images-idx3-ubyte", str(raw), "damaged")
    assert contents(data_dir) == before
    assert not Path("result").exists()


def test_other_data_in_the_same_files_just_works(run, data_dir: Path):
    digits, labels = load_digits(data_dir, "test")
    assert torch.equal(digits, write_split(data_dir, 60))
    assert labels.tolist() == [i % 10 for i in range(60)]
    assert digits.dtype == torch.uint8
    assert "Training on 60 digits" in run("--dry-run", "--batch-size", 20).out
