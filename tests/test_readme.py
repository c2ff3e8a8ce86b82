"""README.md: each of its commands works, and what it says of the program is so."""

import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers import (
    LOG_LINE,
    ROOT,
    RUN_FILES,
    SMALL,
    finished,
    load_script,
    write_idx,
    write_split,
)

import dcgan_mnist

README = (ROOT / "README.md").read_text(encoding="utf-8")
BENCHMARK = load_script(ROOT / "tests" / "benchmark.py")
CODE = re.findall(r"^    (\S.*)$", README, re.MULTILINE)  # lines of code
CODE += re.findall(r"`([^`\n]+)`", README)  # code in the text
COMMANDS = {code for code in CODE if re.match(r"(pip|python|uv|torchrun) ", code)}
SHOWN_ELSEWHERE = f"{dcgan_mnist.__doc__}\n{dcgan_mnist.HELP_EXAMPLES}"
COMMANDS |= set(re.findall(r"^ +(python .*?)(?:   .*)?$", SHOWN_ELSEWHERE, re.MULTILINE))
OTHER_COMMANDS = {
    "pip install -r requirements.txt",
    "pip install -r tests/requirements.txt",
    "python -m pytest",
    "python tests/benchmark.py",
    "python tests/benchmark.py --to-quality",
    "torchrun --standalone --nproc-per-node=2 dcgan_mnist.py --epochs 10",
}
OWN_PICTURES = [  # the example of its section, whose first command makes what the second one reads
    "python dcgan_mnist.py --generate 1000 --digit 7",
    "python dcgan_mnist.py --data-dir result/generated.npy --recipe tuned --epochs 100 "
    "--output-dir sevens",
]
# reversed, for the first ones are tried by default, and --evaluate takes seconds
PROGRAM_COMMANDS = sorted(COMMANDS - OTHER_COMMANDS - set(OWN_PICTURES), reverse=True)
DRAWING = [c for c in PROGRAM_COMMANDS if re.search("--generate|--interpolate|--evaluate", c)]
TRAINING = [command for command in PROGRAM_COMMANDS if command not in DRAWING]


def arguments(command: str) -> list[str]:
    """Return the program's own arguments in a command; uv is taken for this Python."""
    words = shlex.split(command)
    program = words.index("dcgan_mnist.py")
    assert words[:program] in (["python"], ["uv", "run"])
    return words[program + 1 :]


@pytest.mark.few(1)
@pytest.mark.parametrize("command", TRAINING)
def test_a_command_that_trains_works_with_small_networks(run, data_dir: Path, command: str):
    argv = arguments(command)
    if "--resume" in argv:
        assert run("--epochs", 1).code == 0
    outcome = run(*argv)
    assert (outcome.code, outcome.err) == (0, "")
    if "--help" not in argv and "--dry-run" not in argv:
        epochs = int(argv[argv.index("--epochs") + 1]) if "--epochs" in argv else 1
        assert Path("result", dcgan_mnist.epoch_picture(epochs)).exists()


@pytest.mark.few(2)
@pytest.mark.parametrize("command", DRAWING)
def test_a_command_that_draws_works_on_a_fresh_clone(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
):
    monkeypatch.chdir(tmp_path)
    assert dcgan_mnist.main(arguments(command)) == 0
    out, err = capsys.readouterr()
    assert err == ""
    first, *_, last = out.splitlines()
    assert first.startswith("result holds no run: using the included generator")
    for path in re.findall(r"(\S+\.\w+)(?: and |$)", last.removeprefix("saved ")):
        assert Path(path).exists()
    assert any(Path("result").iterdir())


