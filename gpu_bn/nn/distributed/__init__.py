"""The calls of SyncBatchNorm over several processes, and the packets that the processes exchange."""
