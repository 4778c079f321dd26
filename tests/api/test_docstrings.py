"""No public function, class, method or module is without a docstring."""

import ast
from pathlib import Path

import loraformat_converters
import pytest

import loraformat

ROOTS = [Path(package.__file__).parent for package in (loraformat, loraformat_converters)]


def undocumented(text):
    """Yield what one module makes public and says nothing of."""
    tree = ast.parse(text)
    if not ast.get_docstring(tree):
        yield "module"
    public = set()
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            public = {element.value for element in node.value.elts}
    for node in tree.body:
        if getattr(node, "name", None) in public:
            if not ast.get_docstring(node):
                yield node.name
            for member in node.body if isinstance(node, ast.ClassDef) else ():
                name = getattr(member, "name", "_")
                if name[0] != "_" and not _repeats(member) and not ast.get_docstring(member):
                    yield f"{node.name}.{name}"


def _repeats(function):
    """Tell whether it is an overload or a setter, of which something is said elsewhere."""
    words = {ast.unparse(decorator) for decorator in function.decorator_list}
    return any(word == "overload" or word.endswith(".setter") for word in words)


def test_every_public_name_has_a_docstring():
    files = [(root, path) for root in ROOTS for path in sorted(root.rglob("*.py"))]
    assert len(files) > 300
    missing = [
        f"{path.relative_to(root.parent)}: {name}"
        for root, path in files
        for name in undocumented(path.read_text(encoding="utf-8"))
    ]
    assert missing == []


@pytest.mark.parametrize("name", sorted(set(loraformat.__all__) - {"__version__"}))
def test_the_public_face_has_words(name):
    """At run time: a dataclass without words would get its signature."""
    value = getattr(loraformat, name)
    assert callable(value)  # train and demo are packages, too
    assert len(vars(value).get("__doc__", "") or value.__doc__) > 20
    assert not value.__doc__.startswith(f"{name}(")


def test_what_is_missing_is_found():
    text = (
        '"""Words."""\n__all__ = ["One", "two"]\nclass One:\n    """W."""\n    def m(self): ...\n'
    )
    assert list(undocumented(text + "def two(): ...\n")) == ["One.m", "two"]
