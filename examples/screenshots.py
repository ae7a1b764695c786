"""Screenshots of the app by headless Chromium: `python -m examples.screenshots`, with extra `[app]` and playwright.

A visitor draws, edits, describes and chats, at the width of a desktop and of a phone; it prints how long each took.
"""

import shutil
import time
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from app import CSS, create_app
from transformers_nextflow.utils.loading import load_model

SIZES = {"desktop": (1280, 800), "phone": (390, 844)}
FOLDER = Path("docs/app")


def visit(page: Page, name: str) -> None:
    def step(what: str, act, done: str, shot: bool = False) -> None:
        started = time.perf_counter()
        act()
        page.wait_for_function(done)
        print(f"{name}: {what} in {time.perf_counter() - started:.1f} s", flush=True)
        if shot:
            page.wait_for_timeout(1_000)  # the picture's own fading in
            page.screenshot(path=FOLDER / f"{what}-{name}.png", full_page=True)

    button = lambda name: page.get_by_role("button", name=name, exact=True).click  # noqa: E731
    full = "() => document.querySelector('#{} input[type=range]')?.value == 7"
    page.get_by_role("button", name="red heart, fluent", exact=True).click()
    step("draw", button("Draw"), full.format("draw-scales"), shot=True)
    button("Edit it")()
    page.get_by_label("Instruction").fill("make it blue")
    step("edit", button("Edit"), full.format("edit-scales"), shot=True)
    page.get_by_role("tab", name="Draw").click()
    button("Describe it")()
    step("describe", button("Describe"), "() => document.querySelector('#answer textarea').value != ''")
    page.get_by_role("tab", name="Chat").click()
    page.get_by_placeholder("Message").fill("think first: fruit, red, noto")
    ended = "() => document.querySelector('.bot.message img') && !document.querySelector('.stop-button')"
    step("chat", lambda: page.get_by_placeholder("Message").press("Enter"), ended, shot=True)


def main() -> None:
    app = create_app(*load_model())
    _, address, _ = app.launch(server_port=None, css=CSS, prevent_thread_lock=True, quiet=True)
    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, (width, height) in SIZES.items():
            page = browser.new_page(viewport={"width": width, "height": height})
            page.set_default_timeout(60_000)
            page.goto(address)
            visit(page, name)
            page.close()
        browser.close()
    app.close()


if __name__ == "__main__":
    main()
