"""The methods of selection: which keys each block of queries attends to. `registry` has them by name, one file each.

The class of a method has its own options, and `dhsa.Config` takes an instance as `method`, or its name for the default
options. The C file of the same name in csrc/select/methods/ computes the method; `twin` defines it in NumPy. Methods
without a C file (`in_core` is False) run as they are defined.
"""

from __future__ import annotations

from dhsa.methods.base import Method
from dhsa.methods.block import Block
from dhsa.methods.dhsa import Dhsa
from dhsa.methods.flexprefill import FlexPrefill
from dhsa.methods.hip import Hip
from dhsa.methods.hisa import Hisa
from dhsa.methods.hyper import Hyper
from dhsa.methods.moa import Moa
from dhsa.methods.oracle import Oracle
from dhsa.methods.power import Power
from dhsa.methods.proxy import Proxy
from dhsa.methods.quoka import Quoka
from dhsa.methods.retrieval import Retrieval
from dhsa.methods.rows import Rows
from dhsa.methods.sale import Sale
from dhsa.methods.seer import Seer
from dhsa.methods.sparge import Sparge
from dhsa.methods.spatten import Spatten
from dhsa.methods.stem import Stem
from dhsa.methods.tca import Tca
from dhsa.methods.token_sparse import TokenSparse
from dhsa.methods.vertical_slash import VerticalSlash
from dhsa.methods.window import Window
from dhsa.methods.xattention import XAttention

__all__ = [
    "Block",
    "Dhsa",
    "FlexPrefill",
    "Hip",
    "Hisa",
    "Hyper",
    "Method",
    "Moa",
    "Oracle",
    "Power",
    "Proxy",
    "Quoka",
    "Retrieval",
    "Rows",
    "Sale",
    "Seer",
    "Sparge",
    "Spatten",
    "Stem",
    "Tca",
    "TokenSparse",
    "VerticalSlash",
    "Window",
    "XAttention",
    "registry",
]

registry: dict[str, type[Method]] = {
    method.name: method
    for method in (  # in the order of dhsa_method_kind
        Rows,
        Dhsa,
        Window,
        Block,
        VerticalSlash,
        XAttention,
        Proxy,
        Hisa,
        Power,
        Oracle,
        # In NumPy:
        FlexPrefill,
        Stem,
        Quoka,
        Sparge,
        Sale,
        Hip,
        Hyper,
        TokenSparse,
        Moa,
        Tca,
        Spatten,
        Seer,
        Retrieval,
    )
}
