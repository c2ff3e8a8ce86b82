"""Changes of the kind that people make: each on a copy of the program, which must follow."""

import copy
import math
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import (
    ROOT,
    SMALL,
    THREE_STEPS,
    assert_same_run,
    batch,
    grey_curves,
    load_script,
    saved,
)

SOURCE = (ROOT / "dcgan_mnist.py").read_text(encoding="utf-8")
LAST_LAYER = "            nn.Conv2d(4 * width, 1, kernel_size=3),  # (n, 1, 1, 1)\n"
SECOND_LAYER = (
    "            nn.Conv2d(width, 2 * width, kernel_size=4, stride=2, padding=1),"
    "  # (n, 256, 7, 7)\n"
)
THIRD_LAYER = (
    "            nn.Conv2d(2 * width, 4 * width, kernel_size=3, stride=2),  # (n, 512, 3, 3)\n"
)
FIRST_OF_GENERATOR = (
    "            nn.ConvTranspose2d(latent_dim, 4 * width, kernel_size=3),  # (n, 512, 3, 3)\n"
)
SECOND_OF_GENERATOR = (
    "            nn.ConvTranspose2d(4 * width, 2 * width, kernel_size=3, stride=2),"
    "  # (n, 256, 7, 7)\n"
)
THIRD_OF_GENERATOR = (
    "            nn.ConvTranspose2d(2 * width, width, kernel_size=4, stride=2, padding=1),\n"
)
DS_LOSS = (
    "    ds_loss = bce(on_real, torch.ones_like(on_real)) "
    "+ bce(on_fake, torch.zeros_like(on_fake))\n"
)
GN_LOSS = "    loss = bce(on_fake, torch.ones_like(on_fake))\n"
DISCRIMINATOR = (
    "            self.discriminator = Discriminator(settings.width).apply(weights_init)\n"
)
Edits = dict[str, str]


def without_end(layer: str) -> str:
    """Return the expression of a layer, without its comma and comment."""
    return layer.split(",  #")[0].strip().removesuffix(",")


def spectral(layer: str) -> Edits:
    """Put spectral normalisation on a layer."""
    return {layer: f"nn.utils.parametrizations.spectral_norm({without_end(layer)}),\n"}


def with_arguments(layer: str, arguments: str) -> Edits:
    """Give a layer more arguments."""
    return {layer: f"{without_end(layer).removesuffix(')')}, {arguments}),\n"}


