"""The app of the browser, by Gradio's client and in headless Chromium."""

import re
import shutil

import pytest
import torch
from PIL import Image, ImageChops

gradio_client = pytest.importorskip("gradio_client", reason="the extra [app] is not installed")
pytest.importorskip("gradio", reason="the extra [app] is not installed")

from app import CSS, Studio, create_app  # noqa: E402
from transformers_nextflow.processing_nextflow import user_message  # noqa: E402
from transformers_nextflow.text_generation import text_sampling  # noqa: E402


@pytest.fixture(scope="module")
def address(tiny_model, tiny_processor):
    app = create_app(tiny_model, tiny_processor)
    _, address, _ = app.launch(server_port=None, show_error=True, css=CSS, prevent_thread_lock=True, quiet=True)
    yield address
    app.close()


@pytest.fixture(scope="module")
def client(address, tmp_path_factory):
    return gradio_client.Client(address, verbose=False, download_files=str(tmp_path_factory.mktemp("downloads")))


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.linear_gradient("L").resize((24, 24)).convert("RGB").save(path)
    return path


def drawn(model, processor, text, *pictures, **settings) -> list[Image.Image]:
    """The picture after each of its scales, by the model itself."""
    content = [*({"type": "image", "image": picture} for picture in pictures), {"type": "text", "text": text}]
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], generation_mode="image")
    codes = []
    model.generate(**inputs, generation_mode="image", on_scale_end=lambda *told: codes.append(told[2]), **settings)
    grid = {len(codes[-1]): model.model.schedules.by_size(settings.get("height", 24), settings.get("width", 24))}
    (schedule,) = grid.values()
    previews = [model.decode_preview(each, schedule.final_grid)[None] for each in codes]
    return [processor.post_process_image(preview)[0] for preview in previews]


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.size == b.size and ImageChops.difference(a.convert("RGB"), b.convert("RGB")).getbbox() is None


def test_draws_with_a_preview_of_every_scale(client, tiny_model, tiny_processor):
    job = client.submit("a red circle", "32x16", 2.0, 7, False, api_name="/draw")
    job.result(timeout=120)
    pictures = [Image.open(picture) for picture, _, _ in job.outputs()]
    expected = drawn(tiny_model, tiny_processor, "a red circle", seed=7, guidance_scale=2.0, height=16, width=32)
    assert len(pictures) == len(expected) == 3
    assert all(map(same, pictures, expected))
    assert [seed for _, _, seed in job.outputs()] == [7, 7, 7]


def test_edits(client, photo, tiny_model, tiny_processor):
    picture, _, seed = client.predict(gradio_client.handle_file(photo), "make it red", 3.0, 4, False, api_name="/edit")
    expected = drawn(tiny_model, tiny_processor, "make it red", Image.open(photo), seed=4, guidance_scale=3.0)[-1]
    assert seed == 4 and same(Image.open(picture), expected)


def test_seeds_are_new_if_asked(client):
    seeds = [client.predict("a", "24x24", 1.0, 0, True, api_name="/draw")[2] for _ in range(2)]
    assert seeds[0] != seeds[1]


def test_describes(client, photo, tiny_model, tiny_processor):
    answer = client.predict(gradio_client.handle_file(photo), "what is it?", api_name="/describe")
    content = [{"type": "image", "image": Image.open(photo)}, {"type": "text", "text": "what is it?"}]
    inputs = tiny_processor.apply_chat_template([{"role": "user", "content": content}])
    ids = tiny_model.generate(**inputs, **text_sampling(tiny_model, tiny_processor, 128))
    (text,) = tiny_processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == text.strip() != ""


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda client: client.predict(" ", "24x24", 1.0, 0, True, api_name="/draw"), "Please give a prompt first."),
        (lambda client: client.predict(None, "x", 1.0, 0, True, api_name="/edit"), "Please give a picture first."),
        (lambda client: client.predict(None, "x", api_name="/describe"), "Please give a picture first."),
        (lambda client: client.predict("a", "24x24", 1.0, 2**64, False, api_name="/draw"), "seed must be in"),
        (lambda client: client.predict("a " * 5_000, "24x24", 1.0, 0, True, api_name="/draw"), "the model has 4096"),
    ],
)
def test_errors_are_in_words(client, call, message):
    with pytest.raises(Exception, match=re.escape(message)):
        call(client)


