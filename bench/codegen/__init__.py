"""Analysis of the compiled GPU kernels (registers, spills, instructions, occupancy), and tuning of tile sizes."""
