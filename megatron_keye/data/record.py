"""JSON records: what a user writes, checked and brought into one form.

A chat is `{"id", "messages": [{"role", "content"}]}`, a document `{"id", "document"}`; content and document are a string or a
list of parts: `{"type": "text", "text"}`, `{"type": "image", "image"}`, `{"type": "video", "video"}`. A medium is a path
(relative to the JSONL file), a base64 data URI, a web address, or, inside a shard, `"member"`: the name of a file beside the record. What
is at a web address is fetched when shards are written, or stays there: then indexing and training fetch it. `"sha256"` of a medium, if
given, is held by whoever reads it.

Media stand where their parts stand. If a text of the same message holds placeholders (`<image>`, `<video>`, or those of the
released template), the media fill these instead, in order; `"images"` and `"videos"` lists of the record do so throughout.
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_keye.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
KINDS = ("image", "video")
OPTIONS = {
    "image": ("min_pixels", "max_pixels", "resized_height", "resized_width"),
    "video": ("min_pixels", "max_pixels", "total_pixels", "fps", "max_frames"),
}
"""Numbers that a media part may carry, per kind."""
PLACEHOLDER = re.compile(r"<(image|video)>|<\|vision_start\|><\|(image|video)_pad\|><\|vision_end\|>")
RECORD_FIELDS = ("id", "messages", "document", "images", "videos", "task", "source", "answer")


@dataclass(frozen=True, slots=True)
class Media:
    """An image or a video of a record: where its bytes are, and the limits it asks for."""

    kind: Literal["image", "video"]
    origin: Literal["file", "web", "inline", "member"]
    address: str
    """Path, web address, base64 data URI, or name of the shard member."""
    options: Mapping[str, float] = field(default_factory=dict)
    sha256: str | None = None
    """Of the media bytes; known once they are in a shard."""


Part = str | Media


@dataclass(frozen=True, slots=True)
class Message:
    role: str
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Record:
    """One sample as text and media in order. Exactly one of `messages` and `document` has entries."""

    id: str
    messages: tuple[Message, ...] = ()
    document: tuple[Part, ...] = ()
    task: str | None = None
    source: str | None = None
    answer: str | None = None
    """The exact answer that evaluation compares with."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Fields that nothing here reads; carried along."""

    @property
    def media(self) -> tuple[Media, ...]:
        """All media in the order in which the model meets them."""
        parts = [p for m in self.messages for p in m.parts] or self.document
        return tuple(p for p in parts if isinstance(p, Media))


def parse_record(raw: Any, where: str) -> Record:
    """Check `raw`, a parsed JSON value found at `where` (file and line). Raises DataError at the first problem."""
    if not isinstance(raw, dict):
        raise DataError(f"{where}: found a JSON {type(raw).__name__}, expected an object with id and messages or document")
    record_id = raw.get("id")
    if not isinstance(record_id, str | int) or isinstance(record_id, bool) or record_id == "":
        raise DataError(f"{where}: found id {record_id!r}, expected a string or an integer; give every record an id of its own")
    where = f"{where}, record {record_id}"
    if ("messages" in raw) == ("document" in raw):
        found = "both messages and document" if "messages" in raw else f"only {sorted(raw)}{_nearest(raw, RECORD_FIELDS)}"
        raise DataError(f"{where}: found {found}, expected one of them; a chat has messages, anything else is a document")
    named = {name: _optional_string(raw, name, where) for name in ("task", "source", "answer")}
    extra = {name: value for name, value in raw.items() if name not in RECORD_FIELDS}
    pools = _listed_media(raw, where)
    if "document" in raw:
        document = _parts(raw["document"], pools, f"{where}, document")
        if not document:
            raise DataError(f"{where}: found an empty document, expected text or media; remove the record")
        record = Record(str(record_id), document=document, extra=extra, **named)
    else:
        record = Record(str(record_id), messages=_messages(raw["messages"], pools, where), extra=extra, **named)
    _expect_all_used(pools, where)
    return record


def record_to_json(record: Record) -> dict[str, Any]:
    """The JSON object of a record in its one form: every part explicit, no placeholders left to fill."""
    head = {"id": record.id, "task": record.task, "source": record.source, "answer": record.answer}
    body: dict[str, Any] = {"document": [_part_to_json(p) for p in record.document]}
    if record.messages:
        body = {"messages": [{"role": m.role, "content": [_part_to_json(p) for p in m.parts]} for m in record.messages]}
    return {name: value for name, value in head.items() if value is not None} | body | dict(record.extra)


def _messages(raw: Any, pools: dict[str, Iterator[Media]] | None, where: str) -> tuple[Message, ...]:
    if not isinstance(raw, list) or not raw:
        raise DataError(f"{where}: found messages {raw!r:.80}, expected a list with at least one message")
    messages = []
    for number, message in enumerate(raw):
        place = f"{where}, message {number}"
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise DataError(f"{place}: found {message!r:.80}, expected an object with role and content")
        if message["role"] not in ROLES:
            raise DataError(f"{place}: found role {message['role']!r}, expected one of {', '.join(ROLES)}")
        messages.append(Message(message["role"], _parts(message["content"], pools, place)))
    return tuple(messages)


