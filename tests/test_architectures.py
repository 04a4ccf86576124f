"""Architectures whose keys transformers renames on the way to a file and back."""

import pytest
import torch
from safetensors.torch import load_file

from hf_robustq import RobustQ
from tests.architectures import result, small_batch, small_model
from tests.zoo import run

RENAMED = [
    *("ViTForImageClassification", "DeiTForImageClassification", "Dinov2ForImageClassification"),
    *("IJepaForImageClassification", "ViTMSNForImageClassification", "BeitForImageClassification"),
    *("MixtralForSequenceClassification", "Qwen3MoeForSequenceClassification", "GteForSequenceClassification"),
    *("JinaEmbeddingsV3ForSequenceClassification", "NomicBertForSequenceClassification"),
]


@pytest.mark.parametrize("name", RENAMED)
def test_a_folder_gives_back_what_was_saved(name, tmp_path):
    model = small_model(name)
    batch = small_batch(model)
    plain = result(model, batch)
    RobustQ(model, {"weights": {"bits": 4}, "activations": {"bits": 8}}).calibrate([batch], run)
    expected = result(model.eval(), batch)
    assert not torch.equal(expected, plain)
    model.save_pretrained(tmp_path)
    assert not load_file(tmp_path / "model.safetensors").keys() <= model.state_dict().keys()
    assert torch.equal(result(type(model).from_pretrained(tmp_path).eval(), batch), expected)
