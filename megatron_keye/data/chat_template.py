"""The chat template of a model folder: found, and rendered in a sandbox.

A template is a program from outside. transformers renders it in jinja2's immutable sandbox with plain JSON data, and nothing else
of the folder is ever run.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from jinja2.sandbox import SecurityError
from transformers.utils.chat_template_utils import render_jinja_template

from megatron_keye.config.json_file import read_json_object
from megatron_keye.data.record import Message
from megatron_keye.errors import CheckpointError, DataError

SPECIAL_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Entries of tokenizer_config.json that templates may use by name."""

CHAT_TEMPLATE = """\
{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif part.type == 'video' %}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}
            {%- else %}{{ part.text }}{% endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
"""The conversation that this trainer trains on, for models that bring no template of their own."""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A Jinja template, the file it is from, and the special tokens that it may use by name."""

    path: Path
    text: str
    special_tokens: dict[str, str] = field(default_factory=dict)

    def render(self, messages: tuple[Message, ...]) -> str:
        """The conversation as text, one placeholder per medium, without a generation prompt.

        Raises DataError where the template refuses the conversation, CheckpointError where it cannot be rendered at all.
        """
        conversation = [_plain(message) for message in messages]
        try:
            (text,), _ = render_jinja_template([conversation], chat_template=self.text, **self.special_tokens)
        except (TemplateSyntaxError, SecurityError, TypeError, ValueError, AttributeError, LookupError) as error:
            raise CheckpointError(
                f"the chat template {self.path} cannot be rendered ({type(error).__name__}: {error}); restore it from where it was copied"
            ) from error
        except TemplateError as error:
            raise DataError(f"the chat template {self.path} refuses the conversation: {error}") from error
        return text


def find_chat_template(folder: Path) -> ChatTemplate | None:
    """The template that the folder's processor uses: of chat_template.jinja, else chat_template.json, else the tokenizer's own.

    None where the folder has none. Raises CheckpointError for a damaged file.
    """
    tokenizer_path = folder / "tokenizer_config.json"
    tokenizer_config = read_json_object(tokenizer_path) if tokenizer_path.is_file() else {}
    special_tokens = _special_tokens(tokenizer_config)
    jinja_path, json_path = folder / "chat_template.jinja", folder / "chat_template.json"
    if jinja_path.is_file():
        return ChatTemplate(jinja_path, jinja_path.read_text(encoding="utf-8"), special_tokens)
    if json_path.is_file():
        return ChatTemplate(json_path, _default_template(read_json_object(json_path), json_path), special_tokens)
    if tokenizer_config.get("chat_template"):
        return ChatTemplate(tokenizer_path, _default_template(tokenizer_config, tokenizer_path), special_tokens)
    return None


def _plain(message: Message) -> dict[str, Any]:
    """As templates expect it: a string where there is nothing but text, else a list of parts."""
    if all(isinstance(part, str) for part in message.parts):
        return {"role": message.role, "content": "".join(message.parts)}
    parts = [{"type": "text", "text": p} if isinstance(p, str) else {"type": p.kind, p.kind: p.kind} for p in message.parts]
    return {"role": message.role, "content": parts}


def _default_template(content: dict[str, Any], path: Path) -> str:
    """`content["chat_template"]`, or the one named default where it is a list of named ones."""
    found = content.get("chat_template")
    if isinstance(found, list):
        named = {entry["name"]: entry["template"] for entry in found if isinstance(entry, dict) and {"name", "template"} <= set(entry)}
        found = named.get("default")
    if not isinstance(found, str):
        raise CheckpointError(f"{path} has no chat template: expected text in chat_template, or a list with one named default")
    return found


def _special_tokens(tokenizer_config: dict[str, Any]) -> dict[str, str]:
    found = {}
    for role in SPECIAL_ROLES:
        token = tokenizer_config.get(role)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            found[role] = token
    return found
