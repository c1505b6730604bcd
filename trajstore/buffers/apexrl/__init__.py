"""ApexRL's buffers under the names, arguments and results that its users know.

Invariant: what is refused (always with an error that is also a ``ValueError``) leaves a buffer as it was.
"""

from trajstore.buffers.apexrl.distillation import DistillationBuffer
from trajstore.buffers.apexrl.replay import ReplayBuffer
from trajstore.buffers.apexrl.rollout import RolloutBuffer

__all__ = ["DistillationBuffer", "ReplayBuffer", "RolloutBuffer"]
