"""Draws what bench_decode.py measured: time of a decode step over the batch size, with its floor, as one SVG.

    python scripts/plot_bench.py decode.jsonl docs/decode.svg

One line per number of adapters, the floor dashed in the same colour. Of a row measured twice the last one counts.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 860, 500
LEFT, RIGHT, TOP, BOTTOM = 70, 190, 60, 60
COLOURS = ("#1b6ca8", "#d1495b", "#3a7d44", "#8e6c8a", "#b07d12", "#444444")
MOST_ADAPTERS = 64  # rows with one adapter a row, up to so many, make one line
FONT = 'font-family="system-ui, sans-serif"'

Row = dict[str, Any]


class Line(NamedTuple):
    """Rows of one number of adapters, by rising batch size."""

    label: str
    rows: list[Row]


class Axes:
    """From batch sizes (logarithmic) and milliseconds to the picture's coordinates."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.batches = sorted({row["batch"] for row in rows})
        self.ticks = nice_ticks(max(max(row["step_ms"], row["floor_ms"]) for row in rows))

    def x(self, batch: int) -> float:
        low, high = math.log2(self.batches[0]), math.log2(self.batches[-1])
        share = (math.log2(batch) - low) / (high - low) if high > low else 0.5
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, ms: float) -> float:
        return HEIGHT - BOTTOM - ms / self.ticks[-1] * (HEIGHT - TOP - BOTTOM)


def read_rows(path: Path) -> list[Row]:
    """The decode results of a file, without those that failed. Raises SystemExit if there is none."""
    rows: dict[str, Row] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        if row["bench"] == "decode" and "error" not in row:
            rows[row["row"]] = row
    if not rows:
        raise SystemExit(f"{path} has no result of bench_decode.py")
    return list(rows.values())


def make_lines(rows: Iterable[Row]) -> list[Line]:
    """No adapter, the fixed numbers, and one adapter a row; a row may lie on two lines, a line has two rows or more."""
    ordered = sorted(rows, key=lambda row: row["batch"])
    one_each = [row for row in ordered if row["adapters"] == min(row["batch"], MOST_ADAPTERS)]
    fixed = sorted({row["adapters"] for row in ordered} - {MOST_ADAPTERS})
    lines = [Line(label_of(n), [row for row in ordered if row["adapters"] == n]) for n in fixed]
    lines.append(Line(f"one a row, at most {MOST_ADAPTERS}", one_each))
    return [line for line in lines if len(line.rows) > 1] or [Line("", ordered)]


def label_of(num_adapters: int) -> str:
    return {0: "no adapter", 1: "1 adapter"}.get(num_adapters, f"{num_adapters} adapters")


def nice_ticks(highest: float) -> list[float]:
    """Round numbers from 0 to beyond `highest`, four to ten of them."""
    rough = max(highest, 1e-6) / 6
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    return [step * index for index in range(math.ceil(highest / step) + 1)]


def draw(rows: Sequence[Row]) -> str:
    axes = Axes(rows)
    first = rows[0]
    title = f"Decode step, {first['shape']}, rank {first['rank']}, context about {first['context']:.0f}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        text(LEFT, 26, title, size=16),
        text(LEFT, 44, f"{first['gpu']}, commit {first['commit']}", size=11, colour="#666"),
        *grid(axes),
    ]
    lines = make_lines(rows)
    for index, line in enumerate(lines):
        parts += draw_line(axes, line, COLOURS[index % len(COLOURS)])
        parts += legend(index, line.label, COLOURS[index % len(COLOURS)])
    parts += legend(len(lines), "dashed: floor", "#666")
    return "\n".join([*parts, "</svg>\n"])


def grid(axes: Axes) -> list[str]:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts: list[str] = []
    for tick in axes.ticks:
        y = axes.y(tick)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{right}" stroke="#ddd"/>')
        parts.append(text(LEFT - 8, y + 4, f"{tick:g}", anchor="end"))
    parts += [text(axes.x(batch), bottom + 20, str(batch), anchor="middle") for batch in axes.batches]
    parts.append(text((LEFT + right) / 2, HEIGHT - 16, "rows in the batch", anchor="middle"))
    parts.append(text(LEFT - 8, TOP - 8, "ms", anchor="end"))
    return parts


def draw_line(axes: Axes, line: Line, colour: str) -> list[str]:
    parts: list[str] = []
    for key, dashes in (("floor_ms", ' stroke-dasharray="5 4" opacity="0.7"'), ("step_ms", "")):
        points = " ".join(f"{axes.x(row['batch']):.1f},{axes.y(row[key]):.1f}" for row in line.rows)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>')
    for row in line.rows:
        x, y = axes.x(row["batch"]), axes.y(row["step_ms"])
        hint = f"{row['row']}: {row['step_ms']} ms, floor {row['floor_ms']} ms, ratio {row['ratio']}"
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"><title>{escape(hint)}</title></circle>'
        )
    return parts


def legend(index: int, label: str, colour: str) -> list[str]:
    x, y = WIDTH - RIGHT + 20, TOP + 20 * index
    swatch = f'<path d="M{x} {y}h18" stroke="{colour}" stroke-width="3"/>'
    return [swatch, text(x + 24, y + 4, label)]


def text(
    x: float, y: float, words: str, *, size: int = 12, anchor: str = "start", colour: str = "#222"
) -> str:
    style = f'{FONT} font-size="{size}" text-anchor="{anchor}" fill="{colour}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(words)}</text>'


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="JSON lines of bench_decode.py")
    parser.add_argument("svg", type=Path, help="the picture to write")
    args = parser.parse_args()
    args.svg.write_text(draw(read_rows(args.results)))
