"""LoRA and its relatives: what each changes in a model, how it is added, saved, merged, and told about."""

from minift.adapters.bottleneck import HoulsbyConfig, ParallelConfig, PfeifferConfig
from minift.adapters.config import LoraConfig
from minift.adapters.ia3 import IA3Config
from minift.adapters.own import BitFitConfig, FullConfig, NormConfig
from minift.adapters.prefix import PrefixTuningConfig
from minift.adapters.prompt import PromptTuningConfig
from minift.adapters.ptuning import PTuningConfig
from minift.adapters.report import report

__all__ = [
    "BitFitConfig",
    "FullConfig",
    "HoulsbyConfig",
    "IA3Config",
    "LoraConfig",
    "NormConfig",
    "PTuningConfig",
    "ParallelConfig",
    "PfeifferConfig",
    "PrefixTuningConfig",
    "PromptTuningConfig",
    "report",
]
