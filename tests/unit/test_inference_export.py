"""What serves without Python: TorchScript, torch.export, AOTInductor, and a server in C++."""

import os
import shutil
import subprocess
from pathlib import Path

import fbgemm_gpu
import pytest
import torch
from torch.utils import cpp_extension
from torchrec.models.dlrm import DLRM

from cce_torchrec import CCEEmbeddingBagConfig, CCEEmbeddingCollection, cluster
from cce_torchrec.inference import (
    TensorInputs,
    inference_collection,
    inference_model,
    native,
    serve_check,
    to_exported_program,
    to_package,
    to_torchscript,
    write_examples,
)
from tests.support.inference import batch_of, many_tables, one_table, tensors

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")

LOOKUPS = ["portable", "fused"]
SOURCE = Path(__file__).parents[2] / "docs" / "serve.cpp"


def libraries(lookup):
    """With the operators of a lookup, for a process without Python."""
    if lookup == "fused":
        return [str(native.library())]
    return [str(Path(fbgemm_gpu.__file__).parent / "fbgemm_gpu_tbe_inference.so")]


@pytest.fixture(scope="module", params=LOOKUPS)
def lookup(request):
    """A lookup of many tables, with batches of several sizes."""
    torch.manual_seed(0)
    collection = many_tables()
    cluster(collection)
    served = inference_collection(collection, lookup=request.param)
    batches = [tensors(batch_of(collection, size))[:2] for size in (0, 1, 5)]
    # Of a single id, a number that programs are easily made without.
    batches.insert(0, (torch.tensor([3]), torch.tensor([0, 0, 1, 0, 0, 0, 0])))
    return request.param, served.lookup, batches


@pytest.fixture(scope="module", params=LOOKUPS)
def dlrm(request):
    """A DLRM, for serving and as it was trained, with inputs of several sizes, 0 among them."""
    torch.manual_seed(0)
    model = DLRM(one_table(), 4, [8, 16], [8, 1])
    cluster(model)
    served = TensorInputs(inference_model(model, lookup=request.param), ["f"])
    inputs = [
        (torch.randn(size, 4), torch.randint(0, 1000, (size,)), torch.ones(size).long())
        for size in (0, 1, 6)
    ]
    return request.param, served, inputs, model.eval()


@pytest.fixture(scope="module")
def package(dlrm, tmp_path_factory):
    """The package of `dlrm`, which takes long to compile; with the other lookup a lookup's does."""
    name, served, inputs, _ = dlrm
    if name == "portable":
        return None
    return to_package(served, tmp_path_factory.mktemp("package") / "model.pt2", inputs[-1])


def test_programs_of_a_lookup_take_batches_of_any_size(lookup):
    _, served, batches = lookup
    program = to_exported_program(served).module()
    for values, lengths in batches:
        assert torch.equal(program(values, lengths), served(values, lengths))
    values = batches[-1][0].clone()
    values[-1] = 60
    with pytest.raises(
        (RuntimeError, ValueError), match=r"outside \[0, 60\)|\[0, 60\) of table 'joint'"
    ):
        program(values, batches[-1][1])


def test_programs_take_weights():
    collection = many_tables(is_weighted=True)
    served = inference_collection(collection, lookup="portable").lookup
    program = to_exported_program(served, tensors(batch_of(collection, 3))).module()
    batch = tensors(batch_of(collection, 8))
    assert torch.equal(program(*batch), served(*batch))


def test_models_are_exported_whole(dlrm):
    _, served, inputs, _ = dlrm
    program = to_exported_program(served, inputs[-1]).module()
    script = to_torchscript(served, inputs[-1])
    for own in inputs:
        expected = served(*own)
        assert torch.allclose(program(*own), expected, atol=1e-6)
        assert torch.allclose(script(*own), expected, atol=1e-6)
    values = inputs[-1][1].clone()
    values[2] = 1000
    with pytest.raises((RuntimeError, torch.jit.Error), match=r"outside \[0, 1000\)"):
        script(inputs[-1][0], values, inputs[-1][2])


def test_models_that_go_by_the_numbers_of_a_batch_are_not_traced():
    class Sequences(torch.nn.Module):
        def __init__(self):
            super().__init__()
            tables = [
                CCEEmbeddingBagConfig(name=name, num_embeddings=100, embedding_dim=16, num_rows=20)
                for name in ("f", "g")
            ]
            self.collection = CCEEmbeddingCollection(tables)

        def forward(self, dense, features):
            return sum(own.values().sum() for own in self.collection(features).values())

    served = TensorInputs(inference_model(Sequences(), lookup="portable"), ["f", "g"])
    example = (torch.zeros(2, 1), torch.arange(6), torch.tensor([1, 2, 0, 3]))
    with pytest.raises(ValueError, match="the model cannot be traced: with another batch"):
        to_torchscript(served, example)


