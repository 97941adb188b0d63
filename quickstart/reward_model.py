"""Small reward models: a trained language model's body with a new head of one label, taught by pairs of answers."""

from collections.abc import Iterator
from copy import copy

import torch
from torch.nn.functional import logsigmoid
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerBase

from quickstart.models import Encoded, Recipe, batches, collate, encode, optimise
from quickstart.task import Row

BATCH_SIZE = 250


def make_reward_model(body: LlamaForCausalLM, seed: int) -> LlamaForSequenceClassification:
    """A sequence classifier with one label that begins with the body of a language model."""
    torch.manual_seed(seed)
    config = copy(body.config)
    config.num_labels = 1
    model = LlamaForSequenceClassification(config)
    model.model.load_state_dict(body.model.state_dict())
    return model


def fit_reward_model(
    model: LlamaForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[tuple[Row, Row]],
    recipe: Recipe,
    seed: int,
) -> None:
    """Training with the Bradley-Terry loss, `-log sigmoid(r(x, y_1) - r(x, y_2))`, on (better, worse) rows."""
    encoded = [(encode(tokenizer, better), encode(tokenizer, worse)) for better, worse in pairs]

    def losses() -> Iterator[torch.Tensor]:
        for batch in batches(encoded, recipe, seed):
            sequences = [better for better, _ in batch] + [worse for _, worse in batch]
            better, worse = _rewards(model, sequences, tokenizer.pad_token_id).chunk(2)
            yield -logsigmoid(better - worse).mean()

    optimise(model, losses(), recipe)


@torch.inference_mode()
def rewards(model: LlamaForSequenceClassification, tokenizer: PreTrainedTokenizerBase, rows: list[Row]) -> list[float]:
    """The reward of each row's answer."""
    encoded = [encode(tokenizer, row) for row in rows]
    parts = (encoded[start : start + BATCH_SIZE] for start in range(0, len(rows), BATCH_SIZE))
    return [reward for part in parts for reward in _rewards(model, part, tokenizer.pad_token_id).tolist()]


def _rewards(model: LlamaForSequenceClassification, encoded: list[Encoded], pad_id: int) -> torch.Tensor:
    """(B,) outputs of the head at each conversation's last token."""
    batch = collate(encoded, pad_id)
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
