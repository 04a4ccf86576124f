"""Tiny models built from configs: no download. Each takes its batch as keyword arguments and returns a loss."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def timm_wrapped(architecture: str, **options: Any) -> nn.Module:
    from hf_robustq.models import image_classifier

    model = image_classifier(architecture, [str(i) for i in range(10)], timm_options=options)[0]
    # timm starts residual branches at or near zero (a norm's weight, a layer scale), and with them their gradients
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and not name.endswith("bias"):
            nn.init.ones_(parameter)
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


def beit() -> nn.Module:
    return timm_wrapped("beit_base_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)


def swinv2() -> nn.Module:
    sizes = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (2, 1), "num_heads": (2, 2)}
    return timm_wrapped("swinv2_tiny_window8_256", drop_path_rate=0.0, **sizes)


def bert(dropout: float = 0.0) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=3,
        max_position_embeddings=32, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def camembert() -> nn.Module:
    from transformers import CamembertConfig, CamembertForSequenceClassification

    config = CamembertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=3,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return CamembertForSequenceClassification(config)


def albert() -> nn.Module:
    """One layer, used three times."""
    from transformers import AlbertConfig, AlbertForSequenceClassification

    config = AlbertConfig(
        vocab_size=50, embedding_size=16, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, num_labels=3,
        intermediate_size=64, max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        classifier_dropout_prob=0.0,
    )  # fmt: skip
    return AlbertForSequenceClassification(config)


def gpt2(dropout: float = 0.0) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=50, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, use_cache=False,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # the default, without the warning that breaks a compiled graph
    return model


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False,
        use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():  # wide enough for quantization to matter
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return model


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0, use_cache=False,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, num_local_experts=4, num_experts_per_tok=2, use_cache=False,
    )  # fmt: skip
    return MixtralForCausalLM(config)


def wav2vec2() -> nn.Module:
    from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification

    config = Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=3,
        conv_dim=(16, 16), conv_stride=(5, 4), conv_kernel=(10, 8), num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, classifier_proj_size=16, hidden_dropout=0.0, attention_dropout=0.0,
        activation_dropout=0.0, feat_proj_dropout=0.0, final_dropout=0.0, layerdrop=0.0, apply_spec_augment=False,
    )  # fmt: skip
    return Wav2Vec2ForSequenceClassification(config)


def waves(batch: int = 4, length: int = 400) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "input_values": torch.randn(batch, length, generator=generator),
        "labels": torch.randint(0, 3, (batch,), generator=generator),
    }


@dataclass
class Output:
    loss: torch.Tensor
    logits: torch.Tensor


class Encoder(nn.Module):
    """A plain torch classifier: no config, no `save_pretrained`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 3)
        self.reentrant: bool | None = None

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> Output:
        x = self.embed(features)
        x = self.layer(x) if self.reentrant is None else checkpoint(self.layer, x, use_reentrant=self.reentrant)
        logits = self.head(x.mean(1))
        return Output(nn.functional.cross_entropy(logits, labels), logits)


def features(batch: int = 4, length: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "features": torch.randn(batch, length, 8, generator=generator),
        "labels": torch.randint(0, 3, (batch,), generator=generator),
    }


def tokens(labels: int | None = None, batch: int = 4, length: int = 12) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 50, (batch, length), generator=generator)
    target = ids.clone() if labels is None else torch.randint(0, labels, (batch,), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": target}


def sentences() -> dict[str, torch.Tensor]:
    return tokens(labels=3)


@dataclass(frozen=True)
class Entry:
    """A model, a batch for it, and what sets it apart.

    weights_only  patterns of the weights that are read without calling their modules
    calls         the most calls of one layer in a forward
    cannot        what the float model cannot do, with the reason: "compile" (without a graph break),
                  "checkpointing", "reentrant checkpointing"
    """

    build: Callable[[], nn.Module]
    batch: Callable[[], dict[str, torch.Tensor]]
    weights_only: tuple[str, ...] = ()
    calls: int = 1
    cannot: Mapping[str, str] = field(default_factory=dict)


ZOO = {
    "timm resnet": Entry(resnet, images),
    "timm mobilenet_v2": Entry(mobilenet_v2, images),
    "timm mobilenet_v3": Entry(lambda: timm_wrapped("mobilenetv3_small_050"), images),
    "timm efficientnet": Entry(lambda: timm_wrapped("test_efficientnet"), images),
    "timm convnext": Entry(lambda: timm_wrapped("test_convnext", depths=[1, 1, 1, 1]), images),
    "timm vit": Entry(lambda: timm_wrapped("test_vit", img_size=32, depth=2), images),
    "timm beit": Entry(
        beit,
        images,
        weights_only=("*.qkv.weight",),
        cannot={"reentrant checkpointing": "its blocks take keyword arguments, which reentrant checkpoints refuse"},
    ),
    "timm swinv2": Entry(swinv2, images, weights_only=("*.qkv.weight",)),
    "gpt2": Entry(gpt2, tokens),
    "llama": Entry(llama, tokens),
    "t5": Entry(t5, tokens),
    "bert": Entry(bert, sentences),
    "camembert": Entry(camembert, sentences),
    "albert": Entry(
        albert,
        sentences,
        calls=3,
        cannot=dict.fromkeys(("checkpointing", "reentrant checkpointing"), "transformers has none for ALBERT"),
    ),
    "wav2vec2": Entry(wav2vec2, waves, cannot={"compile": "its feature encoder sets requires_grad on its input"}),
    "mixtral": Entry(mixtral, tokens),
    "torch encoder": Entry(Encoder, features, weights_only=("*.out_proj.weight",)),
}


def run(model: nn.Module, batch: dict[str, torch.Tensor]) -> Any:
    return model(**batch)


def checkpoint_blocks(model: Any, reentrant: bool) -> None:
    """Gradient checkpointing, the way each library switches it on."""
    if isinstance(model, Encoder):
        model.reentrant = reentrant
    elif hasattr(model, "timm_model"):
        from timm.layers import set_reentrant_ckpt

        set_reentrant_ckpt(reentrant)
        model.timm_model.set_grad_checkpointing()
    else:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
