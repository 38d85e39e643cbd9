"""The pages in a browser: nothing that keeps those out who do not see, hear or point as most do.

Needs Chromium (`apt install chromium`) and axe-core (of the extra dev); skips, saying so, where there is none.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape
from importlib.resources import files
from pathlib import Path

import pytest
from test_answer import of, rows_of
from test_report import results  # noqa: F401 - a fixture
from test_trainings_report import curves, made

from eval.report.page import write_report
from eval.text.lengths import LengthBin
from eval.trainings import Budget

pytestmark = pytest.mark.browser
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
RULES = ["wcag2a", "wcag2aa", "wcag21aa", "best-practice"]


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser here: none of {', '.join(BROWSERS)}")
    return found


def loaded(browser: str, page: Path, width: int = 1280) -> str:
    """The document as the browser has it once all scripts have run."""
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--window-size={width},1600",
        "--virtual-time-budget=20000",
    ]
    command = [browser, *flags, f"--user-data-dir={page.parent / 'profile'}", "--dump-dom", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def violations(browser: str, page: Path, folder: Path) -> list[str]:
    """What axe finds in a page."""
    axe = pytest.importorskip("axe_core_python", reason="axe-core is not installed (extra dev)")
    script = (files(axe) / "axe.min.js").read_text(encoding="utf-8")
    run = (
        f"axe.run({{runOnly: {json.dumps(RULES)}}}).then(found => {{ const pre = document.createElement('pre');"
        "pre.id = 'axe'; pre.textContent = JSON.stringify(found.violations.map(v => v.id + ': ' + v.help + ': ' +"
        "v.nodes.slice(0, 3).map(n => n.html.slice(0, 200) + ' ' + n.any.map(a => a.message).join(' ')).join(' | ')));"
        "document.body.appendChild(pre); });"
    )
    checked = folder / "checked.html"
    html = page.read_text(encoding="utf-8")
    checked.write_text(html.replace("</body>", f"<script>{script}</script><script>{run}</script></body>"), "utf-8")
    found = re.search(r'<pre id="axe">(.*?)</pre>', loaded(browser, checked), re.DOTALL)
    assert found, "axe did not finish"
    return json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


def test_the_report_is_for_everybody(browser, results, tmp_path):  # noqa: F811
    compared = of({"c25": rows_of("c25", 25.0, 4)}, {"c12": rows_of("c12", 12.5, 1)})
    results.rows += compared.rows
    results.contrasts = compared.contrasts
    results.curves, results.configurations = curves(), made().configurations
    results.text_lengths = [LengthBin("short", 1, 6), LengthBin("long", 7)]
    results.budgets = [Budget(cell, "steps", "a", 9, 90, 1.0, 1e9, 1.0) for cell in "ab"]
    page = write_report(results, tmp_path)
    assert violations(browser, page, tmp_path) == []


def test_a_fault_is_found(browser, tmp_path):
    page = tmp_path / "page.html"
    page.write_text("<html><body><img src='a.png'><p style='color:#ccc;background:#fff'>pale</p></body></html>")
    found = " ".join(violations(browser, page, tmp_path))
    assert "image-alt" in found and "color-contrast" in found and "html-has-lang" in found


def widths(browser: str, html: str, folder: Path, width: int) -> tuple[int, int]:
    """How wide a page's content is, and the place it has: in a frame, as no window is narrower than 500 pixels."""
    told = "parent.document.title = document.documentElement.scrollWidth + ' ' + document.documentElement.clientWidth;"
    framed = escape(html.replace("</body>", f"<script>{told}</script></body>"))
    page = folder / "framed.html"
    style = f"width: {width}px; height: 800px; border: 0"
    page.write_text(
        f'<html><head><title></title></head><iframe style="{style}" srcdoc="{framed}"></iframe></html>', "utf-8"
    )
    content, place = map(int, re.search(r"<title>(\d+) (\d+)</title>", loaded(browser, page)).groups())
    return content, place


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_itself_never_scrolls_sideways(browser, results, tmp_path, width):  # noqa: F811
    results.curves, results.configurations = curves(), made().configurations
    content, place = widths(browser, write_report(results, tmp_path).read_text(encoding="utf-8"), tmp_path, width)
    assert content <= place <= width and place > width - 30
    wide = "<html><body><p style='width: 2000px'>wide</p></body></html>"
    assert widths(browser, wide, tmp_path, width)[0] > width