def test_features_may_come_in_another_order_than_tables_have():
    torch.manual_seed(0)
    collection = many_tables()
    cluster(collection)
    names = ["y", "x", "q", "raw", "h", "g", "f"]

    class Pooled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.collection = collection

        def forward(self, dense, features):
            return self.collection(features).values() + dense

    served = TensorInputs(inference_model(Pooled(), data_type="fp32", lookup="portable"), names)
    batches = []
    for size in (3, 1, 0):
        batch = batch_of(collection, size)
        turned = batch.permute([batch.keys().index(name) for name in names])
        batches.append((torch.zeros(size, 1), turned.values(), turned.lengths()))
    forms = [to_torchscript(served, batches[0]), to_exported_program(served, batches[0]).module()]
    for inputs in batches:
        for form in forms:
            assert torch.equal(form(*inputs), served(*inputs))


def test_models_need_an_example(dlrm):
    _, served, inputs, _ = dlrm
    with pytest.raises(ValueError, match="give an example of the model's inputs: dense, values"):
        to_exported_program(served)
    with pytest.raises(ValueError, match="1 lengths for each of two rows or more"):
        to_torchscript(served, inputs[1])


def test_whole_models_are_checked_by_examples(dlrm, package, tmp_path):
    _, served, inputs, trained = dlrm
    ids = batch_of(trained.sparse_arch.embedding_bag_collection, 9)
    data = write_examples(tmp_path / "examples.npz", trained, ids, torch.randn(9, 4))
    to_torchscript(served, inputs[-1]).save(str(tmp_path / "model.pt"))
    for export in filter(None, (tmp_path / "model.pt", package)):
        report = serve_check.check_export(export, data, batch_size=4)
        assert report.ok, export
    if package is None:
        return
    other = serve_check.installed_versions() | {"torch": "1.0"}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(serve_check, "installed_versions", lambda: other)
        with pytest.raises(ValueError, match=r"was compiled with .*; compile it again"):
            serve_check.check_export(package, data)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """docs/serve.cpp, built as its page says."""
    program = tmp_path_factory.mktemp("server") / "serve"
    include = [f"-I{path}" for path in cpp_extension.include_paths()]
    (folder,) = cpp_extension.library_paths()
    subprocess.run(
        ["g++", "-std=c++20", "-O0", *include, str(SOURCE), "-Wl,--no-as-needed", f"-L{folder}",
         "-ltorch", "-ltorch_cpu", "-lc10", "-ldl", f"-Wl,-rpath,{folder}", "-o", str(program)],
        check=True,
    )  # fmt: skip
    return program


def answer(server, model, types, inputs, libraries, **variables):
    """What the server prints for `inputs`, as a tensor; without Python in its surroundings."""
    text = "\n".join(" ".join(map(str, [*t.shape, *t.flatten().tolist()])) for t in inputs)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "LD_"))}
    command = [str(server), str(model), types, *libraries]
    env |= variables
    done = subprocess.run(command, input=text, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    sizes, *numbers = done.stdout.splitlines()
    shape = [int(size) for size in sizes.split()]
    return torch.tensor([float(number) for number in numbers]).view(shape)


def test_a_server_without_python_gives_the_same_numbers(server, lookup, tmp_path):
    name, served, batches = lookup
    script = tmp_path / "lookup.pt"
    to_torchscript(served).save(script)
    for batch in batches[2:]:
        found = answer(server, script, "i1,i1", batch, libraries(name))
        assert torch.equal(found, served(*batch))


def test_a_library_may_be_there_before_the_server_is(server, lookup, tmp_path):
    """As Triton Inference Server has it."""
    name, served, batches = lookup
    script = tmp_path / "lookup.pt"
    to_torchscript(served).save(script)
    (folder,) = cpp_extension.library_paths()
    (library,) = libraries(name)
    variables = {"LD_PRELOAD": library, "LD_LIBRARY_PATH": folder}
    found = answer(server, script, "i1,i1", batches[-1], [], **variables)
    assert torch.equal(found, served(*batches[-1]))


def test_packages_take_batches_of_any_size(server, lookup, tmp_path):
    name, served, batches = lookup
    if name == "fused":
        pytest.skip("one operator, which the packages of models have")  # 8 seconds
    path = to_package(served, tmp_path / "one.pt2")
    package = torch._inductor.aoti_load_package(str(path))
    for values, lengths in batches:
        assert torch.equal(package(values, lengths), served(values, lengths))
    values = batches[-1][0].clone()
    values[-1] = 60
    with pytest.raises(RuntimeError, match=r"outside \[0, 60\)|API call failed|out of bounds"):
        package(values, batches[-1][1])
    found = answer(server, path, "i1,i1", batches[-1], libraries(name))
    assert torch.equal(found, served(*batches[-1]))


def test_a_server_without_python_gives_the_same_numbers_of_a_model(server, dlrm, package, tmp_path):
    name, served, inputs, _ = dlrm
    to_torchscript(served, inputs[-1]).save(tmp_path / "model.pt")
    for model in filter(None, (tmp_path / "model.pt", package)):
        for own in inputs[1:]:
            found = answer(server, model, "f2,i1,i1", own, libraries(name))
            assert torch.allclose(found, served(*own), atol=1e-6)
    if package is not None:
        nothing = torch._inductor.aoti_load_package(str(package))(*inputs[0])
        assert nothing.shape == served(*inputs[0]).shape
