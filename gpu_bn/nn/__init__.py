"""gpu_bn for torch: layers, their functional form, and conversion of models.

This subpackage alone imports torch::

    from gpu_bn import nn

    model = nn.convert(model)
"""

try:
    import torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    hint = "gpu_bn.nn needs the package torch: pip install -e '.[torch]' in a clone of gpu_bn"
    raise ModuleNotFoundError(hint, name="torch") from error

from gpu_bn.nn.conversion import convert, freeze, insert_identity_, revert, unfreeze
from gpu_bn.nn.folding import fold, fuse_conv_bn_eval, fuse_conv_bn_weights, fuse_linear_bn_eval, fuse_linear_bn_weights
from gpu_bn.nn.functional import batch_norm
from gpu_bn.nn.modules import (
    BatchNorm,
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    FrozenBatchNorm2d,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
)
from gpu_bn.nn.report import Report
from gpu_bn.nn.running import checkpoint_contexts, no_tracking
from gpu_bn.nn.statistics import accumulate_statistics, update_population_stats
from gpu_bn.nn.sync import SyncBatchNorm, sync_batch_norm

__all__ = [
    "BatchNorm", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "FrozenBatchNorm2d", "LazyBatchNorm1d",
    "LazyBatchNorm2d", "LazyBatchNorm3d", "Report", "SyncBatchNorm", "accumulate_statistics", "batch_norm",
    "checkpoint_contexts", "convert", "fold", "freeze", "fuse_conv_bn_eval", "fuse_conv_bn_weights",
    "fuse_linear_bn_eval", "fuse_linear_bn_weights", "insert_identity_", "no_tracking", "revert", "sync_batch_norm",
    "unfreeze", "update_population_stats",
]  # fmt: skip
