"""The settings: the article's defaults, the recipes, and what a run keeps of them."""

import dataclasses

import pytest
from helpers import SMALL, THREE_STEPS, contents, saved

from dcgan_mnist import RECIPES, Settings

SIZES = {"width": int(SMALL[1]), "latent_dim": int(SMALL[3])}  # of the runs of these tests


def kept_settings() -> Settings:
    """Return the settings that the run in the current folder keeps."""
    return Settings(**saved()["settings"])


def test_the_article_is_the_default_recipe_to_the_letter():
    settings = Settings()
    assert settings.recipe == "article"
    assert settings.batch_size == 50
    assert settings.lr == 0.0002
    assert settings.beta1 == 0.5
    assert settings.beta2 == 0.999
    assert settings.generator_steps == 1
    assert settings.width == 128
    assert settings.latent_dim == 100
    assert RECIPES["article"] == {}


def test_a_run_keeps_its_defaults_in_the_checkpoint(run):
    run("--epochs", 1, "--precision", "fp32")
    assert kept_settings() == Settings(**SIZES)


def test_settings_cannot_be_changed_half_way():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().lr = 0.1


def test_the_recipes_are_those_that_were_measured():
    assert RECIPES == {
        "article": {},
        "tuned": {"lr": 0.002, "beta2": 0.99, "generator_steps": 2},
        "quick": {
            "batch_size": 40,
            "lr": 0.0018,
            "beta1": 0.3,
            "beta2": 0.9,
            "ema": 0.1,
        },
    }


def test_recipes_change_what_there_is_to_change_and_no_recipe_is_the_article_again():
    article = dataclasses.asdict(Settings())
    for name, changes in RECIPES.items():
        assert changes.keys() < article.keys() - {"recipe"}
        assert all(article[setting] != value for setting, value in changes.items())
        assert bool(changes) == (name != "article")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_sets_its_defaults_and_no_others(run, recipe: str):
    run("--epochs", 1, "--precision", "fp32", "--recipe", recipe)
    assert kept_settings() == Settings(recipe=recipe, **SIZES, **RECIPES[recipe])


@pytest.mark.parametrize("recipe_first", [True, False])
def test_a_flag_holds_against_a_recipe_and_against_a_default(run, recipe_first: bool):
    flags = ["--lr", 0.1, "--seed", 3, "--ema", 0]
    recipe = ["--recipe", "tuned"]
    line = [*recipe, *flags] if recipe_first else [*flags, *recipe]
    run(*THREE_STEPS, "--epochs", 1, *line)
    kept = kept_settings()
    assert kept.recipe == "tuned"
    assert kept.beta2 == RECIPES["tuned"]["beta2"]
    assert kept.lr == 0.1
    assert kept.seed == 3
    assert kept.ema == 0


@pytest.mark.parametrize(("width", "latent_dim"), [(1, 2), (3, 11)])
def test_networks_of_any_size_go_on_and_draw_without_naming_it_again(
    run, width: int, latent_dim: int
):
    size = ["--width", width, "--latent-dim", latent_dim]
    assert run(*THREE_STEPS, "--epochs", 1, *size).code == 0
    for command in (["--resume", "--epochs", 2], ["--generate", 3], ["--resume", "--epochs", 3]):
        outcome = run(*command)
        assert (outcome.code, outcome.err) == (0, "")
    checkpoint = saved()
    assert checkpoint["epoch"] == 3
    assert (kept_settings().width, kept_settings().latent_dim) == (width, latent_dim)
    first, *_ = checkpoint["generator"].values()
    assert first.shape == (latent_dim, 4 * width, 3, 3)
    assert contents("result").keys() >= {"generated.npy", "generated.png"}


@pytest.mark.parametrize("name", ["--width", "--latent-dim"])
def test_a_run_cannot_go_on_in_another_size(run, name: str):
    run(*THREE_STEPS, "--epochs", 1)
    before = contents(".")
    assert run("--resume", "--epochs", 2, name, 5).is_one_line(2, f"error: argument {name}: 5")
    assert contents(".") == before
