"""Passes over a saved graph. Each says what it requires and what it ensures; the weights stay where they are."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from compiler.errors import BundleError
from compiler.graph.encoder_rewrite import insert, replace
from compiler.graph.nodes import save_model

LAST_TOKEN = "/last_token"


def all_logits(model_path: Path, out_path: Path) -> None:
    """Derive the twin of a `logits="last"` graph that yields logits for every position.

    requires  the gathers `/last_token...` of the decoder builder (older bundles have one, before the head); `out_path` in the directory of `model_path`
    ensures   logits float32 [batch, sequence, vocab]; no node left over; the same external data file, named by location, not copied

    Raises BundleError when the gather is not there, ValueError for another directory.
    """
    if model_path.parent.resolve() != out_path.parent.resolve():
        raise ValueError("the twin shares model.onnx.data by name, so it must stand in the same directory")
    save_model(with_all_logits(model_path), out_path)


def with_all_logits(model_path: Path) -> ir.Model:
    """The same twin as a model in memory, its weights where they are. Raises BundleError when the gather is not there."""
    model = ir.load(model_path)
    graph = model.graph
    gathers = [node for node in graph if str(node.name).startswith(LAST_TOKEN) and node.op_type == "GatherND"]
    if not gathers:
        raise BundleError(str(model_path), expected=f"a decoder graph with a {LAST_TOKEN} gather", found="none", remedy="give a graph of logits=last")
    for gather in gathers:
        ir.convenience.replace_all_uses_with(gather.outputs[0], gather.inputs[0])
    logits = next(value for value in graph.outputs if value.name == "logits")
    logits.shape = ir.Shape([logits.shape[0], "sequence_length", logits.shape[2]])
    remove_unused(graph)
    return model


def float_twin(model_path: Path) -> bytes | None:
    """The graph of a file with `float_activations`, its weights where they are; None without products of integers. Raises BundleError for no such graph."""
    try:
        model = ir.load(model_path)
        found = float_activations(model)
    except Exception as error:  # protobuf's, onnx_ir's and ours share no base
        reason = " ".join(str(error).split())[:200]
        raise BundleError(str(model_path), expected="a graph as the exporter writes it", found=reason, remedy="build the bundle again") from error
    return ir.to_proto(model).SerializeToString() if found else None


def float_activations(model: ir.Model) -> int:
    """Replace DynamicQuantizeMatMul and MatMulIntegerToFloat by DequantizeLinear and MatMul: the same weights, activations in float32. Returns how many.

    requires  weights [in, out] with one scale a column and no zero point, as `encoder_quantize` writes them; codes from a QuantizeLinear
              with the scale and zero point that the product takes them with
    ensures   no operator rounds an activation
    """
    found = [node for node in model.graph if node.op_type in ("DynamicQuantizeMatMul", "MatMulIntegerToFloat")]
    for node in found:
        if node.op_type == "MatMulIntegerToFloat":
            quantized = node.inputs[0].producer() if node.inputs[0] is not None else None
            if quantized is None or quantized.op_type != "QuantizeLinear" or quantized.inputs[1:3] != (node.inputs[2], node.inputs[4]):
                raise ValueError(f"{node.name}: its codes come from no QuantizeLinear of its scale and zero point")
            widened = insert(node, "DequantizeLinear", [node.inputs[1], node.inputs[3]], axis=1)
            new = insert(node, "MatMul", [quantized.inputs[0], widened.outputs[0]])
            replace(node.outputs[0], new.outputs[0])
            model.graph.remove(node, safe=True)
            continue
        source, codes, scales, _, *rest = [*node.inputs, None, None][:5]
        widened = insert(node, "DequantizeLinear", [codes, scales], axis=1)
        new = insert(node, "MatMul", [source, widened.outputs[0]])
        if rest[0] is not None:
            new = insert(node, "Add", [new.outputs[0], rest[0]])
        replace(node.outputs[0], new.outputs[0])
        model.graph.remove(node, safe=True)
    return len(found)


def remove_unused(graph: ir.Graph) -> None:
    """Remove nodes none of whose outputs is used, then initializers that nothing reads.

    requires  nothing; ensures  every node leads to an output of the graph.
    """
    kept = set(graph.outputs)
    for node in reversed(list(graph)):
        if not any(value in kept or value.uses() for value in node.outputs):
            graph.remove(node, safe=True)
    for name in [name for name, value in graph.initializers.items() if not value.uses() and value not in kept]:
        if graph.initializers[name] in graph.inputs:  # an input with a default
            graph.inputs.remove(graph.initializers[name])
        del graph.initializers[name]
