"""Time, memory and error of one workload with every provider, and of distributed training steps."""
