"""The program as a library."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, new_gan

import dcgan_mnist
from dcgan_mnist import load_generator

OPTIONS = ("--batch-size", 20)
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")),
]


@pytest.mark.parametrize("device", DEVICES)
def test_a_trained_generator_is_there_in_three_lines(run, device: str):
    run(*OPTIONS, "--epochs", 2, "--precision", "fp32")
    g = load_generator("result", device=device)
    z = torch.randn(16, dcgan_mnist.LATENT_DIM, 1, 1, device=device)
    images = g(z)
    assert images.shape == (16, 1, 28, 28)
    assert images.device.type == device
    assert images.dtype == torch.float32
    assert images.abs().max() <= 1
    assert not images.requires_grad
    assert torch.equal(g(z), images)
    assert torch.allclose(g(z[:1]), images[:1], atol=1e-5)


def test_the_last_or_the_best_epochs_generator_can_be_had(run, fake_scores):
    fake_scores([10.0, 20.0], [10, 10])
    run(*OPTIONS, "--epochs", 2, "--lr", 0.01, scored=True)
    run(*OPTIONS, "--epochs", 1, "--lr", 0.01, "--output-dir", "one")
    best, last = load_generator(Path("result"), best=True), load_generator("result")
    z = torch.randn(4, dcgan_mnist.LATENT_DIM, 1, 1)
    assert torch.equal(best(z), load_generator("one")(z))
    assert not torch.equal(best(z), last(z))


@pytest.mark.parametrize("best", [False, True])
def test_no_generator_to_load_is_said(tmp_path: Path, best: bool):
    with pytest.raises(dcgan_mnist.Failure, match="train first"):
        load_generator(tmp_path, best)


def test_the_three_lines_of_the_readme_work(tmp_path: Path):
    (tmp_path / "result").mkdir()
    dcgan_mnist.save_checkpoint(new_gan(), tmp_path / "result" / "checkpoint.pt")
    readme = (ROOT / "README.md").read_text()
    lines = readme[readme.index("    import torch\n    from dcgan_mnist") :].split("\n\n")[0]
    code = "\n".join(line[4:] for line in lines.splitlines())
    subprocess.run(
        [sys.executable, "-c", f"{code}\nassert images.shape == (16, 1, 28, 28)"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
    )
