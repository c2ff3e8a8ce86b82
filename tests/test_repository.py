"""The repository: what is in it."""

import ast
import re
import subprocess

import pytest
from helpers import ROOT

SOURCE = (ROOT / "dcgan_mnist.py").read_text(encoding="utf-8")


def tracked() -> list[str]:
    """Return the paths of the files that the repository keeps."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is a download without the repository")
    listing = ["git", "-C", str(ROOT), "ls-files"]
    done = subprocess.run(listing, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.splitlines()


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
        "result/example/same_time.png",
        "result/example/generator.pt",
        "result/example/make_example.py",
    }
    ignored = ["git", "-C", str(ROOT), "check-ignore", "-q"]
    done = subprocess.run([*ignored, "result/checkpoint.pt"], timeout=60, check=False)
    assert done.returncode == 0


def test_the_scripts_own_metadata_names_the_programs_requirements():
    block = re.match(r"# /// script\n((?:# .*\n)+?)# ///\n", SOURCE)[1]
    python, packages = re.fullmatch(
        r'requires-python = "(.*?)"\ndependencies = (\[.*?\])\n',
        re.sub(r"^# ", "", block, flags=re.MULTILINE),
        re.DOTALL,
    ).groups()
    assert python == ">=3.10"
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert ast.literal_eval(packages) == lines
