import itertools
from pathlib import Path

import pytest
import torch
from conftest import new_gan, write_split
from PIL import Image

import dcgan_mnist
from dcgan_mnist import draw, grid, write_results

FILES = {
    "real_samples.png",
    "generated_epoch_001.png",
    "generated_epoch_002.png",
    "timeline.png",
    "training.gif",
    "loss_curve.png",
    "history.csv",
    "checkpoint.pt",
}
GRID_SIZE = (604, 304)  # ten digits by five, each 28 pixels and 2 between them, doubled


def size_of(path: Path | str) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


def digits_in(path: Path, rows: int = 5) -> torch.Tensor:
    """Read the digits (rows * 10, 28, 28) out of a picture."""
    with Image.open(path) as image:
        picture = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    picture = picture.view(-1, GRID_SIZE[0])[::2, ::2]
    cells = [
        picture[2 + 30 * row : 30 * row + 30, 2 + 30 * column : 30 * column + 30]
        for row in range(rows)
        for column in range(10)
    ]
    return torch.stack(cells)


def saved(folder: str = "result") -> dict:
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=True)


def test_a_run_writes_every_file_and_nothing_else(run):
    assert run("--epochs", 2, "--batch-size", 20).code == 0
    assert {path.name for path in Path("result").iterdir()} == FILES


@pytest.mark.parametrize("batch_size", [8, 50, 60])
def test_any_batch_size_gives_grids_of_fifty(run, batch_size: int):
    run("--epochs", 1, "--batch-size", batch_size)
    for name in ("real_samples.png", "generated_epoch_001.png"):
        assert size_of(f"result/{name}") == GRID_SIZE


def test_fewer_than_fifty_digits_still_give_every_picture(run, tmp_path: Path):
    write_split(tmp_path / "data", 7)
    assert run("--epochs", 2, "--batch-size", 3).code == 0
    assert {path.name for path in Path("result").iterdir()} == FILES


def test_real_samples_are_the_first_digits_training_sees(run, monkeypatch):
    seen = []
    original = dcgan_mnist.training_step

    def spy(gan: object, real: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        seen.append(real)
        return original(gan, real, z)

    monkeypatch.setattr(dcgan_mnist, "training_step", spy)
    run("--epochs", 1)
    first = ((seen[0] + 1) * 127.5).round().byte().squeeze(1)
    assert torch.equal(digits_in(Path("result/real_samples.png")), first)


def test_every_picture_is_drawn_from_the_same_noise(run):
    noises = []
    for epochs in (1, 2):
        run("--epochs", epochs, "--batch-size", 20, "--output-dir", str(epochs))
        state = saved(str(epochs))
        gan = new_gan(**state["settings"])
        gan.average.load_state_dict(state["average"])
        noises.append(state["fixed_noise"])
        drawn = draw(gan.average, state["fixed_noise"])
        path = Path(str(epochs)) / f"generated_epoch_{epochs:03d}.png"
        assert torch.equal(digits_in(path), drawn)
    assert torch.equal(*noises)


def test_minus_one_is_black_and_one_is_white_without_stretching():
    class Ramp(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.levels = torch.nn.Parameter(torch.tensor([-1.0, -0.5, 0.0, 1.0]))

        def forward(self, z: torch.Tensor) -> torch.Tensor:
            return self.levels.view(4, 1, 1, 1).expand(4, 1, 28, 28)

    digits = draw(Ramp(), torch.zeros(4, 1, 1, 1))
    assert digits[:, 0, 0].tolist() == [0, 64, 128, 255]
    assert grid(digits[1:3]).getextrema() == (0, 128)


@pytest.mark.usefixtures("small_networks")
def test_drawing_changes_nothing():
    gan = new_gan()
    before = {name: tensor.clone() for name, tensor in gan.average.state_dict().items()}
    state = torch.get_rng_state()
    graphs = []
    gan.average.register_forward_hook(lambda *call: graphs.append(call[2].requires_grad))
    digits = draw(gan.average, gan.fixed_noise)
    assert torch.equal(state, torch.get_rng_state())
    after = gan.average.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert graphs == [False]
    assert all(p.grad is None for p in gan.average.parameters())
    assert torch.equal(digits, draw(gan.average, gan.fixed_noise))


@pytest.mark.usefixtures("small_networks")
def test_a_digit_does_not_depend_on_those_drawn_with_it():
    generator = new_gan().average
    z = torch.randn(501, dcgan_mnist.LATENT_DIM, 1, 1, generator=torch.Generator().manual_seed(0))
    together = draw(generator, z)
    assert together.shape == (501, 28, 28)
    assert (together[500].int() - draw(generator, z[500:])[0].int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("count", "size"), [(1, (56, 56)), (10, (604, 64)), (11, (604, 124)), (100, (604, 604))]
)
def test_grids_have_ten_digits_a_row(count: int, size: tuple[int, int]):
    assert grid(torch.zeros(count, 28, 28, dtype=torch.uint8)).size == size


@pytest.mark.usefixtures("small_networks")
@pytest.mark.parametrize(("epochs", "shown"), [(1, 1), (10, 10), (25, 10)])
def test_timeline_and_animation_show_at_most_ten_epochs_and_the_real_digits_last(
    tmp_path: Path, epochs: int, shown: int
):
    gan = new_gan()
    gan.epoch, gan.history = epochs, torch.ones(epochs, 9)
    gan.samples = torch.arange(1, epochs + 1).byte().view(-1, 1, 1, 1).expand(-1, 50, 28, 28)
    real = torch.full((50, 28, 28), 255, dtype=torch.uint8)
    write_results(gan, real, tmp_path)

    stage = GRID_SIZE[1] + 32
    with Image.open(tmp_path / "timeline.png") as timeline:
        assert timeline.size == (GRID_SIZE[0], (shown + 1) * stage)
        levels = [timeline.getpixel((4, i * stage + 36)) for i in range(shown + 1)]
    assert levels == sorted(set(levels))
    assert (levels[0], levels[-2], levels[-1]) == (1, epochs, 255)
    steps = [b - a for a, b in itertools.pairwise(levels[:-1])]
    assert not steps or max(steps) - min(steps) <= 1

    with Image.open(tmp_path / "training.gif") as animation:
        assert animation.n_frames == shown + 1
        assert animation.size == (GRID_SIZE[0], stage)
        assert animation.info["loop"] == 0


@pytest.mark.usefixtures("small_networks")
def test_curves_of_a_long_run_are_drawn_from_means(tmp_path: Path, monkeypatch):
    drawn = []
    from matplotlib.axes import Axes

    original = Axes.plot

    def spy(axes: Axes, x: torch.Tensor, y: torch.Tensor, **kwargs: object) -> list:
        drawn.append((x, y))
        return original(axes, x, y, **kwargs)

    monkeypatch.setattr(Axes, "plot", spy)
    gan = new_gan()
    gan.epoch, gan.samples = 2, torch.zeros(2, 50, 28, 28).byte()
    gan.history = torch.arange(1000.0).view(-1, 1).expand(-1, 9)
    write_results(gan, gan.samples[0], tmp_path)
    x, y = drawn[0]
    assert len(x) == len(y) == 334
    assert y[0].tolist() == [1.0, 1.0]
    assert size_of(tmp_path / "loss_curve.png") == (1000, 1000)
    lines = (tmp_path / "history.csv").read_text().splitlines()
    assert len(lines) == 1001
    assert lines[501].startswith("2,1,500,")
