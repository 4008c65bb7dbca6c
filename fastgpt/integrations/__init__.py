"""Families of models that `fastgpt.accelerate` knows: one small file each.

A file holds the classes that take the place of a library's: each a `Replacement` of one class, with its forward
written on `fastgpt.ops` and nothing else changed. To add a family, write such a file and add its line below;
`tests/integrations/test_accelerate.py` then needs a model of it. docs/integrations.md has the rules for the file.
"""

from __future__ import annotations

import importlib
import sys

from fastgpt.integrations.replacement import Replacement

# A family's file is imported once its library's module, on the left, has been: a model cannot be of it before.
FAMILIES = {
    "torch": "torch_modules",
    "transformers.activations": "activations",
    "transformers.models.gpt2.modeling_gpt2": "gpt2",
    "transformers.models.bert.modeling_bert": "bert",
    "transformers.models.electra.modeling_electra": "electra",
}


def replacements() -> dict[type, type[Replacement]]:
    """Every class that can be replaced, with what replaces it, of the libraries that are imported."""
    found: dict[type, type[Replacement]] = {}
    for library, family in FAMILIES.items():
        if library in sys.modules:
            module = importlib.import_module(f"{__name__}.{family}")
            found |= {cls.replaces: cls for cls in module.REPLACEMENTS}
    return found
