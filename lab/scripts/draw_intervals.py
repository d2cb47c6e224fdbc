"""Draw docs/assets/intervals.svg: the life of every key under sinks, newest keys and ranks.

python lab/scripts/draw_intervals.py [--output FILE]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from dynamask import key_expiry

LENGTH, WINDOW, LOCAL, SINKS, QUERY = 30, 8, 3, 1, 23
CELL, LEFT, TOP = 16, 64, 34
COLOURS = {"sink": "#5b3a8c", "ranked": "#0072b2", "newest": "#8ecae6", "dropped": "#ececec"}
"""Of the first positions, of keys that their rank keeps alive, of positions that are kept because they are new."""


def draw() -> str:
    """Draw one row per key, from the query that writes it to the query that drops it.

    Returns:
        The picture as SVG. The same code gives the same bytes.
    """
    ranks = torch.randn(1, 1, LENGTH, generator=torch.Generator().manual_seed(3))
    expiry = key_expiry(ranks, WINDOW, local=LOCAL, sinks=SINKS)[0, 0].tolist()
    width, height = LEFT + LENGTH * CELL + 24, TOP + LENGTH * CELL + 74
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{LEFT}" y="{TOP - 14}">queries, in the order of the text →</text>',
        f'<text x="14" y="{TOP + 12}">key</text>',
    ]
    alive = 0
    for key, end in enumerate(expiry):
        top = TOP + key * CELL
        parts.append(f'<text x="40" y="{top + 12}" font-size="10" fill="#666">{key}</text>')
        kind = "sink" if key < SINKS else "ranked"
        new = min(key + LOCAL, end, LENGTH)
        parts.append(_bar(key, new, top, COLOURS["sink" if key < SINKS else "newest"]))
        if end > new:
            parts.append(_bar(new, min(end, LENGTH), top, COLOURS[kind]))
        if end < LENGTH:
            parts.append(_bar(end, LENGTH, top + 6, COLOURS["dropped"], CELL - 12))
        alive += key <= QUERY < end
    left = LEFT + QUERY * CELL
    parts += [
        f'<rect x="{left}" y="{TOP - 4}" width="{CELL}" height="{LENGTH * CELL + 8}" fill="none" stroke="#d55e00" '
        'stroke-width="2"/>',
        f'<text x="{left + CELL / 2}" y="{TOP + LENGTH * CELL + 18}" fill="#d55e00" text-anchor="middle">query {QUERY} '
        f"sees {alive} keys: the cache</text>",
    ]
    names = {"sink": "first position", "newest": f"newest {LOCAL}", "ranked": "kept by its rank"}
    for number, (kind, name) in enumerate(names.items()):
        x, y = LEFT + number * 140, TOP + LENGTH * CELL + 38
        parts.append(f'<rect x="{x}" y="{y}" width="14" height="12" fill="{COLOURS[kind]}"/>')
        parts.append(f'<text x="{x + 20}" y="{y + 11}">{name}</text>')
    parts.append("</svg>")
    return "\n".join(parts) + "\n"


def _bar(first: int, last: int, top: int, colour: str, height: int = CELL - 3) -> str:
    return (
        f'<rect x="{LEFT + first * CELL}" y="{top}" width="{(last - first) * CELL}" height="{height}" fill="{colour}"/>'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/assets/intervals.svg"))
    output = parser.parse_args().output
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(draw(), encoding="utf-8")
    print(f"written {output}")


if __name__ == "__main__":
    main()
