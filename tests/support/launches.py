"""What torch launches in a call: each of its operations but those that only make or look at tensors."""

from collections import Counter

import torch

LAUNCH_NOTHING = {"empty", "empty_strided", "empty_like", "new_empty", "view", "unbind", "split", "select", "slice",
                  "as_strided", "detach", "alias", "to", "expand", "permute"}  # fmt: skip
"""A conversion that is one is seen as what it calls."""


def operations(call):
    """torch's operations of a call that would launch a kernel, by autograd's thread too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        call()
    names = [event.name.removeprefix("aten::") for event in profile.events() if event.name.startswith("aten::")]
    return Counter(name for name in names if name not in LAUNCH_NOTHING)
