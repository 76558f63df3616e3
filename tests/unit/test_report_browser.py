"""The report in a real browser: it renders, without a network and without an error."""

import os
import re
import shutil
import subprocess

import pytest

from tests.unit.test_report import page_of, write_run

pytestmark = pytest.mark.slow

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or ""
# What a page logs, and what it fails to load or run; the browser's own noise is elsewhere.
CONSOLE = re.compile(r".*(?:CONSOLE|net::ERR_).*")


@pytest.fixture
def browser() -> str:
    if not BROWSER and os.environ.get("CI") != "true":
        pytest.skip("no chromium is installed: apt-get install chromium")
    assert BROWSER, "the check needs a browser: apt-get install chromium"
    return BROWSER


def rendered(browser: str, url: str, profile: str, *options: str) -> tuple[str, list[str]]:
    """What the page is after loading, and what its console says."""
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--enable-logging=stderr",
        "--virtual-time-budget=3000",
        f"--user-data-dir={profile}",
        *options,
        "--dump-dom",
        url,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, CONSOLE.findall(done.stderr)


# Appended to the page: it tells of what the browser made of it.
PROBE = """<script>
const width = document.documentElement.scrollWidth;
const sizes = [...document.querySelectorAll("svg, table")].filter(
  one => one.checkVisibility()).map(one => one.getBoundingClientRect());
document.body.dataset.width = width - document.documentElement.clientWidth;
document.body.dataset.shown = sizes.filter(one => one.width > 100 && one.height > 40).length;
document.body.dataset.hidden = sizes.filter(one => one.width <= 100 || one.height <= 40).length;
</script>"""


@pytest.mark.parametrize("width", [400, 1200])
def test_report_renders_without_network_and_errors(tmp_path, browser, width):
    run = write_run(tmp_path / "my_run")
    page = page_of(run)
    probed = run / "probed.html"
    probed.write_text(page.replace("</body>", PROBE + "</body>"), "utf-8")
    profile = str(tmp_path / "profile")
    dom, console = rendered(browser, probed.as_uri(), profile, f"--window-size={width},900")
    assert console == []
    assert dom.count("<svg") == 3
    assert "<td>task_two</td>" in dom
    told = dict(re.findall(r'data-(\w+)="(-?\d+)"', dom))
    # The plots, the systems, two tables of categories, the tasks; none pushes the page sideways.
    assert told == {"width": "0", "shown": "7", "hidden": "0"}


def test_errors_of_a_page_are_seen(tmp_path, browser):
    (tmp_path / "bad.html").write_text(
        "<img src='https://example.org/x.png'><script>nothing.at.all()</script>"
    )
    _, console = rendered(browser, (tmp_path / "bad.html").as_uri(), str(tmp_path / "profile"))
    assert any("nothing is not defined" in line for line in console)
