"""The settings: the article's defaults, the recipes, and what a run keeps of them."""

import dataclasses

import pytest
from helpers import THREE_STEPS, saved

from dcgan_mnist import RECIPES, Settings


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
    assert RECIPES["article"] == {}


def test_a_run_keeps_its_defaults_in_the_checkpoint(run):
    run("--epochs", 1, "--precision", "fp32")
    assert kept_settings() == Settings()


def test_settings_cannot_be_changed_half_way():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().lr = 0.1


def test_recipes_change_what_there_is_to_change_and_no_recipe_is_the_article_again():
    article = dataclasses.asdict(Settings())
    for name, changes in RECIPES.items():
        assert changes.keys() < article.keys() - {"recipe"}
        assert all(article[setting] != value for setting, value in changes.items())
        assert bool(changes) == (name != "article")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_sets_its_defaults_and_no_others(run, recipe: str):
    run("--epochs", 1, "--precision", "fp32", "--recipe", recipe)
    assert kept_settings() == Settings(recipe=recipe, **RECIPES[recipe])


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
