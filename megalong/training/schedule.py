"""What learning rate does a step have? Linear warm-up, then constant: a function of the step alone."""


def learning_rate(step: int, peak: float, warmup_steps: int) -> float:
    """Learning rate of a step counted from 0; the first step of a warm-up is not zero."""
    return peak if step >= warmup_steps else peak * (step + 1) / (warmup_steps + 1)
