"""Random command lines; FUZZ_EXAMPLES=3000 python -m pytest tests/test_fuzz.py tries more."""

import os
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from helpers import write_split
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

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


WORDS = st.one_of(
    st.sampled_from(["test", "train", "cpu", "cuda", "auto", ""]), st.text(max_size=5)
)
FOLDERS = ["out", "new/out", "file", "file/out", "", ".", "résultat 数字", "\udcff"]
if Path("/proc").exists():
    FOLDERS.append("/proc/x")


def number(*good: str) -> st.SearchStrategy[str]:
    """Let about half of the values of a flag be good ones, so that other flags come into play."""
    return st.one_of([st.sampled_from(good)] * 5 + [NUMBERS])


VALUES = {
    "--epochs": st.sampled_from(["1", "2", "0", "-1", "x", "1.5", "9" * 9, "", "nan"]),
    "--output-dir": st.sampled_from(FOLDERS),
    "--data-dir": st.sampled_from(["data", "data/.", "./data"]),
    "--split": st.one_of(st.just("test"), st.text(max_size=5)),
    "--device": st.one_of(st.just("cpu"), st.sampled_from(["cuda", "mps", "gpu", "", "cuda:9"])),
    "--precision": st.sampled_from(["auto", "fp32", "bf16", "fp8", ""]),
    "--batch-size": number("1", "3", "7"),
    "--lr": number("1e-8", "0.002", "1"),
    "--beta1": number("0", "0.9"),
    "--beta2": number("0", "0.9"),
    "--ema": number("0", "0.9"),
    "--seed": number("0", "4294967295"),
    "--log-every": number("1", "1000000"),
    "--generate": number("1", "100").filter(is_quick),
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
def test_any_command_line_succeeds_or_ends_with_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    # The curves take longer than all else; test_pictures.py draws them of any figures.
    monkeypatch.setattr(dcgan_mnist, "curves", lambda _: Image.new("RGB", (1, 1)))
    codes = Counter()

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(line=LINES)
    def try_line(line: list[tuple[str, ...]]) -> None:
        monkeypatch.chdir(tempfile.mkdtemp(dir=tmp_path))
        write_split(Path("data"), 7)
        Path("file").write_text("mine")
        argv = ["--device", "cpu", "--data-dir", "data", "--epochs", "1", "--batch-size", "3"]
        argv += ["--no-score", *(word for words in line for word in words)]
        capsys.readouterr()
        code = dcgan_mnist.main(argv)
        err = capsys.readouterr().err
        no_checkpoint = code == 1 and "; train first, or name" in err
        assert code in (0, 2) or no_checkpoint, (argv, err)
        assert err == "" if code == 0 else err.count("\n") == 1, (argv, err)
        assert code == 0 or err.startswith("dcgan_mnist.py: error: ")
        assert Path("file").read_text() == "mine"
        codes[code] += 1

    try_line()
    assert codes[0] >= EXAMPLES / 20, "too few lines do anything"
