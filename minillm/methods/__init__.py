"""A file a method. The configuration's `method.name` is the name of the file, so that adding one edits none."""

from importlib import import_module

from minillm.config.root import StageConfig
from minillm.methods.protocol import Method


def build_method(config: StageConfig) -> Method:
    """The method that `config.method` describes: the class `METHOD` of minillm/methods/<name>.py."""
    return import_module(f"minillm.methods.{config.method.name}").METHOD(config)
