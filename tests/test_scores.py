"""Scores, the best epoch, warnings, --evaluate, the averaged weights and the recipes."""

import contextlib
import io
import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, contents, new_gan
from test_pictures import FILES
from test_resume import assert_same_run
from test_training import parameters

import dcgan_mnist
from dcgan_mnist import Scorer, draw, frechet_distance, load_digits, make_noise

SCORE_LINE = re.compile(
    r"^score: FD (\d+\.\d) - digits (\d+)/10 - evenness ([01]\.\d\d) - confident ([01]\.\d\d)$",
    re.MULTILINE,
)
OPTIONS = ("--batch-size", 20)


def features_with(mean: list[float], covariance: list[list[float]]) -> torch.Tensor:
    """Return 200 points of exactly this mean and covariance."""
    points = torch.randn(200, 2, generator=torch.Generator().manual_seed(0)).double()
    points -= points.mean(dim=0)
    white = points @ torch.linalg.inv(torch.linalg.cholesky(points.T.cov())).T
    target = torch.linalg.cholesky(torch.tensor(covariance).double())
    return white @ target.T + torch.tensor(mean).double()


@pytest.mark.parametrize(
    ("mean", "covariance", "expected"),
    [
        ([0, 0], [[1, 0], [0, 4]], 0),
        ([3, 4], [[1, 0], [0, 4]], 9 + 16),
        ([0, 0], [[9, 0], [0, 16]], (3 - 1) ** 2 + (4 - 2) ** 2),
        # diag(1, 4) times this has the eigenvalues 4 and 9, so 5 + 7 - 2 * (2 + 3)
        ([0, 0], [[5, 1], [1, 2]], 2),
        ([1, 0], [[5, 1], [1, 2]], 1 + 2),
        ([0, 0], [[1e-12, 0], [0, 4]], 1),
    ],
)
def test_the_distance_is_that_of_two_gaussians_computed_by_hand(mean, covariance, expected):
    a, b = features_with([0, 0], [[1, 0], [0, 4]]), features_with(mean, covariance)
    assert frechet_distance(a, b) == pytest.approx(expected, abs=1e-5)
    assert frechet_distance(b, a) == pytest.approx(expected, abs=1e-5)


def test_the_distance_is_sound_where_features_are_always_zero():
    a = torch.zeros(50, 3)
    a[:, 0] = torch.arange(50)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


@pytest.fixture(scope="module")
def trained() -> tuple[Scorer, str]:
    """The scorer of a run, and what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        scorer = Scorer(torch.device("cpu"))
    return scorer, out.getvalue()


@pytest.fixture(scope="module")
def real() -> tuple[torch.Tensor, torch.Tensor]:
    """The bundled digits and labels in random order."""
    digits, labels = load_digits(ROOT / "MNIST", "test")
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(5))
    return digits[order], labels[order]


def test_the_scorer_recognises_digits_and_says_how_many(trained, real):
    scorer, out = trained
    share, floor = re.fullmatch(
        r"scorer: (\d+\.\d)% of 1,000 held-out digits right - floor: FD (\d+\.\d)\n", out
    ).groups()
    assert float(share) >= 98
    assert f"{scorer.floor:.1f}" == floor
    digits, labels = real
    assert (scorer.judge(digits)[1].argmax(dim=1) == labels).float().mean() > 0.98


def test_the_distance_tells_good_digits_from_worse_ones(trained, real):
    scorer, (digits, labels) = trained[0], real
    one, other = scorer.judge(digits[:5000])[0], scorer.judge(digits[5000:])[0]
    near = frechet_distance(one, other)
    assert 0 < near < 1.5
    distances = [near]
    stream = torch.Generator().manual_seed(0)
    for level in (8, 16, 32, 64):
        noise = level * torch.randn(5000, 28, 28, generator=stream)
        noisy = (digits[:5000] + noise).clamp(0, 255).round().byte()
        distances.append(frechet_distance(scorer.judge(noisy)[0], other))
    assert all(b > 2 * a for a, b in itertools.pairwise(distances))
    for digit in range(10):
        assert frechet_distance(one[labels[:5000] != digit], other) > 5 * near


def test_scores_of_real_digits_and_of_one_digit_alone(trained, real):
    scorer, (digits, labels) = trained[0], real
    score = scorer(digits[:2000])
    assert tuple(score) == dcgan_mnist.SCORES
    assert score["digits"] == 10
    assert score["evenness"] > 0.99
    assert score["confident"] > 0.9
    ones = scorer(digits[labels == 1])
    assert ones["digits"] == 1
    assert ones["evenness"] < 0.1
    assert ones["fd"] > 20 * score["fd"]
    blends = (digits[:2000] // 2 + digits[2000:4000] // 2).byte()
    assert scorer(blends)["confident"] < 0.8


def test_a_digit_appears_from_two_in_a_hundred_on(trained, real, monkeypatch):
    scorer, digits = trained[0], real[0][:100]
    probabilities = torch.zeros(100, 10)
    probabilities[:49, 0] = probabilities[49:97, 1] = 1.0
    probabilities[97:99, 2] = 0.91
    probabilities[99, 3] = 0.9
    monkeypatch.setattr(scorer, "judge", lambda _: (torch.rand(100, 64), probabilities))
    score = scorer(digits)
    assert score["digits"] == 3
    assert score["confident"] == pytest.approx(0.99)
    shares = [0.49, 0.48, 0.02, 0.01]
    entropy = -sum(share * math.log(share) for share in shares)
    assert score["evenness"] == pytest.approx(entropy / math.log(10))


@pytest.fixture
def quick_scorer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train scorers for one epoch only, and score few digits."""
    monkeypatch.setattr(dcgan_mnist, "SCORER_EPOCHS", 1)
    monkeypatch.setattr(dcgan_mnist, "SCORED", 100)


