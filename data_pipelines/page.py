"""The shell of every HTML page that a command writes: one file each, no scripts, nothing from the network."""

from __future__ import annotations

import base64
import io
from html import escape

from PIL import Image

THUMBNAIL_PX = 160
"""longest side"""

_STYLE = """
:root { --ink: #1c2430; --soft: #5b6675; --line: #dde2e8; --paper: #fff; --back: #f5f7f9;
  --a: #2f6fbf; --b: #c0562f; --c: #2e8b57; --d: #8e44ad; --e: #b8860b; --f: #5f6b7a; }
@media (prefers-color-scheme: dark) { :root {
  --ink: #e6eaf0; --soft: #9aa6b5; --line: #333c48; --paper: #1a2029; --back: #12161c;
  --a: #7aa7e0; --b: #e08a6a; --c: #6fc596; --d: #c08ad8; --e: #d9b04c; --f: #9aa6b5; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 24px 16px 48px; }
h1 { font-size: 24px; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 32px 0 12px; } h3 { font-size: 14px; margin: 0 0 8px; }
p { max-width: 70ch; }
.soft { color: var(--soft); }
.grid { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); }
.wide { grid-template-columns: repeat(auto-fill, minmax(min(100%, 420px), 1fr)); }
.card { background: var(--paper); border: 1px solid var(--line); border-radius: 8px; padding: 12px; }
.card { min-width: 0; }
.number b { display: block; font-size: 22px; }
.number i { color: var(--soft); font-style: normal; font-size: 13px; }
.scroll { overflow-x: auto; }
figure { margin: 0; } figure img { width: 100%; height: 130px; object-fit: contain; }
figcaption { font-size: 13px; margin-top: 6px; overflow-wrap: anywhere; }
table { border-collapse: collapse; font-size: 13px; }
td, th { padding: 3px 14px 3px 0; text-align: left; overflow-wrap: anywhere; }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font-size: 11px; }
code { background: var(--back); padding: 1px 4px; border-radius: 4px; overflow-wrap: anywhere; }
"""


def document(title: str, body: str, *, style: str = "") -> str:
    """A whole page. `body` is HTML, `style` what a page adds to the style of all."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}{style}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def number_card(value: str, name: str, note: str = "") -> str:
    """A number in large type; value and note are HTML."""
    return f'<div class="card number"><b>{value}</b><i>{escape(name)}</i>{note}</div>'


def thumbnail(image: Image.Image, alt: str = "") -> str:
    """An <img> with a small copy inside."""
    small = image.copy()
    small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=85)
    return picture(out.getvalue(), alt, kind="jpeg")


def picture(data: bytes, alt: str = "", *, kind: str = "png") -> str:
    """An <img> with an encoded image inside."""
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
    return f'<img alt="{escape(alt)}" src="{source}">'
