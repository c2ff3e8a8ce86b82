"""The scores: the distance, the scorer, what a run makes of its scores, and warnings."""

import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import RUN_FILES, THREE_STEPS, change_steps, contents, write_idx

import dcgan_mnist
from dcgan_mnist import BUNDLED, Scorer, frechet_distance, load_digits, signs_of_collapse

SCORE_LINE = re.compile(
    r"^score: FD (\d+\.\d) - digits (\d+)/10 - evenness ([01]\.\d\d) - confident ([01]\.\d\d)$",
    re.MULTILINE,
)


# ------------------------------------------ the distance ------------------------------------------
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
def test_the_distance_is_that_of_two_gaussians_computed_by_hand(
    mean: list[float], covariance: list[list[float]], expected: float
):
    a = features_with([0, 0], [[1, 0], [0, 4]])
    b = features_with(mean, covariance)
    assert frechet_distance(a, b) == pytest.approx(expected, abs=1e-5)
    assert frechet_distance(b, a) == pytest.approx(expected, abs=1e-5)


def test_the_distance_can_be_had_where_features_are_always_zero():
    a = torch.zeros(50, 3)
    a[:, 0] = torch.arange(50)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_the_distance_can_be_had_where_features_depend_on_one_another():
    stream = torch.Generator().manual_seed(0)
    a = torch.randn(200, 5, generator=stream) @ torch.randn(5, 64, generator=stream)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-3)  # their variances add up to 366


# ------------------------------------------- the scorer -------------------------------------------
@pytest.fixture(scope="session")
def scorer() -> Scorer:
    """A scorer that has learned for half as long as that of a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dcgan_mnist, "SCORER_EPOCHS", 5)
        return Scorer(torch.device("cpu"))


@pytest.fixture(scope="session")
def real() -> tuple[torch.Tensor, torch.Tensor]:
    """The bundled digits and labels in random order."""
    digits, labels = load_digits(BUNDLED, "test")
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(5))
    return digits[order], labels[order]


@pytest.fixture
def quick_scorer(
    real: tuple[torch.Tensor, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let scorers learn only 500 digits, and 1,000 more tell how well; score few."""
    digits, labels = real
    raw = tmp_path / "bundled" / "MNIST" / "raw"
    write_idx(raw / "t10k-images-idx3-ubyte", digits[:1500])
    write_idx(raw / "t10k-labels-idx1-ubyte", labels[:1500].byte())
    monkeypatch.setattr(dcgan_mnist, "BUNDLED", tmp_path / "bundled")
    monkeypatch.setattr(dcgan_mnist, "SCORED", 100)


def test_the_scorer_recognises_digits_it_has_not_seen(scorer: Scorer):
    assert scorer.accuracy >= 0.98


def test_the_distance_tells_good_digits_from_worse_ones(scorer: Scorer, real):
    digits, labels = real
    one = scorer.judge(digits[:5000])[0]
    other = scorer.judge(digits[5000:])[0]
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


def test_real_digits_score_well_and_get_the_floor(scorer: Scorer, real):
    score = scorer(real[0][:2000])
    assert score["digits"] == 10
    assert score["evenness"] > 0.99
    assert score["confident"] > 0.9
    assert 0 < scorer.floor < 2
    assert score["fd"] < 2 * scorer.floor


def test_one_digit_alone_scores_badly(scorer: Scorer, real):
    digits, labels = real
    score = scorer(digits[labels == 1])
    assert score["digits"] == 1
    assert score["evenness"] < 0.1
    assert score["fd"] > 20 * scorer.floor


def test_digits_blended_with_others_are_not_recognised_with_confidence(scorer: Scorer, real):
    digits = real[0]
    blends = digits[:2000] // 2 + digits[2000:4000] // 2
    assert scorer(blends)["confident"] < 0.8


def test_a_digit_appears_from_two_in_a_hundred_on(
    scorer: Scorer, real, monkeypatch: pytest.MonkeyPatch
):
    probabilities = torch.zeros(100, 10)
    probabilities[:49, 0] = 1.0
    probabilities[49:97, 1] = 1.0
    probabilities[97:99, 2] = 0.91
    probabilities[99, 3] = 0.9
    monkeypatch.setattr(scorer, "judge", lambda _: (torch.rand(100, 64), probabilities))
    score = scorer(real[0][:100])
    assert score["digits"] == 3
    assert score["confident"] == pytest.approx(0.99)
    shares = [0.49, 0.48, 0.02, 0.01]
    entropy = -sum(share * math.log(share) for share in shares)
    assert score["evenness"] == pytest.approx(entropy / math.log(10))


@pytest.mark.usefixtures("quick_scorer")
def test_scorers_are_all_the_same_and_touch_no_random_state():
    scorers = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        scorers.append(Scorer(torch.device("cpu")))
        assert torch.equal(torch.get_rng_state(), before)
    first, second = scorers
    assert first.floor == second.floor
    assert first.accuracy == second.accuracy
    weights = first.classifier.state_dict()
    assert len(weights) > 0
    for name, other in second.classifier.state_dict().items():
        assert torch.equal(weights[name], other)


