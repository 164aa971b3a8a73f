"""The command line: one verb per file, each of which parses, calls one public function and prints."""
