"""The scores: the distances, the shipped scorer, what a run makes of its scores, and warnings."""

import copy
import functools
import hashlib
import itertools
import math
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from helpers import (
    DEPTH,
    ROOT,
    RUN_FILES,
    THREE_STEPS,
    change_steps,
    contents,
    load_script,
    new_gan,
    saved,
    write_idx,
    write_split,
)

import dcgan_mnist
from dcgan_mnist import (
    BUNDLED,
    Classifier,
    Scorer,
    bundled_digits,
    density_and_coverage,
    frechet_distance,
    load_classifier,
    load_pictures,
    moments,
    read_idx,
    read_scorer,
    score_line,
    score_table,
    share_of_copies,
    signs_of_collapse,
    some,
)

SCORE_LINE = re.compile(
    r"^score: FD (\d+\.\d) \(floor \d+\.\d\) - digits (\d+)/10 - evenness ([01]\.\d\d)"
    r" - confident ([01]\.\d\d)$",
    re.MULTILINE,
)
CPU = torch.device("cpu")
NAN = math.nan  # of an epoch that is not scored
MNIST_DIGITS = ("--data-dir", ROOT / "MNIST", "--batch-size", 5000)  # two steps an epoch
Judged = dict[str, tuple[torch.Tensor, torch.Tensor]]


# ------------------------------------------ the distance ------------------------------------------
def features_with(mean: list[float], covariance: list[list[float]]) -> torch.Tensor:
    """Return 200 points of exactly this mean and covariance."""
    points = torch.randn(200, 2, generator=torch.Generator().manual_seed(0)).double()
    points -= points.mean(dim=0)
    white = points @ torch.linalg.inv(torch.linalg.cholesky(points.T.cov())).T
    target = torch.linalg.cholesky(torch.tensor(covariance).double())
    return white @ target.T + torch.tensor(mean).double()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the Frechet distance of points."""
    return frechet_distance(moments(a), moments(b))


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
    assert distance(a, b) == pytest.approx(expected, abs=1e-5)
    assert distance(b, a) == pytest.approx(expected, abs=1e-5)


def test_the_distance_can_be_had_where_features_are_always_zero():
    a = torch.zeros(50, 3)
    a[:, 0] = torch.arange(50)
    assert distance(a, a) == pytest.approx(0, abs=1e-6)


def test_the_distance_can_be_had_where_features_depend_on_one_another():
    stream = torch.Generator().manual_seed(0)
    a = torch.randn(200, 5, generator=stream) @ torch.randn(5, 64, generator=stream)
    assert distance(a, a) == pytest.approx(0, abs=1e-3)  # their variances add up to 366


# ------------------------------------ density, coverage, copies -----------------------------------
def test_density_and_coverage_are_those_counted_one_by_one():
    stream = torch.Generator().manual_seed(0)
    real = torch.randn(600, 3, generator=stream)
    drawn = 0.7 * torch.randn(700, 3, generator=stream) + 0.5
    inside = np.zeros((700, 600), dtype=bool)
    for i, centre in enumerate(real.numpy()):
        others = np.linalg.norm(np.delete(real.numpy(), i, axis=0) - centre, axis=1)
        radius = np.sort(others)[4]  # to the fifth neighbour
        inside[:, i] = np.linalg.norm(drawn.numpy() - centre, axis=1) < radius
    density, coverage = density_and_coverage(drawn, real)
    assert density == pytest.approx(inside.sum() / (5 * 700), abs=1e-3)
    assert coverage == pytest.approx(inside.any(axis=0).mean(), abs=2e-3)
    assert 0.2 < coverage < 0.9


def test_digits_all_alike_are_dense_and_cover_little():
    real = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
    alike = real[real.norm(dim=1).argmin()].expand(1000, 2)
    density, coverage = density_and_coverage(alike, real)
    assert density > 0.9
    assert coverage < 0.02


def test_copies_are_those_nearest_to_what_training_saw():
    seen = torch.tensor([[0.0, 0.0], [10.0, 0.0]])
    unseen = torch.tensor([[4.0, 0.0], [0.0, 9.0]])
    drawn = torch.tensor([[1.0, 0.0], [3.0, 0.0], [8.0, 1.0], [0.0, 4.0], [0.0, 5.0]])
    assert share_of_copies(drawn, seen, unseen) == pytest.approx(3 / 5)
    assert share_of_copies(seen, seen, unseen) == 1.0
    assert share_of_copies(unseen, seen, unseen) == 0.0


# --------------------------------------- the shipped scorer ---------------------------------------
@pytest.fixture(scope="session")
def classifier() -> Classifier:
    """The shipped classifier."""
    return load_classifier(read_scorer(), CPU)


def bundled_labels(split: str) -> torch.Tensor:
    """Return the labels (n,) of MNIST's digits."""
    prefix = {"train": "train", "test": "t10k"}[split]
    return read_idx(BUNDLED / f"{prefix}-labels-idx1-ubyte.gz")


