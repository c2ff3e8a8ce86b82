"""Make scorer.pt, the judge of drawn digits, which is the same for everyone.

    python MNIST/make_scorer.py --output scorer.pt    about six minutes

A small classifier learns the 60,000 digits of MNIST's training split; the 10,000 of the test split
only tell how well. Its file also holds the means and covariances of both splits' features, with
which drawn digits are compared, and the scores that real digits get.

One thread computes all, so that the number of cores makes no difference: on machines of the same
kind the same seed gives the same classifier. dcgan_mnist.py takes only the file whose SHA-256 it
knows, for figures of another judge could not be compared; to ship a new one, change SCORER_SHA256
there to what this program prints.
"""

import argparse
import hashlib
import io
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dcgan_mnist import (
    BUNDLED,
    EVALUATED,
    SCORED,
    Classifier,
    Scorer,
    load_pictures,
    moments,
    read_idx,
    some,
    to_images,
)

EPOCHS = 15
BATCH_SIZE = 100
LARGEST_RATE = 0.01  # reached after three tenths of training; then it falls to almost zero
SHIFTS = 2  # pixels to each side


def random_numbers(seed: int, stream: int) -> torch.Generator:
    """Return the random numbers of a stream, which do not depend on those of the program.

    Stream 0 is for the shifts, stream e for the order of the digits in epoch e.
    """
    return torch.Generator().manual_seed(seed * 2**20 + stream)


def load_labels(split: str) -> Tensor:
    """Read the labels (n,) of a split's digits."""
    prefix = {"train": "train", "test": "t10k"}[split]
    return read_idx(BUNDLED / f"{prefix}-labels-idx1-ubyte.gz").long()


def train(digits: Tensor, labels: Tensor, seed: int) -> Classifier:
    """Train a classifier on digits (n, 28, 28) of uint8, each batch shifted by a pixel or two."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        classifier = Classifier()
    optimizer = torch.optim.Adam(classifier.parameters(), fused=True)
    steps = EPOCHS * len(digits) // BATCH_SIZE
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LARGEST_RATE, steps)
    shifts = random_numbers(seed, stream=0)
    for epoch in range(1, EPOCHS + 1):
        losses = []
        order = torch.randperm(len(digits), generator=random_numbers(seed, epoch))
        for index in order.split(BATCH_SIZE):
            shift = torch.randint(-SHIFTS, SHIFTS + 1, (2,), generator=shifts).tolist()
            images = to_images(digits[index]).roll(shift, dims=(2, 3))
            loss = cross_entropy(classifier(images), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        print(f"Epoch {epoch}/{EPOCHS}: loss {sum(losses) / len(losses):.4f}", flush=True)
    return classifier.eval()


def main() -> None:
    """Train the classifier, judge all real digits with it and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="default: 0, as shipped")
    parser.add_argument("--output", type=Path, required=True, help="the file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)

    digits = {split: load_pictures(BUNDLED, split)[0] for split in ("train", "test")}
    labels = {split: load_labels(split) for split in digits}
    classifier = train(digits["train"], labels["train"], options.seed)
    judged = {split: classifier.judge(digits[split]) for split in digits}
    right = judged["test"][1].argmax(dim=1) == labels["test"]
    content = {
        "classifier": classifier.state_dict(),
        "accuracy": right.double().mean().item(),  # of the test split
        "moments": {split: moments(features) for split, (features, _) in judged.items()},
        "floors": {"train": {}, "test": {}},  # by the split seen, and then the number of digits
    }
    for split in digits:
        scorer = Scorer(content, split, torch.device("cpu"))
        for count in (SCORED, EVALUATED):
            real = some(digits[split], count)
            floor = scorer.evaluate(real, digits[split], digits[scorer.unseen])
            content["floors"][split][count] = floor
            print(f"{count} real digits of the {split} split: {floor}")
    buffer = io.BytesIO()  # for torch.save writes the name of a file into it
    torch.save(content, buffer)
    options.output.write_bytes(buffer.getvalue())
    checksum = hashlib.sha256(buffer.getvalue()).hexdigest()
    print(f"{content['accuracy']:.2%} of the test split are recognised")
    print(f'SCORER_SHA256 = "{checksum}"')


if __name__ == "__main__":
    main()
