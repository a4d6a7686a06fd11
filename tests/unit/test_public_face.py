"""What `cce_torchrec` offers, and that it costs nothing before it is used."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import cce_torchrec

ROOT = Path(cce_torchrec.__file__).parent


def run(code):
    """Standard output of `code` in a fresh Python."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize("name", cce_torchrec.__all__)
def test_every_name_is_found_and_documented(name):
    assert name in dir(cce_torchrec)
    assert getattr(cce_torchrec, name).__doc__


def test_type_checkers_see_the_same_names():
    """The imports for type checkers and the table of modules agree."""
    text = (ROOT / "__init__.py").read_text()
    assert sorted(cce_torchrec._MODULE_OF) == sorted(cce_torchrec.__all__)
    seen = text[text.index("if TYPE_CHECKING") : text.index("_MODULES")]
    for name, module in cce_torchrec._MODULE_OF.items():
        assert name in seen and f"from cce_torchrec.{module} import" in seen
    assert (ROOT / "py.typed").exists()


def test_no_name_is_also_a_module():
    """Else what an import gives would depend on which came first."""
    modules = {path.stem for path in ROOT.iterdir()}
    assert not modules & set(cce_torchrec.__all__)


def test_importing_the_package_loads_no_torch():
    loaded = "print(sorted({'torch', 'torchrec', 'numpy'} & set(sys.modules)))"
    assert run(f"import sys, cce_torchrec; {loaded}").strip() == "[]"
    assert run(f"import sys; from cce_torchrec.train import options; {loaded}").strip() == "[]"


def test_unknown_names():
    with pytest.raises(AttributeError, match="module 'cce_torchrec' has no attribute 'clutser'"):
        cce_torchrec.clutser  # noqa: B018  # a misspelling
    with pytest.raises(ImportError, match="clutser"):
        importlib.import_module("cce_torchrec.clutser")


def test_managed_collision_is_refused_whatever_came_first():
    run(
        "from cce_torchrec.modules import compress\n"
        "from torch.nn.modules.module import _global_module_registration_hooks as hooks\n"
        "assert any(hook.__module__.startswith('cce_torchrec') for hook in hooks.values())"
    )
