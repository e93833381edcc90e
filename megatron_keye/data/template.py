"""From a record to text pieces and media slots in model order, with the text that is to be learned marked.

A chat is rendered as by the chat template of the released processors (ChatML; a default system turn unless the first message
is one). What stands between an item's first and last token is not text and is added by `tokenize`.
"""

from dataclasses import dataclass

from megatron_keye.data.record import Part, Record

TEMPLATE_VERSION = 1
"""Raised whenever the same record would give other tokens; part of every index."""
DEFAULT_SYSTEM = "You are a helpful assistant."
TURN_START, TURN_END, DOCUMENT_END = "<|im_start|>", "<|im_end|>", "<|endoftext|>"


@dataclass(frozen=True, slots=True)
class TextPiece:
    """Text between two media. `supervised` holds the [start, end) character ranges to learn, in order."""

    text: str
    supervised: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class MediaPiece:
    """Where medium number `item` of the record stands."""

    item: int


Piece = TextPiece | MediaPiece


class _Writer:
    """Collects pieces; text written in a row becomes one piece, because it is tokenized as a whole."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self._text = ""
        self._supervised: list[tuple[int, int]] = []
        self._num_media = 0

    def text(self, text: str, supervised: bool) -> None:
        if supervised and text:
            start = len(self._text)
            if self._supervised and self._supervised[-1][1] == start:
                start = self._supervised.pop()[0]
            self._supervised.append((start, len(self._text) + len(text)))
        self._text += text

    def parts(self, parts: tuple[Part, ...], supervised: bool) -> None:
        for part in parts:
            if isinstance(part, str):
                self.text(part, supervised)
            else:
                self.flush()
                self.pieces.append(MediaPiece(self._num_media))
                self._num_media += 1

    def flush(self) -> None:
        if self._text:
            self.pieces.append(TextPiece(self._text, tuple(self._supervised)))
        self._text, self._supervised = "", []


def render(record: Record) -> list[Piece]:
    """Pieces of `record` in model order. Supervised are assistant turns, `<|im_end|>` included, or a document's whole text."""
    writer = _Writer()
    if record.messages:
        if record.messages[0].role != "system":
            writer.text(f"{TURN_START}system\n{DEFAULT_SYSTEM}{TURN_END}\n", supervised=False)
        for message in record.messages:
            supervised = message.role == "assistant"
            writer.text(f"{TURN_START}{message.role}\n", supervised=False)
            writer.parts(message.parts, supervised)
            writer.text(TURN_END, supervised)
            writer.text("\n", supervised=False)
    else:
        writer.parts(record.document, supervised=True)
        writer.text(DOCUMENT_END, supervised=True)
    writer.flush()
    return writer.pieces
