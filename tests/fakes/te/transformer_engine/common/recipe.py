"""FP8 recipes, which nothing here makes."""


class DelayedScaling:
    """megatron-core derives a class from it."""
