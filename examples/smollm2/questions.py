"""Questions that no training shows, put to models that share a text tokenizer."""

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from transformers_nextflow import NextFlowProcessor

QUESTIONS = ("What is the capital of France?", "Name three primary colors.", "Why is the sky blue?")


@torch.no_grad()
def answers(
    models: Mapping[str, PreTrainedModel], rows: int, processor: NextFlowProcessor, max_new_tokens: int
) -> list[dict]:
    """Each question with every model's greedy answer, and how far its logits of the question are from the first's.

    Args:
        models: by name; the first is what the others are compared with.
        rows: of the text vocabulary that all of them have.
    """
    results = []
    for question in QUESTIONS:
        inputs = processor.apply_chat_template([{"role": "user", "content": question}])
        logits, said = {}, {}
        for name, model in models.items():
            logits[name] = model(**inputs).logits[..., :rows]
            sequence = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)[0]
            said[name] = processor.decode(sequence[inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        source, *others = logits
        differences = {name: (logits[name] - logits[source]).abs().max().item() for name in others}
        results.append({"question": question, "answers": said, "largest difference of logits": differences})
    return results
