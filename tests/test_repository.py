"""The repository: what is in it, and that README.md says what the program does."""

import ast
import re
import subprocess

import pytest
from helpers import LOG_LINE, ROOT, RUN_FILES

import dcgan_mnist

README = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCE = (ROOT / "dcgan_mnist.py").read_text(encoding="utf-8")


def tracked() -> list[str]:
    """Return the paths of the files that the repository keeps."""
    listing = ["git", "-C", str(ROOT), "ls-files"]
    return subprocess.run(listing, capture_output=True, text=True, check=True).stdout.splitlines()


def test_the_top_level_holds_what_a_user_expects():
    top = {path.split("/")[0] for path in tracked()}
    assert {name for name in top if not name.startswith(".")} == {
        "dcgan_mnist.py",
        "README.md",
        "requirements.txt",
        "result",
        "tests",
        "MNIST",
    }


def test_readme_names_the_command_whose_time_to_quality_is_measured():
    source = (ROOT / "tests" / "benchmark.py").read_text(encoding="utf-8")
    record = ast.literal_eval(re.search(r"^RECORD = (\(.*?\))", source, re.MULTILINE)[1])
    assert re.findall(r"^record: (.*)", README, re.MULTILINE) == [
        f"python dcgan_mnist.py {' '.join(record)}"
    ]


@pytest.mark.parametrize("recipe", dcgan_mnist.RECIPES)
def test_readme_says_which_flags_a_recipe_stands_for(recipe: str):
    changes = dcgan_mnist.RECIPES[recipe]
    flags = [f"{dcgan_mnist.flag(name)} {value}" for name, value in changes.items()]
    row = re.search(r"^\| `--recipe` .*", README, re.MULTILINE)[0]
    meaning = row.split(f"`{recipe}`:")[1].split(";")[0].split(". ")[0]
    assert re.findall(r"`(--.*)`", meaning) == [" ".join(flags)] * bool(flags)


def test_the_repository_keeps_an_example_run_and_ignores_the_users():
    assert {path for path in tracked() if path.startswith("result/")} == {
        "result/example/timeline.png",
        "result/example/training.gif",
        "result/example/loss_curve.png",
        "result/example/recipes.png",
        "result/example/same_time.png",
    }
    ignored = ["git", "-C", str(ROOT), "check-ignore", "-q"]
    assert subprocess.run([*ignored, "result/checkpoint.pt"], check=False).returncode == 0


def test_readme_lists_every_flag_with_its_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        dcgan_mnist.main(["--help"])
    printed = capsys.readouterr().out
    flag = re.compile(r"^  (--[a-z0-9-]+)( \S+)?\s.*?\(default: (.*?)\)$", re.M | re.S)
    in_help = {name: default if value else "off" for name, value, default in flag.findall(printed)}
    table = README.split("| flag | default | meaning |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| `(--[a-z0-9-]+)[^`]*` \| (.*?) \|", table, re.MULTILINE)
    in_readme = {name: default.replace("`", "") for name, default in rows}
    assert len(rows) == len(in_readme)
    for defaults in (in_help, in_readme):  # one says where it is, the other links to it
        assert defaults["--data-dir"].startswith("MNIST")
        del defaults["--data-dir"]
    assert in_readme == in_help


def test_readme_lists_every_file_a_run_writes():
    for name in RUN_FILES - {"generated_epoch_002.png"}:
        assert f"`{name}`" in README


def test_readme_shows_a_log_line_of_the_programs_form():
    assert LOG_LINE.search(README)


def test_the_scripts_own_metadata_names_the_programs_requirements():
    block = re.match(r"# /// script\n((?:# .*\n)+?)# ///\n", SOURCE)[1]
    python, packages = re.fullmatch(
        r'requires-python = "(.*?)"\ndependencies = (\[.*?\])\n',
        re.sub(r"^# ", "", block, flags=re.MULTILINE),
        re.DOTALL,
    ).groups()
    assert python == ">=3.10"
    program = (ROOT / "requirements.txt").read_text(encoding="utf-8").split("\n\n")[0]
    lines = [line for line in program.splitlines() if not line.startswith("#")]
    assert ast.literal_eval(packages) == lines
