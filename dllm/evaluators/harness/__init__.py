"""The model of lm-eval's harness, and its task files."""
