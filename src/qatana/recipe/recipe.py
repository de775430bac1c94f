"""A recipe says what is wanted: a target, then rules in order, the last match wins. JSON and YAML both ways."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator

from qatana.errors import QatanaError, RecipeError, nearest
from qatana.numerics import IntFormat, Scheme, scheme
from qatana.recipe.targets import Target, target
from qatana.validation import make

ROLES = ("weight", "input", "output", "query", "key", "value", "probability", "context", "gradient")
Change = dict[str, Any] | str | None
_SCHEME_KEYS = ("format", "granularity", "symmetric", "scale", "range", "fixed", "scale_type", "rule")


class Rule(BaseModel):
    """What holds for the modules whose name (and type) match.

    match    glob on the module's name: "encoder.layer.*.query", "*"
    type     glob on the module's class name: "Linear", "Conv*"
    skip     leave the whole module float (reason: why, for the plan)
    schemes  per role, changes to the target's scheme: {"weight": {"format": "int4"}}, or a whole scheme by name: {"weight": "nf4+double"};
             null leaves that tensor float"""

    model_config = ConfigDict(extra="forbid", frozen=True)

    match: str = "*"
    type: str = "*"
    skip: bool = False
    reason: str = ""
    schemes: dict[str, Change] = Field(default_factory=dict)

    @field_validator("schemes")
    @classmethod
    def _known(cls, value: dict[str, Change]) -> dict[str, Change]:
        for role, changes in value.items():
            if role not in ROLES:
                raise ValueError(f"unknown role '{role}'{nearest(role, ROLES)}")
            if isinstance(changes, str):
                _named(changes)
                continue
            for key in changes or {}:
                if key not in _SCHEME_KEYS:
                    raise ValueError(f"unknown key '{key}' in a scheme{nearest(key, _SCHEME_KEYS)}")
        return value

    def matches(self, name: str, type_name: str) -> bool:
        return fnmatchcase(name, self.match) and fnmatchcase(type_name, self.type)

    def label(self) -> str:
        return self.match + ("" if self.type == "*" else f" [{self.type}]") + (" skip" if self.skip else "")


class Recipe(BaseModel):
    """Target, rules and the options that hold for the whole model.

    reduce_range  8-bit weights (and operands of integer products with uint8) use 7 bits, [-63, 63]: the only form in
                  which x86
                  CPUs without VNNI compute the exact sum. Turn it off for hardware that has VNNI, AMX or ARM dot
                  products."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: str
    rules: tuple[Rule, ...] = ()
    reduce_range: bool = True

    @field_validator("target")
    @classmethod
    def _known(cls, value: str) -> str:
        try:
            return target(value).name
        except RecipeError as error:
            raise ValueError(str(error)) from error

    @property
    def resolved(self) -> Target:
        return target(self.target)

    # -- building --------------------------------------------------------------------------------------------------
    def skip(self, *patterns: str, reason: str = "skipped by the recipe") -> Recipe:
        """The same recipe, leaving modules whose names match float. A bare name also matches below it."""
        rules = [
            Rule(match=match, skip=True, reason=reason)
            for pattern in patterns
            for match in ((pattern,) if any(c in pattern for c in "*?[") else (pattern, f"{pattern}.*", f"*.{pattern}"))
        ]
        return self.model_copy(update={"rules": (*self.rules, *rules)})

    def rule(self, match: str = "*", type: str = "*", **schemes: Change) -> Recipe:
        """The same recipe with one more rule: `recipe.rule("*.query", weight={"format": "int4"}, input="int8/token")`."""
        return self.model_copy(
            update={"rules": (*self.rules, make(Rule, {"match": match, "type": type, "schemes": schemes}))}
        )

    # -- deciding --------------------------------------------------------------------------------------------------
    def scheme_for(self, name: str, type_name: str, kind: str, role: str) -> tuple[Scheme | None, str, str]:
        """(scheme or None, the rule that won, the reason if float) for one tensor."""
        base = self.resolved.schemes.get((kind, role))
        if base is None and not self.resolved.free and role != "gradient":
            return None, f"target {self.target}", f"{self.target} has no integer kernel for {kind} {role}"
        winner, reason = f"target {self.target}", "" if base is not None else "no rule quantizes it"
        current = base
        for rule in self.rules:
            if not rule.matches(name, type_name):
                continue
            if rule.skip:
                current, winner, reason = None, rule.label(), rule.reason or "skipped by the recipe"
            elif role in rule.schemes:
                changes = rule.schemes[role]
                winner = rule.label()
                current = None if changes is None else _changed(current or base, changes, winner, role)
                reason = "float by rule" if changes is None else ""
        if current is not None and self.reduce_range and not self.resolved.free and _reducible(kind, role, current):
            changes = {"format": str(IntFormat(7, signed=True, narrow=True))}
            current = _changed(current, changes, f"{winner}, with reduce_range", role)
        return current, winner, reason

    # -- files -----------------------------------------------------------------------------------------------------
    def to_dict(self) -> dict[str, Any]:
        data = self.model_dump(exclude_defaults=True)
        if self.rules:
            data["rules"] = [rule.model_dump(exclude_defaults=True) for rule in self.rules]
        return data

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def to_yaml(self) -> str:
        return yaml.safe_dump(json.loads(self.to_json()), sort_keys=False)

    @classmethod
    def from_dict(cls, data: Any) -> Recipe:
        if isinstance(data, str):
            data = {"target": data}
        if not isinstance(data, dict):
            raise RecipeError(f"a recipe is a mapping with a 'target', not {type(data).__name__}")
        return make(cls, data)

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe from .json, .yaml or .yml."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise RecipeError(f"cannot read recipe {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise RecipeError(f"recipe {path} is not a text file in UTF-8") from error
        try:
            data = json.loads(text) if str(path).endswith(".json") else yaml.safe_load(text)
        except (ValueError, yaml.YAMLError) as error:
            raise RecipeError(f"{path} is not valid JSON or YAML: {str(error).splitlines()[0]}") from error
        return cls.from_dict(data)


def _named(text: str) -> Scheme:
    try:
        return scheme(text)
    except QatanaError as error:
        raise ValueError(str(error)) from error


def _changed(base: Scheme | None, changes: dict[str, Any] | str, rule: str, role: str) -> Scheme:
    """A whole scheme by name, or changes to what held before. A name alone stands for scale="dynamic" where nothing else is possible: in
    gradients, and in activations with more than one scale."""
    try:
        if isinstance(changes, str):
            named = scheme(changes)
            static = role == "weight" or (role != "gradient" and named.granularity.kind == "tensor")
            return named if static or " " in changes else named.with_(scale="dynamic")
        if base is None and role == "gradient":
            changes = {"scale": "dynamic"} | changes
        return Scheme.from_dict((base.to_dict() if base is not None else {}) | changes)
    except QatanaError as error:
        raise RecipeError(f"rule '{rule}': {error}") from error


def _reducible(kind: str, role: str, scheme: Scheme) -> bool:
    """Signed 8-bit operands that meet uint8 ones in an integer product."""
    product = (kind in ("linear", "conv") and role == "weight") or (kind == "attention" and role in ("key", "value"))
    wide = scheme.is_integer and scheme.integer.signed and scheme.integer.bits == 8
    return product and wide and scheme.granularity.kind in ("tensor", "channel")
