"""Many processes: engines that share a finished model out over ranks, from outside."""