NETWORKS: dict[str, Edits] = {
    "spectral_norm in the discriminator": {
        **spectral(SECOND_LAYER),
        **spectral(THIRD_LAYER),
        **spectral(LAST_LAYER),
    },
    "dropout in the generator": {THIRD_OF_GENERATOR: f"nn.Dropout(0.2),\n{THIRD_OF_GENERATOR}"},
    "spectral_norm in the generator": {
        **spectral(FIRST_OF_GENERATOR),
        **spectral(SECOND_OF_GENERATOR),
    },
    "no bias before BatchNorm": {
        **with_arguments(FIRST_OF_GENERATOR, "bias=False"),
        **with_arguments(SECOND_OF_GENERATOR, "bias=False"),
        **with_arguments(THIRD_LAYER, "bias=False"),
    },
    "a dilated last layer": {LAST_LAYER: "nn.Conv2d(4 * width, 1, kernel_size=2, dilation=2),\n"},
    "output padding": {
        FIRST_OF_GENERATOR: "nn.ConvTranspose2d(latent_dim, 4 * width, 2, 2, output_padding=1),\n"
    },
    "strides that differ": {
        THIRD_LAYER: "nn.Conv2d(2 * width, 4 * width, kernel_size=3, stride=(2, 1)),\n",
        LAST_LAYER: "nn.Conv2d(4 * width, 1, kernel_size=(3, 5)),\n",
    },
    "pixels that no patch reaches": {
        THIRD_LAYER: "nn.Conv2d(2 * width, 4 * width, kernel_size=2, stride=3),\n",
        LAST_LAYER: "nn.Conv2d(4 * width, 1, kernel_size=2),\n",
    },
    "groups": with_arguments(THIRD_LAYER, "groups=2"),
    "dropout in the discriminator": {LAST_LAYER: f"nn.Dropout2d(0.3),\n{LAST_LAYER}"},
    "GroupNorm": {
        "            nn.BatchNorm2d(2 * width),\n            nn.ReLU(inplace=True),\n": (
            "            nn.GroupNorm(2, 2 * width),\n            nn.ReLU(inplace=True),\n"
        )
    },
    "a Linear first layer": {
        FIRST_OF_GENERATOR: (
            "nn.Flatten(), nn.Linear(latent_dim, 36 * width), nn.Unflatten(1, (4 * width, 3, 3)),\n"
        )
    },
    "upsampling": {
        THIRD_OF_GENERATOR: (
            "nn.Upsample(scale_factor=2), nn.Conv2d(2 * width, width, kernel_size=3, padding=1),\n"
        )
    },
    "a layer more": {THIRD_LAYER: f"nn.Conv2d(2 * width, 2 * width, 1),\n{THIRD_LAYER}"},
}
TRAINING: dict[str, Edits] = {
    "hinge loss": {
        DS_LOSS: "    ds_loss = (1 - on_real).relu().mean() + (1 + on_fake).relu().mean()\n",
        GN_LOSS: "    loss = -on_fake.mean()\n",
    },
    "RMSprop": {
        "            torch.optim.Adam,\n": "            torch.optim.RMSprop,\n",
        "            betas=(settings.beta1, settings.beta2),\n": "",
        "            fused=True,  # the fastest implementation\n": "",
    },
    "another network": {
        DISCRIMINATOR: (
            f"{DISCRIMINATOR}            self.q = nn.Sequential(nn.Flatten(), nn.Linear(784, 8))\n"
        ),
        "        self.settings = settings\n        self.device = device\n": (
            "        self.optimizer_q = adam(self.q.parameters())\n"
            "        self.settings = settings\n        self.device = device\n"
        ),
        '            "average": self.average,\n': (
            '            "average": self.average,\n            "q": self.q,\n'
            '            "optimizer_q": self.optimizer_q,\n'
        ),
        "    gan.optimizer_g.step()\n": (
            "    gan.optimizer_g.step()\n"
            "    gan.optimizer_q.zero_grad()\n"
            "    gan.q(fake.detach()).square().mean().backward()\n"
            "    gan.optimizer_q.step()\n"
        ),
    },
    "another network, of the generator's optimiser": {
        DISCRIMINATOR: (
            f"{DISCRIMINATOR}            self.q = nn.Sequential(nn.Flatten(), nn.Linear(784, 8))\n"
        ),
        "        self.optimizer_g = adam(self.generator.parameters())\n": (
            "        weights = [*self.generator.parameters(), *self.q.parameters()]\n"
            "        self.optimizer_g = adam(weights)\n"
        ),
        '            "average": self.average,\n': (
            '            "average": self.average,\n            "q": self.q,\n'
        ),
        "    gan.optimizer_g.step()\n": (
            "    gan.q(fake.detach()).square().mean().backward()\n    gan.optimizer_g.step()\n"
        ),
    },
    "noise on the real digits": {
        "        on_real = gan.discriminator.logits(real)  # (n,)\n": (
            "        on_real = gan.discriminator.logits(real + 0.1 * torch.randn_like(real))\n"
        )
    },
}


