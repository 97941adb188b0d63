"""A tour of the plugin in a few minutes on a CPU: `python -m quickstart.run` from the project root."""
