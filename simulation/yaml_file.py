"""Reading YAML files that people write: what is wrong is told in one line, with its place in the file."""
