"""The configuration of a run: groups and keys (schema), YAML files and flags (reading)."""