@pytest.mark.usefixtures("quick_scorer")
def test_scorers_are_all_the_same_and_touch_no_random_state():
    scorers = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        scorers.append(Scorer(torch.device("cpu")))
        assert torch.equal(before, torch.get_rng_state())
    assert scorers[0].floor == scorers[1].floor
    weights = [list(scorer.classifier.state_dict().values()) for scorer in scorers]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.usefixtures("quick_scorer")
def test_every_epoch_has_a_score_in_the_log_and_the_history_also_after_a_resume(run):
    out = run(*OPTIONS, "--epochs", 3, "--output-dir", "whole", scored=True).out
    assert out.count("floor: FD") == 1
    logged = [tuple(map(float, line)) for line in SCORE_LINE.findall(out)]
    assert len(logged) == 3
    table = np.genfromtxt("whole/history.csv", delimiter=",", names=True)
    for name, column in zip(dcgan_mnist.SCORES, zip(*logged, strict=True), strict=True):
        assert table[name][2::3] == pytest.approx(column, abs=0.051)
        assert (table[name][::3] == table[name][2::3]).all()
    names = {path.name for path in Path("whole").iterdir()}
    assert names == FILES | {"generated_epoch_003.png", "generator_best.pt"}

    run(*OPTIONS, "--epochs", 1, scored=True)
    run("--resume", "--epochs", 3, scored=True)
    assert_same_run("result", "whole")


def test_without_scores_none_is_trained_printed_or_kept(run, monkeypatch):
    monkeypatch.delattr(dcgan_mnist, "Scorer")
    out = run(*OPTIONS, "--epochs", 2).out
    assert "score" not in out
    assert "best" not in out
    table = np.genfromtxt("result/history.csv", delimiter=",", names=True)
    assert np.isnan(table["fd"]).all()
    assert not Path("result/generator_best.pt").exists()


def test_the_generator_of_the_best_epoch_is_kept_and_named(run, fake_scores):
    run(*OPTIONS, "--epochs", 2, "--output-dir", "two")
    fake_scores([30.0, 20.0, 25.0], [10] * 3)
    out = run(*OPTIONS, "--epochs", 3, scored=True).out
    assert "The best epoch was 2: generator_best.pt" in out.splitlines()[-1]
    drawn = {}
    for folder, options in {"two": [], "result": ["--best"]}.items():
        assert run("--generate", 5, *options, "--output-dir", folder).code == 0
        drawn[folder] = np.load(f"{folder}/generated.npy")
    assert (drawn["two"] == drawn["result"]).all()
    run("--generate", 5)
    assert (drawn["two"] != np.load("result/generated.npy")).any()


def test_the_best_epoch_is_remembered_by_a_resumed_run(run, fake_scores):
    fake_scores([20.0, 30.0], [10] * 2)
    run(*OPTIONS, "--epochs", 2, scored=True)
    best = Path("result/generator_best.pt").read_bytes()
    fake_scores([25.0], [10])
    out = run("--resume", "--epochs", 3, scored=True).out
    assert "The best epoch was 1" in out
    assert Path("result/generator_best.pt").read_bytes() == best


def test_a_new_run_removes_the_best_generator_of_an_earlier_one(run, fake_scores):
    fake_scores([20.0], [10])
    run(*OPTIONS, "--epochs", 1, scored=True)
    run(*OPTIONS, "--epochs", 1)
    outcome = run("--generate", 3, "--best")
    assert outcome.is_one_line(1, "there is no result/generator_best.pt")


def test_best_needs_something_to_draw(run):
    assert run("--best").is_one_line(2, "--best", "--generate", "--evaluate")


def warnings(out: str) -> list[str]:
    return [line for line in out.splitlines() if line.startswith("warning: ")]


