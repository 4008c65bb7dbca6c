"""Classes of transformers that are recognized by the code of their forward, in any model.

The norms, MLPs, layers and heads of many models are the same lines in more than a hundred files
(`fastgpt.integrations.fingerprint`). `decoder_patterns` and `encoder_patterns` hold a class for each such forward,
which computes the same. The fingerprints are those of transformers 4.57 to 5.24; a class with other code is left as it
was.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from fastgpt.integrations.fingerprint import fingerprint
from fastgpt.integrations.replacement import Replacement


class Recognized(Replacement):
    """The base of these classes. A class that is replaced is only known when a model of it is there.

    code:    the fingerprints of forward.
    needs:   of further methods, by name.
    pattern: this class, in a class that is made of it.
    """

    pattern: ClassVar[type[Recognized]]
    code: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[dict[str, str]] = {}

    if TYPE_CHECKING:  # submodules and parameters of the class that is replaced

        def __getattr__(self, name: str) -> Any: ...

    @classmethod
    def fits(cls, kind: Any, found: str | None) -> bool:
        """Return whether a class, whose forward has this fingerprint, computes what this one does."""
        known = cls.needs.items()
        return found in cls.code and all(fingerprint(getattr(kind, name)) == code for name, code in known)

    @classmethod
    def members(cls, replaced: Any) -> dict[str, Any]:
        """Return further members of the class that takes the place of `replaced`."""
        return {}

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle the replaced class and the pattern: the class made of both has no name to import."""
        return _new, (type(self).replaces, type(self).pattern), self.__getstate__()


@functools.cache
def made(kind: Any, pattern: Any) -> type[Recognized]:
    """Make the class that takes the place of `kind` and computes its forward as `pattern` does."""
    names = {"replaces": kind, "pattern": pattern, "__doc__": kind.__doc__}
    names |= {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (pattern, kind), names | pattern.members(kind))


def _new(kind: Any, pattern: Any) -> nn.Module:
    """Make an empty module of a class for `pickle`, which fills it."""
    cls: Any = made(kind, pattern)
    module: nn.Module = cls.__new__(cls)
    return module