@pytest.mark.slow
def test_the_example_trains_on_pictures_of_ones_own(
    tmp_path: Path,
    quick_curves: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    example = "\n".join(f"    {command}" for command in OWN_PICTURES)
    assert f"\n{example}\n" in README
    monkeypatch.chdir(tmp_path)
    first, second = OWN_PICTURES
    assert dcgan_mnist.main(arguments(first.replace("1000", "100"))) == 0
    argv = [*arguments(second.replace("100", "2")), *SMALL, "--device", "cpu"]
    assert dcgan_mnist.main(argv) == 0
    data = Path("result", "generated.npy")
    assert f"Training on 100 pictures from {data}\n" in capsys.readouterr().out
    assert Path("sevens", "generated_epoch_002.png").exists()


def test_readme_gives_no_commands_but_those_that_are_tried():
    assert COMMANDS >= OTHER_COMMANDS
    for command in PROGRAM_COMMANDS:
        assert "dcgan_mnist.py" in command


SMALL_BENCHMARK = """
import benchmark
benchmark.EPOCHS = 1
benchmark.SAME_TIME_EPOCHS = 2
benchmark.SEEDS = (0,)
benchmark.RECORD_SEEDS = (100, 101)
benchmark.dcgan_mnist.EVALUATED = 100
benchmark.STEPS = 1
benchmark.ROUNDS = 2
benchmark.main()
"""


@pytest.fixture
def small_clone(tmp_path: Path) -> Path:
    """The repository with 100 digits and a benchmark that measures little."""
    clone = tmp_path / "clone"
    (clone / "tests").mkdir(parents=True)
    (clone / "result" / "example").mkdir(parents=True)
    shutil.copy(ROOT / "dcgan_mnist.py", clone)
    shutil.copy(ROOT / "tests" / "benchmark.py", clone / "tests")
    (clone / "tests" / "small_benchmark.py").write_text(SMALL_BENCHMARK)
    write_split(clone / "MNIST", 100)
    write_split(clone / "MNIST", 100, "train")
    labels = torch.arange(100).remainder(10).byte()
    write_idx(clone / "MNIST" / "t10k-labels-idx1-ubyte.gz", labels)
    shutil.copy(dcgan_mnist.SCORER, clone / "MNIST")
    shutil.copy(dcgan_mnist.EXAMPLE, clone / "result" / "example")
    return clone


def output_of(command: str, folder: Path, *flags: str) -> str:
    """Run a command with small networks and this Python; return what it prints to stdout."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = finished(" ".join([command, *SMALL, *flags]), folder, PATH=path)
    assert done.code == 0, done.err
    return done.out


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="PyTorch's torchrun may not work on Windows")
def test_torchrun_trains_with_the_readmes_command(small_clone: Path):
    (command,) = (command for command in COMMANDS if command.startswith("torchrun"))
    out = output_of(command, small_clone, "--device", "cpu")  # there may be one GPU only
    assert out.count("Epoch 10/10") == 1
    assert (small_clone / "result" / "generated_epoch_010.png").exists()


@pytest.mark.slow
def test_the_benchmark_prints_the_figures_of_the_speed_table(small_clone: Path):
    out = output_of("python tests/small_benchmark.py", small_clone)
    for row in ("textbook loop, fp32", "this program, fp32", "this program, bf16"):
        assert row in out


@pytest.mark.slow
def test_the_benchmark_prints_the_figures_of_the_record_and_draws_its_picture(small_clone: Path):
    out = output_of("python tests/small_benchmark.py --to-quality", small_clone)
    rows = re.findall(r"^(\w.*?) {2,}(\d+) +([\d,]+) +[\d.]+ +[\d.]+ +\d", out, re.MULTILINE)
    assert rows == [
        ("textbook loop", "1", "2"),
        ("textbook loop, averaged", "1", "2"),
        ("with the record's settings", "1", "6"),
        ("with the record's settings, averaged", "1", "6"),
        ("loss on logits", "1", "6"),
        ("loss on logits, averaged", "1", "6"),
        ("by this program, fp32", "1", "6"),
        ("in bf16: the record", "2", "6"),
        ("recipe article", "1", "2"),
        ("recipe tuned", "1", "2"),
        ("recipe tuned, resumed", "1", "4"),
    ]
    assert len(re.findall(r"^\d of 2 records reach the textbook loop", out, re.MULTILINE)) == 2
    for name in ("same_time.png", "recipes.png"):
        assert (small_clone / "result" / name).exists()


def test_readme_names_the_command_whose_time_to_quality_is_measured():
    record = f"python dcgan_mnist.py --recipe quick --epochs {BENCHMARK.RECORD_EPOCHS}"
    assert f"\n    {record}\n" in README


def test_the_lines_for_python_draw_with_the_included_generator():
    lines = re.search(r"^    import torch\n(?:    .+\n)+", README, re.MULTILINE)[0]
    names: dict[str, object] = {}
    exec(lines.replace("    ", ""), names)
    assert names["images"].shape == (16, 1, 28, 28)
    assert names["images"].dtype == torch.float32
    assert names["images"].abs().max() <= 1


def test_readme_names_no_flag_that_is_not_there(capsys: pytest.CaptureFixture[str]):
    dcgan_mnist.main(["--help"])
    there = set(re.findall(r"--[a-z][a-z0-9-]+", capsys.readouterr().out))
    text = README
    for command in sorted(OTHER_COMMANDS, key=len, reverse=True):
        text = text.replace(command, "")
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text))
    assert len(named) > 10
    assert named <= there


def test_readme_lists_every_file_a_run_writes():
    drawn = {"generated.png", "generated.npy", "interpolation.png", "score.json", "nearest.png"}
    for name in (RUN_FILES | drawn | {"generator_best.pt"}) - {"generated_epoch_002.png"}:
        assert f"`{name}`" in README


def test_the_messages_in_readmes_troubleshooting_are_the_programs():
    source = (ROOT / "dcgan_mnist.py").read_text(encoding="utf-8")
    table = README.split("## Troubleshooting")[1].split("\n\n")[1]
    first_cells = [row.split("|")[1] for row in table.splitlines()[2:]]
    messages = [m.strip(" .…") for cell in first_cells for m in re.findall(r"`([^`]+)`", cell)]
    assert len(messages) > 8
    for message in messages:
        assert message in re.sub(r"\{[^}]*\}", "", source) or message in source


def test_readmes_log_lines_have_the_programs_form():
    assert LOG_LINE.search(README)
    line = dcgan_mnist.score_line(dict.fromkeys(dcgan_mnist.SCORES, 1), {"fd": 1})
    assert re.sub(r"\d+(\.\d+)?", "N", line) in re.sub(r"\d+(\.\d+)?", "N", README)


def test_the_links_lead_to_files_that_are_there():
    links = re.findall(r"\]\(([^):#]+)\)", README)
    assert len(links) > 4
    for link in links:
        assert (ROOT / link).exists(), link