STEP = "                stats[i] = step(real, z)\n"
SCHEDULES: dict[str, Edits] = {
    "noise that fades": {
        "        self.epoch = 0  # epochs done\n": (
            "        self.epoch = 0\n        self.sigma = 1.0\n"
        ),
        STEP: f"                gan.sigma = 0.1**gan.epoch\n{STEP}",
        "        on_real = gan.discriminator.logits(real)  # (n,)\n": (
            "        noisy = real + gan.sigma * torch.randn_like(real)\n"
            "        on_real = gan.discriminator.logits(noisy)\n"
        ),
    },
    "a layer that is frozen in the first epoch": {
        STEP: f"                gan.discriminator.layers[0].requires_grad_(gan.epoch > 0)\n{STEP}"
    },
    "an encoder whose optimiser updates the generator too": {
        DISCRIMINATOR: (
            f"{DISCRIMINATOR}"
            "            self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(784, 8))\n"
        ),
        "        self.settings = settings\n        self.device = device\n": (
            "        weights = [*self.encoder.parameters(), *self.generator.parameters()]\n"
            "        self.optimizer_e = adam(weights)\n"
            "        self.settings = settings\n        self.device = device\n"
        ),
        '            "average": self.average,\n': (
            '            "average": self.average,\n            "encoder": self.encoder,\n'
            '            "optimizer_e": self.optimizer_e,\n'
        ),
        "    outputs = [logits.sigmoid()": (
            "    gan.optimizer_e.zero_grad()\n"
            "    made = gan.generator(noises[0])\n"
            "    (gan.encoder(made) - noises[0].flatten(1)).square().mean().backward()\n"
            "    gan.optimizer_e.step()\n"
            "    outputs = [logits.sigmoid()"
        ),
    },
}


@pytest.fixture
def change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Edits], ModuleType]:
    """Return a function that makes edits in a copy of the program and imports it."""

    def change(edits: Edits) -> ModuleType:
        source = SOURCE
        for line, other in edits.items():
            assert source.count(line) == 1, line
            source = source.replace(line, other)
        path = tmp_path / "changed" / "dcgan_mnist.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(source, encoding="utf-8")
        program = load_script(path)
        monkeypatch.setitem(sys.modules, "changed", program)
        program.PICTURES["loss_curve.png"] = grey_curves
        return program

    monkeypatch.chdir(tmp_path)
    return change


@pytest.fixture
def flags(data_dir: Path) -> list[str]:
    """The flags of a small run on the data_dir fixture's digits."""
    flags = [*SMALL, *THREE_STEPS, "--device", "cpu", "--data-dir", data_dir]
    return [str(word) for word in flags]


def assert_trains_draws_and_goes_on_exactly(program: ModuleType, flags: list[str]) -> None:
    """Check that a run that was interrupted ends like one that was not, and can be drawn with."""
    assert program.main([*flags, "--epochs", "2", "--output-dir", "whole"]) == 0
    assert program.main([*flags, "--epochs", "1"]) == 0
    torch.manual_seed(torch.initial_seed() + 1)  # what the caller does must not matter
    assert program.main([*flags, "--epochs", "2", "--resume"]) == 0
    assert_same_run("result", "whole")
    assert program.main(["--generate", "5", "--device", "cpu"]) == 0


def outcome(network: torch.nn.Module, inputs: torch.Tensor) -> list[torch.Tensor]:
    """Return what a network's layers make of inputs in training, and all gradients."""
    torch.manual_seed(0)
    outputs = network.double().layers(inputs.double())
    outputs.square().sum().backward()
    return [outputs, *(parameter.grad for parameter in network.parameters())]


