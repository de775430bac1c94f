"""What is wanted (Recipe), for which engine (Target), and what that means for each tensor (Plan)."""

from qatana.recipe.make import recipe
from qatana.recipe.plan import Plan, Row
from qatana.recipe.recipe import Recipe, Rule
from qatana.recipe.targets import TARGETS, Target, register_target, target

__all__ = ["TARGETS", "Plan", "Recipe", "Row", "Rule", "Target", "recipe", "register_target", "target"]
