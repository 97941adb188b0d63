"""Tiny models, tokenizers and data sets, built from nothing: what tests train and score with."""

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPTNeoXConfig,
    GPTNeoXModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] | trim }}{{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant turns') }}{% endif %}{% endfor %}"
)

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu one two three four five six seven".split()

CPU_SETTINGS: dict[str, Any] = {
    "bf16": False,
    "fp16": False,
    "tf32": False,
    "attn_implementation": "sdpa",
    "optimizer": "adamw_torch",
    "gradient_checkpointing": False,
    "dataset_num_proc": 0,
    "dataloader_num_workers": 0,
    "dataloader_pin_memory": False,
    "lr_scheduler": "constant",
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "sequence_len": 512,
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_epochs": 1,
    "learning_rate": 1e-3,
    "val_set_size": 0,
    "logging_steps": 1,
    "save_strategy": "no",
    "seed": 7,
    "special_tokens": {"pad_token": "<|pad|>"},
    "use_wandb": False,
}


def text_corpus(seed: int = 0) -> list[str]:
    """Sentences to train tokenizers on."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=12)) + ". Äther, naïve, 東京 ✓\n" for _ in range(300)]


def bpe_tokenizer(folder: Path, *, vocab_size: int, template: str, specials: Sequence[str], eos: str) -> Path:
    """A byte-level BPE tokenizer with a chat template, saved as `AutoTokenizer` finds it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text_corpus(vocab_size), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos, pad_token="<|pad|>", bos_token=specials[0], chat_template=template
    )
    fast.save_pretrained(folder)
    return folder


