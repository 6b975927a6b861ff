"""What does each word of a command line set? Keys are checked, free text is taken as it stands, the rest is Hydra's.

Hydra's grammar gives a meaning to `=`, quotes, brackets, commas and more inside a value, and adds a key that nobody
reads when it is spelled `+key=`. Here every key must exist however it is spelled, and the value of a setting that
holds text (`run_dir`, `init_from`, `data.path`, names) is what stands behind the first `=`, with three exceptions:

- `null` (unquoted) is no value;
- a value in one pair of quotes, as Hydra would want it (`run_dir='a=b'`), loses them;
- `${key}` of another setting, as in `run_dir=runs/${stage.name}`, is that setting's value. Any other `$` is a `$`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from megalong.recipe.folders import groups, names
from megalong.recipe.keys import is_setting, no_such, settings, texts
from megalong.recipe.stages import stage_names
from megalong.runtime.errors import ConfigError

HYDRA = ("hydra.run.dir", "hydra.searchpath", "hydra.sweep.dir", "hydra.sweep.subdir")
"""Of Hydra's own settings, those that have an effect here."""
UNWRITABLE = ("Cc", "Cs", "Zl", "Zp")
"""Unicode categories that a text may not have: YAML turns some into others, logs and terminals suffer from the rest."""


@dataclass(frozen=True)
class Overrides:
    """A command line, understood."""

    groups: dict[str, str]
    """Group -> the file of conf/ that was chosen."""
    values: list[str]
    """`key=value` in Hydra's grammar, in order."""
    texts: dict[str, str | None]
    """Key -> text, literally."""
    hydra: dict[str, str] = field(default_factory=dict)
    """`hydra.*` -> value, in Hydra's grammar."""

    @property
    def for_hydra(self) -> list[str]:
        """What Hydra is given."""
        chosen = [("+" if g in ("stage", "scale") else "") + f"{g}={name}" for g, name in self.groups.items()]
        return [*chosen, *self.values, *(f"{key}={value}" for key, value in self.hydra.items())]


def split(word: str) -> tuple[str, str, str]:
    """A word as (prefix of `+` and `~`, key, value).

    Raises:
        ConfigError: it is no `key=value`.
    """
    match = re.fullmatch(r"([+~]*)([^=]*)=(.*)", word, re.DOTALL)
    if match is None or not match[2]:
        what = no_such(word.lstrip("+~-")) if not is_setting(word.lstrip("+~-")) else ""
        raise ConfigError(f"{word!r} sets nothing: write key=value. {what}".strip())
    return match[1], match[2], match[3]


def read(words: Sequence[str], added: Sequence[str] = ()) -> Overrides:
    """Understand a command line. What is given twice counts as it is given last.

    Args:
        added: folders that files are taken from, if not from conf/ alone.

    Raises:
        ConfigError: a key that does not exist, an attempt to delete one, or a value that cannot be read; all named.
    """
    found = Overrides({}, [], {})
    wrong = []
    for word in words:
        try:
            _take(word, found, added)
        except ConfigError as error:
            wrong.append(str(error))
    if wrong:
        raise ConfigError("\n".join(wrong))
    return found


def _take(word: str, found: Overrides, added: Sequence[str]) -> None:
    if word.startswith("~"):
        raise ConfigError(f"{word!r}: a setting cannot be taken out. Give it another value, or null where it may be.")
    _, key, value = split(word)
    if key == "cluster" and (path := _text(key, value)) is not None and path.endswith((".yaml", ".yml")):
        found.groups.pop(key, None)
        found.groups[key] = path
    elif key in groups(added) and not value.startswith("{"):
        found.groups.pop(key, None)
        found.groups[key] = _choice(key, value, added)
    elif key.startswith(("hydra.", "hydra/")):
        if key not in HYDRA:
            raise ConfigError(f"{key} changes nothing here; of Hydra's own settings these do: {', '.join(HYDRA)}.")
        found.hydra[key] = _readable(key, value)
    elif not is_setting(key):
        raise ConfigError(no_such(key))
    elif key in texts():
        found.texts[key] = _text(key, value)
    else:
        if f"{key}.value" in settings() and not value.startswith("{"):  # a fact: its number
            key = f"{key}.value"
        # a field inside a dictionary may be new, and need not be spelled with the + that Hydra wants for that
        found.values.append(f"{'' if key in settings() else '++'}{key}={_readable(key, value)}")


def _readable(key: str, value: str) -> str:
    try:
        OverridesParser.create().parse_overrides([f"{key}={value}"])
    except HydraException as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{key}={value}: the value cannot be read ({reason}).") from error
    return value


def _choice(group: str, value: str, added: Sequence[str]) -> str:
    name = _unquoted(value) or value
    known = stage_names(added) if group == "stage" else names(group, added)
    if name not in known:
        where = "conf/" if not added else f"conf/ or {', '.join(added)}"
        raise ConfigError(f"There is no {group}/{name} in {where}: choose one of {', '.join(known)}.")
    return name


def _text(key: str, value: str) -> str | None:
    if value == "null":
        return None
    quoted = _unquoted(value)
    text = value if quoted is None else quoted
    if not text:
        raise ConfigError(f"{key}= is empty: give a value, or leave it out.")
    if any(unicodedata.category(c) in UNWRITABLE for c in text):
        raise ConfigError(f"{key}={text!r}: a text in UTF-8 without line breaks and control characters is needed.")
    return text


def _unquoted(value: str) -> str | None:
    """What stands between the quotes of a value in Hydra's style; None for any other value."""
    for quote in "'\"":
        if re.fullmatch(rf"{quote}(?:[^{quote}\\]|\\.)*{quote}", value, re.DOTALL):
            return re.sub(rf"\\([{quote}\\])", r"\1", value[1:-1])
    return None
