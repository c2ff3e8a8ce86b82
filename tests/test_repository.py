import ast
import re
import subprocess

from conftest import ROOT
from test_pictures import FILES

import dcgan_mnist

README = (ROOT / "README.md").read_text()
SOURCE = (ROOT / "dcgan_mnist.py").read_text()


def tracked() -> list[str]:
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


def test_the_repository_keeps_an_example_run_and_ignores_the_users():
    assert {path for path in tracked() if path.startswith("result/")} == {
        "result/example/timeline.png",
        "result/example/training.gif",
        "result/example/loss_curve.png",
        "result/example/recipes.png",
    }
    ignored = ["git", "-C", str(ROOT), "check-ignore", "-q"]
    assert subprocess.run([*ignored, "result/checkpoint.pt"], check=False).returncode == 0


def test_readme_lists_every_flag_with_its_default():
    rows = re.findall(r"^\| `--([a-z0-9-]+)` \| (.*?) \|", README, re.M)
    flags = {name.replace("_", "-"): default for name, (default, _, _) in dcgan_mnist.FLAGS.items()}
    assert [name for name, _ in rows] == list(flags)
    for name, shown in rows:
        default = flags[name]
        if name == "data-dir":
            assert default.name in shown
        else:
            assert shown.strip("`") == (str(default) if default else "0" if name == "seed" else "off")


def test_readme_lists_every_file_a_run_writes():
    for name in FILES - {"generated_epoch_002.png"}:
        assert f"`{name}`" in README


def test_readme_shows_a_log_line_of_the_programs_form():
    from conftest import LOG_LINE

    assert LOG_LINE.search(README)


def test_the_scripts_own_metadata_names_the_programs_requirements():
    block = re.match(r"# /// script\n((?:# .*\n)+?)# ///\n", SOURCE)[1]
    python, packages = re.fullmatch(
        r'requires-python = "(.*?)"\ndependencies = (\[.*?\])\n',
        re.sub(r"^# ", "", block, flags=re.MULTILINE),
        re.DOTALL,
    ).groups()
    assert python == ">=3.10"
    program = (ROOT / "requirements.txt").read_text().split("\n\n")[0]
    lines = [line for line in program.splitlines() if not line.startswith("#")]
    assert ast.literal_eval(packages) == lines


def test_the_file_stays_short_enough_to_read():
    assert len(SOURCE.splitlines()) < 750
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 50, node.name
    step = next(
        node
        for node in ast.walk(ast.parse(SOURCE))
        if isinstance(node, ast.FunctionDef) and node.name == "training_step"
    )
    assert step.end_lineno - step.lineno < 40
