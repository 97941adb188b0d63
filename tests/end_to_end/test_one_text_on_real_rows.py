"""Laws 2 and 4 on real rows and tokenizers: a policy that is its own only reference begins at one half, row by row."""

import gzip
import json
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import hosting
import pytest
import tiny
from transformers import AutoTokenizer

COUNT = 16

ALPACA = (
    "{% for m in messages %}{% if m.role == 'user' %}{% set parts = m.content.split('\n\n', 1) %}"
    "Below is an instruction that describes a task{{ ', paired with an input that provides further context' if parts[1]"
    " }}. Write a response that appropriately completes the request.\n\n### Instruction:\n{{ parts[0] }}\n\n"
    "{% if parts[1] %}### Input:\n{{ parts[1] }}\n\n{% endif %}### Response:\n"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
"""What `type: alpaca` of the host writes, as a chat template."""


@pytest.fixture(scope="module", params=["gpt2", "mistral-v3"])
def policy(request: pytest.FixtureRequest, shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a real tokenizer."""
    folder = tmp_path_factory.mktemp("real") / request.param
    shutil.copytree(shared_data / "tokenizers" / request.param, folder, copy_function=shutil.copy)
    size = len(AutoTokenizer.from_pretrained(folder))
    return tiny.llama(folder, vocab_size=size, seed=3, hidden=16, context=2048)


def alpaca_rows(shared_data: Path) -> list[dict[str, Any]]:
    """Short answers, where it shows most, and the first ones as they come."""
    with gzip.open(shared_data / "alpaca" / "alpaca.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in islice(lines, 2000)]
    rows = [row for row in rows if row["output"].strip() and "\n\n" not in row["instruction"]]
    short = [row for row in rows if len(row["output"]) < 20]
    with_input = [row for row in rows if row["input"]]
    return [*short[: COUNT // 2], *with_input[: COUNT // 4], *rows[: COUNT // 4]]


@pytest.mark.parametrize("kind", ["alpaca", "chat_template"])
def test_the_coefficient_begins_at_one_half(shared_data: Path, tmp_path: Path, policy: Path, kind: str) -> None:
    rows, reference = alpaca_rows(shared_data), {"model": str(policy), "dtype": "float32"}
    if kind == "alpaca":
        template = tmp_path / "alpaca.jinja"
        text = ALPACA
        if policy.name == "mistral-v3":  # the host encodes prompt and answer apart: a space before each, <s> once
            text = "{{ bos_token }} " + ALPACA.replace("{{ m.content }}", " {{ m.content }}")
        template.write_text(text)
        reference["chat_template"] = str(template)
    else:
        asked = [{"role": "user", "content": f"{row['instruction']}\n\n{row['input']}".strip()} for row in rows]
        said = [{"role": "assistant", "content": row["output"]} for row in rows]
        rows = [{"messages": [*pair]} for pair in zip(asked, said, strict=True)]
    data = tiny.write_jsonl(tmp_path / "data.jsonl", rows)
    path = tiny.write_config(
        tmp_path / "config.yml",
        base_model=str(policy),
        datasets=[{"path": str(data), "ds_type": "json", "type": kind}],
        plugins=["poft_plugin.PoftPlugin", "hosting.RecorderPlugin"],
        rl="poft",
        poft={"references": [reference], "score_cache": str(tmp_path / "scores")},
        output_dir=str(tmp_path / "out"),
        dataset_prepared_path=str(tmp_path / "prepared"),
        learning_rate=1e-12,
        sequence_len=2048,
        special_tokens=None,
    )
    logs = hosting.train(path).logs
    assert len(logs) == len(rows)
    for log in logs:
        assert log["poft/coefficient"] == pytest.approx(0.5, abs=1e-5)
