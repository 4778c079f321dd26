"""The Hub as a verb: what is published, where to, and what comes back."""

from loraformat.ops.sharing.pull import pull
from loraformat.ops.sharing.push import push
from loraformat.ops.sharing.report import PullReport, PushReport

__all__ = ["PullReport", "PushReport", "pull", "push"]
