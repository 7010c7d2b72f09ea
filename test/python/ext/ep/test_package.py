"""What is installed: names, types, the shared object itself."""

import ast
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import torch

from mscclpp.ext import ep

PACKAGE = pathlib.Path(ep.__file__).parent


def _stub():
    return ast.parse((PACKAGE / "_cpp.pyi").read_text())


def _names_in(node):
    """Functions, properties and fields that a class of the stub declares."""
    names = set()
    for item in node.body:
        if isinstance(item, ast.FunctionDef):
            names.add(item.name)
        elif isinstance(item, ast.AnnAssign):
            names.add(item.target.id)
        elif isinstance(item, ast.Assign):
            names.update(target.id for target in item.targets)
    return names


def test_the_stub_describes_the_module():
    import mscclpp_ep_cpp as module

    declared = {n.name: n for n in _stub().body if isinstance(n, (ast.ClassDef, ast.FunctionDef))}
    public = {name for name in dir(module) if not name.startswith("_")}
    assert set(declared) == public
    for name, node in declared.items():
        if isinstance(node, ast.ClassDef):
            there = {n for n in dir(getattr(module, name)) if not n.startswith("_")}
            if name in ("DType", "Platform"):
                there = set(getattr(module, name).__members__)
            wanted = {n for n in _names_in(node) if not n.startswith("_")}
            assert there == wanted, f"class {name}"


def test_the_types_are_marked():
    assert (PACKAGE / "py.typed").exists()


def test_all_is_complete():
    for name in ep.__all__:
        assert hasattr(ep, name)


def test_the_low_level_module_works_without_torch_tensors():
    numpy = pytest.importorskip("numpy")
    array = numpy.arange(6, dtype=numpy.int32).reshape(2, 3)
    tensor = ep._cpp.Tensor(array)
    assert tensor.shape == (2, 3) and tensor.dtype == ep._cpp.DType.i32
    assert tensor.data_ptr == array.ctypes.data
    array[0, 0] = 42
    assert torch.utils.dlpack.from_dlpack(tensor.to_dlpack())[0, 0] == 42
    with pytest.raises(ep.EpInvalidArgument, match="is not supported: use bfloat16"):
        ep._cpp.Tensor(numpy.zeros(2, dtype=numpy.float64))
    with pytest.raises(ep.EpInvalidArgument, match="element sizes differ"):
        ep._cpp.Tensor(array, ep._cpp.DType.bf16)
    absent = ep._cpp.DispatchRequest().x
    assert not absent and ep.tensors.to_torch_if_any(absent) is None
    with pytest.raises(ep.EpInvalidArgument, match="an absent tensor has no memory"):
        absent.to_dlpack()


def test_tensors_hold_each_others_memory():
    source = torch.arange(12, dtype=torch.int64).view(3, 4)
    expected, pointer = source.clone(), source.data_ptr()
    held = ep.tensors.to_cpp("x", source)
    del source
    noise = [torch.full((3, 4), -1, dtype=torch.int64) for _ in range(64)]
    back = ep.tensors.to_torch(held)
    del held
    assert back.data_ptr() == pointer and torch.equal(back, expected)
    del noise


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, torch.float8_e4m3fn, torch.float32, torch.int32, torch.int64, torch.uint8],
    ids=str,
)
@pytest.mark.parametrize("shape", [(3, 8), (0, 8), (3, 0), (5,), ()], ids=str)
def test_tensors_cross_unchanged(dtype, shape):
    bits = torch.randint(0, 100, shape, dtype=torch.uint8)
    there = bits.view(dtype) if dtype == torch.float8_e4m3fn else bits.to(dtype)
    back = ep.tensors.to_torch(ep.tensors.to_cpp("x", there))
    assert back.dtype == dtype and back.shape == there.shape
    assert torch.equal(back.float(), there.float())


def test_strides_and_gradients_cross():
    x = torch.arange(12, dtype=torch.float32).view(3, 4).t().requires_grad_()
    back = ep.tensors.to_torch(ep.tensors.to_cpp("x", x))
    assert back.stride() == x.stride() == (1, 4)
    assert not back.requires_grad and torch.equal(back, x.detach())


# ---- the shared object ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared_object():
    import mscclpp_ep_cpp

    return mscclpp_ep_cpp.__file__


def _run(*command):
    if shutil.which(command[0]) is None:
        pytest.skip(f"needs {command[0]} (binutils)")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _needed(library):
    return set(re.findall(r"NEEDED.*\[(.*?)\]", _run("readelf", "-d", library)))


def test_it_needs_nothing_but_the_system(shared_object):
    needed = _needed(shared_object)
    # libstdc++ must be shared: a second, static copy crashes in a torch process.
    assert "libstdc++.so.6" in needed
    allowed = r"lib(stdc\+\+|gcc_s|m|c|pthread|dl|rt)\.so\.\d+|ld-linux-.*"
    brought = {p.name: p for p in (pathlib.Path(shared_object).parent / "mscclpp_ep.libs").iterdir()}
    for library in brought.values():
        needed |= _needed(library)
    others = needed - brought.keys()
    assert all(re.fullmatch(allowed, name) for name in others), others
    # Those that come along are the ones that are loaded.
    loaded = dict(re.findall(r"(\S+) => (\S+)", _run("ldd", shared_object)))
    assert {name: loaded[name] for name in brought} == {n: str(p) for n, p in brought.items()}


def test_it_shows_its_init_function_only(shared_object):
    lines = _run("nm", "-D", "--defined-only", shared_object).splitlines()
    strong = {line.split()[2] for line in lines if line.split()[1] in "TDBR"}
    assert strong == {"PyInit_mscclpp_ep_cpp"}


def test_it_is_abi3_where_it_can_be(shared_object):
    if "site-packages" not in shared_object:
        pytest.skip("needs the installed wheel")
    assert (".abi3." in shared_object) == (sys.version_info >= (3, 12))
