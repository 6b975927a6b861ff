"""Text becomes the tokens of a prompt: tokenizer, chat template, and the edge between prompt and answer.

Prompt and answer are tokenized apart and joined, so that no token lies across the edge: a model that is given the
prompt's tokens has to produce exactly the answer's. White space at the edge belongs to the answer. Where the two
tokenized together would give other tokens, generation from text could not reach these; such samples are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megalong.runtime.errors import DataError

_MARK = "\x01megalong\x01"


class PromptTokenizer:
    """The tokenizer in a folder, as transformers loads it.

    Args:
        folder: holds tokenizer.json, and the chat template if there is one.
        chat: whether prompts are written by the chat template. None: where there is one.

    Raises:
        DataError: no tokenizer, or no chat template where one is asked for.
    """

    def __init__(self, folder: Path, chat: bool | None = None) -> None:
        from transformers import AutoTokenizer

        if not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer.model").is_file():
            raise DataError(
                f"{folder} has no tokenizer (tokenizer.json), so no text can be put to this model. Copy the model's "
                "tokenizer files there, or give --tokenizer DIR."
            )
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # whatever transformers and tokenizers raise for what they cannot read
            raise DataError(f"{folder}: the tokenizer cannot be loaded: {str(error).splitlines()[0][:300]}") from error
        has = getattr(self._tokenizer, "chat_template", None) is not None
        if chat and not has:
            raise DataError(f"{folder}: the tokenizer has no chat template; evaluate without --chat.")
        self.chat = has if chat is None else chat
        self.crossed = 0
        """Prompts whose tokens would be others together with the answer."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, nothing added."""
        found: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    @property
    def beginning(self) -> list[int]:
        """What the tokenizer sets before every text: [beginning of text], or nothing."""
        bos = self._tokenizer.bos_token_id
        return [bos] if bos is not None and self._tokenizer("a")["input_ids"][:1] == [bos] else []

    def frame(self) -> tuple[list[int], list[int]]:
        """Tokens before the user's words and between them and the assistant's first word."""
        if not self.chat:
            return self.beginning, []
        text = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": _MARK}], tokenize=False, add_generation_prompt=True
        )
        before, found, after = text.partition(_MARK)
        if not found:
            raise DataError("The chat template does not write the user's words as they are; evaluate without --chat.")
        return self.encode(before), self.encode(after)

    def answers(self, prompt_end: str, answers: Sequence[str]) -> list[list[int]]:
        """Tokens of the answers, one after another.

        Args:
            prompt_end: the last words of the prompt, without white space at their end.
            answers: texts with the white space that separates them at their beginning.
        """
        assert prompt_end == prompt_end.rstrip(), prompt_end
        parts = [self.encode(answer) for answer in answers]
        apart = self.encode(prompt_end) + [i for part in parts for i in part]
        self.crossed += apart != self.encode(prompt_end + "".join(answers))
        if not all(parts):
            raise DataError(f"One of the answers {list(answers)} has no token: the tokenizer does not know its signs.")
        return parts
