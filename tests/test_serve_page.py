"""The page of ``slm report --serve`` as its user sees it: in Chromium, on models that are here.

Needs gradio and playwright (extra browser) and Chromium (`apt install chromium`); skips, saying so, where one is not.
"""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import soundfile
from test_browser import BROWSERS
from test_report import results  # noqa: F401 - a fixture

from recipes.commands import report

pytestmark = pytest.mark.browser
MODEL, LABEL = "embedded-slm-12.5hz", "12.5hz"
SENTENCE = "bin blue at f two now"
# Of axe's, those that this page decides; ids that occur twice are gradio's.
RULES = ["color-contrast", "label", "button-name", "document-title", "html-has-lang", "frame-title", "link-name"]


@pytest.fixture
def page(tmp_path: Path, results: Any) -> Iterator[Any]:  # noqa: F811
    """The page with one model and a report, open."""
    pytest.importorskip("gradio", reason="gradio is not installed (extra browser)")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra browser)")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser here: none of {', '.join(BROWSERS)}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = report.Config(serve=True, models=[MODEL], device="cpu", port=port)
    served = report.make_page(config, report.write_report(results, tmp_path))
    report.launch(served, config, prevent_thread_lock=True)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": 1200, "height": 900})
        opened.set_default_timeout(120_000)
        opened.goto(f"http://127.0.0.1:{port}")
        yield opened
        browser.close()
    served.close()


def button(page: Any, name: str) -> Any:
    """A button that does something: a tab may have the same name."""
    return page.get_by_role("button", name=name, exact=True)


def test_a_sentence_is_spoken_and_a_recording_transcribed(page, tmp_path):
    page.get_by_label("What to say").fill(SENTENCE)
    button(page, "Speak").click()
    link = page.locator("a[download]").first
    link.wait_for()
    spoken = tmp_path / "spoken.wav"
    with urlopen(link.get_attribute("href")) as answer:
        spoken.write_bytes(answer.read())
    assert soundfile.info(spoken).duration > 0.5
    page.wait_for_function("/0:0[1-9]/.test(document.querySelector('#duration').innerText)")  # the player has it too

    page.get_by_role("tab", name="Transcribe").click()
    page.locator("input[type=file]").last.set_input_files(spoken)
    page.locator("#duration").last.wait_for()
    button(page, "Transcribe").click()
    page.wait_for_function("[...document.querySelectorAll('textarea')].some(t => t.disabled && t.value)")
    assert page.get_by_label(LABEL, exact=True).last.input_value() == report.hear(MODEL, str(spoken), "cpu") != ""


def test_what_is_missing_is_said_and_the_report_stands_in_its_tab(page):
    page.get_by_label("What to say").fill(" ")
    button(page, "Speak").click()
    page.get_by_text("give a sentence first").wait_for()
    page.get_by_role("tab", name="Report").click()
    assert page.frame_locator("iframe[title=Report]").locator("table").first.is_visible()


def test_it_can_be_read_and_fits_a_phone(page):
    axe = pytest.importorskip("axe_core_python", reason="axe-core is not installed (extra dev)")
    page.add_script_tag(content=(files(axe) / "axe.min.js").read_text(encoding="utf-8"))
    run = (
        "rules => axe.run({runOnly: rules, iframes: false}).then(found => found.violations.map("
        "one => one.id + ': ' + one.nodes.map(node => node.html + node.any.map(check => check.message))))"
    )
    for tab in ("Speak", "Transcribe"):
        page.get_by_role("tab", name=tab).click()
        assert page.evaluate(run, RULES) == []
    page.set_viewport_size({"width": 390, "height": 800})
    content, place = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert content <= place == 390