# ------------------------------------------ scores of a run ---------------------------------------
@pytest.mark.usefixtures("quick_scorer")
def test_every_epoch_has_a_score_in_the_log_and_the_history_also_after_a_resume(run):
    out = run(*THREE_STEPS, "--epochs", 2, "--output-dir", "whole", scored=True).out
    stated = r"^scorer: \d+\.\d% of 1,000 held-out digits right - floor: FD \d+\.\d$"
    assert len(re.findall(stated, out, re.MULTILINE)) == 1
    logged = np.array(SCORE_LINE.findall(out), dtype=float)
    assert len(logged) == 2
    table = np.genfromtxt("whole/history.csv", delimiter=",", names=True)
    assert table["epoch"].tolist() == [1, 1, 1, 2, 2, 2]
    assert table["step"].tolist() == [1, 2, 3] * 2
    for column, name in enumerate(("fd", "digits", "evenness", "confident")):
        assert table[name] == pytest.approx(logged[:, column].repeat(3), abs=0.051)
    assert set(contents("whole")) == RUN_FILES | {"generator_best.pt"}

    run(*THREE_STEPS, "--epochs", 1, scored=True)
    run("--resume", "--epochs", 2, scored=True)
    for name in ("history.csv", "loss_curve.png", "generator_best.pt"):
        assert contents("result")[name] == contents("whole")[name]


def test_without_scores_none_is_trained_printed_or_kept(run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(dcgan_mnist, "Scorer")
    outcome = run(*THREE_STEPS, "--epochs", 2)
    assert outcome.code == 0
    assert "score" not in outcome.out
    assert "best" not in outcome.out
    table = np.genfromtxt("result/history.csv", delimiter=",", names=True)
    assert np.isnan(table["fd"]).all()
    assert set(contents("result")) == RUN_FILES


# -------------------------------------------- warnings --------------------------------------------
HEALTHY = {"fd": 20.0, "digits": 10, "evenness": 0.9, "confident": 0.5}


@pytest.mark.parametrize(
    ("losses", "score", "best_fd", "signs"),
    [
        ([0.01, 0.6, 0.01], {}, 20.0, []),
        ([0.01, 0.01, 0.051], {}, 20.0, []),
        ([0.6], {"digits": 8, "fd": 39.9}, 20.0, []),
        ([0.6], {"fd": math.nan, "digits": math.nan}, math.inf, []),
        ([0.049, 0.01, 0.049], {}, 20.0, ["ds_loss stayed under 0.05"]),
        ([0.6], {"digits": 7}, 20.0, ["only 7 of the ten digits appear"]),
        ([0.6], {"fd": 40.1}, 20.0, ["FD is more than twice its best"]),
        (
            [0.01],
            {"digits": 1, "fd": 100.0},
            20.0,
            [
                "only 1 of the ten digits appear",
                "FD is more than twice its best",
                "ds_loss stayed under 0.05",
            ],
        ),
    ],
)
def test_each_sign_of_a_collapse_is_named_and_none_where_all_is_well(
    losses: list[float], score: dict[str, float], best_fd: float, signs: list[str]
):
    assert signs_of_collapse(torch.tensor(losses), HEALTHY | score, best_fd) == signs


def test_a_run_warns_of_epochs_that_look_like_a_collapse_and_of_no_other(run, fake_scores):
    fake_scores([20.0, 39.0, 10.0, 10.0, 20.1, 30.0], [10, 8, 9, 7, 10, 1])
    outcome = run(*THREE_STEPS, "--epochs", 6, scored=True)
    worse = "FD is more than twice its best"
    both = f"only 1 of the ten digits appear and {worse}"
    signs = ["only 7 of the ten digits appear", worse, both]
    hint = "README.md says what to do"
    assert outcome.warnings() == [f"warning: {sign}; {hint}" for sign in signs]


def test_a_discriminator_that_has_won_is_warned_of_also_without_scores(
    run, monkeypatch: pytest.MonkeyPatch
):
    def lower_ds_loss(number: int, stats: torch.Tensor) -> torch.Tensor:
        stats[0] = 0.6 if number == 1 else 0.049  # in the first epoch it was still well
        return stats

    change_steps(monkeypatch, lower_ds_loss)
    outcome = run(*THREE_STEPS, "--epochs", 2)
    assert outcome.warnings() == ["warning: ds_loss stayed under 0.05; README.md says what to do"]


def test_a_dry_run_gives_no_warning(run, fake_scores):
    fake_scores([10.0, 30.0], [1, 1])
    outcome = run(*THREE_STEPS, "--dry-run", scored=True)
    assert outcome.code == 0
    assert outcome.warnings() == []
