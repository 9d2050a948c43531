"""The plot of `swarm_loss`."""

from __future__ import annotations

import statistics
from pathlib import Path

from trainwright.report.plots import Line, line_chart

# The report's style sheet has five colours, and there is no page here: each line gets its own.
_COLOURS = (
    "#4269d0",
    "#efb118",
    "#ff725c",
    "#3ca951",
    "#a463f2",
    "#6cc5b0",
    "#97bbf5",
    "#9c6b4e",
    "#9498a0",
)


def plot(file: Path, model: str, found: dict[str, list[dict]]) -> None:
    """An SVG of each method's loss above DDP's, in percent, over the tokens seen.

    `found` has what runs of each seed found, by the method's name; DDP's are the first.
    """
    (_, ddp), *others = found.items()
    lines = []
    for number, (label, runs) in enumerate(others):
        tokens = [point[0] / 1000 for point in runs[0]["curve"]]
        above = [
            100
            * statistics.mean(
                run["curve"][place][1] / base["curve"][place][1] - 1
                for run, base in zip(runs, ddp, strict=True)
            )
            for place in range(len(tokens))
        ]
        lines.append(Line(label, tokens, above, "points", number))
    drawing = line_chart(
        lines,
        x_title="thousand tokens",
        y_title=f"{model}: held-out loss above DDP (%)",
        width=760,
        height=380,
    )
    legend: list[str] = []
    at = -1
    for colour, line in zip(_COLOURS, lines, strict=False):
        at = drawing.index('class="line', at + 1)
        drawing = drawing[:at] + f'style="stroke:{colour}" ' + drawing[at:]
        at += len(colour) + 20
        y = 24 + 16 * len(legend)
        legend.append(f'<text x="770" y="{y}" style="fill:{colour}">{line.label}</text>')
    style = (
        "<style>text{font:12px sans-serif;fill:#333}.grid{stroke:#ddd}.axis{stroke:#333}"
        ".line{fill:none;stroke-width:2}.dot{display:none}.at{display:none}</style>"
        '<rect width="100%" height="100%" fill="white"/>'
    )
    head, rest = drawing.replace("0 0 760 380", "0 0 900 380").split(">", 1)  # room for names
    head += ' xmlns="http://www.w3.org/2000/svg"'
    file.write_text(f"{head}>{style}{rest[: rest.rindex('</svg>')]}{''.join(legend)}</svg>\n")