def assert_computes_what_is_written(program: ModuleType) -> None:
    """Check that the layers that are trained give what torch makes of those that are written."""
    gan = program.DCGAN(program.Settings(width=4, latent_dim=8), torch.device("cpu"))
    networks = (gan.generator, gan.discriminator)
    written = copy.deepcopy(networks)
    program.fastest_step(gan)
    images, z = batch()
    for trained, plain, inputs in zip(networks, written, (z, images), strict=True):
        for a, b in zip(outcome(trained, inputs), outcome(plain, inputs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.few(2)
@pytest.mark.parametrize("edit", NETWORKS)
def test_another_layer_is_trained_as_it_is_written(
    change: Callable[[Edits], ModuleType], flags: list[str], edit: str
):
    program = change(NETWORKS[edit])
    assert_computes_what_is_written(program)
    assert_trains_draws_and_goes_on_exactly(program, flags)


@pytest.mark.few(2)
@pytest.mark.parametrize("edit", TRAINING)
def test_another_way_to_train_goes_on_exactly(
    change: Callable[[Edits], ModuleType], flags: list[str], edit: str
):
    program = change(TRAINING[edit])
    assert_trains_draws_and_goes_on_exactly(program, flags)
    assert program.main([*flags, "--dry-run"]) == 0


@pytest.mark.parametrize("edit", SCHEDULES)
def test_what_changes_from_epoch_to_epoch_raises_no_false_alarm(
    change: Callable[[Edits], ModuleType], flags: list[str], edit: str
):
    program = change(SCHEDULES[edit])
    assert program.main([*flags, "--dry-run", "--precision", "fp32"]) == 0
    assert_trains_draws_and_goes_on_exactly(program, flags)


def test_gradients_in_another_memory_layout_than_the_weights_are_found_by_a_dry_run(
    change: Callable[[Edits], ModuleType], flags: list[str], capsys: pytest.CaptureFixture[str]
):
    step = "    gan.optimizer_g.step()\n"
    assign = (
        "    for weight in gan.generator.parameters():\n"
        "        weight.grad = weight.grad.contiguous()\n"
    )
    program = change({step: assign + step})
    assert program.main([*flags, "--dry-run", "--precision", "fp32"]) == 1
    assert "the update of generator" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["optimizer_d", "optimizer_g"])
@pytest.mark.parametrize("odd", [0, 1])
def test_a_step_that_counts_its_calls_is_found_by_a_dry_run(
    change: Callable[[Edits], ModuleType],
    flags: list[str],
    capsys: pytest.CaptureFixture[str],
    name: str,
    odd: int,
):
    update = f"    gan.{name}.step()\n"
    every_other = (
        "    training_step.calls = getattr(training_step, 'calls', 0) + 1\n"
        f"    if training_step.calls % 2 == {odd}:\n    {update}"
    )
    program = change({update: every_other})
    assert program.main([*flags, "--dry-run"]) == 1
    assert re.search(r"error: .*training_step", capsys.readouterr().err)


@pytest.mark.parametrize("name", ["optimizer_d", "optimizer_g"])
def test_gradients_that_are_not_set_to_zero_are_found_by_a_dry_run(
    change: Callable[[Edits], ModuleType],
    flags: list[str],
    capsys: pytest.CaptureFixture[str],
    name: str,
):
    program = change({f"    gan.{name}.zero_grad()\n": ""})
    assert program.main([*flags, "--dry-run", "--precision", "fp32"]) == 1
    assert "the gradient of " in capsys.readouterr().err


@pytest.mark.parametrize("in_the_step", ["", "    gan.shares.mul_(0.5)\n"])
def test_a_tensor_that_training_hands_to_a_step_raises_no_false_alarm(
    change: Callable[[Edits], ModuleType], flags: list[str], in_the_step: str
):
    program = change(
        {
            STEP: f"                gan.shares = torch.rand(len(real))\n{STEP}",
            GN_LOSS: f"{in_the_step}    loss = bce(on_fake, gan.shares)\n",
        }
    )
    assert program.main([*flags, "--dry-run", "--precision", "fp32"]) == 0


def test_a_loss_that_cancels_out_raises_no_false_alarm(
    change: Callable[[Edits], ModuleType], flags: list[str]
):
    nearly_zero = "    ds_loss = ds_loss - ds_loss.detach().round(decimals=4)\n"
    program = change({DS_LOSS: DS_LOSS + nearly_zero})
    assert program.main([*flags, "--dry-run", "--precision", "bf16"]) == 0


def test_the_table_tells_epochs_of_different_lengths_apart(
    change: Callable[[Edits], ModuleType], flags: list[str]
):
    program = change(
        {
            "    return order.to(digits.device)\n": (
                "    return order[: 20 * epoch].to(digits.device)\n"
            )
        }
    )
    assert_trains_draws_and_goes_on_exactly(program, flags)
    assert program.main([*flags, "--epochs", "3", "--resume"]) == 0
    rows = [line.split(",")[:2] for line in Path("result/history.csv").read_text().splitlines()]
    expected = [["1", "1"], ["2", "1"], ["2", "2"], ["3", "1"], ["3", "2"], ["3", "3"]]
    assert rows[1:] == expected


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["generator", "discriminator"])
def test_a_frozen_layer_stays_as_it_is(
    change: Callable[[Edits], ModuleType], flags: list[str], name: str
):
    freeze = f"            self.{name}.layers[0].requires_grad_(False)\n"
    program = change({DISCRIMINATOR: DISCRIMINATOR + freeze})
    assert_trains_draws_and_goes_on_exactly(program, flags)
    assert program.main([*flags, "--dry-run"]) == 0
    weights = saved()[name]
    settings = program.Settings(width=4, latent_dim=8)
    first = getattr(program.DCGAN(settings, torch.device("cpu")), name).state_dict()
    assert torch.equal(weights["layers.0.weight"], first["layers.0.weight"])
    last = list(first)[-2]
    assert not torch.equal(weights[last], first[last])


