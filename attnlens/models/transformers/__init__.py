"""Models other libraries wrote, described by data: Hugging Face transformers configurations and bare tensor names.

`describe_transformers` turns a ``config.json`` with a ``model_type`` and the stored tensors' names into an
`Architecture`; `describe_names` does so for a file about which nothing is known but its names and the head count.
Neither imports transformers or torch.
"""

from attnlens.models.by_tensor_names import describe_names
from attnlens.models.transformers.describe import describe_transformers, known_model_types, told_model_type

__all__ = ["describe_names", "describe_transformers", "known_model_types", "told_model_type"]
