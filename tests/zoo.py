"""Tiny models built from configs: no download. Each takes its batch as keyword arguments and returns a loss."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def timm_wrapped(architecture: str) -> nn.Module:
    from hf_robustq.models import image_classifier

    model = image_classifier(architecture, [str(i) for i in range(10)])[0]
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # timm starts residual branches at zero, and with them their gradients
            nn.init.ones_(module.weight)
    return model


def images(size: int = 32, batch: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "pixel_values": torch.randn(batch, 3, size, size, generator=generator),
        "labels": torch.randint(0, 10, (batch,), generator=generator),
    }


def resnet() -> nn.Module:
    return timm_wrapped("test_resnet")


def mobilenet_v2() -> nn.Module:
    return timm_wrapped("mobilenetv2_035")


def bert(dropout: float = 0.0) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=3,
        max_position_embeddings=32, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def gpt2(dropout: float = 0.0) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=50, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():  # wide enough for quantization to matter
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return model


def tokens(labels: int | None = None, batch: int = 4, length: int = 12) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 50, (batch, length), generator=generator)
    target = ids.clone() if labels is None else torch.randint(0, labels, (batch,), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": target}


ZOO: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, torch.Tensor]]]] = {
    "timm resnet": (resnet, images),
    "timm mobilenet_v2": (mobilenet_v2, images),
    "bert": (bert, lambda: tokens(labels=3)),
    "gpt2": (gpt2, tokens),
}


def run(model: nn.Module, batch: dict[str, torch.Tensor]) -> Any:
    return model(**batch)
