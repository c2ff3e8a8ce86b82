"""The pictures: what a run shows of its digits and figures, and the functions that draw them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    GRID_SIZE,
    RUN_FILES,
    SMALL,
    THREE_STEPS,
    contents,
    digits_in,
    new_gan,
    saved,
    size_of,
    write_split,
)
from PIL import Image, ImageSequence
from torch import nn

import dcgan_mnist
from dcgan_mnist import (
    FIXED_NOISE,
    SAMPLES,
    SCORES,
    STATS,
    animation,
    draw,
    grid,
    load_weights,
    make_noise,
    nearest,
    png,
    stacked,
    stages,
)

NAN = float("nan")  # not scored
STAGE_SIZE = (GRID_SIZE[0], GRID_SIZE[1] + 32)  # a grid and its caption


def flat(level: int, count: int = SAMPLES) -> torch.Tensor:
    """Return digits (count, 28, 28) that are all of one grey level."""
    return torch.full((count, 28, 28), level, dtype=torch.uint8)


def figures(*values: float, repeat: int = 1) -> dict[str, torch.Tensor]:
    """Return the STATS of steps, each of which takes these values over and over."""
    return dict.fromkeys(STATS, torch.tensor(values).repeat(repeat))


def distances(*values: float) -> dict[str, torch.Tensor]:
    """Return the SCORES of epochs with these FDs."""
    return dict.fromkeys(SCORES, torch.tensor(values))


def panels(picture: Image.Image) -> int:
    """Return how many panels a picture of curves has: frames with long black lines."""
    black = (np.asarray(picture.convert("L")) < 64).sum(axis=1) > picture.width / 2
    return int((np.diff(black.astype(int)) > 0).sum()) // 2  # each has one above and one below


def curves(stats: dict[str, torch.Tensor], scores: dict[str, torch.Tensor]) -> Image.Image:
    """Draw the curves of a run whose epochs have the same number of steps."""
    epochs = len(scores["fd"])
    return dcgan_mnist.curves(stats, scores, [len(stats["ds_loss"]) // epochs] * epochs)


# -------------------------------------- the pictures of a run -------------------------------------
def test_a_run_writes_every_file_and_nothing_else(run):
    assert run(*THREE_STEPS, "--epochs", 2).code == 0
    assert set(contents("result")) == RUN_FILES


@pytest.mark.parametrize("batch_size", [8, 50, 60])
def test_any_batch_size_gives_grids_of_fifty(run, batch_size: int):
    run("--epochs", 1, "--batch-size", batch_size)
    for name in ("real_samples.png", "generated_epoch_001.png"):
        assert size_of(f"result/{name}") == GRID_SIZE


def test_fewer_than_fifty_digits_still_give_every_picture(run, data_dir: Path):
    write_split(data_dir, 7)
    assert run("--epochs", 2, "--batch-size", 3).code == 0
    assert set(contents("result")) == RUN_FILES


def test_real_samples_are_the_first_digits_training_sees(run, monkeypatch: pytest.MonkeyPatch):
    seen = []
    original = dcgan_mnist.training_step

    def spy(gan: dcgan_mnist.DCGAN, real: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        seen.append(real)
        return original(gan, real, z)

    monkeypatch.setattr(dcgan_mnist, "training_step", spy)
    run("--epochs", 1, "--batch-size", 50)
    first = ((seen[0] + 1) * 127.5).round().byte().squeeze(1)
    assert torch.equal(digits_in("result/real_samples.png"), first)


def test_the_picture_of_every_epoch_is_drawn_from_the_same_noise(run):
    z = make_noise(SAMPLES, 8, 0, FIXED_NOISE)
    for epochs in (1, 2):
        run(*THREE_STEPS, "--epochs", epochs, "--precision", "fp32", "--output-dir", epochs)
        gan = new_gan()
        load_weights(gan.parts(), saved(str(epochs)), Path("checkpoint.pt"))
        picture = f"{epochs}/generated_epoch_{epochs:03d}.png"
        assert torch.equal(digits_in(picture), draw(gan.average, z))


def test_the_animation_shows_the_stages_of_the_timeline_again_and_again(run):
    run("--batch-size", 60, "--epochs", 12)
    with Image.open("result/timeline.png") as timeline:
        timeline_stages = np.split(np.asarray(timeline), 11)
    frames = []
    times = []  # milliseconds
    with Image.open("result/training.gif") as shown:
        assert shown.info["loop"] == 0
        for frame in ImageSequence.Iterator(shown):
            times.append(frame.info["duration"])
            frames.append(np.asarray(frame.convert("L")))
    np.testing.assert_array_equal(frames, timeline_stages)
    assert times == [600] * 10 + [2000]


def test_the_timeline_of_a_run_shows_the_digits_of_its_epochs_and_the_real_ones(run):
    run("--batch-size", 60, "--epochs", 2)
    samples = [digits_in(f"result/generated_epoch_00{epoch}.png") for epoch in (1, 2)]
    real = digits_in("result/real_samples.png")
    assert not torch.equal(*samples)
    pictures = stages(lambda epoch: samples[epoch - 1], 2, real)
    written = contents("result")
    assert written["timeline.png"] == png(stacked(pictures))
    assert written["training.gif"] == animation(pictures)


def test_the_curves_of_a_run_are_those_of_its_figures(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    flags = [*SMALL, "--batch-size", "20", "--epochs", "2", "--data-dir", str(data_dir)]
    assert dcgan_mnist.main([*flags, "--device", "cpu"]) == 0
    checkpoint = saved()
    expected = png(curves(checkpoint["stats"], checkpoint["scores"]))
    assert contents("result")["loss_curve.png"] == expected


# ------------------------------------------- the functions ----------------------------------------
def test_functions_that_draw_pictures_write_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    pictures = [
        grid(flat(7), "a caption"),
        *stages(flat, 3, flat(255)),
        stacked([grid(flat(7)), grid(flat(8))]),
        curves(figures(0.5, repeat=3), distances(20.0)),
        nearest(flat(7), flat(8)),
    ]
    assert all(isinstance(picture, Image.Image) for picture in pictures)
    assert all(isinstance(file, bytes) for file in (png(pictures[0]), animation(pictures[1:3])))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("count", "size"), [(1, (64, 64)), (10, (604, 64)), (11, (604, 124)), (100, (604, 604))]
)
def test_grids_have_ten_digits_a_row(count: int, size: tuple[int, int]):
    assert grid(flat(0, count)).size == size


def test_a_caption_stands_above_the_digits_and_hides_none():
    plain = np.asarray(grid(flat(100)))
    captioned = np.asarray(grid(flat(100), "epoch 7"))
    assert captioned.shape == (STAGE_SIZE[1], STAGE_SIZE[0])
    assert (captioned[32:] == plain).all()
    assert captioned[:32].any()
    assert (captioned[:32] != np.asarray(grid(flat(100), "epoch 8"))[:32]).any()


def test_grey_levels_are_never_stretched():
    dull = torch.cat([flat(64, 10), flat(128, 40)])
    between = {0, 64, 128}  # black is between the digits
    assert set(np.unique(grid(dull))) == between
    assert set(np.unique(nearest(dull, dull))) == between
    for stage in stages(lambda _: dull, 1, dull):
        assert set(np.unique(np.asarray(stage)[32:])) == between


@pytest.mark.parametrize(("epochs", "shown"), [(1, 1), (10, 10), (25, 10)])
def test_stages_are_at_most_ten_epochs_evenly_chosen_and_the_real_digits_last(
    epochs: int, shown: int
):
    pictures = stages(flat, epochs, flat(255))
    assert {picture.size for picture in pictures} == {STAGE_SIZE}
    levels = [picture.getpixel((4, 36)) for picture in pictures]
    assert len(levels) == shown + 1
    assert levels[0] == 1
    assert levels[-2:] == [epochs, 255]
    distances = np.diff(levels[:-1])
    assert (distances > 0).all()
    assert np.ptp(distances) <= 1 if shown > 1 else len(distances) == 0


def test_stages_have_one_size_also_with_few_real_digits():
    pictures = stages(flat, 2, flat(255, 7))
    assert {picture.size for picture in pictures} == {STAGE_SIZE}


def test_stacked_pictures_are_one_below_the_other():
    stack = np.asarray(stacked([grid(flat(1, 10)), grid(flat(2, 20))]))
    assert stack.shape == (64 + 124, 604)
    assert set(np.unique(stack[:64])) == {0, 1}
    assert set(np.unique(stack[64:])) == {0, 2}


def test_curves_show_every_step_of_a_short_run_and_means_of_a_long_one():
    def are_alike(repeat: int) -> bool:
        level = curves(figures(0.5, 0.5, 0.5, repeat=repeat), distances(20.0))
        rising = curves(figures(0.25, 0.5, 0.75, repeat=repeat), distances(20.0))
        return level.tobytes() == rising.tobytes()

    assert not are_alike(133)  # 399 steps
    assert are_alike(400)  # 1,200 steps: means of three


@pytest.mark.few(1)
@pytest.mark.parametrize("name", STATS)
def test_every_figure_of_a_step_has_a_curve_in_its_panel(name: str):
    stats = figures(0.0, 1.0, repeat=20)
    before = np.asarray(curves(stats, distances(20.0)).convert("L")).astype(int)
    changed = stats | {name: torch.full((40,), 0.5)}
    after = np.asarray(curves(changed, distances(20.0)).convert("L")).astype(int)
    rows = np.flatnonzero((before != after).any(axis=1))
    is_loss = name.endswith("loss")
    assert len(rows) > 0
    assert (rows < 320).all() if is_loss else (rows > 640).all()  # the first panel or the third


def test_outputs_are_shown_between_0_and_1_and_every_curve_has_its_name():
    with_fd = np.asarray(curves(figures(0.25, repeat=20), distances(20.0)).convert("L"))
    frames = np.flatnonzero((with_fd < 64).sum(axis=1) > with_fd.shape[1] / 2)
    top, bottom = frames[frames > 640].min(), frames.max()
    colour = np.asarray(curves(figures(0.25, repeat=20), distances(20.0))).astype(int)
    is_curve = np.ptp(colour, axis=2) > 60  # not grey
    rows = np.flatnonzero(is_curve[top : bottom + 1].sum(axis=1) > colour.shape[1] / 2)
    assert rows.mean() / (bottom - top) == pytest.approx(0.75, abs=0.02)

    right = int(np.flatnonzero((with_fd < 64).sum(axis=0) > 200).max())  # of the panels
    for first, last in ((0, 320), (320, 640), (640, 1000)):
        assert (with_fd[first:last, right + 10 :] < 128).any(), "there is no name"


@pytest.mark.slow
def test_curves_show_the_distance_of_every_epoch_of_a_run_of_any_length():
    stats = figures(0.5, repeat=30 * 40)
    fds = torch.linspace(300, 20, 30).tolist()
    pictures = set()
    for epoch in (None, 1, 2, 15, 29, 30):
        changed = [2 * fd if number == epoch else fd for number, fd in enumerate(fds, 1)]
        pictures.add(curves(stats, distances(*changed)).tobytes())
    assert len(pictures) == 6


def test_the_distance_of_an_epoch_stands_at_its_last_step():
    stats = figures(0.5, repeat=40)
    scores = distances(20.0, 10.0)
    pictures = [dcgan_mnist.curves(stats, scores, steps) for steps in ([20, 20], [5, 35])]
    assert pictures[0].tobytes() != pictures[1].tobytes()


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("fds", "expected"),
    [((NAN, NAN), 2), ((20.0, 10.0), 3), ((NAN, 10.0), 3), ((20.0, NAN), 3), ((20.0,), 3)],
)
def test_curves_have_a_panel_for_the_distance_only_if_anything_is_scored(
    fds: tuple[float, ...], expected: int
):
    assert panels(curves(figures(0.5, repeat=4), distances(*fds))) == expected


@pytest.mark.few(2)
@pytest.mark.parametrize("steps", [1, 401])
@pytest.mark.parametrize(("value", "distance"), [(0.0, NAN), (1e-38, 1e-38), (3e38, 3e38)])
def test_curves_can_be_drawn_whatever_the_figures_are(steps: int, value: float, distance: float):
    assert curves(figures(value, repeat=steps), distances(distance)).size == (1000, 1000)


def test_the_nearest_digits_are_found_among_the_real_ones(tmp_path: Path):
    stream = torch.Generator().manual_seed(0)
    real = torch.randint(0, 256, (500, 28, 28), generator=stream).byte()
    noise = 20 * torch.randn(25, 28, 28, generator=stream)
    generated = (real[100:125] + noise).clamp(0, 255).byte()
    nearest(generated, real).save(tmp_path / "nearest.png")
    rows = [generated[:10], real[100:110], generated[10:20], real[110:120]]
    assert torch.equal(digits_in(tmp_path / "nearest.png", rows=4), torch.cat(rows))

    nearest(generated[:3], real).save(tmp_path / "few.png")
    again_and_again = real[100:103].repeat(4, 1, 1)[:10]
    assert torch.equal(digits_in(tmp_path / "few.png", rows=4)[10:20], again_and_again)


# --------------------------------------------- drawing --------------------------------------------
def test_drawing_changes_nothing():
    gan = new_gan()
    z = make_noise(SAMPLES, 8, 0, FIXED_NOISE)
    weights = {name: tensor.clone() for name, tensor in gan.average.state_dict().items()}
    random_state = torch.get_rng_state()
    digits = draw(gan.average, z)
    assert torch.equal(torch.get_rng_state(), random_state)
    for name, tensor in gan.average.state_dict().items():
        assert torch.equal(tensor, weights[name])
    assert torch.equal(draw(gan.average, z), digits)


def test_a_digit_does_not_depend_on_those_drawn_with_it():
    generator = new_gan().average
    z = make_noise(501, 8, 0, FIXED_NOISE)
    together = draw(generator, z)
    assert together.shape == (501, 28, 28)
    alone = draw(generator, z[500:])
    assert (together[500].int() - alone[0].int()).abs().max() <= 1


def test_the_same_noise_gives_the_same_digits_also_with_random_layers():
    generator = new_gan().generator
    generator.layers.append(nn.Dropout(0.5))
    generator.eval()
    generator.layers[-1].train()
    z = make_noise(150, 8, 0, FIXED_NOISE)
    torch.manual_seed(1)
    digits = draw(generator, z)
    torch.manual_seed(2)
    random_state = torch.get_rng_state()
    assert torch.equal(draw(generator, z), digits)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not torch.equal(digits[:50], draw(generator, z[:50].flip(0)).flip(0))  # they are random


class Watched(nn.Module):
    """A generator that keeps what each call would need memory for."""

    def __init__(self) -> None:
        super().__init__()
        self.level = nn.Parameter(torch.zeros(1))
        self.sizes = []
        self.graphs = []

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        images = self.level + torch.zeros(len(z), 1, 28, 28)
        self.sizes.append(len(z))
        self.graphs.append(images.requires_grad)
        return images


def test_drawing_many_digits_takes_bounded_memory():
    generator = Watched()
    assert draw(generator, torch.zeros(10_000, 1, 1, 1)).shape == (10_000, 28, 28)
    assert max(generator.sizes) <= 500
    assert not any(generator.graphs)
