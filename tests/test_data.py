"""The digits: what is bundled, downloads, damaged files, images, random streams."""

import gc
import gzip
import hashlib
import http.server
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import ROOT, SMALL, THREE_STEPS, contents, write_split
from torchvision.datasets import MNIST

import dcgan_mnist
from dcgan_mnist import load_digits, random_stream, read_idx, to_images

IMAGES = "t10k-images-idx3-ubyte"
LABELS = "t10k-labels-idx1-ubyte"
BUNDLED = {  # the sums of the original files, unpacked
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
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
    "signed bytes": (IMAGES, lambda whole: whole[:2] + bytes([9]) + whole[3:]),
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


def test_both_bundled_splits_are_whole_and_stay_gzipped():
    raw = ROOT / "MNIST" / "MNIST" / "raw"
    for name, expected in BUNDLED.items():
        unpacked = gzip.decompress((raw / f"{name}.gz").read_bytes())
        assert hashlib.sha256(unpacked).hexdigest() == expected
    for split, name, count in (("test", LABELS, 10_000), ("train", TRAIN_FILES[1], 60_000)):
        digits = load_digits(ROOT / "MNIST", split)
        assert digits.shape == (count, 28, 28)
        assert digits.dtype == torch.uint8
        labels = read_idx(raw / name)
        assert labels.shape == (count,)
        assert labels.unique().tolist() == list(range(10))
    assert {path.name for path in raw.iterdir()} == {f"{name}.gz" for name in BUNDLED}


@pytest.mark.parametrize("split", ["test", "train"])
def test_either_split_needs_no_network_and_no_right_to_write(tmp_path: Path, split: str):
    clone = tmp_path / "clone"
    shutil.copytree(ROOT / "MNIST", clone / "MNIST")
    shutil.copy(ROOT / "dcgan_mnist.py", clone)
    code = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise SystemExit('a socket was opened')\n"
        "socket.socket.__init__ = socket.getaddrinfo = refuse\n"
        "import dcgan_mnist\n"
        "sys.exit(dcgan_mnist.main(sys.argv[1:]))\n"
    )
    flags = [*SMALL, "--dry-run", "--device", "cpu", "--split", split]
    before = contents(clone)
    for path in [*clone.rglob("*"), clone]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    # on one thread, for the other tests need the other core
    env = os.environ | {"PYTHONPATH": str(clone), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-B", "-c", code, *flags],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    for path in [clone, *clone.rglob("*")]:
        path.chmod(0o755)
    assert done.returncode == 0, done.stderr
    count = {"test": "10,000", "train": "60,000"}[split]
    assert f"Training on {count} digits on cpu in " in done.stdout
    assert "score: FD" in done.stdout
    assert "The dry run went well" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["clone"]
    assert contents(clone) == before


@pytest.mark.usefixtures("no_network")
def test_a_failed_download_says_which_files_to_place_and_where(run, data_dir: Path):
    outcome = run("--split", "train")
    raw = str(data_dir / "MNIST" / "raw")
    assert outcome.is_one_line(1, "error: ", *TRAIN_FILES, raw, "Network is unreachable")
    assert not Path("result").exists()


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", [IMAGES, LABELS])
def test_a_missing_file_is_named_and_the_other_one_kept(run, data_dir: Path, name: str):
    (data_dir / "MNIST" / "raw" / name).unlink()
    before = contents(data_dir)
    assert run().is_one_line(1, "error: ", name, "place")
    assert contents(data_dir) == before


def test_a_missing_split_is_downloaded_once_and_alone(run, mirror: Path, data_dir: Path):
    train = ("--split", "train", "--dry-run", "--batch-size", 8)
    before = contents(data_dir)
    assert "Training on 30 digits" in run(*train).out
    after = contents(data_dir)
    fetched = set(after) - set(before)
    assert fetched == {f"MNIST/raw/{name}.gz" for name in TRAIN_FILES}
    assert after.items() >= before.items()
    for path in mirror.glob("*.gz"):
        path.unlink()
    again = run(*train)
    assert (again.code, again.err) == (0, "")


@pytest.mark.usefixtures("no_network")
def test_a_failed_download_leaves_no_folders(run, tmp_path: Path):
    before = contents(tmp_path)
    assert run("--data-dir", tmp_path / "mistyped").is_one_line(1, "error: ", IMAGES, "mistyped")
    assert not (tmp_path / "mistyped").exists()
    assert contents(tmp_path) == before


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
    digits = load_digits(data_dir, "test")
    assert torch.equal(digits, write_split(data_dir, 60))
    assert digits.dtype == torch.uint8
    assert "Training on 60 digits" in run("--dry-run", "--batch-size", 20).out


def gzip_files(folder: Path) -> None:
    """Replace the files in a folder by gzipped ones."""
    for path in folder.iterdir():
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("place", [".", "MNIST/raw", "FashionMNIST/raw", "any/folder/at/all"])
@pytest.mark.parametrize("packed", [False, True])
def test_digits_are_found_in_any_folder_plain_or_gzipped(
    data_dir: Path, tmp_path: Path, place: str, packed: bool
):
    expected = load_digits(data_dir, "test")
    folder = tmp_path / "elsewhere" / place
    shutil.copytree(data_dir / "MNIST" / "raw", folder)
    if packed:
        gzip_files(folder)
    before = contents(tmp_path)
    assert torch.equal(load_digits(tmp_path / "elsewhere", "test"), expected)
    assert read_idx(folder / LABELS).tolist() == [i % 10 for i in range(60)]
    assert contents(tmp_path) == before


def test_the_plain_file_comes_before_the_gzipped_one(data_dir: Path):
    write_split(data_dir, 50)
    gzip_files(data_dir / "MNIST" / "raw")
    plain = write_split(data_dir, 60)
    assert torch.equal(load_digits(data_dir, "test"), plain)


def test_mnists_own_folder_comes_before_others_and_others_must_be_named(run, data_dir: Path):
    raw = data_dir / "MNIST" / "raw"
    shutil.copytree(raw, data_dir / "A")
    for path in raw.iterdir():
        path.write_bytes(b"damaged")
    assert run().is_one_line(1, "error: ", "damaged", str(raw))
    raw.rename(data_dir / "B")
    outcome = run()
    folders = (str(data_dir / "A"), str(data_dir / "B"))
    assert outcome.is_one_line(2, "error: argument --data-dir: ", *folders)


@pytest.mark.parametrize("damage", ["cut", "changed", "not gzip"])
def test_a_damaged_gzipped_file_ends_with_one_line(run, data_dir: Path, damage: str):
    raw = data_dir / "MNIST" / "raw"
    gzip_files(raw)
    path = raw / f"{IMAGES}.gz"
    whole = path.read_bytes()
    changes = {
        "cut": whole[:-100],
        "changed": whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:],
        "not gzip": b"<html>403 Forbidden</html>",
    }
    path.write_bytes(changes[damage])
    assert run().is_one_line(1, "error: ", IMAGES, str(raw), "damaged")
    assert not Path("result").exists()


