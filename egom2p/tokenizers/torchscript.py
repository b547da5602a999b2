"""TorchScript traces on other machines than the one they were made on.

A trace keeps as constants what was true when it was made: casts to bfloat16 and the name of the GPU. Moving its weights
(`module.to`) does not reach them. Seen in traces of NVIDIA's own Cosmos code at small width: 7 casts in the encoder and
6 in the decoder, all of them arguments of `aten::to`; the device of a `torch.tensor(2.0)`. A bfloat16 trace cannot run
on a CPU: `avg_pool3d` has no such kernel (torch 2.14).
"""

from collections.abc import Iterator
from typing import Any

import torch

# c10::ScalarType, as dtypes stand in a graph: half, float, bfloat16.
HALF, FLOAT, BFLOAT16 = 5, 6, 15
REDUCED = (torch.float16, torch.bfloat16)


def settle(module: torch.jit.ScriptModule, device: torch.device, dtype: torch.dtype) -> torch.jit.ScriptModule:
    """The loaded trace, computing on `device` and, when `dtype` is float32, in float32 throughout. Changes it in place;
    it must not have run before, because what runs is a copy of the graph made at the first call."""
    graph = module.graph
    torch._C._jit_pass_inline(graph)  # in place: what submodules and functions do becomes part of this graph
    module.to(device, dtype)
    for node in list(_nodes(graph)):
        if node.kind() == "prim::Constant" and node.output().type().kind() == "DeviceObjType":
            node.s_("value", str(device))
        if dtype == torch.float32:
            _to_float32(module, graph, node)
    graph.lint()
    return module


def _to_float32(module: torch.jit.ScriptModule, graph: Any, node: Any) -> None:
    if node.kind() == "prim::Constant":
        if node.hasAttribute("value") and node.kindOf("value") == "t" and node.t("value").dtype in REDUCED:
            node.t_("value", node.t("value").float())
    elif node.kind() == "prim::GetAttr" and node.output().type().isSubtypeOf(torch._C.TensorType.get()):
        owner, name = _owner(module, node), node.s("name")
        if owner.getattr(name).dtype in REDUCED:  # neither parameter nor buffer
            owner.setattr(name, owner.getattr(name).float())
    elif node.kind().startswith("aten::") and node.kind() != "aten::view":  # the dtype of a view reinterprets bits
        arguments = torch._C.parse_schema(node.schema()).arguments
        for i, (argument, value) in enumerate(zip(arguments, list(node.inputs()), strict=False)):
            if argument.name.endswith("dtype") and value.node().kind() == "prim::Constant" \
                    and value.toIValue() in (HALF, BFLOAT16):
                # A constant of its own: the same 15 may also be somebody's plain number.
                graph.setInsertPoint(node)
                node.replaceInput(i, graph.insertConstant(FLOAT))


def _nodes(block: Any) -> Iterator[Any]:
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from _nodes(inner)


def _owner(module: torch.jit.ScriptModule, node: Any) -> Any:
    """The submodule whose attribute a prim::GetAttr node reads."""
    names, source = [], node.input().node()
    while source.kind() == "prim::GetAttr":
        names.append(source.s("name"))
        source = source.input().node()
    owner = module._c
    for name in reversed(names):
        owner = owner.getattr(name)
    return owner
