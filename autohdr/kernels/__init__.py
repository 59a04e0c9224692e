"""The ops, each a public function over several backends.

``backends(op)`` tells which backends can run here and why not; ``set_backend(name)`` sets what ``backend="auto"`` stands for.
"""

from autohdr.kernels import _extension, declare
from autohdr.kernels.add_norm import add_norm
from autohdr.kernels.apply_edit import apply_edit
from autohdr.kernels.backends import OPS, backends, set_backend
from autohdr.kernels.causal_conv1d import causal_conv1d
from autohdr.kernels.gdfn import gdfn, gdfn_int8
from autohdr.kernels.mdta import mdta, mdta_apply, mdta_int8, mdta_int8_apply, mdta_int8_statistics, mdta_statistics
from autohdr.kernels.nafblock import nafblock, nafblock_apply, nafblock_statistics
from autohdr.kernels.selective_scan import selective_scan

__all__ = [
    "OPS",
    "add_norm",
    "apply_edit",
    "backends",
    "causal_conv1d",
    "gdfn",
    "gdfn_int8",
    "mdta",
    "mdta_apply",
    "mdta_int8",
    "mdta_int8_apply",
    "mdta_int8_statistics",
    "mdta_statistics",
    "nafblock",
    "nafblock_apply",
    "nafblock_statistics",
    "selective_scan",
    "set_backend",
]

if _extension.module:
    declare.check_signatures(getattr(_extension.module, "signatures", list)())  # older modules have none