def test_images_go_from_minus_one_for_black_to_one_for_white():
    digits = torch.tensor([255, 0, 255], dtype=torch.uint8).view(3, 1, 1).expand(3, 28, 28)
    images = to_images(digits)
    assert images.shape == (3, 1, 28, 28)
    assert images[:, 0, 0, 0].tolist() == [1.0, -1.0, 1.0]


USES = ("FIRST_WEIGHTS", "FIXED_NOISE", "DRAWING", "NORM_STATISTICS", "ORDER", "NOISE", "LAYERS")
OF_AN_EPOCH = ("ORDER", "NOISE", "LAYERS")
SEEDS = (0, 1, 2, 4096, 4097, 2**20, 2**20 + 1, 2**32 - 1)


def test_every_use_and_epoch_and_seed_has_random_numbers_of_its_own():
    epochs = (1, 2, 3, 4095, 4096, 4097, 99_999, 100_000)
    streams = [
        (seed, getattr(dcgan_mnist, use), epoch)
        for seed in SEEDS
        for use in USES
        for epoch in (epochs if use in OF_AN_EPOCH else (0,))
    ]
    first_numbers = {
        tuple(torch.randn(4, generator=random_stream(*stream)).tolist()) for stream in streams
    }
    assert len(first_numbers) == len(streams)


def test_random_numbers_are_the_same_from_their_start():
    first = torch.randn(4, generator=random_stream(3, dcgan_mnist.NOISE, 7))
    assert torch.equal(first, torch.randn(4, generator=random_stream(3, dcgan_mnist.NOISE, 7)))


def test_a_run_goes_on_with_the_folder_that_it_began_with_unless_that_is_gone(
    run, data_dir: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(*THREE_STEPS, "--epochs", 1).code == 0
    resume = ["--resume", "--epochs", "2", "--device", "cpu"]
    assert dcgan_mnist.main(resume) == 0
    data_dir.rename(data_dir.with_name("elsewhere"))
    capsys.readouterr()
    assert dcgan_mnist.main(resume) == 2
    err = capsys.readouterr().err
    assert err.startswith("dcgan_mnist.py: error: argument --data-dir: the run began with")
    assert f"{data_dir}, which is not there now" in err
    assert not data_dir.exists()
    assert run("--resume", "--epochs", 3, "--data-dir", data_dir.with_name("elsewhere")).code == 0