@pytest.fixture(scope="session")
def judged(classifier: Classifier) -> Judged:
    """What it makes of 10,000 digits of each split: features (n, 64), probabilities (n, 10)."""
    return {
        split: classifier.judge(some(bundled_digits(split), 10_000)) for split in ("train", "test")
    }


def test_the_shipped_file_is_small_and_the_one_that_the_program_knows():
    content = dcgan_mnist.SCORER.read_bytes()
    assert len(content) <= 500_000
    assert hashlib.sha256(content).hexdigest() == dcgan_mnist.SCORER_SHA256


@pytest.mark.slow
def test_the_scorer_recognises_the_digits_that_it_has_not_seen(judged: Judged):
    labels = some(bundled_labels("test"), 10_000)
    accuracy = (judged["test"][1].argmax(dim=1) == labels).double().mean().item()
    assert accuracy >= 0.994
    assert accuracy == pytest.approx(read_scorer()["accuracy"], abs=3e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("seen", "unseen"), [("test", "train"), ("train", "test")])
@pytest.mark.parametrize("count", [2000, 10_000])
def test_real_digits_of_either_split_get_the_floor(
    judged: Judged, seen: str, unseen: str, count: int
):
    scorer = Scorer(read_scorer(), seen, CPU)
    assert scorer.unseen == unseen
    floor = scorer.floors[count]
    score = scorer.scores(*(part[:count] for part in judged[seen]))
    assert floor.keys() == score.keys() | set(DEPTH)
    for name in score:
        assert score[name] == pytest.approx(floor[name], rel=0.02)
    assert 0 < floor["fd"] < 10
    assert floor["digits"] == 10
    assert floor["evenness"] > 0.99
    assert floor["confident"] > 0.97


@pytest.mark.parametrize("seen", ["test", "train"])
def test_the_floor_of_the_other_scores_is_that_of_good_digits(seen: str):
    floor = Scorer(read_scorer(), seen, CPU).floors[10_000]
    assert floor["density"] == pytest.approx(1, abs=0.1)
    assert floor["coverage"] > 0.9
    assert floor["copies"] == 1.0  # they are those that training saw


@pytest.mark.slow
@pytest.mark.parametrize("seen", ["test", "train"])
def test_a_missing_digit_costs_many_times_the_floor(judged: Judged, seen: str):
    scorer = Scorer(read_scorer(), seen, CPU)
    features, probabilities = judged[seen]
    kinds = probabilities.argmax(dim=1)
    for digit in range(10):
        others = kinds != digit
        score = scorer.scores(features[others][:2000], probabilities[others][:2000])
        assert score["fd"] > 5 * scorer.floors[2000]["fd"]
        assert score["digits"] == 9


def test_the_distance_grows_with_noise(classifier: Classifier):
    scorer = Scorer(read_scorer(), "test", CPU)
    digits = some(bundled_digits("test"), 2000)
    distances = [scorer.floors[2000]["fd"]]
    stream = torch.Generator().manual_seed(0)
    for level in (16, 32, 64):  # grey levels
        noise = level * torch.randn(2000, 28, 28, generator=stream)
        distances.append(scorer((digits + noise).clamp(0, 255).round().byte())["fd"])
    assert all(b > 2 * a for a, b in itertools.pairwise(distances))


@pytest.mark.slow
def test_one_digit_alone_scores_badly(judged: Judged):
    scorer = Scorer(read_scorer(), "test", CPU)
    features, probabilities = judged["test"]
    ones = probabilities.argmax(dim=1) == 1
    score = scorer.scores(features[ones], probabilities[ones])
    assert score["digits"] == 1
    assert score["evenness"] == pytest.approx(0, abs=1e-6)
    assert score["fd"] > 100 * scorer.floors[2000]["fd"]


