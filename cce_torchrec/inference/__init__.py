"""Trained tables as serving has them: packed, quantised, read-only, and without Python."""

from cce_torchrec.inference.collection import (
    InferenceEmbeddingBagCollection,
    InferenceEmbeddingCollection,
    inference_collection,
    inference_model,
)
from cce_torchrec.inference.examples import write_examples
from cce_torchrec.inference.exported import (
    TensorInputs,
    to_exported_program,
    to_package,
    to_torchscript,
)
from cce_torchrec.inference.folder import load_inference, save_inference
from cce_torchrec.inference.onnx_file import to_onnx
from cce_torchrec.inference.plain import plain_collection
from cce_torchrec.inference.sizes import Sizes, TableSizes, sizes_of
from cce_torchrec.inference.vectors import vectors_of, write_vectors

__all__ = [
    "InferenceEmbeddingBagCollection",
    "InferenceEmbeddingCollection",
    "Sizes",
    "TableSizes",
    "TensorInputs",
    "inference_collection",
    "inference_model",
    "load_inference",
    "plain_collection",
    "save_inference",
    "sizes_of",
    "to_exported_program",
    "to_onnx",
    "to_package",
    "to_torchscript",
    "vectors_of",
    "write_examples",
    "write_vectors",
]
