"""One run, with nothing left open: what a stage, a scale, a model and the ranks that were started come to.

`megalong.recipe.resolve` makes it, once; whoever trains, plans or builds is given it and changes nothing in it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megalong.config.schema import Config, ModelConfig
from megalong.rope.theta import RotaryPoint
from megalong.topology.layout import Layout


@dataclass(frozen=True)
class Run:
    """Settings that follow from others stand here, as they are used; all others are read from `config`."""

    config: Config
    """What the user said, completed: `config.yaml`. The fields below are what counts."""
    seq_length: int
    """Window, tokens per sequence."""
    theta: float
    """Rotary base of the stage."""
    before: RotaryPoint
    """Theta and window of the weights that the stage starts from."""
    layout: Layout
    steps: int
    """Optimizer steps of the whole schedule."""
    stop_after: int
    """The step after which this process saves and stops; at most `steps`."""
    lr: float
    """Peak learning rate."""
    decay_steps: int
    """Steps, warm-up included, after which the learning rate has decayed; without a decay, all."""
    wsd_steps: int
    """Of `decay_steps`, the last ones, in which a wsd schedule decays."""
    global_batch_size: int
    """Sequences per optimizer step."""
    recompute: str
    """What backward computes again, a key of `megalong.model.flops.RECOMPUTE`."""
    mlp_chunk: int | None
    """Tokens of a tile of the MLP; 0: in one piece; None: not resolved yet."""
    run_dir: Path
    """Folder for everything the run writes."""
    rope_scaling: dict[str, Any] | None = None
    """Hugging Face rope dict of the stage, complete; None: plain rotary embedding."""
    rope_scaling_before: dict[str, Any] | None = None
    """The same of the weights that the stage starts from."""

    @property
    def model(self) -> ModelConfig:
        """Shape of the model."""
        return self.config.model

    @property
    def micro_batches(self) -> int:
        """Micro-batches (of one sequence) per step and replica."""
        return self.global_batch_size // self.layout.dp

    def on(self, layout: Layout) -> Run:
        """The same run on another layout."""
        topology = replace(self.config.topology, **asdict(layout))
        return replace(self, layout=layout, config=replace(self.config, topology=topology))

    def reading(self, folder: Path) -> Run:
        """The same run on the sequences in `folder`."""
        return replace(self, config=replace(self.config, data=replace(self.config.data, path=str(folder))))
