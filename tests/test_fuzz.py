"""Random command lines; FUZZ_EXAMPLES=3000 python -m pytest tests/test_fuzz.py tries more."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from conftest import write_split
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dcgan_mnist

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "300"))
NUMBERS = st.one_of(
    st.sampled_from(["0", "1", "2", "7", "-1", "0.001", "1e-3", "nan", "inf", "1e400", "9" * 40]),
    st.sampled_from(["", " ", "ten", "1 2", "0x10", "1_0", "--", "-", "\0", "\n", "é"]),
    st.integers().map(str),
    st.floats().map(str),
    st.text(max_size=5),
)


def is_quick(number: str) -> bool:
    """Whether a number of epochs or digits is too few to take long, or no valid one."""
    try:
        return not 100 < int(number) <= 100_000
    except ValueError:
        return True


WORDS = st.one_of(st.sampled_from(["test", "train", "cpu", "cuda", "auto", ""]), st.text(max_size=5))
VALUES = {
    "--epochs": st.sampled_from(["1", "2", "0", "-1", "x", "1.5", "9" * 9, "", "nan"]),
    "--output-dir": st.sampled_from(["out", "new/out", "file", "file/out", "", ".", "/proc/x"]),
    "--data-dir": st.sampled_from(["data", "data/.", "./data"]),
    "--split": st.one_of(st.just("test"), st.text(max_size=5)),
    "--device": st.one_of(st.just("cpu"), st.sampled_from(["cuda", "mps", "gpu", "", "cuda:9"])),
    **dict.fromkeys(
        ["--batch-size", "--lr", "--beta1", "--beta2", "--ema", "--seed", "--log-every"], NUMBERS
    ),
    "--generate": NUMBERS.filter(is_quick),
    "--evaluate": st.sampled_from(["file", "data", "none.npy", "\0"]),
    "--recipe": st.sampled_from(["article", "tuned", "x", ""]),
    "--unknown": WORDS,
}
FLAG = st.sampled_from(sorted(VALUES)).flatmap(lambda name: st.tuples(st.just(name), VALUES[name]))
BARE = st.sampled_from(
    [
        ("--resume",),
        ("--dry-run",),
        ("--best",),
        ("--evaluate",),
        ("--interpolate",),
        ("--epochs",),
        ("stray",),
        ("-",),
    ]
)
LINES = st.lists(st.one_of(FLAG, FLAG, FLAG, FLAG, BARE), max_size=4)


@pytest.mark.usefixtures("small_networks")
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(line=LINES)
def test_any_command_line_succeeds_or_ends_with_one_line(line, capsys, monkeypatch):
    folder = Path(tempfile.mkdtemp())
    monkeypatch.chdir(folder)
    write_split(Path("data"), 7)
    Path("file").write_text("mine")
    argv = ["--device", "cpu", "--data-dir", "data", "--epochs", "1", "--no-score"]
    argv += [word for words in line for word in words]
    capsys.readouterr()
    try:
        code = dcgan_mnist.main(argv)
        err = capsys.readouterr().err
        no_checkpoint = code == 1 and "; train first, or name" in err
        assert code in (0, 2) or no_checkpoint, (argv, err)
        assert err == "" if code == 0 else err.count("\n") == 1, (argv, err)
        assert code == 0 or err.startswith("dcgan_mnist.py: error: ")
        assert Path("file").read_text() == "mine"
    finally:
        shutil.rmtree(folder)
