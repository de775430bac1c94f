"""Job files: what they mean, where their paths lead, and the examples that the repository ships."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml

import qatana as qt
from qatana.jobs import demo_job, job_of, load_job
from qatana.jobs.job import RecipeSection

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))


def test_sections_and_defaults(tiny: dict[str, Any]) -> None:
    job = job_of(tiny)
    assert job.float_.training is not None
    assert job.float_.training.steps == 4
    assert job.recipe(job.section("int8")).target == "ort:int8"
    assert (job.seeds, job.data.max_length, job.evaluation.limit) == ((0,), 128, None)  # type: ignore[union-attr]


def test_yaml_and_json_say_the_same(tiny: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(tiny))
    (tmp_path / "job.json").write_text(json.dumps(tiny))
    assert load_job(tmp_path / "job.yaml") == load_job(tmp_path / "job.json")


def test_name_and_output_come_from_the_file_name(tiny: dict[str, Any], tmp_path: Path) -> None:
    del tiny["name"]
    (tmp_path / "quick.yaml").write_text(yaml.safe_dump(tiny))
    job = load_job(tmp_path / "quick.yaml")
    assert (job.name, job.output) == ("quick", "runs/quick")


def test_a_job_written_and_read_is_the_same(tiny: dict[str, Any]) -> None:
    job = job_of(tiny)
    assert job_of(job.model_dump(mode="json", by_alias=True)) == job


def test_paths_are_looked_for_beside_the_job_file_first(tiny: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("target: ort:int4\nrules:\n- {match: classifier, skip: true}\n")
    tiny["recipes"][0]["recipe"] = "recipe.yaml"
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(tiny))
    job = load_job(tmp_path / "job.yaml")
    assert job.recipe(job.recipes[0]) == qt.Recipe.load(tmp_path / "recipe.yaml")
    assert job.path("elsewhere.txt") == "elsewhere.txt"
    assert job.path("package:neuroner/data") == "package:neuroner/data"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipes": []}, "recipes"),
        ({"seeds": []}, "seeds"),
        ({"model": None}, "model"),
        ({"float": {"training": {"lr": 1e-3}}}, "exactly one of steps and epochs"),
        ({"benchmark": {"rounds": 0}}, "benchmark.rounds"),
        ({"data": {"train": "a.txt"}}, "data.test: this key is required"),
    ],
)
def test_impossible_values_name_the_key(tiny: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(qt.RecipeError) as caught:
        job_of(tiny | changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["int8-qat", "float", "../int8", "a b", ""])
def test_recipe_names_that_cannot_name_files_or_rows(tiny: dict[str, Any], name: str) -> None:
    tiny["recipes"][0]["name"] = name
    with pytest.raises(qt.RecipeError, match="cannot name a recipe"):
        job_of(tiny)


def test_two_recipes_of_one_name(tiny: dict[str, Any]) -> None:
    with pytest.raises(qt.RecipeError, match="two recipes are called 'int8'"):
        job_of(tiny | {"recipes": [tiny["recipes"][0]] * 2})


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_examples_are_valid(path: Path) -> None:
    job = load_job(path)
    for section in job.recipes:
        assert job.recipe(section).target in qt.TARGETS


def test_the_demo_is_the_example_of_that_name() -> None:
    example = Path(__file__).parents[2] / "examples" / "ner-demo.yaml"
    assert (files("qatana.jobs") / "demo.yaml").read_text() == example.read_text()
    assert demo_job().output == "runs/demo"


@pytest.mark.parametrize(
    ("asked", "batches"), [(False, None), (True, 8), ({}, 8), ({"batches": 32}, 32)], ids=["no", "yes", "{}", "own"]
)
def test_batches_of_gptq(asked: Any, batches: int | None) -> None:
    fields = {"name": "w4", "recipe": "ort:int8", "calibration": {"batches": 8}}
    assert RecipeSection.model_validate(fields | {"gptq": asked}).gptq_batches == batches


@pytest.mark.parametrize("asked", [{"batches": 0}, {"batch": 4}])
def test_gptq_asked_for_wrongly(asked: Any) -> None:
    with pytest.raises(ValueError, match="gptq"):
        RecipeSection.model_validate({"name": "w4", "recipe": "ort:int8", "gptq": asked})
