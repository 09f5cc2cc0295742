"""report.html: one page that holds everything, pictures too; no script, nothing from elsewhere, all texts escaped."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from cllava_fast.evaluate.wording import headline, metric_title, selection_explanations, title_of
from cllava_fast.untrusted import printable

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #fff; --soft: #6b7280; --line: #d8dce2; --card: #f5f6f8;
  --right: #00734f; --wrong: #b34700; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --paper: #15171a; --soft: #9aa3af; --line: #363b43;
  --card: #1f2328; --right: #4cc9a0; --wrong: #f2a065; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .35rem .6rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { font-weight: 600; white-space: normal; overflow-wrap: normal; }
.facts td, .facts th { text-align: left; white-space: normal; vertical-align: top; font-weight: 400; }
.soft, figcaption { color: var(--soft); font-size: .9rem; }
figure { margin: 1rem 0; } figure img { max-width: 100%; height: auto; background: #fff; border-radius: 6px; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: .6rem; }
.card { display: flex; gap: .7rem; background: var(--card); border-radius: 6px; padding: .7rem; min-width: 0; }
.card img { width: 72px; height: 72px; object-fit: contain; flex: none; border-radius: 4px; }
.card p { margin: 0; white-space: pre-line; max-height: 14rem; overflow-y: auto; }
.card span { color: var(--soft); } .right { color: var(--right); } .wrong { color: var(--wrong); }
pre { overflow-x: auto; background: var(--card); border-radius: 6px; padding: .7rem; font-size: .85rem; }
summary { cursor: pointer; font-weight: 600; }
"""


def html_page(
    results: Mapping[str, Any],
    table: tuple[Sequence[str], Sequence[Sequence[str]]],
    explanations: Sequence[tuple[str, str]],
    pictures: Mapping[str, bytes],
    selection: tuple[Sequence[str], Sequence[Sequence[str]]] | None,
) -> str:
    """The page as a text.

    Args:
        table, explanations: as ``report.table`` and ``wording.explanations`` return them.
        pictures: PNGs by what they show.
        selection: as ``report.selection_table`` returns it.
    """
    title = escape(headline(results))
    selected = f"<h2>What is selected</h2>{_table(*selection)}{_list(selection_explanations())}" if selection else ""
    figures = "".join(
        f'<figure><img src="{_data("png", data)}" alt="{escape(text)}"><figcaption>{escape(text)}</figcaption></figure>'
        for text, data in pictures.items()
    )
    examples = "".join(_examples(name, result, results) for name, result in results["methods"].items())
    settings = escape(json.dumps(results.get("config", {}), indent=2))
    environment = "".join(
        f"<tr><th>{escape(str(key))}</th><td>{escape(str(value))}</td></tr>"
        for key, value in results["environment"].items()
        if value is not None
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{title}</h1>
{_table(*table)}
{_list(explanations)}
{figures}
{selected}
{examples}
<h2>Settings and environment</h2>
<details><summary>Settings</summary><pre>{settings}</pre></details>
<details><summary>Environment</summary><div class="wide"><table class="facts"><tbody>{environment}</tbody></table></div>
</details>
</body>
</html>
"""


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    return (
        f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>{''.join(map(_row, rows))}</tbody>\n</table></div>"
    )


def _list(named: Sequence[tuple[str, str]]) -> str:
    items = "".join(
        f"<li><b>{escape(name)}</b>: {escape(text)}</li>" if name else f"<li>{escape(text)}</li>"
        for name, text in named
    )
    return f'<ul class="soft">{items}</ul>'


def escape(text: str) -> str:
    """A text as text: neither markup nor marks that turn the direction of writing."""
    return html.escape(printable(text))


def _row(cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"


def _examples(method: str, result: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """Answers at the end, a section a task."""
    sections = []
    for task, examples in result.get("examples", {}).items():
        metric = results.get("metrics", {}).get(task)
        by = f' <span class="soft">by {escape(metric_title(metric))}</span>' if metric else ""
        cards = "".join(map(_card, examples))
        sections.append(f'<h3>{escape(task)}{by}</h3><div class="cards">{cards}</div>')
    if not sections:
        return ""
    return f"<h2>Answers of {escape(title_of(method))} at the end</h2>{''.join(sections)}"


def _card(example: Mapping[str, Any]) -> str:
    score = float(example["score"])
    right = score >= 0.5
    verdict = ("✓ right" if right else "✗ wrong") + ("" if score in (0.0, 1.0) else f", {score:.2f}")
    thumbnail = _thumbnail(example.get("image"))
    picture = f'<img src="{thumbnail}" alt="">' if thumbnail else ""
    predicted = example["prediction"] or "(nothing)"
    return (
        f'<div class="card">{picture}<div><p>{escape(example["question"])}</p>'
        f"<p><span>expected</span> {escape(' / '.join(example['answers']))}</p>"
        f"<p><span>predicted</span> {escape(predicted)}</p>"
        f'<p class="{"right" if right else "wrong"}">{verdict}</p></div></div>'
    )


def _thumbnail(encoded: Any) -> str | None:
    """A data address, if the text is what it should be: a JPEG in base64."""
    try:
        data = base64.b64decode(encoded, validate=True)
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            image.verify()
    except Exception:  # whatever a decoder raises for a damaged picture
        return None
    return _data("jpeg", data)


def _data(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
