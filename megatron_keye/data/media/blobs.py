"""What an error message says about bytes that could not be decoded."""

_SIGNATURES = (
    (b"\xff\xd8\xff", "a JPEG file"),
    (b"\x89PNG\r\n\x1a\n", "a PNG file"),
    (b"GIF8", "a GIF file"),
    (b"\x1aE\xdf\xa3", "a Matroska or WebM file"),
    (b"ffconcat", "an ffconcat playlist"),
    (b"#EXTM3U", "an HLS playlist"),
    (b"<!doctype html", "an HTML page"),
    (b"<html", "an HTML page"),
    (b"%PDF", "a PDF file"),
    (b"%!PS", "a PostScript file"),
)


def describe_blob(blob: bytes) -> str:
    """A few words: how many bytes, and what they start like."""
    if not blob:
        return "an empty file"
    head = blob[:64].lstrip()
    for signature, name in _SIGNATURES:
        if head[: len(signature)].lower() == signature.lower():
            return f"{name} of {len(blob)} bytes"
    if blob[4:8] == b"ftyp":
        return f"an ISO media file (brand {blob[8:12].decode('ascii', 'replace')}) of {len(blob)} bytes"
    if blob[:4] == b"RIFF":
        return f"a {blob[8:12].decode('ascii', 'replace').strip()} (RIFF) file of {len(blob)} bytes"
    if blob[:1] == b"G" and blob[188:189] == b"G":
        return f"an MPEG-TS file of {len(blob)} bytes"
    return f"{len(blob)} bytes starting with {blob[:16]!r}"
