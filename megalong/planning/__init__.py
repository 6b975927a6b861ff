"""What will a run cost: FLOPs, bytes, memory and time, predicted from the layout without a GPU or a process group."""
