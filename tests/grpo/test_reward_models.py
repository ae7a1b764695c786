"""Shipped rewards, with real models at tiny sizes and a server on loopback."""

import base64
import functools
import gc
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest
import torch
from grpo_samples import chat, picture, policy_of
from PIL import Image
from test_grpo_trainer import moved, redness, state, trainer
from transformers import CLIPConfig, CLIPModel

from transformers_nextflow.training.grpo import RewardError, reward_models
from transformers_nextflow.training.grpo.reward_models import ClipScore, RewardServer, TextMatch, prompt_text
from transformers_nextflow.training.grpo.rewards import Rewards, reward_name


class TinyProcessor:
    """Pictures and texts as a tiny CLIP takes them; its real one needs a vocabulary from the Hub."""

    def __call__(self, images, text, padding, truncation, return_tensors):
        from transformers import BatchFeature

        pixels = torch.stack(
            [torch.tensor(list(image.resize((8, 8)).convert("RGB").tobytes())).view(8, 8, 3).permute(2, 0, 1) / 255
             for image in images]
        )  # fmt: skip
        ids = [[1 + ord(letter) % 40 for letter in each[:6].ljust(6)] + [49] for each in text]
        return BatchFeature({"pixel_values": pixels, "input_ids": torch.tensor(ids)})


def tiny_clip() -> CLIPModel:
    torch.manual_seed(0)
    text = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "eos_token_id": 49}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 8}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()


def test_clip_scores_are_the_models_similarities():
    model = tiny_clip()
    images, prompts = [picture(1), picture(2)], [chat("red"), "blue"]
    inputs = TinyProcessor()(images, ["red", "blue"], True, True, "pt")
    with torch.no_grad():
        expected = model(**inputs).logits_per_image.diagonal()
    scores = ClipScore(model, TinyProcessor(), scaled=True)(images=images, prompts=prompts)
    assert scores == pytest.approx(expected.tolist(), rel=1e-5)
    plain = ClipScore(model, TinyProcessor())(images=images, prompts=prompts)
    assert plain == pytest.approx((expected / model.logit_scale.exp().detach()).tolist(), rel=1e-5)


def test_a_clip_score_may_be_of_a_folder(tmp_path):
    model, asked = tiny_clip(), {"images": [picture(1)], "prompts": ["red"]}
    model.save_pretrained(tmp_path)
    score = ClipScore(str(tmp_path), TinyProcessor())
    assert score(**asked) == pytest.approx(ClipScore(model, TinyProcessor())(**asked), rel=1e-5)
    assert reward_name(functools.partial(score, scaled=True)) == "clip_score"
    assert reward_name(Rewards) == "Rewards" and reward_name(TinyProcessor()) == "TinyProcessor"


def test_what_a_reward_reads_of_a_prompt_is_the_text_of_its_last_message():
    assert prompt_text("a box") == prompt_text([*chat("a cat"), {"role": "user", "content": "a box"}]) == "a box"
    items = [{"type": "text", "text": "make it"}, {"type": "image", "image": None}, {"type": "text", "text": "blue"}]
    assert prompt_text([*chat("a cat"), {"role": "user", "content": items}]) == "make it blue"


def test_text_in_pictures_is_compared_with_what_was_wanted():
    match = TextMatch(lambda image: "Hello World")
    assert match(images=[picture(1)] * 3, text=["hello world", "hello", "xyz"]) == [1.0, 2 * 5 / 15, 0.0]
    with pytest.raises(ValueError, match="no column 'text'"):
        match(images=[picture(1)])