def test_digits_blended_with_others_are_not_recognised_with_confidence():
    scorer = Scorer(read_scorer(), "test", CPU)
    digits = some(bundled_digits("test"), 1000)
    blends = digits[:500] // 2 + digits[500:] // 2
    assert scorer(blends)["confident"] < 0.8


@pytest.mark.slow
def test_copies_of_what_training_saw_are_found_out_also_shifted(
    classifier: Classifier, judged: Judged
):
    seen = some(bundled_digits("test"), 10_000)
    shifted = classifier.judge(seen[:2000].roll(1, dims=2))[0]
    features = {split: judged[split][0] for split in judged}
    assert share_of_copies(features["test"][:2000], features["test"], features["train"]) == 1.0
    assert share_of_copies(shifted, features["test"], features["train"]) > 0.9
    others = bundled_digits("train")[:4000]
    new = classifier.judge(others)[0]
    known = torch.cdist(new, features["train"]).amin(dim=1) < 0.1  # among the 10,000
    share = share_of_copies(new[~known], features["test"], features["train"])
    assert share == pytest.approx(0.5, abs=0.05)


def test_other_digits_in_the_place_of_the_bundled_ones_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_split(tmp_path, 60)
    monkeypatch.setattr(dcgan_mnist, "BUNDLED", tmp_path)
    with pytest.raises(dcgan_mnist.Failure, match="not MNIST's test split"):
        dcgan_mnist.bundled_digits("test")


def test_a_digit_appears_from_two_in_a_hundred_on():
    probabilities = torch.zeros(100, 10)
    probabilities[:49, 0] = 1.0
    probabilities[49:97, 1] = 1.0
    probabilities[97:99, 2] = 0.91
    probabilities[99, 3] = 0.9
    score = Scorer(read_scorer(), "test", CPU).scores(torch.rand(100, 64), probabilities)
    assert score["digits"] == 3
    assert score["confident"] == pytest.approx(0.99)
    shares = [0.49, 0.48, 0.02, 0.01]
    entropy = -sum(share * math.log(share) for share in shares)
    assert score["evenness"] == pytest.approx(entropy / math.log(10))


@pytest.mark.slow
def test_the_included_generator_draws_good_digits_and_is_small():
    assert dcgan_mnist.EXAMPLE.stat().st_size < 5_000_000
    checkpoint = dcgan_mnist.read_checkpoint(dcgan_mnist.EXAMPLE)
    assert dcgan_mnist.SPLIT_OF_DIGITS[checkpoint["data"]["sha256"]] == "train"
    assert checkpoint["settings"].recipe == "tuned"
    generator = dcgan_mnist.load_generator()
    assert {parameter.dtype for parameter in generator.parameters()} == {torch.float32}
    z = dcgan_mnist.make_noise(2000, 100, 0, dcgan_mnist.DRAWING)
    scores = Scorer(read_scorer(), "train", CPU)(dcgan_mnist.draw(generator, z))
    assert scores["fd"] < 15  # real digits: 7.7
    assert scores["digits"] == 10
    assert scores["confident"] > 0.88


def test_loading_the_classifier_touches_no_random_state():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    load_classifier(read_scorer(), CPU)
    assert torch.equal(torch.get_rng_state(), before)


# ----------------------------------------- making the scorer --------------------------------------
@pytest.fixture
def maker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """MNIST/make_scorer.py, beside data with 100 digits to learn and 60 others."""
    module = load_script(ROOT / "MNIST" / "make_scorer.py")
    for split, prefix, count in (("train", "train", 100), ("test", "t10k", 60)):
        images = tmp_path / "few" / f"{prefix}-images-idx3-ubyte"
        write_idx(images, bundled_digits(split)[:count])
        labels = tmp_path / "few" / f"{prefix}-labels-idx1-ubyte.gz"
        write_idx(labels, bundled_labels(split)[:count])
    monkeypatch.setattr(module, "BUNDLED", tmp_path / "few")
    return module


