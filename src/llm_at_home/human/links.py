"""Each rater's secret link and form token, derived from the study's secret."""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets

_LENGTH = 22  # of six bits each: 132 bits


def new_secret() -> str:
    """256 random bits, in hexadecimal."""
    return secrets.token_hex(32)


def link_token(secret: str, rater: int) -> str:
    """What stands in the rater's link: whoever knows it grades as this rater."""
    return _derived(secret, f"link/{rater}")


def form_token(secret: str, rater: int) -> str:
    """What a rater's own page sends back with each grade, and a page on another site does not know."""
    return _derived(secret, f"form/{rater}")


def rater_of(secret: str, token: str, raters: int) -> int | None:
    """The rater, counted from 1, whose link holds ``token``; every link is compared, in constant time."""
    found = None
    for rater in range(1, raters + 1):
        if same(token, link_token(secret, rater)):
            found = rater
    return found


def same(given: str, expected: str) -> bool:
    """Whether two tokens are the same, in a time that does not tell how much of them is."""
    return hmac.compare_digest(given.encode(errors="replace"), expected.encode())


def _derived(secret: str, purpose: str) -> str:
    digest = hmac.digest(bytes.fromhex(secret), purpose.encode(), hashlib.sha256)
    return base64.urlsafe_b64encode(digest).decode("ascii")[:_LENGTH]