def test_a_healthy_run_gives_no_warning(run, fake_scores):
    fake_scores([20.0, 39.0, 10.0], [10, 8, 9])
    assert warnings(run(*OPTIONS, "--epochs", 3, scored=True).out) == []


def test_fewer_than_eight_digits_give_a_warning(run, fake_scores):
    fake_scores([20.0, 20.0], [10, 7])
    (line,) = warnings(run(*OPTIONS, "--epochs", 2, scored=True).out)
    assert line == "warning: only 7 of the ten digits appear; README.md says what to do"


def test_a_distance_of_twice_the_best_gives_a_warning(run, fake_scores):
    fake_scores([20.0, 10.0, 20.1], [10] * 3)
    (line,) = warnings(run(*OPTIONS, "--epochs", 3, scored=True).out)
    assert line == "warning: FD is more than twice its best; README.md says what to do"


@pytest.mark.parametrize(("losses", "expected"), [((0.049,) * 3, 1), ((0.01, 0.01, 0.051), 0)])
def test_a_discriminator_that_has_won_gives_a_warning(run, monkeypatch, losses, expected: int):
    steps = iter(losses)
    monkeypatch.setattr(
        dcgan_mnist, "training_step", lambda *_: torch.tensor([next(steps), 1.0, 0.9, 0.1, 0.1])
    )
    found = warnings(run(*OPTIONS, "--epochs", 1).out)
    line = "warning: ds_loss stayed under 0.05; README.md says what to do"
    assert found == [line] * expected


def test_several_signs_of_a_collapse_make_one_line(run, fake_scores):
    fake_scores([10.0, 30.0], [10, 1])
    (line,) = warnings(run(*OPTIONS, "--epochs", 2, scored=True).out)
    assert "only 1 of the ten digits appear and FD is more than twice its best" in line


def test_a_dry_run_gives_no_warning(run, fake_scores):
    fake_scores([10.0, 30.0], [1, 1])
    assert warnings(run(*OPTIONS, "--dry-run", scored=True).out) == []


@pytest.mark.usefixtures("quick_scorer")
def test_evaluate_scores_the_checkpoint_with_10_000_digits(run):
    run(*OPTIONS, "--epochs", 1)
    before = contents(Path("result"))
    outcome = run("--evaluate")
    assert (outcome.code, outcome.err) == (0, "")
    after = contents(Path("result"))
    assert set(after) - set(before) == {"score.json", "nearest.png"}
    assert all(after[name] == before[name] for name in before)
    score = json.loads(after["score.json"])
    assert set(score) == {*dcgan_mnist.SCORES, "floor", "count", "of"}
    assert score["count"] == 10_000
    assert score["of"] == "result/checkpoint.pt"
    assert f"score: FD {score['fd']:.1f}" in outcome.out
    run("--generate", 10_000)
    run("--evaluate", "result/generated.npy")
    again = json.loads(Path("result/score.json").read_text())
    assert again.pop("of") == "result/generated.npy"
    del score["of"]
    assert again == score


@pytest.mark.usefixtures("quick_scorer")
def test_evaluate_scores_digits_from_anywhere(run, real, tmp_path: Path):
    np.save(tmp_path / "real.npy", real[0][:2000].numpy())
    assert run("--evaluate", tmp_path / "real.npy", "--output-dir", "new/folder").code == 0
    score = json.loads(Path("new/folder/score.json").read_text())
    assert score["digits"] == 10
    assert score["fd"] < 5 * score["floor"]
    assert score["count"] == 2000


@pytest.mark.parametrize("fault", ["missing", "text", "float", "flat", "colour", "code", "one"])
def test_files_that_hold_no_digits_are_refused(run, fault: str):
    path = Path("digits.npy")
    arrays = {
        "float": np.zeros((5, 28, 28)),
        "flat": np.zeros((5, 784), np.uint8),
        "colour": np.zeros((5, 28, 28, 3), np.uint8),
        "code": np.array([{}, print], dtype=object),
        "one": np.zeros((1, 28, 28), np.uint8),
    }
    if fault == "text":
        path.write_text("digits")
    elif fault != "missing":
        np.save(path, arrays[fault])
    assert run("--evaluate", path).is_one_line(2, "--evaluate", "digits.npy")
    assert not Path("result").exists()


def test_nearest_digits_are_found_among_the_real_ones(real):
    digits = real[0][:500]
    stream = torch.Generator().manual_seed(0)
    noise = 20 * torch.randn(25, 28, 28, generator=stream)
    generated = (digits[100:125] + noise).clamp(0, 255).byte()
    rows = dcgan_mnist.above_nearest(generated, digits)
    assert torch.equal(rows, torch.cat([generated[:10], digits[100:110], generated[10:20], digits[110:120]]))
    few = dcgan_mnist.above_nearest(generated[:3], digits)
    assert torch.equal(few[10:20], digits[100:103].repeat(4, 1, 1)[:10])


