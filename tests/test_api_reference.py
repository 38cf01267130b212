"""The API reference is made without a warning and is complete; every docstring names what its function takes."""

from __future__ import annotations

import griffe
import pytest

import vltrain
from tests import api_reference


def test_docstrings_name_what_there_is():
    assert api_reference.docstring_faults() == []


def test_a_parameter_that_is_not_there_is_found(tmp_path, monkeypatch):
    (tmp_path / "wrong").mkdir()
    (tmp_path / "wrong" / "__init__.py").write_text(
        'def f(a: int) -> None:\n    """One.\n\n    Args:\n        a: this.\n        b: that.\n    """\n'
    )
    monkeypatch.setattr(api_reference, "ROOT", tmp_path)
    monkeypatch.setattr(api_reference, "PACKAGES", ("wrong",))
    assert [fault.rpartition(": Args")[2] for fault in api_reference.docstring_faults()] == [
        ": b: not in the signature"
    ]
    assert griffe.__name__


def test_the_reference_has_every_public_name_and_extension_point(tmp_path):
    api_reference.write_reference(tmp_path)
    page = (tmp_path / "vltrain.html").read_text()
    assert all(f'id="{name}"' in page for name in vltrain.__all__)
    assert all((tmp_path / f"{module.replace('.', '/')}.html").is_file() for module in api_reference.EXTENSION_POINTS)
    assert callable(vltrain.train) and vltrain.train.__name__ == "vltrain.train", "the package is itself again"


def test_a_warning_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(vltrain, "__all__", [*vltrain.__all__, "no_such_name"])
    monkeypatch.setattr(vltrain, "no_such_name", None, raising=False)
    monkeypatch.delattr(vltrain, "no_such_name")
    with pytest.raises((UserWarning, AttributeError), match="no_such_name"):
        api_reference.write_reference(tmp_path)
