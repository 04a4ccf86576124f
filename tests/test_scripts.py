"""The ordinary scripts of recipes/: what the plugin adds to them is few lines, and without those they still run."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from hf_robustq.parsing import train_tokenizer
from hf_robustq.sweep import load_sweeps

RECIPES = Path(__file__).parents[1] / "recipes"
WORDS = [
    "red",
    "blue",
    "green",
    "small",
    "large",
    "old",
    "new",
    "cat",
    "dog",
    "house",
    "tree",
    "runs",
    "sleeps",
    "falls",
]
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}

SCRIPTS = {
    "text_classification": (BertConfig, BertForSequenceClassification),
    "token_classification": (BertConfig, BertForTokenClassification),
    "causal_lm_sft": (LlamaConfig, LlamaForCausalLM),
}


def sample(i):
    words = [WORDS[(i * step + step) % len(WORDS)] for step in range(1, 7)]
    return {"text": " ".join(words), "label": i % 2, "tokens": words, "tags": [word[0] for word in words]}


@pytest.fixture
def prepared(tmp_path, request):
    """A folder with a tiny model and its tokenizer, and one with a dataset."""
    config, model = SCRIPTS[request.param]
    tokenizer = train_tokenizer([WORDS], 120)
    special = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id}
    made = model(config(vocab_size=len(tokenizer), max_position_embeddings=64, **SIZES, **special))
    (made if model is LlamaForCausalLM else made.base_model).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    for split, count in (("train", 24), ("test", 8)):
        lines = [sample(i) for i in range(count)]
        if request.param == "causal_lm_sft":
            lines = [{"text": line["text"]} for line in lines]
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return request.param, tmp_path


def run(script, folder, out, monkeypatch):
    argv = ["--model_name_or_path", folder / "model", "--dataset_name", folder / "data", "--output_dir", out]
    argv += ["--num_train_epochs", "1", "--eval_strategy", "epoch", "--report_to", "none", "--use_cpu", "true"]
    argv += ["--per_device_train_batch_size", "8", "--save_strategy", "no", "--dataloader_pin_memory", "false"]
    if "causal" in script.name:
        argv += ["--max_length", "32", "--bf16", "false"]
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, argv)])
    return runpy.run_path(str(script), run_name="__main__")


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # TRL's own default
@pytest.mark.parametrize("prepared", SCRIPTS, indirect=True)
def test_a_script_with_the_plugin_and_without_its_lines(prepared, monkeypatch):
    name, folder = prepared
    if name == "causal_lm_sft":
        pytest.importorskip("trl")
    text = (RECIPES / f"{name}.py").read_text()
    added = [line for line in text.splitlines() if re.search(r"# robustq( |$)", line)]
    assert 0 < len(added) <= 10
    run(RECIPES / f"{name}.py", folder, folder / "with", monkeypatch)
    (one,) = load_sweeps(folder / "with" / "robustq_sweep.json")[-1:]
    assert len(one.rows) == 4 and "W4" in (folder / "with" / "README.md").read_text()
    assert AutoTokenizer.from_pretrained(folder / "with").is_fast
    plain = folder / f"{name}_plain.py"
    plain.write_text("\n".join(line for line in text.splitlines() if line not in added))
    assert "robustq=" not in plain.read_text()
    run(plain, folder, folder / "without", monkeypatch)
    assert not (folder / "without" / "robustq_sweep.json").exists()
    assert (folder / "without" / "model.safetensors").exists()
