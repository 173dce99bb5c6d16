"""The app in Debian's Chromium, headless, through Playwright: upload, sample, steer, paste, compare, cancel, errors."""

import importlib.util
import re
import shutil
import socket

import pytest
import torch
from PIL import Image
from test_app import choice, runs, session  # noqa: F401  fixtures

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
WAIT = 120_000
MISSING = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
MISSING += [] if CHROMIUM else ["chromium"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"the browser test needs {', '.join(MISSING)}"),
]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def visit(session):  # noqa: F811
    """A function that opens the app in a new window, and the requests that all windows made."""
    from playwright.sync_api import sync_playwright

    from featinv.report.app.layout import serve

    torch.set_num_threads(1)
    served, address = serve(session, port=_free_port(), wait=False)
    requests: list[str] = []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])

        def open_page():
            page = browser.new_page(viewport={"width": 1400, "height": 1200})
            page.set_default_timeout(WAIT)
            page.on("request", lambda request: requests.append(request.url))
            page.goto(address)
            page.wait_for_selector("#draw")
            return page

        yield open_page, requests
        browser.close()
    served.close()


@pytest.fixture(scope="module")
def page(visit):
    return visit[0]()


def _wait_for_status(page, text: str) -> None:
    page.wait_for_function("([text]) => document.querySelector('#status').innerText.includes(text)", arg=[text])


def _images(page, name: str) -> int:
    return page.locator(f"#{name} img").count()


def _tab(page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def test_upload_and_sample(page, tmp_path) -> None:
    before = page.locator("#picture img").get_attribute("src")
    Image.new("RGB", (90, 60), (200, 30, 30)).save(tmp_path / "red.png")
    page.set_input_files("#picture-file input[type=file]", tmp_path / "red.png")
    page.wait_for_function("before => document.querySelector('#picture img').src !== before", arg=before)
    page.click("#draw")
    _wait_for_status(page, "Done")
    assert _images(page, "samples") >= 5 and _images(page, "maps") >= 2 and _images(page, "explained") >= 2


def test_a_wrong_upload_is_answered_in_words(page, tmp_path) -> None:
    before = page.locator("#picture img").get_attribute("src")
    (tmp_path / "notes.png").write_text("Dear reader")
    page.locator("#picture-file button[aria-label*='lear'], #picture-file button[aria-label*='emove']").first.click()
    page.set_input_files("#picture-file input[type=file]", tmp_path / "notes.png")
    page.get_by_text(re.compile("notes.png: it is not a picture")).first.wait_for()
    assert page.locator("#picture img").get_attribute("src") == before


def test_steer(page) -> None:
    _tab(page, "Steering")
    page.locator("#strength-0 input[type=number]").fill("3")
    page.locator("#strength-0 input[type=number]").press("Tab")
    page.click("#steer button, button#steer")
    page.locator("#steered img").nth(2).wait_for()
    _wait_for_status(page, "Done")
    assert page.get_by_text("100%:").count()


def test_sliders_at_zero_are_an_error_in_words(page) -> None:
    _tab(page, "Steering")
    page.locator("#strength-0 input[type=number]").fill("0")
    page.locator("#strength-0 input[type=number]").press("Tab")
    page.click("button#steer")
    _wait_for_status(page, "move its slider")


def test_paste_and_compare(page) -> None:
    _tab(page, "Paste")
    page.click("button#paste")
    page.locator("#pasted img").nth(2).wait_for()
    _tab(page, "Methods")
    page.click("button#compare")
    page.locator("#compared img").nth(2).wait_for()


def test_cancel_ends_the_work_and_the_app_goes_on(page, session, choice) -> None:  # noqa: F811
    inverter = session.models.load(choice).inverter
    _tab(page, "Samples")
    inverter.num_inference_steps = 999
    try:
        page.click("button#draw")
        _wait_for_status(page, "of 999")
        page.click("button#cancel")
        _wait_for_status(page, "Cancelled")
    finally:
        inverter.num_inference_steps = 3
    page.click("button#draw")
    _wait_for_status(page, "Done")


def test_choosing_a_layer_changes_the_lists(page) -> None:
    page.click("#layer input")
    page.get_by_role("option").nth(0).click()
    page.wait_for_function("() => document.querySelector('#inverter input').value === 'optimisation'")
    _tab(page, "Methods")
    assert page.locator("#methods input[type=checkbox]").count() == 1


def test_nothing_is_fetched_from_elsewhere(page, visit) -> None:
    elsewhere = {u for u in visit[1] if not re.match(r"(http://(127\.0\.0\.1|localhost)[:/]|data:|blob:)", u)}
    assert not elsewhere
