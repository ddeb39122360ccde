"""The methods of selection: which keys each block of queries attends to. `registry` has them by name, one file each.

The class of a method has its own options, and `dhsa.Config` takes an instance as `method`, or its name for the default
options. The C file of the same name in csrc/select/methods/ computes the method; `twin` defines it in NumPy.
"""

from __future__ import annotations

from dhsa.methods.base import Method
from dhsa.methods.block import Block
from dhsa.methods.dhsa import Dhsa
from dhsa.methods.hisa import Hisa
from dhsa.methods.oracle import Oracle
from dhsa.methods.power import Power
from dhsa.methods.proxy import Proxy
from dhsa.methods.rows import Rows
from dhsa.methods.vertical_slash import VerticalSlash
from dhsa.methods.window import Window
from dhsa.methods.xattention import XAttention

__all__ = [
    "Block",
    "Dhsa",
    "Hisa",
    "Method",
    "Oracle",
    "Power",
    "Proxy",
    "Rows",
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
    )
}
