"""The package as a whole: each thing is found under its name."""

import ast
import importlib
import inspect
import pathlib
import pkgutil
import subprocess
import sys

import jfed


def modules():
    """Every module of the package that can be imported here, by name."""
    found = {}
    for info in pkgutil.walk_packages(jfed.__path__, "jfed."):
        try:
            found[info.name] = importlib.import_module(info.name)
        except ModuleNotFoundError as error:
            if error.name not in ("torch", "fedjax"):  # which come with the benchmark
                raise
    return found


def test_no_module_is_hidden_by_something_of_its_name():
    """`import jfed.models.odenet` must give the module, not a function of that name."""
    found = modules()
    assert len(found) > 60
    for name, module in found.items():
        parent, _, own = name.rpartition(".")
        assert getattr(sys.modules[parent], own) is module, name


def test_no_module_shares_its_name_with_a_function_or_class_beside_it():
    found = modules()
    rooms = {name.rpartition(".")[0] for name in found}
    for room in rooms:
        beside = {name.rpartition(".")[2] for name in found if name.rpartition(".")[0] == room}
        for module in (m for n, m in found.items() if n.rpartition(".")[0] == room):
            for name, thing in vars(module).items():
                own = getattr(thing, "__module__", None) == module.__name__
                if own and (inspect.isfunction(thing) or inspect.isclass(thing)):
                    assert name not in beside, f"{module.__name__}.{name} and {room}.{name}"


ROOMS = "cli planning benchmark runs reports simulation engine algorithms tiers data models".split()


def test_each_room_knows_only_those_below_it():
    """What a function imports when it is called may come from above: figures of a result."""
    folder = pathlib.Path(jfed.__file__).parent
    for i, room in enumerate(ROOMS):
        for path in (folder / room).rglob("*.py"):
            nodes = ast.parse(path.read_text()).body
            names = [n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module]
            known = {name.split(".")[1] for name in names if name.startswith("jfed.")}
            assert not known & set(ROOMS[:i]), path


def test_every_public_name_is_there_when_it_is_the_first_that_is_asked_for():
    code = """if True:
        import sys, jfed
        names = jfed.__all__
        for name in names:
            for module in [m for m in sys.modules if m.partition(".")[0] == "jfed"]:
                del sys.modules[module]
            import jfed
            assert not [m for m in sys.modules if m.startswith("jfed.")]
            getattr(jfed, name)
        assert {"simulate", "plots", "data", "ConfigError"} <= set(names)"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
