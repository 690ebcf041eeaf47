"""What the processes of a SyncBatchNorm send each other."""
