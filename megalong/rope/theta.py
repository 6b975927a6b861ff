"""Which rotary base (theta) does a window need? The laws that lead from one stage of training to the next.

Two published laws, both floored to an integer as the model cards print them:

- *dynamic NTK, chained*: `floor(theta_prev * (f * L / L_prev - (f - 1)) ** (d / (d - 2)))`, the rule of
  transformers' "dynamic" rotary type (bloc97, emozilla 2023), applied from stage to stage. From (500000, 8192) with
  d = 128 and f = 4, 4, 4, 1.6 it gives the thetas of Llama-3-8B-Instruct-Gradient-1048k.
- *scaling law*: `floor(theta_0 ** (ln(L / 2 pi) / ln(L_0 / 2 pi)))`, always from the base model
  (Liu et al., arXiv 2310.05209, theorem 1 for larger bases).

Pure float arithmetic (IEEE double); theta stays a float in the interface because a base found by search need not be
whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megalong.runtime.errors import ThetaError

LAWS = ("dynamic_ntk", "scaling_law", "unchanged", "fixed")


@dataclass(frozen=True)
class RotaryPoint:
    """A rotary base and the window (tokens) that it serves."""

    theta: float
    window: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.theta) and self.theta > 1.0):
            raise ThetaError(f"theta={self.theta!r}: a rotary base is a finite number above 1.")
        if self.window < 1:
            raise ThetaError(f"window={self.window!r}: a window is at least one token.")


def dynamic_ntk(previous: RotaryPoint, window: int, head_dim: int, factor: float) -> float:
    """Theta of `window` by the dynamic-NTK law from the stage before.

    Args:
        previous: theta and window of the stage before.
        window: window of this stage, tokens.
        head_dim: channels per attention head, d.
        factor: f of the law; 1.0 is plain NTK scaling by the ratio of windows.

    Raises:
        ThetaError: the window shrinks, head_dim <= 2, or factor < 1.
    """
    if head_dim <= 2 or head_dim % 2:
        raise ThetaError(f"head_dim={head_dim}: the dynamic-NTK law needs an even head dimension above 2.")
    if factor < 1.0:
        raise ThetaError(f"theta_factor={factor}: the dynamic-NTK law needs a factor of at least 1.")
    if window < previous.window:
        raise ThetaError(
            f"The window shrinks from {previous.window} to {window} tokens: the dynamic-NTK law only lengthens. "
            "Start from a checkpoint with a shorter window, or set stage.theta_law=fixed with stage.theta."
        )
    stretch = factor * window / previous.window - (factor - 1)
    return float(math.floor(previous.theta * stretch ** (head_dim / (head_dim - 2))))


def scaling_law(base: RotaryPoint, window: int) -> float:
    """Theta of `window` by the scaling law, from the base model's theta and window.

    Raises:
        ThetaError: a window of at most 2 pi tokens, where the logarithms of the law change sign.
    """
    if base.window <= 2 * math.pi or window <= 2 * math.pi:
        raise ThetaError(f"Windows {base.window} and {window}: the scaling law needs more than 2 pi tokens in both.")
    exponent = math.log(window / (2 * math.pi)) / math.log(base.window / (2 * math.pi))
    return float(math.floor(base.theta**exponent))


def stage_theta(
    law: str,
    *,
    window: int,
    head_dim: int,
    base: RotaryPoint,
    previous: RotaryPoint,
    factor: float = 4.0,
    declared: float | None = None,
) -> float:
    """Theta that a stage trains with.

    Args:
        law: one of `LAWS`.
        window: the stage's window, tokens.
        head_dim: channels per attention head.
        base: rotary point of the base model (used by the scaling law).
        previous: rotary point of the stage before (used by the dynamic-NTK law); the base itself for a first stage.
        factor: f of the dynamic-NTK law.
        declared: theta that the stage declares. Required by "fixed"; otherwise it must agree with the law.

    Raises:
        ThetaError: unknown law, no theta under "fixed", or a declared theta that contradicts the law.
    """
    if law == "fixed":
        if declared is None:
            raise ThetaError("stage.theta_law=fixed without stage.theta: give the rotary base of this stage.")
        return RotaryPoint(float(declared), window).theta
    if law == "dynamic_ntk":
        theta = dynamic_ntk(previous, window, head_dim, factor)
        origin = f"{previous.theta:.17g} at {previous.window} tokens with factor {factor:g} and head_dim {head_dim}"
    elif law == "unchanged":
        theta = previous.theta
        origin = f"{previous.theta:.17g} at {previous.window} tokens, unchanged"
    elif law == "scaling_law":
        theta = scaling_law(base, window)
        origin = f"{base.theta:.17g} at {base.window} tokens"
    else:
        raise ThetaError(f"stage.theta_law={law!r} is unknown: use one of {', '.join(LAWS)}.")
    if declared is not None and declared != theta:
        raise ThetaError(
            f"stage.theta={declared:.17g} contradicts stage.theta_law={law}, which gives {theta:.17g} for {window} "
            f"tokens from {origin}. Leave it to the law with stage.theta=null, or keep it with stage.theta_law=fixed."
        )
    return theta


def check_follows(found: RotaryPoint, expected: RotaryPoint, where: str) -> None:
    """Check that the checkpoint a stage starts from carries its predecessor's theta.

    Args:
        found: what the checkpoint's own configuration says.
        expected: what the predecessor stage trains with.
        where: the checkpoint, as the message should call it.

    Raises:
        ThetaError: theta or window differ.
    """
    if found.theta != expected.theta:
        raise ThetaError(
            f"{where} has theta {found.theta:.17g}, but this stage follows one with theta {expected.theta:.17g} at "
            f"{expected.window} tokens. Start from the checkpoint of the stage before, or change the stage's "
            "predecessor or theta law."
        )
    if found.window != expected.window:
        raise ThetaError(
            f"{where} has a window of {found.window} tokens, but this stage follows one of {expected.window} tokens. "
            "Start from the checkpoint of the stage before, or change the stage's predecessor."
        )
