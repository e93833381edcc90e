"""Who may ask: requests signed with a secret that the run's processes and its servers share."""

import hashlib
import hmac
import stat
from pathlib import Path

from megatron_keye.errors import SettingsError
from megatron_keye.io_server.protocol import Refused

SCHEME = "Keye-HMAC-SHA256"
WINDOW_S = 60
"""A token is good for this long before and after the moment that it names."""
MIN_SECRET_BYTES = 16


def load_secret(path: Path) -> bytes:
    """The content of a secret file without surrounding whitespace.

    Raises SettingsError for a file that cannot be read, that others than its owner may read, or that is too short.
    """
    advice = f"make one with: (umask 077; head -c 32 /dev/urandom | base64 > {path})"
    try:
        mode = path.stat().st_mode
        secret = path.read_bytes().strip()
    except OSError as error:
        raise SettingsError(f"cannot read the secret file {path}: {error.strerror or error}; {advice}") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise SettingsError(f"the secret file {path} can be read by others (mode {stat.S_IMODE(mode):o}); run: chmod 600 {path}")
    if len(secret) < MIN_SECRET_BYTES:
        raise SettingsError(f"the secret file {path} holds {len(secret)} bytes: expected at least {MIN_SECRET_BYTES}; {advice}")
    return secret


def sign(secret: bytes, path: str, body: bytes, now_s: float) -> str:
    """The value of the Authorization header of a POST of `body` to `path`."""
    issued_s = int(now_s)
    return f"{SCHEME} {issued_s} {_mac(secret, path, body, issued_s)}"


def verify(secret: bytes, header: str, path: str, body: bytes, now_s: float) -> None:
    """Raises Refused (denied) for a header that `sign` did not make for this request within the window."""
    scheme, _, rest = header.partition(" ")
    issued, _, mac = rest.partition(" ")
    if scheme != SCHEME or not issued.isascii() or not issued.isdigit() or len(issued) > 12:
        raise Refused("denied", f"expected the header `Authorization: {SCHEME} SECONDS MAC`; set data.media.secret_file of the run")
    # The MAC first: whoever does not know the secret learns nothing about clocks.
    if not hmac.compare_digest(mac.encode(), _mac(secret, path, body, int(issued)).encode()):
        raise Refused("denied", "the token does not match the request: another secret, or the request was changed on its way")
    if abs(now_s - int(issued)) > WINDOW_S:
        raise Refused("denied", f"the token is {now_s - int(issued):.0f} s old: expected at most {WINDOW_S}; set the clocks")


def _mac(secret: bytes, path: str, body: bytes, issued_s: int) -> str:
    digest = hashlib.sha256(body).hexdigest()
    return hmac.new(secret, f"POST\n{path}\n{issued_s}\n{digest}".encode(), hashlib.sha256).hexdigest()