def _parts(content: Any, pools: dict[str, Iterator[Media]] | None, where: str) -> tuple[Part, ...]:
    """Parts of one message or document. `pools` are the media of the record's lists, None where it has none."""
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise DataError(f"{where}: found content of type {type(content).__name__}, expected a string or a list of parts")
    parts = [_part(raw, f"{where}, part {number}") for number, raw in enumerate(content)]
    own = {kind: [p for p in parts if isinstance(p, Media) and p.kind == kind] for kind in KINDS}
    holds_placeholders = any(PLACEHOLDER.search(p) for p in parts if isinstance(p, str))
    if any(own.values()) and holds_placeholders:
        if pools is not None:
            raise DataError(f"{where}: found placeholders, media parts and a media list; use parts or lists, not both")
        own_pools = {kind: iter(media) for kind, media in own.items()}
        parts = [piece for p in parts if isinstance(p, str) for piece in _fill(p, own_pools, where)]
        _expect_all_used(own_pools, where)
    elif pools is not None:
        parts = [piece for p in parts for piece in (_fill(p, pools, where) if isinstance(p, str) else [p])]
    return tuple(p for p in parts if p != "")


def _fill(text: str, pools: dict[str, Iterator[Media]], where: str) -> Iterator[Part]:
    """Split `text` at its placeholders and put the next medium of the pool at each."""
    at = 0
    for match in PLACEHOLDER.finditer(text):
        kind = match[1] or match[2]
        media = next(pools[kind], None)
        if media is None:
            raise DataError(f"{where}: found more {kind} placeholders than {kind}s, expected one each; remove some or add media")
        yield text[at : match.start()]
        yield media
        at = match.end()
    yield text[at:]


def _expect_all_used(pools: dict[str, Iterator[Media]] | None, where: str) -> None:
    for kind, pool in (pools or {}).items():
        left = sum(1 for _ in pool)
        if left:
            raise DataError(
                f"{where}: found {left} more {kind}(s) than {kind} placeholders, expected one placeholder each; "
                f"write <{kind}> where each belongs, or give media as parts without placeholders"
            )


def _listed_media(raw: dict[str, Any], where: str) -> dict[str, Iterator[Media]] | None:
    """Media of the record's "images" and "videos" lists, per kind; None where it has neither."""
    if "images" not in raw and "videos" not in raw:
        return None
    pools = {}
    for kind in KINDS:
        listed = raw.get(f"{kind}s", [])
        if not isinstance(listed, list):
            raise DataError(f"{where}: found {kind}s of type {type(listed).__name__}, expected a list of paths or data URIs")
        pools[kind] = iter([_media({"type": kind, kind: entry}, f"{where}, {kind}s[{n}]") for n, entry in enumerate(listed)])
    return pools


def _part(raw: Any, where: str) -> Part:
    if not isinstance(raw, dict) or raw.get("type") not in ("text", *KINDS):
        found = raw.get("type") if isinstance(raw, dict) else raw
        raise DataError(f"{where}: found part type {found!r:.80}, expected text, image or video")
    if raw["type"] != "text":
        return _media(raw, where)
    if not isinstance(raw.get("text"), str):
        raise DataError(f"{where}: found text {raw.get('text')!r:.80}, expected a string")
    return raw["text"]


def _media(raw: dict[str, Any], where: str) -> Media:
    kind = raw["type"]
    known = ("type", kind, "member", "sha256", *OPTIONS[kind])
    unknown = [name for name in raw if name not in known]
    if unknown:
        raise DataError(f"{where}: found unknown field {unknown[0]!r} of a {kind}{_nearest(unknown, known)}; known are {', '.join(known)}")
    address = raw.get("member", raw.get(kind))
    if not isinstance(address, str) or not address:
        raise DataError(f"{where}: found {kind} {address!r:.80}, expected a path, a web address or a data URI in {kind!r}")
    options = {name: raw[name] for name in OPTIONS[kind] if raw.get(name) is not None}
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise DataError(f"{where}: found {name} {value!r}, expected a positive number")
    if ("resized_height" in options) != ("resized_width" in options):
        raise DataError(f"{where}: found only one of resized_height and resized_width, expected both or none")
    origin = "member" if "member" in raw else _origin(address)
    return Media(kind, origin, address.removeprefix("file://"), options, raw.get("sha256"))


def _origin(address: str) -> str:
    if address.startswith("data:"):
        return "inline"
    return "web" if address.startswith(("http://", "https://")) else "file"


def _part_to_json(part: Part) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    address = {"member" if part.origin == "member" else part.kind: part.address}
    return {"type": part.kind} | address | ({"sha256": part.sha256} if part.sha256 else {}) | dict(part.options)


def _optional_string(raw: dict[str, Any], name: str, where: str) -> str | None:
    value = raw.get(name)
    if value is not None and not isinstance(value, str):
        raise DataError(f"{where}: found {name} {value!r:.80}, expected a string")
    return value


def _nearest(found: Any, known: tuple[str, ...]) -> str:
    for name in found:
        close = difflib.get_close_matches(name, known, n=1)
        if close and name not in known:
            return f" (did you mean {close[0]!r}?)"
    return ""
