"""Tiny models of the architectures that transformers knows, built from their own config classes: no download."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 99),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size", "lru_width"), 32),
    **dict.fromkeys(("encoder_hidden_size", "decoder_hidden_size", "attention_hidden_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers"), 1),
    "decoder_num_hidden_layers": 1,
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "decoder_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "linear_num_key_heads", "linear_num_value_heads", "index_n_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner"), 48),
    **dict.fromkeys(("hidden_dim", "decoder_intermediate_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 24),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "num_memory_blocks", "type_vocab_size"), 2),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_target_positions"), 64),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "qk_head_dim", "mamba_d_head", "classifier_proj_size"), 16),
    **dict.fromkeys(("mamba_d_state", "mamba_chunk_size", "state_size", "block_size"), 8),
    **dict.fromkeys(("mamba_n_heads", "index_topk", "rotary_dim", "num_conv_pos_embeddings"), 4),
    **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout", "hidden_dropout", "layerdrop"), 0.0),
    **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"), 0.0),
    **dict.fromkeys(("encoder_layerdrop", "decoder_layerdrop", "drop_path_rate"), 0.0),
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    "image_size": 32, "patch_size": 8, "num_channels": 3, "num_mel_bins": 16, "max_source_positions": 50,
    "num_queries": 5, "num_nextn_predict_layers": 0, "sliding_window": 8, "use_cache": False, "num_labels": 3,
    "pad_token_id": 0, "bos_token_id": 1, "decoder_start_token_id": 1, "eos_token_id": 2, "sep_token_id": 3,
    "conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2,
    "num_conv_pos_embedding_groups": 2, "depths": [1, 1, 1, 1], "hidden_sizes": [16, 16, 32, 32],
    "embed_dims": [16, 16, 32, 32],
}  # fmt: skip
"""What a config's sizes are set to, where it has one of the name."""

HEADS = (
    *("SEQUENCE_CLASSIFICATION", "IMAGE_CLASSIFICATION", "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "OBJECT_DETECTION"),
    *("SEMANTIC_SEGMENTATION", "AUDIO_CLASSIFICATION", "CTC", "SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT"),
    *("VIDEO_CLASSIFICATION", "UNIVERSAL_SEGMENTATION", "DEPTH_ESTIMATION", "MASKED_LM", "MASK_GENERATION"),
    "ZERO_SHOT_IMAGE_CLASSIFICATION",
)
LARGEST = 16_000_000
"""Parameters of a model that is tiny."""


def architectures() -> dict[str, str]:
    """{model type: name of a class}, of the first task in `HEADS` that it has, else of the bare model."""
    found: dict[str, str] = {}
    names = [f"MODEL_FOR_{head}_MAPPING_NAMES" for head in HEADS]
    for mapping in (getattr(modeling_auto, name) for name in (*names, "MODEL_MAPPING_NAMES")):
        for kind, classes in mapping.items():
            found.setdefault(kind, classes if isinstance(classes, str) else classes[0])
    return found


def _usual(cls: type[Any]) -> Any:
    """The config of an architecture as it is by default; of one that wants a backbone, with a small one."""
    try:
        return cls()
    except ValueError:
        return cls(backbone_config=_backbone())


def _backbone() -> Any:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]}
    return transformers.ResNetConfig(**sizes, layer_type="basic", out_features=["stage4"])


def small_config(cls: type[Any]) -> Any:
    """A tiny config of this class, and of the classes of its parts."""
    usual = _usual(cls)
    names = {*usual.to_dict(), *inspect.signature(cls.__init__).parameters, *getattr(cls, "__dataclass_fields__", ())}
    options: dict[str, Any] = {}
    for name in SIZES.keys() & names:
        size, known = SIZES[name], getattr(usual, name, None)
        several = isinstance(size, (list, tuple)), isinstance(known, (list, tuple))
        if name.startswith("conv_"):
            options[name] = list(size)
        elif all(several):
            options[name] = (list(size) * len(known))[: len(known)]
        elif several[1]:
            options[name] = [size] * len(known)
        elif not several[0] and not (
            known is None and name in ("head_dim", "num_key_value_heads", "q_lora_rank", "sliding_window")
        ):
            options[name] = size
    timm = getattr(getattr(usual, "backbone_config", None), "model_type", "timm_backbone") == "timm_backbone"
    if "backbone_config" in names and timm:
        options |= {"backbone_config": _backbone(), "backbone": None, "use_timm_backbone": False}
        options = {name: value for name, value in options.items() if name in names}
    for name in getattr(cls, "sub_configs", None) or {}:
        if name not in options and (part := getattr(usual, name, None)) is not None:
            options[name] = small_config(type(part)).to_dict()
    return cls(**options)


def small_model(name: str) -> nn.Module:
    """A tiny model of the class `name`, seeded. Raises where transformers does, or for one that is not tiny."""
    cls = getattr(transformers, name)
    config = small_config(cls.config_class)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in cls(config).parameters())
    if count > LARGEST:
        raise ValueError(f"{name} has {count:,} parameters")
    torch.manual_seed(0)
    return cls(config).eval()


def small_batch(model: Any) -> dict[str, Tensor]:
    """What its forward takes."""
    config, main, takes = model.config, model.main_input_name, inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(1)

    def tokens(length: int) -> Tensor:
        return torch.randint(4, 90, (2, length), generator=generator)

    batch: dict[str, Tensor] = {}
    if main == "pixel_values":
        size = getattr(config, "image_size", None) or 32
        size = size if isinstance(size, int) else size[0]
        shape = (2, getattr(config, "num_channels", None) or 3, size, size)
        batch["pixel_values"] = torch.randn(shape, generator=generator)
    elif main == "input_values":
        batch["input_values"] = torch.randn(2, 400, generator=generator)
    elif main == "input_features":
        batch["input_features"] = torch.randn(2, getattr(config, "num_mel_bins", 16), 100, generator=generator)
    else:
        batch["input_ids"] = tokens(10)
        if "attention_mask" in takes:
            batch["attention_mask"] = torch.ones(2, 10, dtype=torch.long)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in takes:
        batch["decoder_input_ids"] = tokens(5)
    return batch


def result(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Its logits, or the first floating-point tensor that it returns."""
    torch.manual_seed(0)  # some draw noise
    with torch.no_grad():
        outputs = model(**batch)
    named = (getattr(outputs, name, None) for name in ("logits", "last_hidden_state", "pred_logits"))
    found = next((one[0] if isinstance(one, tuple) else one for one in named if one is not None), None)
    tensors = (one for one in outputs.to_tuple() if isinstance(one, Tensor) and one.is_floating_point())
    return found if found is not None else next(tensors)
