"""From overrides on a command line to one complete, checked run: stages, their chain of thetas, layouts."""

from megalong.recipe.compose import compose

__all__ = ["compose"]