def test_a_resumed_run_goes_on_with_another_rate_of_an_optimiser(
    change: Callable[[Edits], ModuleType], flags: list[str]
):
    assert change({}).main([*flags, "--epochs", "1"]) == 0
    line = "        self.optimizer_d = adam(self.discriminator.parameters())\n"
    program = change({line: line.replace("())", "(), lr=0.125)")})
    assert program.main([*flags, "--epochs", "2", "--resume"]) == 0
    assert saved()["optimizer_d"]["param_groups"][0]["lr"] == 0.125
    assert saved()["optimizer_g"]["param_groups"][0]["lr"] == 0.0002


def test_another_optimiser_refuses_the_state_of_the_one_before(
    change: Callable[[Edits], ModuleType], flags: list[str], capsys: pytest.CaptureFixture[str]
):
    assert change({}).main([*flags, "--epochs", "1"]) == 0
    capsys.readouterr()
    assert change(TRAINING["RMSprop"]).main([*flags, "--epochs", "2", "--resume"]) == 1
    assert "optimizer_g is of another kind" in capsys.readouterr().err


def test_the_change_in_readme_is_compared_by_a_dry_run(
    change: Callable[[Edits], ModuleType], flags: list[str], capsys: pytest.CaptureFixture[str]
):
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Change it")[1]
    line = re.search(r"^    nn\..*$", section, re.MULTILINE)[0]
    program = change({LAST_LAYER: f"        {line}\n{LAST_LAYER}"})
    assert program.main([*flags, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "Dropout2d" in printed
    assert re.search(r"^Largest deviation from fp32 on the CPU: \d", printed, re.MULTILINE)


def test_other_networks_refuse_the_files_of_the_ones_before(
    change: Callable[[Edits], ModuleType],
    flags: list[str],
    capsys: pytest.CaptureFixture[str],
):
    assert change({}).main([*flags, "--epochs", "1"]) == 0
    other = change(NETWORKS["GroupNorm"] | NETWORKS["a layer more"])
    for command in (["--resume", *flags], ["--generate", "3", "--device", "cpu"]):
        capsys.readouterr()
        assert other.main(command) == 1
        assert "result/checkpoint.pt holds other networks than" in capsys.readouterr().err


def test_spectral_norm_starts_from_the_weights_that_weights_init_gives(
    change: Callable[[Edits], ModuleType],
):
    program = change(spectral(THIRD_LAYER))
    gan = program.DCGAN(program.Settings(width=32), torch.device("cpu"))
    layers = [m for m in gan.discriminator.modules() if hasattr(m, "parametrizations")]
    (original,) = (layer.parametrizations.weight.original for layer in layers)
    assert original.std().item() == pytest.approx(0.02, rel=0.05)


def test_another_default_size_is_that_of_runs_and_files(
    change: Callable[[Edits], ModuleType], flags: list[str]
):
    program = change({"LATENT_DIM = 100  #": "LATENT_DIM = 12  #"})
    assert program.main([*flags[:2], *flags[4:], "--epochs", "1"]) == 0
    assert saved()["settings"]["latent_dim"] == 12
    assert program.load_generator("result")(torch.randn(2, 12, 1, 1)).shape == (2, 1, 28, 28)


SETTING = '    split: str = setting(\n        "test"'
FLIP = '    flip: bool = setting(False, "mirror every digit")\n'
SMOOTH = (
    '    smoothing: float = setting(0.0, "taken from the target of real digits", low=0, high=1)\n'
)


def test_a_setting_takes_one_line(
    change: Callable[[Edits], ModuleType], flags: list[str], capsys: pytest.CaptureFixture[str]
):
    assert change({}).main([*flags, "--epochs", "1"]) == 0
    program = change(
        {
            SETTING: FLIP + SMOOTH + SETTING,
            DS_LOSS: DS_LOSS.replace(
                "torch.ones_like(on_real)", "torch.ones_like(on_real) - gan.settings.smoothing"
            ),
        }
    )
    resume = [*flags, "--resume", "--epochs", "2"]
    assert program.main(["--help"]) == 0
    assert re.search(r"--smoothing X .*?\(default: 0.0\)", capsys.readouterr().out, re.DOTALL)
    assert program.main([*flags, "--smoothing", "2"]) == 2
    assert "--smoothing: must be a number from 0 to 1, not '2'" in capsys.readouterr().err
    assert program.main([*resume, "--smoothing", "0.1"]) == 2
    assert "--smoothing: 0.1, but the run has 0.0" in capsys.readouterr().err
    assert program.main(resume) == 0  # a file that lacks the setting has its default

    others = [*flags, "--smoothing", "0.1", "--flip", "--output-dir", "other"]
    assert program.main([*others, "--epochs", "1"]) == 0
    assert saved("other")["settings"]["smoothing"] == 0.1
    assert saved("other")["settings"]["flip"] is True
    assert saved("other")["stats"]["ds_loss"][0] != saved()["stats"]["ds_loss"][0]
    capsys.readouterr()
    assert change({}).main(["--resume", "--output-dir", "other", "--device", "cpu"]) == 1
    assert "from another version of this program" in capsys.readouterr().err


def test_choices_can_be_numbers_and_a_range_can_have_one_end(
    change: Callable[[Edits], ModuleType], flags: list[str], capsys: pytest.CaptureFixture[str]
):
    updates = '    updates: int = setting(1, "of the discriminator", choices=(1, 2))\n'
    margin = '    margin: int = setting(3, "of the loss", high=5)\n'
    program = change({SETTING: updates + margin + SETTING})
    assert program.main([*flags, "--epochs", "1", "--updates", "2", "--margin", "-7"]) == 0
    assert (saved()["settings"]["updates"], saved()["settings"]["margin"]) == (2, -7)
    for wrong in (["--updates", "3"], ["--margin", "9"]):
        assert program.main([*flags, *wrong]) == 2
        assert wrong[0] in capsys.readouterr().err


def test_an_edit_of_the_images_that_are_trained_on_leaves_the_scores_as_they_are(
    change: Callable[[Edits], ModuleType],
):
    digits = batch()[0].squeeze(1).mul(100).byte()
    judged = []
    for scale in ("127.5 - 1", "255"):
        program = change(
            {
                "    return digits.unsqueeze(1).float() / 127.5 - 1\n": (
                    f"    return digits.unsqueeze(1).float() / {scale}\n"
                )
            }
        )
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            judged.append(program.Classifier().eval().judge(digits)[0])
    assert torch.equal(*judged)


def test_what_a_generator_without_tanh_draws_too_bright_or_too_dark_stays_white_or_black(
    change: Callable[[Edits], ModuleType],
):
    program = change({"            nn.Tanh(),  # (n, 1, 28, 28)\n": ""})
    generator = program.Generator(8, 4).apply(program.weights_init)
    generator.layers[-1].weight.data.mul_(10_000)
    z = batch()[1]
    images = generator(z).squeeze(1)
    digits = program.draw(generator, z)
    assert set(digits[images > 1].tolist()) == {255}
    assert set(digits[images < -1].tolist()) == {0}


def test_a_dry_run_does_not_go_well_if_a_picture_cannot_be_drawn(
    change: Callable[[Edits], ModuleType], flags: list[str], capsys: pytest.CaptureFixture[str]
):
    timeline = "    TIMELINE: lambda run: png("
    program = change({timeline: f'    "new.png": lambda run: png(run.nothing),\n{timeline}'})
    assert program.main([*flags, "--dry-run"]) == 1
    printed = capsys.readouterr()
    assert "cannot draw" in printed.out
    assert "went well" not in printed.out
    assert "could not write new.png" in printed.err


GRADIENT_IN_THE_LOG = {
    '"fake_out_before", "fake_out_after")\n': '"fake_out_before", "fake_out_after", "gap")\n',
    '    " - fake_out: {fake_out_before:.3f}>>{fake_out_after:.3f}"\n': (
        '    " - fake_out: {fake_out_before:.3f}>>{fake_out_after:.3f} - gap: {gap:.3f}"\n'
    ),
    "    return torch.stack([ds_loss, gn_loss, *outputs]).detach()\n": (
        "    gap = on_real.mean() - on_fake.mean()\n"
        "    return torch.stack([ds_loss, gn_loss, *outputs, gap]).detach()\n"
    ),
}


def test_one_more_number_in_the_log_is_in_every_file(
    change: Callable[[Edits], ModuleType], flags: list[str], capsys: pytest.CaptureFixture[str]
):
    assert change({}).main([*flags, "--epochs", "1", "--output-dir", "before"]) == 0
    program = change(GRADIENT_IN_THE_LOG)
    assert_trains_draws_and_goes_on_exactly(program, flags)
    assert re.search(r"fake_out: \S+>>\S+ - gap: -?\d\.\d{3}$", capsys.readouterr().out, re.M)
    header, *rows = Path("result/history.csv").read_text().splitlines()
    assert header.split(",")[7] == "gap"
    assert len(rows) == 6

    resume = ["--resume", "--epochs", "2", "--output-dir", "before", "--device", "cpu"]
    assert program.main([*resume, *flags[-2:]]) == 0
    header, *rows = Path("before/history.csv").read_text().splitlines()
    assert {len(row.split(",")) for row in (header, *rows)} == {12}
    gaps = [float(row.split(",")[7]) for row in rows]
    assert [math.isnan(gap) for gap in gaps] == [True] * 3 + [False] * 3


@pytest.mark.slow
def test_one_more_score_needs_no_floor(
    change: Callable[[Edits], ModuleType], capsys: pytest.CaptureFixture[str]
):
    program = change(
        {
            '    "confident": "confident {:.2f}",\n': (
                '    "confident": "confident {:.2f}",\n    "sure": "sure {:.2f}",\n'
            ),
            '            "evenness": torch.special': (
                '            "sure": probabilities.amax(dim=1).mean().item(),\n'
                '            "evenness": torch.special'
            ),
        }
    )
    shutil.copytree(ROOT / "MNIST", program.BUNDLED)
    run = [*SMALL, "--batch-size", "5000", "--device", "cpu", "--epochs", "1"]
    assert program.main(run) == 0
    line = re.search(
        r"^score: FD .*? - confident [\d.]+ - sure ([01]\.\d\d)$", capsys.readouterr().out, re.M
    )
    assert line
    header, row, *_ = Path("result/history.csv").read_text().splitlines()
    assert header.endswith(",confident,sure")
    assert f"{float(row.split(',')[-1]):.2f}" == line[1]

    assert program.main(["--evaluate", "--device", "cpu"]) == 0
    row = re.search(r"^sure .*$", capsys.readouterr().out, re.MULTILINE)[0].split()
    assert len(row) == 2  # the score, and nothing of real digits beside it
