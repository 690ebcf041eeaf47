"""Make kernels from a few lines of PTX, for tests of single instructions."""

from __future__ import annotations

from .parser import Kernel, parse

_TEMPLATE = """\
.version 8.0
.target {target}
.address_size 64
{module}
.visible .entry snippet({parameters})
{{
    .reg .pred %p<16>;
    .reg .b16 %h<32>;
    .reg .b32 %r<64>;
    .reg .f32 %f<64>;
    .reg .b64 %rd<64>;
    .reg .f64 %d<32>;
{body}
    ret;
}}
"""


def snippet(body: str, parameters: str = "", *, module: str = "", target: str = "sm_90") -> Kernel:
    """Return a kernel with registers %p %h %r %f %rd %d; `parameters` is like "u64 out, u64 x, u32 n"."""
    declared = (part.split() for part in parameters.split(",") if part.strip())
    text = ", ".join(f".param .{type_} {name}" for type_, name in declared)
    return parse(_TEMPLATE.format(target=target, module=module, parameters=text, body=body))
