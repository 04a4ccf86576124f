"""Sites: where a weight is read. Knows `nn.Module` and none of this package's classes."""

from hf_robustq.sites.adapters import follow_adapters, has_adapters, inner, plain_names
from hf_robustq.sites.attach import attach, bake, detach, staged_class
from hf_robustq.sites.find import find_sites, refuse_wrapped
from hf_robustq.sites.kinds import RAW, RECURRENT
from hf_robustq.sites.site import LeftOut, Site

__all__ = [
    "RAW",
    "RECURRENT",
    "LeftOut",
    "Site",
    "attach",
    "bake",
    "detach",
    "find_sites",
    "follow_adapters",
    "has_adapters",
    "inner",
    "plain_names",
    "refuse_wrapped",
    "staged_class",
]
