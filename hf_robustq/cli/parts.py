"""What lies beside a model: its tokenizer or processor; how many tokens both take, and what rows are padded with."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from hf_robustq.files import loading

logger = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges*", "*.model")


def loaded(auto: Any, name: str) -> Any:
    """A model of transformers. Raises `ValueError`, in one line, for a damaged folder."""
    with loading(name):
        return auto.from_pretrained(name)


def part(auto: str, name: str) -> Any:
    """The tokenizer or processor beside a model. Raises `ValueError` where there is none."""
    import transformers

    folder = Path(name)
    texts = auto in ("AutoTokenizer", "AutoProcessor")
    if texts and folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES):
        raise ValueError(f"{name} has no tokenizer: save it beside the model")  # transformers would make an empty one
    try:
        return getattr(transformers, auto).from_pretrained(name)
    except (OSError, ValueError) as error:
        why = str(error).strip().partition("\n")[0]
        raise ValueError(f"{name} has no {auto.removeprefix('Auto')}: save it beside the model ({why})") from error


def longest(model: Any, tokenizer: Any, limit: int | None = None) -> Any:
    """How many tokens a row may have: what the model takes, at most `limit`; None where nothing limits it."""
    from hf_robustq.parsing.subwords import longest

    known = longest(model.base_model, tokenizer)
    return min((n for n in (known, limit) if n is not None), default=None)


def padded(name: str, model: Any, tokenizer: Any) -> None:
    """Let a tokenizer and its model agree on padding: on the right, where positions count from the left.

    Without a padding token it is the end of text, which is said; the attention mask leaves it out, and the model takes
    the last token before it. Raises `ValueError` where that token is part of each row, or where there is none.
    """
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None or tokenizer.eos_token_id in tokenizer("")["input_ids"]:
            raise ValueError(f"the tokenizer of {name} has no padding token: set its pad_token, and save it again")
        tokenizer.pad_token = tokenizer.eos_token
        logger.warning("the tokenizer of %s has no padding token: rows are padded with %s", name, tokenizer.eos_token)
    if not model.config.is_encoder_decoder:
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if getattr(model.config, "summary_type", None) != "last":  # XLNet, which reads its summary at the end
        tokenizer.padding_side = "right"
