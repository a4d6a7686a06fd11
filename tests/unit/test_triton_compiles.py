"""The Triton kernels compile for an H100, down to machine code, on a machine without a GPU.

The interpreter, which runs them elsewhere in the tests, has no types and no limits of a device.
"""

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from cce_torchrec.clustering import triton_kernel as passes  # noqa: E402
from cce_torchrec.inference import triton_lookup  # noqa: E402
from cce_torchrec.inference.row_types import ROW_TYPES  # noqa: E402
from cce_torchrec.kmeans import triton_kernel as kmeans  # noqa: E402
from cce_torchrec.kmeans import triton_search, triton_sums  # noqa: E402
from cce_torchrec.lookup import triton_kernel as fused  # noqa: E402

H100 = GPUTarget("cuda", 90, 32)
SHARED_BYTES = 227 << 10
"""Most shared memory of one program on sm_90."""


@pytest.fixture(autouse=True)
def compiled_anew(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    if not isinstance(fused.expand, triton.runtime.jit.JITFunction):
        pytest.skip("Triton interprets in this process")


def compile_for_h100(kernel, types, constants, **options):
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constexprs=constants)
    compiled = triton.compile(source, target=H100, options=options)
    assert ".target sm_90" in compiled.asm["ptx"] and compiled.asm["cubin"]
    assert compiled.metadata.shared <= SHARED_BYTES


@pytest.mark.parametrize("ids, weights", [("*i64", None), ("*i32", "*fp32"), ("*i64", "*fp16")])
@pytest.mark.parametrize(
    ("code_bits", "rows"), [(0, "*i32"), (0, "*i64"), (16, "*i32"), (12, "*i64")]
)
def test_expansion(ids, weights, code_bits, rows):
    alike, variable = weights is None, weights == "*fp16"
    types = {"ids": ids, "offsets": ids, "lookup": "*i64", "out": rows, "out_offsets": rows}
    types |= {"weights": weights, "out_weights": weights, "invalid": "*i64"}
    types["first_bad"] = None if alike else "*i64"
    types |= dict.fromkeys(("starts", "out_starts"), None if alike else "*i64")
    types |= dict.fromkeys(("bag_starts", "out_bag_starts"), "*i64" if variable else None)
    signature = {f"{name}_ptr": kind for name, kind in types.items() if kind is not None}
    constants = {f"{name}_ptr": None for name, kind in types.items() if kind is None}
    constants |= {"CHUNKS": 4, "STEPS": 5, "BAG_STEPS": 5, "VALUES": 256, "BAGS": 1024}
    constants |= {"CODE_BITS": code_bits, "RAW": alike, "MARK": alike, "LONG": alike}
    constants |= {"PAIRS": rows == "*i32", "TABLE_BY_TABLE": code_bits > 0}
    constants |= {"FEATURES": 32, "EXACT": rows == "*i32"}
    constants["ROW_BYTES"] = {16: 8}.get(code_bits, 0) if ids == "*i64" else 0
    fields = ("TABLE_FIELDS", "CHUNK_FIELDS", "FEATURE_FIELDS")
    constants |= {name: getattr(fused, name) for name in fields}
    numbers = [name for name in fused.expand.arg_names if name not in {*signature, *constants}]
    signature |= dict.fromkeys(numbers, "i32")
    compile_for_h100(fused.expand, signature, constants, num_warps=8)


@pytest.mark.parametrize("offsets, variable", [("*i32", False), ("*i64", True)])
def test_starts(offsets, variable):
    pointers = ("bag_starts", "tables", "starts", "out_starts")
    types = {f"{name}_ptr": "*i64" for name in pointers} | {"offsets_ptr": offsets}
    types |= dict.fromkeys(("num_features", "num_tables", "stride"), "i32")
    constants = {"FEATURES": 32, "TABLES": 16, "VARIABLE": variable}
    constants["TABLE_FIELDS"] = fused.TABLE_FIELDS
    compile_for_h100(fused.starts, types, constants)


