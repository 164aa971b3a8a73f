"""One loop; what changes between stages is what trains, the loss and the data."""