@pytest.fixture
def server():
    """Answers with the scripted statuses, then with the mean brightness of each picture; keeps the requests."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.server.requests.append(body)
            status = self.server.statuses.pop(0) if self.server.statuses else 200
            pictures = [Image.open(io.BytesIO(base64.b64decode(each))) for each in body["images"]]
            answer = {"rewards": [sum(image.resize((1, 1)).getpixel((0, 0))) / 765 for image in pictures]}
            self.send_response(status)
            self.end_headers()
            self.wfile.write(self.server.answer or json.dumps(answer).encode())

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.statuses, server.answer = [], [], None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def client(server, **kwargs) -> RewardServer:
    return RewardServer(f"http://127.0.0.1:{server.server_port}/", timeout=5, backoff=0.01, **kwargs)


def test_a_reward_server_gets_pictures_and_columns_and_is_asked_again(server):
    server.statuses = [503, 500]
    images = [Image.new("RGB", (4, 4), (255, 255, 255)), Image.new("RGB", (4, 4))]
    reward = client(server, columns=["number"])
    assert reward(images=images, prompts=[chat("white"), "black"], number=[3, 4], other=[0, 0]) == [1.0, 0.0]
    assert len(server.requests) == 3
    assert server.requests[0]["prompts"] == ["white", "black"] and server.requests[0]["columns"] == {"number": [3, 4]}


def test_a_reward_server_is_given_twice_the_time_after_each_failure(server, monkeypatch):
    pauses = []
    monkeypatch.setattr(reward_models, "time", SimpleNamespace(sleep=pauses.append))
    server.statuses = [500] * 4
    with pytest.raises(ConnectionError, match="failed 4 times"):
        RewardServer(f"http://127.0.0.1:{server.server_port}/", retries=3)(images=[picture(1)], prompts=["x"])
    assert pauses == [1, 2, 4] and len(server.requests) == 4


@pytest.mark.parametrize(("model_type", "padding"), [("clip", True), ("siglip", "max_length")])
def test_texts_are_padded_as_the_model_was_trained(model_type, padding):
    asked = []

    class Noting(TinyProcessor):
        def __call__(self, *args, **kwargs):
            asked.append((kwargs["padding"], kwargs["truncation"]))
            return super().__call__(*args, **kwargs)

    model = tiny_clip()
    model.config.model_type = model_type
    ClipScore(model, Noting())(images=[picture(1)], prompts=["red"])
    assert asked == [(padding, True)]


def test_a_reward_server_at_fault_is_named(server):
    images, prompts = [picture(1)], ["x"]
    server.statuses = [404]
    with pytest.raises(ValueError, match="answered 404"):
        client(server)(images=images, prompts=prompts)
    assert len(server.requests) == 1
    server.answer = b"[1, 2]"
    with pytest.raises(ValueError, match="must answer"):
        client(server)(images=images, prompts=prompts)
    server.statuses = [500] * 9
    with pytest.raises(ConnectionError, match="failed 3 times, at last with: HTTP Error 500"):
        client(server, retries=2)(images=images, prompts=prompts)
    gone = RewardServer("http://127.0.0.1:9/", retries=1, backoff=0.01)
    with pytest.raises(ConnectionError, match="failed 2 times"):
        gone(images=images, prompts=prompts)
    with pytest.raises(ValueError, match="url must begin with http"):
        RewardServer("file:///etc/passwd")


def test_a_server_that_dies_in_mid_run_loses_no_step(server, tiny_model, tiny_processor, tmp_path):
    """The run goes on exactly when it is back; failures that retries outlast leave no trace."""
    policy = policy_of(tiny_model)
    values = {"max_steps": 4, "reward": client(server, retries=1)}
    server.statuses = [503]
    whole = trainer(policy, tiny_processor, tmp_path / "whole", **values)
    whole.train()
    server.statuses = [200, 200, 500, 500]
    with pytest.raises(RewardError, match="reward_server raised ConnectionError.*HTTP Error 500"):
        trainer(policy, tiny_processor, tmp_path / "died", **values).train()
    again = trainer(policy, tiny_processor, tmp_path / "died", **values)
    again.train(resume_from_checkpoint=True)
    assert not moved(state(whole.model), state(again.model)) and moved(state(policy), state(again.model))


def test_what_is_no_reward_is_named():
    async def fails(**kwargs):
        raise KeyError("score")

    with pytest.raises(RewardError, match="reward function fails raised KeyError: 'score'"):
        Rewards(fails)(1)
    for given, said in (
        ([[1.0]], r"returned \[1.0\] for picture 0"),
        ([1.0, None], "returned 2 rewards for 1 pictures"),
    ):
        with pytest.raises(RewardError, match=f"the reward function <lambda> {said}"):
            Rewards(lambda given=given: given)(1)
    with pytest.raises(ValueError, match="reward_funcs must be functions of pictures, see ClipScore"):
        Rewards([redness, tiny_clip()])


def test_the_thread_of_rewards_that_are_awaited_ends_with_them():
    async def reward(images, **kwargs):
        return [1.0] * len(images)

    before = {*threading.enumerate()}
    rewards = Rewards(reward)
    assert rewards(2, images=[None, None]).tolist() == [[1.0], [1.0]]
    (thread,) = {*threading.enumerate()} - before
    del rewards
    gc.collect()
    thread.join(20)
    assert not thread.is_alive()
