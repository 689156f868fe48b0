"""One file for each method. The configuration's `method.name` is the name of the file, so that adding one edits none.

A method of elsewhere is made known by `register`, before a configuration that names it is read.
"""

from importlib import import_module

from minillm.config.method import MethodConfig
from minillm.config.root import StageConfig, register_method
from minillm.methods.protocol import Method

_REGISTERED: dict[type[MethodConfig], type[Method]] = {}


def register(config_class: type[MethodConfig], method_class: type[Method]) -> None:
    """Let configurations name a method that is defined outside this package.

    Args:
        config_class: its keys, with the literal type of `name`, `summary` and `needs`.
        method_class: what is made of a stage's configuration.

    Raises ValueError for a name that is taken, UndeclaredNeeds where the class is defined without its needs.
    """
    register_method(config_class)
    _REGISTERED[config_class] = method_class


def build_method(config: StageConfig) -> Method:
    """The method that `config.method` describes: the class `METHOD` of minillm/methods/<name>.py, or a registered one."""
    registered = _REGISTERED.get(type(config.method))
    return (registered or import_module(f"minillm.methods.{config.method.name}").METHOD)(config)