def test_the_article_is_the_default_recipe_to_the_letter():
    options = dcgan_mnist.parse_options([])
    assert options.recipe == "article"
    assert (options.lr, options.beta1, options.beta2) == (0.0002, 0.5, 0.999)
    assert (options.batch_size, options.epochs) == (50, 10)


def test_a_recipe_sets_defaults_that_flags_can_change():
    article, tuned = (vars(dcgan_mnist.parse_options(["--recipe", r])) for r in ("article", "tuned"))
    changed = {name for name in article if article[name] != tuned[name]} - {"recipe", "argv"}
    assert changed == set(dcgan_mnist.RECIPES["tuned"]) != set()
    options = dcgan_mnist.parse_options(["--lr", "0.1", "--recipe", "tuned"])
    assert options.lr == 0.1
    assert options.beta2 == tuned["beta2"]


def test_a_recipe_is_kept_by_a_resumed_run(run):
    tuned = (*OPTIONS, "--recipe", "tuned", "--lr", 0.001)
    run(*tuned, "--epochs", 2, "--output-dir", "whole")
    run(*tuned, "--epochs", 1)
    for given in ((), ("--recipe", "tuned")):
        assert run("--resume", "--epochs", 2, *given).code == 0
    assert_same_run("result", "whole")
    kept = torch.load("result/checkpoint.pt", weights_only=True)["settings"]
    assert (kept["recipe"], kept["lr"]) == ("tuned", 0.001)
    assert kept["beta2"] == dcgan_mnist.RECIPES["tuned"]["beta2"]


def steps_of(gan: dcgan_mnist.DCGAN, count: int) -> list[list[torch.Tensor]]:
    """Take training steps; return the generator's weights before the first and after each."""
    stream = torch.Generator().manual_seed(0)
    weights = [parameters(gan.generator)]
    for _ in range(count):
        real = torch.rand(10, 1, 28, 28, generator=stream) * 2 - 1
        z = torch.randn(10, dcgan_mnist.LATENT_DIM, 1, 1, generator=stream)
        dcgan_mnist.training_step(gan, real, z)
        weights.append(parameters(gan.generator))
    return weights


@pytest.mark.usefixtures("small_networks")
def test_averaged_weights_follow_the_generators():
    gan = new_gan(ema=0.75)
    weights = steps_of(gan, 2)
    for average, w0, w1, w2 in zip(gan.average.parameters(), *weights, strict=True):
        torch.testing.assert_close(average, 0.75**2 * w0 + 0.75 * 0.25 * w1 + 0.25 * w2)


@pytest.mark.usefixtures("small_networks")
def test_without_averaging_the_generators_own_weights_draw():
    gan = new_gan(ema=0.0)
    weights = steps_of(gan, 2)
    assert all(map(torch.equal, gan.average.parameters(), weights[-1]))


@pytest.mark.usefixtures("small_networks")
def test_batchnorm_statistics_fit_the_averaged_weights():
    gan = new_gan()
    steps_of(gan, 3)
    dcgan_mnist.end_epoch(gan, torch.ones(3, 5), None)
    first, norm = gan.average.layers[:2]
    with torch.no_grad():
        values = first(make_noise(1000, gan.settings["seed"], epoch=-2))
    torch.testing.assert_close(norm.running_mean, values.mean(dim=(0, 2, 3)), rtol=1e-3, atol=1e-5)
    variance = values.var(dim=(0, 2, 3))
    torch.testing.assert_close(norm.running_var, variance, rtol=0.02, atol=1e-5)


def test_pictures_scores_and_generate_draw_with_the_averaged_weights(run, monkeypatch):
    scored = []

    def scorer(digits: torch.Tensor) -> dict[str, float]:
        scored.append(digits)
        return dict.fromkeys(dcgan_mnist.SCORES, 1)

    monkeypatch.setattr(dcgan_mnist, "Scorer", lambda _: scorer)
    run(*OPTIONS, "--epochs", 3, "--lr", 0.01, scored=True)
    state = torch.load("result/checkpoint.pt", weights_only=True)
    gan = new_gan(**state["settings"])
    gan.average.load_state_dict(state["average"])
    gan.generator.load_state_dict(state["generator"])
    z = make_noise(2000, 0, epoch=-1)
    assert torch.equal(scored[-1], draw(gan.average, z))
    assert not torch.equal(scored[-1], draw(gan.generator.eval(), z))
    assert torch.equal(state["samples"][-1], draw(gan.average, state["fixed_noise"]))
    run("--generate", 20)
    assert (np.load("result/generated.npy") == scored[-1][:20].numpy()).all()
