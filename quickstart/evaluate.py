"""What the trained models can do: exact match by greedy decoding, and mean log-probability of answers."""

import math
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from quickstart.models import IGNORED, collate, encode
from quickstart.task import Row, solve

BATCH_SIZE = 250


def answers(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, rows: list[Row]) -> list[str]:
    """Greedy answers to the rows' prompts."""
    return [text for (text,) in _generate(model, tokenizer, rows, do_sample=False)]


def samples(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, rows: list[Row], *, count: int, seed: int
) -> list[list[str]]:
    """`count` answers to each of the rows' prompts, drawn from the model's own distribution."""
    torch.manual_seed(seed)
    return _generate(model, tokenizer, rows, do_sample=True, top_k=0, num_return_sequences=count)


@torch.inference_mode()
def _generate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, rows: list[Row], **options: Any
) -> list[list[str]]:
    prompts = [
        tokenizer.apply_chat_template(row.messages()[:-1], tokenize=False, add_generation_prompt=True) for row in rows
    ]
    count = options.get("num_return_sequences", 1)
    found = []
    for start in range(0, len(rows), BATCH_SIZE):
        batch = tokenizer(
            prompts[start : start + BATCH_SIZE],
            padding=True,
            padding_side="left",
            add_special_tokens=False,
            return_tensors="pt",
            return_token_type_ids=False,
        )
        output = model.generate(**batch, max_new_tokens=16, **options)
        texts = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        found += [texts[at : at + count] for at in range(0, len(texts), count)]
    return found


def exact_match(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, rows: list[Row]) -> float:
    """Share of rows answered exactly right."""
    found = answers(model, tokenizer, rows)
    return sum(text == solve(row.prompt) for text, row in zip(found, rows, strict=True)) / len(rows)


@torch.inference_mode()
def mean_logps(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, rows: list[Row]) -> list[float]:
    """Mean log-probability, nats per token, of each row's answer, the end of the turn included."""
    found: list[float] = []
    for start in range(0, len(rows), BATCH_SIZE):
        encoded = [encode(tokenizer, row) for row in rows[start : start + BATCH_SIZE]]
        found += sequence_mean_logps(model, collate(encoded, tokenizer.pad_token_id)).tolist()
    return found


def taus(preference_scores: list[float], logps: list[float]) -> list[float]:
    """Each row's weight in PoFT's gradient, sigmoid(r_ref - r_policy)."""
    return [1 / (1 + math.exp(policy - score)) for score, policy in zip(preference_scores, logps, strict=True)]


def sequence_mean_logps(model: LlamaForCausalLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(B,) mean log-probabilities of the labelled tokens of a batch from `collate`."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    counted = labels != IGNORED
    logps = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return (logps * counted).sum(-1) / counted.sum(-1)
