"""What --data-dir takes: MNIST's format under any name, folders of pictures, .npy files."""

import gc
import gzip
import hashlib
import http.server
import os
import random
import shutil
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, SMALL, THREE_STEPS, contents, finished, saved, write_idx
from PIL import Image
from torchvision.datasets import MNIST

import dcgan_mnist
from dcgan_mnist import load_pictures, read_idx

IMAGES = "t10k-images-idx3-ubyte"
BUNDLED = {  # the sums of the original files, unpacked
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    IMAGES: "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
DRY = ("--dry-run", "--batch-size", 5)


def some_digits(count: int = 20, seed: int = 0) -> torch.Tensor:
    """Return random digits (count, 28, 28) of uint8."""
    stream = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 28, 28), generator=stream).byte()


def write(path: Path | str, values: torch.Tensor, packed: bool = False) -> None:
    """Write values in MNIST's format, gzipped or not, whatever the name says."""
    path = Path(path)
    write_idx(path, values)
    if packed:
        path.write_bytes(gzip.compress(path.read_bytes()))


def write_picture(path: Path | str, values: np.ndarray | torch.Tensor, **options: object) -> None:
    """Write values (height, width) or (height, width, channels) as a picture."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values)).save(path, **options)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse every socket."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


# ------------------------------------------- bundled ----------------------------------------------
def test_both_bundled_splits_are_whole_and_stay_gzipped():
    for name, expected in BUNDLED.items():
        unpacked = gzip.decompress((ROOT / "MNIST" / f"{name}.gz").read_bytes())
        assert hashlib.sha256(unpacked).hexdigest() == expected
    for split, count in (("test", 10_000), ("train", 60_000)):
        digits, source, _ = load_pictures(None, split)
        assert digits.shape == (count, 28, 28)
        assert digits.dtype == torch.uint8
        prefix = {"test": "t10k", "train": "train"}[split]
        assert str(source) == str(ROOT / "MNIST" / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(ROOT / "MNIST" / f"{prefix}-labels-idx1-ubyte.gz")
        assert labels.shape == (count,)
        assert labels.unique().tolist() == list(range(10))
    ours = {"README.md", "make_scorer.py", "scorer.pt", *(f"{name}.gz" for name in BUNDLED)}
    assert {path.name for path in (ROOT / "MNIST").iterdir()} - {"__pycache__"} == ours


@pytest.mark.slow
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
    command = [sys.executable, "-B", "-c", code, *flags]
    done = finished(command, tmp_path, PYTHONPATH=str(clone))
    for path in [clone, *clone.rglob("*")]:
        path.chmod(0o755)
    assert done.code == 0, done.err
    count = {"test": "10,000", "train": "60,000"}[split]
    assert f"Training on {count} pictures from {clone / 'MNIST'}" in done.out
    assert "Computing on cpu in " in done.out
    assert "score: FD" in done.out
    assert "The dry run went well" in done.out
    assert [path.name for path in tmp_path.iterdir()] == ["clone"]
    assert contents(clone) == before


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("content", [b"", b"<html>", None])
def test_a_damaged_bundled_file_is_not_downloaded_and_the_line_says_how_to_restore_it(
    quick_curves: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    content: bytes | None,
):
    write(tmp_path / f"{IMAGES}.gz", some_digits(), packed=True)
    damaged = tmp_path / f"{IMAGES}.gz"
    damaged.write_bytes(damaged.read_bytes()[:-9] if content is None else content)
    monkeypatch.setattr(dcgan_mnist, "BUNDLED", tmp_path)
    before = contents(tmp_path)
    assert dcgan_mnist.main([*SMALL, "--dry-run", "--device", "cpu"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("dcgan_mnist.py: error: ")
    assert err.count("\n") == 1
    assert "git checkout MNIST" in err
    assert contents(tmp_path) == before


# ---------------------------------------- MNIST's format ------------------------------------------
NAMES = [  # as people have them on their disks; all hold a test split
    IMAGES,
    f"MNIST/raw/{IMAGES}",
    f"FashionMNIST/raw/{IMAGES}",
    "emnist-digits-test-images-idx3-ubyte",
    "t10k-images.idx3-ubyte",
    "test-images-idx3-ubyte",
    f"{IMAGES}/{IMAGES}",
    "any/folder/at/all/Test.bin",
    "no word for a split",
    "constrained",
]


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_content_of_a_file_decides_whatever_its_name_is(
    tmp_path: Path, name: str, ending: str, packed: bool
):
    digits = some_digits()
    path = tmp_path / f"{name}{ending}"
    write(path, digits, packed)
    write(path.parent / "t10k-labels-idx1-ubyte", torch.arange(20).byte())
    before = contents(tmp_path)
    for data_dir in (tmp_path, path):
        found, source, _ = load_pictures(data_dir, "test")
        assert torch.equal(found, digits)
        assert str(source) == str(path)
    assert contents(tmp_path) == before


@pytest.mark.usefixtures("no_network")
def test_files_of_one_split_only_are_trained_on_when_it_is_asked_for(run):
    digits = some_digits()
    write("data/emnist-digits-train-images-idx3-ubyte.gz", digits, packed=True)
    before = contents("data")
    for data_dir in ("data", "data/emnist-digits-train-images-idx3-ubyte.gz"):
        outcome = run("--data-dir", data_dir)
        assert outcome.is_one_line(2, "error: argument --data-dir: ", "train", "add --split train")
    outcome = run(*DRY, "--data-dir", "data", "--split", "train")
    path = Path("data/emnist-digits-train-images-idx3-ubyte.gz")
    assert f"Training on 20 pictures from {path}" in outcome.out.splitlines()
    assert contents("data") == before


def test_each_split_is_found_by_its_own_word(tmp_path: Path):
    splits = {"test": some_digits(20, 1), "train": some_digits(30, 2)}
    write(tmp_path / "TRAIN" / "x-test-y", splits["test"])  # the folder's name says nothing
    write(tmp_path / "TRAIN" / "x-Train-y", splits["train"])
    for split, digits in splits.items():
        assert torch.equal(load_pictures(tmp_path, split)[0], digits)


def test_several_files_that_may_hold_the_split_are_listed(run):
    write("data/MNIST/t10k-images", some_digits(20, 1))
    write("data/Fashion/t10k-images", some_digits(20, 2))
    write("data/train-images", some_digits(20, 3))
    both = [str(Path("data", name, "t10k-images")) for name in ("MNIST", "Fashion")]
    outcome = run("--data-dir", "data")
    assert outcome.is_one_line(2, "error: argument --data-dir: ", *both)
    assert "train-images" not in outcome.err
    # one that is damaged might be the one that was meant
    Path(both[0]).write_bytes(Path(both[0]).read_bytes()[:-1])
    assert run("--data-dir", "data").is_one_line(2, *both)
    # one without a word might be it too
    Path(both[0]).rename("data/digits")
    assert run("--data-dir", "data").is_one_line(2, str(Path("data/digits")), both[1])


def test_copies_of_the_same_pictures_count_as_one_file(tmp_path: Path):
    digits = some_digits()
    write(tmp_path / IMAGES, digits)
    write(tmp_path / f"{IMAGES}.gz", digits, packed=True)
    write(tmp_path / "again" / "t10k.idx", digits)
    found, source, _ = load_pictures(tmp_path, "test")
    assert torch.equal(found, digits)
    assert str(source) in [str(path) for path in tmp_path.rglob("*")]


CUT = {
    "empty": lambda whole: b"",
    "cut": lambda whole: whole[:-10],
    "foreign": lambda whole: b"<html>403 Forbidden</html>",
    "changed": lambda whole: whole[:3] + bytes([whole[3] ^ 1]) + whole[4:-2] + b"..",
}


@pytest.mark.few(2)
@pytest.mark.parametrize("damage", CUT)
@pytest.mark.parametrize("damaged", [IMAGES, f"{IMAGES}.gz"])
def test_of_two_copies_the_sound_one_is_read_and_a_line_says_so(run, damage: str, damaged: str):
    data = Path("data")
    write(data / IMAGES, some_digits())
    write(data / f"{IMAGES}.gz", some_digits(), packed=True)
    path = data / damaged
    path.write_bytes(CUT[damage](path.read_bytes()))
    (sound,) = {data / IMAGES, data / f"{IMAGES}.gz"} - {path}
    outcome = run(*DRY, "--data-dir", data)
    assert outcome.code == 0
    assert outcome.warnings() == [
        f"warning: {path} holds no sound pictures; {sound} is read instead"
    ]
    assert f"Training on 20 pictures from {sound}" in outcome.out


@pytest.mark.parametrize("damage", CUT)
@pytest.mark.parametrize("packed", [False, True])
def test_a_damaged_file_ends_with_one_line_that_names_it(run, damage: str, packed: bool):
    path = Path("data", IMAGES)
    write(path, some_digits(), packed)
    path.write_bytes(CUT[damage](path.read_bytes()))
    before = contents("data")
    outcome = run("--data-dir", "data")
    assert outcome.is_one_line(2, "error: argument --data-dir: ", IMAGES, "28 x 28", "uint8")
    assert contents("data") == before
    assert not Path("result").exists()


def test_what_lies_behind_links_is_found_once_and_circles_end(tmp_path: Path):
    write(tmp_path / "far" / "away" / IMAGES, some_digits())
    data = tmp_path / "data"
    data.mkdir()
    (data / "link").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "back").symlink_to(data)
    (tmp_path / "far" / "away" / "self").symlink_to(tmp_path / "far" / "away")
    (data / "broken").symlink_to(tmp_path / "nowhere")
    os.mkfifo(data / "test-pipe")  # whoever opens it waits for ever
    found, source, _ = load_pictures(data, "test")
    assert torch.equal(found, some_digits())
    assert str(source) == str(data / "link" / "away" / IMAGES)


def test_mnists_format_comes_before_pictures_and_a_line_says_so(run):
    write(f"data/{IMAGES}", some_digits())
    for name in "abc":
        write_picture(f"data/{name}.png", some_digits(1)[0])
    outcome = run(*DRY, "--data-dir", "data")
    (line,) = [line for line in outcome.out.splitlines() if line.startswith("data holds")]
    assert line.endswith("other pictures there are not read: 3")
    assert f"Training on 20 pictures from {Path('data', IMAGES)}" in outcome.out


# ------------------------------------------ refusals ----------------------------------------------
def array(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    """Return an array that is not black."""
    return np.full(shape, 9, dtype)


def idx(path: Path, kind: int, shape: tuple[int, ...], content: bytes) -> None:
    """Write a file in the IDX format, of any type and shape."""
    sizes = b"".join(size.to_bytes(4, "big") for size in shape)
    path.write_bytes(bytes([0, 0, kind, len(shape)]) + sizes + content)


REFUSED: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    # what lies in the folder "data", and what the line says of it
    "nothing": (lambda data: None, ("no files",)),
    "hidden files": (lambda data: (data / ".a.png").write_text("x"), ("no files",)),
    "32 x 32": (
        lambda data: write(data / IMAGES, torch.zeros(60, 32, 32).byte()),
        (IMAGES, "(60, 32, 32)"),
    ),
    "no pictures": (lambda data: idx(data / IMAGES, 8, (0, 28, 28), b""), (IMAGES, "(0, 28, 28)")),
    "floats": (
        lambda data: idx(data / IMAGES, 13, (2, 28, 28), bytes(4 * 2 * 784)),
        (IMAGES, "float32"),
    ),
    "signed": (lambda data: idx(data / IMAGES, 9, (2, 28, 28), bytes(2 * 784)), (IMAGES, "int8")),
    "labels": (
        lambda data: write(data / IMAGES, torch.arange(60).byte()),
        (IMAGES, "1-dimensional"),
    ),
    "colours": (
        lambda data: write(data / IMAGES, torch.ones(2, 28, 28, 3).byte()),
        (IMAGES, "4-dimensional"),
    ),
    "zeros and ones": (
        lambda data: write(data / IMAGES, (some_digits() > 127).byte()),
        ("no value is above 1", "255"),
    ),
    "mnist.npz": (lambda data: np.savez(data / "mnist.npz", x=array(9, 28, 28)), ("mnist.npz",)),
    "an .npy in a folder": (lambda data: np.save(data / "a.npy", array(9, 28, 28)), ("a.npy",)),
    "a CSV": (lambda data: (data / "train.csv").write_text("5,0,0\n"), ("train.csv",)),
    "a ZIP": (lambda data: (data / "mnist.zip").write_bytes(b"PK\3\4"), ("mnist.zip",)),
    "many files": (
        lambda data: [(data / f"{i}.txt").write_text("x") for i in range(9)],
        ("0.txt", "6 more"),
    ),
    "a folder": (lambda data: (data / f"{IMAGES}").mkdir(), ("no files",)),
}


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("kind", REFUSED)
def test_a_folder_of_anything_else_is_refused_and_the_line_says_what_is_accepted(run, kind: str):
    data = Path("data")
    data.mkdir()
    make, words = REFUSED[kind]
    make(data)
    before = contents(".")
    outcome = run("--data-dir", "data")
    accepted = ("28 x 28", "uint8", "PNG", ".npy", "MNIST's format")
    assert outcome.is_one_line(2, "error: argument --data-dir: ", *words, *accepted)
    assert contents(".") == before


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    "name",
    [
        "mistyped",
        "new/folder",
        "",
        "a.png",
        "a.csv",
        "a.npz",
        "pipe",
        "x" * 300,
        "\0",
        "float.npy",
        "flat.npy",
    ],
)
def test_a_path_to_anything_else_is_refused(run, name: str):
    write_picture("a.png", some_digits(1)[0])
    Path("a.csv").write_text("1,2")
    np.savez("a.npz", array(9, 28, 28))
    np.save("float.npy", array(9, 28, 28, dtype=np.float32))
    np.save("flat.npy", array(9, 784))
    os.mkfifo("pipe")
    outcome = run("--data-dir", name)
    accepted = ("28 x 28", "uint8") if name else ("must not be empty",)
    assert outcome.is_one_line(2, "error: argument --data-dir: ", *accepted)
    assert not Path("result").exists()
    assert not Path("new").exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read all")
def test_what_may_not_be_read_is_not_passed_over(run):
    write("data/sub/t10k-images", some_digits())
    write_picture("data/a.png", some_digits(1)[0])
    Path("data/sub").chmod(0)
    outcome = run("--data-dir", "data")
    Path("data/sub").chmod(0o755)
    assert outcome.is_one_line(2, "error: argument --data-dir: ", "Permission denied")


# ------------------------------------- folders of pictures ----------------------------------------
def digit(path: Path | str) -> np.ndarray:
    """Return what is trained on when a folder holds this picture only."""
    folder = Path(path).parent
    digits = load_pictures(folder, "test")[0]
    assert digits.shape == (1, 28, 28)
    return digits[0].numpy()


def test_pictures_of_28_pixels_are_taken_to_the_bit_in_the_order_of_their_names(run):
    digits = some_digits(6)
    names = ["a.png", "b/a.BMP", "b/c.gif", "b/d/z.webp", "c.tiff", "d.Png"]
    for name, values in zip(names, digits, strict=True):
        write_picture(f"data/{name}", values, **({"lossless": True} if "webp" in name else {}))
    Path("data/.hidden.png").write_text("no picture")
    Path("data/.cache").mkdir()
    write_picture("data/.cache/a.png", digits[0])
    Path("data/notes.txt").write_text("x")
    Path("data/b/labels.csv").write_text("x")
    os.mkfifo("data/pipe.png")
    found = load_pictures(Path("data"), "test")[0]
    assert torch.equal(found, digits)
    outcome = run("--dry-run", "--batch-size", 3, "--data-dir", "data")
    assert "Training on 6 pictures from data (other files there: 3)" in outcome.out.splitlines()
    assert outcome.warnings() == []
    assert outcome.err == ""


def test_a_picture_is_cropped_in_the_centre_and_made_smaller(tmp_path: Path):
    values = np.zeros((56, 156), np.uint8)
    values[:, 50:106] = np.kron(some_digits(1)[0].numpy() // 128 * 255, np.ones((2, 2), np.uint8))
    values[:, :50] = values[:, 106:] = 200  # to be cropped away
    write_picture(tmp_path / "a.png", values)
    expected = Image.fromarray(values[:, 50:106]).resize((28, 28), Image.Resampling.BICUBIC)
    deviation = np.abs(digit(tmp_path / "a.png").astype(int) - np.asarray(expected))
    assert deviation[1:-1, 1:-1].max() <= 2  # at the rim, what is cropped away shines in


@pytest.mark.parametrize("kind", ["png", "tiff", "pgm"])
def test_greys_of_16_bits_are_scaled_and_not_clipped(tmp_path: Path, kind: str):
    levels = np.arange(784).reshape(28, 28) * 83  # up to 64,989
    path = tmp_path / f"a.{kind}"
    if kind == "pgm":
        path.write_bytes(b"P5 28 28 65535\n" + levels.astype(">u2").tobytes())
    else:
        write_picture(path, levels.astype(np.uint16))
    assert np.array_equal(digit(path), (levels / 257).round())


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB", "I;16"])
def test_transparent_parts_are_black(tmp_path: Path, mode: str):
    grey = np.full((28, 28), 200, np.uint8)
    seen = np.zeros((28, 28), bool)
    seen[5:20, 9:12] = True
    path = tmp_path / "a.png"
    if mode in ("RGBA", "LA"):
        opaque = Image.fromarray(seen.astype(np.uint8) * 255)
        picture = Image.fromarray(grey).convert(mode[:-1])
        picture.putalpha(opaque)
        picture.save(path)
    elif mode == "P":
        picture = Image.fromarray(seen.astype(np.uint8), "P")
        picture.putpalette([250, 250, 250, 200, 200, 200])
        picture.save(path, transparency=0)
    else:
        background = (250, 250, 250) if mode == "RGB" else 250
        values = np.where(seen, 200, 250).astype(np.uint8)
        picture = Image.fromarray(values).convert(mode)
        if mode == "I;16":
            picture = Image.fromarray(values.astype(np.uint16) * 257)
            background = 250 * 257
        picture.save(path, transparency=background)
    assert np.array_equal(digit(path), np.where(seen, 200, 0))


def test_a_picture_is_turned_upright(tmp_path: Path):
    values = np.zeros((28, 28), np.uint8)
    values[:, :14] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: to be turned by 90 degrees to the right
    write_picture(tmp_path / "a.png", values, exif=exif)
    assert np.array_equal(digit(tmp_path / "a.png"), np.rot90(values, -1))


def test_colours_become_grey(tmp_path: Path):
    write_picture(tmp_path / "a.png", np.full((28, 28, 3), (255, 0, 0), np.uint8))
    assert (digit(tmp_path / "a.png") == 76).all()  # 0.299 of red, ITU-R 601


def test_pictures_of_a_single_grey_are_trained_on_and_warned_of(run):
    for i in range(5):
        write_picture(f"data/{i}.png", some_digits(1, i)[0])
    black_on_transparent = np.zeros((40, 40, 4), np.uint8)
    black_on_transparent[9:20, 9:20, 3] = 255
    write_picture("data/5.png", black_on_transparent)
    outcome = run("--dry-run", "--batch-size", 3, "--data-dir", "data")
    assert "Training on 6 pictures from data" in outcome.out.splitlines()
    (warning,) = outcome.warnings()
    assert "single grey" in warning
    assert warning.endswith(": 1")


@pytest.mark.parametrize("kind", ["empty", "text", "cut", "floats", "8 bits in 32", "a GIF's head"])
def test_a_picture_that_cannot_be_read_is_named(run, kind: str):
    write_picture("data/a.png", some_digits(1)[0])
    write_picture("data/sub/b.png", some_digits(1)[0])
    path = Path("data/sub/b.png")
    whole = path.read_bytes()
    if kind in ("floats", "8 bits in 32"):
        path.unlink()
        path = Path("data/sub/b.tiff")
        values = some_digits(1)[0].numpy()
        write_picture(path, values.astype(np.float32 if kind == "floats" else np.int32))
    else:
        kinds = {"empty": b"", "text": b"hello", "cut": whole[:-30], "a GIF's head": b"GIF89a"}
        path.write_bytes(kinds[kind])
    outcome = run("--data-dir", "data")
    assert outcome.is_one_line(2, "error: argument --data-dir: ", str(path))
    assert not Path("result").exists()


@pytest.mark.parametrize("split", ["test", "train"])
def test_pictures_and_arrays_have_no_splits(run, split: str):
    np.save("a.npy", some_digits().numpy())
    write_picture("data/a.png", some_digits(1)[0])
    for data_dir in ("a.npy", "data"):
        outcome = run("--data-dir", data_dir, "--split", split)
        assert outcome.is_one_line(2, "error: argument --data-dir: ", data_dir, "leave out --split")


@pytest.mark.parametrize(("count", "shown"), [(1999, False), (2000, True)])
def test_reading_many_pictures_shows_a_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, shown: bool
):
    write_picture(tmp_path / "a.png", some_digits(1)[0])
    bars = []

    def bar(items: list, **options: object) -> list:
        bars.append(options)
        return items

    monkeypatch.setattr(dcgan_mnist, "progress_bar", bar)
    digits = dcgan_mnist.read_folder([tmp_path / "a.png"] * count)
    assert len(digits) == count
    assert bool(bars) == shown


def test_of_several_pictures_in_a_file_the_first_is_taken_and_a_line_says_so(run):
    frames = [Image.fromarray(values.numpy()) for values in some_digits(3)]
    Path("data").mkdir()
    frames[0].save("data/a.gif", save_all=True, append_images=frames[1:])
    frames[2].save("data/b.tiff", save_all=True, append_images=frames[:1])
    write_picture("data/c.png", some_digits(1)[0])
    outcome = run("--dry-run", "--batch-size", 3, "--data-dir", "data")
    (warning,) = outcome.warnings()
    assert warning.endswith("the first is taken: 2")
    digits = load_pictures(Path("data"), "test")[0]
    assert torch.equal(digits[1], some_digits(3)[2])


def test_what_libraries_remark_on_pictures_is_not_printed(run, recwarn: pytest.WarningsRecorder):
    write_picture("data/a.png", np.zeros((10_000, 9000), np.uint8))  # "decompression bomb"
    for name in "bc":
        write_picture(f"data/{name}.png", some_digits(1)[0])
    outcome = run("--dry-run", "--batch-size", 3, "--data-dir", "data")
    assert (outcome.code, outcome.err) == (0, "")
    assert [str(warning.message) for warning in recwarn if "pixels" in str(warning.message)] == []


@pytest.mark.parametrize(
    ("data", "output"),
    [
        ("mine", "mine"),
        ("mine", "mine/out"),
        (".", "out"),
        ("out/mine", "out"),
        ("out/a.npy", "out"),
    ],
)
def test_pictures_and_results_are_kept_apart(run, data: str, output: str):
    if data.endswith(".npy"):
        Path(data).parent.mkdir()
        np.save(data, some_digits().numpy())
    else:
        for i in range(5):
            write_picture(f"{data}/generated_epoch_00{i + 1}.png", some_digits(1, i)[0])
    before = contents(".")
    flags = ("--batch-size", 5, "--data-dir", data, "--output-dir", output)
    for dry in ([], ["--dry-run"]):
        outcome = run(*dry, *flags)
        assert outcome.is_one_line(2, "error: argument --output-dir: ", "choose another folder")
    assert contents(".") == before


def test_what_the_program_has_drawn_is_not_taken_for_pictures_of_ones_own(run):
    for i in range(5):
        write_picture(f"mine/{i}.png", some_digits(1, i)[0])
    write_picture("mine/result/timeline.png", some_digits(1)[0])
    outcome = run("--batch-size", 5, "--data-dir", "mine", "--output-dir", "out")
    drawn = str(Path("mine", "result", "timeline.png"))
    assert outcome.is_one_line(2, "error: argument --data-dir: ", drawn)


def test_one_damaged_file_beside_pictures_does_not_hide_them(run):
    for i in range(5):
        write_picture(f"data/{i}.png", some_digits(1, i)[0])
    Path("data/notes-train.tar.gz").write_bytes(gzip.compress(b"notes")[:-12])
    outcome = run(*DRY, "--data-dir", "data")
    assert "Training on 5 pictures from data (other files there: 1)" in outcome.out.splitlines()


# ------------------------------------------- arrays -----------------------------------------------
def test_drawings_can_be_trained_on(run):
    assert run(*THREE_STEPS, "--epochs", 1).code == 0
    assert run("--generate", 30).code == 0
    drawings = Path("result/generated.npy")
    outcome = run(*DRY, "--data-dir", drawings, "--output-dir", "other")
    assert outcome.code == 0
    assert f"Training on 30 pictures from {drawings}" in outcome.out.splitlines()
    assert "no scores" in outcome.out


@pytest.mark.parametrize("packed", [False, True])
def test_arrays_in_any_layout_and_under_any_name_are_read(tmp_path: Path, packed: bool):
    digits = some_digits()
    path = tmp_path / "train array"
    with path.open("wb") as file:
        np.save(file, np.asfortranarray(digits.numpy()))
    if packed:
        path.write_bytes(gzip.compress(path.read_bytes()))
    assert torch.equal(load_pictures(path, "test")[0], digits)


# ----------------------------------------- going on -----------------------------------------------
@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["folder", "array", "pictures"])
def test_a_run_goes_on_with_what_it_began_with_unless_that_is_gone_or_changed(
    run, capsys: pytest.CaptureFixture[str], kind: str
):
    digits = some_digits(40)
    data = Path("mine.npy" if kind == "array" else "mine")
    if kind == "array":
        np.save(data, digits.numpy())
    elif kind == "folder":
        write(data / "my own", digits)
    else:
        for i, values in enumerate(digits):
            write_picture(data / f"{i:02d}.png", values)
    assert run(*THREE_STEPS, "--epochs", 1, "--data-dir", data).code == 0
    assert Path(saved()["data"]["path"]) == data.absolute()
    resume = ["--resume", "--epochs", "2", "--device", "cpu"]
    assert dcgan_mnist.main(resume) == 0
    data.rename("elsewhere")
    capsys.readouterr()
    assert dcgan_mnist.main(resume) == 2
    err = capsys.readouterr().err
    assert err.startswith("dcgan_mnist.py: error: argument --data-dir: the run began with")
    assert f"{data.absolute()}, which is not there now" in err
    assert not data.exists()
    assert run("--resume", "--epochs", 3, "--data-dir", "elsewhere").code == 0
    np.save("other.npy", some_digits(40, 1).numpy())
    outcome = run("--resume", "--epochs", 4, "--data-dir", "other.npy")
    assert outcome.is_one_line(2, "error: argument --data-dir: ", "other pictures")


# ------------------------------------------ downloads ---------------------------------------------
@pytest.fixture
def alone(
    quick_curves: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """The folder of a script that was copied without its data; it is the current folder."""
    folder = tmp_path / "alone"
    folder.mkdir()
    monkeypatch.setattr(dcgan_mnist, "HOME", folder)
    monkeypatch.setattr(dcgan_mnist, "BUNDLED", folder / "MNIST")
    monkeypatch.setattr(dcgan_mnist, "SCORER", folder / "MNIST" / "scorer.pt")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Let torchvision download splits of 30 digits from a folder on this machine instead."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    resources = []
    for name in BUNDLED:
        values = some_digits(30) if "images" in name else torch.arange(30).byte()
        write(folder / f"{name}.gz", values, packed=True)
        md5 = hashlib.md5((folder / f"{name}.gz").read_bytes()).hexdigest()
        resources.append((f"{name}.gz", md5))

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


ALONE = [*SMALL, "--dry-run", "--batch-size", "5", "--device", "cpu"]


@pytest.mark.parametrize("split", ["test", "train"])
def test_a_script_without_its_data_downloads_mnist_once_after_a_line(
    alone: Path, mirror: Path, capsys: pytest.CaptureFixture[str], split: str
):
    argv = [*ALONE, "--split", split]
    assert dcgan_mnist.main(argv) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"MNIST is not in {alone / 'MNIST'}: downloading it\n")
    assert "Training on 30 pictures from " in out
    assert set(contents(alone)) == {f"MNIST/{name}.gz" for name in BUNDLED}
    assert [path.name for path in alone.iterdir()] == ["MNIST"]
    for path in mirror.glob("*.gz"):
        path.unlink()
    assert dcgan_mnist.main(argv) == 0
    again = capsys.readouterr()
    assert "download" not in again.out
    assert again.err == ""


def test_a_download_overwrites_nothing(alone: Path, mirror: Path):
    mine = alone / "MNIST" / "train-images-idx3-ubyte.gz"
    write(mine, some_digits(7), packed=True)
    before = mine.read_bytes()
    assert dcgan_mnist.main(ALONE) == 0
    assert mine.read_bytes() == before


def last_of(err: str) -> str:
    """Return the last line, after the progress bars of torchvision."""
    return err.replace("\r", "\n").splitlines()[-1]


@pytest.mark.parametrize("fault", ["gone", "wrong", "no torchvision"])
def test_a_download_that_fails_ends_with_one_line_and_leaves_nothing(
    alone: Path,
    mirror: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fault: str,
):
    for path in mirror.glob("*.gz"):
        if fault == "gone":
            path.unlink()
        else:
            path.write_bytes(b"not the data")
    if fault == "no torchvision":
        monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    assert dcgan_mnist.main(ALONE) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert last_of(err).startswith("dcgan_mnist.py: error: cannot download MNIST")
    assert str(alone / "MNIST") in last_of(err)
    assert list(alone.iterdir()) == []


@pytest.mark.usefixtures("no_network")
def test_without_a_network_the_line_says_where_to_place_the_files(
    alone: Path, capsys: pytest.CaptureFixture[str]
):
    assert dcgan_mnist.main(ALONE) == 1
    assert str(alone / "MNIST") in last_of(capsys.readouterr().err)
    assert list(alone.iterdir()) == []


def test_a_silent_server_is_given_up(
    alone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert dcgan_mnist.SILENCE == 30
    monkeypatch.setattr(dcgan_mnist, "SILENCE", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes calls and says nothing
        address = f"http://127.0.0.1:{server.getsockname()[1]}/"
        monkeypatch.setattr(MNIST, "mirrors", [address])
        assert dcgan_mnist.main(ALONE) == 1
    err = capsys.readouterr().err
    assert last_of(err).startswith("dcgan_mnist.py: error: cannot download MNIST (")
    assert "timed out" in last_of(err)
    assert socket.getdefaulttimeout() is None
    gc.collect()  # torchvision leaves a socket open


# -------------------------------------------- fuzz ------------------------------------------------
@pytest.mark.parametrize("packed", [False, True])
def test_damaged_and_renamed_files_end_with_one_line_or_give_what_was_written(
    tmp_path: Path, packed: bool
):
    """Cuts, renames, and flips of gzipped files give the very pictures, or a Failure.

    Files that are not gzipped have no check sums: a flip of them gives pictures of the right shape.
    """
    digits = some_digits(9)
    numbers = random.Random(0)
    read = 0
    write(tmp_path / "whole", digits, packed)
    whole = (tmp_path / "whole").read_bytes()
    (tmp_path / "whole").unlink()
    for i in range(500):
        data = tmp_path / str(i)
        data.mkdir()
        kind = numbers.choice(["cut", "flip", "rename"])
        content = bytearray(whole)
        name = IMAGES
        if kind == "cut":
            del content[numbers.randrange(len(content)) :]
        elif kind == "flip":
            at = numbers.choice([numbers.randrange(20), numbers.randrange(len(content))])
            content[at] ^= 1 << numbers.randrange(8)
        else:
            letters = "abtes10k-.gz_ train"
            name = "".join(numbers.choices(letters, k=numbers.randint(1, 12))).strip(". ") or "a"
        (data / name).write_bytes(content)
        found = None
        with suppress(dcgan_mnist.WrongInput):
            found = load_pictures(numbers.choice([data, data / name]), "test")[0]
        if found is None:
            continue
        assert kind != "cut"
        assert found.dtype == torch.uint8
        assert found.shape == digits.shape
        if packed or kind == "rename":
            assert torch.equal(found, digits)
        read += 1
    assert read > 100
