"""The Triton kernels compile for an H100, down to machine code, on a machine without a GPU.

The interpreter, which runs them elsewhere in the tests, has no types and no limits of a device.
"""

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from cce_torchrec.clustering import triton_kernel as passes  # noqa: E402
from cce_torchrec.fused import triton_kernel as fused  # noqa: E402
from cce_torchrec.kmeans import triton_kernel as kmeans  # noqa: E402

H100 = GPUTarget("cuda", 90, 32)
SHARED_BYTES = 227 << 10
"""Most shared memory of one program on sm_90."""


@pytest.fixture(autouse=True)
def compiled_anew(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    if not isinstance(fused._expand, triton.runtime.jit.JITFunction):
        pytest.skip("Triton interprets in this process")


def compile_for_h100(kernel, types, constants, **options):
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constexprs=constants)
    compiled = triton.compile(source, target=H100, options=options)
    assert ".target sm_90" in compiled.asm["ptx"] and compiled.asm["cubin"]
    assert compiled.metadata.shared <= SHARED_BYTES


@pytest.mark.parametrize(
    "ids, weights, counts",
    [
        ("*i64", None, {"num_values": "i32", "num_features": "i32"}),
        ("*i32", "*fp32", {"num_values": "i32", "num_features": "i32"}),
        ("*i64", "*fp16", {"num_values": "i64", "num_features": "i32"}),
        ("*i32", None, {"num_values": 1, "num_features": 1}),  # Triton takes 1 as a constant
    ],
)
def test_expansion(ids, weights, counts):
    addresses = ("starts", "table_of", "tables", "chunks", "out_starts", "out", "invalid")
    types = {f"{name}_ptr": "*i64" for name in (*addresses, "first_bad")}
    types |= {"ids_ptr": ids, "weights_ptr": weights or ids, "out_weights_ptr": weights or "*i64"}
    types |= {name: kind for name, kind in counts.items() if kind != 1}
    constants = {name: kind for name, kind in counts.items() if kind == 1}
    constants |= {"WEIGHTED": weights is not None, "CHUNKS": 4, "STEPS": 5, "VALUES": 256}
    constants |= dict.fromkeys(("RAW", "MARK", "COUNT", "FIRST_BAD"), ids == "*i64")
    constants |= {"TABLE_FIELDS": fused.TABLE_FIELDS, "CHUNK_FIELDS": fused.CHUNK_FIELDS}
    compile_for_h100(fused._expand, types, constants, num_warps=8)


@pytest.mark.parametrize("offsets, variable", [("*i32", False), ("*i64", True)])
def test_bags(offsets, variable):
    pointers = ("bag_starts", "out_bag_starts", "starts", "features", "tables", "out_starts", "out")
    types = {f"{name}_ptr": "*i64" for name in pointers}
    types |= {"offsets_ptr": offsets, "lengths_ptr": "*i32"}
    types |= dict.fromkeys(("num_bags", "num_features", "num_tables", "stride"), "i32")
    sizes = {"FEATURES": 32, "TABLES": 16, "BAGS": 1024, "STEPS": 5, "VARIABLE": variable}
    fields = {"FEATURE_FIELDS": fused.FEATURE_FIELDS, "TABLE_FIELDS": fused.TABLE_FIELDS}
    for kernel in (fused._bags, fused._starts):
        constants = {k: v for k, v in {**sizes, **fields}.items() if k in kernel.arg_names}
        compile_for_h100(kernel, types, constants)


HALVES = ("high", "low", "c_high", "c_low")
FLOATS = ("norm", "half_norm", "largest")
NEAREST = {
    "_split": ({"high": "*fp16", "low": "*fp16"}, {"POINTS": 64}),
    "_best_group": ({"c": "*fp16", "bucket": "*u8"}, {"POINTS": 128}),
    "_second_look": ({}, {"POINTS": 128}),
    "_exact": ({"c": "*fp64", "half_norm": "*fp64"}, {"POINTS": 4, "CENTROIDS": 32}),
    "_accumulate": ({"c": "*fp32"}, {"POINTS": 32}),
}


@pytest.mark.parametrize("dim", [4, 20, 32, 64, 150])
@pytest.mark.parametrize("name", NEAREST)
def test_nearest_centroids(name, dim):
    kernel, (types, constants) = getattr(kmeans, name), NEAREST[name]
    kinds = {**dict.fromkeys(HALVES, "*fp16"), **dict.fromkeys(FLOATS, "*fp32")}
    kinds |= dict.fromkeys(("main", "helper", "a", "b", "nearest", "out", "ties"), "*i32")
    kinds |= dict.fromkeys(("tied_bucket", "num_ties"), "*i32")
    kinds |= dict.fromkeys(("order", "starts", "weights", "sums", "sizes", "errors"), "*i64")
    kinds |= dict.fromkeys(("unit", "scales"), "*fp64")
    signature = {f"{key}_ptr": kind for key, kind in {**kinds, **types}.items()}
    signature |= dict.fromkeys(("first", "count", "num_centroids"), "i32")
    dims = kmeans.dims_at_once(dim)
    constants = {
        **constants, **kmeans.tolerances(dim, 3), "DIM": dim, "WIDTH": kmeans.width(dim),
        "DIMS": min(32, dims) if name == "_exact" else dims, "GROUPS": 64, "PAIRS": dim != 20,
    }  # fmt: skip
    used = {k: v for k, v in signature.items() if k in kernel.arg_names}
    warps = 8 if name in ("_best_group", "_second_look") else 4
    compile_for_h100(
        kernel, used, {k: v for k, v in constants.items() if k in kernel.arg_names}, num_warps=warps
    )


@pytest.mark.parametrize("codes", ["*u8", "*i16", "*i32"])
@pytest.mark.parametrize(
    "name", ["_write_pairs", "_count_pairs", "_append_sampled", "_add_residuals", "_relabel"]
)
def test_passes_over_ids(name, codes):
    kernel = getattr(passes, name)
    pointers = {"codes": codes, "new_codes": codes, "counts": "*i32", "a": "*i32", "b": "*i32"}
    pointers |= dict.fromkeys(("main", "helper", "centroids"), "*i32")
    pointers |= dict.fromkeys(("weights", "keys", "sums", "sizes", "found", "changed"), "*i64")
    types = {f"{key}_ptr": kind for key, kind in pointers.items()}
    types |= dict.fromkeys(("columns", "column", "first", "count", "base", "room"), "i32")
    types |= dict.fromkeys(("multiplier", "addend", "new_multiplier", "new_addend"), "i64")
    types |= dict.fromkeys(("sample_multiplier", "sample_addend", "threshold"), "i64")
    types["helper_rows"] = "i32"
    constants = {"IDS": 32, "DIM": 20, "DIMS": 32, "WEIGHTED": False}
    constants |= dict.fromkeys(("BY_PAIR", "WRITE", "KEYS"), codes != "*u8")
    names = kernel.arg_names
    constants = {key: value for key, value in constants.items() if key in names}
    compile_for_h100(kernel, {k: v for k, v in types.items() if k in names}, constants)
