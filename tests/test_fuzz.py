"""Random command lines."""

import shutil
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from helpers import SMALL, write_split

import dcgan_mnist

pytest.importorskip("hypothesis", reason="it draws the command lines")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

EXAMPLES = 200
NUMBERS = st.one_of(
    st.sampled_from(["0", "1", "2", "7", "-1", "0.001", "1e-3", "nan", "inf", "1e400", "9" * 40]),
    st.sampled_from(["", " ", "ten", "1 2", "0x10", "1_0", "--", "-", "\0", "\n", "é"]),
    st.integers().map(str),
    st.floats().map(str),
    st.text(max_size=5),
)


def is_quick(number: str, most: int = 100) -> bool:
    """Whether a number of digits or channels is too small to take long, or no valid one."""
    try:
        return not most < int(number) <= 100_000
    except ValueError:
        return True


WORDS = st.one_of(
    st.sampled_from(["test", "train", "cpu", "cuda", "auto", ""]), st.text(max_size=5)
)
GOOD = {
    "--epochs": ["1", "2"],
    "--output-dir": ["out", "new/out", ".", "résultat 数字", "\udcff", "run", "run"],
    "--batch-size": ["30", "50"],
    "--lr": ["1e-8", "1"],
    "--beta1": ["0", "0.9"],
    "--beta2": ["0", "0.9"],
    "--generator-steps": ["1", "2"],
    "--ema": ["0", "0.5"],
    "--width": ["1", "4"],
    "--latent-dim": ["2", "8"],
    "--seed": ["0", "4294967295"],
    "--split": ["test"],
    "--recipe": ["article", "tuned", "quick"],
    "--precision": ["auto", "fp32", "bf16"],
    "--graph": ["auto", "off"],
    "--log-every": ["1", "1000000"],
    "--generate": ["1", "100"],
}
WILD = {
    "--epochs": st.sampled_from(["0", "-1", "x", "1.5", "9" * 9, "", "nan"]),
    "--output-dir": st.sampled_from(["file", "file/out", "data", "data/MNIST", ""]),
    "--data-dir": st.sampled_from(["data/.", "./data"]),
    "--split": st.text(max_size=4),  # "train" would be downloaded
    "--digit": st.sampled_from(["0", "9", "10", "-1", "x"]),
    "--device": st.sampled_from(["cpu", "cuda", "mps", "gpu", "", "cuda:9"]),
    "--precision": WORDS,
    "--graph": WORDS,
    "--batch-size": NUMBERS.filter(lambda number: len(number) != 1),  # small ones are slow
    **dict.fromkeys(["--lr", "--beta1", "--beta2", "--ema", "--seed", "--log-every"], NUMBERS),
    "--generate": NUMBERS.filter(is_quick),
    "--width": NUMBERS.filter(lambda number: is_quick(number, most=8)),
    "--latent-dim": NUMBERS.filter(is_quick),
    "--evaluate": st.sampled_from(["file", "data", "none.npy", "\0"]),
    "--recipe": WORDS,
    "--unknown": WORDS,
}
BARE = [
    "--resume",
    "--dry-run",
    "--best",
    "--evaluate",
    "--interpolate",
    "--epochs",
    "line\nbreak",
    "-",
]
DRAWING = {"--generate", "--evaluate", "--interpolate"}  # with a generator of a size of its own


def flags(values: dict[str, st.SearchStrategy[str]]) -> st.SearchStrategy[tuple[str, str]]:
    """Draw one of the flags and a value for it."""
    return st.sampled_from(sorted(values)).flatmap(
        lambda name: st.tuples(st.just(name), values[name])
    )


GOOD_FLAG = flags({name: st.sampled_from(values) for name, values in GOOD.items()})
WILD_WORDS = st.one_of(flags(WILD), flags(WILD), st.sampled_from(BARE).map(lambda word: (word,)))
COMMANDS = [[], [("--resume",)], [("--generate", "3")], [("--interpolate",)], [("--evaluate",)]]
LINES = st.tuples(
    st.sampled_from(COMMANDS), st.lists(GOOD_FLAG, max_size=3), st.lists(WILD_WORDS, max_size=2)
)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_curves", "mean_scorer")
def test_any_command_line_succeeds_or_ends_with_one_line(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
):
    monkeypatch.chdir(tmp_path)
    digits = write_split(Path("data"), 50)
    monkeypatch.setitem(dcgan_mnist.SPLIT_OF_DIGITS, dcgan_mnist.sha256_of(digits), "test")
    start = ["--device", "cpu"]
    training = ["--data-dir", "data", "--epochs", "1"]
    assert dcgan_mnist.main([*start, *training, *SMALL, "--output-dir", "run"]) == 0
    monkeypatch.setattr(dcgan_mnist, "EXAMPLE", tmp_path / "run" / "checkpoint.pt")  # a small one
    codes = Counter()

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(line=LINES)
    def try_line(line: tuple[list[tuple[str, ...]], ...]) -> None:
        folder = tempfile.mkdtemp(dir=tmp_path)
        for name in ("data", "run"):
            shutil.copytree(tmp_path / name, Path(folder) / name)
        monkeypatch.chdir(folder)
        Path("file").write_text("mine")
        words = [word for part in line for words in part for word in words]
        argv = [*start, *words]
        if not DRAWING & set(words):
            argv += training
        if not {"--resume", *DRAWING} & set(words):
            argv += SMALL
        capsys.readouterr()
        with dcgan_mnist.own_process():  # as the script does, for names that no console can show
            code = dcgan_mnist.main(argv)
        err = capsys.readouterr().err
        untrained = "; train first, or choose" in err or " drawings are a clear " in err
        assert code in (0, 2) or (code == 1 and untrained), (argv, err)
        assert err == "" if code == 0 else err.count("\n") == 1, (argv, err)
        assert code == 0 or err.startswith("dcgan_mnist.py: error: ")
        assert Path("file").read_text() == "mine"
        codes[code] += 1

    try_line()
    assert codes[0] >= EXAMPLES / 20, "too few lines do anything"
