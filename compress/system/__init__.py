"""What every room needs of the machine: files, memory, processes, terminals, tensors on disk."""
