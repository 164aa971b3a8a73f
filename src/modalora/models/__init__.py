"""The networks: each file holds a config, the module and its source."""