def test_a_text_of_a_chat_ends_before_its_picture(tiny_model, tiny_processor):
    tokens = [tiny_processor.tokenizer(text)["input_ids"] for text in ("red circle", "a star")]
    end = tiny_processor.tokenizer.eos_token_id
    steps = iter([*tokens[0], tiny_model.config.boi_token_id, *tokens[1], end])

    def say(module, args, logits):
        return logits.index_fill(-1, torch.tensor(next(steps)), 1e3)

    handle = tiny_model.lm_head.register_forward_hook(say)
    answers = [list(parts) for parts in Studio(tiny_model, tiny_processor).chat([user_message("a")], seed=0)]
    handle.remove()
    first, picture, second = answers[-1]
    assert (first, second) == ("red circle", "a star") and isinstance(picture, Image.Image)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as running:
        try:
            browser = running.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium: {error.message.splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    page = browser.new_page()
    page.goto(address)
    yield page
    page.close()


def test_a_visitor_draws_edits_and_describes(page):
    """By examples alone, then the slider over scales; nothing is written by hand."""
    page.get_by_role("button", name="red heart, fluent").click()
    page.get_by_role("button", name="Draw", exact=True).click()
    picture = page.locator("#draw-picture img")
    picture.wait_for(timeout=60_000)
    slider = page.locator("#draw-scales input[type=range]")
    page.wait_for_function("e => e.max == 3 && e.value == 3", arg=slider.element_handle())
    last = picture.get_attribute("src")
    slider.fill("1")
    page.wait_for_function("last => document.querySelector('#draw-picture img').src != last", arg=last)
    page.get_by_role("button", name="Edit it").click()
    page.get_by_label("Instruction").fill("make it blue")
    page.get_by_role("button", name="Edit", exact=True).click()
    page.locator("#edit-picture img").wait_for(timeout=60_000)
    page.get_by_role("tab", name="Draw").click()
    page.get_by_role("button", name="Describe it").click()
    page.get_by_role("button", name="Describe", exact=True).click()
    page.wait_for_function("() => document.querySelector('#answer textarea').value != ''", timeout=60_000)


@pytest.fixture
def eager(tiny_model):
    """A model that draws as soon as it may."""
    eager = torch.zeros(tiny_model.lm_head.out_features)
    eager[tiny_model.config.boi_token_id] = 1e3
    handle = tiny_model.lm_head.register_forward_hook(lambda module, args, logits: logits + eager)
    yield
    handle.remove()


def test_a_visitor_chats(page, eager):
    """In two turns; the second one answers to the pictures of the first, too."""
    page.get_by_role("tab", name="Chat").click()
    box = page.locator("textarea:visible").last
    box.fill(" ")
    box.press("Enter")
    page.get_by_text("Please give a message first.").wait_for(timeout=60_000)
    for turn in (1, 2):
        page.wait_for_function("box => !box.disabled", arg=box.element_handle(), timeout=60_000)
        box.fill("hello")
        box.press("Enter")
        page.wait_for_function("turn => document.querySelectorAll('.user.message').length == turn", arg=turn)
        page.wait_for_function("n => document.querySelectorAll('.bot.message img').length == n", arg=4 * turn)
        page.locator(".stop-button").wait_for(state="detached", timeout=60_000)
    assert page.locator(".toast-body").count() == 0


def test_a_visitor_reads_what_is_missing(page):
    page.get_by_role("button", name="Draw", exact=True).click()
    page.get_by_text("Please give a prompt first.").wait_for(timeout=60_000)


def test_what_is_drawn_stays_where_something_is_missing(page):
    page.get_by_role("button", name="red heart, fluent").click()
    page.get_by_role("button", name="Draw", exact=True).click()
    page.locator("#draw-picture img").wait_for(timeout=60_000)
    page.get_by_label("Prompt").fill("")
    page.get_by_role("button", name="Draw", exact=True).click()
    page.get_by_text("Please give a prompt first.").wait_for(timeout=60_000)
    assert page.locator("#draw-picture img").is_visible() and page.locator("#draw-picture .error").count() == 0


def test_on_a_phone_what_comes_is_seen(page):
    page.set_viewport_size({"width": 390, "height": 844})
    page.get_by_role("tab", name="Edit").click()
    page.get_by_role("button", name="make it blue").click()
    page.get_by_role("button", name="Edit", exact=True).click()
    page.locator("#edit-picture img").wait_for(timeout=60_000)
    ends = "document.getElementById('edit-picture').getBoundingClientRect().bottom"
    page.wait_for_function(f"() => {ends} <= window.innerHeight + 1", timeout=60_000)