def make(maker: ModuleType, path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> dict:
    """Run the maker; return what it wrote."""
    argv = ["make_scorer.py", "--seed", str(seed), "--output", str(path)]
    monkeypatch.setattr("sys.argv", argv)
    maker.main()
    return torch.load(path, weights_only=True)


def test_the_maker_writes_what_the_program_reads(
    maker: ModuleType, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "scorer.pt"
    content = make(maker, path, 0, monkeypatch)
    printed = capsys.readouterr().out
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    assert f'SCORER_SHA256 = "{checksum}"' in printed
    assert f"{content['accuracy']:.2%} of the test split are recognised" in printed
    monkeypatch.setattr(dcgan_mnist, "SCORER", path)
    monkeypatch.setattr(dcgan_mnist, "SCORER_SHA256", checksum)
    shipped = torch.load(BUNDLED / "scorer.pt", weights_only=True)
    assert content.keys() == shipped.keys()
    digits = {split: load_pictures(maker.BUNDLED, split)[0] for split in ("train", "test")}
    for seen in ("train", "test"):
        scorer = Scorer(read_scorer(), seen, CPU)
        assert scorer.floors.keys() == {2000, 10_000}
        real = some(digits[seen], 2000)
        expected = scorer.floors[2000]
        assert scorer.evaluate(real, digits[seen], digits[scorer.unseen]) == expected


@pytest.mark.slow
def test_the_same_seed_makes_the_same_scorer_and_another_seed_another(
    maker: ModuleType, tmp_path: Path, monkeypatch
):
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(weights))
        content = make(maker, tmp_path / "scorer.pt", seed, monkeypatch)
        weights.append(content["classifier"]["head.weight"])
        # the program may number its random numbers anew without changing the scorer
        monkeypatch.setattr(dcgan_mnist, "stream_seed", lambda *_: 5)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


# ------------------------------------------ scores of a run ---------------------------------------
def lines_about_scores(out: str) -> list[str]:
    """Return the lines that tell with which scores a run goes, or that it goes without."""
    return [line for line in out.splitlines() if "cores" in line]


@pytest.mark.slow
def test_every_epoch_has_a_score_in_the_log_and_the_history_also_after_a_resume(run):
    out = run(*MNIST_DIGITS, "--epochs", 2, "--output-dir", "whole").out
    [stated] = lines_about_scores(out)
    assert stated == "Scores compare with MNIST's train split, which this run does not see"
    logged = np.array(SCORE_LINE.findall(out), dtype=float)
    assert len(logged) == 2
    table = np.genfromtxt("whole/history.csv", delimiter=",", names=True)
    assert table["epoch"].tolist() == [1, 1, 2, 2]
    assert table["step"].tolist() == [1, 2] * 2
    for column, name in enumerate(("fd", "digits", "evenness", "confident")):
        assert table[name] == pytest.approx(logged[:, column].repeat(2), abs=0.051)
    assert set(contents("whole")) == RUN_FILES | {"generator_best.pt"}

    run(*MNIST_DIGITS, "--epochs", 1)
    run(*MNIST_DIGITS, "--resume", "--epochs", 2)
    for name in ("history.csv", "loss_curve.png", "generator_best.pt"):
        assert contents("result")[name] == contents("whole")[name]


def without_scores(run, *argv: object) -> str:
    """Run two epochs, check that they have no scores, and return the line that says why."""
    outcome = run(*argv, "--epochs", 2)
    assert (outcome.code, outcome.err) == (0, "")
    assert "score:" not in outcome.out
    assert "best" not in outcome.out
    table = np.genfromtxt("result/history.csv", delimiter=",", names=True)
    assert np.isnan(table["fd"]).all()
    assert set(contents("result")) == RUN_FILES
    [line] = lines_about_scores(outcome.out)
    assert line.startswith("This run will have no scores: ")
    return line


def test_other_data_goes_without_scores_and_says_so(run):
    assert "not those of MNIST" in without_scores(run, *THREE_STEPS)


@pytest.mark.slow
def test_digits_cut_from_mnist_go_without_scores(run, data_dir: Path):
    write_idx(data_dir / "t10k-images-idx3-ubyte", bundled_digits("test")[:9999])
    assert "not those of MNIST" in without_scores(run, "--batch-size", 3333)


@pytest.fixture(params=["missing", "changed"])
def other_scorer(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> str:
    """A scorer file that is missing, or that is a scorer, but not the shipped one."""
    path = tmp_path / "scorer.pt"
    if request.param == "changed":
        content = read_scorer()
        content["accuracy"] = 1.0
        torch.save(content, path)
    monkeypatch.setattr(dcgan_mnist, "SCORER", path)
    return str(path)


@pytest.mark.usefixtures("known_digits")
def test_without_the_shipped_scorer_a_run_goes_without_scores(run, other_scorer: str):
    assert other_scorer in without_scores(run, *THREE_STEPS)


@pytest.mark.parametrize("command", [["--evaluate"], ["--generate", 3, "--digit", 7]])
def test_without_the_shipped_scorer_nothing_is_scored_or_chosen(
    run, other_scorer: str, command: list
):
    run(*THREE_STEPS, "--epochs", 1)
    before = contents("result")
    assert run(*command).is_one_line(1, "error: ", other_scorer)
    assert contents("result") == before


# -------------------------------------------- a new score -----------------------------------------
@pytest.fixture
def new_score(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the program have a score of its user's own, of which scorer.pt has no floor."""
    original = Scorer.scores

    def scores(
        self: Scorer, features: torch.Tensor, probabilities: torch.Tensor
    ) -> dict[str, float]:
        return original(self, features, probabilities) | {"sevens": 0.125}

    monkeypatch.setitem(dcgan_mnist.SCORES, "sevens", "sevens {:.3f}")
    monkeypatch.setattr(Scorer, "scores", scores)


@pytest.mark.usefixtures("new_score")
def test_a_score_without_a_floor_is_logged_and_kept(run):
    outcome = run(*MNIST_DIGITS, "--epochs", 1)
    assert (outcome.code, outcome.err) == (0, "")
    [line] = re.findall(r"^score: .*", outcome.out, re.MULTILINE)
    assert re.fullmatch(r"score: FD \d+\.\d \(floor \d+\.\d\) - digits .* - sevens 0\.125", line)
    table = np.genfromtxt("result/history.csv", delimiter=",", names=True)
    assert table["sevens"].tolist() == [0.125, 0.125]
    assert saved()["scores"]["sevens"].tolist() == [0.125]


@pytest.mark.slow
def test_a_run_from_before_a_score_was_added_goes_on_with_it(run, request: pytest.FixtureRequest):
    run(*MNIST_DIGITS, "--epochs", 1)
    request.getfixturevalue("new_score")
    outcome = run("--resume", *MNIST_DIGITS, "--epochs", 2)
    assert (outcome.code, outcome.err) == (0, "")
    table = np.genfromtxt("result/history.csv", delimiter=",", names=True)
    np.testing.assert_array_equal(table["sevens"], [NAN, NAN, 0.125, 0.125])
    assert np.isfinite(table["fd"]).all()


@pytest.mark.usefixtures("new_score")
def test_scores_are_shown_with_those_floors_that_are_known():
    scores = dict.fromkeys((*dcgan_mnist.SCORES, *DEPTH), 0.5)
    floor = dict.fromkeys(scores.keys() - {"sevens"}, 0.9)
    line = "score: FD 0.5{} - digits 0/10 - evenness 0.50 - confident 0.50 - sevens 0.500"
    assert score_line(scores, floor) == line.format(" (floor 0.9)")
    assert score_line(scores, {}) == line.format("")
    rows = [row.split() for row in score_table(scores, floor, 2000, "test").splitlines()]
    assert rows[1] == ["score", "real", "digits"]
    shown = {name: values for name, *values in rows[2:-1]}
    known = {name: ["0.5", "0.9"] for name in scores}
    assert shown == known | {"sevens": ["0.5"], "copies": ["0.5"]}
    rows = [row.split() for row in score_table(scores, {}, 300, "test").splitlines()]
    assert rows[1] == ["score"]
    assert {name: values for name, *values in rows[2:-1]} == {name: ["0.5"] for name in scores}


# -------------------------------------------- warnings --------------------------------------------
def epochs(fd: list[float], digits: list[float]) -> dict[str, torch.Tensor]:
    """Return the scores of epochs."""
    return {"fd": torch.tensor(fd), "digits": torch.tensor(digits)}


FIRST = epochs([], [])
UNSCORED = epochs([NAN], [NAN])
WELL = [0.6]  # losses
WON = [0.049, 0.01]


@pytest.mark.parametrize(
    ("ds_loss", "fd", "digits", "before", "signs"),
    [
        (WELL, 900, 1, FIRST, []),
        (WELL, 900, 1, epochs([900], [3]), []),
        (WELL, 300, 7, epochs([900], [9]), []),
        ([0.01, 0.6, 0.01], 20, 10, epochs([20], [10]), []),
        ([0.01, 0.06], 20, 10, epochs([20], [10]), []),
        ([0.02] * 199 + [0.07], 20, 10, epochs([20], [10]), ["ds_loss stayed under 0.05"]),
        (WELL, 39.9, 10, epochs([20], [10]), []),
        (WELL, NAN, NAN, UNSCORED, []),
        (WELL, NAN, NAN, epochs([20], [10]), []),
        (WELL, 900, 1, UNSCORED, []),
        (WELL, 20, 1, epochs([NAN, 20], [NAN, 10]), ["digits fell from 10 to 1"]),
        (WELL, 20, 7, epochs([20, NAN], [10, NAN]), ["digits fell from 10 to 7"]),
        (WON, 20, 10, epochs([20], [10]), ["ds_loss stayed under 0.05"]),
        (WON, 20, 10, FIRST, ["ds_loss stayed under 0.05"]),
        (WON, NAN, NAN, UNSCORED, ["ds_loss stayed under 0.05"]),
        (WELL, 20, 7, epochs([20, 20], [10, 8]), ["digits fell from 10 to 7"]),
        (WELL, 40.1, 10, epochs([20, 30], [10, 10]), ["FD is more than twice its best"]),
        (
            WON,
            100,
            1,
            epochs([20], [9]),
            [
                "ds_loss stayed under 0.05",
                "digits fell from 9 to 1",
                "FD is more than twice its best",
            ],
        ),
    ],
)
def test_each_sign_of_a_collapse_is_named_and_none_where_all_is_well(
    ds_loss: list[float],
    fd: float,
    digits: float,
    before: dict[str, torch.Tensor],
    signs: list[str],
):
    scores = {"fd": fd, "digits": digits}
    assert signs_of_collapse(torch.tensor(ds_loss), scores, before) == signs


def test_a_run_warns_of_epochs_that_look_like_a_collapse_and_of_no_other(run, fake_scores):
    fake_scores([900.0, 200.0, 20.0, 39.0, 10.0, 10.0, 20.1, 30.0], [1, 3, 10, 8, 9, 7, 10, 1])
    outcome = run(*THREE_STEPS, "--epochs", 8)
    worse = "FD is more than twice its best"
    signs = ["digits fell from 10 to 7", worse, f"digits fell from 10 to 1 and {worse}"]
    hint = "README.md says what to do"
    assert outcome.warnings() == [f"warning: {sign}; {hint}" for sign in signs]


def go_on(run: dcgan_mnist.Run, epochs: int, lr_g: float, lr_d: float) -> None:
    """Train a run for some more epochs with other learning rates, and score each."""
    run.gan.optimizer_g.param_groups[0]["lr"] = lr_g
    run.gan.optimizer_d.param_groups[0]["lr"] = lr_d
    digits = bundled_digits("test")[:2000]
    step = functools.partial(dcgan_mnist.training_step, run.gan)
    scorer = Scorer(read_scorer(), "test", CPU)
    for stats in dcgan_mnist.train_epochs(run.gan, step, digits, run.gan.epoch + epochs, 1000):
        print("\n".join(dcgan_mnist.score(run, stats, scorer)))


@pytest.mark.slow
def test_real_collapses_are_warned_of_and_the_healthy_run_before_them_is_not(
    capsys: pytest.CaptureFixture[str],
):
    gan = new_gan(width=8, latent_dim=100, beta2=0.99, seed=1)
    digits = bundled_digits("test")[:2000]
    healthy = dcgan_mnist.Run(gan, digits, data_dir=None, epochs=6)
    go_on(healthy, 3, lr_g=0.03, lr_d=0.03)
    assert "warning" not in capsys.readouterr().out
    diverging = copy.deepcopy(healthy)
    go_on(diverging, 1, lr_g=1.0, lr_d=1.0)
    warnings = capsys.readouterr().out
    assert "digits fell from " in warnings
    assert "FD is more than twice its best" in warnings
    go_on(healthy, 2, lr_g=0.0001, lr_d=0.05)  # the discriminator gets overpowered
    assert "ds_loss stayed under 0.05" in capsys.readouterr().out


def test_a_collapse_is_also_seen_by_a_resumed_run(run, fake_scores):
    fake_scores([20.0], [10])
    run(*THREE_STEPS, "--epochs", 1)
    fake_scores([20.0], [2])
    assert "digits fell from 10 to 2" in run("--resume", "--epochs", 2).warnings()[0]


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
    fake_scores([10.0, 30.0], [10, 1])
    outcome = run(*THREE_STEPS, "--dry-run")
    assert outcome.code == 0
    assert outcome.warnings() == []
