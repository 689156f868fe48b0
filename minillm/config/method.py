"""`method`: what the keys of every method have in common. Those of each are in minillm/config/methods/NAME_keys.py."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

from pydantic import Field
from pydantic.fields import FieldInfo

from minillm.config.keys import Strict
from minillm.config.needs import Needs, UndeclaredNeeds

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Divergence = Literal["forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd"]


class MethodConfig(Strict):
    """The keys of one method, and what the method needs. A subclass that does not define `needs` is refused."""

    summary: ClassVar[str]  # for the model card: what the student was trained by
    # Metrics of the method's steps that have a panel of their own in the report's picture: key -> (title, unit).
    panels: ClassVar[dict[str, tuple[str, str]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "needs" not in vars(cls) or "summary" not in vars(cls):
            raise UndeclaredNeeds(
                f"{cls.__name__} must define `needs`, what the method samples, reads and trains (minillm.config.needs.Needs), "
                "and `summary`, a phrase for the model card"
            )

    @classmethod
    def panels_of(cls, keys: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
        """The panels of a method with these keys, as a file has them."""
        return cls.panels

    def needs(self) -> Needs:
        """The needs of the method with these keys."""
        raise NotImplementedError

    def findings(self) -> Iterator[tuple[str, str, tuple[str, ...]]]:
        """Contradictions between the method's own keys: (key, message, the other keys that it comes from)."""
        return iter(())

    def idle_keys(self) -> Iterator[tuple[str, str, str]]:
        """Keys that another key leaves without effect: (key, message, that other key)."""
        return iter(())

    def unset_value(self, key: str) -> Any:
        """The value that a key has where nobody gives one."""
        return type(self).model_fields[key].default

    def value_without(self, need: str) -> Any:
        """The value of the key behind a need (Needs.because) at which the method no longer has it.

        Tried are the bounds and the choices of the key; None where none of them does away with the need.
        """
        key = self.needs().because[need]
        for value in _extremes(type(self).model_fields[key]):
            if not getattr(self.model_copy(update={key: value}).needs(), need):
                return value
        return None


def _extremes(field: FieldInfo) -> Iterator[Any]:
    for bound in ("ge", "le"):
        yield from (getattr(mark, bound) for mark in field.metadata if hasattr(mark, bound))
    if field.annotation is bool:
        yield from (False, True)
    if get_origin(field.annotation) is Literal:
        yield from get_args(field.annotation)
