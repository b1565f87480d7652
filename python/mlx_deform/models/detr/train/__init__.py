"""The training demo: objects pasted on photographs, found and named by a small RT-DETRv2."""
