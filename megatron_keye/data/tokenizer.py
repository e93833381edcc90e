"""A local Hugging Face tokenizer folder, read without running code from it and without a network."""

import hashlib
import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from megatron_keye.config.schema import Variant
from megatron_keye.contract.tokens import SpecialTokens
from megatron_keye.errors import SettingsError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
"""Files that decide about token ids; the second may hold added tokens and may be absent."""


class KeyeTokenizer:
    """Text to token ids and back. Safe to use from several threads.

    Special tokens written in a text become their ids, as they do when the released processors tokenize a rendered
    conversation.
    """

    def __init__(self, tokenizer: Tokenizer, specials: SpecialTokens, fingerprint: str):
        self._tokenizer = tokenizer
        self.specials = specials
        self.fingerprint = fingerprint
        """sha256 over the files that decide about token ids."""
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        """One more than the largest token id."""

    @property
    def vocab(self) -> dict[str, int]:
        """Token -> id, special and added tokens included."""
        return self._tokenizer.get_vocab(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_with_starts(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids, and for each token where it starts in `text`, in characters."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, [start for start, _ in encoding.offsets]

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`, special tokens written out."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def load_tokenizer(folder: str | Path, variant: Variant) -> KeyeTokenizer:
    """Load the tokenizer of `folder`. Raises SettingsError if it is absent, damaged, or lacks the variant's special tokens."""
    tokenizer = load_tokenizer_file(Path(folder))
    specials = SpecialTokens.from_vocab(tokenizer.get_vocab(with_added_tokens=True), variant)
    return KeyeTokenizer(tokenizer, specials, _fingerprint(Path(folder)))


def load_tokenizer_file(folder: Path) -> Tokenizer:
    """The tokenizer of `folder`, whatever tokens it has. Raises SettingsError if it is absent or damaged."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise SettingsError(
            f"no tokenizer in {folder}: expected a Hugging Face tokenizer folder with a tokenizer.json; "
            "a folder that has only vocab.json and merges.txt becomes one by loading and saving it with transformers"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for every problem in the file
        raise SettingsError(f"{path} is not a readable tokenizer: {error}; restore it from where it was copied") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    _add_configured_tokens(tokenizer, folder / "tokenizer_config.json")
    return tokenizer


def _add_configured_tokens(tokenizer: Tokenizer, config_path: Path) -> None:
    """Add tokens that only the tokenizer's configuration lists, under the ids given there."""
    if not config_path.is_file():
        return
    try:
        listed = json.loads(config_path.read_text(encoding="utf-8")).get("added_tokens_decoder", {})
    except (ValueError, AttributeError) as error:
        raise SettingsError(f"{config_path} is not a JSON object: {error}; restore it from where it was copied") from error
    for token_id, entry in sorted(listed.items(), key=lambda item: int(item[0])):
        content = entry["content"]
        if tokenizer.token_to_id(content) is None:
            token = AddedToken(content, normalized=False, special=bool(entry.get("special")))
            tokenizer.add_tokens([token])
        found = tokenizer.token_to_id(content)
        if found != int(token_id):
            raise SettingsError(
                f"{config_path} gives {content} the id {token_id}, but tokenizer.json leads to {found}; "
                "the two files are of different tokenizers: copy both from one model"
            )


def _fingerprint(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES:
        path = folder / name
        if path.is_file():
            digest.update(f"{name}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
