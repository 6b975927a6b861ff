"""What does a GGUF say about where a model comes from? What the front of its README.md says, as gguf reads it."""

from __future__ import annotations

from pathlib import Path

from gguf import GGUFWriter, Metadata, size_label
from huggingface_hub import ModelCard

from megalong.runtime.console import warn

_SUFFIX = ".gguf"


def add_card(writer: GGUFWriter, card: str | None, target: Path, parameters: int) -> None:
    """Write `general.*`: the name, and licence, languages, tags, base models and data sets of the card.

    A card that cannot be read costs the file nothing but these; that is said.

    Args:
        card: a README.md with front matter; None: there is none.
        target: the file, whose name is the model's where the card has none.
    """
    metadata = Metadata()
    if card is not None:
        try:
            data = ModelCard(card, ignore_metadata_errors=True).data.to_dict()
            found = Metadata.apply_metadata_heuristic(Metadata(), data)
            found.name = found.name or _name(target)
            found.set_gguf_meta_model(GGUFWriter(None, "llama"))  # what cannot be written is found out here
            metadata = found
        except Exception as error:  # the front matter is anything that YAML can say
            warn(f"The front of README.md is not understood and left out of {target.name}: {error}")
    metadata.name = metadata.name or _name(target)
    metadata.size_label = size_label(parameters, parameters, 0, 0)
    metadata.set_gguf_meta_model(writer)


def _name(target: Path) -> str:
    return target.name.removesuffix(_SUFFIX)
