"""What every recipe begins and ends with: presets under the flags, variants of one model, one report."""

from hf_robustq.recipe.flags import last_checkpoint, no_bars_without_a_terminal, open_output, parse
from hf_robustq.recipe.images import ImageArguments, ImageRun, image_task
from hf_robustq.recipe.parsing import ParserArguments, ParserRun
from hf_robustq.recipe.run import Run, RunArguments, fast_bf16, report

__all__ = [
    "ImageArguments",
    "ImageRun",
    "ParserArguments",
    "ParserRun",
    "Run",
    "RunArguments",
    "fast_bf16",
    "image_task",
    "last_checkpoint",
    "no_bars_without_a_terminal",
    "open_output",
    "parse",
    "report",
]
