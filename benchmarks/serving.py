"""What a server gives many clients over one: `python -m benchmarks.serving --output benchmarks/results/serving.json`.

The command `serve` runs in a process of its own and is asked over HTTP for pictures, edits of one picture, and
descriptions of it, in turn:

- `throughput`: answers a second of one client, and of `--clients`, each of which asks for its next when it has one;
  the two in turn, fifty requests at a time;
- `processor`: the server's own seconds of processor for each of these answers, whatever else the machine does;
- `batches`: how many requests were answered together, as `/metrics` tells, meanwhile;
- `same`: how many answers are, to the last pixel, those of the same request alone;
- `memory`: the server's resident memory in MiB after each tenth of `--further` requests;
- `terminated`: what became of `--requests` further ones when SIGTERM came in their middle: answered, turned away at
  the closed door, or lost.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from base64 import b64decode, b64encode
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from urllib.request import urlopen

import torch
from openai import APIConnectionError, OpenAI
from PIL import Image

from transformers_nextflow.utils.loading import DEFAULT_MODEL

from .harness import machine, report

ROUND = 50
"""Requests of one client, then of all: in turn, so that what else the machine does slows both."""

PROMPTS = ("red apple, noto", "grinning face, fluent", "blue heart, twemoji", "dog, noto")


class Server:
    """The command `serve` on a free port."""

    def __init__(self, model: str | None, exact: bool, max_batches: int):
        named = [*(() if model is None else ("--model", model)), *(("--exact",) if exact else ())]
        named += ["--max-batches", str(max_batches)]
        command = [sys.executable, "-m", "transformers_nextflow", "serve", "--port", "0", *named]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        found = (re.search(r"http://127\.0\.0\.1:\d+", line) for line in self.process.stderr)
        self.address = next(match[0] for match in found if match)
        self.client = OpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0)
        self.model = self.client.models.list().data[0].id

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *error) -> None:
        self.process.terminate()
        self.process.communicate()

    def ask(self, number: int) -> bytes:
        """Request `number`: three pictures for a prompt, then an edit, then a description, and so on."""
        prompt, seed = PROMPTS[number % len(PROMPTS)], {"seed": number}
        if number % 5 == 4:
            url = {"url": f"data:image/png;base64,{b64encode(PICTURE).decode()}"}
            content = [{"type": "image_url", "image_url": url}, {"type": "text", "text": "describe the picture"}]
            chat = [{"role": "user", "content": content}]
            response = self.client.chat.completions.create(model=self.model, messages=chat, max_tokens=16)
            return response.choices[0].message.content.encode()
        if number % 5 == 3:
            response = self.client.images.edit(image=PICTURE, prompt="make it twemoji", extra_body=seed)
        else:
            response = self.client.images.generate(prompt=prompt, extra_body=seed)
        return b64decode(response.data[0].b64_json)

    def batches(self) -> Counter:
        """How many requests were drawn, in how many batches, and in how many of at most so many."""
        text = urlopen(f"{self.address}/metrics").read().decode()
        pattern = r'^nextflow_batch_requests_(?:bucket\{le="(\d+)\.0"\}|(count|sum)) (\d+)'
        names = {"count": "batches", "sum": "requests"}
        found = re.findall(pattern, text, re.MULTILINE)
        return Counter({names.get(other, f"at most {size}"): int(number) for size, other, number in found})

    def processor(self) -> float:
        """Seconds of processor so far, of all threads."""
        user, system = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> float:
        (line,) = re.findall(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{self.process.pid}/status").read_text())
        return round(int(line) / 1024, 1)


def white_picture() -> bytes:
    file = BytesIO()
    Image.new("RGB", (64, 64), "white").save(file, format="PNG")
    return file.getvalue()


PICTURE = white_picture()


def asked(server: Server, numbers: range, clients: int) -> tuple[list[bytes], float]:
    """The answers to some requests, and seconds."""
    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as threads:
        answers = list(threads.map(server.ask, numbers))
    return answers, time.perf_counter() - start


def terminated(server: Server, count: int, clients: int) -> dict[str, int]:
    """What became of requests in whose middle the server was told to end."""

    def outcome(number: int) -> str:
        if number == count // 2:
            server.process.terminate()
        try:
            server.ask(number)
        except APIConnectionError as error:
            return "turned away" if type(error.__cause__).__name__ == "ConnectError" else "lost"
        return "answered"

    with ThreadPoolExecutor(clients) as threads:
        return dict(Counter(threads.map(outcome, range(count))))


def measure(server: Server, clients: int, num_requests: int, num_further: int) -> dict:
    asked(server, range(5), 1)  # warm
    answers, seconds, processor, batches = ({1: [], clients: []}, Counter(), Counter(), Counter())
    for start in range(0, num_requests, ROUND):
        for count in answers:
            before, spent = server.batches(), server.processor()
            some, took = asked(server, range(start, min(start + ROUND, num_requests)), count)
            answers[count] += some
            seconds[count] += took
            processor[count] += server.processor() - spent
            batches += server.batches() - before if count == clients else Counter()
    alone, together = answers.values()
    one, many = seconds.values()
    memory = [server.memory()]
    for tenth in range(10):
        asked(server, range(tenth * num_further // 10, (tenth + 1) * num_further // 10), clients)
        memory.append(server.memory())
    return {
        "clients": clients,
        "requests": num_requests,
        "throughput": {"one": round(num_requests / one, 2), "many": round(num_requests / many, 2)},
        "many_over_one": round(one / many, 2),
        "processor": {
            "one": round(processor[1] / num_requests, 4),
            "many": round(processor[clients] / num_requests, 4),
            "one_over_many": round(processor[1] / processor[clients], 2),
        },
        "batches": dict(batches),
        "same": sum(a == b for a, b in zip(alone, together)),
        "further_requests": num_further,
        "memory": memory,
        "terminated": terminated(server, num_requests, clients),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="NAME", help="default: the repository's checkpoint")
    parser.add_argument("--exact", action="store_true", help="as of the server")
    parser.add_argument(
        "--max-batches", type=int, default=1, metavar="N", help="as of the server; with OMP_NUM_THREADS=1"
    )
    parser.add_argument("--clients", type=int, default=16, metavar="N", help="default: %(default)s")
    parser.add_argument("--requests", type=int, default=200, metavar="N", help="default: %(default)s")
    parser.add_argument("--further", type=int, default=1000, metavar="N", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--output", type=Path, metavar="JSON", help="also write it")
    args = parser.parse_args()
    with Server(args.model, args.exact, args.max_batches) as server:
        result = measure(server, args.clients, args.requests, args.further)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = {"model": Path(args.model or DEFAULT_MODEL).name, "exact": args.exact, "max_batches": args.max_batches}
    report({"machine": machine(device), **settings, **result}, args.json, args.output)


if __name__ == "__main__":
    main()
