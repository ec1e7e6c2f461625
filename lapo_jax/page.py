# SPDX-License-Identifier: Apache-2.0
"""One HTML page that needs nothing else: tables, pictures, completions.

What a model wrote is hostile: every text is escaped, characters that would be
obeyed rather than shown are replaced, and the page forbids its reader's
browser to fetch or run anything.
"""

import base64
from collections.abc import Mapping, Sequence
import html
from typing import Any

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff;
  max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.25; } h2 { margin-top: 2.5rem; }
table { border-collapse: collapse; font-size: 13px; display: block;
  overflow-x: auto; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #ddd;
  text-align: right; white-space: nowrap; }
th { border-bottom: 2px solid #888; }
.left { text-align: left; } .strong td { font-weight: 600; }
img { max-width: 100%; height: auto; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f5f5f5;
  padding: .6rem; font-size: 12.5px; max-height: 24rem; overflow-y: auto; }
figcaption, .note { color: #555; font-size: 13px; } figure { margin: 1rem 0; }
summary { cursor: pointer; }
"""


def page(title: str, parts: Sequence[str]) -> str:
  """The whole document; the parts are HTML, the title is text."""
  return '\n'.join([
      '<!DOCTYPE html>', '<html lang="en"><head><meta charset="utf-8">',
      f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
      '<meta name="viewport" content="width=device-width">',
      f'<title>{text(title)}</title><style>{_STYLE}</style></head><body>',
      f'<h1>{text(title)}</h1>', *parts, '</body></html>', ''])


def text(value: Any) -> str:
  """Any value as text that HTML only shows."""
  shown = ''.join(c if c.isprintable() or c in '\n\t' else '�'
                  for c in str(value))
  return html.escape(shown)


def heading(title: str, level: int = 2) -> str:
  """A heading; level 1 is the page's own."""
  return f'<h{level}>{text(title)}</h{level}>'


def note(words: str) -> str:
  """A paragraph of small text."""
  return f'<p class="note">{text(words)}</p>'


def table(rows: Sequence[Sequence[Any]], left: Sequence[int] = (0,),
          strong: Sequence[int] = ()) -> str:
  """A table, its first row the headings.

  Args:
    rows: cells, shown as text.
    left: columns of words, aligned to the left.
    strong: rows in bold type, 0 being the one below the headings.
  """
  def row(cells, tag, look=''):
    inside = ''.join(
        f'<{tag}{" class=left" if i in left else ""}>{text(cell)}</{tag}>'
        for i, cell in enumerate(cells))
    return f'<tr{look}>{inside}</tr>'

  body = [row(cells, 'td', ' class="strong"' if i in strong else '')
          for i, cells in enumerate(rows[1:])]
  return '\n'.join([f'<table><thead>{row(rows[0], "th")}</thead><tbody>',
                    *body, '</tbody></table>'])


def picture(png: bytes, words: str) -> str:
  """A PNG inside the page, and what it shows."""
  data = base64.b64encode(png).decode('ascii')
  return (f'<figure><img alt="{text(words)}" '
          f'src="data:image/png;base64,{data}">'
          f'<figcaption>{text(words)}</figcaption></figure>')


def folded(title: str, inside: str) -> str:
  """What is shown on a click."""
  return f'<details><summary>{text(title)}</summary>\n{inside}\n</details>'


def sample(row: Mapping[str, Any]) -> str:
  """A completion, as `metrics.Writer.write_samples` keeps it."""
  facts = ', '.join([
      f'step {row.get("step")}', str(row.get('stage')),
      str(row.get('verdict')), f'{row.get("length")} tokens',
      f'reward {row.get("reward")}', f'expected {row.get("gold")}'])
  return (f'<h4>{text(facts)}</h4><pre>{text(row.get("prompt", ""))}</pre>'
          f'<pre>{text(row.get("completion", ""))}</pre>')
