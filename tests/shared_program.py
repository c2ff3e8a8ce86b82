"""The program for torchrun; each process keeps what it trains on and what it ends with."""

import os
import sys
from pathlib import Path

import torch
from helpers import grey_curves

import dcgan_mnist


def main(rank: str, argv: list[str]) -> int:
    """Run a command line; write the number of this process, and what it saw and made of it."""
    Path(f"pid_{rank}").write_text(str(os.getpid()))
    seen: dict[str, list[torch.Tensor]] = {"real": [], "z": [], "weights": []}
    original = dcgan_mnist.training_step

    def step(gan: dcgan_mnist.DCGAN, real: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        stats = original(gan, real, z)
        seen["real"].append(real.clone())
        seen["z"].append(z.clone())
        networks = (gan.generator, gan.discriminator, gan.average)
        seen["weights"] = [p.detach() for network in networks for p in network.parameters()]
        return stats

    dcgan_mnist.training_step = step
    dcgan_mnist.PICTURES["loss_curve.png"] = grey_curves
    with dcgan_mnist.own_process():
        code = dcgan_mnist.main(argv)
    torch.save(seen, f"seen_{rank}.pt")
    return code


if __name__ == "__main__":
    sys.exit(main(os.environ["RANK"], sys.argv[1:]))
