"""Models built on the op. Each is imported on demand: `import mlx_deform.models.birefnet`."""
