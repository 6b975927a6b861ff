"""Tokenizers as Llamas have them, small: Llama 3's byte-level BPE, GPT-2's, and SentencePiece's in both its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers.utils import sentencepiece_model_pb2_new as sentencepiece

from megalong.convert.gguf_tokenizer import LLAMA3

EXAMPLE = Path(__file__).parents[2] / "examples" / "tokenizer"
TEXTS = [
    "def f(self, x):\n    return x.shape[0]  # 12345 items\n\n\n",
    "I'll say: it's 'fine', WE'RE HERE!!   \t  done\r\n",
    "naïve café — Ärger, ελληνικά, русский 12 текст, 你好。世界, 🚀🦙 👩‍👩‍👧 \u200d zero\u00a0width",
    "",
    " ",
    "<|start_header_id|>user<|end_header_id|>\n\nHow are you?<|eot_id|> tail",
    "a<|eot_id|><|eot_id|>b <|notspecial|> <|reserved|>c",
]
CHAT = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def write_gpt2(folder: Path) -> None:
    """The repository's own example, split as GPT-2 does."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((EXAMPLE / name).read_bytes())


def write_llama3(folder: Path, **changes: Any) -> None:
    """The example's vocabulary with what Llama 3 has: its way of splitting, its special tokens, a chat template."""
    raw = json.loads((EXAMPLE / "tokenizer.json").read_text())
    size = len(raw["model"]["vocab"])
    special = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|reserved|>"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    raw["added_tokens"] += [
        {"id": size + i, "content": token, **flags, "special": token != "<|reserved|>"}
        for i, token in enumerate(special)
    ]
    split = {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    raw["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, level]}
    raw["model"]["ignore_merges"] = True
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    first = {"SpecialToken": {"id": special[0], "type_id": 0}}
    raw["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [first, sequence],
        "pair": [first, sequence, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {special[0]: {"id": special[0], "ids": [size], "tokens": [special[0]]}},
    }
    raw.update({key: value for key, value in changes.items() if key in raw})
    raw["model"].update(changes.get("model_changes", {}))
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": special[0],
        "eos_token": "<|eot_id|>",
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(CHAT)


def write_sentencepiece(folder: Path, model: bool) -> Tokenizer:
    """A tokenizer of Llama 2's kind, as tokenizer.json, or (with `model`) as tokenizer.model alone.

    Returns:
        what cuts as it does.
    """
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    text = [*TEXTS, (Path(__file__).parents[2] / "README.md").read_text()[:20000]]
    made.train_from_iterator(text, trainers.BpeTrainer(vocab_size=600, show_progress=False))
    learned = json.loads(made.to_str())["model"]
    merged = ["".join(pair if isinstance(pair, list) else pair.split(" ")) for pair in learned["merges"]]
    letters = sorted(set(learned["vocab"]) - set(merged))
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *dict.fromkeys(merged), *letters]
    score = {piece: -float(rank) for rank, piece in enumerate(dict.fromkeys(merged))}
    places = {piece: place for place, piece in enumerate(pieces)}
    merges = [
        [token[:cut], token[cut:]]
        for token in score  # as transformers makes merges of a tokenizer.model: every way to cut a token in two
        for cut in range(1, len(token))
        if token[:cut] in places and token[cut:] in places
    ]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    first = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    raw = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": pieces[i], **flags} for i in range(3)],
        "normalizer": json.loads(made.to_str())["normalizer"],
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first, sequence],
            "pair": [first, sequence, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": None,
        "model": {
            **{"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "ignore_merges": False},
            **{"dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None},
            "vocab": places,
            "merges": merges,
        },
    }
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if not model:
        (folder / "tokenizer.json").write_text(json.dumps(raw))
    else:
        proto = sentencepiece.ModelProto()
        proto.trainer_spec.model_type = proto.trainer_spec.BPE
        kinds = {0: 2, 1: 3, 2: 3}
        for place, piece in enumerate(pieces):
            kind = kinds.get(place, 6 if place < 259 else 1)
            proto.pieces.add(piece=piece, score=score.get(piece, 0.0), type=kind)
        (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    return Tokenizer.from_str(json.dumps(raw))
