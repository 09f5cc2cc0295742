"""The continual-tuning loop and its stages."""

from cllava_fast.train.arguments import ContinualArguments
from cllava_fast.train.callbacks import ContinualCallback
from cllava_fast.train.loop import ContinualResult, ContinualTrainer, PreparedStream

__all__ = ["ContinualArguments", "ContinualCallback", "ContinualResult", "ContinualTrainer", "PreparedStream"]
