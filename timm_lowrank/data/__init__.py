"""Images and their batches: held in memory, or streamed from parquet shards."""
