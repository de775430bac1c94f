"""The ways to a recipe: `recipe("ort:int8")`, `recipe("torch", weight="nf4")`, `recipe.from_hf(config)`."""

from __future__ import annotations

from qatana.recipe.foreign import from_hf
from qatana.recipe.recipe import Change, Recipe
from qatana.validation import make


class Recipes:
    """What `qatana.recipe` is: called, it makes the recipe of a target."""

    def __call__(self, target: str, *, reduce_range: bool = True, **schemes: Change) -> Recipe:
        """The default recipe of a target, `recipe("ort:int8").skip("classifier")`; with schemes per role, one rule more for every layer:
        `recipe("torch", weight="nf4+double")`, `recipe("torch", weight="bitnet", input="int8/token")`,
        `recipe("torch", weight="int4/group128", key="int8/token", value="int8/token")` (the last two: the KV cache)."""
        rules = [{"schemes": schemes}] if schemes else []
        return make(Recipe, {"target": target, "reduce_range": reduce_range, "rules": rules})

    from_hf = staticmethod(from_hf)


recipe = Recipes()
