"""How does a tokenizer travel inside a GGUF, so that llama.cpp cuts a text as transformers does?

Two kinds: byte-level BPE (Llama 3), of which llama.cpp knows the way of splitting by name, and SentencePiece (Llama 1
and 2), which llama.cpp computes from scores. What would be cut otherwise there is refused by name. Source:
src/llama-vocab.cpp of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType
from tokenizers import Tokenizer

from megalong.convert.gguf_sentencepiece import from_merges, from_model
from megalong.convert.hf_folder import json_object
from megalong.runtime.errors import CheckpointError
from megalong.runtime.json_file import shown

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Llama 3 splits a text before it merges."""
_NAMES = {("llama3", True): "llama-bpe", ("llama3", False): "smaug-bpe", ("gpt2", False): "gpt-2"}
"""(way of splitting, ignore_merges) -> what llama.cpp calls it."""
_SPECIAL = ("bos", "eos", "unk", "pad")


@dataclass
class Vocabulary:
    """What a GGUF holds of a tokenizer."""

    model: str
    """gpt2 or llama."""
    pre: str
    tokens: list[bytes]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    space_prefix: bool | None = None
    """SentencePiece: whether a text gets a space in front."""
    ids: dict[str, int] = field(default_factory=dict)
    """bos, eos, unk, pad -> id."""
    adds: dict[str, bool] = field(default_factory=dict)
    """bos, eos -> whether a text gets it."""
    chat_template: Any = None

    def add_to(self, writer: GGUFWriter) -> None:
        """Write it."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        writer.add_token_types(self.types)
        if self.merges is not None:
            writer.add_token_merges(self.merges)
        for name, token_id in self.ids.items():
            getattr(writer, f"add_{name}_token_id")(token_id)
        for name, added in self.adds.items():
            getattr(writer, f"add_add_{name}_token")(added)
        if self.space_prefix is not None:
            writer.add_add_space_prefix(self.space_prefix)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def vocabulary(files: Mapping[str, bytes], config: Mapping[str, Any], where: Path) -> Vocabulary:
    """The tokenizer of a model.

    Args:
        files: the model's files besides weights, by name.
        config: the complete Hugging Face config.
        where: the model's folder, for errors.

    Raises:
        CheckpointError: there is none, it is damaged, or llama.cpp would cut texts otherwise.
    """
    size = config["vocab_size"]
    said = _optional(files, "tokenizer_config.json", where)
    if "tokenizer.json" in files:
        found = _of_json(files["tokenizer.json"], json_object(files, "tokenizer.json", where), said, where)
    elif "tokenizer.model" in files:
        tokens, scores, types = from_model(files["tokenizer.model"], where / "tokenizer.model")
        found = Vocabulary("llama", "default", tokens, types, scores, space_prefix=True)
        found.adds = {"bos": said.get("add_bos_token") is not False, "eos": said.get("add_eos_token") is True}
    else:
        raise CheckpointError(
            f"{where} has no tokenizer, and a GGUF without one is of no use. Put the tokenizer.json and "
            "tokenizer_config.json of the base model there."
        )
    if len(found.tokens) > size:
        raise CheckpointError(f"{where}: the tokenizer has ids up to {len(found.tokens) - 1}, the model {size} tokens.")
    for token_id in range(len(found.tokens), size):
        _fill(found, token_id)
    _add_special(found, said, config)
    found.chat_template = _chat_template(files, said, where)
    return found


def _fill(found: Vocabulary, token_id: int) -> None:
    """A token of the model that the tokenizer does not have."""
    found.tokens.append(b"[PAD%d]" % token_id)
    found.types.append(TokenType.UNUSED)
    if found.scores is not None and len(found.scores) < len(found.tokens):
        found.scores.append(-10000.0)


def _of_json(text: bytes, raw: dict[str, Any], said: dict[str, Any], where: Path) -> Vocabulary:
    file = where / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_str(text.decode())
        ids = tokenizer.get_vocab(with_added_tokens=True)
        added = tokenizer.get_added_tokens_decoder()
        plain, full = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
        model, splitting = raw["model"], raw.get("pre_tokenizer")
        merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in model.get("merges", [])]
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # plain Exception for whatever it cannot read, and Rust's panics, which are none
        raise CheckpointError(f"{file} is not a tokenizer ({' '.join(str(error).split())[:300]}).") from error
    texts: list[str | None] = [None] * (max(ids.values(), default=-1) + 1)
    for text_of_id, token_id in ids.items():
        texts[token_id] = text_of_id
    refused = _refused(model, added)
    if refused:
        raise CheckpointError(f"{file}: {refused}; llama.cpp would cut texts otherwise.")
    way = _byte_level(splitting)
    if way is not None:
        if raw.get("normalizer") is not None:
            raise CheckpointError(f"{file}: it has a normalizer, {shown(raw['normalizer'])}, which llama.cpp has not.")
        ignores = bool(model.get("ignore_merges"))
        if (way, ignores) not in _NAMES:
            raise CheckpointError(
                f"{file}: llama.cpp has no name for this way of splitting (with ignore_merges={ignores}): "
                f"{shown(splitting, 200)}. It has one for Llama 3's and for GPT-2's."
            )
        found = Vocabulary("gpt2", _NAMES[way, ignores], [], [], merges=[" ".join(pair) for pair in merges])
    elif model.get("byte_fallback"):
        found = Vocabulary("llama", "default", [], [], space_prefix=_space_prefix(raw, file))
        found.scores = from_merges(texts, merges, {t.content for t in added.values()}, file)
    else:
        raise CheckpointError(f"{file} is neither byte-level BPE nor SentencePiece's BPE with bytes to fall back to.")
    unknown = model.get("unk_token")
    for token_id, token in enumerate(texts):
        if token is None:
            _fill(found, token_id)
            continue
        found.types.append(_type(token, token_id, added, unknown if found.model == "llama" else None, found.model))
        spaces = found.model == "llama" and found.types[-1] == TokenType.USER_DEFINED
        found.tokens.append((token.replace("\u2581", " ") if spaces else token).encode())
    _add_ends(found, plain, full, raw, said, file)
    return found


def _type(token: str, token_id: int, added: Mapping[int, Any], unknown: str | None, model: str) -> int:
    if token == unknown:
        return TokenType.UNKNOWN
    if token_id in added:
        return TokenType.CONTROL if added[token_id].special else TokenType.USER_DEFINED
    if model == "llama" and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return TokenType.BYTE
    return TokenType.NORMAL


def _refused(model: Mapping[str, Any], added: Mapping[int, Any]) -> str | None:
    """What of a tokenizer cannot be said in a GGUF."""
    if model.get("type", "BPE") != "BPE":
        return f"its model is {shown(model.get('type'))}, not BPE"
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            return f"its model has {key}={shown(model[key])}"
    for token in added.values():
        for key in ("lstrip", "rstrip", "single_word"):
            if getattr(token, key):
                return f"the token {shown(token.content)} has {key}"
    return None


def _byte_level(splitting: Any) -> str | None:
    """How a byte-level tokenizer splits: llama3, gpt2 or "" (another way); None: it is not byte-level."""
    steps = splitting.get("pretokenizers", [splitting]) if isinstance(splitting, dict) else []
    if not steps or steps[-1].get("type") != "ByteLevel":
        return None
    last = steps[-1]
    if last.get("add_prefix_space"):
        return ""
    if len(steps) == 1:
        return "gpt2" if last.get("use_regex", True) else ""
    split = steps[0]
    plain = split.get("type") == "Split" and split.get("behavior") == "Isolated" and not split.get("invert")
    is_llama3 = plain and split.get("pattern") == {"Regex": LLAMA3} and not last.get("use_regex", True)
    return "llama3" if is_llama3 and len(steps) == 2 else ""


def _space_prefix(raw: Mapping[str, Any], file: Path) -> bool:
    """Whether every text, also one behind a special token, gets a space in front."""
    normalizer, splitting = raw.get("normalizer") or {}, raw.get("pre_tokenizer") or {}
    scheme = splitting.get("prepend_scheme", "always") if splitting.get("type") == "Metaspace" else "never"
    if scheme == "first":
        raise CheckpointError(
            f"{file}: a space goes before the first word of a text only (prepend_scheme=first); llama.cpp puts one "
            "behind every special token too, or none at all."
        )
    steps = normalizer.get("normalizers", [normalizer])
    return scheme == "always" or any(step.get("type") == "Prepend" for step in steps)


def _add_ends(
    found: Vocabulary, plain: list[int], full: list[int], raw: dict[str, Any], said: dict[str, Any], file: Path
) -> None:
    """Which tokens a text gets in front and behind."""
    if raw.get("post_processor") is None or plain == full:
        found.adds = {"bos": said.get("add_bos_token") is True, "eos": said.get("add_eos_token") is True}
        return
    at = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), len(full))
    before, behind = full[:at], full[at + len(plain) :]
    if len(before) > 1 or len(behind) > 1:
        raise CheckpointError(f"{file}: a text gets the ids {before} in front and {behind} behind; llama.cpp adds one.")
    found.adds = {"bos": bool(before), "eos": bool(behind)}
    found.ids = {name: ids[0] for name, ids in (("bos", before), ("eos", behind)) if ids}


def _add_special(found: Vocabulary, said: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    places = {text: place for place, text in enumerate(found.tokens)}
    for name in _SPECIAL:
        token, token_id = said.get(f"{name}_token"), config.get(f"{name}_token_id")
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(token_id, list):  # several ends of text
            token_id = token_id[0] if token_id else None
        if isinstance(text, str) and text.encode() in places:
            token_id = places[text.encode()]
        if type(token_id) is int and 0 <= token_id < len(found.tokens):
            found.ids.setdefault(name, token_id)


def _chat_template(files: Mapping[str, bytes], said: Mapping[str, Any], where: Path) -> Any:
    if "chat_template.jinja" in files:
        try:
            return files["chat_template.jinja"].decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{where / 'chat_template.jinja'} is no text: {error}.") from error
    template = said.get("chat_template") or _optional(files, "chat_template.json", where).get("chat_template")
    if template is None or isinstance(template, str):
        return template
    named = isinstance(template, list) and all(
        isinstance(t, dict) and isinstance(t.get("name"), str) and isinstance(t.get("template"), str) for t in template
    )
    if not named:
        raise CheckpointError(f"{where}: chat_template={shown(template)} is neither a text nor a list of named ones.")
    return template


def _optional(files: Mapping[str, bytes], name: str, where: Path) -> dict[str, Any]:
    return json_object(files, name, where) if name in files else {}
