"""Detectors of the DETR family in MLX: RT-DETR, RT-DETRv2, D-FINE and Deformable DETR."""
