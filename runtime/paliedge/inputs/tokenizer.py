"""The bundle's tokenizer: prompt text to ids and back, as PaliGemma was trained: <bos> + text + newline.

The image tokens are no ids here: their features stand in front of these. Text and separator are
tokenised apart, so that a prompt that ends in a newline is not merged into another token.
"""

# Tests: tests/inputs/test_prompt.py.
from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from paliedge.bundle.manifest import Tokens
from paliedge.errors import BundleError, UsageError

MAX_PROMPT_CHARACTERS = 100_000


class PromptTokenizer:
    """The bundle's tokenizer.

    In a prompt `<loc0000>` ... `<loc1023>` and `<seg000>` ... `<seg127>` stand for their tokens, and so does every
    token that a fine-tune has added. `<image>`, `<bos>`, `<eos>` and `<pad>`, the only ones that the exporter leaves
    marked as special, are plain text. A truncation or a padding that training left in the file does not act.

    Args:
        source: tokenizer.json, its path or its content.
        tokens: the bundle's token ids.
    """

    def __init__(self, source: Path | bytes, tokens: Tokens) -> None:
        self._source = source
        self._tokens = tokens
        self._tokenizer = self._load()

    def encode_prefix(self, text: str, *, location_tokens: bool = True) -> list[int]:
        """Ids of bos, `text` and one newline behind it, which may be there already.

        Text and newline are read together, as transformers reads them: a token that takes the white space behind it
        takes the newline, too.

        With `location_tokens` off, `<locNNNN>` and `<segNNN>` in `text` are plain text too.

        Raises:
            UsageError: `text` is longer than 100,000 characters or holds a lone surrogate.
        """
        if len(text) > MAX_PROMPT_CHARACTERS:
            raise UsageError(
                expected=f"a prompt of at most {MAX_PROMPT_CHARACTERS} characters",
                found=f"{len(text)} characters",
                action="Shorten the prompt.",
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(
                expected="a prompt of valid Unicode", found="a lone surrogate", action="Decode your input as UTF-8."
            ) from error
        tokenizer = self._tokenizer if location_tokens else self._plain_tokenizer
        text = text.removesuffix("\n") + "\n"
        return [self._tokens.bos, *tokenizer.encode(text, add_special_tokens=False).ids]

    def encode_label(self, label: str) -> tuple[list[int], list[int]]:
        """Ids of a label behind its box, and of the separator behind it."""
        tokenizer, location = self._tokenizer, f"<loc{0:04d}>"
        ids = tokenizer.encode(f"{location} {label}", add_special_tokens=False).ids[1:]
        both = tokenizer.encode(f"{location} {label} ; {location}", add_special_tokens=False).ids[1:-1]
        return ids, both[len(ids) :]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; location and segmentation tokens are spelled out, control tokens left out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def decode_stream(self) -> Callable[[int], str]:
        """A function that takes one id after another and returns the text that each completes.

        The pieces joined are `decode` of the ids, but for bytes that are no UTF-8 and for a
        character that is incomplete at the end. (`tokenizers`' own stream raises on such bytes.)
        """
        pending: list[int] = []

        def step(token: int) -> str:
            pending.append(token)
            text = self.decode(pending)
            if text.endswith("\N{REPLACEMENT CHARACTER}"):  # perhaps the first bytes of a character
                return ""
            pending.clear()
            return text

        return step

    @cached_property
    def _plain_tokenizer(self) -> Tokenizer:
        tokenizer = self._load()
        names = [f"<loc{index:04d}>" for index in range(self._tokens.num_locations)]
        names += [f"<seg{index:03d}>" for index in range(self._tokens.num_segmentations)]
        tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
        return tokenizer

    def _load(self) -> Tokenizer:
        source = self._source
        try:
            tokenizer = Tokenizer.from_buffer(source) if isinstance(source, bytes) else Tokenizer.from_file(str(source))
        except Exception as error:  # tokenizers raises plain Exception
            raise BundleError(
                expected=f"a tokenizer in {source if isinstance(source, Path) else 'the bundle'}",
                found=f"{error}",
                action="Export the bundle again.",
            ) from error
        tokenizer.encode_special_tokens = True  # as text: image, bos, eos and pad are not for users to say
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer
