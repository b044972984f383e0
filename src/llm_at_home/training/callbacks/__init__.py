"""Lightning callbacks, one file each: accumulation, clipping, power, memory, throughput, checkpoints."""
