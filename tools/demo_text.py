"""What does the demo train on? Documents of notes (megalong/evaluation/notes.py), as long as the window they are for.

Text files, a tokenizer that knows their words, a data folder for each window, and a text with notes about other keys
than the questions that are hidden in it. Made once, and kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from megalong.data.output_folder import output_folder
from megalong.data.prepare import prepare
from megalong.evaluation.notes import Notes, write_tokenizer
from megalong.evaluation.tasks import NOUNS

EVAL_FRACTION = 1 / 3
"""Share of a stage's documents that is held out; of the base's many short ones a fiftieth is enough."""
HAYSTACK_TOKENS = 20_000


def make_text(out: Path, base_window: int, base_tokens: int, documents: Mapping[int, int]) -> None:
    """Write the demo's text and data folders below `out`, if they are not there.

    Args:
        base_window: tokens of a document of the base model.
        base_tokens: of all of them.
        documents: number of documents by window, for training and held-out sequences together.
    """
    if out.exists():
        return
    with output_folder(out) as folder:
        write_tokenizer(folder / "tokenizer")
        (folder / "haystack").mkdir()
        hay = Notes(seed=0).document(HAYSTACK_TOKENS, NOUNS).replace(" .", ".")
        (folder / "haystack" / "notes.txt").write_text(hay + "\n")
        wanted = {base_window: -(-base_tokens // base_window), **documents}
        for seed, (window, count) in enumerate(wanted.items(), 1):
            draw, text = Notes(seed), folder / f"{window}.jsonl"
            # one token more than the window makes a sequence; the token that ends the text is none of it, or a model
            # would learn that texts end where its window does
            lines = (json.dumps({"text": draw.document(window + 1)}) + "\n" for _ in range(count))
            text.write_text("".join(lines))
            held_out = 0.02 if window == base_window else EVAL_FRACTION
            prepare(
                text, folder / f"window-{window}", folder / "tokenizer", window, eval_fraction=held_out, progress=False
            )
