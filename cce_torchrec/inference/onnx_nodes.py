"""A graph of ONNX, put together node by node."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np


def onnx_package() -> Any:
    """The module `onnx`.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module("onnx")
    except ImportError as error:
        raise ValueError(
            "to_onnx needs the package onnx; pip install 'cce-torchrec[serving]'"
        ) from error


class Graph:
    """Nodes in the order in which they are added, and constants; a value is known by its name."""

    def __init__(self, outer: Graph | None = None) -> None:
        self.onnx = onnx_package()
        self.types = self.onnx.TensorProto
        self.nodes: list[Any] = []
        self.tensors: dict[str, Any] = {} if outer is None else outer.tensors
        self.arrays: dict[str, np.ndarray[Any, Any]] = {}
        """What the tensors that were given a name consist of, which have none of it yet."""
        self.prefix = "value" if outer is None else "inner"

    def add(self, kind: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """A node of one output, which is returned; `name` is told in errors."""
        return self.add_all(kind, *inputs, outputs=1, name=name, **attributes)[0]

    def add_all(
        self, kind: str, *inputs: str, outputs: int, name: str = "", **attributes: Any
    ) -> list[str]:
        """A node of several outputs, which are returned."""
        names = [f"{self.prefix}{len(self.nodes)}_{i}" for i in range(outputs)]
        name = name or f"{self.prefix}{len(self.nodes)}_{kind}"
        node = self.onnx.helper.make_node(kind, inputs, names, name=name, **attributes)
        self.nodes.append(node)
        return names

    def cast(self, value: str, kind: str) -> str:
        """`value` as a type of TensorProto."""
        return self.add("Cast", value, to=getattr(self.types, kind))

    def number(self, value: Any, dtype: type = np.int64) -> str:
        """A small constant, a number or a list; equal ones are one tensor."""
        array: np.ndarray[Any, Any] = np.asarray(value, dtype)
        name = f"{array.dtype}{array.tolist()}"
        if name not in self.tensors:
            self.tensors[name] = self.onnx.numpy_helper.from_array(array, name)
        return name

    def tensor(self, name: str, array: np.ndarray[Any, Any]) -> str:
        """The tensor `name`, of which there is one."""
        # Not by `make_tensor`: messages of protobuf are copied, and have 2 GiB at most.
        kind = self.onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        self.tensors[name] = self.types(name=name, data_type=kind, dims=array.shape)
        self.arrays[name] = np.ascontiguousarray(array)
        return name

    def value_info(self, name: str, kind: int, shape: list[Any]) -> Any:
        """An input or output; dimensions that are names or None are of any size."""
        return self.onnx.helper.make_tensor_value_info(name, kind, shape)


def column(graph: Graph, value: str) -> str:
    """`value` [V] as [V, 1]."""
    return graph.add("Unsqueeze", value, graph.number([1]))
