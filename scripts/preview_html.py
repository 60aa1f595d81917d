#!/usr/bin/env python3
"""Write what `qlora.py --preview N` prints as an HTML page: statistics, then the rows as they are trained on.

    python scripts/preview_html.py --model_name_or_path M --dataset my.jsonl --output_dir output/mine [--preview 20]

Accepts every flag of qlora.py, loads no weights, and writes preview.html to --output_dir. The page is self-contained,
so it can be shared as one file; it contains rows of the dataset.
"""

import dataclasses
import re
import sys
from collections.abc import Iterable
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import qlora

ROWS = 20  # if --preview gives no number
OPEN = 5  # rows that are expanded at first

STYLE = """
:root { color-scheme: light dark; --page: #fafaf7; --card: #fff; --ink: #1c2024; --soft: #596270; --line: #d9dce1;
  --sup: #d2f0dc; --sup-ink: #08381c; --sup-line: #1f8a4c; --bar: #3f7cc4; --note: #b45309; }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --card: #1c2026; --ink: #dde2e9; --soft: #9aa5b4;
  --line: #343b45; --sup: #123b25; --sup-ink: #c9f4d9; --sup-line: #3fb872; --bar: #5b9be6;
  --note: #f0a742; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1rem 1rem 4rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; line-height: 1.25; margin: .5rem 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2rem 0 .75rem; }
header p, .legend { margin: 0; color: var(--soft); overflow-wrap: anywhere; }
header span, .legend span { display: inline-block; margin-right: .9rem; }
:focus-visible { outline: 3px solid var(--bar); outline-offset: 2px; border-radius: 4px; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.75rem, 1fr)); gap: .5rem; margin: 0; }
dl div, details { background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
dl div { padding: .5rem .75rem; }
dt { color: var(--soft); font-size: .85rem; }
dd { margin: 0; font-size: 1.15rem; font-weight: 600; font-variant-numeric: tabular-nums; }
dd small { font-weight: 400; color: var(--soft); }
.note { border-color: var(--note); border-left-width: 4px; }
details { margin: .5rem 0; }
summary { cursor: pointer; padding: .6rem .75rem; font-size: .9rem; overflow-wrap: anywhere; }
.row { margin: 0; padding: .6rem .75rem .8rem; border-top: 1px solid var(--line); white-space: pre-wrap;
  overflow-wrap: anywhere; unicode-bidi: plaintext; font: .88rem/1.6 ui-monospace, Menlo, Consolas, monospace; }
mark { background: var(--sup); color: var(--sup-ink); border-bottom: 2px solid var(--sup-line);
  box-decoration-break: clone; -webkit-box-decoration-break: clone; }
i { color: var(--soft); font-style: normal; user-select: none; }
mark i { color: inherit; opacity: .75; }
@media print { details { break-inside: avoid; } }
"""


LEGEND = ("<mark>supervised</mark>", "not supervised", "<i>↵</i> line break")


def spans(parts: Iterable[str]) -> str:
    """Parts that do not break across lines if they fit on one."""
    return " ".join(f"<span>{part}</span>" for part in parts)


def span_html(text: str, supervised: bool) -> str:
    """Part of a row: supervised text as <mark>."""
    text = escape(text).replace("↵\n", "<i>↵</i>\n")
    return f"<mark>{text}</mark>" if supervised else text


def rows_html(rows: Iterable[tuple[str, qlora.Spans]]) -> str:
    """The rows, each collapsible; the first are expanded."""
    return "\n".join(
        f"<details{' open' * (number < OPEN)}><summary>{escape(title)}</summary>"
        f'<p class="row" dir="auto">{"".join(span_html(*span) for span in row)}</p></details>'
        for number, (title, row) in enumerate(rows)
    )


def statistics_html(name: str, part: qlora.TokenStatistics) -> str:
    """One split: a card for each number, as in the log. Likely mistakes are highlighted."""
    cards = ""
    for line in str(part).split(", "):
        number, share, label = re.fullmatch(r"([\d,]+)( \(.*?\))? (.*)", line).groups()  # type: ignore[union-attr]
        small = f" <small>{escape(share.strip())}</small>" if share else ""
        note = ' class="note"' if label in ("cut", "without EOS", "duplicates") else ""
        cards += f"<div{note}><dt>{escape(label)}</dt><dd>{number}{small}</dd></div>\n"
    return f"<section><h2>Statistics of the {name} rows</h2>\n<dl>\n{cards}</dl></section>"


def page(
    config: qlora.Config, rows: list[tuple[str, qlora.Spans]], statistics: dict[str, qlora.TokenStatistics]
) -> str:
    """The HTML document."""
    title = f"Preview of {qlora.escape_control_chars(config.data.dataset)}"
    flags = [
        f"--{name} {qlora.escape_control_chars(str(config.flags[name]))}"
        for name in sorted(config.explicitly_set - {"dataset"})
    ]
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header><h1>{escape(title)}</h1><p>{spans(map(escape, flags))}</p></header>
<main>
{"".join(statistics_html(name, part) for name, part in statistics.items())}
<section><h2>The first {len(rows)} rows or parts of packs, as they are trained on</h2>
<p class="legend">{spans(LEGEND)}</p>
{rows_html(rows)}
</section>
</main>
</body>
</html>
"""


def write_page(
    rows: Iterable[tuple[str, qlora.Spans]], statistics: dict[str, qlora.TokenStatistics], config: qlora.Config
) -> None:
    """Write preview.html and print its path."""
    file = Path(config.training.output_dir, "preview.html")
    file.parent.mkdir(parents=True, exist_ok=True)
    qlora.write_file(file, page(config, list(rows), statistics))
    print(file)


def preview(config: qlora.Config, stop: qlora.GracefulStop) -> int:
    """Run qlora.py's preview and write the page instead of printing it."""
    data = dataclasses.replace(config.data, preview=config.data.preview or ROWS)
    return qlora.run(dataclasses.replace(config, data=data), stop, show=write_page)


if __name__ == "__main__":
    sys.exit(qlora.main(action=preview))
