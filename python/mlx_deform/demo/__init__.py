"""`python -m mlx_deform.demo` trains a deformable and an ordinary convolution to align frames.

`python -m mlx_deform`, one level up, shows the op alone.
"""
