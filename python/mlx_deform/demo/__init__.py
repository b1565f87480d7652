"""`python -m mlx_deform.demo` trains deformable and ordinary convolutions on handwritten digits.

`python -m mlx_deform`, one level up, shows the op alone.
"""
