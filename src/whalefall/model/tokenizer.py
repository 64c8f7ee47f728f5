"""Model room: text to token ids and back, as the checkpoint's own tokenizer file says.

In: a folder with `tokenizer.json`, or `tiktoken.model` (Kimi, Moonlight), and
`tokenizer_config.json`. Out: `Tokenizer`, and `Detokenizer` for text that comes token by token.
Truth: the `tokenizers` and `tiktoken` libraries, which do the work.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from whalefall.errors import ConfigError, CorruptError, MissingError
from whalefall.model.chat import ChatTemplate, load_chat_template

__all__ = ["Detokenizer", "Tokenizer", "has_tokenizer", "load_tokenizer", "small_tokenizer"]

_REPLACEMENT = "\ufffd"


class _Codec(Protocol):
    """What `Tokenizer` asks of a backend."""

    vocab_size: int
    special: frozenset[int]
    added: frozenset[int]

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int], skip_special: bool) -> str: ...
    def token(self, token_id: int) -> str: ...
    def id_of(self, token: str) -> int | None: ...
    def llguidance(self, vocab_size: int, eos: list[int] | None) -> Any: ...


class _Json:
    """A `tokenizer.json` through the tokenizers library."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Backend

        try:
            self._backend = Backend.from_file(str(path))
        except Exception as problem:  # the library raises bare Exception
            raise CorruptError(f"{path}: not a tokenizer.json ({problem})") from None
        self.vocab_size = self._backend.get_vocab_size()
        added = self._backend.get_added_tokens_decoder()
        self.added = frozenset(added)
        self.special = frozenset(i for i, token in added.items() if token.special)

    def encode(self, text: str) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special))

    def token(self, token_id: int) -> str:
        return self._backend.id_to_token(token_id) or ""

    def id_of(self, token: str) -> int | None:
        found: int | None = self._backend.token_to_id(token)
        return found

    def llguidance(self, vocab_size: int, eos: list[int] | None) -> Any:
        from llguidance import LLTokenizer

        return LLTokenizer(self._backend.to_str(), n_vocab=vocab_size, eos_token=eos)


