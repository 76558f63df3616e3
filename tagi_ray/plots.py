"""Plots and pages that need no network: inline SVG in the page's own colours, and its templates."""

from __future__ import annotations

import re
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

COLOURS = ("#2f7f79", "#d08a3c", "#6a7fc1", "#b8668f")
# Matplotlib can't write CSS variables: these stand for them, so that plots follow the page's theme.
THEME = {
    "#010203": "currentColor",
    "#040506": "var(--line)",
    "#070809": "var(--soft)",
    "#0a0b0c": "var(--card)",
}
INK, LINE, SOFT, CARD = THEME


def rendered_page(template: str, **values: Any) -> str:
    """Return a page of the package's template of that name; all text in it is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    """Return a figure of that many inches, and its axes."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.grid(color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=SOFT, labelcolor=SOFT, labelsize=8, length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    return figure, axes


def scale_losses(axes: Any, values: Sequence[float]) -> None:
    """Logarithmic where losses differ by much, with plain numbers at its ticks."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    low, high = min(values, default=0.0), max(values, default=0.0)
    if low <= 0 or high < 3 * low:
        return
    axes.set_yscale("log")
    # Of 1, 2 and 5 one at least falls between values that differ threefold.
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def inline_svg(figure: Any, name: str) -> Any:
    """Inline SVG of a figure, in the page's colours and without any reference to the network."""
    import matplotlib
    from markupsafe import Markup
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    if figure.axes[0].get_legend_handles_labels()[0]:
        figure.legend(
            loc="outside upper left", ncols=3, frameon=False, fontsize=8, labelcolor=INK,
            handlelength=1.2, columnspacing=1.2,
        )  # fmt: skip
    target = StringIO()
    # The salt keeps ids of different plots of one page apart, and the same plot's ids the same.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        FigureCanvasSVG(figure).print_svg(target, metadata={"Date": None})
    text = target.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for placeholder, variable in THEME.items():
        text = text.replace(placeholder, variable)
    return Markup(text)  # matplotlib escapes the names in it
