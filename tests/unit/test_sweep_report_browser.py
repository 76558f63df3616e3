"""The page of a sweep in a real browser: it renders, without a network and without an error."""

import re

import pytest

from tests.unit.test_report_browser import PROBE, browser, rendered
from tests.unit.test_sweep_report import write_sweep

__all__ = ["browser"]  # a fixture

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("width", [400, 1200])
def test_sweep_renders_without_network_and_errors(tmp_path, browser, width):
    page = write_sweep(tmp_path / "my_sweep")
    probed = tmp_path / "my_sweep" / "probed.html"
    probed.write_text(page.replace("</body>", PROBE + "</body>"), "utf-8")
    profile = str(tmp_path / "profile")
    dom, console = rendered(browser, probed.as_uri(), profile, f"--window-size={width},900")
    assert console == []
    assert dom.count("<svg") == 3
    told = dict(re.findall(r'data-(\w+)="(-?\d+)"', dom))
    # The plots; test scores, the map, three published tables, leaders, errors: none pushes the page
    # sideways.
    assert told == {"width": "0", "shown": "10", "hidden": "0"}
