"""The way from YAML files and `group.key=value` overrides to typed stages, or to every problem at once, with file and line."""
