"""An ONNX graph that is built node by node, its weights in a file beside it.

Graphs are built directly instead of being traced: the operators that make decoding fast
(MatMulNBits, GroupQueryAttention with a shared cache) are onnxruntime's own, and no trace contains
them. Values are named by the node that makes them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

OPSET, IR_VERSION = 21, 10
MICROSOFT = "com.microsoft"
WEIGHTS = "model.onnx.data"
_FLOAT = 1  # TensorProto.FLOAT
_INLINE = 256  # bytes; what is smaller stays in the graph, where shapes can be inferred from it
_ALIGNED = 4096  # so that a weight can be mapped into memory


class Graph:
    """Nodes, constants, inputs and outputs, written to a folder.

    Args:
        folder: gets ``model.onnx`` and ``model.onnx.data``; weights are written as they come.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.nodes: list[Any] = []
        self._constants: dict[str, Any] = {}
        self._widened: dict[str, str] = {}
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._count = 0
        self._file = (folder / WEIGHTS).open("wb")

    def input(self, name: str, kind: type, shape: list[int | str]) -> str:
        self._inputs.append(_value(name, kind, shape))
        return name

    def output(self, name: str, kind: type, shape: list[int | str]) -> None:
        self._outputs.append(_value(name, kind, shape))

    def constant(self, values: Any, name: str = "") -> str:
        """A constant; large ones go to the file at once."""
        from onnx import TensorProto, helper, numpy_helper

        array = np.asarray(values, order="C")  # a scalar stays one
        name = name or f"{array.dtype}:{array.shape}:{array.tobytes().hex()[:64]}"
        if name in self._constants:
            return name
        if array.nbytes <= _INLINE:
            self._constants[name] = numpy_helper.from_array(array, name)
            return name
        offset = -(-self._file.tell() // _ALIGNED) * _ALIGNED
        self._file.seek(offset)
        self._file.write(array.data)
        tensor = TensorProto(
            name=name, dims=array.shape, data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
            data_location=TensorProto.EXTERNAL,
        )  # fmt: skip
        where = {"location": WEIGHTS, "offset": offset, "length": array.nbytes}
        for key, value in where.items():
            tensor.external_data.add(key=key, value=str(value))
        self._constants[name] = tensor
        return name

    def floats(self, values: Any, name: str) -> str:
        """A float32 constant, kept as float16 in the file where that changes no number of it.

        The session widens it once, when it is opened: it folds what depends on constants alone.
        """
        if name not in self._widened:
            with np.errstate(over="ignore"):
                halves = np.asarray(values, np.float32).astype(np.float16)
            if np.array_equal(halves.astype(np.float32), values):
                self._widened[name] = self.node("Cast", self.constant(halves, name), to=_FLOAT)
            else:
                self._widened[name] = self.constant(values, name)
        return self._widened[name]

    def node(
        self,
        operator: str,
        *inputs: str,
        outputs: int | list[str] = 1,
        domain: str = "",
        **attributes: Any,
    ) -> Any:
        """Add a node; returns the name of its output, or a list of names where there are more.

        Args:
            outputs: how many, or their names ("" leaves one out).
        """
        from onnx import helper

        self._count += 1
        label = f"{operator}.{self._count}"
        if isinstance(outputs, int):
            outputs = [f"{label}.{i}" for i in range(outputs)]
        self.nodes.append(
            helper.make_node(operator, inputs, outputs, label, domain=domain, **attributes)
        )
        return outputs if len(outputs) > 1 else outputs[0]

    def save(self, producer: str) -> None:
        """Write the graph; nothing can be added afterwards."""
        from onnx import helper, save_model

        self._file.close()
        graph = helper.make_graph(
            self.nodes, "model", self._inputs, self._outputs, list(self._constants.values())
        )
        model = helper.make_model(
            graph, producer_name=producer, ir_version=IR_VERSION,
            opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)],
        )  # fmt: skip
        save_model(model, self.folder / "model.onnx")

    def close(self) -> None:
        """Give up: close the file of weights."""
        self._file.close()


def _value(name: str, kind: type, shape: list[int | str]) -> Any:
    from onnx import helper

    return helper.make_tensor_value_info(
        name, helper.np_dtype_to_tensor_dtype(np.dtype(kind)), shape
    )
