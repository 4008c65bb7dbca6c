"""The namespace of the registered operators.

The repository for the Hugging Face Hub has a module of the same name, with a namespace of its own (kernels/hub).
"""

import torch

NAMESPACE = "fastgpt"
ops = torch.ops.fastgpt