@pytest.mark.parametrize("of_batch", ["*i64", "*i32"])
@pytest.mark.parametrize("row_type", ROW_TYPES.values(), ids=list(ROW_TYPES))
def test_lookup_of_packed_tables(row_type, of_batch):
    """All that there is with ids of int64, and next to nothing with int32."""
    whole = of_batch == "*i64"
    types = dict.fromkeys(("ends", "numbers", "hashes"), "*i64")
    types |= {
        "values": of_batch,
        "lengths": of_batch,
        "codes": "*i32",
        "rows": "*u8",
        "out": "*fp32",
    }
    types |= {"weights": "*fp32" if whole else None, "found": "*i64" if whole else None}
    signature = {f"{name}_ptr": kind for name, kind in types.items() if kind is not None}
    constants = {f"{name}_ptr": None for name, kind in types.items() if kind is None}
    # Of a table of four chunks of 16 values, and of one whose width is the least there is.
    width, chunks = (16, 4) if whole else (max(1, 16 // row_type.bits), 1)
    numbers = [0] * triton_lookup.FIELDS
    numbers[12], numbers[13] = row_type.row_bytes(width), row_type.number
    numbers[14], numbers[15] = width, chunks
    shape = triton_lookup.Shape.of([numbers])
    constants |= {"TYPE": shape.row_type, "VEC": shape.vec, "ALIGNED": shape.aligned, "SLOTS": 128}
    constants |= {"HASHED": whole, "HELPED": whole}
    constants |= {"FIELDS": triton_lookup.FIELDS, "NONE": triton_lookup.NONE_FOUND}
    kernel = triton_lookup.look_up
    numbers = [name for name in kernel.arg_names if name not in {*signature, *constants}]
    signature |= dict.fromkeys(numbers, "i32")
    compile_for_h100(kernel, signature, constants, num_warps=4, enable_fp_fusion=False)


HALVES = ("high", "low", "c_high", "c_low")
FLOATS = ("tolerances", "half_norm", "reach")
NEAREST = {
    "split": ({"high": "*fp16", "low": "*fp16"}, {"POINTS": 64}),
    "best_group": ({"c": "*fp16", "bucket": "*u8"}, {"POINTS": 128}),
    "second_look": ({}, {"POINTS": 128}),
    "exact": ({"c": "*fp64", "half_norm": "*fp64"}, {"POINTS": 1, "CENTROIDS": 128}),
    "_accumulate": ({"c": "*fp32"}, {"POINTS": 64}),
}


@pytest.mark.parametrize("dim", [4, 20, 32, 64, 150])
@pytest.mark.parametrize("name", NEAREST)
def test_nearest_centroids(name, dim):
    of = triton_sums if name == "_accumulate" else kmeans
    kernel, (types, constants) = getattr(of, name), NEAREST[name]
    kinds = {**dict.fromkeys(HALVES, "*fp16"), **dict.fromkeys(FLOATS, "*fp32")}
    kinds |= dict.fromkeys(("main", "helper", "a", "b", "clusters", "out", "ties"), "*i32")
    kinds |= dict.fromkeys(("tied_bucket", "num_ties"), "*i32")
    kinds |= dict.fromkeys(("order", "starts", "weights", "sums", "sizes", "errors"), "*i64")
    kinds |= dict.fromkeys(("unit", "scales"), "*fp64")
    signature = {f"{key}_ptr": kind for key, kind in {**kinds, **types}.items()}
    signature |= dict.fromkeys(("first", "count", "num_centroids"), "i32")
    dims = triton_search.dims_at_once(dim)
    constants = {
        **constants, **triton_search.tolerances(dim, 2.0**-21), "DIM": dim,
        "WIDTH": triton_search.width(dim),
        "DIMS": min(32, dims) if name == "exact" else dims, "GROUPS": 32, "FOLD": 2,
        "PAIRS": dim != 20,
    }  # fmt: skip
    used = {k: v for k, v in signature.items() if k in kernel.arg_names}
    compile_for_h100(
        kernel, used, {k: v for k, v in constants.items() if k in kernel.arg_names}, num_warps=4
    )


@pytest.mark.parametrize("new_codes", ["*u8", "*i16", "*i32"])
@pytest.mark.parametrize(
    "name", ["_write_pairs", "_count_pairs", "_append_sampled", "_add_residuals", "_relabel"]
)
def test_passes_over_ids(name, new_codes):
    kernel = getattr(passes, name)
    pointers = {
        "codes": "*u8",
        "new_codes": new_codes,
        "counts": "*i32",
        "a": "*i32",
        "b": "*i32",
        "out": "*i32",
    }
    pointers |= dict.fromkeys(("main", "helper", "centroids"), "*i32")
    pointers |= dict.fromkeys(
        ("weights", "keys", "sums", "sizes", "found", "changed", "out"), "*i64"
    )
    types = {f"{key}_ptr": kind for key, kind in pointers.items()}
    types |= dict.fromkeys(
        ("bits", "shift", "stride", "begin", "first", "count", "base", "room"), "i32"
    )
    types |= dict.fromkeys(("multiplier", "addend", "new_multiplier", "new_addend"), "i64")
    types |= dict.fromkeys(("sample_multiplier", "sample_addend", "threshold"), "i64")
    types["helper_rows"] = "i32"
    constants = {"IDS": 32, "DIM": 20, "DIMS": 32, "WEIGHTED": False}
    if new_codes == "*i32":
        types["levels_ptr"] = "*u8"
    else:
        constants["levels_ptr"] = None
    constants |= dict.fromkeys(("BY_PAIR", "KEYS"), new_codes != "*u8")
    names = kernel.arg_names
    constants = {key: value for key, value in constants.items() if key in names}
    compile_for_h100(kernel, {k: v for k, v in types.items() if k in names}, constants)


def test_random_reads_of_the_benchmark():
    from benchmarks.gpu_parts.random_reads import read

    types = {"ids_ptr": "*i64", "words_ptr": "*i64", "out_ptr": "*i64", "count": "i32"}
    compile_for_h100(read, types, {"VALUES": 512}, num_warps=8)
