"""A contact sheet: examples of every task with their questions and answers, from the files as they are on disk."""

import json
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from .clips import decode

PER_TASK = 4
CELL_WIDTH_PX, CELL_HEIGHT_PX, PICTURE_HEIGHT_PX, MARGIN_PX = 340, 230, 150, 8
CLIP_FRAMES = 5
TEXT_SIZE_PX, LINE_CHARACTERS = 12, 50


def write_contact_sheet(records_path: Path, sheet_path: Path) -> None:
    """Draw the first few records of every task in `records_path`, a task to each row."""
    records = [json.loads(line) for line in records_path.read_text(encoding="utf-8").splitlines()]
    names = sorted({record["task"] for record in records})
    sheet = Image.new("RGB", (CELL_WIDTH_PX * PER_TASK, CELL_HEIGHT_PX * len(names)), "white")
    for row, name in enumerate(names):
        chosen = [record for record in records if record["task"] == name][:PER_TASK]
        for column, record in enumerate(chosen):
            sheet.paste(_cell(record, records_path.parent), (column * CELL_WIDTH_PX, row * CELL_HEIGHT_PX))
    sheet.save(sheet_path)


def _cell(record: dict, folder: Path) -> Image.Image:
    """Pictures (and frames of clips) side by side, the text below."""
    parts = record["document"] if "document" in record else record["messages"][0]["content"]
    cell = Image.new("RGB", (CELL_WIDTH_PX, CELL_HEIGHT_PX), "white")
    images = [image for part in parts for image in _images(part, folder)]
    x = MARGIN_PX
    for image in images:
        room_px = (CELL_WIDTH_PX - MARGIN_PX) // len(images) - MARGIN_PX
        image.thumbnail((room_px, PICTURE_HEIGHT_PX - 2 * MARGIN_PX))
        cell.paste(image, (x, MARGIN_PX))
        x += room_px + MARGIN_PX
    text = f"[{record['task']}] " + " ".join(part.get("text", f"<{part['type']}>") for part in parts)
    if "answer" in record:
        text += f"\n-> {record['answer']}"
    lines = [line for paragraph in text.split("\n") for line in textwrap.wrap(paragraph, LINE_CHARACTERS)]
    top = PICTURE_HEIGHT_PX if images else MARGIN_PX
    ImageDraw.Draw(cell).multiline_text((MARGIN_PX, top), "\n".join(lines), fill="black", font=ImageFont.load_default(TEXT_SIZE_PX))
    return cell


def _images(part: dict, folder: Path) -> list[Image.Image]:
    if part["type"] == "image":
        return [Image.open(folder / part["image"])]
    if part["type"] == "video":
        return decode(folder / part["video"], CLIP_FRAMES)
    return []