# Kimi's pattern: Han runs apart, the GPT-4o one with Han taken out, digits in threes.
_KIMI = "|".join(
    (
        r"[\p{Han}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
_RESERVED = 256  # ids that follow a tiktoken vocabulary, named or reserved


class _Tiktoken:
    """A `tiktoken.model` (base64 token, rank) with the special tokens of tokenizer_config.json."""

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        try:
            import tiktoken
        except ImportError:
            raise MissingError(
                f"{path}: reading it needs tiktoken; pip install 'whalefall[tiktoken]'"
            ) from None
        try:
            ranks = {
                base64.b64decode(token): int(rank)
                for token, rank in (line.split() for line in path.read_bytes().splitlines() if line)
            }
        except ValueError as problem:
            raise CorruptError(f"{path}: not a tiktoken file ({problem})") from None
        added = config.get("added_tokens_decoder") or {}
        names = {int(i): str(entry["content"]) for i, entry in added.items()}
        first = len(ranks)
        special = {
            names.get(i, f"<|reserved_token_{i}|>"): i for i in range(first, first + _RESERVED)
        }
        self._backend = tiktoken.Encoding(
            name=path.parent.name, pat_str=_KIMI, mergeable_ranks=ranks, special_tokens=special
        )
        self._special_ids = special
        self.vocab_size = first + _RESERVED
        self.added = frozenset(special.values())
        self.special = frozenset(
            i for i in special.values() if added.get(str(i), {}).get("special", True)
        )

    def encode(self, text: str) -> list[int]:
        return list(self._backend.encode(text, allowed_special="all"))

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        kept = [i for i in ids if not (skip_special and i in self.special)]
        return str(self._backend.decode(kept, errors="replace"))

    def token(self, token_id: int) -> str:
        raw: bytes = self._backend.decode_single_token_bytes(token_id)
        return raw.decode("utf-8", errors="replace")

    def id_of(self, token: str) -> int | None:
        return self._special_ids.get(token)

    def llguidance(self, vocab_size: int, eos: list[int] | None) -> Any:
        from llguidance.tiktoken import lltokenizer_from_encoding

        # tiktoken's own end of text is not among Kimi's tokens: the checkpoint says which ends
        end = eos if eos is not None else [min(self._special_ids.values())]
        return lltokenizer_from_encoding(self._backend, n_vocab=vocab_size, eos_token=end)


class Tokenizer:
    """A checkpoint's tokenizer and chat template.

    Attributes:
        vocab_size: ids it knows; a model's table may be larger (padding).
        bos_token, eos_token: their text, "" where the checkpoint has none.
        eos_token_id: the id, None where the checkpoint has none.
    """

    def __init__(
        self, codec: _Codec, config: dict[str, Any], template: ChatTemplate | None
    ) -> None:
        self._codec = codec
        self._template = template
        self.vocab_size = codec.vocab_size
        self.bos_token = _token_text(config.get("bos_token"))
        self.eos_token = _token_text(config.get("eos_token"))
        self.eos_token_id = codec.id_of(self.eos_token) if self.eos_token else None

    def encode(self, text: str) -> list[int]:
        """Token ids of text; special tokens are recognised, none is added."""
        return self._codec.encode(text)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of token ids; tokens marked special are left out where `skip_special`."""
        return self._codec.decode(ids, skip_special)

    def token(self, token_id: int) -> str:
        """The text of a single token, as logprobs show it."""
        return self._codec.decode([token_id], False)

    def is_special(self, token_id: int) -> bool:
        """Whether the tokenizer file marks the token as special."""
        return token_id in self._codec.special

    def is_added(self, token_id: int) -> bool:
        """Whether the token stands beside the text's own vocabulary (a tag), special or not."""
        return token_id in self._codec.added

    def id_of(self, token: str) -> int | None:
        """The id of a token given by its exact text, None where there is no such token."""
        return self._codec.id_of(token)

    def llguidance(self, vocab_size: int, eos: list[int] | None) -> Any:
        """The same tokenizer as llguidance wants it, for constrained answers.

        Args:
            vocab_size: the model's, padding included.
            eos: ids that end an answer; None: as the tokenizer file says.
        """
        return self._codec.llguidance(vocab_size, eos)

    @property
    def template_source(self) -> str:
        """The chat template as written, "" where the checkpoint has none."""
        return self._template.source if self._template is not None else ""

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` can work."""
        return self._template is not None

    def render_chat(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt text that the checkpoint's template makes of a conversation."""
        if self._template is None:
            raise ConfigError("model: this checkpoint has no chat template; use completions")
        return self._template.render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            bos_token=self.bos_token,
            eos_token=self.eos_token,
            **variables,
        )

    def apply_chat_template(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> list[int]:
        """Token ids of `render_chat`; `variables` reach the template (`thinking`, …)."""
        return self.encode(self.render_chat(messages, tools, add_generation_prompt, **variables))

    def detokenizer(self, skip_special: bool = True) -> Detokenizer:
        """A fresh incremental decoder."""
        return Detokenizer(self, skip_special)


class Detokenizer:
    """Turns tokens into text one by one; text appears once no later token can change it.

    Byte-level tokens may end inside a character: it is held back until complete. A window of
    tokens before the new one is decoded along, so that context-dependent spaces come out right.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._ids: list[int] = []  # the window and the tokens not yet shown
        self._shown = 0  # how many of them the text below covers
        self._text = ""  # text of the ids shown

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that became certain."""
        self._ids.append(token_id)
        text = self._tokenizer.decode(self._ids, self._skip_special)
        if not text.endswith(_REPLACEMENT):
            return self._take(text, len(self._ids))
        # Bytes that are no text may go on and on; only the last three can still begin a character.
        for count in range(len(self._ids) - 3, self._shown + 4, -1):
            certain = self._tokenizer.decode(self._ids[:count], self._skip_special)
            if text.startswith(certain):
                return self._take(certain, count)
        return ""

    def flush(self) -> str:
        """The text still held back (an incomplete character shows as U+FFFD)."""
        return self._take(self._tokenizer.decode(self._ids, self._skip_special), len(self._ids))

    def _take(self, text: str, count: int) -> str:
        """Show the first `count` ids, whose text is `text`."""
        new = text[len(self._text) :]
        window = self._shown
        self._ids, self._shown = self._ids[window:], count - window
        self._text = self._tokenizer.decode(self._ids[: self._shown], self._skip_special)
        return new


def _token_text(value: Any) -> str:
    if isinstance(value, dict):
        value = value.get("content")
    return value or ""


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a checkpoint folder has a tokenizer file that `load_tokenizer` would read."""
    return any((Path(folder) / name).is_file() for name in ("tokenizer.json", "tiktoken.model"))


def small_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> str | None:
    """One line where a tokenizer knows too few of a model's ids; padding alone is a few percent."""
    if tokenizer.vocab_size >= 0.9 * vocab_size:
        return None
    return (
        f"the tokenizer has {tokenizer.vocab_size} ids, the model {vocab_size}:"
        " it may belong to another checkpoint, and answers may be garbage"
    )


def load_tokenizer(folder: str | Path, vocab_size: int | None = None) -> Tokenizer:
    """Load a checkpoint's tokenizer.

    Args:
        folder: the checkpoint.
        vocab_size: the model's; a tokenizer with larger ids is refused as the wrong one.
    Raises: MissingError without a tokenizer file, CorruptError for a malformed one, ConfigError
        for one that does not fit the model.
    """
    folder = Path(folder)
    path = folder / "tokenizer_config.json"
    config: dict[str, Any] = {}
    if path.is_file():
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as problem:
            raise ConfigError(f"{path}: not JSON ({problem})") from None
        if not isinstance(config, dict):
            raise ConfigError(f"{path}: holds {type(config).__name__}, wanted an object")
    codec: _Codec
    if (folder / "tokenizer.json").is_file():
        codec = _Json(folder / "tokenizer.json")
    elif (folder / "tiktoken.model").is_file():
        codec = _Tiktoken(folder / "tiktoken.model", config)
    else:
        raise MissingError(f"model: {folder} has no tokenizer.json or tiktoken.model")
    if vocab_size is not None and codec.vocab_size > vocab_size:
        raise ConfigError(
            f"model: the tokenizer of {folder} has {codec.vocab_size} ids, the model {vocab_size}:"
            " it belongs to another checkpoint"
        )
    return Tokenizer(codec, config, load_chat_template(folder, config))