def llama(folder: Path, *, vocab_size: int, seed: int, hidden: int = 32, layers: int = 2, context: int = 1024) -> Path:
    """A random Llama in float32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def policy(folder: Path, seed: int = 1) -> Path:
    """A tiny policy that speaks ChatML."""
    specials = ["<|bos|>", "<|im_end|>", "<|pad|>", "<|im_start|>"]
    bpe_tokenizer(folder, vocab_size=400, template=CHATML, specials=specials, eos="<|im_end|>")
    return llama(folder, vocab_size=400, seed=seed)


def reference(folder: Path, seed: int = 2, context: int = 1024) -> Path:
    """A tiny reference with another tokenizer and a template that strips and refuses system turns."""
    bpe_tokenizer(folder, vocab_size=330, template=INST, specials=["<s>", "</s>", "<|pad|>"], eos="</s>")
    return llama(folder, vocab_size=330, seed=seed, context=context)


def reward_model(folder: Path, kind: str = "llama", *, seed: int = 5, context: int = 1024) -> Path:
    """A random reward model with one label, large scores, and the end-of-turn token for padding."""
    bpe_tokenizer(folder, vocab_size=330, template=INST, specials=["<s>", "</s>", "<|pad|>"], eos="</s>")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    common: dict[str, Any] = {"vocab_size": 330, "num_labels": 1, "initializer_range": 0.3, "pad_token_id": 1}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    positions = {"max_position_embeddings": context}
    model = {
        "llama": lambda: LlamaForSequenceClassification(LlamaConfig(**common, **sizes, **positions)),
        "gpt2": lambda: GPT2ForSequenceClassification(
            GPT2Config(**common, n_embd=32, n_layer=2, n_head=4, n_positions=context)
        ),
        "bert": lambda: BertForSequenceClassification(BertConfig(**common, **sizes, **positions)),
        "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**common, **sizes, **positions)),
    }[kind]()
    model.save_pretrained(folder)
    return folder


def neox_reward_model(folder: Path, *, pooling: str | None, shards: int = 0, seed: int = 6) -> Path:
    """A `gpt_neox_reward_model` as such checkpoints look: their names, their old buffers, no chat template.

    One `pytorch_model.bin`, or so many safetensors with an index.
    """
    specials = ["<|endoftext|>", "<|padding|>", "<|pad|>", "<|system|>", "<|prompter|>", "<|assistant|>"]
    bpe_tokenizer(folder, vocab_size=340, template="", specials=specials, eos="<|endoftext|>")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    stored = json.loads((folder / "tokenizer_config.json").read_text())
    stored.update(tokenizer_class="GPTNeoXTokenizerFast", pad_token="<|padding|>", unk_token="<|endoftext|>")
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in stored.items() if k != "chat_template"}))
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = {
        "architectures": ["GPTNeoXRewardModel"], "model_type": "gpt_neox_reward_model", "vocab_size": 352, **sizes,
        "max_position_embeddings": 512, "initializer_range": 0.3, "rotary_emb_base": 10000, "rotary_pct": 0.25,
        "hidden_act": "gelu", "use_parallel_residual": True, "torch_dtype": "float32", "pooling": pooling,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    known = {k: v for k, v in config.items() if k not in ("model_type", "pooling", "architectures", "torch_dtype")}
    weights = {f"gpt_neox.{name}": w for name, w in GPTNeoXModel(GPTNeoXConfig(**known)).state_dict().items()}
    for layer in range(2):
        prefix = f"gpt_neox.layers.{layer}.attention"
        weights[f"{prefix}.bias"] = torch.ones(1, 1, 512, 512, dtype=torch.bool).tril()
        weights[f"{prefix}.masked_bias"] = torch.tensor(-1e9)
        weights[f"{prefix}.rotary_emb.inv_freq"] = torch.full((1,), 1e3)
    weights |= {"out_proj.weight": torch.randn(1, 32), "out_proj.bias": torch.tensor([0.7])}
    if not shards:
        torch.save(weights, folder / "pytorch_model.bin")
        return folder
    names = [f"model-{number + 1:05}-of-{shards:05}.safetensors" for number in range(shards)]
    held = {name: names[index % shards] for index, name in enumerate(sorted(weights))}
    for name in names:
        save_file({w: weights[w].contiguous() for w in weights if held[w] == name}, folder / name, {"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": held}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def chat_rows(count: int, seed: int = 0, turns: int = 1) -> list[dict[str, Any]]:
    """Chat rows of differing lengths."""
    rng = random.Random(seed)

    def words(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    rows = []
    for number in range(count):
        messages = []
        for _ in range(turns):
            messages.append({"role": "user", "content": f"{number}: {words(2, 9)}?"})
            messages.append({"role": "assistant", "content": f"{words(1, 14)}."})
        rows.append({"messages": messages})
    return rows


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def write_config(path: Path, **settings: Any) -> Path:
    """An Axolotl config for a CPU; settings of None are left out."""
    merged = {**CPU_SETTINGS, **settings}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({k: v for k, v in merged.items() if v is not None}, sort_keys=False))
    return path


def pair_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Pairs with scores, the prompt as messages of one or three turns."""
    rng = random.Random(seed)

    def words(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    rows = []
    for number in range(count):
        messages = [{"role": "user", "content": f"{number}: {words(2, 9)}?"}]
        if number % 3 == 0:
            messages += [{"role": "assistant", "content": words(1, 5)}, {"role": "user", "content": words(1, 5)}]
        chosen = {"role": "assistant", "content": words(2, 12)}
        scores = [round(rng.gauss(0.3, 1), 3), round(rng.gauss(0, 1), 3)]
        rows.append({"messages": messages, "chosen": chosen, "rejected": words(2, 12), "scores": scores})
    return rows


def ranked_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Lists of two to five responses with scores of one decimal, so that some are tied."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        responses = [" ".join(rng.choices(WORDS, k=rng.randint(2, 12))) for _ in range(rng.randint(2, 5))]
        scores = [round(rng.random(), 1) for _ in responses]
        rows.append({"prompt": f"{number}: {rng.choice(WORDS)}?", "responses": responses, "scores": scores})
    return rows


def even_rows(count: int, seed: int = 0) -> dict[str, list[dict[str, Any]]]:
    """Chats, pairs and lists, all rows of a kind equally long in tokens: the same words in another order."""
    rng = random.Random(seed)

    def words(number: int) -> str:
        first, *middle, last = WORDS[:number]
        return " ".join([first, *rng.sample(middle, len(middle)), last])

    rows: dict[str, list[dict[str, Any]]] = {"chats": [], "pairs": [], "lists": []}
    for number in range(count):
        asked = {"role": "user", "content": f"{number}: {words(6)}?"}
        answers = [words(9), words(5), words(7)]
        scores = [round(rng.gauss(0, 1), 3) for _ in answers]
        rows["chats"].append({"messages": [asked, {"role": "assistant", "content": answers[0]}]})
        pair = {"chosen": {"role": "assistant", "content": answers[0]}, "rejected": answers[1], "scores": scores[:2]}
        rows["pairs"].append({"messages": [asked], **pair})
        rows["lists"].append({"prompt": asked["content"], "responses": answers, "scores": scores})
    return rows


def poft_config(models: SimpleNamespace, folder: Path, **settings: Any) -> Path:
    """A config of `rl: poft` on four rows in its own folder, with one reference."""
    data = write_jsonl(folder / "data.jsonl", chat_rows(4))
    defaults: dict[str, Any] = {
        "base_model": str(models.policy),
        "datasets": [{"path": str(data), "ds_type": "json", "type": "chat_template"}],
        "plugins": ["poft_plugin.PoftPlugin"],
        "rl": "poft",
        "poft": {"references": [{"model": str(models.ref_a)}], "score_cache": str(folder / "scores")},
        "output_dir": str(folder / "out"),
        "dataset_prepared_path": str(folder / "prepared"),
    }
    return write_config(folder / "config.yml", **{**defaults, **settings})
