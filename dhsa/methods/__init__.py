"""The methods of selection: which keys each block of queries attends to. A file a method; `registry` has them by name.

A method's class holds its own options and is what `dhsa.Config` takes as `method`; its name alone stands for the
defaults. The C file of the same name in csrc/select/methods/ does the work; `twin` says in NumPy what it does.
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
