"""The chat page at /: one file without remote parts, and a policy that allows just its own script and style."""

import base64
import hashlib
import re
from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

PAGE_FILE = Path(__file__).with_name("page.html")


def page() -> Callable[[Request], Awaitable[Response]]:
    """The page's handler; the file is read and hashed here, once."""
    html = PAGE_FILE.read_text(encoding="utf-8")
    headers = security_headers(html)

    async def answer(request: Request) -> Response:
        return Response(html, headers=headers, media_type="text/html")

    return answer


def security_headers(html: str) -> dict[str, str]:
    """What a browser may do with the page: run what stands in it, and talk to the server that it came from.

    A text of the model cannot become markup in it, even by a mistake of the script: trusted types are required,
    and there are none.
    """
    policy = {
        "default-src": "'none'",
        "script-src": _hashes("script", html),
        "style-src": _hashes("style", html),
        "img-src": "data:",  # the icon
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return {
        "content-security-policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        "cache-control": "no-cache",
    }


def _hashes(tag: str, html: str) -> str:
    """The hashes of all elements of this kind, as the policy names them."""
    contents: list[str] = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    digests = (hashlib.sha256(content.encode()).digest() for content in contents)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
