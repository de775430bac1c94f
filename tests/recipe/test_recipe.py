"""Recipes: what wins, what is refused and how the message helps, files both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import qatana as qt
from qatana.errors import RecipeError
from qatana.recipe import TARGETS, Recipe


def decided(recipe: Recipe, name: str, kind: str = "linear", role: str = "weight", type_name: str = "Linear") -> str:
    scheme, _, _ = recipe.scheme_for(name, type_name, kind, role)
    return "float" if scheme is None else str(scheme.format)


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_targets_and_their_short_form(name: str) -> None:
    assert qt.recipe(name) == Recipe.from_dict(name) == Recipe.from_dict({"target": name})


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("ort:int", "ort:int"),
        ("ort:in8", "ort:int8"),
        ("openvino", "openvino:int8"),
        ("ort:int8-dynamc", "ort:int8-dynamic"),
    ],
)
def test_unknown_targets_name_the_nearest(wrong: str, right: str) -> None:
    with pytest.raises(RecipeError, match=f"unknown target '{wrong}'; did you mean '{right}") as caught:
        qt.recipe(wrong)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"target": "ort:int8", "rule": []}, "unknown key 'rule' in recipe; did you mean 'rules'"),
        ({"target": "ort:int8", "rules": [{"mach": "*"}]}, "unknown key 'mach' in rules.0; did you mean 'match'"),
        (
            {"target": "ort:int8", "rules": [{"schemes": {"weigth": {}}}]},
            "unknown role 'weigth'; did you mean 'weight'",
        ),
        (
            {"target": "ort:int8", "rules": [{"schemes": {"weight": {"fromat": "int4"}}}]},
            "unknown key 'fromat' in a scheme; did you mean 'format'",
        ),
        ({"target": "ort:int8", "rules": [{"skip": "perhaps"}]}, r"rules.0.skip: .*\(got 'perhaps'\)"),
        ({"target": "ort:int8", "reduce_range": "maybe"}, "reduce_range: "),
        ({"rules": []}, "target: this key is required"),
        ({"target": 8}, "target: "),
        ([], "a recipe is a mapping with a 'target', not list"),
        (None, "not NoneType"),
    ],
)
def test_impossible_recipes(data: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        Recipe.from_dict(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "int9"}, r"rule '\*.query': unknown number format 'int9'"),
        ({"granularity": "grop32"}, r"rule '\*.query': unknown granularity 'grop32'"),
        ({"scale": "dinamic"}, r"rule '\*.query': unknown scale mode 'dinamic'; did you mean 'dynamic'"),
        ({"range": "max"}, r"rule '\*.query': unknown range estimator 'max'"),
        ({"format": 8}, r"rule '\*.query'"),
        ({"granularity": 32}, r"rule '\*.query'"),
        ({"fixed": 3}, r"rule '\*.query'"),
    ],
)
def test_impossible_schemes_name_the_rule(changes: dict[str, Any], message: str) -> None:
    """A value of the wrong type is an error of the same kind, not a traceback."""
    with pytest.raises(RecipeError, match=message):
        qt.recipe("ort:int8").rule("*.query", weight=changes).scheme_for("layer.0.query", "Linear", "linear", "weight")


def test_the_last_rule_wins() -> None:
    recipe = (
        qt.recipe("ort:int8")
        .rule("layer.*", weight={"format": "int4"})
        .rule("layer.1.*", weight={"format": "int3"})
        .rule(type="Emb*", weight=None)
    )
    assert decided(recipe, "layer.0.query") == "int4"
    assert decided(recipe, "layer.1.query") == "int3"
    assert decided(recipe, "head") == "int7n"
    assert decided(recipe, "embeddings", "embedding", type_name="Embedding") == "float"
    again = recipe.skip("layer.1.query").rule("layer.1.query", weight={"format": "int8n"})
    assert decided(again, "layer.1.query") == "int7n"


def test_rules_change_what_they_name_and_nothing_else() -> None:
    base, _, _ = qt.recipe("ort:int8").scheme_for("fc", "Linear", "linear", "input")
    found, winner, reason = (
        qt.recipe("ort:int8").rule("fc", input={"range": "percentile"}).scheme_for("fc", "Linear", "linear", "input")
    )
    assert base is not None
    assert found == base.with_(range="percentile")
    assert (winner, reason) == ("fc", "")


@pytest.mark.parametrize(("pattern", "name", "skipped"), [
    ("classifier", "classifier", True), ("classifier", "model.classifier", True), ("classifier", "classifier.dense", True),
    ("classifier", "preclassifier", False), ("*.query", "a.b.query", True), ("*.query", "query", False), ("layer.[01]", "layer.1", True),
    ("layer.[01]", "layer.2", False),
])  # fmt: skip
def test_skip_patterns(pattern: str, name: str, skipped: bool) -> None:
    assert (decided(qt.recipe("ort:int8").skip(pattern), name) == "float") == skipped


def test_seven_bits_where_no_instruction_holds_eight() -> None:
    assert decided(qt.recipe("ort:int8"), "fc") == "int7n"
    assert decided(qt.recipe("ort:int8", reduce_range=False), "fc") == "int8n"
    assert decided(qt.recipe("ort:int8"), "table", "embedding", type_name="Embedding") == "int8n"  # no product: no need
    assert decided(qt.recipe("ort:int4"), "fc") == "int4"


def test_reasons() -> None:
    _, rule, reason = qt.recipe("ort:int4").scheme_for("conv", "Conv2d", "conv", "weight")
    assert (rule, reason) == ("target ort:int4", "ort:int4 has no integer kernel for conv weight")
    _, rule, reason = (
        qt.recipe("ort:int8").skip("fc", reason="too small to matter").scheme_for("fc", "Linear", "linear", "input")
    )
    assert (rule, reason) == ("fc skip", "too small to matter")


RECIPE = (
    qt.recipe("ort:int8", reduce_range=False)
    .skip("head")
    .rule("*.q", type="Linear", weight={"format": "int4"}, input=None)
)


@pytest.mark.parametrize("suffix", ["json", "yaml", "yml"])
def test_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"recipe.{suffix}"
    path.write_text(RECIPE.to_json() if suffix == "json" else RECIPE.to_yaml())
    assert Recipe.load(path) == RECIPE


def test_written_recipes_hold_what_was_said_and_no_defaults() -> None:
    assert json.loads(qt.recipe("ort:int8").to_json()) == {"target": "ort:int8"}
    assert qt.recipe("ort:int8").skip("*.0").to_yaml() == (
        "target: ort:int8\nrules:\n- match: '*.0'\n  skip: true\n  reason: skipped by the recipe\n"
    )


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("r.json", b"{", "is not valid JSON or YAML"),
        ("r.yaml", b"a: [", "is not valid JSON or YAML"),
        ("r.yaml", b"target: !!python/object/apply:os.system [echo]", "is not valid JSON or YAML"),
        ("r.yaml", b"\xff\xfe\x80", "is not a text file in UTF-8"),
        ("r.json", b"[]", "a recipe is a mapping"),
        ("r.yaml", b"", "a recipe is a mapping"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(RecipeError, match=message) as caught:
        Recipe.load(path)
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot read recipe .*none.yaml: No such file"):
        Recipe.load(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("kind", "format", "granularity", "scales", "expected"),
    [
        ("linear", "int4", "channel", 8, 8 * 32 + 8 * 4),  # QGemm takes int8 codes, whatever their range
        ("conv", "int2", "channel", 8, 8 * 32 + 8 * 4),
        ("linear", "int4", "group32", 8, 8 * 32 / 2 + 8 * 4),  # MatMulNBits
        ("linear", "int2", "group32", 8, 8 * 32 / 4 + 8 * 4),
        ("embedding", "int4", "channel", 8, 8 * 32 / 2 + 8 * 4),  # GatherBlockQuantized
        ("embedding", "int8", "channel", 8, 8 * 32 + 8 * 4),
    ],
)
def test_bytes_of_a_weight_are_those_of_the_file(
    kind: str, format: str, granularity: str, scales: int, expected: float
) -> None:
    """A weight of (8, 32): what convert stores and the operator of the file takes."""
    from qatana.recipe import Row

    row = Row("w", "m", kind, "", "weight", qt.scheme(format, granularity), "", elements=8 * 32, scales=scales)
    assert row.bytes == expected
