"""Three small chat models made from nothing, each with a tokenizer and a chat template of its own."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from tokenizers import trainers as tokenizer_trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from quickstart.task import Row

Encoded = tuple[list[int], list[int]]  # token ids and labels of one conversation
Item = TypeVar("Item")

IGNORED = -100  # the label that transformers leaves out of the loss


@dataclass(frozen=True)
class Style:
    """A tokenizer and a chat template that belong together.

    `build` trains the tokenizer on texts. `specials`: the token for padding, then the template's markers, each one
    token, the last one ending a turn.
    """

    build: Callable[[list[str], list[str]], Tokenizer]
    specials: list[str]
    template: str


@dataclass(frozen=True)
class Shape:
    """Size of a Llama model."""

    hidden: int = 128
    layers: int = 3
    heads: int = 4


@dataclass(frozen=True)
class Recipe:
    """How `fit` trains."""

    steps: int
    batch_size: int = 64
    learning_rate: float = 2e-3
    warmup: float = 0.1


def byte_level(vocab_size: int) -> Callable[[list[str], list[str]], Tokenizer]:
    """Byte-level BPE; with `vocab_size` 256 every byte is a token and nothing is merged."""

    def build(texts: list[str], specials: list[str]) -> Tokenizer:
        tokenizer = Tokenizer(tokenizer_models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizer_trainers.BpeTrainer(
            vocab_size=vocab_size + len(specials),
            special_tokens=specials,
            initial_alphabet=alphabet,
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return tokenizer

    return build


def sentence_piece_like(vocab_size: int) -> Callable[[list[str], list[str]], Tokenizer]:
    """BPE over characters with a visible blank, the way SentencePiece writes it."""

    def build(texts: list[str], specials: list[str]) -> Tokenizer:
        tokenizer = Tokenizer(tokenizer_models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
        trainer = tokenizer_trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=["<unk>", *specials], show_progress=False
        )
        tokenizer.train_from_iterator(texts, trainer)
        return tokenizer

    return build


POLICY = Style(
    byte_level(256),
    ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"],
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
)

REFERENCE_A = Style(
    byte_level(300),
    ["[PAD]", "<s>", "[INST]", "[/INST]", "</s>"],
    "{{ '<s>' }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST]' + m['content'] + '[/INST]' }}"
    "{% else %}{{ m['content'] + '</s>' }}{% endif %}{% endfor %}",
)

REFERENCE_B = Style(
    sentence_piece_like(80),
    ["<pad>", "<task>", "<answer>", "<eot>"],
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<task> ' + m['content'] }}"
    "{% else %}{{ '<answer>' + m['content'] + '<eot>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<answer>' }}{% endif %}",
)


def make_tokenizer(style: Style, rows: list[Row]) -> PreTrainedTokenizerFast:
    """Train the style's tokenizer on the rows' texts and give it the style's template."""
    texts = [text for row in rows for text in (row.prompt, row.answer)]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=style.build(texts, style.specials),
        pad_token=style.specials[0],
        eos_token=style.specials[-1],
        additional_special_tokens=style.specials[1:-1],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = style.template
    return tokenizer


def make_model(tokenizer: PreTrainedTokenizerBase, shape: Shape, seed: int) -> LlamaForCausalLM:
    """A Llama with random weights for this tokenizer."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=3 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=512,
        initializer_range=0.02,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerBase, row: Row) -> Encoded:
    """Token ids of a conversation and labels for its answer, the end of the turn included.

    A template without a generation prompt leaves its answer marker, if any, to the model.
    """
    messages = row.messages()
    start = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    prompt_ids = tokenizer.encode(start, add_special_tokens=False)
    answer_ids = tokenizer.encode(whole[len(start) :], add_special_tokens=False)
    return prompt_ids + answer_ids, [IGNORED] * len(prompt_ids) + answer_ids


def collate(encoded: list[Encoded], pad_id: int) -> dict[str, torch.Tensor]:
    """One right-padded batch."""
    width = max(len(ids) for ids, _ in encoded)
    ids = torch.tensor([ids + [pad_id] * (width - len(ids)) for ids, _ in encoded])
    labels = torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in encoded])
    lengths = torch.tensor([len(ids) for ids, _ in encoded])
    return {"input_ids": ids, "labels": labels, "attention_mask": (torch.arange(width) < lengths[:, None]).long()}


def fit(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, rows: list[Row], recipe: Recipe, seed: int
) -> None:
    """Plain supervised training on the rows' answers."""
    encoded = [encode(tokenizer, row) for row in rows]
    collated = (collate(batch, tokenizer.pad_token_id) for batch in batches(encoded, recipe, seed))
    optimise(model, (model(**batch).loss for batch in collated), recipe)


def optimise(model: PreTrainedModel, losses: Iterator[torch.Tensor], recipe: Recipe) -> None:
    """One step of AdamW per loss, with a cosine schedule; each loss is computed when the step before it is done."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    warmup = int(recipe.warmup * recipe.steps)
    scheduler = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, 1.0, warmup),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.steps - warmup),
        ],
        [warmup],
    )
    model.train()
    for loss in losses:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    model.eval()


def batches(encoded: list[Item], recipe: Recipe, seed: int) -> Iterator[list[Item]]:
    """`recipe.steps` shuffled batches, passing over the data as often as needed."""
    rng = random.Random(seed)
    order: list[Item] = []
    for _ in range(recipe.steps):
        if len(order) < recipe.batch_size:
            order = rng.sample(encoded, len(encoded))
        yield [order.pop() for _ in range(recipe.batch_size)]


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write model and tokenizer as any other checkpoint folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
