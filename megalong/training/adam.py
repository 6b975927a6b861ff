"""Which Adam does megatron-core update the weights with? It takes what it could import; here it takes what was chosen.

megatron-core decides on import, twice: optimizer/__init__.py (which class is built, and with which arguments) and
optimizer/distrib_optimizer.py (where the step count lies: in each parameter's state with torch, in its group with the
fused ones). Both are set together, so that where a fused one is installed CPU ranks still get torch's.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from megatron.core import optimizer as megatron_optimizer
from megatron.core.optimizer import distrib_optimizer

from megalong.runtime import device, packages

_FUSED = {
    "transformer_engine": ("transformer_engine.pytorch.optimizers", packages.TRANSFORMER_ENGINE),
    "apex": ("apex.optimizers", packages.APEX_ADAM),
}


def choose_adam(wanted: str) -> str:
    """Make megatron-core build its optimizers with this Adam from now on.

    Args:
        wanted: `train.adam`.

    Returns:
        transformer_engine, apex or torch.

    Raises:
        ConfigError: what was chosen is not installed.
    """
    chosen = packages.adam(wanted, device.on_cuda())
    building: Any = megatron_optimizer
    counting: Any = distrib_optimizer
    if chosen in _FUSED:
        module, package = _FUSED[chosen]
        packages.require(package, f"train.adam={chosen}", "train.adam=auto")
        building.Adam = counting.Adam = import_module(module).FusedAdam
    building.USING_PYTORCH_OPTIMIZER = chosen == "torch"
    counting.HAVE_APEX_OR_TE = chosen != "torch"
    counting.USING_TE_OPTIMIZER = chosen == "transformer_engine"
    counting.USING_APEX_OPTIMIZER = chosen == "apex"
    return chosen
