"""The only readers and writers of packed q, k, v and output-projection weights.

A layout is data: an `AttentionSpec` names, for each role, the tensor and the rows or columns of each head
(`spec`). `describe` makes a spec from a live module, dispatching on its class; `read_heads` and `write_heads`
interpret it for numpy arrays and torch tensors alike.
"""

from attnlens.layouts.read_write import read_heads, write_heads
from attnlens.layouts.spec import AttentionSpec, NormSpec, Refusal, Slot

__all__ = ["AttentionSpec", "NormSpec", "Refusal", "Slot", "read_heads", "write_heads"]
