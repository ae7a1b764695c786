"""NextFlow in a browser: `python app.py`. Draws, edits, describes and chats; a picture shows after each of its scales.

As it stands this file is the app of a Space of Hugging Face, too, see docs/app.md.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import Any

import gradio as gr
from PIL import Image

from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowProcessor
from transformers_nextflow.image_processing_nextflow import open_picture
from transformers_nextflow.interleaved import AnswerStreamer
from transformers_nextflow.processing_nextflow import user_message
from transformers_nextflow.rewriting import Rewriting
from transformers_nextflow.text_generation import text_sampling
from transformers_nextflow.utils.loading import load_model

PROMPTS = ["red heart, fluent", "red apple, noto", "cat face, twemoji", "sun, fluent flat", "pizza, noto classic"]
INSTRUCTIONS = ["make it blue", "make it green", "make it yellow", "make it fluent flat"]
QUESTIONS = ["describe the picture", "what is it?", "which style is it?"]
CHATS = ["think first: fruit, red, noto", "show the hours from one to three, noto", "two cats, noto"]
HEART = str(Path(__file__).parent / "docs" / "app" / "heart.png")  # PROMPTS[0], seed 0
SEEDS = 2**31
MAX_TOKENS, MAX_IMAGES = 128, 4  # of an answer
CSS = ".picture img {width: 100%; object-fit: contain}"  # as large as there is room, whatever its pixels
DONE = object()


def streamed(work: Callable[[Callable[[Any], None]], None]) -> Iterator:
    """What `work(put)` puts, as it comes. Where nobody reads on, it ends at its next put."""
    items, unread = SimpleQueue(), Event()

    def put(item) -> None:
        if unread.is_set():
            raise InterruptedError("nobody reads on")
        items.put(item)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work, put)
        future.add_done_callback(lambda _: items.put(DONE))
        try:
            yield from iter(items.get, DONE)
            future.result()
        finally:
            unread.set()


class Words(AnswerStreamer):
    """Puts text as it is written."""

    def __init__(self, processor: NextFlowProcessor, put: Callable[[str], None]):
        super().__init__(processor)
        self.on_finalized_text = lambda text, stream_end=False: put(text)


class Studio:
    """A model and its processor, by what a visitor asks for."""

    def __init__(self, model: NextFlowForConditionalGeneration, processor: NextFlowProcessor):
        self.model, self.processor = model, processor
        table = model.model.schedules
        self.sizes = ["{1}x{0}".format(*table.image_size(schedule)) for schedule in table.of_level()]

    def _inputs(self, chat: list[dict], mode: str):
        inputs = self.processor.apply_chat_template(chat, generation_mode=mode, sanitize_control_tokens=True)
        return inputs.to(self.model.device)

    def _preview(self, inputs, **settings) -> Callable:
        """What turns the codes so far of a picture that is drawn into a picture."""
        grid = self.model.drawn_grid(inputs.get("image_grid_hw"), **settings)
        show = lambda codes: self.processor.post_process_image(self.model.decode_preview(codes, grid)[None])[0]  # noqa: E731
        return show

    def draw(self, text: str, pictures: list[Image.Image], seed: int, **settings) -> Iterator[Image.Image]:
        """The picture after each of its scales; the last one is the picture."""
        inputs = self._inputs([user_message(text, pictures)], "image")
        preview = self._preview(inputs, **settings)

        def work(put) -> None:
            tell = lambda picture, scale, codes: put(preview(codes))  # noqa: E731
            self.model.generate(**inputs, generation_mode="image", seed=seed, on_scale_end=tell, **settings)

        return streamed(work)

    def describe(self, picture: Image.Image, question: str) -> Iterator[str]:
        """Words of the answer."""
        inputs = self._inputs([user_message(question, [picture])], "text")
        sampling = text_sampling(self.model, self.processor, MAX_TOKENS)
        return streamed(lambda put: self.model.generate(**inputs, **sampling, streamer=Words(self.processor, put)))

    def chat(self, chat: list[dict], seed: int) -> Iterator[list[str | Image.Image]]:
        """The answer so far, texts and pictures in turn."""
        inputs = self._inputs(chat, "interleaved")
        preview = self._preview(inputs)

        def work(put) -> None:
            self.model.generate(
                **inputs,
                **text_sampling(self.model, self.processor, MAX_TOKENS),
                generation_mode="interleaved",
                max_new_images=MAX_IMAGES,
                seed=seed,
                streamer=Words(self.processor, put),
                on_scale_end=lambda row, scale, codes: put((scale, preview(codes))),
            )

        parts = []
        for item in streamed(work):
            if isinstance(item, str):
                if parts and isinstance(parts[-1], str):
                    parts[-1] += item
                elif item.strip():
                    parts.append(item)
            else:
                scale, picture = item
                parts[len(parts) if scale == 0 else -1 :] = [picture]
            yield parts


def needing(*names: str) -> Callable[..., list[dict]]:
    """What says beside the first boxes of a page, by their names, whether something stands in them."""

    def check(*values) -> list[dict]:
        texts = [value["text"] if isinstance(value, dict) else value for value in values]
        has = [text is not None and not (isinstance(text, str) and not text.strip()) for text in texts[: len(names)]]
        checks = [gr.validate(given, f"Please give {name} first.") for name, given in zip(names, has)]
        return [*checks, *(gr.validate(True, "") for _ in values[len(names) :])]

    return check


def create_app(
    model: NextFlowForConditionalGeneration, processor: NextFlowProcessor, rewriting: Rewriting | None = None
) -> gr.Blocks:
    """The page; its calls by name are `/draw`, whose prompts may be rewritten, `/edit`, `/describe` and `/chat`."""
    rewriting = rewriting or Rewriting()
    studio = Studio(model, processor)

    def paint(text: str, pictures: list[Image.Image], seed: float, new_seed: bool, **settings):
        seed, previews = random.randrange(SEEDS) if new_seed else int(seed), []
        for preview in studio.draw(text, pictures, seed, **settings):
            previews = [*previews, preview]
            yield preview, gr.Slider(value=len(previews), maximum=max(len(previews), 2)), seed, previews

    def draw(prompt, size, guidance_scale, seed, new_seed):
        width, height = map(int, size.split("x"))
        settings = {"height": height, "width": width, "guidance_scale": guidance_scale}
        yield from paint(rewriting(prompt), [], seed, new_seed, **settings)

    def edit(picture, instruction, guidance_scale, seed, new_seed):
        yield from paint(instruction, [picture], seed, new_seed, guidance_scale=guidance_scale)

    def describe(picture, question):
        text = ""
        for words in studio.describe(picture, question):
            text += words
            yield text.strip()

    def chat(message: dict, history: list[dict], seed: float):
        pictures = [open_picture(path) for path in message["files"]]
        asked = user_message(message["text"], pictures)
        for parts in studio.chat([*map(told, history), asked], int(seed)):
            yield [part.strip() if isinstance(part, str) else gr.Image(part, format="png") for part in parts]

    def told(message: dict) -> dict:
        """A message of the history as the processor reads it."""
        content = [
            {"type": "text", "text": part["text"]}
            if part["type"] == "text"
            else {"type": "image", "image": open_picture(part["file" if part["type"] == "file" else "value"]["path"])}
            for part in message["content"]
        ]
        return {"role": message["role"], "content": content}

    def picture_box(label: str, **kwargs) -> gr.Image:
        """As large as there is room."""
        return gr.Image(label=label, type="pil", format="png", elem_classes="picture", height=360, **kwargs)

    def seen_when_new(output: gr.Image | gr.Textbox) -> None:
        """Lets a page scroll to what has come, on screens that do not show all of it."""
        scroll = "scrollIntoView({behavior: 'smooth', block: 'nearest'})"
        output.change(None, js=f"() => document.getElementById('{output.elem_id}').{scroll}")

    def result(name: str):
        """A picture, and how it came about."""
        picture = picture_box("Picture", interactive=False, elem_id=f"{name}-picture")
        slider = gr.Slider(1, 2, 1, step=1, label="Scales, from coarse to fine", elem_id=f"{name}-scales")
        previews = gr.State([])
        seen_when_new(picture)
        shown = lambda previews, scale: previews[scale - 1] if scale <= len(previews) else None  # noqa: E731
        slider.input(shown, [previews, slider], picture, api_visibility="private", show_progress="hidden")
        return picture, slider, previews

    def examples(texts: list[str], box: gr.Textbox) -> None:
        """What fills a box at once: in the browser, so that nothing can be pressed before it is there."""
        chosen = gr.Dataset(components=[box], samples=[[text] for text in texts], label="Examples")
        chosen.click(None, chosen, box, js=f"index => {json.dumps(texts)}[index]")

    def seed_box(**kwargs) -> gr.Number:
        info = "The same seed and settings draw the same pictures again."
        return gr.Number(0, precision=0, label="Seed", info=info, **kwargs)

    def settings_box():
        guidance_scale = gr.Slider(1, 10, guidance, step=0.1, label="Guidance (1 is off)")
        return guidance_scale, seed_box(), gr.Checkbox(True, label="A new seed each time")

    guidance = model.config.image_generation["guidance_scale"]
    guidance = guidance if isinstance(guidance, int | float) else 3.0  # of a schedule over scales
    with gr.Blocks(title="NextFlow") as app:
        gr.Markdown("# NextFlow\nOne model for text and pictures. Choose an example, or write your own.")
        with gr.Tabs() as tabs:
            with gr.Tab("Draw", id="draw"), gr.Row():
                with gr.Column():
                    prompt = gr.Textbox(label="Prompt", placeholder=PROMPTS[0])
                    examples(PROMPTS, prompt)
                    draw_button = gr.Button("Draw", variant="primary")
                    with gr.Accordion("Settings", open=False):
                        size = gr.Dropdown(studio.sizes, value=studio.sizes[0], label="Width x height in pixels")
                        settings = settings_box()
                with gr.Column():
                    drawn, slider, previews = result("draw")
                    with gr.Row():
                        to_edit, to_describe = gr.Button("Edit it"), gr.Button("Describe it")
                gr.on(
                    [draw_button.click, prompt.submit],
                    draw,
                    [prompt, size, *settings],
                    [drawn, slider, settings[1], previews],
                    show_progress_on=drawn,
                    api_name="draw",
                    validator=needing("a prompt"),
                )
            with gr.Tab("Edit", id="edit"), gr.Row():
                with gr.Column():
                    source = picture_box("Picture to edit", value=HEART)
                    instruction = gr.Textbox(label="Instruction", placeholder=INSTRUCTIONS[0])
                    examples(INSTRUCTIONS, instruction)
                    edit_button = gr.Button("Edit", variant="primary")
                    with gr.Accordion("Settings", open=False):
                        settings = settings_box()
                with gr.Column():
                    edited, slider, previews = result("edit")
                    again = gr.Button("Edit this one")
                gr.on(
                    [edit_button.click, instruction.submit],
                    edit,
                    [source, instruction, *settings],
                    [edited, slider, settings[1], previews],
                    show_progress_on=edited,
                    api_name="edit",
                    validator=needing("a picture", "an instruction"),
                )
            with gr.Tab("Describe", id="describe"), gr.Row():
                with gr.Column():
                    described = picture_box("Picture to describe", value=HEART)
                    question = gr.Textbox(QUESTIONS[0], label="Question")
                    examples(QUESTIONS, question)
                    describe_button = gr.Button("Describe", variant="primary")
                answer = gr.Textbox(label="Answer", lines=3, elem_id="answer")
                seen_when_new(answer)
                gr.on(
                    [describe_button.click, question.submit],
                    describe,
                    [described, question],
                    answer,
                    api_name="describe",
                    validator=needing("a picture", "a question"),
                )
            with gr.Tab("Chat", id="chat"):
                gr.ChatInterface(
                    chat,
                    multimodal=True,
                    textbox=gr.MultimodalTextbox(file_types=["image"], file_count="multiple", placeholder="Message"),
                    examples=[[{"text": each, "files": []}, None] for each in CHATS],
                    additional_inputs=[seed_box(render=False)],
                    additional_inputs_accordion=gr.Accordion("Settings", open=False, render=False),
                    validator=lambda message: needing("a message")(message)[0],
                    cache_examples=False,
                    api_name="chat",
                )
        for button, picture, target, tab in (
            (to_edit, drawn, source, "edit"),
            (to_describe, drawn, described, "describe"),
            (again, edited, source, "edit"),
        ):
            passed_on = lambda picture, tab=tab: (picture, gr.Tabs(selected=tab))  # noqa: E731
            button.click(passed_on, picture, [target, tabs], api_visibility="private")
    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id (default: the repository's checkpoint)")
    parser.add_argument("--host", default="127.0.0.1", help="the default lets in this machine alone")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--rewrite", metavar="ADDRESS", help="of a chat model's API like OpenAI's, for prompts")
    parser.add_argument("--rewrite-model", metavar="NAME", help="the chat model")
    arguments = parser.parse_args()
    rewriting = Rewriting(arguments.rewrite, arguments.rewrite_model)
    app = create_app(*load_model(arguments.model), rewriting)
    app.launch(server_name=arguments.host, server_port=arguments.port, show_error=True, css=CSS)


if __name__ == "__main__":
    main()
